"""What a run will cost: parameters, memory, disk, hours and dollars of every stage.

    python -m scripts.plan                               # the $100 tier, 8 H100s at $3 an hour each
    python -m scripts.plan --goal gpt2                   # GPT-2's CORE, 0.2565, as fast as possible
    python -m scripts.plan --depth 26 --gpus 8 --gpu h100 --price 3
    python -m scripts.plan --dollars 1000                # depth and ratio for that much money
    python -m scripts.plan --dollars 1000 --depth 32     # the ratio that it pays for at this depth
    python -m scripts.plan --only depth ratio shards     # numbers on one line, for scripts
    python -m scripts.plan --laptop                      # runcpu.sh's stages on this machine
    python -m scripts.plan --minutes 10                  # and as many of its steps as fit

Arithmetic on nanochat/scaling.py, the scripts' defaults and the assumptions below, of which `--mfu`
matters most: nothing is measured; karpathy/nanochat reports .5 of the peak in bf16, .6 with fp8.
`--dollars` picks the depth whose affordable ratio is nearest to the optimum of the fitted scaling
laws. `--laptop` and `--minutes` train a model of the laptop's size for some seconds and print a
line for each of runcpu.sh's stages: its name, its steps (0: it has none), and its seconds.

reads: nothing
writes: nothing
"""

import math
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from nanochat import scaling
from nanochat.checkpoint import build_model
from nanochat.common import Count, Positive, PositiveShare, UserError, run_script, set_up
from nanochat.loss import gpu_chunk
from nanochat.scaling import CARDS, Card
from scripts import base_loss, base_train, chat_eval, chat_rl, chat_sft, mid_train
from tasks.spellingbee import SpellingBee

BEST_RATIO = 12  # tokens per parameter; karpathy/nanochat's last fit (10.5 before), flat around it
FP8_DEPTH = 20  # fp8 pays from here on; karpathy/nanochat: slower at depth 12, 1.17 x tok/s at 26
USABLE = 0.95  # of a GPU's memory; the rest is fragmentation and the libraries' own
TOKENS_PER_SHARD = 55e6  # of the public corpora: 100 B tokens in 1,823 shards, 400 B in 6,543
SHARD_GB = 0.1  # on disk
# Of the default mixtures (tasks/mixtures.py), 500 tokens to a conversation.
MID_TOKENS, SFT_TOKENS = 1_071_000 * 500, 22_000 * 500
CORE_TOKENS, CHOICE_TOKENS = 60e6, 10e6  # read by base_eval, and for ChatCORE's multiple choice
# Problems answered in words: GSM8K's, and those with HumanEval's and SpellingBee's.
GSM8K, CHAT_CORE = 1319, 1319 + 164 + SpellingBee.num_test
ANSWER_TOKENS = 150  # sampled for one of them; not measured
DECODE_STEPS_PER_SECOND = 80  # of one GPU; launch-bound below depth 32 (not measured)

# The laptop's model, as runcpu.sh has it, and tokens of a step.
LAPTOP, LAPTOP_BATCH = scaling.depth_to_config(6, 2048, 512, aspect_ratio=26, head_dim=80), 2048
LAPTOP_STEPS = 2860  # bare steps' time for training, if no minutes are given; more teaches more
# Its stages: (share of the time for training, what one of its steps takes), or (0, what all of it
# takes), in bare steps of training: between what two cores of an EPYC and of a Xeon took.
LAPTOP_STAGES = {
    "corpus": (0, 80), "tok_train": (0, 24), "tok_eval": (0, 26),
    "base_train": (0.24, 1.15), "base_loss": (0, 55), "base_eval": (0, 26),
    "mid_train": (0.545, 1.1), "chat_eval_mid": (0, 100),
    "chat_sft": (0.155, 1.1), "chat_eval_sft": (0, 100),
    "chat_rl": (0.06, 18), "chat_eval_rl": (0, 135),  # with the report and the conversation
}  # fmt: skip

Size = Literal["depth", "ratio", "shards", "device_batch_size", "fp8"]


