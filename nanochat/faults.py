"""What goes wrong while a run trains, and how it ends: signals, ranks that are gone, gradients that are not finite.

SIGTERM and SIGINT are noted, agreed on by all ranks at the end of the step, and then the run saves and exits; a
second one exits at once. A rank that waits too long for another one prints where each of its threads stands and
exits, and so does the job: torchrun ends the others, and with --max-restarts starts all of them again. Steps
whose gradient was not finite have changed nothing (nanochat/optim.py); three in a row stop the run.

The choice that would surprise: ranks agree once a step through host memory, in a gloo group of their own. It costs
a third of a millisecond and, unlike a word sent between the GPUs, makes no host wait for its device.
"""

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nanochat.paths import UserError
from nanochat.runtime import Runtime, patience

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
            faulthandler.dump_traceback_later(patience(), exit=True)

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
