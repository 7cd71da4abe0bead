"""What a run will cost, and what it buys: hours, dollars, memory and disk, and expected scores.

    python -m scripts.plan                               # the $100 tier, on the GPUs that are here
    python -m scripts.plan --hours 8                     # what these GPUs make of so many hours
    python -m scripts.plan --hours 8 --gpu 4090          # or one RTX 4090, or --gpus 4 of them
    python -m scripts.plan --dollars 1000                # the hours that so much money rents
    python -m scripts.plan --goal gpt2                   # GPT-2's CORE, 0.2565, as fast as possible
    python -m scripts.plan --only depth ratio shards     # numbers on one line, for scripts
    python -m scripts.plan --laptop                      # runcpu.sh's stages on this machine
    python -m scripts.plan --minutes 10                  # and as many of its steps as fit

Arithmetic on nanochat/scaling.py, the scripts' defaults and the assumptions below, of which `--mfu`
matters most: nothing is measured; karpathy/nanochat reports .5 of the peak in bf16, .6 with fp8.
A budget gets the depth with the fewest expected bits per byte, at the ratio that it pays for there.
Midtraining then has at most two tokens per parameter, a sixth of pretraining's at ratio 12, and
validations, reinforcement and examinations are cut to the same share. `--laptop` and `--minutes`
train a model of the laptop's size for some seconds and print a line for each of runcpu.sh's stages:
its name, its steps (0: it has none), and its seconds.

reads: nothing
writes: nothing
"""

import math
import shutil
import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from nanochat import scaling
from nanochat.checkpoint import build_model
from nanochat.common import Count, Positive, PositiveShare, UserError, base_dir, run_script, set_up
from nanochat.gpt import GPTConfig
from nanochat.loss import gpu_chunk
from nanochat.report import standing
from nanochat.scaling import Card
from scripts import base_loss, base_train, chat_eval, chat_rl, chat_sft, mid_train
from tasks.spellingbee import SpellingBee

DEPTHS = range(4, 66, 2)  # that a budget may get
MID_RATIO = 2  # tokens of midtraining per parameter, at most, where a budget is given
FP8_DEPTH = 20  # fp8 pays from here on; karpathy/nanochat: slower at depth 12, 1.17 x tok/s at 26
USABLE = 0.95  # of a GPU's memory; the rest is fragmentation and the libraries' own
TOKENS_PER_SHARD = 55e6  # of the public corpora: 100 B tokens in 1,823 shards, 400 B in 6,543
SHARD_GB, MAX_SHARDS = 0.1, 6542  # on disk; after the last one the first is read again
KEPT = 3 + 3 + 1 + 2  # checkpoints of the four trainers at the end of a long run
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

Size = Literal[
    "depth", "ratio", "shards", "device_batch_size", "fp8",
    "mid_steps", "rl_steps", "eval_tokens", "problems",
]  # fmt: skip


GOALS = {  # depth, ratio, words
    # Of what --dollars 85 chooses, with a reserve; a constant, since a run begun must not change.
    "best": (24, 12.0, "the $100 tier, the best model that 8 H100s make of it"),
    # karpathy/nanochat's sixth run: 1.65 h to CORE 0.2626 on 8 H100s, with fp8 and a flash kernel.
    "gpt2": (24, 8.0, "GPT-2's CORE, 0.2565, as fast as possible"),
}


