"""Documents become rows of token ids: dealt to lanes, packed by best fit, the same on 1 or N ranks.

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
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from nanochat.paths import UserError

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
