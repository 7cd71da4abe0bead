"""How the rows of a step are cut into micro-batches that fit the device, and the model is compiled for them.

The size of a micro-batch changes nothing but speed and memory. The choice that would surprise: before training a
forward and a backward pass are made on zeros and thrown away. So a GPU that is too small says so before anything
is trained, and ranks whose compiler starts from a cold cache are waited for here, where nothing times out.
"""

from dataclasses import replace
from typing import Literal, cast

import torch

from nanochat.faults import Guard
from nanochat.gpt import GPT, GPTConfig
from nanochat.paths import UserError
from nanochat.runtime import Runtime
from nanochat.scaling import memory_bytes

CPU_TOKENS = 4096  # of a micro-batch by `auto` on a CPU; larger ones gained nothing (dev/LOG.md)


def batch_rows(total_batch_size: int, seq_len: int) -> int:
    """Rows of the global batch. Raises UserError naming the nearest sizes when they are not whole."""
    if total_batch_size < seq_len or total_batch_size % seq_len:
        below = total_batch_size // seq_len * seq_len
        choices = " or ".join(str(size) for size in (below, below + seq_len) if size)
        raise UserError(
            f"--total_batch_size={total_batch_size} is not a multiple of --max_seq_len={seq_len}; use {choices}"
        )
    return total_batch_size // seq_len


def divisors(number: int) -> list[int]:
    """The divisors of `number`, the largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]


def split_rows(num_rows: int, device_batch_size: int, world_size: int) -> int:
    """Rows per micro-batch: `device_batch_size`, or all of a rank's rows when they are fewer.

    Raises UserError that names the nearest sizes when the global batch of `num_rows` rows does not divide.
    """
    if num_rows % world_size:
        raise UserError(
            f"a batch of {num_rows} rows does not divide among {world_size} ranks; change the batch"
        )
    local = num_rows // world_size
    rows = min(device_batch_size, local)
    if rows < 1 or local % rows:
        nearest = sorted(divisors(local), key=lambda size: (abs(size - device_batch_size), size))
        choices = " or ".join(f"--device_batch_size={size}" for size in sorted(nearest[:2]))
        raise UserError(
            f"--device_batch_size={device_batch_size} does not divide the {local} rows of a rank's batch; use {choices}"
        )
    return rows


def row_choices(
    num_rows: int,
    device_batch_size: int | Literal["auto"],
    seq_len: int,
    config: GPTConfig,
    runtime: Runtime,
) -> list[int]:
    """Rows per micro-batch to try in this order; for "auto" on a GPU, all that its memory may hold."""
    if device_batch_size != "auto":
        return [split_rows(num_rows, device_batch_size, runtime.world_size)]
    local = split_rows(num_rows, num_rows, runtime.world_size)
    if runtime.device.type != "cuda":
        return [max(size for size in divisors(local) if size == 1 or size * seq_len <= CPU_TOKENS)]
    there = torch.cuda.mem_get_info(runtime.device)[1]
    config = replace(config, sequence_len=seq_len)
    needed = {
        size: memory_bytes(config, size, runtime.world_size)["total"] for size in divisors(local)
    }
    return [size for size in needed if needed[size] <= there] or [1]


def out_of_memory(rows: int) -> UserError:
    """What to say when micro-batches of `rows` rows do not fit; half divides a rank's rows wherever `rows` does."""
    smaller = next((size for size in divisors(rows) if size <= rows / 2), None)
    mend = f"try --device_batch_size={smaller}" if smaller else "train a smaller --depth"
    return UserError(f"out of GPU memory with --device_batch_size={rows}; {mend}")


def fits(model: torch.nn.Module, rows: int, seq_len: int, device: torch.device) -> bool:
    """True when a forward and a backward pass do not run out of the device's memory."""
    # Two tensors: the compiler's code for a batch whose targets are its inputs would serve no other.
    ids, targets = (torch.zeros(rows, seq_len, dtype=torch.long, device=device) for _ in range(2))
    try:
        model(ids, targets, reduction="sum").backward()
        fine = True
    except torch.OutOfMemoryError:
        fine = False
    model.zero_grad()
    if not fine:
        torch.cuda.empty_cache()
    return fine


def compile_for_training(
    model: GPT,
    choice: Literal["auto", "yes", "no"],
    row_choices: list[int],
    seq_len: int,
    guard: Guard,
) -> tuple[torch.nn.Module, int]:
    """(the model through torch.compile, if `choice` is yes or it is auto on a GPU; the rows that fit on every rank).

    Only training goes through it: evaluation and sampling have other shapes, each of which would compile anew.
    Raises UserError when no number of rows fits.
    """
    device, trained = guard.runtime.device, model
    if choice == "yes" or (choice == "auto" and device.type == "cuda"):
        trained = cast(torch.nn.Module, torch.compile(model, dynamic=False))
    elif device.type != "cuda":
        return model, row_choices[0]  # nothing to compile, and nothing to run out of
    for rows in row_choices:
        if guard.agree(not fits(trained, rows, seq_len, device)) == [0]:
            return trained, rows
    raise out_of_memory(row_choices[-1])
