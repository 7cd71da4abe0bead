"""The primer's tables, read from the text files beside this one, and template filling.

A table file is a list of sections that begin with `== NAME` or `== NAME: TITLE`; the text before
the first explains the rows.
"""

import random
import re
from collections import defaultdict
from itertools import count, pairwise
from pathlib import Path
from string import ascii_lowercase
from typing import NamedTuple


class Topic(NamedTuple):
    """A set of facts with sentences that state one; `PHRASES` and `WORDINGS` ask for one."""

    title: str
    sentences: list[str]
    facts: dict[str, str]

    @property
    def values(self) -> list[str]:
        return list(dict.fromkeys(self.facts.values()))

    def told(self, key: str) -> list[str]:
        """The sentences that state a fact."""
        return [fill(sentence, key=key, value=self.facts[key]) for sentence in self.sentences]


def sections(file: str | Path) -> list[tuple[str, str, list[str]]]:
    """(name, title, rows) of each section of a table file; a bare name is of this folder."""
    text = (Path(__file__).parent / file).read_text(encoding="utf-8").replace("\n  ", " ")
    found = []
    for part in text.split("\n== ")[1:]:
        heading, *rows = part.strip().splitlines()
        name, _, title = heading.partition(": ")
        found.append((name, title, rows))
    return found


def lists(rows: list[str], separator: str) -> dict[str, list[str]]:
    """`lists(["day = Monday", "day = Tuesday"], ", ")` -> `{"day": ["Monday", "Tuesday"]}`."""
    found: dict[str, list[str]] = {}
    for row in rows:
        name, items = row.split(" = ", 1)
        found.setdefault(name, []).extend(items.split(separator))
    return found


def facts(rows: list[str]) -> dict[str, str]:
    """`facts(["hen, duck = two; ant = six"])` -> `{"hen": "two", "duck": "two", "ant": "six"}`."""
    pairs = (fact.split(" = ") for row in rows for fact in row.split("; "))
    return {key: value for keys, value in pairs for key in keys.split(", ")}


def turned(facts: dict[str, str]) -> dict[str, str]:
    return {value: key for key, value in facts.items()}


def a(noun: str) -> str:
    """The noun with its article: `a("owl")` -> `"an owl"`; gold and the like have none."""
    if noun in WORDS["mass"]:
        return noun
    vowel = noun[0].lower() in "aeiou" and not noun.startswith("uni")
    return f"an {noun}" if vowel else f"a {noun}"


def plural(noun: str) -> str:
    """The plural of a noun: `plural("piece of cake")` -> `"pieces of cake"`."""
    head, of, rest = noun.partition(" of ")
    if of:
        return plural(head) + of + rest
    if noun in WORDS["mass"]:
        return noun
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith("man"):
        return noun[:-2] + "en"
    ending = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return TOPICS["plural"].facts.get(noun, noun + ending)


def bare(key: str) -> str:
    """The noun without its article."""
    return re.sub("^(an?|the) ", "", key)


def are(key: str) -> str:
    """What follows "what colour": `are("an ant")` -> `"are ants"`, `are("ink")` -> `"is ink"`."""
    return f"are {plural(bare(key))}" if key.startswith(("a ", "an ")) else f"is {key}"


FORMS = {"": str, "a": a, "s": plural, "bare": bare, "are": are}


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def fill(template: str, rng: random.Random | None = None, /, **slots: object) -> str:
    """`fill("{A x} runs.", x="owl")` -> `"An owl runs."`; an rng decides each `[one|[an]other]`."""
    while rng and "[" in template:
        template = re.sub(r"\[([^\[\]]*)\]", lambda m: rng.choice(m[1].split("|")), template)

    def slot(match: re.Match[str]) -> str:
        whole = match[1].lower()
        form, _, name = whole.rpartition(" ")
        value = str(slots[whole]) if whole in slots else FORMS[form](str(slots[name]))
        return capital(value) if match[1][0].isupper() else value

    return re.sub(r"\{([\w ]+)\}", slot, template)


