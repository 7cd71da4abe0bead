"""nanochat.optim against torch's AdamW, singular values, formulas, and more ranks."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.adamw import adamw  # the class would import torch's compiler

from nanochat import optim
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import POLAR_EXPRESS, Bucket, MuonAdamW, StateShard, orthogonalize
from nanochat.scaling import make_optimizer
from tests.launch import on_ranks

ADAMW = {"kind": "adamw", "lr": 0.01, "betas": (0.8, 0.96), "eps": 1e-10, "weight_decay": 0.1}
MUON = {"kind": "muon", "lr": 0.05, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.2}
SLOW = pytest.mark.slow
SHAPES = {"muon": [(8, 8)] * 4 + [(40, 30)] * 4 + [(30, 40)], "adamw": [(67, 31), (9,), (), (4, 5)]}


def make_groups() -> list[dict]:
    """In fp64, so that rounding is far below any difference that matters; and a table in bf16."""
    generator = torch.Generator().manual_seed(1)
    groups = []
    for options in (MUON, ADAMW):
        shapes = SHAPES[options["kind"]]
        tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        names = [f"{options['kind']}.{i}" for i in range(len(shapes))]
        groups.append(options | {"params": list(map(torch.nn.Parameter, tensors)), "names": names})
    table = torch.nn.Parameter(torch.randn(33, 40, generator=generator).bfloat16())
    return [*groups, ADAMW | {"params": [table], "names": ["table"]}]


def parameters(groups: list[dict]) -> list[torch.Tensor]:
    return [param for group in groups for param in group["params"]]


def train(optimizer: MuonAdamW, steps: range, scale: float = 1.0) -> None:
    """Gradients depend on the step alone; `scale` makes those of the ranks differ."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in parameters(optimizer.param_groups):
            param.grad = scale * torch.randn(param.shape, generator=generator, dtype=param.dtype)
        optimizer.step()