@dataclass
class Config:
    goal: Literal["best", "gpt2"] = "best"  # the best model for $100, or GPT-2's CORE the soonest
    hours: Positive | None = None  # choose ratio (and depth) for so many in all stages
    dollars: Positive | None = None  # or for the hours that they rent
    depth: Count | None = None  # layers; the goal's, or what suits the budget
    ratio: Positive | None = None  # tokens per parameter of blocks and head; the goal's
    gpus: Count | None = None  # of all machines together; those here, one of --gpu, or else 8
    gpu: str = ""  # such as b200, rtx4090, 3060-ti or a100-40gb; empty: those here, or else h100
    price: Positive | None = None  # dollars for one GPU and hour; what it usually costs if left out
    mfu: PositiveShare = 0.5  # of the dense bf16 peak; assumed
    max_seq_len: Count = 2048  # tokens of context
    vocab_size: Count = 32768  # of the tokenizer
    device_batch_size: Count | None = None  # rows on one GPU; the most that fit if left out
    only: tuple[Size, ...] = ()  # print these alone, on one line; 0: no fp8, a stage's default
    laptop: bool = False  # print steps and seconds of runcpu.sh's stages on this machine
    minutes: Positive | None = None  # the same, as many steps as fit


class Gpus(NamedTuple):
    card: Card
    num: int
    are_here: bool = False


class Plan(NamedTuple):
    config: GPTConfig
    ratio: float
    num_tokens: int
    flops: float  # of pretraining
    batch: int  # tokens a step
    device_batch_size: int  # rows per GPU and micro-batch
    recompute: bool  # activations, where nothing fits else
    fp8: bool  # where the card has it and the model is large enough to gain
    memory: dict[str, int]  # bytes by part
    fits: bool
    shards: int
    share: float  # of the stages around pretraining
    hours: dict[str, float]  # by stage

    @property
    def total(self) -> float:
        return sum(self.hours.values())


def card_here(index: int) -> Card:
    """A GPU of this machine, with the memory that it has; an unlisted one is measured."""
    found = torch.cuda.get_device_properties(index)
    memory, capability = found.total_memory / 2**30, (found.major, found.minor)
    if card := scaling.find_card(found.name):
        return card._replace(memory_gib=memory)
    peak = scaling.measure_flops(set_up("cuda")) / 1e12
    return Card(found.name, memory, 0.0, peak, None, capability)


def find_gpus(cfg: Config) -> Gpus:
    """The GPUs of the run that `cfg` describes; UserError for an unknown name, or none at all."""
    if cfg.gpu:
        return Gpus(scaling.named_card(cfg.gpu), cfg.gpus or 1)
    if cards := [card_here(index) for index in range(torch.cuda.device_count())]:
        slowest = min(cards, key=lambda card: card.peak)  # all wait for it
        least = min(card.memory_gib for card in cards)
        return Gpus(slowest._replace(memory_gib=least), cfg.gpus or len(cards), are_here=True)
    if cfg.hours:
        raise UserError(
            "no GPU is here: --gpu rtx4090 plans for a machine with one; this one trains a small "
            f"model in its own way, `bash runcpu.sh --minutes {max(10, round(60 * cfg.hours))}`"
        )
    return Gpus(scaling.named_card("h100"), cfg.gpus or 8)


def hourly_price(cfg: Config, gpus: Gpus) -> float:
    """Dollars for an hour of all GPUs; 0 for a card that is usually bought, without `--price`."""
    return gpus.num * (cfg.price or gpus.card.price or 0.0)


def budget_hours(cfg: Config, gpus: Gpus) -> float | None:
    """The hours that may be spent, of dollars down to a hundredth; None if no budget is given."""
    if not cfg.dollars:
        return cfg.hours
    if not hourly_price(cfg, gpus):
        raise UserError(f"the {gpus.card.name} is not usually rented; give an hour's --price")
    rented = math.floor(100 * cfg.dollars / hourly_price(cfg, gpus)) / 100
    return min(rented, cfg.hours or rented)


def stage_flags(share: float) -> dict[str, int]:
    """Flags that leave about `share` of the stages around pretraining; none for all of them."""
    return {} if share == 1 else {
        "mid_steps": max(1, int(share * MID_TOKENS / mid_train.Config().total_batch_size)),
        "rl_steps": max(1, int(share * chat_rl.Config().num_steps)),
        "eval_tokens": max(2**18, int(share * base_loss.Config().eval_tokens)),
        "problems": max(50, int(share * chat_rl.Config().eval_problems)),  # of each task
    }  # fmt: skip


