"""Text shards become batches of token ids, packed ahead of time by a background thread.

`Loader` turns what `packing.py` packs into tensors; `TextLoader` is the one for text, which reads its shards
round and round, and `chat_loader.py` has the one for conversations. A batch carries the place right after it as
a function, `batch.state()`: making it costs a few references a step, and only a checkpoint pays for the rest.
The parts of all ranks, put together by `merge_states`, let any number of ranks go on.

The choice that would surprise: a state holds the tokens of the lanes, not places in the shards, so resuming
tokenises nothing again; that is 8 to 9 rows of tokens a lane, plain numbers in JSON.

Shapes: R rows of this rank, T time.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from nanochat.dataset import check_shard, read_texts
from nanochat.packing import Packer, Shape, Source
from nanochat.paths import UserError
from nanochat.runtime import say
from nanochat.tokenizer import Tokenizer

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
                say(f"epoch {epoch + 1} of the text begins ({self.num_documents:,} documents)")

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

    def __init__(  # noqa: PLR0913  (a flat signature that every trainer calls)
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
