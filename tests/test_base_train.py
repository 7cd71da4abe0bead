"""scripts.base_train: stopped at any step and started again, a run ends as if it had not been."""

from dataclasses import replace
from pathlib import Path

import pytest

from nanochat import dataset, scaling
from nanochat.checkpoint import list_steps
from nanochat.common import run_dir
from nanochat.dataset import find_corpus, read_texts
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.trainer import Run, read_metrics
from scripts import base_train
from tests.models import refuses

TINY = base_train.Config(
    depth=2, aspect_ratio=16, head_dim=16, max_seq_len=32, total_batch_size=256,
    device_batch_size=4, num_iterations=9, eval_every=4, eval_tokens=256, sample_every=-1,
    save_every=3, log_every=2, device_type="cpu",
)  # fmt: skip


def die_after(last: int, cfg: base_train.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until step `last` would be counted."""
    advance = Run.advance

    def dying(run: Run, progress: float) -> None:
        if run.step == last:
            raise KeyboardInterrupt
        advance(run, progress)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "advance", dying)
        base_train.main(cfg)


def test_resumed_equals_uninterrupted(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base_train.main(replace(TINY, model_tag="whole"))
    pieces = replace(TINY, model_tag="pieces")
    for last in (1, 5, 8):  # before the first save, and after the first and the second
        die_after(last, pieces, monkeypatch)
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


def curve(tag: str, key: str) -> list[float]:
    return [record[key] for record in read_metrics(run_dir("base", tag))[1:]]


def weights(tag: str) -> bytes:
    run = run_dir("base", tag)
    return (run / f"step_{list_steps(run)[-1]:06d}" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("ended_at", "rises_at"), [(3, 0), (6, 6), (9, 9)])
def test_a_run_goes_on_to_a_later_end(
    ended_at: int, rises_at: int, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 9 steps the rate falls from the fourth on. Killed in the longer part: the same bits."""
    longer = replace(TINY, num_iterations=20, extend=True)
    for tag in ("whole", "pieces"):
        cfg, goes_on = replace(TINY, model_tag=tag), replace(longer, model_tag=tag)
        if ended_at == 9:
            base_train.main(cfg)
        else:
            die_after(ended_at, cfg, monkeypatch)
        refuses(
            "--num_iterations was 9, is 20.*--extend to train on to another end",
            base_train.main, replace(goes_on, extend=False),
        )  # fmt: skip
        for last in (ended_at + 1, ended_at + 4) if tag == "pieces" else ():
            die_after(last, goes_on, monkeypatch)  # before the longer part's first save, and after
        base_train.main(goes_on)
    assert weights("whole") == weights("pieces")
    assert curve("whole", "loss") == curve("pieces", "loss") and len(curve("whole", "loss")) == 20
    oracle = scaling.Schedule(256, 20 - rises_at, 1)
    rates = [oracle.multipliers(step)[0] for step in range(20 - rises_at)]
    assert curve("whole", "lrm")[max(rises_at, ended_at) :] == pytest.approx(
        rates[ended_at - rises_at :]
    )
    before = replace(longer, model_tag="whole", num_iterations=15)
    refuses("to end at step 20, which is later than 15", base_train.main, before)
    base_train.main(replace(longer, model_tag="whole"))  # is finished
    assert len(curve("whole", "loss")) == 20


def test_a_model_is_trained_further_on_other_text(
    base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base_train.main(replace(TINY, model_tag="d2"))
    texts = [f"The {n}th bell rang {n} times over the harbour town." for n in range(300)]
    (tmp_path / "bells.txt").write_text("\n\n".join(texts))
    dataset.main(dataset.Config(source=tmp_path / "bells.txt"))
    further = base_train.Config(
        source="base", model_tag="d2", data="bells", total_batch_size=256, device_batch_size=4,
        eval_every=4, eval_tokens=256, sample_every=-1, save_every=3, device_type="cpu",
    )  # fmt: skip
    before = weights("d2")
    base_train.main(further)
    records = read_metrics(run_dir("base", "d2-bells"))
    assert records[-1]["val_bpb"] < 0.8 * records[0]["val_bpb"] and weights("d2") == before
    num_tokens = sum(
        len(Tokenizer.load(base_dir / "tokenizer").encode(text))
        for text in read_texts(find_corpus("bells").train)
    )
    assert records[-1]["tokens"] == pytest.approx(base_train.PASSES * num_tokens, rel=0.1)
    base_train.main(further)
    assert "d2-bells is finished" in capsys.readouterr().out
    base_train.main(replace(further, data="primer", num_iterations=2, new_tag="again"))
    model_before = read_metrics(run_dir("base", "d2"))[-1]["val_bpb"]
    assert read_metrics(run_dir("base", "again"))[0]["val_bpb"] == pytest.approx(model_before)
    refuses("--depth goes with a new model", base_train.main, replace(further, depth=3))
    refuses("no model tag d7", base_train.main, replace(further, model_tag="d7"))
    itself = replace(further, new_tag="d2", fresh=True)
    refuses("--new_tag=d2 is the model that -i names", base_train.main, itself)
    refuses("--new_tag and --step go with -i", base_train.main, replace(itself, source=""))
    assert weights("d2") == before


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
