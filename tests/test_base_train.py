"""scripts.base_train: stopped at any step and started again, a run ends as if it had not been."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanochat import dataset
from nanochat.checkpoint import list_steps
from nanochat.common import UserError, run_dir
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.trainer import Run, read_metrics
from scripts import base_train, tok_train

TINY = base_train.Config(
    depth=2, aspect_ratio=16, head_dim=16, max_seq_len=32, total_batch_size=256,
    device_batch_size=4, num_iterations=9, eval_every=4, eval_tokens=256, sample_every=-1,
    save_every=3, log_every=2, device_type="cpu",
)  # fmt: skip


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small corpus and its tokenizer."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    dataset.main(dataset.Config(corpus="primer", num_documents=120))
    tok_train.main(tok_train.Config(vocab_size=300))
    return tmp_path


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies before the update of `step` is counted."""
    advance = Run.advance

    def dying(run: Run, progress: float) -> None:
        if run.step == step:
            raise KeyboardInterrupt
        advance(run, progress)

    monkeypatch.setattr(Run, "advance", dying)


@pytest.mark.parametrize("stops", [[1], [3, 5], [8]])
def test_resumed_equals_uninterrupted(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, stops: list[int]
) -> None:
    base_train.main(replace(TINY, model_tag="whole"))
    for step in stops:
        with monkeypatch.context() as patch:
            stop_at(step, patch)
            with pytest.raises(KeyboardInterrupt):
                base_train.main(replace(TINY, model_tag="pieces"))
    base_train.main(replace(TINY, model_tag="pieces"))

    whole, pieces = run_dir("base", "whole"), run_dir("base", "pieces")
    assert list_steps(whole) == list_steps(pieces) == [3, 6, 9]
    for name in ("model.safetensors", "optimizer_00000.safetensors"):
        expected, found = (
            load_file(whole / "step_000009" / name),
            load_file(pieces / "step_000009" / name),
        )
        assert expected.keys() == found.keys()
        assert all(expected[key].equal(found[key]) for key in expected), name
    lanes = [(run / "step_000009" / "rank_00000.json").read_text() for run in (whole, pieces)]
    assert lanes[0] == lanes[1]
    curves = [
        [(r["step"], r["tokens"], r.get("loss"), r.get("val_bpb")) for r in read_metrics(run)]
        for run in (whole, pieces)
    ]
    assert curves[0] == curves[1]
    assert [step for step, *_, bpb in curves[0] if bpb is not None] == [0, 4, 8, 9]


def test_a_finished_run_says_so_and_other_settings_are_refused(
    prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base_train.main(TINY)
    losses = [record["loss"] for record in read_metrics(run_dir("base", "d2"))[1:]]
    assert len(losses) == 9 and losses[-1] < losses[0]
    capsys.readouterr()
    base_train.main(TINY)
    assert "is finished (step 9)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--num_iterations was 9, is 12"):
        base_train.main(replace(TINY, num_iterations=12))


def test_what_is_missing_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "new"))
    with pytest.raises(UserError, match="python -m nanochat.dataset"):
        base_train.main(TINY)
    dataset.main(dataset.Config(corpus="primer", num_documents=20))
    with pytest.raises(UserError, match="python -m scripts.tok_train"):
        base_train.main(TINY)
    assert not (tmp_path / "new" / "base").exists()


def test_a_run_keeps_its_tokenizer_when_torchrun_repeats_a_fresh_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tokenizers = [Tokenizer.train(["the hen the hen"], size, SPECIAL_TOKENS) for size in (266, 267)]
    tokenizers[0].save(tmp_path / "base/d2/tokenizer")
    (tmp_path / "base/d2/step_000001").mkdir()
    tokenizers[1].save(tmp_path / "tokenizer")  # trained since, for another run
    for restarts, fresh, size in (("0", False, 266), ("0", True, 267), ("1", True, 266)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        assert base_train.load_tokenizer(replace(TINY, fresh=fresh), "d2").vocab_size == size
