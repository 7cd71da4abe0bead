"""dev/t4.ipynb, run line by line as Colab runs it, with tiny sizes in place of those it sets."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests import test_speedrun
from tests.test_speedrun import ROOT

environment = test_speedrun.environment
BOOK = json.loads((ROOT / "dev/t4.ipynb").read_text())
LINES = [
    line.rstrip("\n") for c in BOOK["cells"] if c["cell_type"] == "code" for line in c["source"]
]
CHAT = "--total_batch_size=512 --device_batch_size=2 --num_iterations=2 --eval_tokens=512"
TINY = {
    "TEXT": "-n 2", "TOKENIZER": "--vocab_size=400 --max_chars=200000", "MID": CHAT, "SFT": CHAT,
    "BASE": "--depth=2 --max_seq_len=64 --head_dim=32 --aspect_ratio=16 --device_batch_size=2 "
    "--total_batch_size=512 --num_iterations=4 --eval_tokens=1024",
    "BASE_LOSS": "--eval_tokens=1024", "BASE_EVAL": "--max_per_task=2",
    "EXAM": "--max_problems=2 --max_tokens=8",
}  # fmt: skip


def test_it_is_a_notebook_without_output() -> None:
    assert (BOOK["nbformat"], BOOK["nbformat_minor"]) == (4, 5) and BOOK["metadata"]["kernelspec"]
    ids = [cell["id"] for cell in BOOK["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", each) for each in ids)
    for cell in BOOK["cells"]:
        own = {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
        text = {"cell_type": cell["cell_type"], "source": cell["source"]}
        assert cell == text | {"id": cell["id"], "metadata": {}} | own
        assert cell["source"] and all(line.endswith("\n") for line in cell["source"][:-1])


@pytest.mark.long
def test_from_nothing_to_a_talk(environment: dict[str, str], tmp_path: Path) -> None:
    kept = TINY | {"NANOCHAT_BASE_DIR": environment["NANOCHAT_BASE_DIR"]}
    # What Colab's notebooks hand down: a backend of matplotlib that a .venv does not have.
    inline = "module://matplotlib_inline.backend_inline"
    cargo = os.environ.get("CARGO_HOME", f"{Path.home()}/.cargo")
    environment |= {"HOME": str(tmp_path), "CARGO_HOME": cargo, "MPLBACKEND": inline}
    folder, said = tmp_path, ""
    for line in LINES:
        if setting := re.fullmatch(r"%env (\w+)=(.*)", line):
            environment[setting[1]] = kept.get(*setting.groups())
        elif line.startswith("%cd ~/"):
            folder = tmp_path / line.removeprefix("%cd ~/")
        else:
            assert line.startswith("!"), line
            done = subprocess.run(
                ["bash", "-ec", line[1:]], cwd=folder, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            said += done.stdout
            assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}"
    assert set(TINY) < {line[5:].split("=")[0] for line in LINES if line.startswith("%env ")}
    report = json.loads((tmp_path / "base/report/report.json").read_text())
    stages = {"tok_train", "base_train", "base_loss", "base_eval", "mid_train", "chat_sft"}
    assert stages | {"chat_eval_sft"} <= set(report["sections"]) and "# nanochat report" in said
