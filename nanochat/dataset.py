"""Corpora of text shards: download a public one, import a folder, generate the primer, read them.

A corpus is a folder `base_data/NAME` of parquet shards with one string column `text`, one document
per row; the last shard is the validation split. `base_data/current` names the corpus prepared last
and is written once everything else is in place.

    python -m nanochat.dataset -n 8                        # 8 shards of climbmix, and its last
    python -m nanochat.dataset -n 8 --corpus fineweb-edu   # under a freer licence
    python -m nanochat.dataset --from my_texts             # yours: .parquet, or .txt and .jsonl
    python -m nanochat.dataset --corpus primer             # the embedded default, offline
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

import primer
from nanochat.common import (
    FOLDER_NAME,
    Count,
    UserError,
    corpora_dir,
    fsync,
    print0,
    run_script,
    write_file,
)

# Name -> (data set on the Hugging Face hub, number of its shards, licence).
PUBLIC = {
    "climbmix": ("karpathy/climbmix-400b-shuffle", 6543, "CC-BY-NC 4.0, not commercial"),
    "fineweb-edu": ("karpathy/fineweb-edu-100b-shuffle", 1823, "ODC-By"),
}
DOWNLOAD_ATTEMPTS = 4  # in a row without a new shard; the hub's client retries requests, too
RETRY_SECONDS = 2.0  # before the second attempt; 2 more before each further one
SCHEMA = pa.schema([("text", pa.string())])
ROW_GROUP_DOCUMENTS = 1024
ROW_GROUP_CHARS = 16_000_000  # bounds a reader's memory when documents are whole books
SHARD_CHARS = 64_000_000  # about 20 MB compressed
DOCUMENT_CHARS = 10_000  # at most, of a document cut from a .txt file
VALIDATION_EVERY = 20  # one document in 20 is for validation: a passage or more of each book
SOURCE_FILE = "source.json"  # what a corpus was made from: tells whether it is up to date
MEND_SHARD = "remove it and run `python -m nanochat.dataset` as for this corpus"


@dataclass(frozen=True)
class Corpus:
    name: str
    train: list[Path]
    val: Path


def shard_name(index: int) -> str:
    """File name of a shard, the same here and on the hub."""
    return f"shard_{index:05d}.parquet"


def find_corpus(name: str = "") -> Corpus:
    """The corpus `name`, by default the one prepared last; UserError unless it is whole."""
    current = corpora_dir() / "current"
    prepare = "run `python -m nanochat.dataset -n 8` (or with --corpus primer, or --from FOLDER)"
    if not name:
        if not current.is_file():
            raise UserError(f"no corpus has been prepared in {corpora_dir()}; {prepare}")
        name = current.read_text().strip()
    shards = sorted((corpora_dir() / name).glob("shard_*.parquet"))
    if len(shards) < 2:
        others = sorted(path.parent.name for path in corpora_dir().glob(f"*/{shard_name(0)}"))
        there = f"; there are {', '.join(others)}" if others else ""
        raise UserError(f"no corpus --data={name} in {corpora_dir()}{there}; {prepare}")
    for shard in shards:
        check_shard(shard)
    return Corpus(name, shards[:-1], shards[-1])


def check_shard(path: Path) -> int:
    """Number of documents in a shard, from its footer.

    Raises UserError for a file that is truncated, empty, or without a string column `text`.
    """
    try:
        with pq.ParquetFile(path) as file:
            schema, num_documents = file.schema_arrow, file.metadata.num_rows
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole parquet file; {MEND_SHARD}") from error
    kinds = dict(zip(schema.names, schema.types, strict=True))
    if kinds.get("text") not in (pa.string(), pa.large_string()):
        columns = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise UserError(f"{path} has no column `text` of strings (it has {columns}); {MEND_SHARD}")
    if num_documents == 0:
        raise UserError(f"{path} holds no documents; {MEND_SHARD}")
    return num_documents


def is_whole(path: Path) -> bool:
    try:
        return check_shard(path) > 0
    except UserError:
        return False


def read_texts(shards: Sequence[Path], skip: int = 0) -> Iterator[str]:
    """The documents of `shards` in order, after the first `skip`; UserError for a damaged shard.

    Row counts in the footers say what to skip, without decompressing it.
    """
    for path in shards:
        check_shard(path)
        try:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    num_rows = file.metadata.row_group(group).num_rows
                    if skip < num_rows:
                        yield from islice(_read_row_group(file, group), skip, None)
                    skip = max(0, skip - num_rows)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())  # of several lines, where Arrow adds details
            raise UserError(f"{path} is damaged ({reason}); {MEND_SHARD}") from error


def _read_row_group(file: pq.ParquetFile, group: int) -> Iterator[str]:
    for batch in file.iter_batches(ROW_GROUP_DOCUMENTS, row_groups=[group], columns=["text"]):
        yield from (text or "" for text in batch.column(0).to_pylist())  # a null counts as empty


class ShardWriter:
    def __init__(self, path: Path) -> None:
        self.file = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self.num_chars = self.group_chars = 0
        self.texts: list[str] = []  # of the next row group

    def add(self, text: str) -> None:
        self.texts.append(text)
        self.num_chars += len(text)
        self.group_chars += len(text)
        if len(self.texts) == ROW_GROUP_DOCUMENTS or self.group_chars >= ROW_GROUP_CHARS:
            self.flush()

    def flush(self) -> None:
        if self.texts:
            self.file.write_table(pa.table({"text": self.texts}, SCHEMA))
        self.texts, self.group_chars = [], 0

    def close(self) -> None:
        self.flush()
        self.file.close()


def write_shards(documents: Iterable[tuple[str, bool]], folder: Path) -> None:
    """Write (text, is it for validation) pairs; the last shard holds the validation documents."""
    val, train = ShardWriter(folder / "val"), ShardWriter(folder / shard_name(0))
    num_train = 1
    try:
        for text, is_val in documents:
            if train.num_chars >= SHARD_CHARS and not is_val:
                train.close()
                train = ShardWriter(folder / shard_name(num_train))
                num_train += 1
            (val if is_val else train).add(text)
    finally:
        train.close()
        val.close()
    (folder / "val").rename(folder / shard_name(num_train))


def build_corpus(name: str, source: dict[str, Any], build: Callable[[Path], None]) -> None:
    """Have `build` fill the corpus folder, unless it exists, made from the same `source`."""
    folder, partial = corpora_dir() / name, corpora_dir() / f".{name}.partial"
    made_from = folder / SOURCE_FILE
    try:
        if json.loads(made_from.read_text()) == source and find_corpus(name):
            print0(f"corpus {name} is already complete; nothing to do")
            return
    except (OSError, ValueError):  # missing, or a shard is damaged
        pass
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        build(partial)
        for shard in partial.iterdir():
            fsync(shard)
        write_file(partial / SOURCE_FILE, json.dumps(source, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    fsync(corpora_dir())


def write_primer(num_documents: int) -> None:
    """Generate the embedded corpus: `num_documents` for training, 1/20 as many for validation."""
    files = sorted(path for path in Path(primer.__file__).parent.iterdir() if path.is_file())
    book = b"".join(file.read_bytes() for file in files)
    source = {"num_documents": num_documents, "primer": hashlib.sha256(book).hexdigest()}
    num_val = max(1, num_documents // VALIDATION_EVERY)
    train = ((primer.document("train", i), False) for i in range(num_documents))
    val = ((primer.document("val", i), True) for i in range(num_val))
    build_corpus("primer", source, lambda folder: write_shards(chain(train, val), folder))


def import_folder(path: Path, name: str = "") -> str:
    """Import `path`; returns the corpus name: `name`, or by default the folder's.

    Two or more parquet files become the shards as they are; anything else is cut into new shards.
    """
    name = name or (path.resolve().name if path.is_dir() else path.stem)
    if not re.fullmatch(FOLDER_NAME, name) or name in {*PUBLIC, "primer", "current"}:
        raise UserError(f"a corpus cannot be called {name!r}; choose another with --name")
    files = list_files(path)
    parquet = [file for file in files if file.suffix == ".parquet"]
    files = parquet or files
    source = {"files": [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]}
    for file in parquet:
        check_shard(file)

    def build(folder: Path) -> None:
        if len(parquet) < 2:
            write_shards(hold_out(read_documents(files), path), folder)
            return
        for i, file in enumerate(parquet):
            try:
                os.link(file, folder / shard_name(i))
            except OSError:  # another file system, or another user's file
                shutil.copyfile(file, folder / shard_name(i))

    build_corpus(name, source, build)
    return name


def list_files(path: Path) -> list[Path]:
    """All importable files below `path`, numbers in names sorted numerically."""
    if not path.exists():
        raise UserError(f"--from={path}: there is no such file or folder")
    found = path.resolve().rglob("*") if path.is_dir() else [path.resolve()]
    kinds = {".parquet", ".txt", ".jsonl"}
    files = [file for file in found if file.suffix in kinds and file.is_file()]
    if not files:
        raise UserError(f"--from={path}: found no .parquet, .txt or .jsonl file there")
    parts = {file: re.split(r"(\d+)", str(file)) for file in files}
    return sorted(files, key=lambda f: [int(p) if p.isdecimal() else p for p in parts[f]])


def read_documents(files: Sequence[Path]) -> Iterator[str]:
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": lambda f: read_texts([f])}
    for file in files:
        yield from (text for text in readers[file.suffix](file) if text.strip())


def _read_txt(path: Path) -> Iterator[str]:
    rest = ""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while block := file.read(20 * DOCUMENT_CHARS):
                rest += block
                while len(rest) > DOCUMENT_CHARS:
                    end = _cut_point(rest, DOCUMENT_CHARS)
                    yield rest[:end]
                    rest = rest[end:]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; convert or remove it") from error
    yield rest


def _cut_point(text: str, limit: int) -> int:
    """Where to cut `text` before `limit`: after a paragraph, else a line, else a word."""
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, limit // 2, limit)
        if at >= 0:
            return at + len(mark)
    return limit


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, row in numbered_jsonl(path):
        try:
            # JSON can hold half of a surrogate pair, parquet cannot.
            yield row["text"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        except (KeyError, TypeError, AttributeError) as error:
            expected = "expected a JSON object with a string `text`"
            raise UserError(f"{path}, line {number}: {expected}") from error


def numbered_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, row) of a .jsonl file, blank lines skipped; UserError for a bad file."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {number}: not JSON ({error}); mend that line") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}; give a .jsonl file in UTF-8") from error


def hold_out(documents: Iterator[str], path: Path) -> Iterator[tuple[str, bool]]:
    """Mark every 20th document, from the second on, for validation; a single one is cut in two."""
    first, second = next(documents, ""), next(documents, "")
    if not second:
        middle = _cut_point(first, (len(first) + 1) // 2)
        first, second = first[:middle], first[middle:]
    if not second.strip():
        raise UserError(f"--from={path}: too little text, it must make two documents at least")
    for i, text in enumerate(chain([first, second], documents)):
        yield text, i % VALIDATION_EVERY == 1


def download(name: str, num_shards: int) -> None:
    """Download what a public corpus lacks of its first `num_shards` shards (-1: all) and last one.

    The last shard comes first, so that every partial corpus has the same validation split. Raises
    UserError if a shard cannot be downloaded; a second call continues.
    """
    repo, total, licence = PUBLIC[name]
    num_shards = total - 1 if num_shards == -1 else num_shards
    if not 1 <= num_shards < total:
        raise UserError(f"-n {num_shards}: {name} has 1 to {total - 1} training shards (-1: all)")
    print0(f"{name} is {repo} on the Hugging Face hub; licence {licence}")
    folder, partial, failures = corpora_dir() / name, corpora_dir() / name / ".partial", 0
    shards = [shard_name(i) for i in (total - 1, *range(num_shards))]
    missing = [shard for shard in shards if not is_whole(folder / shard)]
    if not missing:
        print0(f"corpus {name} already has these {len(shards)} shards; nothing to do")
    while missing:
        wanted = missing[:1] if missing[0] == shards[0] else missing.copy()
        problem = fetch(repo, wanted, partial)
        failures += 1
        for shard in filter(lambda shard: is_whole(partial / shard), wanted):
            fsync(partial / shard)
            (partial / shard).rename(folder / shard)
            missing.remove(shard)
            failures = 0
        shutil.rmtree(partial, ignore_errors=True)  # the rest, and the client's metadata
        if failures == DOWNLOAD_ATTEMPTS:
            mend = "run the same command again to go on, or set HF_ENDPOINT to a mirror"
            raise UserError(f"{missing[0]} of {repo} could not be downloaded {problem}; {mend}")
        time.sleep(RETRY_SECONDS * failures)
    fsync(folder)


def fetch(repo: str, shards: list[str], folder: Path) -> str:
    """Download `shards` into `folder`; returns, in one line, why any might be missing."""
    from huggingface_hub import HfApi, constants  # takes half a second
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # else it logs each retry of a request
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    try:
        hub = HfApi(endpoint)
        revision = hub.dataset_info(repo).sha  # a download would not say why it is unreachable
        hub.snapshot_download(
            repo, repo_type="dataset", revision=revision, local_dir=folder, allow_patterns=shards
        )
        reason = "it has none, or what arrived is not a whole parquet file"
    except Exception as error:  # the hub's client raises many kinds of network error
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return f"from {endpoint} ({reason})"


@dataclass
class Config:
    """Prepare a corpus; trainers read the one prepared last."""

    corpus: Literal["climbmix", "fineweb-edu", "primer"] = "climbmix"  # the corpus to prepare
    num_shards: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 8  # training shards; -1: all
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None  # import this folder instead
    name: str = ""  # of an imported corpus; default: the folder's name
    num_documents: Count = 40_000  # of the primer; about 9 MB


def main(cfg: Config) -> None:
    if cfg.name and not cfg.source:
        raise UserError("--name goes with --from; without it the corpus has the name of --corpus")
    name = cfg.corpus
    if cfg.source:
        name = import_folder(cfg.source, cfg.name)
    elif cfg.corpus == "primer":
        write_primer(cfg.num_documents)
    else:
        download(cfg.corpus, cfg.num_shards)
    corpus = find_corpus(name)
    write_file(corpora_dir() / "current", f"{name}\n")
    shards = f"{len(corpus.train)} training shards and 1 for validation"
    print0(f"corpus {name}: {shards} in {corpus.val.parent}")


if __name__ == "__main__":
    run_script(main, Config)
