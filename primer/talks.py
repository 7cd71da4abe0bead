"""Conversations: what a stranger types, one thing after the other, and clean replies."""

from typing import Any

from primer import questions as ask
from primer.questions import KEYS, Dice, Question
from primer.strangers import roughen
from primer.tales import ask_tale, next_tale, some_name
from primer.world import ASKED, PHRASES, TALK, TOPICS, WORDINGS, a, bare, capital

TURNS: list[tuple[Any, ...]] = [  # (weight, kind, its arguments)
    (44, ask.ask_fact), (4, ask.ask_fact, "define"), (4, ask.ask_fact, "nature"),
    (2, ask.ask_fact, "how"), (6, ask.ask_fact, "spell"), (13, ask.ask_choice),
    (5, ask.ask_letter), (5, ask.ask_yes_no), (2, ask.ask_bigger), (3, ask.ask_list),
    (1, ask.ask_counting), (2, ask.ask_repeat), (19, ask.ask_sum), (6, ask.ask_sum, True),
    (6, ask.ask_letters), (2, ask.ask_fact, "length"), (24, ask.ask_outside), (8, ask.ask_near),
    (5, ask.ask_nonsense), (10, ask_tale), (6, ask_tale, "verse"),
    (11, ask.ask_talk, "identity"), (15, ask.ask_talk, "greeting", "small talk"),
]  # fmt: skip
NOUNS = {"sound", "young", "home", "legs", "kind", "nature"}  # topics whose keys have no article
DEEDS = {"job", "tool", "season", "define", "how", *ask.SPELLED}  # whose keys nobody calls "it"


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
    if turn.choices:
        return turn.prompt
    return roughen(dice, turn.text, turn.keep, alone=not turn.topic)


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
    turns: list[Question] = []
    name = some_name(dice) if dice.random() < 0.035 else ""
    if name:
        text, reply = dice.phrase("name", hero=name), dice.reply("name reply", hero=name)
        turns = [Question(text, reply, keep=name, topic="name", key=name)]
    turns = prolonged(dice, turns, dice.choices((1, 2, 3, 4, 5, 6), (44, 29, 15, 7, 3, 2))[0])
    if name or dice.random() < 0.01:
        reply = f"Your name is {name}." if name else dice.reply("name unknown")
        turns.append(Question(dice.phrase("name question", "name it"), reply))
    return dice.reply("system") if style < 0.09 else "", turns


def prolonged(dice: Dice, turns: list[Question], num: int) -> list[Question]:
    """The talk with more turns, `num` in all."""
    while len(turns) < num:
        turn = follow(dice, turns[-1]) if turns and dice.random() < 0.4 else None
        if turn is None:
            _, kind, *arguments = dice.choices(TURNS, [weight for weight, *_ in TURNS])[0]
            turn = kind(dice, *arguments)
        turns = [*turns, turn]
    return turns


def follow(dice: Dice, last: Question) -> Question | None:
    """What refers to the turn before."""
    if dice.random() < 0.15:
        return Question(dice.phrase("thanks"), dice.reply("thanks"))
    ways = FOLLOWING.get(last.topic)
    return dice.choice(ways)(dice, last) if ways else None


def remark(dice: Dice, last: Question) -> Question:
    """A doubt about a fact, or the wish to hear it in fewer words."""
    name = dice.choice(("why", "sure", "shorter"))
    reply = dice.reply(name, fact=last.accepted[0], answer=capital(last.answer))
    return last._replace(text=dice.phrase(name), reply=reply, keep="")


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
    if not known:
        return None
    topic, key = dice.choice(known)
    return ask.ask_fact(dice, topic, key, dice.choice(WORDINGS[f"it {topic}"]))


def reckon_on(dice: Dice, last: Question) -> Question:
    """Another sum, which begins with the last result."""
    return ask.ask_sum(dice, first=int(last.answer))


# What may follow a turn about a topic, likelier if named more often.
FOLLOWING: dict[str, list[Any]] = {topic: [another_key, it] * 4 + [remark] * 3 for topic in KEYS}
FOLLOWING |= dict.fromkeys(DEEDS, []) | {
    "tale": [next_tale], "verse": [next_tale], "yes": [remark], "bigger": [remark],
    "sum": [reckon_on, reckon_on, remark], "letters": [it], "length": [it], "spell": [it],
}  # fmt: skip
