"""The questions of the primer with correct replies, and quizzes made of them.

Splits differ in content, not just in seed: what a question is about (two operands; phrasing and
fact; word and letter) is hashed, and a tenth of all keys never appears in the train split, neither
in a conversation nor on a page. Facts themselves are in both: no model can know a capital that it
was never told.
"""

import hashlib
import operator
import random
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import combinations
from string import ascii_lowercase
from typing import Any, NamedTuple

from primer import world
from primer.world import GROUPS, PHRASES, SUBJECTS, TOPICS, WORDINGS, WORDS, a, capital, fill

LETTERS = "ABC"  # of a quiz
TOLD = ("nature", "define", "how")  # topics whose values are too long to choose between
SPELLED = ("spell", "length")  # and those about the letters of their keys
FORMED = ("plural", "past")  # and those of exceptions, where mistakes are made by rule
OPERATIONS = {"+": "plus", "-": "minus", "*": "times"}
RESULTS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
TESTED = [name for name in TOPICS if name not in TOLD + SPELLED]
KEYS = {name: list(topic.facts) for name, topic in TOPICS.items()}
WEIGHTS = [len(KEYS[name]) ** 0.5 for name in TESTED]
DOUBTED = [name.removeprefix("yes ") for name in WORDINGS if name.startswith("yes ")]
FACTORS = [name.removeprefix("by ") for name in WORDINGS if name.startswith("by ")]


class Question(NamedTuple):
    """A user's question and a correct reply; `accepted` are other correct replies."""

    text: str
    reply: str | list[dict[str, str]]
    answer: str = ""  # the right choice, or the fact in one word
    accepted: tuple[str, ...] = ()  # the first is a whole sentence
    choices: tuple[str, ...] = ()  # of a multiple-choice question: `text` stands before them
    letters: str = LETTERS  # one for each choice
    keep: str = ""  # what noise must leave alone
    topic: str = ""  # of a fact, or a kind of question; without one nothing is said around it
    key: Any = ""  # what it is about

    @property
    def prompt(self) -> str:
        if not self.choices:
            return self.text
        return f"{self.text}\n{self.lettered_choices}\nAnswer with the letter only."

    @property
    def lettered_choices(self) -> str:
        """One choice a line, each followed by its letter."""
        return "\n".join(map(lettered, self.choices, self.letters))


def lettered(choice: str, letter: str) -> str:
    return f"- {choice} {letter}"


