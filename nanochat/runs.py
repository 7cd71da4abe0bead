"""The training runs in the base folder, as the page /runs shows them.

metrics.jsonl gains a line per step and is asked for every few seconds, so a `Log` remembers how far
it has read: a look costs only what is new. A resumed run replaces the file, which begins it anew.
"""

import json
import os
import time
from array import array
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from nanochat.common import base_dir
from nanochat.trainer import result_step

STAGES = ("base", "mid", "sft", "rl")
CURVES = ("loss", "val_bpb", "reward", "accuracy")
MAX_POINTS = 400  # of a curve; beyond, each is the mean of a stretch of steps
# A process of the number in .lock is the run's, if the run wrote anything this lately; the system
# gives numbers anew. No lock is tried, as that could stop a run that is about to begin.
ALIVE_SECONDS = 3600


class Log:
    """What one run has written so far."""

    def __init__(self, path: Path) -> None:
        self.path = path  # of metrics.jsonl
        self.inode = self.place = 0
        self.newest: dict[str, Any] = {}  # the newest value of each figure
        self.points: dict[str, array[float]] = {}  # of each curve: step, value, step, value, ...

    def read(self) -> None:
        """Take in what is new; a last line without its end waits."""
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self.inode or status.st_size < self.place:
                self.inode, self.place = status.st_ino, 0
                self.newest, self.points = {}, defaultdict(lambda: array("d"))
            file.seek(self.place)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self.place += len(new)
        for line in new.splitlines():
            with suppress(ValueError, TypeError, KeyError):  # damaged
                self._take(json.loads(line, parse_constant=lambda _: None))  # NaN is no JSON

    def _take(self, record: dict[str, Any]) -> None:
        step = record["step"]
        self.newest |= record
        for name in CURVES:
            if record.get(name) is not None:
                self.points[name].extend((step, record[name]))

    def describe(self) -> dict[str, Any]:
        """The run as JSON; `steps` and `seconds_left` are None while nothing tells them."""
        folder, newest = self.path.parent, self.newest
        step, progress = newest.get("step", 0), newest.get("progress")
        age = time.time() - self.path.stat().st_mtime
        if result_step(folder) == step:
            state, progress = "finished", 1
        else:
            alive = age < ALIVE_SECONDS and is_process(folder / ".lock")
            state = "running" if alive else "stopped"
        # The loss of a policy gradient measures nothing.
        omitted = {"loss"} if "reward" in self.points else set()
        shown = [name for name in CURVES if name in self.points.keys() - omitted]
        return {
            "stage": folder.parent.name,
            "tag": folder.name,
            "state": state,
            "step": step,
            "steps": round(step / progress) if progress else None,
            "seconds_left": newest.get("seconds", 0) * (1 / progress - 1) if progress else None,
            "age_seconds": age,
            "tok_per_second": newest.get("tok_per_second"),
            "mfu": newest.get("mfu"),
            "samples": newest.get("samples", []),
            "curves": {name: thin(self.points[name]) for name in shown},
        }


def is_process(lock: Path) -> bool:
    """Whether the process that wrote its number in `lock` lives on this machine."""
    try:
        os.kill(int(lock.read_text()), 0)
    except PermissionError:  # another user's
        return True
    except (OSError, ValueError):
        return False
    return True


def thin(values: "array[float]") -> list[list[float]]:
    points = np.array(values).reshape(-1, 2)
    stretches = np.array_split(points, min(len(points), MAX_POINTS))
    return [stretch.mean(axis=0).round(5).tolist() for stretch in stretches]


class Runs:
    """All runs of the base folder; may be read from several threads."""

    def __init__(self) -> None:
        self.logs: dict[Path, Log] = {}
        self.lock = Lock()

    def read(self) -> list[dict[str, Any]]:
        """What `Log.describe` says of each, those first that wrote last."""
        found = []
        with self.lock:
            for path in [p for s in STAGES for p in (base_dir() / s).glob("*/metrics.jsonl")]:
                if path.parent.is_symlink():  # of a persona, to the base model that it shares
                    continue
                log = self.logs.setdefault(path, Log(path))
                with suppress(OSError):  # deleted meanwhile
                    log.read()
                    found.append(log.describe())
        return sorted(found, key=lambda run: run["age_seconds"])
