"""Every kernel against the dense one, forward and backward; who sees whom; traces for CUDA.

No CPU has flash: a slow one stands in for it, that does what torch's documentation says.
"""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention

from nanochat import attention
from nanochat.attention import Kernel, attend, choose_kernel, flash_reads_a_cache, see
from nanochat.gpt import GPT, GPTConfig, call
from tests.models import busy_gpt, random_ids

# Torch's own, of its eager flex_attention.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
HALF = (torch.float16, torch.bfloat16)
BOS = 7


@pytest.fixture(autouse=True)
def kernels(slow_flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash by hand; flex as torch's own eager version, which a CPU may differentiate here."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention, "_of_flex", lambda name, **_: getattr(flex_attention, name))
    attention._causal_block_mask.cache_clear()


def use_torch_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for each in (attention.flash_options, attention._varlen_options):
        each.cache_clear()
    attention._causal_block_mask.cache_clear()


CARDS = {  # of a capability: the kernel in bf16 (fp16 where there is no bf16) and in fp32
    (6, 1): ("dense", "dense"), (7, 0): ("dense", "dense"), (7, 5): ("flex", "dense"),
    (8, 0): ("flash", "dense"), (8, 6): ("flash", "dense"), (8, 9): ("flash", "dense"),
    (9, 0): ("flash", "dense"), (10, 0): ("flash", "dense"), (12, 0): ("flash", "dense"),
}  # fmt: skip


@pytest.mark.parametrize("capability", CARDS)
def test_the_kernel_of_a_card(capability: tuple[int, int]) -> None:
    for dtype in HALF:
        assert choose_kernel("cuda", capability, dtype, 128) == CARDS[capability][0]
    assert choose_kernel("cuda", capability, torch.float32, 128) == CARDS[capability][1]


def test_the_kernel_where_heads_or_compiler_do_not_allow_the_best() -> None:
    assert choose_kernel("cpu", (0, 0), torch.bfloat16, 128) == "dense"
    assert choose_kernel("mps", (0, 0), torch.bfloat16, 128) == "dense"
    assert choose_kernel("cuda", (8, 0), torch.bfloat16, 100) == "dense"
    assert choose_kernel("cuda", (8, 0), torch.bfloat16, 512) == "flex"
    assert choose_kernel("cuda", (7, 5), torch.float16, 128, can_compile=False) == "dense"


@pytest.mark.parametrize("num_kv_heads", [2, 4])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("kernel", ["flash", "flex"])
def test_output_and_gradients_are_those_of_the_dense_kernel(
    kernel: Kernel, documents: bool, num_kv_heads: int
) -> None:
    ids = random_ids(2, 150, 60)  # a document of sixty tokens, on average
    found = []
    for each in (kernel, "dense"):
        random = torch.Generator().manual_seed(0)
        heads = (4, num_kv_heads, num_kv_heads)
        qkv = [torch.randn(2, 150, n, 16, generator=random, requires_grad=True) for n in heads]
        view = see(each, {40, None, 999}, ids, BOS if documents else None)
        q, k, v = qkv
        some = [attend((q, k, v), view, window, 0.3) for window in (40, None, 999)]
        torch.stack(some).square().sum().backward()
        found.append((*some, *(part.grad for part in qkv)))
    for ours, dense in zip(*found, strict=True):
        assert torch.allclose(ours, dense, atol=2e-5)
    assert not torch.allclose(found[1][0], found[1][1], atol=0.01)  # the window matters
    assert torch.equal(found[1][1], found[1][2])  # one that is longer than the row does not


def small_gpt(**changes: Any) -> GPT:
    sizes = {"n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "vocab_size": 90}
    return busy_gpt(GPTConfig(sequence_len=160, **{**sizes, **changes}))


@pytest.mark.parametrize("kernel", ["flash", "dense"])
def test_documents_of_a_row_do_not_see_each_other(kernel: Kernel) -> None:
    """The losses of a packed row are those of its documents, each read alone."""
    model = small_gpt()
    model.kernel = kernel
    ids = random_ids(2, 150, 90)
    ids[ids == BOS] = 8
    begins = {0: (40, 41, 130), 1: (3,)}
    for row, places in begins.items():
        ids[row, list(places)] = BOS
    targets = ids.roll(-1, 1).contiguous()
    mixed = model(ids, targets, reduction="none")
    model.document_start = BOS
    apart = model(ids, targets, reduction="none")
    for row, places in begins.items():
        parts = (ids[row].tensor_split(places), targets[row].tensor_split(places))
        alone = [
            model(part[None], target[None], reduction="none")[0]
            for part, target in zip(*parts, strict=True)
        ]
        assert torch.allclose(apart[row], torch.cat(alone), atol=1e-5)
    assert torch.allclose(apart[0, :40], mixed[0, :40], atol=1e-5)
    assert (apart[0, 42:] - mixed[0, 42:]).abs().max() > 0.01


def test_more_documents_than_flash_keeps_apart_count_as_one() -> None:
    ids = torch.full((1, 64), BOS)
    view = see("flash", {None}, ids, BOS)
    assert view.bounds is not None and view.bounds.tolist() == [0, 1, 64]


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
@pytest.mark.parametrize("kernel", ["flash", "flex"])
def test_every_use_of_a_kernel_is_traced_for_cuda(
    kernel: Kernel, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's real functions on fake tensors. The backward pass of a fake GPU wants a driver:
    it is traced of a fake CPU instead."""
    use_torch_s_own(monkeypatch)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(attention, "_of_flex", lambda name, **_: getattr(flex_attention, name))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
        model = GPT(GPTConfig(sequence_len=1024, n_layer=4))
        model.compute_dtype = torch.bfloat16
        model.kernel = kernel
        ids = torch.zeros(2, 1024, dtype=torch.int64)
        for start in (None, BOS):
            model.document_start = start
            with torch.set_grad_enabled(device == "cpu"):
                loss = model(ids, ids, reduction="none").sum()  # a CPU drops rows from the others
                assert loss.device == torch.device(device)
                if device == "cpu":
                    loss.backward()
        if device == "cpu":
            assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize("kernel", ["flash", "flex"])
@pytest.mark.parametrize("what", ["packed prompts", "padded prompts", "decoding"])
def test_a_cache_s_steps_are_traced_for_cuda(
    kernel: Kernel, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's real functions on fake tensors; without flash, prompts are read one by one."""
    use_torch_s_own(monkeypatch)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    probed = "torch.nn.attention.varlen._cudnn_decode_disabled"
    monkeypatch.setattr(probed, lambda *_: True, raising=False)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    fakes, packed = FakeTensorMode(allow_non_fake_inputs=True), what == "packed prompts"
    rows = {"packed prompts": (1, 64), "padded prompts": (4, 16), "decoding": (4, 1)}[what]
    with fakes, torch.device("cuda:0"):
        model = GPT(GPTConfig(sequence_len=1024, n_layer=4))
        model.compute_dtype = torch.bfloat16
        model.kernel = kernel
        cache = model.make_cache(4, 512)
        ids = torch.zeros(rows, dtype=torch.int64)
    assert cache.flashes == (kernel == "flash" and flash_reads_a_cache())
    cache.lengths = torch.tensor([0, 100, 300, 7])  # real: they are read to plan
    num_new = torch.tensor([1, 0, 1, 1] if what == "decoding" else [9, 0, 16, 3])
    step = cache.begin(rows[0], rows[1], num_new=num_new, dtype=torch.bfloat16, packed=packed)
    monkeypatch.setattr(cache, "begin", lambda *_: step)
    monkeypatch.setattr(cache, "finish", lambda _: None)
    with fakes, torch.inference_mode():
        logits = model(ids, cache=cache, num_new=num_new, packed=packed, last_only=True)
    assert logits.shape == (4, 1, 32768) and logits.device == torch.device("cuda:0")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("num_kv_heads", [2, 4])
@pytest.mark.parametrize("kernel", ["flash", "flex", "dense"])
def test_a_gpu_s_kernels_are_near_fp32_on_the_cpu(
    kernel: Kernel, num_kv_heads: int, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward in bf16, under windows, over whole rows and documents."""
    use_torch_s_own(monkeypatch)
    ids = random_ids(2, 384, 90)
    found = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
        random = torch.Generator().manual_seed(0)
        heads = (4, num_kv_heads, num_kv_heads)
        qkv = [torch.randn(2, 384, n, 64, generator=random).bfloat16() for n in heads]
        q, k, v = (part.to(device, dtype).requires_grad_() for part in qkv)
        own: Kernel = kernel if device == "cuda" else "dense"
        view = see(own, {128, None}, ids.to(device), BOS if documents else None)
        some = [attend((q, k, v), view, window, 0.1) for window in (128, None)]
        gradients = torch.autograd.grad(torch.stack(some).float().square().sum(), (q, k, v))
        found.append([part.float().cpu() for part in (*some, *gradients)])
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() < 0.01 * exact.norm()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kernel", ["flash", "flex", "dense"])
def test_a_gpu_compiles_the_step_without_a_break(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its gradients are those of the dense mask, uncompiled."""
    use_torch_s_own(monkeypatch)
    model = small_gpt(n_head=2).cuda()
    model.compute_dtype = torch.bfloat16
    ids = random_ids(2, 160, 90).cuda()
    gradients = []
    for compiled in (True, False):
        model.kernel = kernel if compiled else "dense"
        model.call_part = torch.compile(call, dynamic=False, fullgraph=True) if compiled else call
        parts = torch.autograd.grad(model(ids, ids.clone()), list(model.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[1].norm()
