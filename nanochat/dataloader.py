"""Text or conversations -> packed (B, T) batches: the same on 1 or N ranks, exactly resumable.

Every rank reads all documents, which is cheap, and assigns each to the row of the global batch with
the fewest bytes so far (ties: the lowest). It tokenises and packs only its own rows, so a batch
depends on data, tokenizer and step alone. A thread packs a few batches ahead. A saved state holds
each row's waiting tokens (8 to 9 rows of them), not file positions: resuming retokenises nothing.

Shapes: R rows of this rank, T tokens of a row. A token that is not to be learned is ~id, in pieces,
rows and saved states.
"""

import hashlib
import heapq
import os
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, count
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from nanochat.common import Runtime, UserError, all_reduce_sum, print0
from nanochat.dataset import check_shard, read_texts
from nanochat.tokenizer import Conversation, Tokenizer, check_conversation, render_conversation

IGNORED = -1  # target of a token that is not to be learned
WINDOW_ROWS = 8  # rows of tokens considered when packing; 16 and 32 gained nothing (simulated)
ENCODE_BYTES = 1 << 18  # tokenised at a time, about
BATCHES_AHEAD = 4  # packed or being packed by the thread
NUM_THREADS = min(4, os.cpu_count() or 1)  # of the tokenizer; eight were slower
BYTES_PER_TOKEN = 4  # typical of English
MARK_BYTES = 8  # of a message, for the two special tokens around it


class TextSource:
    """The documents of text shards, endlessly; announces each new epoch unless `quiet`."""

    splits = True  # a document may continue in a later row; every token is a target
    total = None  # the stream has no end

    def __init__(self, tokenizer: Tokenizer, shards: Sequence[Path], quiet: bool = False) -> None:
        self.tokenizer, self.shards, self.quiet = tokenizer, list(shards), quiet

    @property
    def identity(self) -> list[str]:
        return [shard.name for shard in self.shards]

    def resume(self, identity: Any) -> bool:
        """Restrict to the shards a stream began with; False if any are missing."""
        self.shards = [shard for shard in self.shards if shard.name in identity]
        return self.identity == identity

    def documents(self, first: int) -> Iterator[str]:
        """Texts from number `first` on, counted through all epochs, without end.

        Raises UserError for a damaged shard, and if there is no text at all.
        """
        num_documents = sum(check_shard(shard) for shard in self.shards)
        first_epoch, skip = divmod(first, num_documents)
        for epoch in count(first_epoch):
            if epoch > first_epoch and not self.quiet:
                print0(f"epoch {epoch + 1} of the text begins ({num_documents:,} documents)")
            found = skip > 0
            for text in read_texts(self.shards, skip):
                found = found or bool(text)
                yield text
            if not found:
                shards = f"{len(self.shards)} training shards"
                raise UserError(f"no text in {shards}; run `python -m nanochat.dataset`")
            skip = 0

    def num_bytes(self, document: str) -> int:
        return len(document.encode())

    def encode(self, documents: list[str]) -> list[np.ndarray]:
        batch = self.tokenizer.encode_batch(documents, NUM_THREADS)
        return [np.array(ids, np.int32) for ids in batch]


