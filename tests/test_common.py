"""nanochat.common: --help, and what a user can mend: one line, before work begins."""

import errno
import importlib
import os
import sys
from pathlib import Path

import pytest

from nanochat.common import UserError, run_script, set_up
from tests import launch

SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[1] / "scripts").glob("[a-z]*.py"))


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


def test_a_value_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    least_one, above_0 = "be greater than or equal to 1", "be greater than 0"
    assert run(monkeypatch, "plan --mfu 0") == f"error: --mfu=0.0: Input should {above_0}"
    for command, what in {
        "base_train --depth=0": least_one,
        "base_train --num_iterations=0": least_one,
        "base_train --target_param_data_ratio=inf": "be a finite number",
        "base_train --device_batch_size=-2": least_one,
        "base_train --device_type=tpu": "match pattern '^(cpu|cuda|mps)?$'",
        "base_train --dtype=fp16": "match pattern '^(auto|float32|bfloat16)$'",
        "base_train --model_tag=../x": r"match pattern '^(\w[\w.-]*)?$'",
        "base_eval --batch_size=0": least_one,
        "mid_train --warmdown=1.5": "be less than or equal to 1",
        "chat_sft --lr_scale=0.0": above_0,
        "chat_cli --temperature=nan": "be less than or equal to 100",
        "chat_cli --top_k=-1": "be greater than or equal to 0",
        "chat_web --port=99999": "be less than or equal to 65535",
        "chat_eval --max_problems=-1": least_one,
    }.items():
        kind = "String" if "pattern" in what else "Input"
        told = f"error: {command.split()[1]}: {kind} should {what}"
        assert run(monkeypatch, command) == told


def test_values_that_can_be_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    command = "base_train --depth=1 --num_iterations -1 --device_batch_size=auto --eval_every=0"
    cfg = vars(run(monkeypatch, command))
    assert (cfg["num_iterations"], cfg["device_batch_size"], cfg["eval_every"]) == (-1, "auto", 0)
    cfg = vars(run(monkeypatch, "chat_sft --num_iterations 7 --warmdown=0 -g a.b-c_1"))
    assert (cfg["num_iterations"], cfg["warmdown"], cfg["model_tag"]) == (7, 0, "a.b-c_1")
    assert vars(run(monkeypatch, "chat_eval -i rl"))["max_problems"] is None


def test_what_a_user_or_the_machine_caused_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "base_loss --step=7", UserError("no step 7")) == "error: no step 7"
    full = OSError(errno.ENOSPC, "No space left on device", "/a/b")
    said = "error: /a/b: No space left on device; make room or choose another path"
    assert run(monkeypatch, "tok_train", full) == said
    with pytest.raises(OSError, match="Bad file descriptor"):
        run(monkeypatch, "tok_train", OSError(errno.EBADF, "Bad file descriptor"))


def be_a_rank(log: Path, leads_session: bool) -> None:
    """What torchrun starts, in a session of its own unless a script is between them."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    if leads_session:
        os.setsid()
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    set_up("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells that a parent died")
@pytest.mark.parametrize("leads_session", [True, False])
def test_a_rank_whose_torchrun_died_does_not_start(tmp_path: Path, leads_session: bool) -> None:
    rank = launch.FORK.Process(target=be_a_rank, args=(tmp_path / "log", leads_session))
    rank.start()  # its parent is the server that forks it, and no torchrun
    rank.join(60)
    died = (tmp_path / "log").read_text() == "torchrun died while this rank was starting\n"
    assert (rank.exitcode, died) == (leads_session, leads_session)
