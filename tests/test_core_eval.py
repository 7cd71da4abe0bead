"""CORE and bits per byte against evaluators written from their definitions; the bundle of CORE.

CORE's oracle reads one document at a time, all logits, nothing shared. Both see the same tasks of
all three kinds, with prompts that fit and prompts that do not, on a model of random weights and on
one that has learned some of the documents by heart.
"""

import json
import math
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import core_eval
from nanochat.common import base_dir
from nanochat.core_eval import (
    CORE_TASKS,
    CoreTask,
    GPTReader,
    centered_score,
    evaluate,
    find_bundle,
    load_tasks,
    mean_score,
    source_bpb,
)
from nanochat.dataloader import Batch, ChatSource, Loader
from nanochat.gpt import GPT
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from tests.launch import on_ranks
from tests.models import CPU, busy_gpt, memorise, random_gpt, refuses

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
        choices, query = words.sample(COLOURS, words.randint(2, 4)), f"{word()} is{end}"
        return {"query": query, "choices": choices, "gold": words.randrange(len(choices))}

    def schema(_: str) -> dict[str, Any]:
        options, end = [f"the {word()}", f"the {word()} sky"], f"is {word()}."
        return {"context_options": options, "continuation": end, "gold": words.randrange(2)}

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
Records = dict[str, list[dict[str, Any]]]


def slow_documents(task: CoreTask, number: int) -> tuple[list[list[int]], list[int]]:
    """(cropped ids of each option, how many at the end are scored), from the definitions."""
    others = [row for i, row in enumerate(task.rows) if i != number]
    shots = random.Random(1234 + number).sample(others, task.num_fewshot)

    def texts(row: dict[str, Any]) -> list[str]:
        if task.kind == "multiple_choice":
            return [row["query"] + task.delimiter + choice for choice in row["choices"]]
        if task.kind == "schema":
            end = task.delimiter + row["continuation"]
            return [option + end for option in row["context_options"]]
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
        while len({tuple(own[: same + 1]) for own in compared}) == 1 and same < len(compared[0]):
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


def random_model() -> GPT:
    return busy_gpt(random_gpt(CONTEXT, TOKENIZER.vocab_size).config)


def memorising_model() -> GPT:
    """Has read the right documents of the first items of every task until it knew them."""
    model = random_model()
    rows = []
    for task in TASKS:
        for number in range(NUM_KNOWN):
            documents, _ = slow_documents(task, number)
            rows.append(documents[task.rows[number].get("gold", 0)])
    memorise(model, rows, [[1] * len(row) for row in rows], steps=45)
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, GPT]:
    return {"random": random_model(), "memorising": memorising_model()}


@pytest.fixture(scope="module")
def expected(models: dict[str, GPT]) -> Records:
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
    return [record for task in TASKS for record in evaluate(reader, task, batch_size, None)]


