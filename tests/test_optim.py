"""nanochat.optim against torch.optim.AdamW, the singular value decomposition, the formulas, and other rank counts."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat import optim
from nanochat.optim import POLAR_EXPRESS, Bucket, MuonAdamW, Part, orthogonalize

ADAMW = {"kind": "adamw", "lr": 0.01, "betas": (0.8, 0.96), "eps": 1e-10, "weight_decay": 0.1}
MUON = {"kind": "muon", "lr": 0.05, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.2}
SHAPES = {"muon": [(8, 8)] * 4 + [(40, 30)] * 4 + [(30, 40)], "adamw": [(67, 31), (9,), (), (4, 5)]}


def make_groups(dtype: torch.dtype = torch.float32) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    groups = []
    for options in (MUON, ADAMW):
        shapes = SHAPES[options["kind"]]
        params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
        names = [f"{options['kind']}.{i}" for i in range(len(shapes))]
        groups.append(options | {"params": params, "names": names})
    return groups


def parameters(groups: list[dict]) -> list[torch.Tensor]:
    return [param for group in groups for param in group["params"]]


def train(optimizer: MuonAdamW, steps: range, scale: float = 1.0) -> None:
    """Gradients depend on the step alone; `scale` makes those of the ranks differ."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in parameters(optimizer.param_groups):
            param.grad = (scale * torch.randn(param.shape, generator=generator)).to(param.dtype)
        optimizer.step()


def test_adamw_equals_torch() -> None:
    ours, theirs = make_groups()[1], make_groups()[1]
    optimizer = MuonAdamW([ours])
    options = {key: ADAMW[key] for key in ("lr", "betas", "eps", "weight_decay")}
    reference = torch.optim.AdamW(theirs["params"], **options, foreach=False)
    for step in range(50):
        generator = torch.Generator().manual_seed(step)
        for mine, other in zip(ours["params"], theirs["params"], strict=True):
            # Small gradients: an eps added before the bias correction would show.
            mine.grad = 1e-9 * torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours["params"], theirs["params"], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(48, 48), (64, 32), (32, 64)])
