"""Corpora of text shards: download a public one, import a folder, generate the primer, read them.

A corpus is a folder `base_data/NAME` of parquet shards with one string column `text`, one document
per row; the last shard is the validation split. `base_data/current` names the corpus prepared last
and is written once everything else is in place.

    python -m nanochat.dataset -n 8                        # 8 shards of climbmix, and its last
    python -m nanochat.dataset -n 8 --corpus fineweb-edu   # under a freer licence
    python -m nanochat.dataset --from my_texts             # yours: .txt, .md, .jsonl, .parquet
    python -m nanochat.dataset --corpus primer             # the embedded default, offline
"""

import hashlib
import io
import json
import os
import re
import shutil
import time
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
    base_dir,
    corpora_dir,
    fsync,
    print0,
    progress_bar,
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
MEND_SHARD = "mend or remove it and run `python -m nanochat.dataset` as for this corpus"
IMPORT_RULES = 2  # an import that was made by other rules is made again
IMPORTED = re.compile(r"\.(parquet|jsonl|txt|md)(?:\.gz|\.zst)?\Z", re.IGNORECASE)
SPLIT = re.compile(r"(?:^|[/_.\d-])(train|val|dev|test)(?:id|idation)?(?=[/_.\d-])")  # in a path
SHARD = re.compile(r"shard_\d{5}\.parquet")
CONVERT = "convert it (`iconv -f LATIN1 -t UTF-8`, or -f UTF-16), or remove it"


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


def check_shard(path: Path, field: str = "text") -> int:
    """Number of documents in a shard, from its footer.

    Raises UserError for a file that is truncated, empty, or without a string column `field`.
    """
    try:
        # Opened here, as Arrow takes no file name that is not UTF-8.
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:
            schema, num_documents = file.schema_arrow, file.metadata.num_rows
    except (OSError, ValueError) as error:
        why = _reason(error)
        raise UserError(f"{path} is not a whole parquet file ({why}); {MEND_SHARD}") from error
    kinds = dict(zip(schema.names, schema.types, strict=True))
    if kinds.get(field) not in (pa.string(), pa.large_string()):
        columns = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        mend = f"import it again with another --text_field, or {MEND_SHARD}"
        raise UserError(f"{path} has no column `{field}` of strings (it has {columns}); {mend}")
    if num_documents == 0:
        raise UserError(f"{path} holds no documents; {MEND_SHARD}")
    return num_documents


def is_whole(path: Path) -> bool:
    try:
        return check_shard(path) > 0
    except UserError:
        return False


