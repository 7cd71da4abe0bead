"""Killed, stopped, frozen, fed with nonsense, short of disk or memory: a run ends well, or goes on as if nothing had been."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import checkpoint, trainer
from nanochat.checkpoint import list_steps
from nanochat.common import Runtime, UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import Bucket, MuonAdamW
from nanochat.trainer import TrainRun, read_metrics
from tests import launch

EVERY = 5
MODEL = "--depth=1 --aspect_ratio=32 --head_dim=16 --max_seq_len=64 --total_batch_size=256"
FLAGS = f"{MODEL} --eval_every=-1 --eval_tokens=256 --sample_every=-1 --save_every={EVERY} --log_every=1 --device_type=cpu"


def flags(steps: int, *more: str) -> list[str]:
    return [*FLAGS.split(), f"--num_iterations={steps}", *more]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        launch.prepare()
    return folder


@pytest.fixture
def base_dir(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "base_dir"))


def run_of(base_dir: Path) -> Path:
    return base_dir / "base" / "d1"


def end_state(base_dir: Path, stage: str = "base") -> dict[str, Any]:
    """All that must not differ: every byte of the last checkpoint but times, and the loss curve."""
    run = base_dir / stage / "d1"
    folder = checkpoint.step_dir(run, list_steps(run)[-1])
    names = [path.name for path in folder.iterdir() if path.name[:5] in ("model", "optim", "rank_")]
    curve = [(r["step"], r["tokens"], r.get("loss"), r.get("val_bpb")) for r in read_metrics(run)]
    return {name: (folder / name).read_bytes() for name in names} | {"curve": curve}


def finish(base_dir: Path, flags: list[str], world_size: int, script: str = "base_train") -> str:
    """Run to the end; returns what was printed."""
    group = launch.start(base_dir, script, flags, world_size)
    assert group.wait() == [0] * world_size, group.log.read_text()
    return group.log.read_text()


def uninterrupted(prepared: Path, folder: Path, steps: int, world_size: int) -> dict[str, Any]:
    shutil.copytree(prepared, folder)
    finish(folder, flags(steps), world_size)
    return end_state(folder)


# --- killed


def die_inside_a_save(number: int) -> None:
    """SIGKILL for all ranks at the `number`-th thing that a save does to the disk."""
    calls = 0

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def dying(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                os.killpg(0, signal.SIGKILL)
            return function(*arguments, **options)

        return dying

    for name in ("save_file", "write_file", "fsync", "file_digest", "commit", "discard"):
        setattr(checkpoint, name, before(getattr(checkpoint, name)))


def steps_in(said: str) -> list[int]:
    return [int(line[5:10]) for line in said.splitlines() if line.startswith("step ")]


def kill(
    base_dir: Path, script: str, flags: list[str], draw: random.Random, inside: bool
) -> str | None:
    """What a run of two ranks printed until it was killed; None where it was finished before the signal came."""
    meddle = partial(die_inside_a_save, draw.randint(1, 30)) if inside else None
    group = launch.start(base_dir, script, flags, 2, meddle)
    if not inside:
        steps = int(next(flag for flag in flags if "num_" in flag).split("=")[1])
        text = f"step {draw.randint(1, steps - 2):05d}/" if draw.random() < 0.9 else ""
        group.wait_for(text)
        time.sleep(draw.uniform(0, 0.1))
        group.signal(signal.SIGKILL)
    return group.log.read_text() if any(group.wait()) else None


def kill_and_finish(
    source: Path, base_dir: Path, script: str, flags: list[str], draw: random.Random, inside: bool
) -> None:
    """Kill a run once, at a random instant or inside a save; start it again until it is finished."""
    printed = None
    while printed is None:
        shutil.rmtree(base_dir, ignore_errors=True)
        shutil.copytree(source, base_dir)
        printed = kill(base_dir, script, flags, draw, inside)
    said = finish(base_dir, flags, 2, script)
    begun = int(said.split(" at step ")[1].split("\n")[0]) if "resuming" in said else 0
    # A save that was still being written when all died is lost, the one before it never is.
    assert begun >= (max(steps_in(printed), default=0) // EVERY - 1) * EVERY, said
    assert not [*base_dir.glob("*/d1/*.partial"), *base_dir.glob("*/d1/*.deleted")]


@pytest.mark.parametrize(
    ("num_kills", "steps"), [(4, 14), pytest.param(50, 60, marks=pytest.mark.long)]
)
def test_killed_at_any_instant(prepared: Path, tmp_path: Path, num_kills: int, steps: int) -> None:
    expected = uninterrupted(prepared, tmp_path / "whole", steps, 2)
    draw = random.Random(0)
    for number in range(num_kills):
        folder = tmp_path / f"killed_{number}"
        inside = number % 2 == 0
        kill_and_finish(prepared, folder, "base_train", flags(steps), draw, inside)
        assert end_state(folder) == expected, number
        shutil.rmtree(folder)


CHAT = f"--source=base --device_type=cpu --save_every={EVERY} --log_every=1 --eval_every=-1 --device_batch_size=4"
PACKED = (
    "--mixture=primer --num_iterations=20 --total_batch_size=256 --max_seq_len=64 --eval_tokens=256"
)
STAGES = {
    "mid_train": ("mid", f"{CHAT} {PACKED}"),
    "chat_sft": ("sft", f"{CHAT} {PACKED}"),
    "chat_rl": ("rl", f"{CHAT} --task=primer-exact --num_steps=20 --questions_per_step=2 --num_samples=4 "
    "--max_tokens=8 --num_slots=4 --eval_problems=4 --eval_samples=1"),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("script", STAGES)
def test_every_stage_killed_at_five_instants(prepared: Path, tmp_path: Path, script: str) -> None:
    stage, text = STAGES[script]
    folder = Path(shutil.copytree(prepared, tmp_path / "base_dir"))
    finish(folder, [*flags(6), "--max_seq_len=128"], 1)
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    finish(whole, text.split(), 2, script)
    draw = random.Random(0)
    for number in range(5):
        killed = tmp_path / f"killed_{number}"
        kill_and_finish(folder, killed, script, text.split(), draw, inside=number % 2 == 0)
        assert end_state(killed, stage) == end_state(whole, stage), number


# --- stopped


def stop(base_dir: Path, steps: int, number: int, at_step: int) -> None:
    """A signal to all ranks, as torchrun sends it; the run is saved, and goes on."""
    group = launch.start(base_dir, "base_train", flags(steps), 2)
    group.wait_for(f"step {at_step:05d}/")
    group.signal(number)
    codes = group.wait()
    said = group.log.read_text()
    assert codes in ([128 + number] * 2, [0, 0]), said
    if codes[0]:
        assert list_steps(run_of(base_dir))[-1] == max(steps_in(said)), said
        assert f"{signal.Signals(number).name}: saving" in said and "the same command" in said


@pytest.mark.parametrize(
    ("steps", "stops"), [(12, 2), pytest.param(60, 20, marks=pytest.mark.long)]
)
def test_stopped_by_a_signal(prepared: Path, tmp_path: Path, steps: int, stops: int) -> None:
    expected = uninterrupted(prepared, tmp_path / "whole", steps, 2)
    folder = tmp_path / "stopped"
    shutil.copytree(prepared, folder)
    for i in range(stops):
        at_step = 1 + i * (steps - 4) // stops
        stop(folder, steps, signal.SIGINT if i % 4 == 1 else signal.SIGTERM, at_step)
    finish(folder, flags(steps), 2)
    assert end_state(folder) == expected


def slow_steps() -> None:
    """Steps of ten seconds, so that a signal finds the run inside one."""
    step = MuonAdamW.step

    def slow(self: MuonAdamW) -> torch.Tensor:
        finite = step(self)
        trainer.print0("inside a step")
        until = time.monotonic() + 10
        while time.monotonic() < until:
            time.sleep(0.05)
        return finite

    MuonAdamW.step = slow


def test_a_second_signal_exits_at_once(base_dir: Path) -> None:
    group = launch.start(base_dir, "base_train", flags(9), 1, slow_steps)
    group.wait_for("inside a step")
    begin = time.monotonic()
    group.signal(signal.SIGTERM)
    group.signal(signal.SIGTERM)  # passed on twice: still the first one
    group.wait_for("SIGTERM: saving after this step")
    time.sleep(1.2)
    assert group.processes[0].is_alive()
    group.signal(signal.SIGTERM)
    assert group.wait() == [143] and time.monotonic() - begin < 9
    assert list_steps(run_of(base_dir)) == []


def test_a_frozen_rank_ends_the_job_with_its_stacks(base_dir: Path) -> None:
    group = launch.start(base_dir, "base_train", flags(2000), 2, None, {"NANOCHAT_TIMEOUT": "3"})
    group.wait_for("/step_000005\n")
    group.signal(signal.SIGSTOP, rank=1)
    group.processes[0].join(60)
    assert group.processes[0].exitcode not in (0, None)
    group.wait(0)
    said = group.log.read_text()
    assert "Timeout (0:00:03)!" in said and "most recent call first" in said
    assert list_steps(run_of(base_dir)) == [5]


# --- not finite


def poison(*steps: int) -> None:
    """On the last rank the gradients of these steps (from 0) have a NaN in them."""
    step, start_reduction = MuonAdamW.step, MuonAdamW.start_reduction
    last, number = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1, 0

    def counting(self: MuonAdamW) -> torch.Tensor:
        nonlocal number
        number += 1
        return step(self)

    def poisoned(self: MuonAdamW, bucket: Bucket) -> None:
        gradient = bucket.params[0].grad
        if last and number in steps and bucket.stacked and gradient is not None:
            gradient.view(-1)[0] = float("nan")
        start_reduction(self, bucket)

    MuonAdamW.step, MuonAdamW.start_reduction = counting, poisoned


def test_steps_that_are_not_finite_are_skipped_and_counted(base_dir: Path) -> None:
    group = launch.start(base_dir, "base_train", flags(8), 2, partial(poison, 2, 3, 5))
    assert group.wait() == [0, 0], group.log.read_text()
    assert "| 3 steps skipped, not finite" in group.log.read_text().split("step 00008/")[1]
    losses = [record["loss"] for record in read_metrics(run_of(base_dir))[1:]]
    assert all(loss == loss for loss in losses) and losses[7] < losses[0]


def test_three_in_a_row_stop_the_run(base_dir: Path) -> None:
    group = launch.start(
        base_dir, "base_train", flags(12, "--log_every=4"), 2, partial(poison, 4, 5, 6)
    )
    assert group.wait() == [1, 1]
    said = group.log.read_text()
    assert "not finite in 3 steps in a row, up to step 7" in said and "by document" in said
    assert said.count("error:") == 2 and "Traceback" not in said
    run = run_of(base_dir)
    assert list_steps(run) == [5]
    weights = checkpoint.open_checkpoint(run, 5).load_weights(torch.device("cpu"))
    assert all(tensor.isfinite().all() for tensor in weights.values())


# --- disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Leave 300 KB, of which a checkpoint takes more."""
    there = os.statvfs(disk)
    (disk / "ballast").write_bytes(b"x" * (there.f_bavail * there.f_frsize - 300_000))


