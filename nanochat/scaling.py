"""From depth: sizes, FLOPs, memory, training tokens, batch, learning rates and their schedules.

And what scripts.plan and MFU refer to: expected scores, and the peak FLOP/s of graphics cards.

Depth sets the width (aspect_ratio x depth, rounded up to whole heads). Training tokens are a ratio
times the parameters of blocks and head, the count with the steadiest scaling law. Batch, learning
rates and weight decay were tuned at depth 12, ratio 12, 1.32 B tokens, 2^19 tokens a step; the
formulas extrapolate from there by the tokens of the run, counted as if at ratio 12
(`reference_horizon`), or by the steps that `--num_iterations` gives. Schedules are pure functions
of the step or of `progress`, so resuming cannot change them.

Sources: schedules, training tokens and the decay at ratio 8, karpathy/nanochat's sweeps at depths
12 and 24; batch ~ tokens^.383, arXiv 2505.13738; decay with a constant number of passes of its time
scale, 2405.13698; small batches: our sweep in dev/LOG.md.
"""

import difflib
import math
import re
import time
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from nanochat.common import Runtime, UserError, synchronize
from nanochat.gpt import GPT, SMEAR_GATE_CHANNELS, VE_GATE_CHANNELS, GPTConfig
from nanochat.loss import GPU_CHUNK
from nanochat.optim import MuonAdamW, transient_bytes

LR_WARMUP_STEPS, LR_WARMUP_LIMIT = 40, 0.05  # steps, and at most this fraction of the run
MOMENTUM_WARMUP_STEPS, MOMENTUM_WARMUP_LIMIT = 400, 0.25
WARMDOWN = 0.65  # final fraction of the run, over which the learning rate falls
FINAL = 0.05  # learning-rate multiplier at the end of pretraining

REFERENCE_BATCH = 2**19  # tokens a step at which the learning rates below were tuned
REFERENCE_RATIO = 12  # tokens per parameter of blocks and head
REFERENCE_TOKENS = REFERENCE_RATIO * 110_100_912  # those parameters at depth 12
REFERENCE_STEPS = REFERENCE_TOKENS / REFERENCE_BATCH  # 2,520
REFERENCE_WIDTH = 768
SQRT_RULE_FROM = 2**18  # tokens a step; below, learning rates stop falling with the batch


class Rates(NamedTuple):
    """How a group of parameters is trained, as tuned at the reference batch, length and width."""

    lr: float
    betas: tuple[float, float]  # AdamW's; of Muon: momentum, and beta2 of its second moment
    weight_decay: float
    width_exponent: float  # lr times (width / 768)^width_exponent
    batch_exponent: float  # see rate_factor
    steps_exponent: float
    eps: float = 1e-10


# While the blocks still add nothing, the norms hide the scalars: their first gradients are rounding
# errors of 1e-10, which AdamW with a smaller eps would follow.
RATES = {  # group of GPT.parameter_groups -> the fields of Rates, in order
    "matrices": Rates(0.02, (0.95, 0.9), 0.28, 0.0, 0.5, 0.5),
    "head": Rates(0.008, (0.8, 0.96), 0.01, -0.5, 0.5, -1 / 6),
    "embedding": Rates(0.3, (0.8, 0.995), 0.001, -0.5, 0.5, 0.5),
    "value_embeddings": Rates(0.15, (0.8, 0.995), 0.01, -0.5, 0.5, 0.5),
    "resid_scalars": Rates(0.005, (0.8, 0.95), 0.05, 0.0, 0.5, 0.0, 1e-7),
    "x0_scalars": Rates(0.5, (0.96, 0.95), 0.0, 0.0, 0.5, 0.0, 1e-7),
    "gates": Rates(0.02, (0.8, 0.95), 0.0, 0.0, 0.5, 0.0, 1e-7),
    "smear_backout": Rates(0.2, (0.8, 0.95), 0.0, 0.0, 0.0, 0.0, 1e-7),
}


