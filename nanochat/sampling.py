"""Logits -> the next id of every row: temperature, top-k, top-p, min-p, and a seed per row.

One inverse-CDF draw per row over the kept probabilities in vocabulary order. The uniform number is
a hash of (seed, position): no generator state to keep, and a row never depends on its neighbours.
Top-k and top-p find a *value* below which logits are dropped, not a set of ids, so ties, common in
bf16, are kept or dropped together (top-k may keep more than k) and no sort order matters.

Sources: nucleus sampling, arXiv 1904.09751; min-p, 2407.01082; the 32-bit mixer is `lowbias32` of
https://github.com/skeeto/hash-prospector. Shapes: B rows, V vocabulary, W widest top-k of the
batch (V if a row uses top-p alone).
"""

import hashlib
from collections.abc import Sequence

import torch

WORD = 0xFFFFFFFF  # 32 bits, held in int64 so that all devices agree


def derive_seed(*parts: int) -> int:
    """A distinct seed in [0, 2^63) for each tuple of integers, such as (seed, question, sample).

    Hashed, not added: seed 1 of question 2 and seed 2 of question 1 must be different streams.
    """
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def counter_uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One fp32 number in [0, 1) per row, from int64 `seeds` (B,) and `positions` (B,)."""
    state = _mix((seeds & WORD) ^ _mix((seeds >> 32) & WORD ^ 0x9E3779B9))
    state = _mix(state ^ _mix(positions & WORD ^ 0x85EBCA6B))  # (B,)
    return (state >> 8).float() * 2.0**-24  # 24 bits are what fp32 holds exactly below 1


class SamplingBatch:
    """The sampling parameters of B rows, on the device, reused until a row changes."""

    def __init__(
        self,
        rows: Sequence[tuple[float, int, float, float]],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """`rows` are (temperature, top_k, top_p, min_p); temperature 0 takes the largest logit.

        top_k is off if 0 or above `vocab_size`, top_p if 1 or more, min_p if 0.
        """
        temperature, top_k, top_p, min_p = (
            torch.tensor([row[i] for row in rows]) for i in range(4)
        )
        limit = torch.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k)  # (B,)
        greedy = temperature <= 0
        filtered = ((limit < vocab_size) | (top_p < 1)) & ~greedy
        self.all_greedy = bool(greedy.all())
        self.width = int(limit[filtered].max()) if filtered.any() else 0  # W; 0: no row is filtered
        self.cuts = bool(self.width or (min_p > 0).any())
        self.divisor = torch.where(greedy, 1.0, temperature)[:, None].to(device)  # (B, 1)
        self.greedy, self.filtered = greedy.to(device), filtered.to(device)
        self.limit, self.top_p = limit.to(device), top_p.to(device)
        self.floor = min_p.float().log().to(device)  # (B,) of logits whose largest is 0


def sample(logits: torch.Tensor, batch: SamplingBatch, uniform: torch.Tensor) -> torch.Tensor:
    """The next ids (B,) from fp32 `logits` (B, V) and `uniform` (B,) in [0, 1)."""
    largest, likeliest = logits.max(dim=1)
    if batch.all_greedy:
        return likeliest
    # Shift the largest to 0 first: a tiny temperature then gives -inf, never inf - inf.
    scaled = (logits - largest[:, None]).div_(batch.divisor)  # (B, V)
    weights = scaled.exp()
    if batch.cuts:
        lowest = torch.maximum(batch.floor, _lowest_kept(scaled, batch))
        # Multiply by 0 and 1: 0.3 ms; a masked fill takes 0.9 (16 x 32,768, one thread).
        weights.mul_(scaled.ge_(lowest[:, None]))
    total = weights.cumsum_(dim=1)  # (B, V)
    # Strictly below the last total, so that the drawn id has a probability above 0.
    target = uniform.clamp(max=1 - 2.0**-23)[:, None] * total[:, -1:]
    drawn = torch.searchsorted(total, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return torch.where(batch.greedy, likeliest, drawn)


def with_logprobs(ids: torch.Tensor, logits: torch.Tensor, num_top: int) -> torch.Tensor:
    """(B, 1 + num_top, 2): (id, log-probability) pairs of `ids`, then of the likeliest.

    At temperature 1, unfiltered. One tensor, since each transfer from a GPU blocks; fp32 holds
    every id below 2^24.
    """
    logprobs = logits.log_softmax(dim=1)
    likeliest = logprobs.topk(min(num_top, logits.shape[1]), dim=1).indices
    shown = torch.cat((ids[:, None], likeliest), dim=1)
    return torch.stack((shown.float(), logprobs.gather(1, shown)), dim=2)


def _lowest_kept(scaled: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """The smallest scaled logit (B,) inside the row's top-k and top-p; -inf if both are off.

    top-p keeps the fewest ids, at least one, whose share of the top-k's probability reaches
    `top_p`. Sums come from a running sum, so a W widened by another row changes nothing.
    """
    if batch.width == 0:
        return torch.full_like(batch.floor, -torch.inf)
    ranked = scaled.topk(batch.width, dim=1).values  # (B, W), descending
    last = batch.limit.clamp(max=batch.width)[:, None] - 1  # (B, 1)
    mass = ranked.exp().cumsum(dim=1)
    before = mass - ranked.exp()
    inside = before < batch.top_p[:, None] * mass.gather(1, last)
    inside &= torch.arange(batch.width, device=scaled.device) <= last
    # With top-p off, rounding at the end of the sum must not drop the last of the top-k.
    num_kept = torch.where(batch.top_p >= 1, last[:, 0] + 1, inside.sum(dim=1).clamp(min=1))
    lowest = ranked.gather(1, num_kept[:, None] - 1)[:, 0]
    return torch.where(batch.filtered, lowest, -torch.inf)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit numbers held in int64; products wrap, but their low 32 bits stay exact."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & WORD
    return x ^ (x >> 16)
