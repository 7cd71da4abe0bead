"""How strangers type: in a hurry, with noise that leaves the sense, the numbers and a kept word."""

import re
from collections.abc import Callable
from random import Random

from primer.world import RESPELLED, TOPICS, WORDINGS, WORDS, capital, chosen

ASKING = re.compile(
    "(wh(at|ats|o|ere|en|y|ich)|how|is|are|was|were|do|does|did|can|could|will|would|should|may"
    "|have|has|in|on|at|to|from) ",
    re.IGNORECASE,
)
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
        last += "?" if ASKING.match(last) else "."
    return ". ".join(map(capital, (*before, last)))


def surrounded(dice: Random, text: str) -> str:
    """The text with something said before or after it."""
    place = dice.choice(("remark", "closer", "opener", "politeness"))
    if place == "politeness" and not re.match("Wh|How", text):
        place = "opener"
    said = chosen(dice.choice(WORDINGS[place]), dice)
    match place:
        case "remark":
            return f"{said} {text}"
        case "closer":
            body = text.rstrip(".?!")
            return f"{body}{dice.choice((', ', ' '))}{said}{text[len(body) :]}"
        case "politeness":
            return f"{capital(said)} {text[0].lower()}{text[1:]}"
    return f"{capital(said)}{dice.choice((', ', ' ', '! ', '. '))}{text}"


def in_other_signs(dice: Random, text: str) -> str:
    """The text's sums with other signs and spaces, small numbers in words: `12 * 3` -> `12x3`."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if numbers and max(numbers) < len(WORDS["number"]) and dice.random() < 0.2:
        return re.sub(r"\d+", lambda m: WORDS["number"][int(m[0])], text)
    left, times, right = dice.choice(("", "", " ")), dice.choice("*xX×"), dice.choice(("", "", " "))
    signs = {" + ": "+", " - ": "-", " * ": times}
    return re.sub(r"(?<=\d) [-+*] (?=\d)", lambda m: left + signs[m[0]] + right, text)


def respelled(name: str, before: str = "") -> Callable[[Random, str], str]:
    """The habit of writing the words of a table in another way if that pattern follows."""
    words = RESPELLED[name]
    pattern = re.compile(rf"\b({'|'.join(words)})\b{before}", re.IGNORECASE)

    def other(match: re.Match[str]) -> str:
        new = words[match[0].lower()]
        return capital(new) if match[0][0].isupper() else new

    return lambda _, text: pattern.sub(other, text)


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
    alone, mark = text[:-1].rstrip(), text[-1]
    if mark not in ".?!" or dice.random() < 0.8:
        return text.rstrip(".?! ")
    return alone + dice.choice((mark * 2, mark * 3, "!", f" {mark}"))


HABITS: list[tuple[float, Callable[[Random, str], str]]] = [  # and how often a stranger has each
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
    """The text as a stranger may type it, often as it is; `keep` stays letter by letter.

    Nothing is said before or after what is said `alone`.
    """
    text = neat(text.replace(keep, KEPT) if keep else text)
    if dice.random() > 0.35:
        if not alone and dice.random() < 0.3:
            text = surrounded(dice, text)
        for chance, habit in HABITS:
            if dice.random() < chance:
                text = habit(dice, text)
    return text.replace(KEPT, keep)
