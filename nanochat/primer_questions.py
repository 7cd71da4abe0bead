"""The questions of the primer and its test split: what may be asked, with a right reply to each.

Every `ask_...(rng, split)` makes one `Question`; primer.py mixes them into conversations, quizzes and pages.

The choice that would surprise: the splits are not other seeds but other content. What a question is about
(the two operands; the phrasing and the fact; the word and the letter) is hashed, and one tenth of all keys
never appears in the train split, neither in a conversation nor on a page. Facts themselves are in both:
no model can know a capital that it was never told.
"""

import hashlib
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from nanochat import primer_texts as texts
from nanochat import primer_words as world
from nanochat.primer_facts import DEFINITIONS, DETERMINERS, SPELLED, TOPICS
from nanochat.primer_words import a, plural

SPLITS = ("train", "val", "test")  # val and test share the content that is kept from train
HELD_OUT_ONE_IN = 10
LETTERS = "ABC"  # of a quiz
NUM_CHOICES = len(LETTERS)
CHOICE = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(?:([aAsS]) )?(\w+)\}")

NAMES = world.GIRLS + world.BOYS
KINDS = list(world.CATEGORIES)
DEFINED = list(DEFINITIONS)
WEATHERS_OF = {season: world.words(each) for season, each in world.WEATHERS_OF.items()}
MONTHS_OF = {season: world.words(each) for season, each in world.MONTHS_OF.items()}
TOPIC_NAMES = list(TOPICS)
TOPIC_WEIGHTS = list(accumulate(len(topic.facts) ** 0.5 for topic in TOPICS.values()))
TOPIC_KEYS = {name: list(topic.facts) for name, topic in TOPICS.items()}
TOPIC_VALUES = {name: list(dict.fromkeys(topic.facts.values())) for name, topic in TOPICS.items()}

Key = TypeVar("Key", bound=tuple)
Reply = str | list[dict[str, str]]


@dataclass(frozen=True)
class Question:
    """What a user asks, and a right reply; `accepted` are other replies that are right as well."""

    text: str
    reply: Reply
    accepted: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()  # of a multiple-choice question: `text` stands before them
    letters: str = LETTERS  # one for each choice
    answer: str = ""  # the right choice, or the fact in one word

    def prompt(self) -> str:
        """The whole of what the user writes."""
        if not self.choices:
            return self.text
        return render_choices(self.text, self.letters, self.choices)


# --- splits and templates


