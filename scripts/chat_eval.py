"""Evaluate a chat model: its accuracy on every task, and a record of every reply.

    python -m scripts.chat_eval -i sft                                          # one GPU, ChatCORE
    torchrun --nproc_per_node=8 -m scripts.chat_eval -- -i sft                     # eight
    python -m scripts.chat_eval -i rl -a 'ARC-Easy|GSM8K' --max_problems 50
    python -m scripts.chat_eval -i rl -a 'primer-choice|primer-exact'           # laptop

With --num_samples above 1 the accuracy is the mean over samples (pass@1), with the share of
problems that any sample solves beside it (pass@k). ChatCORE is the mean of six accuracies, each
rescaled so that 0 is guessing and 1 is perfect. primer-choice is also asked as a base model is, by
the loss of each choice on a page (`primer-choice: page`).

reads: <source>/<model tag>/, the tasks' data sets
writes: <source>/<model tag>/chat_eval_<task>.jsonl, report/chat_eval_<source>.json
"""

# pyright: reportIncompatibleVariableOverride=false

import json
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import tyro

from nanochat.checkpoint import load_model
from nanochat.common import (
    ChatStage,
    CheckpointFlags,
    Count,
    Temperature,
    UserError,
    print0,
    run_dir,
    run_script,
    set_up,
    write_file,
)
from nanochat.core_eval import GPTReader, centered_score, evaluate, mean_score
from nanochat.engine import Engine
from nanochat.report import show, write_section
from nanochat.sandbox import isolation
from nanochat.task_eval import Task, evaluate_choice, evaluate_generate, needed_len
from tasks.mixtures import CHAT_CORE, build_task

Tasks = Annotated[str, tyro.conf.arg(aliases=["-a", "--task_name"])]


@dataclass
class Config(CheckpointFlags):
    source: ChatStage = "sft"  # stage
    tasks: Tasks = ""  # names with | between; ChatCORE's six if empty
    num_samples: Count = 1  # replies per problem
    max_problems: Count | None = None  # per task; default: all
    batch_size: Count = 32  # replies in flight, or choices read at once, on one device
    temperature: Temperature = 0.0  # 0: always the likeliest token
    max_tokens: Count = 512  # of one reply; at most half the context
    seed: int = 0  # of the sampling
    words: Path | None = None  # SpellingBee: a file of words; tasks/spellingbee.txt if left out
    allow_unsafe_exec: bool = False  # HumanEval: run programs even where nothing isolates them


def choose_tasks(cfg: Config) -> dict[str, Task]:
    """The tasks; HumanEval is skipped, and that is said, if nothing can isolate its programs."""
    names = cfg.tasks.split("|") if cfg.tasks else list(CHAT_CORE)
    if "HumanEval" in names and not cfg.allow_unsafe_exec and (reason := isolation()):
        print0(f"HumanEval is skipped: {reason}; --allow_unsafe_exec runs its programs anyway")
        names.remove("HumanEval")
    return {
        name: build_task(name, "test", cfg.words, cfg.allow_unsafe_exec)[: cfg.max_problems]
        for name in names
    }


def sample_of(record: dict[str, Any]) -> str:
    """One record for the report: the turns up to the last question, first reply, its score."""
    messages = record["conversation"]["messages"]
    turns = messages[: (len(messages) - 1) // 2 * 2 + 1]  # without the right reply, if it is there
    reply, score = record["replies"][0], record["scores"][0]
    if not isinstance(reply, str):
        marks = {"text": "{}", "python": "[{}", "python_output": " = {}]"}
        reply = "".join(marks[part["type"]].format(part["text"]) for part in reply)
    speakers = {"user": "User", "assistant": "Model"}
    talk = "\n".join(f"{speakers[turn['role']]}: {turn['content']}" for turn in turns)
    return f"{talk}\nModel: {reply}\nScore: {score:g}"


def by_kind(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The records of each kind that a task's rows name, in alphabetical order."""
    kinds = {record["conversation"].get("kind") for record in records} - {None}
    return {
        kind: [record for record in records if record["conversation"]["kind"] == kind]
        for kind in sorted(kinds)
    }


def main(cfg: Config) -> None:
    began = time.perf_counter()
    if cfg.num_samples > 1 and cfg.temperature <= 0:
        raise UserError("--num_samples above 1 needs a --temperature above 0; at 0 all are alike")
    runtime = set_up(cfg.device_type, cfg.dtype, exact=True)
    model, tokenizer, meta = load_model(cfg, runtime)
    print0(f"examining {meta['name']}")
    tasks = choose_tasks(cfg)
    asked = chain.from_iterable(task for task in tasks.values() if task.kind != "choice")
    max_len = needed_len(tokenizer, asked, cfg.max_tokens, model.config.sequence_len)
    engine = Engine(model, tokenizer, cfg.batch_size, max_len, deterministic=True)
    run = run_dir(cfg.source, meta["model_tag"])
    results: dict[str, Any] = {}
    samples = []
    for name, task in tasks.items():
        if task.kind == "choice":
            result = evaluate_choice(model, tokenizer, task, cfg.batch_size)
        else:
            result = evaluate_generate(
                engine, task, cfg.num_samples, cfg.max_tokens, cfg.temperature, cfg.seed
            )
        results[name] = result.score
        line = f"{name}: {show(result.score, percent=True)} of {len(result.records)}"
        if task.kind != "choice" and cfg.num_samples > 1:
            results[f"{name} pass@{cfg.num_samples}"] = result.best_of
            line += f", pass@{cfg.num_samples} {show(result.best_of, percent=True)}"
        kinds = by_kind(result.records)
        for kind, records in kinds.items():
            results[f"{name}: {kind}"] = mean_score(records)
        scores = (f"{kind} {show(mean_score(own), percent=True)}" for kind, own in kinds.items())
        line += f"; {', '.join(scores)}" if kinds else ""
        if pages := task.pages(name):
            reader = GPTReader(model, tokenizer, cfg.batch_size)
            results[pages.label] = mean_score(evaluate(reader, pages, cfg.batch_size, None))
            line += f"; page {show(results[pages.label], percent=True)}"
        print0(f"{line} (guessing: {100 * task.baseline:.0f} %)")
        shown = [own[0] for own in kinds.values()] or result.records[:2]
        samples += map(sample_of, shown)
        if runtime.is_main:
            rows = [json.dumps({"step": meta["step"], **record}) for record in result.records]
            write_file(run / f"chat_eval_{name}.jsonl", "\n".join(rows) + "\n")
    core = [(results[name], tasks[name].baseline) for name in CHAT_CORE if name in tasks]
    if len(core) >= len(CHAT_CORE) - 1:  # HumanEval may be skipped
        name, score = centered_score("ChatCORE", len(CHAT_CORE), core)
        print0(f"{name}: {show(score)}")
        results[name] = score
    settings = vars(cfg) | {"model_tag": meta["model_tag"], "step": meta["step"]}
    seconds = time.perf_counter() - began
    title = f"Chat evaluation of {cfg.source.upper()}"
    write_section(f"chat_eval_{cfg.source}", title, settings, results, samples, seconds)


if __name__ == "__main__":
    run_script(main, Config)
