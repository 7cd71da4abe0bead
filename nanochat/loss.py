"""Norm, relu squared, rotation, and the loss over the vocabulary in chunks.

On a CPU every eager elementwise operation walks through all activations, forward and backward.
Where that costs, gradients are written by hand; together this takes 22 % off a step of the
laptop's model (dev/LOG.md). torch.compile traces through all of them.

Shapes: B batch, T time, C channels, H heads, D head dimension; M = B T tokens, V vocabulary with
padding, R rows of one chunk. Sources: chunked losses of Liger Kernel (arXiv 2410.10989) and Cut
Your Losses (arXiv 2411.09009).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1.1920928955078125e-07  # epsilon of fp32: what the published weights were trained with
# Logits in memory at once. CPU: 2 MiB of fp32, so that tanh and exp find them in the L2 cache.
# GPU: up to 512 MiB of fp32, enough rows for efficient matmuls (not measured: no GPU was at hand).
CPU_CHUNK, GPU_CHUNK = 2**19, 2**27
# Rows of a chunk in fp16: x is normed, so no sum over them of dz x, each at most sqrt(C), overflows
# for C up to 4,095; a smaller scale of the loss could not mend that.
FP16_ROWS = 2**10
Angles = tuple[Tensor, Tensor | None]  # see `rotate`
Settings = tuple[int, float, int]  # vocabulary size, softcap, logits in a GPU's memory at once


def _wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where a test computes in it."""
    return torch.promote_types(dtype, torch.float32)


def norm(x: Tensor, angles: Angles | None = None) -> Tensor:
    """`x`, first rotated if `angles` are given, scaled to a root mean square of 1 in fp32.

    That is along its last dimension; see `rotate` for the angles.
    """
    cos, sin = angles or (None, None)
    if torch.is_grad_enabled():
        return _Norm.apply(x, cos, sin)
    if cos is not None:
        x = rotate(x, cos, sin).to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)  # transformers' very bits


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        wide = x.to(_wide(x.dtype))
        if cos is not None:
            wide = rotate(wide, cos, sin)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = (length.square_() / x.shape[-1]).add_(NORM_EPS).rsqrt_()
        y = wide * scale
        if y.dtype != x.dtype:  # torch 2.11 compiles a cast that changes nothing to no gradient
            y = y.to(x.dtype)
        ctx.save_for_backward(y, scale, cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, scale, cos, sin = ctx.saved_tensors
        dy = grads[0]
        along = (dy * y).mean(-1, keepdim=True, dtype=scale.dtype)
        dx = torch.addcmul(dy.to(scale.dtype), y, along, value=-1).mul_(scale)
        if cos is not None:
            dx = rotate(dx, cos.conj(), None) if sin is None else rotate(dx, cos, -sin)
        return dx.to(y.dtype), None, None


def relu_squared(x: Tensor) -> Tensor:
    return _ReluSquared.apply(x)


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kept = x.relu()
        ctx.save_for_backward(kept)
        return kept * kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        return (grads[0] * kept).mul_(2)


def rotary_angles(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (..., T, 1, D / 2) in fp32, for integer `positions` (..., T)."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * (1 / base ** (pairs / head_dim))
    return angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)


def adjacent_angles(cos: Tensor, sin: Tensor) -> Angles:
    """The same for `rotate` of adjacent channels."""
    return torch.complex(cos, -sin), None


def rotate(x: Tensor, cos: Tensor, sin: Tensor | None) -> Tensor:
    """(B, T, H, D) `x`, each pair of channels rotated by minus its angle; in fp32.

    By cos and sin, (..., T, 1, D / 2), channel d is paired with d + D / 2. With sin None, `cos` is
    complex and pairs 2 d with 2 d + 1: with its norm, two thirds of the time on a CPU.
    """
    if sin is None:
        pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * cos).flatten(-2)
    left, right = x.chunk(2, dim=-1)
    halves = torch.addcmul(left * cos, right, sin), torch.addcmul(right * cos, left, sin, value=-1)
    return torch.cat(halves, dim=-1)


def gpu_chunk(num_bytes: float) -> int:
    """Logits at once on a GPU of that memory: three tensors of fp32 take a tenth at most."""
    return min(GPU_CHUNK, 2 ** int(math.log2(num_bytes / 128)))


