"""nanochat.checkpoint: what is saved comes back bit for bit; what is damaged is never loaded."""

import json
import os
import random
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import checkpoint
from nanochat.common import CheckpointFlags, run_dir, write_file
from nanochat.gpt import GPT, GPTConfig
from nanochat.scaling import make_optimizer
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.models import CPU, refuses

CONFIG = GPTConfig(
    sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL"
)


@pytest.fixture
def run(base: Path) -> Path:
    return run_dir("base", "d2")


def save(run: Path, step: int, model: GPT, loader: dict[str, Any] | None = None) -> Path:
    loader = loader or {"documents": 3}
    moments = make_optimizer(model, 64, 10).export_state()
    state = state_of(step, model)
    return checkpoint.save_checkpoint(run, state, model.state_dict(), moments, loader, CPU)


def state_of(step: int, model: GPT) -> dict[str, Any]:
    return {"step": step, "model_config": asdict(model.config)}


def new_model(seed: int = 0) -> GPT:
    return checkpoint.build_model(CONFIG, None, CPU, seed)


def test_everything_comes_back(run: Path) -> None:
    model = new_model(seed=3)
    loader = {"documents": 7, "lanes": [{"lane": 0, "documents": 7, "pieces": [[1, 2]]}]}
    save(run, 20, model, loader)
    loaded = checkpoint.open_checkpoint(run, 20)
    assert loaded.model_config == CONFIG
    again = checkpoint.build_model(loaded.model_config, loaded.load_weights(CPU.device), CPU)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    moments = make_optimizer(model, 64, 10).export_state()
    read = loaded.open_optimizer()
    for key, part in moments.items():
        assert torch.equal(read(key, part.first, part.first + len(part.values)), part.values)
    assert loaded.load_loader_state(0, 1) == loader


@torch.no_grad()
def test_tables_of_16_bits_begin_come_back_and_change_like_wide_ones(run: Path) -> None:
    wide, thin = new_model(3), checkpoint.build_model(CONFIG, None, CPU, 3, "bfloat16")
    for name, tensor in thin.state_dict().items():
        is_table = name.startswith(("wte", "value_embeds"))
        assert tensor.dtype == (torch.bfloat16 if is_table else torch.float32)
        assert torch.equal(tensor, wide.state_dict()[name].to(tensor.dtype)), name
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(thin(ids, ids), wide(ids, ids), rtol=1e-3, atol=0)
    save(run, 20, thin)
    loaded = checkpoint.open_checkpoint(run, 20)
    wide.load_state_dict(loaded.load_weights(CPU.device))
    assert torch.equal(thin(ids), wide(ids))
    make_optimizer(wide, 64, 10).import_state(loaded.open_optimizer())


@torch.inference_mode()
def test_weights_are_narrow_for_inference_and_wide_for_training(run: Path) -> None:
    model = new_model()
    for weight in model.parameters():
        weight.normal_(0, 0.2)
    save(run, 20, model)
    Tokenizer.train(["the hen"], 300, SPECIAL_TOKENS).save(run / "tokenizer")
    narrow = replace(CPU, dtype=torch.bfloat16)
    chosen = CheckpointFlags("base", "d2", 20)
    wide, thin = (checkpoint.load_model(chosen, narrow, train)[0] for train in (True, False))
    assert {weight.dtype for weight in wide.parameters()} == {torch.float32}
    assert {weight.dtype for weight in thin.parameters()} == {torch.bfloat16}
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(wide(ids), thin(ids)) and torch.equal(wide(ids, ids), thin(ids, ids))


def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """100 cases: each file cut at some places, with a bit flipped at some, or gone."""
    save(run, 10, new_model())
    folder = save(run, 20, new_model())
    whole = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    assert len(whole) == 5
    places = random.Random(0)
    for case in range(100):
        path = list(whole)[case % len(whole)]
        place = places.randrange(len(whole[path]))
        flipped = bytes([whole[path][place] ^ 1 << places.randrange(8)])
        if case < len(whole):
            path.unlink()
        elif case % 2:
            path.write_bytes(whole[path][:place])
        else:
            path.write_bytes(whole[path][:place] + flipped + whole[path][place + 1 :])
        newest = checkpoint.newest_checkpoint(run)
        assert newest is not None and newest.state["step"] == 10, (case, path)
        said = capsys.readouterr().out
        named = path.name in said or path.name == "manifest.json"
        assert named and "step_000020" in said and "trying the one before" in said, said
        if case < 15:
            refuses("use --step=10", checkpoint.find_checkpoint, "base", "d2", 20)
        path.write_bytes(whole[path])
    newest = checkpoint.newest_checkpoint(run)
    assert newest is not None and newest.state["step"] == 20
    assert {path.stat().st_mode & 0o777 for path in whole} == {0o644}, "another user reads them"
    for step in (10, 20):  # all are damaged: none is advised, and none overwritten
        (run / f"step_{step:06d}" / "model.safetensors").write_bytes(b"")
    refuses("all checkpoints .* are damaged; use --fresh", checkpoint.newest_checkpoint, run)
    said = refuses("base_train --fresh`", checkpoint.find_checkpoint, "base", "d2", 20)
    assert "--step" not in said


