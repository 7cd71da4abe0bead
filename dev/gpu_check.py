"""What only a GPU can tell, in one command: is it right, how fast is it, what memory does it take.

    python -m dev.gpu_check                                      # what matters most in ten minutes
    python -m dev.gpu_check --sections tests,train_d12 --minutes 3
    python -m dev.gpu_check --device_type cpu                    # rehearses every section, tiny

A section is a command within a limit of its own: none stops the others. Its figures are the lines
of its log with a number behind two blanks, so that one which is killed leaves what it had. Bounds
hold on a GPU only. A second call with the same --out finds everything compiled, and its summary
holds the sections of both. dev/gpu_check.md tells how to take this to a rented machine.

reads: nothing: the text is the primer, tokens are pairs of letters, all weights are random
writes: <out>/summary.md and <section>.log; corpus and compiled code in <out>/base
"""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dev.bench.serve_load import letter_tokenizer
from nanochat import common, dataset

ROOT = Path(__file__).resolve().parent.parent
TRAIN = "-m dev.bench.train_speed --num_steps=6 --num_warmup=3 --depth="
FILES = (path for path in ROOT.glob("tests/test_*.py") if "mark.gpu" in path.read_text())
TESTS = [f"tests/{path.name}" for path in FILES]


class Section(NamedTuple):
    seconds: float  # at most
    command: str  # of Python
    mfu: float = 0.0  # percent, at least


SECTIONS = {  # what matters most first
    "tests": Section(240, f"-m pytest -q -rA -m gpu -W default {' '.join(TESTS)}"),
    "train_d12": Section(70, f"{TRAIN}12", mfu=40),
    "train_d20": Section(100, f"{TRAIN}20", mfu=50),
    "decode": Section(90, "-m dev.bench.decode_speed"),
    "train_d20_fp8": Section(100, f"{TRAIN}20 --fp8", mfu=50),
    "train_d24_fp8": Section(120, f"{TRAIN}24 --fp8 --device_batch_size=16", mfu=55),
    "train_d20_recompute": Section(60, f"{TRAIN}20 --recompute"),
    "train_d20_tables": Section(60, f"{TRAIN}20 --table_dtype=bfloat16"),
    "train_d20_one_row": Section(60, f"{TRAIN}20 --device_batch_size=1"),
    "server": Section(60, "-m dev.bench.serve_load --clients=64 --slots=64 --depth=12 --seconds=8"),
}
TINY = {  # what a rehearsal adds
    "train": "--depth=1 --max_seq_len=64 --device_batch_size=2 --num_steps=1 --device_type=cpu",
    "decode": "--depth=1 --slots 1 2 --past 8 64 --device_type=cpu",
    "server": "--depth=1 --slots=2 --clients=2 --seconds=1",
}
PATIENCE = 5.0  # times the limits, for a rehearsal on busy cores
BOUNDS = {  # figure -> least and most
    "data, %": (0, 2), "peak over plan": (0.85, 1.15), "steps that wait for the GPU": (0, 0),
    "matmul over data sheet": (0.75, 1), "fp8 matmul over data sheet": (1.2, 2),
    "copy over data sheet": (0.8, 1), "MBU of 1 slot after 1500 tokens, %": (50, 100),
    "lost": (0, 0),
}  # fmt: skip


@dataclass
class Config:
    sections: str = ""  # names with commas between them; empty: all, what matters most first
    minutes: common.Positive = 10.0  # for all of them; what does not fit is skipped
    out: Path = Path("gpu_check")  # folder of logs and caches
    device_type: common.DeviceType = "cuda"  # cuda; cpu: a rehearsal


def run_section(log: Path, section: Section, seconds: float) -> bool:
    """True if the command succeeds; its log ends with how it went."""
    begin, command = time.monotonic(), [sys.executable, *section.command.split()]
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            verdict = f"failed: exit code {code}" if code else "passed"
        except subprocess.TimeoutExpired:
            verdict = f"failed: killed after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
        verdict = f"{verdict} ({time.monotonic() - begin:.0f} s)"
        file.write(f"\n{verdict}\n")
    print(f"{log.stem:20} {verdict}", flush=True)
    return verdict.startswith("passed")


def summarize(cfg: Config) -> tuple[str, int]:
    """(a Markdown table of every section's log, the number of figures that miss their bounds)."""
    rows, num_missed = ["| section | figure | value | criterion |", "| --- | --- | ---: | --- |"], 0
    for name, section in SECTIONS.items():
        log = cfg.out / f"{name}.log"
        if not log.exists():
            continue
        text = log.read_text(errors="replace")
        rows.append(f"| {name} | {text.strip().splitlines()[-1]} | | |")
        for figure, value in re.findall(r"^(\S.*?) {2,}(-?\d\S*)$", text, re.MULTILINE):
            bounds = (section.mfu, 100) if figure == "MFU, %" else BOUNDS.get(figure)
            criterion = ""
            if bounds and cfg.device_type == "cuda":
                criterion = "{:g} to {:g}".format(*bounds)
                if not bounds[0] <= float(value) <= bounds[1]:
                    criterion, num_missed = f"{criterion}: missed", num_missed + 1
            rows.append(f"| | {figure} | {value} | {criterion} |")
    return "\n".join(rows) + "\n", num_missed


def main(cfg: Config) -> None:
    chosen = cfg.sections.split(",") if cfg.sections else list(SECTIONS)
    if unknown := set(chosen) - set(SECTIONS):
        raise common.UserError(f"--sections={unknown.pop()}: there are {', '.join(SECTIONS)}")
    is_rehearsal = cfg.device_type == "cpu"
    cfg.out = cfg.out.resolve()
    cfg.out.mkdir(parents=True, exist_ok=True)
    os.environ["NANOCHAT_BASE_DIR"] = str(cfg.out / "base")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cfg.out / "base" / "compiled")
    if not (common.corpora_dir() / "current").exists():
        dataset.main(dataset.Config("primer", num_documents=200 if is_rehearsal else 20_000))
        letter_tokenizer(512 if is_rehearsal else 32_768).save(common.tokenizer_dir())
    patience = PATIENCE if is_rehearsal else 1.0
    end, passed = time.monotonic() + 60 * patience * cfg.minutes, []
    for name in chosen:
        section, left = SECTIONS[name], end - time.monotonic()
        if is_rehearsal:
            tiny = f"{section.command} {TINY.get(name.split('_')[0], '')}"
            section = Section(patience * section.seconds, tiny.replace("--fp8", ""))
        if left < section.seconds / 2:  # about what a section takes
            print(f"{name:20} skipped: {left:.0f} s left of --minutes={cfg.minutes:g}", flush=True)
            continue
        passed.append(run_section(cfg.out / f"{name}.log", section, min(section.seconds, left)))
        common.write_file(cfg.out / "summary.md", summarize(cfg)[0])
    num_missed = summarize(cfg)[1]
    print(f"{sum(passed)} of {len(passed)} sections passed, {num_missed} bounds missed")
    print(f"the figures: {cfg.out / 'summary.md'}")
    if num_missed or not all(passed):
        sys.exit(1)


if __name__ == "__main__":
    common.run_script(main, Config)
