"""scripts.base_train: stopped at any step and started again, a run ends as if it had not been."""

from dataclasses import replace
from pathlib import Path

import pytest

from nanochat import dataset
from nanochat.checkpoint import list_steps
from nanochat.common import run_dir
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.trainer import Run, read_metrics
from scripts import base_train
from tests.models import refuses

TINY = base_train.Config(
    depth=2, aspect_ratio=16, head_dim=16, max_seq_len=32, total_batch_size=256,
    device_batch_size=4, num_iterations=9, eval_every=4, eval_tokens=256, sample_every=-1,
    save_every=3, log_every=2, device_type="cpu",
)  # fmt: skip


def test_resumed_equals_uninterrupted(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_train.main(replace(TINY, model_tag="whole"))
    pieces = replace(TINY, model_tag="pieces")
    advance = Run.advance
    for last in (1, 5, 8):  # before the first save, and after the first and the second

        def dying(run: Run, progress: float, last: int = last) -> None:
            if run.step == last:
                raise KeyboardInterrupt
            advance(run, progress)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Run, "advance", dying)
            base_train.main(pieces)
    base_train.main(pieces)

    runs = [run_dir("base", tag) for tag in ("whole", "pieces")]
    assert [list_steps(run) for run in runs] == [[3, 6, 9]] * 2
    for name in ("model.safetensors", "optimizer_00000.safetensors", "rank_00000.json"):
        whole, resumed = ((run / "step_000009" / name).read_bytes() for run in runs)
        assert whole == resumed, name
    keys = ("step", "tokens", "loss", "val_bpb")
    whole, resumed = ([[r.get(key) for key in keys] for r in read_metrics(run)] for run in runs)
    assert whole == resumed
    assert [step for step, *_, bpb in whole if bpb is not None] == [0, 4, 8, 9]


def test_what_is_missing_is_told_before_anything_is_written(base: Path) -> None:
    refuses("python -m nanochat.dataset", base_train.main, TINY)
    dataset.main(dataset.Config(corpus="primer", num_documents=20))
    refuses("python -m scripts.tok_train", base_train.main, TINY)
    assert not (base / "base").exists()


def test_a_run_keeps_its_tokenizer_when_torchrun_repeats_a_fresh_start(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizers = [Tokenizer.train(["the hen the hen"], size, SPECIAL_TOKENS) for size in (266, 267)]
    tokenizers[0].save(base / "base/d2/tokenizer")
    (base / "base/d2/step_000001").mkdir()
    tokenizers[1].save(base / "tokenizer")  # trained since, for another run
    for restarts, fresh, size in (("0", False, 266), ("0", True, 267), ("1", True, 266)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        assert base_train.load_tokenizer(replace(TINY, fresh=fresh), "d2").vocab_size == size
