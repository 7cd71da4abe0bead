"""The cache against the full forward pass: every position, any split, a kept beginning over poison.

That a row's bits do not depend on its mates, nor on what lies in free slots: test_engine.py.
"""

import copy
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from nanochat.attention import Kernel
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import Append, KVCache
from tests.models import busy_gpt, random_ids

CONTEXT = 640  # short windows see 256 keys
VOCAB = 96


def make_model(kernel: Kernel = "dense", **changes) -> GPT:
    """Three small layers, of which the first two see a short window."""
    sizes = {"n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
    model = busy_gpt(GPTConfig(sequence_len=CONTEXT, vocab_size=VOCAB, **{**sizes, **changes}))
    model.kernel = kernel
    return model


def text(rows: int, time: int, seed: int = 1) -> torch.Tensor:
    return random_ids(rows, time, VOCAB, seed)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(params=["dense", "blocks", "flash"])
def kernel(
    request: pytest.FixtureRequest, slow_flash: None, monkeypatch: pytest.MonkeyPatch
) -> Kernel:
    """Three ways to decode: a CPU's, and a GPU's without flash and with it."""
    monkeypatch.setattr(KVCache, "in_blocks", request.param == "blocks")
    return "flash" if request.param == "flash" else "dense"


@pytest.mark.parametrize("n_kv_head", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_equals_full_at_every_position(
    n_kv_head: int, dtype: torch.dtype, kernel: Kernel
) -> None:
    """Prefill in uneven pieces, then one by one, past the window and past several decode blocks."""
    model = make_model(kernel, n_kv_head=n_kv_head)
    model.compute_dtype = dtype
    ids = text(2, 400)
    full = model(ids)
    cache = model.make_cache(2, 400)
    pieces = ids.split([7, 143, 140, 1, 79, *[1] * 30], dim=1)
    logits = torch.cat([model(piece, cache=cache) for piece in pieces], dim=1)
    assert logits.dtype == torch.float32
    worst = (logits - full).abs().max()
    assert worst <= (1e-4 if dtype == torch.float32 else 0.25)
    assert full.std() > 0.1  # the comparison is of something


def test_the_window_matters() -> None:
    """Without it the same weights say something else, so the test above can fail."""
    ids = text(1, 400)
    with_window, without = make_model(), make_model(window_pattern="L")
    assert torch.allclose(with_window(ids)[:, :256], without(ids)[:, :256], atol=1e-4)
    assert (with_window(ids)[:, 300:] - without(ids)[:, 300:]).abs().max() > 0.01


def test_rows_of_different_lengths_with_right_padding(kernel: Kernel) -> None:
    model = make_model(kernel)
    ids = text(3, 300)
    lengths = [300, 17, 140]
    cache = model.make_cache(3, 310)
    last = model(ids, cache=cache, num_new=torch.tensor(lengths), last_only=True)
    assert cache.lengths.tolist() == lengths
    step = model(torch.tensor([[1], [2], [3]]), cache=cache)
    for row, length in enumerate(lengths):
        alone = torch.cat((ids[row, :length], torch.tensor([row + 1])))[None]
        full = model(alone)
        assert (last[row, 0] - full[0, length - 1]).abs().max() <= 1e-4
        assert (step[row, 0] - full[0, length]).abs().max() <= 1e-4


def test_chosen_slots_and_idle_rows(kernel: Kernel) -> None:
    """Rows may go to any slots; a row with nothing new leaves its slot as it was."""
    model = make_model(kernel)
    ids = text(2, 30)
    cache = model.make_cache(4, 32)
    model(ids[:, :20], cache=cache, slots=torch.tensor([3, 1]))
    assert cache.lengths.tolist() == [0, 20, 0, 20]
    idle = model(torch.zeros(4, 1, dtype=torch.int64), cache=cache, num_new=torch.zeros(4).long())
    assert torch.isfinite(idle).all() and cache.lengths.tolist() == [0, 20, 0, 20]
    pieces = ids[:, 20:].split(1, dim=1)
    rest = [model(piece, cache=cache, slots=torch.tensor([3, 1])) for piece in pieces]
    assert (torch.cat(rest, dim=1) - model(ids)[:, 20:]).abs().max() <= 1e-4


def test_packed_prompts_are_read_as_if_each_had_a_row(kernel: Kernel) -> None:
    """Of slots in any order, some with a past and some with nothing new, padding behind them."""
    model = make_model(kernel)
    counts, ids = [0, 140, 0, 1, 37, 0], text(6, 150)
    slots = torch.tensor([5, 3, 0, 4, 1, 2])
    packed_cache, cache = model.make_cache(6, 400), model.make_cache(6, 400)
    for either in (packed_cache, cache):
        model(ids[:2, :130], cache=either, slots=torch.tensor([3, 0]))
    rows = model(ids, cache=cache, slots=slots, num_new=torch.tensor(counts), last_only=True)
    row = torch.cat([ids[i, :count] for i, count in enumerate(counts)])
    for padding in (0, 14):
        some = copy.deepcopy(packed_cache)
        packed = model(
            torch.nn.functional.pad(row, (0, padding))[None],
            cache=some, slots=slots, num_new=torch.tensor(counts), packed=True, last_only=True,
        )  # fmt: skip
        live = [i for i, count in enumerate(counts) if count]
        assert (packed[live] - rows[live]).abs().max() <= 1e-4
        assert some.lengths.tolist() == cache.lengths.tolist()
        assert torch.allclose(some.previous, cache.previous, atol=1e-5)
        step = model(text(6, 1, seed=3), cache=some)
        assert (step - model(text(6, 1, seed=3), cache=copy.deepcopy(cache))).abs().max() <= 1e-4
    with pytest.raises(AssertionError, match="a row packs all tokens"):
        model(ids[:1, :5], cache=cache, slots=slots, num_new=torch.tensor(counts), packed=True)


@pytest.mark.parametrize("source", [0, 1])
def test_a_kept_beginning_goes_on_like_a_fresh_one(source: int, kernel: Kernel) -> None:
    """Turned back to 300 of 350 tokens, where they are or copied over garbage, past the window."""
    model = make_model(kernel)
    ids, other = text(1, 350), text(1, 40, seed=2)
    cache = model.make_cache(2, 400)
    model(ids, cache=cache, slots=torch.tensor([source]))
    if source == 1:
        cache.keys[:, 0], cache.values[:, 0], cache.previous[0] = (torch.nan,) * 3
    cache.keep(0, 300, source, model.embed(ids[0, 299]))
    assert cache.lengths.tolist() == [300, 350 * source]
    row = torch.tensor([0])
    tail = [model(piece, cache=cache, slots=row) for piece in other.split([30, 9, 1], 1)]
    full = model(torch.cat((ids[:, :300], other), dim=1))
    assert (torch.cat(tail, dim=1) - full[:, 300:]).abs().max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [1, 3]])
