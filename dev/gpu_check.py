"""What only a GPU can tell, in one command: is it right, how fast is it, what memory does it take.

    python -m dev.gpu_check                                      # what matters most in ten minutes
    python -m dev.gpu_check --sections facts,tests --minutes 3
    python -m dev.gpu_check --device_type cpu                    # rehearses every section, tiny

A section is one function, run in a process of its own within its own limit: none stops the others.
Its figures are written one by one, so that one which is killed leaves what it had. Bounds hold on a
GPU only. A second call with the same --out finds everything compiled, and its summary holds the
sections of both. dev/gpu_check.md tells how to take this to a rented machine.

reads: nothing: the text is the primer, tokens are pairs of letters, all weights are random
writes: <out>/summary.md, <section>.json and .log; corpus, runs and compiled code in <out>/base
"""

import asyncio
import gc
import json
import math
import multiprocessing
import os
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any, TypeVar

import torch

from dev.bench import serve_load, train_speed
from nanochat import attention, common, dataset, fp8
from nanochat.checkpoint import build_model
from nanochat.engine import Engine, SlotPool, slots_that_fit
from nanochat.gpt import GPT
from nanochat.scaling import depth_to_config, find_card

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
# Imported once for all sections; none of it touches a GPU, which forked processes could not share.
PRELOADED = ["dev.bench.serve_load", "dev.bench.train_speed", "torch._dynamo"]
PATIENCE = 5.0  # times the limits, for a rehearsal on busy cores


@dataclass
class Config:
    sections: str = ""  # names with commas between them; empty: all, what matters most first
    minutes: common.Positive = 10.0  # for all of them; what does not fit is skipped
    out: Path = Path("gpu_check")  # folder of results, logs and caches
    device_type: common.DeviceType = "cuda"  # cuda; cpu: a rehearsal


class Check:
    """What one section finds, on disk after each figure, and what sections share."""

    def __init__(self, path: Path, runtime: common.Runtime) -> None:
        self.path, self.runtime, self.device = path, runtime, runtime.device
        self.on_gpu = runtime.device.type == "cuda"
        self.tokenizer = serve_load.letter_tokenizer(self.size(32_768, 512))
        self.found: dict[str, Any] = {"figures": []}
        if not (common.corpora_dir() / "current").exists():
            dataset.main(dataset.Config("primer", num_documents=self.size(20_000, 200)))
            self.tokenizer.save(common.tokenizer_dir())

    def size(self, real: T, tiny: T) -> T:
        """`tiny` in a rehearsal."""
        return real if self.on_gpu else tiny

    def add(
        self, name: str, value: float | str, low: float | None = None, high: float | None = None
    ) -> None:
        """Record a figure; on a GPU the section fails if it is not within the bounds."""
        sides = {">=": low, "<=": high}.items()
        criterion = ", ".join(f"{sign} {bound:g}" for sign, bound in sides if bound is not None)
        least, most = -math.inf if low is None else low, math.inf if high is None else high
        verdict = "passed" if not criterion or least <= float(value) <= most else "failed"
        figure = {"name": name, "value": value, "criterion": criterion}
        figure |= {"verdict": verdict if criterion and self.on_gpu else ""}
        self.found["figures"].append(figure)
        self.note()
        print(figure, flush=True)

    def note(self, **details: Any) -> None:
        """Record what belongs in the section's file, but in no table."""
        self.found |= details
        common.write_file(self.path, json.dumps(self.found, indent=1, default=str))

    def milliseconds(self, work: Callable[[], Any], repeats: int = 20) -> float:
        """Mean time of `work`, again and again without a wait, after three that do not count."""
        begin = 0.0
        for number in range(repeats + 3):
            if number == 3:
                common.synchronize(self.device)
                begin = time.perf_counter()
            work()
        common.synchronize(self.device)
        return 1000 * (time.perf_counter() - begin) / repeats

    def copy_rate(self) -> float:
        """Bytes per second, read and written, of a plain copy."""
        source, target = torch.ones(2, self.size(2**28, 2**20), device=self.device).unbind(0)
        return 2000 * source.nbytes / self.milliseconds(lambda: target.copy_(source))

    def forget(self) -> None:
        """Free earlier models and what was compiled for them; the peak of memory begins anew."""
        gc.collect()
        if self.on_gpu:
            torch.compiler.reset()  # imports the compiler, which takes seconds
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def model(self, depth: int) -> GPT:
        """A model without zeros, whose products would take less power."""
        self.forget()
        depth, seq_len = self.size((depth, 2048), (1, 128))
        config = depth_to_config(depth, self.tokenizer.vocab_size, seq_len)
        model = build_model(config, None, self.runtime).eval()
        for name, weight in model.named_parameters():
            if name.endswith(("c_proj.weight", "lm_head.weight")):
                torch.nn.init.normal_(weight, 0, weight.shape[1] ** -0.5)
        return model


