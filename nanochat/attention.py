"""Causal attention under sliding windows, by one of three kernels; `choose_kernel` is the choice.

flash  torch's varlen_attn: reads only the keys inside a window, on NVIDIA GPUs from Ampere on.
flex   compiled flex_attention: skips the blocks of keys that a mask hides, where Triton runs.
dense  torch's scaled_dot_product_attention, with a mask that says which keys a query sees: the
       others' oracle, and the kernel of CPUs and MPS. On a GPU it computes every score that it
       hides: of a context of 2,048 under windows of 512, four times what is needed. A CPU takes
       128 queries at a time and only the keys that they may see (`_InBlocks`).

A row may hold several documents. `see` makes what all layers of a forward call share: causal masks
or bounds, for each window; with `documents`, tokens see their own document alone.

Shapes: B batch, T time, H query heads, K kv heads, D head dimension; M tokens of N sequences, one
after the other. Sources: FlashAttention-2, arXiv 2307.08691; FlexAttention, 2412.05496.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from inspect import signature
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Literal["flash", "flex", "dense"]
QKV = tuple[Tensor, Tensor, Tensor]
# Queries, the keys that they may see, and (1 or B, 1, queries, keys) to be added to their scores.
Blocks = list[tuple[slice, slice, Tensor]]
# Documents of one call that flash keeps apart: one in 32 tokens; those beyond count as one. Fixed,
# since the number of bounds is a shape, and a new shape is a new compilation.
TOKENS_PER_DOCUMENT = 32
# Queries at a time on a CPU, where a step of the laptop's model spends half the time on attention
# that it does in torch's kernel (dev/LOG.md); and the keys of one above which the probabilities,
# kept for backward, would take too much memory.
CPU_BLOCK, CPU_KEYS = 128, 1024
softmax_backward = torch._softmax_backward_data  # pyright: ignore[reportPrivateImportUsage]


def choose_kernel(
    device_type: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    can_compile: bool = True,
) -> Kernel:
    """The fastest kernel for a device of this compute capability; `can_compile`: Triton works."""
    if device_type != "cuda":
        return "dense"
    if capability >= (8, 0) and dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= 256:
        return "flash"
    # Triton needs Turing, and flex heads of a power of two; fp32 scores are slow in either.
    fits = head_dim >= 16 and head_dim & (head_dim - 1) == 0 and dtype.itemsize == 2
    return "flex" if capability >= (7, 5) and fits and can_compile else "dense"


class View(NamedTuple):
    """Who sees whom in rows of tokens, in the form that the kernel takes."""

    kernel: Kernel
    # By window. dense: bool (T, T) or (B, 1, T, T), on a CPU `Blocks`; flex: a BlockMask
    masks: dict[int | None, Any]
    bounds: Tensor | None = None  # flash: (N + 1,) int32, where the sequences begin among the M
    options: dict[str, Any] = {}  # of flash, as this torch has them
    starts: Tensor | None = None  # (B, T) True where a document begins, if they are kept apart


def see(
    kernel: Kernel,
    windows: Iterable[int | None],
    ids: Tensor,
    document_start: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> View:
    """The view of `ids` (B, T) for layers with these windows (keys seen, None: all earlier ones).

    With `document_start`, each token of this id begins a document that sees nothing before it.
    `dtype` is that of the queries.
    """
    batch, time = ids.shape
    starts = documents = None
    if document_start is not None:
        starts = ids == document_start  # (B, T)
        starts[:, 0] = True
        documents = starts.cumsum(1)  # (B, T) number of each token's
    if kernel == "flash":
        bounds = _bounds(batch, time, ids.device, starts)
        return View(kernel, {}, bounds, flash_options(), starts)
    seen = {window if window and window < time else None for window in windows}
    make = _causal_block_mask if documents is None else _block_mask
    if kernel == "dense":
        make = _dense_mask
    in_blocks = kernel == "dense" and ids.device.type == "cpu"
    masks = {
        window: _blocks(window, time, starts, dtype)
        if in_blocks and (window or time) <= CPU_KEYS
        else make(window, time, ids.device, documents)
        for window in seen
    }
    return View(kernel, masks, starts=starts)


def attend(qkv: QKV, view: View, window: int | None, scale: float) -> Tensor:
    """(B, T, H, D) for q (B, T, H, D) and k, v (B, T, K, D)."""
    q, k, v = qkv
    time = q.shape[1]
    if window is not None and window >= time:
        window = None
    if view.bounds is not None:
        tokens = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (M, H, D), (M, K, D)
        bounds = view.bounds, view.bounds
        return flash(tokens, bounds, (time, time), window, scale, **view.options).view_as(q)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mask = view.masks[window]
    if view.kernel == "flex":
        return _flex(q, k, v, mask, scale).transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, list):
        if grouped:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return _InBlocks.apply(q * scale, k, v, mask).transpose(1, 2)
    y = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return y.transpose(1, 2)


def flash(
    qkv: QKV,
    bounds: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    window: int | None,
    scale: float,
    **options: Any,
) -> Tensor:
    """(M, H, D): the queries of each of N sequences attend to its keys; the last sees all of them.

    q is (M, H, D), k and v (M', K, D); `bounds` (N + 1,) and `longest` are of queries and of keys.
    An option `seqused_k` (N,) says how many of a sequence's keys count.
    """
    from torch.nn.attention.varlen import varlen_attn  # brings torch's compiler, seconds of import

    seen = ((window or 0) - 1, 0)  # keys before and after a query's own; -1: all
    (q, k, v), (queries, keys), (longest_queries, longest_keys) = qkv, bounds, longest
    y = varlen_attn(
        q, k, v, queries, keys, longest_queries, longest_keys,
        scale=scale, window_size=seen, **options,
    )  # fmt: skip
    return cast(Tensor, y)  # alone, since nothing else was asked for


@cache
def flash_options(of_a_cache: bool = False) -> dict[str, Any]:
    """Options for `flash` that this torch has: torch 2.11 groups kv heads without being asked.

    Of a cache, whose keys are read without splitting: then a row's bits do not depend on its mates.
    """
    wanted = {"enable_gqa": True} | ({"num_splits": 1} if of_a_cache else {})
    return {name: value for name, value in wanted.items() if name in _varlen_options()}


def flash_reads_a_cache() -> bool:
    """True if flash can be told how many of a sequence's keys count; in torch 2.11 it cannot."""
    return "seqused_k" in _varlen_options()


@cache
def _varlen_options() -> frozenset[str]:
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(signature(varlen_attn).parameters)


class _InBlocks(torch.autograd.Function):
    """(B, H, T, D) of q, k, v (B, H, T, D): for each block, only the keys that it may see.

    By hand, since each slice would have a gradient of the whole's size, filled and added.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
        shape = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B H, T, D)
        y = torch.empty_like(q)
        kept = q.new_empty(len(q) * sum(hidden[0, 0].numel() for _, _, hidden in blocks))
        for queries, keys, hidden, probability in _by_block(kept, len(q), blocks):
            scores = torch.bmm(q[:, queries], k[:, keys].mT)
            scores.unflatten(0, shape[:2]).add_(hidden)
            torch.softmax(scores, -1, out=probability)
            y[:, queries] = torch.bmm(probability, v[:, keys])
        ctx.blocks, ctx.shape = blocks, shape
        ctx.save_for_backward(q, k, v, kept)
        return y.view(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, kept = ctx.saved_tensors
        dy = grads[0].flatten(0, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys, _, probability in _by_block(kept, len(q), ctx.blocks):
            dv[:, keys].baddbmm_(probability.mT, dy[:, queries])
            dprobability = torch.bmm(dy[:, queries], v[:, keys].mT)
            dscores = softmax_backward(dprobability, probability, -1, q.dtype)
            dq[:, queries] = torch.bmm(dscores, k[:, keys])
            dk[:, keys].baddbmm_(dscores.mT, q[:, queries])
        return *(x.view(ctx.shape) for x in (dq, dk, dv)), None


def _by_block(
    kept: Tensor, num_rows: int, blocks: Blocks
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Each of `blocks`, with its part (num_rows, queries, keys) of `kept`, which holds all."""
    begin = 0
    for queries, keys, hidden in blocks:
        end = begin + num_rows * hidden[0, 0].numel()
        yield queries, keys, hidden, kept[begin:end].view(num_rows, hidden.shape[2], -1)
        begin = end


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Tensor:
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention
    else:
        flex_attention = _of_flex("flex_attention", is_compiled=True)
    grouped = q.shape[1] != k.shape[1]
    return cast(Tensor, flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped))