def test_a_recorded_decode_step_serves_all_later_ones(
    slots: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph keeps, traced on the CPU: only `layout` and the ids change."""
    model = make_model()
    eager, recorded = model.make_cache(4, 400), model.make_cache(4, 400)
    monkeypatch.setattr(KVCache, "in_blocks", True)
    eager.block = recorded.block = 400
    size = len(slots)
    with monkeypatch.context() as patch:  # while a graph records, `begin` writes nothing
        lists = (list(range(size)), [0] * size, [1] * size, list(range(size)))
        plan = Append(recorded, recorded.layout[:, :size], (size, 1), False, *lists)
        patch.setattr(recorded, "begin", lambda *_: plan)
        patch.setattr(recorded, "recorded_keys", 400)
        patch.setattr(recorded, "finish", lambda _: None)
        replay = make_fx(lambda ids: model(ids, cache=recorded, last_only=True))(text(size, 1))
    recorded.reset()
    for slot, length in enumerate((1, 140, 300)):
        for cache in (eager, recorded):
            model(text(1, length), cache=cache, slots=torch.tensor([slot]))
    for i in range(20):
        ids, live = text(size, 1, seed=i), text(1, size, seed=i)[0] % 2
        options: Any = {"slots": torch.tensor(slots), "num_new": live}
        expected = model(ids, cache=eager, last_only=True, **options)
        step = recorded.begin(size, 1, **options)
        assert torch.allclose(replay(ids)[live > 0], expected[live > 0], atol=1e-5)
        recorded.finish(step)
    assert torch.equal(recorded.previous, eager.previous) and eager.lengths[slots].min() > 3


def test_what_does_not_fit_is_refused_untouched() -> None:
    model = make_model()
    cache = model.make_cache(2, 16)
    model(text(2, 10), cache=cache)
    state = (cache.keys, cache.values, cache.previous, cache.lengths)
    kept = [tensor.clone() for tensor in state]
    refused = [
        (text(2, 7), {}, "17 tokens in a cache for 16"),
        (text(2, 1), {"slots": torch.tensor([1, 1])}, "distinct"),
        (text(1, 1), {"slots": torch.tensor([2])}, "distinct"),
        (text(2, 1), {"num_new": torch.tensor([1, 2])}, "of 1 tokens"),
        (text(1, 1), {}, "a row needs a slot"),
        (text(2, 1), {"cache": KVCache(3, 2, 2, 16, 16, 64, "cpu", torch.bfloat16)}, "torch.bflo"),
    ]
    for ids, options, error in refused:
        with pytest.raises(AssertionError, match=error):
            model(ids, **{"cache": cache, **options})
    assert all(torch.equal(a, b) for a, b in zip(kept, state, strict=True))
    padded = model(text(2, 7), cache=cache, num_new=torch.tensor([6, 0]), last_only=True)
    assert torch.isfinite(padded[0]).all()  # exactly full, with a padded column past the end
    assert cache.lengths.tolist() == [16, 10]


def test_memory_is_what_it_says() -> None:
    model = make_model()
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model.compute_dtype = dtype
        # 3 layers x (keys, values) x 2 kv heads x (100 + 1) cells x 16 channels in fp32, as this is
        # a CPU, and 64 for smear.
        expected = 5 * (4 * 3 * 2 * 2 * 101 * 16 + size * 64)
        for device in ("cpu", "meta"):
            assert model.make_cache(5, 100, device=device).num_bytes == expected