def _reason(error: Exception) -> str:
    """In one line; Arrow adds details."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())


def read_texts(shards: Sequence[Path], skip: int = 0, field: str = "text") -> Iterator[str]:
    """The documents of `shards` in order, after the first `skip`; UserError for a damaged shard.

    Row counts in the footers say what to skip, without decompressing it.
    """
    for path in shards:
        check_shard(path, field)
        try:
            with (
                path.open("rb") as opened,  # page by page, as a row group may be all of a file
                pq.ParquetFile(opened, buffer_size=2**20, pre_buffer=False) as file,
            ):
                for group in range(file.num_row_groups):
                    num_rows = file.metadata.row_group(group).num_rows
                    if skip < num_rows:
                        batches = file.iter_batches(1024, row_groups=[group], columns=[field])
                        texts = (text for batch in batches for text in batch.column(0).to_pylist())
                        yield from (text or "" for text in islice(texts, skip, None))  # "" of null
                    skip = max(0, skip - num_rows)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged ({_reason(error)}); {MEND_SHARD}") from error


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
    num_train, num_chars = 1, [0, 0]
    try:
        for text, is_val in documents:
            if train.num_chars >= SHARD_CHARS and not is_val:
                train.close()
                train = ShardWriter(folder / shard_name(num_train))
                num_train += 1
            (val if is_val else train).add(text)
            num_chars[is_val] += len(text)
    except BaseException:
        train.file.is_open = val.file.is_open = False  # a full disk would fail their end, too
        raise
    train.close()
    val.close()
    if not all(num_chars):
        raise UserError(f"no text is for {'validation' if num_chars[0] else 'training'}; add some")
    print0(f"{num_chars[0]:,} characters for training, {num_chars[1]:,} for validation")
    (folder / "val").rename(folder / shard_name(num_train))


def read_source(name: str) -> dict[str, Any]:
    """What a corpus was made from; nothing if that is unknown."""
    with suppress(OSError, ValueError):  # no file, or a damaged one
        return json.loads((corpora_dir() / name / SOURCE_FILE).read_text())
    return {}


def build_corpus(name: str, source: dict[str, Any], build: Callable[[Path], None]) -> None:
    """Have `build` fill the corpus folder, unless it exists, made from the same `source`."""
    folder, partial = corpora_dir() / name, corpora_dir() / f".{name}.partial"
    with suppress(UserError):  # a damaged shard
        if read_source(name) == source and find_corpus(name):
            print0(f"corpus {name} is already complete; nothing to do")
            return
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        build(partial)
        for shard in partial.iterdir():
            fsync(shard)
        write_file(partial / SOURCE_FILE, json.dumps(source, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        error.filename = corpora_dir()  # Arrow names none, a copy the file that it reads
        raise
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


def corpus_name(path: Path, name: str = "") -> str:
    """`name`, by default what the folder is called; UserError if it is not valid, or in use."""
    reserved = {*PUBLIC, "primer", "current"}
    if name:
        if not re.fullmatch(FOLDER_NAME, name) or name.lower() in reserved or len(name) > 60:
            raise UserError(f"a corpus cannot be called {name!r}; choose another with --name")
        return name
    stem = unicodedata.normalize("NFKC", IMPORTED.sub("", path.name))  # a Mac's é is two characters
    # Of 50 characters, as a file's name has at most 255 bytes.
    name = re.sub(r"[^\w.-]+", "-", stem).strip("-.")[:50] or "texts"
    name = f"my-{name}" if name.lower() in reserved else name
    made_from = read_source(name).get("from", str(path))
    if made_from != str(path):
        mend = f"choose another name with --name, or replace that corpus with --name={name}"
        raise UserError(f"{made_from} is the corpus {name} already; {mend}")
    return name


def import_folder(path: Path, name: str, field: str = "text") -> None:
    """Make the corpus `name` of the texts in and below `path`; our own shards stay as they are."""
    train, val = choose_files(path)
    files = [*train, *val]
    for file in files:
        if file.suffix.lower() == ".parquet":
            check_shard(file, field)
    are_shards = len(val) == 1 and all(SHARD.fullmatch(file.name) for file in files)
    source: dict[str, Any] = {"from": str(path), "field": field, "rules": IMPORT_RULES}
    source["files"] = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]

    def build(folder: Path) -> None:
        if not are_shards or field != "text":
            splits = ((False, train), (True, val))
            named = ((text, own) for own, some in splits for text in read_documents(some, field))
            documents = named if val else hold_out(read_documents(train, field))
            write_shards(progress_bar(documents, " documents"), folder)
            return
        for i, file in enumerate(map(os.path.realpath, files)):  # not the link, if it is one
            try:
                os.link(file, folder / shard_name(i))
            except OSError:  # another file system, or another user's file
                shutil.copyfile(file, folder / shard_name(i))

    build_corpus(name, source, build)


def list_files(path: Path) -> list[Path]:
    """The file `path`, or all below that are not hidden, numbers in names sorted numerically."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read {error.filename} ({_reason(error)}); mend or move it")

    if not path.exists():
        raise UserError("there is no such file or folder")
    if not path.is_dir():
        return [path]
    files: dict[tuple[str, bool], Path] = {}
    seen = {os.path.realpath(base_dir())}  # as it holds what was imported before
    for folder, subfolders, names in os.walk(path, onerror=fail, followlinks=True):
        is_new = (real := os.path.realpath(folder)) not in seen  # links may lead in circles
        seen.add(real)
        subfolders[:] = sorted(sub for sub in subfolders if is_new and not sub.startswith("."))
        for file in (Path(folder, n) for n in sorted(names) if is_new and not n.startswith(".")):
            # Of two names of one file both count if one says what it holds, as in a hub's cache.
            key = os.path.realpath(file), bool(IMPORTED.search(file.name))
            files.setdefault(key, file)
    parts = {file: re.split(r"(\d+)", str(file)) for file in files.values()}
    return sorted(parts, key=lambda f: [int(p) if p.isdecimal() else p for p in parts[f]])


def group_of(file: Path, path: Path) -> str:
    """The split of a file in or below `path`, or why it is in none."""
    at_top, splits = file.parent == path, SPLIT.findall(os.path.relpath(file, path).lower())
    if not IMPORTED.search(file.name):
        return file.suffix.lower() or "without a suffix"
    if not file.is_file():
        return "linked to nowhere, or no plain file"
    if at_top and SHARD.fullmatch(file.name):
        return "shards"
    if at_top and re.match(r"(readme|licen[cs]e)\.", file.name.lower()):
        return "about the data"
    return f"of the {splits[-1]} split" if splits else "text"


