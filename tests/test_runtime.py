"""nanochat.runtime: --help of each script says what it does and what its flags are; a UserError is one line; no rank outlives torchrun."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.paths import UserError
from nanochat.runtime import run_script

SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[1] / "scripts").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_the_script_does(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module(f"scripts.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        run_script(script.main, script.Config)
    said = capsys.readouterr().out
    assert script.__doc__ and ended.value.code == 0
    assert script.__doc__.split("\n")[0] in said


def test_a_user_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    script = importlib.import_module("scripts.export_hf")
    monkeypatch.setattr(sys, "argv", ["export_hf", "--out", "folder", "--step", "7"])

    def main(cfg: object) -> None:
        raise UserError(f"no step {vars(cfg)['step']}")

    with pytest.raises(SystemExit) as ended:
        run_script(main, script.Config)
    assert ended.value.code == "error: no step 7"


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process that its parent died"
)
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            'setsid "$PYTHON" -c "$CODE"; true',
            "torchrun died while this rank was starting\n",
        ),  # sh is not torchrun
        (
            'setsid sh -c \'"$PYTHON" -c "$CODE"; true\'; true',
            "",
        ),  # torchrun started a script, the script us
    ],
)
def test_a_rank_whose_torchrun_died_does_not_start(command: str, said: str) -> None:
    code = 'from nanochat.runtime import set_up; set_up("cpu")'
    environment = os.environ | {
        "PYTHON": sys.executable,
        "CODE": code,
        "TORCHELASTIC_RUN_ID": "none",
    }
    done = subprocess.run(
        ["sh", "-c", command], env=environment, stderr=subprocess.PIPE, text=True, timeout=120
    )
    assert done.stderr == said
