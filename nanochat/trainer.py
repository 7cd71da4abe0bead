"""What every trainer shares: lock, resume, clock, console line, metrics, faults, micro-batches.

What a run measured: one line per step on the console, one object per step in metrics.jsonl, optional wandb.

    step 00020/00300 (6.7%) | loss 5.1202 | lrm 1.00 | 812 ms | 5,044 tok/s | mfu 48.1% | data 0.1% | 16s so far | 3m 47s left

Losses stay on the device until `flush`, which the trainer calls every `--log_every` steps and before a save:
reading one earlier would make the host wait for the device. A record is on disk before the checkpoint that
follows it, and a resumed run cuts the file back to its own step, so each step stands in the file once.

What goes wrong while a run trains, and how it ends: signals, ranks that are gone, gradients that are not finite.

SIGTERM and SIGINT are noted, agreed on by all ranks at the end of the step, and then the run saves and exits; a
second one exits at once. A rank that waits too long for another one prints where each of its threads stands and
exits, and so does the job: torchrun ends the others, and with --max-restarts starts all of them again. Steps
whose gradient was not finite have changed nothing (nanochat/optim.py); three in a row stop the run.

The choice that would surprise: ranks agree once a step through host memory, in a gloo group of their own. It costs
a third of a millisecond and, unlike a word sent between the GPUs, makes no host wait for its device.

How the rows of a step are cut into micro-batches that fit the device, and the model is compiled for them.

The size of a micro-batch changes nothing but speed and memory. The choice that would surprise: before training a
forward and a backward pass are made on zeros and thrown away. So a GPU that is too small says so before anything
is trained, and ranks whose compiler starts from a cold cache are waited for here, where nothing times out.

The verbs that every trainer shares: open a run, is it due, fetch, accumulate, update, save, finish.

A trainer reads as a loop of these verbs; the order of events stays in the script. `TrainRun` is the run folder
of one stage: it holds the lock, the place (step, tokens, seconds, progress), the console line, metrics.jsonl, the
checkpoints' writer and the guard against faults. After a signal the next `save` ends the process.

    with TrainRun("base", "d4", vars(cfg), runtime) as run:
        loader_state = run.restore(model, optimizer)
        run.begin(model, tokenizer)
        while True:
            if run.step > 0 and run.due(cfg.save_every): run.save(model, optimizer, loader.state)
            if run.due(cfg.eval_every): run.note(val_bpb=...)
            if run.progress >= 1: break
            batch = run.fetch(loader)
            loss = accumulate(model, batch, rows, world_size, optimizer=optimizer)
            optimizer.step()
            run.update(loss, lr_multiplier, progress, num_tokens)
        run.finish()

The choice that would surprise: the record of a step stays open until the next update, because what is measured
after the update (val_bpb) belongs to it; a checkpoint carries the open record along.
"""

import faulthandler
import fcntl
import gc
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Literal, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    clear_strays,
    list_steps,
    newest_checkpoint,
    open_checkpoint,
)
from nanochat.common import (
    Runtime,
    UserError,
    all_reduce_sum,
    barrier,
    base_dir,
    dist_timeout,
    git_revision,
    peak_flops,
    print0,
    run_dir,
    tokenizer_dir,
    write_file,
)
from nanochat.dataloader import Batch, Loader
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.scaling import flops_per_token, memory_bytes, parameter_counts
from nanochat.tokenizer import Tokenizer


class MetricsFile:
    """metrics.jsonl of one run, with wandb beside it where a run name is given."""

    def __init__(
        self, folder: Path, resumed_step: int, run_name: str, config: dict[str, Any]
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.pending: list[dict[str, Any]] = []
        write_file(self.path, "".join(line + "\n" for line in keep_until(self.path, resumed_step)))
        self.wandb = None
        if run_name != "dummy":
            import wandb  # half a second that only its users should wait for

            self.wandb = wandb.init(project="nanochat", name=run_name, config=config)

    def add(self, record: dict[str, Any]) -> None:
        """Keep one step's record; a loss in it may still be a tensor on the device."""
        self.pending.append(record)

    def flush(self) -> None:
        """Write the kept records, durably."""
        if not self.pending:
            return
        records = [
            {name: to_number(value) for name, value in record.items()} for record in self.pending
        ]
        self.pending.clear()
        try:
            with self.path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error}") from error
        if self.wandb is not None:
            for record in records:
                self.wandb.log(record, step=record["step"])

    def close(self) -> None:
        """Write what is kept and end the wandb run."""
        self.flush()
        if self.wandb is not None:
            self.wandb.finish()


