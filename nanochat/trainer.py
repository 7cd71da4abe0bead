"""What trainers share: the run folder, step timing and metrics, faults, micro-batch sizes.

`Run` is one run's locked folder: it resumes, saves and ends it. `Meter` times the steps, prints a
line every `--log_every` steps and writes an object per step to metrics.jsonl and wandb:

    step 00020/00300 (6.7%) | loss 5.1202 | lrm 1.000 | 812 ms | 5,044 tok/s | mfu 48.1% | ...

Losses stay on the device until a line or a save is due: reading one blocks the host. Three steps in
a row with a non-finite gradient stop the run at its next line or save. A rank that waits too long
for another prints its threads' stacks and exits; torchrun then ends or restarts all ranks.

Asked to stop, by SIGTERM, SIGINT, SIGHUP, SIGUSR1 or the end of its time, a rank skips to the last
micro-batch of the step, where all ranks agree to forget it; the run is saved as it was before. An
evaluation is not cut short.
"""

import faulthandler
import fcntl
import gc
import json
import os
import shutil
import signal
import stat
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat import checkpoint
from nanochat.common import (
    Choice,
    Runtime,
    StreamFlags,
    UserError,
    all_reduce_sum,
    barrier,
    base_dir,
    dist_timeout,
    free_memory,
    fsync,
    git_revision,
    gpu_memory,
    has_c_compiler,
    leave,
    out_of_memory,
    print0,
    run_dir,
    stop_time,
    write_file,
)
from nanochat.dataloader import IGNORED, Batch, Loader, local_rows
from nanochat.gpt import GPT, GPTConfig, call
from nanochat.loss import gpu_chunk
from nanochat.optim import MuonAdamW
from nanochat.scaling import (
    flops_per_token,
    measure_flops,
    memory_bytes,
    parameter_counts,
    peak_flops,
)
from nanochat.tokenizer import Tokenizer

USABLE = 0.97  # of a GPU's free memory; the rest is fragmentation
CPU_TOKENS = 4096  # per micro-batch with `auto` on a CPU; more gained nothing (dev/LOG.md)
MAX_BAD_STEPS = 3  # in a row
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SAME_SIGNAL_SECONDS = 1.0  # Slurm and torchrun both forward a signal; that is not a second one
SAVE_RATE = 1e8  # bytes a second that a slow disk takes: before a save was timed, for --stop_after
WANDB_SECONDS = 10  # that wandb may take to answer
# What torch.compile may make of one function: parts of a model, kinds of layers, with and without
# gradients, shapes. Its own limit of 8 is for functions that change by mistake.
COMPILED_FORMS = 128
COMPILE_TIMEOUT = timedelta(hours=2)  # for a rank with a cold compiler cache
# Settings that a resumed run may change: they affect the weights through float rounding at most.
# "weights", "corpus" and "own" are compared in place of model_tag, source, step, data and files.
FREE_SETTINGS = {
    "run", "fresh", "device_type", "device_batch_size", "log_every", "save_every", "eval_every",
    "eval_tokens", "eval_problems", "eval_samples", "sample_every", "compile", "keep_last",
    "num_slots", "model_tag", "source", "step", "data", "deterministic", "recompute", "stop_after",
    "extend", "new_tag", "custom", "identity",
}  # fmt: skip
HORIZON = {"num_iterations", "target_param_data_ratio"}  # --extend trains on to another


# --- micro-batches


