"""Reinforce a chat model on problems with a checkable answer: it answers, and right answers become likelier.

Each step asks `questions_per_step` questions, samples a group of answers to each, and makes one policy-gradient
step. Answers are sampled at temperature 1 from the full distribution, the one whose
log-probabilities the gradient uses.

    python -m scripts.chat_rl                                          # one GPU
    torchrun --nproc_per_node=8 -m scripts.chat_rl                     # eight
    python -m scripts.chat_rl --task primer-exact --num_steps 20 --max_tokens 64 --eval_samples 1  # laptop

reads: sft/<model tag>/, the task's data set
writes: rl/<model tag>/ (checkpoints, metrics.jsonl, tokenizer, config.json), report/chat_rl.json
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nanochat.checkpoint import load_model
from nanochat.common import (
    Count,
    Positive,
    Runtime,
    Source,
    StepNumber,
    Tag,
    all_reduce_sum,
    print0,
    run_script,
    set_up,
)
from nanochat.dataloader import IGNORED, Batch
from nanochat.engine import Engine, Request
from nanochat.report import write_section
from nanochat.sampling import derive_seed
from nanochat.scaling import lr_multiplier_at, make_optimizer
from nanochat.task_eval import EvalTask, evaluate_generate
from nanochat.tokenizer import Conversation, render_prompt
from nanochat.trainer import TrainRun, accumulate
from tasks.common import Task
from tasks.mixtures import build_task

MOMENTUM = 0.95  # of Muon; constant, since the stage starts from a trained model
BATCH_TOKENS = 2**18  # learning rates are those of batches up to this size (nanochat/scaling.py)


@dataclass
class Config:
    # from where
    source: Source = "sft"  # stage of the checkpoint to start from
    model_tag: Tag = ""  # its run; empty: the one written last
    step: StepNumber = None  # its step; the newest if left out
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
    lr_scale: Positive = 0.05  # times the learning rates of pretraining; falls linearly to 0
    # machine
    device_type: str = ""  # cpu, cuda or mps; empty: the best there is
    dtype: str = "auto"  # of the matmuls: auto, float32 or bfloat16; master weights are fp32
    seed: int = 0  # of the questions' order and the samples
    # the run
    run: str = "dummy"  # wandb name; dummy: no wandb
    fresh: bool = False  # start over instead of resuming
    log_every: int = 1  # steps between console lines; <= 0: at the end alone
    eval_every: int = 25  # steps between held-out measurements; <= 0: at the end alone
    eval_problems: Count = 400  # problems of one such measurement
    eval_samples: Count = 8  # answers to each: pass@1 and pass@8; 1: one answer, the likeliest
    save_every: int = 50  # steps between checkpoints; <= 0: at the end alone


ROUND_UP = 32  # rows are padded to a multiple of this many tokens, so that few shapes occur


@dataclass(frozen=True)
class Rollout:
    """One sampled answer: the whole sequence, which tokens the model chose, and what it earned."""

    ids: list[int]
    mask: list[int]  # 1 where the model sampled the token
    reward: float
    text: str  # what was said, tool calls left out


def roll_out(
    engine: Engine,
    questions: Mapping[int, Conversation],
    task: EvalTask,
    num_samples: int,
    max_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[Rollout]]:
    """A group of `num_samples` rollouts for each question (number -> question), in order.

    `seed` and the question's number fix every one of them, whichever rank makes it.
    """
    asked: dict[Request, int] = {}
    for number, question in questions.items():
        prompt = render_prompt(engine.tokenizer, question)
        for k in range(num_samples):
            own = derive_seed(seed, number, k)
            asked[Request(prompt, max_tokens, temperature, seed=own)] = number
    groups: dict[int, list[Rollout]] = {number: [] for number in questions}
    for request, reply in engine.complete(asked):
        number = asked[request]
        reward = task.score(questions[number], reply.text)
        sampled = [0] * len(request.prompt) + reply.masks
        groups[number].append(Rollout(request.prompt + reply.tokens, sampled, reward, reply.text))
    return list(groups.values())


def advantages(rewards: Sequence[float]) -> list[float]:
    """Each reward minus the group's mean: [1, 0, 0, 1] -> [.5, -.5, -.5, .5]."""
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def is_useful(group: Sequence[Rollout]) -> bool:
    """True when the answers of a group earned different rewards."""
    return len({rollout.reward for rollout in group}) > 1


