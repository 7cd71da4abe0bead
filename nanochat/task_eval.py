"""Evaluate a chat model on a task: by the logits of the letters, or by its replies.

`evaluate_choice` compares the logits of the offered letters right after the prompt.
`evaluate_generate` has all items and samples of a task in flight at once; the task scores the text
of each reply, while tool calls and results are only recorded. Rank r of n takes the items r, r + n,
r + 2n, ..., and every rank gets the same result.

Shapes: B rows, T time, V vocabulary.
"""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

import torch

from nanochat.common import gather, own_part, progress_bar
from nanochat.core_eval import Score, padded
from nanochat.engine import Engine, Reply, Request
from nanochat.gpt import GPT
from nanochat.sampling import derive_seed
from nanochat.tokenizer import Conversation, render_prompt


class EvalTask(Protocol):
    """What an evaluation needs of a task; `tasks.common.Task` is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Conversation: ...
    def score(self, conversation: Conversation, reply: str, /) -> float: ...


@dataclass(frozen=True)
class EvalResult:
    """The outcome over all ranks."""

    score: Score  # mean over items, of several samples per item over them too (pass@1)
    best_of: float  # mean over items of the best sample's score (pass@k for k samples)
    records: list[dict[str, Any]]  # per item: index, scores, the replies, the whole conversation


def evaluate_choice(
    engine: Engine, task: EvalTask, batch_size: int = 32, max_problems: int | None = None
) -> EvalResult:
    """Score the offered letter with the highest logit after the prompt, for every item."""
    model, tokenizer = engine.model, engine.tokenizer
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
    return _result(records)


@torch.inference_mode()
def next_logits(model: GPT, prompts: Sequence[list[int]]) -> torch.Tensor:
    """(B, V) fp32 logits after each prompt, on the CPU.

    Through a cache, which gives only the last token's logits; all would take B * T * V floats.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    cache = model.make_cache(len(prompts), longest)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = padded(prompts).to(device)  # (B, T)
    return model(ids, cache=cache, num_new=lengths, last_only=True)[:, 0].cpu()


def evaluate_generate(
    engine: Engine,
    task: EvalTask,
    num_samples: int = 1,
    max_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
    max_problems: int | None = None,
) -> EvalResult:
    """Score `num_samples` replies to every item.

    A reply gets at most half the context; a prompt longer than the rest loses its beginning.
    """
    items = {index: task[index] for index in _own_items(task, max_problems)}
    max_tokens = min(max_tokens, engine.max_len // 2)
    asked: dict[Request, tuple[int, int]] = {}
    for index, conversation in items.items():
        prompt = _fit(render_prompt(engine.tokenizer, conversation), engine.max_len - max_tokens)
        for k in range(num_samples):
            request = Request(prompt, max_tokens, temperature, seed=derive_seed(seed, index, k))
            asked[request] = (index, k)
    replies: dict[tuple[int, int], Reply] = {}
    for request, reply in progress_bar(engine.complete(asked), "reply", len(asked)):
        replies[asked[request]] = reply

    def judge(index: int) -> dict[str, Any]:
        said = [replies[index, k] for k in range(num_samples)]
        texts, parts = [reply.text for reply in said], [reply.parts for reply in said]
        return _record(task, index, items[index], texts, parts)

    # In threads: scoring a program means waiting for it.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        records = list(progress_bar(pool.map(judge, items), "score", len(items)))
    return _result(records)


def _own_items(task: EvalTask, max_problems: int | None) -> range:
    return own_part(len(task) if max_problems is None else min(len(task), max_problems))


def _fit(prompt: list[int], max_len: int) -> list[int]:
    """`prompt`, or its first token (bos) and its end if it is longer than `max_len`."""
    return prompt if len(prompt) <= max_len else prompt[:1] + prompt[len(prompt) - max_len + 1 :]


def _record(
    task: EvalTask, index: int, conversation: Conversation, texts: Sequence[str], replies: Sequence
) -> dict[str, Any]:
    scores = [float(task.score(conversation, text)) for text in texts]
    return {"index": index, "scores": scores, "replies": replies, "conversation": conversation}


def _result(records: list[dict[str, Any]]) -> EvalResult:
    records = sorted(gather(records), key=lambda record: record["index"])
    means = [fmean(record["scores"]) for record in records]
    accuracy = fmean(means)
    spread = fmean((mean - accuracy) ** 2 for mean in means)
    return EvalResult(
        score=Score(accuracy, math.sqrt(spread / max(len(means) - 1, 1))),
        best_of=fmean(max(record["scores"]) for record in records),
        records=records,
    )
