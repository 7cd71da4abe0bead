"""CORE against an evaluator written from its definitions: one document at a time, all logits,
nothing shared.

Both see the same tasks of all three kinds, with prompts that fit and prompts that do not, on a
model of random weights and on one that has learned some of the documents by heart.
"""

import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from nanochat import core_eval
from nanochat.common import UserError
from nanochat.core_eval import CORE_TASKS, CoreTask, GPTReader, TaskResult, core_score, evaluate
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

# All bytes, and merges that take the blank before a word into its token, across the end of a
# prompt.
MERGES = [b" t", b"he", b" the", b" s", b"ky", b" sky", b" b", b" bl", b" blue", b"\n\n", b"  "]
TOKENS = [bytes([byte]) for byte in range(256)] + MERGES
TOKENIZER = Tokenizer(TOKENS, SPECIAL_TOKENS, SPLIT_PATTERN)
CONTEXT = 64
NUM_KNOWN = 4  # items of each task that a model learns by heart
COLOURS = ("red", "blue", "green", "blue and red", "the sky")


def make_tasks() -> list[CoreTask]:
    """Four tasks; prompts end with and without a blank, and the first has more examples than the
    context holds.
    """
    words, tasks = random.Random(1), []

    def word() -> str:
        return "".join(words.choices("skythe", k=words.randint(2, 6)))

    def choice(end: str) -> dict[str, Any]:
        choices = words.sample(COLOURS, words.randint(2, 4))
        return {
            "query": f"{word()} is{end}",
            "choices": choices,
            "gold": words.randrange(len(choices)),
        }

    def schema(_: str) -> dict[str, Any]:
        options = [f"the {word()}", f"the {word()} sky"]
        return {
            "context_options": options,
            "continuation": f"is {word()}.",
            "gold": words.randrange(2),
        }

    def text(end: str) -> dict[str, Any]:
        return {"context": f"{word()} of {word()}{end}", "continuation": words.choice(COLOURS)}

    table = [
        ("arc_easy", "multiple_choice", choice, "", 10, "\nAnswer: "),
        ("piqa", "multiple_choice", choice, " ", 1, " "),
        ("winograd", "schema", schema, "", 0, " "),
        ("lambada_openai", "language_modeling", text, " ", 1, " "),
    ]
    for label, kind, make, end, num_fewshot, delimiter in table:
        rows = [make(end) | {"id": 100 + i} for i in range(14)]
        tasks.append(CoreTask(label, kind, rows, 0.25, num_fewshot, delimiter))
    return tasks


TASKS = make_tasks()


def slow_documents(task: CoreTask, number: int) -> tuple[list[list[int]], list[int]]:
    """(cropped ids of each option, how many at the end are scored), from the definitions."""
    others = [row for i, row in enumerate(task.rows) if i != number]
    shots = random.Random(1234 + number).sample(others, task.num_fewshot)

    def texts(row: dict[str, Any]) -> list[str]:
        if task.kind == "multiple_choice":
            return [row["query"] + task.delimiter + choice for choice in row["choices"]]
        if task.kind == "schema":
            return [
                option + task.delimiter + row["continuation"] for option in row["context_options"]
            ]
        return [row["context"].strip() + task.delimiter + row["continuation"]]

    before = "".join(texts(row)[row.get("gold", 0)] + "\n\n" for row in shots)
    row = task.rows[number]
    rows = [[TOKENIZER.bos_id, *TOKENIZER.encode(before + text)] for text in texts(row)]
    same = 0
    if task.kind == "schema":
        while len({own[-1 - same] for own in rows}) == 1:
            same += 1
        scored = [same] * len(rows)
    else:
        compared = rows
        if task.kind == "language_modeling":
            prompt = (before + row["context"].strip() + task.delimiter).rstrip()
            compared = [rows[0], [TOKENIZER.bos_id, *TOKENIZER.encode(prompt)]]
        while (
            all(len(own) > same for own in compared) and len({own[same] for own in compared}) == 1
        ):
            same += 1
        scored = [len(own) - same for own in rows]
    cut = max(0, max(map(len, rows)) - CONTEXT)
    return [own[:1] + own[1 + cut :] for own in rows], scored


@torch.inference_mode()
def slow_record(model: GPT, task: CoreTask, number: int) -> dict[str, Any]:
    losses, likeliest, there = [], [], []
    for ids, num in zip(*slow_documents(task, number), strict=True):
        logs = model(torch.tensor([ids]))[0].double().log_softmax(-1)
        there = ids[len(ids) - num :]
        places = range(len(ids) - num - 1, len(ids) - 1)
        nats = [-float(logs[place, id]) for place, id in zip(places, there, strict=True)]
        losses.append(sum(nats) / num if num else math.inf)
        likeliest = [int(logs[place].argmax()) for place in places]
    row = task.rows[number]
    if task.kind == "language_modeling":
        found = {"prediction": TOKENIZER.decode(likeliest), "gold": row["continuation"]}
        found["correct"] = likeliest == there
    else:
        best = min(range(len(losses)), key=lambda i: losses[i])
        found = {"prediction": best, "gold": row["gold"], "correct": best == row["gold"]}
    return {"task": task.label, "id": row["id"], **found, "losses": losses}


