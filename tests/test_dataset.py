"""Corpora appear whole, are read back from any position, and come from a hub (here a local one)."""

import json
import os
from io import BytesIO
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import primer
from nanochat import dataset
from nanochat.dataset import (
    DOCUMENT_CHARS,
    Config,
    check_shard,
    find_corpus,
    is_whole,
    list_files,
    main,
    read_documents,
    read_texts,
    write_shards,
)
from tests.hub import Fault, Hub
from tests.models import refuses

pytestmark = pytest.mark.usefixtures("base")


def parquet(*texts: str | None, **options) -> bytes:
    buffer = BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), buffer, **options)
    return buffer.getvalue()


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(exist_ok=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


# Shards


def test_every_starting_position_gives_the_rest_and_decodes_no_more(tmp_path: Path, monkeypatch):
    """Of three shards of ten documents in row groups of four, four and two."""
    texts = [f"document {i}" for i in range(30)]
    files = {f"{k}": parquet(*texts[10 * k : 10 * k + 10], row_group_size=4) for k in range(3)}
    folder_of(tmp_path / "many", files)
    paths = [tmp_path / "many" / name for name in files]
    for skip in range(32):
        assert list(read_texts(paths, skip)) == texts[skip:]
    decoded, original = [], pq.ParquetFile.iter_batches

    def noting(self, *args, **kwargs):
        decoded.append(kwargs["row_groups"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noting)
    assert list(islice(read_texts(paths, 18), 2)) == texts[18:20]
    assert decoded == [[2]], "one row group: the last of the second shard"


def test_other_columns_nulls_and_large_strings(tmp_path: Path):
    texts = pa.array(["a", None, "ü"], pa.large_string())
    pq.write_table(pa.table({"id": [1, 2, 3], "text": texts}), tmp_path / "x.parquet")
    assert list(read_texts([tmp_path / "x.parquet"])) == ["a", "", "ü"]


def test_written_shards_have_zstd_bounded_row_groups_and_validation_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def row_groups(path: Path) -> list[int]:
        meta = pq.read_metadata(path)
        assert meta.row_group(0).column(0).compression == "ZSTD"
        return [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]

    documents = [(f"{i} " + "x" * (i % 7), i % 2500 == 1) for i in range(2502)]
    write_shards(documents, tmp_path)
    train, val = sorted(tmp_path.iterdir())
    assert (train.name, val.name) == ("shard_00000.parquet", "shard_00001.parquet")
    assert row_groups(train) == [1024, 1024, 452]
    assert list(read_texts([train])) == [text for text, is_val in documents if not is_val]
    assert list(read_texts([val])) == [documents[1][0], documents[2501][0]]

    monkeypatch.setattr(dataset, "ROW_GROUP_CHARS", 50)
    monkeypatch.setattr(dataset, "SHARD_CHARS", 120)
    write_shards([("y" * 30, i == 0) for i in range(8)], tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [row_groups(file) for file in files] == [[2, 2], [2, 1], [1]]


def test_bad_shards_are_named(tmp_path: Path):
    texts = [f"text {i}" * 9 for i in range(1000)]
    data = parquet(*texts, compression="zstd")
    files = {"whole": data, "cut": data[:-100], "rot": data[:4] + b"\xff" * 396 + data[400:]}
    folder = folder_of(tmp_path / "bad", files | {"empty": parquet()})
    pq.write_table(pa.table({"content": ["x"]}), folder / "schema")
    pq.write_table(pa.table({"text": [1, 2]}), folder / "numbers")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "empty")
    for name, complaint in {
        "cut": "not a whole parquet file",
        "missing": "not a whole parquet file",
        "schema": "no column `text` of strings .it has content: string.",
        "numbers": "no column `text` of strings .it has text: int64.",
        "empty": "holds no documents",
    }.items():
        for action in (check_shard, lambda path: list(read_texts([folder / "whole", path]))):
            said = refuses(f"{name} .*{complaint}", action, folder / name)
            assert "python -m nanochat.dataset" in said
        assert not is_whole(folder / name)
    assert check_shard(folder / "whole") == 1000
    refuses("rot is damaged", list, read_texts([folder / "rot"]))


# A user's own files


PARAGRAPH = "word " * 150 + "end.\n\n"
UNITS = [PARAGRAPH, "line of words\n", "word ", "x", "\n", "\n\n\n", "é\n\n "]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: repr(unit[:5]))
def test_a_text_file_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path: Path, unit: str):
    text = "start" + unit * (5 * DOCUMENT_CHARS // len(unit) + 7) + "end"
    (tmp_path / "a.txt").write_text(text)
    documents = list(read_documents([tmp_path / "a.txt"]))
    assert "".join(documents).replace("\n", "") in text.replace("\n", "")
    assert "".join("".join(documents).split()) == "".join(text.split())
    assert max(map(len, documents)) <= DOCUMENT_CHARS
    if unit == PARAGRAPH:
        assert "".join(documents) == text
        assert all(document.endswith("end.\n\n") for document in documents[:-1])
        assert len(documents) <= len(text) / (DOCUMENT_CHARS - len(unit)) + 1


def test_all_kinds_in_name_order_with_numbers_as_numbers(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "part10.txt").write_text("ten")
    (tmp_path / "part2.txt").write_bytes(b"\xef\xbb\xbftwo\r\nlines")
    rows = [{"text": "j0"}, {"text": " "}, {"text": "half \ud800 \U0001f600", "other": 1}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "sub" / "a.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]))
    (tmp_path / "z.parquet").write_bytes(parquet("p0", "", "p1"))
    (tmp_path / "README.md").write_text("not a document")
    documents = list(read_documents(list_files(tmp_path)))
    assert documents == ["two\nlines", "ten", "j0", "half \ufffd \U0001f600", "p0", "p1"]
    assert list_files(tmp_path / "part2.txt") == [tmp_path / "part2.txt"]


def test_a_bad_file_is_named_by_its_line(tmp_path: Path):
    no_row, bad_lines = "line 2: (not JSON|expected a JSON object)", ["no JSON", "[1]", "null"]
    cases = [("a.jsonl", line, no_row) for line in [*bad_lines, '{"body": "x"}', '{"text": 3}']]
    cases += [(name, "été", "UTF-8") for name in ("a.jsonl", "a.txt")]
    for name, content, complaint in cases:
        (tmp_path / name).write_text(f'{{"text": "good"}}\n{content}\n', encoding="latin-1")
        refuses(f"{name}.* {complaint}", list, read_documents([tmp_path / name]))


# Corpora


def test_parquet_folder_is_taken_as_it_is(tmp_path: Path, base: Path, capsys):
    files = {f"part-{i}.parquet": parquet(f"a{i}", f"b{i}") for i in (10, 9, 2)}
    source = folder_of(tmp_path / "mine", {**files, "notes.txt": b"left alone"})
    main(Config(source=source))
    corpus = find_corpus()
    assert corpus.name == "mine"
    assert [shard.name for shard in corpus.train] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert list(read_texts([*corpus.train, corpus.val])) == ["a2", "b2", "a9", "b9", "a10", "b10"]
    assert corpus.train[0].read_bytes() == files["part-2.parquet"]
    assert (base / "base_data/current").read_text() == "mine\n"

    before = corpus.train[0].parent.stat().st_ino
    main(Config(source=source))
    assert "already complete" in capsys.readouterr().out
    assert corpus.train[0].parent.stat().st_ino == before

    (source / "part-11.parquet").write_bytes(parquet("a11"))
    main(Config(source=source))
    assert list(read_texts([find_corpus().val])) == ["a11"]
    assert sorted(os.listdir(base / "base_data")) == ["current", "mine"]


def test_one_document_in_twenty_is_for_validation_and_at_least_one(tmp_path: Path):
    forty = {f"{i}.txt": f"text {i}".encode() for i in range(40)}
    train = [f"text {i}" for i in range(40) if i not in (1, 21)]
    for name, files, learned, val in (
        ("forty", forty, train, ["text 1", "text 21"]),
        ("three", {"only.parquet": parquet("x", "y", "z")}, ["x", "z"], ["y"]),
        ("halves", {"a.txt": b"one two\nthree four"}, ["one two\n"], ["three four"]),
    ):
        main(Config(source=folder_of(tmp_path / name, files)))
        corpus = find_corpus(name)
        assert list(read_texts(corpus.train)) == learned
        assert list(read_texts([corpus.val])) == val
    shard = find_corpus("halves").train[0]
    shard.write_bytes(shard.read_bytes()[:50])
    refuses("shard_00000.parquet is not a whole parquet file", find_corpus, "halves")
    main(Config(source=tmp_path / "halves"))  # a damaged import is made again
    assert list(read_texts([shard])) == ["one two\n"]
    for name, text in (("none", b""), ("letter", b"x")):
        source = folder_of(tmp_path / name, {"a.txt": text})
        refuses(f"--from=.*{name}: too little text", main, Config(source=source))


def test_a_bad_import_leaves_nothing_behind(tmp_path: Path, base: Path):
    main(Config(source=folder_of(tmp_path / "good", {"a.txt": b"one two"})))
    bad = {
        "cut": {"a.parquet": parquet("x"), "b.parquet": parquet("y")[:-9]},
        "empty": {"a.parquet": parquet("x"), "b.parquet": parquet()},
        "latin": {"a.txt": b"fine", "b.txt": b"\xe9"},
        "line": {"b.jsonl": b'{"text": "x"}\n{"text": "y"}\n{"text": "z"}\noops\n'},
    }
    for name, files in bad.items():
        refuses(r"/b\.", main, Config(source=folder_of(tmp_path / name, files)))
    assert sorted(os.listdir(base / "base_data")) == ["current", "good"]
    assert find_corpus().name == "good"


def test_what_is_not_there_is_told(tmp_path: Path):
    for name in ("", "books"):
        refuses("run `python -m nanochat.dataset", find_corpus, name)
    mine = folder_of(tmp_path / "mine", {"a.txt": b"one two"})
    for name in ("climbmix", "primer", "current", "../up", ".hidden", "a b"):  # reserved, and odd
        refuses("choose another with --name", main, Config(source=mine, name=name))
    main(Config(source=mine))
    refuses("no corpus --data=books .*there are mine", find_corpus, "books")
    refuses("--name goes with --from", main, Config(name="x"))
    refuses("no such file or folder", main, Config(source=tmp_path / "typo"))
    (mine / "a.txt").rename(mine / "a.md")
    refuses("found no .parquet, .txt or .jsonl", main, Config(source=mine))
    for num_shards in (0, -2, 6543):
        refuses("climbmix has 1 to 6542 training shards", main, Config(num_shards=num_shards))


def test_primer_corpus_holds_the_primers_documents(capsys):
    main(Config(corpus="primer", num_documents=50))
    corpus = find_corpus()
    assert corpus.name == "primer"
    assert list(read_texts(corpus.train)) == [primer.document("train", i) for i in range(50)]
    assert list(read_texts([corpus.val])) == [primer.document("val", i) for i in range(2)]
    main(Config(corpus="primer", num_documents=50))
    assert "already complete" in capsys.readouterr().out
    main(Config(corpus="primer", num_documents=20))
    assert len(list(read_texts(find_corpus().train))) == 20


# A public corpus

REPO = "someone/tiny-shuffle"
SHARDS = {f"shard_{i:05d}.parquet": parquet(*(f"{i}:{k}" for k in range(5000))) for i in range(5)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """A tiny public corpus on a local hub, found through HF_ENDPOINT."""
    monkeypatch.setattr(dataset, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(dataset, "PUBLIC", {"climbmix": (REPO, 5, "CC-TEST 1.0")})
    with Hub(REPO, dict(SHARDS)).serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


def test_download_takes_the_validation_shard_and_only_what_is_missing(hub: Hub, base: Path, capsys):
    main(Config(num_shards=2))
    assert "CC-TEST 1.0" in capsys.readouterr().out
    corpus = find_corpus()
    assert [path.name for path in corpus.train] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert corpus.val.name == "shard_00004.parquet"
    shards = [*corpus.train, corpus.val]
    assert all(path.read_bytes() == SHARDS[path.name] for path in shards)
    assert hub.gets[0][0] == "shard_00004.parquet", "first, so that it is the last of any part"
    assert sorted(os.listdir(base / "base_data/climbmix")) == sorted(path.name for path in shards)

    hub.gets.clear()
    main(Config(num_shards=2))
    assert "nothing to do" in capsys.readouterr().out
    assert hub.gets == []
    corpus.train[1].write_bytes(b"damaged")
    main(Config(num_shards=-1))
    assert sorted(name for name, _ in hub.gets) == [f"shard_0000{i}.parquet" for i in (1, 2, 3)]
    assert corpus.train[1].read_bytes() == SHARDS["shard_00001.parquet"]


def test_errors_wrong_lengths_and_broken_transfers_are_mended(hub: Hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    faults: list[Fault] = ["cut", "", "error", "longer", "error"]
    hub.fault = lambda number: faults[number] if number < len(faults) else ""
    main(Config(num_shards=2))
    corpus = find_corpus()
    for path in [*corpus.train, corpus.val]:
        assert path.read_bytes() == SHARDS[path.name]
    arrived = len(SHARDS["shard_00004.parquet"]) // 2 // 1000 * 1000
    assert hub.gets[:2] == [("shard_00004.parquet", asked) for asked in ("", f"bytes={arrived}-")]
    assert len(hub.gets) > len(faults), "each fault was met"


def test_a_failed_download_is_one_line_and_keeps_what_arrived(hub: Hub, base: Path, monkeypatch):
    del hub.files["shard_00001.parquet"]
    hub.files["shard_00002.parquet"] = b"<html>blocked</html>"
    where = f"{REPO} could not be downloaded from {hub.address}"
    for num_shards in (2, 3):
        config = Config(num_shards=num_shards)
        assert "HF_ENDPOINT" in refuses(f"shard_00001.parquet of {where}", main, config)
    assert not (base / "base_data/current").exists()
    arrived = sorted(path.name for path in (base / "base_data/climbmix").glob("*.parquet"))
    assert arrived == ["shard_00000.parquet", "shard_00004.parquet"]
    with monkeypatch.context() as away:
        away.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        refuses("127.0.0.1:9 .*[Rr]efused", main, Config(num_shards=3))
    hub.files, hub.revision = dict(SHARDS), "1" * 40
    hub.gets.clear()
    main(Config(num_shards=3))
    assert sorted(name for name, _ in hub.gets) == ["shard_00001.parquet", "shard_00002.parquet"]
