"""From text to a chat answer at depth 2: every stage, as a user types it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from nanochat.trainer import read_metrics
from tests.launch import FORK

DEVICE = f"--device_type={'cuda' if torch.cuda.is_available() else 'cpu'}"
SIZES = f"{DEVICE} --model_tag=tiny"
BASE = "--depth=2 --aspect_ratio=16 --head_dim=16 --window_pattern=SL --num_iterations=20"
BATCH = "--total_batch_size=512 --device_batch_size=4 --eval_every=10 --eval_tokens=512"
BATCH += " --max_seq_len=128 --log_every=5"
CHAT = f"{SIZES} {BATCH} --mixture=primer --num_iterations=10"
STAGES = {
    "corpus": "nanochat.dataset --corpus=primer --num-documents=400",
    "tokenizer": "scripts.tok_train --vocab_size=400",
    "compression": "scripts.tok_eval",
    "base": f"scripts.base_train {SIZES} {BASE} {BATCH} --save_every=10",
    "base loss": f"scripts.base_loss {SIZES} --eval_tokens=512 --device_batch_size=4",
    "base eval": f"scripts.base_eval {SIZES} -a primer-choice --max_per_task=8",
    "mid": f"scripts.mid_train {CHAT}",
    "sft": f"scripts.chat_sft {CHAT}",
    "rl": f"scripts.chat_rl {SIZES} --num_steps=2 --questions_per_step=2 --num_samples=2 "
    "--max_tokens=16 --num_slots=4 --eval_every=1 --eval_problems=4 --task=primer-arithmetic "
    "--eval_samples=1",
    "chat eval": f"scripts.chat_eval {SIZES} -i rl -a primer-choice|primer-arithmetic "
    "--max_problems=4 --max_tokens=16",
    "report": "nanochat.report generate",
}

# What the first line and the report of a stage that loads a checkpoint name.
LOADED = {
    "base loss": "base/tiny step 20", "base eval": "base/tiny step 20", "mid": "base/tiny step 20",
    "sft": "mid/tiny step 10", "rl": "sft/tiny step 10", "chat eval": "rl/tiny step 2",
}  # fmt: skip

CHAT_CLI = f"scripts.chat_cli -i rl -g tiny {DEVICE} --max_tokens=12"


def become(command: str, folder: Path, log: Path) -> None:
    """What `python -m` does, in a process that has imported torch already."""
    os.chdir(folder)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ["NANOCHAT_BASE_DIR"] = str(folder / "base_dir")
    sys.argv = command.split(" ")
    sys.modules.pop(sys.argv[0], None)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


@pytest.mark.gpu
@pytest.mark.slow
def test_from_text_to_a_chat_answer(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()

    def run(command: str) -> CompletedProcess[str]:
        process = FORK.Process(target=become, args=(command, tmp_path, log))
        process.start()
        process.join()
        said = [(log / name).read_text() for name in ("stdout", "stderr")]
        return CompletedProcess(command, process.exitcode or 0, *said)

    def run_anew(command: str, typed: str | None = None) -> CompletedProcess[str]:
        own = {"NANOCHAT_BASE_DIR": str(tmp_path / "base_dir"), "PYTHONUTF8": "1"}
        own["PYTHONPATH"] = str(Path(__file__).parent.parent)
        words, environment = [sys.executable, "-m", *command.split(" ")], os.environ | own
        options = {"capture_output": True, "text": True, "input": typed}
        return subprocess.run(words, cwd=tmp_path, env=environment, **options)

    missing = run_anew("scripts.chat_cli -i sft --device_type=cpu -p hello")
    assert missing.returncode == 1
    assert missing.stderr.count("\n") == 1 and "python -m scripts.chat_sft" in missing.stderr

    for name, command in STAGES.items():
        done = run(command)
        assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert LOADED.get(name, "") in done.stdout.splitlines()[0]
    for stage in ("base", "mid", "sft", "rl"):
        folder = tmp_path / "base_dir" / stage / "tiny"
        steps = [record["step"] for record in read_metrics(folder)]
        assert steps == list(range(len(steps))) and (folder / "result.json").exists()
    records = read_metrics(tmp_path / "base_dir" / "base" / "tiny")
    assert records[-1]["loss"] < records[1]["loss"] - 1

    report = (tmp_path / "report.md").read_text()
    assert "| Metric | BASE | MID | SFT | RL |" in report
    assert report.count("base/tiny step 20") == 1 and report.count("mid/tiny step 10") == 1
    row = [line for line in report.splitlines() if line.startswith("| primer-arithmetic |")][-1]
    assert row.split("|")[2:5] == [" - "] * 3 and "%" in row.split("|")[5]

    again = run(STAGES["mid"])
    assert again.returncode == 0 and "is finished" in again.stdout
    answer = run(f"{CHAT_CLI} --temperature=0 -p Hello")
    assert answer.returncode == 0 and answer.stderr.startswith("rl/tiny step 2 on ")
    assert answer.stderr.count("\n") == 1
    talk = run_anew(CHAT_CLI, typed="Hello\nWho are you?\n")
    assert talk.returncode == 0
    assert talk.stdout.count("You: ") == talk.stdout.count("Model: ") == 2

    for weights in (tmp_path / "base_dir" / "rl" / "tiny").glob("step_*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-100])
    damaged = run(f"{CHAT_CLI} -p Hello")
    assert damaged.returncode == 1 and damaged.stderr.count("\n") == 1
    assert "model.safetensors is damaged" in damaged.stderr
    assert "python -m scripts.chat_rl --fresh" in damaged.stderr
    records = tmp_path / "base_dir" / "rl" / "tiny" / "chat_eval_primer-choice.jsonl"
    assert json.loads(records.read_text().splitlines()[0])["replies"][0] in "ABC"