class ChatSource:
    """Conversations, reshuffled each epoch; `num_epochs` None: without end."""

    splits = False  # a conversation stays whole, cropped to a row, and rows are padded with <|bos|>

    def __init__(
        self,
        tokenizer: Tokenizer,
        conversations: Sequence[Conversation],
        num_epochs: int | None = 1,
        seed: int = 0,
        quiet: bool = False,
    ) -> None:
        """Raises UserError if there are no conversations."""
        if not len(conversations):
            raise UserError("there are no conversations to train on; check --mixture and --custom")
        self.tokenizer, self.conversations = tokenizer, conversations
        self.num_epochs, self.seed, self.quiet = num_epochs, seed, quiet
        # Conversations in the whole stream.
        self.total = None if num_epochs is None else num_epochs * len(conversations)
        self.identity = {"num_conversations": len(conversations), "seed": seed}

    def resume(self, identity: Any) -> bool:
        """True if a saved stream was of these conversations."""
        return self.identity == identity

    def documents(self, first: int) -> Iterator[Conversation]:
        """Conversations from number `first` on, counted through all epochs."""
        num_conversations = len(self.conversations)
        first_epoch, skip = divmod(first, num_conversations)
        for epoch in count(first_epoch):
            if epoch == self.num_epochs:
                return
            if epoch > first_epoch and not self.quiet:
                print0(f"epoch {epoch + 1} of the conversations begins ({num_conversations:,})")
            digest = hashlib.sha256(f"{self.seed} {epoch}".encode()).digest()
            generator = np.random.default_rng(int.from_bytes(digest))
            for index in generator.permutation(num_conversations)[skip:]:
                yield self.conversations[int(index)]
            skip = 0

    def num_bytes(self, document: Conversation) -> int:
        """Bytes of its texts; UserError, on every rank, if it is malformed."""
        check_conversation(document)
        num_bytes = 0
        for message in document["messages"]:
            content = message["content"]
            texts = [content] if isinstance(content, str) else [part["text"] for part in content]
            num_bytes += MARK_BYTES + sum(len(text.encode("utf-8", "replace")) for text in texts)
        return num_bytes

    def encode(self, documents: list[Conversation]) -> list[np.ndarray]:
        """The piece of each conversation, without <|bos|>."""
        rendered = (np.array(render_conversation(self.tokenizer, d), np.int32) for d in documents)
        return [np.where(mask, ids, ~ids)[1:] for ids, mask in rendered]


def local_rows(num_rows: int, runtime: Runtime) -> range:
    """This rank's rows of the global batch; UserError unless all ranks have as many."""
    num, num_odd = divmod(num_rows, runtime.world_size)
    if num < 1 or num_odd:
        ranks = f"{runtime.world_size} ranks; change --total_batch_size"
        raise UserError(f"a batch of {num_rows} rows does not divide among {ranks}")
    return range(runtime.rank * num, (runtime.rank + 1) * num)


@dataclass
class RowBuffer:
    """The pieces waiting to be packed into one row of the global batch."""

    pieces: list[np.ndarray]  # of tokens, oldest first; never written to, so snapshots share them
    documents: int = 0  # documents below this number have been assigned, to any row
    finished: int = 0  # pieces packed to their end
    cropped: int = 0

    def sizes(self) -> list[int]:
        """Tokens of each piece with its <|bos|>."""
        return [len(piece) + 1 for piece in self.pieces]

    def fill(self, row: np.ndarray, window: int, split: bool) -> None:
        """Pack pieces into `row` (T+1,), prefilled with <|bos|>: best fit first.

        If no piece fits whole, the longest is split; without `split` the rest stays padding.
        Splitting the longest keeps the most context: on average 55.4 tokens before a target,
        against 47.4 for the shortest and 54.9 for the oldest (primer, T = 256; web-like text at
        2048: 641, 606, 618). Only the oldest `window` tokens of pieces are considered: one rank may
        have read further than another, and that must not matter.
        """
        sizes, place = self.sizes(), 0
        while place < len(row) and sizes:
            space = len(row) - place
            seen = sizes[: bisect_left(list(accumulate(sizes)), window) + 1]
            best = max((size for size in seen if size <= space), default=None)
            if best is not None:
                fitting = seen.index(best)  # ties: the older
                piece, _ = self.pieces.pop(fitting), sizes.pop(fitting)
                self.finished += 1
            elif split:
                longest = seen.index(max(seen))
                whole = self.pieces[longest]
                piece, self.pieces[longest] = whole[: space - 1], whole[space - 1 :]
                self.cropped += 1
            else:
                return
            row[place + 1 : place + 1 + len(piece)] = piece
            place += 1 + len(piece)


