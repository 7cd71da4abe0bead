"""dev.gpu_check rehearsed in tiny sizes, and what it makes of sections that hang, fail or wait."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from dev.gpu_check import SECTIONS, Check, Config, Section, check_all, main
from tests.models import refuses


def good(check: Check) -> None:
    check.add("speed", 2.0, low=3.0)  # on a CPU, no bound holds
    check.note(more="words")


def hang(check: Check, pids: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pids.write_text(f"{os.getpid()} {child.pid}")
    check.add("before", 1.0)
    time.sleep(600)


def fail(check: Check) -> None:
    check.add("before", "words")
    raise RuntimeError("the last words")


def is_alive(pid: str) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.slow  # half a minute is a section's limit
def test_no_section_stops_another(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pids = tmp_path / "out", tmp_path / "pids"
    sections: dict[str, Section] = {
        "tests": (partial(hang, pids=pids), 30.0), "facts": (fail, 60.0), "memory": (good, 60.0),
        "fp8": (good, 900.0),
    }  # fmt: skip
    cfg = Config(minutes=2, out=out, device_type="cpu")
    assert not check_all(sections, cfg)
    found = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert found["tests"]["verdict"] == "failed: killed after 30 s"
    assert found["facts"]["verdict"] == "failed: exit code 1"
    assert (out / "facts.log").read_text().endswith("RuntimeError: the last words\n")
    assert [each["figures"][0]["name"] for each in (found["tests"], found["facts"])] == [
        "before"
    ] * 2
    assert found["memory"]["verdict"] == "passed" and found["memory"]["more"] == "words"
    assert "fp8" not in found
    assert not any(map(is_alive, pids.read_text().split()))
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()] == [*sections, "1"]
    assert "skipped: " in said and "1 of 3 sections passed" in said
    rows = (out / "summary.md").read_text().splitlines()[2:]
    assert "|  | speed | 2 | >= 3 |  |" in rows


def test_an_unknown_section_is_refused() -> None:
    refuses("--sections=nofacts: there are facts, tests,", main, Config(sections="facts,nofacts"))


@pytest.mark.long
def test_every_section_is_rehearsed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dev.gpu_check", "--device_type=cpu", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(SECTIONS)} of {len(SECTIONS)} sections passed" in done.stdout
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert found.keys() == SECTIONS.keys()
    assert all(each["figures"] for each in found.values())
    assert "not there" not in (tmp_path / "summary.md").read_text()
