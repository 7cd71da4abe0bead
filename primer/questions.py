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
from itertools import accumulate, permutations
from string import ascii_lowercase
from typing import Any, NamedTuple

from primer import world
from primer.world import GROUPS, PHRASES, TOPICS, WORDINGS, WORDS, a, capital, chosen, fill

LETTERS = "ABC"  # of a quiz
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
TOLD = ("nature", "define", "how", "spell")  # topics whose values are too long to choose between
KEYS = {name: list(topic.facts) for name, topic in TOPICS.items()}
TESTED = [name for name in TOPICS if name not in TOLD]
TOPIC_WEIGHTS = list(accumulate(len(KEYS[name]) ** 0.5 for name in TESTED))
LISTS = world.SUBJECTS | {f"tale {name}": words for name, words in world.HEROES.items()}
LISTS |= {f"near {topic}": keys for topic, keys in world.NEAR.items()}


class Question(NamedTuple):
    """A user's question and a correct reply; `accepted` are other correct replies."""

    text: str
    reply: str | list[dict[str, str]]
    answer: str = ""  # the right choice, or the fact in one word
    accepted: tuple[str, ...] = ()  # the first is a whole sentence
    choices: tuple[str, ...] = ()  # of a multiple-choice question: `text` stands before them
    letters: str = LETTERS  # one for each choice
    keep: str = ""  # what noise must leave alone
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


@cache
def pool(name: str, split: str) -> list[str]:
    """The words of a list that belong to the split; all of them, if none is kept from train."""
    words = LISTS[name]
    return [word for word in words if held_out(name, word) == (split != "train")] or words


