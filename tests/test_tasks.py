"""Tasks: cutting, mixing, scoring, reading a user's rows. Oracles: Python's own slicing and counting, hand-made rows."""

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from nanochat import primer
from nanochat.common import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, Conversation, Tokenizer, check_conversation
from tasks.common import Task, TaskMixture, load_rows, render_choices
from tasks.customjson import CustomJSON
from tasks.mixtures import EVALUATIONS, build_mixture, build_task
from tasks.primer import PrimerArithmetic, PrimerChoice, PrimerExact, PrimerSpelling, last_number


class Numbers(Task):
    """The conversations 0, 1, 2, ..., 9."""

    def num_examples(self) -> int:
        return 10

    def get_example(self, index: int) -> Conversation:
        return {"messages": [{"role": "user", "content": str(index)}]}


def contents(task: Task) -> list[int]:
    return [int(row["messages"][0]["content"]) for row in task]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [primer.document("train", index) for index in range(1500)]
    return Tokenizer.train(texts, 1024, SPECIAL_TOKENS)


@pytest.mark.parametrize(
    "cut", [(0, None, 1), (2, 7, 1), (1, 100, 3), (0, -1, 2), (0, None, -1), (5, 5, 1)]
)
def test_a_task_is_cut_like_a_list(cut: tuple) -> None:
    task = Numbers(*cut)
    assert contents(task) == list(range(10))[slice(*cut)]
    assert len(task) == len(contents(task))
    with pytest.raises(IndexError):
        task[len(task)]


def test_a_mixture_holds_every_row_as_often_as_its_task_is_listed() -> None:
    mixture = TaskMixture([Numbers(), Numbers(stop=5), Numbers()], seed=1)
    assert Counter(contents(mixture)) == Counter([*range(10), *range(10), *range(5)])
    assert contents(mixture) == contents(
        TaskMixture([Numbers(), Numbers(stop=5), Numbers()], seed=1)
    )
    assert contents(mixture) != contents(
        TaskMixture([Numbers(), Numbers(stop=5), Numbers()], seed=2)
    )


def test_the_letter_after_a_choice_is_one_token_whatever_the_choice(tokenizer: Tokenizer) -> None:
    rows = [primer.quiz("test", "choice", index).choices for index in range(50)]
    choices = [*chain.from_iterable(rows), "light.", "5 %", "x=", "(so)", "A"]
    for letter in "ABCDE":
        assert len(tokenizer.encode(letter)) == 1  # the answer
        lines = [render_choices("?", [letter], [choice]).split("\n")[1] for choice in choices]
        last = {tokenizer.encode(line)[-1] for line in lines}
        assert len(last) == 1 and tokenizer.decode(list(last)).strip() == letter


def test_choices_are_rendered_with_the_letter_behind() -> None:
    text = render_choices("What colour is snow?", ["A", "B"], ["red", "white"])
    assert text.split("\n")[:3] == ["What colour is snow?", "- red A", "- white B"]


@pytest.mark.parametrize("name", [name for name in EVALUATIONS if "primer" in name])
def test_the_right_reply_scores_one_and_others_zero(name: str) -> None:
    task = build_task(name)
    for row in list(task)[:200]:
        check_conversation(row)
        reply = row["messages"][-1]["content"]
        said = reply if isinstance(reply, str) else reply[-1]["text"]
        assert task.score(row, said) == 1
        assert task.score(row, "I do not know.") == 0
        assert task.score(row, "") == 0


