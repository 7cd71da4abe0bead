"""What /runs/data tells of runs: files that grow, are torn, replaced, damaged; states; the key."""

import json
import os
from array import array
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from nanochat.runs import MAX_POINTS, Runs, thin
from tests.serving import EchoEngine, serving

DEAD = 2**22 + 1  # more than a process's number can be


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "sft/d2").mkdir(parents=True)
    return tmp_path / "sft/d2"


def line(step: int, **figures: object) -> str:
    return json.dumps({"step": step, "progress": step / 8, "seconds": 2.0 * step} | figures) + "\n"


def test_a_file_that_grows_is_read_on_from_where_it_ended(folder: Path) -> None:
    runs, path = Runs(), folder / "metrics.jsonl"
    path.write_text(line(0, val_bpb=3.0) + line(1, loss=2.0, mfu=0.5) + line(2, loss=1.5)[:-9])
    [run] = runs.read()
    assert (run["stage"], run["tag"], run["step"], run["steps"]) == ("sft", "d2", 1, 8)
    assert run["seconds_left"] == pytest.approx(14) and run["mfu"] == 0.5
    assert run["curves"] == {"loss": [[1, 2]], "val_bpb": [[0, 3]]}
    assert runs.read()[0]["curves"]["loss"] is run["curves"]["loss"], "thinned again for nothing"
    rest = line(2, loss=1.5)[-9:] + "no json\n[]\n" + line(3, loss=float("nan"), samples=["hello"])
    with path.open("a") as file:
        file.write(rest)
    [run] = runs.read()
    assert run["curves"] == {"loss": [[1, 2], [2, 1.5]], "val_bpb": [[0, 3]]}
    assert (run["step"], run["samples"]) == (3, ["hello"])
    other = folder / "new"  # as a resumed run replaces it
    other.write_text(line(0, val_bpb=4.0) + line(1, loss=2.5))
    other.rename(path)
    assert runs.read()[0]["curves"] == {"loss": [[1, 2.5]], "val_bpb": [[0, 4]]}
    path.unlink()
    assert runs.read() == [] and not runs.logs


DAMAGED = (
    '{"step": 2, "loss": "x"}',
    '{"step": 2, "loss": 1e999}',
    '{"step": 2, "loss": [1]}',
    '{"step": null, "loss": 9}',
    '{"step": 2, "progress": "x"}',
    '{"step": 2, "seconds": "x"}',
    '{"step": 2, "mfu": 1e999}',
    '{"step": 1%s}' % ("0" * 400),
    '{"loss": 9}',
    "[]",
    "[" * 100_000,
)


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_record_is_passed_over(folder: Path, damaged: str) -> None:
    good = line(1, loss=2.0) + "%s" + line(3, loss=1.5) + "%s"
    (folder / "metrics.jsonl").write_text(good.replace("%s", f"{damaged}\n"))
    [run] = Runs().read()
    (folder / "metrics.jsonl").write_text(good.replace("%s", ""))
    [expected] = Runs().read()
    assert run | {"age_seconds": 0} == expected | {"age_seconds": 0}


def test_a_long_run_is_thinned_out(folder: Path) -> None:
    steps = range(10 * MAX_POINTS)
    (folder / "metrics.jsonl").write_text("".join(line(s, loss=s, reward=2 * s) for s in steps))
    [run] = Runs().read()
    assert list(run["curves"]) == ["reward"], "the loss of a policy gradient measures nothing"
    points = run["curves"]["reward"]
    assert points[0] == [4.5, 9] and len(points) == MAX_POINTS
    assert all(value == 2 * step for step, value in points)


@pytest.mark.parametrize("num_points", [1, MAX_POINTS, MAX_POINTS + 1, 3 * MAX_POINTS - 1])
def test_thinned_points_are_means_of_stretches(num_points: int) -> None:
    points = np.random.default_rng(0).normal(size=(num_points, 2))
    begins = [i * num_points // MAX_POINTS for i in range(MAX_POINTS)]
    stretches = [points[i:j] for i, j in pairwise([*dict.fromkeys(begins), num_points])]
    means = [stretch.mean(axis=0) for stretch in stretches]
    assert np.allclose(thin(array("d", points.ravel())), means, atol=1e-5)


@pytest.mark.parametrize(
    ("lock", "result", "hours", "state"),
    [
        ("own", None, 0, "running"),
        ("own", 3, 0, "running"),  # extended beyond the end at step 3
        ("own", None, 2, "stopped"),  # the number is another process's by now
        (DEAD, None, 0, "stopped"),
        ("", None, 0, "stopped"),
        (10**30, None, 0, "stopped"),
        (DEAD, 4, 0, "finished"),
    ],
)
def test_states(folder: Path, lock: object, result: int | None, hours: int, state: str) -> None:
    path = folder / "metrics.jsonl"
    path.write_text(line(4, loss=1.0))
    then = path.stat().st_mtime - 3600 * hours
    os.utime(path, (then, then))
    (folder / ".lock").write_text(str(os.getpid() if lock == "own" else lock))
    if result is not None:
        (folder / "result.json").write_text(json.dumps({"step": result}))
    (folder.parent / "pip").symlink_to(folder)  # a persona's, told with the run itself
    [run] = Runs().read()
    assert run["state"] == state


def test_the_data_need_the_key_and_the_page_does_not(folder: Path) -> None:
    text = line(1, loss=float("inf"), samples=["\ud800"])
    (folder / "metrics.jsonl").write_text(text)
    with serving([EchoEngine()], api_key="secret") as running:
        assert running.client.get("/runs").status_code == 200
        assert running.client.get("/runs/data").status_code == 401
        found = running.client.get("/runs/data", headers={"Authorization": "Bearer secret"}).json()
    assert [(run["tag"], run["curves"]) for run in found] == [("d2", {})]
