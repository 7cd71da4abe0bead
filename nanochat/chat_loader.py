"""Conversations become packed batches whose targets are masked to what the assistant says.

The lanes of `packing.py`, fed with whole conversations: each is rendered with its mask, best-fit packed, and the
rest of a row is padded with <|bos|>, nothing of which is a target. One that is longer than a row is cropped to it
and counted, so it can never clog a lane. Conversations are shuffled anew each epoch, from the seed and the epoch.

Conversations are dealt by the bytes of their texts, which every rank can count without tokenising, up to what fits
into a row. So ranks render only their own, but none knows when the lanes of the others run empty. Therefore
`progress` is summed over the ranks, and only when all conversations are packed does the stream end, on every
rank after the same step; lanes that ran empty before yield padding.

The choice that would surprise: that sum is a collective call in `__next__`, on the trainer's thread, one number a
step. Its price is one wait for the device a step; rendering everything on every rank would cost far more.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch

from nanochat.chat_format import Conversation, check_conversation, render_conversation
from nanochat.dataloader import Batch, Loader
from nanochat.packing import Shape
from nanochat.paths import UserError
from nanochat.runtime import all_reduce_sum, say
from nanochat.tokenizer import Tokenizer

BYTES_PER_TOKEN = 4  # typical of English; conversations are dealt as if none were longer than a row
MARK_BYTES = 8  # a message also takes the two tokens around it


class Conversations:
    """The conversations of some epochs, each epoch in an order of its own, and how they become pieces."""

    crop = False

    def __init__(
        self,
        conversations: Sequence[Conversation],
        tokenizer: Tokenizer,
        seq_len: int,
        num_epochs: int | None,
        seed: int,
        quiet: bool,
    ) -> None:
        if not len(conversations):
            raise UserError("there are no conversations to train on; check --mixture and --custom")
        self.conversations, self.tokenizer = conversations, tokenizer
        self.row_len, self.num_epochs, self.seed = seq_len + 1, num_epochs, seed
        self.bos, self.quiet = ~tokenizer.bos_id, quiet
        self.identity = {"num_conversations": len(conversations), "seed": seed}

    def read(self, first: int) -> Iterator[Conversation]:
        """The conversations from number `first` on, counted through all epochs."""
        first_epoch, skip = divmod(first, len(self.conversations))
        for epoch in count(first_epoch):
            if epoch == self.num_epochs:
                return
            if epoch > first_epoch and not self.quiet:
                say(f"epoch {epoch + 1} of the conversations begins ({len(self.conversations):,})")
            digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
            generator = np.random.default_rng(int.from_bytes(digest))
            for index in generator.permutation(len(self.conversations))[skip:]:
                yield self.conversations[int(index)]
            skip = 0

    def num_bytes(self, document: Conversation) -> int:
        """The bytes of its texts, up to those of a row. Raises UserError, on every rank, when malformed."""
        check_conversation(document)
        num_bytes = 0
        for message in document["messages"]:
            content = message["content"]
            texts = [content] if isinstance(content, str) else [part["text"] for part in content]
            num_bytes += MARK_BYTES + sum(len(text.encode("utf-8", "replace")) for text in texts)
        return min(num_bytes, BYTES_PER_TOKEN * self.row_len)

    def encode(self, documents: list[Conversation]) -> list[tuple[np.ndarray, bool]]:
        """Each conversation's ids, ~id where the mask is 0, cropped to a row."""
        pieces = []
        for document in documents:
            ids, mask = render_conversation(self.tokenizer, document)
            marked = np.array(ids[1 : self.row_len], np.int32)
            learned = np.array(mask[1 : self.row_len], np.bool_)
            pieces.append((np.where(learned, marked, ~marked), len(ids) > self.row_len))
        return pieces


class ChatLoader(Loader):
    """Batches of conversations for `num_epochs` (None: without end).

    `Batch.progress` is the share of all conversations that is packed, or the epochs when there is no end.
    """

    def __init__(  # noqa: PLR0913  (what TextLoader takes, and epochs and seed)
        self,
        conversations: Sequence[Conversation],
        tokenizer: Tokenizer,
        num_rows: int,
        seq_len: int,
        rank: int,
        world_size: int,
        device: torch.device | str,
        num_epochs: int | None = 1,
        state: dict[str, Any] | None = None,
        seed: int = 0,
        quiet: bool = False,
    ) -> None:
        """`num_rows` are those of all ranks; `state` is that of `merge_states`, to go on from there.

        Raises UserError when there is nothing to read, rows do not divide, or the state does not match.
        """
        source = Conversations(conversations, tokenizer, seq_len, num_epochs, seed, quiet)
        self.endless, self.world_size = num_epochs is None, world_size
        self.total = len(conversations) * (num_epochs or 1)
        lanes = state["lanes"] if state else []
        self.progress = sum(lane["finished"] for lane in lanes) / self.total
        shape = Shape(num_rows, seq_len, rank, world_size)
        super().__init__(source, shape, device, state, lambda packer: packer.num_finished)

    def __next__(self) -> Batch:
        if self.progress >= 1 and not self.endless:
            self.close()
            raise StopIteration
        batch = super().__next__()
        num_finished = int(batch.progress)  # so far in the lanes of this rank
        if self.world_size > 1:
            num_finished = all_reduce_sum(torch.tensor(num_finished, device=self.device)).item()
        self.progress = num_finished / self.total
        return replace(batch, progress=self.progress)
