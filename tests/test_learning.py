"""dev.bench.learning: what an idea is worth, against curves of a known multiplier."""

import json
from pathlib import Path

import pytest

import primer
from dev.bench import learning
from dev.bench.learning import Point, compute_multiplier
from nanochat.common import run_dir
from nanochat.scaling import flops_per_token
from tests.models import random_gpt, refuses, save_model
from tests.test_dataset import parquet


def law(flops: float, multiplier: float = 1.0) -> Point:
    """A power law: what `multiplier` times the FLOPs would reach."""
    return Point(flops, 8 * (multiplier * flops) ** -0.05, 1.0)


@pytest.mark.parametrize("multiplier", [0.5, 0.9, 1.0, 1.07, 1.3, 4.0])
@pytest.mark.parametrize("flops", [1e13, 3e13, 5e14, 2e16])
def test_the_multiplier_of_a_power_law_is_found(multiplier: float, flops: float) -> None:
    """Between the baseline's points and beyond both ends."""
    baseline = [law(flops) for flops in (1e15, 1e13, 1e14)]
    found = compute_multiplier(baseline, law(flops, multiplier))
    assert found == pytest.approx(multiplier, rel=1e-9)


def test_points_that_are_no_better_do_not_count() -> None:
    start, worse = Point(0.0, 3.0, 0.0), Point(3e14, 9.0, 1.0)
    baseline = [start, law(1e13), worse, law(1e15)]
    assert compute_multiplier(baseline, law(2e14, 1.2)) == pytest.approx(1.2)
    assert compute_multiplier([start, law(1e15)], law(1e15)) != 1  # nan: one point is no curve


def test_two_runs_are_compared_by_their_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for tag, multiplier in (("plain", 1.0), ("idea", 1.25)):
        model = random_gpt(64)
        save_model(model, "base", tag, step=3)
        flops = flops_per_token(model.config)
        records = [
            {
                "step": n,
                "tokens": n * 1000,
                "seconds": n,
                "val_bpb": law(n * 1e3 * flops, multiplier).bpb,
            }
            for n in (1, 2, 3)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (run_dir("base", tag) / "metrics.jsonl").write_text(text)
    paths = run_dir("base", "plain") / "metrics.jsonl", run_dir("base", "idea")
    learning.main(learning.Config(compare=paths))
    assert "compute multiplier 1.250" in capsys.readouterr().out
    refuses("holds no checkpoint", learning.compare, (tmp_path, tmp_path))


@pytest.mark.slow
def test_each_depth_is_trained_with_the_idea_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "")  # restores it afterwards
    for number in (0, 1):
        texts = (primer.document("train", 300 * number + index) for index in range(300))
        (tmp_path / f"shard_{number:05d}.parquet").write_bytes(parquet(*texts))
    learning.main(
        learning.Config(tmp_path, (1, 2), ratio=0.01, variant=("plain",), device_type="cpu")
    )
    page = capsys.readouterr().out
    for depth in (1, 2):
        assert f"baseline depth {depth} seed 0: bpb" in page and f"idea     depth {depth}" in page
        assert f"\ndepth {depth}: bpb" in page
