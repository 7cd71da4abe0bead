"""How fast a small model learns real text: bits per byte against tokens and against seconds.

Trains a tokenizer of 4,096 on 20 M characters, then depth 4 at T = 512 with 4,096 tokens a step for 300 steps,
exactly as `base_train --depth 4 --max_seq_len 512 --total_batch_size 4096 --num_iterations 300` would (fp32,
CPU), once per seed. Score: the first 96 documents of the last shard, each cut to 1,000 characters and fed alone
as <|bos|> + tokens; every token after it is scored.

    python -m dev.bench.learning --data FOLDER              parquet shards with a `text` column, three seeds
    python -m dev.bench.learning --data FOLDER --plain      the first-generation architecture

The bar on our 77 MB of English: 1.86 at 1.23 M tokens. Seconds count training steps only, not the scoring.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import tyro

from nanochat.dataloader import TextLoader
from nanochat.dataset import read_texts
from nanochat.gpt import GPT
from nanochat.scaling import (
    depth_to_config,
    lr_multiplier,
    make_optimizer,
    muon_momentum,
    weight_decay_multiplier,
)
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.trainer import accumulate

VOCAB_SIZE, TOKENIZER_CHARS = 4096, 20_000_000
DEPTH, SEQ_LEN, BATCH_TOKENS = 4, 512, 4096
SCORED_DOCUMENTS, SCORED_CHARS = 96, 1000


@dataclass
class Config:
    data: Path  # folder of parquet shards; the last one is for the score
    seeds: int = 3  # runs, which differ in their initial weights
    first_seed: int = 0  # of them
    steps: int = 300  # of 4,096 tokens
    score_every: int = 100  # steps between scores
    plain: bool = False  # the first-generation architecture
    threads: int = 2  # of torch


def first_chars(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The texts up to `limit` characters, the last one cut."""
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


@torch.inference_mode()
def score(model: GPT, tokenizer: Tokenizer, documents: list[str]) -> float:
    """Bits per byte of documents that are each fed alone."""
    nats = 0.0
    for ids in tokenizer.encode_batch(documents):
        row = torch.tensor([[tokenizer.bos_id, *ids]])
        nats += float(model(row[:, :-1], row[:, 1:], reduction="sum"))
    return nats / math.log(2) / sum(len(document.encode()) for document in documents)


def train(
    cfg: Config, seed: int, tokenizer: Tokenizer, shards: list[Path], documents: list[str]
) -> list[float]:
    """Train one model; prints and returns the score at every `score_every` steps."""
    model = GPT(depth_to_config(DEPTH, tokenizer.vocab_size, SEQ_LEN, plain=cfg.plain))
    model.init_weights(seed)
    optimizer = make_optimizer(model, BATCH_TOKENS, cfg.steps)
    num_rows = BATCH_TOKENS // SEQ_LEN
    loader = TextLoader(tokenizer, shards, num_rows, SEQ_LEN, 0, 1, torch.device("cpu"))
    scores, seconds = [], 0.0
    for step in range(cfg.steps + 1):
        if step % cfg.score_every == 0:
            scores.append(score(model, tokenizer, documents))
            print(f"{seed:4} {step:5} {step * BATCH_TOKENS:9,} {seconds:8.1f} {scores[-1]:7.3f}")
        if step == cfg.steps:
            break
        begin = time.perf_counter()
        accumulate(model, next(loader), num_rows, world_size=1)
        optimizer.set_multipliers(
            lr_multiplier(step, cfg.steps),
            muon_momentum(step, cfg.steps),
            weight_decay_multiplier(step / cfg.steps),
        )
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - begin
    loader.close()
    return scores


def main(cfg: Config) -> None:
    """Print a table of all seeds and the mean of their last scores."""
    torch.set_num_threads(cfg.threads)
    *shards, held_out = sorted(cfg.data.glob("*.parquet"))
    texts = first_chars(read_texts(shards), TOKENIZER_CHARS)
    tokenizer = Tokenizer.train(texts, VOCAB_SIZE, SPECIAL_TOKENS)
    documents = [text[:SCORED_CHARS] for text in islice(read_texts([held_out]), SCORED_DOCUMENTS)]
    print("seed  step    tokens  seconds     bpb")
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    runs = [train(cfg, seed, tokenizer, shards, documents) for seed in seeds]
    for index, at in enumerate(zip(*runs, strict=True)):
        print(f"mean {index * cfg.score_every:5}: {sum(at) / len(at):.4f} (worst {max(at):.4f})")


if __name__ == "__main__":
    main(tyro.cli(Config))
