"""A user's own files become documents: nothing is lost, the order is kept, bad files are named."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import UserError
from nanochat.dataset import DOCUMENT_CHARS, hold_out, list_files, read_documents


def test_a_text_file_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path: Path):
    paragraph = "word " * 150 + "end.\n\n"
    book = paragraph * 400
    (tmp_path / "book.txt").write_text(book)
    documents = list(read_documents([tmp_path / "book.txt"]))
    assert "".join(documents) == book
    assert max(map(len, documents)) <= DOCUMENT_CHARS
    assert all(document.endswith("end.\n\n") for document in documents)
    assert len(documents) <= len(book) / (DOCUMENT_CHARS - len(paragraph)) + 1


@pytest.mark.parametrize("unit", ["line of words\n", "word ", "x", "\n", "\n\n\n", "é\n\n "])
def test_cutting_any_text_loses_nothing(tmp_path: Path, unit: str):
    text = "start" + unit * (3 * DOCUMENT_CHARS // len(unit) + 7) + "end"
    (tmp_path / "a.txt").write_text(text)
    documents = list(read_documents([tmp_path / "a.txt"]))
    assert "".join(documents).replace("\n", "") in text.replace("\n", "")
    assert "".join("".join(documents).split()) == "".join(text.split())
    assert max(map(len, documents)) <= DOCUMENT_CHARS


def test_all_kinds_in_name_order_with_numbers_as_numbers(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "part10.txt").write_text("ten")
    (tmp_path / "part2.txt").write_bytes(b"\xef\xbb\xbftwo\r\nlines")
    rows = [{"text": "j0"}, {"text": " "}, {"text": "half \ud800 \U0001f600", "other": 1}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "sub" / "a.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]))
    pq.write_table(pa.table({"text": ["p0", "", "p1"]}), tmp_path / "z.parquet")
    (tmp_path / "README.md").write_text("not a document")
    documents = list(read_documents(list_files(tmp_path)))
    assert documents == ["two\nlines", "ten", "j0", "half \ufffd \U0001f600", "p0", "p1"]
    assert list_files(tmp_path / "part2.txt") == [tmp_path / "part2.txt"]


@pytest.mark.parametrize("line", ["no JSON", "[1]", '{"body": "x"}', '{"text": 3}', "null"])
def test_a_bad_line_is_named(tmp_path: Path, line: str):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(UserError, match="a.jsonl, line 2: expected a JSON object"):
        list(read_documents([tmp_path / "a.jsonl"]))


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    with pytest.raises(UserError, match="latin.txt is not UTF-8"):
        list(read_documents(list_files(tmp_path)))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="found no .parquet, .txt or .jsonl"):
        list_files(tmp_path / "none")
    with pytest.raises(UserError, match="no such file or folder"):
        list_files(tmp_path / "typo")


def test_hold_out_marks_one_in_twenty_and_loses_nothing():
    texts = [str(i) for i in range(100)]
    marked = list(hold_out(iter(texts), Path("x")))
    assert [text for text, _ in marked] == texts
    assert [text for text, is_val in marked if is_val] == ["1", "21", "41", "61", "81"]


def test_hold_out_cuts_a_single_document_in_two():
    assert list(hold_out(iter(["one two\nthree four"]), Path("x"))) == [
        ("one two\n", False),
        ("three four", True),
    ]
    for texts in ([], ["x"]):
        with pytest.raises(UserError, match="--from=x: too little text"):
            list(hold_out(iter(texts), Path("x")))
