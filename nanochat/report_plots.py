"""The metrics.jsonl of a run as small line charts: SVG, drawn by matplotlib, the same bytes for the same numbers.

A chart is an element to be put into a page: its colours are the page's CSS variables, so that it reads in light,
in dark and in print, its letters are text in the page's own font, and every id in it begins with its name.

The choice that would surprise: a long run is drawn as the means of MAX_POINTS stretches of it, not step by step.
That is all that a chart of this size can show, and it keeps the page small.
"""

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nanochat.report_page import format_value

MAX_POINTS = 300
INK, RULE, LINE = "#5c666b", "#dcdfdd", "#1f6f78"  # of --ink, --rule and --line in report.css
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "nanochat", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "font.size": 10,
    "axes.labelcolor": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "ytick.major.size": 0,
    "axes.edgecolor": RULE, "xtick.color": RULE, "grid.color": RULE, "axes.grid": True, "axes.grid.axis": "y",
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "path.simplify": False,
}  # fmt: skip
# What a chart is drawn over -> (size of a unit, its name), the largest first.
UNITS = {
    "step": ((1, "steps"),),
    "tokens": ((1e9, "billion tokens"), (1e6, "million tokens"), (1, "tokens")),
    "seconds": ((3600, "hours"), (60, "minutes"), (1, "seconds")),
}


class Curve(NamedTuple):
    """One key of metrics.jsonl over another; a share is printed in percent."""

    key: str
    over: str
    title: str
    share: bool = False


TRAINING = (
    Curve("loss", "tokens", "Loss over tokens"),
    Curve("loss", "seconds", "Loss over time"),
    Curve("val_bpb", "tokens", "Validation bits per byte over tokens"),
    Curve("val_bpb", "seconds", "Validation bits per byte over time"),
)
REINFORCEMENT = (  # without the loss of a policy gradient, which measures nothing
    Curve("reward", "step", "Reward over steps"),
    Curve("accuracy", "step", "Held-out accuracy over steps", share=True),
    Curve("useful_groups", "step", "Useful groups over steps", share=True),
    Curve("answer_tokens", "step", "Tokens of an answer over steps"),
)
MACHINERY = (
    Curve("lrm", "step", "Learning rate multiplier over steps"),
    Curve("tok_per_second", "seconds", "Tokens per second over time"),
    Curve("mfu", "seconds", "Model FLOPs utilisation over time", share=True),
)


def draw_run(records: Sequence[dict[str, Any]], name: str) -> dict[str, str]:
    """{title: <figure>} of all that the records of a run have numbers for; `name` begins the ids."""
    reinforced = any("reward" in record for record in records)
    figures = {}
    for curve in (*(REINFORCEMENT if reinforced else TRAINING), *MACHINERY):
        rows = [
            [record[curve.over], record[curve.key], record.get(f"{curve.key}_stderr", np.nan)]
            for record in records
            if curve.key in record
        ]
        if rows:
            figures[curve.title] = draw(curve, np.array(rows, dtype=float), name)
    return figures


def draw(curve: Curve, points: np.ndarray, name: str) -> str:
    """The <figure> of `points` (N, 3): place, value and standard error (NaN: none)."""
    # Imported here, since it takes a second that `report reset` should not wait for.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    units, share = UNITS[curve.over], curve.share
    size, unit = next((u for u in units if u[0] <= points[-1, 0]), units[-1])
    stretches = np.array_split(points, min(len(points), MAX_POINTS))
    place, value, error = np.array([stretch.mean(axis=0) for stretch in stretches]).T
    with matplotlib.rc_context(SETTINGS):
        chart = Figure(figsize=(4.4, 2.5))
        axes = chart.add_axes((0.15, 0.2, 0.82, 0.75))
        marker = "o" if len(place) <= 40 else ""  # each point, where they are few
        axes.plot(place / size, value, marker=marker, markersize=3.5, color=LINE, gid="curve")
        if not np.isnan(error).any():
            axes.vlines(place / size, value - error, value + error, colors=LINE, gid="errors")
        axes.set_xlabel(unit)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %" if share else f"{y:,.7g}")
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        chart.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    ends = points[[0, -1], 1].tolist()
    first, last = (f"{100 * y:.1f} %" if share else format_value(y) for y in ends)
    label = f"{curve.title}, from {first} to {last}"
    svg = embeddable(file.getvalue(), f"{name}-{curve.key}-{curve.over}-", label)
    return f"<figure><figcaption>{curve.title} <b>{last}</b></figcaption>{svg}</figure>\n"


def embeddable(svg: str, prefix: str, label: str) -> str:
    """matplotlib's file as an element of a page: labelled, as wide as its place, in the page's colours."""
    svg = f'<svg role="img" aria-label="{label}"{svg[svg.index("<svg") + 4 :]}'
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg)  # of the root
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    for variable, colour in (("ink", INK), ("rule", RULE), ("line", LINE)):
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.strip()
