"""How well a chat model does a task: by the logits of the letters, or by what it writes.

`evaluate_choice` looks at the one position after the prompt: the letter with the highest logit is
the answer, and only the letters that the row offers compete. `evaluate_generate` lets the engine
answer, with all items and all samples of the task in flight at once, and the task scores what was
said. Rank r of n takes the items r, r + n, r + 2n, ...; sums are added up and every rank gets the
same result.

The choice that would surprise: what the task scores is the text that the model says, not its tool
calls nor what the tool printed; the records keep all of it.

B rows, T time, V vocabulary.
"""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nanochat.common import UserError, all_reduce_sum, gather, own_part, progress_bar
from nanochat.core_eval import Score, padded
from nanochat.engine import Engine, Reply, Request
from nanochat.gpt import GPT
from nanochat.sampling import derive_seed
from nanochat.tokenizer import Conversation, Tokenizer, render_prompt


class EvalTask(Protocol):
    """What an evaluation asks of a task; `tasks.common.Task` is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Conversation: ...
    def score(self, conversation: Conversation, reply: str, /) -> float: ...


@dataclass(frozen=True)
class EvalResult:
    """The outcome over all ranks."""

    score: Score  # mean over items, of several samples per item over them too (pass@1)
    num: int  # items
    best_of: float  # mean over items of the best sample's score (pass@k for k samples)
    records: list[dict[str, Any]]  # per item: index, scores, the replies, the whole conversation


def evaluate_choice(
    model: GPT,
    tokenizer: Tokenizer,
    task: EvalTask,
    batch_size: int = 32,
    max_problems: int | None = None,
) -> EvalResult:
    """Score the offered letter with the highest logit right after the prompt, for every item."""
    rows = [(index, task[index]) for index in _own_items(task, max_problems)]
    prompts = [_fit(render_prompt(tokenizer, row), model.config.sequence_len) for _, row in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))
    records = []
    for start in progress_bar(range(0, len(order), batch_size), "batch"):
        batch = order[start : start + batch_size]
        logits = next_logits(model, [prompts[i] for i in batch])
        for i, row_logits in zip(batch, logits, strict=True):
            index, conversation = rows[i]
            letters = conversation["letters"]
            ids = [tokenizer.encode(letter) for letter in letters]
            assert all(len(id) == 1 for id in ids), f"a letter of {letters} is not one token"
            letter = letters[int(row_logits[[id[0] for id in ids]].argmax())]
            records.append(_record(task, index, conversation, [letter], [letter]))
    return _reduce(records, next(model.parameters()).device)


@torch.inference_mode()
def next_logits(model: GPT, prompts: Sequence[list[int]]) -> torch.Tensor:
    """(B, V) fp32 logits after each prompt, on the CPU.

    Read through a cache, which gives the logits of each row's last token only: those of all tokens
    would take B * T * V floats.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    cache = model.make_cache(len(prompts), longest)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = padded(prompts).to(device)  # (B, T)
    return model(ids, cache=cache, num_new=lengths, last_only=True)[:, 0].cpu()


def evaluate_generate(
    engine: Engine,
    tokenizer: Tokenizer,
    task: EvalTask,
    num_samples: int = 1,
    max_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    max_problems: int | None = None,
) -> EvalResult:
    """Let the model answer every item `num_samples` times, all in flight at once, and score what it
    says.

    At most half the context is kept for the reply; a prompt longer than the rest loses its
    beginning.
    """
    items = {index: task[index] for index in _own_items(task, max_problems)}
    max_tokens = min(max_tokens, engine.max_len // 2)
    asked: dict[Request, tuple[int, int]] = {}
    for index, conversation in items.items():
        prompt = _fit(render_prompt(tokenizer, conversation), engine.max_len - max_tokens)
        for k in range(num_samples):
            own = derive_seed(seed, index, k)
            asked[Request(prompt, max_tokens, temperature, seed=own)] = (index, k)
    replies: dict[tuple[int, int], Reply] = {}
    for request, reply in progress_bar(engine.complete(asked), "reply", len(asked)):
        replies[asked[request]] = reply

    def judge(index: int) -> dict[str, Any]:
        said = [replies[index, k] for k in range(num_samples)]
        texts, parts = [reply.text for reply in said], [reply.parts for reply in said]
        return _record(task, index, items[index], texts, parts)

    # In threads, because scoring a program means to wait for it.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        records = list(progress_bar(pool.map(judge, items), "score", len(items)))
    return _reduce(records, engine.device)


def _own_items(task: EvalTask, max_problems: int | None) -> range:
    """The items of this rank."""
    num = len(task) if max_problems is None else min(len(task), max_problems)
    if num < 1:
        raise UserError("there is nothing to evaluate; use --max_problems of at least 1")
    return own_part(num)


def _fit(prompt: list[int], max_len: int) -> list[int]:
    """`prompt`, or its first token (bos) and its end where it is longer than `max_len`."""
    return prompt if len(prompt) <= max_len else prompt[:1] + prompt[len(prompt) - max_len + 1 :]


def _record(
    task: EvalTask, index: int, conversation: Conversation, said: Sequence[str], replies: Sequence
) -> dict[str, Any]:
    """What is kept of one item; `said` is what the task scores of each reply."""
    scores = [float(task.score(conversation, text)) for text in said]
    return {
        "index": index,
        "scores": scores,
        "replies": list(replies),
        "conversation": conversation,
    }


def _reduce(records: list[dict[str, Any]], device: torch.device) -> EvalResult:
    """The result over the items of all ranks; the records of all of them, in order of the items."""
    means = [sum(record["scores"]) / len(record["scores"]) for record in records]
    best = [max(record["scores"]) for record in records]
    values = [float(len(means)), sum(means), sum(mean**2 for mean in means), sum(best)]
    exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no fp64
    sums = all_reduce_sum(torch.tensor(values, dtype=exact, device=device))
    count, total, squares, total_best = sums.tolist()
    accuracy = total / count
    spread = max(0.0, squares / count - accuracy**2)
    return EvalResult(
        score=Score(accuracy, math.sqrt(spread / max(count - 1, 1))),
        num=int(count),
        best_of=total_best / count,
        records=sorted(gather(records), key=lambda record: record["index"]),
    )
