"""Keys and values of every sequence in flight, and attention over them.

The buffers are static: `num_slots` sequences of at most `max_len` tokens, zero at first. A forward
call is one `Append`: `begin` checks it before touching memory and plans where each token goes,
`attend` writes a layer's keys and values and attends under the training window, `finish` advances
the lengths. `keep` truncates a slot, or copies another slot's beginning into it; it zeroes what it
drops, as a masked 0 times a leftover NaN is still NaN.

One extra cell at `max_len` takes the writes of padding and is never read, so no shape depends on
the data. The device reads token positions from one small static buffer, so a CUDA graph of a step
serves all later ones. Each sequence attends by itself, or by flash to its own length; only a GPU
without flash decodes all rows at once, in fixed-size blocks of keys, of which a graph reads as many
as it was recorded for. A block hidden from a row adds exact zeros, so a row's bits do not depend on
its mates' lengths. QK norm bounds scores by qk_scale^2 * sqrt(D) (16 at D = 128): no exp overflows.

Shapes: L layers, N slots, B sequences of this call, T tokens of a row, M tokens of all rows, H
query heads, K kv heads, D head dimension, C channels, S = max_len, E keys in one block.
"""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.attention import QKV, Kernel, flash, flash_options, flash_reads_a_cache, in_window

GPU_DECODE_BLOCK = 256  # keys that a GPU without flash reads at a time, a guess; a graph's fewest


def kept_dtype(device: torch.device, dtype: torch.dtype, kernel: Kernel = "dense") -> torch.dtype:
    """Of keys and values, where activations are of `dtype`.

    A CPU keeps them in fp32: one query attends 3 to 7 times as fast as in bf16.
    """
    return torch.float32 if device.type == "cpu" and kernel != "flash" else dtype


class KVCache:
    """Static buffers for `num_slots` sequences; `lengths[slot]` tokens of each are filled."""

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        max_len: int,
        head_dim: int,
        num_channels: int,
        device: torch.device | str,
        dtype: torch.dtype,
        kernel: Kernel = "dense",
        kept_as: torch.dtype | None = None,
    ) -> None:
        """All zeros; `GPT.make_cache` knows a model's sizes.

        `dtype` is that of activations; of keys and values, too, unless they are `kept_as` another.
        """
        self.flashes = kernel == "flash" and flash_reads_a_cache()
        size = (num_layers, num_slots, num_kv_heads, max_len + 1, head_dim)
        if self.flashes:  # flash wants them cell by cell
            size = (num_layers, num_slots, max_len + 1, num_kv_heads, head_dim)
        # Zeros as they are made take no memory of a CPU until something is written.
        both = (torch.zeros(size, device=device, dtype=kept_as or dtype) for _ in range(2))
        self.keys, self.values = (  # (L, N, K, S + 1, D)
            buffer.transpose(2, 3) if self.flashes else buffer for buffer in both
        )
        self.previous = torch.zeros(num_slots, num_channels, device=device, dtype=dtype)  # (N, C)
        self.lengths = torch.zeros(num_slots, dtype=torch.int64)  # (N,), always on the CPU
        self.layout = torch.zeros(4, num_slots, dtype=torch.int64, device=device)  # see Append
        self.num_slots, self.max_len = num_slots, max_len
        self.block = min(GPU_DECODE_BLOCK, max_len)
        self.recorded_keys = 0  # while a graph of a decode step is recorded: the keys that it reads

    @property
    def in_blocks(self) -> bool:
        """True if decoding without flash takes all rows at once, in blocks of keys."""
        return self.keys.device.type != "cpu"

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.previous.nbytes

    def keep(self, slot: int, length: int, source: int, previous: Tensor | float = 0) -> None:
        """Make `slot` hold the first `length` tokens of slot `source` (may be itself).

        `previous` (C,) is what the model carries over from the last of them (see `swap_previous`).
        In shifted heads the last of them has left its key one cell behind them.
        """
        if source != slot:
            for buffer in (self.keys, self.values):
                buffer[:, slot, :, : length + 1] = buffer[:, source, :, : length + 1]
        self.values[:, slot, :, length:] = 0
        if length == 0:
            self.keys[:, slot, :, 0] = 0
        self.previous[slot] = previous
        self.lengths[slot] = length

    def reset(self) -> None:
        for slot in range(self.num_slots):
            self.keep(slot, 0, slot)

    def begin(
        self,
        num_rows: int,
        num_tokens: int,
        slots: Tensor | None = None,
        num_new: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        packed: bool = False,
    ) -> "Append":
        """Plan to append `num_new[b]` (default: all) of `num_tokens` tokens to slot `slots[b]`.

        If `packed`, the only row has the tokens of all slots, one slot after the other, then
        padding. What does not fit is an AssertionError, with the cache untouched.
        """
        own_dtype = self.previous.dtype
        assert dtype == own_dtype, f"the cache is for {own_dtype}, not {dtype}"
        where = list(range(self.num_slots)) if slots is None else slots.tolist()
        added = [num_tokens] * num_rows if num_new is None else num_new.tolist()
        num_sequences = len(where) if packed else num_rows
        assert len(where) == len(added) == num_sequences, "a row needs a slot and a count"
        assert not packed or (num_rows == 1 and sum(added) <= num_tokens), "a row packs all tokens"
        known = set(where) & set(range(self.num_slots))
        assert len(known) == len(where), f"not distinct slots: {where}"
        assert all(0 <= count <= num_tokens for count in added), f"{added} of {num_tokens} tokens"
        starts = self.lengths[where].tolist()
        longest = max(map(sum, zip(starts, added, strict=True)), default=0)
        assert longest <= self.max_len, f"{longest} tokens in a cache for {self.max_len}"
        counts = added if packed else [num_tokens] * num_rows
        firsts = [0, *accumulate(counts)][:-1]
        layout = self.layout[:, :num_sequences]
        if not (layout.is_cuda and torch.cuda.is_current_stream_capturing()):
            layout.copy_(torch.tensor([where, starts, added, firsts]))
        shape = (num_rows, num_tokens)
        return Append(self, layout, shape, packed, where, starts, added, firsts)

    def finish(self, append: "Append") -> None:
        """Count the tokens of `append` as cached."""
        self.lengths[append.slots] += torch.tensor(append.num_new)


