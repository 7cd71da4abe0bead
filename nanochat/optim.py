"""Muon for the matrices and AdamW for everything else, in one class, for one rank or many.

Parameters are packed into buckets of rows: matrices of one shape are stacked (a row is a whole matrix), large
AdamW parameters stand alone and small ones are joined (a row is one element). With N ranks a bucket's gradients
are reduced as soon as the last backward of a step has brought them, every rank updates its own N-th of the rows,
whose state it alone holds, and the results are gathered; small buckets are updated alike on every rank. One rank
does none of that. A Muon step is momentum, equal row norms, Polar Express, NorMuon's variance and cautious
decay; AdamW is torch's fused kernel. State is fp32.

What would surprise: a step whose reduced gradient is not finite changes nothing, on any rank, and the host is
not asked: zero times the update is added (`finite` tells later). On a CPU the matrices are orthogonalised in
fp32, since in bf16 a rounding difference of 1e-7 (another number of ranks) becomes 2 % of the update. And the
class is not a torch.optim.Optimizer: making one of those imports torch's compiler, 4.6 s of CPU at each start.

Sources: Muon, Jordan et al. 2024; Polar Express, arXiv 2505.16932; NorMuon, 2510.05491; cautious weight decay,
2510.12402; AdamW, 1711.05101. Shapes: K matrices of M x N, P rows in a bucket.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Five odd quintics a x + b x^3 + c x^5 that carry singular values in [1e-3, 0.99] to [0.859, 1.141] (2505.16932).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SMALL = 1024  # parameters with fewer elements are joined and replicated: a message each costs more than it saves
MESSAGE_ELEMENTS = (
    1 << 23
)  # of matrices sent together: 32 MB in fp32, so that there is something to overlap


def orthogonalize(matrices: Tensor) -> Tensor:
    """Each matrix with its singular values brought near 1, in bf16 on a GPU and fp32 elsewhere.

    matrices: (K, M, N); a zero matrix stays zero.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the Gram matrix of the shorter side
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        quadratic = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, quadratic, x, beta=a)
    return x.mT if tall else x


def muon_update(
    weights: Tensor,
    gradients: Tensor,
    state: dict[str, Tensor],
    options: dict[str, Any],
    finite: Tensor,
) -> None:
    """One Muon step on `weights`, in place; none where not `finite` ().

    All (K, M, N) fp32; state: momentum (K, M, N), variance.
    """
    rows, columns = weights.shape[-2:]
    gradients = torch.where(finite, gradients, 0.0)  # zero times infinity would not be zero
    momentum = state["momentum"].lerp_(gradients, (1 - options["momentum"]) * finite)
    update = gradients.lerp(momentum, options["momentum"])  # Nesterov's look ahead
    # Rows of equal norm; their common norm falls to the normalisation that follows.
    update /= update.norm(dim=-1, keepdim=True).clamp_(min=1e-6)
    update = orthogonalize(update).float()
    size = math.sqrt(min(rows, columns))  # the Frobenius norm of an exactly orthogonal matrix
    update *= size / update.norm(dim=(-2, -1), keepdim=True).clamp_(min=1e-10)
    mean_square = update.square().mean(dim=-1 if rows >= columns else -2, keepdim=True)
    variance = state["variance"].lerp_(mean_square, (1 - options["beta2"]) * finite)
    update *= variance.clamp(min=1e-10).rsqrt()
    update *= size / update.norm(dim=(-2, -1), keepdim=True).clamp_(min=1e-10)
    if options["weight_decay"]:  # only where the step and the decay pull the same way
        agree = update * weights >= 0
        update = torch.where(agree, update.add(weights, alpha=options["weight_decay"]), update)
    weights.addcmul_(update, finite * (options["lr"] * max(1, rows / columns) ** 0.5), value=-1)


def adamw_update(
    weights: Tensor,
    gradients: Tensor,
    state: dict[str, Tensor],
    options: dict[str, Any],
    finite: Tensor,
    step: Tensor,
) -> None:
    """One step of torch.optim.AdamW on `weights`, in place; none where not `finite` ().

    All (P,) fp32; state: mean, variance; `step` () counts this one.
    """
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        [weights], [gradients], [state["mean"]], [state["variance"]], [], [step],
        lr=options["lr"], beta1=options["betas"][0], beta2=options["betas"][1],
        weight_decay=options["weight_decay"], eps=options["eps"], amsgrad=False, maximize=False,
        found_inf=1.0 - finite.float(),
    )  # fmt: skip


class Part(NamedTuple):
    """A range of the flattened elements of one moment."""

    values: Tensor  # (last - first,)
    shape: tuple[int, ...]  # of the whole moment
    first: int


