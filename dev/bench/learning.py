"""What an idea is worth: small models of several depths with and without it.

    python -m dev.bench.learning FOLDER                                  # the baseline alone
    python -m dev.bench.learning FOLDER --variant window_pattern=L       # with base_train's flags
    python -m dev.bench.learning FOLDER --depths 4 --seeds 3 --variant plain no-fp8

A tokenizer of 4,096 is trained on 20 M characters of the parquet shards in FOLDER, and with
base_train (T = 512, steps of 4,096 tokens) a model per depth, seed and side. Each is scored on the
first 96 documents of the last shard, cut to 1,000 characters and read alone. Tokens go with the
depth's parameters; depth 4 gets 300 steps, whose bar on our 77 MB of English is 1.80 bits per byte.
Judge by the trend over the depths: what helps the smallest most is what the largest does not need.
"""

import math
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

from nanochat import common, dataset
from nanochat.checkpoint import load_model
from nanochat.dataset import find_corpus, read_texts
from nanochat.scaling import depth_to_config, flops_per_token, training_tokens
from scripts import base_train, tok_train

VOCAB_SIZE, SEQ_LEN, BATCH_TOKENS = 4096, 512, 4096
SCORED_DOCUMENTS, SCORED_CHARS = 96, 1000


@dataclass
class Config:
    folder: tyro.conf.Positional[Path]  # parquet shards; the last is held out
    depths: tuple[common.Count, ...] = (2, 4, 6)  # layers of the models
    seeds: common.Count = 1  # models of each depth and side, which differ in their initial weights
    variant: tuple[str, ...] = ()  # flags of base_train, without their dashes, that are the idea
    ratio: common.Positive = 0.293  # tokens per parameter of blocks and head
    device_type: common.DeviceType = ""  # cpu, cuda or mps; empty: the best available


class Outcome(NamedTuple):
    bpb: float
    flops: float  # spent on training
    seconds: float


def learn(cfg: Config, runtime: common.Runtime) -> None:
    """Print bpb, FLOPs and seconds of every model, then their means by depth and side.

    Seed by seed, so that a run that is cut short has compared something.
    """
    dataset.main(dataset.Config(source=cfg.folder))
    tok_train.main(tok_train.Config(VOCAB_SIZE, max_chars=20_000_000, max_doc_chars=20_000_000))
    held_out = islice(read_texts([find_corpus().val]), SCORED_DOCUMENTS)
    documents = [text[:SCORED_CHARS] for text in held_out]
    sides = {"baseline": (), "idea": cfg.variant} if cfg.variant else {"baseline": ()}
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    for depth, seed, side in product(cfg.depths, range(cfg.seeds), sides):
        tag = f"{side}-d{depth}-{seed}"
        train(cfg, depth, seed, tag, sides[side])
        own = outcomes[f"depth {depth}, {side}"]
        own.append(examine(tag, runtime, documents))
        print(tag, own[-1], flush=True)
    for name, own in outcomes.items():
        bpb, flops, seconds = map(statistics.mean, zip(*own, strict=True))
        print(f"{name:18} bpb {bpb:.4f}, {flops:.3e} FLOPs, {seconds:.0f} s")


def train(cfg: Config, depth: int, seed: int, tag: str, flags: Sequence[str]) -> None:
    config = depth_to_config(depth, VOCAB_SIZE, SEQ_LEN)
    settings = base_train.Config(
        depth=depth, max_seq_len=SEQ_LEN, total_batch_size=BATCH_TOKENS, device_batch_size=8,
        num_iterations=max(1, round(training_tokens(config, cfg.ratio) / BATCH_TOKENS)), seed=seed,
        model_tag=tag, eval_every=-1, eval_tokens=BATCH_TOKENS, save_every=-1, log_every=100,
        device_type=cfg.device_type,
    )  # fmt: skip
    arguments = [f"--{flag}" for flag in flags]
    base_train.main(tyro.cli(base_train.Config, args=arguments, default=settings))


@torch.inference_mode()
def examine(tag: str, runtime: common.Runtime, documents: list[str]) -> Outcome:
    """Bits per byte of the documents, and FLOPs and seconds of the steps of the run `tag`."""
    model, tokenizer, meta = load_model(common.CheckpointFlags("base", tag), runtime, train=True)
    flops = meta["tokens"] * flops_per_token(model.config)
    nats = 0.0
    for ids in tokenizer.encode_batch(documents):
        row = torch.tensor([[tokenizer.bos_id, *ids]], device=runtime.device)
        nats += float(model(row[:, :-1], row[:, 1:], reduction="sum"))
    num_bytes = sum(len(document.encode()) for document in documents)
    return Outcome(nats / math.log(2) / num_bytes, flops, meta["seconds"])


def main(cfg: Config) -> None:
    runtime = common.set_up(cfg.device_type, exact=True)
    with tempfile.TemporaryDirectory() as home:
        os.environ["NANOCHAT_BASE_DIR"] = home
        learn(cfg, runtime)


if __name__ == "__main__":
    common.run_script(main, Config)