def new_model(context: int = CONTEXT) -> GPT:
    vocab = TOKENIZER.vocab_size
    return GPT(GPTConfig(context, vocab, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)).eval()


def random_model() -> GPT:
    model = new_model()
    model.init_weights(1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def memorising_model() -> GPT:
    """Has read the right documents of the first items of every task until it knew them."""
    model = random_model()
    rows = []
    for task in TASKS:
        for number in range(NUM_KNOWN):
            documents, _ = slow_documents(task, number)
            rows.append(documents[task.rows[number].get("gold", 0)])
    longest = max(map(len, rows))
    ids = torch.tensor([row + [-1] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(45):
        optimizer.zero_grad()
        model(ids[:, :-1].clamp(min=0), ids[:, 1:].contiguous()).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, GPT]:
    return {"random": random_model(), "memorising": memorising_model()}


@pytest.fixture(scope="module")
def expected(models: dict[str, GPT]) -> dict[str, list[dict[str, Any]]]:
    """Name of a model -> the slow evaluator's records of all tasks."""
    return {
        name: [slow_record(model, task, i) for task in TASKS for i in range(len(task.rows))]
        for name, model in models.items()
    }


def assert_same(records: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(records) == len(expected)
    for found, right in zip(records, expected, strict=True):
        losses = [math.inf if loss is None else loss for loss in found["losses"]]
        assert losses == pytest.approx(right["losses"], abs=1e-4)
        assert found | {"losses": []} == right | {"losses": []}


def all_records(model: GPT, batch_size: int) -> list[dict[str, Any]]:
    reader = GPTReader(model, TOKENIZER, batch_size)
    results = [evaluate(reader, task, batch_size, None) for task in TASKS]
    return [record for result in results for record in result.records]


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("name", ["random", "memorising"])
def test_equals_the_slow_evaluator(
    models: dict[str, GPT],
    expected: dict[str, list[dict[str, Any]]],
    name: str,
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(core_eval, "CPU_CHUNK", 11)  # so that prefixes take several steps
    monkeypatch.setattr(core_eval, "CPU_TOKENS", 40)
    assert_same(all_records(models[name], batch_size), expected[name])


def test_the_comparison_means_something(expected: dict[str, list[dict[str, Any]]]) -> None:
    """What was learned by heart is right, of every kind; the random model gets some wrong."""
    for name, least in (("random", 0), ("memorising", NUM_KNOWN)):
        for task in TASKS:
            known = [record for record in expected[name] if record["task"] == task.label]
            assert sum(record["correct"] for record in known[:NUM_KNOWN]) >= least
    assert not all(record["correct"] for record in expected["random"])
    lengths = [max(map(len, slow_documents(task, 0)[0])) for task in TASKS]
    assert lengths[0] == CONTEXT and all(length < CONTEXT for length in lengths[1:])


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for name in ("random", "memorising"):
        model = new_model()
        model.load_state_dict(load_file(f"{folder}/{name}.safetensors"))
        for batch_size in (1, 32):
            records = all_records(model, batch_size)
            Path(f"{folder}/{name}{batch_size}{rank}.json").write_text(json.dumps(records))
    dist.destroy_process_group()


def test_two_ranks_find_what_one_does(
    models: dict[str, GPT], expected: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    for name, model in models.items():
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    for name in models:
        for batch_size in (1, 32):
            files = [tmp_path / f"{name}{batch_size}{rank}.json" for rank in (0, 1)]
            first, second = (json.loads(file.read_text()) for file in files)
            assert first == second
            assert_same(first, expected[name])


class Listener(GPTReader):
    """A reader that keeps the texts it is given."""

    def encode(self, text: str) -> list[int]:
        self.texts = [*getattr(self, "texts", []), text]
        return super().encode(text)


def documents_of(task: CoreTask, max_items: int | None = None) -> Iterator[str]:
    model = new_model()
    model.init_weights()
    reader = Listener(model, TOKENIZER, 4)
    evaluate(reader, task, 4, max_items)
    return iter(reader.texts)


def test_examples_are_other_rows_of_the_whole_set_solved() -> None:
    """Lessons of other ports: examples really in the prompt, never the item, and drawn beyond the
    items kept.
    """
    rows = [
        {"query": f"<{i}>", "choices": ["no", f"yes{i}"], "gold": 1, "id": i} for i in range(12)
    ]
    task = CoreTask("piqa", "multiple_choice", rows, 0.5, 10, "\nAnswer: ")
    drawn = set()
    for number, document in enumerate(list(documents_of(task))[::2]):
        *shots, own = document.split("\n\n")
        assert own == f"<{number}>\nAnswer: no"
        numbers = [int(shot[1 : shot.index(">")]) for shot in shots]
        assert shots == [f"<{i}>\nAnswer: yes{i}" for i in numbers]
        assert len(set(numbers)) == 10 and number not in numbers
        drawn.add(tuple(numbers))
    assert len(drawn) == 12
    [no, yes] = documents_of(task, max_items=1)
    assert no.count("\n\n") == yes.count("\n\n") == 10


def test_spans_are_found_among_ids(models: dict[str, GPT]) -> None:
    """The blank before a word belongs to its token, whether the prompt ends with one or the
    delimiter does.
    """
    reader = GPTReader(models["random"], TOKENIZER, 4)
    rows = [{"context": "the sky is ", "continuation": "blue", "id": 1}]
    rows_of, scored = core_eval.item_rows(
        reader, CoreTask("squad", "language_modeling", rows, 0), 0
    )
    assert scored == [1] and TOKENIZER.decode(rows_of[0][-1:]) == " blue"
    assert TOKENIZER.decode(rows_of[0][1:]) == "the sky is blue"
    rows = [{"query": "is ", "choices": ["blue", "sky"], "gold": 0, "id": 1}]
    rows_of, scored = core_eval.item_rows(reader, CoreTask("piqa", "multiple_choice", rows, 0), 0)
    assert [TOKENIZER.decode(ids[-n:]) for ids, n in zip(rows_of, scored, strict=True)] == [
        " blue", " sky",
    ]  # fmt: skip
    assert all(TOKENIZER.decode(ids[1:]).startswith("is  ") for ids in rows_of)  # queries stay


def test_options_longer_than_the_context(models: dict[str, GPT]) -> None:
    """A choice too long by itself keeps its end behind bos; a short one loses the prompt, but not
    itself.
    """
    rows = [{"query": "q " * 40, "choices": ["xyz" * 40, "abc", "a"], "gold": 1, "id": 1}]
    task = CoreTask("copa", "multiple_choice", rows, 0.5)
    reader = GPTReader(models["random"], TOKENIZER, 4)
    item = core_eval.encode_item(reader, task, 0)
    texts = [TOKENIZER.decode((item.prefix + tail)[1:]) for tail in item.tails]
    assert texts == [("xyz" * 40)[-63:], "abc", "a"] and item.num_scored == [63, 3, 1]
    assert all((item.prefix + tail)[0] == TOKENIZER.bos_id for tail in item.tails)
    [record] = evaluate(reader, task, 4, None).records
    assert all(loss is not None and loss < 20 for loss in record["losses"])


def test_options_without_tokens_of_their_own(models: dict[str, GPT]) -> None:
    reader = GPTReader(models["random"], TOKENIZER, 4)
    rows = [{"query": "a", "choices": ["b", "b c"], "gold": 1, "id": 1}]
    [record] = evaluate(reader, CoreTask("copa", "multiple_choice", rows, 0.5), 4, None).records
    assert record["losses"][0] is None and record["prediction"] == 1 and record["correct"]
    rows = [{"context": "a", "continuation": "", "id": 1}]
    [record] = evaluate(
        reader, CoreTask("squad", "language_modeling", rows, 0.0, 0, ""), 4, None
    ).records
    assert record["losses"] == [None] and not record["correct"]


def test_a_broken_model_is_refused() -> None:
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    with pytest.raises(UserError, match="--step"):
        evaluate(GPTReader(model, TOKENIZER, 4), TASKS[2], 4, None)


def result_of(label: str, baseline: float, num_right: int, num: int) -> TaskResult:
    records = [{"correct": i < num_right} for i in range(num)]
    return TaskResult(CoreTask(label, "schema", [], baseline), records)


def test_core_is_the_mean_of_centered_accuracies() -> None:
    results = [result_of("copa", 0.5, 75, 100), result_of("squad", 0.0, 10, 100)]
    errors = [math.sqrt(0.75 * 0.25 / 99), math.sqrt(0.1 * 0.9 / 99)]
    assert [result.score for result in results] == [
        (0.75, pytest.approx(errors[0])),
        (0.1, pytest.approx(errors[1])),
    ]
    name, score = core_score(results)
    assert (name, score.value) == ("CORE (2 of 22)", pytest.approx((0.5 + 0.1) / 2))
    assert score.stderr == pytest.approx(math.hypot(errors[0] / 0.5, errors[1]) / 2)
    all_of_them = [result_of(label, 0.25, 1, 1) for label in CORE_TASKS]
    assert core_score(all_of_them) == ("CORE", (pytest.approx(1.0), 0.0))
    assert core_score(all_of_them[1:])[0] == "CORE (21 of 22)"
