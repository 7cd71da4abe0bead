"""Shards of text: parquet files with one string column `text`, one document a row.

Written with zstd in row groups of at most 1,024 documents; read back one row group at a time. Files of other
makers are read too, whatever else they hold beside `text`.

The choice that would surprise: documents that come before the reading position are passed over by the row
counts in the footers, without decompressing them, so resuming deep in a corpus costs milliseconds.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.paths import UserError

ROW_GROUP_DOCUMENTS = 1024
ROW_GROUP_CHARS = 16_000_000  # bounds a reader's memory where documents are whole books
SHARD_CHARS = 64_000_000  # some 20 MB a file once compressed
SCHEMA = pa.schema([("text", pa.string())])


def shard_name(index: int) -> str:
    """The file name of a shard, the same here and on the hub."""
    return f"shard_{index:05d}.parquet"


def check_shard(path: Path) -> int:
    """The number of documents in a shard, from its footer.

    Raises UserError, naming the file, when it is cut short, has no string column `text`, or is empty.
    """
    mend = "mend or remove it, then run `python -m nanochat.dataset` again"
    try:
        with pq.ParquetFile(path) as file:
            schema, num_documents = file.schema_arrow, file.metadata.num_rows
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no whole parquet file; {mend}") from error
    if "text" not in schema.names:
        raise UserError(f"{path} has no column `text` (it has {', '.join(schema.names)}); {mend}")
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: the column `text` holds {kind}, not strings; {mend}")
    if num_documents == 0:
        raise UserError(f"{path} holds no documents; {mend}")
    return num_documents


def is_whole(path: Path) -> bool:
    """Whether `path` is there and passes `check_shard`."""
    try:
        return check_shard(path) > 0
    except UserError:
        return False


def read_texts(shards: Sequence[Path], skip: int = 0) -> Iterator[str]:
    """The documents of `shards` in order, once, but the first `skip`. Raises UserError for a damaged shard."""
    for path in shards:
        num_documents = check_shard(path)
        if skip >= num_documents:
            skip -= num_documents
            continue
        try:
            with pq.ParquetFile(path) as file:
                yield from _read_groups(file, skip)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is damaged ({error}); remove it, then run `python -m nanochat.dataset` again"
            ) from error
        skip = 0


def _read_groups(file: pq.ParquetFile, skip: int) -> Iterator[str]:
    for group in range(file.num_row_groups):
        num_rows = file.metadata.row_group(group).num_rows
        if skip < num_rows:
            batches = file.iter_batches(ROW_GROUP_DOCUMENTS, row_groups=[group], columns=["text"])
            texts = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
            yield from (text or "" for text in islice(texts, skip, None))  # a null counts as empty
        skip = max(0, skip - num_rows)


class ShardWriter:
    """Writes documents to one parquet file, a row group at a time."""

    def __init__(self, path: Path) -> None:
        self.path, self.num_chars = path, 0
        self._file = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._texts: list[str] = []
        self._group_chars = 0

    def add(self, text: str) -> None:
        """Append one document."""
        self._texts.append(text)
        self._group_chars += len(text)
        self.num_chars += len(text)
        if len(self._texts) == ROW_GROUP_DOCUMENTS or self._group_chars >= ROW_GROUP_CHARS:
            self._flush()

    def _flush(self) -> None:
        self._file.write_table(pa.table({"text": self._texts}, SCHEMA))
        self._texts, self._group_chars = [], 0

    def close(self) -> None:
        """Finish the file and make its content durable."""
        if self._texts:
            self._flush()
        self._file.close()
        fsync_file(self.path)


def fsync_file(path: Path) -> None:
    """Make the content of a file durable."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_shards(documents: Iterable[tuple[str, bool]], folder: Path) -> None:
    """Write (text, is it for validation) into shards; the validation documents make up the last."""
    val = ShardWriter(folder / "val.parquet")
    train = [ShardWriter(folder / shard_name(0))]
    try:
        for text, is_val in documents:
            if train[-1].num_chars >= SHARD_CHARS and not is_val:
                train[-1].close()
                train.append(ShardWriter(folder / shard_name(len(train))))
            (val if is_val else train[-1]).add(text)
    finally:
        train[-1].close()
        val.close()
    val.path.rename(folder / shard_name(len(train)))