def to_number(value: Any) -> Any:
    """A tensor's number, rounded to fp32's seven digits; anything else as it is."""
    value = value.item() if isinstance(value, torch.Tensor) else value
    return float(f"{value:.7g}") if isinstance(value, float) else value


def keep_until(path: Path, step: int) -> list[str]:
    """The lines of a metrics file up to and including `step`; a torn last line is dropped."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            break
    return kept


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All records of a run, in step order; a torn last line is dropped."""
    return [json.loads(line) for line in keep_until(folder / "metrics.jsonl", 2**62)]


def format_seconds(seconds: float) -> str:
    """A duration for people: 47s, 3m 47s, 2h 05m."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


MAX_BAD_STEPS = 3  # in a row
SAME_SIGNAL_SECONDS = 1.0  # Slurm and torchrun both pass a signal on; that is not a second one
COMPILE_TIMEOUT = timedelta(hours=2)  # ranks may wait this long for one with a cold cache


class Guard:
    """Looks out for the faults of one run; every rank has one."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        many = runtime.world_size > 1
        self.group: Any = dist.new_group(backend="gloo", timeout=COMPILE_TIMEOUT) if many else None
        self.signal_number, self.signal_time = 0, 0.0
        self.handlers: dict[int, Any] = {}
        self.unread: list[tuple[int, torch.Tensor, Callable[[], Any] | None]] = []
        self.num_skipped = self.num_in_a_row = 0

    def open(self) -> None:
        """Take over SIGTERM and SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self._receive)

    def close(self) -> None:
        """Hand the signals back and end the watch."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        faulthandler.cancel_dump_traceback_later()

    def _receive(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if not self.signal_number:
            self.signal_number, self.signal_time = number, now
            text = f"{signal.Signals(number).name}: saving after this step; a second one exits at once\n"
            if self.runtime.is_main:
                os.write(1, text.encode())  # print may be what was interrupted
        elif now - self.signal_time > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)

    def watch(self) -> None:
        """Print all stacks and exit unless this is called again in time; one rank alone has nobody to wait for."""
        if self.runtime.world_size > 1:
            faulthandler.dump_traceback_later(dist_timeout(), exit=True)

    def agree(self, *flags: int) -> list[int]:
        """The largest of each flag over the ranks, which are waited for."""
        values = torch.tensor(flags, dtype=torch.int32)
        if self.group is not None:
            dist.all_reduce(values, dist.ReduceOp.MAX, self.group)
        return values.tolist()

    def add_step(self, step: int, finite: torch.Tensor, place: Callable[[], Any] | None) -> None:
        """Note whether the gradient of `step` was finite, for `check_steps`; `place` gives the loader's state."""
        self.unread.append((step, finite, place))

    def check_steps(self) -> None:
        """Read the noted steps, which waits for the device. Raises UserError after three bad ones in a row."""
        if not self.unread:
            return
        flags = torch.stack([finite for _, finite, _ in self.unread]).tolist()
        for (step, _, place), finite in zip(self.unread, flags, strict=True):
            self.num_skipped += not finite
            self.num_in_a_row = 0 if finite else self.num_in_a_row + 1
            if self.num_in_a_row == MAX_BAD_STEPS:
                state = place() if place else None
                where = f", whose batch ends by document {state['documents']:,}" if state else ""
                raise UserError(
                    f"the loss or its gradient was not finite in {MAX_BAD_STEPS} steps in a row, up to step "
                    f"{step}{where}; look at the data there, or lower the learning rate and use --fresh"
                )
        self.unread.clear()


