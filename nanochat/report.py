"""The report card: each stage leaves a section, and `generate` makes one report of them.

    python -m nanochat.report reset      # before a run: clear the sections, note time and machine
    python -m nanochat.report generate   # after it: write report.md, report.html and report.json

A section is one JSON file, `$NANOCHAT_BASE_DIR/report/<stage>.json`, which a stage that runs again
replaces. The report lies beside them, report.md and report.html in the working folder as well. It
is written once, as Markdown; markdown-it makes the page of it, with only tables, lists and fences
switched on, so that nothing that a model or a user wrote can act there. The page needs no other
file; matplotlib draws its charts from metrics.jsonl, the same bytes for the same numbers.
"""

import io
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro

from nanochat.common import (
    UserError,
    base_dir,
    git_revision,
    print0,
    report_dir,
    run_script,
    write_file,
)
from nanochat.core_eval import Score
from nanochat.trainer import format_seconds, read_metrics

TITLE = "nanochat report"
ASSETS = Path(__file__).resolve().parent / "ui"
STAGES = (
    "tok_train", "tok_eval", "base_train", "base_loss", "base_eval",
    "mid_train", "chat_sft", "chat_rl", "chat_eval_mid", "chat_eval_sft", "chat_eval_rl",
)  # fmt: skip
# Column of the last table -> the stages that may hold val_bpb, the first found wins; and, last, the
# stage of the accuracies.
COLUMNS = {
    "BASE": ("base_loss", "base_train", "base_eval"),
    "MID": ("mid_train", "chat_eval_mid"),
    "SFT": ("chat_sft", "chat_eval_sft"),
    "RL": ("chat_rl", "chat_eval_rl"),
}
# Metrics that are not accuracies begin with these. CORE and ChatCORE are centered: 0 is guessing.
NO_ACCURACY = ("val_bpb", "CORE", "ChatCORE")
# Of known models. CORE: GPT-2's from karpathy/nanochat's dev/estimate_gpt3_core.ipynb, and of its
# own pull request 747, first README, and runs 1 and 6. ChatCORE: its SFT around commit 83dccc2.
KNOWN = {
    "CORE": {
        "GPT-2 124M": 0.1139, "karpathy's d14": 0.157, "GPT-2 355M": 0.1849, "GPT-2 774M": 0.2146,
        "karpathy's first d20": 0.2219, "GPT-2 XL": 0.2565, "karpathy's d24 at ratio 12": 0.2585,
        "karpathy's d24 at ratio 8": 0.2626,
    },
    "ChatCORE": {"karpathy's SFT without a loss mask": 0.315, "karpathy's SFT": 0.355},
}  # fmt: skip
START = "start"  # start.json holds what `reset` noted; no stage has this name
REPOSITORY = Path(__file__).resolve().parent.parent
CODE = ("*.py", "*.pyi", "*.rs", "*.sh", "*.js", "*.css", "*.html", "*.toml")
MAX_POINTS = 300
QUIET, LINE, TEAL = "#5c6668", "#dcd4c2", "#1b636b"  # of the variables in ui/base.css
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "nanochat", "svg.fonttype": "none", "path.simplify": False,
    "font.sans-serif": ["DejaVu Sans"], "font.size": 10,
    "axes.labelcolor": QUIET, "xtick.labelcolor": QUIET, "ytick.labelcolor": QUIET,
    "axes.edgecolor": LINE, "xtick.color": LINE, "grid.color": LINE, "ytick.major.size": 0,
    "axes.grid": True, "axes.grid.axis": "y",
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False,
}  # fmt: skip
# What a chart is drawn over -> (size of a unit, its name), the largest first.
UNITS = {
    "step": ((1, "steps"),),
    "tokens": ((1e9, "billion tokens"), (1e6, "million tokens"), (1, "tokens")),
    "seconds": ((3600, "hours"), (60, "minutes"), (1, "seconds")),
}
# Title of a chart -> (key of metrics.jsonl, the key that it is drawn over).
CURVES = {
    "Loss over tokens": ("loss", "tokens"),
    "Loss over time": ("loss", "seconds"),
    "Validation bits per byte over tokens": ("val_bpb", "tokens"),
    "Validation bits per byte over time": ("val_bpb", "seconds"),
    "Reward over steps": ("reward", "step"),
    "Held-out accuracy over steps": ("accuracy", "step"),
    "Useful groups over steps": ("useful_groups", "step"),
    "Tokens of an answer over steps": ("answer_tokens", "step"),
    "Learning rate multiplier over steps": ("lrm", "step"),
    "Tokens per second over time": ("tok_per_second", "seconds"),
    "Model FLOPs utilisation over time": ("mfu", "seconds"),
}
SHARES = ("accuracy", "useful_groups", "mfu")  # printed in percent


