"""The questions of the primer with correct replies, and quizzes made of them.

Splits differ in content, not just in seed: what a question is about (two operands; phrasing and
fact; word and letter) is hashed, and a tenth of all keys never appears in the train split, neither
in a conversation nor on a page. Facts themselves are in both: no model can know a capital that it
was never told.
"""

import hashlib
import operator
import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate, count
from string import ascii_lowercase
from typing import Any, NamedTuple

from primer import world
from primer.strangers import neat
from primer.world import PHRASES, REPLIES, TOPICS, WORDS, a, bare, capital, fill

LETTERS = "ABC"  # of a quiz
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
KEYS = {name: list(topic.facts) for name, topic in TOPICS.items()}
LISTS = world.SUBJECTS | {f"tale {name}": words for name, words in world.HEROES.items()}
LISTS |= {f"near {topic}": keys for topic, keys in world.NEAR.items()}
TOPIC_WEIGHTS = list(accumulate(len(keys) ** 0.5 for keys in KEYS.values()))


class Question(NamedTuple):
    """A user's question and a correct reply; `accepted` are other correct replies."""

    text: str
    reply: str | list[dict[str, str]]
    answer: str = ""  # the right choice, or the fact in one word
    accepted: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()  # of a multiple-choice question: `text` stands before them
    letters: str = LETTERS  # one for each choice
    keep: tuple[str, ...] = ()  # what noise must leave alone
    alone: bool = False  # nothing is said before or after it
    topic: str = ""  # of a fact, or what kind of question it is
    key: Any = ""  # what it is about

    @property
    def prompt(self) -> str:
        if not self.choices:
            return self.text
        return f"{self.text}\n{self.lettered_choices}\nAnswer with the letter only."

    @property
    def lettered_choices(self) -> str:
        """One choice a line, each followed by its letter."""
        return "\n".join(map("- {} {}".format, self.choices, self.letters))