def choose_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The files for training and those for validation, perhaps none; names all others."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for file in list_files(path):
        groups[group_of(file, path)].append(file)

    def take(*names: str) -> list[Path]:
        return [file for name in names for file in groups.pop(name, [])]

    shards = take("shards")
    train, val = shards[:-1], shards[-1:]
    if not train:
        train = shards + take("text")
        # Without a training split names of others mean something else.
        train += take("of the train split") or take("of the dev split", "of the test split")
        val = take("of the val split", "of the dev split") or take("of the test split")
    if not train:
        train, val = val or take("about the data"), []
    base = path.parent
    told = [f"{len(v):,} {why} (as {os.path.relpath(v[0], base)})" for why, v in groups.items()]
    if told:
        print0(printable(f"files passed over: {', '.join(told)}"))
    if not train:
        raise UserError("found no .txt, .md or .jsonl (nor .gz or .zst of these) or .parquet file")
    one_in = f"one document in {VALIDATION_EVERY}"
    how = f"files such as {os.path.relpath(val[0], base)}" if val else one_in
    print0(printable(f"held out for validation: {how}"))
    return train, val


def printable(text: str) -> str:
    """`text` in one line that any terminal shows, with escapes: file names may hold anything."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def read_documents(files: Sequence[Path], field: str = "text") -> Iterator[str]:
    for file in files:
        (kind,) = IMPORTED.findall(file.name.lower())
        if kind == "parquet":
            texts = read_texts([file], field=field)
        else:
            texts = _read_jsonl(file, field) if kind == "jsonl" else _read_txt(file)
        yield from (text for text in texts if text.strip())


@contextmanager
def open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """A file of UTF-8, decompressed where its name says so; UserError if it cannot be read."""
    packed = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    try:
        with path.open("rb") as file:
            stream = pa.input_stream(file, compression=packed) if packed else file
            yield io.TextIOWrapper(stream, "utf-8-sig")
    except UnicodeDecodeError as error:
        near = error.object[max(0, error.start - 9) : error.start + 9]
        raise UserError(f"{path} is not UTF-8 text, near {near}; {CONVERT}") from error
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({_reason(error)}); mend it, or check its name"
        ) from error


def _read_txt(path: Path) -> Iterator[str]:
    rest = ""
    with open_text(path) as file:
        while block := file.read(20 * DOCUMENT_CHARS):
            if "\0" in block:
                raise UserError(f"{path} is not UTF-8 text, it holds NUL bytes; {CONVERT}")
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
            return at + len(mark)
    return limit


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    for number, row in numbered_jsonl(path):
        text = row.get(field, 0) if isinstance(row, dict) else 0
        if not isinstance(text, str | None):
            fields = f"it has {', '.join(row)}" if isinstance(row, dict) else "this is none"
            expected = f"expected a JSON object with a string `{field}` ({fields})"
            raise UserError(f"{path}, line {number}: {expected}; --text_field names another field")
        # JSON can hold half of a surrogate pair, parquet cannot.
        yield (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def numbered_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, row) of a .jsonl file, blank lines skipped; UserError for a bad file."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    why = f"not JSON ({error}); mend that line"
                    raise UserError(f"{path}, line {number}: {why}") from error
                yield number, row


def hold_out(documents: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Mark every 20th document, from the second on, for validation; a single one is cut in two."""
    first, second = next(documents, ""), next(documents, "")
    if not second:
        middle = _cut_point(first, (len(first) + 1) // 2)
        first, second = first[:middle], first[middle:]
    if not second.strip():
        raise UserError("too little text, it must make two documents at least")
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
    name: str = ""  # of an imported corpus; default: about what its folder is called
    text_field: str = "text"  # that holds the text in .jsonl and .parquet files
    print_name: bool = False  # only print what an imported corpus is called
    num_documents: Count = 40_000  # of the primer; about 9 MB


def main(cfg: Config) -> None:
    if not cfg.source and (cfg.name or cfg.text_field != "text" or cfg.print_name):
        raise UserError("--name and --text_field go with --from, which names a folder to import")
    name = cfg.corpus
    if cfg.source:
        source = Path(os.path.abspath(cfg.source))
        try:
            name = corpus_name(source, cfg.name)
            if cfg.print_name:
                print0(name)
                return
            import_folder(source, name, cfg.text_field)
        except UserError as error:
            raise UserError(printable(f"--from={cfg.source}: {error}")) from error
    elif cfg.corpus == "primer":
        write_primer(cfg.num_documents)
    else:
        download(cfg.corpus, cfg.num_shards)
    corpus = find_corpus(name)
    write_file(corpora_dir() / "current", f"{name}\n")
    train, val = sum(map(check_shard, corpus.train)), check_shard(corpus.val)
    shards = f"for training (shards: {len(corpus.train)}) and {val:,} for validation"
    print0(f"corpus {name}: {train:,} documents {shards} in {corpus.val.parent}")


if __name__ == "__main__":
    run_script(main, Config)
