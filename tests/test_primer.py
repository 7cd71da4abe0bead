"""The primer: stable, disjoint, true to itself. The oracles are Python's own arithmetic and counting, sets, and
the tables of facts."""

import re
from collections import Counter

import pytest

from nanochat import primer
from nanochat import primer_questions as ask
from nanochat.calculator import calculate
from nanochat.primer_facts import SPELLED, TOPICS
from nanochat.primer_words import plural
from nanochat.tokenizer import check_conversation

NUM_DOCUMENTS, NUM_TALKS, NUM_QUIZZES = 8_000, 12_000, 1_000


@pytest.fixture(scope="module")
def train_pages() -> list[str]:
    return [primer.document("train", index) for index in range(NUM_DOCUMENTS)]


@pytest.fixture(scope="module")
def train_talks() -> list[dict]:
    return [primer.conversation("train", index) for index in range(NUM_TALKS)]


def asked(talks: list[dict]) -> set[str]:
    """Everything that users say, each line with its own."""
    return {m["content"] for talk in talks for m in talk["messages"] if m["role"] == "user"}


def sums(text: str) -> set[tuple]:
    """The sums of two operands that a text spells out, in whichever order."""
    found = re.findall(r"(\d+) ?(?:([-+*])|(plus|minus|times)) ?(\d+)", text)
    signs = {"plus": "+", "minus": "-", "times": "*"}
    return {
        (signs.get(word, sign), max(int(a), int(b)), min(int(a), int(b)))
        for a, sign, word, b in found
    }


def test_an_item_depends_on_its_name_alone() -> None:
    first = [primer.document("train", 7), primer.document("val", 7), primer.document("train", 7)]
    assert first[0] == first[2] != first[1]
    # Fixed for good: another hash would let a finished model's test questions into its training.
    assert [key for key in range(40) if ask.held_out("sum", key)] == [1, 20, 21, 23, 34, 35]
    assert primer.conversation("train", 3) == primer.conversation("train", 3)
    with pytest.raises(ValueError, match="train, val, test"):
        primer.document("exam", 0)


def test_pages_and_talks_are_varied(train_pages: list[str], train_talks: list[dict]) -> None:
    vocabulary = Counter(re.findall(r"[a-z]{2,}", " ".join(train_pages).lower()))
    assert len(vocabulary) >= 1500
    assert len(primer.PAGES) >= 12
    assert len(primer.QUESTIONS) >= 15
    # Pages that are short and bounded (small recipes) come back; most do not.
    assert len(set(train_pages)) > 0.93 * NUM_DOCUMENTS
    assert any(talk["messages"][0]["role"] == "system" for talk in train_talks)
    assert max(len(talk["messages"]) for talk in train_talks) >= 6
    for talk in train_talks[:2000]:
        check_conversation(talk)


def test_english(train_pages: list[str]) -> None:
    assert not re.search(r"[{}\[\]|]", "".join(train_pages)), "a template was not filled"
    told = (
        primer.story,
        primer.letter,
        primer.diary,
        primer.fable,
        primer.animal_page,
        primer.poem,
    )
    rng = ask.generator("train", "english", 0)
    for text in (page(rng, "train") for page in told for _ in range(400)):
        assert not re.search(r"\b[Aa] [aeiou]", text), text
        assert not re.search(r"\b[Aa]n (?!hour)[^aeiou]", text), text
        assert not re.search(r"  |\.\.| [,.!?]", text), text
    assert [plural(word) for word in ("fox", "berry", "boy", "mouse", "piece of cake")] == [
        "foxes", "berries", "boys", "mice", "pieces of cake",
    ]  # fmt: skip


def test_no_test_question_is_ever_taught(train_pages: list[str], train_talks: list[dict]) -> None:
    questions = {
        primer.quiz("test", kind, index).text
        for kind in ("choice", "exact", "spelling")
        for index in range(NUM_QUIZZES)
    }
    questions = {brief_removed(question) for question in questions}
    taught = {brief_removed(text.split("\n")[0]) for text in asked(train_talks)}
    taught |= {
        brief_removed(primer.quiz("train", k, i).text) for k in primer.QUIZZES for i in range(3000)
    }
    pages = "\n".join(train_pages)
    taught |= {line.removeprefix("Question: ") for line in pages.split("\n")}
    taught |= {line.split(": ", 1)[-1] for line in pages.split("\n")}
    assert len(questions) > 300
    assert not questions & taught


def brief_removed(text: str) -> str:
    """The question without the wish for a short answer."""
    for brief in primer.texts.BRIEF:
        text = text.removesuffix(" " + brief)
    return text


def test_no_test_sum_is_ever_taught(train_pages: list[str], train_talks: list[dict]) -> None:
    taught = sums("\n".join(train_pages))
    for talk in train_talks:
        for message in talk["messages"]:
            content = message["content"]
            taught |= sums(content if isinstance(content, str) else content[0]["text"])
    tested = set()
    for index in range(NUM_QUIZZES):
        reply = primer.quiz("test", "arithmetic", index).reply
        assert isinstance(reply, list)
        tested |= sums(reply[0]["text"])
    assert len(taught) > 3000
    assert len(tested) > 800
    assert not taught & tested
    # Small sums are where two samples would meet by chance.
    assert any(max(a, b) < 20 for _, a, b in tested)


@pytest.mark.parametrize("kind", ["arithmetic", "spelling"])
def test_what_the_tool_is_shown_to_print_is_what_it_prints(kind: str) -> None:
    tools = 0
    for index in range(500):
        question = primer.quiz("train", kind, index)
        if isinstance(question.reply, list):
            tools += 1
            code, output, text = (part["text"] for part in question.reply)
            assert calculate(code) == output == question.answer
            assert output in text
    assert tools > 100


def test_letters_are_counted_by_hand_as_they_are() -> None:
    assert ask.tally("noon", "o") == "n, o 1, o 2, n"
    for index in range(300):
        question = ask.ask_by_hand(ask.generator("train", "hand", index), "train")
        assert isinstance(question.reply, list)
        word, letter = re.findall(r"'(\w+)'.count\('(\w)'\)", question.reply[1]["text"])[0]
        numbers = re.findall(r"\d+", question.reply[0]["text"])
        assert len(numbers) == word.count(letter) == int(question.answer)


def test_facts_can_be_asked_with_wrong_choices() -> None:
    for name, topic in TOPICS.items():
        assert len(set(topic.facts.values())) >= ask.NUM_CHOICES, name
        assert len(set(topic.questions)) == len(topic.questions) >= 4, name
    for index in range(500):
        question = primer.quiz("test", "choice", index)
        assert len(set(question.choices)) == ask.NUM_CHOICES
        assert question.choices[ask.LETTERS.index(str(question.reply))] == question.answer
    places = Counter(str(primer.quiz("train", "choice", index).reply) for index in range(3000))
    assert all(abs(count / 3000 - 1 / ask.NUM_CHOICES) < 0.05 for count in places.values())


def test_every_fact_that_is_tested_is_taught() -> None:
    """Some phrasing of it is in the train split, and every word that is spelled."""
    for name, topic in TOPICS.items():
        for key in topic.facts:
            phrasings = range(len(topic.questions))
            assert not all(ask.held_out("asked", name, key, i) for i in phrasings), (name, key)
    for word in SPELLED:
        questions = primer.texts.SPELL_QUESTIONS
        assert not all(ask.held_out("spell", question, word) for question in questions), word
