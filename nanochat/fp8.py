"""Linear layers whose three matmuls run in 8-bit floats: y = x W^T, dx = g W, dW = g^T x.

Inputs and weights are e4m3, for precision; gradients e5m2, for range. Each tensor has one scale,
its largest magnitude over the format's. `refresh` quantises the weights once per optimizer step.
Everything is made in both layouts that the matmuls want while it is at hand. Master weights stay
fp32, results are bf16. Training only: evaluation and sampling use bf16, so the saved model is the
one measured.

Source: FP8 formats, arXiv 2209.05433. Shapes: M tokens, K inputs, N outputs, all multiples of 16.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nanochat.common import Runtime, UserError, print0

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Quantised(NamedTuple):
    """A matrix in both layouts; a weight's is updated in place, as compiled models see that."""

    rows: Tensor  # (N, K) in 8 bits
    columns: Tensor  # (K, N)
    scale: Tensor  # () fp32, to multiply them by


def quantise(values: Tensor, dtype: torch.dtype) -> Quantised:
    scale = values.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    rows = (values / scale).to(dtype)
    return Quantised(rows, rows.t().contiguous(), scale)


def multiply(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, fast: bool = False
) -> Tensor:
    """bf16 `left` @ `right`.T of two row-major 8-bit matrices: (M, K), (N, K) -> (M, N).

    `fast` sums with fewer bits, which Hopper does faster: fit for activations, not for gradients.
    """
    scaled_mm = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    return scaled_mm(
        left, right.t(), left_scale, right_scale, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, _: Tensor, rows: Tensor, columns: Tensor, scale: Tensor
    ) -> Tensor:
        x8, x8_columns, x_scale = quantise(x, E4M3)  # (M, K), (K, M)
        ctx.save_for_backward(x8_columns, x_scale, columns, scale)
        return multiply(x8, rows, x_scale, scale, fast=True)  # (M, N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x8_columns, x_scale, columns, scale = ctx.saved_tensors
        g8, g8_columns, g_scale = quantise(grads[0], E5M2)  # (M, N), (N, M)
        dx = multiply(g8, columns, g_scale, scale)  # (M, K)
        dw = multiply(g8_columns, x8_columns, g_scale, x_scale)  # (N, K)
        return dx, dw.float(), None, None, None


def fp8_linear(x: Tensor, weight: Tensor, quantised: Quantised) -> Tensor:
    """bf16 (..., N) = x (..., K) times the weight; `weight` (N, K) only receives the gradient."""
    y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, *quantised)
    return y.view(*x.shape[:-1], -1)


def is_there(runtime: Runtime, batches: Iterable[int] = ()) -> bool:
    """True on a GPU with 8-bit matmuls; otherwise prints that there are none.

    Raises UserError where the model computes in another dtype than their results have, or the
    hardware does not take a micro-batch of one of these numbers of tokens.
    """
    if runtime.capability < (8, 9):
        print0(f"--fp8: {runtime.device_name} has no 8-bit matmuls; training in {runtime.dtype}")
        return False
    if runtime.dtype != torch.bfloat16:
        raise UserError("--fp8 needs --dtype=bfloat16, in which its results are")
    if odd := [num_tokens for num_tokens in batches if num_tokens % 16]:
        raise UserError(
            f"--fp8 needs micro-batches of a multiple of 16 tokens, not {odd[0]}; "
            "use such a --max_seq_len"
        )
    return True


def is_eligible(weight: Tensor) -> bool:
    """True for a matrix large enough to gain, with sides the hardware accepts."""
    return weight.ndim == 2 and min(weight.shape) >= 128 and not any(n % 16 for n in weight.shape)


@torch.no_grad()
def enable(model: nn.Module) -> list[Any]:
    """Make the large linear layers of `model` train in fp8; returns them, for `refresh`."""
    linears: list[Any] = [m for m in model.modules() if isinstance(m, nn.Linear)]
    linears = [linear for linear in linears if is_eligible(linear.weight)]
    for linear in linears:
        linear.quantised = quantise(linear.weight, E4M3)
    return linears


@torch.no_grad()
def refresh(linears: Iterable[Any], compiled: bool = False) -> None:
    """Requantise the weights; call it after each optimizer step."""
    into = compiled_requantise() if compiled else requantise
    for linear in linears:
        into(linear.weight, linear.quantised)


def requantise(weight: Tensor, quantised: Quantised) -> None:
    for old, new in zip(quantised, quantise(weight, E4M3), strict=True):
        old.copy_(new)


@cache
def compiled_requantise() -> Any:
    return torch.compile(requantise, dynamic=False)  # once for each shape