CPU_TOKENS = 4096  # of a micro-batch by `auto` on a CPU; larger ones gained nothing (dev/LOG.md)


def batch_rows(total_batch_size: int, seq_len: int) -> int:
    """Rows of the global batch. Raises UserError naming the nearest sizes when they are not whole."""
    if total_batch_size < seq_len or total_batch_size % seq_len:
        below = total_batch_size // seq_len * seq_len
        choices = " or ".join(str(size) for size in (below, below + seq_len) if size)
        raise UserError(
            f"--total_batch_size={total_batch_size} is not a multiple of --max_seq_len={seq_len}; use {choices}"
        )
    return total_batch_size // seq_len


def divisors(number: int) -> list[int]:
    """The divisors of `number`, the largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]


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
        nearest = sorted(divisors(local), key=lambda size: (abs(size - device_batch_size), size))
        choices = " or ".join(f"--device_batch_size={size}" for size in sorted(nearest[:2]))
        raise UserError(
            f"--device_batch_size={device_batch_size} does not divide the {local} rows of a rank's batch; use {choices}"
        )
    return rows


def row_choices(
    num_rows: int,
    device_batch_size: int | Literal["auto"],
    seq_len: int,
    config: GPTConfig,
    runtime: Runtime,
) -> list[int]:
    """Rows per micro-batch to try in this order; for "auto" on a GPU, all that its memory may hold."""
    if device_batch_size != "auto":
        return [split_rows(num_rows, device_batch_size, runtime.world_size)]
    local = split_rows(num_rows, num_rows, runtime.world_size)
    if runtime.device.type != "cuda":
        return [max(size for size in divisors(local) if size == 1 or size * seq_len <= CPU_TOKENS)]
    there = torch.cuda.mem_get_info(runtime.device)[1]
    config = replace(config, sequence_len=seq_len)
    needed = {
        size: memory_bytes(config, size, runtime.world_size)["total"] for size in divisors(local)
    }
    return [size for size in needed if needed[size] <= there] or [1]


def out_of_memory(rows: int) -> UserError:
    """What to say when micro-batches of `rows` rows do not fit; half divides a rank's rows wherever `rows` does."""
    smaller = next((size for size in divisors(rows) if size <= rows / 2), None)
    mend = f"try --device_batch_size={smaller}" if smaller else "train a smaller --depth"
    return UserError(f"out of GPU memory with --device_batch_size={rows}; {mend}")


def fits(model: torch.nn.Module, rows: int, seq_len: int, device: torch.device) -> bool:
    """True when a forward and a backward pass do not run out of the device's memory."""
    # Two tensors: the compiler's code for a batch whose targets are its inputs would serve no other.
    ids, targets = (torch.zeros(rows, seq_len, dtype=torch.long, device=device) for _ in range(2))
    try:
        model(ids, targets, reduction="sum").backward()
        fine = True
    except torch.OutOfMemoryError:
        fine = False
    model.zero_grad()
    if not fine:
        torch.cuda.empty_cache()
    return fine


def compile_for_training(
    model: GPT,
    choice: Literal["auto", "yes", "no"],
    row_choices: list[int],
    seq_len: int,
    guard: Guard,
) -> tuple[torch.nn.Module, int]:
    """(the model through torch.compile, if `choice` is yes or it is auto on a GPU; the rows that fit on every rank).

    Only training goes through it: evaluation and sampling have other shapes, each of which would compile anew.
    Raises UserError when no number of rows fits.
    """
    device, trained = guard.runtime.device, model
    if choice == "yes" or (choice == "auto" and device.type == "cuda"):
        trained = cast(torch.nn.Module, torch.compile(model, dynamic=False))
    elif device.type != "cuda":
        return model, row_choices[0]  # nothing to compile, and nothing to run out of
    for rows in row_choices:
        if guard.agree(not fits(trained, rows, seq_len, device)) == [0]:
            return trained, rows
    raise out_of_memory(row_choices[-1])