def test_a_full_or_read_only_disk_leaves_the_old_checkpoint(
    prepared: Path, small_disk: Path
) -> None:
    base_dir = Path(shutil.copytree(prepared, small_disk / "base_dir"))
    steps = flags(2 * EVERY, "--keep_last=0")
    log = small_disk.parent / "log"  # not on that disk
    log.mkdir()
    where = {"NANOCHAT_BASE_DIR": str(base_dir)}
    group = launch.start(log, "base_train", steps, 2, partial(fill_at, str(small_disk)), where)
    assert group.wait(30) == [1, 1], group.log.read_text()
    said = group.log.read_text()
    assert "cannot save: [Errno 28] No space left" in said and "Traceback" not in said, said
    run = run_of(base_dir)
    assert list_steps(run) == [EVERY] and not list(run.glob("*.partial"))
    checkpoint.open_checkpoint(run, EVERY)

    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    group = launch.start(log, "base_train", steps, 1, None, where)
    assert group.wait() == [1]
    said = group.log.read_text()
    assert said.count("\n") == 1 and "cannot write" in said and "Read-only file system" in said
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    group = launch.start(log, "base_train", steps, 1, None, where)
    assert group.wait() == [0], group.log.read_text()


def fill_at(disk: str) -> None:
    """The disk fills up once the first checkpoint is on it."""
    commit = checkpoint.commit

    def committing(partial: Path, final: Path) -> None:
        commit(partial, final)
        fill(Path(disk))

    checkpoint.commit = committing


