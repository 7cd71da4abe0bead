"""nanochat.finetuning: the loss is the mean over the targets of the whole batch, in any split."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint import find_checkpoint
from nanochat.common import run_dir
from nanochat.finetuning import FinetuneConfig, finetune
from nanochat.tokenizer import Conversation
from nanochat.trainer import read_metrics
from scripts import chat_eval, chat_rl
from tests.models import refuses
from tests.serving import save_chat_model

CFG = FinetuneConfig(
    source="sft", num_iterations=3, total_batch_size=256, eval_every=-1, eval_tokens=256,
    device_type="cpu", fresh=True, save_every=-1,
)  # fmt: skip


def conversation(question: str, reply: str) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {"messages": messages}


def test_micro_batches_with_unequal_targets_are_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_chat_model(tmp_path, monkeypatch)
    talk = [conversation("?" * (60 - n), "ab" * (n // 2)) for n in range(4, 60, 4)]
    curves = []
    for rows in (4, 2, 1):
        cfg = replace(CFG, dtype="float32", device_batch_size=rows)
        finetune("mid", "Midtraining", cfg, lambda _: talk)
        curves.append([record["loss"] for record in read_metrics(run_dir("mid", "d2"))[1:]])
    assert len(set(curves[0])) == 3
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_moments_make_two_stages_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a constant rate and with all batches alike, the oracle is one stage of as many steps."""
    save_chat_model(tmp_path, monkeypatch)
    talk = [conversation("?" * 20, "ab" * 8)] * 2
    cfg = replace(CFG, device_batch_size=4, warmdown=0.0)

    def weights(stage: str, **changes: Any) -> dict[str, torch.Tensor]:
        finetune(stage, "A stage", replace(cfg, **changes), lambda _: talk)
        return find_checkpoint(stage)[1].load_weights(torch.device("cpu"))

    whole = weights("mid", num_iterations=5, moments=True)
    assert "sft/d2/step_000003 has no optimizer state" in capsys.readouterr().out
    weights("mid", num_iterations=3)
    for moments in (True, False):
        halves = weights("rl", num_iterations=2, source="mid", moments=moments)
        assert all(torch.equal(halves[name], whole[name]) for name in whole) == moments


def test_rates_fall_from_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_chat_model(tmp_path, monkeypatch)
    talk = [conversation("?" * 20, "ab" * 8)] * 2
    finetune("mid", "Midtraining", CFG, lambda _: talk)
    rates = [record["lrm"] for record in read_metrics(run_dir("mid", "d2"))[1:]]
    assert rates == pytest.approx([1, 2 / 3, 1 / 3])


def test_what_can_be_refused_is_so_before_a_data_set_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(stage: str) -> list[Conversation]:
        pytest.fail(f"fetched {stage}")

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "empty"))
    away = replace(CFG, source="base")
    refuses("no checkpoint in .*base_train", finetune, "mid", "Midtraining", away, fetch)
    save_chat_model(tmp_path, monkeypatch)
    for changes, said in (
        ({"total_batch_size": 250}, "not a multiple of --max_seq_len=64"),
        ({"device_batch_size": 3}, "--device_batch_size=2 or --device_batch_size=4"),
        ({"model_tag": "d9"}, "no model tag d9"),
        ({"step": 9}, "no step 9"),
    ):
        refuses(said, finetune, "mid", "Midtraining", replace(CFG, **changes), fetch)
    finetune("mid", "Midtraining", CFG, lambda _: [conversation("?" * 20, "ab" * 8)] * 2)
    finetune("mid", "Midtraining", replace(CFG, fresh=False), fetch)  # is finished
    for changes, said in (({"task": "GSM9K"}, "GSM9K' is unknown"), ({"step": 9}, "no step 9")):
        cfg = replace(chat_rl.Config(device_type="cpu"), **changes)
        refuses(said, chat_rl.main, cfg)
    monkeypatch.setenv("NANOCHAT_DATASETS", "/nowhere")
    refuses("no step 9", chat_eval.main, chat_eval.Config(step=9, device_type="cpu"))