# --- the sections


def facts(check: Check) -> None:
    """Versions, what nanochat chooses, and the peaks of products and of a copy."""
    runtime, card = check.runtime, find_card(check.runtime.device_name)
    check.note(python=sys.version, torch=torch.__version__, device=runtime.device_name, card=card)
    capability, dtype = runtime.capability, runtime.dtype
    kernel = attention.choose_kernel(check.device.type, capability, dtype, head_dim=128)
    check.add("capability, attention, dtype", f"{capability}, {kernel}, {dtype}")
    size, peak = check.size(8192, 64), card.peak if card else 0.0
    left, right = torch.randn(2, size, size, device=check.device, dtype=dtype).unbind(0)
    rate = 2e-9 * size**3 / check.milliseconds(lambda: left @ right)
    check.add("matmul, TFLOP/s", rate, 0.75 * peak)
    if fp8.is_there(runtime):
        one = torch.ones((), device=check.device)
        product = partial(fp8.multiply, left.to(fp8.E4M3), right.to(fp8.E4M3), one, one, fast=True)
        check.add("fp8 matmul, TFLOP/s", 2e-9 * size**3 / check.milliseconds(product), 1.2 * peak)
    check.add("copy, GB/s", check.copy_rate() / 1e9, 0.8 * card.bandwidth if card else 0.0)


def tests(check: Check) -> None:
    """The tests that a GPU decides: tests/test_gpu.py and others marked gpu."""
    files = [path for path in ROOT.glob("tests/test_*.py") if "mark.gpu" in path.read_text()]
    files = check.size(files, [ROOT / "tests/test_gpu.py"])
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-m", "gpu", "-W", "default", *files]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    check.add(f"pytest: {done.stdout.splitlines()[-1].strip('= ')}", done.returncode, high=0)


