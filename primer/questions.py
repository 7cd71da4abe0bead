"""The questions of the primer, each with a right reply; conversations and quizzes made of them.

The splits are not other seeds but other content. What a question is about (the two operands; the
phrasing and the fact; the word and the letter) is hashed, and one tenth of all keys never appears in the
train split, neither in a conversation nor on a page. Facts themselves are in both: no model can know a
capital that it was never told.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from string import ascii_lowercase
from typing import Any

from primer.world import (
    GROUPS,
    PHRASES,
    REPLIES,
    TALK,
    TEXTS,
    TOPICS,
    WORDS,
    Topic,
    a,
    capital,
    fill,
)

LETTERS = "ABC"  # of a quiz
SIGNS = {"+": "plus", "-": "minus", "*": "times"}
TOPIC_WEIGHTS = [len(topic.facts) ** 0.5 for topic in TOPICS.values()]


@dataclass(frozen=True)
class Question:
    """What a user asks, and a right reply; `accepted` are other replies that are right as well."""

    text: str
    reply: str | list[dict[str, str]]
    answer: str = ""  # the right choice, or the fact in one word
    accepted: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()  # of a multiple-choice question: `text` stands before them
    letters: str = LETTERS  # one for each choice

    @property
    def prompt(self) -> str:
        """The whole of what the user writes."""
        if not self.choices:
            return self.text
        return f"{self.text}\n{self.lettered_choices}\nAnswer with the letter only."

    @property
    def lettered_choices(self) -> str:
        """A line for each choice, its letter right behind it."""
        return "\n".join(map("- {} {}".format, self.choices, self.letters))


Ask = Callable[[random.Random, str], Question]  # the numbers to draw from, the split


def generator(split: str, kind: str, index: int) -> random.Random:
    """The random numbers of one item, seeded with its name (which random.Random hashes stably)."""
    assert split in ("train", "val", "test"), split  # val and test share what is kept from train
    return random.Random(f"{split}/{kind}/{index}")


def held_out(*key: object) -> bool:
    """True for the tenth of all content keys that the train split never holds."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def draw(split: str, label: str, pick: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """The first key from `pick` that belongs to the split; `label` tells apart kinds of keys."""
    while True:
        key = pick()
        if held_out(label, *key) == (split != "train"):
            return key


def choose(rng: random.Random, split: str, label: str, *items: Sequence[Any]) -> tuple[Any, ...]:
    """One of each of the `items`: a key that belongs to the split."""
    return draw(split, label, lambda: tuple(map(rng.choice, items)))


def cast(rng: random.Random, split: str, label: str) -> dict[str, str]:
    """Who and what a text is about: values for the slots of its template."""
    parts = ("hero", "animal", "place", "thing")
    chosen = choose(rng, split, label, *[WORDS[name] for name in parts])
    slots: dict[str, str] = dict(zip(parts, chosen, strict=True))
    slots["season"] = rng.choice(("spring", "summer", "autumn", "winter"))
    slots["friend"] = rng.choice([name for name in WORDS["hero"] if name != slots["hero"]])
    for name in ("relative", "food", "dish", "elder", "colour", "feeling", "day"):
        slots[name] = rng.choice(WORDS[name])
    for name in ("month", "weather"):
        slots[name] = rng.choice(WORDS[f"{slots['season']} {name}"])
    for who, prefix in (("hero", ""), ("friend", "friend_")):
        forms = ("she", "her", "her") if slots[who] in WORDS["girl"] else ("he", "his", "him")
        slots |= dict(zip((f"{prefix}he", f"{prefix}his", f"{prefix}him"), forms, strict=True))
    return slots


def pick_topic(rng: random.Random) -> str:
    """The name of a topic; large ones come more often."""
    return rng.choices(list(TOPICS), TOPIC_WEIGHTS)[0]


def pick_fact(rng: random.Random, split: str) -> tuple[Topic, str, str, str]:
    """(topic, key, value, a question for it)."""

    def pick() -> tuple[str, str, int]:
        topic = TOPICS[name := pick_topic(rng)]
        return name, rng.choice(list(topic.facts)), rng.randrange(len(topic.questions))

    name, key, phrasing = draw(split, "asked", pick)
    topic = TOPICS[name]
    value = topic.facts[key]
    return topic, key, value, fill(topic.questions[phrasing], key=key, value=value)


def ask_fact(rng: random.Random, split: str, brief: bool | None = None) -> Question:
    """A fact, answered in a sentence, or in one word when the question says so."""
    topic, key, value, text = pick_fact(rng, split)
    sentences = [fill(sentence, key=key, value=value) for sentence in topic.sentences]
    accepted = (*sentences, f"{capital(value)}.", f"{capital(a(value))}.")
    if brief is None and rng.random() < 0.2:
        text, brief = f"{text} {rng.choice(PHRASES['brief'])}", True
    reply = f"{capital(value)}." if brief else rng.choice(sentences)
    return Question(text, reply, value, accepted)


def ask_choice(rng: random.Random, split: str) -> Question:
    """A fact with lettered choices, which are other values of the same topic."""
    topic, _, value, text = pick_fact(rng, split)
    wrong = rng.sample([other for other in topic.values if other != value], len(LETTERS) - 1)
    choices = rng.sample([value, *wrong], len(LETTERS))
    return Question(text, LETTERS[choices.index(value)], value, choices=tuple(choices))


def ask_letter(rng: random.Random, split: str) -> Question:
    """Which letter stands by a choice: the bare skill that multiple choice needs beside knowledge.

    Short lists and any letters teach to copy a letter before there is anything to choose; from lists of
    three in their order alone, a small model learns neither (dev/LOG.md).
    """
    choices = rng.sample(TOPICS[rng.choice(list(TOPICS))].values, rng.choice((1, 2, 2, 3, 3)))
    letters = "".join(rng.sample("ABCDEFGH", len(choices)))
    value, letter = rng.choice(list(zip(choices, letters, strict=True)))
    text = fill(rng.choice(PHRASES["which letter"]), value=value)
    return Question(text, letter, value, choices=tuple(choices), letters=letters)


def ask_yes_no(rng: random.Random, split: str) -> Question:
    """Whether something has a colour, or belongs to a group."""

    def pick() -> tuple[str, str, str, str]:
        topic = TOPICS[name := rng.choice(("colour", "kind"))]
        key, truth = rng.choice(list(topic.facts.items()))
        value = truth if rng.random() < 0.5 else rng.choice(topic.values)
        return rng.choice(PHRASES["yes"]), name, key, value

    phrase, name, key, value = draw(split, "yes", pick)
    words = key, value, TOPICS[name].facts[key]
    thing, asked, truth = words if name == "colour" else map(a, words)
    reply = f"{'Yes' if asked == truth else 'No'}, {thing} is {truth}."
    return Question(fill(phrase, key=thing, value=asked), reply)


def ask_bigger(rng: random.Random, split: str) -> Question:
    """Which of two animals is bigger."""

    def pick() -> tuple[str, ...]:
        return rng.choice(PHRASES["bigger"]), *rng.sample(WORDS["size"], 2)

    phrase, x, y = draw(split, "bigger", pick)
    return Question(fill(phrase, x=x, y=y), compare(x, y))


def compare(x: str, y: str) -> str:
    """`compare("ant", "fox")` -> `"A fox is bigger than an ant."`."""
    small, big = sorted((x, y), key=WORDS["size"].index)
    return fill("{A big} is bigger than {a small}.", big=big, small=small)


def ask_list(rng: random.Random, split: str) -> Question:
    """Some members of a group."""
    parts = (PHRASES["list"], range(2, 5), list(GROUPS))
    phrase, num, kind = choose(rng, split, "list", *parts)
    slots = {"n": WORDS["number"][num], "kind": kind, "members": members(rng, kind, num)}
    return Question(fill(phrase, **slots), fill("Here are {n} {s kind}: {members}.", **slots))


def members(rng: random.Random, kind: str, num: int) -> str:
    """Such as `"salmon, eel and carp"`."""
    *names, last = rng.sample(GROUPS[kind], num)
    return f"{', '.join(names)} and {last}"


def ask_counting(rng: random.Random, split: str) -> Question:
    """Count from one number to another."""
    low, num = choose(rng, split, "count", range(96), range(3, 10))
    text = fill(rng.choice(PHRASES["count"]), a=low, b=low + num)
    return Question(text, ", ".join(map(str, range(low, low + num + 1))) + ".")


def pick_sum(
    rng: random.Random, split: str, smallest: int = 0, largest: int = 999
) -> tuple[int, str, int, int]:
    """(first operand, operation, second operand, result), never negative."""

    def pick() -> tuple[str, int, int]:
        op = rng.choice("++--*")
        top = min(largest, 99) if op == "*" or rng.random() < 0.5 else largest
        low, high = sorted((rng.randint(smallest, top), rng.randint(smallest, top)))
        return op, high, low  # 3 + 4 and 4 + 3 are one key

    op, high, low = draw(split, "sum", pick)
    x, y = (low, high) if op != "-" and rng.random() < 0.5 else (high, low)
    return x, op, y, {"+": x + y, "-": x - y, "*": x * y}[op]


def by_tool(code: str, result: object, reply: str) -> list[dict[str, str]]:
    """The parts of a reply that asks the calculator first."""
    parts = (("python", code), ("python_output", str(result)), ("text", reply))
    return [{"type": kind, "text": text} for kind, text in parts]


def ask_sum(rng: random.Random, split: str, in_words: bool = False) -> Question:
    """Two operands, bare or in a little story, worked out by the calculator."""
    x, op, y, result = pick_sum(rng, split, smallest=2 if in_words else 0)
    slots = cast(rng, split, "problem") if in_words else {}
    phrase = rng.choice(PHRASES[f"problem {op}" if in_words else "sum"])
    text = fill(phrase, a=x, b=y, op=op, word=SIGNS[op], **slots)
    return Question(text, by_tool(f"{x}{op}{y}", result, f"{x} {op} {y} = {result}."), str(result))


def ask_letters(rng: random.Random, split: str, by_hand: bool = False) -> Question:
    """How often a letter is in a word: by the tool, or by hand first and then checked."""

    def pick() -> tuple[str, str]:
        word = rng.choice(list(REPLIES["spell"]))
        return word, rng.choice(word if rng.random() < 0.8 else ascii_lowercase)

    word, letter = draw(split, "letter", pick)
    count = word.count(letter)
    times = "1 time" if count == 1 else f"{count} times"
    reply = f"The letter {letter} appears {times} in '{word}'."
    parts = by_tool(f"'{word}'.count('{letter}')", count, reply)
    if by_hand:
        parts.insert(0, {"type": "text", "text": tally(word, letter) + ". "})
    phrase = rng.choice(PHRASES["by hand" if by_hand else "letters"])
    return Question(fill(phrase, word=word, letter=letter), parts, str(count))


def tally(word: str, letter: str) -> str:
    """The word spelled with a running count: `tally("noon", "o")` -> `"n, o 1, o 2, n"`."""
    counts = accumulate(int(each == letter) for each in word)
    steps = zip(word, counts, strict=True)
    return ", ".join(f"{each} {n}" if each == letter else each for each, n in steps)


def ask_story(rng: random.Random, split: str) -> Question:
    """A fable about an animal."""
    slots = cast(rng, split, "fable")
    _, fable = rng.choice(TEXTS["fable"])
    reply = fill(fable, rng, **slots)
    return Question(fill(rng.choice(PHRASES["story"]), **slots), reply)


def ask_repeat(rng: random.Random, split: str) -> Question:
    """Say after me."""
    slots = cast(rng, split, "repeat")
    what = fill(rng.choice(PHRASES["repeated"]), **slots)
    return Question(fill(rng.choice(PHRASES["repeat"]), what=what), what)


def ask_about(rng: random.Random, split: str, label: str) -> Question:
    """How a word is spelled or what it means, what an animal does, how something is done."""
    replies = REPLIES[label]
    phrase, key = choose(rng, split, label, PHRASES[label], list(replies))
    return Question(fill(phrase, key=key, word=key), replies[key], replies[key])


def ask_talk(rng: random.Random, split: str, replies: dict[str, list[str]]) -> Question:
    """Manners, and who the model is: the same in every split."""
    text, ways = rng.choice(list(replies.items()))
    return Question(text, rng.choice(ways) if len(ways) > 1 else ways[0])


ask_problem = partial(ask_sum, in_words=True)
ask_by_hand = partial(ask_letters, by_hand=True)
ask_spelling = partial(ask_about, label="spell")
ask_nature = partial(ask_about, label="nature")
ask_greeting = partial(ask_talk, replies=TALK["greeting"])
QUESTIONS: dict[Ask, int] = {  # of conversations, with their weights
    ask_fact: 22, ask_choice: 14, ask_letter: 8, ask_sum: 14, ask_problem: 6, ask_spelling: 8,
    ask_letters: 6, ask_by_hand: 2, partial(ask_talk, replies=TALK["identity"]): 5,
    partial(ask_talk, replies=TALK["greeting"] | TALK["small talk"]): 8,
    partial(ask_talk, replies=dict.fromkeys(PHRASES["unknown"], PHRASES["unknown reply"])): 1,
    ask_story: 3, partial(ask_about, label="define"): 4, ask_yes_no: 5, ask_bigger: 3, ask_list: 3,
    ask_counting: 2, ask_repeat: 3, partial(ask_about, label="how"): 2, ask_nature: 3,
}  # fmt: skip
QUIZZES: dict[str, list[Ask]] = {
    "choice": [ask_choice],
    "letter": [ask_letter],
    "exact": [ask_fact],
    "arithmetic": [ask_sum, ask_sum, ask_problem],
    "spelling": [ask_spelling, ask_letters],
}


def quiz(split: str, kind: str, index: int) -> Question:
    """Question `index` of a kind of quiz: choice, letter, exact, arithmetic or spelling."""
    rng = generator(split, kind, index)
    return rng.choice(QUIZZES[kind])(rng, split)


def conversation(split: str, index: int) -> dict[str, Any]:
    """Talk `index`: one to three questions, at times a system message, at times a name to remember."""
    rng = generator(split, "conversation", index)
    system, style = "", rng.random()
    if style < 0.04:
        system = rng.choice(PHRASES["brief system"])
        turns = [ask_fact(rng, split, brief=True) for _ in range(rng.randint(1, 3))]
    elif style < 0.08:
        turns = introduction(rng, split)
    else:
        if rng.random() < 0.08:
            system = rng.choice(PHRASES["system"])
        num_turns = rng.choices((1, 2, 3), (60, 28, 12))[0]
        kinds = rng.choices(list(QUESTIONS), list(QUESTIONS.values()), k=num_turns)
        turns = [ask(rng, split) for ask in kinds]
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.prompt})
        messages.append({"role": "assistant", "content": turn.reply})
    return {"messages": messages}


def introduction(rng: random.Random, split: str) -> list[Question]:
    """A user who tells a name, talks of something else or not, and asks for it."""
    slots = cast(rng, split, "name")
    hello, welcome = (fill(rng.choice(PHRASES[each]), **slots) for each in ("name", "name reply"))
    between = [ask_fact(rng, split)] if rng.random() < 0.5 else []
    again = Question(rng.choice(PHRASES["name question"]), f"Your name is {slots['hero']}.")
    return [Question(hello, welcome), *between, again]