def test_adamw_equals_torch() -> None:
    ours, theirs = make_groups()[1], make_groups()[1]["params"]
    optimizer = MuonAdamW([ours])
    means, variances = ([torch.zeros_like(p) for p in theirs] for _ in range(2))
    counts = [torch.zeros(()) for _ in theirs]
    for step in range(50):
        generator = torch.Generator().manual_seed(step)
        for param in ours["params"]:
            # Small gradients: an eps added before the bias correction would show.
            param.grad = 1e-9 * torch.randn(param.shape, generator=generator, dtype=param.dtype)
        gradients = [param.grad.clone() for param in ours["params"]]
        optimizer.step()
        with torch.no_grad():
            adamw(
                theirs, gradients, means, variances, [], counts, foreach=False, amsgrad=False,
                beta1=0.8, beta2=0.96, lr=0.01, weight_decay=0.1, eps=1e-10, maximize=False,
            )  # fmt: skip
    for mine, other in zip(ours["params"], theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_compiled_updates_equal_eager_ones_and_are_compiled_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three stacks of two shapes and two tables of one, 20 steps of changing rates."""
    from torch._dynamo.testing import CompileCounterWithBackend  # takes seconds

    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(optim, "STACK_ELEMENTS", 4 * 12 * 8)
    shapes, found = {"muon": [(12, 8)] * 8 + [(8, 12)] * 4, "table": [(40, 30)] * 2}, []
    for compiled in (False, True):
        random, groups = torch.Generator().manual_seed(0), []
        for name, options in (("muon", MUON), ("table", ADAMW)):
            tensors = [torch.randn(shape, generator=random) for shape in shapes[name]]
            params = [t.bfloat16() if name == "table" else t for t in tensors]
            names = [f"{name}.{i}" for i in range(len(params))]
            groups.append(
                options | {"params": list(map(torch.nn.Parameter, params)), "names": names}
            )
        optimizer = MuonAdamW(groups)
        if compiled:
            optimizer.compile()
        for step in range(20):
            optimizer.set_multipliers(1 - step / 30, 0.85 + step / 200, weight_decay=1 - step / 19)
            train(optimizer, range(step, step + 1), scale=math.nan if step == 3 else 1.0)
        assert optimizer.num_steps == 19
        found.append(parameters(groups))
    assert counter.frame_count == 3
    for mine, other in zip(*found, strict=True):
        tolerance = 1e-5 if mine.dtype == torch.float32 else 1 / 64
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_elementwise_adamw_is_the_fused_one_with_one_rounding(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over ten steps, the third not finite; 16 bits against fp32 that is rounded after each."""
    monkeypatch.setattr(optim, "STACK_ELEMENTS", 64)
    wide = torch.promote_types(dtype, torch.float32)
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(100, generator=random).to(dtype)
    state = {"mean": torch.zeros(100, dtype=dtype), "variance": torch.zeros(100, dtype=wide)}
    expected = weights.to(wide)
    reference = {kind: tensor.to(wide, copy=True) for kind, tensor in state.items()}
    step = torch.zeros(())
    for number in range(10):
        gradients = torch.randn(100, generator=random).to(dtype)
        if number == 2:
            gradients[7] = math.nan
        finite = gradients.isfinite().all()
        step += finite
        optim.adamw_update(weights, gradients, state, ADAMW, finite, step)
        if finite:
            update = optim.fused_adamw_update
            update(expected, gradients.to(wide), reference, ADAMW, finite, step)
            expected, reference["mean"] = (  # rounded to `dtype`
                tensor.to(dtype).to(wide) for tensor in (expected, reference["mean"])
            )
        # A last bit of fp32 may turn the rounding of one of a hundred numbers over.
        off = [weights.to(wide) - expected, state["mean"].to(wide) - reference["mean"]]
        assert all((error.abs() > 1e-6).sum() <= 1 for error in off)
        torch.testing.assert_close(state["variance"], reference["variance"], rtol=1e-4, atol=1e-9)
        expected, reference["mean"] = weights.to(wide, copy=True), state["mean"].to(wide, copy=True)


@pytest.mark.parametrize("shape", [(48, 48), (64, 32), (32, 64)])
def test_orthogonalize_keeps_singular_vectors_and_levels_values(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, *shape, generator=generator)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.logspace(-2, 0, min(shape))
    result = orthogonalize(left * values @ right, torch.float32)
    in_basis = left.mT @ result @ right.mT  # diagonal when the singular vectors are kept
    diagonal = in_basis.diagonal(dim1=-2, dim2=-1)
    assert (in_basis - torch.diag_embed(diagonal)).abs().max() < 2e-3
    assert diagonal.min() > 0.8585 and diagonal.max() < 1.1415
    expected = values / (1.01 * values.norm() + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(diagonal, expected.expand_as(diagonal), rtol=0, atol=2e-3)
    for dtype, rounding in ((torch.float16, 5e-3), (torch.bfloat16, 5e-2)):
        found = orthogonalize(left * values @ right, dtype)
        assert found.dtype == dtype and not orthogonalize(torch.zeros(1, *shape), dtype).any()
        assert (found.float() - result).norm() < rounding * result.norm()


def reference_muon(weight: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Muon for one matrix, straight from the published formulas."""
    w, m, v = weight, torch.zeros_like(weight), 0.0
    (rows, columns), mu = w.shape, MUON["momentum"]
    for g in gradients:
        m = mu * m + (1 - mu) * g
        u = (1 - mu) * g + mu * m
        u = u * (u.norm() / math.sqrt(rows)) / u.norm(dim=1, keepdim=True)
        x = u / (1.01 * u.norm())
        for a, b, c in POLAR_EXPRESS:
            left, values, right = torch.linalg.svd(x, full_matrices=False)
            x = left @ torch.diag(a * values + b * values**3 + c * values**5) @ right
        o = x * math.sqrt(min(rows, columns)) / x.norm()
        v = 0.9 * v + 0.1 * (o**2).mean(dim=1 if rows >= columns else 0, keepdim=True)
        scaled = o / v.sqrt()
        scaled = scaled * o.norm() / scaled.norm()
        decay = MUON["weight_decay"] * (scaled * w >= 0) * w
        w = w - MUON["lr"] * math.sqrt(max(1, rows / columns)) * (scaled + decay)
    return w


def test_muon_equals_the_formulas() -> None:
    group = make_groups()[0]
    before = [param.detach().clone() for param in group["params"]]
    optimizer = MuonAdamW([group])
    gradients = [[] for _ in before]
    for step in range(4):
        train(optimizer, range(step, step + 1))
        for seen, param in zip(gradients, group["params"], strict=True):
            seen.append(param.grad.clone())
    for param, weight, seen in zip(group["params"], before, gradients, strict=True):
        torch.testing.assert_close(param.detach(), reference_muon(weight, seen), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_one_rank_updates_stack_by_stack_and_needs_what_it_says(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as in one stack, and the allocator's peak in a step."""
    random, size = torch.Generator().manual_seed(0), math.prod(shape)
    start = [torch.randn(shape, generator=random) for _ in range(7)]
    gradient, results = torch.randn(shape, generator=random), []
    for limit in (optim.STACK_ELEMENTS, 2 * size):
        monkeypatch.setattr(optim, "STACK_ELEMENTS", limit)
        params = [torch.nn.Parameter(weight.clone()) for weight in start]
        optimizer = MuonAdamW([MUON | {"params": params, "names": list("abcdefg")}])
        for param in params:
            param.grad = gradient.clone()
        optimizer.step()
        results.append(params)
    assert len(optimizer.buckets) == 4
    assert all(map(torch.equal, *results))
    optimizer.param_groups[0]["dtype"] = torch.bfloat16  # as on a GPU
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        optimizer.step()
    profiler: Any = profile.profiler
    memory = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]
    peak, allowed = max(itertools.accumulate(sizes)), optim.transient_bytes(7 * size, size)
    # A CPU with instructions for bf16 reorders matrices in memory of its own, with AVX512 alone up
    # to all of one operand.
    operand = 2 * 2 * size  # bytes, of a stack of two
    assert 0.9 * allowed < peak <= 1.1 * allowed + operand and sum(sizes) == 0


def reader(*exports: dict[str, StateShard]) -> Callable[[str, int, int], torch.Tensor]:
    """What a checkpoint of these ranks would give to `import_state`."""
    shards: dict[str, dict[int, torch.Tensor]] = {}
    for export in exports:
        for key, shard in export.items():
            shards.setdefault(key, {})[shard.first] = shard.values.clone()

    def read(key: str, first: int, last: int) -> torch.Tensor:
        return torch.cat([values for _, values in sorted(shards[key].items())])[first:last]

    return read


@pytest.mark.parametrize("index", [0, 9, 10, 13])  # a matrix; AdamW: large, small, 16 bits
def test_no_trace_is_left_by_a_resume_or_a_gradient_that_is_not_finite(index: int) -> None:
    straight, first, second = make_groups(), make_groups(), make_groups()
    train(MuonAdamW(straight), range(6))
    optimizer = MuonAdamW(first)
    train(optimizer, range(3))
    for bad in (math.nan, math.inf, -math.inf):
        for param in parameters(first):
            param.grad = torch.ones_like(param)
            if param is parameters(first)[index]:
                param.grad.view(-1)[0] = bad
        assert not optimizer.step()
    assert optimizer.num_steps == 3
    for mine, other in zip(parameters(second), parameters(first), strict=True):
        mine.data.copy_(other.data)
    resumed = MuonAdamW(second)
    resumed.import_state(reader(optimizer.export_state()))
    train(resumed, range(3, 6))
    for mine, other in zip(parameters(straight), parameters(second), strict=True):
        assert torch.equal(mine, other)


def test_the_scale_of_the_loss_follows_torch_and_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optim, "GROWTH_STEPS", 3)
    plain, scaled, resumed = make_groups(), make_groups(), make_groups()
    without, optimizer = MuonAdamW(plain), MuonAdamW(scaled, dtype=torch.float16)
    expected, tracker = torch.tensor(2.0**16), torch.zeros((), dtype=torch.int32)
    for step, overflows in enumerate("0001100000100000000"):
        assert optimizer.loss_scale == expected and without.loss_scale == 1
        bad = math.inf if overflows == "1" else 0.0
        if not bad:
            train(without, range(step, step + 1))
        train(optimizer, range(step, step + 1), scale=float(optimizer.loss_scale) + bad)
        adapt: Any = torch._amp_update_scale_  # pyright: ignore[reportPrivateImportUsage]
        adapt(expected, tracker, torch.tensor(float(bad > 0)), 2.0, 0.5, 3)
    for mine, other in zip(parameters(scaled), parameters(plain), strict=True):
        assert torch.equal(mine, other)
    assert "loss_scale" not in without.export_state()

    other = MuonAdamW(resumed, dtype=torch.float16)
    read = reader(optimizer.export_state())

    def read_older(key: str, first: int, last: int) -> torch.Tensor:
        if key == "loss_scale":
            raise UserError("lacks it")
        return read(key, first, last)

    other.import_state(read_older)
    assert other.loss_scale == 2**16 and other.num_steps == optimizer.num_steps
    other.import_state(read)
    assert torch.equal(other.scale_state, optimizer.scale_state) and other.num_finite > 0


def test_a_gradient_that_no_scale_mends_is_a_fault() -> None:
    optimizer = MuonAdamW(make_groups(), dtype=torch.float16)
    verdicts = []
    for step in range(19):
        train(optimizer, range(step, step + 1), scale=math.nan)
        verdicts.append(bool(optimizer.step()))
    assert verdicts == [True] * 8 + [False] * 11  # two steps each
    assert optimizer.loss_scale == 1 and optimizer.num_steps == 0


def test_a_model_learns_in_fp16_as_in_fp32() -> None:
    """With the scale alone: at 2^-19 of the loss's sum, gradients would be zeros in fp16."""
    found = []
    for dtype in (torch.float32, torch.float16, torch.float16):
        model = GPT(GPTConfig(32, 256, n_layer=2, n_head=2, n_kv_head=2, n_embd=64))
        model.init_weights(0)
        model.compute_dtype = dtype
        optimizer = make_optimizer(model, 2**18, 2520)
        optimizer.set_multipliers(0.3, 0.9, 1.0)
        if len(found) == 2:
            optimizer.loss_scale.fill_(1)
        losses = []
        for step in range(18):  # the 20th magnifies noise in fp32 as well
            random = torch.Generator().manual_seed(step)
            ids = torch.randint(0, 16, (4, 33), generator=random).cumsum(1) % 251
            loss = model(ids[:, :-1], ids[:, 1:], reduction="sum")
            (loss / 2**19 * optimizer.loss_scale).backward()
            assert optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item() / ids[:, 1:].numel())
        found.append(torch.tensor(losses))
    exact, scaled, unscaled = found
    assert exact[-1] < exact[0] - 0.5
    assert (scaled - exact).abs().max() < 0.005
    assert (unscaled - exact).abs().max() > 0.1


