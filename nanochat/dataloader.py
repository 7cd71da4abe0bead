"""Documents or conversations become packed (B, T) batches, the same on 1 or N ranks, exactly resumable.

Documents become rows of token ids: dealt to lanes, packed by best fit, the same on 1 or N ranks.

One lane per row of the global batch. Every rank reads all documents (cheap) and deals each to the lane that
was dealt the fewest bytes so far (ties: the lowest); a rank tokenises and packs only its own lanes. So the
rows of a step follow from the data, the tokenizer and the step alone.

A lane fills its row with its largest piece that fits whole, again and again. The choice is among its oldest
pieces that together make WINDOW_ROWS rows: a rank may have dealt further than another, and what it holds
beyond the window must not matter. When nothing fits, a source of conversations leaves the rest of the row
empty; of text, the *longest* piece is cropped, and what is left of it stays in the lane as a piece of its own,
which starts with <|bos|> again. So every token of a text is a target exactly once.

The choice that would surprise: a token that is not to be learned is held as ~id, a negative number, so that ids
and loss mask travel as one array. Lanes hold pieces without their <|bos|>: rows are filled with it beforehand.

Why crop the longest, against the shortest and the oldest (simulated; mean tokens of context per target): primer-like
documents at T = 256: 55.4, 47.4, 54.9; web-like at T = 2048: 641, 606, 618; 4,096 books and textbooks at 512: all 235.7.
Windows of 16 and 32 rows gained nothing over 8. Shapes: R rows of this rank, T time.

Text shards become batches of token ids, packed ahead of time by a background thread.

`Loader` turns what `packing.py` packs into tensors; `TextLoader` is the one for text, which reads its shards
round and round, and `chat_loader.py` has the one for conversations. A batch carries the place right after it as
a function, `batch.state()`: making it costs a few references a step, and only a checkpoint pays for the rest.
The parts of all ranks, put together by `merge_states`, let any number of ranks go on.

The choice that would surprise: a state holds the tokens of the lanes, not places in the shards, so resuming
tokenises nothing again; that is 8 to 9 rows of tokens a lane, plain numbers in JSON.

Shapes: R rows of this rank, T time.

Conversations become packed batches whose targets are masked to what the assistant says.

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
import heapq
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch

from nanochat.common import UserError, all_reduce_sum, print0
from nanochat.dataset import check_shard, read_texts
from nanochat.tokenizer import Conversation, Tokenizer, check_conversation, render_conversation

WINDOW_ROWS = 8
CHUNK_BYTES = 1 << 18  # documents for our lanes are tokenised this many bytes at a time


@dataclass(frozen=True)
class Shape:
    """The rows of a step and the share of one rank: a contiguous block of them."""

    num_rows: int  # of the global batch
    seq_len: int  # T; a row has one place more, as inputs and targets overlap
    rank: int = 0
    world_size: int = 1

    @property
    def lanes(self) -> range:
        """The lanes (global rows) of this rank. Raises UserError when the rows do not divide."""
        if self.num_rows < 1 or self.num_rows % self.world_size:
            raise UserError(
                f"a batch of {self.num_rows} rows does not divide among {self.world_size} ranks; "
                "change --total_batch_size"
            )
        num_local = self.num_rows // self.world_size
        return range(self.rank * num_local, (self.rank + 1) * num_local)


class Source(Protocol):
    """Documents in a fixed order, and how they become pieces."""

    bos: int  # as rows hold it: ~id where it is not to be learned
    crop: bool  # crop a piece to fill the row, else leave the rest of the row as padding
    identity: Any  # JSON; a stream goes on only from a state of the same source

    def read(self, first: int) -> Iterator[Any]:
        """The documents from number `first` on, counted through all epochs."""
        ...

    def num_bytes(self, document: Any) -> int:
        """The size by which documents are dealt; known without tokenising."""
        ...

    def encode(self, documents: list[Any]) -> list[tuple[np.ndarray, bool]]:
        """(int32 ids without <|bos|>, was it cropped) of each document."""
        ...


@dataclass
class Lane:
    """What one row of the global batch is made from, step after step."""

    pieces: list[np.ndarray]  # oldest first; arrays are never written to, so snapshots share them
    documents: int = 0  # those with lower numbers have been dealt, to this lane or to another
    finished: int = 0  # pieces packed to their end
    cropped: int = 0

    def num_tokens(self) -> int:
        """What the pieces would take in rows."""
        return sum(map(len, self.pieces)) + len(self.pieces)

    def fill(self, row: np.ndarray, window: int, crop: bool) -> None:
        """Pack pieces into `row` (T+1,), which holds <|bos|> in every place."""
        place = 0
        while place < len(row) and self.pieces:
            space = len(row) - place - 1  # beside the <|bos|> of the piece
            fitting, longest = self._choose(space, window)
            if fitting is not None:
                piece = self.pieces.pop(fitting)
                self.finished += 1
            elif crop:
                whole = self.pieces[longest]
                piece, self.pieces[longest] = whole[:space], whole[space:]
                self.cropped += 1
            else:
                return
            row[place + 1 : place + 1 + len(piece)] = piece
            place += 1 + len(piece)

    def _choose(self, space: int, window: int) -> tuple[int | None, int]:
        """(the largest piece that fits whole, the longest piece) of the window; the older of equals."""
        fitting, fitting_len, longest, longest_len, seen = None, -1, 0, -1, 0
        for i, piece in enumerate(self.pieces):
            num = len(piece)
            if fitting_len < num <= space:
                fitting, fitting_len = i, num
            if num > longest_len:
                longest, longest_len = i, num
            seen += num + 1
            if seen >= window:
                break
        return fitting, longest


class Packer:
    """Deals documents to lanes and packs the rows of one rank."""

    def __init__(self, source: Source, shape: Shape, state: dict[str, Any] | None) -> None:
        self.source, self.shape = source, shape
        self.row_len = shape.seq_len + 1
        self.documents = state["documents"] if state else 0
        dealt = state["dealt"] if state else [0] * shape.num_rows
        self.dealt = [(num_bytes, lane) for lane, num_bytes in enumerate(dealt)]
        heapq.heapify(self.dealt)
        self.lanes = {lane: Lane([]) for lane in shape.lanes}
        for saved in state["lanes"] if state else ():
            if saved["lane"] in self.lanes:
                fields = {name: value for name, value in saved.items() if name != "lane"}
                fields["pieces"] = [np.array(piece, np.int32) for piece in saved["pieces"]]
                self.lanes[saved["lane"]] = Lane(**fields)
        self.unread = source.read(self.documents)
        self.ended = False

    @property
    def num_finished(self) -> int:
        """Pieces that the lanes of this rank have packed to their end."""
        return sum(lane.finished for lane in self.lanes.values())

    @property
    def num_cropped(self) -> int:
        """Crops in the lanes of this rank."""
        return sum(lane.cropped for lane in self.lanes.values())

    def next_rows(self) -> np.ndarray:
        """(R, T+1) int32, one row of each lane; nothing but <|bos|> in lanes that are empty for good."""
        window = WINDOW_ROWS * self.row_len
        rows = np.full((len(self.lanes), self.row_len), self.source.bos, np.int32)
        for row, lane in zip(rows, self.lanes.values(), strict=True):
            # One row more than the window: it must be full before the last placement, too.
            while not self.ended and lane.num_tokens() < window + self.row_len:
                self._deal()
            lane.fill(row, window, self.source.crop)
        return rows

    def _deal(self) -> None:
        """Deal documents until about CHUNK_BYTES have come to our own lanes, and tokenise those."""
        mine: list[tuple[Lane, Any]] = []
        num_mine = 0
        while num_mine < CHUNK_BYTES:
            try:
                document = next(self.unread)
            except StopIteration:
                self.ended = True
                break
            num_bytes = self.source.num_bytes(document)
            dealt, index = self.dealt[0]
            heapq.heapreplace(self.dealt, (dealt + num_bytes, index))
            lane = self.lanes.get(index)
            # A lane that comes from a rank which had dealt further has its next documents already.
            if lane is not None and self.documents >= lane.documents and num_bytes:
                mine.append((lane, document))
                num_mine += num_bytes
            self.documents += 1
        pieces = self.source.encode([document for _, document in mine])
        for (lane, _), (piece, cropped) in zip(mine, pieces, strict=True):
            lane.pieces.append(piece)
            lane.cropped += cropped

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """A function that returns the present place as JSON, whenever it is called; cheap to make."""
        documents, dealt = self.documents, tuple(self.dealt)
        lanes = {
            index: replace(lane, pieces=lane.pieces.copy()) for index, lane in self.lanes.items()
        }

        def state() -> dict[str, Any]:
            return {
                "source": self.source.identity,
                "seq_len": self.shape.seq_len,
                "documents": documents,
                "dealt": [num_bytes for num_bytes, _ in sorted(dealt, key=lambda pair: pair[1])],
                "lanes": [
                    {
                        "lane": index,
                        "documents": max(lane.documents, documents),
                        "finished": lane.finished,
                        "cropped": lane.cropped,
                        "pieces": [piece.tolist() for piece in lane.pieces],
                    }
                    for index, lane in lanes.items()
                ],
            }

        return state


IGNORED = -1  # the target of a token that is not to be learned
QUEUE_BATCHES = 4  # batches that the background thread may be ahead
NUM_THREADS = min(4, os.cpu_count() or 1)  # of the tokenizer; eight were slower


@dataclass(frozen=True)
class Batch:
    """One step's rows of this rank, and where the stream stands after them."""

    inputs: torch.Tensor  # (R, T) int64
    targets: torch.Tensor  # (R, T) int64, IGNORED where nothing is to be learned
    num_targets: int  # to be learned in these rows; the trainer sums it over the ranks
    num_cropped: int  # crops in the lanes of this rank since the stream began
    progress: float  # text: epochs read; chat: the share of all conversations that is packed, alike on all ranks
    state: Callable[
        [], dict[str, Any]
    ]  # -> JSON: this rank's part of the place right after this batch


