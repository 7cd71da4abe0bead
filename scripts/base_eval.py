"""Examine a base model: multiple choice in document form, scored by the loss of the choices.

    python -m scripts.base_eval                                        # one GPU
    torchrun --nproc_per_node=8 -m scripts.base_eval                   # eight
    python -m scripts.base_eval --batch_size 64                        # laptop

reads: base/<model tag>/
writes: base/<model tag>/eval_base.jsonl (one item a line), report/base_eval.json
"""

import json
import math
from dataclasses import dataclass
from typing import Annotated

import tyro

from nanochat.checkpoint import load_model
from nanochat.core_eval import score_choices
from nanochat.paths import run_dir, write_file
from nanochat.report import write_section
from nanochat.runtime import run_script, say, set_up
from tasks.mixtures import build_task

TASK = "primer-choice"


@dataclass
class Config:
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "base"  # stage of the checkpoint
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = (
        ""  # its run; empty: the one written last
    )
    step: Annotated[int | None, tyro.conf.arg(aliases=["-s"])] = (
        None  # its step; the newest if left out
    )
    max_problems: int | None = None  # items of the task; all if left out
    batch_size: int = 64  # choices that the model reads at once
    device_type: str = ""  # cpu, cuda or mps; empty: the best there is
    dtype: str = "auto"  # of the matmuls: auto, float32 or bfloat16


def main(cfg: Config) -> None:
    """Score every item, keep what the model made of it, and report the accuracy."""
    runtime = set_up(cfg.device_type, cfg.dtype)
    model, tokenizer, meta = load_model(cfg.source, cfg.model_tag, cfg.step, runtime)
    task = build_task(TASK, "test")
    rows = [task[i] for i in range(min(len(task), cfg.max_problems or len(task)))]
    items = [
        ([row["document"] + text for text in row["continuations"]], row["gold"]) for row in rows
    ]
    scores = score_choices(model, tokenizer, items, cfg.batch_size)
    accuracy = sum(score.correct for score in scores) / len(scores)
    stderr = math.sqrt(accuracy * (1 - accuracy) / max(1, len(scores) - 1))
    say(
        f"{TASK}: {100 * accuracy:.1f} % ± {100 * stderr:.1f} of {len(scores)} (guessing: {100 * task.baseline:.0f} %)"
    )
    lines = [
        json.dumps(
            {
                "index": i,
                "prediction": s.prediction,
                "gold": s.gold,
                "losses": s.losses,
                "texts": texts,
            }
        )
        for i, (s, (texts, _)) in enumerate(zip(scores, items, strict=True))
    ]
    if runtime.is_main:
        write_file(
            run_dir(cfg.source, meta["model_tag"]) / "eval_base.jsonl", "\n".join(lines) + "\n"
        )
    results = {TASK: accuracy, f"{TASK}_stderr": stderr}
    write_section("base_eval", "Base evaluation", vars(cfg), results)


if __name__ == "__main__":
    run_script(main, Config)
