"""Muon for the matrices and AdamW for everything else, in one class, for one rank or many.

Parameters are packed into buckets of rows: matrices of one shape are stacked (a row is a whole matrix), large
AdamW parameters stand alone and small ones are joined (a row is one element). With N ranks each bucket's
gradients are summed and divided by N, every rank updates its own N-th of the rows, and the results are gathered;
small buckets are updated alike on every rank. One rank does none of that. A Muon step is momentum, equal row
norms, Polar Express, NorMuon's variance and cautious decay; AdamW is torch's fused kernel. State is fp32.

What would surprise: on a CPU the matrices are orthogonalised in fp32, since in bf16 a rounding difference of
1e-7 (another number of ranks) becomes 2 % of the update. And the class is not a torch.optim.Optimizer: making
one of those imports torch's compiler, 4.6 s of CPU at each start, and gives nothing that is used here.

Sources: Muon, Jordan et al. 2024; Polar Express, arXiv 2505.16932; NorMuon, 2510.05491; cautious weight decay,
2510.12402; AdamW, 1711.05101. Shapes: K matrices of M x N, P rows in a bucket.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

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
PART_OF = re.compile(r"(.*)\[(\d+):(\d+)\]")


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
    weights: Tensor, gradients: Tensor, state: dict[str, Tensor], options: dict[str, Any]
) -> None:
    """One Muon step on `weights`, in place. All (K, M, N) fp32; state: momentum (K, M, N), variance."""
    rows, columns = weights.shape[-2:]
    momentum = state["momentum"].lerp_(gradients, 1 - options["momentum"])
    update = gradients.lerp(momentum, options["momentum"])  # Nesterov's look ahead
    # Rows of equal norm; their common norm falls to the normalisation that follows.
    update /= update.norm(dim=-1, keepdim=True).clamp_(min=1e-6)
    update = orthogonalize(update).float()
    size = math.sqrt(min(rows, columns))  # the Frobenius norm of an exactly orthogonal matrix
    update *= size / update.norm(dim=(-2, -1), keepdim=True).clamp_(min=1e-10)
    mean_square = update.square().mean(dim=-1 if rows >= columns else -2, keepdim=True)
    variance = state["variance"].lerp_(mean_square, 1 - options["beta2"])
    update *= variance.clamp(min=1e-10).rsqrt()
    update *= size / update.norm(dim=(-2, -1), keepdim=True).clamp_(min=1e-10)
    if options["weight_decay"]:  # only where the step and the decay pull the same way
        agree = update * weights >= 0
        update = torch.where(agree, update.add(weights, alpha=options["weight_decay"]), update)
    weights.sub_(update, alpha=options["lr"] * max(1, rows / columns) ** 0.5)


def adamw_update(
    weights: Tensor,
    gradients: Tensor,
    state: dict[str, Tensor],
    options: dict[str, Any],
    step: int,
) -> None:
    """One step of torch.optim.AdamW on `weights`, in place. All (P,) fp32; state: mean, variance."""
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        [weights], [gradients], [state["mean"]], [state["variance"]], [],
        [torch.full((), float(step), device=weights.device)],
        lr=options["lr"], beta1=options["betas"][0], beta2=options["betas"][1],
        weight_decay=options["weight_decay"], eps=options["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip


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

    def spans(self) -> Iterator[tuple[str, int, int, int]]:
        """(name, first, last, offset): rows [first, last) of that parameter lie from `offset` in the own rows."""
        num_own = len(next(iter(self.state.values())))
        begin, end = self.part * num_own, (self.part + 1) * num_own
        start = 0
        for name, param in zip(self.names, self.params, strict=True):
            stop = start + self.rows_of(param)
            if max(start, begin) < min(stop, end):
                first, last = max(start, begin) - start, min(stop, end) - start
                yield name, first, last, start + first - begin
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
        self.num_steps = 0
        self.scatters = world_size > 1 and dist.get_backend() == "nccl"  # gloo may lack it
        for group in self.param_groups:
            group["base_lr"], group["base_weight_decay"] = group["lr"], group["weight_decay"]
        self.buckets = [
            Bucket(group, names, params, group["kind"] == "muon", num_parts, rank % num_parts)
            for group in self.param_groups
            for names, params in partition(group)
            for num_parts in [world_size if params[0].numel() >= SMALL else 1]
        ]

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

    @torch.no_grad()
    def step(self) -> None:
        """Average the gradients over the ranks and update every parameter.

        Raises RuntimeError when a parameter has no gradient.
        """
        self.num_steps += 1
        reductions = [self.start_reduction(bucket) for bucket in self.buckets]
        gathers = [
            self.start_gather(bucket, self.update(bucket, wait()))
            for bucket, wait in zip(self.buckets, reductions, strict=True)
        ]
        for wait in gathers:
            wait()

    def start_reduction(self, bucket: Bucket) -> Callable[[], Tensor]:
        """Start averaging the bucket's gradients; the returned call waits and gives this rank's rows."""
        gradients = [param.grad for param in bucket.params if param.grad is not None]
        if len(gradients) < len(bucket.params):
            raise RuntimeError(f"a parameter of {', '.join(bucket.names)} has no gradient")
        if self.world_size == 1:
            return lambda: bucket.pack(gradients).float()
        rows = bucket.pack(gradients).float()
        if self.scatters and bucket.num_parts > 1:
            own = torch.empty_like(bucket.own(rows))
            work = dist.reduce_scatter_tensor(own, rows, async_op=True)
        else:
            own = bucket.own(rows)
            work = dist.all_reduce(rows, async_op=True)

        def wait() -> Tensor:
            work.wait()  # pyright: ignore[reportOptionalMemberAccess]
            return own.div_(self.world_size)

        return wait

    def update(self, bucket: Bucket, gradients: Tensor) -> Tensor:
        """Update this rank's rows by their averaged gradients; returns the new rows in fp32."""
        weights = bucket.own(bucket.pack(bucket.params)).float()
        if bucket.stacked:
            muon_update(weights, gradients, bucket.state, bucket.group)
        else:
            adamw_update(weights, gradients, bucket.state, bucket.group, self.num_steps)
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

    def export_state(self) -> dict[str, Tensor]:
        """This rank's moments as "<parameter>.<moment>", and "step"; views, not copies.

        A large AdamW parameter that is shared among ranks appears as "<parameter>.<moment>[first:last]", a
        range of its flattened elements, so the exports of all ranks join into one dictionary.
        """
        tensors = {"step": torch.tensor(self.num_steps)}
        for bucket in self.buckets:
            shapes = dict(zip(bucket.names, (param.shape for param in bucket.params), strict=True))
            for name, first, last, offset in bucket.spans():
                for moment, rows in bucket.state.items():
                    part = rows[offset : offset + last - first]
                    if bucket.stacked:
                        tensors[f"{name}.{moment}"] = part[0]
                    elif last - first == shapes[name].numel():
                        tensors[f"{name}.{moment}"] = part.view(shapes[name])
                    else:
                        tensors[f"{name}.{moment}[{first}:{last}]"] = part
        return tensors

    @torch.no_grad()
    def import_state(self, tensors: dict[str, Tensor]) -> None:
        """Take over the joined `export_state` of any number of ranks, bit for bit.

        Raises KeyError when a moment, or a part of one, is missing.
        """
        parts: dict[str, list[tuple[int, Tensor]]] = {}
        for key, tensor in tensors.items():
            match = PART_OF.fullmatch(key)
            name, first = (match[1], int(match[2])) if match else (key, 0)
            parts.setdefault(name, []).append((first, tensor))
        for bucket in self.buckets:
            for name, first, last, offset in bucket.spans():
                for moment, rows in bucket.state.items():
                    own = rows[offset : offset + last - first]
                    if bucket.stacked:
                        own.copy_(tensors[f"{name}.{moment}"])
                    else:
                        fill(own, first, parts[f"{name}.{moment}"])
        self.num_steps = int(tensors["step"])


def partition(group: dict[str, Any]) -> Iterator[tuple[list[str], list[Tensor]]]:
    """(names, parameters) of each bucket of a group: Muon's by shape; AdamW's large ones alone, small ones joined."""
    together: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, param in zip(group["names"], group["params"], strict=True):
        alone = name if param.numel() >= SMALL else ""
        key = param.shape if group["kind"] == "muon" else alone
        together.setdefault(key, []).append((name, param))
    for members in together.values():
        yield [name for name, _ in members], [param for _, param in members]


def fill(own: Tensor, first: int, parts: list[tuple[int, Tensor]]) -> None:
    """Copy elements [first, first + len(own)) out of the parts, each a (first element, tensor)."""
    missing = len(own)
    for start, tensor in parts:
        flat = tensor.reshape(-1)
        low, high = max(start, first), min(start + len(flat), first + len(own))
        if low < high:
            own[low - first : high - first] = flat[low - start : high - start]
            missing -= high - low
    if missing:
        raise KeyError(f"{missing} elements of a moment are missing")