def held_out(*key: object) -> bool:
    """True for the tenth of all content keys that the train split never holds."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def draw(split: str, label: str, pick: Callable[[], Key]) -> Key:
    """The first key from `pick` that belongs to the split; `label` tells apart keys of different kinds."""
    while True:
        key = pick()
        if held_out(label, *key) == (split != "train"):
            return key


def generator(split: str, kind: str, index: int) -> random.Random:
    """The random numbers of one item; seeded with its name, since random.Random hashes a string stably."""
    if split not in SPLITS:
        raise ValueError(f"the primer has the splits {', '.join(SPLITS)}, not {split!r}")
    return random.Random(f"{split}/{kind}/{index}")


def fill(template: str, rng: random.Random | None = None, /, **slots: object) -> str:
    """The template with its choices made and its slots filled: `fill("{A x} runs.", x="owl")` -> `"An owl runs."`"""
    if rng:
        template = CHOICE.sub(lambda found: rng.choice(found[1].split("|")), template)

    def slot(found: re.Match[str]) -> str:
        form, name = found.groups()
        value = str(slots[name.lower()])
        if form in ("a", "A"):
            value = a(value)
        elif form:
            value = plural(value)
        return capital(value) if form in ("A", "S") or name[0].isupper() else value

    return SLOT.sub(slot, template)


def letter_choices(letters: Sequence[str], choices: Sequence[str]) -> str:
    """A line per choice, its letter right behind it: smear then hands the letter what it stands for."""
    return "\n".join(map("- {} {}".format, choices, letters))


def render_choices(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """The one form of a multiple-choice question."""
    return f"{question}\n{letter_choices(letters, choices)}\nAnswer with the letter only."


def capital(text: str) -> str:
    """The text with a capital at its head, the rest as it is."""
    return text[0].upper() + text[1:]


def listed(items: Sequence[str]) -> str:
    """`listed(["a", "b", "c"])` -> `"a, b and c"`."""
    return f"{', '.join(items[:-1])} and {items[-1]}"


def cast(rng: random.Random, split: str, label: str) -> dict[str, str]:
    """Who and what a page is about; the combination of its main parts is of this split alone."""
    parts = (NAMES, world.ANIMALS, world.PLACES, world.THINGS)
    hero, animal, place, thing = draw(split, label, lambda: tuple(map(rng.choice, parts)))
    season = rng.choice(list(WEATHERS_OF))
    friend = rng.choice([name for name in NAMES if name != hero])
    he, his, him = ("she", "her", "her") if hero in world.GIRLS else ("he", "his", "him")
    return {
        "hero": hero, "he": he, "his": his, "him": him, "animal": animal, "place": place, "thing": thing,
        "friend": friend, "friend_he": "she" if friend in world.GIRLS else "he",
        "friend_his": "her" if friend in world.GIRLS else "his",
        "relative": rng.choice(world.RELATIVES), "food": rng.choice(world.FOODS), "dish": rng.choice(world.DISHES),
        "elder": rng.choice(world.RELATIVES[:4]), "colour": rng.choice(TOPIC_VALUES["colour"]), "feeling": rng.choice(world.FEELINGS), "day": rng.choice(world.DAYS),
        "season": season, "month": rng.choice(MONTHS_OF[season]), "weather": rng.choice(WEATHERS_OF[season]),
    }  # fmt: skip


# --- questions


def ask_fact(rng: random.Random, split: str, brief: bool | None = None) -> Question:
    """A fact, answered in a sentence, or in one word when the question says so."""
    name, key, i = pick_fact(rng, split)
    topic, value = TOPICS[name], TOPICS[name].facts[key]
    text = fill(topic.questions[i], key=key, value=value)
    sentences = tuple(fill(sentence, key=key, value=value) for sentence in topic.sentences)
    accepted = (*sentences, f"{capital(value)}.", f"{capital(a(value))}.")
    if brief is None and rng.random() < 0.2:
        text, brief = f"{text} {rng.choice(texts.BRIEF)}", True
    reply = f"{capital(value)}." if brief else rng.choice(sentences)
    return Question(text, reply, accepted, answer=value)


def pick_fact(rng: random.Random, split: str) -> tuple[str, str, int]:
    """(topic, key, number of the phrasing)."""

    def pick() -> tuple[str, str, int]:
        name = rng.choices(TOPIC_NAMES, cum_weights=TOPIC_WEIGHTS)[0]
        return name, rng.choice(TOPIC_KEYS[name]), rng.randrange(len(TOPICS[name].questions))

    return draw(split, "asked", pick)


def ask_choice(rng: random.Random, split: str) -> Question:
    """A fact with lettered choices, which are other values of the same topic."""
    name, key, i = pick_fact(rng, split)
    topic, value = TOPICS[name], TOPICS[name].facts[key]
    wrong = rng.sample([other for other in TOPIC_VALUES[name] if other != value], NUM_CHOICES - 1)
    choices = rng.sample([value, *wrong], NUM_CHOICES)
    question = fill(topic.questions[i], key=key, value=value)
    return Question(question, LETTERS[choices.index(value)], (), tuple(choices), answer=value)


def ask_letter(rng: random.Random, split: str) -> Question:
    """Which letter stands by a choice: the bare skill that multiple choice needs beside knowledge.

    Short lists and any letters teach to copy a letter before there is anything to choose; from lists of three in
    their order alone, a small model learns neither (dev/LOG.md).
    """
    choices = rng.sample(TOPIC_VALUES[rng.choice(TOPIC_NAMES)], rng.choice((1, 2, 2, 3, 3)))
    letters = "".join(rng.sample(string.ascii_uppercase[:8], len(choices)))
    value, letter = rng.choice(list(zip(choices, letters, strict=True)))
    question = fill(rng.choice(texts.WHICH_LETTER), value=value)
    return Question(question, letter, (), tuple(choices), letters, answer=value)


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
    first, second = (low, high) if op != "-" and rng.random() < 0.5 else (high, low)
    return first, op, second, {"+": first + second, "-": first - second, "*": first * second}[op]


def _by_tool(code: str, result: object, reply: str) -> list[dict[str, str]]:
    parts = (("python", code), ("python_output", str(result)), ("text", reply))
    return [{"type": kind, "text": text} for kind, text in parts]


def ask_sum(rng: random.Random, split: str) -> Question:
    """Two operands, worked out by the calculator."""
    first, op, second, result = pick_sum(rng, split)
    template = rng.choice(texts.SUM_QUESTIONS)
    text = fill(template, a=first, b=second, op=op, word=texts.SUM_WORDS[op])
    return Question(
        text,
        _by_tool(f"{first}{op}{second}", result, f"{first} {op} {second} = {result}."),
        answer=str(result),
    )


def ask_problem(rng: random.Random, split: str) -> Question:
    """The same, wrapped in a story."""
    first, op, second, result = pick_sum(rng, split, smallest=2)
    slots = cast(rng, split, "problem") | {"a": first, "b": second}
    text = fill(rng.choice(texts.WORD_PROBLEMS[op]), **slots, things=plural(str(slots["thing"])))
    return Question(
        text,
        _by_tool(f"{first}{op}{second}", result, f"{first} {op} {second} = {result}."),
        answer=str(result),
    )


def ask_spelling(rng: random.Random, split: str) -> Question:
    """A word, letter by letter."""
    template, word = draw(
        split, "spell", lambda: (rng.choice(texts.SPELL_QUESTIONS), rng.choice(SPELLED))
    )
    return Question(fill(template, word=word), "-".join(word), answer="-".join(word))


def pick_letter(rng: random.Random, split: str) -> tuple[str, str]:
    """(word, letter), where the letter is most often one of the word's."""

    def pick() -> tuple[str, str]:
        word = rng.choice(SPELLED)
        return word, rng.choice(word if rng.random() < 0.8 else world.ALPHABET)

    return draw(split, "letter", pick)


