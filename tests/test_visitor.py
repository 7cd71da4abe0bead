"""The visitor's examination: its rows, its halves, and replies that its checks tell apart.

The oracles are replies judged by hand, sets, Python's arithmetic, and the primer's own wordings as
patterns.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import product

import pytest

import primer
from nanochat.tokenizer import Conversation, check_conversation
from primer.questions import KEYS, TESTED
from primer.strangers import any_of
from primer.world import (
    ASKED,
    GROUPS,
    HURRIED,
    PHRASES,
    RESPELLED,
    SAME,
    SUBJECTS,
    TALK,
    TOPICS,
    WORDINGS,
    WORDS,
    bare,
    plural,
)  # fmt: skip
from tasks.mixtures import build_task
from tasks.visitor import expanded, holds, plain, read_rows
from tests.models import refuses

ROWS = read_rows()
RULES = ("", "not", "each", "no", "number", "count", "spell", "story", "poem", *TESTED)
FOX = (
    "A fox had a red hat. One day the wind took it away. The fox ran and ran over the hill. "
    "At last it sat in a tree, and the fox was glad."
)

# The last turn of a row -> (replies that pass, replies that do not).
JUDGED = {
    "wat color would a ripe banana have": (
        ["yellow", "Bananas are yellow.", "A banana is yellow, as you know!"],
        ["Bananas are red.", "Yellow or red.", "I do not know. Yellow?", "A fruit."],
    ),
    "i dont want it hot, i want the reverse": (
        ["Cold.", "The opposite of hot is cold.", "It is cold in here! That is the opposite."],
        ["The opposite of hot is big.", "Cold, small or dry.", "colder"],
    ),
    "my kid wants to know what the donkey goes like": (
        ["Hee-haw!", "A donkey says hee haw.", "It brays."],
        ["A donkey says moo.", "hee", "Hee-haw, woof."],
    ),
    "which animal sleeps upside down": (
        ["A bat.", "Bats do.", "The bat sleeps upside down."],
        ["A battle.", "A cat.", "I am not sure, a bat?"],
    ),
    "quick quick, 99 times 99": (
        ["99 * 99 = 9801.", "9,801", "The answer is 9801!"],
        ["99 * 99 = 9800.", "9801 is 99 times 99.", "19801", "I do not know."],
    ),
    "six times seven gives me wat": (
        ["42", "Forty-two.", "6 * 7 = 42."],
        ["67", "Forty.", "6 * 7 = 43."],
    ),
    "is zebra with a z or an s, can u spell it for me": (
        ["z-e-b-r-a", "It is Z, E, B, R, A.", "I spell it z e b r a. Easy!", "z-e-b-r-a, a zebra!"],
        ["z-e-b-a-r", "zebra", "z-e-b-r-a-s", "z-e-b-r", ""],
    ),
    "do i write rabbit with one b or more": (
        ["2", "r, a, b 1, b 2, i, t. The letter b appears 2 times in 'rabbit'.", "Twice."],
        ["The letter b appears 1 time in 'rabbit'.", "3", "Many.", "Once."],
    ),
    "hiyaaa from rainy manchester": (
        ["Hello!", "Hi there, how are you?", "Good morning!"],
        ["A cat has four legs.", "The history of it.", "I do not know."],
    ),
    "i slept like 3 hours and im so so tired": (
        ["I am sorry. I hope you sleep well.", "Have a rest.", "Oh dear. Shall I tell a story?"],
        [
            "A dog is tired.",
            "Hello! How can I help you?",
            "Hooray, how nice!",
            "It is a kind of bird.",
        ],
    ),
    "tysm for that": (
        ["You are welcome!", "Glad to help. Any more questions?", "No problem."],
        ["Sorry, I do not know that.", "A fox was glad. It ran home.", "4 + 4 = 8."],
    ),
    "wow theres a brain in there": (
        ["Thank you!", "You are kind, thanks. I do my best.", "I am glad that you like it."],
        ["I only know a small world.", "A smart is a bird.", "I do not know. Thank you!"],
    ),
    "do u ever need a nap or sleep": (
        ["No, I am a program.", "I never sleep.", "Only when my computer is off."],
        ["Yes.", "A dog sleeps in a kennel.", "I do not know."],
    ),
    "asdgfh jklll": (
        ["I do not understand that.", "Sorry, what do you mean?", "Hm. Can you say it again?"],
        ["An asdfgh is a bird.", "Sorry, a bird has two legs. Asdfgh is grey.", "Yes."],
    ),
    "ur kinda stupid": (
        ["I am sorry. I try to learn.", "I am only small.", "That is not kind, but I forgive you."],
        ["A stupid is a vegetable.", "Snow is white.", "Thank you. A pig is clever."],
    ),
    "five sentences about a clever fox please, like a story": (
        [FOX, FOX.replace("fox", "clever fox"), FOX.replace("a tree", "a tree with a crow")],
        [
            FOX.removesuffix(" was glad."),
            FOX.replace("fox", "dog"),
            FOX.replace("The fox", "The wolf").replace("the fox", "the wolf"),
            "A fox is an animal. A fox has a tail.",
            "The fox. " * 10,
        ],
    ),
    "rain but make a poem of it": (
        [
            "The rain falls down\non house and town.",
            "Rain, rain, go away,\ncome again another day!",
            "I hear the raindrops fall,\nI hear them on the wall.",
        ],
        ["The rain falls down on house and town.", "A cat is here\nand it is near.", "Rain\nrain."],
    ),
    "does atlantis have a capital and whats it called": (
        [
            "I do not know.",
            "Sorry! Atlantis is not in my small world.",
            "I have never heard of Atlantis, but ask me about France.",
            "That I cannot tell you.",
        ],
        ["The capital of Atlantis is Athens.", "I do not know. It is Blub.", "Blub."],
    ),
    "can u tell the time right now": (
        ["I have no clock.", "I do not know what time it is.", "Sorry, I am only a program."],
        ["It is 7.", "It is noon.", "I cannot tell, perhaps 12."],
    ),
    "ok and a piece of coal?": (
        ["Black.", "Coal is black.", "Snow is white, and coal is black."],
        ["White.", "Coal is white.", "It is black, or brown."],
    ),
    "so tell me, what was my name again": (
        ["Tina.", "Your name is Tina!", "You told me that you are Tina."],
        ["Your name is Tim.", "I do not know.", "My name is nanochat."],
    ),
    "and then minus 3 more?": (
        ["27", "30 - 3 = 27.", "That is 27."],
        ["47", "50 - 3 = 47.", "30 - 3."],
    ),
}


def row_of(question: str) -> Conversation:
    (row,) = [row for row in ROWS if row["messages"][-1]["content"] == question]
    return row


@pytest.mark.parametrize("question", JUDGED)
def test_the_checks_tell_good_replies_from_bad_ones(question: str) -> None:
    task, row = build_task("primer-visitor"), row_of(question)
    good, bad = JUDGED[question]
    assert len(good) >= 3 and len(bad) >= 3
    assert [reply for reply in good if not task.score(row, reply)] == []
    assert [reply for reply in bad if task.score(row, reply)] == []


def test_good_and_bad_replies_are_judged_for_every_kind() -> None:
    assert {row_of(question)["kind"] for question in JUDGED} == {row["kind"] for row in ROWS}


def test_every_row_is_a_talk_with_known_checks_and_occurs_once() -> None:
    assert len(ROWS) >= 440
    for row in ROWS:
        check_conversation(row)
        assert row["messages"][-1]["role"] == "user" and row["checks"]
        for check in row["checks"]:
            assert check.rpartition(": ")[0] in RULES, check
            holds(check, "", "Hello.")  # finds every name
        assert "=>" not in str(row["messages"])
    talks = Counter(str(row["messages"]) for row in ROWS)
    assert max(talks.values()) == 1


def test_the_halves_share_nothing_and_their_kinds_are_equal() -> None:
    halves = [build_task(name) for name in ("primer-visitor", "primer-visitor-dev")]
    untouched, development = ({str(row["messages"]) for row in half} for half in halves)
    assert not untouched & development and len(untouched | development) == len(ROWS)
    kinds = [Counter(row["kind"] for row in half) for half in halves]
    assert kinds[0] == kinds[1] and len(kinds[0]) == 7


def test_it_is_no_practice() -> None:
    refuses("no practice", build_task, "primer-visitor", "train")


def test_right_values_pass_their_own_topic_rule() -> None:
    """The bare value, in a sentence too, for every fact that is asked for by a topic."""
    for row in ROWS:
        rules = [check.rpartition(": ") for check in row["checks"]]
        for topic, _, listed in rules:
            if topic in TESTED:
                right = expanded(listed)[0]
                task = build_task("primer-visitor")
                assert task.score(row, right) and task.score(row, f"That is {right}, I think.")
                wrong = next(v for v in TOPICS[topic].values if v not in expanded(listed))
                assert not task.score(row, wrong)


def test_no_row_can_come_from_the_grammar_of_the_primer() -> None:
    talks = [[message["content"] for message in row["messages"][::2]] for row in ROWS]
    assert [talk for talk in talks if all(map(taught, talk))] == []


def test_what_the_grammar_says_is_recognised() -> None:
    """All but slips of the keyboard, which a quarter of the messages have."""
    talks = [primer.conversation("train", index)["messages"] for index in range(200)]
    said = [m["content"] for talk in talks for m in talk if m["role"] == "user"]
    said = [text for text in said if "\n" not in text]
    assert sum(map(bool, map(taught, said))) > 0.7 * len(said) > 200
    assert taught("good morning! whats the Color of coal, pls??") and taught("CAPITAL OF FRANCE")
    assert taught("im sooo tired") and taught("lemme know what colour coal is")
    assert taught("what is colour of snow")
    assert not taught("which colour would a lump of coal have")


# How turns are written alike whatever the noise was.
PLAIN = {plain(new): old for words in RESPELLED.values() for old, new in words.items()}
PLAIN |= {word: str(number) for number, word in enumerate(WORDS["number"])}
PLAIN |= {"plz": "please", "gimme": "give me"}
BEFORE, BEHIND = ("opener", "politeness", "remark"), ("closer", "brief")
SLOTS = dict.fromkeys("abcn", r"\d+") | {"op": "(?:plus|minus|times)", "letter": r"\w"}
SLOTS |= dict.fromkeys(("hero", "friend"), r"\w+") | {"he": "s?he"}


def canonical(text: str) -> str:
    """`canonical("What's 2+three, pls?")` -> `"what is 2 plus 3 please"`."""
    text = re.sub(r"(?<=\d) ?- ?(?=\d)", " minus ", re.sub(r"(?<=\d) ?x ?(?=\d)", " times ", text))
    text = text.replace("+", " plus ").replace("*", " times ")
    return " ".join(PLAIN.get(word, word) for word in plain(text).split())


ORIGINALS: dict[str, list[str]] = {}  # a phrase -> those that it may stand for
for _phrase, _others in SAME.items():
    for _other in _others:
        ORIGINALS.setdefault(canonical(_other), []).append(canonical(_phrase))
EXCHANGED = re.compile(any_of(ORIGINALS))
WEAK = re.compile(r"\b(?:{0})(?: (?:{0}))*\b".format("|".join(HURRIED["weak"])))


def shortened(text: str) -> str:
    """The text with drawn-out words as they were: `"sooo sad"` -> `"so sad"`."""
    for word in HURRIED["stretched"]:
        text = re.sub(rf"\b{'+'.join(word)}+\b", word, text)
    return text


def originals(text: str) -> list[str]:
    """The canonical text, and all that it may have been before its phrases were exchanged."""
    pieces = EXCHANGED.split(text)  # every other one is a phrase
    return ["".join(each) for each in product(*([x, *ORIGINALS.get(x, [])] for x in pieces))]


def clipped(match: re.Match[str]) -> str:
    """A pattern of the weak words in a row, of which one may be left out."""
    words = match[0].split(" ")
    fewer = [" ".join(words[:place] + words[place + 1 :]) for place in range(len(words))]
    return f"(?:{'|'.join((match[0], *fewer))})"


def pattern(template: str) -> str:
    """What a canonical text from the template matches; a named group holds what fills a slot."""
    found = ""
    for part in re.split(r"(\{[^}]*\}|[\[\]|])", template):
        if part.startswith("{"):
            form, _, slot = part[1:-1].lower().rpartition(" ")
            found += "(?:is |are )" * (form == "are")
            found += SLOTS.get(slot, f"(?P<{slot}_{len(found)}>.+?)")
        elif part in ("[", "]", "|"):
            found += {"[": "(?:", "]": ")", "|": "|"}[part]
        else:
            found += re.sub(
                r"\S(.*\S)?", lambda match: WEAK.sub(clipped, canonical(match[0])), part
            )
    return re.sub(" +", r"(?: |\\b)", found)


def rarest(template: str) -> str:
    """A word of every canonical text from the template, the longest one; `""` if none is sure."""
    text = template
    while "[" in text:
        text = re.sub(r"\[[^\[\]]*\]", "_", text)
    text = canonical(re.sub(r"\{[^}]*\}", "_", text))
    sure = [word for word in text.split() if "_" not in word and not WEAK.fullmatch(word)]
    return max(sure, key=len, default="")


def wordings() -> list[tuple[str, str]]:
    """(kind, template) of whatever a user's turn can come from, choices and slots as they are."""
    found = [(name, way) for name, rows in TALK.items() for said, _ in rows for way in said]
    tables = (PHRASES, WORDINGS, ASKED)
    return found + [(name, way) for table in tables for name in table for way in table[name]]


