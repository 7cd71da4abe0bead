"""nanochat.checkpoint: what is saved comes back bit for bit, and what is damaged is never loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import checkpoint
from nanochat.gpt import GPT, GPTConfig
from nanochat.paths import UserError, run_dir
from nanochat.runtime import Runtime
from nanochat.scaling import make_optimizer

CPU = Runtime(torch.device("cpu"), torch.float32, 0, 1, "cpu")
CONFIG = GPTConfig(
    sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL"
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return run_dir("base", "d2")


def save(run: Path, step: int, model: GPT, loader: dict[str, Any] | None = None) -> Path:
    optimizer = make_optimizer(model, 64, 10)
    state = {"step": step, "model_config": checkpoint.config_dict(model.config)}
    return checkpoint.save_checkpoint(
        run, state, model.state_dict(), optimizer.export_state(), loader, CPU
    )


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
    assert loaded.load_optimizer(CPU.device).keys() == moments.keys()
    assert loaded.load_loader_state() == loader


def test_steps_are_numbers_and_strays_are_passed_over(run: Path) -> None:
    for step in (999, 1000, 1_000_000):
        save(run, step, new_model())
    for stray in ("step_001001.partial", "step_002000_backup", "step_x", "tokenizer"):
        (run / stray).mkdir()
    (run / "step_003000").write_text("a file")
    assert checkpoint.list_steps(run) == [999, 1000, 1_000_000]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "state.json", "optimizer_00000.safetensors", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    run: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(run, 10, new_model())
    path = save(run, 20, new_model()) / name
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(UserError, match="use --step=10"):
        checkpoint.find_checkpoint("base", "d2", 20)
    newest = checkpoint.newest_checkpoint(run)
    assert newest is not None and newest.state["step"] == 10
    said = capsys.readouterr().out
    assert "step_000020" in said and "trying the one before" in said


def test_saving_again_replaces_a_partial_folder(run: Path) -> None:
    partial = run / "step_000010.partial"
    partial.mkdir(parents=True)
    (partial / "half.written").write_text("x")
    folder = save(run, 10, new_model())
    assert not partial.exists()
    assert set(json.loads((folder / "manifest.json").read_text())) == {
        "model.safetensors",
        "optimizer_00000.safetensors",
        "state.json",
    }


def test_what_is_not_there_is_told_with_its_mend(run: Path) -> None:
    with pytest.raises(UserError, match="run `python -m scripts.base_train`"):
        checkpoint.find_checkpoint("base")
    with pytest.raises(UserError, match="--source=basis is unknown"):
        checkpoint.find_checkpoint("basis")
    save(run, 10, new_model())
    with pytest.raises(UserError, match=r"no model tag d9 .*there: d2"):
        checkpoint.find_checkpoint("base", "d9")
    with pytest.raises(UserError, match="no step 11"):
        checkpoint.find_checkpoint("base", "d2", 11)


def test_a_disk_that_refuses_leaves_the_old_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 10, new_model())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(UserError, match="No space left"):
        save(run, 20, new_model())
    assert checkpoint.list_steps(run) == [10]
    checkpoint.open_checkpoint(run, 10)