def train(check: Check, depth: int, rows: int, mfu: float | None = None, **options: Any) -> float:
    """Training steps: speed, memory against plan, waits for the GPU, longest kernels; tok/s."""
    check.forget()
    depth, rows, length, steps, warmup = check.size((depth, rows, 2048, 6, 3), (1, 2, 64, 1, 1))
    cfg = train_speed.Config(depth, rows, length, steps, warmup, **options)
    while check.on_gpu and cfg.device_batch_size > 1:
        if train_speed.planned_bytes(cfg, check.device) < 0.95 * common.free_memory(check.device):
            break
        cfg = replace(cfg, device_batch_size=cfg.device_batch_size // 2)
    own = "".join(f", {name} {value}" for name, value in options.items())
    label = f"d{depth}, {cfg.device_batch_size} rows{own}: "
    parts = train_speed.train(cfg, check.runtime)
    figures = train_speed.measure(cfg, check.runtime, parts)
    bounds = {"MFU, %": (mfu, None), "data, %": (None, 2), "peak over plan": (0.85, 1.15)}
    for name, value in figures.items():
        check.add(label + name, value, *bounds.get(name, ()))
    with torch.profiler.profile() as trace:
        train_speed.seconds_of(parts, 2, check.device)
    where, field = check.size(("CUDA", "device"), ("CPU", "cpu"))
    events = [event for event in trace.key_averages() if event.device_type.name == where]
    spent = {event.key[:90]: getattr(event, f"self_{field}_time_total") for event in events}
    longest = sorted(spent.items(), key=lambda pair: -pair[1])[:10]
    total = sum(spent.values())
    check.note(**{label + "kernels, %": {name: 100 * each / total for name, each in longest}})
    if check.on_gpu:
        waits = False
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in islice(parts, 4 * 5):
                pass
        except RuntimeError:
            traceback.print_exc()  # into the log: which line waits
            waits = True
        torch.cuda.set_sync_debug_mode("default")
        check.add(label + "a step waits for the GPU", waits, high=0)
    parts.close()
    return figures["tok/s"]


def eight_bits(check: Check) -> None:
    """Training steps in bf16 and in fp8."""
    if check.on_gpu and not fp8.is_there(check.runtime):
        return check.add("fp8", "not there")
    check.runtime = replace(check.runtime, dtype=torch.bfloat16)  # that of all results of fp8
    for depth in check.size((20, 24), (1,)):
        # On a CPU, a step in fp8 takes seconds.
        plain, eight = (train(check, depth, 16, fp8=on) for on in (False, check.on_gpu))
        check.add(f"d{depth}: fp8 over bf16, tok/s", eight / plain, 1.1 if depth >= 24 else 1.0)


def memory(check: Check) -> None:
    """The peak of a step through the optimizer against the plan, for few and for many rows."""
    small: list[dict[str, Any]] = [{"recompute": True}, {"table_dtype": "bfloat16"}]
    cases = [(12, 1, {}), *((12, 1, own) for own in small), (20, 1, {}), (20, 16, {})]
    for depth, rows, options in check.size([*cases, (20, 16, small[0])], cases[:3]):
        train(check, depth, rows, **options)


@torch.inference_mode()
def feed(pool: SlotPool, past: int) -> None:
    """A step of decoding, behind `past` tokens in every slot."""
    pool.cache.lengths.fill_(past)
    pool.decode(dict.fromkeys(pool.all, 7))


def step_bytes(model: GPT, num_slots: int, length: int) -> int:
    """The least that a decode step reads when every slot holds `length` tokens."""
    tables = ("wte", "value_embeds")  # a few rows of them
    weights = sum(p.nbytes for n, p in model.named_parameters() if n.split(".")[0] not in tables)
    config = model.config
    seen = sum(min(length, config.window(i) or length) for i in range(config.n_layer))
    cell = 2 * config.n_kv_head * config.head_dim * model.compute_dtype.itemsize
    return weights + num_slots * seen * cell


def decode(check: Check) -> None:
    """Decoding, captured and eager: tok/s, and the share of a copy's bandwidth that it uses."""
    copied, model = check.copy_rate(), check.model(20).to(check.runtime.dtype)
    for num_slots in check.size((1, 8, 32, 128), (1, 2)):
        if num_slots > slots_that_fit(model):
            break
        pool = Engine(model, check.tokenizer, num_slots).slots
        ways = {pool.graphs, None}
        for past, pool.graphs in product(check.size((64, 1500), (8, 64)), ways):
            taken = check.milliseconds(partial(feed, pool, past)) / 1000
            kind = "captured" if pool.graphs else "eager"
            label = f"{num_slots} slots after {past} tokens, {kind}: "
            used = step_bytes(model, num_slots, past) / taken / copied
            check.add(label + "tok/s", num_slots / taken)
            check.add(label + "MBU, %", 100 * used, 50 if pool.graphs and num_slots == 1 else None)


def serve(check: Check) -> None:
    """64 streaming clients through HTTP."""
    port = 9000 + os.getpid() % 1000
    num, depth, seconds = check.size((64, 12, 8.0), (2, 1, 1.0))
    process = multiprocessing.get_context("spawn").Process  # in our process group, unlike a fork
    process(target=serve_load.serve, args=(port, num, depth), daemon=True).start()
    cfg = serve_load.Config(clients=num, seconds=seconds)
    seen = asyncio.run(serve_load.run(cfg, f"http://127.0.0.1:{port}"))
    check.add("tok/s", seen.tok_per_second)
    for name, times in seen.times.items():
        check.add(f"{name}, median ms", 1000 * statistics.median(times))
    check.add("requests lost", seen.ends["lost"], high=0)


def pipeline(check: Check) -> None:
    """Every stage from text to a report, tiny."""
    from tests.test_pipeline import STAGES

    os.environ["NANOCHAT_BASE_DIR"] = tempfile.mkdtemp(dir=check.path.parent)
    os.chdir(os.environ["NANOCHAT_BASE_DIR"])  # where the report is copied to
    for name, command in islice(STAGES.items(), check.size(99, 2)):
        begin = time.perf_counter()
        sys.argv = command.replace("=cpu", f"={check.device.type}").split()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        check.add(f"{name}, s", time.perf_counter() - begin)


# --- running them

Section = tuple[Callable[[Check], object], float]  # and at most how many seconds
SECTIONS: dict[str, Section] = {  # what matters most first
    "facts": (facts, 60), "tests": (tests, 120),
    "train_d12": (partial(train, depth=12, rows=32, mfu=40), 70),
    "train_d20": (partial(train, depth=20, rows=32, mfu=50), 100),
    "decode": (decode, 60), "fp8": (eight_bits, 150), "memory": (memory, 100),
    "server": (serve, 60), "pipeline": (pipeline, 150),
}  # fmt: skip


def enter(name: str, section: Section, cfg: Config) -> None:
    """The life of a section's process."""
    os.setsid()  # a process group of its own, to be killed as one
    log = os.open(cfg.out / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["NANOCHAT_BASE_DIR"] = str(cfg.out / "base")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cfg.out / "base" / "compiled")
    section[0](Check(cfg.out / f"{name}.json", common.set_up(cfg.device_type)))


def run_section(name: str, section: Section, cfg: Config, seconds: float) -> bool:
    """True if the section passes; its file says so, or why not."""
    path = cfg.out / f"{name}.json"
    path.unlink(missing_ok=True)
    context: Any = multiprocessing.get_context("forkserver")
    process, begin = context.Process(target=enter, args=(name, section, cfg)), time.monotonic()
    process.start()
    try:
        process.join(seconds)
        known = {0: "", None: f"killed after {seconds:.0f} s"}
        fault = known.get(process.exitcode, f"exit code {process.exitcode}")
    finally:
        process.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # and what it has started
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"figures": []}
    wrong = [each["name"] for each in found["figures"] if each["verdict"] == "failed"]
    faults = [fault] * bool(fault) + wrong
    found["verdict"] = f"failed: {'; '.join(faults)}" if faults else "passed"
    found["seconds"] = round(time.monotonic() - begin, 1)
    common.write_file(path, json.dumps(found, indent=1))
    print(f"{name:12} {found['seconds']:6.1f} s  {found['verdict']}", flush=True)
    return not faults


