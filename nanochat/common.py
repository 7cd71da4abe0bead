"""Folders, files, errors, device and ranks, command lines: what everything else builds on.

All artifacts lie under `$NANOCHAT_BASE_DIR` (default `~/.cache/nanochat`). Files are written to a
temporary name, fsynced, renamed, and their *folder* fsynced: only that makes a rename durable.
`set_up` is a script's first call; under torchrun it joins one process group (nccl on GPUs, gloo on
CPUs). A script's flags are the fields of its `Config`; a field's comment is its --help, and its
type (`Count`, `Share`, ...) says which values are valid.

A script whose time is up (SIGUSR1, as Slurm warns; or `NANOCHAT_STOP_AFTER`, such as 3h50m, counted
from `NANOCHAT_BEGAN` or its own start) ends with status 75, and the same command goes on.
"""

import ctypes
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
import tyro
from pydantic import Field, TypeAdapter, ValidationError
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

T = TypeVar("T")
FOLDER_NAME = r"\w[\w.-]*"  # of a corpus or a run; cannot leave its parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PR_SET_PDEATHSIG = 1  # prctl(2): the signal to send when the parent dies
STARTED = time.time()
DURATION = r"(\d+h)?(\d+m)?(\d+s)?"
TIME_IS_UP = 75  # exit status, EX_TEMPFAIL of sysexits.h: to be run again
MEMORY_FLAGS = ("device_batch_size", "batch_size", "num_slots", "slots")  # less of it, less memory
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3): bytes from which malloc gives memory back


class UserError(ValueError):
    """An error that the user caused: one line saying what is wrong and how to fix it."""


def base_dir() -> Path:
    """The folder of all artifacts; nothing else reads `NANOCHAT_BASE_DIR`."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()


def corpora_dir() -> Path:
    return base_dir() / "base_data"


def tokenizer_dir() -> Path:
    """The tokenizer trained last; each run keeps a copy of the one it used."""
    return base_dir() / "tokenizer"


def run_dir(stage: str, model_tag: str) -> Path:
    return base_dir() / stage / model_tag


def report_dir() -> Path:
    return base_dir() / "report"


def fsync(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, text: str) -> None:
    """Write `path` durably, whole or not at all; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    fsync(path.parent)


@dataclass(frozen=True)
class Runtime:
    device: torch.device
    dtype: torch.dtype  # of the matmuls; master weights are always fp32
    rank: int
    world_size: int
    device_name: str
    capability: tuple[int, int] = (0, 0)  # CUDA's version of the hardware; (0, 0): no CUDA

    @property
    def is_main(self) -> bool:
        """True on the rank that prints and writes shared files."""
        return self.rank == 0


@cache
def git_revision() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    checkout = Path(__file__).parent
    try:
        found = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
        return found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def has_c_compiler() -> bool:
    """True if torch.compile can build what it generates."""
    return any(shutil.which(name) for name in (os.environ.get("CC") or "cc", "gcc", "clang"))


def print0(text: str) -> None:
    """Print on the main rank only; all of the library's output goes through here."""
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            print(text, flush=True)  # noqa: T201
        except OSError:  # a closed terminal, a reader that is gone, a full disk: no reason to stop
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def progress_bar(parts: Iterable[T], unit: str, total: int | None = None) -> Iterable[T]:
    """`parts`, with a progress bar on stderr if that is a terminal and this the main rank."""
    hidden = int(os.environ.get("RANK", 0)) != 0 or None  # None: where there is no terminal
    return tqdm(parts, unit=unit, total=total, disable=hidden, leave=False)


def set_up(
    device_type: str = "",
    dtype: str = "auto",
    seed: int = 0,
    deterministic: bool = False,
    exact: bool = False,
) -> Runtime:
    """Choose device and dtype, join torchrun's process group if there is one, and seed.

    Empty `device_type`: the best available. `dtype` auto: what its matrix instructions take, but
    on a CPU fp32 if `exact`, so that scores do not depend on the kind of processor.
    `deterministic`: only kernels that give the same bits each time. Raises UserError for a missing
    device, or one that this torch has no kernels for.
    """
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
    kind = device_type or next(name for name in backends if backends[name].is_available())
    if not backends[kind].is_available():
        raise UserError(f"--device_type={kind}: torch sees no such device; use --device_type=cpu")
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, name, capability = torch.device(kind), kind, (0, 0)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    if kind == "cuda":
        # So is this. Segments that grow leave fewer holes when the memory is nearly full.
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
        name = torch.cuda.get_device_name(device)
        capability = torch.cuda.get_device_capability(device)
        check_kernels(device, capability)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    elif kind == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    if dtype == "auto":
        in_16_bits = kind == "cpu" and not exact and multiplies_bf16()
        dtype = "bfloat16" if in_16_bits else fastest_dtype(capability)
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        die_with_torchrun()
    if world_size > 1 and not dist.is_initialized():
        join_ranks(device)
    random.seed(seed)
    torch.manual_seed(seed)
    return Runtime(device, DTYPES[dtype], rank, world_size, name, capability)


