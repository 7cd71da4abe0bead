"""Start a script's ranks in processes of their own, which can be killed, stopped and started again.

The processes are forked from a server that has imported everything, so that a start costs no
import; all ranks of one start are in one process group, as torchrun's would be. `meddle`, a
function at module level, runs in each rank before the script, to inject a fault or to look on.
"""

import hashlib
import json
import multiprocessing
import multiprocessing.process
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nanochat import common
from nanochat.common import run_script
from nanochat.dataloader import Batch, Loader
from nanochat.trainer import Meter
from scripts import base_train, chat_batch, chat_rl, chat_sft, mid_train

SCRIPTS = {"base_train": base_train, "mid_train": mid_train, "chat_sft": chat_sft}
SCRIPTS |= {"chat_rl": chat_rl, "chat_batch": chat_batch}
Meddle = Callable[[], None] | None
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["pytest", "tests.launch"])
# The server passes over what it cannot import.
os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass
class Group:
    """The ranks of one start."""

    processes: Sequence[multiprocessing.process.BaseProcess]
    log: Path  # what all of them printed

    def wait(self, seconds: float = 120) -> list[int | None]:
        """Exit codes of the ranks; what still runs after `seconds` is killed and has none."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()
        return codes

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What was printed, once `text` is in it."""
        until = time.monotonic() + seconds
        while text not in (said := self.log.read_text()):
            assert time.monotonic() < until, said
            time.sleep(0.01)
        return said


def start(
    base_dir: Path,
    script: str,
    flags: Sequence[str],
    world_size: int = 1,
    meddle: Meddle = None,
    environment: dict[str, str] | None = None,
) -> Group:
    """Start `script` on `world_size` gloo ranks."""
    log = base_dir / f"log_{time.monotonic_ns()}.txt"
    log.touch()
    shared = {
        "NANOCHAT_BASE_DIR": str(base_dir),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    } | (environment or {})
    processes = []
    for rank in range(world_size):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        arguments = (script, list(flags), own, log, meddle)
        processes.append(FORK.Process(target=be_a_rank, args=arguments))
        processes[-1].start()
        shared["GROUP_LEADER"] = str(processes[0].pid)
    return Group(processes, log)


def on_ranks(world_size: int, folder: Path, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(rank, *arguments)` on gloo ranks, which meet in `folder`."""
    ranks = []
    for rank in range(world_size):
        where = (folder, rank, world_size, function, arguments)
        ranks.append(FORK.Process(target=join, args=where))
        ranks[-1].start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0


def join(
    folder: Path, rank: int, world_size: int, function: Callable[..., None], arguments: Any
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world_size)
    function(rank, *arguments)
    dist.destroy_process_group()


def join_group(leader: int) -> None:
    """Enter the process group of the first rank, which may not have made it yet; 0: make one."""
    while True:
        with suppress(PermissionError, ProcessLookupError):
            return os.setpgid(0, leader)
        time.sleep(0.001)


def be_a_rank(
    script: str, flags: list[str], environment: dict[str, str], log: Path, meddle: Meddle
) -> None:
    """The life of one rank."""
    os.environ.update(environment)
    join_group(int(environment.get("GROUP_LEADER", 0)))
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    torch.set_num_threads(1)
    if meddle is not None:
        meddle()
    run(script, flags)


def run(script: str, flags: list[str]) -> None:
    """What the command line does."""
    sys.argv = [script, *flags]
    run_script(SCRIPTS[script].main, SCRIPTS[script].Config)


def in_float64() -> None:
    """Compute in fp64 under --dtype=float32: rounding cannot hide a fault, nor be taken for one."""
    torch.set_default_dtype(torch.float64)
    common.DTYPES["float32"] = torch.float64
    note_batches()


def note_batches() -> None:
    """Each rank writes the hash of every row that it is given, and ends before step $STOP_AT."""
    fetch = Meter.fetch
    path = Path(os.environ["NANOCHAT_BASE_DIR"]) / f"rows_{os.environ['RANK']}.jsonl"

    def noting(self: Meter, loader: Loader) -> Batch:
        if self.run.step == int(os.environ.get("STOP_AT", -1)):
            raise SystemExit
        batch = fetch(self, loader)
        pairs = zip(batch.inputs.numpy(), batch.targets.numpy(), strict=True)
        rows = [hashlib.sha256(x.tobytes() + y.tobytes()).hexdigest() for x, y in pairs]
        with path.open("a") as file:
            file.write(json.dumps([self.run.step, rows]) + "\n")
        return batch

    Meter.fetch = noting


if __name__ == "__main__":  # under torchrun
    in_float64()
    with (Path(os.environ["NANOCHAT_BASE_DIR"]) / "pids.txt").open("a") as pids:
        pids.write(f"{os.environ['RANK']} {os.getpid()}\n")
    run(sys.argv[1], sys.argv[2:])
