"""Save and load what a run needs to go on: weights, optimizer state, place in the data, loop state.

    base/d4/step_000300/model.safetensors             weights by parameter name, fp32; other tools can read it
                        optimizer_00000.safetensors   one per rank, keyed "<parameter>.<moment>"
                        loader_00000.json             one per rank: that rank's lanes of the data
                        state.json                    step, tokens, seconds, configs, figures
                        manifest.json                 every file's size and sha256, written last

A checkpoint is written into `step_000300.partial`, fsynced, and renamed when it is complete, so a folder
with the final name is whole. It is verified against its manifest before anything is read from it; a damaged
one is named, and a resuming run falls back to the one before.

The choice that would surprise: no torch.save anywhere. Its files are pickles, which run code when loaded.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat.dataloader import merge_states
from nanochat.gpt import GPT, GPTConfig
from nanochat.paths import UserError, base_dir, fsync_dir, run_dir, write_file
from nanochat.runtime import Runtime, barrier, say
from nanochat.tokenizer import Tokenizer

STEP_NAME = re.compile(r"step_(\d{6,})")
STAGE_SCRIPTS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}


@dataclass
class Checkpoint:
    """A verified checkpoint: `state` is read, tensors are loaded on request."""

    folder: Path
    state: dict[str, Any]
    digest: str  # the first half of the weights' sha256: what a later stage was begun from

    @property
    def model_config(self) -> GPTConfig:
        """The whole architecture that the weights belong to."""
        return GPTConfig(**self.state["model_config"])

    def load_weights(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Parameter name -> fp32 tensor on `device`."""
        return load_tensors(self.folder / "model.safetensors", device)

    def load_optimizer(self, device: torch.device) -> dict[str, torch.Tensor]:
        """ "<parameter>.<moment>" -> tensor, of all the ranks that saved."""
        parts = sorted(self.folder.glob("optimizer_*.safetensors"))
        return {key: value for part in parts for key, value in load_tensors(part, device).items()}

    def load_loader_state(self) -> dict[str, Any] | None:
        """The place in the data, joined from the parts of all ranks; None for a stage without a loader."""
        parts = [json.loads(part.read_text()) for part in sorted(self.folder.glob("loader_*.json"))]
        return merge_states(parts) if parts else None


def load_tensors(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """All tensors of one safetensors file. Raises UserError when it cannot be read."""
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); choose another --step or train again"
        ) from error


def step_dir(run: Path, step: int) -> Path:
    """The folder of one checkpoint."""
    return run / f"step_{step:06d}"


def list_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints in `run`, ascending; anything else in the folder is passed over."""
    if not run.is_dir():
        return []
    found = (STEP_NAME.fullmatch(entry.name) for entry in run.iterdir() if entry.is_dir())
    return sorted(int(match.group(1)) for match in found if match)


def file_digest(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of one file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"num_bytes": path.stat().st_size, "sha256": digest}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write and fsync one safetensors file."""
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def save_checkpoint(
    run: Path,
    state: dict[str, Any],
    weights: dict[str, torch.Tensor],
    optimizer: dict[str, torch.Tensor],
    loader: dict[str, Any] | None,
    runtime: Runtime,
) -> Path:
    """Write the checkpoint of `state["step"]`; every rank calls this and writes its own part.

    Returns the folder, which exists whole or not at all. Raises UserError when the disk refuses.
    """
    final = step_dir(run, state["step"])
    partial = final.with_suffix(".partial")
    try:
        if runtime.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier()
        write_tensors(partial / f"optimizer_{runtime.rank:05d}.safetensors", optimizer)
        if loader is not None:
            write_file(partial / f"loader_{runtime.rank:05d}.json", json.dumps(loader))
        if runtime.is_main:
            write_tensors(partial / "model.safetensors", weights)
            write_file(partial / "state.json", json.dumps(state, indent=1))
        barrier()
        if runtime.is_main:
            commit(partial, final)
        barrier()
    except OSError as error:
        raise UserError(
            f"cannot save {final}: {error}; the checkpoints before it are intact"
        ) from error
    return final


