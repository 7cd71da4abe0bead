"""The verbs that every trainer shares: open a run, is it due, fetch, accumulate, update, save, finish.

A trainer reads as a loop of these verbs; the order of events stays in the script. `TrainRun` is the run folder
of one stage: it holds the lock, the place (step, tokens, seconds, progress), the console line and metrics.jsonl.

    with TrainRun("base", "d4", vars(cfg), runtime) as run:
        loader_state = run.restore(model, optimizer)
        run.begin(model, tokenizer)
        while True:
            if run.step > 0 and run.due(cfg.save_every): run.save(model, optimizer, loader_state)
            if run.due(cfg.eval_every): run.note(val_bpb=...)
            if run.progress >= 1: break
            batch = run.fetch(loader)
            loss = accumulate(model, batch, rows, world_size)
            optimizer.step()
            run.update(loss, lr_multiplier, progress, num_tokens)
        run.finish()

The choice that would surprise: the record of a step stays open until the next update, because what is measured
after the update (val_bpb) belongs to it; a checkpoint carries the open record along.
"""

import fcntl
import json
import os
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Literal, Self, cast

import torch
from torch import Tensor

from nanochat.checkpoint import (
    Checkpoint,
    config_dict,
    list_steps,
    newest_checkpoint,
    save_checkpoint,
)
from nanochat.dataloader import Batch
from nanochat.gpt import GPT
from nanochat.metrics import MetricsFile, format_seconds, to_number
from nanochat.optim import MuonAdamW
from nanochat.paths import UserError, run_dir, tokenizer_dir, write_file
from nanochat.runtime import Runtime, all_reduce_sum, barrier, peak_flops, say
from nanochat.scaling import flops_per_token, parameter_counts
from nanochat.tokenizer import Tokenizer

CHECKOUT = Path(__file__).resolve().parent
# What a resumed run may change: none of it reaches the weights but through float rounding.
FREE_SETTINGS = {
    "run", "fresh", "device_type", "device_batch_size", "log_every", "save_every", "eval_every",
    "eval_tokens", "sample_every", "compile",
}  # fmt: skip


def due(step: int, every: int, last: bool) -> bool:
    """True at step 0, every `every` steps and at the last; `every` <= 0: at the last alone."""
    return last or (every > 0 and step % every == 0)


