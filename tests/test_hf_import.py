"""Imports: checkpoints in the first generation's layout; damaged, hostile ones; our own exports."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch

from nanochat.checkpoint import build_model, load_model, save_checkpoint
from nanochat.common import Runtime, UserError, base_dir, run_dir
from nanochat.finetuning import finetune
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.trainer import read_metrics
from scripts import chat_cli, chat_sft, export_hf
from scripts.import_hf import Config, main

CPU = Runtime(torch.device("cpu"), torch.float32, 0, 1, "cpu")
TOKENIZER = Tokenizer.train(["The hen sat on the hay; the hat is on the hen."], 300, SPECIAL_TOKENS)
SIZES: dict[str, Any] = {"sequence_len": 64, "vocab_size": TOKENIZER.vocab_size}
SIZES |= {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64}


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    model, random = build_model(config, None, CPU), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=random) * 0.2)
    return model.eval()


def pickled(**changes: Any) -> bytes:
    """tokenizer.pkl as the first generation wrote it: the Encoding itself."""
    tokens = [TOKENIZER.decode_bytes([id]) for id in range(TOKENIZER.bos_id)]
    parts = {
        "pat_str": TOKENIZER.pattern,
        "mergeable_ranks": {token: rank for rank, token in enumerate(tokens)},
        "special_tokens": TOKENIZER.specials,
    }
    return pickle.dumps(tiktoken.Encoding("rustbpe", **(parts | changes)))


def write_first_generation(folder: Path, step: int = 700, prefix: str = "", seed: int = 0) -> GPT:
    """A first-generation checkpoint, its embedding in bf16; returns the model that it holds."""
    model = random_model(GPTConfig.plain(**SIZES), seed)
    rows, tensors = TOKENIZER.vocab_size, {}
    for name, tensor in model.state_dict().items():
        theirs = name if name.startswith("lm_head") else f"transformer.{name}"
        tensor = tensor[:rows] if name in ("wte.weight", "lm_head.weight") else tensor
        if name == "wte.weight":
            tensor = tensor.bfloat16()
            model.wte.weight.data[:rows] = tensor.float()
        tensors[prefix + theirs.replace("blocks", "h")] = tensor.clone()
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / f"model_{step:06d}.pt")
    meta = {"step": step, "val_bpb": 0.9, "model_config": SIZES, "user_config": {"depth": 2}}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    (folder / "tokenizer.pkl").write_bytes(pickled())
    torch.save(torch.tensor(TOKENIZER.token_bytes()), folder / "token_bytes.pt")
    return model


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_the_first_generation_loads_and_talks(
    prefix: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = write_first_generation(base / "d2", 700, prefix)
    older = write_first_generation(base / "d2", 90, prefix, seed=1)
    main(Config(str(base / "d2")))
    main(Config(str(base / "d2"), stage="base", model_tag="old", step=90))
    ids = torch.randint(0, TOKENIZER.bos_id, (2, 40), generator=torch.Generator().manual_seed(0))
    for stage, tag, step, model in (("sft", "d2", 700, newest), ("base", "old", 90, older)):
        loaded, tokenizer, meta = load_model(stage, tag, None, CPU)
        assert meta["step"] == step and meta["model_tag"] == tag
        with torch.inference_mode():
            assert torch.equal(loaded(ids), model(ids))
        text = "The hen's hat <|bos|> 2024 日本"
        assert tokenizer.encode(text) == TOKENIZER.encode(text)
        assert tokenizer.specials == TOKENIZER.specials
    capsys.readouterr()
    chat_cli.main(chat_cli.Config(prompt="The hen", max_tokens=8, device_type="cpu"))
    assert capsys.readouterr().out.strip()


class Malice:
    """Leaves a file behind when it is unpickled as usual."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_tensors(folder: Path, **changes: Any) -> None:
    path = folder / "model_000700.pt"
    tensors = torch.load(path, weights_only=True) | changes
    torch.save({name: value for name, value in tensors.items() if value is not None}, path)


def change_meta(folder: Path, **changes: Any) -> None:
    meta = {"model_config": {k: v for k, v in (SIZES | changes).items() if v is not None}}
    (folder / "meta_000700.json").write_text(json.dumps(meta))


def change_encoding(folder: Path, **changes: Any) -> None:
    (folder / "tokenizer.pkl").write_bytes(pickled(**changes))


def pickle_by_name(folder: Path) -> None:
    """What tiktoken answers with a download: an Encoding whose state is a name."""
    # Protocol 4: the class, an empty tuple, NEWOBJ, the name, BUILD, STOP.
    body = b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81\x8c\x04gpt2b."
    (folder / "tokenizer.pkl").write_bytes(body)


def pickle_malice(folder: Path) -> None:
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(Malice(folder / "ran")))


