"""The same command on 1, 2 and 4 ranks gives the same batches and weights, resumed elsewhere too.

Weights are compared in fp64, because in fp32 rounding grows: at the learning rates of these 30
steps a last bit of the first step is 1e-2 of the loss ten steps later, whether ranks, threads or
micro-batches turned it over (dev/LOG.md). A gradient off by 1e-3 differs by far more than rounding.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanochat.optim import Bucket, MuonAdamW
from nanochat.trainer import read_metrics
from tests import launch

STEPS, EVERY = 10, 5
FLAGS = "--depth=2 --aspect_ratio=16 --head_dim=16 --max_seq_len=64 --total_batch_size=512"
FLAGS += f" --num_iterations=30 --eval_every={EVERY} --eval_tokens=512 --save_every={EVERY}"
FLAGS += " --device_type=cpu --dtype=float32"
# Of a weight of up to 80, in fp64. Measured after 10 steps: 3e-11, but in the tables 3e-8, where
# gradients of 1e-17 are no longer small beside AdamW's eps.
TOLERANCE = 1e-7
A_FAULT = 1e-6  # what a gradient off by 1e-3 adds at least; measured: 1e-5 after 5 steps
# A parameter of each bucket: three shapes of matrices, three tables, four groups of small ones.
OF_EACH_BUCKET = (
    "blocks.0.attn.c_q.weight", "wte.weight", "resid_lambdas", "blocks.0.mlp.c_fc.weight",
    "blocks.0.mlp.c_proj.weight", "lm_head.weight", "value_embeds.1.weight", "x0_lambdas",
    "smear_gate.weight", "smear_lambda",
)  # fmt: skip


@dataclass
class Trained:
    """What a run has left behind."""

    base_dir: Path
    batches: dict[int, str]  # step -> hash of its global batch

    @property
    def metrics(self) -> list[float]:
        """Loss of each complete step, and bits per byte where measured."""
        records = read_metrics(self.base_dir / "base" / "d2")[:STEPS]
        return [r[key] for r in records for key in ("loss", "val_bpb") if key in r]

    def weights(self, step: int = STEPS) -> dict[str, torch.Tensor]:
        return load_file(self.base_dir / "base" / "d2" / f"step_{step:06d}" / "model.safetensors")


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest between two weights."""
    return max((one[name] - other[name]).abs().max().item() for name in one)


def batches(folder: Path) -> dict[int, str]:
    """Hash of each step's global batch; a step that was repeated must have got the same rows."""
    rows: dict[int, dict[Path, list[str]]] = {}
    for path in sorted(folder.glob("rows_*.jsonl")):
        for line in path.read_text().splitlines():
            step, own = json.loads(line)
            assert rows.setdefault(step, {}).setdefault(path, own) == own
        path.unlink()
    return {step: " ".join(sum(own.values(), [])) for step, own in rows.items()}


def train(
    base_dir: Path, world_size: int, meddle: Any = launch.in_float64, steps=STEPS, rows=1
) -> Trained:
    """The first steps of a run, in micro-batches of `rows`."""
    flags = [*FLAGS.split(), f"--device_batch_size={rows}"]
    stop = {"STOP_AT": str(steps)}
    group = launch.start(base_dir, "base_train", flags, world_size, meddle, stop)
    assert group.wait(1800) == [0] * world_size, group.log.read_text()
    return Trained(base_dir, batches(base_dir))


