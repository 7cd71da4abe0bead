"""The examination script: results, records and report of a small random model; what it refuses."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint import save_checkpoint
from nanochat.common import Runtime, UserError, report_dir, run_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from scripts.chat_eval import Config, main

TOKENIZER = Tokenizer([bytes([byte]) for byte in range(256)], SPECIAL_TOKENS, SPLIT_PATTERN)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run with one checkpoint."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    model = GPT(GPTConfig(128, TOKENIZER.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights(0)
    folder = run_dir("mid", "d1")
    TOKENIZER.save(folder / "tokenizer")
    state = {"step": 7, "model_config": asdict(model.config)}
    runtime = Runtime(torch.device("cpu"), torch.float32, 0, 1, "cpu")
    save_checkpoint(folder, state, model.state_dict(), {}, None, runtime)
    return folder


def test_two_tasks_are_recorded_and_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = "primer-choice|primer-arithmetic"
    sampling = {"num_samples": 2, "temperature": 1.0, "max_tokens": 8, "batch_size": 4}
    main(Config("mid", tasks, max_problems=5, device_type="cpu", **sampling))
    for name, num_replies in (("primer-choice", 1), ("primer-arithmetic", 2)):
        rows = [
            json.loads(line) for line in (run / f"chat_eval_{name}.jsonl").read_text().splitlines()
        ]
        assert [row["index"] for row in rows] == list(range(5))
        assert all(row["step"] == 7 and len(row["replies"]) == num_replies for row in rows)
    section = json.loads((report_dir() / "chat_eval_mid.json").read_text())
    results = section["results"]
    lines = (run / "chat_eval_primer-choice.jsonl").read_text().splitlines()
    expected = sum(json.loads(line)["scores"][0] for line in lines)
    assert results["primer-choice"]["value"] == pytest.approx(expected / 5)
    assert {"primer-arithmetic", "primer-arithmetic pass@2"} <= results.keys()
    assert len(section["samples"]) == 4 and "User: " in section["samples"][0]
    assert "primer-choice:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config",
    [
        Config("mid", "no-such-task"),
        Config("mid", num_samples=3),
        Config("rl", "primer-choice", device_type="cpu"),
        Config("mid", "primer-choice", model_tag="d99", device_type="cpu"),
    ],
    ids=["task", "samples", "stage", "tag"],
)
def test_refusals_leave_nothing_behind(run: Path, config: Config) -> None:
    with pytest.raises(UserError) as refusal:
        main(config)
    assert "\n" not in str(refusal.value)
    assert not list(run.glob("*.jsonl")) and not report_dir().exists()
