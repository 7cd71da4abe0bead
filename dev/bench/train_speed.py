"""Training speed on any device: tok/s, MFU, memory.

    python -m dev.bench.train_speed --depth 20 --device_batch_size 32
    python -m dev.bench.train_speed --depth 24 --device_batch_size 16 --fp8 --compile yes
    python -m dev.bench.train_speed --depth 4 --max_seq_len 512 --device_batch_size 8      # laptop

Times whole steps as in base_train, then the parts of a step, synchronising after each, on the
corpus and with the tokenizer prepared last. What is learned: dev/bench/learning.py.
"""

import statistics
import time
import traceback
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import torch

from nanochat import common, fp8
from nanochat.checkpoint import build_model
from nanochat.dataloader import Loader, TextSource
from nanochat.dataset import find_corpus
from nanochat.gpt import GPTConfig, call
from nanochat.loss import gpu_chunk
from nanochat.scaling import (
    depth_to_config,
    flops_per_token,
    make_optimizer,
    memory_bytes,
    peak_flops,
)
from nanochat.tokenizer import Tokenizer
from nanochat.trainer import compile_for_training


@dataclass
class Config:
    depth: int = 20  # layers
    device_batch_size: int = 32  # rows of a step
    max_seq_len: int = 2048  # tokens of a row
    num_steps: int = 20  # of each pass; three of whole steps and one of their parts
    num_warmup: int = 5  # steps that are not counted: compilation, caches
    fp8: bool = False  # 8-bit matmuls
    compile: common.Choice = "auto"  # torch.compile; auto: on a GPU
    recompute: bool = False  # activations
    table_dtype: common.TableDtype = "auto"  # of the embeddings
    device_type: common.DeviceType = ""  # cpu, cuda or mps; empty: the best available
    dtype: common.Dtype = "auto"  # of the matmuls: auto, bfloat16, float16 or float32


def config_of(cfg: Config) -> GPTConfig:
    vocab_size = Tokenizer.load(common.tokenizer_dir()).vocab_size
    return depth_to_config(cfg.depth, vocab_size, cfg.max_seq_len)


def planned_bytes(cfg: Config, device: torch.device) -> int:
    """What a step should take of a GPU's memory."""
    options = {"recompute": cfg.recompute, "table_bytes": 2 if cfg.table_dtype == "bfloat16" else 4}
    chunk = gpu_chunk(common.gpu_memory(device))
    return memory_bytes(config_of(cfg), cfg.device_batch_size, chunk=chunk, **options)["total"]


def train(cfg: Config, runtime: common.Runtime) -> Generator[str]:
    """Trains a fresh model without end; yields the name of each part of a step when it is over."""
    model = build_model(config_of(cfg), None, runtime, table_dtype=cfg.table_dtype)
    linears = fp8.enable(model.blocks) if cfg.fp8 else []
    optimizer = make_optimizer(model, cfg.device_batch_size * cfg.max_seq_len, 1000)
    optimizer.set_multipliers(1.0, 0.95, 1.0)
    choices, length = [(cfg.device_batch_size, cfg.recompute)], cfg.max_seq_len
    compile_for_training(model, optimizer, cfg.compile, choices, length)
    source = TextSource(Tokenizer.load(common.tokenizer_dir()), find_corpus().train)
    with closing(Loader(source, cfg.device_batch_size, length, runtime)) as loader:
        while True:
            batch = next(loader)
            yield "data"
            loss = model(batch.inputs, batch.targets)
            yield "forward"
            loss.backward()
            yield "backward"
            optimizer.step()
            optimizer.zero_grad()
            fp8.refresh(linears, compiled=model.call_part is not call)
            yield "optimizer"


def seconds_of(parts: Iterator[str], num_steps: int, device: torch.device) -> float:
    begin = time.perf_counter()
    for _ in islice(parts, 4 * num_steps):
        pass
    common.synchronize(device)
    return time.perf_counter() - begin


def measure(cfg: Config, runtime: common.Runtime, parts: Iterator[str]) -> dict[str, float]:
    """Speed of whole steps, the share of each part, and on a GPU the memory, by name and unit."""
    config, device = config_of(cfg), runtime.device
    figures = {"first step, s": seconds_of(parts, 1, device)}  # with its compilation
    seconds_of(parts, cfg.num_warmup, device)
    passes = [seconds_of(parts, cfg.num_steps, device) for _ in range(3)]
    seconds = statistics.median(passes) / cfg.num_steps
    rate = cfg.device_batch_size * cfg.max_seq_len / seconds
    figures |= {"step, ms": 1000 * seconds, "tok/s": rate}
    figures["MFU, %"] = 100 * rate * flops_per_token(config) / peak_flops(runtime)[0]
    of_parts, begin = defaultdict(list), time.perf_counter()
    for part in islice(parts, 4 * cfg.num_steps):
        common.synchronize(device)
        now = time.perf_counter()
        of_parts[part].append(now - begin)
        begin = now
    medians = {part: statistics.median(times) for part, times in of_parts.items()}
    figures |= {f"{part}, %": 100 * m / sum(medians.values()) for part, m in medians.items()}
    if device.type == "cuda":
        planned, peak = planned_bytes(cfg, device), torch.cuda.max_memory_allocated(device)
        figures |= {"peak memory, GiB": peak / 2**30, "peak over plan": peak / planned}
    return figures


def longest_kernels(parts: Iterator[str], device: torch.device) -> dict[str, float]:
    """The ten kernels that take most of a GPU's time, in percent of two steps."""
    with torch.profiler.profile() as trace:
        seconds_of(parts, 2, device)
    events = [event for event in trace.key_averages() if event.device_type.name == "CUDA"]
    spent = {event.key[:60]: event.self_device_time_total for event in events}
    longest = sorted(spent, key=lambda name: -spent[name])[:10]
    return {f"{name}, %": 100 * spent[name] / sum(spent.values()) for name in longest}


def waits(parts: Iterator[str]) -> bool:
    """True if a step waits for the GPU; standard error says in which line."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in islice(parts, 4 * 5):
            pass
    except RuntimeError:
        traceback.print_exc()
        return True
    return False


def main(cfg: Config) -> None:
    runtime = common.set_up(cfg.device_type, cfg.dtype)
    device, rows = runtime.device, cfg.device_batch_size
    if device.type == "cuda":
        while rows > 1 and planned_bytes(cfg, device) > 0.95 * common.free_memory(device):
            rows = cfg.device_batch_size = rows // 2
    print(f"{runtime.device_name}, torch {torch.__version__}, {runtime.dtype}, {rows} rows")
    print(f"MFU is of the {peak_flops(runtime)[1]}")
    parts = train(cfg, runtime)
    figures = measure(cfg, runtime, parts)
    if device.type == "cuda":
        figures |= longest_kernels(parts, device)
        figures["steps that wait for the GPU"] = waits(parts)
    print("\n".join(f"{name}  {value:.5g}" for name, value in figures.items()))


if __name__ == "__main__":
    common.run_script(main, Config)
