"""Save and load what a run needs to resume: weights, optimizer state, position in the data.

    base/d4/step_000300/
        model.safetensors            weights by parameter name, fp32; tables may be bf16
        optimizer_00000.safetensors  one per rank, keyed "<parameter>.<kind of state>": a range of
                                     the flattened tensor; the header gives its shape and start
        rank_00000.json              one per rank: its rows of the data
        state.json                   step, tokens, seconds, configs
        manifest.json                every file's size and sha256, written last

A checkpoint is written to `step_000300.partial`, fsynced, and renamed when complete, so a folder
with the final name is whole. The manifest is verified before anything is read. No torch.save or
torch.distributed.checkpoint: they pickle, and loading a pickle runs code.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nanochat.attention import choose_kernel
from nanochat.common import (
    DTYPES,
    CheckpointFlags,
    Runtime,
    TableDtype,
    UserError,
    base_dir,
    fsync,
    gpu_memory,
    has_c_compiler,
    print0,
    synchronize,
    write_file,
)
from nanochat.dataloader import merge_states
from nanochat.gpt import BEFORE, GPT, GPTConfig
from nanochat.loss import gpu_chunk
from nanochat.optim import StateShard
from nanochat.tokenizer import Tokenizer

STAGE_SCRIPTS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}


@dataclass
class Checkpoint:
    """A verified checkpoint: `state` is in memory, tensors are loaded on request."""

    folder: Path
    state: dict[str, Any]
    digest: str  # first half of the weights' sha256; tells a later stage what it started from

    @property
    def model_config(self) -> GPTConfig:
        return GPTConfig(**BEFORE | self.state["model_config"])

    def load_weights(self, device: torch.device) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model.safetensors", device=str(device))

    def open_optimizer(self) -> Callable[[str, int, int], torch.Tensor]:
        """read(key, first, last) -> those elements of a flattened state, from whichever ranks.

        `read` raises UserError if any are missing.
        """
        parts: dict[str, list[tuple[int, Any]]] = {}
        for path in sorted(self.folder.glob("optimizer_*.safetensors")):
            file = safe_open(path, "pt")
            for key, part in json.loads(file.metadata()["parts"]).items():
                parts.setdefault(key, []).append((part["first"], file.get_slice(key)))

        def read(key: str, first: int, last: int) -> torch.Tensor:
            found, place = [], first
            for begin, part in sorted(parts.get(key, ()), key=lambda pair: pair[0]):
                end = min(last, begin + part.get_shape()[0])
                if begin <= place < end:
                    found.append(part[place - begin : end - begin])
                    place = end
            if place < last:
                raise UserError(
                    f"{self.folder} lacks elements {place} to {last} of {key}; "
                    "use --fresh to start over"
                )
            return torch.cat(found)

        return read

    def load_loader_state(self, rank: int, world_size: int) -> dict[str, Any] | None:
        """The position in the data, merged from all ranks; None for a stage without a loader."""
        ranks = [json.loads(path.read_text()) for path in sorted(self.folder.glob("rank_*.json"))]
        parts = [saved["loader"] for saved in ranks if saved["loader"]]
        if not parts:
            return None
        # With as many ranks as before, each knows exactly which documents it has assigned.
        mine = parts[rank] if len(parts) == world_size else {}
        return merge_states(parts) | {key: mine[key] for key in mine if key != "lanes"}


def step_dir(run: Path, step: int) -> Path:
    return run / f"step_{step:06d}"


def list_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints in `run`, ascending."""
    numbers = (folder.name.removeprefix("step_") for folder in run.glob("step_*/"))
    return sorted(int(number) for number in numbers if number.isdecimal())


def file_digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"num_bytes": path.stat().st_size, "sha256": digest}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
    host = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(host, path, header)
    path.chmod(0o644)  # else its owner's alone: no server of another user could read it
    fsync(path)


@contextmanager
def agreed(folder: Path, group: Any) -> Iterator[None]:
    """A block of every rank of `group`; UserError on all of them if writing failed on any."""
    error = None
    try:
        yield
    except (OSError, SafetensorError) as caught:
        error = caught
    failed = torch.tensor(error is not None, dtype=torch.int32)
    if dist.is_initialized():
        dist.all_reduce(failed, group=group)
    if failed:
        reason = error or "another rank could not write its part"
        raise UserError(
            f"cannot save {folder}: {reason}; make room: the same command goes on from the "
            "checkpoints before, which are intact"
        ) from error


