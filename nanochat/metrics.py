"""What a run measured: one line per step on the console, one object per step in metrics.jsonl, optional wandb.

    step 00020/00300 (6.7%) | loss 5.1202 | lrm 1.00 | 812 ms | 5,044 tok/s | mfu 48.1% | data 0.1% | 16s so far | 3m 47s left

Losses stay on the device until `flush`, which the trainer calls every `--log_every` steps and before a save:
reading one earlier would make the host wait for the device. A record is on disk before the checkpoint that
follows it, and a resumed run cuts the file back to its own step, so each step stands in the file once.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from nanochat.paths import UserError, write_file


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
