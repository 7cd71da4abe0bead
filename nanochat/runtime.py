"""The machine under a run: device, compute dtype, ranks, seeds; and the command line of a script.

`set_up` is the first call of every script and `tear_down` (through `run_script`) the last. Under torchrun
it joins one flat process group (nccl on GPUs, gloo on CPUs); started plainly it is one rank of one.

The choice that would surprise: a CPU computes in fp32, even one with bf16 matrix instructions. Its matmuls would
be faster, but a small model's step is bound by what lies between them (dev/LOG.md); `--dtype=bfloat16` is there.

Peak figures: vendor data sheets, dense (no sparsity). A device that is not listed is measured with a matmul.
"""

import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
import tyro

from nanochat.paths import UserError

Config = TypeVar("Config")

# Part of the device name -> dense bf16 peak in FLOP/s (vendor data sheets).
PEAK_BF16_FLOPS = {
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Runtime:
    """What a script needs to know of the machine; made once by `set_up`."""

    device: torch.device
    dtype: torch.dtype  # of the matmuls; master weights are always fp32
    rank: int
    world_size: int
    device_name: str

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes shared files."""
        return self.rank == 0


def say(text: str) -> None:
    """Print on the main rank alone; the one place where the library speaks."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)  # noqa: T201


def choose_device(device_type: str) -> str:
    """`device_type` itself, or the best one present when it is empty.

    Raises UserError for a device that is not there.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if not device_type:
        return next(name for name, there in present.items() if there)
    if device_type not in present:
        raise UserError(
            f"--device_type={device_type} is unknown; choose one of {', '.join(present)}"
        )
    if not present[device_type]:
        raise UserError(
            f"--device_type={device_type}: torch sees no such device; use --device_type=cpu"
        )
    return device_type


def choose_dtype(device: torch.device, dtype: str) -> torch.dtype:
    """The dtype named, or the one that trains fastest on `device` without loss scaling."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UserError(f"--dtype={dtype} is unknown; choose auto, {' or '.join(DTYPES)}")
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float32
    return torch.float32


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators; streams that matter (data, sampling) carry seeds of their own."""
    random.seed(seed)
    torch.manual_seed(seed)


def set_up(device_type: str = "", dtype: str = "auto", seed: int = 0) -> Runtime:
    """Choose the device, join the process group when torchrun started us, and seed.

    Raises UserError for an unknown or missing device.
    """
    kind = choose_device(device_type)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = (
        torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
        if kind == "cuda"
        else torch.device(kind)
    )
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    seed_everything(seed)
    name = torch.cuda.get_device_name(device) if kind == "cuda" else kind
    return Runtime(device, choose_dtype(device, dtype), rank, world_size, name)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` over the ranks, in place; one rank returns it as it is."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait for all ranks; one rank goes on at once."""
    if dist.is_initialized():
        dist.barrier()


def measure_flops(
    device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.2
) -> float:
    """FLOP/s of a square matmul on this device: the yardstick where no data sheet is known."""
    left, right = torch.randn(2, size, size, device=device, dtype=dtype).unbind(0)
    torch.mm(left, right)
    synchronize(device)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        torch.mm(left, right)
        synchronize(device)
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - begin)


def peak_flops(runtime: Runtime) -> tuple[float, str]:
    """(FLOP/s that MFU is measured against, where that figure comes from)."""
    for part, flops in PEAK_BF16_FLOPS.items():
        if part in runtime.device_name:
            return flops, f"{part} dense bf16 data sheet"
    dtype = str(runtime.dtype).removeprefix("torch.")
    return measure_flops(
        runtime.device, runtime.dtype
    ), f"{dtype} matmul measured on this {runtime.device_name}"


def run_script(main: Callable[[Config], None], config: type[Config]) -> None:
    """Run `main` on the parsed command line; a UserError becomes one line on stderr and exit code 1."""
    parsed = tyro.cli(config)
    try:
        main(parsed)
    except UserError as error:
        sys.exit(f"error: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