def row_choices(
    cfg: StreamFlags, num_tokens: int, seq_len: int, config: GPTConfig, runtime: Runtime
) -> tuple[int, list[tuple[int, bool]]]:
    """(rows of a batch of `num_tokens`; (rows, whether to recompute) of micro-batches to try).

    These are, in this order, either of `device_batch_size` rows, capped at a rank's, or for "auto"
    of all sizes that the device's memory may hold, the largest first. With `recompute` auto a GPU
    recomputes activations only where nothing fits without. Raises UserError naming the nearest
    sizes that divide.
    """
    num_rows, rest = divmod(num_tokens, seq_len)
    if rest:
        nearest = [seq_len * number for number in (num_rows, num_rows + 1) if number]
        raise UserError(
            f"--total_batch_size={num_tokens} is not a multiple of "
            f"--max_seq_len={seq_len}; use {' or '.join(map(str, nearest))}"
        )
    local = len(local_rows(num_rows, runtime))
    sizes = [size for size in range(local, 0, -1) if local % size == 0]
    kind = runtime.device.type
    modes = [cfg.recompute == "yes"] if cfg.recompute != "auto" or kind == "cpu" else [False, True]
    if cfg.device_batch_size != "auto":
        rows = min(cfg.device_batch_size, local)
        if rows not in sizes:
            nearest = sorted(sizes, key=lambda size: (abs(size - rows), size))[:2]
            choices = " or ".join(f"--device_batch_size={size}" for size in sorted(nearest))
            raise UserError(
                f"--device_batch_size={rows} does not divide the {local} rows of a rank's batch; "
                f"use {choices}"
            )
        return num_rows, [(rows, mode) for mode in modes]
    if kind == "cpu":
        rows = max(size for size in sizes if size == 1 or size * seq_len <= CPU_TOKENS)
        return num_rows, [(rows, modes[0])]
    needed = partial(
        memory_bytes, replace(config, sequence_len=seq_len), world_size=runtime.world_size,
        compute_bytes=runtime.dtype.itemsize, table_bytes=2 if cfg.table_dtype == "bfloat16" else 4,
        chunk=gpu_chunk(gpu_memory(runtime.device)),
    )  # fmt: skip
    room = USABLE * gpu_memory(runtime.device)
    if kind == "cuda":  # what is free, or this process's already
        own = torch.cuda.memory_reserved(runtime.device)
        room = USABLE * (free_memory(runtime.device) + own)
    tried = [(rows, mode) for mode in modes for rows in sizes]
    # On any rank: all have to try the same.
    too_large = agree(*(needed(rows, recompute=mode)["total"] > room for rows, mode in tried))
    fitting = [choice for choice, bad in zip(tried, too_large, strict=True) if not bad]
    return num_rows, fitting or tried[-1:]


def compile_parts(model: GPT, choice: Choice) -> None:
    """Have the model call its parts compiled, if `choice` says so and there is a C compiler.

    Only losses call them so: sampling has other shapes, each of which would be compiled.
    """
    if choice == "no" or (choice == "auto" and not model.wte.weight.is_cuda):
        return
    if not has_c_compiler():
        print0("no C compiler: training without torch.compile; `apt-get install gcc` mends it")
        return
    torch._dynamo.config.recompile_limit = COMPILED_FORMS
    # The compiler looks at this attribute of every input.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    model.call_part = torch.compile(call, dynamic=False)


def fits_memory(model: GPT, optimizer: MuonAdamW, rows: int, seq_len: int) -> bool:
    """True if a step on zeros fits into the device's memory; changes nothing."""
    device = model.wte.weight.device
    # Two tensors: code compiled for targets that alias the inputs would fit no real batch.
    ids, targets = (torch.zeros(rows, seq_len, dtype=torch.long, device=device) for _ in range(2))
    try:
        model(ids, targets, reduction="sum").backward()
        # Several ranks have the gathered weights in place of the gradients, so a step needs little
        # more; and one rank that fails amid a collective would stop the others.
        if device.type == "cuda" and optimizer.world_size == 1:
            rehearse_step(optimizer)
        fits = True
    except torch.OutOfMemoryError:
        fits = False
    model.zero_grad()
    if not fits:
        torch.cuda.empty_cache()
    return fits


def rehearse_step(optimizer: MuonAdamW) -> None:
    """A step with an infinite gradient, which takes as much memory as any and changes nothing."""
    scale = optimizer.scale_state.clone()
    optimizer.param_groups[0]["params"][0].grad.fill_(float("inf"))
    optimizer.step()
    optimizer.scale_state.copy_(scale)


