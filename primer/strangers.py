"""How strangers type: in a hurry, with noise that leaves the sense, the numbers and a kept word."""

import re
from collections.abc import Callable
from random import Random

from primer.world import RESPELLED, TOPICS, WORDINGS, WORDS, capital, fill

Habit = Callable[[Random, str], str]
KEYBOARD = "qwertyuiop asdfghjkl zxcvbnm"
KEPT = "一"  # a letter without case, which no habit touches, stands for the kept word
# A slip must not make a word that means something else here ("cold" -> "bold" may, "near" may not).
KNOWN = {
    word
    for topic in TOPICS.values()
    for text in (*topic.facts, *topic.values)
    for word in text.lower().split()
}


def neat(text: str) -> str:
    """The text with capitals and a final mark: `neat("is it true")` -> `"Is it true?"`."""
    text = re.sub(r"\bi\b(?!')", "I", text)
    *before, last = text.split(". ")
    if text[-1].isalnum() and " " in text:
        last += "?" if last.split()[0].lower() in WORDS["asking"] else "."
    return ". ".join(map(capital, (*before, last)))


def surrounded(dice: Random, text: str) -> str:
    """The text with something said before or after it."""
    place = dice.choice(("remark", "closer", "opener", "politeness"))
    said = fill(dice.choice(WORDINGS[place]), dice)
    if place == "closer":
        body = text.rstrip(".?! ")
        return f"{body}{dice.choice((', ', ' '))}{said}{text[len(body) :]}"
    if place == "politeness":
        if not re.match("Wh|How", text):
            return text
        text = text[0].lower() + text[1:]
    joint = dice.choice((", ", " ", "! ", ". ")) if place == "opener" else " "
    return f"{capital(said)}{joint}{text}"


def in_other_signs(dice: Random, text: str) -> str:
    """The text's sums with other signs and spaces, small numbers in words: `12 * 3` -> `12x3`."""
    if dice.random() < 0.1:
        text = re.sub(r"\b(1?\d|20)\b", lambda m: WORDS["number"][int(m[0])], text)
    left, times, right = dice.choice(("", "", " ")), dice.choice("*xX×"), dice.choice(("", "", " "))
    return re.sub(r"(?<=\d) ([-+*]) (?=\d)", rf"{left}\1{right}", text).replace("*", times)


def respelled(name: str, before: str = "") -> Habit:
    """The habit of writing the words of a table in another way if that pattern follows."""
    words = RESPELLED[name]
    pattern = re.compile(rf"\b({'|'.join(words)})\b{before}", re.IGNORECASE)
    return lambda _, text: pattern.sub(lambda match: words[match[0].lower()], text)


def slipped(dice: Random, text: str) -> str:
    """The text with one typing error in a word of four letters or more."""
    words = [m for m in re.finditer(r"[A-Za-z]{4,}", text) if m[0].lower() not in WORDS["number"]]
    if not words:
        return text
    match = dice.choice(words)
    word, i = match[0], dice.randrange(1, len(match[0]) - 1)
    one, two = word[i : i + 2]
    beside = KEYBOARD[KEYBOARD.find(one.lower()) - 1].strip()
    new = word[:i] + dice.choice((two + one, two, one + one + two, beside + two)) + word[i + 2 :]
    return text if new.lower() in KNOWN else text[: match.start()] + new + text[match.end() :]


def ended(dice: Random, text: str) -> str:
    """The text with a careless end."""
    mark = text[-1]
    if mark not in ".?!" or dice.random() < 0.8:
        return text.rstrip(".?! ") or text
    return text[:-1] + dice.choice((mark * 2, mark * 3, "!", f" {mark}"))


HABITS: list[tuple[float, Habit]] = [  # and how often a stranger has each
    (0.6, in_other_signs),
    (0.5, respelled("short", "(?= [a-z])")),
    (0.4, respelled("american")),
    (0.08, respelled("chat")),
    (0.3, slipped),
    (0.8, lambda _, text: text.lower()),
    (0.02, lambda _, text: text.upper()),
    (0.5, lambda _, text: text.replace("'", "").replace(",", "")),
    (0.75, ended),
]


def roughen(dice: Random, text: str, keep: str = "", alone: bool = False) -> str:
    """The text as a stranger may type it; `keep` stays, and nothing is put around it if `alone`."""
    text = neat(text.replace(keep, KEPT) if keep else text)
    if dice.random() > 0.35:
        if not alone and dice.random() < 0.35:
            text = surrounded(dice, text)
        for chance, habit in HABITS:
            if dice.random() < chance:
                text = habit(dice, text)
    return text.replace(KEPT, keep)