GOALS = {  # depth, ratio, words
    # Of what --dollars 85 chooses, with a reserve; a constant, since a run begun must not change.
    "best": (24, 12.0, "the best model that $100 buys"),
    # karpathy/nanochat's sixth run: 1.65 h to CORE 0.2626 on 8 H100s, with fp8 and a flash kernel.
    "gpt2": (24, 8.0, "GPT-2's CORE, 0.2565, as fast as possible"),
}


@dataclass
class Config:
    goal: Literal["best", "gpt2"] = "best"  # the best model for $100, or GPT-2's CORE the soonest
    depth: Count | None = None  # layers; the goal's, or with --dollars what suits the money
    ratio: Positive | None = None  # tokens per parameter of blocks and head; the goal's
    dollars: Positive | None = None  # choose ratio (and depth) for this much money in all stages
    gpus: Count = 8  # of all machines together
    gpu: str = "h100"  # such as b200, a100-40gb, l4, 4090 or 3060-ti; another is told all names
    price: Positive | None = None  # dollars for one GPU and hour; what it usually costs if left out
    mfu: PositiveShare = 0.5  # of the dense bf16 peak; assumed
    max_seq_len: Count = 2048  # tokens of context
    vocab_size: Count = 32768  # of the tokenizer
    device_batch_size: Count | None = None  # rows on one GPU; the most that fit if left out
    only: tuple[Size, ...] = ()  # print these alone, on one line; fp8 is 0 or 1
    laptop: bool = False  # print steps and seconds of runcpu.sh's stages on this machine
    minutes: Positive | None = None  # the same, as many steps as fit


class Plan(NamedTuple):
    depth: int
    ratio: float
    num_tokens: int
    batch: int  # tokens a step
    device_batch_size: int  # rows per GPU and micro-batch
    recompute: bool  # activations, where nothing fits else
    fp8: bool  # where the card has it and the model is large enough to gain
    memory: dict[str, int]  # bytes by part
    fits: bool
    shards: int
    hours: dict[str, float]  # by stage


def find_gpu(cfg: Config) -> Card:
    """The card that `--gpu` names; UserError lists all names."""
    cards = {card.key: card for card in CARDS}
    if cfg.gpu.lower() not in cards:
        raise UserError(f"--gpu={cfg.gpu} is unknown; choose one of: {', '.join(cards)}")
    return cards[cfg.gpu.lower()]


def hourly_price(cfg: Config) -> float:
    """Dollars for an hour of all GPUs; 0 for a card that is usually bought, without `--price`."""
    return cfg.gpus * (cfg.price or find_gpu(cfg).price or 0.0)


