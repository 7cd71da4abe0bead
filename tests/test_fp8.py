"""nanochat.fp8 against fp32 matmuls: results, gradients, a whole model, and that refresh counts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanochat import fp8
from nanochat.fp8 import (
    E4M3,
    enable,
    fp8_linear,
    is_eligible,
    is_there,
    quantise,
    refresh,
    requantise,
)
from nanochat.gpt import GPT, GPTConfig
from tests.models import CPU, refuses


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_products_are_near_those_of_fp32(scale: float) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 48, 128, generator=random).requires_grad_()
    weight = (scale * torch.randn(160, 128, generator=random)).requires_grad_()
    above = torch.randn(2, 48, 160, generator=random)
    expected = F.linear(x, weight)
    dx, dw = torch.autograd.grad(expected, (x, weight), above)
    linear: Any = nn.Linear(128, 160, bias=False)
    linear.weight.data.copy_(weight)
    enable(nn.Sequential(linear))
    found = fp8_linear(x.bfloat16(), weight, linear.quantised)
    dx8, dw8 = torch.autograd.grad(found, (x, weight), above.bfloat16())
    assert found.dtype == torch.bfloat16 and dw8.dtype == torch.float32
    # e4m3 keeps 3 bits behind the point, e5m2 two: 1/16 and 1/8 at worst, less on average.
    assert error(found, expected) < 0.05 and error(dx8, dx) < 0.08 and error(dw8, dw) < 0.08


def test_a_model_learns_alike_and_evaluates_in_bf16() -> None:
    config = GPTConfig(64, 256, n_layer=2, n_head=2, n_kv_head=2, n_embd=128)
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (4, 65), generator=random)
    gradients = []
    for is_fp8 in (False, True):
        model = GPT(config)
        model.init_weights(0)
        with torch.no_grad():
            for weight in model.parameters():
                if not weight.any():
                    weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
        model.compute_dtype = torch.bfloat16
        with torch.no_grad():
            before = model(ids[:, :-1])
        linears = enable(model.blocks) if is_fp8 else []
        assert len(linears) == 6 * config.n_layer * is_fp8, "gates are too small"
        with torch.no_grad():
            assert torch.equal(model(ids[:, :-1]), before)
        model(ids[:, :-1], ids[:, 1:]).backward()
        grads = [w.grad.flatten() for w in model.blocks.parameters() if w.grad is not None]
        gradients.append(torch.cat(grads))
    cosine = F.cosine_similarity(gradients[0], gradients[1], dim=0)
    assert 0.98 < cosine < 0.99999


def test_weights_are_those_of_the_last_refresh() -> None:
    model = GPT(GPTConfig(16, 256, n_layer=1, n_head=1, n_kv_head=1, n_embd=128))
    model.init_weights(0)
    linears = enable(model.blocks)
    linear, x = linears[0], torch.ones(16, 128, dtype=torch.bfloat16)
    first = linear(x)
    with torch.no_grad():
        linear.weight.mul_(2)
    assert torch.equal(linear(x), first)
    refresh(linears)
    torch.testing.assert_close(linear(x), 2 * first)


def test_a_compiled_refresh_is_the_eager_one_and_is_compiled_once_for_a_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend  # takes seconds

    counter = CompileCounterWithBackend("aot_eager")
    once = torch.compile(requantise, dynamic=False, backend=counter)
    monkeypatch.setattr(fp8, "compiled_requantise", lambda: once)
    sizes = [(128, 256), (256, 128), (128, 256)]
    linears = enable(nn.Sequential(*(nn.Linear(*size, bias=False) for size in sizes)))
    for _ in range(3):
        for linear in linears:
            nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(0))
        refresh(linears, compiled=True)
    assert counter.frame_count == 2
    for linear in linears:
        q = linear.quantised
        rows, columns, scale = quantise(linear.weight.detach(), E4M3)
        assert torch.equal(q.scale, scale) and torch.equal(q.rows.float(), rows.float())
        assert torch.equal(q.columns.float(), columns.float()) and columns.is_contiguous()


def test_where_and_for_what_batches_fp8_is_there() -> None:
    for capability, there in (((8, 0), False), ((8, 9), True), ((12, 0), True), ((0, 0), False)):
        runtime = replace(CPU, capability=capability, dtype=torch.bfloat16)
        assert is_there(runtime, [2 * 1000]) == there
    refuses("--fp8 needs --dtype=bfloat16", is_there, replace(CPU, capability=(8, 9)), [2 * 1000])
    hopper = replace(CPU, capability=(9, 0), dtype=torch.bfloat16)
    told = "multiple of 16 tokens, not 1000; use such a --max_seq_len"
    refuses(told, is_there, hopper, [2 * 1000, 1000])


def test_only_matrices_that_the_hardware_takes() -> None:
    sizes = [(128, 256), (127, 256), (136, 128), (64, 1024)]
    assert [is_eligible(torch.empty(size)) for size in sizes] == [True, False, False, False]