def test_a_missing_gradient_is_named_and_multipliers_reach_the_groups() -> None:
    optimizer = MuonAdamW(make_groups())
    with pytest.raises(RuntimeError, match=r"muon\.8"):  # has no gradient
        optimizer.step()
    for _ in range(2):  # they do not compound
        optimizer.set_multipliers(lr=0.5, momentum=0.7, weight_decay=0.25)
    muon, adamw, _ = optimizer.param_groups
    assert (muon["lr"], muon["momentum"], muon["weight_decay"]) == (0.025, 0.7, 0.05)
    assert (adamw["lr"], adamw["weight_decay"]) == (0.005, 0.1)


def reduce_during_backward(rank: int, world_size: int) -> list[str]:
    """Arrivals of gradients and reductions in two backward passes, the second a step's last."""
    groups, events = make_groups(), []

    class Observed(MuonAdamW):
        def start_reduction(self, bucket: Bucket) -> Any:
            events.append(f"reduce {bucket.names[0]}")
            return super().start_reduction(bucket)

    optimizer = Observed(groups, rank, world_size)
    for name, param in zip(sum((g["names"] for g in groups), []), parameters(groups), strict=True):
        arrived = f"arrived {name}"
        param.register_post_accumulate_grad_hook(lambda _, arrived=arrived: events.append(arrived))
    for mark in ("first", "last"):
        events.append(mark)
        if mark == "last":
            optimizer.reduce_on_next_backward()
        x = torch.linspace(-1, 1, 31, dtype=torch.float64)
        for param in parameters(groups):  # so that backward reaches the last parameter first
            x = torch.tanh((param * x.mean()).sum() + x)
        x.sum().backward()
    events.append("step")
    optimizer.step()
    return events