def stage_hours(
    cfg: Config, flops: float, num_tokens: int, batch: int, recompute: bool = False
) -> dict[str, float]:
    """Hours of every stage with its script's defaults, at `flops` per training token."""
    peak = 1e12 * find_gpu(cfg).peak
    training_rate = cfg.gpus * peak * cfg.mfu / flops  # tokens a second
    reading_rate = 3 * training_rate  # without the backward pass
    training_rate *= 3 / 4 if recompute else 1

    def train(script: Any, num_tokens: float, batch: int) -> float:
        num_validations = num_tokens // batch // script.eval_every + 2
        return num_tokens / training_rate + num_validations * script.eval_tokens / reading_rate

    def answer(num_answers: int, slots: int) -> float:
        return num_answers * ANSWER_TOKENS / (cfg.gpus * DECODE_STEPS_PER_SECOND * slots)

    mid, sft, rl, exam = mid_train.Config(), chat_sft.Config(), chat_rl.Config(), chat_eval.Config()
    trained_on = rl.num_steps * rl.questions_per_step * rl.num_samples
    held_out = (rl.num_steps // rl.eval_every + 1) * rl.eval_problems * rl.eval_samples
    seconds = {
        "tok_train": 180.0,  # two billion characters, on one machine's cores
        "base_train": train(base_train.Config(), num_tokens, batch),
        "base_loss": 2 * base_loss.Config().eval_tokens / reading_rate,
        "base_eval": CORE_TOKENS / reading_rate + 120,
        "mid_train": train(mid, mid.num_epochs * MID_TOKENS, mid.total_batch_size),
        "chat_sft": train(sft, sft.num_epochs * SFT_TOKENS, sft.total_batch_size) + 60,
        "chat_rl": answer(trained_on + held_out, rl.num_slots)
        + trained_on * ANSWER_TOKENS / training_rate,
        # MID and SFT in everything, RL in GSM8K alone (speedrun.sh).
        "chat_eval": 2 * CHOICE_TOKENS / reading_rate
        + answer(2 * CHAT_CORE + GSM8K, exam.batch_size),
    }
    return {stage: value / 3600 for stage, value in seconds.items()}


def make_plan(cfg: Config, depth: int, ratio: float) -> Plan:
    """The plan for one depth and ratio; UserError for an unknown GPU."""
    config = scaling.depth_to_config(depth, cfg.vocab_size, cfg.max_seq_len)
    num_tokens = scaling.training_tokens(config, ratio)
    horizon = scaling.reference_horizon(num_tokens, ratio)
    batch = max(scaling.batch_tokens(horizon), cfg.max_seq_len * cfg.gpus)
    in_all = find_gpu(cfg).memory_gib * 2**30
    most = batch // cfg.max_seq_len // cfg.gpus  # rows of one GPU in a step
    sizes = [most // 2**halvings for halvings in range(most.bit_length())]
    needed = partial(scaling.memory_bytes, config, world_size=cfg.gpus, chunk=gpu_chunk(in_all))
    tried = [
        (needed(rows, recompute=recompute), rows, recompute)
        for recompute in (False, True)
        for rows in ([cfg.device_batch_size] if cfg.device_batch_size else sizes)
    ]
    room = USABLE * in_all
    fitting = (found for found in tried if found[0]["total"] <= room)
    memory, rows, recompute = next(fitting, tried[-1])
    flops = scaling.flops_per_token(config)
    return Plan(
        depth, ratio, num_tokens, batch, rows, recompute,
        depth >= FP8_DEPTH and find_gpu(cfg).capability >= (8, 9), memory,
        fits=memory["total"] <= room,
        shards=math.ceil(1.02 * num_tokens / TOKENS_PER_SHARD) + 1,
        hours=stage_hours(cfg, flops, num_tokens, batch, recompute),
    )  # fmt: skip


def choose(cfg: Config, budget: float) -> Plan:
    """The plan for `budget` dollars, at the depth whose ratio is nearest to the best one."""
    if not hourly_price(cfg):
        raise UserError(f"a {cfg.gpu} is not usually rented; give the price of its hour, --price")
    plans = []
    for depth in [cfg.depth] if cfg.depth else range(4, 50, 2):
        ratio = BEST_RATIO
        for _ in range(4):  # the hours of base_train are nearly in proportion to the ratio
            hours = make_plan(cfg, depth, ratio).hours
            left = budget / hourly_price(cfg) - (sum(hours.values()) - hours["base_train"])
            ratio = max(0.1, math.floor(10 * ratio * left / hours["base_train"]) / 10)
        plans.append(make_plan(cfg, depth, ratio))
    plans = [plan for plan in plans if plan.fits and plan.ratio > 1]
    if not plans:
        raise UserError(f"--dollars={budget:g} pays for no run on {cfg.gpus} {cfg.gpu}; give more")
    return min(plans, key=lambda plan: abs(math.log(plan.ratio / BEST_RATIO)))


def describe(cfg: Config, plan: Plan) -> str:
    config = scaling.depth_to_config(plan.depth, cfg.vocab_size, cfg.max_seq_len)
    rows = plan.device_batch_size
    checkpoint_gb = (plan.memory["weights"] + plan.memory["optimizer"] * cfg.gpus) / 1e9
    hours = plan.hours | {"total": sum(plan.hours.values())}
    price = hourly_price(cfg)
    lines = [
        f"depth {plan.depth}: width {config.n_embd}, {config.n_head} heads, "
        f"context {cfg.max_seq_len}",
        *(f"  {part:<18}{count / 1e6:>12,.1f} M parameters"
          for part, count in scaling.parameter_counts(config).items()),
        f"training: {plan.num_tokens / 1e9:.2f} B tokens (ratio {plan.ratio:g}), "
        f"{plan.num_tokens * scaling.flops_per_token(config):.2e} FLOPs, "
        f"{'in fp8' if plan.fp8 else 'without fp8'}",
        f"  {plan.num_tokens // plan.batch:,} steps of {plan.batch:,} tokens = {cfg.gpus} GPUs x "
        f"{rows} rows x {plan.batch // (rows * cfg.max_seq_len * cfg.gpus)} micro-batches",
        f"data: {plan.shards} shards, {plan.shards * SHARD_GB:.0f} GB on disk; "
        f"a checkpoint is {checkpoint_gb:.0f} GB",
        f"memory of one {cfg.gpu}{', activations recomputed' if plan.recompute else ''}:",
        *(f"  {part:<18}{size / 2**30:>12,.1f} GiB" for part, size in plan.memory.items() if size),
        f"  {'it fits' if plan.fits else 'IT DOES NOT FIT'} in {find_gpu(cfg).memory_gib:g} GiB",
        f"time and money at {100 * cfg.mfu:.0f} % MFU (assumed), ${price / cfg.gpus:g} a GPU hour:",
        *(f"  {stage:<18}{each:>12,.2f} h  ${each * price:>10,.2f}"
          for stage, each in hours.items()),
    ]  # fmt: skip
    return "\n".join(lines)


def laptop_step_seconds() -> float:
    """Seconds that this machine takes for a step of the laptop's model, the median of a few."""
    runtime = set_up("cpu", trains=True)
    model = build_model(LAPTOP, None, runtime)
    optimizer = scaling.make_optimizer(model, LAPTOP_BATCH, 1000)
    optimizer.set_multipliers(1.0, 0.95, 1.0)
    ids = torch.randint(
        LAPTOP.vocab_size, (LAPTOP_BATCH // LAPTOP.sequence_len, LAPTOP.sequence_len)
    )
    times = []
    while len(times) < 5 or (sum(times) < 3 and len(times) < 20):
        begin = time.perf_counter()
        model(ids, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def plan_laptop(minutes: float | None, step_seconds: float) -> dict[str, tuple[int, float]]:
    """(steps, seconds) of runcpu.sh's stages; UserError if the minutes are too few."""
    fixed = sum(cost for share, cost in LAPTOP_STAGES.values() if not share)
    left = LAPTOP_STEPS if minutes is None else 60 * minutes / step_seconds - fixed
    if left < fixed / 4:
        least = math.ceil(1.25 * fixed * step_seconds / 60)
        raise UserError(f"--minutes={minutes:g} is too short on this machine; {least} is the least")
    plan = {}
    for stage, (share, cost) in LAPTOP_STAGES.items():
        num_steps = round(share * left / cost)
        plan[stage] = num_steps, step_seconds * cost * (num_steps if share else 1)
    return plan


def main(cfg: Config) -> None:
    if cfg.laptop or cfg.minutes:
        for stage, (num_steps, seconds) in plan_laptop(cfg.minutes, laptop_step_seconds()).items():
            print(stage, num_steps, round(seconds))
        return
    depth, ratio, words = GOALS[cfg.goal]
    if cfg.dollars:
        plan = choose(cfg, cfg.dollars)
    else:
        plan = make_plan(cfg, cfg.depth or depth, cfg.ratio or ratio)
    if cfg.only:
        print(*(f"{getattr(plan, name):g}" for name in cfg.only))
        return
    if (plan.depth, plan.ratio) == (depth, ratio):
        print(f"goal: {words}")
    print(describe(cfg, plan))


if __name__ == "__main__":
    run_script(main, Config)
