"""Import a first-generation checkpoint, or one of our exports, as an ordinary run.

    python -m scripts.import_hf karpathy/nanochat-d32  # from the Hugging Face hub; needs no GPU
    python -m scripts.import_hf FOLDER --stage base    # model_*.pt, meta_*.json, tokenizer.pkl

The source is not trusted: .pt files are read with weights_only, and tokenizer.pkl by an unpickler
that knows only tiktoken's Encoding, as a stand-in: the real one would download whatever encoding a
pickle names. Everything is checked before a byte is written.

reads: the folder, or the model on the hub
writes: <stage>/<model tag>/
"""

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import tyro
from safetensors.torch import load_file

from nanochat import hf_export
from nanochat.checkpoint import list_steps, save_checkpoint
from nanochat.common import Step, Tag, UserError, print0, run_dir, run_script, set_up, write_file
from nanochat.gpt import BEFORE, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
Model = tuple[GPTConfig, hf_export.Weights, Tokenizer, int]  # the last is the step


@dataclass
class Config:
    source: tyro.conf.Positional[str]  # a folder, or the name of a model on the Hugging Face hub
    stage: Literal["base", "mid", "sft", "rl"] = "sft"  # what it was trained for
    model_tag: Tag = ""  # empty: d and the depth
    step: Step = None  # default: the newest


class EncodingUnpickler(pickle.Unpickler):
    """Knows one class, tiktoken's Encoding, of which it keeps the fields alone."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"GLOBAL {module_name}.{global_name}")
        return SimpleNamespace


def trying(action: Callable[[Any], Any], argument: object, fault: str = "is refused") -> Any:
    """`action(argument)`, with any error turned into a one-line UserError."""
    try:
        return action(argument)
    except Exception as error:  # what a damaged file or a network can do has no end
        named = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch.load says it so, too
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        reason = f"it asks for {named[1]}" if named else reason
        raise UserError(f"{argument} {fault}: {reason}") from error


def find_folder(source: str) -> Path:
    """`source`, or the folder that the hub's model was downloaded to."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download  # takes half a second

    wanted = ["model*", "meta_*.json", "tokenizer*", "config.json"]
    download = partial(snapshot_download, allow_patterns=wanted)
    return Path(trying(download, source, "is not a folder here, and cannot be downloaded"))


def read_weights(path: Path) -> hf_export.Weights:
    """Our name -> tensor, from model_NNNNNN.pt."""
    weights = {}
    for name, tensor in torch.load(path, "cpu", weights_only=True, mmap=True).items():
        name = name.removeprefix("_orig_mod.").removeprefix("transformer.")
        weights[re.sub(r"^h\.", "blocks.", name)] = tensor.float()
    return weights


def read_meta(path: Path) -> GPTConfig:
    sizes = json.loads(path.read_text())["model_config"]
    if {name: type(size) for name, size in sizes.items()} != dict.fromkeys(SIZES, int):
        raise ValueError(f"its model_config is not a whole number for each of {', '.join(SIZES)}")
    return GPTConfig.plain(**sizes)


def make_tokenizer(ranks: dict[bytes, int], specials: dict[str, int], pattern: str) -> Tokenizer:
    """The tokenizer of these ids; ValueError unless it has nanochat's special tokens."""
    tokens, names = sorted(ranks, key=ranks.__getitem__), sorted(specials, key=specials.__getitem__)
    ids = [*(ranks[token] for token in tokens), *(specials[name] for name in names)]
    if ids != list(range(len(ids))) or tuple(names) != SPECIAL_TOKENS:
        raise ValueError("the ids have gaps, or the special tokens are not nanochat's")
    return Tokenizer(tokens, names, pattern)


def read_pickle(path: Path) -> Tokenizer:
    with path.open("rb") as file:
        state = vars(EncodingUnpickler(file).load())
    return make_tokenizer(state["mergeable_ranks"], state["special_tokens"], state["pat_str"])


def read_export(folder: Path) -> Model:
    saved = BEFORE | json.loads((folder / "config.json").read_text())
    if saved["model_type"] == "nanochat_x":
        config = GPTConfig(**{field.name: saved[field.name] for field in fields(GPTConfig)})
    else:
        sizes = {ours: saved[theirs] for ours, theirs in hf_export.SETTINGS.items()}
        config = GPTConfig.plain(**sizes, rope_base=saved["rope_parameters"]["rope_theta"])
    names = {theirs: ours for ours, theirs in hf_export.plain_names(config.n_layer).items()}
    tensors = load_file(folder / "model.safetensors")
    weights = {names.get(name, name): tensor for name, tensor in tensors.items()}
    words = json.loads((folder / "tokenizer.json").read_text())
    byte = {letter: i for i, letter in enumerate(hf_export.LETTERS)}
    ranks = {bytes(byte[c] for c in token): id for token, id in words["model"]["vocab"].items()}
    specials = {token["content"]: token["id"] for token in words["added_tokens"]}
    pattern = words["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    return config, weights, make_tokenizer(ranks, specials, pattern), saved.get("nanochat_step", 0)


def read_first_generation(folder: Path, step: int | None) -> Model:
    """A first-generation checkpoint, by default the newest step."""
    stems = [path.stem.removeprefix("model_") for path in folder.glob("model_*.pt")]
    newest = max(filter(str.isdecimal, stems), key=int, default="NNNNNN")
    number = newest if step is None else f"{step:06d}"
    weights = trying(read_weights, folder / f"model_{number}.pt")
    config = trying(read_meta, folder / f"meta_{number}.json")
    return config, weights, trying(read_pickle, folder / "tokenizer.pkl"), int(number)


def main(cfg: Config) -> None:
    runtime, folder = set_up("cpu"), find_folder(cfg.source)
    if (folder / "model.safetensors").exists():
        config, weights, tokenizer, step = trying(read_export, folder)
    else:
        config, weights, tokenizer, step = read_first_generation(folder, cfg.step)
    if tokenizer.vocab_size != config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens, its model {config.vocab_size}"
        raise UserError(f"{folder} is refused: its tokenizer has {sizes}")
    weights = hf_export.check_weights(weights, config, folder)
    run = run_dir(cfg.stage, cfg.model_tag or f"d{config.n_layer}")
    if list_steps(run):
        raise UserError(f"{run} holds checkpoints; choose another --model_tag")
    tokenizer.save(run / "tokenizer")
    origin = {"stage": cfg.stage, "step": step, "source": str(cfg.source)}
    write_file(run / "config.json", json.dumps({"config": origin}, indent=1))
    state = origin | {"model_config": asdict(config)}
    save_checkpoint(run, state, weights, {}, None, runtime)
    write_file(run / "result.json", json.dumps({"step": step}))  # a run that is finished
    chat = f"python -m scripts.chat_cli -i {cfg.stage} -g {run.name}"
    print0(f"imported {run} at step {step}; {chat}")


if __name__ == "__main__":
    run_script(main, Config)