def held_out(*key: object) -> bool:
    """True for the tenth of content keys that the train split never contains."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 10 == 0


class Dice(random.Random):
    """The random numbers of one item, and choices restricted to its split's content."""

    def __init__(self, split: str, kind: str, index: int) -> None:
        """Seeded by the item's name, which random.Random hashes the same everywhere."""
        # val and test share what is kept from train
        assert split in ("train", "val", "test"), split
        super().__init__(f"{split}/{kind}/{index}")
        self.split = split
        self.free = kind == "conversation"  # a stranger asks, in more ways than a quiz

    def draw(self, label: str, pick: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """The first key from `pick` that belongs to the split; `label` is the kind of key."""
        for _ in range(1000):
            key = pick()
            if held_out(label, *key) == (self.split != "train"):
                return key
        raise AssertionError(f"the {self.split} split has no {label} to draw")

    def one_of_each(self, label: str, *items: Sequence[Any]) -> tuple[Any, ...]:
        """One of each of the `items`, as a key that belongs to the split."""
        return self.draw(label, lambda: tuple(map(self.choice, items)))

    def ways(self, *names: str) -> list[str]:
        """The templates of those names."""
        ways = [way for name in names for way in PHRASES.get(name, ())]
        return ways + [way for name in names for way in world.WORDINGS.get(name, ())] * self.free

    def say(self, template: str, keep: str = "", /, **slots: object) -> str:
        """The template filled; with capital and final mark even if a stranger's has none."""
        if not self.free:
            return fill(template, **slots)
        text = neat(" ".join(fill(template, self, **slots).split()))
        return keep + text[len(keep) :] if keep and text.startswith(capital(keep)) else text

    def phrase(self, *names: str, **slots: object) -> str:
        """A random phrase of those names, filled."""
        return self.say(self.choice(self.ways(*names)), **slots)

    def cast(self, label: str) -> dict[str, str]:
        """Who and what a text is about: values for its template's slots."""
        names = ("hero", "animal", "place", "thing")
        chosen = self.one_of_each(label, *[WORDS[name] for name in names])
        slots: dict[str, str] = dict(zip(names, chosen, strict=True))
        slots["season"] = self.choice(("spring", "summer", "autumn", "winter"))
        slots["friend"] = self.choice([name for name in WORDS["hero"] if name != slots["hero"]])
        for name in ("relative", "food", "dish", "elder", "colour", "feeling", "day"):
            slots[name] = self.choice(WORDS[name])
        for name in ("month", "weather"):
            slots[name] = self.choice(WORDS[f"{slots['season']} {name}"])
        for name, prefix in (("hero", ""), ("friend", "friend_")):
            forms = ("she", "her", "her") if slots[name] in WORDS["girl"] else ("he", "his", "him")
            slots |= zip((prefix + he for he in ("he", "his", "him")), forms, strict=True)
        return slots

    def topic(self) -> str:
        """A topic's name; larger topics are likelier."""
        return self.choices(list(KEYS), cum_weights=TOPIC_WEIGHTS)[0]

    def fact(self, clean: bool = False) -> tuple[str, str, str, str]:
        """(topic, key, value, question); a clean question is put as in a quiz."""

        def pick() -> tuple[str, str, int]:
            name = self.topic()
            topic = TOPICS[name]
            more = len(topic.wordings) if self.free and not clean else 0
            return name, self.choice(KEYS[name]), self.randrange(len(topic.questions) + more)

        name, key, phrasing = self.draw("asked", pick)
        topic = TOPICS[name]
        way = (*topic.questions, *topic.wordings)[phrasing]
        return name, key, topic.facts[key], self.say(way, key=key)

    def sum(self, smallest: int = 0, largest: int = 999) -> tuple[int, str, int, int]:
        """(first operand, operation, second operand, result), never negative."""

        def pick() -> tuple[str, int, int]:
            op = self.choice("++--*")
            top = min(largest, 99) if op == "*" or self.random() < 0.5 else largest
            low, high = sorted((self.randint(smallest, top), self.randint(smallest, top)))
            return op, high, low  # 3 + 4 and 4 + 3 are one key

        op, high, low = self.draw("sum", pick)
        x, y = (low, high) if op != "-" and self.random() < 0.5 else (high, low)
        return x, op, y, OPERATIONS[op](x, y)

    def members(self, kind: str, num: int) -> str:
        """Some members of a group: `members("fish", 3)` -> `"salmon, eel and carp"`."""
        *names, last = self.sample(world.GROUPS[kind], num)
        return f"{', '.join(names)} and {last}" if names else last


@cache
def pool(name: str, split: str) -> list[str]:
    """The words of a list that belong to the split; all of them, if none is kept from train."""
    words = LISTS[name]
    return [word for word in words if held_out(name, word) == (split != "train")] or words


Ask = Callable[[Dice], Question]


def ask_fact(dice: Dice, brief: bool | None = None) -> Question:
    """A fact, answered in a sentence, or in one word if asked for."""
    topic, key, value, text = dice.fact()
    sentences = [fill(sentence, key=key, value=value) for sentence in TOPICS[topic].sentences]
    accepted = (*sentences, f"{capital(value)}.", f"{capital(a(value))}.")
    if brief is None and dice.random() < 0.2:
        text, brief = f"{text} {dice.phrase('brief')}", True
    reply = f"{capital(value)}." if brief else dice.choice(sentences)
    return Question(text, reply, value, accepted, topic=topic, key=key)


def ask_choice(dice: Dice) -> Question:
    """A fact with lettered choices: other values of the same topic."""
    topic, _, value, text = dice.fact(clean=True)
    wrong = [other for other in TOPICS[topic].values if other != value]
    choices = dice.sample([value, *dice.sample(wrong, len(LETTERS) - 1)], len(LETTERS))
    return Question(text, LETTERS[choices.index(value)], value, choices=tuple(choices))


def ask_letter(dice: Dice) -> Question:
    """Which letter goes with a choice: the skill that multiple choice needs besides knowledge.

    Short lists and arbitrary letters teach copying before choosing; from ordered lists of three
    alone a small model learns neither (dev/LOG.md).
    """
    choices = dice.sample(TOPICS[dice.choice(list(TOPICS))].values, dice.choice((1, 2, 2, 3, 3)))
    letters = "".join(dice.sample("ABCDEFGH", len(choices)))
    value, letter = dice.choice(list(zip(choices, letters, strict=True)))
    text = dice.phrase("which letter", value=value)
    return Question(text, letter, value, choices=tuple(choices), letters=letters)


def ask_yes_no(dice: Dice) -> Question:
    def pick() -> tuple[str, str, str, str]:
        topic = dice.choice(("colour", "kind"))
        key, truth = dice.choice(list(TOPICS[topic].facts.items()))
        value = truth if dice.random() < 0.5 else dice.choice(TOPICS[topic].values)
        return dice.choice(dice.ways("yes", f"yes {topic}")), topic, key, value

    phrase, topic, key, value = dice.draw("yes", pick)
    words = key, value, TOPICS[topic].facts[key]
    thing, asked, truth = words if topic == "colour" else map(a, words)
    reply = f"{'Yes' if asked == truth else 'No'}, {thing} is {truth}."
    text = dice.say(phrase, key=thing, value=asked, x=key, kind=value)
    return Question(text, reply, topic="yes")


def ask_bigger(dice: Dice) -> Question:
    def pick() -> tuple[str, ...]:
        return dice.choice(dice.ways("bigger")), *dice.sample(WORDS["size"], 2)

    phrase, x, y = dice.draw("bigger", pick)
    return Question(dice.say(phrase, x=x, y=y), compare(x, y), topic="bigger")


def compare(x: str, y: str) -> str:
    """`compare("ant", "fox")` -> `"A fox is bigger than an ant."`."""
    small, big = sorted((x, y), key=WORDS["size"].index)
    return fill("{A big} is bigger than {a small}.", big=big, small=small)


def ask_list(dice: Dice) -> Question:
    def pick() -> tuple[str, int, str]:
        name = dice.choice(("list", "list", "list some", "list one")) if dice.free else "list"
        num = {"list some": 3, "list one": 1}.get(name) or dice.randint(2, 4)
        return dice.choice(dice.ways(name)), num, dice.choice(list(world.GROUPS))

    phrase, num, kind = dice.draw("list", pick)
    word = WORDS["number"][num]
    text = dice.say(phrase, n=num if dice.free and dice.random() < 0.4 else word, kind=kind)
    head = "Here are {n} {s kind}" if num > 1 else "Here is {a kind}"
    reply = fill(head + ": {m}.", n=word, kind=kind, m=dice.members(kind, num))
    return Question(text, reply, topic="list", key=kind)


def ask_counting(dice: Dice) -> Question:
    up = dice.free and dice.random() < 0.3
    ways, lows = dice.ways("count up" if up else "count"), [1] if up else range(96)
    way, low, num = dice.one_of_each("count", ways, lows, range(3, 12))
    numbers = ", ".join(map(str, range(low, low + num + 1)))
    text = dice.say(way, a=low, b=low + num)
    return Question(text, f"{numbers}.")


def ask_sum(dice: Dice, in_words: bool = False) -> Question:
    """Two operands, bare or in a short story, computed with the calculator."""
    x, op, y, result = dice.sum(smallest=2 if in_words else 0)
    slots = dice.cast("problem") if in_words else {}
    word = {"+": "plus", "-": "minus", "*": "times"}[op]
    names = [f"problem {op}"] if in_words else ["sum", f"sum {op}"]
    text = dice.phrase(*names, a=x, b=y, op=op, word=word, **slots)
    return Question(text, computed(x, op, y, result), str(result), topic="sum")


def computed(x: int, op: str, y: int, result: int) -> list[dict[str, str]]:
    return by_tool(f"{x}{op}{y}", result, f"{x} {op} {y} = {result}.")


def by_tool(code: str, result: object, reply: str) -> list[dict[str, str]]:
    parts = (("python", code), ("python_output", str(result)), ("text", reply))
    return [{"type": kind, "text": text} for kind, text in parts]


def ask_letters(dice: Dice, by_hand: bool = False) -> Question:
    """How often a letter occurs in a word: by the tool, or by hand and then checked."""

    def pick() -> tuple[str, str]:
        word = dice.choice(list(REPLIES["spell"]))
        return word, dice.choice(word if dice.random() < 0.8 else ascii_lowercase)

    word, letter = dice.draw("letter", pick)
    parts = counted(word, letter)
    num = parts[1]["text"]
    if by_hand:
        parts.insert(0, {"type": "text", "text": tally(word, letter) + ". "})
    shown = letter.upper() if dice.free and dice.random() < 0.15 else letter
    text = dice.phrase("by hand" if by_hand else "letters", word=word, letter=shown)
    return Question(text, parts, num, keep=(word,), topic="letters", key=word)


def counted(word: str, letter: str) -> list[dict[str, str]]:
    num = word.count(letter)
    times = "1 time" if num == 1 else f"{num} times"
    reply = f"The letter {letter} appears {times} in '{word}'."
    return by_tool(f"'{word}'.count('{letter}')", num, reply)


def tally(word: str, letter: str) -> str:
    """The word spelled with a running count: `tally("noon", "o")` -> `"n, o 1, o 2, n"`."""
    counts = count(1)
    return ", ".join(f"{each} {next(counts)}" if each == letter else each for each in word)


def ask_length(dice: Dice) -> Question:
    way, word = dice.one_of_each("length", dice.ways("length"), list(REPLIES["spell"]))
    letters = ", ".join(f"{letter} {place}" for place, letter in enumerate(word, 1))
    reply = f"{letters}. The word '{word}' has {len(word)} letters."
    return Question(dice.say(way, word=word), reply, keep=(word,), topic="letters", key=word)


def ask_repeat(dice: Dice) -> Question:
    slots = dice.cast("repeat")
    what = fill(dice.choice(PHRASES["repeated"]), **slots)
    return Question(dice.phrase("repeat", what=what), what, keep=(what,))


def ask_about(dice: Dice, label: str) -> Question:
    phrase, key = dice.one_of_each(label, dice.ways(label), list(REPLIES[label]))
    reply = REPLIES[label][key]
    keep = (key,) if label == "spell" else ()
    text = dice.say(phrase, key=key, word=bare(key))
    return Question(text, reply, reply, keep=keep, topic=label, key=key)


def ask_talk(dice: Dice, *names: str) -> Question:
    """Manners, and who the model is: the same in every split."""
    said, replies = dice.choice([row for name in names for row in world.TALK[name]])
    topic = "joke" if "tell me a joke" in said else ""
    text = neat(fill(dice.choice(said), dice))
    return Question(text, dice.choice(replies), alone=True, topic=topic, key=replies)


ask_problem = partial(ask_sum, in_words=True)
ask_by_hand = partial(ask_letters, by_hand=True)
ask_spelling = partial(ask_about, label="spell")
QUIZZES: dict[str, tuple[Ask, ...]] = {
    "choice": (ask_choice,),
    "letter": (ask_letter,),
    "exact": (ask_fact,),
    "arithmetic": (ask_sum, ask_sum, ask_problem),
    "spelling": (ask_spelling, ask_letters),
}


def quiz(split: str, kind: str, index: int) -> Question:
    """Question `index` of a quiz: choice, letter, exact, arithmetic or spelling."""
    dice = Dice(split, kind, index)
    return dice.choice(QUIZZES[kind])(dice)