def save_checkpoint(
    run: Path,
    state: dict[str, Any],
    weights: dict[str, torch.Tensor],
    moments: dict[str, StateShard],
    loader: dict[str, Any] | None,
    runtime: Runtime,
    group: Any = None,
) -> Path:
    """Write the checkpoint of `state["step"]`, each rank of `group` its part; returns the folder.

    `loader` is this rank's position in the data, if it reads any. Raises UserError, on every rank,
    if the disk refuses.
    """
    final = step_dir(run, state["step"])
    partial, is_main = final.with_suffix(".partial"), runtime.is_main
    parts = {name: {"shape": part.shape, "first": part.first} for name, part in moments.items()}
    values = {name: part.values for name, part in moments.items()}
    try:
        with agreed(final, group):
            if is_main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with agreed(final, group):
            path = partial / f"optimizer_{runtime.rank:05d}.safetensors"
            write_tensors(path, values, {"parts": json.dumps(parts)})
            if loader is not None:
                write_file(
                    partial / f"rank_{runtime.rank:05d}.json", json.dumps({"loader": loader})
                )
            if is_main:
                write_tensors(partial / "model.safetensors", weights, {"format": "pt"})
                write_file(partial / "state.json", json.dumps(state, indent=1))
        with agreed(final, group):
            if is_main:
                commit(partial, final)
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)  # the disk may be full
        raise
    return final


def commit(partial: Path, final: Path) -> None:
    files = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
    write_file(partial / "manifest.json", json.dumps(files, indent=1))
    if final.exists():
        discard(final)
    partial.rename(final)
    fsync(final.parent)


def discard(folder: Path) -> None:
    """Delete a checkpoint; it is never seen half deleted under its name."""
    gone = folder.with_suffix(".deleted")
    folder.rename(gone)
    shutil.rmtree(gone)


def clear_strays(run: Path) -> None:
    for stray in (*run.glob("step_*.partial"), *run.glob("step_*.deleted")):
        shutil.rmtree(stray)


class CheckpointWriter:
    """Saves checkpoints in the background, on every rank; each save waits for the one before."""

    def __init__(self, run: Path, keep_last: int, runtime: Runtime) -> None:
        """Keeps the newest `keep_last` checkpoints; <= 0: all."""
        self.run, self.keep_last, self.runtime = run, keep_last, runtime
        self.group = dist.new_group(backend="gloo") if runtime.world_size > 1 else None
        self.host: dict[str, torch.Tensor] = {}  # reused: page-locking memory takes seconds
        self.thread = ThreadPoolExecutor(1, "nanochat-checkpoint")
        self.last: Future[None] | None = None
        self.seconds = 0.0  # that the last save took

    def start(
        self,
        state: dict[str, Any],
        weights: dict[str, torch.Tensor],
        moments: dict[str, StateShard],
        loader_state: Callable[[], dict[str, Any] | None],
    ) -> None:
        """Copy everything to host memory, and write it in the background. Raises as `wait` does."""
        self.wait()
        begin = time.monotonic()
        weights = weights if self.runtime.is_main else {}
        weights = {name: self._copy(name, tensor) for name, tensor in weights.items()}
        moments = {
            name: part._replace(values=self._copy(f"moment {name}", part.values))
            for name, part in moments.items()
        }
        synchronize(self.runtime.device)

        def write() -> None:
            folder = save_checkpoint(
                self.run, state, weights, moments, loader_state(), self.runtime, group=self.group
            )
            self.seconds = time.monotonic() - begin
            print0(f"saved {folder}")
            if self.runtime.is_main and self.keep_last > 0:
                for step in list_steps(self.run)[: -self.keep_last]:
                    discard(step_dir(self.run, step))

        self.last = self.thread.submit(write)

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` in host memory, unchanged until the next save."""
        if name not in self.host:
            pinned = tensor.device.type == "cuda"
            self.host[name] = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        return self.host[name].copy_(tensor.detach(), non_blocking=True)

    def wait(self) -> None:
        """Wait until the last save is on disk; raises its error, UserError if the disk refused."""
        if self.last is not None:
            self.last.result()

    def has_failed(self) -> bool:
        """True if the last save has ended in an error."""
        return self.last is not None and self.last.done() and self.last.exception() is not None


def open_checkpoint(run: Path, step: int, verify: bool = True) -> Checkpoint:
    """A checkpoint, verified unless told not to; UserError names the damaged or missing file."""
    folder = step_dir(run, step)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, expected in manifest.items():
            if verify and file_digest(folder / name) != expected:
                raise UserError(
                    f"{folder / name} is damaged: its size or sha256 differs from the manifest"
                )
        digest = manifest["model.safetensors"]["sha256"][:32]
        return Checkpoint(folder, json.loads((folder / "state.json").read_text()), digest)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
        raise UserError(f"checkpoint {folder} is incomplete: {error}") from error


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint; warns about damaged ones and skips them.

    None if there are none; UserError if all are damaged.
    """
    steps = list_steps(run)
    for step in reversed(steps):
        try:
            return open_checkpoint(run, step)
        except UserError as error:
            print0(f"warning: {error}; trying the one before")
    if steps:
        raise UserError(f"all checkpoints in {run} are damaged; use --fresh to start over")
    return None


def list_runs(stage: str) -> list[Path]:
    """The folders of a stage's runs that have checkpoints."""
    folder = base_dir() / stage
    return sorted(run for run in folder.iterdir() if list_steps(run)) if folder.is_dir() else []


def find_checkpoint(
    stage: str, model_tag: str = "", step: int | None = None, verify: bool = True
) -> tuple[Path, Checkpoint]:
    """(run folder, checkpoint) of a stage; by default the newest step of the run saved last.

    Raises UserError if the stage, tag or step does not exist, or the checkpoint is damaged.
    """
    stage_dir, runs = base_dir() / stage, list_runs(stage)
    remedy = f"run `python -m scripts.{STAGE_SCRIPTS[stage]}`"
    if not runs:
        raise UserError(f"no checkpoint in {stage_dir}; {remedy}")
    # Not a link to the one saved last.
    newest = max(runs, key=lambda run: (saved_at(run), not run.is_symlink()))
    run = stage_dir / model_tag if model_tag else newest
    if run not in runs:
        known = ", ".join(run.name for run in runs)
        raise UserError(
            f"no model tag {model_tag} in {stage_dir} (there: {known}); choose one or {remedy}"
        )
    steps = list_steps(run)
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"no step {step} in {run}; there are {', '.join(map(str, steps))}")
    try:
        return run, open_checkpoint(run, step, verify)
    except UserError as error:
        for other in reversed([other for other in steps if other != step]):
            with suppress(UserError):
                open_checkpoint(run, other)
                remedy = f"use --step={other}"
                break
        else:
            remedy = f"{remedy[:-1]} --fresh`"
        raise UserError(f"{error}; {remedy}") from error


