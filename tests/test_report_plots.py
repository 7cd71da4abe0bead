"""Charts: the points of the SVG are those of the records, the bytes are always the same, what is missing is left out."""

import ast
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from nanochat import report
from nanochat.report import MAX_POINTS, draw_run

SVG = "{http://www.w3.org/2000/svg}"


def training(num_steps: int) -> list[dict[str, float]]:
    """Records as a trainer writes them; validated at the first and every tenth step."""
    records = [{"step": 0, "tokens": 0, "seconds": 0.0, "val_bpb": 3.5}]
    for step in range(1, num_steps + 1):
        records.append({
            "step": step, "tokens": 4096 * step, "seconds": 40.0 * step, "loss": 2 + 5 / step + math.sin(step),
            "lrm": 1 - step / num_steps, "tok_per_second": 4e6 + step, "mfu": 0.5,
        })  # fmt: skip
        if step % 10 == 0:
            records[-1]["val_bpb"] = 1 + 1 / step
    return records


def reinforcement(num_steps: int) -> list[dict[str, float]]:
    return [
        {"step": step, "tokens": step, "seconds": step, "loss": -0.1, "reward": step / 10}
        | ({"accuracy": 0.4 + step / 50, "accuracy_stderr": 0.04} if step % 2 == 0 else {})
        for step in range(1, num_steps + 1)
    ]


def element(figure: str, name: str) -> ET.Element:
    """The group of the chart whose id ends in `name`."""
    root = ET.fromstring(figure)
    return next(group for group in root.iter(f"{SVG}g") if group.get("id", "").endswith(name))


def curve_points(figure: str) -> np.ndarray:
    """(N, 2) places of the curve's points in the chart's units."""
    path = element(figure, "-curve").find(f"{SVG}path")
    assert path is not None
    return np.array(
        [pair.split() for pair in re.findall(r"[ML] ([^ML]+)", path.get("d", ""))], float
    )


def assert_affine(drawn: np.ndarray, true: list[float]) -> None:
    """`drawn` is `true`, moved and scaled, up to the six decimals of the SVG."""
    scale, offset = np.polyfit(true, drawn, 1)
    assert np.allclose(scale * np.array(true) + offset, drawn, atol=1e-4)


def test_every_point_is_where_its_record_says() -> None:
    records = training(60)
    figures = draw_run(records, "base_train")
    assert len(figures) == 7
    for title, over, key in (
        ("Loss over tokens", "tokens", "loss"),
        ("Validation bits per byte over time", "seconds", "val_bpb"),
        ("Learning rate multiplier over steps", "step", "lrm"),
    ):
        points = curve_points(figures[title])
        rows = [record for record in records if key in record]
        assert len(points) == len(rows) == (7 if key == "val_bpb" else 60)
        assert_affine(points[:, 0], [row[over] for row in rows])
        assert_affine(-points[:, 1], [row[key] for row in rows])


def test_a_long_run_is_drawn_as_means_of_stretches() -> None:
    records = training(2 * MAX_POINTS)
    points = curve_points(draw_run(records, "base_train")["Loss over tokens"])
    losses = [record["loss"] for record in records[1:]]
    assert len(points) == MAX_POINTS
    assert_affine(-points[:, 1], [fmean(losses[i : i + 2]) for i in range(0, len(losses), 2)])


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert draw_run(training(12), "base_train") == draw_run(training(12), "base_train")


def test_two_runs_share_no_id() -> None:
    found = [
        re.findall(r' id="([^"]*)"', "".join(draw_run(training(3), name).values()))
        for name in ("mid_train", "chat_sft")
    ]
    assert len(set(found[0] + found[1])) == len(found[0]) + len(found[1])


def test_reinforcement_shows_rewards_and_accuracy_with_its_error_instead_of_the_loss() -> None:
    figures = draw_run(reinforcement(8), "chat_rl")
    assert list(figures) == ["Reward over steps", "Held-out accuracy over steps"]
    accuracy = figures["Held-out accuracy over steps"]
    points = curve_points(accuracy)
    bars = [path.get("d", "") for path in element(accuracy, "-errors").iter(f"{SVG}path")]
    ends = np.array([re.findall(r"[ML] (\S+) (\S+)", bar) for bar in bars], float)  # (N, 2, 2)
    assert len(points) == len(ends) == 4
    assert np.allclose(ends.mean(axis=1), points, atol=1e-4)
    # An error of .04 is as long as the way from one point to the next, which is .04 higher.
    assert np.allclose(np.ptp(ends[:, :, 1], axis=1) / 2, points[0, 1] - points[1, 1], atol=1e-4)


@pytest.mark.parametrize(
    ("num_steps", "units"), [(1, "seconds"), (60, "minutes"), (100, "hours"), (300, "hours")]
)
def test_time_is_told_in_the_largest_unit_that_fits(num_steps: int, units: str) -> None:
    texts = [
        text.text
        for text in ET.fromstring(draw_run(training(num_steps), "x")["Loss over time"]).iter(
            f"{SVG}text"
        )
    ]
    assert texts.count(units) == 1


def test_charts_are_left_out_where_there_are_no_numbers() -> None:
    assert draw_run([], "base_train") == {}
    assert list(draw_run(training(0), "x")) == [
        "Validation bits per byte over tokens",
        "Validation bits per byte over time",
    ]


def test_a_diverged_run_is_drawn_up_to_where_it_diverged() -> None:
    records = training(5)
    records[-1]["loss"] = math.nan
    figure = draw_run(records, "x")["Loss over tokens"]
    assert len(curve_points(figure)) == 4 and "to nan" in figure


def test_colours_are_those_of_the_page_and_text_is_text() -> None:
    figure = draw_run(training(20), "x")["Loss over tokens"]
    assert not re.findall(r"(?:fill|stroke): #", figure)
    assert {"var(--ink)", "var(--rule)", "var(--line)"} == set(re.findall(r"var\(--\w+\)", figure))
    assert "million tokens" not in figure and ">tokens</text>" in figure


def test_matplotlib_is_not_loaded_with_the_module() -> None:
    """`report reset` does not draw, and should not wait for a second."""
    tree = ast.parse(Path(report.__file__).read_text())
    top = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert top and not [line for line in top if "matplotlib" in line]
