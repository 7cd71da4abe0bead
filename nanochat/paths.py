"""Where each artifact lives, how a file appears whole or not at all, and how a user's mistake is told.

Everything that nanochat makes lies under one folder, `$NANOCHAT_BASE_DIR` (default `~/.cache/nanochat`):
corpora, the tokenizer, one folder per training run, the report. Nothing else in the code base joins
these names.

The choice that would surprise: a written file is fsynced, renamed into place, and then its *folder* is
fsynced too, since a rename is only durable once the directory entry is (PostgreSQL calls the same
sequence `durable_rename`).
"""

import os
import tempfile
from pathlib import Path

FOLDER_NAME = r"\w[\w.-]*"  # what a corpus and a run may be called: it leads nowhere else


class UserError(ValueError):
    """What a user caused and can mend: one line that says what is wrong and which command mends it."""


def base_dir() -> Path:
    """The folder that holds every artifact; the only place that reads `NANOCHAT_BASE_DIR`."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()


def corpora_dir() -> Path:
    """The folder with one subfolder of text shards per corpus."""
    return base_dir() / "base_data"


def tokenizer_dir() -> Path:
    """The tokenizer that was trained last; each run keeps a copy of the one it used."""
    return base_dir() / "tokenizer"


def run_dir(stage: str, model_tag: str) -> Path:
    """The folder of one training run, such as `base/d20`. `stage` is base, mid, sft or rl."""
    return base_dir() / stage / model_tag


def report_dir() -> Path:
    """The folder with one section file per stage, and the report made from them."""
    return base_dir() / "report"


def eval_bundle_dir() -> Path:
    """The public data of the CORE metric, once they are downloaded."""
    return base_dir() / "eval_bundle"


def fsync_dir(folder: Path) -> None:
    """Make the names inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: str | bytes) -> None:
    """Write `path` whole or not at all, durably; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)
