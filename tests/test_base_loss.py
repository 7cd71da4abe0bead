"""scripts.base_loss: one figure, whatever fits the device."""

import json
from pathlib import Path

import pytest

from nanochat import dataset
from nanochat.common import report_dir, tokenizer_dir
from nanochat.tokenizer import Tokenizer
from scripts.base_loss import Config, main
from tests.models import random_gpt, save_model


def test_bits_per_byte_do_not_depend_on_the_device_batch_size(base_dir: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_dir())
    model = random_gpt(64, tokenizer.vocab_size, head_std=0.3)
    save_model(model, "base", "d1", 3, tokenizer, config={"corpus": "primer"})
    (base_dir / "texts").mkdir()
    (base_dir / "texts" / "a.jsonl").write_text('{"text": "another corpus"}\n' * 9)
    dataset.main(dataset.Config(source=base_dir / "texts"))  # the one prepared last
    measured = []
    for rows in (1, 8, 128):
        main(Config(eval_tokens=4096, device_batch_size=rows, device_type="cpu"))
        section = json.loads((report_dir() / "base_loss.json").read_text())
        place = {"model_tag": "d1", "step": 3, "data": "primer"}
        assert place.items() <= section["settings"].items()
        measured.append([section["results"][f"{split}_bpb"] for split in ("train", "val")])
    assert measured[1] == pytest.approx(measured[0], rel=1e-6)
    assert measured[2] == pytest.approx(measured[0], rel=1e-6)
