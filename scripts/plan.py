"""What a run will cost, before it starts: parameters, tokens, memory, disk, hours and dollars of every stage.

    python -m scripts.plan --depth 24 --ratio 12                     # the $100 tier, 8 H100s at $3 an hour each
    python -m scripts.plan --depth 26 --gpus 8 --gpu h100 --price 3
    python -m scripts.plan --dollars 1000                            # depth and ratio chosen for that much money
    python -m scripts.plan --dollars 1000 --depth 32                 # the ratio that it pays for at this depth
    python -m scripts.plan --depth 24 --ratio 12 --only shards       # one number, for scripts

All of it is arithmetic (nanochat/scaling.py); nothing is measured and no GPU is needed. The assumptions stand
below, each with its origin. The one that matters most is `--mfu`.

The choice that would surprise: depth and ratio for a sum of money are those whose ratio is nearest to 10.5
tokens per parameter of blocks and head, where the fitted scaling laws put the optimum (loss is flat around it).

reads: nothing
writes: nothing
"""

import math
from dataclasses import dataclass
from typing import Literal

from nanochat.common import (
    PEAK_BF16_FLOPS,
    Count,
    Positive,
    PositiveShare,
    UserError,
    print0,
    run_script,
)
from nanochat.scaling import (
    batch_tokens,
    depth_to_config,
    flops_per_token,
    memory_bytes,
    parameter_counts,
    training_tokens,
)

BEST_RATIO = (
    10.5  # tokens per parameter of blocks and head; karpathy/nanochat's fit of January 2026
)
GPU_GIB = {"b200": 178, "h200": 139, "h100": 78, "a100": 78, "l40s": 44, "l4": 22}  # usable
USABLE = 0.95  # of a GPU's memory; the rest is fragmentation and the libraries' own
TOKENS_PER_SHARD = 55e6  # of the public corpora: 100 B tokens in 1,823 shards, 400 B in 6,543
SHARD_GB = 0.1  # on disk
# Conversations, and tokens trained on, of the default mixtures (tasks/mixtures.py, 500 tokens to a talk).
MID_TOKENS, SFT_TOKENS = 848_000 * 500, 23_000 * 500
CORE_TOKENS, CHAT_EVAL_TOKENS = (
    60e6,
    10e6,
)  # read by one evaluation, at a third of a training token each
GENERATED_TOKENS = {
    "chat_rl": 467 * 16 * 16 * 150,
    "chat_eval": 2000 * 250,
}  # sampled, see decode_rate
DECODE_STEPS_PER_SECOND, SLOTS = 80, 64  # of one GPU; launch-bound below depth 32 (not measured)


@dataclass
class Config:
    depth: Count | None = None  # layers; 24, or with --dollars what suits the money
    ratio: Positive = 12.0  # tokens per parameter of blocks and head
    dollars: Positive | None = None  # choose ratio (and depth) for this much money in all stages
    gpus: Count = 8  # of all machines together
    gpu: str = "h100"  # b200, h200, h100, a100, l40s, l4
    price: Positive = 3.0  # dollars for one GPU and hour
    mfu: PositiveShare = 0.5  # of the dense bf16 peak that training reaches
    max_seq_len: Count = 2048  # tokens of context
    vocab_size: Count = 32768  # of the tokenizer
    device_batch_size: Count | None = None  # rows on one GPU; the most that fit if left out
    only: Literal["", "shards", "depth", "ratio", "device_batch_size"] = ""  # print it alone


@dataclass(frozen=True)
class Plan:
    """Everything that follows from a Config."""

    depth: int
    ratio: float
    num_tokens: int
    batch: int  # tokens a step
    rows: int  # per GPU and micro-batch
    memory: dict[str, int]  # bytes by part
    fits: bool
    shards: int
    hours: dict[str, float]  # by stage