def compile_for_training(
    model: GPT,
    optimizer: MuonAdamW,
    choice: Choice,
    choices: list[tuple[int, bool]],
    seq_len: int,
) -> int:
    """The rows that fit on every rank, once the model is compiled if `choice` says so.

    Of `choices` it sets `model.recompute`, too. The trial runs report at once that a GPU is too
    small, and wait for ranks with a cold compiler cache where nothing times out. Raises UserError
    if no choice fits.
    """
    compile_parts(model, choice)
    is_compiled, on_gpu = model.call_part is not call, model.wte.weight.is_cuda
    if is_compiled and on_gpu:
        optimizer.compile()
    is_tried = is_compiled or on_gpu
    for rows, model.recompute in choices:
        if not is_tried or agree(not fits_memory(model, optimizer, rows, seq_len)) == [0]:
            recomputed = ", activations recomputed" if model.recompute else ""
            print0(f"{rows} rows at a time on each device{recomputed}")
            return rows
    raise out_of_memory({"device_batch_size": choices[-1][0]})


# --- ranks


@cache
def _host_group() -> Any:
    return dist.new_group(backend="gloo", timeout=COMPILE_TIMEOUT)


def agree(*flags: int) -> list[int]:
    """The maximum of each flag over all ranks.

    Through host memory: a third of a millisecond, and unlike a GPU message it never blocks on the
    device.
    """
    values = torch.tensor(flags, dtype=torch.int32)
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX, _host_group())
    return values.tolist()


def restart_watchdog() -> None:
    """Print all stacks and exit unless called again in time; no-op on a single rank."""
    if dist.is_initialized():
        faulthandler.dump_traceback_later(dist_timeout(), exit=True)


# --- measuring


def format_seconds(seconds: float) -> str:
    minutes, whole_seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {whole_seconds:02d}s" if minutes else f"{whole_seconds}s"


def to_number(value: Any) -> Any:
    """A tensor's value, rounded to fp32's seven digits; anything else unchanged."""
    value = value.item() if isinstance(value, Tensor) else value
    return float(f"{value:.7g}") if isinstance(value, float) else value


def read_metrics(folder: Path, last: float = float("inf")) -> list[dict[str, Any]]:
    """The records of a run up to step `last`; a torn last line is dropped."""
    records: list[dict[str, Any]] = []
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
            if record["step"] <= last:
                records.append(record)
        except (json.JSONDecodeError, KeyError):
            break
    return records


