"""Corpora of text shards: download a public one, import a folder of your own, write the primer, read them.

A corpus is the folder `base_data/NAME` of parquet shards with one string column `text`; the last shard is
the validation split. `base_data/current` names the corpus prepared last, which trainers read unless
`--data NAME` says otherwise; it is written when everything else is in place.

    python -m nanochat.dataset -n 8                        8 shards of the public corpus, and its last one
    python -m nanochat.dataset -n 8 --corpus fineweb-edu   another, under a freer licence
    python -m nanochat.dataset --from my_texts             a folder of yours: .parquet, or .txt and .jsonl
    python -m nanochat.dataset --corpus primer             the embedded default, offline

The choice that would surprise: a downloaded corpus grows shard by shard, the validation shard first, while
an imported or generated one is renamed into place: half of it would have a wrong last shard.

Sources: https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle and fineweb-edu-100b-shuffle.

Shards of text: parquet files with one string column `text`, one document a row.

Written with zstd in row groups of at most 1,024 documents; read back one row group at a time. Files of other
makers are read too, whatever else they hold beside `text`.

The choice that would surprise: documents that come before the reading position are passed over by the row
counts in the footers, without decompressing them, so resuming deep in a corpus costs milliseconds.

The documents in a user's own files: .txt, .jsonl and .parquet, in a folder of any depth.

A line of .jsonl and a row of .parquet is a document. A .txt file is cut into documents of at most 10,000
characters, at the end of a paragraph where there is one; nothing of it is lost between them.

The choice that would surprise: every 20th document is held out for validation rather than the last ones,
so that a folder of a few books is judged on passages of all of them.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from tqdm import tqdm

import primer
from nanochat.common import (
    FOLDER_NAME,
    Count,
    UserError,
    corpora_dir,
    fsync_dir,
    print0,
    run_script,
    write_file,
)

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


__all__ = ["Corpus", "check_shard", "find_corpus", "read_texts"]  # all that trainers need

DOWNLOAD_ATTEMPTS = 4  # of a shard; the hub's client tries each request five times besides
RETRY_SECONDS = 1.0  # before the second attempt; doubles with each
PRIMER_HELD_OUT = 20  # one validation document of the primer for so many to train on
SOURCE_FILE = "source.json"  # what a corpus was made from, to see whether it is still up to date


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: the paths of its shards, in reading order."""

    name: str
    train: list[Path]
    val: Path


@dataclass(frozen=True)
class PublicCorpus:
    """A data set on the Hugging Face hub; its shards are numbered from 0."""

    repo: str
    num_shards: int
    licence: str


PUBLIC = {
    "climbmix": PublicCorpus(
        "karpathy/climbmix-400b-shuffle", 6543, "CC-BY-NC 4.0, not commercial"
    ),
    "fineweb-edu": PublicCorpus("karpathy/fineweb-edu-100b-shuffle", 1823, "ODC-By"),
}


def find_corpus(name: str = "") -> Corpus:
    """The corpus `name`, or the one prepared last. Raises UserError unless all its shards can be read."""
    current = corpora_dir() / "current"
    prepare = "run `python -m nanochat.dataset -n 8` (or with --corpus primer, or --from FOLDER)"
    if not name:
        if not current.is_file():
            raise UserError(f"no corpus has been prepared in {corpora_dir()}; {prepare}")
        name = current.read_text().strip()
    folder = corpora_dir() / name
    shards = sorted(folder.glob("shard_*.parquet"))
    if len(shards) < 2:
        others = sorted(path.parent.name for path in corpora_dir().glob(f"*/{shard_name(0)}"))
        there = f"; there are {', '.join(others)}" if others else ""
        raise UserError(f"no corpus --data={name} in {corpora_dir()}{there}; {prepare}")
    for shard in shards:
        check_shard(shard)
    return Corpus(name, shards[:-1], shards[-1])