def run_rank(rank: int, world_size: int, folder: Path) -> None:
    """Three steps on gradients whose mean over the ranks is that of one rank, then a bad step."""
    optim.MESSAGE_ELEMENTS = 1  # a message for every world_size matrices
    groups = make_groups()
    optimizer = MuonAdamW(groups, rank, world_size)
    train(optimizer, range(3), scale=2 * (rank + 1) / (world_size + 1))
    for param in parameters(groups):
        param.grad = torch.full_like(param, math.nan if rank == 1 else 1.0)
    assert not optimizer.step()
    weights = [param.detach() for param in parameters(groups)]
    shards = {key: tuple(shard) for key, shard in optimizer.export_state().items()}
    events = reduce_during_backward(rank, world_size)
    torch.save((weights, shards, events), folder / f"rank{rank}.pt")


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=SLOW) for n in (3, 4))])
def test_ranks_equal_one_rank(tmp_path: Path, world_size: int) -> None:
    on_ranks(world_size, tmp_path, run_rank, world_size, tmp_path)
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)]
    groups = make_groups()
    alone = MuonAdamW(groups)
    train(alone, range(3))
    expected = {key: shard.values.clone() for key, shard in alone.export_state().items()}
    for weights, _, _ in results:
        for mine, other in zip(parameters(groups), weights, strict=True):
            # One bit of bf16, of weights up to 4.
            tolerance = 1e-11 if mine.dtype == torch.float64 else 2e-2
            torch.testing.assert_close(mine.detach(), other, rtol=0, atol=tolerance)
    exports = [{key: StateShard(*s) for key, s in shards.items()} for _, shards, _ in results]
    # Whole matrices and slices of a large AdamW parameter come from different ranks, none twice.
    for key, shape in (("muon.4.momentum", (40, 30)), ("adamw.0.mean", (67, 31))):
        found = [export[key] for export in exports if key in export]
        assert all(shard.shape == shape for shard in found)
        assert sum(len(shard.values) for shard in found) == math.prod(shape)
        assert len(found) == (1 if "muon" in key else world_size)
    alone.import_state(reader(*exports))
    for key, shard in alone.export_state().items():
        tolerance = 1e-11 if "table" not in key else 2e-2
        torch.testing.assert_close(shard.values, expected[key], rtol=0, atol=tolerance)

    # Reductions begin in the last backward, each as soon as its bucket is full, alike on all ranks.
    all_events = [events for _, _, events in results]
    reductions = [[event for event in some if event[:6] == "reduce"] for some in all_events]
    assert all(some == reductions[0] for some in reductions)
    last, step = all_events[0].index("last"), all_events[0].index("step")
    places = [i for i, event in enumerate(all_events[0]) if event[:6] == "reduce"]
    assert len(places) > 4 and all(last < place < step for place in places)
    assert all_events[0].index("reduce adamw.0") < all_events[0].index("arrived muon.8", last)