WTE = "transformer.wte.weight"
OTHERS = {f"<|{i}|>": TOKENIZER.bos_id + i for i in range(9)}
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no model": (lambda f: (f / "model_000700.pt").unlink(), "model_NNNNNN.pt"),
    "no meta": (lambda f: (f / "meta_000700.json").unlink(), "meta_000700.json"),
    "no tokenizer": (lambda f: (f / "tokenizer.pkl").unlink(), "tokenizer.pkl"),
    "half a model": (lambda f: cut(f / "model_000700.pt"), "model_000700.pt"),
    "half a meta": (lambda f: cut(f / "meta_000700.json"), "meta_000700.json"),
    "half a tokenizer": (lambda f: cut(f / "tokenizer.pkl"), "tokenizer.pkl"),
    "hostile model": (lambda f: change_tensors(f, x=Malice(f / "ran")), "posix.system"),
    "hostile tokenizer": (pickle_malice, "posix.system"),
    "tokenizer to download": (pickle_by_name, "tokenizer.pkl"),
    "a number for a tensor": (lambda f: change_tensors(f, **{WTE: 3}), "model_000700.pt"),
    "unknown tensor": (lambda f: change_tensors(f, resid_lambdas=torch.ones(2)), "resid_lambdas"),
    "missing tensor": (lambda f: change_tensors(f, **{WTE: None}), "wte.weight"),
    "a flat tensor": (lambda f: change_tensors(f, **{WTE: torch.ones(9)}), "refused"),
    "too few rows": (lambda f: change_tensors(f, **{WTE: torch.ones(9, 64)}), "wte.weight"),
    "later generation": (lambda f: change_meta(f, window_pattern="SSSL"), "meta_000700.json"),
    "no number of heads": (lambda f: change_meta(f, n_head=None), "n_head"),
    "heads that do not divide": (lambda f: change_meta(f, n_head=7), "heads"),
    "sizes as text": (lambda f: change_meta(f, n_embd="64"), "n_embd"),
    "another vocabulary": (lambda f: change_meta(f, vocab_size=99), "99"),
    "other special tokens": (lambda f: change_encoding(f, special_tokens=OTHERS), "special tokens"),
    "gaps in the ids": (lambda f: change_encoding(f, mergeable_ranks={b"a": 0, b"b": 2}), "gaps"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_and_hostile_ones_are_refused_in_one_line(name: str, base: Path) -> None:
    write_first_generation(base / "d2")
    damage, named = DAMAGE[name]
    damage(base / "d2")
    with pytest.raises(UserError, match=named) as refusal:
        main(Config(str(base / "d2")))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500
    assert not (base / "d2/ran").exists() and not base_dir().exists()


def test_malice_would_run_if_it_were_let(base: Path) -> None:
    """The control of the hostile files."""
    pickle.loads(pickle.dumps(Malice(base / "ran")))
    assert (base / "ran").exists()


def test_a_run_that_is_there_and_a_source_that_is_not(base: Path) -> None:
    write_first_generation(base / "d2")
    main(Config(str(base / "d2")))
    with pytest.raises(UserError, match="--model_tag"):
        main(Config(str(base / "d2")))
    for source in (str(base / "d3"), "someone/some-model"):
        with pytest.raises(UserError, match="no folder here") as refusal:
            main(Config(source))
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="model_000001.pt"):
        main(Config(str(base / "d2"), model_tag="x", step=1))


def test_a_model_on_the_hub_is_downloaded_by_pattern(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = write_first_generation(base / "d2"), {}

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked[repo_id] = allow_patterns
        return str(base / "d2")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    main(Config("someone/nanochat", stage="mid"))
    assert "model*" in asked["someone/nanochat"]
    loaded, rows = load_model("mid", "d2", None, CPU)[0], TOKENIZER.vocab_size
    assert torch.equal(loaded.lm_head.weight[:rows], model.lm_head.weight[:rows])


@pytest.mark.parametrize(("kind", "stage"), [("plain", "mid"), ("additions", "sft")])
def test_sft_after_export_and_import_has_the_same_losses(
    kind: str, stage: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GPTConfig.plain(**SIZES) if kind == "plain" else GPTConfig(**SIZES)
    model = random_model(config)
    TOKENIZER.save(run_dir(stage, "d2") / "tokenizer")
    state = {"stage": stage, "step": 50, "model_config": asdict(config)}
    save_checkpoint(run_dir(stage, "d2"), state, model.state_dict(), {}, None, CPU)
    export_hf.main(export_hf.Config(base / "out", source=stage))
    reply = {"role": "assistant", "content": "hay"}
    talks = [{"messages": [{"role": "user", "content": "hen " * i}, reply]} for i in range(1, 40)]
    sizes = {"total_batch_size": 256, "device_batch_size": 4, "eval_tokens": 256, "lr_scale": 1.0}
    losses = []
    for folder in ("base", "detour"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base / folder))
        if folder == "detour":
            main(Config(str(base / "out"), stage=stage))  # pyright: ignore[reportArgumentType]
        settings = chat_sft.Config(stage, fresh=True, device_type="cpu", **sizes)
        finetune("sft", settings, talks, talks[:4])
        losses.append([row.get("loss") for row in read_metrics(run_dir("sft", "d2"))])
    assert losses[0] == losses[1] and len(losses[0]) > 4 and losses[0][1] > losses[0][-1]
