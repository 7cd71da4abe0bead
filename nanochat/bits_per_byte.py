"""How many bits the model needs per byte of text: a loss that does not depend on the vocabulary.

The nats of every target that stands for bytes, over ln 2 times those bytes. Special tokens stand for no
bytes, so neither their nats nor they themselves count; nor do targets of -1.

The choice that would surprise: sums and not means travel between ranks, so that ranks with more bytes
weigh more and the result is the same on any number of them.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nanochat.dataloader import Batch, TextLoader
from nanochat.gpt import GPT
from nanochat.runtime import Runtime, all_reduce_sum
from nanochat.tokenizer import Tokenizer


@torch.inference_mode()
def evaluate_bpb(
    model: GPT,
    batches: Iterator[Batch],
    token_bytes: Sequence[int],
    num_steps: int,
    rows: int = 1 << 30,
) -> float:
    """Bits per byte over the next `num_steps` batches of every rank; infinite where they hold no bytes.

    `token_bytes` has the byte length of each id, 0 for specials (`Tokenizer.token_bytes`). The model is given
    `rows` rows at a time.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor(token_bytes, device=device)  # (V,)
    exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no fp64
    sums = torch.zeros(2, dtype=exact, device=device)  # nats, bytes
    for _ in range(num_steps):
        batch = next(batches)
        parts = zip(batch.inputs.split(rows), batch.targets.split(rows), strict=True)
        for inputs, wanted in parts:
            targets = wanted.reshape(-1)  # (R * T,)
            nats = model(inputs, wanted, reduction="none").reshape(-1)
            num_bytes = torch.where(targets >= 0, lengths[targets.clamp(min=0)], 0)
            sums[0] += torch.where(num_bytes > 0, nats, 0.0).sum(dtype=exact)
            sums[1] += num_bytes.sum()
    nats_total, bytes_total = all_reduce_sum(sums).tolist()
    return nats_total / (math.log(2) * bytes_total) if bytes_total else math.inf


def text_bpb(
    model: GPT,
    tokenizer: Tokenizer,
    shards: Sequence[Path],
    num_tokens: int,
    rows: int,
    runtime: Runtime,
    num_rows: int = 0,
) -> float:
    """Bits per byte on the first `num_tokens` tokens of the shards, packed as in training.

    `num_rows` (default: `rows` for each rank) of all ranks fix the packing, so that it is the same on any number.
    """
    num_rows, seq_len = num_rows or rows * runtime.world_size, model.config.sequence_len
    where = (runtime.rank, runtime.world_size, runtime.device)
    loader = TextLoader(tokenizer, shards, num_rows, seq_len, *where, quiet=True)
    num_steps = max(1, num_tokens // (num_rows * seq_len))
    bpb = evaluate_bpb(model, loader, tokenizer.token_bytes(), num_steps, rows)
    loader.close()
    return bpb
