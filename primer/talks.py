"""Conversations: what a stranger types, one thing after the other, and clean replies."""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

from primer import questions as ask
from primer.questions import KEYS, Dice, Question
from primer.strangers import roughen
from primer.tales import ask_tale, next_tale, some_name
from primer.world import ASKED, GROUPS, PHRASES, TALK, TOPICS, WORDINGS, a, bare, capital, fill

TURNS: list[tuple[Any, ...]] = [  # (weight, kind, its arguments)
    (44, ask.ask_fact), (4, ask.ask_fact, "define"), (4, ask.ask_fact, "nature"),
    (2, ask.ask_fact, "how"), (6, ask.ask_fact, "spell"), (13, ask.ask_choice),
    (5, ask.ask_letter), (5, ask.ask_yes_no), (2, ask.ask_bigger), (3, ask.ask_list),
    (1, ask.ask_counting), (2, ask.ask_repeat), (19, ask.ask_sum), (6, ask.ask_problem),
    (6, ask.ask_letters), (2, ask.ask_length), (24, ask.ask_outside), (8, ask.ask_near),
    (5, ask.ask_nonsense), (10, ask_tale), (6, ask_tale, "verse"),
    (11, ask.ask_talk, "identity"), (15, ask.ask_talk, "greeting", "small talk"),
]  # fmt: skip
WEIGHTS = list(accumulate(weight for weight, *_ in TURNS))
# Topics whose keys are nouns without an article, and those that nothing refers to but its thanks.
NOUNS = {"sound", "young", "home", "legs", "kind", "nature"}
ENDS = {"job", "tool", "season", "define", "how", "spell", "thanks"}


def conversation(split: str, index: int) -> dict[str, Any]:
    """Conversation `index`: a system message, mostly empty, and the turns of a talk."""
    dice = Dice(split, "conversation", index)
    system, turns = turns_of(dice)
    said = [("system", system)] if system else []
    for turn in turns:
        said += [("user", typed(dice, turn)), ("assistant", turn.reply)]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def typed(dice: Dice, turn: Question) -> str:
    """The turn with noise; lettered lists stay clean: matching is hard enough (dev/LOG.md)."""
    return turn.prompt if turn.choices else roughen(dice, turn.text, turn.keep, turn.alone)


def wordings() -> list[tuple[str, str]]:
    """(kind, template) of whatever a user's turn can come from, choices and slots as they are."""
    found = [(name, way) for name, rows in TALK.items() for said, _ in rows for way in said]
    tables = (PHRASES, WORDINGS, ASKED)
    return found + [(name, way) for table in tables for name in table for way in table[name]]


def turns_of(dice: Dice) -> tuple[str, list[Question]]:
    """A system message and questions, some of which follow from the one before."""
    style = dice.random()
    if style < 0.03:
        turns = [ask.ask_fact(dice, brief=True) for _ in range(dice.randint(1, 3))]
        return dice.reply("brief system"), turns
    num = dice.choices((1, 2, 3, 4, 5, 6), (44, 29, 15, 7, 3, 2))[0]
    name = some_name(dice) if dice.random() < 0.035 else ""
    turns = prolonged(dice, [tell_name(dice, name)] if name else [], num)
    if name or dice.random() < 0.01:
        turns.append(ask_name(dice, name))
    return dice.reply("system") if style < 0.09 else "", turns


def prolonged(dice: Dice, turns: list[Question], num: int) -> list[Question]:
    """The talk with more turns, `num` in all."""
    while len(turns) < num:
        next_turn = follow(dice, turns[-1]) if turns and dice.random() < 0.4 else None
        turns = [*turns, next_turn or question(dice)]
    return turns


def question(dice: Dice) -> Question:
    _, kind, *arguments = dice.choices(TURNS, cum_weights=WEIGHTS)[0]
    return kind(dice, *arguments)


def tell_name(dice: Dice, name: str) -> Question:
    text, reply = dice.phrase("name", hero=name), dice.reply("name reply", hero=name)
    return Question(text, reply, keep=name, alone=True, topic="name", key=name)


def ask_name(dice: Dice, name: str) -> Question:
    """The user's name, if it was told."""
    reply = f"Your name is {name}." if name else dice.reply("name unknown")
    return Question(dice.phrase("name question", "name it"), reply, alone=True)


def follow(dice: Dice, last: Question) -> Question | None:
    """What refers to the turn before, if anything can."""
    ways = FOLLOWING.get(last.topic, [])
    if last.topic not in ENDS:
        ways = ways + [another_key, it] * 4 * (last.topic in KEYS)
        ways += [partial(remark, name=name) for name in ("why", "sure", "shorter") if last.accepted]
    if last.topic != "thanks" and dice.random() < 0.15:
        ways = [partial(remark, name="thanks")]
    turn = dice.choice(ways)(dice, last) if ways else None
    return turn and turn._replace(alone=True)


def remark(dice: Dice, last: Question, name: str) -> Question:
    """What is said of a reply."""
    fact, topic = "".join(last.accepted[:1]), name if name == "thanks" else last.topic
    reply = dice.reply(name, fact=fact, answer=capital(last.answer))
    return last._replace(text=dice.phrase(name), reply=reply, choices=(), keep="", topic=topic)


def another_key(dice: Dice, last: Question) -> Question:
    """The same question about another key, which may be unknown."""
    way = dice.choice(WORDINGS["and"])
    if last.topic in NOUNS:
        way = way.replace("{key}", dice.choice(("{a key}", "{s key}", "the {key}")))
    if dice.random() < 0.15:
        return ask.ask_outside(dice, f"near {last.topic}", way)
    return ask.ask_fact(dice, last.topic, way=way)


def it(dice: Dice, last: Question) -> Question | None:
    """Another question about the same key, which has become "it"."""
    noun = bare(last.key)
    known = [
        (topic, key)
        for topic in KEYS
        for key in (noun, a(noun), f"the {noun}")
        if f"it {topic}" in WORDINGS and topic != last.topic and key in TOPICS[topic].facts
    ]
    return ask_same(dice, *dice.choice(known)) if known else None


def ask_same(dice: Dice, topic: str, key: str) -> Question:
    return ask.ask_fact(dice, topic, key, dice.choice(WORDINGS[f"it {topic}"]))


def more_of(dice: Dice, last: Question) -> Question | None:
    """More of a list: one after one, else three."""
    others = [word for word in GROUPS[last.key] if word not in str(last.reply)]
    if len(others) < 3:
        return None
    head, num = "Here are three more {s kind}", 3
    if str(last.reply).startswith("Here is "):
        head, num = "Here is another {kind}", 1
    reply = fill(head + ": {m}.", kind=last.key, m=dice.members(others, num))
    return last._replace(text=dice.phrase("again"), reply=reply)


def count_in_it(dice: Dice, last: Question) -> Question | None:
    """How often a letter is in the word that was spelled."""
    letters = [x for x in sorted({*last.key}) if dice.owns("letter", (last.key, x))]
    return ask.ask_letters(dice, "count it", last.key, dice.choice(letters)) if letters else None


FOLLOWING: dict[str, list[Callable[[Dice, Question], Question | None]]] = {
    "tale": [next_tale], "verse": [next_tale], "list": [more_of], "spell": [count_in_it],
    "letters": [lambda dice, last: ask_same(dice, "spell", last.key)],
    "sum": [lambda dice, last: ask.ask_sum(dice, first=int(last.answer))] * 6,
}  # fmt: skip
