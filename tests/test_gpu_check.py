"""dev.gpu_check rehearsed in tiny sizes, and what it makes of sections that hang, fail or wait."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dev import gpu_check
from dev.gpu_check import SECTIONS, Config, Section, main
from tests.models import refuses

HANG = """\
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(f"pid  {os.getpid()}\\npid  {child.pid}\\nbefore, ms  1.5", flush=True)
time.sleep(600)
"""


def is_alive(pid: str) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_no_section_stops_another(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, code in {
        "hang": HANG, "fail": "raise RuntimeError('the last words')",
        "good": "print('speed  3.0\\nMFU, %  41.5\\nlost  2')",
    }.items():  # fmt: skip
        (tmp_path / f"{name}.py").write_text(code)
    out, sections = tmp_path / "out", {"hang": 5, "fail": 30, "good": 30, "long": 900}
    commands = {
        name: Section(seconds, str(tmp_path / f"{name}.py"), mfu=40)
        for name, seconds in sections.items()
    }
    monkeypatch.setattr(gpu_check, "SECTIONS", commands)
    monkeypatch.setattr(gpu_check.dataset, "main", lambda _: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # restores it afterwards
    with pytest.raises(SystemExit):
        main(Config(minutes=1, out=out, device_type="cuda"))
    hung = (out / "hang.log").read_text()
    assert "\nfailed: killed after 5 s (" in hung
    pids = [line.split()[1] for line in hung.splitlines() if line.startswith("pid")]
    assert len(pids) == 2 and not any(map(is_alive, pids))
    assert "RuntimeError: the last words\n" in (out / "fail.log").read_text()
    assert not (out / "long.log").exists()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == [*sections, "1", "the"]
    assert "skipped: " in said[3] and said[4] == "1 of 3 sections passed, 1 bounds missed"
    table = re.sub(r" \(\d+ s\)", "", (out / "summary.md").read_text())
    assert table.splitlines()[2:] == [
        "| hang | failed: killed after 5 s | | |",
        *(f"| | pid | {pid} |  |" for pid in pids), "| | before, ms | 1.5 |  |",
        "| fail | failed: exit code 1 | | |", "| good | passed | | |",
        "| | speed | 3.0 |  |", "| | MFU, % | 41.5 | 40 to 100 |",
        "| | lost | 2 | 0 to 0: missed |",
    ]  # fmt: skip


def test_an_unknown_section_is_refused() -> None:
    refuses("--sections=nofacts: there are tests, train_d12,", main, Config("tests,nofacts"))


@pytest.mark.long
def test_every_section_is_rehearsed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dev.gpu_check", "--device_type=cpu", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    logs = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
    assert done.returncode == 0, done.stdout + done.stderr + str(logs)
    assert f"{len(SECTIONS)} of {len(SECTIONS)} sections passed, 0 bounds" in done.stdout
    rows = (tmp_path / "summary.md").read_text()
    for figure in ("MFU, %", "data, %", "tok/s", "copy, 10^12 per second", "lost", "first token"):
        assert f"| | {figure}" in rows
    assert logs.keys() == SECTIONS.keys()