class Prefetcher:
    """Runs an iterator ahead of its consumer in one background thread; its errors surface in `take`."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items
        self._ready: deque[Any] = deque()
        self._error: BaseException | None = None
        self._ended = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="nanochat-loader", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._closed or len(self._ready) < QUEUE_BATCHES)
                    if self._closed:
                        return
        except BaseException as error:  # handed to the consumer, which raises it
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def take(self) -> Any:
        """The next item. Raises what the iterator raised, StopIteration at its end or once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._ended)
            if self._ready and not self._closed:
                self._changed.notify_all()
                return self._ready.popleft()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """End the thread and wait for it."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()


class Loader:
    """Iterates over the batches of a source, packed ahead of time; `close` it when done."""

    def __init__(
        self,
        source: Source,
        shape: Shape,
        device: torch.device | str,
        state: dict[str, Any] | None,
        progress: Callable[[Packer], float],
    ) -> None:
        """`progress` tells from this rank's packer how far it has come, for `Batch.progress`."""
        self.device, self._progress = torch.device(device), progress
        if state:
            check_state(state, source, shape)
        self._prefetcher = Prefetcher(self._batches(Packer(source, shape, state)))

    def _batches(self, packer: Packer) -> Iterator[Batch]:
        """Endless batches in host memory, page-locked where the device is a GPU; the thread runs this."""
        if (
            self.device.type == "cuda"
        ):  # else page-locking would wake GPU 0 in the process of every rank
            torch.cuda.set_device(self.device.index or 0)
        while True:
            rows = packer.next_rows()
            inputs = np.where(rows < 0, ~rows, rows)[:, :-1].astype(np.int64)  # (R, T)
            targets = np.maximum(rows[:, 1:], IGNORED).astype(np.int64)  # (R, T)
            yield Batch(
                self._host_tensor(inputs),
                self._host_tensor(targets),
                num_targets=int((targets != IGNORED).sum()),
                num_cropped=packer.num_cropped,
                progress=self._progress(packer),
                state=packer.snapshot(),
            )

    def _host_tensor(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch: Batch = self._prefetcher.take()
        # The copies run on the consumer's own stream, so what follows on it sees them finished.
        return replace(
            batch,
            inputs=batch.inputs.to(self.device, non_blocking=True),
            targets=batch.targets.to(self.device, non_blocking=True),
        )

    def close(self) -> None:
        """End the background thread; the loader gives no more batches."""
        self._prefetcher.close()


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The place of the whole stream from the parts of all ranks, for any number of ranks to go on from.

    Ranks may have dealt to different documents. Dealing goes on from the earliest; each lane knows how far it has
    been dealt and takes nothing twice.
    """
    lanes = [lane for state in states for lane in state["lanes"]]
    return min(states, key=lambda state: state["documents"]) | {"lanes": lanes}


def check_state(state: dict[str, Any], source: Source, shape: Shape) -> None:
    """Raises UserError when a stream of `source` in `shape` cannot go on from `state`."""
    if state["source"] != source.identity:
        raise UserError(
            "the checkpoint was made with other data; give the same --data, --mixture, --custom and --seed "
            "as before, or --fresh to start over"
        )
    if (len(state["dealt"]), state["seq_len"]) != (shape.num_rows, shape.seq_len):
        raise UserError(
            f"the checkpoint has batches of {len(state['dealt'])} rows of {state['seq_len']} tokens, not "
            f"{shape.num_rows} of {shape.seq_len}; give the same --total_batch_size and --max_seq_len"
        )
    assert set(shape.lanes) <= {lane["lane"] for lane in state["lanes"]}, "merge_states first"


class Texts:
    """The documents of some shards, round and round; each new epoch is said, unless `quiet`."""

    crop = True

    def __init__(self, tokenizer: Tokenizer, shards: Sequence[Path], quiet: bool = False) -> None:
        self.tokenizer, self.shards, self.bos = tokenizer, shards, tokenizer.bos_id
        self.quiet = quiet
        self.num_documents = sum(check_shard(shard) for shard in shards)
        self.identity = [shard.name for shard in shards]

    def read(self, first: int) -> Iterator[str]:
        """Endless texts from document `first` on. Raises UserError when an epoch holds no text at all."""
        epoch, skip = divmod(first, max(1, self.num_documents))
        while True:
            found = skip > 0
            for text in read_texts(self.shards, skip):
                found = found or bool(text)
                yield text
            if not found:
                raise UserError(
                    f"no text in {len(self.shards)} training shards; run `python -m nanochat.dataset`"
                )
            epoch, skip = epoch + 1, 0
            if not self.quiet:
                print0(f"epoch {epoch + 1} of the text begins ({self.num_documents:,} documents)")

    def num_bytes(self, document: str) -> int:
        """Its length in UTF-8."""
        return len(document.encode())

    def encode(self, documents: list[str]) -> list[tuple[np.ndarray, bool]]:
        """The ids of each text; nothing is cropped before it is packed."""
        batch = self.tokenizer.encode_batch(documents, NUM_THREADS)
        return [(np.array(ids, np.int32), False) for ids in batch]


class TextLoader(Loader):
    """Batches of text without end.

    `Batch.progress` is what has been dealt, in epochs; ranks may differ by what one of them deals at a time.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        shards: Sequence[Path],
        num_rows: int,
        seq_len: int,
        rank: int,
        world_size: int,
        device: torch.device | str,
        state: dict[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        """`num_rows` are those of all ranks; `state` is that of `merge_states`, to go on from there.

        A resumed stream keeps to the shards it began with, whatever was added to the folder since.
        Raises UserError when the rows do not divide or the state does not match.
        """
        if state:
            shards = [shard for shard in shards if shard.name in state["source"]]
        source = Texts(tokenizer, shards, quiet)
        shape = Shape(num_rows, seq_len, rank, world_size)
        super().__init__(
            source, shape, device, state, lambda packer: packer.documents / source.num_documents
        )


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
                print0(
                    f"epoch {epoch + 1} of the conversations begins ({len(self.conversations):,})"
                )
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

    def __init__(
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
