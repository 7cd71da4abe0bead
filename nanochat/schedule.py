"""How far a run has come -> learning rate multiplier, Muon momentum, weight decay multiplier; pure functions.

All take `progress`, the fraction of the run that is done: (step) / (num_steps) for pretraining, the fraction of
the conversations dealt for the chat stages. Nothing is remembered between calls, so a resumed run cannot
differ from an uninterrupted one.

The choice that would surprise: the warm-ups are counted in steps (40 and 400, as tuned at depth 12 with 2,500
steps) but never exceed a fraction of the run, so that a run of some hundred steps is not all warm-up.

Source: karpathy/nanochat's sweeps at depth 12, confirmed at depth 24.
"""

import math

LR_WARMUP_STEPS, LR_WARMUP_LIMIT = 40, 0.05  # steps; at most this fraction of the run
MOMENTUM_WARMUP_STEPS, MOMENTUM_WARMUP_LIMIT = 400, 0.25
WARMDOWN = 0.65  # the last part of the run, in which the learning rate falls
FINAL = 0.05  # of the learning rate, at the end of pretraining


def ramp(step: int, num_steps: int, warmup_steps: int, limit: float) -> float:
    """Fraction of a warm-up that is over once the update of `step` is made, in (0, 1]."""
    return min(1.0, (step + 1) / max(1.0, min(warmup_steps, limit * num_steps)))


def fall(progress: float, warmdown: float) -> float:
    """Fraction of the warm-down that is over, in [0, 1]."""
    if warmdown <= 0:
        return 0.0
    return min(1.0, max(0.0, (progress - (1 - warmdown)) / warmdown))


def lr_multiplier(
    step: int, num_steps: int, warmdown: float = WARMDOWN, final: float = FINAL
) -> float:
    """Learning rate multiplier of `step` (from 0): linear warm-up, flat, linear warm-down to `final`."""
    warm = ramp(step, num_steps, LR_WARMUP_STEPS, LR_WARMUP_LIMIT)
    return warm * lr_multiplier_at(step / num_steps, warmdown, final)


def lr_multiplier_at(progress: float, warmdown: float, final: float = 0.0) -> float:
    """Multiplier of a stage that starts from a trained model: flat, then linear to `final` at progress 1."""
    return 1 - (1 - final) * fall(progress, warmdown)


def muon_momentum(step: int, num_steps: int, warmdown: float = WARMDOWN) -> float:
    """Momentum of `step`: .85 -> .97 in the warm-up, .97 -> .90 in the warm-down."""
    warm = ramp(step, num_steps, MOMENTUM_WARMUP_STEPS, MOMENTUM_WARMUP_LIMIT)
    return 0.85 + 0.12 * warm - 0.07 * fall(step / num_steps, warmdown)


def weight_decay_multiplier(progress: float) -> float:
    """Half a cosine from 1 at the start to 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