def fastest_dtype(capability: tuple[int, int]) -> str:
    """The dtype of the GPU's matrix instructions; fp32 where there are none."""
    if capability >= (8, 0):
        return "bfloat16"
    return "float16" if capability >= (7, 0) else "float32"


def multiplies_bf16() -> bool:
    """True if the processor multiplies matrices of bf16 faster than those of fp32.

    AMD's do by AVX512-BF16, four times as fast; Intel's by AMX alone (half as fast: dev/LOG.md).
    """
    has = torch.cpu.get_capabilities()
    by_avx512 = has.get("avx512_bf16") and "Intel" not in str(has.get("cpu_name"))
    return bool(has.get("amx_bf16") or by_avx512)


def check_kernels(device: torch.device, capability: tuple[int, int]) -> None:
    """Raise UserError if this torch has no kernels for the GPU."""
    try:
        torch.ones(1, device=device)
    except torch.AcceleratorError as error:
        # CUDA 13 dropped the cards before 7.5; a newer card needs a newer torch.
        backend = "cu126" if capability < (7, 5) else "auto"
        raise UserError(
            f"torch {torch.__version__} cannot use this card of compute capability "
            f"{capability[0]}.{capability[1]} ({str(error).splitlines()[0]}); run `uv pip install "
            f"--torch-backend={backend} --reinstall-package torch --upgrade torch`, or give "
            "--device_type=cpu"
        ) from error


def keep_freed_memory() -> None:
    """Let glibc's malloc reuse what tensors free, where it would ask the kernel for fresh pages.

    There are thousands of those in a step, each with a page fault (dev/LOG.md).
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that every version takes
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def die_with_torchrun() -> None:
    """Have the kernel kill this rank when torchrun dies; it would live on and keep the run locked.

    torchrun starts each rank in a new session, so signals to its process group do not reach them.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # torchrun may be dead already. (A child of a script that torchrun started cannot tell.)
    leads_session = os.getsid(0) == os.getpid()
    if leads_session and "torch" not in Path(f"/proc/{os.getppid()}/cmdline").read_text():
        sys.exit("torchrun died while this rank was starting")


def join_ranks(device: torch.device) -> None:
    timeout = timedelta(seconds=dist_timeout())
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
        # On one machine the store survives a restart and holds the addresses of dead ranks.
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size,
        timeout=timeout, device_id=device if on_gpu else None,
    )  # fmt: skip


def dist_timeout() -> float:
    """Seconds after which a silent rank counts as dead: `NANOCHAT_TIMEOUT`, default 900."""
    return float(os.environ.get("NANOCHAT_TIMEOUT") or 900)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def own_part(num: int) -> range:
    """This rank's items of `num`: r, r + n, r + 2n, ... for rank r of n."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return range(rank, num, world_size)


def gather(parts: list[T]) -> list[T]:
    """The concatenated lists of all ranks, the same on every rank."""
    if not dist.is_initialized():
        return parts
    lists: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, parts)
    return [part for own in lists for part in own]


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gpu_memory(device: torch.device) -> int:
    """Bytes in all; of an Apple chip, those that its GPU may have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return torch.mps.recommended_max_memory()


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if (system := Path("/proc/meminfo")).exists():
        lines = dict(line.split(":") for line in system.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


# Types of flags: valid values, and short names for the flags that choose a checkpoint.
Source = Annotated[Literal["base", "mid", "sft", "rl"], tyro.conf.arg(aliases=["-i"])]
ChatStage = Annotated[Literal["mid", "sft", "rl"], tyro.conf.arg(aliases=["-i"])]
RunName = Annotated[str, Field(pattern=rf"^({FOLDER_NAME})?$")]
Tag = Annotated[RunName, tyro.conf.arg(aliases=["-g"])]
Step = Annotated[int | None, tyro.conf.arg(aliases=["-s"])]

DeviceType = Annotated[str, Field(pattern="^(cpu|cuda|mps)?$")]
Dtype = Annotated[str, Field(pattern="^(auto|bfloat16|float16|float32)$")]
TableDtype = Literal["auto", "float32", "bfloat16"]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Derived = Literal[-1] | Count  # -1: follows from other flags
Rows = Literal["auto"] | Count
Choice = Literal["auto", "yes", "no"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Port = Annotated[int, Field(ge=0, le=65535)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=100)]
Duration = Annotated[str, Field(pattern=rf"^{DURATION}$")]


@dataclass
class CheckpointFlags:
    """The flags of every script that loads a model."""

    source: Source = "sft"  # stage of the checkpoint
    model_tag: Tag = ""  # its run; empty: the one saved last
    step: Step = None  # its step; default: the newest
    device_type: DeviceType = ""  # cpu, cuda or mps; empty: the best available
    dtype: Dtype = "auto"  # of the matmuls: auto, bfloat16, float16 or float32


@dataclass
class RunFlags:
    """The flags of every script that trains."""

    lr_scale: Positive = 1.0  # multiplies the learning rates of pretraining
    compile: Choice = "auto"  # torch.compile; auto: on a GPU
    seed: int = 0  # of initial weights, the conversations' order and RL's samples
    deterministic: bool = False  # the same bits on a GPU each time; slower
    run: str = "dummy"  # wandb name; dummy: no wandb
    fresh: bool = False  # start over instead of resuming
    stop_after: Duration = ""  # save and leave within this time, such as 3h50m, with status 75
    log_every: int = 10  # steps between console lines; <= 0: only at the end
    eval_every: int = 250  # steps between validations; <= 0: only at the end
    save_every: int = 1000  # steps between checkpoints; <= 0: only at the end
    keep_last: int = 3  # newest checkpoints to keep; <= 0: all


@dataclass
class StreamFlags(RunFlags):
    """The flags of those that train on a stream of documents or conversations."""

    num_iterations: Derived = -1  # steps; -1: as the other flags say
    device_batch_size: Rows = "auto"  # rows per micro-batch; auto: what fits
    recompute: Choice = "auto"  # activations, for a third more time; auto: if nothing fits else
    table_dtype: TableDtype = "auto"  # of the embeddings
    mask_documents: bool = False  # a token sees its own document or conversation only
    eval_tokens: Count = 10_485_760  # tokens of one validation


# Faults of the machine, not of the program, though no path is known.
MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE}


