"""Evaluate a base model: the CORE metric over 22 few-shot tasks, or the primer's multiple choice.

    python -m scripts.base_eval                                        # one GPU
    torchrun --nproc_per_node=8 -m scripts.base_eval                   # eight
    python -m scripts.base_eval --max_per_task 100                     # laptop
    python -m scripts.base_eval -a primer-choice                       # the primer's, offline
    python -m scripts.base_eval --hf_path openai-community/gpt2        # a model of transformers

The primer's questions are asked twice, as `scripts.chat_eval` asks them, too: by the loss of each
choice on a page (`primer-choice: page`), and by the letter in a chat, which a base model has not
learned yet.

reads: base/<model tag>/, the eval bundle (--eval_bundle, NANOCHAT_EVAL_BUNDLE, or downloaded once)
writes: base/<model tag>/base_eval.jsonl (one item a line), report/base_eval.json; the record alone,
    in <stage>/<model tag>/ or hf/<name>/, for a model of another stage or of transformers
"""

import json
import time
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro

from nanochat import core_eval
from nanochat.checkpoint import load_model
from nanochat.common import (
    CheckpointFlags,
    Count,
    Source,
    UserError,
    print0,
    run_dir,
    run_script,
    set_up,
    write_file,
)
from nanochat.core_eval import CORE_TASKS, CoreTask, GPTReader, HFReader, Score
from nanochat.report import show, write_section
from nanochat.task_eval import evaluate_choice
from tasks.primer import Choice

PRIMER = "primer-choice"


@dataclass
class Config(CheckpointFlags):
    source: Source = "base"  # stage of the checkpoint
    hf_path: str = ""  # instead, a model of transformers: its name on the hub, or a folder
    tasks: Annotated[str, tyro.conf.arg(aliases=["-a"])] = "core"  # core, primer-choice, or A|B
    eval_bundle: str = ""  # folder with core.yaml; empty: downloaded once
    max_per_task: Count | None = None  # items of each task; default: all
    batch_size: Count = 32  # items that the model reads at once


def choose_tasks(cfg: Config) -> list[CoreTask]:
    names = cfg.tasks.split("|")
    tasks = [Choice("test").pages(PRIMER)] if PRIMER in names else []
    labels = [own for name in names for own in (CORE_TASKS if name == "core" else [name])]
    if labels := [label for label in labels if label != PRIMER]:
        tasks += core_eval.load_tasks(core_eval.find_bundle(cfg.eval_bundle), labels)
    return tasks


def main(cfg: Config) -> None:
    began = time.perf_counter()
    runtime = set_up(cfg.device_type, cfg.dtype, exact=True)
    settings = vars(cfg)
    scores: dict[str, Score] = {}
    lines: list[str] = []
    if cfg.hf_path:
        print0(f"examining {cfg.hf_path}")
        reader = HFReader(cfg.hf_path, runtime)
        folder = run_dir("hf", cfg.hf_path.strip("/").replace("/", "--"))
    else:
        model, tokenizer, meta = load_model(cfg, runtime)
        print0(f"examining {meta['name']}")
        reader = GPTReader(model, tokenizer, cfg.batch_size)
        settings = settings | {"model_tag": meta["model_tag"], "step": meta["step"]}
        folder = run_dir(cfg.source, meta["model_tag"])
        if PRIMER in cfg.tasks.split("|"):
            quiz = Choice("test")[: cfg.max_per_task]
            scores[PRIMER] = evaluate_choice(model, tokenizer, quiz, cfg.batch_size).score
            share = f"{show(scores[PRIMER], percent=True)} of {len(quiz)}"
            lines.append(f"{PRIMER}: {share}, by the letter in a chat")
            print0(lines[-1])
    tasks = choose_tasks(cfg)  # last, since it may download them
    records: list[dict[str, Any]] = []
    for task in tasks:
        try:
            task_records = core_eval.evaluate(reader, task, cfg.batch_size, cfg.max_per_task)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            kind = UserError if isinstance(error, UserError) else RuntimeError
            raise kind(f"task {task.label} failed: {error}") from error
        records += task_records
        scores[task.label] = score = core_eval.mean_score(task_records)
        _, centered = core_eval.centered_score(task.label, 1, [(score, task.baseline)])
        share = f"{show(score, percent=True)} of {len(task_records)}"
        lines.append(f"{task.label}: {share}, centered {centered.value:.4f}")
        print0(lines[-1])
    if core := [(scores[t.label], t.baseline) for t in tasks if t.label in CORE_TASKS]:
        name, score = core_eval.centered_score("CORE", len(CORE_TASKS), core)
        scores[name] = score
        lines.append(f"{name}: {show(score)}")
        print0(lines[-1])
    if runtime.is_main:
        rows = "".join(json.dumps(record) + "\n" for record in records)
        write_file(folder / "base_eval.jsonl", rows)
    if cfg.source == "base" and not cfg.hf_path:
        samples, seconds = ["\n".join(lines)], time.perf_counter() - began
        write_section("base_eval", "Base evaluation", settings, scores, samples, seconds)


if __name__ == "__main__":
    run_script(main, Config)
