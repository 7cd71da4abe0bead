"""The same command on 1, 2 and 4 ranks: the same batches, the same losses, and a run begun on some goes on on others."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nanochat.trainer import TrainRun, read_metrics
from tests import launch

STEPS = 6
FLAGS = (
    "--depth=2 --aspect_ratio=16 --head_dim=16 --max_seq_len=64 --total_batch_size=512 --device_batch_size=1 "
    "--num_iterations=400 --eval_every=2 --eval_tokens=512 --save_every=3 --log_every=2 --device_type=cpu"
)
DEPTH_4 = (
    "--depth=4 --head_dim=64 --max_seq_len=256 --total_batch_size=4096 --device_batch_size=4 --num_iterations=2000 "
    "--eval_every=-1 --eval_tokens=4096 --save_every=-1 --log_every=10 --device_type=cpu"
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        launch.prepare()
    return folder


def note_and_die() -> None:
    """The same, and the process ends before step 4 is counted."""
    launch.note_batches()
    update = TrainRun.update

    def dying(run: TrainRun, *arguments: Any) -> None:
        if run.step == 4:
            run.writer.wait()
            os._exit(9)
        update(run, *arguments)

    TrainRun.update = dying  # pyright: ignore[reportAttributeAccessIssue]


def batches(folder: Path, world_size: int) -> dict[int, str]:
    """Step -> hash of its global batch; steps that were repeated must have been given the same rows again."""
    rows: dict[int, dict[int, list[str]]] = {}
    for rank in range(world_size):
        for line in (folder / f"rows_{rank}.jsonl").read_text().splitlines():
            step, own = json.loads(line)
            assert rows.setdefault(step, {}).setdefault(rank, own) == own
    return {step: " ".join(sum((own[r] for r in sorted(own)), [])) for step, own in rows.items()}


def losses_of(base_dir: Path, tag: str) -> list[float]:
    """The loss of each step, and the bits per byte of each validation."""
    records = read_metrics(base_dir / "base" / tag)
    measured = [record["val_bpb"] for record in records if "val_bpb" in record]
    return [record["loss"] for record in records[1:]] + measured


def train(
    base_dir: Path, world_size: int, num_steps: int = STEPS, flags: str = FLAGS, tag: str = "d2"
) -> tuple[list[float], dict[int, str]]:
    """(figures, batches) of the first steps of a run on `world_size` ranks."""
    for old in base_dir.glob("rows_*.jsonl"):
        old.unlink()
    stop = {"STOP_AT": str(num_steps + 1)}  # the record of the last step is complete then
    group = launch.start(
        base_dir, "base_train", flags.split(), world_size, launch.note_batches, stop
    )
    assert group.wait(1800) == [0] * world_size, group.log.read_text()
    return losses_of(base_dir, tag), batches(base_dir, world_size)


def test_any_number_of_ranks_and_resumed_on_another(prepared: Path, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("one", "two", "stopped", "to_one", "to_four")}
    for name in ("one", "two", "stopped"):
        shutil.copytree(prepared, folders[name])
    losses, expected = train(folders["one"], 1)
    assert len(losses) == STEPS + 4 and len(expected) == STEPS + 1
    on_two, seen = train(folders["two"], 2)
    assert on_two == pytest.approx(losses, abs=1e-4) and seen == expected

    group = launch.start(folders["stopped"], "base_train", FLAGS.split(), 2, note_and_die)
    assert 9 in group.wait()
    before = batches(folders["stopped"], 2)
    assert sorted(before) == list(range(5))
    for name, world_size in (("to_one", 1), ("to_four", 4)):
        shutil.copytree(folders["stopped"], folders[name])
        resumed, seen = train(folders[name], world_size)
        assert sorted(seen) == [3, 4, 5, 6]  # from the save at step 3
        assert before | seen == expected == seen | before
        assert resumed == pytest.approx(losses, abs=1e-4)


@pytest.mark.long
def test_depth_4_on_1_2_and_4_ranks_and_two_agents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first 50 steps of 2,000, on text from the folder NANOCHAT_TEST_TEXT, or on the primer.

    A run of 50 steps has learning rates six times as high, at which rounding errors grow tenfold in two steps.
    """
    text = os.environ.get("NANOCHAT_TEST_TEXT")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("STOP_AT", "51")
    source = {"source": Path(text)} if text else {"corpus": "primer", "num_documents": 4000}
    launch.prepare(4096, **source)
    losses, expected = train(tmp_path, 1, 50, f"{DEPTH_4} --model_tag=one", "one")
    assert len(losses) == 50 and losses[49] < losses[0] - 1
    for world_size in (2, 4):
        tag = f"on_{world_size}"
        found, seen = train(tmp_path, world_size, 50, f"{DEPTH_4} --model_tag={tag}", tag)
        print(f"{world_size} ranks: {max(map(abs, map(float.__sub__, found, losses))):.1e}")
        assert found == pytest.approx(losses, abs=1e-4) and seen == expected
    for old in tmp_path.glob("rows_*.jsonl"):
        old.unlink()
    agents = torchrun(tmp_path, f"{DEPTH_4} --model_tag=agents", num_agents=2)
    assert [agent.wait(1800) for agent in agents] == [0, 0]
    found = losses_of(tmp_path, "agents")
    print(f"two agents of 2 ranks: {max(map(abs, map(float.__sub__, found, losses))):.1e}")
    assert found == pytest.approx(losses, abs=1e-4) and batches(tmp_path, 4) == expected


def torchrun(
    base_dir: Path, flags: str, num_agents: int = 1, *options: str
) -> list[subprocess.Popen[bytes]]:
    """Agents on the loopback interface, with two ranks each."""
    where = ["--master_addr=127.0.0.1", f"--master_port={launch.free_port()}"]
    environment = os.environ | {
        "NANOCHAT_BASE_DIR": str(base_dir), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    agents: list[subprocess.Popen[bytes]] = []
    for agent in range(num_agents):
        numbers = [f"--nnodes={num_agents}", f"--node_rank={agent}", "--nproc_per_node=2"]
        command = [sys.executable, "-m", "torch.distributed.run", *numbers, *where, *options]
        command += ["-m", "tests.launch", "base_train", *flags.split()]
        with (base_dir / f"agent_{agent}.txt").open("w") as log:
            agents.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return agents


@pytest.mark.slow
def test_torchrun_goes_on_after_a_rank_is_killed(prepared: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "base_dir"))
    flags = FLAGS.replace("eval_every=2", "eval_every=-1 --fresh")
    (agent,) = torchrun(folder, flags, 1, "--max-restarts=2")
    log = folder / "agent_0.txt"
    while "/step_000006" not in log.read_text():
        assert agent.poll() is None, log.read_text()
        time.sleep(0.05)
    ranks = dict(line.split() for line in (folder / "pids.txt").read_text().splitlines())
    os.kill(int(ranks["0"]), signal.SIGKILL)
    assert agent.wait(300) == 0, log.read_text()
    assert "resuming" in log.read_text() and len(losses_of(folder, "d2")) == 401
