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
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from nanochat import primer
from nanochat.flags import Count, run_script
from nanochat.paths import FOLDER_NAME, UserError, corpora_dir, fsync_dir, write_file
from nanochat.runtime import say
from nanochat.shards import check_shard, fsync_file, is_whole, read_texts, shard_name, write_shards
from nanochat.text_files import hold_out, list_files, read_documents

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
        say(f"corpus {name} is already complete; nothing to do")
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
    files = sorted(Path(primer.__file__).parent.glob("primer*.py"))
    code = b"".join(file.read_bytes() for file in files)
    source = {"num_documents": num_documents, "primer": hashlib.sha256(code).hexdigest()}
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
    say(f"{name} is {public.repo} on the Hugging Face hub; licence {public.licence}")
    missing = [i for i in [last, *range(num_shards)] if not is_whole(folder / shard_name(i))]
    if not missing:
        say(f"corpus {name} already has these {num_shards + 1} shards; nothing to do")
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
    say(f"corpus {name}: {len(corpus.train)} training shards and 1 for validation in {where}")


if __name__ == "__main__":
    run_script(main, Config)
