"""The visitor: conversations written by hand, as strangers type, that the primer did not word.

    user: wat color is snow       assistant: Snow is white.
    user: and coal?               wanted: black, and no other colour

The rows and the language of their checks are in visitor.txt. Half of them are for development; the
other half is to be looked at as rarely as possible, and neither is ever trained on.
"""

import random
import re
from functools import cache
from itertools import cycle
from pathlib import Path

from nanochat.common import UserError
from nanochat.task_eval import Task
from nanochat.tokenizer import Conversation
from primer.world import TOPICS, WORDS, sections
from tasks.spellingbee import last_count, last_number

TABLE = Path(__file__).with_suffix(".txt")
DEVELOPMENT, UNTOUCHED = 0, 1
NUM_WORDS, NUM_DIFFERENT = 20, 12  # in a story, at least


class Visitor(Task):
    """Half of the rows, mixed, each with its kind; the reply to the last turn is scored."""

    def __init__(self, half: int, split: str = "test") -> None:
        if split != "test":
            raise UserError("the visitor's questions are no practice; choose another task")
        rows = [row for own in read_rows().values() for row in own[half::2]]
        random.Random("visitor").shuffle(rows)  # the first hundred should be a fair sample
        super().__init__(rows)

    def score(self, conversation: Conversation, reply: str) -> float:
        context = " ".join(message["content"] for message in conversation["messages"])
        return all(holds(check, context, reply) for check in conversation["checks"])


@cache
def read_rows() -> dict[str, list[Conversation]]:
    """kind -> its conversations, in the order of the table."""
    found: dict[str, list[Conversation]] = {}
    for kind, _, lines in sections(TABLE)[1:]:
        found[kind] = []
        above = ""
        for line in lines:
            if line.startswith("! "):
                above = line[2:]
                continue
            talk, _, own = line.partition(" => ")
            roles = cycle(("user", "assistant"))
            turns = zip(roles, talk.split(" / "), strict=False)
            messages = [{"role": role, "content": turn} for role, turn in turns]
            checks = [check for part in (above, own) if part for check in part.split("; ")]
            found[kind].append({"messages": messages, "kind": kind, "checks": checks})
    return found


def holds(check: str, context: str, reply: str) -> bool:
    """Whether a reply, after the turns in `context`, passes one check; see visitor.txt."""
    rule, _, listed = check.rpartition(": ")
    if rule == "no":
        return not says(reply, new_values(listed, context))
    phrases = expanded(listed)
    match rule:
        case "":
            return says(reply, phrases)
        case "not":
            return not says(reply, phrases)
        case "each":
            parts = re.split(r"[.!?\n]|\bbut\b", reply)
            return all(says(part, phrases) for part in parts if plain(part))
        case "number" | "count":
            text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", reply)
            said = last_number(text) if rule == "number" else last_count(text)
            return said == phrases[0] or (said is None and says(text, phrases[1:]))
        case "spell":
            # Letters that the same sign parts: in "c-o-w, a cow" the article is none of them.
            runs = re.finditer(r"\b[a-z]([^a-z]{1,3})[a-z]\b(?:\1[a-z]\b)*", reply.lower())
            spelled = [re.sub("[^a-z]", "", run[0]) for run in runs]
            return spelled[-1:] == phrases
        case "story" | "poem":
            return is_written(reply, rule, phrases, context)
    others = [
        value
        for value in new_values(rule, context)
        if not any(says(phrase, [value]) or says(value, [phrase]) for phrase in phrases)
    ]
    return says(reply, phrases) and not says(reply, others)


def is_written(reply: str, form: str, subjects: list[str], context: str) -> bool:
    """Whether a story or a poem is whole, and about its subject more than another animal."""
    words = plain(reply).split()
    if form == "story":
        whole = len(words) >= NUM_WORDS and len(set(words)) >= NUM_DIFFERENT
    else:
        whole = len(reply.strip().splitlines()) >= 2 and len(set(words)) >= NUM_DIFFERENT // 2
    named = sum(times(reply, subject) for subject in subjects)
    others = [animal for animal in WORDS["animal"] if not says(context, [animal])]
    most = max(times(reply, animal) for animal in others)
    ends = reply.rstrip().rstrip("\"'”’)").endswith((".", "!", "?"))
    return whole and ends and named >= max(most, 2 if form == "story" else 1)


def new_values(topic: str, context: str) -> list[str]:
    """The values of a topic that the conversation has not named and that mean something alone."""
    common = expanded("@common")
    values = TOPICS[topic].values
    return [value for value in values if value not in common and not says(context, [value])]


@cache
def named_phrases() -> dict[str, str]:
    """The rows of the first section."""
    _, _, rows = sections(TABLE)[0]
    return dict(row.split(" = ") for row in rows)


def expanded(listed: str) -> list[str]:
    """The phrases, names replaced by theirs: `"hi | @bye"` -> `["hi", "bye", "see you", ...]`."""
    found = []
    for phrase in listed.split(" | "):
        is_name = phrase.startswith("@")
        found += expanded(named_phrases()[phrase[1:]]) if is_name else [phrase]
    return found


def plain(text: str) -> str:
    """Words alone: `"It's a hee-haw!"` -> `"its a hee haw"`."""
    return " ".join(re.findall(r"\w+", re.sub("['’]", "", text.lower())))


def times(text: str, phrase: str) -> int:
    """How often a phrase is in a text as whole words; one of three letters also in the plural."""
    phrase = plain(phrase)
    ending = "(?:e?s)?" if len(phrase) >= 3 else ""
    return len(re.findall(rf"\b{phrase}{ending}\b", plain(text)))


def says(text: str, phrases: list[str]) -> bool:
    return any(times(text, phrase) for phrase in phrases)
