"""Logits -> the next id of every row: temperature, top-k, top-p, and a seed of its own per row.

One inverse-CDF draw per row: the kept probabilities are summed in the order of the vocabulary, and the
row's uniform number picks a place in that sum. The uniform number is a hash of (seed, position), so there
is no generator state to keep, and what a row draws never depends on the rows beside it.

The choice that would surprise: top-k and top-p find a *value* below which logits are dropped, not a set
of ids. Tied logits are therefore kept or dropped together (top-k may keep more than k), and no result
hangs on how a sort breaks ties, which bf16 models make common. It also needs no sorted ids: with top-k
on, only the largest k values are ranked.

Sources: nucleus sampling, arXiv 1904.09751; the 32-bit mixer is `lowbias32` of
https://github.com/skeeto/hash-prospector.

B rows, V vocabulary, W widest top-k of the batch (V where a row uses top-p alone).
"""

import hashlib

import torch

WORD = 0xFFFFFFFF  # 32 bits, held in int64 so that the arithmetic is the same on every device


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2^63) of its own for each tuple of integers, such as (seed, question, sample).

    Hashed rather than added: seed 1 of question 2 and seed 2 of question 1 must be different streams.
    """
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def counter_uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One fp32 number in [0, 1) per row from int64 `seeds` (B,) and `positions` (B,); stateless."""
    state = _mix((seeds & WORD) ^ _mix((seeds >> 32) & WORD ^ 0x9E3779B9))
    state = _mix(state ^ _mix(positions & WORD ^ 0x85EBCA6B))  # (B,)
    return (state >> 8).float() * 2.0**-24  # 24 bits are what fp32 holds exactly below 1


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """The next id (B,) of every row of fp32 `logits` (B, V).

    The other tensors are (B,): temperature 0 takes the largest logit; top_k of 0 or above V, and top_p of
    1 or more, are off. Keep these three on the CPU: what is off is then skipped without waiting for a GPU.
    """
    vocab_size, device = logits.shape[1], logits.device
    limit = torch.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k)  # (B,)
    greedy = (temperature <= 0).to(device)
    divisor = torch.where(temperature > 0, temperature, 1.0).to(device)
    # The largest becomes 0 first, so that a tiny temperature gives -inf and never inf - inf.
    scaled = (logits - logits.amax(dim=1, keepdim=True)) / divisor[:, None]  # (B, V)
    filtered = ((limit < vocab_size) | (top_p < 1)) & (temperature > 0)
    if bool(filtered.any()):
        width = int(limit[filtered].max())
        lowest = _lowest_kept(scaled, limit.to(device), top_p.to(device), width)
        lowest = torch.where(filtered.to(device), lowest, -torch.inf)
        scaled = scaled.masked_fill(scaled < lowest[:, None], -torch.inf)
    total = scaled.exp().cumsum(dim=1)  # (B, V)
    # Strictly below the last total, so that the id found has a probability above 0.
    target = uniform.to(device).clamp(max=1 - 2.0**-23) * total[:, -1]
    drawn = torch.searchsorted(total, target[:, None], right=True)[:, 0].clamp(max=vocab_size - 1)
    return torch.where(greedy, logits.argmax(dim=1), drawn)


def _lowest_kept(
    scaled: torch.Tensor, limit: torch.Tensor, top_p: torch.Tensor, width: int
) -> torch.Tensor:
    """The smallest scaled logit (B,) that is inside the row's top-k and its top-p.

    top-p keeps the fewest ids whose share of the top-k's probability reaches `top_p`, and at least one.
    Sums are read out of a running sum, so that a wider `width` for the sake of another row changes nothing.
    """
    ranked = scaled.topk(width, dim=1).values  # (B, W), descending
    last = limit.clamp(max=width)[:, None] - 1  # (B, 1)
    mass = ranked.exp().cumsum(dim=1)
    before = mass - ranked.exp()
    inside = before < top_p[:, None] * mass.gather(1, last)
    inside &= torch.arange(width, device=scaled.device) <= last
    # Where top-p is off, rounding at the far end of the sum must not drop the last of the top-k.
    num_kept = torch.where(top_p >= 1, last[:, 0] + 1, inside.sum(dim=1).clamp(min=1))
    return ranked.gather(1, num_kept[:, None] - 1)[:, 0]


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit numbers held in int64; products wrap, and their low 32 bits stay exact."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & WORD
    return x ^ (x >> 16)
