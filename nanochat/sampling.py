"""Logits -> the next id of every row: temperature, top-k, top-p, and a seed of its own per row.

One inverse-CDF draw per row: the kept probabilities are summed in the order of the vocabulary, and
the row's uniform number picks a place in that sum. That number is a hash of (seed, position), so
there is no generator state to keep, and what a row draws never depends on the rows beside it.

Top-k and top-p find a *value* below which logits are dropped, not a set of ids. So tied logits,
which bf16 models make common, are kept or dropped together (top-k may keep more than k), and no
result hangs on how a sort breaks ties. With top-k on, only the largest k values are ranked.

Sources: nucleus sampling, arXiv 1904.09751; the 32-bit mixer is `lowbias32` of
https://github.com/skeeto/hash-prospector.

B rows, V vocabulary, W widest top-k of the batch (V where a row uses top-p alone).
"""

import hashlib
from collections.abc import Sequence

import torch

WORD = 0xFFFFFFFF  # 32 bits, held in int64 so that the arithmetic is the same on every device


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2^63) of its own for each tuple of integers, such as (seed, question, sample).

    Hashed, not added: seed 1 of question 2 and seed 2 of question 1 must be different streams.
    """
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def counter_uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One fp32 number in [0, 1) per row from int64 `seeds` (B,) and `positions` (B,); stateless."""
    state = _mix((seeds & WORD) ^ _mix((seeds >> 32) & WORD ^ 0x9E3779B9))
    state = _mix(state ^ _mix(positions & WORD ^ 0x85EBCA6B))  # (B,)
    return (state >> 8).float() * 2.0**-24  # 24 bits are what fp32 holds exactly below 1


class SamplingBatch:
    """How each of B rows is sampled, laid out on the device for all steps until a row changes."""

    def __init__(
        self,
        rows: Sequence[tuple[float, int, float]],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """`rows` are (temperature, top_k, top_p); temperature 0 takes the largest logit.

        A top_k of 0 or above `vocab_size` and a top_p of 1 or more are off.
        """
        temperature, top_k, top_p = (torch.tensor(values) for values in zip(*rows, strict=True))
        limit = torch.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k)  # (B,)
        greedy = temperature <= 0
        filtered = ((limit < vocab_size) | (top_p < 1)) & ~greedy
        self.all_greedy = bool(greedy.all())
        self.width = int(limit[filtered].max()) if filtered.any() else 0  # W; 0: no row is filtered
        self.divisor = torch.where(greedy, 1.0, temperature)[:, None].to(device)  # (B, 1)
        self.greedy, self.filtered = greedy.to(device), filtered.to(device)
        self.limit, self.top_p = limit.to(device), top_p.to(device)


def sample(logits: torch.Tensor, batch: SamplingBatch, uniform: torch.Tensor) -> torch.Tensor:
    """The next id (B,) of every row of fp32 `logits` (B, V), drawn at `uniform` (B,) in [0, 1)."""
    largest, likeliest = logits.max(dim=1)
    if batch.all_greedy:
        return likeliest
    # The largest becomes 0 first, so that a tiny temperature gives -inf and never inf - inf.
    scaled = (logits - largest[:, None]).div_(batch.divisor)  # (B, V)
    weights = scaled.exp()
    if batch.width:
        lowest = _lowest_kept(scaled, batch)
        # A product with 0 and 1: a masked fill takes 0.9 ms, not 0.3 (16 x 32,768, one thread).
        weights.mul_(scaled.ge_(lowest[:, None]))
    total = weights.cumsum_(dim=1)  # (B, V)
    # Strictly below the last total, so that the id found has a probability above 0.
    target = uniform.clamp(max=1 - 2.0**-23)[:, None] * total[:, -1:]
    drawn = torch.searchsorted(total, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return torch.where(batch.greedy, likeliest, drawn)


def with_logprobs(ids: torch.Tensor, logits: torch.Tensor, num_top: int) -> torch.Tensor:
    """(B, 1 + num_top, 2): pairs of an id and its log-probability: `ids`, then the likeliest.

    Of the whole distribution at temperature 1. In one tensor, since each transfer from a GPU waits
    for it; fp32 holds every id below 2^24.
    """
    logprobs = logits.log_softmax(dim=1)
    likeliest = logprobs.topk(min(num_top, logits.shape[1]), dim=1).indices
    shown = torch.cat((ids[:, None], likeliest), dim=1)
    return torch.stack((shown.float(), logprobs.gather(1, shown)), dim=2)


def _lowest_kept(scaled: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """The smallest scaled logit (B,) inside the row's top-k and top-p; -inf where both are off.

    top-p keeps the fewest ids whose share of the top-k's probability reaches `top_p`, and at least
    one. Sums are read out of a running sum, so that a W made wider by another row changes nothing.
    """
    ranked = scaled.topk(batch.width, dim=1).values  # (B, W), descending
    last = batch.limit.clamp(max=batch.width)[:, None] - 1  # (B, 1)
    mass = ranked.exp().cumsum(dim=1)
    before = mass - ranked.exp()
    inside = before < batch.top_p[:, None] * mass.gather(1, last)
    inside &= torch.arange(batch.width, device=scaled.device) <= last
    # Where top-p is off, rounding at the far end of the sum must not drop the last of the top-k.
    num_kept = torch.where(batch.top_p >= 1, last[:, 0] + 1, inside.sum(dim=1).clamp(min=1))
    lowest = ranked.gather(1, num_kept[:, None] - 1)[:, 0]
    return torch.where(batch.filtered, lowest, -torch.inf)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit numbers held in int64; products wrap, and their low 32 bits stay exact."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & WORD
    return x ^ (x >> 16)