class Meter:
    """Times a run's steps and reports them: console line, metrics.jsonl, wandb.

    A step's record stays open until the next step is logged, so that what is measured after the
    update (val_bpb) belongs to it; checkpoints include the open record.
    """

    def __init__(self, run: "Run", peak: float, flops_per_token: float) -> None:
        """mfu refers to a rank's `peak` FLOP/s. Truncates metrics.jsonl to the resumed step."""
        state = run.resumed.state if run.resumed else {}
        self.run, self.peak, self.measured_at = run, peak, 0.0  # of `seconds`
        self.flops_per_token = flops_per_token / run.runtime.world_size
        self.tokens: int = state.get("tokens", 0)  # of all ranks since the run began
        self.seconds: float = state.get("seconds", 0.0)  # in steps: no evaluation, no save
        self.record: dict[str, Any] = state.get("record", {"step": 0, "tokens": 0, "seconds": 0.0})
        self.num_skipped, self.num_bad_in_a_row = state.get("skipped", (0, 0))
        # (step, were loss and gradient finite?, function for the place in the data after its batch)
        self.unread: list[tuple[int, Tensor, Callable[[], Any]]] = []
        self.pending: list[dict[str, Any]] = []  # complete records not yet on disk
        self.clock = 0.0  # when the step began
        self.line_start = (run.step, self.tokens, self.seconds)  # at the last line
        self.wait_seconds = 0.0  # for data, since the last line
        self.path = run.folder / "metrics.jsonl" if run.runtime.is_main else None
        self.wandb: Any = None
        if self.path is not None:
            kept = read_metrics(run.folder, run.step - 1)
            write_file(self.path, "".join(json.dumps(record) + "\n" for record in kept))
            if run.config["run"] != "dummy":
                self.wandb = start_wandb(run.config, run.folder)
                run.at_exit.callback(self.tell_wandb, lambda: self.wandb.finish())
        run.at_exit.callback(self.flush)

    def start_step(self) -> None:
        restart_watchdog()
        self.clock = time.perf_counter()

    def fetch(self, loader: Loader) -> Batch:
        """Start a step with the next batch; counts the wait for data."""
        self.start_step()
        batch = next(loader)
        self.wait_seconds += time.perf_counter() - self.clock
        return batch

    def log_step(
        self,
        loss: Tensor,
        lr_multiplier: float,
        num_tokens: int,
        finite: Tensor | None = None,
    ) -> None:
        """Record the finished step, of `num_tokens` tokens over all ranks.

        loss () and finite (), the optimizer's verdict on the gradient, stay on the device until a
        line is due. Raises UserError after MAX_BAD_STEPS non-finite steps in a row.
        """
        run = self.run
        self.pending.append(self.record)
        if finite is not None:
            # A loss that is not finite is a fault even where a smaller scale might mend a gradient.
            sound = finite & loss.isfinite()
            self.unread.append((run.step, sound, run.position))
        line_due = run.is_due(run.config["log_every"])
        if line_due:
            loss = torch.tensor(loss.item())  # the one wait for the device
            self.check_gradients()
        self.tokens += num_tokens
        self.seconds += time.perf_counter() - self.clock
        _, tokens, seconds = self.line_start
        tok_per_second = (self.tokens - tokens) / max(self.seconds - seconds, 1e-9)
        if line_due and run.runtime.device.type == "cpu" and self.seconds > 2 * self.measured_at:
            # Again and again, since it may have been busy before.
            self.peak = max(self.peak, measure_flops(run.runtime, seconds=0.01))
            self.measured_at = self.seconds
        self.record = {
            "step": run.step, "progress": run.progress, "tokens": self.tokens,
            "seconds": self.seconds, "loss": loss,
            "lrm": lr_multiplier, "tok_per_second": tok_per_second,
            "mfu": tok_per_second * self.flops_per_token / self.peak,
        }  # fmt: skip
        if line_due:
            self.print_line()
            self.flush()
            self.line_start, self.wait_seconds = (run.step, self.tokens, self.seconds), 0.0
        run.is_whole = True

    def check_gradients(self) -> None:
        """Read which gradients were finite (blocks on the device); three bad in a row raise."""
        if not self.unread:
            return
        flags = torch.stack([finite for _, finite, _ in self.unread]).tolist()
        for (step, _, position), finite in zip(self.unread, flags, strict=True):
            self.num_skipped += not finite
            self.num_bad_in_a_row = 0 if finite else self.num_bad_in_a_row + 1
            if self.num_bad_in_a_row == MAX_BAD_STEPS:
                state = position()
                place = f", whose batch ends by document {state['documents']:,}" if state else ""
                raise UserError(
                    f"the loss or its gradient was not finite in {MAX_BAD_STEPS} steps in a row, "
                    f"up to step {step}{place}; look at the data there, or lower the learning rate "
                    "and use --fresh"
                )
        self.unread.clear()

    def print_line(self) -> None:
        """Print a parseable line about the steps since the last one."""
        run, record = self.run, self.record
        seconds = self.seconds - self.line_start[2]
        seconds_left = self.seconds * (1 - run.progress) / max(run.progress, 1e-9)
        num_steps = max(run.step, round(run.step / max(run.progress, 1e-9)))
        wait = self.wait_seconds / max(seconds, 1e-9)
        parts = [
            f"step {run.step:05d}/{num_steps:05d} ({100 * run.progress:.1f}%)",
            f"loss {float(record['loss']):.4f}",
            f"lrm {record['lrm']:.3f}",
            f"{1000 * seconds / (run.step - self.line_start[0]):.0f} ms",
            f"{record['tok_per_second']:,.0f} tok/s",
            f"mfu {100 * record['mfu']:.1f}%",
            f"data {100 * wait:.1f}%",
            f"{format_seconds(self.seconds)} so far",
            f"{format_seconds(seconds_left)} left",
        ]
        if later := float(os.environ.get("NANOCHAT_SECONDS_LATER") or 0):  # of the stages to come
            parts.append(f"{format_seconds(seconds_left + later)} of all stages")
        if wait > 0.1:
            parts.append("warning: training waits for data")
        if self.num_skipped:
            parts.append(f"{self.num_skipped} steps skipped, not finite")
        print0(" | ".join(parts))

    def note(self, **figures: Any) -> None:
        """Add measurements, such as val_bpb, to the step's record, and print the numbers."""
        self.record |= figures
        numbers = [f"{k} {v:.4f}" for k, v in figures.items() if isinstance(v, float)]
        print0(" | ".join([f"step {self.run.step:05d}", *numbers]))

    def state(self) -> dict[str, Any]:
        """The meter's part of a checkpoint; flushes earlier records first."""
        self.check_gradients()
        self.flush()
        if "loss" in self.record:
            self.record["loss"] = float(self.record["loss"])
        return {
            "tokens": self.tokens, "seconds": self.seconds, "record": self.record,
            "skipped": (self.num_skipped, self.num_bad_in_a_row),
        }  # fmt: skip

    def finish(self) -> dict[str, Any]:
        """The last step's record, now complete, and the run's folder."""
        self.pending.append(self.record)
        self.flush()
        figures = {name: to_number(value) for name, value in self.record.items()}
        figures.pop("progress", None)  # is 1
        return {"folder": str(self.run.folder.relative_to(base_dir()))} | figures

    def flush(self) -> None:
        records, self.pending = self.pending, []
        if not records or self.path is None:
            return
        records = [{name: to_number(v) for name, v in record.items()} for record in records]
        try:
            with self.path.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
            fsync(self.path)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error}") from error
        self.tell_wandb(lambda: [self.wandb.log(r, step=r["step"]) for r in records])

    def tell_wandb(self, call: Callable[[], Any]) -> None:
        """Make a call of wandb, if it is there; no error of it is a reason to stop."""
        try:
            if self.wandb:
                call()
        except Exception as error:  # it raises many kinds
            print0(f"wandb: {' '.join(str(error).split())}; going on without it")
            self.wandb = None


