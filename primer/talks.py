"""Conversations: what a stranger types, one thing after the other, and clean replies."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from primer import questions as ask
from primer import world
from primer.outside import ask_near, ask_nonsense, ask_outside, near_key
from primer.questions import KEYS, Dice, Question, held_out
from primer.strangers import roughen
from primer.tales import ask_tale, next_tale, some_name
from primer.world import a, bare, capital, fill, plural

TURNS: list[tuple[Any, ...]] = [  # (weight, kind, its arguments)
    (44, ask.ask_fact), (13, ask.ask_choice), (5, ask.ask_letter), (5, ask.ask_yes_no),
    (2, ask.ask_bigger), (3, ask.ask_list), (4, ask.ask_about, "define"),
    (4, ask.ask_about, "nature"), (2, ask.ask_about, "how"), (1, ask.ask_counting),
    (2, ask.ask_repeat), (19, ask.ask_sum), (6, ask.ask_problem), (6, ask.ask_about, "spell"),
    (5, ask.ask_letters), (1, ask.ask_by_hand), (2, ask.ask_length), (24, ask_outside),
    (8, ask_near), (5, ask_nonsense), (10, ask_tale), (6, ask_tale, "verse"),
    (11, ask.ask_talk, "identity"), (15, ask.ask_talk, "greeting", "small talk"),
]  # fmt: skip
WEIGHTS = list(accumulate(weight for weight, *_ in TURNS))
# Topics whose keys can follow "and ...?", and which topics know a key that has become "it".
NOUN_TOPICS = {"colour", "opposite", "capital", "country", "plural", "past", "rhyme"}
NOUN_TOPICS |= {f"{step} {unit}" for step in ("next", "last") for unit in ("day", "month")}
NOUN_TOPICS |= {"next letter", "next number"}
ARTICLE_TOPICS = {"sound", "young", "home", "legs", "kind", "nature"}
# Phrases that are not a user's.
OURS = {"system", "brief system", "repeated", "name reply", "name unknown", "thanks reply"}
KNOWN: dict[str, list[tuple[str, str]]] = defaultdict(list)
for _topic, _keys in (KEYS | world.REPLIES).items():
    if f"it {_topic}" in world.WORDINGS:
        for _key in _keys:
            KNOWN[bare(_key)].append((_topic, _key))


def conversation(split: str, index: int) -> dict[str, Any]:
    """Conversation `index`: a system message, mostly empty, and the turns of a talk."""
    dice = Dice(split, "conversation", index)
    system, turns = turns_of(dice)
    said = [("system", system)] if system else []
    for turn in turns:  # lettered lists stay clean: matching letters is hard enough (dev/LOG.md)
        text = turn.prompt if turn.choices else roughen(dice, turn.text, turn.keep, turn.alone)
        said += [("user", text), ("assistant", turn.reply)]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def wordings() -> list[tuple[str, str]]:
    """(kind, template) of whatever a user's turn can come from, choices and slots as they are."""
    found = [
        (f"fact {name}", way)
        for name, topic in world.TOPICS.items()
        for way in (*topic.questions, *topic.wordings)
    ]
    found += [(kind, way) for kind, rows in world.TALK.items() for said, _ in rows for way in said]
    asked = {name: ways for name, ways in world.PHRASES.items() if name not in OURS}
    tales = (world.TALE_ASKED, world.TALE_ANY, world.TALE_NEXT)
    for table in (asked, world.WORDINGS, world.ASKED, *tales, world.FOLLOW_UPS, world.AROUND):
        found += [(name, way) for name, ways in table.items() for way in ways]
    return found