def commit(partial: Path, final: Path) -> None:
    """Seal `partial` with a manifest and give it its final name."""
    files = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
    write_file(partial / "manifest.json", json.dumps(files, indent=1))
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    fsync_dir(final.parent)


def open_checkpoint(run: Path, step: int) -> Checkpoint:
    """Verify one checkpoint against its manifest and read its state.

    Raises UserError that names the damaged or missing file.
    """
    folder = step_dir(run, step)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, expected in manifest.items():
            if file_digest(folder / name) != expected:
                raise UserError(
                    f"{folder / name} is damaged: its size or sha256 differs from the manifest"
                )
        digest = manifest["model.safetensors"]["sha256"][:32]
        return Checkpoint(folder, json.loads((folder / "state.json").read_text()), digest)
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise UserError(f"checkpoint {folder} is incomplete: {error}") from error


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint to resume from; damaged ones are named and passed over."""
    for step in reversed(list_steps(run)):
        try:
            return open_checkpoint(run, step)
        except UserError as error:
            say(f"warning: {error}; trying the one before")
    return None


def choose_tag(stage: str, model_tag: str) -> str:
    """`model_tag`, or the tag of the stage's run that was written last when it is empty.

    Raises UserError when there is no such run.
    """
    stage_dir = base_dir() / stage
    runs = [run for run in stage_dir.iterdir() if list_steps(run)] if stage_dir.is_dir() else []
    mend = f"run `python -m scripts.{STAGE_SCRIPTS[stage]}`"
    if not runs:
        raise UserError(f"no checkpoint in {stage_dir}; {mend}")
    if model_tag and model_tag not in {run.name for run in runs}:
        known = ", ".join(sorted(run.name for run in runs))
        raise UserError(
            f"no model tag {model_tag} in {stage_dir} (there: {known}); choose one or {mend}"
        )
    return model_tag or max(runs, key=lambda run: run.stat().st_mtime).name


def find_checkpoint(
    stage: str, model_tag: str = "", step: int | None = None
) -> tuple[Path, Checkpoint]:
    """(run folder, checkpoint) of a stage; the newest step unless one is named.

    Raises UserError when the stage, the tag or the step is not there, or the checkpoint is damaged.
    """
    if stage not in STAGE_SCRIPTS:
        raise UserError(f"--source={stage} is unknown; choose one of {', '.join(STAGE_SCRIPTS)}")
    run = run_dir(stage, choose_tag(stage, model_tag))
    steps = list_steps(run)
    if step is not None and step not in steps:
        raise UserError(f"no step {step} in {run}; there are {', '.join(map(str, steps))}")
    try:
        return run, open_checkpoint(run, steps[-1] if step is None else step)
    except UserError as error:
        others = [str(other) for other in steps if other != (steps[-1] if step is None else step)]
        mend = (
            f"use --step={others[-1]}"
            if others
            else f"run `python -m scripts.{STAGE_SCRIPTS[stage]} --fresh`"
        )
        raise UserError(f"{error}; {mend}") from error


def build_model(
    config: GPTConfig, weights: dict[str, torch.Tensor] | None, runtime: Runtime, seed: int = 0
) -> GPT:
    """A model on the runtime's device with the weights given, or freshly initialised from `seed`."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=runtime.device)
    if weights is None:
        model.init_weights(seed)
    else:
        model.load_state_dict(weights)
    model.set_compute_dtype(runtime.dtype)
    return model


def load_model(
    source: str, model_tag: str, step: int | None, runtime: Runtime
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """(model in evaluation mode, the tokenizer of its run, the checkpoint's state).

    Raises UserError when there is no such checkpoint or it is damaged.
    """
    run, checkpoint = find_checkpoint(source, model_tag, step)
    model = build_model(checkpoint.model_config, checkpoint.load_weights(runtime.device), runtime)
    meta = checkpoint.state | {"model_tag": run.name, "weights": checkpoint.digest}
    return model.eval(), Tokenizer.load(run / "tokenizer"), meta


def config_dict(config: GPTConfig) -> dict[str, Any]:
    """A model configuration as JSON-able values, to be saved whole."""
    return asdict(config)