def start_wandb(config: dict[str, Any], folder: Path) -> Any:
    """A run of wandb; one in the run's folder where wandb cannot be reached or nobody is logged in.

    None, if it refuses even that. It never stops a run: each is said in one line.
    """
    settings: dict[str, Any] = {"project": "nanochat", "name": config["run"], "config": config}
    problem = "nobody is logged in"
    try:
        import wandb  # takes half a second

        limits = wandb.Settings(init_timeout=WANDB_SECONDS, finish_timeout=3 * WANDB_SECONDS)
        settings |= {"dir": folder, "settings": limits}
        if os.environ.get("WANDB_MODE") or wandb.api.api_key:
            try:
                return wandb.init(**settings)
            except wandb.Error as error:
                problem = " ".join(str(error).split())
        offline = wandb.init(mode="offline", **settings)
    except Exception as error:  # it raises many kinds, none of which is a reason to stop
        print0(f"wandb: {' '.join(str(error).split())}; training without it")
        return None
    mend = f"`wandb sync {folder}/wandb/offline-run-*` sends it once `wandb login` works"
    print0(f"wandb: {problem}; logging to {folder}; {mend}")
    return offline


# --- the run folder


def summed_loss(model: GPT, inputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """The sum () of the nats of all targets, times the weights (B, 1) of their rows if given."""
    if weights is None:
        return model(inputs, targets, reduction="sum")
    return (model(inputs, targets, reduction="none") * weights).sum()


class Run:
    """One run's folder, locked against other processes, and the run's progress.

    As a context manager it catches signals, waits for the last save however the run ends, and runs
    the callbacks of `at_exit`. If a single rank's GPU memory runs out outside an update, it saves.
    """

    def __init__(
        self, stage: str, model_tag: str, config: dict[str, Any], runtime: Runtime
    ) -> None:
        """Open or resume `stage`/`model_tag`; `config` holds the script's settings.

        Raises UserError if another process trains in the folder, or if the settings differ from the
        run's.
        """
        self.stage, self.runtime = stage, runtime
        self.config: dict[str, Any] = {
            k: str(v) if isinstance(v, Path) else v for k, v in config.items()
        }
        self.folder = run_dir(stage, model_tag)
        self.writer = checkpoint.CheckpointWriter(self.folder, config.get("keep_last", 3), runtime)
        with ExitStack() as at_exit:  # unlocks the folder again if it is refused
            self.resumed = open_folder(self.folder, config["fresh"], runtime, at_exit)
            state = self.resumed.state if self.resumed else {}
            before = state.get("config", self.config)
            check_settings(self.folder, before, self.config)
            self.at_exit = at_exit.pop_all()
        self.step: int = state.get("step", 0)  # updates made
        self.progress: float = state.get("progress", 0.0)  # share of the run that is done
        self.saved_step = self.step
        self.signal_number = 0  # the first that asked this process to stop
        self.received: dict[int, float] = {}  # when each came first
        self.stop_time = stop_time(config.get("stop_after", ""))
        # When it was asked whether to stop, and the most seconds between: an evaluation's, perhaps.
        self.asked_at, self.longest = time.monotonic(), state.get("longest", 0.0)
        self.more_state: dict[str, Any] = {}  # of a script, in every checkpoint
        self.rows = 0  # of a micro-batch
        self.is_whole = False  # weights and record are those of `step`
        # A run whose last checkpoints were deleted is not finished, nor one that is extended.
        ends = HORIZON & before.keys() & self.config.keys()
        is_longer = any(before[name] != self.config[name] for name in ends)
        self.is_finished = bool(
            self.resumed and not is_longer and result_step(self.folder) == self.step
        )
        if self.is_finished:
            more = ", --extend trains on" if "extend" in self.config else ""
            print0(f"{self.folder} is finished (step {self.step}); --fresh starts over{more}")
        elif self.resumed:
            print0(f"resuming {self.folder} at step {self.step}")

    def restore(self, model: GPT, optimizer: MuonAdamW) -> dict[str, Any] | None:
        """Load weights and optimizer state if resuming; returns the loader's state.

        Raises UserError if the checkpoint has another architecture, such as an older nanochat's.
        """
        if self.resumed is None:
            return None
        if self.resumed.model_config != model.config:
            raise UserError(
                f"{self.folder} has an older architecture; continue with the nanochat that began "
                "it, or use --fresh to start over"
            )
        model.load_state_dict(self.resumed.load_weights(self.runtime.device))
        optimizer.import_state(self.resumed.open_optimizer())
        return self.resumed.load_loader_state(self.runtime.rank, self.runtime.world_size)

    def start(
        self,
        model: GPT,
        optimizer: MuonAdamW,
        tokenizer: Tokenizer,
        rows: int,
        loader: Loader | None = None,
    ) -> Meter:
        """Announce the training, save tokenizer and settings in the run folder, return the meter.

        `rows` of a micro-batch is what an out-of-memory error suggests to lower.
        """
        self.model, self.optimizer, self.rows, self.loader = model, optimizer, rows, loader
        self.position = loader.state if loader else lambda: None  # in the data, after `step` steps
        peak, source = peak_flops(self.runtime)
        dtype = str(self.runtime.dtype).removeprefix("torch.")
        print0(
            f"{self.stage}: {parameter_counts(model.config)['total']:,} parameters, "
            f"depth {model.config.n_layer}, width {model.config.n_embd}, {dtype}, "
            f"{model.kernel} attention; mfu is against {peak / 1e12:.3g} TFLOP/s ({source})"
        )
        if self.runtime.is_main:
            tokenizer.save(self.folder / "tokenizer")
            settings = {"config": self.config, "git": git_revision()}
            write_file(self.folder / "config.json", json.dumps(settings, indent=1))
            (self.folder / "result.json").unlink(missing_ok=True)
        self.meter = Meter(self, peak, flops_per_token(model.config))
        gc.collect()
        self.at_exit.callback(gc.unfreeze)
        gc.freeze()  # collections then skip torch and the model
        saved = [part.values for part in optimizer.export_state().values()]
        self.num_bytes = sum(tensor.nbytes for tensor in (*saved, *model.state_dict().values()))
        signal.setitimer(signal.ITIMER_REAL, 0)  # of run_script: `is_asked` leaves time to save
        for number in STOP_SIGNALS:
            before = signal.getsignal(number)
            # What nohup and `&` have a process ignore, it goes on ignoring.
            if before != signal.SIG_IGN or number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._receive)
                self.at_exit.callback(signal.signal, number, before)
        self.asked_at, self.is_whole = time.monotonic(), True
        return self.meter

    def is_due(self, every: int) -> bool:
        """True at step 0, every `every` steps, and at the end; `every` <= 0: only at the end."""
        return self.progress >= 1 or (every > 0 and self.step % every == 0)

    def advance(self, progress: float) -> None:
        """Count the step whose update was made."""
        self.step, self.progress = self.step + 1, progress
        if self.loader:
            self.position = self.loader.state

    def accumulate(self, batch: Batch, weights: Tensor | None = None) -> Tensor:
        """The mean loss () over all ranks' targets; its gradient is added up over micro-batches.

        With weights (B, 1) each row's nats count that many times. The sum is divided by the number
        of all ranks' targets, so that the mean depends neither on the micro-batches nor on the
        number of ranks.
        """
        inputs, targets = batch
        num_targets = all_reduce_sum((targets != IGNORED).sum())
        num_targets.clamp_(min=1)  # the last rows of conversations may hold nothing to learn
        loss = torch.zeros((), device=self.runtime.device)
        for first in range(0, len(inputs), self.rows):
            rows = slice(first, first + self.rows)
            if first + self.rows >= len(inputs):
                self.stop_if_asked()
                self.optimizer.reduce_on_next_backward()  # average the gradients over the ranks
            elif self.is_asked():
                continue
            weight = None if weights is None else weights[rows]
            part = summed_loss(self.model, inputs[rows], targets[rows], weight) / num_targets
            # As the optimizer averages over ranks; the other scale is 1, but in fp16.
            (part * self.runtime.world_size * self.optimizer.loss_scale).backward()
            loss += part.detach()
        return all_reduce_sum(loss)

    def update(self, lr_multiplier: float, momentum: float, weight_decay: float) -> Tensor:
        """Make the optimizer's step, which `advance` then counts.

        Returns the verdict () of MuonAdamW.step on the gradient.
        """
        self.optimizer.set_multipliers(lr_multiplier, momentum, weight_decay)
        self.is_whole = False
        finite = self.optimizer.step()
        self.optimizer.zero_grad()
        return finite

    def is_asked(self) -> int:
        """The signal that asked this process to stop, SIGALRM if its time is nearly up, or 0.

        Nearly: a save, and what may come between two such questions, must still fit. Once asked, it
        stays so: a part of a step may have been left out.
        """
        saving = max(self.num_bytes / SAVE_RATE, 2 * self.writer.seconds)
        if time.time() + saving + 1.5 * self.longest + 1 > self.stop_time:
            self.signal_number = self.signal_number or signal.SIGALRM
        return self.signal_number

    def stop_if_asked(self) -> None:
        """End this process, once any rank was asked to, with the run saved as it was after `step`.

        Collective, called at least once a step. Raises UserError if a rank could not save.
        """
        now = time.monotonic()
        self.longest, self.asked_at = max(self.longest, now - self.asked_at), now
        number, failed = agree(self.is_asked(), self.writer.has_failed())
        if failed:
            self.writer.wait()
            raise UserError(f"another rank could not save in {self.folder}")
        restart_watchdog()
        if not number:
            return
        self.optimizer.zero_grad()
        self.save()
        self.writer.wait()
        if number in (signal.SIGALRM, signal.SIGUSR1):
            leave(f"stopped at step {self.step}, as the time is up")
        print0(f"stopped by {signal.Signals(number).name}; the same command resumes")
        sys.exit(128 + number)

    def checkpoint(self, every: int) -> None:
        """Stop if asked to; save if it is due."""
        self.stop_if_asked()
        if self.is_due(every):
            self.save()

    def save(self) -> None:
        """Write a checkpoint of `step` in the background, unless already saved."""
        if self.step == self.saved_step:
            return
        state = self.meter.state() | {
            "stage": self.stage, "step": self.step, "progress": self.progress,
            "config": self.config, "model_config": asdict(self.model.config), "git": git_revision(),
            "longest": self.longest,
        }  # fmt: skip
        weights, moments = self.model.state_dict(), self.optimizer.export_state()
        self.writer.start(state | self.more_state, weights, moments, self.position)
        self.saved_step = self.step

    def finish(self) -> dict[str, Any]:
        """Mark the run as finished once its last save is on disk; returns `Meter.finish`."""
        results = self.meter.finish()
        self.writer.wait()
        barrier()
        if self.runtime.is_main:
            write_file(self.folder / "result.json", json.dumps(results, indent=1))
        return results

    def __enter__(self) -> Self:
        self.at_exit.callback(faulthandler.cancel_dump_traceback_later)
        return self

    def _receive(self, number: int, _: Any) -> None:
        now = time.monotonic()
        first = self.received.setdefault(number, now)
        if number == signal.SIGHUP:  # the terminal is gone, and to write to it an error
            null = os.open(os.devnull, os.O_WRONLY)
            for descriptor in (1, 2):
                if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                    os.dup2(null, descriptor)
        if not self.signal_number:
            self.signal_number = number
            text = f"{signal.Signals(number).name}: saving; a second one exits at once\n"
            if self.runtime.is_main:
                with suppress(OSError):  # as print0, which the signal may have interrupted
                    os.write(1, text.encode())
        elif now - first > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        is_full = isinstance(error, torch.OutOfMemoryError)
        with self.at_exit:
            try:
                if is_full and self.is_whole and self.runtime.world_size == 1:  # others wait
                    self.optimizer.zero_grad()
                    torch.cuda.empty_cache()
                    self.save()
            finally:
                self.writer.wait()
        if is_full:
            rows = {"device_batch_size": self.rows} if self.rows else {}
            raise out_of_memory(self.config | rows) from error


