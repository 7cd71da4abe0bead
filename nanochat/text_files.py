"""The documents in a user's own files: .txt, .jsonl and .parquet, in a folder of any depth.

A line of .jsonl and a row of .parquet is a document. A .txt file is cut into documents of at most 10,000
characters, at the end of a paragraph where there is one; nothing of it is lost between them.

The choice that would surprise: every 20th document is held out for validation rather than the last ones,
so that a folder of a few books is judged on passages of all of them.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from nanochat.paths import UserError
from nanochat.shards import read_texts

DOCUMENT_CHARS = 10_000
VALIDATION_EVERY = 20


def list_files(path: Path) -> list[Path]:
    """Every file below `path` that can be imported, numbers in the names in numeric order."""
    if not path.exists():
        raise UserError(f"--from={path}: there is no such file or folder")
    found = path.resolve().rglob("*") if path.is_dir() else [path.resolve()]
    kinds = {".parquet", ".txt", ".jsonl"}
    files = [file for file in found if file.suffix in kinds and file.is_file()]
    if not files:
        raise UserError(f"--from={path}: found no .parquet, .txt or .jsonl file there")
    return sorted(files, key=_name_parts)


def _name_parts(path: Path) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def read_documents(files: Sequence[Path]) -> Iterator[str]:
    """The documents of `files` in order, blank ones left out. Raises UserError naming a file that is damaged."""
    readers = {
        ".txt": _read_txt,
        ".jsonl": _read_jsonl,
        ".parquet": lambda file: read_texts([file]),
    }
    for file in files:
        try:
            yield from (text for text in readers[file.suffix](file) if text.strip())
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text; convert or remove it") from error


def _read_txt(path: Path) -> Iterator[str]:
    rest = ""
    with path.open(encoding="utf-8-sig") as file:
        while block := file.read(20 * DOCUMENT_CHARS):
            rest += block
            while len(rest) > DOCUMENT_CHARS:
                end = _cut_point(rest, DOCUMENT_CHARS)
                yield rest[:end]
                rest = rest[end:]
    yield rest


def _cut_point(text: str, limit: int) -> int:
    """Where to cut `text` before `limit`: after a paragraph, else a line, else a word."""
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, limit // 2, limit)
        if at >= 0:
            return min(at + len(mark), limit)
    return limit


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                # JSON can spell half of a surrogate pair, parquet cannot hold one.
                yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}, line {number}: expected a JSON object with a string `text`"
                ) from error


def numbered_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, row) of a .jsonl file, blank lines left out. Raises UserError with a malformed line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; give a .jsonl file in UTF-8") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number}: not JSON ({error}); mend that line"
                ) from error


def hold_out(documents: Iterator[str], path: Path) -> Iterator[tuple[str, bool]]:
    """Mark every 20th document, first of all the second, for validation; one alone is cut in two."""
    first, second = next(documents, ""), next(documents, "")
    if not second:
        middle = _cut_point(first, (len(first) + 1) // 2)
        first, second = first[:middle], first[middle:]
    if not second.strip():
        raise UserError(f"--from={path}: too little text, it must make two documents at least")
    for i, text in enumerate(chain([first, second], documents)):
        yield text, i % VALIDATION_EVERY == 1
