"""Tasks: cutting, mixing, scoring, reading rows. Oracles: rows made by hand, Python's own slicing.

The rows of public data sets have their real fields and lie in a local folder.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

import primer
from nanochat.calculator import calculate
from nanochat.finetuning import FinetuneConfig
from nanochat.task_eval import Task
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    Conversation,
    Tokenizer,
    check_conversation,
    render_choices,
    render_conversation,
)
from tasks.common import TaskMixture, exchange, load_rows
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K, final_number
from tasks.identity import FACTS, Identity
from tasks.mixtures import CHAT_CORE, EVALUATIONS, Mixtures, build_task
from tasks.mmlu import MMLU
from tasks.primer import Arithmetic, Choice, Exact, Quiz, Spelling
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import WORDS, SpellingBee, SpellWord, words_of
from tests.models import refuses

OWN_TESTS = {"HumanEval", "primer-visitor", "primer-visitor-dev"}
WriteRows = Callable[[str, list], None]
ARC_EASY, MMLU_ALL = "allenai/ai2_arc/ARC-Easy", "cais/mmlu/all"
GSM, SMOL = "openai/gsm8k/main", "HuggingFaceTB/smol-smoltalk/default"
PLANTS = {
    "question": "What do plants need?",
    "choices": {"text": ["light", "sugar", "noise"], "label": ["A", "B", "C"]},
    "answerKey": "A",
}
SUM = {"question": "2 + 2?", "subject": "maths", "choices": ["1", "2", "3", "4"], "answer": 3}
PENS = {
    "question": "A pen costs $3. Ann buys 4 pens and 2 rubbers at $0.50. What does she pay?",
    "answer": "The pens cost 4*3=$<<4*3=12>>12.\nWith the rubbers it is 12+2*0.5 = "
    "<<12+2*0.5=13.00>>13.00 dollars.\n#### 1,013",
}
TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Hi."},
    ],
    "source": "made by hand",
}


# What the default mixtures read: data set -> its splits, a row, and how many of it a test writes.
DATASETS: dict[str, tuple[str, dict, int]] = {
    ARC_EASY: ("train test", PLANTS, 3),
    "allenai/ai2_arc/ARC-Challenge": ("train test", PLANTS, 3),
    MMLU_ALL: ("auxiliary_train validation test", SUM, 4),
    GSM: ("train test", PENS, 5),
    SMOL: ("train test", TALK, 6),
}


class Numbers(Task):
    """The conversations 0, 1, 2, ..., 9."""

    def __init__(self) -> None:
        super().__init__(range(10))

    def get_example(self, number: int) -> Conversation:
        return {"messages": [{"role": "user", "content": str(number)}]}


def contents(task: Task) -> list[int]:
    return [int(row["messages"][0]["content"]) for row in task]


def mixed(stage: str, name: Any, *custom: str, identity: Path | None = None) -> TaskMixture:
    cfg = FinetuneConfig(mixture=name, custom=[*custom], identity=identity)
    return Mixtures(cfg).build(stage)


def spoken(row: Conversation) -> str:
    """The reply of a row as a model would say it."""
    reply = row["messages"][-1]["content"]
    return reply if isinstance(reply, str) else reply[-1]["text"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [primer.document("train", index) for index in range(1500)]
    return Tokenizer.train(texts, 1024, SPECIAL_TOKENS)


@pytest.fixture
def write_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteRows:
    """Writes the rows of a split such as "openai/gsm8k/main/train" into NANOCHAT_DATASETS."""
    monkeypatch.setenv("NANOCHAT_DATASETS", str(tmp_path))

    def write(split: str, rows: list) -> None:
        file = tmp_path / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(map(json.dumps, rows)))

    return write


@pytest.fixture
def all_data(write_rows: WriteRows) -> None:
    for name, (splits, row, num_rows) in DATASETS.items():
        for split in splits.split():
            write_rows(f"{name}/{split}", [row] * num_rows)


# --- cutting, mixing, reading


@pytest.mark.parametrize(
    "cut", [(0, None, 1), (2, 7, 1), (1, 100, 3), (0, -1, 2), (0, None, -1), (5, 5, 1)]
)
def test_a_task_is_cut_like_a_list(cut: tuple) -> None:
    task = Numbers()[slice(*cut)]
    assert contents(task) == list(range(10))[slice(*cut)]
    assert len(task) == len(contents(task))
    assert contents(task[1:]) == contents(task)[1:]
    with pytest.raises(IndexError):
        task[len(task)]


def test_a_mixture_holds_every_row_as_often_as_its_task_is_listed() -> None:
    tasks = [Numbers(), Numbers()[:5], Numbers()]
    once = contents(TaskMixture(tasks, seed=1))
    assert Counter(once) == Counter([*range(10), *range(10), *range(5)])
    assert once == contents(TaskMixture(tasks, seed=1)) != contents(TaskMixture(tasks, seed=2))


def test_the_mixtures_hold_every_row(all_data: None) -> None:
    for stage, name, size in (
        ("mid", "default", 6 + 3 * 4 + 4 * 5 + 1000 + 1000 + 200_000 + 80_000),
        ("sft", "default", 3 + 3 + 5 + 6 + 1000 + 300 + 300),
        ("val", "default", 6 + 4 + 5 + 200 + 200),
        ("mid", "primer", 32_000 + 6_000 + 8_000 + 10_000 + 2_000 + 2_000),
        ("sft", "primer", 15_000 + 2_000 + 4_000 + 6_000 + 1_000 + 1_000),
        ("val", "primer", 400),
    ):
        mixture = mixed(stage, name)
        assert len(mixture) == size
        for index in range(0, size, max(1, size // 100)):
            check_conversation(mixture[index])
            assert mixture[index]["messages"][-1]["role"] == "assistant"


def test_the_first_rows_are_a_sample_of_all(write_rows: WriteRows) -> None:
    write_rows(f"{MMLU_ALL}/test", [SUM | {"question": f"{number}?"} for number in range(300)])
    asked = [int(row["messages"][0]["content"].split("?")[0]) for row in MMLU("test")]
    assert sorted(asked) == list(range(300))
    assert 100 < sum(asked[:60]) / 60 < 200


def test_local_files_stand_in_for_the_hub(tmp_path: Path, write_rows: WriteRows) -> None:
    rows = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 2?", "answer": "#### 4"}]
    write_rows(f"{GSM}/train", rows)
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / GSM / "test.parquet")
    (tmp_path / GSM / "cut.jsonl").write_text('{"question": "1"}\n{"question": \n')
    (tmp_path / GSM / "rotten.parquet").write_bytes(b"PAR1 cut short")
    assert list(load_rows("openai/gsm8k", "main", "train")) == rows
    assert list(load_rows("openai/gsm8k", "main", "test")) == rows
    for split, told in {
        "validation": "no validation.jsonl or validation.parquet",
        "cut": "line 2: not JSON",
        "rotten": "not a readable parquet",
    }.items():
        refuses(told, load_rows, "openai/gsm8k", "main", split)


def test_the_hub_is_asked_by_name_and_its_failure_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str, split: str) -> list[dict]:
        if split != "test":
            raise ValueError(f"Unknown split {split}.\nShould be one of: test")
        return [{"asked": (name, config)}]

    monkeypatch.delenv("NANOCHAT_DATASETS", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_rows("cais/mmlu", "all", "test") == [{"asked": ("cais/mmlu", "all")}]
    told = r"cannot load cais/mmlu \(all, train\): Unknown split train"
    refuses(told, load_rows, "cais/mmlu", "all", "train")


def test_a_malformed_row_is_named(write_rows: WriteRows) -> None:
    for name, split, row, reason in (
        ("MMLU", MMLU_ALL, SUM | {"answer": 4}, "answer 4 of 4 choices"),
        ("MMLU", MMLU_ALL, SUM | {"answer": -1}, "answer -1 of 4 choices"),
        ("MMLU", MMLU_ALL, {"question": "2 + 2?"}, "no 'choices'"),
        ("ARC-Easy", ARC_EASY, PLANTS | {"answerKey": "1"}, "'1' is not in"),
        ("ARC-Easy", ARC_EASY, PLANTS | {"choices": None}, "NoneType"),
        ("GSM8K", GSM, PENS | {"answer": "13"}, "no number after ####"),
        ("GSM8K", GSM, PENS | {"question": None}, "content must be a string"),
        ("GSM8K", GSM, ["a list"], "indices"),
    ):
        write_rows(f"{split}/test", [row])
        told = rf"test\), row 0 from 0: .*{reason}.*fetch the data set"
        refuses(told, build_task(name).__getitem__, 0)


# --- scoring


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", sorted(set(EVALUATIONS) - OWN_TESTS))
def test_the_right_reply_scores_one_and_others_zero(all_data: None, name: str, split: str) -> None:
    task = build_task(name, split)
    for row in [task[index] for index in range(min(100, len(task)))]:
        check_conversation(row)
        assert task.score(row, spoken(row)) == 1
        assert not any(task.score(row, wrong) for wrong in ("I do not know.", "", "#### 0.77"))
    assert (task.baseline > 0) == (task.kind == "choice")
    assert set(CHAT_CORE) < set(EVALUATIONS)
    refuses("primer-choice, primer-exact", build_task, "primer-chess")


@pytest.mark.parametrize(
    ("task", "row", "right", "wrong"),
    [
        (Exact, {"accepted": ["yellow", "A banana is yellow.", "Yellow."]},
         ["yellow", " Yellow!", "a banana is  yellow"], ["not yellow", "yellow and red", "yell"]),
        (Arithmetic, {"answer": "95"},
         ["37 + 58 = 95.", "95", "It is 95!"], ["95 is 37 + 58", "195", "9.5", "-95"]),
        (Arithmetic, {"answer": "2"}, ["5-3 = 2."], ["1.2", "none"]),
        (Arithmetic, {"answer": "-7"}, ["= -7", "0 times -7"], ["7"]),
        (Spelling, {"answer": "e-g-g"}, ["e-g-g", "E-G-G."], ["e-g"]),
        (Spelling, {"answer": "2"},
         ["The letter g appears 2 times in 'egg'."], ["The letter g appears 3 times in 'egg'."]),
    ],
)  # fmt: skip
def test_scores_are_neither_too_kind_nor_too_strict(
    task: type[Quiz], row: Conversation, right: list[str], wrong: list[str]
) -> None:
    score = task("test").score
    assert [score(row, reply) for reply in right] == [1] * len(right)
    assert [score(row, reply) for reply in wrong] == [0] * len(wrong)


# --- multiple choice


def arc(question: str, texts: list[str], labels: str, key: str) -> dict:
    choices = {"text": texts, "label": list(labels)}
    return {"question": question, "choices": choices, "answerKey": key}


METALS = ["dead trees", "water", "animal bones", "oil wells", "rocks"]
RATIO = {"question": "The ratio is", "choices": ["0", "5", "9"], "answer": 2}
CHOICES = [
    ("ARC-Easy", ARC_EASY, arc("Children", ["shrink", "grow", "remain the same"], "123", "2"),
     "Children\n- shrink A\n- grow B\n- remain the same C\n", "B"),
    ("ARC-Challenge", "allenai/ai2_arc/ARC-Challenge",
     arc("What makes food?", ["root", "cone", "trunk", "needle"], "DCBA", "D"),
     "What makes food?\n- root A\n- cone B\n- trunk C\n- needle D\n", "A"),
    ("ARC-Easy", ARC_EASY, arc("Metals?", METALS, "ABCDE", "E"),
     "Metals?\n- dead trees A\n- water B\n- animal bones C\n- oil wells D\n- rocks E\n", "E"),
    ("MMLU", MMLU_ALL, RATIO, "The ratio is\n- 0 A\n- 5 B\n- 9 C\n", "C"),
]  # fmt: skip


@pytest.mark.parametrize("case", CHOICES, ids=lambda case: case[2]["question"])
def test_a_choice_prompt_to_the_token(
    write_rows: WriteRows, tokenizer: Tokenizer, case: tuple
) -> None:
    name, split, row, prompt, letter = case
    write_rows(f"{split}/test", [row])
    task = build_task(name)
    asked = task[0]
    ids, mask = render_conversation(tokenizer, asked)
    assert tokenizer.decode(ids) == (
        f"<|bos|><|user_start|>{prompt}Answer with the letter only.<|user_end|>"
        f"<|assistant_start|>{letter}<|assistant_end|>"
    )
    assert mask == [0] * (len(ids) - 2) + [1, 1]
    assert [each for each in asked["letters"] if task.score(asked, each)] == [letter]


def test_the_letter_after_a_choice_is_one_token_whatever_the_choice(tokenizer: Tokenizer) -> None:
    rows = [primer.quiz("test", "choice", index).choices for index in range(50)]
    choices = [*chain.from_iterable(rows), "light.", "5 %", "x=", "(so)", "A"]
    for place, letter in enumerate("ABCDE"):
        assert len(tokenizer.encode(letter)) == 1  # the answer
        prompts = [render_choices("?", [*"....."[:place], choice]) for choice in choices]
        last = {tokenizer.encode(prompt.split("\n")[-2])[-1] for prompt in prompts}
        assert len(last) == 1 and tokenizer.decode(list(last)).strip() == letter


def test_choice_rows_carry_what_a_base_model_is_asked() -> None:
    pages = Choice("test")[:50].pages("quiz")
    assert pages.label == "quiz: page" and len(pages.rows) == 50 and pages.baseline == 1 / 3
    for row in pages.rows:
        choice = row["choices"][row["gold"]].strip()
        assert f"- {choice} {row['answer']}" in row["messages"][0]["content"]
        assert row["query"].startswith("Question: ") and row["query"].endswith("\nAnswer:")
        assert len(row["letters"]) == len(row["choices"])


# --- GSM8K


def test_marks_become_calls_of_the_tool(write_rows: WriteRows) -> None:
    row = {  # openai/gsm8k, MIT
        "question": "Tim buys 3 dozen eggs.  Eggs cost $.50 each.  How much did he pay for eggs?",
        "answer": "He bought 3*12=<<3*12=36>>36 eggs\nSo they cost 36*.5=$<<36*.5=18>>18\n#### 18",
    }
    write_rows(f"{GSM}/test", [row])
    user, assistant = GSM8K("test")[0]["messages"]
    assert user == {"role": "user", "content": row["question"]}
    assert [(part["type"], part["text"]) for part in assistant["content"]] == [
        ("text", "He bought 3*12="), ("python", "3*12"), ("python_output", "36"),
        ("text", "36 eggs\nSo they cost 36*.5=$"), ("python", "36*.5"), ("python_output", "18"),
        ("text", "18\n#### 18"),
    ]  # fmt: skip


def test_the_number_behind_the_hashes() -> None:
    numbers = {
        "#### 18": "18", "so it is 4.\n####18 eggs.": "18", "#### 1,080": "1080",
        "#### $2,520,000.": "2520000", "#### -5": "-5", "#### -$5.50": "-5.5",
        "#### $-5.50": "-5.5", "#### +7": "7", "#### .5": "0.5", "#### 18.00": "18",
        "#### 3 no, #### 4": "4", "#### 1,01,3": "1013",
    }  # fmt: skip
    assert {said: final_number(said) for said in numbers} == {
        said: Decimal(number) for said, number in numbers.items()
    }
    for said in ("18", "#### none", "#### 18/3", "#### 1,8.5/3", "### 18", ""):
        assert final_number(said) is None


# --- conversations


def test_smoltalk_keeps_the_messages(write_rows: WriteRows) -> None:
    short = TALK["messages"][1:]
    write_rows(f"{SMOL}/train", [TALK, {"messages": short}])
    rows = [row["messages"] for row in SmolTalk("train")]
    assert sorted(rows, key=len) == [short, TALK["messages"]]


def test_identity_tells_the_facts_of_the_file(tmp_path: Path) -> None:
    rows = list(Identity())
    assert len(rows) == 1000 and rows == list(Identity())
    assert len({json.dumps(row) for row in rows}) > 900
    replies = Counter(m["content"] for row in rows for m in row["messages"][1::2])
    assert len(replies) > 20 and not any("{" in reply for reply in replies)
    for row in rows:
        check_conversation(row)
    own, facts = tmp_path / "facts.json", json.loads(FACTS.read_text())
    own.write_text("\ufeff" + json.dumps(facts | {"name": "Pip", "maker": "Ann"}))
    told = " ".join(m["content"] for row in Identity(facts=own) for m in row["messages"][1::2])
    assert "I am Pip" in told and "I was made by Ann." in told and "I am nanochat" not in told
    for broken, reason in {
        "{": "Expecting", "[]": '"maker" is missing', '{"name": "Pip"}': '"maker" is missing',
        json.dumps(facts | {"name": 3}): '"name" is missing or no text;',
        json.dumps(facts | {"nmae": "Pip"}): '"nmae" is unknown, did you mean "name"',
    }.items():  # fmt: skip
        own.write_text(broken)
        refuses(f"facts.json.*{reason}", Identity, facts=own)


def said(question: str, reply: str) -> str:
    return json.dumps(exchange(question, reply)) + "\n"


def test_custom_conversations_join_the_mixture(tmp_path: Path) -> None:
    talk = TALK["messages"][1:]
    file, other = tmp_path / "own.jsonl", tmp_path / "with:colon:2"
    lines = json.dumps({"messages": talk}) + "\r\n\r\n" + json.dumps(talk) + "\r\n"
    file.write_text("\ufeff" + lines)
    other.write_text(said("And you?", "I, too."))
    assert [row["messages"] for row in CustomJSON(file)] == [talk, talk]
    for spec, epochs in ((file, 2000), (f"{file}:7", 7), (other, 4000), (f"{other}:3", 3)):
        assert CustomJSON(spec).epochs == epochs
    mixture = mixed("sft", "primer", f"{file}:3", f"{other}:5")
    assert len(mixture) == 29_000 + 2 * 3 + 5
    last = [row["messages"] for row in mixture.tasks[-1]]
    assert last == [exchange("And you?", "I, too.")]
    assert len(mixed("val", "primer", str(file))) == 400
    for text, told in {
        '{"messages": [': "line 2: not JSON",
        '"hello"': "line 2: expected",
        '{"text": "hello"}': "line 2: .*messages",
        '[{"role": "assistant", "content": "hi"}]': "line 2: message 0 has the role 'assistant'",
        '[{"role": "user", "content": "hi"}]': "line 2: no assistant message",
        '[{"role": "user", "content": 3}]': "line 2: message 0",
    }.items():
        file.write_text(f"{json.dumps(TALK)}\n{text}\n")
        refuses(f"own.jsonl, {told}", CustomJSON, file)
    file.write_text("\n")
    refuses("no conversation", CustomJSON, file)
    for wrong in (
        tmp_path,
        tmp_path / "nowhere",
        f"{tmp_path}/nowhere:3",
        f"{file}:x",
        f"{file}:0",
    ):
        refuses("cannot read .*(Is a directory|No such file)", CustomJSON, wrong)


def test_without_a_mixture_every_20th_conversation_validates(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_text("".join(said(str(n), "Hoo!") for n in range(45)))
    files[1].write_text("".join(said(str(n), "Hoo!") for n in range(19, 60)))  # half of it again
    val = contents(mixed("val", "none", *(f"{file}:2" for file in files)))
    assert sorted(val) == [19, 39, 59]
    for stage in ("mid", "sft"):
        train = Counter(contents(mixed(stage, "none", f"{files[0]}:2", f"{files[1]}:3")))
        wanted = {n: 2 * (n < 45) + 3 * (n >= 19) for n in range(60) if n not in val}
        assert train == wanted
    files[0].write_text(said("1", "Hoo!") * 2)
    refuses("--mixture=none needs --custom", mixed, "mid", "none", str(files[0]))
    refuses("--mixture=none needs --custom", mixed, "mid", "none")
    files[0].write_text(said("1", "Hoo!") + said("2", "Hoo!"))
    assert contents(mixed("mid", "none", f"{files[0]}:1")) == [1]
    assert contents(mixed("val", "none", f"{files[0]}:1")) == [2]


def test_a_persona_takes_the_place_of_the_primer_s(tmp_path: Path, all_data: None) -> None:
    """Its replies to all ways of asking; everything else stays as it was."""
    persona, facts = tmp_path / "pip.jsonl", tmp_path / "pip.json"
    own = {"who are you": "I am Pip.", "What is your name?!": "Pip!", "Where do you live?": "Here."}
    persona.write_text("".join(map(said, own, own.values())) + said("Some fact?", "Yes."))
    usual = {
        "I am nanochat, a very small language model.": "I am Pip.",
        "My name is nanochat.": "Pip!",
        "I live in the memory of a computer.": "Here.",
        "Welcome! I am nanochat. What would you like to know?": "I am Pip.",
        "I am nanochat, and much smaller than the well-known ones.": "I am Pip.",
    }
    plain, changed = (
        list(chain.from_iterable(row["messages"] for row in mixture.tasks[0][:900]))
        for mixture in (
            mixed("sft", "primer"),
            mixed("sft", "primer", str(persona)),
        )
    )
    seen = set()
    for was, now in zip(plain, changed, strict=True):
        told = str(was["content"]) if was["role"] == "assistant" else ""
        if told in usual or now == was:
            assert now["content"] == usual.get(told, was["content"])
            seen.add(told)
        else:
            assert "nanochat" in told and now["content"] == "I am Pip."
    assert seen > usual.keys()
    # Where the mixture has Identity, and by facts alone.
    facts.write_text(FACTS.read_text().replace('"nanochat"', '"Pip"'))
    for mixture in (
        mixed("sft", "default", str(persona)),
        mixed("sft", "primer", identity=facts),
    ):
        told = " ".join(
            str(message["content"])
            for row in chain.from_iterable(task[:200] for task in mixture.tasks)
            for message in row["messages"]
            if message["role"] == "assistant"
        )
        assert "I am Pip" in told and not re.search("(am|is|me|called) nanochat", told)


def test_the_example_persona_answers_each_question_once() -> None:
    rows = CustomJSON(Path(__file__).parent.parent / "dev/persona.jsonl")
    assert 30 <= len({row["messages"][0]["content"] for row in rows}) == len(rows) <= 60


# --- spelling


@pytest.mark.parametrize("split", ["train", "test"])
def test_letters_are_spelled_and_counted_right(split: str) -> None:
    for row in SpellWord(split)[:100]:
        word = row["answer"].replace("-", "")
        assert word in row["messages"][0]["content"]
        assert row["messages"][1]["content"] == "-".join(word)
    bee = SpellingBee(split)[:200]
    for row in bee:
        by_hand, code, output, said = row["messages"][1]["content"]
        _, word, _, letter, _ = code["text"].split("'")
        assert output["text"] == str(word.count(letter)) == calculate(code["text"])
        tally = by_hand["text"].split(".")[0].split(", ")
        assert "".join(each[0] for each in tally) == word
        counts = [each[1:].strip() for each in tally if each[0] == letter]
        assert counts == [str(n + 1) for n in range(word.count(letter))]
        assert f"By hand I count {output['text']}." in by_hand["text"]
        assert bee.score(row, by_hand["text"] + said["text"]) == 1
        assert bee.score(row, "The letter appears 99 times.") == 0
    assert {row["answer"] for row in bee} >= {"0", "1", "2"}


def test_a_word_belongs_to_one_split(tmp_path: Path) -> None:
    train, test = set(words_of("train", WORDS)), set(words_of("test", WORDS))
    assert train and test and not train & test
    assert set(words_of("val", WORDS)) == test
    assert 0.05 < len(test) / len(train | test) < 0.15
    file = tmp_path / "words.txt"
    refuses("give a text file", SpellWord, "train", words=file)
    file.write_text("\n".join([*train, *test, "not-a-word", "", "ZEBRAS"]))
    assert {*words_of("train", file), *words_of("test", file)} == {*train, *test, "zebras"}
    assert set(words_of("train", file)) - {"zebras"} == train
    file.write_text("1234\n")
    words_of.cache_clear()
    refuses("no word for train", SpellWord, "train", words=file)
