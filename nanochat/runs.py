"""The training runs in the base folder, as the page /runs shows them.

metrics.jsonl gains a line per step and is asked for every few seconds, so a `Log` remembers how far
it has read, and its curves until there is more. A resumed run replaces the file: all is read again.
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

from nanochat.checkpoint import STAGE_SCRIPTS
from nanochat.common import base_dir
from nanochat.trainer import result_step

CURVES = ("loss", "val_bpb", "reward", "accuracy")
FIGURES = ("step", "progress", "seconds", "tok_per_second", "mfu", *CURVES)
MAX_POINTS = 400  # of a curve; beyond, each is the mean of a stretch of steps
# A process of the number in .lock is the run's, if the run wrote anything this lately; the system
# reuses process numbers. No lock is tried, as that could stop a run that is about to begin.
ALIVE_SECONDS = 3600


class Log:
    """What one run has written so far."""

    def __init__(self, path: Path) -> None:
        self.path = path  # of metrics.jsonl
        self.inode = self.place = 0
        self.newest: dict[str, Any] = {}  # the newest value of each figure, and samples
        self.points: dict[str, array[float]] = {}  # of each curve: step, value, step, value, ...
        self.curves: dict[str, list[list[float]]] = {}  # the same, thinned

    def read(self) -> None:
        """Take in what is new; a last line without its end waits."""
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self.inode or status.st_size < self.place:
                self.inode, self.place = status.st_ino, 0
                self.newest, self.points = {}, defaultdict(lambda: array("d"))
                self.curves = {}
            file.seek(self.place)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self.place += len(new)
        for line in new.splitlines():
            with suppress(Exception):  # damaged, in whatever way
                self._take(json.loads(line, parse_constant=lambda _: None))  # NaN is no JSON
        if new:
            self.curves = {name: thin(self.points[name]) for name in CURVES if name in self.points}

    def _take(self, record: dict[str, Any]) -> None:
        figures = {name: float(record[name]) for name in FIGURES if record.get(name) is not None}
        if not all(abs(value) < 1e15 for value in figures.values()):
            raise ValueError("no figure of a run")
        step, samples = figures["step"], record.get("samples", self.newest.get("samples", []))
        self.newest |= figures | {"samples": list(map(str, samples))}
        for name in CURVES & figures.keys():
            self.points[name].extend((step, figures[name]))

    def describe(self) -> dict[str, Any]:
        """The run as JSON; `steps` and `seconds_left` are None while nothing tells them."""
        folder, newest = self.path.parent, self.newest
        step, progress = newest.get("step", 0), newest.get("progress", 0)
        age = time.time() - self.path.stat().st_mtime
        if result_step(folder) == step:
            state, progress = "finished", 1
        else:
            alive = age < ALIVE_SECONDS and is_process(folder / ".lock")
            state = "running" if alive else "stopped"
        measures = progress > 1e-9
        # The loss of a policy gradient measures nothing.
        omitted = "loss" if "reward" in self.curves else ""
        return {
            "stage": folder.parent.name,
            "tag": folder.name,
            "state": state,
            "step": step,
            "steps": round(step / progress) if measures else None,
            "seconds_left": newest.get("seconds", 0) * (1 / progress - 1) if measures else None,
            "age_seconds": age,
            "tok_per_second": newest.get("tok_per_second"),
            "mfu": newest.get("mfu"),
            "samples": newest.get("samples", []),
            "curves": {name: curve for name, curve in self.curves.items() if name != omitted},
        }


def is_process(lock: Path) -> bool:
    """Whether the process that wrote its number in `lock` lives on this machine."""
    try:
        os.kill(int(lock.read_text()), 0)
    except PermissionError:  # another user's
        return True
    except (OSError, OverflowError, ValueError):
        return False
    return True


def thin(values: "array[float]") -> list[list[float]]:
    """At most MAX_POINTS pairs of step and value, the means of stretches of equal length."""
    points = np.frombuffer(values).reshape(-1, 2)
    begins = np.unique(np.linspace(0, len(points), MAX_POINTS, endpoint=False).astype(int))
    counts = np.diff(begins, append=len(points))[:, None]
    return (np.add.reduceat(points, begins) / counts).round(5).tolist()


class Runs:
    """All runs of the base folder; may be read from several threads."""

    def __init__(self) -> None:
        self.logs: dict[Path, Log] = {}
        self.lock = Lock()

    def read(self) -> list[dict[str, Any]]:
        """What `Log.describe` says of each, those first that wrote last."""
        found, folders = [], [base_dir() / stage for stage in STAGE_SCRIPTS]
        paths = [path for folder in folders for path in folder.glob("*/metrics.jsonl")]
        # No links: a persona's leads to the base model that it shares.
        paths = [path for path in paths if not path.parent.is_symlink()]
        with self.lock:
            self.logs = {path: self.logs.get(path) or Log(path) for path in paths}
            for log in self.logs.values():
                with suppress(OSError):  # deleted meanwhile
                    log.read()
                    found.append(log.describe())
        return sorted(found, key=lambda run: run["age_seconds"])
