"""Tasks, and how a chat model does on one: by the logits of the letters, or by its replies.

`evaluate_choice` compares the logits of the offered letters right after the prompt.
`evaluate_generate` submits all items and samples at once; the task scores the text of each reply,
while tool calls and results are only recorded. Rank r of n takes the items r, r + n, r + 2n, ...,
and every rank gets the same result.

Shapes: B rows, T time, V vocabulary.
"""

import copy
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple

import torch

from nanochat.common import gather, own_part, progress_bar
from nanochat.core_eval import CoreTask, Score, mean_score, padded
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT
from nanochat.kv_cache import GPU_DECODE_BLOCK
from nanochat.sampling import derive_seed
from nanochat.tokenizer import Conversation, Tokenizer, crop_prompt, render_prompt


class Task(Sequence[Conversation]):
    """A list of conversations; a slice such as `task[:100]` is a task, too."""

    kind = "generate"  # "choice": the reply is one of the letters in the conversation's "letters"
    baseline = 0.0  # accuracy of guessing

    def __init__(self, keys: Sequence[Any]) -> None:
        """`keys`, in this order, are what `get_example` makes the conversations from."""
        self._keys = keys

    def get_example(self, key: Any, /) -> Conversation:
        """The conversation of a key; here the key is one."""
        return key

    def score(self, conversation: Conversation, reply: str) -> float:
        """From 0 (wrong) to 1 (right), for evaluation and RL; here: equality with the answer."""
        return reply.strip() == conversation["answer"]

    def pages(self, name: str) -> CoreTask | None:
        """The rows in the form in which a base model is examined, if they have one."""
        return None

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            part = copy.copy(self)
            part._keys = self._keys[index]
            return part
        return self.get_example(self._keys[index])


class EvalResult(NamedTuple):
    """The outcome over all ranks."""

    score: Score  # the mean over items and their samples (pass@1)
    best_of: float  # mean over items of the best sample's score (pass@k for k samples)
    records: list[dict[str, Any]]  # per item: index, scores, replies, the whole conversation


@torch.inference_mode()
def evaluate_choice(
    model: GPT, tokenizer: Tokenizer, task: Task, batch_size: int = 32
) -> EvalResult:
    """Score the offered letter with the highest logit after the prompt, for every item."""
    items = {index: task[index] for index in own_part(len(task))}
    prompts = {
        index: crop_prompt(render_prompt(tokenizer, item), model.config.sequence_len)
        for index, item in items.items()
    }
    order = sorted(items, key=lambda index: -len(prompts[index]))
    said: dict[int, list[tuple[str, Any]]] = {}
    for start in progress_bar(range(0, len(order), batch_size), "batch"):
        batch = order[start : start + batch_size]
        rows = [prompts[index] for index in batch]
        # Through a cache, for the last token's logits only: all would take B * T * V floats.
        cache = model.make_cache(len(rows), max(map(len, rows)))
        inputs = padded(rows).to(cache.keys.device)  # (B, T)
        num_new = torch.tensor([len(row) for row in rows])
        logits = model(inputs, cache=cache, num_new=num_new, last_only=True)[:, 0].cpu()  # (B, V)
        for index, item_logits in zip(batch, logits, strict=True):
            letters = items[index]["letters"]
            ids = [id for letter in letters for id in tokenizer.encode(letter)]
            assert len(ids) == len(letters), f"a letter of {letters} is not one token"
            letter = letters[int(item_logits[ids].argmax())]
            said[index] = [(letter, letter)]
    return _judge(task, items, said)


def needed_len(
    tokenizer: Tokenizer, items: Iterable[Conversation], max_tokens: int, context: int
) -> int:
    """Tokens of cache that the longest of these prompts and its reply take, at most `context`.

    Half the cache takes half the memory and, without flash, half the time; whole blocks change
    no bit.
    """
    longest = max((len(render_prompt(tokenizer, item)) for item in items), default=1)
    num_blocks = -(-(longest + max_tokens) // GPU_DECODE_BLOCK)
    return min(context, num_blocks * GPU_DECODE_BLOCK)


def evaluate_generate(
    engine: Engine,
    task: Task,
    num_samples: int = 1,
    max_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
) -> EvalResult:
    """Score `num_samples` replies to every item.

    A reply gets at most half the context; a prompt longer than the rest loses its beginning.
    """
    items = {index: task[index] for index in own_part(len(task))}
    context = engine.model.config.sequence_len
    max_tokens = min(max_tokens, context // 2)
    requests: dict[int, list[Request]] = {}
    for index, item in items.items():
        prompt = crop_prompt(render_prompt(engine.tokenizer, item), context - max_tokens)
        seeds = [derive_seed(seed, index, k) for k in range(num_samples)]
        requests[index] = [Request(prompt, max_tokens, temperature, seed=own) for own in seeds]
    asked = list(chain.from_iterable(requests.values()))
    replies = dict(progress_bar(engine.complete(asked), "reply", len(asked)))
    said = {
        index: [(replies[request].text, replies[request].parts) for request in own]
        for index, own in requests.items()
    }
    return _judge(task, items, said)


def _judge(
    task: Task, items: dict[int, Conversation], said: dict[int, list[tuple[str, Any]]]
) -> EvalResult:
    """The outcome for `said`: of every sample of an item, the text to score and what to record."""

    def record(index: int) -> dict[str, Any]:
        scores = [float(task.score(items[index], text)) for text, _ in said[index]]
        replies = [reply for _, reply in said[index]]
        outcome = {"index": index, "scores": scores, "replies": replies}
        return outcome | {"conversation": items[index]}

    # In threads: scoring a program means waiting for it.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        records = list(progress_bar(pool.map(record, items), "score", len(items)))
    records = sorted(gather(records), key=lambda record: record["index"])
    best_of = fmean(max(record["scores"]) for record in records)
    return EvalResult(mean_score(records), best_of, records)