class Section(NamedTuple):
    """What one stage left, as its file holds it."""

    title: str
    time: float
    seconds: float | None
    git: str
    host: str
    settings: Mapping[str, Any]
    results: Mapping[str, Any]  # a score is {"value": ..., "stderr": ...}
    samples: Sequence[str]


class Chapter(NamedTuple):
    """A heading, the Markdown below it, its address in the page and the figures there."""

    anchor: str
    title: str
    markdown: str
    figures: Mapping[str, str] = {}  # title -> HTML


def facts(caption: str, values: Mapping[str, Any]) -> str:
    lines = [f"- {cell(name)}: {cell(show(value))}\n" for name, value in values.items()]
    return f"{caption}:\n\n{''.join(lines)}\n"


def score_table(
    caption: str, corner: str, names: Iterable[str], columns: Mapping[str, Mapping[str, Any]]
) -> str:
    """A row for each name, with its score in every column."""
    rows = [[corner, *columns], ["---", *["---:"] * len(columns)]]
    for name in names:
        percent = not name.startswith(NO_ACCURACY)
        rows.append([name, *(show(scores.get(name), percent) for scores in columns.values())])
    lines = [f"| {' | '.join(map(cell, row))} |\n" for row in rows]
    return f"{caption}:\n\n{''.join(lines)}\n"


def markdown_page(chapters: Sequence[Chapter]) -> str:
    """The whole report as Markdown, which cannot hold the figures and says where they are."""
    parts = [f"# {TITLE}\n\n"]
    for chapter in chapters:
        parts.append(f"## {cell(chapter.title)}\n\n{chapter.markdown}")
        if chapter.figures:
            parts.append(f"Charts in report.html: {', '.join(chapter.figures)}.\n\n")
    return "".join(parts).rstrip("\n") + "\n"


def html_page(chapters: Sequence[Chapter]) -> str:
    """The whole report as one HTML file; it begins with the last chapter, the summary."""
    # Imported here, as matplotlib is: `report reset` should not wait for what it does not need.
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("zero").enable(["table", "list", "fence", "escape", "entity"])
    # The box scrolls, not the page; the keyboard reaches it by its tabindex.
    box = '<div class="box" role="region" tabindex="0" aria-label="Table">\n<table>\n'
    markdown.add_render_rule("table_open", lambda *_: box)
    markdown.add_render_rule("table_close", lambda *_: "</table>\n</div>\n")
    links, parts = "", ""
    for chapter in (chapters[-1], *chapters[:-1]):
        link = f'<a href="#{chapter.anchor}">{escape(chapter.title)}</a>'
        links += f"<li>{link}</li>"
        parts += f'<section>\n<h2 id="{chapter.anchor}">{link}</h2>\n'
        parts += markdown.render(chapter.markdown)
        parts += f'<div class="charts">{"".join(chapter.figures.values())}</div>\n</section>\n'
    names = ("logo.svg", "base.css", "report.css")
    logo, *sheets = ((ASSETS / name).read_text("utf-8") for name in names)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{TITLE}</title>
<style>
{"".join(sheets)}</style>
</head>
<body>
<header>{logo}<h1>{TITLE}</h1></header>
<nav aria-label="Contents"><ul>{links}</ul></nav>
<main>
{parts}</main>
</body>
</html>
"""


def cell(text: str) -> str:
    """A value that stays in its Markdown line or table cell and reads as it was written."""
    marks = str.maketrans({"\\": "\\\\", "&": "&amp;", "<": "&lt;", "|": "\\|"})
    return " ".join(text.translate(marks).split())


def show(value: Any, percent: bool = False) -> str:
    """`0.2219 ± 0.0031`, or `85.0 % ± 1.2`; without the standard error where there is none."""
    if isinstance(value, dict) and "stderr" in value:
        value = Score(**value)
    value, stderr = value if isinstance(value, Score) else (value, None)
    if percent and isinstance(value, float):
        return f"{100 * value:.1f} %" + ("" if stderr is None else f" ± {100 * stderr:.1f}")
    return format_value(value) + ("" if stderr is None else f" ± {format_value(stderr)}")


def format_value(value: Any) -> str:
    """A number short enough to compare by eye, `-` for what is missing, else what it prints as."""
    if value is None or value == "":
        return "-"
    if type(value) is int or (isinstance(value, float) and 1e4 <= abs(value) < 1e9):
        return f"{value:,.0f}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def draw_run(records: Sequence[dict[str, Any]], name: str) -> dict[str, str]:
    """{title: <figure>} of all that a run's records have numbers for; `name` begins the ids."""
    reinforced = any("reward" in record for record in records)
    figures = {}
    for title, (key, over) in CURVES.items():
        if reinforced and key == "loss":  # that of a policy gradient measures nothing
            continue
        rows = [record for record in records if key in record]
        points = [[row[over], row[key], row.get(f"{key}_stderr", np.nan)] for row in rows]
        if points:
            figures[title] = draw(title, np.array(points, dtype=float), name)
    return figures