def tally(word: str, letter: str) -> str:
    """The word spelled with a running count: `tally("noon", "o")` -> `"n, o 1, o 2, n"`."""
    counts = accumulate(int(each == letter) for each in word)
    return ", ".join(
        f"{each} {n}" if each == letter else each for each, n in zip(word, counts, strict=True)
    )


def times(number: int) -> str:
    """`times(2)` -> `"2 times"`."""
    return "1 time" if number == 1 else f"{number} times"


def ask_letters(rng: random.Random, split: str, by_hand: bool = False) -> Question:
    """How often a letter is in a word: by the tool, or by hand first and then checked."""
    word, letter = pick_letter(rng, split)
    count = word.count(letter)
    reply = f"The letter {letter} appears {times(count)} in '{word}'."
    parts = _by_tool(f"'{word}'.count('{letter}')", count, reply)
    if by_hand:
        parts.insert(0, {"type": "text", "text": tally(word, letter) + ". "})
    template = rng.choice(texts.HAND_QUESTIONS if by_hand else texts.COUNT_QUESTIONS)
    return Question(fill(template, word=word, letter=letter), parts, answer=str(count))


def ask_by_hand(rng: random.Random, split: str) -> Question:
    """Letters counted by hand, then checked with the tool."""
    return ask_letters(rng, split, by_hand=True)


def ask_how(rng: random.Random, split: str) -> Question:
    """How something is made or done."""
    template, key = draw(
        split, "how", lambda: (rng.choice(texts.HOW_QUESTIONS), rng.choice(list(texts.RECIPES)))
    )
    return Question(fill(template, key=key), texts.RECIPES[key])


def ask_nature(rng: random.Random, split: str) -> Question:
    """Something to know about an animal."""
    template, key = draw(
        split, "nature", lambda: (rng.choice(texts.NATURE_QUESTIONS), rng.choice(world.ANIMALS))
    )
    return Question(
        fill(template, key=key), fill("{A key} {nature}.", key=key, nature=world.NATURE[key])
    )