def test_strays_are_passed_over_and_what_a_killed_process_left_is_cleared(run: Path) -> None:
    left = ("step_001001.partial", "step_000005.deleted", "step_000010.partial")
    for stray in (*left, "step_002000_backup", "step_x", "tokenizer"):
        (run / stray).mkdir(parents=True)
        (run / stray / "model.safetensors").write_text("half")
    (run / "step_003000").write_text("a file")
    for step in (10, 1000, 1_000_000):
        folder = save(run, step, new_model())
        names = ["model.safetensors", "optimizer_00000.safetensors", "rank_00000.json"]
        assert sorted(json.loads((folder / "manifest.json").read_text())) == [*names, "state.json"]
    assert checkpoint.list_steps(run) == [10, 1000, 1_000_000]
    checkpoint.clear_strays(run)
    kept = {path.name for path in run.iterdir()}
    assert not kept & set(left) and {"step_002000_backup", "tokenizer", "step_000010"} <= kept


def test_what_is_not_there_is_told_with_its_mend(run: Path) -> None:
    refuses("run `python -m scripts.base_train`", checkpoint.find_checkpoint, "base")
    save(run, 10, new_model())
    refuses(r"no model tag d9 .*there: d2", checkpoint.find_checkpoint, "base", "d9")
    refuses("no step 11", checkpoint.find_checkpoint, "base", "d2", 11)


def test_an_evaluation_does_not_make_a_run_the_one_written_last(run: Path) -> None:
    newer = run.with_name("new")
    for seconds, (folder, step) in enumerate([(run, 90), (newer, 10), (newer, 20)]):
        os.utime(save(folder, step, new_model()) / "manifest.json", (seconds, seconds))
    assert checkpoint.find_checkpoint("base")[0] == newer
    write_file(run / "base_eval.jsonl", "{}\n")
    assert checkpoint.find_checkpoint("base")[0] == newer
    (newer / "step_000020" / "manifest.json").unlink()  # damaged, and still the one written last
    refuses("new/step_000020 is incomplete.*use --step=10", checkpoint.find_checkpoint, "base")


def test_training_goes_on_while_a_checkpoint_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is what was there at `start`; the next save waits; older checkpoints are
    deleted.
    """
    model = new_model()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = make_optimizer(model, 64, 10).export_state()
    disk, write_tensors = threading.Event(), checkpoint.write_tensors

    def slow(*arguments: Any) -> None:
        assert disk.wait(60)
        write_tensors(*arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    writer = checkpoint.CheckpointWriter(run, 2, CPU)
    writer.start(state_of(1, model), model.state_dict(), moments, lambda: None)
    assert checkpoint.list_steps(run) == []
    with torch.no_grad():
        for tensor in [*model.parameters(), *(part.values for part in moments.values())]:
            tensor.fill_(7)
    disk.set()
    for step in (2, 3):
        writer.start(state_of(step, model), model.state_dict(), moments, lambda: None)
        assert checkpoint.list_steps(run)[-1] == step - 1
        if step == 2:
            saved = checkpoint.open_checkpoint(run, 1)
            for name, tensor in saved.load_weights(CPU.device).items():
                assert torch.equal(tensor, expected[name])
            assert not saved.open_optimizer()("lm_head.weight.mean", 0, 100).any()
    writer.wait()
    assert checkpoint.list_steps(run) == [2, 3]


@pytest.mark.parametrize("refusing", ["write_tensors", "write_file", "fsync", "file_digest"])
def test_a_disk_that_refuses_is_told_by_the_next_save(
    run: Path, monkeypatch: pytest.MonkeyPatch, refusing: str
) -> None:
    model = new_model()
    writer = checkpoint.CheckpointWriter(run, 3, CPU)
    arguments = (model.state_dict(), make_optimizer(model, 64, 10).export_state(), lambda: None)
    writer.start(state_of(10, model), *arguments)
    writer.wait()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, refusing, full)
    writer.start(state_of(20, model), *arguments)
    told = r"cannot save.*No space left.*are intact"
    refuses(told, writer.start, state_of(30, model), *arguments)
    monkeypatch.undo()
    assert checkpoint.list_steps(run)[0] == 10 and not list(run.glob("*.partial"))
    checkpoint.open_checkpoint(run, 10)


def test_moments_that_are_not_all_there_are_told(run: Path) -> None:
    save(run, 10, new_model())
    read = checkpoint.open_checkpoint(run, 10).open_optimizer()
    refuses(r"lacks elements 0 to 3 of nothing\.mean", read, "nothing.mean", 0, 3)
    refuses(r"lacks elements .* of lm_head\.weight\.mean", read, "lm_head.weight.mean", 0, 10**6)
