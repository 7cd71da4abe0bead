"""Corpora appear whole, are read back from any position, and come from a hub (here a local one)."""

import errno
import gzip
import json
import os
import subprocess
from collections.abc import Mapping
from io import BytesIO
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

import primer
from nanochat import dataset
from nanochat.common import Tag
from nanochat.dataset import (
    DOCUMENT_CHARS,
    Config,
    check_shard,
    corpus_name,
    find_corpus,
    is_whole,
    list_files,
    main,
    numbered_jsonl,
    read_documents,
    read_texts,
    write_shards,
)
from tests.hub import Fault, Hub
from tests.models import refuses

pytestmark = pytest.mark.usefixtures("base")
ROOT = Path(__file__).resolve().parent.parent


def parquet(*texts: str | None, **options) -> bytes:
    buffer = BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), buffer, **options)
    return buffer.getvalue()


def jsonl(*texts: str | None, field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


def zst(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def folder_of(path: Path, files: Mapping[str, bytes | Path]) -> Path:
    """A folder of these files; of links where there is a path, relative to the link's folder."""
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, Path):
            (path / name).symlink_to(data)
        else:
            (path / name).write_bytes(data)
    path.mkdir(exist_ok=True)
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
    documents = list(read_documents(list_files(tmp_path)))
    assert documents == ["two\nlines", "ten", "j0", "half \ufffd \U0001f600", "p0", "p1"]
    assert list_files(tmp_path / "part2.txt") == [tmp_path / "part2.txt"]


PASSED = "files passed over: 1 without a suffix (as MAKE), 2 .json (as b.json), 1 .csv (as d.csv)\n"
DEEP, LONG = b"[" * 100_000, b'{"text": "x", "n": ' + b"9" * 5000 + b"}"
HUB = {
    "README.md": b"---\nlicense: mit\n---",
    "data/train-00000-of-00002.parquet": parquet("a", "b"),
    "data/train-00001-of-00002.parquet": parquet("c"),
    "data/test-00000-of-00001.parquet": parquet("t"),
}
VALIDATION = {"data/validation-00000-of-00001.parquet": parquet("v")}
BLOBS = {".blobs/0": b"a", ".blobs/1": parquet("b")}
LINKS = {"0.txt": Path(".blobs/0"), "1.parquet": Path(".blobs/1")}
# A folder's files -> documents for training | for validation, or the complaint; what is said, too.
FOLDERS = {
    # Splits
    "hub": (HUB, "a b c|t", "for validation: files such as data/test-00000-of-00001.parquet"),
    "hub note": (HUB, "a b c|t", "passed over: 1 about the data (as README.md)"),
    "hub 3": (HUB | VALIDATION, "a b c|v", "1 of the test split (as data/test-00000-of-00001"),
    "txt": ({"dev.txt": b"v", "train.txt": b"a", "test.txt": b"t"}, "a|v", "1 of the test split"),
    "named": ({"x_train.jsonl": jsonl("a"), "x_val.jsonl": jsonl("v", "w")}, "a|v w", ""),
    "pile": (
        {"train/00.jsonl.zst": zst(jsonl("a")), "train/1.jsonl.zst": zst(jsonl("b")),
         "val.jsonl.zst": zst(jsonl("v")), "test.jsonl.zst": zst(jsonl("t"))}, "a b|v", ""),
    "converted": (
        {"en/test/0.parquet": parquet("t"), "en/train/0.parquet": parquet("a")}, "a|t", ""),
    "unnamed": ({"a.txt": b"a", "VALID.TXT": b"v"}, "a|v", "validation: files such as VALID.TXT"),
    "test alone": ({"test.txt": b"one two"}, "one|two", "for validation: one document in 20"),
    "no split": ({"latest.txt": b"a", "my test drive.txt": b"v"}, "a|v", "one document in 20"),
    "no val": ({"train.txt": b"a", "val.txt": b"\n"}, "!no text is for validation", ""),
    "no train": ({"train.txt": b"", "val.txt": b"v"}, "!no text is for training", ""),
    "shards": (
        {"shard_00000.parquet": parquet("a"), "shard_00001.parquet": parquet("v", "w"),
         "notes.txt": b"x"}, "a|v w", "passed over: 1 text (as notes.txt)"),
    "one shard": ({"shard_00000.parquet": parquet("a", "v", "b")}, "a b|v", ""),
    "parquets": ({"0.parquet": parquet("a", "v"), "1.parquet": parquet("b", None)}, "a b|v", ""),
    # Names and suffixes
    "upper": ({"A.TXT": b"a", "B.Md": b"v", "c.JSONL": jsonl("b")}, "a b|v", ""),
    "mixed": ({"a.parquet": parquet("a"), "b.md": b"v"}, "a|v", ""),
    "gz": ({"a.txt.gz": gzip.compress(b"a"), "b.MD.GZ": gzip.compress(b"v")}, "a|v", ""),
    "gz 2": ({"a.jsonl.gz": gzip.compress(jsonl("a")) + gzip.compress(jsonl("v"))}, "a|v", ""),
    "zst": ({"a.md.zst": zst(b"a"), "b.txt.zst": zst(b"v"), "c.txt.zst": b""}, "a|v", ""),
    "others": (
        {"a.txt": b"one two", "b.json": b"", "c.JSON": b"", "d.csv": b"", "MAKE": b""},
        "one|two", PASSED),
    "hidden": ({".git/a.txt": b"x", ".DS_Store": b"x", "a.txt": b"one two"}, "one|two", "-passed"),
    "pdf": ({"a.pdf": b"x"}, "!found no .txt, .md or .jsonl .* or .parquet file$", ""),
    "nothing": ({}, "!found no .txt", ""),
    "newline": ({"a\nb.txt": b"one two", "c\nd": b""}, "one|two", r"(as c\nd)"),
    "bad newline": ({"a\nb.txt": b"\xe9"}, r"!a\\nb.txt is not UTF-8", ""),
    "bytes": ({"caf\udce9.txt": b"a", "d\udce9.parquet": parquet("v")}, "a|v", ""),
    "bad bytes": ({"caf\udce9.txt.gz": b"no"}, r"!caf\\udce9.txt.gz .zlib", ""),
    "passed bytes": ({"\udce9.pdf": b"", "a.txt": b"one two"}, "one|two", r"(as \udce9.pdf)"),
    # Contents
    "null": ({"a.jsonl": jsonl("a", None, "v", " ")}, "a|v", ""),
    "bom": ({"a.jsonl": b"\xef\xbb\xbf" + jsonl("a", "v")}, "a|v", ""),
    "content": ({"a.jsonl": jsonl("a", field="content")},
        "!a.jsonl, line 1: .* string `text` .it has id, content.; --text_field names another", ""),
    "column": ({"a.parquet": HUB["data/train-00001-of-00002.parquet"].replace(b"text", b"name")},
        "!a.parquet .* `text` .* .it has name: string.; .* another --text_field", ""),
    "latin": ({"a.txt": b"caf\xe9 au lait"}, r"!a.txt is not .* near b'caf\\xe9 au.*`iconv", ""),
    "utf-16": ({"a.txt": "one".encode("utf-16")}, "!a.txt is not UTF-8 text.* -f UTF-16", ""),
    "utf-16 le": ({"a.txt": "one".encode("utf-16-le")}, "!a.txt is not UTF-8.*NUL bytes", ""),
    "no parquet": ({"a.txt": parquet("x")}, "!a.txt is not UTF-8 text", ""),
    "cut gz": ({"a.md.gz": gzip.compress(b"x" * 99)[:-9]}, "!a.md.gz .Truncated.*; mend it", ""),
    "no gz": ({"a.jsonl.gz": jsonl("a")}, "!a.jsonl.gz .*incorrect header", ""),
    "cut zst": ({"a.txt.zst": zst(b"x" * 99)[:-3]}, "!a.txt.zst .Truncated", ""),
    "parquet gz": ({"a.parquet.gz": gzip.compress(parquet("x"))}, "!gz is not a whole parquet", ""),
    "empty": ({"a.parquet": b""}, "!a.parquet is not a whole parquet file", ""),
    "no rows": ({"a.parquet": parquet("x"), "b.parquet": parquet()}, "!b.parquet ", ""),
    "deep": ({"a.jsonl": DEEP}, "!a.jsonl, line 1: not JSON .*recursion", ""),
    "long": ({"a.jsonl": jsonl("a") + LONG}, "!a.jsonl, line 2: not JSON .*5000 digits", ""),
    "long line": ({"a.jsonl": jsonl("a", "v" * 5_000_000)}, "a|" + "v" * 5_000_000, ""),
    # Links
    "blobs": (BLOBS | LINKS, "a|b", "-passed"),
    "cache": ({"blobs/0": b"a", "x/a.md": Path("../blobs/0"), "x/b.md": b"v"}, "a|v", ""),
    "no blobs": (LINKS | {"a.md": b"one two"}, "one|two", "2 linked to nowhere, or no plain file"),
    "loop": ({"a.md": Path("a.md"), "b.md": b"one two"}, "one|two", "1 linked to nowhere"),
    "circle": ({"sub/up": Path(".."), "sub/a.txt": b"one two"}, "one|two", "-passed"),
    "twice": (
        {"a.txt": b"a", "b.txt": Path("a.txt"), "c/0.txt": b"v", "d": Path("c")}, "a|v", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_any_folder_is_imported_or_explains_itself(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], name: str
):
    files, expected, said = FOLDERS[name]
    source = folder_of(tmp_path / name, files)
    if expected.startswith("!"):
        complaint = refuses(expected[1:], main, Config(source=source))
        assert complaint.startswith(f"--from={source}: ") and complaint.isprintable()
        assert not base.exists() or os.listdir(base / "base_data") == []
        return
    main(Config(source=source))
    corpus = find_corpus(name.replace(" ", "-"))
    out = capsys.readouterr().out.replace(f"as {name}/", "as ")
    found = [" ".join(map(str.strip, read_texts(part))) for part in (corpus.train, [corpus.val])]
    assert "|".join(found) == expected
    assert (said[1:] not in out) if said.startswith("-") else (said in out)
    assert out.count("\n") <= 5
    num_documents = [len(list(read_texts(part))) for part in (corpus.train, [corpus.val])]
    assert "{} documents for training (shards: 1) and {} for".format(*num_documents) in out
    if "shard" not in name or "one" in name:
        chars = [sum(map(len, read_texts(part))) for part in (corpus.train, [corpus.val])]
        assert "{:,} characters for training, {:,} for validation".format(*chars) in out


def test_folders_of_other_kinds(tmp_path: Path, base: Path, monkeypatch, capsys):
    """A single file, a pipe, the base folder, a field's name, a link to a shard; no permissions."""
    good = folder_of(tmp_path / "good", {"a.jsonl": jsonl("a", "v", field="content")})
    main(Config(source=good / "a.jsonl", text_field="content"))
    assert list(read_texts([find_corpus("a").val])) == ["v"]
    refuses("it has id, content", main, Config(source=good / "a.jsonl"))  # not taken as up to date
    os.mkfifo(good / "b.txt")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(good / "base"))
    monkeypatch.chdir(good)
    for _ in range(2):
        main(Config(source=Path("."), text_field="content"))
        assert find_corpus().name == "good" and check_shard(find_corpus().val) == 1
    assert "already complete" in capsys.readouterr().out

    blobs = {f".blobs/{i}": parquet(str(i)) for i in range(2)}
    links = {f"shard_0000{i}.parquet": Path(f".blobs/{i}") for i in range(2)}
    main(Config(source=folder_of(tmp_path / "snapshot", blobs | links)))
    shards = sorted((good / "base/base_data/snapshot").glob("*.parquet"))
    assert [shard.is_symlink() for shard in shards] == [False, False]
    assert shards[1].samefile(tmp_path / "snapshot/.blobs/1")

    def denied(path, *_args, **_options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for change in ((Path, "open"), (os, "scandir")):
        with monkeypatch.context() as patch:
            patch.setattr(*change, denied)
            refuses(r"/good.* .Permission denied.; mend ", main, Config(source=good, name="new"))


def test_a_full_disk_leaves_nothing_behind_and_is_named(tmp_path: Path, base: Path, monkeypatch):
    # As Arrow does: what is written later fails in another way.
    faults = iter([OSError(errno.ENOSPC, "No space left on device")])

    def full(*_arguments):
        raise next(faults, pa.ArrowInvalid("Operation on closed file"))

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError) as caught:
        main(Config(source=folder_of(tmp_path / "mine", {"a.txt": b"one two"})))
    assert caught.value.filename == base / "base_data"
    assert os.listdir(base / "base_data") == []


def test_every_folder_has_a_name_and_no_two_the_same(tmp_path: Path, base: Path):
    for folder, name in {
        "my texts": "my-texts", ".hidden": "hidden", "-rf": "rf", "...": "texts", "": "texts",
        "primer": "my-primer", "Climbmix": "my-Climbmix", "current": "my-current",
        "été": "été", "e\u0301te\u0301": "été", "日本語": "日本語", "x²": "x2", "caf\udce9!": "caf",
        "x" * 200: "x" * 50, "a\nb": "a-b", "My_texts.v2": "My_texts.v2", "a.jsonl.gz": "a",
    }.items():  # fmt: skip
        assert corpus_name(Path("/", folder)) == name
        TypeAdapter(Tag).validate_python(f"laptop-{name}")
    for parent in ("one", "two"):
        folder_of(tmp_path / parent, {"books/a.txt": f"{parent} text".encode()})
    one, two = tmp_path / "one/books", tmp_path / "two/books"
    main(Config(source=one))
    complaint = refuses("one/books is the corpus books already", main, Config(source=two))
    assert "--name" in complaint and list(read_texts([find_corpus().val])) == ["text"]
    main(Config(source=two, name="more"))
    main(Config(source=one))
    assert find_corpus("books") and find_corpus("more")
    (base / "base_data/more/source.json").write_text('{"files": []}')  # by earlier rules
    assert corpus_name(tmp_path / "more") == "more"


def test_runcpu_asks_what_the_corpus_is_called(tmp_path: Path):
    """Up to where it begins, with stand-ins for what it sources and calls."""
    (tmp_path / "setup.sh").write_text("python() { [ $# -lt 7 ] && echo NAME; }")
    stages = (ROOT / "stages.sh").read_text()
    begin = 'begin() { echo "${source[@]} -> $1"; exit; }'
    (tmp_path / "stages.sh").write_text(f"{stages}\n{begin}\n")
    (tmp_path / "runcpu.sh").write_text((ROOT / "runcpu.sh").read_text())
    mine = folder_of(tmp_path / "there/my texts", {"a.txt": b"one two"})
    for options, said in {
        (): "--corpus primer -> laptop-primer\n",
        ("--from", "my texts/"): f"--from {mine} -> laptop-NAME\n",
        ("--from=my texts/a.txt", "--name", "b"): f"--from {mine}/a.txt --name=b -> laptop-NAME\n",
        ("--name", "b", "--text_field=x", "--from=.", "--text_field=y"): "",  # it fails
        ("--from=.", "--name"): "error: --name needs a value\n",
    }.items():
        there = {"cwd": mine.parent, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(["bash", "../runcpu.sh", *options], stdout=subprocess.PIPE, **there)
        assert (done.stdout, done.returncode != 0) == (said, "->" not in said)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"messages": []}\r\n\n[1]')
    assert list(numbered_jsonl(tmp_path / "a.jsonl")) == [(1, {"messages": []}), (3, [1])]


def test_a_bad_file_is_named_by_its_line(tmp_path: Path):
    no_row, bad_lines = "line 2: (not JSON|expected a JSON object)", ["no JSON", "[1]", "null"]
    cases = [("a.jsonl", line, no_row) for line in [*bad_lines, '{"body": "x"}', '{"text": 3}']]
    cases += [(name, "été", "UTF-8") for name in ("a.jsonl", "a.txt")]
    for name, content, complaint in cases:
        (tmp_path / name).write_text(f'{{"text": "good"}}\n{content}\n', encoding="latin-1")
        refuses(f"{name}.* {complaint}", list, read_documents([tmp_path / name]))


# Corpora


def test_shards_are_taken_as_they_are_until_they_change(tmp_path: Path, base: Path, capsys):
    files = {f"shard_0000{i}.parquet": parquet(f"a{i}", f"b{i}") for i in (2, 0, 1)}
    source = folder_of(tmp_path / "mine", files)
    main(Config(source=source))
    corpus = find_corpus()
    assert corpus.name == "mine"
    assert [shard.name for shard in corpus.train] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert list(read_texts([*corpus.train, corpus.val])) == ["a0", "b0", "a1", "b1", "a2", "b2"]
    assert corpus.val.samefile(source / "shard_00002.parquet")
    assert (base / "base_data/current").read_text() == "mine\n"

    before = corpus.train[0].parent.stat().st_ino
    main(Config(source=source))
    assert "already complete" in capsys.readouterr().out
    assert corpus.train[0].parent.stat().st_ino == before

    (source / "shard_00003.parquet").write_bytes(parquet("a3"))
    main(Config(source=source))
    assert list(read_texts([find_corpus().val])) == ["a3"]
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
    for config in (Config(name="x"), Config(text_field="x"), Config(print_name=True)):
        refuses("--name and --text_field go with --from", main, config)
    refuses("no such file or folder", main, Config(source=tmp_path / "typo"))
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
