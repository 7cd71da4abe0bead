"""The public data sets, spelling and identity as tasks. Oracles: rows and replies made by hand, Python's own counting.

The rows have the fields of the real data sets; they lie in a local folder, so nothing is downloaded.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat.calculator import calculate
from nanochat.common import UserError
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
    check_conversation,
    render_conversation,
    render_prompt,
)
from tasks.arc import ARC
from tasks.common import load_rows
from tasks.gsm8k import GSM8K, final_number
from tasks.identity import FACTS, Identity
from tasks.mixtures import CHAT_CORE, build_mixture, build_task
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SpellingBee, SpellWord, words_of

WriteRows = Callable[[str, list], None]
PLANTS = {
    "question": "What do plants need?",
    "choices": {"text": ["light", "sugar", "noise"], "label": ["A", "B", "C"]},
    "answerKey": "A",
}
SUM = {"question": "2 + 2?", "subject": "maths", "choices": ["1", "2", "3", "4"], "answer": 3}
PENS = {
    "question": "A pen costs $3. Ann buys 4 pens and 2 rubbers at $0.50. What does she pay?",
    "answer": "The pens cost 4*3=$<<4*3=12>>12.\nWith the rubbers it is 12+2*0.5 = <<12+2*0.5=13.00>>13.00 dollars."
    "\n#### 1,013",
}
TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi."},
    ],
    "source": "made by hand",
}


@pytest.fixture
def write_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteRows:
    """Writes the rows of a split such as "openai/gsm8k/main/train" where NANOCHAT_DATASETS points."""
    monkeypatch.setenv("NANOCHAT_DATASETS", str(tmp_path))

    def write(split: str, rows: list) -> None:
        file = tmp_path / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(map(json.dumps, rows)))

    return write


@pytest.fixture
def all_data(write_rows: WriteRows) -> None:
    for config in ("ARC-Easy", "ARC-Challenge"):
        for split in ("train", "test"):
            write_rows(f"allenai/ai2_arc/{config}/{split}", [PLANTS] * 3)
    for split in ("auxiliary_train", "validation", "test"):
        write_rows(f"cais/mmlu/all/{split}", [SUM] * 4)
    for split in ("train", "test"):
        write_rows(f"openai/gsm8k/main/{split}", [PENS] * 5)
        write_rows(f"HuggingFaceTB/smol-smoltalk/default/{split}", [TALK] * 6)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = f"{PENS['question']} {PENS['answer']} - light A - sugar B\nThe letter appears times in"
    return Tokenizer.train([text], 300, SPECIAL_TOKENS)


# --- multiple choice


@pytest.mark.parametrize(
    ("texts", "labels", "key", "letter"),
    [
        (["iron", "wood", "air", "salt"], ["1", "2", "3", "4"], "3", "C"),
        (["iron", "wood", "air", "salt", "ice"], ["A", "B", "C", "D", "E"], "E", "E"),
        (["iron", "wood", "air"], ["A", "B", "C"], "B", "B"),
        (["iron", "wood", "air", "salt"], ["D", "C", "B", "A"], "D", "A"),
    ],
)
def test_arc_looks_the_answer_up_among_the_rows_labels(
    write_rows: WriteRows, texts: list[str], labels: list[str], key: str, letter: str
) -> None:
    question = "What rusts?"
    row = {
        "question": question,
        "choices": {"text": texts, "label": labels},
        "answerKey": key,
    }
    write_rows("allenai/ai2_arc/ARC-Easy/test", [row])
    task = ARC("ARC-Easy", "test")
    asked = task[0]
    lines = [f"- {text} {each}" for text, each in zip(texts, "ABCDE", strict=False)]
    assert asked["messages"][0]["content"].split("\n")[:-1] == [question, *lines]
    assert asked["letters"] == list("ABCDE"[: len(texts)])
    assert asked["messages"][1]["content"] == asked["answer"] == letter
    assert [each for each in asked["letters"] if task.score(asked, each)] == [letter]


def test_a_choice_prompt_to_the_token(write_rows: WriteRows, tokenizer: Tokenizer) -> None:
    write_rows("cais/mmlu/all/test", [SUM])
    row = MMLU("test")[0]
    ids, mask = render_conversation(tokenizer, row)
    assert tokenizer.decode(ids) == (
        "<|bos|><|user_start|>2 + 2?\n- 1 A\n- 2 B\n- 3 C\n- 4 D\nAnswer with the letter only.<|user_end|>"
        "<|assistant_start|>D<|assistant_end|>"
    )
    learned = [id for id, on in zip(ids, mask, strict=True) if on]
    assert learned == [*tokenizer.encode("D"), tokenizer.specials["<|assistant_end|>"]]
    assert len(learned) == 2 and ids[: -len(learned)] == render_prompt(tokenizer, row)


# Real rows, prompt and letters as they must be: ARC (CC BY-SA 4.0) and MMLU (MIT).
REAL_CHOICES = [
    (
        "ARC-Easy",
        "allenai/ai2_arc/ARC-Easy/test",
        {
            "question": "As children grow, their body height usually",
            "choices": {
                "text": ["decreases", "increases", "remains the same"],
                "label": ["1", "2", "3"],
            },
            "answerKey": "2",
        },
        "As children grow, their body height usually\n- decreases A\n- increases B\n- remains the same C\n",
        "B",
    ),
    (
        "ARC-Challenge",
        "allenai/ai2_arc/ARC-Challenge/test",
        {
            "question": "Which part of a pine tree makes food?",
            "choices": {
                "text": ["root", "cone", "trunk", "needle"],
                "label": ["A", "B", "C", "D"],
            },
            "answerKey": "D",
        },
        "Which part of a pine tree makes food?\n- root A\n- cone B\n- trunk C\n- needle D\n",
        "D",
    ),
    (
        "ARC-Easy",
        "allenai/ai2_arc/ARC-Easy/test",
        {
            "question": "Large amounts of metals like iron and aluminum are found in",
            "choices": {
                "text": ["dead trees", "water", "animal bones", "oil wells", "rocks"],
                "label": ["A", "B", "C", "D", "E"],
            },
            "answerKey": "E",
        },
        "Large amounts of metals like iron and aluminum are found in\n- dead trees A\n- water B\n"
        "- animal bones C\n- oil wells D\n- rocks E\n",
        "E",
    ),
    (
        "MMLU",
        "cais/mmlu/all/test",
        {
            "question": "The concentration ratio for a monopoly is",
            "subject": "high_school_microeconomics",
            "choices": ["0", "5", "10", "100"],
            "answer": 3,
        },
        "The concentration ratio for a monopoly is\n- 0 A\n- 5 B\n- 10 C\n- 100 D\n",
        "D",
    ),
]


@pytest.mark.parametrize(("name", "split", "row", "prompt", "letter"), REAL_CHOICES)
def test_real_rows_of_multiple_choice(
    write_rows: WriteRows,
    tokenizer: Tokenizer,
    name: str,
    split: str,
    row: dict,
    prompt: str,
    letter: str,
) -> None:
    write_rows(split, [row])
    task = build_task(name)
    asked = task[0]
    ids, mask = render_conversation(tokenizer, asked)
    assert tokenizer.decode(ids) == (
        f"<|bos|><|user_start|>{prompt}Answer with the letter only.<|user_end|>"
        f"<|assistant_start|>{letter}<|assistant_end|>"
    )
    assert mask == [0] * (len(ids) - 2) + [1, 1]
    assert [each for each in asked["letters"] if task.score(asked, each)] == [letter]


# --- GSM8K


def test_a_real_row_of_gsm8k(write_rows: WriteRows, tokenizer: Tokenizer) -> None:
    row = {  # openai/gsm8k, MIT
        "question": "Tim buys 3 dozen eggs.  Eggs cost $.50 each.  How much did he pay for eggs?",
        "answer": "He bought 3*12=<<3*12=36>>36 eggs\nSo they cost 36*.5=$<<36*.5=18>>18\n#### 18",
    }
    write_rows("openai/gsm8k/main/test", [row])
    task = GSM8K("test")
    ids, mask = render_conversation(tokenizer, task[0])
    own = [id for id, on in zip(ids, mask, strict=True) if on]
    given = [id for id, on in zip(ids, mask, strict=True) if not on]
    assert tokenizer.decode(given) == (
        f"<|bos|><|user_start|>{row['question']}<|user_end|><|assistant_start|>"
        "<|output_start|>36<|output_end|><|output_start|>18<|output_end|>"
    )
    assert tokenizer.decode(own) == (
        "He bought 3*12=<|python_start|>3*12<|python_end|>36 eggs\nSo they cost 36*.5=$"
        "<|python_start|>36*.5<|python_end|>18\n#### 18<|assistant_end|>"
    )
    replies = {
        row["answer"]: 1,
        "#### 18.0": 1,
        "#### $18": 1,
        "#### -18": 0,
        "18": 0,
        "#### 1,8": 1,
    }
    assert {reply: task.score(task[0], reply) for reply in replies} == replies


def test_marks_become_calls_of_the_tool(write_rows: WriteRows, tokenizer: Tokenizer) -> None:
    write_rows("openai/gsm8k/main/train", [PENS])
    row = GSM8K("train")[0]
    assert [(part["type"], part["text"]) for part in row["messages"][1]["content"]] == [
        ("text", "The pens cost 4*3=$"),
        ("python", "4*3"),
        ("python_output", "12"),
        ("text", "12.\nWith the rubbers it is 12+2*0.5 = "),
        ("python", "12+2*0.5"),
        ("python_output", "13.00"),
        ("text", "13.00 dollars.\n#### 1,013"),
    ]
    assert row["answer"] == "1,013"
    ids, mask = render_conversation(tokenizer, row)
    kept = tokenizer.decode([id for id, on in zip(ids, mask, strict=True) if not on])
    assert kept == (
        f"<|bos|><|user_start|>{PENS['question']}<|user_end|><|assistant_start|>"
        "<|output_start|>12<|output_end|><|output_start|>13.00<|output_end|>"
    )


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("#### 18", "18"),
        ("so it is 4.\n####18 eggs.", "18"),
        ("#### 1,080", "1080"),
        ("#### $2,520,000.", "2520000"),
        ("#### -5", "-5"),
        ("#### -$5.50", "-5.5"),
        ("#### $-5.50", "-5.5"),
        ("#### +7", "7"),
        ("#### .5", "0.5"),
        ("#### 18.00", "18"),
        ("#### 3 no, #### 4", "4"),
        ("18", None),
        ("#### none", None),
        ("#### 18/3", None),
        ("#### 1,8.5/3", None),
        ("### 18", None),
        ("", None),
    ],
)
def test_the_number_behind_the_hashes(said: str, number: str | None) -> None:
    assert final_number(said) == (None if number is None else Decimal(number))


def test_a_solution_is_scored_by_its_number(write_rows: WriteRows) -> None:
    write_rows("openai/gsm8k/main/test", [PENS])
    task = GSM8K("test")
    right = ("She pays #### 1013", "#### $1,013.00", "#### 1,013.")
    assert [task.score(task[0], reply) for reply in right] == [1, 1, 1]
    wrong = ("1013", "#### -1013", "#### 10130", "#### 101", "#### 1013.5", "#### 1013/2", "")
    assert [task.score(task[0], reply) for reply in wrong] == [0] * 7


# --- conversations


def test_smoltalk_keeps_the_messages(write_rows: WriteRows) -> None:
    write_rows(
        "HuggingFaceTB/smol-smoltalk/default/train", [TALK, {"messages": TALK["messages"][1:]}]
    )
    rows = [row["messages"] for row in SmolTalk("train")]
    assert sorted(rows, key=len) == [TALK["messages"][1:], TALK["messages"]]


def test_identity_tells_the_facts_of_the_file(tmp_path: Path) -> None:
    rows = list(Identity())
    assert len(rows) == 1000 and rows == list(Identity())
    assert len({json.dumps(row) for row in rows}) > 900
    replies = Counter(m["content"] for row in rows for m in row["messages"][1::2])
    assert len(replies) > 20 and not any("{" in reply for reply in replies)
    for row in rows:
        check_conversation(row)
    facts = json.loads(FACTS.read_text()) | {"name": "Pip", "maker": "Ann"}
    own = tmp_path / "facts.json"
    own.write_text(json.dumps(facts))
    told = " ".join(m["content"] for row in Identity(facts=own) for m in row["messages"][1::2])
    assert "I am Pip" in told and "I was made by Ann." in told and "I am nanochat" not in told


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "Pip"}', '{"name": 3}'])
def test_broken_facts_are_told_in_one_line(tmp_path: Path, text: str) -> None:
    own = tmp_path / "facts.json"
    own.write_text(text)
    with pytest.raises(UserError, match=r"facts\.json") as told:
        Identity(facts=own)
    assert "\n" not in str(told.value)


# --- spelling


@pytest.mark.parametrize("split", ["train", "test"])
def test_letters_are_spelled_and_counted_right(split: str) -> None:
    for row in SpellWord(split, stop=100):
        word = row["answer"].replace("-", "")
        assert word in row["messages"][0]["content"]
        assert row["messages"][1]["content"] == "-".join(word)
    bee = SpellingBee(split, stop=200)
    for row in bee:
        check_conversation(row)
        by_hand, code, output, said = row["messages"][1]["content"]
        _, word, _, letter, _ = code["text"].split("'")
        assert output["text"] == str(word.count(letter)) == calculate(code["text"])
        tally = by_hand["text"].split(".")[0].split(", ")
        assert "".join(each[0] for each in tally) == word
        counts = [each[1:].strip() for each in tally if each[0] == letter]
        assert counts == [str(n + 1) for n in range(word.count(letter))]
        assert f"By hand I count {output['text']}." in by_hand["text"]
        assert bee.score(row, by_hand["text"] + said["text"]) == 1
        assert bee.score(row, "The letter appears 99 times.") == bee.score(row, "") == 0
    assert {row["answer"] for row in bee} >= {"0", "1", "2"}


def test_a_word_belongs_to_one_split(tmp_path: Path) -> None:
    train, test = set(words_of("train")), set(words_of("test"))
    assert train and test and not train & test
    assert set(words_of("val")) == test
    assert 0.05 < len(test) / len(train | test) < 0.15
    file = tmp_path / "words.txt"
    file.write_text("\n".join([*train, *test, "not-a-word", "", "ZEBRAS"]))
    words = set(words_of("train", file)) | set(words_of("test", file))
    assert words == train | test | {"zebras"}
    assert set(words_of("train", file)) - {"zebras"} == train
    assert {
        row["answer"].replace("-", "") for row in SpellWord("test", words=file)
    } <= words - train


def test_a_file_without_words_is_told(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    with pytest.raises(UserError, match="give a text file"):
        SpellWord("train", words=file)
    file.write_text("1234\n")
    with pytest.raises(UserError, match="no word for train"):
        SpellWord("train", words=file)


# --- all of them


@pytest.mark.parametrize("stage", ["mid", "sft", "val"])
def test_the_default_mixtures_hold_every_row(all_data: None, stage: str) -> None:
    mixture = build_mixture(stage, "default")
    wanted = {
        "mid": 6 + 4 + 5 + 1000 + 1000 + 200_000 + 80_000,
        "sft": 3 + 3 + 5 + 6 + 1000 + 300 + 300,
        "val": 6 + 4 + 5 + 200 + 200,
    }
    assert len(mixture) == wanted[stage]
    for index in range(0, len(mixture), max(1, len(mixture) // 200)):
        check_conversation(mixture[index])


@pytest.mark.parametrize("name", sorted(set(CHAT_CORE) - {"HumanEval"}))
def test_the_public_evaluations_score_their_own_answers(all_data: None, name: str) -> None:
    for split in ("train", "test"):
        task = build_task(name, split)
        for row in [task[index] for index in range(3)]:
            reply = row["messages"][-1]["content"]
            said = reply if isinstance(reply, str) else reply[-1]["text"]
            assert task.score(row, said) == 1
            assert task.score(row, "I do not know.") == task.score(row, "") == 0
        assert (task.baseline > 0) == (task.kind == "choice")


def test_the_first_rows_are_a_sample_of_all(write_rows: WriteRows) -> None:
    rows = [SUM | {"question": f"{number}?"} for number in range(300)]
    write_rows("cais/mmlu/all/test", rows)
    asked = [int(row["messages"][0]["content"].split("?")[0]) for row in MMLU("test")]
    assert sorted(asked) == list(range(300))
    assert 100 < sum(asked[:60]) / 60 < 200
    assert asked[5:50:5] == [
        int(row["messages"][0]["content"].split("?")[0]) for row in MMLU("test", 5, 50, 5)
    ]


@pytest.mark.parametrize(
    ("name", "split", "row", "reason"),
    [
        ("MMLU", "cais/mmlu/all/test", SUM | {"answer": 4}, "answer 4 of 4 choices"),
        ("MMLU", "cais/mmlu/all/test", SUM | {"answer": -1}, "answer -1 of 4 choices"),
        ("MMLU", "cais/mmlu/all/test", {"question": "2 + 2?"}, "no 'choices'"),
        ("ARC-Easy", "allenai/ai2_arc/ARC-Easy/test", PLANTS | {"answerKey": "1"}, "'1' is not in"),
        ("ARC-Easy", "allenai/ai2_arc/ARC-Easy/test", PLANTS | {"choices": None}, "NoneType"),
        ("GSM8K", "openai/gsm8k/main/test", PENS | {"answer": "13"}, "no number after ####"),
        ("GSM8K", "openai/gsm8k/main/test", PENS | {"question": None}, "content must be a string"),
        ("GSM8K", "openai/gsm8k/main/test", ["a list"], "indices"),
    ],
)
def test_a_malformed_row_is_named(
    write_rows: WriteRows, name: str, split: str, row: Any, reason: str
) -> None:
    write_rows(split, [row])
    task = build_task(name)
    with pytest.raises(UserError, match=r"test\), row 0 from 0: .*fetch the data set") as told:
        task[0]
    assert reason in str(told.value) and "\n" not in str(told.value)


def test_a_missing_split_is_told(write_rows: WriteRows) -> None:
    with pytest.raises(UserError, match=r"there is no test\.jsonl or test\.parquet"):
        build_task("GSM8K")


def test_the_hub_is_asked_by_name_and_its_failure_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str, split: str) -> list[dict]:
        if split != "test":
            raise ValueError(f"Unknown split {split}.\nShould be one of: test")
        return [{"asked": (name, config)}]

    monkeypatch.delenv("NANOCHAT_DATASETS", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_rows("cais/mmlu", "all", "test") == [{"asked": ("cais/mmlu", "all")}]
    with pytest.raises(
        UserError, match=r"cannot load cais/mmlu \(all, train\): Unknown split train"
    ):
        load_rows("cais/mmlu", "all", "train")
