"""Every stage with --device_type=mps: on an Apple chip, or on one in software.

The oracle of the losses is the same command on the CPU.
"""

import re
from pathlib import Path

import pytest

from nanochat.trainer import read_metrics
from tests.apple import become_a_mac
from tests.launch import FORK
from tests.test_pipeline import CHAT_CLI, DEVICE, LOADED, STAGES, become

MPS = "--device_type=mps"


def on_a_mac(command: str, folder: Path, log: Path) -> None:
    become_a_mac()
    become(command.replace(DEVICE, MPS), folder, log)


@pytest.mark.long
def test_every_stage_runs_on_an_apple_chip(tmp_path: Path, base_dir: Path) -> None:
    base_dir.rename(tmp_path / "base_dir")
    steps = re.compile(r"(--num_iterations)=\d+")  # each takes a second here
    commands = {name: steps.sub(r"\1=5", STAGES[name]) for name in ("base", *LOADED)}
    base = commands["base"]
    commands |= {"chat": f"{CHAT_CLI} -p Hello"}
    commands |= {"half": base.replace("tiny", "half --dtype=float16")}
    commands |= {"cpu": base.replace("tiny", "cpu --dtype=float32")}
    for name, command in commands.items():
        (tmp_path / name).mkdir()
        target = become if name == "cpu" else on_a_mac
        process = FORK.Process(target=target, args=(command, tmp_path, tmp_path / name))
        process.start()
        process.join()
        said = [(tmp_path / name / stream).read_text()[-2000:] for stream in ("stdout", "stderr")]
        assert process.exitcode == 0, f"{name}: {said}"
    runs = [read_metrics(tmp_path / "base_dir/base" / tag) for tag in ("tiny", "half", "cpu")]
    losses, half, oracle = ([record["loss"] for record in run[1:]] for run in runs)
    assert len(losses) == 5 and losses == pytest.approx(oracle, abs=2e-3)
    assert half == pytest.approx(oracle, abs=0.1)
