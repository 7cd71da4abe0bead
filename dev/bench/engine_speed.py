"""Speed of the engine by number of slots, with a random model: tokens per second, memory traffic.

    python -m dev.bench.engine_speed
    python -m dev.bench.engine_speed --depth 20 --device cuda --slots 1 16 64

Medians of interleaved rounds, so that a busy machine affects all alike. In a round every engine
generates num_tokens for one request per slot, with prompts of 32 tokens, then answers a task's
questions, as chat_eval and chat_rl do. GB/s is the least a step must read (weights, visible keys
and values) over its time; compare it with the plain copy.
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
import tyro

from nanochat.checkpoint import build_model
from nanochat.common import set_up, synchronize
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT
from nanochat.scaling import depth_to_config
from nanochat.task_eval import evaluate_generate
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from tasks.primer import Arithmetic

PROMPT = 32  # tokens
VOCAB = 32768


@dataclass
class Config:
    depth: int = 4  # layers
    slots: tuple[int, ...] = (1, 4, 8, 16)  # at once; the others are compared with the first
    num_tokens: int = 64  # generated per request
    num_questions: int = 16  # of the task
    num_rounds: int = 5  # interleaved
    device: str = "cpu"  # cpu or cuda


def letter_tokenizer(vocab_size: int = VOCAB) -> Tokenizer:
    """Tokens are bytes and letter combinations, so that none need be trained."""
    words = (bytes(word) for size in (2, 3, 4) for word in product(range(97, 123), repeat=size))
    num_words = vocab_size - 256 - len(SPECIAL_TOKENS)
    tokens = [*(bytes([byte]) for byte in range(256)), *islice(words, num_words)]
    return Tokenizer(tokens, SPECIAL_TOKENS, SPLIT_PATTERN)


def random_model(depth: int, device: str) -> tuple[GPT, Tokenizer]:
    """A model with a context of 512."""
    runtime = set_up(device)
    model = build_model(depth_to_config(depth, VOCAB, 512), None, runtime)
    return model.to(runtime.dtype).eval(), letter_tokenizer()


def generate(engine: Engine, num_tokens: int, seed: int) -> int:
    """Run one request per slot; returns the tokens generated."""
    ids = random.Random(seed)
    requests = [
        Request(ids.choices(range(256), k=PROMPT), num_tokens, top_k=50, seed=seed + i)
        for i in range(engine.num_slots)
    ]
    return sum(1 for _ in engine.run(requests))


def answer(engine: Engine, num_tokens: int, num_questions: int) -> int:
    """Run a generative evaluation; returns the number of questions."""
    task = Arithmetic("test")[:num_questions]
    return len(evaluate_generate(engine, task, max_tokens=num_tokens, temperature=1.0).records)


def copy(source: torch.Tensor, target: torch.Tensor) -> int:
    """Copy once; returns the bytes read and written."""
    target.copy_(source)
    synchronize(source.device)
    return 2 * source.nbytes


def rate(work: Callable[..., int], *arguments: Any) -> float:
    begin = time.perf_counter()
    return work(*arguments) / (time.perf_counter() - begin)


def step_bytes(model: GPT, num_slots: int, length: int) -> int:
    """The least that a decode step reads when every slot holds `length` tokens."""
    tables = ("wte", "value_embeds")  # a few rows of them
    weights = sum(p.nbytes for n, p in model.named_parameters() if n.split(".")[0] not in tables)
    config = model.config
    seen = sum(min(length, config.window(i) or length) for i in range(config.n_layer))
    cell = 2 * config.n_kv_head * config.head_dim * model.compute_dtype.itemsize
    return weights + num_slots * seen * cell


def main(cfg: Config) -> None:
    model, tokenizer = random_model(cfg.depth, cfg.device)
    engines = [Engine(model, tokenizer, n, prefix_reuse=False) for n in cfg.slots]
    source, target = torch.ones(2, 2**26, device=cfg.device).unbind(0)  # 256 MiB each
    for engine in engines:
        generate(engine, 4, seed=0)  # warm-up
    copies, speeds, answers = [], [], []  # by round; of the last two, a list by engine
    for seed in range(cfg.num_rounds):
        copies.append(rate(copy, source, target))
        speeds.append([rate(generate, engine, cfg.num_tokens, seed) for engine in engines])
        limits = (cfg.num_tokens, cfg.num_questions)
        answers.append([rate(answer, engine, *limits) for engine in engines])
    print(f"a copy moves {statistics.median(copies) / 1e9:.1f} GB/s")
    speed = [statistics.median(own) for own in zip(*speeds, strict=True)]
    answered = [statistics.median(own) for own in zip(*answers, strict=True)]
    for i, n in enumerate(cfg.slots):
        traffic = step_bytes(model, n, PROMPT + cfg.num_tokens // 2) * speed[i] / n / 1e9
        print(
            f"{n:3d} slots: {speed[i]:7.0f} tok/s ({speed[i] / speed[0]:.2f} x), "
            f"{traffic:5.1f} GB/s; {answered[i]:6.2f} questions/s "
            f"({answered[i] / answered[0]:.2f} x)"
        )


if __name__ == "__main__":
    main(tyro.cli(Config))