def softcap_loss(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float,
    reduction: str,
    chunk: int = GPU_CHUNK,
) -> Tensor:
    """Loss in nats, a scalar for reduction "mean" or "sum", (B, T) for "none"; targets of -1 add 0.

    `x` is (B, T, C) in the compute dtype, `weight` (V, C) the master weight; logits and loss are
    fp32. Rows of `weight` from `vocab_size` on are padding with no probability. The mean of no
    targets is 0. `chunk`: logits in a GPU's memory at once.
    """
    assert reduction in ("mean", "sum", "none"), reduction
    sum_at_once = reduction != "none" and torch.is_grad_enabled()
    settings = vocab_size, softcap, chunk
    rows, wanted = x.flatten(0, -2), targets.flatten()
    if reduction != "none" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        learned = (wanted >= 0).nonzero().squeeze(1)  # of a chat's tokens, half
        rows, wanted = rows.index_select(0, learned), wanted[learned]
    loss = _SoftcapLoss.apply(rows, weight, wanted, settings, sum_at_once)
    if reduction == "none":
        return loss.view_as(targets)
    return loss.sum() / (targets >= 0).sum().clamp(min=1) if reduction == "mean" else loss.sum()


class _SoftcapLoss(torch.autograd.Function):
    """(M,) losses or, with `sum_at_once`, their sum.

    The sum's gradient is computed while a chunk's logits are at hand; backward only scales it. For
    separate losses the incoming gradient differs per token, so backward recomputes the chunks.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, settings: Settings, sum_at_once: bool
    ) -> Tensor:
        ctx.settings, ctx.sum_at_once = settings, sum_at_once
        if not sum_at_once:
            ctx.save_for_backward(x, weight, targets)
            return _losses(x, weight, targets, settings)[0]
        ones = torch.ones_like(targets, dtype=_wide(x.dtype))
        losses, dx, dweight = _losses(x, weight, targets, settings, ones)
        ctx.save_for_backward(dx, dweight)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.sum_at_once:
            # In fp32: in fp16 a factor such as 1 / 2^19 would keep few of its bits.
            scale = grads[0][None]
            dx, dweight = (
                torch.mul(gradient, scale).to(gradient.dtype) for gradient in ctx.saved_tensors
            )
        else:
            x, weight, targets = ctx.saved_tensors
            _, dx, dweight = _losses(x, weight, targets, ctx.settings, grads[0])
        return dx, dweight, None, None, None


def _losses(
    x: Tensor, weight: Tensor, targets: Tensor, settings: Settings, row_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """((M,) losses; with a `row_scale` (M,) also d sum(row_scale * losses) by x and by weight).

    For one row, z = x W^T, logit = c tanh(z / c), loss = log(sum_v exp(logit_v)) - logit_target and
    dz = (softmax(logit) - onehot) * (1 - tanh(z / c)^2). Only a chunk's logits are in memory. No
    maximum is subtracted before exp: the softcap bounds the logits (2^17 tokens of e^15 sum to
    4e11, far inside fp32).
    """
    vocab_size, softcap, chunk = settings
    losses = torch.zeros(len(x), dtype=_wide(x.dtype), device=x.device)
    dx = dweight = losses[:0]  # empty unless asked for
    if row_scale is not None:
        row_scale = row_scale.masked_fill(targets < 0, 0)
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight)
    narrow = weight.to(x.dtype)
    num_rows = max(1, (CPU_CHUNK if x.device.type == "cpu" else chunk) // len(weight))
    num_rows = min(num_rows, FP16_ROWS) if x.dtype == torch.float16 else num_rows
    for begin in range(0, len(x), num_rows):
        rows = slice(begin, begin + num_rows)
        tanh = (x[rows] @ narrow.T).to(losses.dtype).div_(softcap).tanh_()  # (R, V)
        exp = (tanh * softcap).exp_()  # (R, V)
        exp[:, vocab_size:] = 0
        total = exp.sum(1)  # (R,)
        target = targets[rows].clamp(min=0)[:, None]  # (R, 1)
        wanted = tanh.gather(1, target).squeeze(1) * softcap  # (R,)
        losses[rows] = (total.log() - wanted).masked_fill_(targets[rows] < 0, 0)
        if row_scale is None:
            continue
        # Reuse the memory of exp and tanh.
        dz = exp.mul_((row_scale[rows] / total)[:, None])  # (R, V)
        dz.scatter_add_(1, target, -row_scale[rows, None])
        dz = dz.mul_(tanh.square_().neg_().add_(1)).to(x.dtype)
        torch.mm(dz, narrow, out=dx[rows])
        if dweight.dtype == dz.dtype:
            dweight.addmm_(dz.T, x[rows])
        else:
            dweight += dz.T @ x[rows]
    return losses, dx, dweight
