"""speedrun.sh with tiny sizes on two CPU processes, from an empty folder to report.md, killed in every stage.

Everything it downloads comes from a hub on this machine that breaks transfers, lies about lengths and fails. The
oracle is the uninterrupted order of stages: each is done exactly once, and the report holds them all.
"""

import json
import os
import random
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from nanochat import primer
from tests.hub import Fault, Hub

ROOT = Path(__file__).resolve().parent.parent
STAGES = [
    "first_shards", "tok_train", "tok_eval", "all_shards", "base_train", "base_loss", "base_eval", "mid_train",
    "chat_eval_mid", "chat_sft", "chat_eval_sft", "chat_rl", "chat_eval_rl",
]  # fmt: skip
FAULTS: dict[int, Fault] = {2: "error", 5: "longer", 8: "cut"}


def shard(first: int) -> bytes:
    texts = [primer.document("train", index) for index in range(first, first + 300)]
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"text": texts}), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def write_datasets(folder: Path) -> None:
    """A few rows of every data set that the default mixtures and ChatCORE read."""
    arc = {
        "question": "Which is hot?",
        "choices": {"text": ["ice", "fire"], "label": ["A", "B"]},
        "answerKey": "B",
    }
    mmlu = {"question": "2 + 2?", "subject": "maths", "choices": ["1", "2", "3", "4"], "answer": 3}
    gsm = {"question": "What is 3 * 4?", "answer": "It is <<3*4=12>>12.\n#### 12"}
    talk = {
        "messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hi."}]
    }
    code = {
        "task_id": "HumanEval/0", "prompt": "def one():\n    return", "canonical_solution": " 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n", "entry_point": "one",
    }  # fmt: skip
    rows = {
        "allenai/ai2_arc/ARC-Easy": ("train test", arc),
        "allenai/ai2_arc/ARC-Challenge": ("train test", arc),
        "cais/mmlu/all": ("auxiliary_train validation test", mmlu),
        "openai/gsm8k/main": ("train test", gsm),
        "HuggingFaceTB/smol-smoltalk/default": ("train test", talk),
        "openai/openai_humaneval/openai_humaneval": ("test", code),
    }
    for name, (splits, row) in rows.items():
        (folder / name).mkdir(parents=True)
        for split in splits.split():
            (folder / name / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * 20)


def write_bundle(folder: Path) -> None:
    """An eval_bundle of one task of each kind."""
    tasks = {
        "copa": ("multiple_choice", {"query": "It is hot,", "choices": ["so I sweat", "so I freeze"], "gold": 0}),
        "winograd": ("schema", {"context_options": ["The fox", "The box"], "continuation": "ran.", "gold": 0}),
        "jeopardy": ("language_modeling", {"context": "One, two,", "continuation": "three"}),
    }  # fmt: skip
    (folder / "eval_data").mkdir(parents=True)
    lines = ["icl_tasks:"]
    for label, (kind, row) in tasks.items():
        lines += [
            f"- label: {label}", f"  dataset_uri: {label}.jsonl", "  num_fewshot: [1]",
            f"  icl_task_type: {kind}", "  continuation_delimiter: ' '",
        ]  # fmt: skip
        (folder / "eval_data" / f"{label}.jsonl").write_text((json.dumps(row) + "\n") * 4)
    (folder / "core.yaml").write_text("\n".join(lines) + "\n")
    baselines = "".join(f"{label},50\n" for label in tasks)
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + baselines)


@pytest.fixture
def environment(tmp_path: Path):
    """What speedrun.sh runs in: nothing of ours outside `tmp_path`, and a hub on the loopback address."""
    write_datasets(tmp_path / "datasets")
    write_bundle(tmp_path / "bundle")
    # A working folder of its own, since the report is copied there.
    (tmp_path / "nanochat").mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.startswith("report."):
            (tmp_path / "nanochat" / entry.name).symlink_to(entry)
    files = {f"shard_{i:05d}.parquet": shard(300 * i) for i in (0, 1, 2)}
    files["shard_06542.parquet"] = shard(1000)
    # Every third answer is an error, cut short, or of a wrong length.
    hub = Hub("karpathy/climbmix-400b-shuffle", files, lambda number: FAULTS.get(number % 9, ""))
    variables = {
        "NANOCHAT_TINY": "1",
        "NPROC_PER_NODE": "2",
        "NANOCHAT_BASE_DIR": str(tmp_path / "base"),
        "NANOCHAT_DATASETS": str(tmp_path / "datasets"),
        "NANOCHAT_EVAL_BUNDLE": str(tmp_path / "bundle"),
        "HF_ENDPOINT": hub.address,
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
    }
    with hub.serving():
        yield os.environ | variables


def left_over(environment: dict[str, str]) -> list[str]:
    """The processes that still run in `environment`."""
    own, found = f"NANOCHAT_BASE_DIR={environment['NANOCHAT_BASE_DIR']}\0".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if own in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text())
    return found


def run(environment: dict[str, str], log: Path, kill_in: str = "") -> None:
    """Run speedrun.sh to its end, or kill it and all that it started soon after the stage `kill_in` began."""
    with log.open("w") as file:
        process = subprocess.Popen(
            ["bash", log.parent / "nanochat" / "speedrun.sh"], env=environment, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        while process.poll() is None:
            if kill_in and f"== {kill_in}: " in log.read_text():
                time.sleep(random.Random(kill_in).uniform(0, 12))
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                deadline = time.monotonic() + 30
                while (orphans := left_over(environment)) and time.monotonic() < deadline:
                    time.sleep(0.1)
                assert not orphans
                return
            time.sleep(0.1)
    assert process.returncode == 0, log.read_text()[-3000:]


@pytest.mark.slow
def test_from_nothing_to_a_report_though_killed_in_every_stage(
    environment: dict[str, str], tmp_path: Path
) -> None:
    for stage in STAGES:
        run(environment, tmp_path / f"{stage}.log", kill_in=stage)
    run(environment, tmp_path / "end.log")
    log = (tmp_path / "end.log").read_text()
    assert re.findall(r"== (\w+): done before", log) == STAGES[: log.count("done before")]
    assert log.count("done before") >= len(STAGES) - 1
    report = json.loads((tmp_path / "base" / "report" / "report.json").read_text())
    assert set(STAGES) - {"first_shards", "all_shards"} <= set(report["sections"])
    assert (tmp_path / "nanochat" / "report.md").read_text().startswith("# nanochat report")
    again = tmp_path / "again.log"
    run(environment, again)
    assert again.read_text().count("done before") == len(STAGES)
