"""Answers that the model gives while it is reinforced, and the policy gradient's batch made from them.

For every question a group of answers is sampled from the model itself, all questions in flight at once. The
advantage of an answer is its reward minus the mean of its group, and the loss of the whole batch is

    - sum_i A_i sum_t log p(token_it) / (sampled tokens of the whole batch, all ranks)

over the tokens that the model sampled: prompts and what the tool printed are masked. There is no KL term and no
clipping, because each batch is used for one update (the ratio to clip would be 1).

The choice that would surprise: groups in which every answer has the same reward are left out. They have no
gradient, and Muon, which does not see a gradient's size, would take a full step along what noise remains.

Sources: REINFORCE with a group baseline (arXiv 2402.03300 without its ratio, KL and division by the standard
deviation); normalisation by tokens, arXiv 2503.14476. Shapes: R rows, T time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nanochat.chat_format import Conversation, render_prompt
from nanochat.dataloader import IGNORED, Batch
from nanochat.engine import Engine, Request
from nanochat.replies import reply_parts
from nanochat.sampling import derive_seed
from nanochat.task_eval import EvalTask, spoken_text

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
    for request, tokens, masks in engine.complete(asked):
        number = asked[request]
        text = spoken_text(reply_parts(engine.tokenizer, tokens))
        reward = task.score(questions[number], text)
        sampled = [0] * len(request.prompt) + masks
        groups[number].append(Rollout(request.prompt + tokens, sampled, reward, text))
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
    batch = Batch(inputs.to(device), targets.to(device), num_targets, 0, 0.0, dict)
    return batch, weights.to(device)