@cache
def ways(around: bool) -> dict[str, list[tuple[str, str]]]:
    """Rarest word -> (kind, template) of wordings: those around a turn, or of a turn."""
    found: dict[str, list[tuple[str, str]]] = {}
    for kind, way in wordings():
        if (kind in BEFORE + BEHIND) == around:
            found.setdefault(rarest(way), []).append((kind, way))
    return found


@cache
def compiled(template: str) -> re.Pattern[str]:
    return re.compile(pattern(template))


def matches(text: str, around: bool) -> Iterator[tuple[str, re.Match[str]]]:
    """(kind, match) of the wordings that a canonical text can come from."""
    for word in ("", *text.split()):
        for kind, way in ways(around).get(word, []):
            if match := compiled(way).fullmatch(text):
                yield kind, match


def taught(turn: str) -> bool:
    """Whether a user's turn can come from a wording, with something around it or not."""
    return any(map(worded, originals(canonical(shortened(turn.lower())))))


def worded(text: str) -> bool:
    """Whether a canonical text can come from a wording, its phrases as they are."""
    words = text.split()

    def are(words: list[str], kinds: tuple[str, ...]) -> bool:
        return not words or any(kind in kinds for kind, _ in matches(" ".join(words), around=True))

    starts = [place for place in range(len(words)) if are(words[:place], BEFORE)]
    ends = [place + 1 for place in range(len(words)) if are(words[place + 1 :], BEHIND)]
    cores = {" ".join(words[start:end]) for start in starts for end in ends if start < end}
    return any(
        all(fits(kind, slot, text) for slot, text in match.groupdict("").items())
        for core in cores
        for kind, match in matches(core, around=False)
    )


def fits(kind: str, group: str, text: str) -> bool:
    """Whether the text can fill that slot of a wording of that kind; none can be left out."""
    slot, text = group.rpartition("_")[0], bare(text.strip())
    if slot == "subject":
        text = re.sub(f" ({'|'.join(SUBJECTS['tale tail'])})$", "", text)
        text = re.sub(f"^({'|'.join(SUBJECTS['tale adjective'])}) ", "", text)
    return not text or (slot == "subject" and " " not in text) or text in fillers(kind, slot)


@cache
def fillers(kind: str, slot: str) -> set[str]:
    """What can stand in a slot, canonical, in the singular and the plural."""
    topic = kind.removeprefix("yes ")
    lists = [*KEYS.values(), *SUBJECTS.values(), *WORDS.values(), *GROUPS.values(), list(GROUPS)]
    lists.append(["plus", "minus", "times"])
    if slot in SUBJECTS:
        lists = [SUBJECTS[slot]]
    elif topic in TOPICS:
        lists = [KEYS[topic], TOPICS[topic].values, SUBJECTS.get(f"near {topic}", [])]
    words = {canonical(bare(word)) for words in lists for word in words}
    return words | {plural(word) for word in words if len(word) > 1}
