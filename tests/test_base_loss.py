"""scripts.base_loss: one figure, whatever fits the device."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from nanochat import dataset
from nanochat.checkpoint import build_model, save_checkpoint
from nanochat.common import Runtime, report_dir, run_dir, tokenizer_dir
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import Tokenizer
from scripts.base_loss import Config, main
from tests.launch import prepare

CPU = Runtime(torch.device("cpu"), torch.float32, 0, 1, "cpu")


def test_bits_per_byte_do_not_depend_on_the_device_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    prepare()
    tokenizer = Tokenizer.load(tokenizer_dir())
    config = GPTConfig(
        sequence_len=64,
        vocab_size=tokenizer.vocab_size,
        n_layer=1,
        n_head=1,
        n_kv_head=1,
        n_embd=32,
    )
    model = build_model(config, None, CPU)
    torch.nn.init.normal_(model.lm_head.weight, 0, 0.3)  # else every token is as likely
    state = {"step": 3, "model_config": asdict(config), "config": {"corpus": "primer"}}
    save_checkpoint(run_dir("base", "d1"), state, model.state_dict(), {}, None, CPU)
    tokenizer.save(run_dir("base", "d1") / "tokenizer")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text('{"text": "another corpus"}\n' * 9)
    dataset.main(dataset.Config(source=tmp_path / "texts"))  # the one prepared last
    measured = []
    for rows in (1, 8, 128):
        main(Config(eval_tokens=4096, device_batch_size=rows, device_type="cpu"))
        section = json.loads((report_dir() / "base_loss.json").read_text())
        place = {"model_tag": "d1", "step": 3, "data": "primer"}
        assert place.items() <= section["settings"].items()
        measured.append([section["results"][f"{split}_bpb"] for split in ("train", "val")])
    assert measured[1] == pytest.approx(measured[0], rel=1e-6)
    assert measured[2] == pytest.approx(measured[0], rel=1e-6)
