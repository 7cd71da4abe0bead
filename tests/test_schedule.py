"""nanochat.schedule as tables at 0, 80, 90 and 100 % of a run."""

import pytest

from nanochat import scaling


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1 / 40),  # 40 steps of warm-up
        (19, 0.5),
        (39, 1.0),
        (350, 1.0),  # the warm-down is the last 65 %
        (675, 0.525),
        (800, 1 - 0.95 * 0.45 / 0.65),
        (900, 1 - 0.95 * 0.55 / 0.65),
        (1000, 0.05),
    ],
)
def test_pretraining_multiplier(step: int, expected: float) -> None:
    assert scaling.lr_multiplier(step, 1000) == pytest.approx(expected)


def test_short_runs_warm_up_in_a_fraction_of_the_run() -> None:
    multipliers = [scaling.lr_multiplier(step, 100) for step in range(101)]
    full = scaling.LR_WARMUP_LIMIT * 100
    assert multipliers[0] == pytest.approx(1 / full)
    assert multipliers[round(full) - 1] == 1.0
    assert all(0 < multiplier <= 1 for multiplier in multipliers)
    assert scaling.lr_multiplier(0, 1) == 1.0


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 1.0), (0.8, 1.0), (0.9, 0.5), (1.0, 0.0), (1.3, 0.0)],  # a last batch may overshoot
)
def test_chat_stage_multiplier_falls(progress: float, expected: float) -> None:
    assert scaling.lr_multiplier_at(progress, warmdown=0.2) == pytest.approx(expected)


def test_no_warmdown_stays_at_one() -> None:
    assert [scaling.lr_multiplier_at(p, warmdown=0) for p in (0.0, 0.9, 1.0)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.85 + 0.12 / 400),
        (399, 0.97),
        (3500, 0.97),
        (8000, 0.97 - 0.07 * 0.45 / 0.65),
        (9000, 0.97 - 0.07 * 0.55 / 0.65),
        (10000, 0.90),
    ],
)
def test_muon_momentum(step: int, expected: float) -> None:
    assert scaling.muon_momentum(step, 10000) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0.0, 1.0), (0.5, 0.5), (0.8, 0.0954915), (0.9, 0.0244717), (1.0, 0.0)],
)
def test_weight_decay_multiplier(progress: float, expected: float) -> None:
    assert scaling.weight_decay_multiplier(progress) == pytest.approx(expected, abs=1e-7)