# What a resumed run may change: none of it reaches the weights but through float rounding. The last
# four name what "weights" and "corpus" stand for.
FREE_SETTINGS = {
    "run", "fresh", "device_type", "device_batch_size", "log_every", "save_every", "eval_every",
    "eval_tokens", "eval_problems", "eval_samples", "sample_every", "compile", "keep_last",
    "num_slots", "model_tag", "source", "step", "data",
}  # fmt: skip


def due(step: int, every: int, last: bool) -> bool:
    """True at step 0, every `every` steps and at the last; `every` <= 0: at the last alone."""
    return last or (every > 0 and step % every == 0)


def accumulate(
    model: torch.nn.Module,
    batch: Batch,
    rows: int,
    world_size: int,
    weights: Tensor | None = None,
    optimizer: MuonAdamW | None = None,
) -> Tensor:
    """Add the gradient of the global batch's mean loss, `rows` rows at a time; returns that loss, detached.

    The mean is over all targets of all ranks, so neither micro-batches nor ranks change it; the gradients are
    scaled so that their *average* over ranks, which the optimizer takes, is the gradient of that mean.
    `weights` (R, T) multiplies each target's loss (the advantages of a policy gradient). The `optimizer` begins to
    reduce gradients during the last backward pass; without it, in its step.
    """
    device = batch.targets.device
    # Filled on the device: a number copied there would make the host wait.
    num_targets = all_reduce_sum(torch.full((), batch.num_targets, device=device)).clamp(min=1)
    total = torch.zeros((), device=device)
    for begin in range(0, len(batch.inputs), rows):
        part = slice(begin, begin + rows)
        if weights is None:
            loss = model(batch.inputs[part], batch.targets[part], reduction="sum")
        else:
            losses = model(batch.inputs[part], batch.targets[part], reduction="none")
            loss = (losses.view_as(weights[part]) * weights[part]).sum()
        loss = loss / num_targets
        if optimizer and begin + rows >= len(batch.inputs):
            optimizer.reduce_on_next_backward()
        (loss * world_size).backward()
        total += loss.detach()
    return all_reduce_sum(total)


