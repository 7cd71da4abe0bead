"""Reinforcement learning: sample groups of answers, and make the better ones likelier.

Each step samples `num_samples` answers to each of `questions_per_step` questions and makes one
policy-gradient step. An answer's advantage is its reward minus its group's mean. The gradient
is of log-probabilities at temperature 1, at which the answers are sampled by default.

    python -m scripts.chat_rl                                # one GPU
    torchrun --nproc_per_node=8 -m scripts.chat_rl           # eight
    python -m scripts.chat_rl --task primer-quizzes --num_steps 20 --max_tokens 64 \\
        --eval_samples 1                                     # laptop

reads: sft/<model tag>/, the task's data set
writes: rl/<model tag>/ (checkpoints, metrics.jsonl, tokenizer, config.json), report/chat_rl.json
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from nanochat.checkpoint import load_model
from nanochat.common import (
    CheckpointFlags,
    Count,
    Positive,
    RunFlags,
    all_reduce_sum,
    print0,
    run_script,
    set_up,
)
from nanochat.core_eval import Score
from nanochat.dataloader import IGNORED, Batch
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT, call
from nanochat.report import write_section
from nanochat.sampling import derive_seed
from nanochat.scaling import lr_multiplier_at, make_optimizer
from nanochat.task_eval import Task, evaluate_generate, needed_len
from nanochat.tokenizer import Tokenizer, render_prompt
from nanochat.trainer import Run, compile_parts
from tasks.mixtures import build_task, check_task

MOMENTUM = 0.95  # of Muon; constant, since the stage starts from a trained model
BATCH_TOKENS = 2**18  # learning rates are those of batches up to this size (nanochat/scaling.py)
ROUND_UP = 32  # rows are padded to a multiple of this many tokens, so that few shapes occur
SHORTEST = 128  # tokens of a compiled row; longer ones have twice as many, and so on


@dataclass
class Config(RunFlags, CheckpointFlags):
    # problems and answers
    task: str = "GSM8K"  # a generative task that scores its answers
    num_steps: Count = 100  # updates
    questions_per_step: Count = 16  # over all ranks
    num_samples: Count = 16  # answers in the group of one question
    max_tokens: Count = 256  # of one answer
    temperature: Positive = 1.0  # of sampling
    num_slots: Count = 64  # answers in flight on one device
    # batch and steps
    device_batch_size: Count = 32  # rows per micro-batch on one device
    lr_scale: Positive = 0.05  # multiplies pretraining's learning rates; falls linearly to 0
    # the run
    log_every: int = 1  # steps between console lines; <= 0: only at the end
    eval_every: int = 25  # steps between held-out measurements; <= 0: only at the end
    eval_problems: Count = 400  # problems per measurement
    eval_samples: Count = 8  # answers to each: pass@1 and pass@8; 1: one answer, the likeliest
    save_every: int = 50  # steps between checkpoints; <= 0: only at the end


@dataclass(frozen=True)
class Rollout:
    """One sampled answer: the whole sequence, the tokens the model chose, the reward."""

    ids: list[int]
    mask: list[int]  # 1 where the model sampled the token
    reward: float
    text: str  # the answer without its tool calls


def roll_out(cfg: Config, engine: Engine, task: Task, run: Run) -> list[list[Rollout]]:
    """This rank's groups of answers to the questions of the run's step.

    Answers depend on the seed and the question's number, not on the rank.
    """
    numbers = range(run.step * cfg.questions_per_step, (run.step + 1) * cfg.questions_per_step)
    numbers = numbers[run.runtime.rank :: run.runtime.world_size]
    questions = {number: task[number % len(task)] for number in numbers}
    asked: dict[Request, int] = {}
    for number, question in questions.items():
        prompt = render_prompt(engine.tokenizer, question)
        for k in range(cfg.num_samples):
            seed = derive_seed(cfg.seed, number, k)
            asked[Request(prompt, cfg.max_tokens, cfg.temperature, seed=seed)] = number
    groups: dict[int, list[Rollout]] = {number: [] for number in questions}
    for request, reply in engine.complete(asked):
        number = asked[request]
        reward = task.score(questions[number], reply.text)
        mask = [0] * len(request.prompt) + reply.masks
        groups[number].append(Rollout(request.prompt + reply.tokens, mask, reward, reply.text))
        if run.is_asked():
            break
    run.stop_if_asked()
    return list(groups.values())


def is_useful(group: Sequence[Rollout]) -> bool:
    """True if the rewards of the group differ."""
    return len({rollout.reward for rollout in group}) > 1


def policy_batch(
    groups: Sequence[Sequence[Rollout]], pad_id: int, whole_rows: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs (R, T), targets (R, T), advantages (R, 1)) of the useful groups, or a padding row.

    With `whole_rows`, of a compiled micro-batch, R is a multiple of it and T a power of two, so
    that few shapes are compiled.
    """
    rows: list[tuple[Rollout, float]] = []
    for group in filter(is_useful, groups):
        mean = sum(rollout.reward for rollout in group) / len(group)
        rows += [(rollout, rollout.reward - mean) for rollout in group]
    longest = max((len(rollout.ids) for rollout, _ in rows), default=2) - 1
    time, num_rows = -(-longest // ROUND_UP) * ROUND_UP, max(1, len(rows))
    if whole_rows:
        time = max(SHORTEST, 2 ** (time - 1).bit_length())
        num_rows = -(-num_rows // whole_rows) * whole_rows
    inputs = torch.full((num_rows, time), pad_id)
    targets = torch.full_like(inputs, IGNORED)
    advantages = torch.zeros(len(inputs), 1)
    for row, (rollout, advantage) in enumerate(rows):
        ids, mask = torch.tensor(rollout.ids), torch.tensor(rollout.mask)
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = torch.where(mask[1:] == 1, ids[1:], IGNORED)
        advantages[row] = advantage
    return inputs, targets, advantages


def evaluate(cfg: Config, engine: Engine, held_out: Task) -> dict[str, float]:
    """Accuracy on the held-out problems: of several answers the mean, with pass@k beside it."""
    num, sampled = cfg.eval_samples, cfg.eval_samples > 1
    temperature = cfg.temperature if sampled else 0.0
    result = evaluate_generate(engine, held_out, num, cfg.max_tokens, temperature, cfg.seed)
    best = {f"pass_at_{num}": result.best_of} if sampled else {}
    return {"accuracy": result.score.value, "accuracy_stderr": result.score.stderr, **best}


def summarize(groups: Sequence[Sequence[Rollout]], device: torch.device) -> tuple[dict, int]:
    """(mean reward, share of useful groups, mean length; tokens sampled) over all ranks."""
    rollouts = [rollout for group in groups for rollout in group]
    rewards, lengths = sum(r.reward for r in rollouts), sum(sum(r.mask) for r in rollouts)
    useful = sum(is_useful(group) for group in groups)
    sums = torch.tensor([len(rollouts), len(groups), rewards, useful, lengths], device=device)
    num_rollouts, num_groups, rewards, useful, lengths = all_reduce_sum(sums.float()).tolist()
    figures = {
        "reward": rewards / num_rollouts,
        "useful_groups": useful / num_groups,
        "answer_tokens": lengths / num_rollouts,
    }
    return figures, int(lengths)


def make_engine(cfg: Config, model: GPT, tokenizer: Tokenizer, items: Iterable[Any]) -> Engine:
    """An engine for the prompts of `items`; a model that computes in 16 bits gets such weights.

    It reads them in every step: half the bytes, and nothing to cast. See `refresh`.
    """
    max_len = needed_len(tokenizer, items, cfg.max_tokens, model.config.sequence_len)
    dtype = model.compute_dtype
    sampler = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    return Engine(sampler, tokenizer, cfg.num_slots, max_len, deterministic=True)


@torch.no_grad()
def refresh(engine: Engine, model: GPT) -> None:
    """Give the engine the weights of `model`."""
    if engine.model is not model:
        for ours, theirs in zip(engine.model.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)


def main(cfg: Config) -> None:
    check_task(cfg.task)
    runtime = set_up(cfg.device_type, cfg.dtype, cfg.seed, cfg.deterministic)
    model, tokenizer, meta = load_model(cfg, runtime, train=True)
    print0(f"rl from {meta['name']}")
    settings = vars(cfg) | {"weights": meta["weights"]}
    with Run("rl", meta["model_tag"], settings, runtime) as run:
        if run.is_finished:
            return
        task, held_out = build_task(cfg.task, "train"), build_task(cfg.task)[: cfg.eval_problems]
        optimizer = make_optimizer(model, BATCH_TOKENS, 1, runtime.rank, runtime.world_size)
        run.restore(model, optimizer)
        questions = [task[n % len(task)] for n in range(cfg.num_steps * cfg.questions_per_step)]
        engine = make_engine(cfg, model, tokenizer, chain(questions, held_out))
        compile_parts(model, cfg.compile)
        whole_rows = cfg.device_batch_size if model.call_part is not call else 0
        meter = run.start(model, optimizer, tokenizer, cfg.device_batch_size)
        while True:
            run.checkpoint(cfg.save_every)
            if run.is_due(cfg.eval_every):
                run.save()  # an evaluation takes longer than some schedulers wait
                meter.note(**evaluate(cfg, engine, held_out))
            if run.step == cfg.num_steps:
                break

            meter.start_step()
            groups = roll_out(cfg, engine, task, run)
            figures, num_tokens = summarize(groups, runtime.device)
            loss, finite = torch.zeros(()), None
            multiplier = cfg.lr_scale * lr_multiplier_at(run.progress, 1.0)
            if figures["useful_groups"] > 0:
                batch = policy_batch(groups, tokenizer.bos_id, whole_rows)
                inputs, targets, advantages = (part.to(runtime.device) for part in batch)
                # The mean over sampled tokens of advantage x -log p(token).
                loss = run.accumulate(Batch(inputs, targets), advantages)
                finite = run.update(multiplier, MOMENTUM, weight_decay=0.0)
                refresh(engine, model)
            run.advance((run.step + 1) / cfg.num_steps)
            meter.log_step(loss, multiplier, num_tokens, finite)
            samples = [f"reward {r.reward:g}: {r.text}" for group in groups[:2] for r in group[:2]]
            meter.note(**figures, samples=samples)
        results = run.finish()
        samples = results.pop("samples")
        results["accuracy"] = Score(results["accuracy"], results.pop("accuracy_stderr"))
        results |= {"from": meta["name"]}
        title = "Reinforcement learning"
        write_section("chat_rl", title, vars(cfg), results, samples, meter.seconds)


if __name__ == "__main__":
    run_script(main, Config)
