"""The public data of the CORE metric: find or download the bundle, and read its tasks.

    eval_bundle/core.yaml             label, file, kind, number of examples and delimiter of every task
                eval_meta_data.csv    what guessing scores on it, in percent
                eval_data/**.jsonl    its items, one a line

The choice that would surprise: the rows of a task are shuffled once and for all, as for the published numbers,
so the first hundred are a fair sample. A row's "id" is its line in the file.

Source: https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip, in the layout of DCLM.
"""

import csv
import http.client
import os
import random
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from nanochat.core_eval import CORE_TASKS, CoreTask
from nanochat.paths import UserError, eval_bundle_dir, fsync_dir
from nanochat.runtime import progress, say
from nanochat.text_files import numbered_jsonl

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
INDEX, BASELINES = "core.yaml", "eval_meta_data.csv"
MEND = "give an unpacked bundle with --eval_bundle or NANOCHAT_EVAL_BUNDLE"
TIMEOUT_SECONDS = 30.0  # without a byte
SHUFFLE_SEED = 1337
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # what reading it may raise
# Kind of task -> the fields of its rows.
FIELDS: dict[str, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}


def find_bundle(given: str = "") -> Path:
    """The folder `given`, or that of NANOCHAT_EVAL_BUNDLE, or the downloaded one, downloaded if need be."""
    given = given or os.environ.get("NANOCHAT_EVAL_BUNDLE", "")
    folder = Path(given).expanduser() if given else eval_bundle_dir()
    if not given and not folder.exists():
        download(folder)
    if not (folder / INDEX).is_file():
        raise UserError(f"there is no {INDEX} in {folder}; {MEND}")
    return folder


def download(folder: Path) -> None:
    """Fetch the bundle into `folder`, which appears whole or not at all."""
    say(f"downloading {URL}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".eval_bundle.", dir=folder.parent) as beside:
            archive = Path(beside) / "bundle.zip"
            with urllib.request.urlopen(URL, timeout=TIMEOUT_SECONDS) as source:
                total = -(-int(source.headers.get("Content-Length") or 0) // 2**20)
                blocks = progress(iter(lambda: source.read(2**20), b""), "MiB", total)
                with archive.open("wb") as file:
                    file.writelines(blocks)
            _unpack(archive, Path(beside) / "unpacked").rename(folder)
        fsync_dir(folder.parent)
    except (OSError, http.client.HTTPException, *DAMAGED_ZIP) as error:
        raise UserError(f"{URL} cannot be downloaded whole ({_line(error)}); {MEND}") from error


def _unpack(archive: Path, folder: Path) -> Path:
    """The folder with the index, below `folder`; durable, and every file checked against its CRC."""
    with zipfile.ZipFile(archive) as bundle:
        for name in bundle.namelist():
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{URL}: its file {name!r} would leave the folder; {MEND}")
        bundle.extractall(folder)
    found = next(folder.rglob(INDEX), None)
    if found is None:
        raise UserError(f"{URL} holds no {INDEX}; {MEND}")
    os.sync()
    return found.parent


def load_tasks(folder: Path, labels: Sequence[str] = CORE_TASKS) -> list[CoreTask]:
    """The tasks of CORE with these labels; says which of them have no data in the bundle.

    Raises UserError for an unknown label, and one that names the file and line of what is malformed.
    """
    wanted = dict.fromkeys(labels)
    if unknown := sorted(set(wanted) - set(CORE_TASKS)):
        known = ", ".join(("core", "primer-choice", *CORE_TASKS))
        raise UserError(f"--tasks: {unknown[0]!r} is unknown; choose of {known}")
    index = _read_index(folder)
    there = [label for label in wanted if label in index and index[label][0].is_file()]
    if len(there) < len(wanted):
        say(f"{folder} has no data of {', '.join(sorted(set(wanted) - set(there)))}")
    if not there:
        raise UserError(f"{folder} has no data of any task; {MEND}")
    tasks = (index[label] for label in there)
    return [replace(task, rows=_read_rows(path, task)) for path, task in tasks]


def _read_index(folder: Path) -> dict[str, tuple[Path, CoreTask]]:
    """Label -> (the file of its rows, the task without them)."""
    index = {}
    try:
        with (folder / BASELINES).open(encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            percent = {row["Eval Task"]: float(row["Random baseline"]) for row in table}
        for entry in yaml.safe_load((folder / INDEX).read_text(encoding="utf-8"))["icl_tasks"]:
            label, kind, shots = entry["label"], entry["icl_task_type"], entry["num_fewshot"]
            shots = shots[0] if isinstance(shots, list) else shots
            if kind not in FIELDS or not 0 <= percent[label] < 100 or shots < 0:
                raise ValueError(f"{label}: {kind}, {shots} examples, {percent[label]} %")
            between = entry.get("continuation_delimiter", " ")
            task = CoreTask(label, kind, (), percent[label] / 100, shots, between)
            index[label] = (folder / "eval_data" / entry["dataset_uri"], task)
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{INDEX} or {BASELINES} in {folder}: {_line(error)}; {MEND}") from error
    return index


def _read_rows(path: Path, task: CoreTask) -> list[dict[str, Any]]:
    fields, rows = FIELDS[task.kind], []
    for number, row in numbered_jsonl(path):
        if not _fits(row, fields):
            raise UserError(f"{path}, line {number}: expected {', '.join(fields)}; mend that line")
        rows.append({field: row[field] for field in fields} | {"id": number})
    if len(rows) <= task.num_fewshot:
        few = f"{len(rows)} rows are too few for {task.num_fewshot} examples and an item"
        raise UserError(f"{path}: {few}; complete or remove it")
    random.Random(SHUFFLE_SEED).shuffle(rows)
    return rows


def _fits(row: Any, fields: dict[str, type]) -> bool:
    if not isinstance(row, dict) or any(type(row.get(name)) is not fields[name] for name in fields):
        return False
    options = next((row[name] for name in fields if fields[name] is list), None)
    return options is None or (
        all(isinstance(text, str) for text in options) and 0 <= row["gold"] < len(options) > 1
    )


def _line(error: BaseException) -> str:
    """What an error says, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