def starts_over(fresh: bool) -> bool:
    """Whether --fresh is to be obeyed: torchrun repeats the command after a fault, to go on."""
    return fresh and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def load_tokenizer(stage: str, model_tag: str, fresh: bool) -> Tokenizer:
    """The tokenizer that a run was begun with, or the one trained last for a run yet to begin."""
    run = run_dir(stage, model_tag)
    begun = list_steps(run) and not starts_over(fresh)
    return Tokenizer.load(run / "tokenizer" if begun else tokenizer_dir())


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
        self.at_exit = ExitStack()  # what is to be closed however the run ends
        self.guard = Guard(runtime)
        self.writer = CheckpointWriter(self.folder, config.get("keep_last", 3), runtime)
        try:
            self.resumed = open_run(self.folder, config["fresh"], self.guard, self.at_exit)
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
        self.guard.num_skipped, self.guard.num_in_a_row = state.get("skipped", (0, 0))
        self.stopping = 0  # the signal on which all ranks have agreed to stop
        self.rows: int = config.get("device_batch_size", 1)  # "auto": the trainer sets it
        self.optimizer: MuonAdamW | None = None
        self.place: Callable[[], Any] | None = None  # of the batch fetched last
        self.metrics: MetricsFile | None = None
        self.flops_per_second_at_peak = self.flops_per_token = 1.0
        self.clock = self.window_seconds = self.wait_seconds = 0.0
        self.window_tokens = self.window_steps = 0

    @property
    def finished(self) -> bool:
        """True when the run came to its end in an earlier call; says so."""
        done = (self.folder / "result.json").exists()
        if done:
            print0(f"{self.folder} is finished (step {self.step}); --fresh starts over")
        return done

    def restore(self, model: GPT, optimizer: MuonAdamW) -> dict[str, Any] | None:
        """Take over weights and moments where the run is resumed; returns the loader's state, or None."""
        self.optimizer = optimizer
        if self.resumed is None:
            return None
        print0(f"resuming {self.folder} at step {self.step}")
        model.load_state_dict(self.resumed.load_weights(self.runtime.device))
        optimizer.import_state(self.resumed.open_optimizer())
        return self.resumed.load_loader_state(self.runtime.rank, self.runtime.world_size)

    def begin(self, model: GPT, tokenizer: Tokenizer) -> None:
        """Say what is trained, write the run's copy of tokenizer and settings, and open metrics.jsonl."""
        peak, source = peak_flops(self.runtime)
        self.flops_per_token = flops_per_token(model.config)
        self.flops_per_second_at_peak = peak * self.runtime.world_size
        dtype = str(self.runtime.dtype).removeprefix("torch.")
        print0(
            f"{self.stage}: {parameter_counts(model.config)['total']:,} parameters, depth {model.config.n_layer}, "
            f"width {model.config.n_embd}, {dtype}; mfu is against {peak / 1e12:.3g} TFLOP/s ({source})"
        )
        if self.runtime.is_main:
            tokenizer.save(self.folder / "tokenizer")
            settings = {"config": self.config, "git": git_revision()}
            write_file(self.folder / "config.json", json.dumps(settings, indent=1))
            self.metrics = MetricsFile(self.folder, self.step - 1, self.config["run"], self.config)
            self.at_exit.callback(self.metrics.close)
        if self.resumed:  # now that everything is set up, which may have drawn numbers
            self.resumed.restore_generators(self.runtime.rank)
        gc.collect()
        self.at_exit.callback(gc.unfreeze)
        gc.freeze()  # what there is stays: collections no longer walk through torch and the model

    def due(self, every: int) -> bool:
        """True when something done every `every` steps falls on this step; always at the end of the run.

        And after a signal, for the save, which comes first in every loop and then ends the process.
        """
        return due(self.step, every, self.progress >= 1 or self.stopping > 0)

    def start_clock(self) -> None:
        """The step begins now; `update` ends it."""
        self.guard.watch()
        self.clock = time.perf_counter()

    def fetch(self, loader: Loader) -> Batch:
        """The next batch; starts the step's clock and counts the wait for data."""
        self.start_clock()
        batch = next(loader)
        self.place = loader.state
        self.wait_seconds += time.perf_counter() - self.clock
        return batch

    def update(self, loss: Tensor, lr_multiplier: float, progress: float, num_tokens: int) -> None:
        """Count one optimizer step over `num_tokens` tokens of all ranks; prints the line when it is due."""
        self.close_record()
        self.step, self.progress = self.step + 1, progress
        self.window_steps += 1
        self.tokens, self.window_tokens = self.tokens + num_tokens, self.window_tokens + num_tokens
        if self.optimizer is not None and self.optimizer.finite is not None:
            self.guard.add_step(self.step, self.optimizer.finite, self.place)
            self.optimizer.finite = None
        line_due = due(self.step, self.log_every, progress >= 1)
        if line_due:
            loss = torch.tensor(loss.item())  # the one wait for the device
            self.guard.check_steps()
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
        errors = self.writer.error is not None
        self.stopping, errors = self.guard.agree(self.guard.signal_number, errors)
        if errors:
            self.writer.wait()
            raise UserError(f"another rank could not save in {self.folder}")
        self.guard.watch()

    def print_line(self) -> None:
        """One parseable line about the steps since the last one; starts a new window of measurement."""
        left = self.seconds * (1 - self.progress) / max(self.progress, 1e-9)
        wait = self.wait_seconds / max(self.window_seconds, 1e-9)
        stall = " | warning: training waits for data" if wait > 0.1 else ""
        if self.guard.num_skipped:
            stall += f" | {self.guard.num_skipped} steps skipped, not finite"
        total = max(self.step, round(self.step / max(self.progress, 1e-9)))
        print0(
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
        texts = [f"{name} {value:.4f}" for name, value in figures.items()]
        print0(" | ".join([f"step {self.step:05d}", *texts]))

    def close_record(self) -> None:
        """The step's record is complete: hand it to metrics.jsonl."""
        if self.metrics:
            self.metrics.add(self.record)

    def save(
        self,
        model: GPT,
        optimizer: MuonAdamW,
        loader_state: Callable[[], dict[str, Any] | None] | None,
    ) -> None:
        """Write a checkpoint of this step in the background, unless it is the one that the run was resumed from.

        After a signal it is waited for, and the process exits with 128 plus the signal's number.
        """
        if not self.resumed or self.resumed.state["step"] != self.step:
            self.guard.check_steps()
            if self.metrics:
                self.metrics.flush()
            loss = self.record.get("loss")
            self.record |= {} if loss is None else {"loss": float(loss)}
            state = {
                "stage": self.stage, "step": self.step, "tokens": self.tokens, "seconds": self.seconds,
                "progress": self.progress, "record": self.record, "config": self.config,
                "skipped": (self.guard.num_skipped, self.guard.num_in_a_row),
                "model_config": asdict(model.config), "git": git_revision(),
            }  # fmt: skip
            weights, moments = model.state_dict(), optimizer.export_state()
            self.writer.start(state, weights, moments, loader_state or (lambda: None))
        if self.stopping:
            self.writer.wait()
            print0(f"stopped by {signal.Signals(self.stopping).name}; the same command goes on")
            raise SystemExit(128 + self.stopping)

    def results(self) -> dict[str, Any]:
        """The run's folder below the base folder and the figures of its last step, for the report."""
        figures = {name: to_number(value) for name, value in self.record.items()}
        return {"folder": str(self.folder.relative_to(base_dir()))} | figures

    def finish(self) -> None:
        """Mark the run as finished, with its results."""
        self.close_record()
        self.writer.wait()
        barrier()
        if self.runtime.is_main:
            write_file(self.folder / "result.json", json.dumps(self.results(), indent=1))

    def __enter__(self) -> Self:
        self.guard.open()
        self.at_exit.callback(self.guard.close)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        with self.at_exit:
            self.writer.wait()
        if isinstance(error, torch.OutOfMemoryError):
            raise out_of_memory(self.rows) from error


def open_run(folder: Path, fresh: bool, guard: Guard, at_exit: ExitStack) -> Checkpoint | None:
    """The checkpoint to go on from, on every rank; `at_exit` unlocks the folder.

    Raises UserError when another process trains in it, it cannot be written to, or a rank does not see it.
    """
    found = None
    if guard.runtime.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            at_exit.enter_context(lock_folder(folder))
            clear_strays(folder)
            if starts_over(fresh):
                clear_folder(folder)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error}") from error
        found = newest_checkpoint(folder)
    (step,) = guard.agree(found.state["step"] if found else -1)
    if not folder.is_dir():
        raise UserError(f"{folder} is not on a disk that all machines share; set NANOCHAT_BASE_DIR")
    if step >= 0 and found is None:
        found = open_checkpoint(folder, step, verify=False)
    return found


def lock_folder(folder: Path) -> IO[str]:
    """Hold the run folder for this process. Raises UserError with the pid of the process that holds it."""
    file = (folder / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise UserError(
            f"{folder} is being trained in by process {owner}; wait for it or stop it"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def clear_folder(folder: Path) -> None:
    """Delete what an earlier run left, for `--fresh`."""
    if list_steps(folder):
        print0(f"--fresh: deleting the earlier run in {folder}")
    for entry in folder.iterdir():
        if entry.name == ".lock":
            continue
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def check_settings(run: TrainRun, saved: dict[str, Any]) -> None:
    """Raise UserError naming each setting that differs from the run's and would change its course.

    A setting that only one of them has came or went with a version since.
    """
    names = sorted((saved.keys() & run.config.keys()) - FREE_SETTINGS)
    different = [name for name in names if saved[name] != run.config[name]]
    if different:
        labels = {"corpus": "--data", "weights": "the model that it starts from"}
        shown = ", ".join(
            f"{labels.get(name, f'--{name}')} was {saved[name]}, is {run.config[name]}"
            for name in different
        )
        raise UserError(
            f"{run.folder} was begun with other settings ({shown}); use those, or --fresh to start over"
        )