def summarize(out: Path) -> str:
    """A Markdown table of every section's file."""
    rows = [("section", "figure", "value", "criterion", "verdict"), ("---",) * 5]
    for path in (out / f"{name}.json" for name in SECTIONS):
        if path.exists():
            found = json.loads(path.read_text())
            rows.append((path.stem, "seconds", found["seconds"], "", found["verdict"]))
            rows += [("", *figure.values()) for figure in found["figures"]]
    shown = [
        [f"{each:.4g}" if isinstance(each, float) else str(each) for each in row] for row in rows
    ]
    lines = [f"| {' | '.join(row)} |" for row in shown]
    return "\n".join(lines) + "\n"


def check_all(sections: dict[str, Section], cfg: Config) -> bool:
    """Run the sections while there is time; True if all that ran passed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "PYTHONPATH": ":".join(paths)}
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    cfg = replace(cfg, out=cfg.out.resolve())
    cfg.out.mkdir(parents=True, exist_ok=True)
    end, passed = time.monotonic() + 60 * cfg.minutes, []
    for name, section in sections.items():
        left = end - time.monotonic()
        if left < section[1] / 2:  # about what a section takes
            print(f"{name:12} skipped: {left:.0f} s left of --minutes={cfg.minutes:g}", flush=True)
        else:
            passed.append(run_section(name, section, cfg, min(section[1], left)))
        common.write_file(cfg.out / "summary.md", summarize(cfg.out))
    print(f"{sum(passed)} of {len(passed)} sections passed: {cfg.out / 'summary.md'}")
    return all(passed)


def main(cfg: Config) -> None:
    chosen = cfg.sections.split(",") if cfg.sections else list(SECTIONS)
    if unknown := set(chosen) - set(SECTIONS):
        raise common.UserError(f"--sections={unknown.pop()}: there are {', '.join(SECTIONS)}")
    patience = PATIENCE if cfg.device_type == "cpu" else 1.0
    limits = {name: (SECTIONS[name][0], patience * SECTIONS[name][1]) for name in chosen}
    if not check_all(limits, replace(cfg, minutes=patience * cfg.minutes)):
        sys.exit(1)


if __name__ == "__main__":
    common.run_script(main, Config)
