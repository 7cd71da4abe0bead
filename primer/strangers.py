"""How strangers type: in a hurry, with noise that leaves the sense, the numbers and a kept word."""

import re
from collections.abc import Callable, Iterable
from random import Random

from primer.world import HURRIED, RESPELLED, SAME, TOPICS, WORDINGS, WORDS, capital, fill

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


def any_of(phrases: Iterable[str]) -> str:
    """A pattern of any of the phrases, the longest first, that ends with a word."""
    found = "|".join(sorted(map(re.escape, phrases), key=len, reverse=True))
    return rf"\b({found})(?![\w'])"


# Not in "do I want to": some of what may stand for "I want to" is no question.
EXCHANGED = re.compile(rf"(?<!do )(?<!did ){any_of(SAME)}", re.IGNORECASE)
STRETCHED = re.compile(any_of(HURRIED["stretched"]), re.IGNORECASE)
SINGLE_LETTER = re.compile(
    r"letter|alphabet|after|before|\ba[^\w ]|"
    r"\ba (in|is|are|and|comes|do|does|there|occurs?|appears?)\b"
)
WEAK = re.compile(rf"\b((?:{'|'.join(HURRIED['weak'])}) )+(?=[a-z]{{2,}})", re.IGNORECASE)


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


def exchanged(dice: Random, text: str) -> str:
    """The text with some of its phrases in other words, the same each time a phrase returns."""
    chosen: dict[str, str] = {}

    def other(match: re.Match[str]) -> str:
        phrase = match[0].lower()
        if phrase not in chosen:
            chosen[phrase] = dice.choice(SAME[phrase]) if dice.random() < 0.3 else match[0]
        begins = match.start() == 0 or text[match.start() - 2] in ".?!"
        return capital(chosen[phrase]) if begins else chosen[phrase]

    return EXCHANGED.sub(other, text)


def stretched(dice: Random, text: str) -> str:
    """The text with words of feeling or greeting drawn out: `"so sad"` -> `"sooo sad"`."""

    def drawn_out(match: re.Match[str]) -> str:
        word = match[0]
        vowels = [i for i, letter in enumerate(word) if letter.lower() in "aeiou"]
        i = dice.choice((len(word) - 1, *vowels[-1:]))
        return word[:i] + word[i] * dice.randint(2, 4) + word[i + 1 :]

    return STRETCHED.sub(drawn_out, text)


def clipped(dice: Random, text: str) -> str:
    """The text without some weak words, one at most of those in a row.

    Nothing is left out where a letter is meant, as in "what comes after a?".
    """
    if SINGLE_LETTER.search(text):
        return text

    def rest(match: re.Match[str]) -> str:
        words = match[0].split()
        if dice.random() < 0.3 * len(words):
            words.pop(dice.randrange(len(words)))
        return "".join(f"{word} " for word in words)

    return WEAK.sub(rest, text)


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
    (1, exchanged),
    (0.08, clipped),
    (0.1, stretched),
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