# --- memory

CPU = Runtime(torch.device("cpu"), torch.float32, 0, 1, "cpu")
CONFIG = GPTConfig(sequence_len=64, vocab_size=64, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)


def test_out_of_memory_names_the_flag_and_a_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    settings = {"fresh": False, "run": "dummy", "log_every": 1, "device_batch_size": 12}
    with (
        pytest.raises(UserError, match=r"--device_batch_size=12; try --device_batch_size=6$"),
        TrainRun("base", "d1", settings, CPU),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "smaller --depth" in str(trainer.out_of_memory(1))


def test_auto_takes_the_first_micro_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trainer.row_choices(96, "auto", 64, CONFIG, CPU) == [48]  # 96 rows are above CPU_TOKENS
    assert trainer.row_choices(96, "auto", 10**6, CONFIG, CPU) == [1]
    assert trainer.row_choices(96, 32, 64, CONFIG, CPU) == [32]
    tried = []

    def loss(ids: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
        tried.append(len(ids))
        if len(ids) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ids.sum() * torch.ones((), requires_grad=True)

    model = checkpoint.build_model(CONFIG, None, CPU)
    monkeypatch.setattr(
        GPT, "forward", lambda self, *arguments, **options: loss(*arguments, **options)
    )
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    guard = trainer.Guard(CPU)
    _, rows = trainer.compile_for_training(model, "yes", [12, 6, 4, 3], 64, guard)
    assert rows == 4 and tried == [12, 6, 4]
    with pytest.raises(UserError, match="--device_batch_size=6; try --device_batch_size=3"):
        trainer.compile_for_training(model, "yes", [12, 6], 64, guard)
