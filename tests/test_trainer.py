"""nanochat.trainer: killed, stopped, frozen, fed NaN, short of disk; a run ends well or goes on."""

import gc
import itertools
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat import checkpoint, scaling, trainer
from nanochat.checkpoint import build_model, list_steps, open_checkpoint
from nanochat.common import Choice, Rows, Runtime, StreamFlags
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss import gpu_chunk
from nanochat.optim import Bucket, MuonAdamW
from nanochat.scaling import CARDS, Card, depth_to_config, find_card, make_optimizer, memory_bytes
from nanochat.trainer import Meter, Run, read_metrics
from tests import launch
from tests.models import CPU, TOKENIZER, busy_gpt, random_ids, refuses

CONFIG = GPTConfig(sequence_len=64, vocab_size=64, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
EVERY = 5
FLAGS = "--depth=1 --aspect_ratio=32 --head_dim=16 --max_seq_len=64 --total_batch_size=256"
FLAGS += f" --eval_every=-1 --eval_tokens=256 --sample_every=-1 --save_every={EVERY} --log_every=1"
FLAGS += " --device_type=cpu --num_iterations=16"


# --- micro-batches


def row_choices(
    num_rows: int,
    size: Rows,
    seq_len: int,
    config: GPTConfig,
    runtime: Runtime,
    recompute: Choice = "auto",
) -> list[tuple[int, bool]]:
    cfg = StreamFlags(device_batch_size=size, recompute=recompute)
    found, choices = trainer.row_choices(cfg, num_rows * seq_len, seq_len, config, runtime)
    assert found == num_rows
    return choices


def test_rows_of_a_micro_batch_divide_those_of_a_rank() -> None:
    for device_batch_size, expected in ((8, 8), (16, 8), (4, 4), (1, 1)):
        assert row_choices(8, device_batch_size, 64, CONFIG, CPU) == [(expected, False)]
    refuses("--device_batch_size=4 or --device_batch_size=6", row_choices, 12, 5, 64, CONFIG, CPU)
    five = Runtime(CPU.device, CPU.dtype, 0, 5, "cpu")
    refuses("does not divide among 5 ranks", row_choices, 12, 4, 64, CONFIG, five)
    for num_tokens, said in ((1000, "use 512 or 1024"), (100, "use 512$")):
        refuses(said, trainer.row_choices, StreamFlags(), num_tokens, 512, CONFIG, CPU)
    assert row_choices(96, "auto", 64, CONFIG, CPU) == [(48, False)]  # 96 are above CPU_TOKENS
    assert row_choices(96, "auto", 10**6, CONFIG, CPU, "yes") == [(1, True)]


def be_a_gpu(monkeypatch: pytest.MonkeyPatch, card: Card, taken: float = 0) -> Runtime:
    """A GPU of which `taken` GiB are others', and one is this process's already."""
    free = int((card.memory_gib - taken - 1) * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, int(card.memory_gib * 2**30)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2**30)
    return Runtime(torch.device("cuda", 0), torch.bfloat16, 0, 1, card.name, card.capability)


def test_auto_finds_rows_for_every_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that fit, and more memory is never worse: first without recomputation, then in rows."""
    for depth, needed in ((4, 0), (12, 7), (20, 23)):
        config = depth_to_config(depth, 32768)
        best = []
        for card in sorted(CARDS, key=lambda card: card.memory_gib):
            runtime = be_a_gpu(monkeypatch, card)
            choices = row_choices(256, "auto", 2048, config, runtime)
            room = trainer.USABLE * card.memory_gib * 2**30
            chunk = gpu_chunk(card.memory_gib * 2**30)
            sizes = [
                memory_bytes(config, n, recompute=again, chunk=chunk)["total"]
                for n, again in choices
            ]
            assert max(sizes) <= room or choices == [(1, True)]
            assert max(sizes) <= room or card.memory_gib < needed, (depth, card)
            best.append((not choices[0][1], choices[0][0]))
            assert row_choices(256, 32, 2048, config, runtime) == [(32, False), (32, True)]
            assert row_choices(256, 32, 2048, config, runtime, "no") == [(32, False)]
            only = row_choices(256, "auto", 2048, config, runtime, "yes")
            assert only == [choice for choice in choices if choice[1]]
        assert best == sorted(best)


def test_auto_goes_by_the_memory_that_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    card, config = find_card("RTX 4090"), depth_to_config(12, 32768)
    assert card is not None
    first = [
        row_choices(256, "auto", 2048, config, be_a_gpu(monkeypatch, card, taken))[0]
        for taken in (0, 9, 14, 18.5)
    ]
    assert first == [(16, False), (8, False), (4, False), (1, True)]
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * 2**30)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2**30)
    mps = Runtime(torch.device("mps"), torch.float32, 0, 1, "mps")
    assert row_choices(256, "auto", 2048, config, mps)[0] == (4, False)


def choose_on_rank(rank: int) -> None:
    """Others have 15 GiB of the last rank's GPU: every rank has to try what fits there."""
    card, config = find_card("RTX 4090"), depth_to_config(12, 32768)
    assert card is not None
    runtime = replace(be_a_gpu(pytest.MonkeyPatch(), card, 15 * rank), rank=rank, world_size=2)
    assert row_choices(64, "auto", 2048, config, runtime)[0] == (4, False)


def test_ranks_try_the_same_micro_batches(tmp_path: Path) -> None:
    launch.on_ranks(2, tmp_path, choose_on_rank)


def test_auto_takes_the_first_micro_batch_that_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def forward(model: GPT, ids: torch.Tensor, targets: Any, reduction: str = "") -> torch.Tensor:
        tried.append((len(ids), model.recompute))
        if len(ids) > (5 if model.recompute else 2):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ids.sum() * torch.ones((), requires_grad=True)

    model = build_model(CONFIG, None, CPU)
    optimizer = make_optimizer(model, 32, 4)
    monkeypatch.setattr(GPT, "forward", forward)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: partial(function))

    def compile_for_training(*choices: tuple[int, bool]) -> Any:
        return trainer.compile_for_training(model, optimizer, "yes", list(choices), 64)

    choices = (4, False), (3, False), (12, True), (4, True), (3, True)
    assert compile_for_training(*choices) == 4 and model.recompute
    assert tried == list(choices[:4])
    assert "4 rows at a time on each device, activations recomputed" in capsys.readouterr().out
    told = "--device_batch_size=6; try --device_batch_size=3"
    refuses(told, compile_for_training, (12, False), (6, False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rehearsed_step_changes_nothing(dtype: torch.dtype) -> None:
    """Neither weights nor moments, nor the number of steps, nor the loss's scale."""
    model = busy_gpt(CONFIG)
    model.compute_dtype = dtype
    optimizer = make_optimizer(model, 256, 9)
    ids = random_ids(4, 64, 64)

    def everything() -> list[torch.Tensor]:
        kept = [shard.values for shard in optimizer.export_state().values()]
        return [tensor.clone() for tensor in [*kept, *model.parameters()]]

    for _ in range(2):
        before = everything()
        model(ids, ids, reduction="sum").backward()
        trainer.rehearse_step(optimizer)
        assert all(map(torch.equal, before, everything()))
        optimizer.zero_grad()
        model(ids, ids).backward()
        optimizer.step()
        assert not any(map(torch.equal, before, everything()))


# --- the run folder


def settings(**changes: Any) -> dict[str, Any]:
    return {"fresh": False, "run": "dummy", "log_every": 1, "seed": 0, **changes}


def start(run: Run, model: GPT, optimizer: MuonAdamW | None = None, rows: int = 4) -> Meter:
    return run.start(model, optimizer or make_optimizer(model, 32, 4), TOKENIZER, rows)


def test_a_run_folder_belongs_to_one_process(base: Path) -> None:
    with Run("base", "d1", settings(), CPU):
        refuses(f"being trained in by process {os.getpid()}", Run, "base", "d1", settings(), CPU)
    with Run("base", "d1", settings(), CPU) as run:
        assert not run.is_finished


def test_records_line_and_resume(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three steps, a save after the second: the file is cut back, and has each step once."""
    model = build_model(CONFIG, None, CPU)
    optimizer = make_optimizer(model, 32, 4)

    def step(run: Run, meter: Meter) -> None:
        meter.start_step()
        run.advance((run.step + 1) / 4)
        meter.log_step(torch.tensor(1.5), lr_multiplier=0.5, num_tokens=32)

    with Run("base", "d1", settings(), CPU) as run:
        meter = start(run, model, optimizer)
        assert gc.get_freeze_count() > 0
        meter.note(val_bpb=3.0)
        step(run, meter)
        step(run, meter)
        run.save()
        meter.note(val_bpb=2.0)
        step(run, meter)
    assert gc.get_freeze_count() == 0
    assert "step 00003/00004 (75.0%) | loss 1.5000 | lrm 0.500" in capsys.readouterr().out
    assert [record["step"] for record in read_metrics(run.folder)] == [0, 1, 2]
    refuses(r"--seed was 0, is 1.*--fresh", Run, "base", "d1", settings(seed=1), CPU)
    # What does not change the weights may differ.
    with Run("base", "d1", settings(log_every=2), CPU) as run:
        meter = start(run, model)
        assert (run.step, meter.tokens) == (2, 64)
        meter.note(val_bpb=2.0)
        step(run, meter)
        step(run, meter)
        run.save()
        run.finish()
    records = read_metrics(run.folder)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert records[0]["val_bpb"] == 3.0 and records[2]["val_bpb"] == 2.0
    names = {"step", "progress", "tokens", "seconds", "loss", "lrm", "tok_per_second", "mfu"}
    assert names <= records[4].keys()
    with Run("base", "d1", settings(), CPU) as run:
        assert run.is_finished
    away = run.folder.with_name("away")
    checkpoint.step_dir(run.folder, 4).rename(away)  # as if deleted by hand
    with Run("base", "d1", settings(), CPU) as run:
        assert not run.is_finished and run.step == 2
    away.rename(checkpoint.step_dir(run.folder, 4))
    (run.folder / ".fresh").touch()  # stages.sh asks for --fresh as long as it is there
    with Run("base", "d1", settings(fresh=True), CPU) as run:
        assert not run.is_finished and run.step == 0 and not (run.folder / ".fresh").exists()


def test_a_run_of_an_older_architecture_keeps_it_and_is_not_resumed(base: Path) -> None:
    """The weights have the same shapes, and do something else."""
    model = build_model(replace(CONFIG, shifted_keys=False), None, CPU)
    optimizer = make_optimizer(model, 32, 4)
    with Run("base", "d1", settings(), CPU) as run:
        start(run, model, optimizer)
        run.advance(0.25)
        run.save()
    state = open_checkpoint(run.folder, 1).state
    del state["model_config"]["shifted_keys"]
    older = checkpoint.Checkpoint(run.folder, state, "")
    assert older.model_config == model.config
    with Run("base", "d1", settings(), CPU) as run:
        new = build_model(CONFIG, None, CPU)
        refuses("an older architecture.*--fresh", run.restore, new, optimizer)
        assert run.restore(model, optimizer) is None


def test_mfu_outlives_a_peak_measured_on_a_busy_machine(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "measure_flops", lambda _: 1.0)
    monkeypatch.setattr(trainer, "measure_flops", lambda _, seconds: 1e15)
    with Run("base", "d1", settings(), CPU) as run:
        meter = start(run, build_model(CONFIG, None, CPU))
        run.advance(0.5)
        meter.log_step(torch.tensor(1.5), lr_multiplier=0.5, num_tokens=32)
        assert 0 < meter.record["mfu"] < 1


def test_a_link_to_another_run_is_not_trained_in(base: Path) -> None:
    with Run("base", "d1", settings(), CPU) as run:
        (run.folder / "kept").touch()
    (base / "base/d1-owl").symlink_to("d1")
    for fresh in (False, True):
        refuses("a link to another run", Run, "base", "d1-owl", settings(fresh=fresh), CPU)
    assert (run.folder / "kept").exists()


SAVED = {
    "own": "-",
    "seed": 0,
    "num_slots": 64,
    "weights": "a1",
    "corpus": "primer",
    "data": "",
    "gone": 7,
}


def test_settings_that_a_run_may_go_on_with() -> None:
    before = {name: value for name, value in SAVED.items() if name != "gone"}
    good: tuple[dict[str, Any], ...] = (
        {"num_slots": 32, "eval_problems": 9, "eval_samples": 1},
        {"source": "mid", "model_tag": "d2", "step": 300},  # the same weights
        {"data": "primer"},  # the same corpus, by its name
        {"custom": ["me.jsonl"]},  # the same content
        {"came": 2},
    )
    for now in good:
        trainer.check_settings(Path("d2"), SAVED, before | now)
    for now, said in (
        ({"corpus": "mine"}, r"--data was primer, is mine\)"),  # the one prepared last is another
        ({"own": "c3"}, "what --custom or --identity hold was -, is c3"),
        ({"weights": "b2"}, "the model that it starts from was a1, is b2"),
        ({"seed": 1, "came": 2}, r"\(--seed was 0, is 1\); use those, or --fresh"),
    ):
        refuses(said, trainer.check_settings, Path("d2"), SAVED, before | now)


def test_out_of_memory_names_the_flag_and_loses_no_step(base: Path) -> None:
    def exhaust() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def run_out_of_memory() -> None:
        with Run("base", "d1", settings(), CPU) as run:
            start(run, build_model(CONFIG, None, CPU), rows=12)
            run.advance(0.25)
            if in_an_update:
                run.optimizer.step = exhaust
                run.update(1.0, 0.95, 0.0)
            exhaust()

    for in_an_update in (True, False):
        refuses("--device_batch_size=12; try --device_batch_size=6$", run_out_of_memory)
        assert list_steps(base / "base/d1") == ([] if in_an_update else [1])


class FakeWandb:
    """wandb, whose calls that are named in `broken` fail."""

    Error, Settings = RuntimeError, dict

    def __init__(self, broken: str, key: str) -> None:
        self.broken, self.api, self.records = broken, SimpleNamespace(api_key=key), []

    def init(self, mode: str = "online", **_: Any) -> "FakeWandb":
        if mode in self.broken:
            raise self.Error(f"{mode} fails")
        return self

    def log(self, record: dict[str, Any], step: int) -> None:
        if "log" in self.broken:
            raise ConnectionError("log fails")
        self.records.append((step, record["step"]))

    def finish(self) -> None:
        if "finish" in self.broken:
            raise ConnectionError("finish fails")


@pytest.mark.parametrize(
    ("broken", "key", "said", "num_records"),
    [
        ("", "k", "", 2),
        ("", "", "wandb: nobody is logged in; logging to ", 2),
        ("online", "k", "wandb: online fails; logging to ", 2),
        ("online offline", "k", "wandb: offline fails; training without it", 0),
        ("log", "k", "wandb: log fails; going on without it", 0),
        ("finish", "k", "wandb: finish fails", 2),
    ],
)
def test_wandb_never_stops_a_run(
    broken: str, key: str, said: str, num_records: int, base: Path, monkeypatch: Any, capsys: Any
) -> None:
    wandb = FakeWandb(broken, key)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with Run("base", "d1", settings(run="mine"), CPU) as run:
        meter = start(run, build_model(CONFIG, None, CPU))
        run.advance(0.5)
        meter.log_step(torch.tensor(1.5), 1.0, 32)
        run.finish()
    assert wandb.records == [(0, 0), (1, 1)][:num_records]
    lines = [line for line in capsys.readouterr().out.splitlines() if "wandb" in line]
    assert len(lines) == bool(said) and all(said in line for line in lines)


# --- whole runs, on ranks that can be killed


def flags(steps: int, *more: str) -> list[str]:
    return [*FLAGS.split(), f"--num_iterations={steps}", *more]


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


# --- interrupted


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


def run_out_of_time(num_steps: int) -> None:
    """After so many steps the time is up on the last rank."""
    advance, made = Run.advance, itertools.count(1)

    def advancing(self: Run, progress: float) -> None:
        advance(self, progress)
        if next(made) == num_steps and self.runtime.rank == 1:
            self.stop_time = 0.0

    Run.advance = advancing


def steps_in(said: str) -> list[int]:
    return [int(line[5:10]) for line in said.splitlines() if line.startswith("step ")]


def interrupt(
    base_dir: Path, script: str, flags: list[str], kind: str, draw: random.Random
) -> bool:
    """Stop two ranks inside a save, or some steps after their start by a signal, as torchrun sends
    it to all; False if they had finished before.
    """
    meddle = {
        "save": partial(die_inside_a_save, draw.randint(1, 15)),
        "limit": partial(run_out_of_time, draw.randint(1, 3)),
    }
    group = launch.start(base_dir, script, flags, 2, meddle.get(kind))
    if kind not in meddle:
        num_steps = draw.randint(1, 3)
        while len(steps_in(group.log.read_text())) < num_steps and group.processes[0].is_alive():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.02))
        group.signal(signal.Signals[kind])
    codes, said = group.wait(), group.log.read_text()
    [run] = base_dir.glob(f"{STAGES[script][0]}/d1")
    saved, last = max(list_steps(run), default=0), max(steps_in(said), default=0)
    # A save that was still being written when all died is lost, the one before it never is.
    assert saved >= (last // EVERY - 1) * EVERY, said
    if kind not in ("save", "SIGKILL") and any(codes):
        timed = kind in ("SIGUSR1", "limit")
        assert codes == [75 if timed else 128 + signal.Signals[kind]] * 2 and saved == last, said
        assert "the same command" in said  # told by the first, which may learn it from the other
    return any(codes)


KINDS = ("limit", "save", "SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
CHAT = f"--source=base --device_type=cpu --save_every={EVERY} --log_every=1 --eval_every=-1"
CHAT += " --device_batch_size=4"
PACKED = f"{CHAT} --mixture=primer --num_iterations=16 --total_batch_size=256 --max_seq_len=64"
PACKED += " --eval_tokens=256"
ROLLED_OUT = f"{CHAT} --task=primer-exact --num_steps=16 --questions_per_step=2 --num_samples=4"
ROLLED_OUT += " --max_tokens=8 --num_slots=4 --eval_problems=4 --eval_samples=1"
STAGES = {
    "base_train": ("base", FLAGS),
    "mid_train": ("mid", PACKED),
    "chat_sft": ("sft", PACKED),
    "chat_rl": ("rl", ROLLED_OUT),
}


def check_interruptions(source: Path, folder: Path, script: str, num_runs: int) -> None:
    """A run that is interrupted in every way ends as the one that nobody interrupted."""
    stage, text = STAGES[script]
    whole = Path(shutil.copytree(source, folder / "whole"))
    finish(whole, text.split(), 2, script)
    draw = random.Random(0)
    for number in range(num_runs):
        base_dir = Path(shutil.copytree(source, folder / f"run_{number}"))
        stops = [interrupt(base_dir, script, text.split(), kind, draw) for kind in KINDS]
        assert sum(stops) >= 3
        finish(base_dir, text.split(), 2, script)
        assert end_state(base_dir, stage) == end_state(whole, stage), number
        assert not [*base_dir.glob("*/d1/*.partial"), *base_dir.glob("*/d1/*.deleted")]


@pytest.mark.parametrize("num_runs", [1, pytest.param(4, marks=pytest.mark.long)])
def test_interrupted_at_any_instant(prepared: Path, tmp_path: Path, num_runs: int) -> None:
    check_interruptions(prepared, tmp_path, "base_train", num_runs)


@pytest.mark.long
@pytest.mark.parametrize("script", ["mid_train", "chat_sft", "chat_rl"])
def test_every_stage_interrupted(base_dir: Path, tmp_path: Path, script: str) -> None:
    finish(base_dir, [*flags(6), "--max_seq_len=128"], 1)
    check_interruptions(base_dir, tmp_path, script, 2)


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
    group.wait_for("SIGTERM: saving; a second one")
    time.sleep(1.2)
    assert group.processes[0].is_alive()
    group.signal(signal.SIGTERM)
    assert group.wait() == [143] and time.monotonic() - begin < 9
    assert list_steps(run_of(base_dir)) == []


def name_micro_batches() -> None:
    """Each is named, and slow; a hangup is ignored, as under nohup, if and only if that is said."""
    forward, number = GPT.forward, itertools.count()
    signal.signal(signal.SIGHUP, signal.SIG_IGN if "IGNORED" in os.environ else signal.SIG_DFL)

    def named(self: GPT, *arguments: Any, **options: Any) -> torch.Tensor:
        trainer.print0(f"micro-batch {next(number)}")
        time.sleep(0.05)
        return forward(self, *arguments, **options)

    GPT.forward = named


ONE_BY_ONE = ("--total_batch_size=4096", "--device_batch_size=1")  # 64 micro-batches a step


def test_a_signal_is_heard_between_micro_batches(base_dir: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(base_dir, tmp_path / "whole"))
    finish(whole, flags(2, *ONE_BY_ONE), 1)
    for number in (signal.SIGTERM, signal.SIGHUP):
        group = launch.start(base_dir, "base_train", flags(2, *ONE_BY_ONE), 1, name_micro_batches)
        group.wait_for("micro-batch 9")
        group.signal(number)
        assert group.wait() == [128 + number]
        after = group.log.read_text().split(": saving; a second one")[1]
        assert after.count("micro-batch") <= 1
    finish(base_dir, flags(2, *ONE_BY_ONE), 1)
    assert end_state(base_dir) == end_state(whole)


def test_a_hangup_that_is_ignored_stays_ignored(base_dir: Path) -> None:
    ignored = {"IGNORED": "1"}
    group = launch.start(base_dir, "base_train", flags(9), 1, name_micro_batches, ignored)
    group.wait_for("micro-batch 3")
    group.signal(signal.SIGHUP)
    assert group.wait() == [0] and "SIGHUP" not in group.log.read_text()


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
    start_reduction, last = MuonAdamW.start_reduction, os.environ["RANK"] == "1"
    calls = itertools.count()  # one for each bucket of a step

    def poisoned(self: MuonAdamW, bucket: Bucket) -> Any:
        gradient = bucket.params[0].grad
        step = next(calls) // len(self.buckets)
        if last and step in steps and bucket.stacked and gradient is not None:
            gradient.view(-1)[0] = float("nan")
        return start_reduction(self, bucket)

    MuonAdamW.start_reduction = poisoned


def test_a_loss_that_is_not_finite_counts_though_its_scale_may_fall(base: Path) -> None:
    with Run("base", "d1", settings(), CPU) as run:
        meter = start(run, build_model(CONFIG, None, CPU))

        def log(loss: float) -> None:
            meter.start_step()
            run.advance(0.1)
            meter.log_step(torch.tensor(loss), 1.0, 32, finite=torch.tensor(True))

        for loss in (math.nan, 1.5, math.inf, math.inf):
            log(loss)
        refuses("3 steps in a row, up to step 5", log, math.nan)


def test_steps_not_finite_are_skipped_and_three_in_a_row_stop_the_run(base_dir: Path) -> None:
    few_lines = flags(12, "--log_every=4")
    group = launch.start(base_dir, "base_train", few_lines, 2, partial(poison, 1, 2, 5, 6, 7))
    assert group.wait() == [1, 1]
    said = group.log.read_text()
    assert "| 2 steps skipped, not finite" in said.split("step 00004/")[1]
    assert "not finite in 3 steps in a row, up to step 8" in said and "by document" in said
    assert said.count("error:") == 2 and "Traceback" not in said
    run = run_of(base_dir)
    losses = [record["loss"] for record in read_metrics(run)[1:]]
    assert all(loss == loss for loss in losses) and losses[4] < losses[0]
    assert list_steps(run) == [5]
    weights = open_checkpoint(run, 5).load_weights(torch.device("cpu"))
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


def fill_after_a_save(disk: Path) -> None:
    """Once a checkpoint is on the disk, leave 300 KB on it, of which the next takes more."""
    commit = checkpoint.commit

    def committing(partial: Path, final: Path) -> None:
        commit(partial, final)
        free = os.statvfs(disk)
        (disk / "ballast").write_bytes(b"x" * (free.f_bavail * free.f_frsize - 300_000))

    checkpoint.commit = committing


def test_a_full_or_read_only_disk_leaves_the_old_save(prepared: Path, small_disk: Path) -> None:
    base_dir = Path(shutil.copytree(prepared, small_disk / "base_dir"))
    log = small_disk.parent / "log"  # not on that disk
    log.mkdir()

    def start(world_size: int, meddle: Callable[[], None] | None = None) -> launch.Group:
        steps, where = flags(2 * EVERY, "--keep_last=0"), {"NANOCHAT_BASE_DIR": str(base_dir)}
        return launch.start(log, "base_train", steps, world_size, meddle, where)

    group = start(2, partial(fill_after_a_save, small_disk))
    assert group.wait(30) == [1, 1], group.log.read_text()
    said = group.log.read_text()
    assert "step_000010: [Errno 28] No space left" in said and "Traceback" not in said, said
    run = run_of(base_dir)
    assert list_steps(run) == [EVERY] and not list(run.glob("*.partial"))
    open_checkpoint(run, EVERY)

    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    group = start(1)
    assert group.wait() == [1]
    said = group.log.read_text()
    assert said.count("\n") == 1 and "cannot write" in said and "Read-only file system" in said
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    group = start(1)
    assert group.wait() == [0], group.log.read_text()
