"""Muon for the matrices and AdamW for everything else, in one class, for one rank or many.

Parameters are packed into buckets of rows: matrices of one shape are stacked (a row is a matrix),
large AdamW parameters stand alone, small ones are joined (a row is an element). One rank packs,
updates and unpacks one bucket after another, so that few copies are there at once. With N ranks, a
bucket's gradients are averaged once a step's last backward pass has produced them; each rank holds
the state of, and updates, its N-th of the rows, and the new rows are gathered. Small buckets are
updated on every rank. Parameters are fp32, or bf16 with AdamW, whose arithmetic is fp32.

A step with a non-finite gradient changes nothing on any rank without blocking the host: updates
are multiplied by `finite`. In fp16 the loss has a scale, which falls after such a step. Not a
torch.optim.Optimizer: making one imports torch's compiler, 4.6 s of CPU at each start.

Sources: Muon, Jordan et al. 2024; Polar Express, arXiv 2505.16932; NorMuon, 2510.05491; cautious
weight decay, 2510.12402; AdamW, 1711.05101.
Shapes: K matrices of (M, N) in a bucket, or P elements; a rank's shard has K / ranks or P / ranks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import UserError

Group = dict[str, Any]  # parameters and their options, see MuonAdamW
State = dict[str, Tensor]  # what the optimizer remembers of a bucket's rows, by kind

# Five odd quintics a x + b x^3 + c x^5 that map singular values in [1e-3, .99] to [.859, 1.141].
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# Smaller parameters are joined and replicated: a message each would cost more than it saves.
SMALL = 1024
# Elements of matrices per message: 32 MB in fp32, small enough to overlap with backward.
MESSAGE_ELEMENTS = 1 << 23
# Elements of matrices per stack on one rank: 28 of depth 12's smaller matrices, one of the largest
# that depth 32 has. A larger stack would be no faster, and bounds what a step needs.
STACK_ELEMENTS = 1 << 24
# Bytes per element of a stack during muon_update: weights and update, and in 16 bits the four
# matrices of `orthogonalize`, which a CPU has in fp32. Counted by tests/test_optim.py.
STACK_BYTES = 17
VARYING = ("lr", "momentum", "weight_decay")  # options that change from step to step
# The loss's scale in fp16, whose numbers are 6e-8 to 65,504: where it starts, and steps without
# overflow after which it is doubled. Both of torch.amp.GradScaler.
START_SCALE, GROWTH_STEPS = 2.0**16, 2000


def transient_bytes(num_elements: int, largest_matrix: int) -> int:
    """Bytes that a step takes for a while, beside weights, gradients and state.

    `num_elements` of all of Muon's matrices, and of the largest; an upper bound.
    """
    return STACK_BYTES * max(largest_matrix, min(num_elements, STACK_ELEMENTS))


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """(K, M, N) matrices with the same singular vectors and all singular values near 1.

    Computed and returned in `dtype`; no entry on the way is too large for fp16. A zero matrix stays
    zero.
    """
    x = matrices.to(dtype)
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the Gram matrix of the shorter side
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        quadratic = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, quadratic, x, beta=a)
    return x.mT if tall else x


def muon_update(
    weights: Tensor, gradients: Tensor, state: State, options: Group, finite: Tensor
) -> None:
    """One Muon step on `weights`, in place; a no-op where `finite` () is False.

    weights, gradients (which are overwritten), state["momentum"]: (K, M, N);
    state["variance"], of NorMuon: (K, M, 1) if M >= N, else (K, 1, N).
    """
    rows, columns = weights.shape[-2:]
    update = gradients.masked_fill_(~finite, 0.0)  # zero times infinity would not be zero
    momentum = state["momentum"].lerp_(update, (1 - options["momentum"]) * finite)
    update.lerp_(momentum, options["momentum"])  # Nesterov's look ahead
    # Rows of equal norm; orthogonalize normalises the scale.
    update /= update.norm(dim=-1, keepdim=True).clamp_(min=1e-6)
    update = orthogonalize(update, options["dtype"]).to(weights.dtype)
    size = math.sqrt(min(rows, columns))  # the Frobenius norm of an exactly orthogonal matrix
    # All that follows scales rows or columns, which takes one pass in the end.
    dim = -1 if rows >= columns else -2
    square = torch.linalg.vector_norm(update, dim=dim, keepdim=True).square_()
    scale = size / square.sum((-2, -1), keepdim=True).sqrt_().clamp_(min=1e-10)
    mean_square = square * scale.square() / update.shape[dim]
    variance = state["variance"].lerp_(mean_square, (1 - options["beta2"]) * finite)
    scale = scale * variance.clamp(min=1e-10).rsqrt_()
    total = (square * scale.square()).sum((-2, -1), keepdim=True).sqrt_()
    update *= scale * (size / total.clamp_(min=1e-10))
    decay = options["weight_decay"]
    if isinstance(decay, Tensor) or decay:  # only where step and decay have the same sign
        agrees = (update * weights).sign_().add_(1).clamp_(max=1)  # 1 or 0; where() is slow on CPUs
        agreeing = agrees.mul_(weights)
        if isinstance(decay, Tensor):
            update.addcmul_(agreeing, decay)
        else:
            update.add_(agreeing, alpha=decay)
    weights.addcmul_(update, finite * (options["lr"] * max(1, rows / columns) ** 0.5), value=-1)


def adamw_update(
    weights: Tensor, gradients: Tensor, state: State, options: Group, finite: Tensor, step: Tensor
) -> None:
    """One step of torch.optim.AdamW on `weights`, in place; a no-op where `finite` () is False.

    weights, gradients, state["mean"], state["variance"]: (P,); `step` () counts this one. Computed
    in the dtype of the variance, in parts that take no more memory than a stack of matrices.
    """
    (beta1, beta2), wide = options["betas"], state["variance"].dtype
    step_size = options["lr"] / (1 - beta1**step)
    tensors = (weights, gradients, state["mean"], state["variance"])
    parts = (tensor.split(STACK_ELEMENTS // 2) for tensor in tensors)
    for weight, gradient, mean, variance in zip(*parts, strict=True):
        new_mean = mean.to(wide).lerp(gradient.to(wide), 1 - beta1)
        new_variance = variance.lerp(gradient.to(wide).square(), 1 - beta2)
        deviation = (new_variance / (1 - beta2**step)).sqrt() + options["eps"]
        kept = weight.to(wide) * (1 - options["lr"] * options["weight_decay"])
        new_weight = kept - step_size * new_mean / deviation
        for old, new in ((weight, new_weight), (mean, new_mean), (variance, new_variance)):
            old.copy_(torch.where(finite, new, old))


def fused_adamw_update(
    weights: Tensor, gradients: Tensor, state: State, options: Group, finite: Tensor, step: Tensor
) -> None:
    """The same in one of torch's kernels, for tensors of one dtype on a CPU or with CUDA.

    Of the kernel for MPS nobody has shown that it heeds `found_inf`.
    """
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        [weights], [gradients], [state["mean"]], [state["variance"]], [], [step],
        lr=options["lr"], beta1=options["betas"][0], beta2=options["betas"][1],
        weight_decay=options["weight_decay"], eps=options["eps"], amsgrad=False, maximize=False,
        found_inf=1.0 - finite.float(),
    )  # fmt: skip


class StateShard(NamedTuple):
    """This rank's range of one parameter's optimizer state, such as its momentum."""

    values: Tensor  # (number of elements,) of the flattened whole
    shape: tuple[int, ...]  # of the whole
    first: int  # where in the whole the values begin


@dataclass
class Bucket:
    """Parameters that are reduced, updated and gathered as one tensor of rows."""

    group: Group
    names: list[str]
    params: list[Tensor]
    num_shards: int  # ranks that share the rows; 1: every rank updates them all
    shard: int  # which of them this rank updates
    num_missing: int = 0  # gradients still to come in the last backward pass
    # With several ranks: gradient of this rank's rows, and the work after which it is their sum.
    reduction: tuple[Tensor, dist.Work | None] | None = None

    def __post_init__(self) -> None:
        self.stacked = self.group["kind"] == "muon"  # a row is a matrix, else one element
        self.num_rows = [1 if self.stacked else param.numel() for param in self.params]
        own = self.own_rows(self.pack(self.params))
        zeros = torch.zeros_like(own, memory_format=torch.contiguous_format)
        if self.stacked:
            mean_over = -1 if own.shape[-2] >= own.shape[-1] else -2
            variance = zeros.mean(dim=mean_over, keepdim=True)
            self.state: State = {"momentum": zeros, "variance": variance}
        else:
            # A mean of 16 bits forgets its rounding errors in a few steps; a variance that moves by
            # .5 % a step would stand still, since numbers of bf16 are up to .8 % apart.
            wide = torch.promote_types(own.dtype, torch.float32)
            self.state = {"mean": zeros, "variance": zeros.to(wide, copy=True)}
            self.is_fused = own.dtype == wide and own.device.type in ("cpu", "cuda")

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """(K, M, N) or (P,) rows of the tensors, zero-padded to divide among the ranks.

        A single flat tensor that divides is not copied.
        """
        if self.stacked:
            rows = torch.stack(list(tensors))
        elif len(tensors) == 1:
            rows = tensors[0].detach().reshape(-1)
        else:
            rows = torch.cat([tensor.reshape(-1) for tensor in tensors])
        num_lacking = -len(rows) % self.num_shards
        if num_lacking:
            rows = torch.cat([rows, rows.new_zeros(num_lacking, *rows.shape[1:])])
        return rows

    def gradients(self) -> list[Tensor]:
        found = [param.grad for param in self.params if param.grad is not None]
        if len(found) < len(self.params):
            raise RuntimeError(f"a parameter of {', '.join(self.names)} has no gradient")
        return found

    def own_rows(self, rows: Tensor) -> Tensor:
        return rows.chunk(self.num_shards)[self.shard]

    def unpack(self, rows: Tensor) -> None:
        rows = rows[: sum(self.num_rows)]
        for param, values in zip(self.params, rows.split(self.num_rows), strict=True):
            if values.data_ptr() != param.data_ptr():
                param.copy_(values.view(param.shape))

    def state_shards(self) -> Iterator[tuple[str, StateShard]]:
        """("<parameter>.<kind of state>", shard) for all state of this rank; views, not copies."""
        num_own = len(next(iter(self.state.values())))
        own_begin, own_end = self.shard * num_own, (self.shard + 1) * num_own
        begin = 0  # the parameter's first row
        for name, param, num_rows in zip(self.names, self.params, self.num_rows, strict=True):
            end = begin + num_rows
            first, last = max(begin, own_begin), min(end, own_end)
            for kind, rows in self.state.items() if first < last else ():
                values = rows[first - own_begin : last - own_begin]
                shape = values.shape[1:] if self.stacked else param.shape
                yield f"{name}.{kind}", StateShard(values.view(-1), tuple(shape), first - begin)
            begin = end


class MuonAdamW:
    """Muon and AdamW over groups `{"kind": "muon" | "adamw", "names", "params", "lr", ...}`.

    A Muon group has momentum, beta2 and weight_decay; an AdamW group betas, eps and weight_decay.
    Matrices are orthogonalised in `dtype`, that of the model's matmuls; there an error of 1e-7
    (another number of ranks) becomes 2 % of the update, but it halves the time. Gradients are
    averaged over the ranks: scale each rank's loss for that, and by `loss_scale`, which is 1 unless
    `dtype` is fp16. Groups are the same on every rank; with more than one, `torch.distributed` is
    initialised.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.param_groups = [dict(group) for group in groups]
        self.world_size = world_size
        self.buckets: list[Bucket] = []
        for group in self.param_groups:
            group["base_lr"], group["base_weight_decay"] = group["lr"], group["weight_decay"]
            some = group["params"][0]
            narrow = some.is_cuda or dtype == torch.bfloat16
            group["dtype"] = dtype if narrow else some.dtype
            for names, params in partition(group, world_size):
                num_shards = world_size if params[0].numel() >= SMALL else 1
                self.buckets.append(Bucket(group, names, params, num_shards, rank % num_shards))
        device = self.buckets[0].params[0].device
        self.num_steps = torch.zeros((), device=device)  # updates made
        self.scales = dtype == torch.float16
        start = [START_SCALE if self.scales else 1.0, 0.0]
        self.scale_state = torch.tensor(start, dtype=torch.float32, device=device)
        self.loss_scale, self.num_finite = self.scale_state.unbind()  # finite steps at this scale
        self.muon_update, self.adamw_update = muon_update, adamw_update
        if world_size > 1:
            for bucket in self.buckets:
                for param in bucket.params:
                    param.register_post_accumulate_grad_hook(partial(self._count_down, bucket))

    def compile(self) -> None:
        """Compile the updates, for each shape once: what varies is passed in tensors."""

        def muon_on_a_copy(weights: Tensor, gradients: Tensor, *others: Any) -> None:
            # Inductor of torch 2.15 fails on gradients that are overwritten, and needs no copy.
            muon_update(weights, gradients.clone(), *others)

        self.muon_update = torch.compile(muon_on_a_copy, dynamic=False)
        self.adamw_update = torch.compile(adamw_update, dynamic=False)
        for group in self.param_groups:
            fixed = {key: group[key] for key in ("beta2", "betas", "eps", "dtype") if key in group}
            full = self.num_steps.new_full
            varying = {key: full((), group[key]) for key in VARYING if key in group}
            group["compiled"] = fixed | varying

    def set_multipliers(self, lr: float, momentum: float, weight_decay: float) -> None:
        """Scale the next step's learning rates and Muon's weight decay; set Muon's momentum."""
        for group in self.param_groups:
            group["lr"] = group["base_lr"] * lr
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = group["base_weight_decay"] * weight_decay
            for key, value in group.get("compiled", {}).items():
                if isinstance(value, Tensor):
                    value.fill_(group[key])

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def reduce_on_next_backward(self) -> None:
        """Start averaging each bucket as soon as the next backward pass has filled it.

        Call it before a step's last backward pass; otherwise `step` does all the averaging.
        """
        for bucket in self.buckets:
            bucket.num_missing = len(bucket.params)

    def _count_down(self, bucket: Bucket, _: Tensor) -> None:
        """Note that a gradient has arrived; buckets fill in the same order on all ranks."""
        if bucket.num_missing:
            bucket.num_missing -= 1
            if not bucket.num_missing:
                self.start_reduction(bucket)

    @torch.no_grad()
    def start_reduction(self, bucket: Bucket) -> tuple[Tensor, dist.Work | None]:
        """Start averaging the bucket's gradients; returns `bucket.reduction`."""
        bucket.num_missing = 0
        rows = bucket.pack(bucket.gradients())
        for param in bucket.params:
            param.grad = None  # the rows hold it now
        own = bucket.own_rows(rows)
        if bucket.num_shards > 1:
            own = torch.empty_like(own)
            work = dist.reduce_scatter_tensor(own, rows, async_op=True)
        else:
            work = dist.all_reduce(rows, async_op=True)
        bucket.reduction = own, work
        return bucket.reduction

    def finish_reductions(self) -> list[Tensor]:
        """The averaged gradients of this rank's rows, bucket by bucket."""
        gradients = []
        for gradient, work in [b.reduction or self.start_reduction(b) for b in self.buckets]:
            work.wait()  # pyright: ignore[reportOptionalMemberAccess]
            gradients.append(gradient.div_(self.world_size))
        return gradients

    @torch.no_grad()
    def step(self) -> Tensor:
        """Update every parameter if the gradient is finite; returns False () where it is not.

        But True if a smaller scale of the loss, which the next step will have, may mend that.
        Raises RuntimeError if a parameter has no gradient.
        """
        if self.world_size > 1:
            gradients = self.finish_reductions()
        else:
            gradients = [grad for bucket in self.buckets for grad in bucket.gradients()]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.world_size > 1:
            dist.all_reduce(norm)  # the sum is finite where the norm of every rank's rows is
        finite = norm.isfinite()
        sound = finite | (self.loss_scale > 1)
        self.num_steps += finite
        gathers = []
        for bucket in self.buckets:
            gradient = bucket.reduction[0] if bucket.reduction else bucket.pack(bucket.gradients())
            bucket.reduction = None
            if self.scales:
                gradient.div_(self.loss_scale)  # a power of two: exact
            own = bucket.own_rows(bucket.pack(bucket.params))
            options = bucket.group.get("compiled", bucket.group)
            if bucket.stacked:
                self.muon_update(own, gradient, bucket.state, options, finite)
            elif bucket.is_fused:
                fused_adamw_update(
                    own, gradient, bucket.state, bucket.group, finite, self.num_steps
                )
            else:
                self.adamw_update(own, gradient, bucket.state, options, finite, self.num_steps)
            if bucket.num_shards == 1:
                bucket.unpack(own)
            else:
                rows = own.new_empty(bucket.num_shards * len(own), *own.shape[1:])
                work = dist.all_gather_into_tensor(rows, own, async_op=True)
                gathers.append((bucket, rows, work))
        for bucket, rows, work in gathers:
            work.wait()  # pyright: ignore[reportOptionalMemberAccess]
            bucket.unpack(rows)
        if self.scales:
            self.adapt_scale(finite)
        return sound

    def adapt_scale(self, finite: Tensor) -> None:
        """Halve the loss's scale, down to 1, or double it when it has served long enough."""
        self.num_finite.add_(1).mul_(finite)
        is_old = self.num_finite >= GROWTH_STEPS
        self.loss_scale.mul_(torch.where(finite, 1.0 + is_old.float(), 0.5)).clamp_(min=1.0)
        self.num_finite.mul_(~is_old)

    def export_state(self) -> dict[str, StateShard]:
        """This rank's shards by "<parameter>.<kind of state>", and "step"; views, not copies.

        In fp16 also "loss_scale", with the number of steps since it was changed.
        """
        step = {"step": StateShard(self.num_steps.view(1), (), 0)}
        if self.scales:
            step["loss_scale"] = StateShard(self.scale_state, (2,), 0)
        return step | dict(pair for bucket in self.buckets for pair in bucket.state_shards())

    @torch.no_grad()
    def import_state(self, read: Callable[[str, int, int], Tensor]) -> None:
        """Load a state exported by any number of ranks, bit for bit.

        `read(key, first, last)` returns those elements of the flattened tensor. A scale of the loss
        may be missing, as the run may have begun in another dtype.
        """
        for key, shard in self.export_state().items():
            try:
                shard.values.copy_(read(key, shard.first, shard.first + len(shard.values)))
            except UserError:
                if key != "loss_scale":
                    raise


def partition(group: Group, world_size: int) -> Iterator[tuple[list[str], list[Tensor]]]:
    """(names, parameters) of each bucket of a group.

    Muon's are joined by shape; large AdamW parameters stand alone, small ones are joined. A shape
    is cut into stacks or, with several ranks, into messages, the last layer first, where backward
    begins.
    """
    buckets: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, param in reversed(list(zip(group["names"], group["params"], strict=True))):
        alone = name if param.numel() >= SMALL else ""
        key = param.shape if group["kind"] == "muon" else alone
        buckets.setdefault(key, []).append((name, param))
    for members in buckets.values():
        num_each = len(members)
        if group["kind"] == "muon":
            limit = MESSAGE_ELEMENTS if world_size > 1 else STACK_ELEMENTS
            num_each = world_size * max(1, limit // (world_size * members[0][1].numel()))
        for begin in range(0, len(members), num_each):
            some = members[begin : begin + num_each]
            yield [name for name, _ in some], [param for _, param in some]