def run_script(main: Callable[[T], None], config: type[T]) -> None:
    """Run `main` on the parsed command line; --help begins with the script's docstring.

    UserError, errors of paths and the machine, and too little GPU memory become one line on stderr
    and exit code 1; Ctrl-C becomes one and 130; the end of the time, `TIME_IS_UP`.
    """
    parsed = tyro.cli(config, description=main.__globals__["__doc__"])
    try:
        check(parsed)
        for number in (signal.SIGUSR1, signal.SIGALRM):
            signal.signal(number, lambda *_: leave("the time is up"))
        if (seconds := stop_time() - time.time()) < float("inf"):
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
        main(parsed)
    except UserError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit(f"error: {out_of_memory(vars(parsed))}")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again\n")
        sys.exit(130)  # what a shell says of it
    except OSError as error:
        if error.filename is None and error.errno not in MACHINE_ERRORS:
            raise
        path = "a file" if error.filename is None else error.filename
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "make room or choose another path" if is_full else "choose another path"
        sys.exit(f"error: {path}: {error.strerror}; {mend}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if dist.is_initialized():
            dist.destroy_process_group()


def out_of_memory(settings: dict[str, Any]) -> UserError:
    """The error that names those of a script's flags that need less memory if they are lower."""
    given = {name: settings[name] for name in MEMORY_FLAGS if name in settings}
    lower = [
        f"--{name}={1 if size == 'auto' else max(n for n in range(1, size) if size % n == 0)}"
        for name, size in given.items()
        if size == "auto" or size > 1
    ]
    had = " ".join(f"--{name}={size}" for name, size in given.items())
    mend = f"try {' '.join(lower)}" if lower else "use a smaller model or shorter rows"
    return UserError(f"out of GPU memory{' with ' * bool(had)}{had}; {mend}")


def stop_time(stop_after: str = "") -> float:
    """When to stop, in seconds since 1970, by that flag and the environment; infinite: never."""
    began = float(os.environ.get("NANOCHAT_BEGAN") or STARTED)
    whole = to_seconds(os.environ.get("NANOCHAT_STOP_AFTER", ""))
    return min(STARTED + to_seconds(stop_after), began + whole)


def to_seconds(duration: str) -> float:
    """Of 3h50m, 45m or 90s; infinite for "". UserError for anything else."""
    if duration and not re.fullmatch(DURATION, duration):
        raise UserError(f"NANOCHAT_STOP_AFTER={duration} is no time; give it as 3h50m, 45m or 90s")
    parts = re.findall(r"(\d+)([hms])", duration)
    seconds = sum(int(count) * {"h": 3600, "m": 60, "s": 1}[unit] for count, unit in parts)
    return seconds if duration else float("inf")


def leave(reason: str) -> NoReturn:
    """End this process with `TIME_IS_UP`, and note that for the shell script that started it.

    Under torchrun, which would start all ranks again, with 0.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        if note := os.environ.get("NANOCHAT_STOPPED"):
            Path(note).touch()
        with suppress(OSError):  # not print: a signal may have interrupted one
            os.write(1, f"{reason}; the same command goes on\n".encode())
    sys.exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else TIME_IS_UP)


def check(config: Any) -> None:
    try:
        TypeAdapter(type(config)).validate_python(vars(config))
    except ValidationError as error:
        worst = error.errors()[-1]  # of a union's members, the last
        raise UserError(f"--{worst['loc'][0]}={worst['input']}: {worst['msg']}") from error