@pytest.fixture(scope="module")
def on_one(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The run that the others have to equal."""
    folder = tmp_path_factory.mktemp("one") / "base_dir"
    return train(Path(shutil.copytree(prepared, folder)), 1)


def die_at_step_7() -> None:
    launch.in_float64()
    step, saved = MuonAdamW.step, Path(os.environ["NANOCHAT_BASE_DIR"], "base/d2/step_000005")

    def dying(self: MuonAdamW) -> Any:
        if self.num_steps == 7:
            while not saved.exists():
                time.sleep(0.01)
            os._exit(9)
        return step(self)

    MuonAdamW.step = dying


def test_any_number_of_ranks_and_resumed_on_another(
    base_dir: Path, on_one: Trained, tmp_path: Path
) -> None:
    assert sorted(on_one.batches) == list(range(STEPS))
    stopped = Path(shutil.copytree(base_dir, tmp_path / "stopped"))
    on_two = train(base_dir, 2)
    assert difference(on_two.weights(), on_one.weights()) < TOLERANCE
    assert on_two.batches == on_one.batches
    assert on_two.metrics == pytest.approx(on_one.metrics, rel=1e-6)

    group = launch.start(stopped, "base_train", FLAGS.split(), 2, die_at_step_7)
    assert 9 in group.wait()
    before = batches(stopped)
    assert sorted(before) == list(range(8))
    for world_size in (1, 4):
        folder = Path(shutil.copytree(stopped, tmp_path / f"to_{world_size}"))
        resumed = train(folder, world_size)
        assert sorted(resumed.batches) == list(range(EVERY, STEPS))  # from the save before
        assert before | resumed.batches == on_one.batches == resumed.batches | before
        assert difference(resumed.weights(), on_one.weights()) < TOLERANCE
        assert resumed.metrics == pytest.approx(on_one.metrics, rel=1e-6)


def spoil(name: str) -> None:
    """The last rank's share of the gradient of one bucket is off by 1e-3 of itself."""
    launch.in_float64()
    start_reduction = MuonAdamW.start_reduction

    def spoiling(self: MuonAdamW, bucket: Bucket) -> Any:
        if name in bucket.names and os.environ["RANK"] == "1":
            for param in bucket.params:
                assert param.grad is not None
                param.grad *= 1.001
        return start_reduction(self, bucket)

    MuonAdamW.start_reduction = spoiling


@pytest.mark.parametrize(
    "name",
    [*OF_EACH_BUCKET[:3], *(pytest.param(n, marks=pytest.mark.long) for n in OF_EACH_BUCKET[3:])],
)
def test_a_small_fault_in_one_gradient_shows(base_dir: Path, on_one: Trained, name: str) -> None:
    """A factor on *all* of a bucket's gradient would not: both optimizers divide it out again."""
    spoiled = train(base_dir, 2, partial(spoil, name), EVERY)
    assert difference(spoiled.weights(EVERY), on_one.weights(EVERY)) > A_FAULT


def test_two_ranks_equal_two_micro_batches_bit_for_bit(base_dir: Path, tmp_path: Path) -> None:
    """In fp32, 30 steps: the sums are the same ones, so that nothing is there to grow."""
    copy = Path(shutil.copytree(base_dir, tmp_path / "copy"))
    one = train(base_dir, 1, launch.note_batches, 30, rows=4)
    two = train(copy, 2, launch.note_batches, 30, rows=4)
    assert difference(two.weights(30), one.weights(30)) == 0
    assert one.weights(30)["wte.weight"].dtype == torch.float32


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
def test_two_agents_of_torchrun(base_dir: Path, on_one: Trained, monkeypatch: Any) -> None:
    monkeypatch.setenv("STOP_AT", str(STEPS))
    agents = torchrun(base_dir, f"{FLAGS} --device_batch_size=1", num_agents=2)
    assert [agent.wait(1800) for agent in agents] == [0, 0], (base_dir / "agent_0.txt").read_text()
    found = Trained(base_dir, batches(base_dir))
    assert found.batches == on_one.batches
    assert difference(found.weights(), on_one.weights()) < TOLERANCE


@pytest.mark.slow
def test_torchrun_goes_on_after_a_rank_is_killed(base_dir: Path) -> None:
    flags = FLAGS + " --num_iterations=100 --fresh --eval_every=-1"
    (agent,) = torchrun(base_dir, flags, 1, "--max-restarts=2")
    log = base_dir / "agent_0.txt"
    while not list((base_dir / "base").glob("d2/step_*[05]")):
        assert agent.poll() is None, log.read_text()
        time.sleep(0.05)
    ranks = dict(line.split() for line in (base_dir / "pids.txt").read_text().splitlines())
    os.kill(int(ranks["0"]), signal.SIGKILL)
    assert agent.wait(300) == 0, log.read_text()
    assert "resuming" in log.read_text()
    assert len(read_metrics(base_dir / "base" / "d2")) == 101