def build_corpus(name: str, source: dict[str, Any], build: Callable[[Path], None]) -> None:
    """Let `build` fill a folder, which then becomes the corpus; one made from the same source is kept."""
    folder, partial = corpora_dir() / name, corpora_dir() / f".{name}.partial"
    if _is_up_to_date(folder, source):
        print0(f"corpus {name} is already complete; nothing to do")
        return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        build(partial)
        write_file(partial / SOURCE_FILE, json.dumps(source, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    fsync_dir(corpora_dir())


def _is_up_to_date(folder: Path, source: dict[str, Any]) -> bool:
    try:
        made_from = json.loads((folder / SOURCE_FILE).read_text())
        return made_from == source and bool(find_corpus(folder.name))
    except (OSError, ValueError):  # no such corpus, or a shard of it is damaged
        return False


# The primer


def write_primer(num_documents: int) -> None:
    """Generate the embedded corpus: `num_documents` to train on, and a twentieth of that held out."""
    files = sorted(path for path in Path(primer.__file__).parent.iterdir() if path.is_file())
    book = b"".join(file.read_bytes() for file in files)
    source = {"num_documents": num_documents, "primer": hashlib.sha256(book).hexdigest()}
    train = ((primer.document("train", i), False) for i in range(num_documents))
    num_val = max(1, num_documents // PRIMER_HELD_OUT)
    val = ((primer.document("val", i), True) for i in range(num_val))
    build_corpus("primer", source, lambda folder: write_shards(chain(train, val), folder))


# A folder of the user's own


def import_folder(path: Path, name: str = "") -> str:
    """Import `path` and return the corpus name: the folder's own unless `name` is given.

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
    if len(parquet) >= 2:
        build_corpus(name, source, lambda folder: _link_shards(parquet, folder))
    else:
        documents = hold_out(read_documents(files), path)
        build_corpus(name, source, lambda folder: write_shards(documents, folder))
    return name


def _link_shards(files: Sequence[Path], folder: Path) -> None:
    for i, file in enumerate(files):
        target = folder / shard_name(i)
        try:
            os.link(file, target)
        except OSError:  # another file system, or not allowed on a file of somebody else
            shutil.copyfile(file, target)
            fsync_file(target)


# A public corpus


def download(name: str, num_shards: int, num_workers: int) -> None:
    """Download what is missing of the first `num_shards` shards (-1: all) of a public corpus, and its last."""
    from huggingface_hub import utils as hub_utils  # takes half a second

    public = PUBLIC[name]
    last = public.num_shards - 1
    num_shards = last if num_shards == -1 else num_shards
    if not 1 <= num_shards <= last:
        raise UserError(f"-n {num_shards}: {name} has 1 to {last} training shards (-1: all)")
    folder = corpora_dir() / name
    print0(f"{name} is {public.repo} on the Hugging Face hub; licence {public.licence}")
    missing = [i for i in [last, *range(num_shards)] if not is_whole(folder / shard_name(i))]
    if not missing:
        print0(f"corpus {name} already has these {num_shards + 1} shards; nothing to do")
        return
    hub_utils.disable_progress_bars()  # one bar over all shards instead of one for each
    hub_utils.logging.set_verbosity_error()  # a line for each retry; the error below says it once
    if missing[0] == last:  # before any other, so that the last one there is always this one
        _download_shard(public, folder, missing.pop(0))
    with ThreadPoolExecutor(num_workers) as pool:  # the first error cancels what has not begun
        shards = pool.map(partial(_download_shard, public, folder), missing)
        list(tqdm(shards, name, len(missing), unit="shard"))
    shutil.rmtree(folder / ".partial", ignore_errors=True)


def _download_shard(public: PublicCorpus, folder: Path, index: int) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    name = shard_name(index)
    for attempt in range(DOWNLOAD_ATTEMPTS):
        try:
            partial_dir = folder / ".partial"
            hf_hub_download(
                public.repo, name, repo_type="dataset", local_dir=partial_dir, endpoint=endpoint
            )
            path = partial_dir / name
            if not is_whole(path):
                path.unlink()
                raise OSError("what arrived is no whole parquet file")
            fsync_file(path)
            path.rename(folder / name)
            fsync_dir(folder)
            return
        except Exception as error:  # the hub's client lets through many kinds of network error
            fatal = isinstance(error, RepositoryNotFoundError | EntryNotFoundError)
            if fatal or attempt == DOWNLOAD_ATTEMPTS - 1:
                cause = error.__cause__ or error
                reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
                raise UserError(
                    f"{name} of {public.repo} could not be downloaded from {endpoint} ({reason});"
                    " run the same command again to go on, or set HF_ENDPOINT to a mirror"
                ) from error
        time.sleep(RETRY_SECONDS * 2**attempt)


# The command line


@dataclass
class Config:
    """Prepare a corpus; trainers read the one prepared last."""

    corpus: Literal["climbmix", "fineweb-edu", "primer"] = "climbmix"  # which one to prepare
    num_shards: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 8  # training shards, -1: all
    num_workers: Count = 4  # parallel downloads
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None  # import this folder instead
    name: str = ""  # of an imported corpus; default: the folder's name
    num_documents: Count = 55_000  # of the primer; some 12 MB


def main(cfg: Config) -> None:
    """Prepare the corpus that `cfg` asks for, then make it the current one."""
    if cfg.name and not cfg.source:
        raise UserError("--name goes with --from; without it the corpus has the name of --corpus")
    name = cfg.corpus
    if cfg.source:
        name = import_folder(cfg.source, cfg.name)
    elif cfg.corpus == "primer":
        write_primer(cfg.num_documents)
    else:
        download(cfg.corpus, cfg.num_shards, cfg.num_workers)
    corpus = find_corpus(name)
    write_file(corpora_dir() / "current", f"{name}\n")
    where = corpus.val.parent
    print0(f"corpus {name}: {len(corpus.train)} training shards and 1 for validation in {where}")


if __name__ == "__main__":
    run_script(main, Config)
