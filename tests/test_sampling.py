"""Sampling: the right distribution, the right ids kept, and every row on its own.

The oracles are the softmax itself (frequencies) and naive Python versions of top-k, top-p, min-p.
"""

import random
from typing import Any

import pytest
import torch

from nanochat.sampling import (
    SamplingBatch,
    counter_uniform,
    derive_seed,
    sample,
    with_logprobs,
)

V = 50
COMB = torch.linspace(0, 1 - 2.0**-24, 5_000)  # uniform numbers that reach every id that is kept


def draw(
    logits: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0, uniform=None, min_p=0.0
) -> torch.Tensor:
    """`sample` with one setting for all rows."""
    n = len(logits)
    if uniform is None:
        uniform = counter_uniform(torch.arange(n), torch.zeros(n, dtype=torch.int64))
    batch = SamplingBatch([(temperature, top_k, top_p, min_p)] * n, logits.shape[1])
    return sample(logits, batch, uniform)


def random_logits(rows: int, seed: int = 0, vocab_size: int = V) -> torch.Tensor:
    return 2 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def test_uniform_is_uniform() -> None:
    seeds, positions = torch.arange(-200, 200), torch.arange(500)
    grid = torch.stack([counter_uniform(seeds, p.expand_as(seeds)) for p in positions])
    assert float(grid.min()) >= 0 and float(grid.max()) < 1
    for values in (grid.flatten(), grid[:, 7], grid[3], grid[1:, 0] - grid[:-1, 0] + 1):
        expected = 0.5 if values.max() < 1 else 1.0
        assert abs(float(values.mean()) - expected) < 4 / len(values) ** 0.5
    counts = torch.histc(grid, bins=100, min=0, max=1)
    chi_square = float(((counts - grid.numel() / 100) ** 2 / (grid.numel() / 100)).sum())
    assert chi_square < 150  # 99 degrees of freedom: above 150 once in a thousand
    correlation = torch.corrcoef(grid)  # between positions, over seeds
    correlation.fill_diagonal_(0)
    assert float(correlation.abs().max()) < 0.3


def test_derived_seeds_differ_and_every_bit_of_a_seed_counts() -> None:
    derived = {derive_seed(a, b) for a in range(-50, 50) for b in range(100)}
    assert len(derived) == 10_000 and all(0 <= seed < 1 << 63 for seed in derived)
    seeds = torch.tensor([0, 1, -1, 1 << 32, 1 << 62, (1 << 63) - 1])
    assert len(counter_uniform(seeds, torch.zeros_like(seeds)).unique()) == len(seeds)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    num = 100_000
    row = random_logits(1)[0, :12]
    ids = draw(row.expand(num, -1), temperature=temperature)
    frequencies = torch.bincount(ids, minlength=12) / num
    expected = (row / temperature).softmax(0)
    assert float((frequencies - expected).abs().max()) < 4 * 0.5 / num**0.5


@pytest.mark.parametrize("top_k", [0, 1, 3, V, V + 5])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 1.0])
def test_only_what_top_k_and_top_p_keep(top_k: int, top_p: float) -> None:
    """Against a naive nucleus."""
    row = random_logits(1, seed=3)[0] / 2
    ranked = row.argsort(descending=True).tolist()[: top_k if 0 < top_k < V else V]
    probabilities = row[ranked].softmax(0)
    kept, mass = [], 0.0
    for id, probability in zip(ranked, probabilities.tolist(), strict=True):
        if kept and mass >= top_p and top_p < 1:
            break
        kept.append(id)
        mass += probability
    assert set(draw(row.expand(len(COMB), -1), 1.0, top_k, top_p, COMB).tolist()) == set(kept)


@pytest.mark.parametrize("top_k", [0, 4])
@pytest.mark.parametrize("min_p", [0.05, 0.5, 1.0])
def test_only_what_min_p_keeps(min_p: float, top_k: int) -> None:
    row = random_logits(1, seed=3)[0]
    probabilities = (row / 0.8).softmax(0)
    kept = {int(id) for id in (probabilities >= min_p * probabilities.max()).nonzero()}
    if top_k:
        kept &= set(row.topk(top_k).indices.tolist())
    drawn = draw(row.expand(len(COMB), -1), 0.8, top_k, 1.0, COMB, min_p)
    assert set(drawn.tolist()) == kept


def test_ties_are_kept_together_and_the_impossible_is_never_picked() -> None:
    """Not even at the ends of the interval."""
    logits = torch.tensor([-torch.inf, 1.0, 2.0, 1.0, 1.0, 0.0, -torch.inf]).expand(len(COMB), -1)
    assert draw(logits, top_k=2, uniform=COMB).unique().tolist() == [1, 2, 3, 4]
    assert draw(logits, uniform=COMB).unique().tolist() == [1, 2, 3, 4, 5]


def test_temperature_zero_is_the_largest() -> None:
    logits = random_logits(8)
    for temperature, top_k in ((0.0, 0), (1e-30, 0), (1.0, 1)):
        assert draw(logits, temperature, top_k).tolist() == logits.argmax(1).tolist()


def test_rows_do_not_see_their_mates() -> None:
    """Whatever the settings and logits of its mates, NaN included, a row's id is the same."""
    random_ = random.Random(1)
    own = random_logits(1, seed=9, vocab_size=500).bfloat16().float()  # bf16: many ties
    for trial in range(60):
        mine = (0.9, random_.choice([0, 30]), random_.choice([1.0, 0.8]))
        choices = ([0.0, 0.5, 1.0, 3.0], [0, 1, 40, 499], [1.0, 0.9, 0.5], [0.0, 0.0, 0.2])
        rows: list[Any] = [tuple(map(random_.choice, choices)) for _ in range(8)]
        place, at = trial % 4, trial / 60
        rows[place] = (*mine, 0.0)
        uniform = torch.tensor([random_.random() for _ in rows])
        uniform[place] = at
        mates = random_logits(8, seed=trial, vocab_size=500)
        mates[5] = torch.nan
        mates[place] = own[0]
        alone = draw(own.expand(8, -1), *mine, torch.full((8,), at))[0]
        assert sample(mates, SamplingBatch(rows, 500), uniform)[place] == alone


def test_logprobs_are_the_log_softmax() -> None:
    logits = random_logits(3)
    ids = torch.tensor([4, 0, 49])
    told = with_logprobs(ids, logits, 5).tolist()
    expected = logits.softmax(1).log()
    for row, pairs in enumerate(told):
        likeliest = expected[row].argsort(descending=True)[:5].tolist()
        assert [id for id, _ in pairs] == [ids[row], *likeliest]
        for id, logprob in pairs:
            assert logprob == pytest.approx(float(expected[row, int(id)]), abs=1e-5)
