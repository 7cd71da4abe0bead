"""Which slot of the cache a prompt goes to, and what need not be read again.

A slot keeps its tokens when its request leaves. A new prompt gets, of all slots in use or free,

- all of a prompt that one has read whole, with the logits after it: a copy, as exact as reading it anew;
- else, with `prefix_reuse`, the longest beginning that it has in common with what one holds, such as the history
  of a conversation. The rest is then read in chunks that begin elsewhere than those of a fresh reading, so the
  last bits of the logits depend on who came before: right for a server, not for an evaluation.

It goes where these tokens are if that slot is free and loses little, else to the slot unused for longest.

Both presume that the weights stay as they are; after a change, make new ones (Engine.reset).

V vocabulary, C channels.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache

WORTH_SHARING = 16  # tokens; a shorter beginning is read again and leaves its slot alone


class Prompt(NamedTuple):
    """A prompt that a slot has read to its end, and what the model made of it."""

    ids: list[int]
    logits: torch.Tensor  # (V,) after its last token
    previous: torch.Tensor  # (C,) see KVCache.previous


@dataclass(eq=False)
class Slot:
    """One sequence of the cache."""

    index: int
    held: list[int] = field(default_factory=list)  # the tokens whose keys and values it has
    prompt: Prompt | None = None  # what `held` begins with, once that is read whole


class Slots:
    """All slots of `cache`, which is emptied: those in use, and free ones that hold what was said there."""

    def __init__(self, model: GPT, cache: KVCache, prefix_reuse: bool) -> None:
        cache.reset()
        self.model, self.cache, self.prefix_reuse = model, cache, prefix_reuse
        self.all = [Slot(index) for index in range(cache.num_slots)]
        self.free = deque(self.all)  # the one unused for longest first

    def take(self, prompt: list[int]) -> Slot:
        """A slot that was free, holding as much of the beginning of `prompt` as could be found."""
        source, shared = self._longest_prefix(prompt)
        in_place = source in self.free and 2 * shared >= len(source.held)
        slot = source if in_place else self.free[0]
        whole = source.prompt if shared == len(prompt) else None
        previous: torch.Tensor | float = 0.0
        if whole:
            previous = whole.previous
        elif shared:
            newest = torch.tensor(prompt[shared - 1], device=self.cache.keys.device)
            previous = self.model.embed(newest)
        self.cache.keep(slot.index, shared, source.index, previous)
        slot.held, slot.prompt = prompt[:shared], whole
        self.free.remove(slot)
        return slot

    def give_back(self, slot: Slot) -> None:
        """Free a slot; it goes on holding what it holds."""
        self.free.append(slot)

    def _longest_prefix(self, prompt: list[int]) -> tuple[Slot, int]:
        """(the slot to begin from, how many of its tokens to keep).

        The last token of a prompt is only kept together with the logits after it.
        """
        best, longest = self.free[0], 0
        for slot in self.all:
            if slot.prompt and slot.prompt.ids == prompt:
                return slot, len(prompt)
            if self.prefix_reuse:
                limit = min(len(slot.held), len(prompt) - 1)
                pairs = zip(slot.held, prompt[:limit], strict=False)
                shared = next((i for i, (old, new) in enumerate(pairs) if old != new), limit)
                if shared >= max(WORTH_SHARING, longest + 1):
                    best, longest = slot, shared
        return best, longest