def git_revision() -> str:
    """The revision of the checkout, `-dirty` when it was changed, `unknown` outside one."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
        return found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def batch_rows(total_batch_size: int, seq_len: int) -> int:
    """Rows of the global batch. Raises UserError naming the nearest sizes when they are not whole."""
    if total_batch_size < seq_len or total_batch_size % seq_len:
        below = total_batch_size // seq_len * seq_len
        choices = " or ".join(str(size) for size in (below, below + seq_len) if size)
        raise UserError(
            f"--total_batch_size={total_batch_size} is not a multiple of --max_seq_len={seq_len}; use {choices}"
        )
    return total_batch_size // seq_len


def compile_for_training(
    model: GPT, choice: Literal["auto", "yes", "no"], device: torch.device
) -> torch.nn.Module:
    """The model through torch.compile (`choice` yes, or auto on a GPU), else as it is.

    Only training goes through it: evaluation and sampling have other shapes, each of which would compile anew.
    """
    wanted = choice == "yes" or (choice == "auto" and device.type == "cuda")
    return cast(torch.nn.Module, torch.compile(model, dynamic=False)) if wanted else model


def split_rows(num_rows: int, device_batch_size: int, world_size: int) -> int:
    """Rows per micro-batch: `device_batch_size`, or all of a rank's rows when they are fewer.

    Raises UserError that names the nearest sizes when the global batch of `num_rows` rows does not divide.
    """
    if num_rows % world_size:
        raise UserError(
            f"a batch of {num_rows} rows does not divide among {world_size} ranks; change the batch"
        )
    local = num_rows // world_size
    rows = min(device_batch_size, local)
    if rows < 1 or local % rows:
        fitting = [size for size in range(1, local + 1) if local % size == 0]
        nearest = sorted(sorted(fitting, key=lambda size: abs(size - device_batch_size))[:2])
        choices = " or ".join(f"--device_batch_size={size}" for size in nearest)
        raise UserError(
            f"--device_batch_size={device_batch_size} does not divide the {local} rows of a rank's batch; use {choices}"
        )
    return rows


def accumulate(
    model: torch.nn.Module,
    batch: Batch,
    rows: int,
    world_size: int,
    weights: Tensor | None = None,
) -> Tensor:
    """Add the gradient of the global batch's mean loss, `rows` rows at a time; returns that loss, detached.

    The mean is over all targets of all ranks, so neither micro-batches nor ranks change it; the gradients are
    scaled so that their *average* over ranks, which the optimizer takes, is the gradient of that mean.
    `weights` (R, T) multiplies each target's loss (the advantages of a policy gradient).
    """
    num_targets = all_reduce_sum(
        torch.tensor(batch.num_targets, device=batch.targets.device)
    ).clamp(min=1)
    total = torch.zeros((), device=batch.targets.device)
    for begin in range(0, len(batch.inputs), rows):
        part = slice(begin, begin + rows)
        if weights is None:
            loss = model(batch.inputs[part], batch.targets[part], reduction="sum")
        else:
            losses = model(batch.inputs[part], batch.targets[part], reduction="none")
            loss = (losses.view_as(weights[part]) * weights[part]).sum()
        loss = loss / num_targets
        (loss * world_size).backward()
        total += loss.detach()
    return all_reduce_sum(total)


def load_tokenizer(stage: str, model_tag: str, fresh: bool) -> Tokenizer:
    """The tokenizer that a run was begun with, or the one trained last for a run that is still to begin."""
    run = run_dir(stage, model_tag)
    return Tokenizer.load(run / "tokenizer" if list_steps(run) and not fresh else tokenizer_dir())


class TrainRun:
    """The folder and the place of one training run; see the head of this file for its use."""

    def __init__(
        self, stage: str, model_tag: str, config: dict[str, Any], runtime: Runtime
    ) -> None:
        """Open or resume `stage`/`model_tag`. `config`: the script's settings, with `fresh`, `run`, `log_every`.

        Raises UserError when another process trains in the folder, or the settings differ from those that
        the run was started with.
        """
        self.stage, self.runtime = stage, runtime
        self.log_every: int = config["log_every"]
        self.config = {
            name: str(value) if isinstance(value, Path) else value for name, value in config.items()
        }
        self.folder = run_dir(stage, model_tag)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.at_exit = ExitStack()  # what is to be closed however the run ends
        if runtime.is_main:
            self.at_exit.enter_context(lock_folder(self))
        try:
            if config["fresh"] and runtime.is_main:
                clear_folder(self)
            barrier()
            self.resumed: Checkpoint | None = newest_checkpoint(self.folder)
            state = self.resumed.state if self.resumed else {}
            check_settings(self, state.get("config", self.config))
        except BaseException:
            self.at_exit.close()
            raise
        self.step: int = state.get("step", 0)
        self.tokens: int = state.get("tokens", 0)
        self.seconds: float = state.get("seconds", 0.0)
        self.progress: float = state.get("progress", 0.0)
        self.record: dict[str, Any] = state.get("record", {"step": 0, "tokens": 0, "seconds": 0.0})
        self.metrics: MetricsFile | None = None
        self.flops_per_second_at_peak = self.flops_per_token = 1.0
        self.clock = self.window_seconds = self.wait_seconds = 0.0
        self.window_tokens = self.window_steps = 0

    @property
    def finished(self) -> bool:
        """True when the run came to its end in an earlier call; says so."""
        done = (self.folder / "result.json").exists()
        if done:
            say(f"{self.folder} is finished (step {self.step}); --fresh starts over")
        return done

    def restore(self, model: GPT, optimizer: MuonAdamW) -> dict[str, Any] | None:
        """Take over weights and moments where the run is resumed; returns the loader's state, or None."""
        if self.resumed is None:
            return None
        say(f"resuming {self.folder} at step {self.step}")
        device = self.runtime.device
        model.load_state_dict(self.resumed.load_weights(device))
        optimizer.import_state(self.resumed.load_optimizer(device))
        return self.resumed.load_loader_state()

    def begin(self, model: GPT, tokenizer: Tokenizer) -> None:
        """Say what is trained, write the run's copy of tokenizer and settings, and open metrics.jsonl."""
        peak, source = peak_flops(self.runtime)
        self.flops_per_token = flops_per_token(model.config)
        self.flops_per_second_at_peak = peak * self.runtime.world_size
        dtype = str(self.runtime.dtype).removeprefix("torch.")
        say(
            f"{self.stage}: {parameter_counts(model.config)['total']:,} parameters, depth {model.config.n_layer}, "
            f"width {model.config.n_embd}, {dtype}; mfu is against {peak / 1e12:.3g} TFLOP/s ({source})"
        )
        if self.runtime.is_main:
            tokenizer.save(self.folder / "tokenizer")
            settings = {"config": self.config, "git": git_revision()}
            write_file(self.folder / "config.json", json.dumps(settings, indent=1))
            self.metrics = MetricsFile(self.folder, self.step - 1, self.config["run"], self.config)
            self.at_exit.callback(self.metrics.close)

    def due(self, every: int) -> bool:
        """True when something done every `every` steps falls on this step; always at the end of the run."""
        return due(self.step, every, self.progress >= 1)

    def start_clock(self) -> None:
        """The step begins now; `update` ends it."""
        self.clock = time.perf_counter()

    def fetch(self, loader: Any) -> Batch:
        """The next batch; starts the step's clock and counts the wait for data."""
        self.start_clock()
        batch = next(loader)
        self.wait_seconds += time.perf_counter() - self.clock
        return batch

    def update(self, loss: Tensor, lr_multiplier: float, progress: float, num_tokens: int) -> None:
        """Count one optimizer step over `num_tokens` tokens of all ranks; prints the line when it is due."""
        self.close_record()
        self.step, self.progress = self.step + 1, progress
        self.window_steps += 1
        self.tokens, self.window_tokens = self.tokens + num_tokens, self.window_tokens + num_tokens
        line_due = due(self.step, self.log_every, progress >= 1)
        if line_due:
            loss = torch.tensor(loss.item())  # the one wait for the device
        elapsed = time.perf_counter() - self.clock
        self.seconds, self.window_seconds = self.seconds + elapsed, self.window_seconds + elapsed
        tok_per_second = self.window_tokens / max(self.window_seconds, 1e-9)
        mfu = tok_per_second * self.flops_per_token / self.flops_per_second_at_peak
        self.record = {
            "step": self.step, "tokens": self.tokens, "seconds": self.seconds, "loss": loss,
            "lrm": lr_multiplier, "tok_per_second": tok_per_second, "mfu": mfu,
        }  # fmt: skip
        if line_due:
            self.print_line()

    def print_line(self) -> None:
        """One parseable line about the steps since the last one; starts a new window of measurement."""
        left = self.seconds * (1 - self.progress) / max(self.progress, 1e-9)
        wait = self.wait_seconds / max(self.window_seconds, 1e-9)
        stall = " | warning: training waits for data" if wait > 0.1 else ""
        total = max(self.step, round(self.step / max(self.progress, 1e-9)))
        say(
            f"step {self.step:05d}/{total:05d} ({100 * self.progress:.1f}%) | loss {float(self.record['loss']):.4f}"
            f" | lrm {self.record['lrm']:.3f} | {1000 * self.window_seconds / self.window_steps:.0f} ms"
            f" | {self.record['tok_per_second']:,.0f} tok/s | mfu {100 * self.record['mfu']:.1f}%"
            f" | data {100 * wait:.1f}% | {format_seconds(self.seconds)} so far | {format_seconds(left)} left{stall}"
        )
        self.window_seconds = self.wait_seconds = 0.0
        self.window_tokens = self.window_steps = 0
        if self.metrics:
            self.metrics.flush()

    def note(self, **figures: float) -> None:
        """Add figures measured at this step, such as val_bpb, to its record; says them."""
        self.record |= figures
        say(
            f"step {self.step:05d} | "
            + " | ".join(f"{name} {value:.4f}" for name, value in figures.items())
        )

    def close_record(self) -> None:
        """The step's record is complete: hand it to metrics.jsonl."""
        if self.metrics:
            self.metrics.add(self.record)

    def save(self, model: GPT, optimizer: MuonAdamW, loader_state: dict[str, Any] | None) -> None:
        """Write a checkpoint of this step, unless it is the one that the run was resumed from."""
        if self.resumed and self.resumed.state["step"] == self.step:
            return
        if self.metrics:
            self.metrics.flush()
        loss = self.record.get("loss")
        self.record |= {} if loss is None else {"loss": float(loss)}
        state = {
            "stage": self.stage, "step": self.step, "tokens": self.tokens, "seconds": self.seconds,
            "progress": self.progress, "record": self.record, "config": self.config,
            "model_config": config_dict(model.config), "git": git_revision(),
        }  # fmt: skip
        weights, moments = model.state_dict(), optimizer.export_state()
        folder = save_checkpoint(self.folder, state, weights, moments, loader_state, self.runtime)
        say(f"saved {folder}")

    def results(self) -> dict[str, Any]:
        """The figures of the last step, for the report."""
        return {name: to_number(value) for name, value in self.record.items()}

    def finish(self) -> None:
        """Mark the run as finished, with its results."""
        self.close_record()
        if self.runtime.is_main:
            write_file(self.folder / "result.json", json.dumps(self.results(), indent=1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.at_exit.close()


def lock_folder(run: TrainRun) -> IO[str]:
    """Hold the run folder for this process; the kernel lets go when the process ends, however it ends.

    Raises UserError with the pid of the process that holds it.
    """
    file = (run.folder / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise UserError(
            f"{run.folder} is being trained in by process {owner}; wait for it or stop it"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def clear_folder(run: TrainRun) -> None:
    """Delete what an earlier run left, for `--fresh`."""
    if list_steps(run.folder):
        say(f"--fresh: deleting the earlier run in {run.folder}")
    for entry in run.folder.iterdir():
        if entry.name == ".lock":
            continue
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def check_settings(run: TrainRun, saved: dict[str, Any]) -> None:
    """Raise UserError naming each setting that differs from the run's and would change its course."""
    names = sorted((saved.keys() | run.config.keys()) - FREE_SETTINGS)
    different = [name for name in names if saved.get(name) != run.config.get(name)]
    if different:
        shown = ", ".join(
            f"--{name} was {saved.get(name)}, is {run.config.get(name)}" for name in different
        )
        raise UserError(
            f"{run.folder} was begun with other settings ({shown}); use those, or --fresh to start over"
        )
