"""How strangers type: in a hurry, with noise that leaves the sense, the numbers and kept words."""

import re
from collections.abc import Callable, Sequence
from random import Random

from primer.world import AROUND, TOPICS, WORDS, capital, chosen

ASKING = re.compile(
    "(wh(at|ats|o|ere|en|y|ich)|how|is|are|was|were|do|does|did|can|could|will|would|should|may"
    "|have|has|in|on|at|to|from) ",
    re.IGNORECASE,
)
SHORT = {  # what is said in fewer letters; the apostrophe is dropped by another kind of haste
    "what is": "what's", "who is": "who's", "where is": "where's", "how is": "how's",
    "that is": "that's", "it is": "it's", "i am": "i'm", "i would": "i'd", "i will": "i'll",
    "you are": "you're", "do not": "don't", "does not": "doesn't", "did not": "didn't",
    "cannot": "can't", "is not": "isn't", "are not": "aren't", "want to": "wanna",
}  # fmt: skip
AMERICAN = {
    "colour": "color", "colours": "colors", "grey": "gray", "favourite": "favorite",
    "neighbour": "neighbor", "harbour": "harbor", "centre": "center", "metre": "meter",
    "maths": "math", "mum": "mom",
}  # fmt: skip
CHAT = {
    "you": "u", "your": "ur", "are": "r", "please": "pls", "thanks": "thx", "what": "wat",
    "because": "cuz", "and": "n", "though": "tho", "okay": "k",
}  # fmt: skip
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
# A slip must not make a word that means something else here ("cold" -> "bold" may, "near" may not).
KNOWN = {
    word
    for topic in TOPICS.values()
    for text in (*topic.facts, *topic.values)
    for word in text.lower().split()
} | {*WORDS["number"], "plus", "minus", "times"}


def neat(text: str) -> str:
    """The text with capitals and a final mark: `neat("is it true")` -> `"Is it true?"`."""
    text = re.sub(r"\bi\b(?!')", "I", text)
    *before, last = text.split(". ")
    if text[-1].isalnum() and " " in text:
        last += "?" if ASKING.match(last) else "."
    return ". ".join(map(capital, (*before, last)))


def reworded(text: str, words: dict[str, str], before: str = "") -> str:
    """The text with the keys of `words` before that pattern replaced, capitals kept."""

    def other(match: re.Match[str]) -> str:
        new = words[match[0].lower()]
        return capital(new) if match[0][0].isupper() else new

    return re.sub(rf"\b({'|'.join(words)})\b{before}", other, text, flags=re.IGNORECASE)


def slipped(dice: Random, text: str) -> str:
    """The text with one typing error in a word of four letters or more."""
    words = [m for m in re.finditer(r"[A-Za-z]{4,}", text) if m[0].lower() not in WORDS["number"]]
    if not words:
        return text
    match = dice.choice(words)
    word, i, slip = match[0], dice.randrange(1, len(match[0]) - 1), dice.random()
    if slip < 0.3:
        new = word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    elif slip < 0.6:
        new = word[:i] + word[i + 1 :]
    elif slip < 0.75:
        new = word[: i + 1] + word[i:]
    else:
        row = next((row for row in KEYBOARD if word[i] in row), word[i])
        place = row.index(word[i])
        new = word[:i] + row[place - 1 if place else min(1, len(row) - 1)] + word[i + 1 :]
    return text if new.lower() in KNOWN else text[: match.start()] + new + text[match.end() :]


def in_other_signs(dice: Random, text: str) -> str:
    """The text's sums with other signs and spaces, small numbers in words: `12 * 3` -> `12x3`."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if numbers and max(numbers) < len(WORDS["number"]) and dice.random() < 0.2:
        return re.sub(r"\d+", lambda m: WORDS["number"][int(m[0])], text)

    def retyped(match: re.Match[str]) -> str:
        first, sign, second = match.groups()
        sign = dice.choice("*xX×") if sign == "*" else sign
        left, right = dice.choice((("", ""), ("", ""), ("", " "), (" ", ""), (" ", " ")))
        return first + left + sign + right + second + dice.choice(("", "", "", "=", " ="))

    return re.sub(r"(\d+) ([-+*]) (\d+)(?: =)?", retyped, text)


def surrounded(dice: Random, text: str) -> str:
    """The text with something said before or after it."""
    place = dice.random()
    if place < 0.25:
        return f"{dice.choice(AROUND['remark'])} {text}"
    if place < 0.55:
        closer, mark = dice.choice(AROUND["closer"]), text[-1] if text[-1] in ".?!" else ""
        return f"{text.removesuffix(mark)}{dice.choice((', ', ' '))}{closer}{mark}"
    if place < 0.7 and re.match("Wh|How", text):
        opener, joint = chosen(dice.choice(AROUND["politeness"]), dice), " "
    else:
        opener, joint = dice.choice(AROUND["opener"]), dice.choice((", ", " ", "! ", ". "))
    if joint in (", ", " ") and re.match("[A-Z][a-z]* [a-z]", text) and not text.startswith("I "):
        text = text[0].lower() + text[1:]
    return f"{capital(opener)}{joint}{text}"


def ended(dice: Random, text: str) -> str:
    """The text with a careless end."""
    if text[-1] not in ".?!" or len(text) < 2:
        return text
    alone, mark = text[:-1], text[-1]
    more = (text + mark, text + mark * 2, f"{alone}!", f"{alone} {mark}")
    return alone if dice.random() < 0.8 else dice.choice(more)


HABITS: list[tuple[float, Callable[[Random, str], str]]] = [  # and how often a stranger has each
    (0.6, in_other_signs),
    (0.5, lambda _, text: reworded(text, SHORT, "(?= [a-z])")),
    (0.4, lambda _, text: reworded(text, AMERICAN)),
    (0.08, lambda _, text: reworded(text, CHAT)),
    (0.3, slipped),
    (0.8, lambda _, text: text.lower()),
    (0.02, lambda _, text: text.upper()),
    (0.5, lambda _, text: text.replace("'", "").replace(",", "")),
    (0.75, ended),
]


def roughen(dice: Random, text: str, keep: Sequence[str] = (), alone: bool = False) -> str:
    """The text as a stranger may type it, often as it is; `keep` stays letter by letter.

    Nothing is said before or after what is said `alone`.
    """
    if dice.random() < 0.35:
        return text
    for place, kept in enumerate(keep):  # a sign that no habit touches
        text = text.replace(kept, chr(place + 1)) if len(kept) > 2 else text
    if not alone and dice.random() < 0.3:
        text = surrounded(dice, text)
    for chance, habit in HABITS:
        if dice.random() < chance:
            text = habit(dice, text)
    for place, kept in enumerate(keep):
        text = text.replace(chr(place + 1), kept)
    return text
