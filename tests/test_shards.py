"""Shards are read back exactly as written, from any position, and bad ones are named in one line."""

from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataset import ShardWriter, check_shard, is_whole, read_texts, write_shards


def write(path: Path, texts: list[str], **options) -> Path:
    pq.write_table(pa.table({"text": texts}), path, **options)
    return path


@pytest.fixture
def many(tmp_path: Path) -> tuple[list[Path], list[str]]:
    """Three shards of ten documents in row groups of four, four and two."""
    texts = [f"document {i}" for i in range(30)]
    paths = [
        write(tmp_path / f"{k}.parquet", texts[10 * k : 10 * k + 10], row_group_size=4)
        for k in range(3)
    ]
    return paths, texts


def test_every_starting_position_gives_the_rest(many):
    paths, texts = many
    for skip in range(32):
        assert list(read_texts(paths, skip)) == texts[skip:]


def test_skipped_shards_and_row_groups_are_not_decoded(many, monkeypatch):
    paths, texts = many
    decoded = []
    original = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, *args, **kwargs: (
            decoded.append(kwargs["row_groups"]) or original(self, *args, **kwargs)
        ),
    )
    assert list(islice(read_texts(paths, 18), 2)) == texts[18:20]
    assert decoded == [[2]], "one row group: the last of the second shard"


def test_other_columns_nulls_and_large_strings(tmp_path: Path):
    table = pa.table(
        {"id": [1, 2, 3], "text": pa.array(["a", None, "ü"], pa.large_string()), "x": [0.5] * 3}
    )
    pq.write_table(table, tmp_path / "x.parquet")
    assert list(read_texts([tmp_path / "x.parquet"])) == ["a", "", "ü"]


def test_written_shards_have_zstd_and_bounded_row_groups(tmp_path: Path, monkeypatch):
    texts = [f"{i} " + "x" * (i % 7) for i in range(2500)]
    writer = ShardWriter(tmp_path / "a.parquet")
    for text in texts:
        writer.add(text)
    writer.close()
    meta = pq.read_metadata(tmp_path / "a.parquet")
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [1024, 1024, 452]
    assert meta.row_group(0).column(0).compression == "ZSTD"
    assert list(read_texts([tmp_path / "a.parquet"])) == texts

    monkeypatch.setattr(dataset, "ROW_GROUP_CHARS", 50)
    writer = ShardWriter(tmp_path / "b.parquet")
    for text in ["y" * 30] * 5:
        writer.add(text)
    writer.close()
    meta = pq.read_metadata(tmp_path / "b.parquet")
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [2, 2, 1]


def test_write_shards_rotates_and_puts_validation_last(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(dataset, "SHARD_CHARS", 20)
    documents = [(f"train {i}", False) for i in range(7)] + [("val 0", True)]
    write_shards([documents[0], documents[-1], *documents[1:-1], ("val 1", True)], tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"shard_{i:05d}.parquet" for i in range(4)]
    assert list(read_texts(files[:-1])) == [f"train {i}" for i in range(7)]
    assert list(read_texts(files[-1:])) == ["val 0", "val 1"]


def test_bad_shards_are_named(tmp_path: Path):
    whole = write(tmp_path / "whole.parquet", [f"some text {i}" for i in range(1000)])
    data = whole.read_bytes()
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(data[:-100])
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "schema.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    write(tmp_path / "empty.parquet", [])
    cases = {
        "cut": "no whole parquet file",
        "missing": "no whole parquet file",
        "schema": "no column `text` .it has content.",
        "numbers": "holds int64, not strings",
        "empty": "holds no documents|holds null, not strings",
    }
    for name, complaint in cases.items():
        path = tmp_path / f"{name}.parquet"
        for action in (check_shard, lambda path: list(read_texts([whole, path]))):
            with pytest.raises(UserError, match=f"{name}.parquet.*({complaint})") as caught:
                action(path)
            assert "\n" not in str(caught.value)
            assert "python -m nanochat.dataset" in str(caught.value)
        assert not is_whole(path)
    assert is_whole(whole)
    assert check_shard(whole) == 1000


def test_a_shard_damaged_inside_is_named(tmp_path: Path):
    path = write(
        tmp_path / "rot.parquet", [f"text {i}" * 9 for i in range(500)], compression="zstd"
    )
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    with pytest.raises(UserError, match="rot.parquet is damaged"):
        list(read_texts([path]))