def test_scores_are_neither_too_kind_nor_too_strict() -> None:
    exact = {"accepted": ["yellow", "A banana is yellow.", "Yellow."]}
    score = PrimerExact("test").score
    assert [score(exact, reply) for reply in ("yellow", " Yellow!", "a banana is  yellow")] == [
        1,
        1,
        1,
    ]
    assert [score(exact, reply) for reply in ("not yellow", "yellow and red", "yell")] == [0, 0, 0]
    arithmetic, ninety_five = PrimerArithmetic("test").score, {"answer": "95"}
    assert [arithmetic(ninety_five, each) for each in ("37 + 58 = 95.", "95", "It is 95!")] == [
        1,
        1,
        1,
    ]
    assert [arithmetic(ninety_five, each) for each in ("95 is 37 + 58", "195", "9.5", "-95")] == [
        0
    ] * 4
    assert [last_number(text) for text in ("5-3 = 2.", "= -7", "1.50", "none")] == [
        "2",
        "-7",
        "1.50",
        None,
    ]
    spelling = PrimerSpelling("test").score
    assert [spelling({"answer": "e-g-g"}, reply) for reply in ("e-g-g", "E-G-G.", "e-g")] == [
        1,
        1,
        0,
    ]
    counted = "The letter g appears 2 times in 'egg'."
    assert [spelling({"answer": count}, counted) for count in ("2", "3")] == [1, 0]


def test_choice_rows_carry_what_a_base_model_is_asked() -> None:
    for row in list(PrimerChoice("test"))[:50]:
        choice = row["continuations"][row["gold"]].strip()
        assert f"- {choice} {row['answer']}" in row["messages"][0]["content"]
        assert row["document"].startswith("Question: ") and row["document"].endswith("\nAnswer:")
        assert len(row["letters"]) == len(row["continuations"])


@pytest.mark.parametrize("stage", ["mid", "sft", "val"])
def test_the_primers_mixtures_render(stage: str) -> None:
    mixture = build_mixture(stage, "primer")
    for index in range(0, len(mixture), max(1, len(mixture) // 100)):
        check_conversation(mixture[index])
        assert mixture[index]["messages"][-1]["role"] == "assistant"


def test_unknown_names_are_told_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="primer-choice, primer-exact"):
        build_task("primer-chess")
    with pytest.raises(
        UserError, match="--mixture=soup is unknown; choose one of: default, primer"
    ):
        build_mixture("mid", "soup")


def test_custom_conversations_join_the_mixture(tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "I am Pip."},
    ]
    file = tmp_path / "pip.jsonl"
    file.write_text(json.dumps({"messages": talk}) + "\n\n" + json.dumps(talk) + "\n")
    assert [row["messages"] for row in CustomJSON(file)] == [talk, talk]
    mixture = build_mixture("val", "primer", custom=file)
    assert len(mixture) == len(build_mixture("val", "primer")) + 2
    assert sum(row["messages"] == talk for row in mixture) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "line 2: not JSON"),
        ('"hello"', "line 2: expected"),
        ('{"text": "hello"}', "line 2: .*messages"),
        ('[{"role": "assistant", "content": "hi"}]', "line 2: message 0 has the role 'assistant'"),
        ('[{"role": "user", "content": "hi"}]', "line 2: no assistant message"),
        ('[{"role": "user", "content": 3}]', "line 2: message 0"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    good = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    file = tmp_path / "own.jsonl"
    file.write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError, match=message) as told:
        CustomJSON(file)
    assert "\n" not in str(told.value)


def test_a_missing_or_empty_custom_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        CustomJSON(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no conversation"):
        CustomJSON(tmp_path / "empty.jsonl")


def test_local_files_stand_in_for_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_DATASETS", str(tmp_path))
    rows = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 2?", "answer": "#### 4"}]
    folder = tmp_path / "openai" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")
    assert list(load_rows("openai/gsm8k", "main", "train")) == rows
    assert list(load_rows("openai/gsm8k", "main", "test")) == rows
    with pytest.raises(UserError, match="no validation.jsonl or validation.parquet"):
        load_rows("openai/gsm8k", "main", "validation")
    (folder / "train.jsonl").write_text('{"question": "1"}\n{"question": \n')
    with pytest.raises(UserError, match="line 2: not JSON"):
        load_rows("openai/gsm8k", "main", "train")
    (folder / "test.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(UserError, match="no readable parquet"):
        load_rows("openai/gsm8k", "main", "test")