def turns_of(dice: Dice) -> tuple[str, list[Question]]:
    """A system message and questions, some of which follow from the one before."""
    style = dice.random()
    if style < 0.03:
        turns = [ask.ask_fact(dice, brief=True) for _ in range(dice.randint(1, 3))]
        return dice.choice(world.PHRASES["brief system"]), turns
    system = dice.choice(world.PHRASES["system"]) if style < 0.09 else ""
    num = dice.choices((1, 2, 3, 4, 5, 6), (44, 29, 15, 7, 3, 2))[0]
    turns: list[Question] = []
    name = ""
    if dice.random() < 0.035:
        turns, name = introduction(dice)
    turns = prolonged(dice, turns, num)
    if name or dice.random() < 0.01:
        turns.append(ask_name(dice, name))
    return system, turns


def prolonged(dice: Dice, turns: list[Question], num: int) -> list[Question]:
    """The talk with more turns, `num` in all."""
    while len(turns) < num:
        next_turn = follow(dice, turns[-1]) if turns and dice.random() < 0.4 else None
        turns = [*turns, next_turn or question(dice)]
    return turns


def question(dice: Dice) -> Question:
    _, kind, *arguments = dice.choices(TURNS, cum_weights=WEIGHTS)[0]
    return kind(dice, *arguments)


def introduction(dice: Dice) -> tuple[list[Question], str]:
    """A user gives a name: the turn, and the name as it was typed."""
    name = some_name(dice)
    text = dice.say(dice.choice(dice.ways("name")), name, hero=name)
    reply = fill(dice.choice(world.PHRASES["name reply"]), hero=name)
    return [Question(text, reply, keep=(name,), alone=True, topic="name", key=name)], name


def ask_name(dice: Dice, name: str) -> Question:
    """The user's name, if it was told."""
    ways = [*dice.ways("name question"), *world.FOLLOW_UPS["name it"]]
    reply = f"Your name is {name}." if name else dice.choice(world.PHRASES["name unknown"])
    return Question(dice.say(dice.choice(ways)), reply, alone=True)


def follow(dice: Dice, last: Question) -> Question | None:
    """What refers to the turn before, if anything can."""
    ways = list(FOLLOWING.get(last.topic, ()))
    if last.topic in NOUN_TOPICS | ARTICLE_TOPICS:
        ways += [another_key] * 4 + [it] * 4 + [why, sure] + [shorter] * bool(last.accepted)
    if last.topic != "thanks" and dice.random() < 0.15:
        ways.append(thanks)
    return dice.choice(ways)(dice, last) if ways else None


def follow_up(dice: Dice, name: str, reply: Any, last: Question, **slots: object) -> Question:
    """A follow-up in words of that name; the topic and its key stay."""
    text = dice.say(dice.choice(world.FOLLOW_UPS[name]), **slots)
    return last._replace(text=text, reply=reply, choices=(), keep=(), alone=True)


def another_key(dice: Dice, last: Question) -> Question:
    """The same question about another key, which may be unknown."""
    topic, way = last.topic, dice.choice(world.FOLLOW_UPS["and"])
    if topic in world.NEAR and dice.random() < 0.15:
        key = near_key(dice, topic)
        reply = answer = fill(dice.choice(world.UNKNOWN[f"near {topic}"]), key=key)
    else:
        keys = KEYS.get(topic) or list(world.REPLIES[topic])
        _, key, way = dice.one_of_each("and", [topic], keys, world.FOLLOW_UPS["and"])
        reply, answer = stated(dice, topic, key)
    shown = dice.choice((a(key), plural(key), f"the {key}")) if topic in ARTICLE_TOPICS else key
    text = dice.say(way, shown, key=shown)
    return Question(text, reply, answer, (), keep=(key,), alone=True, topic=topic, key=key)


def stated(dice: Dice, topic: str, key: str) -> tuple[str, str]:
    """The sentence that tells a fact, and the fact in a word."""
    if topic in world.REPLIES:
        return world.REPLIES[topic][key], world.REPLIES[topic][key]
    value = world.TOPICS[topic].facts[key]
    return fill(dice.choice(world.TOPICS[topic].sentences), key=key, value=value), value


