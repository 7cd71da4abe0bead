"""What checkpoints cost: the time of 20 steps with a save at their beginning, against 20 steps without one.

    python -m dev.bench.checkpoint_speed --depth 4 --max_seq_len 512 --device_batch_size 8     # laptop

Blocks of steps with and without a save follow each other in turns, with the corpus and the tokenizer prepared last.
A block ends with its steps; what its save still writes then is waited for outside both.
"""

import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from dev.bench import train_speed
from dev.bench.train_speed import Trainer
from nanochat.checkpoint import CheckpointWriter, list_steps, step_dir
from nanochat.common import run_script, set_up


@dataclass
class Config:
    train: tyro.conf.OmitArgPrefixes[train_speed.Config]  # as of train_speed
    save_every: int = 20  # steps of a block
    num_rounds: int = 5  # blocks of each kind


def block(trainer: Trainer, num_steps: int, writer: CheckpointWriter | None, step: int) -> float:
    """Seconds of `num_steps` steps, with a save at their beginning where there is a writer."""
    begin = time.perf_counter()
    if writer:
        state = {"step": step, "model_config": asdict(trainer.config)}
        moments = trainer.optimizer.export_state()
        writer.start(state, trainer.model.state_dict(), moments, lambda: None)
    trainer.steps(num_steps)
    seconds = time.perf_counter() - begin
    if writer:
        writer.wait()
    return seconds


def main(cfg: Config) -> None:
    """Print the medians, their ratio, and the size of a checkpoint."""
    runtime = set_up(cfg.train.device_type, cfg.train.dtype)
    trainer = Trainer(cfg.train, runtime)
    trainer.steps(cfg.train.num_warmup)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), 1, runtime)
        block(trainer, 1, writer, 0)  # the first one allocates
        for number in range(1, cfg.num_rounds + 1):
            for saves in (True, False) if number % 2 else (False, True):
                own = block(trainer, cfg.save_every, writer if saves else None, number)
                seconds[saves].append(own)
        newest = step_dir(writer.run, list_steps(writer.run)[-1])
        size = sum(file.stat().st_size for file in newest.iterdir())
    trainer.loader.close()
    medians = {saves: statistics.median(own) for saves, own in seconds.items()}
    print(
        f"{size / 1e6:.0f} MB; {cfg.save_every} steps: {medians[True]:.2f} s with a save, {medians[False]:.2f} s without: ",
        end="",
    )
    print(f"{100 * (medians[True] / medians[False] - 1):.2f} % more")


if __name__ == "__main__":
    run_script(main, Config)
