"""Examine a chat model: accuracy with its standard error on every task, and a record of every reply.

    python -m scripts.chat_eval -i sft                                          # one GPU, all tasks
    torchrun --nproc_per_node=8 -m scripts.chat_eval -i sft                     # eight
    python -m scripts.chat_eval -i rl -a 'primer-choice|primer-exact' --max_problems 50  # laptop

Choices are read off the logits of their letters; everything else is generated, all replies of a task in
flight at once. With --num_samples above 1 the accuracy is the mean over the samples (pass@1), and the share
of problems that any sample solves is given beside it (pass@k).

reads: <source>/<model tag>/, the tasks' data sets
writes: <source>/<model tag>/chat_eval_<task>.jsonl, report/chat_eval_<source>.json
"""

import json
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from nanochat.checkpoint import load_model
from nanochat.engine import Engine
from nanochat.paths import UserError, run_dir, write_file
from nanochat.report import write_section
from nanochat.runtime import run_script, say, set_up
from nanochat.task_eval import EvalResult, evaluate_choice, evaluate_generate
from tasks.common import Task
from tasks.mixtures import EVALUATIONS, build_task


@dataclass
class Config:
    source: Annotated[Literal["mid", "sft", "rl"], tyro.conf.arg(aliases=["-i"])] = "sft"  # stage
    tasks: Annotated[str, tyro.conf.arg(aliases=["-a", "--task_name"])] = (
        ""  # names with | between; all if empty
    )
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""  # empty: the one written last
    step: Annotated[int | None, tyro.conf.arg(aliases=["-s"])] = None  # the newest if left out
    num_samples: int = 1  # replies per problem
    max_problems: int | None = None  # per task; all if left out
    batch_size: int = 32  # replies in flight, or choices read at once, on one device
    temperature: float = 0.0  # 0: always the likeliest token
    max_tokens: int = 512  # of one reply; at most half the context
    seed: int = 0  # of the sampling
    device_type: str = ""  # cpu, cuda or mps; empty: the best there is
    dtype: str = "auto"  # of the matmuls: auto, float32 or bfloat16


def evaluate(cfg: Config, engine: Engine, task: Task) -> EvalResult:
    """The result of one task, of whichever kind it is."""
    model, tokenizer = engine.model, engine.tokenizer
    if task.kind == "choice":
        return evaluate_choice(model, tokenizer, task, cfg.batch_size, cfg.max_problems)
    return evaluate_generate(
        engine,
        tokenizer,
        task,
        cfg.num_samples,
        cfg.max_tokens,
        cfg.temperature,
        cfg.seed,
        cfg.max_problems,
    )


def sample_of(record: dict[str, Any]) -> str:
    """One record as a reader of the report wants it: question, first reply, its score."""
    question = record["conversation"]["messages"][0]["content"]
    reply, score = record["replies"][0], record["scores"][0]
    if not isinstance(reply, str):
        marks = {"text": "{}", "python": "[{}", "python_output": " = {}]"}
        reply = "".join(marks[part["type"]].format(part["text"]) for part in reply)
    return f"User: {question}\nModel: {reply}\nScore: {score:g}"


def main(cfg: Config) -> None:
    """Evaluate the tasks one after the other; keep every reply; report."""
    begin = time.perf_counter()
    if cfg.num_samples < 1 or (cfg.num_samples > 1 and cfg.temperature <= 0):
        raise UserError("--num_samples above 1 needs a --temperature above 0; at 0 all are alike")
    names = cfg.tasks.split("|") if cfg.tasks else list(EVALUATIONS)
    tasks = {name: build_task(name) for name in names}
    runtime = set_up(cfg.device_type, cfg.dtype)
    model, tokenizer, meta = load_model(cfg.source, cfg.model_tag, cfg.step, runtime)
    engine = Engine(model, tokenizer, num_slots=cfg.batch_size)
    run = run_dir(cfg.source, meta["model_tag"])
    results: dict[str, float] = {}
    samples = []
    for name, task in tasks.items():
        result = evaluate(cfg, engine, task)
        results |= {name: result.accuracy, f"{name}_stderr": result.stderr}
        line = f"{name}: {100 * result.accuracy:.1f} % ± {100 * result.stderr:.1f} of {result.num}"
        if task.kind != "choice" and cfg.num_samples > 1:
            results[f"{name} pass@{cfg.num_samples}"] = result.best_of
            line += f", pass@{cfg.num_samples} {100 * result.best_of:.1f} %"
        say(f"{line} (guessing: {100 * task.baseline:.0f} %)")
        samples += [sample_of(record) for record in result.records[:2]]
        if runtime.is_main:
            rows = [json.dumps({"step": meta["step"], **record}) for record in result.records]
            write_file(run / f"chat_eval_{name}.jsonl", "\n".join(rows) + "\n")
    title = f"Chat evaluation of {cfg.source.upper()}"
    settings = vars(cfg) | {"model_tag": meta["model_tag"], "step": meta["step"]}
    seconds = time.perf_counter() - begin
    write_section(f"chat_eval_{cfg.source}", title, settings, results, samples, seconds)


if __name__ == "__main__":
    run_script(main, Config)