def saved_at(run: Path) -> float:
    return max((file.stat().st_mtime for file in run.glob("step_*/manifest.json")), default=0.0)


def build_model(
    config: GPTConfig,
    weights: dict[str, torch.Tensor] | None,
    runtime: Runtime,
    seed: int = 0,
    table_dtype: TableDtype = "auto",
) -> GPT:
    """A model with `weights` or, if there are none, initialised; `table_dtype` auto is fp32."""
    # Not via the meta device: there torch imports its compiler, which takes seconds.
    with runtime.device:
        model = GPT(config, DTYPES["float32" if table_dtype == "auto" else table_dtype])
    if weights is None:
        model.init_weights(seed)
    else:
        model.load_state_dict(weights)
    model.compute_dtype = runtime.dtype
    if runtime.device.type != "cpu":
        model.loss_chunk = gpu_chunk(gpu_memory(runtime.device))
    model.kernel = choose_kernel(
        runtime.device.type, runtime.capability, runtime.dtype, config.head_dim, has_c_compiler()
    )
    return model


def load_model(
    chosen: CheckpointFlags,
    runtime: Runtime,
    train: bool = False,
    table_dtype: TableDtype = "auto",
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """(model, its run's tokenizer, state + "name", "model_tag", "weights" and the "checkpoint").

    To `train`, the weights stay in fp32 and tables in `table_dtype`; otherwise all are cast to the
    runtime's dtype. Raises as find_checkpoint.
    """
    run, checkpoint = find_checkpoint(chosen.source, chosen.model_tag, chosen.step)
    weights = checkpoint.load_weights(runtime.device)
    model = build_model(checkpoint.model_config, weights, runtime, table_dtype=table_dtype)
    tokenizer = Tokenizer.load(run / "tokenizer")
    if checkpoint.state.get("config", {}).get("mask_documents"):  # measure what was trained
        model.document_start = tokenizer.bos_id
    name = f"{chosen.source}/{run.name} step {checkpoint.state['step']}"
    meta = checkpoint.state | {
        "name": name, "model_tag": run.name, "weights": checkpoint.digest, "checkpoint": checkpoint,
    }  # fmt: skip
    return model if train else model.to(runtime.dtype), tokenizer, meta