class Dice(random.Random):
    """The random numbers of one item, and choices restricted to its split's content."""

    def __init__(self, split: str, kind: str, index: int) -> None:
        """Seeded by the item's name, which random.Random hashes the same everywhere."""
        # val and test share what is kept from train
        assert split in ("train", "val", "test"), split
        super().__init__(f"{split}/{kind}/{index}")
        self.split = split
        self.free = kind == "conversation"  # a stranger asks, in more ways than a quiz

    def owns(self, label: str, key: Sequence[object]) -> bool:
        """Whether a key of that kind belongs to the split."""
        return held_out(label, *key) == (self.split != "train")

    def draw(self, label: str, pick: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """The first key from `pick` that belongs to the split; `label` is the kind of key."""
        for _ in range(1000):
            key = pick()
            if self.owns(label, key):
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
        """A random phrase of those names, filled."""
        return self.say(self.choice(self.ways(*names)), **slots)

    def reply(self, name: str, **slots: object) -> str:
        return fill(self.choice(world.REPLIES[name]), **slots)

    def cast(self) -> dict[str, str]:
        """Who and what a text is about: values for its template's slots."""
        slots = {name: self.choice(words) for name, words in WORDS.items()}
        slots["friend"] = self.choice([name for name in WORDS["hero"] if name != slots["hero"]])
        for name in ("month", "weather"):
            slots[name] = slots[f"{slots['season']} {name}"]
        for name, prefix in (("hero", ""), ("friend", "friend_")):
            forms = ("she", "her", "her") if slots[name] in WORDS["girl"] else ("he", "his", "him")
            slots |= zip((prefix + he for he in ("he", "his", "him")), forms, strict=True)
        return slots

    def fact(self, topic: str = "", clean: bool = False) -> tuple[str, str, str]:
        """(topic, key, wording); a clean one is a quiz's. Larger topics are likelier."""

        def pick() -> tuple[str, str, int]:
            name = topic or self.choices(TESTED, cum_weights=TOPIC_WEIGHTS)[0]
            ways = PHRASES[name] if clean else self.ways(name)
            return name, self.choice(KEYS[name]), self.randrange(len(ways))

        name, key, place = self.draw("asked", pick)
        return name, key, (PHRASES[name] + WORDINGS[name])[place]

    def sum(
        self, smallest: int = 0, largest: int = 999, first: int | None = None
    ) -> tuple[int, str, int, int]:
        """(first operand, operation, second operand, result), never negative."""

        def pick() -> tuple[str, int, int]:
            op = self.choice("++--*" if (first or 0) < 100 else "+-")
            top = min(largest, 99) if op == "*" or self.random() < 0.5 else largest
            x = self.randint(smallest, top) if first is None else first
            y = self.randint(smallest, min(x, top) if op == "-" else top)
            return op, max(x, y), min(x, y)  # 3 + 4 and 4 + 3 are one key

        op, high, low = self.draw("sum", pick)
        x = high if op == "-" else self.choice((high, low))
        if first is not None:
            x = first
        y = high + low - x
        return x, op, y, OPERATIONS[op](x, y)

    def members(self, names: list[str], num: int) -> str:
        """Some of the names: `members(["carp", "eel", "cod"], 2)` -> `"eel and carp"`."""
        *names, last = self.sample(names, num)
        return f"{', '.join(names)} and {last}" if names else last


def stated(dice: Dice, topic: str, key: str) -> str:
    """A sentence that tells a fact."""
    return fill(dice.choice(TOPICS[topic].sentences), key=key, value=TOPICS[topic].facts[key])


def ask_fact(
    dice: Dice, topic: str = "", key: str = "", way: str = "", brief: bool = False
) -> Question:
    """A fact, answered in a sentence, or in one word if asked for."""
    if not way:
        topic, key, way = dice.fact(topic)
    key = key or dice.choice(KEYS[topic])
    value, text = TOPICS[topic].facts[key], dice.say(way, key=key)
    if not brief and topic in TESTED and dice.random() < 0.2:
        joint = " " if text[-1] in ".?!" else ", "
        text, brief = text + joint + dice.phrase("brief"), True
    sentences = [fill(sentence, key=key, value=value) for sentence in TOPICS[topic].sentences]
    accepted = (*sentences, f"{capital(value)}.", f"{capital(a(value))}.")
    reply = f"{capital(value)}." if brief else dice.choice(sentences)
    keep = key if topic == "spell" else ""
    return Question(text, reply, value, accepted, keep=keep, topic=topic, key=key)


def ask_choice(dice: Dice) -> Question:
    """A fact with lettered choices: other values of the same topic."""
    topic, key, way = dice.fact(clean=True)
    value, values = TOPICS[topic].facts[key], TOPICS[topic].values
    wrong = dice.sample([other for other in values if other != value], len(LETTERS) - 1)
    choices = tuple(dice.sample([value, *wrong], len(LETTERS)))
    letter = LETTERS[choices.index(value)]
    return Question(dice.say(way, key=key), letter, value, choices=choices)


def ask_letter(dice: Dice) -> Question:
    """Which letter goes with a choice: the skill that multiple choice needs besides knowledge.

    Short lists and arbitrary letters teach copying before choosing; from ordered lists of three
    alone a small model learns neither (dev/LOG.md).
    """
    choices = dice.sample(TOPICS[dice.choice(TESTED)].values, dice.choice((1, 2, 2, 3, 3)))
    letters = "".join(dice.sample("ABCDEFGH", len(choices)))
    value, letter = dice.choice(list(zip(choices, letters, strict=True)))
    text = dice.phrase("which letter", value=value)
    return Question(text, letter, value, choices=tuple(choices), letters=letters)


def ask_yes_no(dice: Dice) -> Question:
    topic = dice.choice(("colour", "kind"))
    ways, facts = dice.ways("yes", f"yes {topic}"), list(TOPICS[topic].facts.items())
    way, (key, truth) = dice.one_of_each("yes", ways, facts)
    value = truth if dice.random() < 0.5 else dice.choice(TOPICS[topic].values)
    words = key, value, truth
    thing, asked, fact = words if topic == "colour" else map(a, words)
    yes, fact = "Yes" if value == truth else "No", f"{thing} is {fact}."
    text = dice.say(way, key=thing, value=asked, x=key, kind=value)
    return Question(text, f"{yes}, {fact}", yes, (capital(fact),), topic="yes")


def ask_bigger(dice: Dice) -> Question:
    pairs = list(permutations(WORDS["size"], 2))
    way, (x, y) = dice.one_of_each("bigger", dice.ways("bigger"), pairs)
    fact, big = compare(x, y), max(x, y, key=WORDS["size"].index)
    return Question(dice.say(way, x=x, y=y), fact, a(big), (fact,), topic="bigger")


def compare(x: str, y: str) -> str:
    """`compare("ant", "fox")` -> `"A fox is bigger than an ant."`."""
    small, big = sorted((x, y), key=WORDS["size"].index)
    return fill("{A big} is bigger than {a small}.", big=big, small=small)


def ask_list(dice: Dice) -> Question:
    lists = (("list", (2, 3, 4)), ("list", (2, 3, 4)), ("list some", (3,)), ("list one", (1,)))
    name, nums = dice.choice(lists)
    way, num, kind = dice.one_of_each("list", dice.ways(name), nums, list(GROUPS))
    word = WORDS["number"][num]
    head = "Here are {n} {s kind}" if num > 1 else "Here is {a kind}"
    reply = fill(head + ": {m}.", n=word, kind=kind, m=dice.members(GROUPS[kind], num))
    text = dice.say(way, n=dice.choice((word, num)), kind=kind)
    return Question(text, reply, topic="list", key=kind)


def ask_counting(dice: Dice) -> Question:
    name, lows = dice.choice((("count", range(96)), ("count", range(96)), ("count up", [1])))
    way, low, num = dice.one_of_each("count", dice.ways(name), lows, range(3, 12))
    numbers = ", ".join(map(str, range(low, low + num + 1)))
    return Question(dice.say(way, a=low, b=low + num), f"{numbers}.")


def ask_sum(dice: Dice, in_words: bool = False, first: int | None = None) -> Question:
    """Two operands, bare or in a short story or after a result, computed with the calculator."""
    x, op, y, result = dice.sum(smallest=2 if in_words else 0, first=first)
    slots = dice.cast() if in_words else {}
    word = {"+": "plus", "-": "minus", "*": "times"}[op]
    names = [f"problem {op}"] if in_words else ["sum", f"sum {op}"]
    text = dice.phrase(*names if first is None else [word], a=x, b=y, op=op, word=word, **slots)
    reply = f"{x} {op} {y} = {result}."
    parts = by_tool(f"{x}{op}{y}", result, reply)
    return Question(text, parts, str(result), (reply,), topic="sum")


def by_tool(code: str, result: object, reply: str) -> list[dict[str, str]]:
    parts = (("python", code), ("python_output", str(result)), ("text", reply))
    return [{"type": kind, "text": text} for kind, text in parts]


def ask_letters(dice: Dice, name: str = "letters", word: str = "", letter: str = "") -> Question:
    """How often a letter occurs in a word, counted by the tool."""

    def pick() -> tuple[str, str]:
        word = dice.choice(KEYS["spell"])
        return word, dice.choice(word if dice.random() < 0.8 else ascii_lowercase)

    word, letter = (word, letter) if word else dice.draw("letter", pick)
    num = word.count(letter)
    times = "1 time" if num == 1 else f"{num} times"
    reply = f"The letter {letter} appears {times} in '{word}'."
    parts = by_tool(f"'{word}'.count('{letter}')", num, reply)
    text = dice.phrase(name, word=word, letter=letter)
    return Question(text, parts, str(num), keep=word, topic="letters", key=word)


def ask_length(dice: Dice) -> Question:
    way, word = dice.one_of_each("length", dice.ways("length"), KEYS["spell"])
    letters = ", ".join(f"{letter} {place}" for place, letter in enumerate(word, 1))
    reply = f"{letters}. The word '{word}' has {len(word)} letters."
    return Question(dice.say(way, word=word), reply, keep=word, topic="letters", key=word)


def ask_repeat(dice: Dice) -> Question:
    what = dice.reply("repeated", **dice.cast())
    return Question(dice.phrase("repeat", what=what), what, keep=what)


def ask_talk(dice: Dice, *names: str) -> Question:
    """Manners, and who the model is: the same in every split."""
    said, replies = dice.choice([row for name in names for row in world.TALK[name]])
    return Question(dice.say(dice.choice(said)), dice.choice(replies), alone=True)


def ask_outside(dice: Dice, name: str = "", way: str = "") -> Question:
    """Something that no table knows or that cannot be done; an honest reply that copies it."""
    name = name or dice.choice(list(world.ASKED))
    way = chosen(way or dice.choice(world.ASKED[name]), dice)  # its choices first: they hold slots
    slots = {
        slot: dice.word(slot if slot in LISTS else name)
        for slot in re.findall(r"\{(?:\w+ )?(\w{2,})\}", way.lower())
    }
    numbers = {"a": dice.randint(2, 999), "b": dice.randint(2, 20), "c": dice.randint(2, 99)}
    subject = slots.get("key") or slots.get(name, "")
    known = name if name in world.REPLIES else "unknown" if subject else "unknown bare"
    reply = dice.reply(known, subject=subject, **slots)
    topic = name if name.startswith("near ") else f"outside {name}"
    return Question(
        dice.say(way, **slots, **numbers), reply, keep=subject, topic=topic, key=subject
    )


def ask_near(dice: Dice) -> Question:
    """A question as about a fact, but the key is not in the world."""
    topic = dice.choice(list(world.NEAR))
    return ask_outside(dice, f"near {topic}", dice.choice(dice.ways(topic)))


def ask_nonsense(dice: Dice) -> Question:
    text = dice.choice(WORDINGS["nonsense"])
    if dice.random() < 0.4:
        lengths = [dice.randint(4, 9) for _ in range(dice.randint(1, 3))]
        text = " ".join("".join(dice.choices(ascii_lowercase, k=num)) for num in lengths)
    return Question(text, dice.reply("nonsense"), keep=text, alone=True)


ask_problem = partial(ask_sum, in_words=True)
Ask = Callable[[Dice], Question]
QUIZZES: dict[str, tuple[Ask, ...]] = {
    "choice": (ask_choice,),
    "letter": (ask_letter,),
    "exact": (ask_fact,),
    "arithmetic": (ask_sum, ask_sum, ask_problem),
    "spelling": (partial(ask_fact, topic="spell"), ask_letters),
}


def quiz(split: str, kind: str, index: int) -> Question:
    """Question `index` of a quiz: choice, letter, exact, arithmetic or spelling."""
    dice = Dice(split, kind, index)
    return dice.choice(QUIZZES[kind])(dice)