def held_out(*key: object) -> bool:
    """True for the tenth of content keys that the train split never contains."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def belongs(split: str, *key: object) -> bool:
    """True for the keys that the split may contain; val and test share what train may not."""
    return held_out(*key) == (split != "train")


@cache
def pool(name: str, split: str) -> list[str]:
    """The words of a list that belong to the split; all of them, if none is kept from train."""
    words = SUBJECTS[name]
    return [word for word in words if belongs(split, name, word)] or words


class Dice(random.Random):
    """The random numbers of one item, and choices restricted to its split's content."""

    def __init__(self, split: str, kind: str, index: int) -> None:
        """Seeded by the item's name, which random.Random hashes the same everywhere."""
        assert split in ("train", "val", "test"), split
        super().__init__(f"{split}/{kind}/{index}")
        self.split = split
        self.free = kind == "conversation"  # a stranger asks, in more ways than a quiz

    def draw(self, label: str, pick: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """The first key from `pick` that belongs to the split; `label` is the kind of key."""
        for _ in range(1000):
            key = pick()
            if belongs(self.split, label, *key):
                return key
        raise AssertionError(f"the {self.split} split has no {label} to draw")

    def one_of_each(self, label: str, *items: Sequence[Any]) -> tuple[Any, ...]:
        """One of each of the `items`, as a key that belongs to the split."""
        return self.draw(label, lambda: tuple(map(self.choice, items)))

    def word(self, name: str) -> str:
        """A word of a list as it may be typed; replies copy it, since small models copy best."""
        word = self.choice(pool(name, self.split))
        return word.lower() if self.random() < 0.5 else word

    def ways(self, *names: str) -> list[str]:
        """The templates of those names."""
        ways = [way for name in names for way in PHRASES.get(name, ())]
        if self.free or not ways:
            ways += [way for name in names for way in WORDINGS.get(name, ())]
        return ways

    def say(self, template: str, **slots: object) -> str:
        """The template filled."""
        return " ".join(fill(template, self, **slots).split())

    def phrase(self, *names: str, **slots: object) -> str:
        """One of the ways, filled."""
        return self.say(self.choice(self.ways(*names)), **slots)

    def reply(self, name: str, /, **slots: object) -> str:
        return fill(self.choice(world.REPLIES[name]), **slots)

    def cast(self) -> dict[str, str]:
        """Who and what a text is about: values for its template's slots."""
        slots = {name: self.choice(words) for name, words in WORDS.items()}
        slots["friend"] = self.choice([name for name in WORDS["hero"] if name != slots["hero"]])
        slots["rhyming"] = TOPICS["rhyme"].facts[slots["rhyme"]]
        for name in ("month", "weather"):
            slots[name] = slots[f"{slots['season']} {name}"]
        for name, prefix in (("hero", ""), ("friend", "friend_")):
            forms = ("she", "her", "her") if slots[name] in WORDS["girl"] else ("he", "his", "him")
            slots |= zip((prefix + he for he in ("he", "his", "him")), forms, strict=True)
        return slots

    def topic(self) -> str:
        """A topic of quizzes; larger ones are likelier."""
        return self.choices(TESTED, WEIGHTS)[0]


def ask_fact(
    dice: Dice, topic: str = "", key: str = "", way: str = "", brief: bool = False
) -> Question:
    """A fact, answered in a sentence, or in one word if asked for.

    Strangers ask for one word more often: it needs the fact at once, without the sentence that
    leads there, and is what multiple choice needs (dev/LOG.md).
    """
    topic = topic or dice.topic()
    if not way:
        ways = dice.ways(topic, f"either {topic}")
        _, key, way = dice.one_of_each("asked", [topic], KEYS[topic], ways)
    key = key or dice.choice(KEYS[topic])
    value, told = TOPICS[topic].facts[key], TOPICS[topic].told(key)
    one, two = dice.sample((value, mistaken(dice, topic, key)), 2)
    text = dice.say(way, key=key, value=value, one=one, two=two)
    if not brief and topic in TESTED and dice.random() < (0.4 if dice.free else 0.2):
        text, brief = f"{text} {dice.phrase('brief')}", True
    accepted = (*told, f"{capital(value)}.", f"{capital(a(value))}.")
    reply = f"{capital(value)}." if brief else told[0]
    keep = key if topic in SPELLED else ""
    return Question(text, reply, value, accepted, keep=keep, topic=topic, key=key)


def mistaken(dice: Dice, topic: str, key: str) -> str:
    """What somebody may take for the value: another one, or a form without its exception."""
    if topic in FORMED:
        return f"{key}s" if topic == "plural" else f"{key.removesuffix('e')}ed"
    right = (key, TOPICS[topic].facts[key])
    return dice.choice([value for value in TOPICS[topic].values if value not in right])


def ask_choice(dice: Dice) -> Question:
    """A fact with lettered choices: other values of the same topic."""
    topic = dice.topic()
    _, key, way = dice.one_of_each("asked", [topic], KEYS[topic], PHRASES[topic])
    value, values = TOPICS[topic].facts[key], TOPICS[topic].values
    wrong = dice.sample([other for other in values if other != value], len(LETTERS) - 1)
    choices = tuple(dice.sample([value, *wrong], len(LETTERS)))
    text, letter = dice.say(way, key=key), LETTERS[choices.index(value)]
    about = (topic, LETTERS, choices)
    return Question(text, letter, value, choices=choices, topic="letter", key=about)


def ask_letter(dice: Dice) -> Question:
    """Which letter goes with a choice: the skill that multiple choice needs besides knowledge.

    Short lists and arbitrary letters teach copying before choosing; from ordered lists of three
    alone a small model learns neither (dev/LOG.md).
    """
    topic = dice.choice(TESTED)
    choices = tuple(dice.sample(TOPICS[topic].values, dice.choice((1, 2, 2, 3, 3))))
    letters = "".join(dice.sample("ABCDEFGH", len(choices)))
    value, letter = dice.choice(list(zip(choices, letters, strict=True)))
    asked = Question(dice.phrase("which letter", value=value), letter, value, topic="letter")
    return asked._replace(choices=choices, letters=letters, key=(topic, letters, choices))


def another_letter(
    dice: Dice, last: Question, name: str = "letter again", recalled: float = 0.9
) -> Question:
    """Which letter of the same list goes with an item: one that is named, or answers a question.

    The latter in a share `recalled`. Several on one list teach to recall and to match at once,
    which a question with three choices alone does in some runs only (dev/LOG.md).
    """
    topic, letters, choices = last.key
    facts = TOPICS[topic].facts
    key = dice.choice([key for key in facts if facts[key] in choices])
    way = dice.choice(PHRASES[topic])
    if belongs(dice.split, "asked", topic, key, way) and dice.random() < recalled:
        value, text = facts[key], dice.say(way, key=key)
    else:
        value = dice.choice(choices)
        text = dice.phrase(name, value=value)
    return Question(text, letters[choices.index(value)], topic="letter", key=last.key)


def inside(topic: str, key: str) -> str:
    """The fact as it stands inside a sentence: `"snow is white."`."""
    return fill(TOPICS[topic].sentences[0].lower(), key=key, value=TOPICS[topic].facts[key])


def ask_yes_no(dice: Dice) -> Question:
    """Whether a fact is so; what is false is put right."""
    topic = dice.choice((*DOUBTED, "colour", "kind", "colour", "kind"))
    form = a if topic == "kind" else str
    names = ["yes"] * (topic in ("colour", "kind")) + [f"yes {topic}"]
    facts = list(TOPICS[topic].facts.items())
    way, (key, truth) = dice.one_of_each("yes", dice.ways(*names), facts)
    value = truth if dice.random() < 0.5 else mistaken(dice, topic, key)
    text = dice.say(way, key=form(key), value=form(value), x=key, kind=value)
    return judged(text, topic, key, value)


def judged(text: str, topic: str, key: str, value: str) -> Question:
    """The question whether that is the key's value, answered."""
    yes, fact = "Yes" if value == TOPICS[topic].facts[key] else "No", inside(topic, key)
    about = (topic, key, value)
    return Question(text, f"{yes}, {fact}", yes, (capital(fact),), topic="yes", key=about)


def ask_bigger(dice: Dice, name: str = "bigger") -> Question:
    pairs = list(combinations(WORDS["size"], 2))
    way, (small, big) = dice.one_of_each("bigger", dice.ways(name), pairs)
    x, y = dice.sample((small, big), 2)
    fact = fill("{A big} is bigger than {a small}.", big=big, small=small)
    return Question(dice.say(way, x=x, y=y), fact, a(big), (fact,), topic="bigger")


def ask_list(dice: Dice) -> Question:
    name, nums = dice.choice((("list", (2, 3, 4)), ("list some", (3,)), ("list one", (1,))))
    way, num, kind = dice.one_of_each("list", dice.ways(name), nums, list(GROUPS))
    return listed(dice, way, kind, dice.sample(GROUPS[kind], num))


def listed(dice: Dice, way: str, kind: str, members: list[str]) -> Question:
    """The wish for members of a kind, fulfilled."""
    num, (*names, last) = len(members), members
    text = f"{', '.join(names)} and {last}" if names else last
    word = WORDS["number"][num]
    reply = dice.reply("list one" if num == 1 else "list", n=word, kind=kind, members=text)
    asked = dice.say(way, n=dice.choice((word, num)), kind=kind)
    return Question(asked, reply, topic="list", key=(kind, members))


def ask_counting(dice: Dice) -> Question:
    name, lows = dice.choice((("count", range(96)), ("count up", [1])))
    way, low, num = dice.one_of_each("count", dice.ways(name), lows, range(3, 12))
    numbers = ", ".join(map(str, range(low, low + num + 1)))
    return Question(dice.say(way, a=low, b=low + num), f"{numbers}.")


def ask_sum(dice: Dice, story: bool = False, first: int | None = None) -> Question:
    """A sum, bare or in a short story or after the `first` number, done with the calculator."""
    least = 2 if story else 0

    def pick() -> tuple[str, int, int]:
        op = dice.choice("++--*" if (first or 0) < 100 else "+-")
        most = 99 if op == "*" or dice.random() < 0.5 else 999
        if dice.free and dice.random() < 0.3:
            most = 20  # strangers count apples, too
        x = dice.randint(least, most) if first is None else first
        y = dice.randint(least, min(x, most) if op == "-" else most)
        return op, max(x, y), min(x, y)  # 3 + 4 and 4 + 3 are one key

    op, high, low = dice.draw("sum", pick)
    x = high if op == "-" else dice.choice((high, low))
    if first is not None:
        x = first
    y = high + low - x
    word = OPERATIONS[op]
    slots, names = {}, ["sum", f"sum {op}"] if first is None else [word]
    if story:
        slots, names = dice.cast(), [f"problem {op}"]
        if dice.free and dice.random() < 0.5:
            slots["thing"] = dice.word("tale thing")
    claimed = RESULTS[op](x, y) + dice.choice((0, 0, 1, 2, 10))
    text = dice.phrase(*names, **slots, a=x, b=y, c=claimed, op=op, word=word)
    return reckoned(text, x, op, y)


def ask_product(dice: Dice) -> Question:
    """A product one factor of which is said in words: double, days in weeks, the legs of dogs."""
    factor = dice.choice(FACTORS)

    def pick() -> tuple[str, int, int]:
        y = dice.randint(2, 99)
        x = y if factor == "itself" else int(factor)
        return "*", max(x, y), min(x, y)

    op, high, low = dice.draw("sum", pick)
    x = high if factor == "itself" else int(factor)
    y = high + low - x
    return reckoned(dice.phrase(f"by {factor}", **dice.cast(), b=y), x, op, y)


def reckoned(text: str, x: int, op: str, y: int) -> Question:
    """The sum asked for in a text, done with the calculator."""
    result = RESULTS[op](x, y)  # never negative
    reply = f"{x} {op} {y} = {result}."
    parts = by_tool(f"{x}{op}{y}", result, reply)
    return Question(text, parts, str(result), (reply,), topic="sum", key=(x, op, y))


def by_tool(code: str, result: object, reply: str) -> list[dict[str, str]]:
    parts = (("python", code), ("python_output", str(result)), ("text", reply))
    return [{"type": kind, "text": text} for kind, text in parts]


def ask_letters(dice: Dice) -> Question:
    """How often a letter occurs in a word."""

    def pick() -> tuple[str, str]:
        word = dice.choice(KEYS["spell"])
        return word, dice.choice(word if dice.random() < 0.8 else ascii_lowercase)

    word, letter = dice.draw("letter", pick)
    return letters_counted(dice, "letters", word, letter)


def letters_counted(dice: Dice, name: str, word: str, letter: str) -> Question:
    """A letter in a word, counted by the tool."""
    num = word.count(letter)
    times = "1 time" if num == 1 else f"{num} times"
    reply = f"The letter {letter} appears {times} in '{word}'."
    parts = by_tool(f"'{word}'.count('{letter}')", num, reply)
    text = dice.phrase(name, word=word, letter=letter)
    return Question(text, parts, str(num), (reply,), keep=word, topic="letters", key=(word, letter))


def ask_repeat(dice: Dice) -> Question:
    what = dice.reply("repeated", **dice.cast())
    return Question(dice.phrase("repeat", what=what), what, keep=what)


def ask_talk(dice: Dice, *names: str) -> Question:
    """Manners, and who the model is: the same in every split."""
    said, replies = dice.choice([row for name in names for row in world.TALK[name]])
    return Question(dice.say(dice.choice(said)), dice.choice(replies))


def ask_outside(dice: Dice, name: str = "", way: str = "", **given: str) -> Question:
    """Something that no table knows or that cannot be done; an honest reply that copies it."""
    name = name or dice.choice(list(world.ASKED))
    way = way or dice.choice(world.ASKED[name])
    names = re.findall(r"\{(?:\w+ )?(\w{2,})\}", way.lower())
    slots = {slot: dice.word(slot if slot in SUBJECTS else name) for slot in names} | given
    numbers = {"a": dice.randint(2, 999), "b": dice.randint(2, 20), "c": dice.randint(2, 99)}
    subject = slots.get("key") or slots.get(name, "")
    known = name if name in world.REPLIES else "unknown" if subject else "unknown bare"
    text, reply = dice.say(way, **slots, **numbers), dice.reply(known, subject=subject, **slots)
    return Question(text, reply, keep=subject, topic=f"outside {name}", key=subject)


def ask_near(dice: Dice) -> Question:
    """A question as about a fact, but the key is not in the world."""
    topic = dice.choice([*TESTED, *TOLD])
    one, two = dice.sample(TOPICS[topic].values, 2)
    ways = dice.ways(topic) if topic in FORMED else dice.ways(topic, f"either {topic}")
    return ask_outside(dice, f"near {topic}", dice.choice(ways), one=one, two=two)


def ask_nonsense(dice: Dice) -> Question:
    typed = "".join(dice.choices(ascii_lowercase, k=dice.randint(4, 12)))
    text = dice.choice(WORDINGS["nonsense"]) if dice.random() < 0.6 else typed
    return Question(text, dice.reply("nonsense"), keep=text)


QUIZZES: dict[str, list[Callable[[Dice], Question]]] = {
    "choice": [ask_choice],
    "exact": [ask_fact],
    "arithmetic": [ask_sum, ask_sum, partial(ask_sum, story=True)],
    "spelling": [partial(ask_fact, topic="spell"), ask_letters],
}


def quiz(split: str, kind: str, index: int) -> Question:
    """Question `index` of a quiz: choice, exact, arithmetic or spelling."""
    dice = Dice(split, kind, index)
    return dice.choice(QUIZZES[kind])(dice)
