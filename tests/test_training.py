"""nanochat.training: accumulation equals one big batch, sizes that do not divide are told, a run folder is one's own."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import trainer
from nanochat.checkpoint import build_model
from nanochat.common import Runtime, UserError
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.trainer import read_metrics

CPU = Runtime(torch.device("cpu"), torch.float32, 0, 1, "cpu")
CONFIG = GPTConfig(sequence_len=8, vocab_size=50, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


def new_model() -> GPT:
    model = build_model(CONFIG, None, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # no zero matrices: they would hide differences
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def new_batch() -> Batch:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 50, (4, 9), generator=generator)
    targets = ids[:, 1:].clone()
    targets[0, :5] = targets[2, 3:] = targets[3] = -1  # rows of unequal weight, one of none
    return Batch(ids[:, :-1], targets, int((targets >= 0).sum()))


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [1, 2])
def test_accumulation_equals_one_big_batch(rows: int) -> None:
    model, batch = new_model(), new_batch()
    model(batch.inputs, batch.targets).backward()
    expected = gradients(model)
    model.zero_grad()
    loss = trainer.accumulate(model, batch, rows, 1)
    with torch.no_grad():
        torch.testing.assert_close(loss, model(batch.inputs, batch.targets))
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_weights_multiply_each_targets_loss() -> None:
    model, batch = new_model(), new_batch()
    weights = torch.randn(batch.targets.shape, generator=torch.Generator().manual_seed(3))
    losses = model(batch.inputs, batch.targets, reduction="none").view_as(weights)
    expected = (losses * weights)[batch.targets >= 0].sum() / batch.num_targets
    loss = trainer.accumulate(model, batch, 2, 1, weights)
    torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize(("device_batch_size", "expected"), [(8, 8), (16, 8), (4, 4), (1, 1)])
def test_rows_per_micro_batch(device_batch_size: int, expected: int) -> None:
    assert trainer.split_rows(8, device_batch_size, 1) == expected


def test_sizes_that_do_not_divide_name_the_nearest() -> None:
    with pytest.raises(UserError, match="--device_batch_size=4 or --device_batch_size=6"):
        trainer.split_rows(12, 5, 1)
    with pytest.raises(UserError, match="does not divide among 5 ranks"):
        trainer.split_rows(12, 4, 5)
    with pytest.raises(UserError, match="use 512 or 1024"):
        trainer.batch_rows(1000, 512)
    with pytest.raises(UserError, match="use 512"):
        trainer.batch_rows(100, 512)


def test_due() -> None:
    assert [step for step in range(7) if trainer.due(step, 3, step == 5)] == [0, 3, 5, 6]
    assert [step for step in range(7) if trainer.due(step, -1, step == 6)] == [6]


def settings(**changes: Any) -> dict[str, Any]:
    return {"fresh": False, "run": "dummy", "log_every": 1, "seed": 0, **changes}


def test_a_run_folder_belongs_to_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with (
        trainer.TrainRun("base", "d2", settings(), CPU),
        pytest.raises(UserError, match="being trained in by process"),
    ):
        trainer.TrainRun("base", "d2", settings(), CPU)
    with trainer.TrainRun("base", "d2", settings(), CPU) as run:
        assert not run.finished


SAVED = {"seed": 0, "num_slots": 64, "weights": "a1", "corpus": "primer", "data": "", "gone": 7}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"num_slots": 32, "eval_problems": 9, "eval_samples": 1}, None),
        ({"source": "mid", "model_tag": "d2", "step": 300}, None),  # the same weights
        ({"data": "primer"}, None),  # the same corpus, by its name
        ({"corpus": "mine"}, r"--data was primer, is mine\)"),  # the one prepared last is another
        ({"weights": "b2"}, "the model that it starts from was a1, is b2"),
        ({"seed": 1, "came": 2}, r"\(--seed was 0, is 1\); use those, or --fresh"),
        ({"came": 2}, None),
    ],
)
def test_settings_that_a_run_may_go_on_with(
    now: dict[str, Any], said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    present = {name: value for name, value in SAVED.items() if name != "gone"}
    with trainer.TrainRun("base", "d2", settings(**present | now), CPU) as run:
        if said is None:
            trainer.check_settings(run, SAVED)
        else:
            with pytest.raises(UserError, match=said):
                trainer.check_settings(run, SAVED)


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
        assert trainer.load_tokenizer("base", "d2", fresh).vocab_size == size


class NoTokenizer:
    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)


def test_records_line_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three updates, a save after the second: the file is cut back, and each step stands in it once."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    from nanochat.scaling import make_optimizer

    model = new_model()
    optimizer = make_optimizer(model, 32, 4)
    optimizer.export_state()

    def open_run(**changes: Any) -> trainer.TrainRun:
        run = trainer.TrainRun("base", "d2", settings(**changes), CPU)
        run.begin(model, NoTokenizer())  # pyright: ignore[reportArgumentType]
        return run

    def update(run: trainer.TrainRun) -> None:
        run.start_clock()
        run.update(torch.tensor(1.5), 0.5, (run.step + 1) / 4, 32)

    with open_run() as run:
        assert gc.get_freeze_count() > 0
        run.note(val_bpb=3.0)
        update(run)
        update(run)
        run.save(model, optimizer, None)
        run.note(val_bpb=2.0)
        update(run)
    assert gc.get_freeze_count() == 0
    assert "step 00003/00004 (75.0%) | loss 1.5000 | lrm 0.500" in capsys.readouterr().out
    assert [record["step"] for record in read_metrics(run.folder)] == [0, 1, 2]
    with pytest.raises(UserError, match=r"--seed was 0, is 1.*--fresh"):
        open_run(seed=1)
    with open_run(log_every=2) as run:  # what does not change the weights may differ
        assert (run.step, run.tokens) == (2, 64)
        run.note(val_bpb=2.0)
        update(run)
        update(run)
        run.finish()
    records = read_metrics(run.folder)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert records[0]["val_bpb"] == 3.0 and records[2]["val_bpb"] == 2.0
    assert {"step", "tokens", "seconds", "loss", "lrm", "tok_per_second", "mfu"} <= records[
        4
    ].keys()
    with trainer.TrainRun("base", "d2", settings(), CPU) as run:
        assert run.finished
    (run.folder / ".fresh").touch()  # stages.sh asks for --fresh as long as it is there
    with trainer.TrainRun("base", "d2", settings(fresh=True), CPU) as run:
        assert not run.finished and run.step == 0 and not (run.folder / ".fresh").exists()
