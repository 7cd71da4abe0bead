"""The primer's tables, read from the text files beside this one, and template filling.

A table file is a list of sections that begin with `== NAME` or `== NAME: TITLE`; the text before
the first explains the rows.
"""

import random
import re
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase
from typing import NamedTuple


class Topic(NamedTuple):
    """A set of facts, with ways to ask for one and sentences that state it."""

    title: str
    questions: list[str]
    wordings: list[str]  # of strangers
    sentences: list[str]
    facts: dict[str, str]

    @property
    def values(self) -> list[str]:
        return list(dict.fromkeys(self.facts.values()))


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
    """`lists(["day = Monday, Tuesday"], ", ")` -> `{"day": ["Monday", "Tuesday"]}`."""
    pairs = (row.split(" = ", 1) for row in rows)
    return {name: items.split(separator) for name, items in pairs}


def read_texts() -> dict[str, list[tuple[str, str]]]:
    """The sections of pages.txt by kind: (title, text) of each; only stories have a title."""
    texts: dict[str, list[tuple[str, str]]] = {}
    for kind, title, rows in sections("pages.txt"):
        text = " ".join(rows).replace(" / ", "\n")
        texts.setdefault(kind, []).append((title, f"{title}\n\n{text}" if title else text))
    return texts


def read_topics() -> dict[str, Topic]:
    """The sections of facts.txt, plus facts derived from other tables."""
    topics = {}
    for name, title, rows in sections("facts.txt"):
        pairs = (fact.split(" = ") for row in rows[3:] for fact in row.split("; "))
        facts = {key: value for keys, value in pairs for key in keys.split(", ")}
        asked, typed, told = (row[2:].split(" | ") for row in rows[:3])
        topics[name] = Topic(title, asked, typed, told, facts)
    topics["opposite"].facts.update(turned(topics["opposite"].facts))
    topics["country"].facts.update(turned(topics["capital"].facts))
    for unit in ("day", "month"):
        after = dict(pairwise([*WORDS[unit], WORDS[unit][0]]))
        topics[f"next {unit}"].facts.update(after)
        topics[f"last {unit}"].facts.update(turned(after))
    topics["next letter"].facts.update(pairwise(ascii_lowercase))
    topics["next number"].facts.update(pairwise(map(str, range(101))))
    return topics


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
    if noun in TOPICS["plural"].facts:
        return TOPICS["plural"].facts[noun]
    if noun in WORDS["mass"]:
        return noun
    head, of, rest = noun.partition(" of ")
    if of:
        return plural(head) + of + rest
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def bare(key: str) -> str:
    """The noun without its article."""
    return re.sub("^(an?|the) ", "", key)


def are(key: str) -> str:
    """What follows "what colour": `are("an ant")` -> `"are ants"`, `are("ink")` -> `"is ink"`."""
    return f"are {plural(bare(key))}" if key.startswith(("a ", "an ")) else f"is {key}"


FORMS = {"a": a, "s": plural, "bare": bare, "are": are}


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def chosen(template: str, rng: random.Random) -> str:
    """The template with each `[one|[an]other]` decided."""
    while "[" in template:
        template = re.sub(r"\[([^\[\]]*)\]", lambda m: rng.choice(m[1].split("|")), template)
    return template


def fill(template: str, rng: random.Random | None = None, /, **slots: object) -> str:
    """`fill("{A x} runs.", x="owl")` -> `"An owl runs."`; an rng decides between choices."""
    template = chosen(template, rng) if rng else template

    def slot(match: re.Match[str]) -> str:
        form, name = match.groups()
        value = str(slots[name.lower()])
        if form:
            value = FORMS[form.lower()](value)
        return capital(value) if form in ("A", "S") or name[0].isupper() else value

    return re.sub(r"\{(?:([aAsS]|are|bare) )?(\w+)\}", slot, template)


WORDS = lists([row for *_, rows in sections("words.txt") for row in rows], ", ")
_talk = {name: rows for name, _, rows in sections("talk.txt")}
PHRASES, WORDINGS = (lists(_talk.pop(name), " | ") for name in ("phrases", "wordings"))
# What is said to the model and what it answers: ways of both.
TALK = {
    name: [tuple(side.split(" | ") for side in row.split(" = ")) for row in rows]
    for name, rows in _talk.items()
}
_strangers = {name: rows for name, _, rows in sections("strangers.txt")}
SUBJECTS, NEAR = (lists(_strangers[name], ", ") for name in ("subjects", "near"))
ASKED, UNKNOWN, FOLLOW_UPS, AROUND = (
    lists(_strangers[name], " | ") for name in ("asked", "replies", "follow-ups", "around")
)
_tales = {name: rows for name, _, rows in sections("subjects.txt")}
HEROES = lists(_tales.pop("words"), ", ")
# How stories and poems are asked for: with a subject, with any, and after another.
TALE_ASKED, TALE_ANY, TALE_NEXT = (lists(rows, " | ") for rows in _tales.values())
TEXTS = read_texts()
TOPICS = read_topics()

# What is told, but too long to be a choice of a quiz: name -> key -> reply.
REPLIES: dict[str, dict[str, str]] = {}
for _name in ("nature", "define", "how"):
    _, PHRASES[_name], WORDINGS[_name], (_sentence,), _facts = TOPICS.pop(_name)
    REPLIES[_name] = {key: fill(_sentence, key=key, value=value) for key, value in _facts.items()}
for _name, _keys in NEAR.items():  # what a table has learned since is not unknown
    _known = {bare(key) for key in (TOPICS[_name].facts if _name in TOPICS else REPLIES[_name])}
    NEAR[_name] = [key for key in _keys if bare(key) not in _known]
GROUPS: dict[str, list[str]] = {}  # kind of thing -> its members
for _thing, _kind in TOPICS["kind"].facts.items():
    GROUPS.setdefault(_kind, []).append(_thing)
GROUPS |= {"animal": list(REPLIES["nature"]), "country": list(TOPICS["capital"].facts)}
GROUPS |= {"city": list(TOPICS["country"].facts), "colour": TOPICS["colour"].values}
WORDS["hero"] = WORDS["girl"] + WORDS["boy"]
WORDS["animal"] = list(REPLIES["nature"])
WORDS["colour"] = TOPICS["colour"].values
# What is spelled and counted: known words, so that the letters of each can be learned.
_all = [*WORDS["animal"], *WORDS["thing"], *WORDS["food"], *GROUPS["fruit"], *GROUPS["vegetable"]]
_spelled = {"strawberry"} | {word for word in _all if word.isalpha() and len(word) <= 8}
REPLIES["spell"] = {word: "-".join(word) for word in sorted(_spelled)}