TABLES: dict[str, list[str]] = defaultdict(list)  # a section of any table -> its rows
for _file in ("words.txt", "asking.txt", "talk.txt", "strangers.txt", "subjects.txt"):
    for _name, _, _rows in sections(_file):
        TABLES[_name] += _rows
WORDS, SUBJECTS = lists(TABLES["words"], ", "), lists(TABLES["subjects"], ", ")
PHRASES = lists(TABLES["phrases"], " | ")  # ways to ask of a quiz, and of everybody
WORDINGS = lists(TABLES["wordings"], " | ")  # of a stranger
ASKED = lists(TABLES["asked"], " | ")  # of a stranger, for what nobody here knows
for _names, _ways in lists(TABLES["about"], " | ").items():  # asked for about all those
    for _name in _names.split(", "):
        ASKED[_name] += [way.replace("{x}", f"{{{_name}}}") for way in _ways]
REPLIES = lists(TABLES["replies"], " | ")
HURRIED = lists(TABLES["hurried"], ", ")
SAME = {phrase.lower(): others for phrase, others in lists(TABLES["same"], " | ").items()}
RESPELLED = {name: facts(TABLES[name]) for name in ("short", "american", "chat")}
TALK = {  # ways of what is said to the model, and of what it answers
    name: [tuple(side.split(" | ") for side in row.split(" = ")) for row in TABLES[name]]
    for name in ("greeting", "small talk", "identity")
}
TEXTS: dict[str, list[str]] = defaultdict(list)
for _kind, _title, _rows in sections("pages.txt"):
    _text = " ".join(_rows).replace(" / ", "\n")
    TEXTS[_kind].append(f"{_title}\n\n{_text}" if _title else _text)

TOPICS: dict[str, Topic] = {}
for _name, _title, _rows in sections("facts.txt"):
    PHRASES[_name], WORDINGS[_name], _told = (row[2:].split(" | ") for row in _rows[:3])
    TOPICS[_name] = Topic(_title, _told, facts(_rows[3:]))
TOPICS["opposite"].facts.update(turned(TOPICS["opposite"].facts))
TOPICS["country"].facts.update(turned(TOPICS["capital"].facts))
for _unit in ("day", "month"):
    _next = dict(pairwise([*WORDS[_unit], WORDS[_unit][0]]))
    TOPICS[f"next {_unit}"].facts.update(_next)
    TOPICS[f"last {_unit}"].facts.update(turned(_next))
TOPICS["next letter"].facts.update(pairwise(ascii_lowercase))
TOPICS["next number"].facts.update(pairwise(map(str, range(101))))

GROUPS: dict[str, list[str]] = defaultdict(list)  # kind of thing -> its members
for _thing, _kind in TOPICS["kind"].facts.items():
    GROUPS[_kind].append(_thing)
WORDS["hero"] = WORDS["girl"] + WORDS["boy"]
WORDS["animal"] = GROUPS["animal"] = list(TOPICS["nature"].facts)
WORDS["rhyme"] = list(TOPICS["rhyme"].facts)
WORDS["colour"] = GROUPS["colour"] = TOPICS["colour"].values
GROUPS["country"], GROUPS["city"] = map(list, (TOPICS["capital"].facts, TOPICS["country"].facts))
# What is spelled and counted: known words, so that the letters of each can be learned.
_known = {*WORDS["animal"], *WORDS["thing"], *WORDS["food"], *GROUPS["fruit"], *GROUPS["vegetable"]}
for _word in ("strawberry", *sorted(_known)):
    if _word == "strawberry" or (_word.isalpha() and len(_word) <= 8):
        TOPICS["spell"].facts[_word] = "-".join(_word)
        _counted = ", ".join(map("{} {}".format, _word, count(1)))
        TOPICS["length"].facts[_word] = f"{_counted}. The word '{_word}' has {len(_word)} letters."