@pytest.mark.parametrize("batch_size", [1, 32])
@pytest.mark.parametrize("name", ["random", "memorising"])
def test_equals_the_slow_evaluator(
    models: dict[str, GPT], expected: Records, name: str, batch_size: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(core_eval, "CPU_CHUNK", 11)  # so that prefixes take several steps
    monkeypatch.setattr(core_eval, "CPU_TOKENS", 40)
    assert_same(all_records(models[name], batch_size), expected[name])


def test_the_comparison_means_something(expected: Records) -> None:
    """What was learned by heart is right, of every kind; the random model gets some wrong."""
    for name, least in (("random", 0), ("memorising", NUM_KNOWN)):
        for task in TASKS:
            known = [record for record in expected[name] if record["task"] == task.label]
            assert sum(record["correct"] for record in known[:NUM_KNOWN]) >= least
    assert not all(record["correct"] for record in expected["random"])
    lengths = [max(map(len, slow_documents(task, 0)[0])) for task in TASKS]
    assert lengths[0] == CONTEXT and all(length < CONTEXT for length in lengths[1:])


def run_rank(rank: int, folder: Path) -> None:
    records = all_records(random_model(), batch_size=4)
    (folder / f"{rank}.json").write_text(json.dumps(records))


def test_two_ranks_find_what_one_does(expected: Records, tmp_path: Path) -> None:
    on_ranks(2, tmp_path, run_rank, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert_same(first, expected["random"])


@pytest.fixture
def reader(models: dict[str, GPT]) -> GPTReader:
    return GPTReader(models["random"], TOKENIZER, 4)


def test_examples_are_other_rows_of_the_whole_set_solved(reader: GPTReader) -> None:
    """Lessons of other ports: never the item itself, and drawn beyond the items kept."""
    texts = []
    encode = reader.encode
    reader.encode = lambda text: texts.append(text) or encode(text)
    rows = [
        {"query": f"<{i}>", "choices": ["no", f"yes{i}"], "gold": 1, "id": i} for i in range(12)
    ]
    task = CoreTask("piqa", "multiple_choice", rows, 0.5, 10, "\nAnswer: ")
    evaluate(reader, task, 4, None)
    drawn = set()
    for number, document in enumerate(texts[::2]):
        *shots, item = document.split("\n\n")
        assert item == f"<{number}>\nAnswer: no"
        numbers = [int(shot[1 : shot.index(">")]) for shot in shots]
        assert shots == [f"<{i}>\nAnswer: yes{i}" for i in numbers]
        assert len(set(numbers)) == 10 and number not in numbers
        drawn.add(tuple(numbers))
    assert len(drawn) == 12
    first = texts[:2]
    texts.clear()
    evaluate(reader, task, 4, max_items=1)
    assert texts == first


def test_options_longer_than_the_context(reader: GPTReader) -> None:
    """A choice too long by itself keeps its end behind bos; a short one loses the prompt, but not
    itself.
    """
    rows = [{"query": "q " * 40, "choices": ["xyz" * 40, "abc", "a"], "gold": 1, "id": 1}]
    task = CoreTask("copa", "multiple_choice", rows, 0.5)
    item = core_eval.encode_item(reader, task, 0)
    texts = [TOKENIZER.decode((item.prefix + tail)[1:]) for tail in item.tails]
    assert texts == [("xyz" * 40)[-63:], "abc", "a"] and item.num_scored == [63, 3, 1]
    assert all((item.prefix + tail)[0] == TOKENIZER.bos_id for tail in item.tails)
    [record] = evaluate(reader, task, 4, None)
    assert all(loss is not None and loss < 20 for loss in record["losses"])


def test_options_without_tokens_of_their_own(reader: GPTReader) -> None:
    rows = [{"query": "a", "choices": ["b", "b c"], "gold": 1, "id": 1}]
    [record] = evaluate(reader, CoreTask("copa", "multiple_choice", rows, 0.5), 4, None)
    assert record["losses"][0] is None and record["prediction"] == 1 and record["correct"]
    rows = [{"context": "a", "continuation": "", "id": 1}]
    task = CoreTask("squad", "language_modeling", rows, 0.0, delimiter="")
    [record] = evaluate(reader, task, 4, None)
    assert record["losses"] == [None] and not record["correct"]


def test_core_is_the_mean_of_centered_accuracies() -> None:
    scores = [mean_score([{"correct": i < num} for i in range(100)]) for num in (75, 10)]
    errors = [math.sqrt(0.75 * 0.25 / 99), math.sqrt(0.1 * 0.9 / 99)]
    assert scores == [(0.75, pytest.approx(errors[0])), (0.1, pytest.approx(errors[1]))]
    name, score = centered_score("CORE", 22, list(zip(scores, [0.5, 0.0], strict=True)))
    assert (name, score.value) == ("CORE (2 of 22)", pytest.approx((0.5 + 0.1) / 2))
    assert score.stderr == pytest.approx(math.hypot(errors[0] / 0.5, errors[1]) / 2)
    right = mean_score([{"correct": True}])
    assert centered_score("CORE", 2, [(right, 0.25)] * 2) == ("CORE", (1.0, 0.0))


# Bits per byte


@torch.inference_mode()
def slow_bpb(model: GPT, batches: list[Batch]) -> float:
    """From the full logits, one target at a time; specials and targets of -1 do not count."""
    nats, num_bytes = 0.0, 0
    for batch in batches:
        probabilities = model(batch.inputs).double().log_softmax(-1)
        for row, targets in enumerate(batch.targets.tolist()):
            for time, target in enumerate(targets):
                if 0 <= target < len(TOKENS):
                    nats -= float(probabilities[row, time, target])
                    num_bytes += len(TOKENS[target])
    return nats / math.log(2) / num_bytes


def test_bits_per_byte_equal_the_slow_sum() -> None:
    model = random_gpt(16, TOKENIZER.vocab_size, head_std=0.5)
    asked = {"role": "user", "content": "the sky?"}
    told = [{"role": "assistant", "content": reply} for reply in ("the blue", "é", "")]
    talk = ChatSource(TOKENIZER, [{"messages": [asked, reply]} for reply in told], num_epochs=None)
    loader = Loader(talk, 3, 16, CPU)
    batches = [next(loader) for _ in range(3)]
    loader.close()
    for num_steps, rows in ((3, 2), (2, 100)):
        num_tokens = num_steps * 3 * 16 + 5  # only whole steps count
        found = source_bpb(model, talk, CPU, num_tokens, rows, num_rows=3, seq_len=16)
        assert found == pytest.approx(slow_bpb(model, batches[:num_steps]), rel=1e-5)
    nothing = ChatSource(TOKENIZER, [{"messages": [asked]}], num_epochs=None)
    assert source_bpb(model, nothing, CPU, 1, 9, num_rows=3, seq_len=16) == math.inf


# The bundle: where it is found, how it is downloaded, what is read of it, and what is refused.

ROWS: dict[str, list[dict[str, Any]]] = {
    "deep/copa.jsonl": [
        {"query": f"It is {i}, so", "choices": ["it rains.", "we go."], "gold": i % 2}
        for i in range(9)
    ],
    "winograd.jsonl": [
        {"context_options": ["the cat", "the mat"], "continuation": f"is {i}.", "gold": 0}
        for i in range(5)
    ],
    "lambada.jsonl": [
        {"context": f"I have {i} and", "continuation": f"{i}", "gold": "more", "category": "x"}
        for i in range(4)
    ],
}
INDEX = """
icl_tasks:
- {label: copa, dataset_uri: deep/copa.jsonl, num_fewshot: [2], icl_task_type: multiple_choice}
- {label: winograd, dataset_uri: winograd.jsonl, num_fewshot: 0, icl_task_type: schema}
- label: lambada_openai
  dataset_uri: lambada.jsonl
  num_fewshot: [3]
  icl_task_type: language_modeling
  continuation_delimiter: "\\nAnswer: "
- {label: squad, dataset_uri: nowhere.jsonl, num_fewshot: [0], icl_task_type: language_modeling}
- {label: mine, dataset_uri: winograd.jsonl, num_fewshot: [0], icl_task_type: schema}
"""
BASELINES = """Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline
copa,reasoning,multiple_choice,2,9,50.0
winograd,understanding,schema,0,5,50.0
lambada_openai,understanding,language_modeling,3,4,0
squad,comprehension,language_modeling,0,1,0
mine,own,schema,0,5,50
"""


def write_bundle(folder: Path) -> Path:
    """A bundle with three tasks of CORE, one without its file, and one that is none of CORE."""
    for name, rows in ROWS.items():
        path = folder / "eval_data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "core.yaml").write_text(INDEX)
    (folder / "eval_meta_data.csv").write_text(BASELINES)
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOCHAT_EVAL_BUNDLE", raising=False)
    monkeypatch.setattr(core_eval, "URL", "http://127.0.0.1:9/eval_bundle.zip")  # nobody is there


def test_tasks_are_read_and_missing_ones_named(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {task.label: task for task in load_tasks(bundle)}
    assert list(tasks) == ["copa", "lambada_openai", "winograd"]  # in the order of CORE
    copa, lambada, winograd = tasks.values()
    assert (copa.kind, copa.baseline, copa.num_fewshot) == ("multiple_choice", 0.5, 2)
    assert (winograd.kind, winograd.num_fewshot, winograd.delimiter) == ("schema", 0, " ")
    assert (lambada.delimiter, lambada.baseline) == ("\nAnswer: ", 0.0)
    order = list(range(9))
    random.Random(1337).shuffle(order)
    assert copa.rows == [{**ROWS["deep/copa.jsonl"][i], "id": i + 1} for i in order]
    assert lambada.rows[0].keys() == {"context", "continuation", "id"}
    [line] = capsys.readouterr().out.splitlines()
    assert set(CORE_TASKS) - set(tasks) == set(line.split(" has no data of ")[1].split(", "))
    assert [task.label for task in load_tasks(bundle, ["winograd"])] == ["winograd"]
    assert capsys.readouterr().out == ""
    refuses("'mine' is unknown", load_tasks, bundle, ["mine"])
    refuses("no data of any task", load_tasks, bundle, ["squad", "coqa"])


def test_a_malformed_bundle_is_refused(bundle: Path) -> None:
    for name, old, new in (
        ("core.yaml", "icl_tasks:", "tasks:"),
        ("core.yaml", "icl_tasks:", "icl_tasks: ["),
        ("core.yaml", INDEX, "icl_tasks: 3"),
        ("core.yaml", "num_fewshot: [2]", "num_fewshot: []"),
        ("core.yaml", "icl_task_type: schema", "icl_task_type: riddle"),
        ("eval_meta_data.csv", "Random baseline", "Baseline"),
        ("eval_meta_data.csv", "9,50.0", "9,100"),
        ("eval_meta_data.csv", "9,50.0", "9,half"),
        ("eval_meta_data.csv", "copa", "coma"),
        ("eval_data/winograd.jsonl", "", None),
        ("eval_data/winograd.jsonl", '{"context_options"', '{"query"'),
        ("eval_data/winograd.jsonl", "}", ""),
        ("eval_data/winograd.jsonl", '"gold": 0', '"gold": 2'),
        ("eval_data/winograd.jsonl", '"gold": 0', '"gold": -1'),
        ("eval_data/winograd.jsonl", '"context_options": [', '"context_options": 3, "x": ['),
        ("eval_data/winograd.jsonl", json.dumps(ROWS["winograd.jsonl"][1]), "7"),
        ("eval_data/lambada.jsonl", json.dumps(ROWS["lambada.jsonl"][3]), ""),  # 3 rows, 3 examples
    ):
        text = (bundle / name).read_text()
        (bundle / name).write_text("" if new is None else text.replace(old, new))
        refuses(Path(name).name, load_tasks, bundle)
        (bundle / name).write_text(text)


def test_where_the_bundle_is_found(
    base: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_bundle(str(bundle)) == bundle
    refuses("--eval_bundle", find_bundle, str(tmp_path / "nowhere"))
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE", str(bundle))
    assert find_bundle() == bundle
    assert find_bundle(str(write_bundle(tmp_path / "other"))) == tmp_path / "other"
    monkeypatch.delenv("NANOCHAT_EVAL_BUNDLE")
    own = write_bundle(base_dir() / "eval_bundle")
    assert find_bundle() == own
    (own / "core.yaml").unlink()
    refuses("no core.yaml", find_bundle)


def zip_bundle(bundle: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(bundle.rglob("*.*")):
            file.write(path, f"eval_bundle/{path.relative_to(bundle)}")
        file.writestr("../outside.txt", "stays inside")


def test_download_once(
    base: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zip_bundle(bundle, tmp_path / "it.zip")
    monkeypatch.setattr(core_eval, "URL", (tmp_path / "it.zip").as_uri())
    folder = find_bundle()
    assert folder == base / "eval_bundle" and len(load_tasks(folder)) == 3
    assert [path.name for path in base.iterdir()] == ["eval_bundle"]
    assert not list(tmp_path.rglob("outside.txt"))
    (tmp_path / "it.zip").unlink()
    assert find_bundle() == folder


def test_a_failed_download_leaves_nothing(
    base: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses("--eval_bundle", find_bundle)  # no network
    archive = tmp_path / "it.zip"
    zip_bundle(bundle, archive)
    monkeypatch.setattr(core_eval, "URL", archive.as_uri())
    whole = archive.read_bytes()
    flipped = whole[:80] + bytes(byte ^ 255 for byte in whole[80:120]) + whole[120:]
    page, empty = b"<html>Sign in to this network</html>", b"PK\x05\x06" + bytes(18)
    for data in (whole[: len(whole) // 2], flipped, page, empty):
        archive.write_bytes(data)
        refuses("--eval_bundle", find_bundle)
        assert not list(base.iterdir())
    archive.unlink()
    refuses("--eval_bundle", find_bundle)
    assert not list(base.iterdir())