def _bounds(batch: int, time: int, device: torch.device, starts: Tensor | None) -> Tensor:
    num_tokens = batch * time
    if starts is None:
        return torch.arange(0, num_tokens + 1, time, dtype=torch.int32, device=device)
    limit = batch * -(-time // TOKENS_PER_DOCUMENT)
    places = torch.nonzero_static(starts.flatten(), size=limit, fill_value=num_tokens)[:, 0]
    return F.pad(places, (0, 1), value=num_tokens).int()


def _dense_mask(
    window: int | None, time: int, device: torch.device, documents: Tensor | None
) -> Tensor | None:
    if window is None and documents is None:
        return None  # causal: torch has a faster way to say it
    position = torch.arange(time, device=device)
    mask = in_window(window, position[:, None], position)  # (T, T)
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None])  # (B, 1, T, T)
    return mask


def _blocks(window: int | None, time: int, starts: Tensor | None, dtype: torch.dtype) -> Blocks:
    """The blocks of a CPU's attention, with minus infinity for each key that is hidden."""
    position = torch.arange(time)
    begun = torch.zeros_like(position)[None]  # (1 or B, T) where each query's document begins
    if starts is not None:
        begun = position.masked_fill(~starts, 0).cummax(1).values
    blocks = []
    for begin in range(0, time, CPU_BLOCK):
        first = max(0, begin - window + 1) // 8 * 8 if window else 0  # aligned memory
        queries, keys = slice(begin, begin + CPU_BLOCK), slice(first, begin + CPU_BLOCK)
        outside = ~in_window(window, position[queries, None], position[keys])
        hidden = torch.zeros(outside.shape, dtype=dtype).masked_fill_(outside, -torch.inf)
        before = begun[:, None, queries, None] > position[keys]
        blocks.append((queries, keys, hidden.masked_fill(before, -torch.inf)))
    return blocks


def _block_mask(
    window: int | None, time: int, device: torch.device, documents: Tensor | None
) -> Any:
    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = in_window(window, query, key)
        return seen if documents is None else seen & (documents[b, query] == documents[b, key])

    num_rows = None if documents is None else len(documents)
    # Compiled, it never holds all (B, T, T) answers.
    make = _of_flex("create_block_mask", is_compiled=device.type == "cuda")
    return make(sees, num_rows, None, time, time, device=device)


_causal_block_mask = cache(_block_mask)  # where there are no documents, the same in every call


def in_window(window: int | None, query: Tensor, key: Tensor) -> Tensor:
    """Whether a query at one position sees the key of another."""
    return (key <= query) & (query - key < window) if window else key <= query


@cache
def _of_flex(name: str, is_compiled: bool) -> Any:
    from torch.nn.attention import flex_attention

    function = getattr(flex_attention, name)
    return torch.compile(function) if is_compiled else function