def result_step(folder: Path) -> int | None:
    """The step at which the run ended, if it did."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((folder / "result.json").read_text())["step"]
    return None


def starts_over(fresh: bool) -> bool:
    """True to obey --fresh: not when torchrun restarts the same command after a fault."""
    return fresh and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def open_folder(
    folder: Path, fresh: bool, runtime: Runtime, at_exit: ExitStack
) -> checkpoint.Checkpoint | None:
    """The checkpoint to resume from, on every rank; `at_exit` unlocks the folder.

    Raises UserError if another process trains in it, it is not writable, or a rank cannot see it.
    """
    found = None
    if runtime.is_main:
        if folder.is_symlink():  # of a persona, to the base model that it shares
            raise UserError(f"{folder} is a link to another run; give a --model_tag of its own")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            at_exit.enter_context(lock_folder(folder))
            checkpoint.clear_strays(folder)
            if starts_over(fresh):
                clear_folder(folder)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error}") from error
        found = checkpoint.newest_checkpoint(folder)
    (step,) = agree(found.state["step"] if found else -1)
    if not folder.is_dir():
        raise UserError(f"{folder} is not on a disk that all machines share; set NANOCHAT_BASE_DIR")
    if step >= 0 and found is None:
        found = checkpoint.open_checkpoint(folder, step, verify=False)
    return found


def lock_folder(folder: Path) -> IO[str]:
    """The folder's lock; UserError names the pid of the process that has it."""
    file = (folder / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
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
    if checkpoint.list_steps(folder):
        print0(f"--fresh: deleting the earlier run in {folder}")
    # Last .fresh, by which a shell script asks again if this is cut short.
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == ".fresh"):
        if entry.name == ".lock":
            continue
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def check_settings(folder: Path, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise UserError naming each setting that differs from the run's and affects its weights.

    Settings present on one side only came or went with a version and are ignored.
    """
    free = FREE_SETTINGS | (HORIZON if settings.get("extend") else set())
    names = sorted((saved.keys() & settings.keys()) - free)
    different = [name for name in names if saved[name] != settings[name]]
    if different:
        longer = "extend" in settings and set(different) <= HORIZON
        another = "new_tag" in settings and "weights" in different
        labels = {"corpus": "--data", "weights": "the model that it starts from"}
        labels["own"] = "what --custom or --identity hold"
        shown = ", ".join(
            f"{labels.get(name, f'--{name}')} was {saved[name]}, is {settings[name]}"
            for name in different
        )
        raise UserError(
            f"{folder} was begun with other settings ({shown}); use those, "
            f"{'--extend to train on to another end, ' * longer}"
            f"{'--new_tag for a run of its own, ' * another}or --fresh to start over"
        )