def policy_batch(
    groups: Sequence[Sequence[Rollout]], pad_id: int, device: torch.device
) -> tuple[Batch, torch.Tensor]:
    """(rows of all useful groups, advantage of each target (R, T)); one row of padding where no group is.

    Multiplied by these weights, the losses of the targets sum to the policy gradient's loss.
    """
    rows = [
        (rollout, advantage)
        for group in groups
        if is_useful(group)
        for rollout, advantage in zip(group, advantages([r.reward for r in group]), strict=True)
    ]
    longest = max((len(rollout.ids) for rollout, _ in rows), default=2) - 1
    time = -(-longest // ROUND_UP) * ROUND_UP
    inputs = torch.full((max(1, len(rows)), time), pad_id)
    targets = torch.full_like(inputs, IGNORED)
    weights = torch.zeros(inputs.shape)
    for row, (rollout, advantage) in enumerate(rows):
        ids, mask = torch.tensor(rollout.ids), torch.tensor(rollout.mask)
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = torch.where(mask[1:] == 1, ids[1:], IGNORED)
        weights[row] = advantage
    num_targets = int((targets != IGNORED).sum())
    batch = Batch(inputs.to(device), targets.to(device), num_targets)
    return batch, weights.to(device)


def ask(
    cfg: Config, engine: Engine, task: Task, step: int, runtime: Runtime
) -> list[list[Rollout]]:
    """This rank's groups of answers to the questions of `step`; the seed and the step fix them."""
    numbers = range(step * cfg.questions_per_step, (step + 1) * cfg.questions_per_step)
    own = numbers[runtime.rank :: runtime.world_size]
    questions = {number: task[number % len(task)] for number in own}
    sampling = (cfg.num_samples, cfg.max_tokens, cfg.temperature, cfg.seed)
    return roll_out(engine, questions, task, *sampling)


def examine(cfg: Config, engine: Engine, held_out: Task) -> dict[str, float]:
    """Accuracy on the held-out problems; of several sampled answers the mean, with pass@k beside it."""
    num, sampled = cfg.eval_samples, cfg.eval_samples > 1
    sampling = (num, cfg.max_tokens, cfg.temperature if sampled else 0.0, cfg.seed)
    result = evaluate_generate(engine, held_out, *sampling, cfg.eval_problems)
    best = {f"pass_at_{num}": result.best_of} if sampled else {}
    accuracy, stderr = result.score
    return {"accuracy": accuracy, "accuracy_stderr": stderr or 0.0, **best}


def summarize(groups: Sequence[Sequence[Rollout]], device: torch.device) -> dict[str, float]:
    """Mean reward, share of useful groups, mean and total answer length over the groups of all ranks."""
    rollouts = [rollout for group in groups for rollout in group]
    rewards, lengths = sum(r.reward for r in rollouts), sum(sum(r.mask) for r in rollouts)
    useful = sum(is_useful(group) for group in groups)
    sums = torch.tensor([len(rollouts), len(groups), rewards, useful, lengths], device=device)
    num_rollouts, num_groups, rewards, useful, lengths = all_reduce_sum(sums.float()).tolist()
    return {
        "reward": rewards / num_rollouts,
        "useful_groups": useful / num_groups,
        "answer_tokens": lengths / num_rollouts,
        "sampled_tokens": lengths,
    }


def main(cfg: Config) -> None:
    """Reinforce, or go on reinforcing, one model."""
    runtime = set_up(cfg.device_type, cfg.dtype, cfg.seed)
    model, tokenizer, meta = load_model(cfg.source, cfg.model_tag, cfg.step, runtime, train=True)
    print0(f"rl from {meta['name']}")
    task, held_out = build_task(cfg.task, "train"), build_task(cfg.task, "test")
    settings = vars(cfg) | {"weights": meta["weights"]}
    with TrainRun("rl", meta["model_tag"], settings, runtime) as run:
        if run.finished:
            return
        optimizer = make_optimizer(model, BATCH_TOKENS, 1, runtime.rank, runtime.world_size)
        run.restore(model, optimizer)
        engine = Engine(model, tokenizer, cfg.num_slots, prefix_reuse=False)
        run.begin(model, tokenizer)
        while True:
            if run.step > 0 and run.due(cfg.save_every):
                run.save(model, optimizer, None)
            if run.due(cfg.eval_every):
                run.note(**examine(cfg, engine, held_out))
            if run.progress >= 1:
                break
            run.start_clock()
            groups = ask(cfg, engine, task, run.step, runtime)
            figures = summarize(groups, runtime.device)
            loss, multiplier = torch.zeros(()), cfg.lr_scale * lr_multiplier_at(run.progress, 1.0)
            batch, weights = policy_batch(groups, tokenizer.bos_id, runtime.device)
            if figures["useful_groups"] > 0:
                loss = accumulate(model, batch, cfg.device_batch_size, runtime.world_size, weights)
                optimizer.set_multipliers(multiplier, MOMENTUM, weight_decay=0.0)
                optimizer.step()
                optimizer.zero_grad()
            run.update(
                loss, multiplier, (run.step + 1) / cfg.num_steps, int(figures.pop("sampled_tokens"))
            )
            run.note(**figures)
            said = [f"reward {r.reward:g}: {r.text}" for group in groups[:2] for r in group[:2]]
            run.record["samples"] = said
        run.finish()
        results = run.results() | {"from": meta["name"]}
        samples = results.pop("samples")
        title = "Reinforcement learning"
        write_section("chat_rl", title, vars(cfg), results, samples, run.seconds)


if __name__ == "__main__":
    run_script(main, Config)