def make_plan(cfg: Config, depth: int, ratio: float) -> Plan:
    """The plan for one depth and ratio. Raises UserError for a GPU that is not known."""
    if cfg.gpu.lower() not in GPU_GIB:
        raise UserError(f"--gpu={cfg.gpu} is unknown; choose one of: {', '.join(GPU_GIB)}")
    config = depth_to_config(depth, cfg.vocab_size, cfg.max_seq_len)
    num_tokens = training_tokens(config, ratio)
    batch = max(batch_tokens(num_tokens), cfg.max_seq_len * cfg.gpus)
    room = USABLE * GPU_GIB[cfg.gpu.lower()] * 2**30
    most = batch // cfg.max_seq_len // cfg.gpus  # rows of one GPU in a step
    sizes = [most // 2**halvings for halvings in range(most.bit_length())]
    fitting = [n for n in sizes if memory_bytes(config, n, cfg.gpus)["total"] <= room]
    rows = cfg.device_batch_size or (fitting[0] if fitting else 1)
    memory = memory_bytes(config, rows, cfg.gpus)
    flops = flops_per_token(config)
    training_rate = cfg.gpus * PEAK_BF16_FLOPS[cfg.gpu.upper()] * cfg.mfu / flops  # tokens a second
    decode_rate = cfg.gpus * DECODE_STEPS_PER_SECOND * SLOTS
    seconds = {
        "tokenizer": 180.0,  # two billion characters, on one machine's cores
        "base_train": num_tokens / training_rate,
        "base_eval": CORE_TOKENS / 3 / training_rate + 120,
        "mid_train": MID_TOKENS / training_rate,
        "chat_sft": SFT_TOKENS / training_rate + 60,
        "chat_rl": GENERATED_TOKENS["chat_rl"] * (1 / decode_rate + 1 / training_rate),
        # MID, SFT and RL are each examined
        "chat_eval": 3 * (CHAT_EVAL_TOKENS / 3 / training_rate)
        + 3 * GENERATED_TOKENS["chat_eval"] / decode_rate,
    }
    return Plan(
        depth, ratio, num_tokens, batch, rows, memory,
        fits=memory["total"] <= room,
        shards=math.ceil(1.02 * num_tokens / TOKENS_PER_SHARD) + 1,
        hours={stage: value / 3600 for stage, value in seconds.items()},
    )  # fmt: skip


def dollars(cfg: Config, hours: float) -> float:
    """What `hours` of all GPUs cost."""
    return hours * cfg.gpus * cfg.price


def choose(cfg: Config, budget: float) -> Plan:
    """The plan that spends `budget` dollars, at the depth whose ratio comes nearest to the best one."""
    plans = []
    for depth in [cfg.depth] if cfg.depth else range(4, 50, 2):
        free = make_plan(cfg, depth, ratio=1.0)
        others = sum(hours for stage, hours in free.hours.items() if stage != "base_train")
        left = budget - dollars(cfg, others)
        ratio = left / dollars(
            cfg, free.hours["base_train"]
        )  # hours are in proportion to the ratio
        if ratio > 1:
            plans.append(make_plan(cfg, depth, math.floor(10 * ratio) / 10))
    plans = [plan for plan in plans if plan.fits]
    if not plans:
        raise UserError(
            f"--dollars={budget:g} pays for no run on {cfg.gpus} x {cfg.gpu}; give more"
        )
    return min(plans, key=lambda plan: abs(math.log(plan.ratio / BEST_RATIO)))


def describe(cfg: Config, plan: Plan) -> str:
    """The plan as a page of text."""
    config = depth_to_config(plan.depth, cfg.vocab_size, cfg.max_seq_len)
    counts = parameter_counts(config)
    accumulation = plan.batch // (plan.rows * cfg.max_seq_len * cfg.gpus)
    lines = [
        f"depth {plan.depth}: width {config.n_embd}, {config.n_head} heads, context {cfg.max_seq_len}",
        *(f"  {name:<18}{count / 1e6:>12,.1f} M parameters" for name, count in counts.items()),
        f"training: {plan.num_tokens / 1e9:.2f} B tokens (ratio {plan.ratio:g}), "
        f"{plan.num_tokens * flops_per_token(config):.2e} FLOPs",
        f"  {plan.num_tokens // plan.batch:,} steps of {plan.batch:,} tokens = {cfg.gpus} GPUs x "
        f"{plan.rows} rows x {accumulation} micro-batches",
        f"data: {plan.shards} shards, {plan.shards * SHARD_GB:.0f} GB on disk; a checkpoint is "
        f"{(plan.memory['weights'] + plan.memory['optimizer'] * cfg.gpus) / 1e9:.0f} GB",
        f"memory of one {cfg.gpu}:",
        *(f"  {part:<18}{size / 2**30:>12,.1f} GiB" for part, size in plan.memory.items()),
        f"  {'it fits' if plan.fits else 'IT DOES NOT FIT'} in {GPU_GIB[cfg.gpu.lower()]} GiB",
        f"time and money at {100 * cfg.mfu:.0f} % MFU, ${cfg.price:g} a GPU hour:",
        *(
            f"  {stage:<18}{hours:>12,.2f} h  ${dollars(cfg, hours):>10,.2f}"
            for stage, hours in (plan.hours | {"total": sum(plan.hours.values())}).items()
        ),
    ]
    return "\n".join(lines)


def main(cfg: Config) -> None:
    """Print the plan, or one number of it."""
    plan = (
        choose(cfg, cfg.dollars)
        if cfg.dollars
        else make_plan(cfg, 24 if cfg.depth is None else cfg.depth, cfg.ratio)
    )
    numbers = {
        "shards": plan.shards, "depth": plan.depth, "ratio": plan.ratio, "device_batch_size": plan.rows,
    }  # fmt: skip
    print0(str(numbers[cfg.only]) if cfg.only else describe(cfg, plan))


if __name__ == "__main__":
    run_script(main, Config)