class Batch(NamedTuple):
    """One step's rows of this rank."""

    inputs: torch.Tensor  # (R, T) int64
    targets: torch.Tensor  # (R, T) int64, IGNORED where nothing is to be learned


class Loader:
    """Iterates over this rank's batches, packed ahead by a thread; `close` it when done.

    Three attributes describe the stream up to the latest batch:
    state        a function that returns this rank's part of the position as JSON
    num_cropped  pieces split or cropped in this rank's rows
    progress     packed share of a finite source, the same on all ranks; the loader stops at 1
    """

    def __init__(
        self,
        source: TextSource | ChatSource,
        num_rows: int,
        seq_len: int,
        runtime: Runtime,
        state: dict[str, Any] | None = None,
    ) -> None:
        """`num_rows` counts all ranks; `state`, from `merge_states`, is where to resume.

        Raises UserError if the rows do not divide or the state is of another stream.
        """
        self.device, self.world_size = runtime.device, runtime.world_size
        self.source, self.total, self.seq_len = source, source.total, seq_len
        self.buffers = {row: RowBuffer([]) for row in local_rows(num_rows, runtime)}
        self.assigned = [(0, row) for row in range(num_rows)]  # (bytes, row): a heap
        self.num_documents = 0  # read so far
        if state:
            self._resume(state)
        self.unread = source.documents(self.num_documents)
        self.ended = False  # nothing is unread
        self.state: Callable[[], dict[str, Any] | None] = lambda: state
        self.num_cropped = 0
        num_finished = sum(lane["finished"] for lane in state["lanes"]) if state else 0
        self.progress = num_finished / self.total if self.total else 0.0
        self._thread = ThreadPoolExecutor(1, "nanochat-loader")
        self._ahead = deque(self._thread.submit(self._pack) for _ in range(BATCHES_AHEAD))

    def _resume(self, state: dict[str, Any]) -> None:
        num_rows = len(self.assigned)
        if not self.source.resume(state["source"]):
            raise UserError(
                "the checkpoint was made with other data; give the same --data, --mixture, "
                "--custom and --seed as before, or --fresh to start over"
            )
        if (len(state["dealt"]), state["seq_len"]) != (num_rows, self.seq_len):
            raise UserError(
                f"the checkpoint has batches of {len(state['dealt'])} rows of {state['seq_len']} "
                f"tokens, not {num_rows} of {self.seq_len}; "
                "give the same --total_batch_size and --max_seq_len"
            )
        self.num_documents = state["documents"]
        self.assigned = [(num_bytes, row) for row, num_bytes in enumerate(state["dealt"])]
        heapq.heapify(self.assigned)
        for lane in state["lanes"]:
            if lane["lane"] in self.buffers:
                pieces = [np.array(piece, np.int32) for piece in lane["pieces"]]
                self.buffers[lane["lane"]] = RowBuffer(
                    pieces, lane["documents"], finished=lane["finished"], cropped=lane["cropped"]
                )

    def _assign(self) -> None:
        """Assign documents until about ENCODE_BYTES are ours; tokenise those."""
        ours: list[tuple[RowBuffer, Any]] = []
        ours_bytes = 0
        while ours_bytes < ENCODE_BYTES:
            document: Any = next(self.unread, None)
            if document is None:
                self.ended = True
                break
            num_bytes = self.source.num_bytes(document)
            if not self.source.splits:
                num_bytes = min(num_bytes, BYTES_PER_TOKEN * (self.seq_len + 1))
            assigned, row = self.assigned[0]
            heapq.heapreplace(self.assigned, (assigned + num_bytes, row))
            buffer = self.buffers.get(row)
            # A buffer from a rank that had read further already has its next documents.
            if buffer is not None and self.num_documents >= buffer.documents and num_bytes:
                ours.append((buffer, document))
                ours_bytes += num_bytes
            self.num_documents += 1
        pieces = self.source.encode([document for _, document in ours])
        for (buffer, _), piece in zip(ours, pieces, strict=True):
            if not self.source.splits and len(piece) > self.seq_len:
                piece = piece[: self.seq_len]
                buffer.cropped += 1
            buffer.pieces.append(piece)

    def _snapshot(self) -> Callable[[], dict[str, Any]]:
        """A function that returns the present state as JSON, now or later; cheap to make."""
        num_documents, assigned = self.num_documents, self.assigned.copy()
        buffers = {
            row: replace(b, pieces=b.pieces.copy(), documents=max(b.documents, num_documents))
            for row, b in self.buffers.items()
        }

        def state() -> dict[str, Any]:
            lanes = [
                {"lane": row, **vars(buffer), "pieces": [piece.tolist() for piece in buffer.pieces]}
                for row, buffer in buffers.items()
            ]
            return {
                "source": self.source.identity,
                "seq_len": self.seq_len,
                "documents": num_documents,
                "dealt": [num_bytes for num_bytes, _ in sorted(assigned, key=lambda pair: pair[1])],
                "lanes": lanes,
            }

        return state

    def _pack(self) -> tuple[Batch, Callable[[], dict[str, Any]], int, int]:
        """(batch in host memory, state after it, crops, pieces packed to their end)."""
        row_len = self.seq_len + 1
        window = WINDOW_ROWS * row_len
        # <|bos|> is a target in text; among conversations neither it nor padding is one.
        bos = self.source.tokenizer.bos_id
        filling = bos if self.source.splits else ~bos
        rows = np.full((len(self.buffers), row_len), filling, np.int32)  # (R, T+1)
        for row, buffer in zip(rows, self.buffers.values(), strict=True):
            # One row more than the window, which must still be full at the last placement.
            while not self.ended and sum(buffer.sizes()) < window + row_len:
                self._assign()
            buffer.fill(row, window, self.source.splits)
        parts = np.where(rows < 0, ~rows, rows)[:, :-1], np.maximum(rows, IGNORED)[:, 1:]
        batch = Batch(*(torch.from_numpy(part.astype(np.int64)) for part in parts))
        if self.device.type == "cuda":
            # Else page-locking would initialise GPU 0 in every rank's process.
            torch.cuda.set_device(self.device.index or 0)
            batch = Batch(*(tensor.pin_memory() for tensor in batch))
        num_cropped = sum(buffer.cropped for buffer in self.buffers.values())
        num_finished = sum(buffer.finished for buffer in self.buffers.values())
        return batch, self._snapshot(), num_cropped, num_finished

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch, on the device; raises the thread's error, if any."""
        if self.progress >= 1:
            self.close()
        if not self._ahead:
            raise StopIteration
        # An error stays in front, for the next call.
        batch, self.state, self.num_cropped, num_finished = self._ahead[0].result()
        self._ahead.popleft()
        self._ahead.append(self._thread.submit(self._pack))
        if self.total:
            # No rank knows when the others run out, so they sum what they have packed. That waits
            # for the device, but rendering all conversations on all ranks would cost far more.
            if self.world_size > 1:
                num_finished = all_reduce_sum(torch.tensor(num_finished, device=self.device)).item()
            self.progress = num_finished / self.total
        # The copies run on the consumer's stream, which orders them before what follows.
        return Batch(*(tensor.to(self.device, non_blocking=True) for tensor in batch))

    def close(self) -> None:
        self._ahead.clear()
        self._thread.shutdown(cancel_futures=True)


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of the whole stream from all ranks' parts, usable on any number of ranks.

    Ranks may have read to different documents. Reading resumes at the earliest; each row's buffer
    knows how far it has been assigned documents and takes none twice.
    """
    lanes = [lane for state in states for lane in state["lanes"]]
    return min(states, key=lambda state: state["documents"]) | {"lanes": lanes}