@dataclass
class Bucket:
    """Parameters that are reduced, updated and gathered as one tensor of rows."""

    group: dict[str, Any]
    names: list[str]
    params: list[Tensor]
    stacked: bool  # a row is a matrix; otherwise a row is one element
    num_parts: int  # ranks that share the rows; 1: every rank updates them all
    part: int  # which share is this rank's
    state: dict[str, Tensor] = field(default_factory=dict)
    num_missing: int = 0  # gradients that the last backward has not brought yet
    wait: Callable[[], Tensor] | None = None  # of the reduction that is under way

    def __post_init__(self) -> None:
        """Zero moments for this rank's rows."""
        own = self.own(self.pack(self.params))
        zeros = torch.zeros_like(own, dtype=torch.float32, memory_format=torch.contiguous_format)
        if not self.stacked:
            self.state = {"mean": zeros, "variance": zeros.clone()}
            return
        over = -1 if own.shape[-2] >= own.shape[-1] else -2
        self.state = {"momentum": zeros, "variance": zeros.mean(dim=over, keepdim=True)}

    def rows_of(self, param: Tensor) -> int:
        """Number of rows that `param` has in this bucket."""
        return 1 if self.stacked else param.numel()

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors' rows, filled up with zeros to divide among the ranks; one flat tensor is not copied."""
        if self.stacked:
            rows = torch.stack(list(tensors))
        elif len(tensors) == 1:
            rows = tensors[0].detach().reshape(-1)
        else:
            rows = torch.cat([tensor.reshape(-1) for tensor in tensors])
        short = -len(rows) % self.num_parts
        return torch.cat([rows, rows.new_zeros(short, *rows.shape[1:])]) if short else rows

    def own(self, rows: Tensor) -> Tensor:
        """This rank's share of packed rows."""
        return rows.chunk(self.num_parts)[self.part]

    def unpack(self, rows: Tensor) -> None:
        """Write packed rows back into the parameters."""
        sizes = [self.rows_of(param) for param in self.params]
        for param, part in zip(self.params, rows[: sum(sizes)].split(sizes), strict=True):
            if part.data_ptr() != param.data_ptr():
                param.copy_(part.view(param.shape))

    def moments(self) -> Iterator[tuple[str, Part]]:
        """("<parameter>.<moment>", this rank's part of it) of every moment; the values are views."""
        num_own = len(next(iter(self.state.values())))
        begin, end = self.part * num_own, (self.part + 1) * num_own
        start = 0
        for name, param in zip(self.names, self.params, strict=True):
            stop = start + self.rows_of(param)
            first, last = max(start, begin), min(stop, end)
            for moment, rows in self.state.items() if first < last else ():
                own = rows[first - begin : last - begin]
                shape = own.shape[1:] if self.stacked else param.shape
                yield f"{name}.{moment}", Part(own.view(-1), tuple(shape), first - start)
            start = stop