def draw(title: str, points: np.ndarray, name: str) -> str:
    """The <figure> of `points` (N, 3): place, value and standard error (NaN: none)."""
    # Imported here, since it takes a second that `report reset` should not wait for.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    key, over = CURVES[title]
    units, share = UNITS[over], key in SHARES
    size, unit = next((u for u in units if u[0] <= points[-1, 0]), units[-1])
    stretches = np.array_split(points, min(len(points), MAX_POINTS))
    place, value, error = np.array([stretch.mean(axis=0) for stretch in stretches]).T
    with matplotlib.rc_context(SETTINGS):
        chart = Figure(figsize=(4.4, 2.5))
        axes = chart.add_axes((0.15, 0.2, 0.82, 0.75))
        marker = "o" if len(place) <= 40 else ""  # each point, where they are few
        axes.plot(place / size, value, marker=marker, markersize=3.5, color=TEAL, gid="curve")
        if not np.isnan(error).any():
            axes.vlines(place / size, value - error, value + error, colors=TEAL, gid="errors")
        axes.set_xlabel(unit)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g} %" if share else f"{y:,.7g}")
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        chart.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    first, last = (show(y, percent=share) for y in points[[0, -1], 1].tolist())
    label = f"{title}, from {first} to {last}"
    # As an element of a page: without the XML before it, its ids its own, colours of the page.
    svg = file.getvalue()
    svg = f'<svg role="img" aria-label="{label}" {svg[svg.index("<svg") + 4 :].strip()}'
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-{key}-{over}-", svg)
    for variable, colour in (("quiet", QUIET), ("line", LINE), ("teal", TEAL)):
        svg = svg.replace(colour, f"var(--{variable})")
    return f"<figure><figcaption>{title} <b>{last}</b></figcaption>{svg}</figure>\n"


def write_section(
    stage: str,
    title: str,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    samples: Sequence[str] = (),
    seconds: float | None = None,
) -> None:
    """Write the section of `stage`, whole or not at all, on the main rank alone.

    `results` of an evaluation (base_eval, chat_eval_*) are {task: accuracy in 0..1}, and CORE or
    ChatCORE; those of a trainer may hold "val_bpb" and "folder", that of the run below the base
    folder. A Score carries its standard error. `seconds` is how long the stage took.
    """
    assert stage in (START, *STAGES), f"unknown stage {stage}; one of {STAGES}"
    if int(os.environ.get("RANK", 0)) != 0:
        return
    scores = {name: s._asdict() if isinstance(s, Score) else s for name, s in results.items()}
    git, host = git_revision(), platform.node()
    section = Section(title, time.time(), seconds, git, host, settings, scores, samples)
    text = json.dumps(section._asdict(), indent=1, default=str)
    write_file(report_dir() / f"{stage}.json", text)


def tracked_texts(patterns: Iterable[str], root: Path = REPOSITORY) -> dict[Path, str]:
    """The files of such names that git tracks, but tests and vendored code; none outside git."""
    others = [f":(exclude,glob)**/{folder}/**" for folder in ("tests", "vendor")]
    command = ["git", "-C", root, "ls-files", "-z", *patterns, *others]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    names = [Path(name) for name in listing.split("\0")]
    return {name: (root / name).read_text("utf-8") for name in names if (root / name).is_file()}


def code_size(root: Path = REPOSITORY) -> dict[str, int]:
    """Files, lines and characters of the code under `root`; empty outside git."""
    texts = tracked_texts(CODE, root).values()
    lines, characters = sum(text.count("\n") for text in texts), sum(map(len, texts))
    return {"files": len(texts), "lines": lines, "characters": characters} if texts else {}


def machine() -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    table = Path("/proc/cpuinfo")  # on Linux
    cpu = re.search(r"model name\s*:\s*(.+)", table.read_text()) if table.is_file() else None
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "CPU": f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores",
        "GPU": ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus) or "-",
        "memory": f"{memory / 2**30:.1f} GiB",
        "OS": platform.platform(),
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
        "git revision": git_revision(),
    }


def reset() -> None:
    """Forget the sections of earlier runs; note the time and the machine of the one that begins."""
    for path in report_dir().glob("*.json"):
        path.unlink()
    write_section(START, "Start", {}, machine())
    print0(f"report: started afresh in {report_dir()}")


