"""Keys and values of every sequence in flight, and attention over them.

The buffers are static: `num_slots` sequences of at most `max_len` tokens, zero at first. A forward
call is one `Append`: `begin` checks it before touching memory and plans where each token goes,
`attend` writes a layer's keys and values and attends under the training window, `finish` advances
the lengths. `keep` truncates a slot, or copies another slot's beginning into it.

- One extra cell at `max_len` takes the writes of right padding and is never read, so no shape
  depends on the data.
- `lengths` is always on the CPU: checking it never waits for a GPU. The device reads token
  positions from one small static buffer, so a CUDA graph of a step serves all later ones.
- Decoding reads keys in fixed-size blocks and skips those no live row can see. A block hidden from
  a row adds exact zeros, so a row's bits do not depend on its batch mates' lengths. Cutting the
  keys at the longest row would be as fast, but would change the order of the sums.
- QK norm bounds every score by qk_scale^2 * sqrt(D) (16 at D = 128), so exp needs no running
  maximum.
- `keep` zeroes the values it drops: a masked 0 times a leftover NaN is still NaN.

Shapes: L layers, N slots, B rows of this call, T new tokens, H query heads, K kv heads, D head
dimension, C channels, S = max_len, E keys in one block.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F

# Keys read at a time when decoding on a CPU. Of 32 to 512 (width 256, 16 slots of 512) 64 and 128
# are fastest: 8 to 11 ms on one thread depending on filling; all 512 at once: 13. A GPU reads all.
CPU_DECODE_BLOCK = 128


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
    ) -> None:
        """All zeros; `GPT.make_cache` knows a model's sizes."""
        shape = (num_layers, num_slots, num_kv_heads, max_len + 1, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)  # (L, N, K, S + 1, D)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.previous = torch.zeros(num_slots, num_channels, device=device, dtype=dtype)  # (N, C)
        self.lengths = torch.zeros(num_slots, dtype=torch.int64)  # (N,), always on the CPU
        self.layout = torch.zeros(3, num_slots, dtype=torch.int64, device=device)  # see Append
        self.num_slots, self.max_len = num_slots, max_len
        self.block = CPU_DECODE_BLOCK if self.keys.device.type == "cpu" else max_len

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.previous.nbytes

    def keep(self, slot: int, length: int, source: int, previous: torch.Tensor | float = 0) -> None:
        """Make `slot` hold the first `length` tokens of slot `source` (may be itself).

        `previous` (C,) is what the model carries over from the last of them (see `swap_previous`).
        """
        if source != slot:
            for buffer in (self.keys, self.values):
                buffer[:, slot, :, :length] = buffer[:, source, :, :length]
        self.values[:, slot, :, length:] = 0
        self.previous[slot] = previous
        self.lengths[slot] = length

    def reset(self) -> None:
        for slot in range(self.num_slots):
            self.keep(slot, 0, slot)

    def begin(
        self,
        num_rows: int,
        num_tokens: int,
        slots: torch.Tensor | None = None,
        num_new: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "Append":
        """Plan to append `num_new[b]` (default: all) of `num_tokens` tokens to slot `slots[b]`.

        Raises ValueError, with the cache untouched, if slots and rows differ in number, a slot is
        repeated or does not exist, a sequence would exceed `max_len`, or the model computes in
        another dtype.
        """
        if dtype != self.keys.dtype:
            raise ValueError(f"the model computes in {dtype}, but the cache is {self.keys.dtype}")
        where = list(range(self.num_slots)) if slots is None else slots.tolist()
        added = [num_tokens] * num_rows if num_new is None else num_new.tolist()
        if not len(where) == len(added) == num_rows:
            raise ValueError(f"{num_rows} rows need as many slots and counts")
        if len(set(where)) < num_rows or not all(0 <= s < self.num_slots for s in where):
            raise ValueError(f"slots must be distinct and below {self.num_slots}, not {where}")
        starts = self.lengths[where].tolist()
        for slot, start, count in zip(where, starts, added, strict=True):
            if not 0 <= count <= num_tokens:
                raise ValueError(f"slot {slot} cannot take {count} of {num_tokens} tokens")
            if start + count > self.max_len:
                full = f"slot {slot} holds {start} tokens and cannot take {count} more"
                raise ValueError(f"{full}: the cache was made for at most {self.max_len}")
        layout = self.layout[:, :num_rows]
        if not (layout.is_cuda and torch.cuda.is_current_stream_capturing()):
            layout.copy_(torch.tensor([where, starts, added]))
        return Append(self, layout, num_tokens, where, starts, added)

    def finish(self, append: "Append") -> None:
        """Count the tokens of `append` as cached."""
        self.lengths[append.slots] += torch.tensor(append.num_new)


@dataclass
class Append:
    """Where the tokens of a forward call go; made by `KVCache.begin`, shared by all layers."""

    cache: KVCache
    layout: torch.Tensor  # (3, B) on the device: the three lists below
    num_tokens: int  # T
    slots: list[int]  # per row, its slot
    starts: list[int]  # per row, how many tokens its slot held before
    num_new: list[int]  # per row, how many of the T tokens are real; the rest is right padding
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by window, see _seen

    @cached_property
    def positions(self) -> torch.Tensor:
        """(B, T) position of each token in its sequence."""
        return self.layout[1, :, None] + torch.arange(self.num_tokens, device=self.layout.device)

    @cached_property
    def write_at(self) -> torch.Tensor:
        """(B, T) cell of each token; max_len for padding."""
        real = self.positions < self.layout[1:].sum(0)[:, None]
        return torch.where(real, self.positions, self.cache.max_len)

    @cached_property
    def last(self) -> torch.Tensor:
        """(B,) index of each row's last real token among the T."""
        return (self.layout[2] - 1).clamp(min=0)

    def swap_previous(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C) each slot's newest token before `x` (B, T, C); stores the newest of x instead."""
        slots, _, num_new = self.layout
        before = self.cache.previous[slots]
        newest = x[torch.arange(len(x), device=x.device), self.last]  # (B, C)
        self.cache.previous[slots] = torch.where(num_new[:, None] > 0, newest, before)
        return before

    def attend(
        self,
        layer: int,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        window: int | None,
        scale: float,
    ) -> torch.Tensor:
        """(B, T, H, D): write the new keys and values, then attend to the slot's past and to them.

        A query sees `window` keys including its own (None: all). q is (B, T, H, D); k, v (B, T, K,
        D).
        """
        q, k, v = qkv
        rows = self.layout[0, :, None]
        self.cache.keys[layer][rows, :, self.write_at] = k
        self.cache.values[layer][rows, :, self.write_at] = v
        attend = self._decode if self.num_tokens == 1 else self._prefill
        return attend(layer, q, window, scale)

    def _decode(
        self, layer: int, q: torch.Tensor, window: int | None, scale: float
    ) -> torch.Tensor:
        """One query per row, all rows at once, block by block of keys."""
        num_rows, _, num_heads, head_dim = q.shape
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (N, K, S + 1, D)
        if self.slots != list(range(self.cache.num_slots)):  # else nothing need be copied
            keys, values = keys[self.slots], values[self.slots]
        grouped = (q * scale).view(num_rows, keys.shape[1], -1, head_dim)  # (B, K, H / K, D)
        hidden = ~self._seen(window)[:, None]  # (B, 1, 1, S)
        live = [s for s, n in zip(self.starts, self.num_new, strict=True) if n]
        oldest = 0 if window is None or not live else max(0, min(live) - window + 1)
        block = self.cache.block
        mixed = torch.zeros(grouped.shape, dtype=torch.float32, device=q.device)
        total = torch.zeros(*grouped.shape[:3], 1, dtype=torch.float32, device=q.device)
        for begin in range(oldest // block * block, max(live, default=-1) + 1, block):
            end = min(begin + block, self.cache.max_len)
            scores = (grouped @ keys[:, :, begin:end].transpose(2, 3)).float()  # (B, K, H / K, E)
            weights = scores.exp_().masked_fill_(hidden[..., begin:end], 0)
            total += weights.sum(-1, keepdim=True)
            mixed += weights.to(q.dtype) @ values[:, :, begin:end]
        mixed /= total.clamp_(min=1e-30)  # a row without tokens saw no key
        return mixed.to(q.dtype).view(num_rows, 1, num_heads, head_dim)

    def _prefill(
        self, layer: int, q: torch.Tensor, window: int | None, scale: float
    ) -> torch.Tensor:
        """Many queries per row, row by row: each row's shapes depend on that row alone."""
        out = torch.zeros_like(q)  # (B, T, H, D)
        for row, slot in enumerate(self.slots):
            start, count = self.starts[row], self.num_new[row]
            if count == 0:
                continue
            oldest = 0 if window is None else max(0, start - window + 1)
            end = start + count
            mixed = F.scaled_dot_product_attention(
                q[row, :count].transpose(0, 1)[None],
                self.cache.keys[layer, slot, :, oldest:end][None],
                self.cache.values[layer, slot, :, oldest:end][None],
                attn_mask=self._seen(window)[row, :count, oldest:end],
                scale=scale,
                enable_gqa=q.shape[2] != self.cache.keys.shape[2],
            )  # (1, H, count, D)
            out[row, :count] = mixed[0].transpose(0, 1)
        return out

    def _seen(self, window: int | None) -> torch.Tensor:
        """(B, T, S) True where a token may look, made by the first layer that has this window."""
        if window not in self.masks:
            cells = torch.arange(self.cache.max_len, device=self.positions.device)
            own = self.positions[:, :, None]
            self.masks[window] = cells <= own
            if window is not None:
                self.masks[window] &= cells > own - window
        return self.masks[window]
