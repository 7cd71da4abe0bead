"""Generated tokens per second of the engine at 1, 4 and 16 slots, with a random model of depth 4.

    python -m dev.bench.engine_speed

The median of interleaved rounds, so that a busy machine disturbs all alike. A round generates 64 tokens for as
many requests as there are slots, each with a prompt of 32 tokens.
"""

import random
import statistics
import time
from dataclasses import dataclass

import torch
import tyro

from nanochat.chat_format import SPECIAL_TOKENS
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT
from nanochat.scaling import depth_to_config
from nanochat.tokenizer import SPLIT_PATTERN, Tokenizer


@dataclass
class Config:
    """How fast one process generates for 1, 4 and 16 at once."""

    depth: int = 4  # layers
    num_tokens: int = 64  # generated per request
    num_rounds: int = 7  # per number of slots
    device: str = "cpu"  # cpu or cuda


def one_round(engine: Engine, num_tokens: int, seed: int) -> float:
    """Tokens per second of one full set of requests."""
    ids = random.Random(seed)
    requests = [
        Request(ids.choices(range(256), k=32), num_tokens, top_k=50, seed=seed + i)
        for i in range(engine.num_slots)
    ]
    begin = time.perf_counter()
    count = sum(1 for _ in engine.run(requests))
    return count / (time.perf_counter() - begin)


def main(cfg: Config) -> None:
    """Print the median speed for each number of slots, and how much faster it is than one slot."""
    tokenizer = Tokenizer([bytes([byte]) for byte in range(256)], SPECIAL_TOKENS, SPLIT_PATTERN)
    model = GPT(depth_to_config(cfg.depth, 32768, 512))
    model.init_weights()
    model.to(cfg.device)
    if cfg.device == "cuda":
        model.set_compute_dtype(torch.bfloat16)
    speeds: dict[int, list[float]] = {1: [], 4: [], 16: []}
    engines = {n: Engine(model, tokenizer, num_slots=n) for n in speeds}
    for engine in engines.values():
        one_round(engine, 4, seed=0)  # warm-up
    for seed in range(cfg.num_rounds):
        for n, engine in engines.items():
            speeds[n].append(one_round(engine, cfg.num_tokens, seed))
    alone = statistics.median(speeds[1])
    for n, own in speeds.items():
        median = statistics.median(own)
        print(f"{n:3d} slots: {median:8.0f} tok/s, {median / alone:.2f} times one slot")


if __name__ == "__main__":
    main(tyro.cli(Config))
