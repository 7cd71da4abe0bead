"""base_eval: what it writes and reports, what it refuses, and models of transformers."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import core_eval
from nanochat.common import report_dir, run_dir
from nanochat.core_eval import CoreTask, HFReader, evaluate, item_documents, load_tasks
from scripts import chat_eval
from scripts.base_eval import Config, main
from tasks.mixtures import build_task
from tests.models import CPU, random_gpt, refuses, save_model
from tests.test_core_eval import write_bundle

NUM = {"copa": 4, "lambada_openai": 4, "winograd": 4}  # items with --max_per_task 4


@pytest.fixture
def bundle(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small bundle, in a world without a network."""
    monkeypatch.delenv("NANOCHAT_EVAL_BUNDLE", raising=False)
    monkeypatch.setattr(core_eval, "URL", "http://127.0.0.1:9/eval_bundle.zip")
    return str(write_bundle(tmp_path / "bundle"))


@pytest.fixture
def run(base: Path) -> Path:
    """The folder of a run of a small random model, step 5."""
    return save_model(random_gpt(128), "base", "d1", step=5)


def read_records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "base_eval.jsonl").read_text().splitlines()]


def test_core_is_recorded_and_reported(
    bundle: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(Config(eval_bundle=bundle, max_per_task=4, batch_size=3, device_type="cpu"))
    records = read_records(run)
    assert [record["task"] for record in records] == [n for n in NUM for _ in range(NUM[n])]
    for record in records:
        assert record.keys() == {"task", "id", "prediction", "gold", "correct", "losses"}
        if record["task"] != "lambada_openai":
            assert record["prediction"] == record["losses"].index(min(record["losses"]))
    section = json.loads((report_dir() / "base_eval.json").read_text())
    results, centered = section["results"], []
    for name, guessing in (("copa", 0.5), ("lambada_openai", 0.0), ("winograd", 0.5)):
        right = [record["correct"] for record in records if record["task"] == name]
        accuracy = sum(right) / 4
        assert results[name]["value"] == accuracy
        error = math.sqrt(accuracy * (1 - accuracy) / 3)
        assert results[name]["stderr"] == pytest.approx(error)
        centered.append((accuracy - guessing) / (1 - guessing))
    assert results["CORE (3 of 22)"]["value"] == pytest.approx(sum(centered) / 3)
    assert results["CORE (3 of 22)"]["stderr"] > 0 and "CORE" not in results
    assert section["settings"]["step"] == 5 and section["seconds"] > 0
    said = capsys.readouterr().out
    assert "squad" in said and section["samples"][0] in said  # the missing, then the table


def test_one_item_of_some_tasks_and_the_quiz_of_the_primer(bundle: str, run: Path) -> None:
    tasks = "winograd|primer-choice"
    main(Config(tasks=tasks, eval_bundle=bundle, max_per_task=1, device_type="cpu"))
    found = [record["task"] for record in read_records(run)]
    assert found == ["primer-choice: page", "winograd"]
    main(Config(tasks="primer-choice", batch_size=64, device_type="cpu"))  # no bundle needed
    records, quiz = read_records(run), build_task("primer-choice")
    assert [record["gold"] for record in records] == [row["gold"] for row in quiz]
    results = json.loads((report_dir() / "base_eval.json").read_text())["results"]
    assert results.keys() == {"primer-choice", "primer-choice: page"}
    right = [record["correct"] for record in records]
    assert results["primer-choice: page"]["value"] == sum(right) / len(quiz)


def test_both_scripts_score_the_primers_choices_alike(run: Path) -> None:
    save_model(random_gpt(128), "mid", "d1", step=5)
    main(Config(tasks="primer-choice", max_per_task=60, device_type="cpu"))
    chat_eval.main(
        chat_eval.Config("mid", tasks="primer-choice", max_problems=60, device_type="cpu")
    )
    before, after = (
        json.loads((report_dir() / f"{stage}.json").read_text())["results"]
        for stage in ("base_eval", "chat_eval_mid")
    )
    assert before == after and before.keys() == {"primer-choice", "primer-choice: page"}


def test_refusals_leave_nothing_behind(bundle: str, base: Path, run: Path) -> None:
    broken = random_gpt(128)
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    save_model(broken, "base", "broken", step=5)
    cases: dict[str, dict[str, Any]] = {
        "--eval_bundle": {},  # and no network
        "NANOCHAT_EVAL_BUNDLE": {"eval_bundle": "/nowhere"},
        "'cope' is unknown": {"tasks": "core|cope", "eval_bundle": bundle},
        "d9": {"tasks": "primer-choice", "model_tag": "d9"},
        "task copa failed.*--step": {"eval_bundle": bundle, "model_tag": "broken"},
    }
    for told, options in cases.items():
        refuses(told, main, Config(device_type="cpu", **{"model_tag": "d1", **options}))
        assert not list(base.rglob("base_eval.*")) and not (base / "eval_bundle").exists()


def test_a_fault_in_a_task_fails_the_run_and_names_it(
    bundle: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(reader: Any, task: CoreTask, *rest: Any) -> Any:
        if task.label == "winograd":
            raise IndexError("out of range")
        return evaluate(reader, task, *rest)

    monkeypatch.setattr("nanochat.core_eval.evaluate", failing)
    with pytest.raises(RuntimeError, match="task winograd failed: out of range"):
        main(Config(eval_bundle=bundle, max_per_task=2, device_type="cpu"))
    assert not report_dir().exists() and not (run / "base_eval.jsonl").exists()


def save_hf_model(folder: Path, bos: str | None) -> None:
    """A random GPT-2 of 2 layers over bytes, as transformers saves one; its special tokens end the
    vocabulary.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "<s>", "</s>"])}
    fast: Any = Fast(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=bos, eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    sizes = GPT2Config(vocab_size=len(vocab), n_positions=96, n_embd=32, n_layer=2, n_head=2)
    sizes.initializer_range = 0.3  # so that predictions differ
    GPT2LMHeadModel(sizes).save_pretrained(folder)


@pytest.mark.parametrize(("bos", "first"), [("<s>", 256), (None, 257)])
def test_a_model_of_transformers(bundle: str, tmp_path: Path, bos: str | None, first: int) -> None:
    pytest.importorskip("transformers")
    save_hf_model(tmp_path / "gpt2", bos)
    name = str(tmp_path / "gpt2")
    main(Config(hf_path=name, eval_bundle=bundle, batch_size=3, device_type="cpu"))
    assert not report_dir().exists()  # the report is about models of our own
    records = read_records(run_dir("hf", name.strip("/").replace("/", "--")))
    reader = HFReader(name, CPU)
    assert reader.max_len == 96
    numbered = [(task, i) for task in load_tasks(Path(bundle)) for i in range(len(task.rows))]
    assert len(records) == len(numbered)
    for record, (task, number) in zip(records, numbered, strict=True):
        losses = []
        rows, num_scored = item_documents(reader, task, number)
        cut = max(0, max(map(len, rows)) - 96)
        for row, num in zip(rows, num_scored, strict=True):
            assert row[0] == first
            ids = torch.tensor([row[:1] + row[1 + cut :]])
            with torch.no_grad():
                logs = reader.model(ids).logits[0].log_softmax(-1)
            nats = -logs[:-1].gather(1, ids[0, 1:, None])[-num:]
            losses.append(float(nats.mean()))
        assert record["losses"] == pytest.approx(losses, abs=1e-4)


def test_without_transformers_and_without_the_model(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"eval_bundle": bundle, "device_type": "cpu"}
    pytest.importorskip("transformers")
    refuses("--hf_path=", main, Config(hf_path=str(tmp_path), **options))
    monkeypatch.setitem(sys.modules, "transformers", None)
    refuses("uv pip install transformers", main, Config(hf_path="gpt2", **options))
