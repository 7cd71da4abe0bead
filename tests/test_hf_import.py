"""Imports: checkpoints in the first generation's layout; damaged, hostile ones; our own exports."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch

from nanochat.checkpoint import load_model
from nanochat.common import CheckpointFlags, base_dir
from nanochat.gpt import BEFORE, GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts import chat_cli, export_hf
from scripts.import_hf import Config, main
from tests.models import CPU, busy_gpt, random_ids, refuses, save_model

TOKENIZER = Tokenizer.train(["The hen sat on the hay; the hat is on the hen."], 300, SPECIAL_TOKENS)
SIZES: dict[str, Any] = {"sequence_len": 64, "vocab_size": TOKENIZER.vocab_size}
SIZES |= {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64}


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


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
    model = busy_gpt(GPTConfig.plain(**SIZES), seed)
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
    ids = random_ids(2, 40, TOKENIZER.bos_id)
    first, second = CheckpointFlags("sft", "d2"), CheckpointFlags("base", "old")
    for chosen, step, model in ((first, 700, newest), (second, 90, older)):
        loaded, tokenizer, meta = load_model(chosen, CPU)
        assert meta["step"] == step and meta["model_tag"] == chosen.model_tag
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


def change_tokenizer(folder: Path, data: bytes = b"", **changes: Any) -> None:
    (folder / "tokenizer.pkl").write_bytes(data or pickled(**changes))


# What tiktoken answers with a download: an Encoding whose state is a name. Protocol 4: the class,
# an empty tuple, NEWOBJ, the name, BUILD, STOP.
BY_NAME = b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81\x8c\x04gpt2b."


WTE = "transformer.wte.weight"
OTHERS = {f"<|{i}|>": TOKENIZER.bos_id + i for i in range(9)}
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "hostile model": (lambda f: change_tensors(f, x=Malice(f / "ran")), "posix.system"),
    "hostile tokenizer": (
        lambda f: change_tokenizer(f, pickle.dumps(Malice(f / "ran"))), "posix.system"),
    "tokenizer to download": (lambda f: change_tokenizer(f, BY_NAME), "tokenizer.pkl"),
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
    "special tokens": (lambda f: change_tokenizer(f, special_tokens=OTHERS), "special tokens"),
    "gaps in the ids": (
        lambda f: change_tokenizer(f, mergeable_ranks={b"a": 0, b"b": 2}), "gaps"),
}  # fmt: skip
for name in ("model_000700.pt", "meta_000700.json", "tokenizer.pkl"):
    lost = "model_NNNNNN.pt" if name.startswith("model") else name
    DAMAGE[f"no {name}"] = (lambda f, name=name: (f / name).unlink(), lost)
    DAMAGE[f"half of {name}"] = (lambda f, name=name: cut(f / name), name)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_and_hostile_ones_are_refused_in_one_line(name: str, base: Path) -> None:
    write_first_generation(base / "d2")
    damage, named = DAMAGE[name]
    damage(base / "d2")
    assert len(refuses(named, main, Config(str(base / "d2")))) < 500
    assert not (base / "d2/ran").exists() and not base_dir().exists()


def test_a_run_that_is_there_and_a_source_that_is_not(base: Path) -> None:
    write_first_generation(base / "d2")
    main(Config(str(base / "d2")))
    refuses("--model_tag", main, Config(str(base / "d2")))
    for source in (str(base / "d3"), "someone/some-model"):
        refuses("not a folder here", main, Config(source))
    refuses("model_000001.pt", main, Config(str(base / "d2"), model_tag="x", step=1))


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
    loaded, rows = load_model(CheckpointFlags("mid", "d2"), CPU)[0], TOKENIZER.vocab_size
    assert torch.equal(loaded.lm_head.weight[:rows], model.lm_head.weight[:rows])


@pytest.mark.parametrize(
    ("kind", "stage"), [("plain", "mid"), ("additions", "sft"), ("older", "rl")]
)
def test_export_and_import_give_back_the_model(
    kind: str, stage: Any, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GPTConfig.plain(**SIZES) if kind == "plain" else GPTConfig(**SIZES)
    if kind == "older":
        config = replace(config, **BEFORE)
    model = busy_gpt(config)
    weights = model.state_dict()
    save_model(model, stage, "d2", 50, TOKENIZER)
    export_hf.main(export_hf.Config(base / "out", source=stage))
    if kind == "older":
        file = base / "out" / "config.json"
        said = json.loads(file.read_text())
        file.write_text(json.dumps({name: said[name] for name in said.keys() - BEFORE.keys()}))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base / "detour"))
    main(Config(str(base / "out"), stage=stage))
    loaded, tokenizer, meta = load_model(CheckpointFlags(stage, "d2"), CPU)
    assert loaded.config == config and meta["step"] == 50
    rows = {"wte.weight", "lm_head.weight"} | {n for n in weights if n.startswith("value_embeds")}
    for name, tensor in loaded.state_dict().items():  # but for the rows of padding
        kept = TOKENIZER.vocab_size if name in rows else None
        assert torch.equal(tensor[:kept], weights[name][:kept]), name
    assert (tokenizer.specials, tokenizer.pattern) == (TOKENIZER.specials, TOKENIZER.pattern)
    assert tokenizer.encode("The hen <|bos|>") == TOKENIZER.encode("The hen <|bos|>")
