"""The visitor: conversations written by hand, as strangers type, that the primer did not word.

    user: wat color is snow       assistant: Snow is white.
    user: and coal?               wanted: black, and no other colour

The rows and their checks are in visitor.txt. Half of them are for development; none is trained on.
"""

import random
import re
from itertools import cycle
from pathlib import Path

from nanochat.common import UserError
from nanochat.task_eval import Task
from nanochat.tokenizer import Conversation
from primer.world import TOPICS, WORDS, sections
from tasks.spellingbee import last_count, last_number

(_, _, _phrases), *SECTIONS = sections(Path(__file__).with_suffix(".txt"))
NAMED_PHRASES = dict(row.split(" = ") for row in _phrases)
DEVELOPMENT, UNTOUCHED = 0, 1


class Visitor(Task):
    """Half of the rows, mixed, each with its kind; the reply to the last turn is scored."""

    def __init__(self, half: int, split: str = "test") -> None:
        if split != "test":
            raise UserError("the visitor's questions are no practice; choose another task")
        rows = read_rows()[half::2]
        random.Random("visitor").shuffle(rows)  # the first hundred should be a fair sample
        super().__init__(rows)

    def score(self, conversation: Conversation, reply: str) -> float:
        context = " ".join(message["content"] for message in conversation["messages"])
        return all(holds(check, context, reply) for check in conversation["checks"])


def read_rows() -> list[Conversation]:
    """The conversations in the order of the table; a section's title is a check of its rows."""
    rows = []
    for kind, shared, lines in SECTIONS:
        for line in lines:
            talk, _, own = line.partition(" => ")
            turns = zip(cycle(("user", "assistant")), talk.split(" / "), strict=False)
            messages = [{"role": role, "content": turn} for role, turn in turns]
            checks = [check for part in (shared, own) if part for check in part.split("; ")]
            rows.append({"messages": messages, "kind": kind, "checks": checks})
    return rows


def holds(check: str, context: str, reply: str) -> bool:
    """Whether a reply, after the turns in `context`, passes one check; see visitor.txt."""
    rule, _, listed = check.rpartition(": ")
    phrases = expanded(listed)
    words = plain(reply).split()
    match rule:
        case "" | "not":
            return says(reply, phrases) == (rule == "")
        case "each":
            return all(says(x, phrases) for x in re.split(r"[.!?\n]|\bbut\b", reply) if plain(x))
        case "no":
            return not says(reply, other_values(listed, context, []))
        case "number" | "count":
            text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", reply)
            said = last_number(text) if rule == "number" else last_count(text)
            return said == phrases[0] or (said is None and says(text, phrases[1:]))
        case "spell":
            # Letters that the same sign parts: in "c-o-w, a cow" the article is none of them.
            runs = re.finditer(r"\b[a-z]([^a-z]{1,3})[a-z]\b(?:\1[a-z]\b)*", reply.lower())
            return [re.sub("[^a-z]", "", run[0]) for run in runs][-1:] == phrases
        case "story" | "poem":
            least, whole = 1, "\n" in reply.strip() and len(set(words)) >= 6
            if rule == "story":
                least, whole = 2, len(words) >= 20 and len(set(words)) >= 12
            others = [times(reply, each) for each in WORDS["animal"] if not says(context, [each])]
            ends = reply.rstrip(" \n\"'”’)").endswith((".", "!", "?"))
            return whole and ends and sum(times(reply, x) for x in phrases) >= max(least, *others)
    return says(reply, phrases) and not says(reply, other_values(rule, context, phrases))


def other_values(topic: str, context: str, phrases: list[str]) -> list[str]:
    """A topic's values but for `phrases`, what was named before, and what means little alone."""
    known, common = " ".join((context, *phrases)), expanded("@common")
    values = [value for value in TOPICS[topic].values if value not in common]
    return [each for each in values if not says(each, phrases) and not says(known, [each])]


def expanded(listed: str) -> list[str]:
    """The phrases, names replaced by theirs: `"hi | @bye"` -> `["hi", "bye", "see you", ...]`."""
    found = []
    for phrase in listed.split(" | "):
        found += expanded(NAMED_PHRASES[phrase[1:]]) if phrase.startswith("@") else [phrase]
    return found


def plain(text: str) -> str:
    """Words alone: `"It's a hee-haw!"` -> `"its a hee haw"`."""
    return " ".join(re.findall(r"\w+", re.sub("['’]", "", text.lower())))


def times(text: str, phrase: str) -> int:
    """How often a phrase is in a text as whole words; one of three letters also in the plural."""
    phrase = plain(phrase)
    return len(re.findall(rf"\b{phrase}{'(?:e?s)?' * (len(phrase) > 2)}\b", plain(text)))


def says(text: str, phrases: list[str]) -> bool:
    return any(times(text, phrase) for phrase in phrases)
