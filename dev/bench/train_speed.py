"""Training speed on whatever device there is: tok/s, MFU, peak memory, and where a step's time goes.

    python -m dev.bench.train_speed --depth 20 --device_batch_size 32
    python -m dev.bench.train_speed --depth 24 --device_batch_size 16 --fp8 --compile yes
    python -m dev.bench.train_speed --depth 4 --max_seq_len 512 --device_batch_size 8      # laptop

Trains a fresh model on the corpus and with the tokenizer prepared last. A first pass times whole steps as base_train
makes them, without waiting for the device in between; a second one waits after each part, to share the time out.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from nanochat import fp8
from nanochat.checkpoint import build_model
from nanochat.common import Runtime, peak_flops, run_script, set_up, synchronize, tokenizer_dir
from nanochat.dataloader import TextLoader
from nanochat.dataset import find_corpus
from nanochat.scaling import depth_to_config, flops_per_token, make_optimizer, memory_bytes
from nanochat.tokenizer import Tokenizer
from nanochat.trainer import Guard, compile_for_training


@dataclass
class Config:
    depth: int = 20  # layers
    device_batch_size: int = 32  # rows of a step
    max_seq_len: int = 2048  # tokens of a row
    num_steps: int = 20  # of each pass, after the warm-up
    num_warmup: int = 5  # steps that are not counted: compilation, caches
    fp8: bool = False  # 8-bit matmuls
    compile: Literal["auto", "yes", "no"] = "auto"  # torch.compile; auto: on a GPU
    device_type: str = ""  # cpu, cuda or mps; empty: the best there is
    dtype: str = "auto"  # of the matmuls: auto, float32 or bfloat16


class Trainer:
    """A fresh model, its optimizer and its data, and the time that each part of a step took."""

    def __init__(self, cfg: Config, runtime: Runtime) -> None:
        self.device = runtime.device
        tokenizer, shards = Tokenizer.load(tokenizer_dir()), find_corpus().train
        sizes = (cfg.device_batch_size, cfg.max_seq_len)
        self.loader = TextLoader(tokenizer, shards, *sizes, 0, 1, self.device, None)
        self.config = depth_to_config(cfg.depth, tokenizer.vocab_size, cfg.max_seq_len)
        self.model = model = build_model(self.config, None, runtime, seed=0)
        self.linears = fp8.enable(model.blocks) if cfg.fp8 else []
        self.optimizer = make_optimizer(model, cfg.device_batch_size * cfg.max_seq_len, 1000)
        self.optimizer.set_multipliers(1.0, 0.95, 1.0)
        guard = Guard(runtime)
        self.compiled, _ = compile_for_training(
            model, cfg.compile, [cfg.device_batch_size], cfg.max_seq_len, guard
        )
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def part(self, name: str, wait: bool) -> Iterator[None]:
        """Times what is inside, to the end of its work on the device; not unless `wait`."""
        begin = time.perf_counter()
        yield
        if wait:
            synchronize(self.device)
            self.seconds.setdefault(name, []).append(time.perf_counter() - begin)

    def step(self, wait: bool) -> None:
        """One optimizer step."""
        with self.part("data", wait):
            batch = next(self.loader)
        with self.part("forward", wait):
            loss = self.compiled(batch.inputs, batch.targets)
        with self.part("backward", wait):
            loss.backward()
        with self.part("optimizer", wait):
            self.optimizer.step()
            self.optimizer.zero_grad()
            fp8.refresh(self.linears)

    def steps(self, num: int, wait: bool = False) -> float:
        """Seconds of `num` steps."""
        begin = time.perf_counter()
        for _ in range(num):
            self.step(wait)
        synchronize(self.device)
        return time.perf_counter() - begin


def main(cfg: Config) -> None:
    """Measure and print one table."""
    runtime = set_up(cfg.device_type, cfg.dtype)
    trainer = Trainer(cfg, runtime)
    trainer.steps(cfg.num_warmup)
    seconds = trainer.steps(cfg.num_steps) / cfg.num_steps
    trainer.steps(cfg.num_steps, wait=True)
    trainer.loader.close()
    peak, source = peak_flops(runtime)
    rate = cfg.device_batch_size * cfg.max_seq_len / seconds
    mfu = rate * flops_per_token(trainer.config) / peak
    print(f"{runtime.device_name}, torch {torch.__version__}, {runtime.dtype}, fp8 {cfg.fp8}")
    print(
        f"depth {cfg.depth}, {cfg.device_batch_size} x {cfg.max_seq_len}: {1000 * seconds:.1f} ms "
        f"a step, {rate:,.0f} tok/s, MFU {100 * mfu:.1f} % of {source}"
    )
    medians = {part: statistics.median(own) for part, own in trainer.seconds.items()}
    total = sum(medians.values())
    print(", ".join(f"{part} {100 * own / total:.1f} %" for part, own in medians.items()))
    if runtime.device.type == "cuda":
        measured = torch.cuda.max_memory_allocated(runtime.device)
        planned = memory_bytes(trainer.config, cfg.device_batch_size)["total"]
        print(f"peak memory {measured / 2**30:.1f} GiB, planned {planned / 2**30:.1f} GiB")


if __name__ == "__main__":
    run_script(main, Config)