def depth_to_config(
    depth: int,
    vocab_size: int,
    sequence_len: int = 2048,
    aspect_ratio: int = 64,
    head_dim: int = 128,
    window_pattern: str = "SSSL",
    plain: bool = False,
) -> GPTConfig:
    """The architecture of `depth` layers; `plain` is the first generation's, without windows."""
    num_heads = -(-aspect_ratio * depth // head_dim)
    sizes: dict[str, Any] = {
        "sequence_len": sequence_len, "vocab_size": vocab_size, "n_layer": depth,
        "n_head": num_heads, "n_kv_head": num_heads, "n_embd": num_heads * head_dim,
    }  # fmt: skip
    return GPTConfig.plain(**sizes) if plain else GPTConfig(**sizes, window_pattern=window_pattern)


def parameter_counts(config: GPTConfig) -> dict[str, int]:
    """Number of parameters of each part, and their "total"."""
    width, depth = config.n_embd, config.n_layer
    kv_width = config.n_kv_head * config.head_dim
    num_tables = sum(config.has_value_embedding(layer) for layer in range(depth))
    counts = {
        "blocks": depth * (2 * width**2 + 2 * width * kv_width + 8 * width**2)
        + num_tables * VE_GATE_CHANNELS * config.n_kv_head,
        "head": config.padded_vocab_size * width,
        "embedding": config.padded_vocab_size * width,
        "value_embeddings": num_tables * config.padded_vocab_size * kv_width,
        "scalars": 2 * depth * config.residual_scalars
        + (SMEAR_GATE_CHANNELS + 1) * config.smear
        + config.backout,
    }
    return counts | {"total": sum(counts.values())}


def scaling_parameters(config: GPTConfig) -> int:
    """Parameters that count for training tokens: blocks and head, no tables."""
    counts = parameter_counts(config)
    return counts["blocks"] + counts["head"]


def flops_per_token(config: GPTConfig) -> float:
    """FLOPs of one training token, forward and backward; the basis of MFU.

    6 per matrix parameter and 12 per channel and visible key; the usual count ignores windows.
    """
    length = config.sequence_len
    keys = sum(min(config.window(layer) or length, length) for layer in range(config.n_layer))
    matrices = scaling_parameters(config) + SMEAR_GATE_CHANNELS * config.smear
    return 6 * matrices + 12 * config.n_embd * keys


def training_tokens(config: GPTConfig, target_param_data_ratio: float) -> int:
    return round(target_param_data_ratio * scaling_parameters(config))


@cache
def memory_bytes(
    config: GPTConfig,
    rows: int,
    world_size: int = 1,
    *,
    recompute: bool = False,
    compute_bytes: int = 2,
    table_bytes: int = 4,
    chunk: int = GPU_CHUNK,
) -> dict[str, int]:
    """Bytes of device memory for training on micro-batches of `rows`, by part, and their "total".

    Weights and gradients are fp32 (embeddings: `table_bytes` each) and whole on every rank;
    optimizer state is sharded. A layer keeps 17 numbers per channel and token for backward: 4 + 4
    widths in the MLP, 3.5 in norms and inputs, 5.5 in queries, keys and values (4.5 if no keys are
    shifted). To `recompute`, it keeps its input; one layer at a time then takes 22 for its backward
    pass, in the place of the loss's logits. Smear keeps 2 (tests/test_scaling.py measures the
    peak). `chunk`: logits that the loss has at once.
    """
    counts = parameter_counts(config)
    muon, tables = counts["blocks"], counts["embedding"] + counts["value_embeddings"]
    num_tokens = rows * config.sequence_len
    stored = 4 * (counts["total"] - tables) + table_bytes * tables
    moments = (4 + table_bytes) * tables  # the mean is stored as the table is
    at_once = 1 if recompute else config.n_layer  # layers with all that backward needs
    width = compute_bytes * config.n_embd * num_tokens  # a number per channel and token
    logits = 3 * 4 * min(chunk, num_tokens * config.padded_vocab_size)
    activations = (2 * config.smear + 17 * config.n_layer) * width
    if recompute:
        activations = (2 * config.smear + config.n_layer + 22) * width
        logits = max(0, logits - 22 * width)
    copied = counts["blocks"] * at_once // config.n_layer + counts["head"]
    passing = {
        "16-bit copies": compute_bytes * copied if compute_bytes < 4 else 0,
        "activations": activations,
        # The head's gradient, made in the forward pass, and three tensors of one chunk's logits, so
        # far as they are not in that place.
        "loss": 4 * counts["head"] + logits,
    }
    # What only a step needs takes the place of what is gone by then.
    step = transient_bytes(muon, 4 * config.n_embd**2)
    parts = {
        "weights": stored,
        "gradients": stored,
        "optimizer": (4 * muon + 8 * (counts["total"] - muon - tables) + moments) // world_size,
        **passing,
        "step": max(0, step - sum(passing.values())),
    }
    return parts | {"total": sum(parts.values())}


def reference_horizon(horizon: float, target_param_data_ratio: float) -> float:
    """Tokens or steps of the same model at the reference's ratio, which batch and decay follow.

    A model with fewer tokens per parameter is no smaller model: depth 24 at ratio 8 was tuned to
    the decay of ratio 12, .060, where its own steps would give .090.
    """
    return horizon * (REFERENCE_RATIO / target_param_data_ratio)


def batch_tokens(num_tokens: float) -> int:
    """Tokens a step for a run of `num_tokens`: 2^19 (tokens / reference)^.383, rounded to 2^n."""
    return 2 ** round(math.log2(REFERENCE_BATCH * (num_tokens / REFERENCE_TOKENS) ** 0.383))


def rate_factor(rates: Rates, total_batch_size: int, num_steps: float) -> float:
    """Learning-rate multiplier: (batch / 2^19)^batch_exponent, .5 in the published rule, to 2^18.

    Smaller batches use the rate of 2^18, times (2520 / steps)^steps_exponent if the run has fewer
    steps than the reference's 2,520. num_steps 1 means unknown: a stage that starts from a trained
    model.
    """
    factor = (max(total_batch_size, SQRT_RULE_FROM) / REFERENCE_BATCH) ** rates.batch_exponent
    if total_batch_size >= SQRT_RULE_FROM or num_steps <= 1:
        return factor
    return factor * max(1.0, REFERENCE_STEPS / num_steps) ** rates.steps_exponent


def weight_decay(total_batch_size: int, num_steps: float) -> float:
    """Decay of the matrices, such that learning rate x decay x steps matches the reference run."""
    rates = RATES["matrices"]
    factor = rate_factor(rates, total_batch_size, num_steps)
    return rates.weight_decay * REFERENCE_STEPS / num_steps / factor


def make_optimizer(
    model: GPT, total_batch_size: int, num_steps: float, rank: int = 0, world_size: int = 1
) -> MuonAdamW:
    """The optimizer for `num_steps` steps, at the base rates that schedules multiply."""
    groups = []
    for group in model.parameter_groups():
        rates = RATES[group["name"]]
        lr = rates.lr * (model.config.n_embd / REFERENCE_WIDTH) ** rates.width_exponent
        lr *= rate_factor(rates, total_batch_size, num_steps)
        if group["kind"] == "muon":
            momentum, beta2 = rates.betas
            decay = weight_decay(total_batch_size, num_steps)
            options = {"momentum": momentum, "beta2": beta2, "weight_decay": decay}
        else:
            options = {"betas": rates.betas, "eps": rates.eps, "weight_decay": rates.weight_decay}
        groups.append({**group, "lr": lr, **options})
    return MuonAdamW(groups, rank, world_size, model.compute_dtype)


def warmup_fraction(step: int, num_steps: int, warmup_steps: int, limit: float) -> float:
    """Completed fraction of a warm-up after the update of `step`, in (0, 1]."""
    return min(1.0, (step + 1) / max(1.0, min(warmup_steps, limit * num_steps)))


def warmdown_fraction(progress: float, warmdown: float) -> float:
    if warmdown <= 0:
        return 0.0
    return min(1.0, max(0.0, (progress - (1 - warmdown)) / warmdown))


def lr_multiplier_at(progress: float, warmdown: float, final: float = 0.0) -> float:
    """Learning-rate multiplier without warm-up: flat, then linear to `final` at progress 1."""
    return 1 - (1 - final) * warmdown_fraction(progress, warmdown)


class Schedule(NamedTuple):
    """The steps of a pretraining run."""

    batch: int  # tokens a step
    end: int  # the step at which the learning rate has fallen
    tuned_steps: float  # that learning rates and decay are for
    start: int = 0  # the step at which the rate begins to rise

    def multipliers(self, step: int) -> tuple[float, float, float]:
        """(of the learning rates, Muon's momentum, of its weight decay) at `step` of the run.

        Rates: linear warm-up, flat, linear warm-down to FINAL. Momentum: .85 -> .97 in its warm-up,
        .97 -> .90 in the warm-down. Decay: half a cosine from 1 to 0.
        """
        step, num_steps = step - self.start, self.end - self.start
        progress = step / num_steps
        rate = warmup_fraction(step, num_steps, LR_WARMUP_STEPS, LR_WARMUP_LIMIT)
        warm = warmup_fraction(step, num_steps, MOMENTUM_WARMUP_STEPS, MOMENTUM_WARMUP_LIMIT)
        momentum = 0.85 + 0.12 * warm - 0.07 * warmdown_fraction(progress, WARMDOWN)
        decay = 0.5 * (1 + math.cos(math.pi * progress))
        return rate * lr_multiplier_at(progress, WARMDOWN, FINAL), momentum, decay


# --- what compute buys, by runs and laws that others published

# FLOPs, ratio, bits per byte of ClimbMix and CORE of karpathy/nanochat's runs 4, 5 and 6, of depth
# 24, from its dev/LEADERBOARD.md. Our recipe is that of the last.
RUNS = (
    (3.43e19, 9.5, 0.71854, 0.2571), (3.09e19, 8.7, 0.71808, 0.2690), (2.79e19, 8.0, 0.718, 0.2626),
)  # fmt: skip
# Loss E + A / parameters^a + B / tokens^b, fitted to other models by Hoffmann et al., arXiv
# 2203.15556, and again by Besiroglu et al., 2404.10102: what these runs, all of one size, cannot
# say. It is scaled to the last run, and its best ratio put where karpathy/nanochat found its own.
LAWS = ((1.69, 406.4, 410.7, 0.34, 0.28), (1.8172, 482.01, 2085.43, 0.3478, 0.3658))
# (FLOPs, ratio, CORE) of a smaller and a larger model of karpathy/nanochat: depth 14 of its pull
# request 747 and the runs above; depth 16 of its dev/LOG.md and run 1. That the smaller had ratio
# 12 and the corpus of the larger is assumed. That CORE falls exponentially with the loss is the
# form of Gadre et al., arXiv 2403.08540.
CORE = fmean(run[3] for run in RUNS)
CORE_PAIRS = (
    ((2.22e18, 12, 0.157), (2.79e19, 8, CORE)), ((4.47e18, 12, 0.155), (4.33e19, 12, 0.2585)),
)  # fmt: skip
CORE_SPREAD = 0.0165 / 2  # around its middle, of seven runs of one recipe (run 4)


def law_bpb(law: tuple[float, ...], flops: float, ratio: float) -> float:
    """Bits per byte of ClimbMix by a law; of the last run, as published."""
    least, a, b, alpha, beta = law
    best = (alpha * a / (beta * b)) ** (1 / (alpha + beta))

    def loss(flops: float, ratio: float) -> float:
        num_params = best * (flops / 6) ** (beta / (alpha + beta))
        num_params *= math.sqrt(REFERENCE_RATIO / ratio)
        return least + a / num_params**alpha + b / (flops / 6 / num_params) ** beta

    return RUNS[-1][2] * loss(flops, ratio) / loss(*RUNS[-1][:2])


def predict(flops: float, ratio: float) -> tuple[float, float, float, float]:
    """(bits per byte of ClimbMix, its error; CORE, its error) after so many FLOPs of pretraining.

    The errors add up half of what the laws, or the pairs, differ by; what the laws miss the other
    runs by, at most; and what CORE varies by.
    """

    def mean_bpb(flops: float, ratio: float) -> float:
        return fmean(law_bpb(law, flops, ratio) for law in LAWS)

    bpb, missed = mean_bpb(flops, ratio), [mean_bpb(*run[:2]) - run[2] for run in RUNS[:-1]]
    slopes = [math.log(high[2] / low[2]) / (mean_bpb(*low[:2]) - mean_bpb(*high[:2]))
              for low, high in CORE_PAIRS]  # fmt: skip
    cores = [CORE * math.exp(slope * (RUNS[-1][2] - bpb)) for slope in slopes]
    error = abs(law_bpb(LAWS[0], flops, ratio) - bpb) + max(map(abs, missed))
    core_error = abs(cores[0] - fmean(cores)) + fmean(slopes) * fmean(cores) * error + CORE_SPREAD
    return bpb, error, fmean(cores), core_error


# --- graphics cards


class Card(NamedTuple):
    """One GPU as its vendor describes it, a row of cards.txt."""

    name: str  # words of the CUDA device name
    memory_gib: float  # usable: without what the driver, error correction and CUDA take
    bandwidth: float  # GB/s
    peak: float  # dense TFLOP/s with fp32 accumulation in bf16, before capability 8.0 in fp16
    price: float | None  # dollars for an hour, where such a card is usually rented
    capability: tuple[int, int]  # CUDA's version of the hardware

    @property
    def key(self) -> str:
        """The short name that flags take, such as h100-pcie, 4060-ti or 6000-ada."""
        return re.sub("[rg]tx (?=.)", "", self.name.lower()).replace(" ", "-")


def read_card(line: str) -> Card:
    name, memory, bandwidth, peak, price, capability = line.rsplit(maxsplit=5)
    major, minor = map(int, capability.split("."))
    dollars = None if price == "-" else float(price)
    return Card(name, float(memory), float(bandwidth), float(peak), dollars, (major, minor))


LINES = (Path(__file__).parent / "cards.txt").read_text().splitlines()
CARDS = [read_card(line) for line in LINES if line and not line.startswith("#")]
# Words of a device name that tell neither speed nor a share of the card.
SAME_CARD = re.compile(
    r"nvidia|geforce|tesla|gpu|generation|blackwell|(workstation|server|edition)|pcie|sxm\d?|hbm\w+"
    r"|\d+gb"
)


def find_card(device_name: str) -> Card | None:
    """The card of a CUDA device name; None if it is not in the table.

    All words of the card must be there, and no others but those that change nothing: an L40 is no
    L4, and a laptop's 4090 or a slice of an A100 is unknown.
    """
    words = set(re.findall(r"[\w.]+", device_name.lower()))
    for card in sorted(CARDS, key=lambda card: -len(card.name.split())):
        own = set(card.name.lower().split())
        if own <= words and all(SAME_CARD.fullmatch(word) for word in words - own):
            return card
    return None


def named_card(name: str) -> Card:
    """The card that people call rtx4090, RTX 4090, 4090 or NVIDIA GeForce RTX 4090.

    Part of a name will do where no other card has it. UserError suggests the nearest names.
    """
    brands = r"nvidia|geforce|tesla|rtx|gtx|[^a-z0-9]"
    cards = {re.sub(brands, "", card.name.lower()): card for card in CARDS}
    words = re.findall(r"[^\W_]+", name.lower())
    own = [word for word in words if not SAME_CARD.fullmatch(word)]
    text = ""
    for text in (re.sub(brands, "", "".join(part)) for part in (words, own)):
        found = [text] if text in cards else [key for key in cards if text and text in key]
        if len(found) == 1:
            return cards[found[0]]
    nearest = ", ".join(cards[key].key for key in difflib.get_close_matches(text, cards, 3, 0))
    raise UserError(f"--gpu={name} is unknown; the nearest are {nearest} (all: nanochat/cards.txt)")


def peak_flops(runtime: Runtime) -> tuple[float, str]:
    """(the FLOP/s that MFU is measured against, where that number comes from)."""
    if card := find_card(runtime.device_name):
        kind = "bf16" if card.capability >= (8, 0) else "fp16"
        return card.peak * 1e12, f"{card.name} dense {kind} data sheet"
    dtype = str(runtime.dtype).removeprefix("torch.")
    return measure_flops(runtime), f"{dtype} matmul measured on this {runtime.device_name}"


def measure_flops(runtime: Runtime, seconds: float = 0.5) -> float:
    """FLOP/s of matmuls on this device: the best within some seconds, as it may be busy."""
    # Of a GPU only large ones, one after the other, measure more than their launch.
    size, repeats = (8192, 20) if runtime.device.type == "cuda" else (1024, 1)
    random = torch.Generator(runtime.device)  # training's own must not move
    shape, dtype = (2, size, size), runtime.dtype
    left, right = torch.randn(shape, generator=random, device=runtime.device, dtype=dtype)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        synchronize(runtime.device)
        before = time.perf_counter()
        for _ in range(repeats):
            torch.mm(left, right)
        synchronize(runtime.device)
        best = min(best, time.perf_counter() - before)
    return repeats * 2 * size**3 / best
