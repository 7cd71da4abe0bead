"""Evaluation of chat models: which letter wins, what is scored, error bars, two ranks.

Oracles: the full logits of one prompt at a time; and a model that was trained on the answers.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.task_eval import Task, evaluate_choice, evaluate_generate
from nanochat.tokenizer import Conversation, render_conversation, render_prompt
from tests.launch import on_ranks
from tests.models import TOKENIZER, memorise, random_gpt


def random_model(context: int = 64) -> GPT:
    return random_gpt(context, width=64, head_std=0.1)


class Letters(Task):
    """Choices of 2 to 4 letters; the right one alternates."""

    def __init__(self, num: int) -> None:
        super().__init__(range(num))

    def get_example(self, index: int) -> Conversation:
        letters = list("ABCD"[: 2 + index % 3])
        question, answer = "which?" + "." * (index * 7 % 11), letters[index % 2]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "letters": letters}

    def score(self, conversation: Conversation, reply: str) -> float:
        return float(reply == conversation["messages"][1]["content"])


class Sums(Letters):
    """Small sums through the tool, said aloud after it."""

    def get_example(self, index: int) -> Conversation:
        sum_, result = f"{index}+1", f"{index + 1}"
        call = [("python", sum_), ("python_output", result), ("text", f"{result}!")]
        content = [{"type": kind, "text": text} for kind, text in call]
        user, assistant = {"role": "user", "content": sum_}, {"role": "assistant"}
        return {"messages": [user, assistant | {"content": content}]}

    def score(self, conversation: Conversation, reply: str) -> float:
        return float(reply == conversation["messages"][1]["content"][-1]["text"])


@torch.inference_mode()
def slow_letter(model: GPT, conversation: Conversation) -> str:
    prompt = render_prompt(TOKENIZER, conversation)
    if len(prompt) > model.config.sequence_len:
        prompt = [prompt[0], *prompt[-(model.config.sequence_len - 1) :]]
    logits = model(torch.tensor([prompt]))[0, -1]
    return max(conversation["letters"], key=lambda letter: float(logits[ord(letter)]))


@pytest.mark.parametrize(("batch_size", "context"), [(1, 64), (5, 64), (64, 12)])
def test_choice_equals_one_at_a_time(batch_size: int, context: int) -> None:
    model, task = random_model(context), Letters(20)
    result = evaluate_choice(model, TOKENIZER, task, batch_size)
    letters = [slow_letter(model, task[i]) for i in range(20)]
    scores = [task.score(task[i], letter) for i, letter in enumerate(letters)]
    assert [record["replies"] for record in result.records] == [[letter] for letter in letters]
    assert [record["index"] for record in result.records] == list(range(20))
    assert result.score.value == pytest.approx(sum(scores) / 20)
    assert result.score.stderr == pytest.approx(statistics.stdev(scores) / 20**0.5)


def test_generate_scores_what_is_said_after_the_tool() -> None:
    model, task = random_model(), Sums(4)
    rendered = [render_conversation(TOKENIZER, task[i]) for i in range(4)]
    memorise(model, [ids for ids, _ in rendered], [mask for _, mask in rendered], steps=120)
    result = evaluate_generate(Engine(model, TOKENIZER, num_slots=3), task, max_tokens=20)
    assert result.score == (1, 0) and result.best_of == 1 and len(result.records) == 4
    assert result.records[2]["replies"] == [task[2]["messages"][1]["content"]]
    assert result.records[2]["conversation"] == task[2]


class Luck(Letters):
    """Right when the reply has an even number of characters: chance decides."""

    def score(self, conversation: Conversation, reply: str) -> float:
        return float(len(reply) % 2 == 0)


def test_several_samples_per_item() -> None:
    engine = Engine(random_model(), TOKENIZER, num_slots=8)
    options: dict[str, Any] = {"num_samples": 5, "max_tokens": 6, "temperature": 1.0}
    result = evaluate_generate(engine, Luck(6), **options, seed=1)
    scores = [record["scores"] for record in result.records]
    assert all(len(own) == 5 for own in scores)
    assert result.score.value == pytest.approx(statistics.mean(map(statistics.mean, scores)))
    assert result.best_of == pytest.approx(statistics.mean(map(max, scores)))
    replies = [record["replies"] for record in result.records]
    again = evaluate_generate(engine, Luck(6), **options, seed=1)
    other = evaluate_generate(engine, Luck(6), **options, seed=2)
    assert [record["replies"] for record in again.records] == replies
    assert [record["replies"] for record in other.records] != replies


def test_prompts_longer_than_the_context() -> None:
    engine = Engine(random_model(context=16), TOKENIZER, num_slots=2)
    assert len(evaluate_generate(engine, Letters(4), max_tokens=50).records) == 4


def outcome() -> list[Any]:
    result = evaluate_choice(random_model(), TOKENIZER, Letters(7), batch_size=2)
    return [*result.score, [record["replies"] for record in result.records]]


def evaluate_on_rank(rank: int, folder: Path) -> None:
    (folder / f"{rank}.json").write_text(json.dumps(outcome()))


def test_two_ranks_find_what_one_does(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, evaluate_on_rank, tmp_path)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == outcome()
