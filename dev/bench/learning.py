"""What an idea is worth: small models of several depths with and without it.

    python -m dev.bench.learning FOLDER                                  # the baseline alone
    python -m dev.bench.learning FOLDER --variant window_pattern=L       # with base_train's flags
    python -m dev.bench.learning FOLDER --depths 4 --seeds 3 --variant plain no-fp8
    python -m dev.bench.learning --compare base/d12 base/d12-idea        # two runs that are there

A tokenizer of 4,096 is trained on 20 M characters of the parquet shards in FOLDER, and with
base_train (T = 512, steps of 4,096 tokens) a model per depth, seed and side. Each is scored on the
first 96 documents of the last shard, cut to 1,000 characters and read alone. Tokens go with the
depth's parameters; depth 4 gets 300 steps, whose bar on our 77 MB of English is 1.86 bits per byte.

An idea's compute multiplier is what FLOPs the baseline needs for the idea's bits per byte, over
those of the idea: 1.1 saves a tenth. With two depths or more the baseline's models are the curve,
each with its whole schedule; --compare has only the baseline's way there (val_bpb in
metrics.jsonl), steeper in the warm-down, so that multipliers come out too near 1. Judge by the
trend over the depths: what helps the smallest most is what the largest does not need.
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

from nanochat import dataset
from nanochat.checkpoint import list_steps, load_model, open_checkpoint
from nanochat.common import (
    CheckpointFlags,
    Count,
    DeviceType,
    Dtype,
    Positive,
    Runtime,
    UserError,
    run_script,
    set_up,
)
from nanochat.dataset import find_corpus, read_texts
from nanochat.scaling import depth_to_config, flops_per_token, training_tokens
from nanochat.trainer import read_metrics
from scripts import base_train, tok_train

VOCAB_SIZE, SEQ_LEN, BATCH_TOKENS = 4096, 512, 4096
SCORED_DOCUMENTS, SCORED_CHARS = 96, 1000


@dataclass
class Config:
    folder: tyro.conf.Positional[Path | None] = None  # parquet shards; the last is held out
    depths: tuple[Count, ...] = (2, 4, 6)  # layers of the models
    seeds: Count = 1  # models of each depth and side, which differ in their initial weights
    variant: tuple[str, ...] = ()  # flags of base_train, without their dashes, that are the idea
    ratio: Positive = 0.293  # tokens per parameter of blocks and head
    compare: tuple[Path, Path] | None = None  # folders or metrics.jsonl: the baseline, the idea
    device_type: DeviceType = ""  # cpu, cuda or mps; empty: the best available
    dtype: Dtype = "auto"  # of the matmuls: auto, bfloat16, float16 or float32
    threads: int = 0  # of torch on a CPU; 0: as many as torch takes


class Point(NamedTuple):
    flops: float  # spent on training
    bpb: float
    seconds: float


def compute_multiplier(baseline: Sequence[Point], idea: Point) -> float:
    """FLOPs at which the baseline is as good, over the idea's; nan with fewer than two points.

    log bpb is linear in log FLOPs between the baseline's points; beyond them the last two go on.
    """
    curve: list[Point] = []
    for point in sorted(baseline):
        if point.flops > 0 and (not curve or point.bpb < curve[-1].bpb):  # no better: noise
            curve.append(point)
    if len(curve) < 2:
        return math.nan
    better = (i for i, point in enumerate(curve) if i and point.bpb <= idea.bpb)
    end = next(better, len(curve) - 1)
    low, high = curve[end - 1], curve[end]
    share = math.log(idea.bpb / low.bpb) / math.log(high.bpb / low.bpb)
    return low.flops * (high.flops / low.flops) ** share / idea.flops


def compare(paths: Sequence[Path]) -> None:
    """Print the compute multiplier of the second of two runs, by their metrics.jsonl."""
    curves: list[list[Point]] = []
    for path in paths:
        run = path.parent if path.suffix == ".jsonl" else path
        if not list_steps(run):
            raise UserError(f"{run} holds no checkpoint; --compare takes two folders of runs")
        flops = flops_per_token(
            open_checkpoint(run, list_steps(run)[-1], verify=False).model_config
        )
        records = [record for record in read_metrics(run) if "val_bpb" in record]
        curves.append([Point(r["tokens"] * flops, r["val_bpb"], r["seconds"]) for r in records])
        print(f"{run}: {describe(curves[-1][-1])}")
    print(f"compute multiplier {compute_multiplier(curves[0], curves[1][-1]):.3f}")


def describe(point: Point) -> str:
    return f"bpb {point.bpb:.4f}, {point.flops:.3e} FLOPs, {point.seconds:.0f} s"


def learn(cfg: Config, runtime: Runtime, folder: Path) -> None:
    """Print bpb, FLOPs and seconds of every model, then each depth's means and multiplier.

    Seed by seed, so that a run that is cut short has compared something.
    """
    dataset.main(dataset.Config(source=folder))
    tok_train.main(tok_train.Config(VOCAB_SIZE, max_chars=20_000_000, max_doc_chars=20_000_000))
    held_out = islice(read_texts([find_corpus().val]), SCORED_DOCUMENTS)
    documents = [text[:SCORED_CHARS] for text in held_out]
    sides = {"baseline": (), "idea": cfg.variant} if cfg.variant else {"baseline": ()}
    points: dict[tuple[str, int], list[Point]] = defaultdict(list)
    lines = []
    for depth, seed, side in product(cfg.depths, range(cfg.seeds), sides):
        tag = f"{side}-d{depth}-{seed}"
        train(cfg, depth, seed, tag, sides[side])
        points[side, depth].append(examine(tag, runtime, documents))
        lines.append(f"{side:8} depth {depth} seed {seed}: {describe(points[side, depth][-1])}")
        print(lines[-1], flush=True)
    print("\n".join(lines))
    means = {
        key: Point(*map(statistics.mean, zip(*some, strict=True))) for key, some in points.items()
    }
    baseline = [means["baseline", depth] for depth in cfg.depths]
    for depth in cfg.depths if cfg.variant else ():
        before, after = means["baseline", depth], means["idea", depth]
        multiplier = compute_multiplier(baseline, after)
        print(
            f"depth {depth}: bpb {before.bpb:.4f} -> {after.bpb:.4f}, "
            f"seconds x {after.seconds / before.seconds:.2f}, compute multiplier {multiplier:.3f}"
        )


def train(cfg: Config, depth: int, seed: int, tag: str, flags: Sequence[str]) -> None:
    config = depth_to_config(depth, VOCAB_SIZE, SEQ_LEN)
    settings = base_train.Config(
        depth=depth, max_seq_len=SEQ_LEN, total_batch_size=BATCH_TOKENS, device_batch_size=8,
        num_iterations=max(1, round(training_tokens(config, cfg.ratio) / BATCH_TOKENS)), seed=seed,
        model_tag=tag, eval_every=-1, eval_tokens=BATCH_TOKENS, save_every=-1, log_every=100,
        device_type=cfg.device_type, dtype=cfg.dtype,
    )  # fmt: skip
    arguments = [f"--{flag}" for flag in flags]
    base_train.main(tyro.cli(base_train.Config, args=arguments, default=settings))


@torch.inference_mode()
def examine(tag: str, runtime: Runtime, documents: list[str]) -> Point:
    """FLOPs and seconds of the steps of the run `tag`, and bits per byte of the documents."""
    model, tokenizer, meta = load_model(CheckpointFlags("base", tag), runtime, train=True)
    flops = meta["tokens"] * flops_per_token(model.config)
    nats = 0.0
    for ids in tokenizer.encode_batch(documents):
        row = torch.tensor([[tokenizer.bos_id, *ids]], device=runtime.device)
        nats += float(model(row[:, :-1], row[:, 1:], reduction="sum"))
    num_bytes = sum(len(document.encode()) for document in documents)
    return Point(flops, nats / math.log(2) / num_bytes, meta["seconds"])


def main(cfg: Config) -> None:
    if cfg.compare:
        compare(cfg.compare)
        return
    if cfg.folder is None:
        raise UserError("give a folder of parquet shards, or --compare and two runs")
    runtime = set_up(cfg.device_type, cfg.dtype)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    with tempfile.TemporaryDirectory() as home:
        os.environ["NANOCHAT_BASE_DIR"] = home
        learn(cfg, runtime, cfg.folder)


if __name__ == "__main__":
    run_script(main, Config)