def ask_small_talk(rng: random.Random, split: str) -> Question:
    """Greetings, moods and thanks: the same in every split, as manners are."""
    key = rng.choice(list(texts.SMALL_TALK))
    return Question(key, rng.choice(texts.SMALL_TALK[key]))


def ask_identity(rng: random.Random, split: str) -> Question:
    """Who the model is: the same in every split, as there is one answer."""
    key = rng.choice(list(texts.IDENTITY))
    return Question(key, texts.IDENTITY[key])


def ask_unknown(rng: random.Random, split: str) -> Question:
    """What nobody can know from the primer."""
    return Question(rng.choice(texts.UNKNOWN), rng.choice(texts.UNKNOWN_REPLIES))


def ask_definition(rng: random.Random, split: str) -> Question:
    """What a word means."""
    template, word = draw(
        split, "define", lambda: (rng.choice(texts.DEFINITION_QUESTIONS), rng.choice(DEFINED))
    )
    return Question(fill(template, word=word), define(word))


def define(word: str) -> str:
    """`define("island")` -> `"An island is land with water all around it."`"""
    subject = DETERMINERS[word] + word if word in DETERMINERS else a(word)
    return f"{capital(subject)} is {DEFINITIONS[word]}."


def ask_story(rng: random.Random, split: str) -> Question:
    """A fable about an animal."""
    slots = cast(rng, split, "fable")
    reply = " ".join(fill(line, rng, **slots) for line in rng.choice(texts.FABLES))
    return Question(fill(rng.choice(texts.STORY_QUESTIONS), **slots), reply)


def ask_list(rng: random.Random, split: str) -> Question:
    """Some members of a group."""
    template, n, kind = draw(
        split,
        "list",
        lambda: (rng.choice(texts.LIST_QUESTIONS), rng.randint(2, 4), rng.choice(KINDS)),
    )
    slots = {
        "n": world.NUMBERS[n],
        "kind": kind,
        "members": listed(rng.sample(world.CATEGORIES[kind], n)),
    }
    return Question(fill(template, **slots), fill("Here are {n} {s kind}: {members}.", **slots))


def ask_yes_no(rng: random.Random, split: str) -> Question:
    """Whether something has a colour, or belongs to a group."""

    def pick() -> tuple[str, str, str, str]:
        name = rng.choice(("colour", "kind"))
        key = rng.choice(TOPIC_KEYS[name])
        value = TOPICS[name].facts[key] if rng.random() < 0.5 else rng.choice(TOPIC_VALUES[name])
        return rng.choice(texts.YES_NO_QUESTIONS), name, key, value

    template, name, key, value = draw(split, "yes", pick)
    right = TOPICS[name].facts[key]
    thing, shown, truth = (key, value, right) if name == "colour" else map(a, (key, value, right))
    reply = f"Yes, {thing} is {truth}." if value == right else f"No, {thing} is {truth}."
    return Question(fill(template, key=thing, value=shown), reply)


def ask_bigger(rng: random.Random, split: str) -> Question:
    """Which of two animals is bigger."""
    template, x, y = draw(
        split, "bigger", lambda: (rng.choice(texts.BIGGER_QUESTIONS), *rng.sample(world.SIZES, 2))
    )
    small, big = sorted((x, y), key=world.SIZES.index)
    return Question(
        fill(template, x=x, y=y), fill("{A big} is bigger than {a small}.", big=big, small=small)
    )


def ask_counting(rng: random.Random, split: str) -> Question:
    """Count from one number to another."""
    low, num = draw(split, "count", lambda: (rng.randint(0, 95), rng.randint(3, 9)))
    text = fill(rng.choice(texts.COUNTING_QUESTIONS), a=low, b=low + num)
    return Question(text, ", ".join(map(str, range(low, low + num + 1))) + ".")


def ask_repeat(rng: random.Random, split: str) -> Question:
    """Say after me."""
    slots = cast(rng, split, "repeat")
    what = fill(
        "[the {colour} {animal}|{a thing} for {hero}|{weather} {day}|{hero} and {friend}|{s animal} eat {food}]",
        rng,
        **slots,
    )
    return Question(fill(rng.choice(texts.REPEAT_QUESTIONS), what=what), what)