class MuonAdamW:
    """Muon and AdamW over parameter groups `{"kind": "muon" | "adamw", "names", "params", "lr", ...}`.

    A Muon group has momentum, beta2 and weight_decay, an AdamW group betas, eps and weight_decay. Gradients are
    averaged over the ranks, so the loss of each rank must be scaled for that. With more than one rank every
    rank has the same groups, and `torch.distributed` is initialised.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], rank: int = 0, world_size: int = 1
    ) -> None:
        self.param_groups = [dict(group) for group in groups]
        self.world_size = world_size
        for group in self.param_groups:
            group["base_lr"], group["base_weight_decay"] = group["lr"], group["weight_decay"]
        self.buckets = [
            Bucket(group, names, params, group["kind"] == "muon", num_parts, rank % num_parts)
            for group in self.param_groups
            for names, params in partition(group, world_size)
            for num_parts in [world_size if params[0].numel() >= SMALL else 1]
        ]
        self.num_steps = torch.zeros((), device=self.buckets[0].params[0].device)  # updates made
        self.finite: Tensor | None = None  # bool (): did the last step change anything?
        self.expecting = False  # the gradients of the backward that comes are complete
        if world_size > 1:
            self.scatters = dist.get_backend() in ("nccl", "gloo")  # others may lack it
            for bucket in self.buckets:
                for param in bucket.params:
                    param.register_post_accumulate_grad_hook(partial(self._arrive, bucket))

    def set_multipliers(self, lr: float, momentum: float, weight_decay: float) -> None:
        """Set the coming step's options: learning rates times `lr`, Muon's momentum, Muon's decay times `weight_decay`."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * lr
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = group["base_weight_decay"] * weight_decay

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def expect_last_backward(self) -> None:
        """The backward that comes completes the gradients: reduce each bucket as soon as it is there."""
        self.expecting = True
        for bucket in self.buckets:
            bucket.num_missing = len(bucket.params)

    def _arrive(self, bucket: Bucket, _: Tensor) -> None:
        """A gradient is complete. All ranks walk the same graph, so their buckets fill in the same order."""
        if self.expecting:
            bucket.num_missing -= 1
            if not bucket.num_missing:
                self.start_reduction(bucket)

    @torch.no_grad()
    def step(self) -> None:
        """Average the gradients over the ranks and update every parameter, or none if they are not finite.

        Raises RuntimeError when a parameter has no gradient.
        """
        self.expecting = False
        for bucket in self.buckets:
            if bucket.wait is None:
                self.start_reduction(bucket)
        gradients = [bucket.wait() for bucket in self.buckets if bucket.wait]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.world_size > 1:
            dist.all_reduce(norm)  # the sum is finite where the norm of every rank's rows is
        self.finite = norm.isfinite()
        self.num_steps += self.finite
        gathers = [
            self.start_gather(bucket, self.update(bucket, gradient, self.finite))
            for bucket, gradient in zip(self.buckets, gradients, strict=True)
        ]
        for wait in gathers:
            wait()

    @torch.no_grad()
    def start_reduction(self, bucket: Bucket) -> None:
        """Start averaging the bucket's gradients; `bucket.wait` ends it and gives this rank's rows."""
        gradients = [param.grad for param in bucket.params if param.grad is not None]
        if len(gradients) < len(bucket.params):
            raise RuntimeError(f"a parameter of {', '.join(bucket.names)} has no gradient")
        if self.world_size == 1:
            bucket.wait = lambda: bucket.pack(gradients).float()
            return
        rows = bucket.pack(gradients).float()
        for param in bucket.params:
            param.grad = None  # the rows hold it now
        own = bucket.own(rows)
        if self.scatters and bucket.num_parts > 1:
            own = torch.empty_like(own)
            work = dist.reduce_scatter_tensor(own, rows, async_op=True)
        else:
            work = dist.all_reduce(rows, async_op=True)

        def wait() -> Tensor:
            work.wait()  # pyright: ignore[reportOptionalMemberAccess]
            return own.div_(self.world_size)

        bucket.wait = wait

    def update(self, bucket: Bucket, gradients: Tensor, finite: Tensor) -> Tensor:
        """Update this rank's rows by their averaged gradients; returns the new rows in fp32."""
        bucket.wait = None
        weights = bucket.own(bucket.pack(bucket.params)).float()
        if bucket.stacked:
            muon_update(weights, gradients, bucket.state, bucket.group, finite)
        else:
            adamw_update(weights, gradients, bucket.state, bucket.group, finite, self.num_steps)
        return weights

    def start_gather(self, bucket: Bucket, own: Tensor) -> Callable[[], None]:
        """Start collecting the updated rows of all ranks; the returned call waits and writes the parameters."""
        if bucket.num_parts == 1:
            bucket.unpack(own)
            return lambda: None
        own = own.to(bucket.params[0].dtype)
        rows = own.new_empty(bucket.num_parts * len(own), *own.shape[1:])
        work = dist.all_gather_into_tensor(rows, own, async_op=True)

        def wait() -> None:
            work.wait()  # pyright: ignore[reportOptionalMemberAccess]
            bucket.unpack(rows)

        return wait

    def export_state(self) -> dict[str, Part]:
        """This rank's parts of all moments by "<parameter>.<moment>", and "step"; views, not copies."""
        step = {"step": Part(self.num_steps.view(1), (), 0)}
        return step | {key: part for bucket in self.buckets for key, part in bucket.moments()}

    @torch.no_grad()
    def import_state(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Take over an exported state, of any number of ranks, bit for bit.

        `read(key, first, last)` gives these elements of a flattened moment.
        """
        for key, part in self.export_state().items():
            part.values.copy_(read(key, part.first, part.first + len(part.values)))


def partition(group: dict[str, Any], world_size: int) -> Iterator[tuple[list[str], list[Tensor]]]:
    """(names, parameters) of each bucket of a group: Muon's by shape; AdamW's large ones alone, small ones joined.

    Among ranks a shape is cut into messages, from the last layer, where backward begins, to the first.
    """
    together: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, param in reversed(list(zip(group["names"], group["params"], strict=True))):
        alone = name if param.numel() >= SMALL else ""
        key = param.shape if group["kind"] == "muon" else alone
        together.setdefault(key, []).append((name, param))
    for members in together.values():
        num_each = len(members)
        if world_size > 1 and group["kind"] == "muon":
            num_rounds = MESSAGE_ELEMENTS // (world_size * members[0][1].numel())
            num_each = world_size * max(1, num_rounds)
        for begin in range(0, len(members), num_each):
            some = members[begin : begin + num_each]
            yield [name for name, _ in some], [param for _, param in some]
