"""nanochat.flags: --help says what a script does; what a user can mend is one line, and is said before work begins."""

import errno
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.common import UserError, run_script

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("[a-z]*.py"))


def run(monkeypatch: pytest.MonkeyPatch, command: str, fault: Exception | None = None) -> object:
    """What the script's main was given, or what it exited with; `fault` is what main raises."""
    name, *arguments = command.split()
    script = importlib.import_module(f"scripts.{name}")
    given: list[object] = []

    def main(cfg: object) -> None:
        given.append(cfg)
        if fault:
            raise fault

    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        run_script(main, script.Config)
    except SystemExit as ended:
        assert fault or not given, "refused before it began"
        return ended.code
    return given[0]


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
    assert run(monkeypatch, "base_loss --step=7", UserError("no step 7")) == "error: no step 7"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("base_train --depth=0", "--depth=0: Input should be greater than or equal to 1"),
        ("base_train --num_iterations 0", "--num_iterations=0: Input should be greater than or equal to 1"),
        ("base_train --target_param_data_ratio=inf", "--target_param_data_ratio=inf: Input should be a finite number"),
        ("base_train --device_batch_size=-2", "--device_batch_size=-2: Input should be greater than or equal to 1"),
        ("base_train --model_tag=../x", r"--model_tag=../x: String should match pattern '^(\w[\w.-]*)?$'"),
        ("base_eval --batch_size=0", "--batch_size=0: Input should be greater than or equal to 1"),
        ("mid_train --warmdown=1.5", "--warmdown=1.5: Input should be less than or equal to 1"),
        ("chat_sft --lr_scale=0", "--lr_scale=0.0: Input should be greater than 0"),
        ("chat_cli --temperature=nan", "--temperature=nan: Input should be less than or equal to 100"),
        ("chat_cli --top_k=-1", "--top_k=-1: Input should be greater than or equal to 0"),
        ("chat_web --port=99999", "--port=99999: Input should be less than or equal to 65535"),
        ("chat_eval --max_problems=-1", "--max_problems=-1: Input should be greater than or equal to 1"),
        ("plan --mfu=0", "--mfu=0.0: Input should be greater than 0"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused(
    command: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, command) == f"error: {said}"


def test_values_that_can_be_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    command = "base_train --depth=1 --num_iterations -1 --device_batch_size=auto --eval_every=0"
    cfg = vars(run(monkeypatch, command))
    assert (cfg["num_iterations"], cfg["device_batch_size"], cfg["eval_every"]) == (-1, "auto", 0)
    cfg = vars(run(monkeypatch, "chat_sft --num_iterations 7 --warmdown=0 -g a.b-c_1"))
    assert (cfg["num_iterations"], cfg["warmdown"], cfg["model_tag"]) == (7, 0, "a.b-c_1")
    assert vars(run(monkeypatch, "chat_eval -i rl"))["max_problems"] is None


def test_what_the_machine_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/a/b")
    said = "error: /a/b: No space left on device; make room or choose another path"
    assert run(monkeypatch, "tok_train", full) == said
    with pytest.raises(OSError, match="Bad file descriptor"):
        run(monkeypatch, "tok_train", OSError(errno.EBADF, "Bad file descriptor"))


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("runcpu.sh --help", 0, "bash runcpu.sh --from FOLDER"),
        ("runcpu.sh --from", 2, "error: --from needs a folder\n"),
        ("runcpu.sh --fresh --from=", 2, "error: --from needs a folder\n"),
        ("runcpu.sh --from=/nowhere", 2, "error: --from /nowhere is no folder\n"),
        ("runcpu.sh --form", 2, "error: unknown option --form;"),
        ("speedrun.sh --frehs", 2, "error: unknown option --frehs; the only one is --fresh"),
        ("run1000.sh 8", 2, "error: unknown option 8; the only one is --fresh"),
    ],
)  # fmt: skip
def test_the_shell_scripts_know_their_options(command: str, code: int, said: str) -> None:
    done = subprocess.run(
        ["bash", *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == code and said in done.stdout + done.stderr