def stage_hours(
    cfg: Config, gpus: Gpus, flops: float, num_tokens: int, batch: int, *,
    recompute: bool = False, share: float = 1.0,
) -> dict[str, float]:  # fmt: skip
    """Hours of every stage at `flops` a training token, `share` of what has flags for it."""
    training_rate = gpus.num * 1e12 * gpus.card.peak * cfg.mfu / flops  # tokens a second
    reading_rate = 3 * training_rate  # without the backward pass
    training_rate *= 3 / 4 if recompute else 1

    def train(script: Any, num_tokens: float, batch: int, share: float = 1.0) -> float:
        num_validations = share * (num_tokens / batch / script.eval_every + 2)
        return num_tokens / training_rate + num_validations * script.eval_tokens / reading_rate

    def answer(num_answers: int, slots: int) -> float:
        return num_answers * ANSWER_TOKENS / (gpus.num * DECODE_STEPS_PER_SECOND * slots)

    mid, sft, rl, exam = mid_train.Config(), chat_sft.Config(), chat_rl.Config(), chat_eval.Config()
    mid_tokens = share * mid.num_epochs * MID_TOKENS
    trained_on = rl.num_steps * rl.questions_per_step * rl.num_samples
    held_out = (rl.num_steps // rl.eval_every + 1) * rl.eval_problems * rl.eval_samples
    reinforcement = answer(trained_on + held_out, rl.num_slots)
    reinforcement += trained_on * ANSWER_TOKENS / training_rate
    # MID and SFT in everything, RL in GSM8K alone (speedrun.sh).
    examination = 2 * CHOICE_TOKENS / reading_rate + answer(2 * CHAT_CORE + GSM8K, exam.batch_size)
    seconds = {
        "tok_train": 180.0,  # two billion characters, on one machine's cores
        "base_train": train(base_train.Config(), num_tokens, batch, share),
        "base_loss": share * 2 * base_loss.Config().eval_tokens / reading_rate,
        "base_eval": share * CORE_TOKENS / reading_rate + 120,
        "mid_train": train(mid, mid_tokens, mid.total_batch_size, share),
        "chat_sft": train(sft, sft.num_epochs * SFT_TOKENS, sft.total_batch_size) + 60,
        "chat_rl": share * reinforcement,
        "chat_eval": share * examination,
    }
    return {stage: value / 3600 for stage, value in seconds.items()}


def make_plan(cfg: Config, gpus: Gpus, depth: int, ratio: float, cut: bool = False) -> Plan:
    """The plan for one depth and ratio; `cut`: with smaller stages for a small model."""
    config = scaling.depth_to_config(depth, cfg.vocab_size, cfg.max_seq_len)
    num_tokens = scaling.training_tokens(config, ratio)
    horizon = scaling.reference_horizon(num_tokens, ratio)
    batch = max(scaling.batch_tokens(horizon), cfg.max_seq_len * gpus.num)
    in_all = gpus.card.memory_gib * 2**30
    most = batch // cfg.max_seq_len // gpus.num  # rows of one GPU in a step
    sizes = [most // 2**halvings for halvings in range(most.bit_length())]
    needed = partial(scaling.memory_bytes, config, world_size=gpus.num, chunk=gpu_chunk(in_all))
    tried = [
        (needed(rows, recompute=recompute), rows, recompute)
        for recompute in (False, True)
        for rows in ([cfg.device_batch_size] if cfg.device_batch_size else sizes)
    ]
    room = USABLE * in_all
    fitting = (found for found in tried if found[0]["total"] <= room)
    memory, rows, recompute = next(fitting, tried[-1])
    flops = scaling.flops_per_token(config)
    # The same at any ratio, or more hours might mean a smaller model.
    share = min(1.0, MID_RATIO * scaling.scaling_parameters(config) / MID_TOKENS) if cut else 1.0
    return Plan(
        config, ratio, num_tokens, num_tokens * flops, batch, rows, recompute,
        depth >= FP8_DEPTH and gpus.card.capability >= (8, 9), memory,
        fits=memory["total"] <= room,
        shards=min(MAX_SHARDS, math.ceil(1.02 * num_tokens / TOKENS_PER_SHARD) + 1), share=share,
        hours=stage_hours(cfg, gpus, flops, num_tokens, batch, recompute=recompute, share=share),
    )  # fmt: skip


def choose(cfg: Config, gpus: Gpus, hours: float) -> Plan:
    """The plan of at most `hours` with the fewest expected bits per byte."""

    def longest(depth: int) -> Plan:
        made = partial(make_plan, cfg, gpus, depth, cut=True)
        one, two = made(1.0).total, made(2.0).total  # between them, and beyond, hours are linear
        ratio = 1 + (hours - one) / (two - one)
        return made(max(1.0, math.floor(100 * ratio - 1e-3) / 100))  # a token less, for rounding

    depths = [cfg.depth] if cfg.depth else DEPTHS
    plans = [plan for depth in depths if (plan := longest(depth)).fits]
    what = f"depth {depths[0]} on {gpus.num} {gpus.card.name}"
    if not plans:
        raise UserError(f"no memory for {what}; name another --gpu, or a smaller --depth")
    if plans[0].total > hours:
        hint = f"--hours={math.ceil(100 * plans[0].total) / 100:g} is the least"
        raise UserError(f"{hours:g} hours are too few for {what}; {hint}")
    affordable = [plan for plan in plans if plan.total <= hours]
    return min(affordable, key=lambda plan: scaling.predict(plan.flops, plan.ratio)[0])


def disk_lines(gpus: Gpus, plan: Plan) -> list[str]:
    """The disk that the run takes in all, and how much is free if it would be here."""
    each_gb = (plan.memory["weights"] + plan.memory["optimizer"] * gpus.num) / 1e9
    needed_gb = plan.shards * SHARD_GB + (KEPT + 1) * each_gb
    line = f"disk: {needed_gb:,.0f} GB for {plan.shards} shards of text and "
    line += f"{KEPT + 1} checkpoints of {each_gb:.1f} GB, one of them being written"
    if not gpus.are_here:
        return [line]
    there = next(path for path in (base_dir(), *base_dir().parents) if path.exists())
    free_gb = shutil.disk_usage(there).free / 1e9
    verdict = "it fits" if needed_gb < free_gb else "IT DOES NOT FIT"
    return [line, f"  {verdict} in the {free_gb:,.0f} GB that are free in {there}"]


def expected_lines(cfg: Config, gpus: Gpus, plan: Plan) -> list[str]:
    """What this plan, and those of twice and four times its hours, are expected to score."""
    lines = []
    for factor in (1, 2, 4) if plan.fits else (1,):
        each = choose(cfg, gpus, factor * plan.total) if factor > 1 else plan
        bpb, error, core, core_error = scaling.predict(each.flops, each.ratio)
        lines.append(
            f"  {factor} x the hours: {bpb:.3f} +- {error:.3f} bits per byte of ClimbMix, CORE "
            f"{core:.3f} +- {core_error:.3f} (depth {each.config.n_layer}, ratio {each.ratio:g})"
        )
    return [*lines, f"  {standing('CORE', scaling.predict(plan.flops, plan.ratio)[2])}"]


def command_line(cfg: Config, gpus: Gpus, plan: Plan, hours: float | None) -> str:
    """What to type for this plan, on the machine that it is for."""
    if not plan.fits:
        return "--hours chooses a model that fits"
    if (cfg.max_seq_len, cfg.vocab_size) != (Config.max_seq_len, Config.vocab_size):
        start = f"torchrun --nproc_per_node={gpus.num} -m scripts.base_train --"
        flags = f"--depth={plan.config.n_layer} --target_param_data_ratio={plan.ratio:g}"
        return f"{start} {flags} --max_seq_len={cfg.max_seq_len}"  # speedrun.sh changes neither
    fewer = cfg.gpus if gpus.are_here and (cfg.gpus or 99) < torch.cuda.device_count() else None
    values = {**vars(cfg), "hours": hours, "nproc_per_node": fewer}
    names = ["hours", "depth", "mfu"] if hours else ["depth", "ratio", "goal"]
    usual = vars(Config) | {"nproc_per_node": None}
    words = [f"{name.upper()}={values[name]}" for name in [*names, "nproc_per_node"]
             if values[name] != usual[name]]  # fmt: skip
    return " ".join([*words, "bash speedrun.sh"]).replace(".0 ", " ")


def describe(cfg: Config, gpus: Gpus, plan: Plan) -> str:
    config, rows, card = plan.config, plan.device_batch_size, gpus.card
    hours = plan.hours | {"total": plan.total}
    price = hourly_price(cfg, gpus)
    cost = f", ${price / gpus.num:g} a GPU hour" if price else ""
    cut = ", ".join(f"{name} {number:,}" for name, number in stage_flags(plan.share).items())
    lines = [
        f"depth {config.n_layer}: width {config.n_embd}, {config.n_head} heads, "
        f"context {cfg.max_seq_len}",
        *(f"  {part:<18}{count / 1e6:>12,.1f} M parameters"
          for part, count in scaling.parameter_counts(config).items()),
        f"training: {plan.num_tokens / 1e9:.2f} B tokens (ratio {plan.ratio:g}), "
        f"{plan.flops:.2e} FLOPs, {'in fp8' if plan.fp8 else 'without fp8'}",
        f"  {plan.num_tokens // plan.batch:,} steps of {plan.batch:,} tokens = {gpus.num} GPU"
        f"{'s' * (gpus.num > 1)} x {rows} rows x "
        f"{plan.batch // (rows * cfg.max_seq_len * gpus.num)} micro-batches",
        *([f"  other stages are cut to {100 * plan.share:.0f} %: {cut}"] if cut else []),
        *disk_lines(gpus, plan),
        f"memory of one {card.name}{', activations recomputed' if plan.recompute else ''}:",
        *(f"  {part:<18}{size / 2**30:>12,.1f} GiB" for part, size in plan.memory.items() if size),
        f"  {'it fits' if plan.fits else 'IT DOES NOT FIT'} in {card.memory_gib:.3g} GiB",
        f"time on {gpus.num} {card.name} at {100 * cfg.mfu:.0f} % MFU (assumed){cost}:",
        *(f"  {stage:<18}{each:>12,.2f} h" + (f"  ${each * price:>10,.2f}" if price else "")
          for stage, each in hours.items()),
        "expected, by runs and laws that others published (nanochat/scaling.py):",
        *expected_lines(cfg, gpus, plan),
    ]  # fmt: skip
    return "\n".join(lines)


def laptop_step_seconds() -> float:
    """Seconds that this machine takes for a step of the laptop's model, the median of a few."""
    runtime = set_up("cpu")
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
    gpus = find_gpus(cfg)
    depth, ratio, words = GOALS[cfg.goal]
    if (hours := budget_hours(cfg, gpus)) is not None:
        if cfg.ratio:
            raise UserError(f"--ratio={cfg.ratio:g}: a budget chooses it; leave one of them out")
        plan = choose(cfg, gpus, hours)
    else:
        plan = make_plan(cfg, gpus, cfg.depth or depth, cfg.ratio or ratio)
    if cfg.only:
        values = dict.fromkeys(cfg.only, 0) | plan._asdict() | stage_flags(plan.share)
        values["depth"] = plan.config.n_layer
        print(*(f"{values[name]:.12g}" for name in cfg.only))  # no exponent, for shells
        return
    if hours is None and (plan.config.n_layer, plan.ratio) == (depth, ratio):
        print(f"goal: {words}")
    print(f"{describe(cfg, gpus, plan)}\nnext: {command_line(cfg, gpus, plan, hours)}")


if __name__ == "__main__":
    run_script(main, Config)