def it(dice: Dice, last: Question) -> Question | None:
    """Another question about the same key, which has become "it"."""
    kept = dice.split != "train"
    known = [each for each in KNOWN[bare(last.key)] if held_out("it", *each) == kept]
    known = [(topic, key) for topic, key in known if topic != last.topic]
    if not known:
        return None
    topic, key = dice.choice(known)
    reply, answer = stated(dice, topic, key)
    text = dice.say(dice.choice(world.WORDINGS[f"it {topic}"]))
    return Question(text, reply, answer, alone=True, topic=topic, key=key)


def fact_of(question: Question) -> str:
    """What a reply said, as a sentence."""
    if question.accepted:
        return question.accepted[0]
    if isinstance(question.reply, list):
        return question.reply[-1]["text"]
    return capital(re.sub("^(Yes|No), ", "", question.reply))


def doubted(dice: Dice, last: Question, name: str) -> Question:
    """The answer to "why?" and "are you sure?"."""
    return follow_up(dice, name, fill(dice.choice(world.UNKNOWN[name]), fact=fact_of(last)), last)


def shorter(dice: Dice, last: Question) -> Question:
    return follow_up(dice, "shorter", f"{capital(last.answer)}.", last)


def thanks(dice: Dice, last: Question) -> Question:
    reply = dice.choice(world.PHRASES["thanks reply"])
    return follow_up(dice, "thanks", reply, last._replace(topic="thanks"))


def another_joke(dice: Dice, last: Question) -> Question:
    reply = dice.choice([reply for reply in last.key if reply != last.reply])
    return follow_up(dice, "again", reply, last)


def reckon_on(dice: Dice, last: Question) -> Question:
    """Another sum, which begins with the last result."""
    x = int(last.answer)

    def pick() -> tuple[str, int, int]:
        op = dice.choice("+-*" if x < 100 else "+-")
        y = dice.randint(0, 9 if op == "*" else dice.choice((20, 20, 99, 999)))
        y = min(x, y) if op == "-" else y
        return op, max(x, y), min(x, y)

    op, high, low = dice.draw("sum", pick)
    y = low if x == high else high
    result = ask.OPERATIONS[op](x, y)
    name = {"+": "plus", "-": "minus", "*": "times"}[op]
    done = last._replace(answer=str(result))
    return follow_up(dice, name, ask.computed(x, op, y, result), done, b=y)


def another_list(dice: Dice, last: Question) -> Question | None:
    """As many more of the same kind: one after one, else three."""
    others = [word for word in world.GROUPS[last.key] if word not in str(last.reply)]
    if len(others) < 3:
        return None
    one, two, three = dice.sample(others, 3)
    reply = f"Here is another {last.key}: {one}."
    if not str(last.reply).startswith("Here is "):
        reply = f"Here are three more {plural(last.key)}: {one}, {two} and {three}."
    return follow_up(dice, "again", reply, last)


def spell_it(dice: Dice, last: Question) -> Question:
    spelled = follow_up(dice, "spell it", world.REPLIES["spell"][last.key], last)
    return spelled._replace(topic="spell")


def count_in_it(dice: Dice, last: Question) -> Question | None:
    kept = dice.split != "train"
    letters = [x for x in sorted({*last.key}) if held_out("letter", last.key, x) == kept]
    if not letters:
        return None
    letter = dice.choice(letters)
    parts = ask.counted(last.key, letter)
    counted = follow_up(dice, "count it", parts, last, letter=letter)
    return counted._replace(topic="letters", answer=parts[1]["text"])


why, sure = partial(doubted, name="why"), partial(doubted, name="sure")
FOLLOWING: dict[str, Sequence[Callable[[Dice, Question], Question | None]]] = {
    "tale": [next_tale] * 8, "verse": [next_tale] * 8, "sum": [reckon_on] * 6 + [sure],
    "list": [another_list] * 5, "yes": [why, sure], "bigger": [why, sure],
    "letters": [spell_it] * 3, "spell": [count_in_it] * 3, "joke": [another_joke] * 5,
}  # fmt: skip
