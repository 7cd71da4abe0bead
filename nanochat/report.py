"""The report card: every stage leaves a section, and `generate` makes report.md of them.

    python -m nanochat.report reset      # before a run: clear the sections, note the time and the machine
    python -m nanochat.report generate   # after it: write report.md, here and in the report folder
    python -m nanochat.report size       # print the size of the code base

A section is one JSON file, `$NANOCHAT_BASE_DIR/report/<stage>.json`, which a stage that runs again replaces.
The report lists them in pipeline order and ends with the table Metric | BASE | MID | SFT | RL.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from nanochat.metrics import format_seconds
from nanochat.paths import UserError, report_dir, write_file
from nanochat.runtime import run_script, say
from nanochat.training import git_revision

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
START = "start"  # start.json holds what `reset` noted; no stage has this name
REPOSITORY = Path(__file__).resolve().parent.parent
CODE_SUFFIXES = {".py", ".rs", ".toml", ".sh", ".md", ".html", ".js", ".css"}


def write_section(
    stage: str,
    title: str,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    samples: Sequence[str] = (),
    seconds: float | None = None,
) -> None:
    """Write the section of `stage`, whole or not at all, on the main rank alone.

    `results` of an evaluation (base_eval, chat_eval_*) are {task: accuracy in 0..1, task + "_stderr": float};
    a trainer's may hold "val_bpb". `seconds` is how long the stage took.
    """
    assert stage in STAGES, f"unknown stage {stage}; one of {STAGES}"
    if int(os.environ.get("RANK", 0)) != 0:
        return
    section = {
        "title": title,
        "time": time.time(),
        "seconds": seconds,
        "git": git_revision(),
        "host": socket.gethostname(),
        "settings": dict(settings),
        "results": dict(results),
        "samples": list(samples),
    }
    write_file(report_dir() / f"{stage}.json", json.dumps(section, indent=1, default=str))


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
    if not texts:
        return {}
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
    noted = {"time": time.time(), "machine": machine()}
    write_file(report_dir() / f"{START}.json", json.dumps(noted, indent=1))
    say(f"report: started afresh in {report_dir()}")


def read_json(name: str) -> dict[str, Any] | None:
    """One file of the report folder, or None where the stage has not run."""
    path = report_dir() / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it or run its stage again") from None


def generate() -> None:
    """Write report.md into the report folder and the working folder. Raises UserError without a section."""
    sections = {stage: section for stage in STAGES if (section := read_json(stage))}
    if not sections:
        raise UserError(f"no stage has reported to {report_dir()}; run `bash runcpu.sh` first")
    text = render(sections, read_json(START))
    for path in (report_dir() / "report.md", Path("report.md").resolve()):
        write_file(path, text)
        say(f"report: wrote {path}")


def render(sections: Mapping[str, dict[str, Any]], start: Mapping[str, Any] | None) -> str:
    """The whole report as Markdown; `sections` in pipeline order, `start` what `reset` noted."""
    # To the end of the last stage: a report that is generated a day later says the same.
    end = max(section["time"] for section in sections.values())
    parts = [
        "# nanochat report\n",
        f"Started {format_time(start['time']) if start else '-'}.\n",
        "## Machine\n\n" + bullets(start["machine"] if start else machine()),
        "## Code base\n\n" + (bullets(code_size()) or "- size: -\n"),
        *map(render_section, sections.values()),
        "## Summary\n\n" + summary_table(sections),
        f"Total wall clock time: {format_seconds(end - start['time']) if start else '-'}\n",
    ]
    return "\n".join(parts)


def render_section(section: Mapping[str, Any]) -> str:
    """One stage: when and where, then settings, results and samples."""
    took = f", took {format_seconds(section['seconds'])}" if section["seconds"] is not None else ""
    parts = [
        f"## {section['title']}\n",
        f"{format_time(section['time'])} on {section['host']}, revision {section['git']}{took}.\n",
    ]
    for name in ("settings", "results"):
        if section[name]:
            parts.append(f"{name.capitalize()}:\n\n{bullets(section[name])}")
    if section["samples"]:
        parts += ["Samples:\n", *map(fenced, section["samples"])]
    return "\n".join(parts)


def bullets(values: Mapping[str, Any]) -> str:
    """A list line per value; `name_stderr` joins the line of `name`."""
    lines = []
    for name, value in values.items():
        if name.removesuffix("_stderr") in values and name.endswith("_stderr"):
            continue
        stderr = values.get(f"{name}_stderr")
        error = f" ± {format_value(stderr)}" if stderr is not None else ""
        lines.append(f"- {one_line(name)}: {format_value(value)}{error}\n")
    return "".join(lines)


def summary_table(sections: Mapping[str, dict[str, Any]]) -> str:
    """Metric | BASE | MID | SFT | RL: bits per byte, then one row per task that any stage was tested on."""
    results = {stage: section["results"] for stage, section in sections.items()}
    tests = {column: results.get(stage, {}) for column, (_, stage) in COLUMNS.items()}
    tasks = dict.fromkeys(
        name for test in tests.values() for name in test if not name.endswith("_stderr")
    )
    rows = [["Metric", *COLUMNS], ["---", *["---:"] * len(COLUMNS)], ["val_bpb"]]
    for stages, _ in COLUMNS.values():
        measured = [results[s]["val_bpb"] for s in stages if "val_bpb" in results.get(s, {})]
        rows[-1].append(format_value(measured[0] if measured else None))
    rows += [[one_line(task), *(percent(tests[c], task) for c in COLUMNS)] for task in tasks]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def percent(results: Mapping[str, Any], task: str) -> str:
    """`85.0 % ± 1.2`, without the standard error where there is none, `-` without the accuracy."""
    accuracy, stderr = results.get(task), results.get(f"{task}_stderr")
    if accuracy is None:
        return "-"
    return f"{100 * accuracy:.1f} %" + (f" ± {100 * stderr:.1f}" if stderr is not None else "")


def one_line(value: object) -> str:
    """Text that cannot break out of a list line or a table cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def format_value(value: Any) -> str:
    """A number short enough to compare by eye; anything else as it prints; `-` for what is missing."""
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return one_line(value)


def format_time(seconds: float) -> str:
    """A moment, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in `text`."""
    fence = "`" + max(["``", *re.findall("`+", text)], key=len)
    return f"{fence}text\n{text}\n{fence}\n"


@dataclass
class Config:
    action: tyro.conf.Positional[Literal["reset", "generate", "size"]]


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