def read_section(stage: str) -> Section | None:
    """A stage's section, None where it has not run; NaN, which JSON lacks, is a missing number."""
    path = report_dir() / f"{stage}.json"
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text("utf-8"), parse_constant=lambda _: None)
        return Section(**saved)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it or run its stage again") from None


def generate() -> None:
    """Write the report, its two pages into the working folder too."""
    sections = {stage: section for stage in STAGES if (section := read_section(stage))}
    if not sections:
        raise UserError(f"no stage has reported to {report_dir()}; run `bash runcpu.sh` first")
    start = read_section(START)
    # To the end of the last stage: a report that is generated a day later says the same.
    end = max(section.time for section in sections.values())
    report = {
        "started": start.time if start else None,
        "total_seconds": end - start.time if start else None,
        "machine": start.results if start else machine(),
        "code": code_size(),
        "sections": {stage: section._asdict() for stage, section in sections.items()},
        "summary": summarize(sections),
    }
    began = f"Started {format_time(start.time) if start else '-'}.\n\n"
    took = f"Total wall clock time: {format_seconds(end - start.time) if start else '-'}\n\n"
    size = facts("Size of the code base", report["code"] or {"size": None})
    chapters = [
        Chapter("start", "Machine and code", began + facts("Machine", report["machine"]) + size),
        *(stage_chapter(stage, section) for stage, section in sections.items()),
        Chapter("summary", "Summary", took + summary_table(report["summary"])),
    ]
    texts = {"report.md": markdown_page(chapters), "report.html": html_page(chapters)}
    for name, text in texts.items():
        write_file(report_dir() / name, text)
        write_file(Path(name).resolve(), text)
    write_file(report_dir() / "report.json", json.dumps(report, indent=1) + "\n")
    print0(f"report: wrote {' and '.join(texts)} here, and with report.json to {report_dir()}")


def stage_chapter(stage: str, section: Section) -> Chapter:
    """One stage: when and where, then results, samples, settings, and charts of its run."""
    took = f", took {format_seconds(section.seconds)}" if section.seconds is not None else ""
    text = f"{format_time(section.time)} on {section.host}, revision {section.git}{took}.\n\n"
    results = section.results
    if stage in {test for *_, test in COLUMNS.values()}:
        text += score_table("Results", "Task", results, {"Score": results})
    else:
        text += facts("Results", results)
    text += "Samples:\n\n" if section.samples else ""
    for sample in section.samples:
        fence = "`" + max(["``", *re.findall("`+", sample)], key=len)  # longer than any in it
        text += f"{fence}text\n{sample}\n{fence}\n\n"
    text += facts("Settings", section.settings)
    figures = draw_run(read_metrics(base_dir() / results.get("folder", "-")), stage)
    return Chapter(stage, section.title, text, figures)


def summarize(sections: Mapping[str, Section]) -> dict[str, dict[str, Any]]:
    """{column: {"val_bpb": ..., and the results of its evaluation}} for all of COLUMNS."""
    results = {stage: section.results for stage, section in sections.items()}
    summary = {}
    for column, (*trainers, test) in COLUMNS.items():
        bpb = [results[s]["val_bpb"] for s in trainers if "val_bpb" in results.get(s, {})]
        summary[column] = {"val_bpb": bpb[0] if bpb else None, **results.get(test, {})}
    return summary


def summary_table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Metric | BASE | MID | SFT | RL; of CORE's tasks only those that chat models did too."""
    base, *chat = map(list, summary.values())
    if any(name.startswith("CORE") for name in base):
        base = [name for name in base if name.startswith(NO_ACCURACY)]
    names = sorted(dict.fromkeys(sum(chat, base)), key=lambda n: not n.startswith(NO_ACCURACY))
    # Before it, what CORE and ChatCORE of the latest stage are worth.
    latest = {name: own[name] for own in summary.values() for name in KNOWN if name in own}
    values = {name: s["value"] if isinstance(s, dict) else s for name, s in latest.items()}
    worth = [f"{standing(name, value)}.\n\n" for name, value in values.items() if value is not None]
    return "".join(worth) + score_table("Metrics", "Metric", names, summary)


def standing(name: str, score: float) -> str:
    """Between which known models a CORE or ChatCORE is, in words."""
    known = sorted((value, f"{model} ({value:.4g})") for model, value in KNOWN[name].items())
    worse = [f"above {label}" for value, label in known if value <= score]
    better = [f"below {label}" for value, label in known if value > score]
    return f"{name} {score:.3f} is {' and '.join(worse[-1:] + better[:1])}"


def format_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


@dataclass
class Config:
    action: tyro.conf.Positional[Literal["reset", "generate"]]  # what to do


def main(config: Config) -> None:
    {"reset": reset, "generate": generate}[config.action]()


if __name__ == "__main__":
    run_script(main, Config)
