"""The report card: every stage leaves a section, and `generate` makes a report of them for people and programs.

    python -m nanochat.report reset      # before a run: clear the sections, note the time and the machine
    python -m nanochat.report generate   # after it: write report.md, report.html and report.json
    python -m nanochat.report size       # print the size of the code base

A section is one JSON file, `$NANOCHAT_BASE_DIR/report/<stage>.json`, which a stage that runs again replaces.
The report lies beside them, and in the working folder what people read. It lists the sections in pipeline order,
with charts of the training runs, and ends with the table Metric | BASE | MID | SFT | RL.

The choice that would surprise: a token of the code base is taken for four characters, since the count should
not depend on a vocabulary.
"""

import json
import os
import platform
import re
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro

from nanochat import report_page as page
from nanochat.flags import run_script
from nanochat.metrics import format_seconds, read_metrics
from nanochat.paths import UserError, base_dir, report_dir, write_file
from nanochat.report_plots import draw_run
from nanochat.runtime import git_revision, say

STAGES = (
    "tok_train", "tok_eval", "base_train", "base_loss", "base_eval",
    "mid_train", "chat_sft", "chat_rl", "chat_eval_mid", "chat_eval_sft", "chat_eval_rl",
)  # fmt: skip
# Column of the last table -> (stages that may hold val_bpb, first found wins; stage of the accuracies).
COLUMNS = {
    "BASE": (("base_loss", "base_train"), "base_eval"),
    "MID": (("mid_train",), "chat_eval_mid"),
    "SFT": (("chat_sft",), "chat_eval_sft"),
    "RL": (("chat_rl",), "chat_eval_rl"),
}
# How metrics begin that are not accuracies. CORE and ChatCORE are centred: 0 is guessing.
NO_ACCURACY = ("val_bpb", "CORE", "ChatCORE")
START = "start"  # start.json holds what `reset` noted; no stage has this name
REPOSITORY = Path(__file__).resolve().parent.parent
CODE_SUFFIXES = {".py", ".rs", ".toml", ".sh", ".md", ".html", ".js", ".css"}


class Section(NamedTuple):
    """What one stage left."""

    title: str
    time: float
    seconds: float | None
    git: str
    host: str
    settings: dict[str, Any]
    results: dict[str, Any]
    samples: list[str]


def write_section(
    stage: str,
    title: str,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    samples: Sequence[str] = (),
    seconds: float | None = None,
) -> None:
    """Write the section of `stage`, whole or not at all, on the main rank alone.

    `results` of an evaluation (base_eval, chat_eval_*) are {task: accuracy in 0..1}, and CORE or ChatCORE; those of
    a trainer may hold "val_bpb" and "folder", that of the run below the base folder. A `name + "_stderr"` is the
    standard error of `name`. `seconds` is how long the stage took.
    """
    assert stage in (START, *STAGES), f"unknown stage {stage}; one of {STAGES}"
    if int(os.environ.get("RANK", 0)) != 0:
        return
    place = git_revision(), socket.gethostname()
    section = Section(
        title, time.time(), seconds, *place, dict(settings), dict(results), list(samples)
    )
    write_file(report_dir() / f"{stage}.json", json.dumps(section._asdict(), indent=1, default=str))