def test_orthogonalize_keeps_singular_vectors_and_levels_values(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(
        torch.randn(3, *shape, generator=generator), full_matrices=False
    )
    values = torch.logspace(-2, 0, min(shape))
    result = orthogonalize(left * values @ right)
    in_basis = left.mT @ result @ right.mT  # diagonal when the singular vectors are kept
    diagonal = in_basis.diagonal(dim1=-2, dim2=-1)
    assert (in_basis - torch.diag_embed(diagonal)).abs().max() < 2e-3
    assert diagonal.min() > 0.8585 and diagonal.max() < 1.1415
    expected = values / (1.01 * values.norm() + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(diagonal, expected.expand_as(diagonal), rtol=0, atol=2e-3)
    assert not orthogonalize(torch.zeros(1, *shape)).any()


def reference_muon(weight: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    """Muon for one matrix in fp64, straight from the published formulas."""
    w, m, v = weight.double(), torch.zeros_like(weight).double(), 0.0
    (rows, columns), mu = w.shape, MUON["momentum"]
    for gradient in gradients:
        g = gradient.double()
        m = mu * m + (1 - mu) * g
        u = (1 - mu) * g + mu * m
        row_norms = u.norm(dim=1, keepdim=True)
        u = u * (u.norm() / math.sqrt(rows)) / row_norms
        x = u / (1.01 * u.norm() + 1e-6)
        for a, b, c in POLAR_EXPRESS:
            left, values, right = torch.linalg.svd(x, full_matrices=False)
            x = left @ torch.diag(a * values + b * values**3 + c * values**5) @ right
        o = x * math.sqrt(min(rows, columns)) / x.norm()
        v = 0.9 * v + 0.1 * (o**2).mean(dim=1 if rows >= columns else 0, keepdim=True)
        scaled = o / v.sqrt()
        scaled = scaled * o.norm() / scaled.norm()
        decay = MUON["weight_decay"] * (scaled * w >= 0) * w
        w = w - MUON["lr"] * math.sqrt(max(1, rows / columns)) * (scaled + decay)
    return w.float()


def test_muon_equals_the_formulas() -> None:
    group = make_groups()[0]
    before = [param.detach().clone() for param in group["params"]]
    optimizer = MuonAdamW([group])
    gradients = [[] for _ in before]
    for step in range(4):
        train(optimizer, range(step, step + 1))
        for seen, param in zip(gradients, group["params"], strict=True):
            assert param.grad is not None
            seen.append(param.grad.clone())
    for param, weight, seen in zip(group["params"], before, gradients, strict=True):
        torch.testing.assert_close(param.detach(), reference_muon(weight, seen), rtol=0, atol=2e-4)


def test_bf16_parameters_have_fp32_state() -> None:
    half, full = make_groups(torch.bfloat16), make_groups(torch.bfloat16)
    for group in full:
        group["params"] = [torch.nn.Parameter(param.detach().float()) for param in group["params"]]
    optimizers = [MuonAdamW(half), MuonAdamW(full)]
    generator = torch.Generator().manual_seed(0)
    for mine, other in zip(parameters(half), parameters(full), strict=True):
        mine.grad = torch.randn(mine.shape, generator=generator).bfloat16()
        other.grad = mine.grad.float()
    for optimizer in optimizers:
        optimizer.step()
    assert all(
        tensor.dtype == torch.float32 for tensor, *_ in optimizers[0].export_state().values()
    )
    for mine, other in zip(parameters(half), parameters(full), strict=True):
        assert torch.equal(mine, other.bfloat16())


def reader(*exports: dict[str, Part]) -> Callable[[str, int, int], torch.Tensor]:
    """What a checkpoint of these ranks would give to `import_state`."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for export in exports:
        for key, part in export.items():
            parts.setdefault(key, {})[part.first] = part.values.clone()

    def read(key: str, first: int, last: int) -> torch.Tensor:
        return torch.cat([values for _, values in sorted(parts[key].items())])[first:last]

    return read


def test_resumed_equals_uninterrupted() -> None:
    straight, first, second = make_groups(), make_groups(), make_groups()
    train(MuonAdamW(straight), range(6))
    optimizer = MuonAdamW(first)
    train(optimizer, range(3))
    for mine, other in zip(parameters(second), parameters(first), strict=True):
        mine.data.copy_(other.data)
    resumed = MuonAdamW(second)
    resumed.import_state(reader(optimizer.export_state()))
    train(resumed, range(3, 6))
    for mine, other in zip(parameters(straight), parameters(second), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 9, 10])  # a matrix, a large and a small AdamW parameter
def test_a_gradient_that_is_not_finite_leaves_no_trace(bad: float, index: int) -> None:
    straight, groups = make_groups(), make_groups()
    train(MuonAdamW(straight), range(3))
    optimizer = MuonAdamW(groups)
    train(optimizer, range(2))
    for param in parameters(groups):
        param.grad = torch.ones_like(param)
    parameters(groups)[index].grad.view(-1)[0] = bad  # pyright: ignore[reportOptionalMemberAccess]
    optimizer.step()
    assert optimizer.finite is not None and not optimizer.finite
    train(optimizer, range(2, 3))
    assert optimizer.finite and optimizer.num_steps == 3
    for mine, other in zip(parameters(straight), parameters(groups), strict=True):
        assert torch.equal(mine, other)


def test_multipliers_reach_the_groups() -> None:
    optimizer = MuonAdamW(make_groups())
    for _ in range(2):  # they do not compound
        optimizer.set_multipliers(lr=0.5, momentum=0.7, weight_decay=0.25)
    muon, adamw = optimizer.param_groups
    assert (muon["lr"], muon["momentum"], muon["weight_decay"]) == (0.025, 0.7, 0.05)
    assert (adamw["lr"], adamw["weight_decay"]) == (0.005, 0.1)


def test_missing_gradient_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"muon\.8"):
        MuonAdamW(make_groups()).step()


def forward(params: list[torch.Tensor]) -> torch.Tensor:
    """A loss whose backward pass reaches the last parameter first."""
    x = torch.linspace(-1, 1, 31)
    for param in params:
        x = torch.tanh((param * x.mean()).sum() + x)
    return x.sum()


def reduce_during_backward(rank: int, world_size: int, start: Callable[..., None]) -> list[str]:
    """What happened in two backward passes of which the second is the last: arrivals and reductions."""
    groups = make_groups()
    optimizer = MuonAdamW(groups, rank, world_size)
    events: list[str] = []

    def started(self: MuonAdamW, bucket: Bucket) -> None:
        events.append(f"reduce {bucket.names[0]}")
        start(self, bucket)

    for group in groups:
        for name, param in zip(group["names"], group["params"], strict=True):
            param.register_post_accumulate_grad_hook(
                lambda _, name=name: events.append(f"arrived {name}")
            )
    optim.MuonAdamW.start_reduction = started  # pyright: ignore[reportAttributeAccessIssue]
    forward(parameters(groups)).backward()
    optimizer.expect_last_backward()
    events.append("last")
    forward(parameters(groups)).backward()
    events.append("step")
    optimizer.step()
    optim.MuonAdamW.start_reduction = start  # pyright: ignore[reportAttributeAccessIssue]
    return events


def run_rank(rank: int, world_size: int, folder: str) -> None:
    """One gloo rank: three steps on gradients whose mean over the ranks is that of one rank, and one bad step."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rendezvous = f"file://{folder}/store"
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=world_size)
    optim.MESSAGE_ELEMENTS = 1  # a message for every world_size matrices
    result = {}
    for scatters in (True, False):
        groups = make_groups()
        optimizer = MuonAdamW(groups, rank, world_size)
        assert optimizer.scatters
        optimizer.scatters = scatters
        train(optimizer, range(3), scale=2 * (rank + 1) / (world_size + 1))
        for param in parameters(groups):
            param.grad = torch.full_like(param, math.nan if rank == 1 else 1.0)
        optimizer.step()
        assert optimizer.finite is not None and not optimizer.finite
        weights = [param.detach() for param in parameters(groups)]
        parts = {key: tuple(part) for key, part in optimizer.export_state().items()}
        result[scatters] = (weights, parts)
    result["events"] = reduce_during_backward(rank, world_size, MuonAdamW.start_reduction)
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "world_size",
    [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)],
)
def test_ranks_equal_one_rank(tmp_path: Path, world_size: int) -> None:
    mp.spawn(run_rank, (world_size, str(tmp_path)), nprocs=world_size)  # pyright: ignore[reportPrivateImportUsage]
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)]
    groups = make_groups()
    alone = MuonAdamW(groups)
    train(alone, range(3))
    expected = {key: part.values.clone() for key, part in alone.export_state().items()}
    for scatters in (True, False):
        exports = []
        for weights, state in (result[scatters] for result in results):
            for mine, other in zip(parameters(groups), weights, strict=True):
                torch.testing.assert_close(mine.detach(), other, rtol=1e-4, atol=1e-4)
            exports.append({key: Part(*part) for key, part in state.items()})
        # Whole matrices and slices of a large AdamW parameter come from different ranks, none twice.
        for key, shape in (("muon.4.momentum", (40, 30)), ("adamw.0.mean", (67, 31))):
            found = [export[key] for export in exports if key in export]
            assert all(part.shape == shape for part in found)
            assert sum(len(part.values) for part in found) == math.prod(shape)
            assert len(found) == (1 if "muon" in key else world_size)
        alone.import_state(reader(*exports))
        for key, part in alone.export_state().items():
            torch.testing.assert_close(part.values, expected[key], rtol=1e-4, atol=1e-5)
    check_events([result["events"] for result in results])


def check_events(events: list[list[str]]) -> None:
    """Reductions begin in the last backward, each when its bucket is full and before what follows is there."""
    reductions = [[event for event in some if event.startswith("reduce")] for some in events]
    assert all(some == reductions[0] for some in reductions)
    last, step = events[0].index("last"), events[0].index("step")
    places = [i for i, event in enumerate(events[0]) if event.startswith("reduce")]
    assert len(places) > 4 and all(last < place < step for place in places)
    assert events[0].index("reduce adamw.0") < events[0].index("arrived muon.8", last)


def test_one_rank_registers_no_hooks() -> None:
    groups = make_groups()
    MuonAdamW(groups)
    assert all(param._post_accumulate_grad_hooks is None for param in parameters(groups))  # pyright: ignore[reportAttributeAccessIssue]