@dataclass
class Append:
    """Where the tokens of a forward call go; made by `KVCache.begin`, shared by all layers."""

    cache: KVCache
    layout: Tensor  # (4, B) on the device: the four lists below
    shape: tuple[int, int]  # of the ids: (B, T), or packed (1, M)
    packed: bool
    slots: list[int]  # per sequence, its slot
    starts: list[int]  # per sequence, how many tokens its slot held before
    num_new: list[int]  # per sequence, how many new tokens it has; other tokens are padding
    firsts: list[int]  # per sequence, where its new tokens begin among the M
    masks: dict[tuple, Tensor] = field(default_factory=dict)  # shared by layers

    @cached_property
    def is_decode(self) -> bool:
        return self.shape[1] == 1 and not self.packed

    @cached_property
    def owners(self) -> Tensor:
        """(M,) the sequence that each packed token is of."""
        token = torch.arange(self.shape[1], device=self.layout.device)
        # Of sequences that begin at the same token, all but the last are without tokens.
        return torch.searchsorted(self.layout[3], token, right=True) - 1

    def of_tokens(self, row: int) -> Tensor:
        """(B, 1) or, packed, (1, M): what that row of the layout says of each token's sequence."""
        return self.layout[row][self.owners][None] if self.packed else self.layout[row, :, None]

    @cached_property
    def offsets(self) -> Tensor:
        """(1, T) how many new tokens of its sequence come before each token."""
        token = torch.arange(self.shape[1], device=self.layout.device)[None]
        return token - self.of_tokens(3) if self.packed else token

    @cached_property
    def is_real(self) -> Tensor:
        """(B, T) False for padding."""
        return self.offsets < self.of_tokens(2)

    @cached_property
    def positions(self) -> Tensor:
        """(B, T) position of each token in its sequence."""
        return self.of_tokens(1) + self.offsets

    @cached_property
    def write_at(self) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 1) or (1, M) slot and (B, T) cell of each token; the cell is max_len for padding.

        Last the (B, T) cells of the keys that a shifted head gives to the next token.
        """
        cells = torch.where(self.is_real, self.positions, self.cache.max_len)
        return self.of_tokens(0), cells, (cells + 1).clamp(max=self.cache.max_len)

    @cached_property
    def last(self) -> Tensor:
        """(B,) index of each sequence's last new token among the M; any where there is none."""
        _, _, num_new, first = self.layout
        last = first + (num_new - 1).clamp(min=0)
        return last.clamp(max=self.shape[0] * self.shape[1] - 1)  # first of an empty one may be M

    def swap_previous(self, x: Tensor) -> Tensor:
        """(B, T, C) what comes before each token of `x` (B, T, C) in its sequence.

        A sequence's first new token gets what the cache kept; it keeps the newest instead.
        """
        slots, _, num_new, _ = self.layout
        kept = self.cache.previous[slots]  # (B, C)
        newest = x.flatten(0, 1)[self.last]  # (B, C)
        self.cache.previous[slots] = torch.where(num_new[:, None] > 0, newest, kept)
        if not self.packed:
            return torch.cat((kept[:, None], x[:, :-1]), dim=1)
        begins = (self.offsets == 0)[..., None]  # (1, M, 1)
        return torch.where(begins, kept[self.owners], x.roll(1, 1))

    def attend(
        self, layer: int, qkv: QKV, window: int | None, scale: float, num_shifted: int
    ) -> Tensor:
        """(B, T, H, D): write the new keys and values, then attend to the slot's past and to them.

        A query sees `window` keys, its own too (None: all). q is (B, T, H, D); k, v (B, T, K, D).
        In the last `num_shifted` kv heads, a token's key stands for the token that follows.
        """
        q, k, v = qkv
        slots, cells, late = self.write_at
        keys, kept = self.cache.keys[layer], k.shape[2] - num_shifted
        k, v = k.to(keys.dtype), v.to(keys.dtype)
        self.cache.values[layer][slots, :, cells] = v
        keys[slots, :kept, cells] = k[:, :, :kept]
        keys[slots, kept:, late] = k[:, :, kept:]
        if self.cache.flashes:
            return self._flash(layer, q, window, scale)
        in_blocks = self.is_decode and self.cache.in_blocks
        attend = self._all_at_once if in_blocks else self._one_by_one
        return attend(layer, q.to(keys.dtype), window, scale).to(q.dtype)

    @cached_property
    def flash_layout(self) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor | None]:
        """(B + 1,) bounds of queries and of keys; (B,) keys used; (M,) the order of queries.

        A step of decoding has one query in every row: one without a token sees meaningless keys.
        Else padding comes after all queries; the order is None where it already does.
        """
        slots, start, num_new, first = self.layout
        num_cells = self.cache.max_len + 1
        keys = F.pad(slots * num_cells, (0, 1), value=self.cache.num_slots * num_cells)
        order, counts = None, num_new
        if self.is_decode:
            counts = torch.ones_like(num_new)
        elif not self.packed:
            order = torch.argsort(~self.is_real.flatten(), stable=True)
        queries = F.pad(counts.cumsum(0), (1, 0))
        return (queries.int(), keys.int()), (start + counts).int(), order

    def _flash(self, layer: int, q: Tensor, window: int | None, scale: float) -> Tensor:
        """Every query at once, each over its own slot's keys."""
        bounds, used, order = self.flash_layout
        flat = q.flatten(0, 1)  # (M, H, D)
        keys, values = (  # (N (S + 1), K, D): views, since this cache lies cell by cell
            buffer[layer].transpose(1, 2).flatten(0, 1)
            for buffer in (self.cache.keys, self.cache.values)
        )
        qkv = flat if order is None else flat[order], keys, values
        longest = self.shape[1], self.cache.max_len
        options = {"seqused_k": used} | flash_options(of_a_cache=True)
        y = flash(qkv, bounds, longest, window, scale, **options)
        return (y if order is None else torch.empty_like(y).index_copy_(0, order, y)).view_as(q)

    def _all_at_once(self, layer: int, q: Tensor, window: int | None, scale: float) -> Tensor:
        """One query per row, block by block of keys."""
        num_rows, _, num_heads, head_dim = q.shape
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (N, K, S + 1, D)
        # By the layout, for a graph; nothing need be copied where all slots take part.
        chosen = self.layout[0] if self.slots != list(range(len(keys))) else slice(None)
        grouped = (q * scale).view(num_rows, keys.shape[1], -1, head_dim)  # (B, K, H / K, D)
        hidden = ~self._seen(window, 0, self.cache.max_len)[:, None]  # (B, 1, 1, S)
        live = [s for s, n in zip(self.starts, self.num_new, strict=True) if n]
        oldest = 0 if window is None or not live else max(0, min(live) - window + 1)
        num_keys = max(live, default=-1) + 1
        if self.cache.recorded_keys:
            oldest, num_keys = 0, self.cache.recorded_keys
        block = self.cache.block
        # exp(16) is more than fp16 holds.
        dtype = torch.float32 if q.dtype == torch.float16 else q.dtype
        mixed = torch.zeros(grouped.shape, dtype=torch.float32, device=q.device)
        total = torch.zeros(*grouped.shape[:3], 1, dtype=torch.float32, device=q.device)
        for begin in range(oldest // block * block, num_keys, block):
            end = min(begin + block, self.cache.max_len)
            seen = keys[chosen, :, begin:end]  # (B, K, E, D)
            scores = (grouped @ seen.transpose(2, 3)).float()  # (B, K, H / K, E)
            weights = scores.exp_().masked_fill_(hidden[..., begin:end], 0)
            total += weights.sum(-1, keepdim=True)
            mixed += weights.to(dtype) @ values[chosen, :, begin:end].to(dtype)
        mixed /= total.clamp_(min=1e-30)  # a row without tokens saw no key
        return mixed.to(q.dtype).view(num_rows, 1, num_heads, head_dim)

    def _one_by_one(self, layer: int, q: Tensor, window: int | None, scale: float) -> Tensor:
        """Sequence by sequence: each one's shapes depend on it alone."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        flat = q.flatten(0, 1)  # (M, H, D)
        out = torch.zeros_like(flat)
        places = zip(self.slots, self.starts, self.num_new, self.firsts, strict=True)
        for slot, start, count, first in places:
            if count == 0:
                continue
            oldest = 0 if window is None else max(0, start - window + 1)
            end = start + count
            own_keys = keys[slot, :, oldest:end][None]  # (1, K, S', D)
            own_values = values[slot, :, oldest:end][None]
            if count == 1:  # sees them all; its heads that share keys are like queries of one head
                grouped = flat[first].view(1, keys.shape[1], -1, flat.shape[2])
                mixed = F.scaled_dot_product_attention(grouped, own_keys, own_values, scale=scale)
                out[first] = mixed.view_as(flat[first])
                continue
            mixed = F.scaled_dot_product_attention(
                flat[first : first + count].transpose(0, 1)[None],
                own_keys,
                own_values,
                attn_mask=self._seen(window, oldest, end, start),
                scale=scale,
                enable_gqa=q.shape[2] != keys.shape[1],
            )  # (1, H, count, D)
            out[first : first + count] = mixed[0].transpose(0, 1)
        return out.view_as(q)

    def _seen(self, window: int | None, oldest: int, end: int, start: int | None = None) -> Tensor:
        """Which keys from `oldest` to `end` are seen.

        (T', S') by the queries from `start` on, or (B, 1, S') by the only query of each row.
        """
        key = (window, oldest, end, start)
        if key not in self.masks:
            cells = torch.arange(end, device=self.layout.device)
            own = self.positions[..., None] if start is None else cells[start:, None]
            self.masks[key] = in_window(window, own, cells[oldest:])
        return self.masks[key]