def code_size(root: Path = REPOSITORY) -> dict[str, int]:
    """Size of everything that git tracks under `root` but tests and locks, empty outside git."""
    command = ["git", "-C", root, "ls-files", "-z"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    names = [Path(name) for name in listing.split("\0") if name]
    code = [name for name in names if name.suffix in CODE_SUFFIXES and "tests" not in name.parts]
    texts = [(root / name).read_text(encoding="utf-8") for name in code if (root / name).is_file()]
    num_characters = sum(map(len, texts))
    lock = root / "requirements.lock"
    return {
        "characters": num_characters,
        "lines": sum(text.count("\n") for text in texts),
        "files": len(texts),
        "approximate tokens": num_characters // 4,
        "lines of the dependency lock": lock.read_text().count("\n") if lock.is_file() else 0,
    }


def machine() -> dict[str, str]:
    """What the run ran on, as printable values."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    table = Path("/proc/cpuinfo")  # on Linux
    cpu = re.search(r"model name\s*:\s*(.+)", table.read_text()) if table.is_file() else None
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "host": socket.gethostname(),
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
    say(f"report: started afresh in {report_dir()}")


def read_section(stage: str) -> Section | None:
    """The section of a stage, None where it has not run. A NaN, which JSON does not know, is a missing number."""
    path = report_dir() / f"{stage}.json"
    if not path.is_file():
        return None
    try:
        return Section(**json.loads(path.read_text("utf-8"), parse_constant=lambda _: None))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it or run its stage again") from None


def generate() -> None:
    """Write the report; what people read also into the working folder. Raises UserError without a section."""
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
    chapters = make_chapters(report, sections)
    texts = {"report.md": page.markdown_page(chapters), "report.html": page.html_page(chapters)}
    for name, text in texts.items():
        write_file(report_dir() / name, text)
        write_file(Path(name).resolve(), text)
    write_file(report_dir() / "report.json", json.dumps(report, indent=1) + "\n")
    say(f"report: wrote {' and '.join(texts)} here, and with report.json to {report_dir()}")


def make_chapters(report: Mapping[str, Any], sections: Mapping[str, Section]) -> list[page.Chapter]:
    """What the report says, in its order."""
    started, seconds = report["started"], report["total_seconds"]
    began = f"Started {'-' if started is None else format_time(started)}."
    took = f"Total wall clock time: {'-' if seconds is None else format_seconds(seconds)}"
    blocks = [
        page.facts("Machine", report["machine"]),
        page.facts("Size of the code base", report["code"] or {"size": None}),
    ]
    return [
        page.Chapter("start", "Machine and code", began, blocks),
        *(stage_chapter(stage, section) for stage, section in sections.items()),
        page.Chapter("summary", "Summary", took, [summary_table(report["summary"])]),
    ]


def stage_chapter(stage: str, section: Section) -> page.Chapter:
    """One stage: when and where, then settings, results, charts of its run, and samples."""
    took = f", took {format_seconds(section.seconds)}" if section.seconds is not None else ""
    text = f"{format_time(section.time)} on {section.host}, revision {section.git}{took}."
    results = section.results
    if stage in {test for _, test in COLUMNS.values()}:
        rows = score_rows(page.own_names(results), [results])
        blocks = [page.table("Results", ["Task", "Score"], rows)]
    else:
        blocks = [page.facts("Results", results)]
    if figures := draw_run(read_metrics(base_dir() / results.get("folder", "-")), stage):
        blocks.append(page.charts("Charts", figures))
    if section.samples:
        blocks.append(page.samples("Samples", section.samples))
    blocks.append(page.facts("Settings", section.settings))
    return page.Chapter(stage, section.title, text, blocks)


def summarize(sections: Mapping[str, Section]) -> dict[str, dict[str, Any]]:
    """{column: {"val_bpb": ..., and the results of its evaluation}} for all of COLUMNS."""
    results = {stage: section.results for stage, section in sections.items()}
    summary = {}
    for column, (trainers, test) in COLUMNS.items():
        bpb = [results[s]["val_bpb"] for s in trainers if "val_bpb" in results.get(s, {})]
        summary[column] = {"val_bpb": bpb[0] if bpb else None, **results.get(test, {})}
    return summary


def summary_table(summary: Mapping[str, Mapping[str, Any]]) -> page.Block:
    """Metric | BASE | MID | SFT | RL, without CORE's tasks, unless a chat model was tested on them too."""
    base, *chat = map(page.own_names, summary.values())
    if any(name.startswith("CORE") for name in base):
        base = [name for name in base if name.startswith(NO_ACCURACY)]
    names = dict.fromkeys(sum(chat, base))
    rows = score_rows(sorted(names, key=lambda n: not n.startswith(NO_ACCURACY)), summary.values())
    return page.table("Metrics", ["Metric", *summary], rows)


def score_rows(names: Iterable[str], columns: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each name, with its score in every column."""
    return [
        [name, *(page.show(column, name, not name.startswith(NO_ACCURACY)) for column in columns)]
        for name in names
    ]


def format_time(seconds: float) -> str:
    """A moment, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


@dataclass
class Config:
    action: tyro.conf.Positional[Literal["reset", "generate", "size"]]  # what to do


def main(config: Config) -> None:
    """What the command line asks for."""
    if config.action == "reset":
        reset()
    elif config.action == "generate":
        generate()
    else:
        say("\n".join(f"{name}: {value:,}" for name, value in code_size().items()) or "size: -")


if __name__ == "__main__":
    run_script(main, Config)
