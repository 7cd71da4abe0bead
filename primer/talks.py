"""Conversations: what a stranger types, one thing after the other, and clean replies."""

from typing import Any

from primer import questions as ask
from primer.questions import KEYS, Dice, Question
from primer.strangers import roughen
from primer.tales import ask_tale, next_tale, some_name
from primer.world import GROUPS, TOPICS, WORDINGS, WORDS, a, bare, capital, plural

TURNS: list[tuple[Any, ...]] = [  # (weight, kind, its arguments)
    (60, ask.ask_fact), (4, ask.ask_fact, "define"), (4, ask.ask_fact, "nature"),
    (2, ask.ask_fact, "how"), (8, ask.ask_fact, "spell"), (13, ask.ask_choice),
    (5, ask.ask_letter), (8, ask.ask_yes_no), (2, ask.ask_bigger), (3, ask.ask_list),
    (1, ask.ask_counting), (2, ask.ask_repeat), (19, ask.ask_sum), (9, ask.ask_sum, True),
    (5, ask.ask_product), (8, ask.ask_letters), (3, ask.ask_fact, "length"),
    (24, ask.ask_outside), (8, ask.ask_near), (5, ask.ask_nonsense), (8, ask_tale),
    (5, ask_tale, "verse"), (18, ask.ask_talk, "identity"),
    (38, ask.ask_talk, "greeting", "small talk"),
]  # fmt: skip
NOUNS = {"sound", "young", "home", "legs", "kind", "nature"}  # topics whose keys have no article
DEEDS = {"job", "tool", "season", "define", "how", *ask.SPELLED}  # whose keys nobody calls "it"
MEMORIES = [name.removeprefix("told ") for name in WORDINGS if name.startswith("told ")]


def conversation(split: str, index: int) -> dict[str, Any]:
    """Conversation `index`: a system message, mostly empty, and the turns of a talk."""
    dice = Dice(split, "conversation", index)
    system, turns = turns_of(dice)
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages += exchange(typed(dice, turn), turn.reply)
    return {"messages": messages}


def exchange(said: str, reply: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]


def matching(split: str, index: int) -> dict[str, Any]:
    """Practice for multiple choice: a lettered list and several questions about it."""
    dice = Dice(split, "matching", index)
    turns = [ask.ask_choice(dice) if dice.random() < 0.7 else ask.ask_letter(dice)]
    while len(turns) < 5 and len(turns[0].choices) > 1:
        turns.append(ask.another_letter(dice, turns[0]))
    return {"messages": [each for turn in turns for each in exchange(turn.prompt, turn.reply)]}


def typed(dice: Dice, turn: Question) -> str:
    """The turn with noise; lettered lists stay clean: matching is hard enough (dev/LOG.md)."""
    if turn.choices:
        return turn.prompt
    return roughen(dice, turn.text, turn.keep, alone=not turn.topic)


def turns_of(dice: Dice) -> tuple[str, list[Question]]:
    """A system message and questions, some of which follow from the one before."""
    style = dice.random()
    if style < 0.06:
        turns = [ask.ask_fact(dice, brief=True) for _ in range(dice.randint(1, 6))]
        return dice.reply("brief system"), turns
    turns: list[Question] = []
    name = some_name(dice) if dice.random() < 0.05 else ""
    if name:
        text, reply = dice.phrase("name", hero=name), dice.reply("name reply", hero=name)
        turns = [Question(text, reply, keep=name, topic="name", key=name)]
    memory = memory_of(dice) if dice.random() < 0.07 else []
    turns += memory[:-1]
    turns = prolonged(dice, turns, dice.choices((1, 2, 3, 4, 5, 6), (32, 28, 18, 12, 6, 4))[0])
    if name or dice.random() < 0.01:
        reply = f"Your name is {name}." if name else dice.reply("name unknown")
        turns.append(Question(dice.phrase("name question", "name it"), reply))
    return dice.reply("system") if style < 0.12 else "", turns + memory[-1:]


def memory_of(dice: Dice) -> list[Question]:
    """What strangers tell of themselves and ask about later, or only the question."""
    kind = dice.choice(MEMORIES)
    what = dice.choice(("colour", "colour", "food", "animal", "season", "day", "month", "number"))
    values = {"number": list(map(str, range(100))), "food": [plural(dice.word("tale food"))]}
    slots = {
        "name": some_name(dice), "pet": dice.choice(WORDS["pet"]), "what": what,
        "kin": dice.choice(WORDS["kin"]), "value": dice.choice(values.get(what) or WORDS[what]),
        "age": str(dice.randint(5, 90)), "town": dice.choice(GROUPS["city"]),
        "word": dice.word("tale thing"),
    }  # fmt: skip
    if what == "animal":
        slots["value"] = f"the {slots['value']}"
    told, asked = (dice.phrase(f"{way} {kind}", **slots) for way in ("told", "asked"))
    if dice.random() < 0.15:
        return [Question(asked, dice.reply(f"unknown {kind}", **slots))]
    keep = next(
        (slots[slot] for slot in ("name", "value", "town", "word") if slots[slot] in told), ""
    )
    return [
        Question(told, dice.reply(f"told {kind}", **slots), keep=keep, topic="memory"),
        Question(asked, dice.reply(f"asked {kind}", **slots)),
    ]


def prolonged(dice: Dice, turns: list[Question], num: int) -> list[Question]:
    """The talk with more turns, `num` in all."""
    while len(turns) < num:
        turn = follow(dice, turns[-1]) if turns and dice.random() < 0.5 else None
        if turn is None:
            _, kind, *arguments = dice.choices(TURNS, [weight for weight, *_ in TURNS])[0]
            turn = kind(dice, *arguments)
        turns = [*turns, turn]
    return turns


def follow(dice: Dice, last: Question) -> Question | None:
    """What refers to the turn before."""
    if dice.random() < 0.15:
        return Question(dice.phrase("thanks"), dice.reply("thanks"))
    if last.topic.startswith("outside "):
        return after_unknown(dice, last)
    ways = FOLLOWING.get(last.topic)
    return dice.choice(ways)(dice, last) if ways else None


def remark(dice: Dice, last: Question) -> Question:
    """A doubt about a fact, or the wish to hear it in fewer or in more words."""
    name = dice.choice(("why", "sure", "shorter", "longer"))
    reply = dice.reply(name, fact=last.accepted[0], answer=capital(last.answer))
    return last._replace(text=dice.phrase(name), reply=reply, keep="")


def doubt(dice: Dice, last: Question) -> Question:
    """Another value for the fact just told, or the same one said again."""
    fact, value = ask.inside(last.topic, last.key), TOPICS[last.topic].facts[last.key]
    if dice.random() < 0.3:
        text, reply = dice.phrase("it is", value=value), f"Yes, {fact}"
    else:
        other = ask.mistaken(dice, last.topic, last.key)
        text, reply = dice.phrase("it is not", value=other), f"No, {fact}"
    return last._replace(text=text, reply=reply, keep="")


def after_unknown(dice: Dice, last: Question) -> Question:
    """The same question about another key, or the wish to know why this one is not known."""
    topic = last.topic.removeprefix("outside near ")
    if topic in KEYS and dice.random() < 0.6:
        return another_key(dice, last._replace(topic=topic))
    return Question(dice.phrase("why unknown"), dice.reply("why unknown"))


def another_key(dice: Dice, last: Question) -> Question:
    """The same question about another key, which may be unknown."""
    ways = WORDINGS.get(f"and {last.topic}", [])
    way = dice.choice(ways if last.topic in DEEDS else WORDINGS["and"] + ways)
    if last.topic in NOUNS:
        way = way.replace("{key}", dice.choice(("{a key}", "{s key}", "the {key}")))
    if last.topic not in ask.SPELLED and dice.random() < 0.15:
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


def onward(dice: Dice, last: Question) -> Question | None:
    """One step further from the value just named."""
    direction, unit = last.topic.split()
    if last.answer not in TOPICS[last.topic].facts:
        return None
    way = dice.choice(WORDINGS[f"on {direction}"]).replace("{unit}", unit)
    return ask.ask_fact(dice, last.topic, last.answer, way)


def letters_of_it(dice: Dice, last: Question) -> Question | None:
    """A letter in the word just asked about."""
    word = bare(last.key)
    others = dict.fromkeys(word + "aeiorst")
    letters = [other for other in others if ask.belongs(dice.split, "letter", word, other)]
    if word not in TOPICS["spell"].facts or not letters:
        return None
    return ask.letters_counted(dice, "it letters", word, dice.choice(letters))


def after_letters(dice: Dice, last: Question) -> Question | None:
    """Something else about the word whose letters were counted."""
    word = last._replace(key=last.key[0])
    return dice.choice((it, letters_of_it))(dice, word)


def reckon_on(dice: Dice, last: Question) -> Question:
    """Another sum, which begins with the last result."""
    return ask.ask_sum(dice, first=int(last.answer))


def doubled(dice: Dice, last: Question) -> Question | None:
    num = int(last.answer)
    if not ask.belongs(dice.split, "sum", "*", max(num, 2), min(num, 2)):
        return None
    return ask.reckoned(dice.phrase("double that"), num, "*", 2)


def sum_again(dice: Dice, last: Question) -> Question | None:
    """The last sum with another second number."""
    x, op, y = last.key
    numbers = [
        num
        for num in range(2, 100)
        if num != y and (op != "-" or num <= x)
        if ask.belongs(dice.split, "sum", op, max(x, num), min(x, num))
    ]
    if not numbers:
        return None
    b = dice.choice(numbers)
    text = dice.phrase("sum again", a=x, op=op, word=ask.OPERATIONS[op], b=b, old=y)
    return ask.reckoned(text, x, op, b)


def list_on(dice: Dice, last: Question) -> Question | None:
    """More of the same kind."""
    kind, members = last.key
    rest = [member for member in GROUPS[kind] if member not in members]
    num = dice.choice((1, 1, 2, 3))
    if len(rest) < num:
        return None
    way = dice.choice(WORDINGS["one more" if num == 1 else "more"])
    return ask.listed(dice, way, kind, dice.sample(rest, num))


def after_list(dice: Dice, last: Question) -> Question | None:
    """Something about the one thing named, or more of its kind."""
    members = last.key[1]
    if len(members) == 1 and dice.random() < 0.5:
        return it(dice, last._replace(topic="kind", key=members[0]))
    return list_on(dice, last)


def yes_again(dice: Dice, last: Question) -> Question | None:
    """Whether another key has the same value; only where many may share one."""
    topic, key, value = last.key
    if topic not in ("colour", "kind"):
        return None
    facts = TOPICS[topic].facts
    others = [other for other in facts if other != key]
    same = [other for other in others if facts[other] == value]
    other = dice.choice(same if same and dice.random() < 0.5 else others)
    text = dice.phrase("again yes", key=a(other) if topic in NOUNS else other)
    return ask.judged(text, topic, other, value)


# What may follow a turn about a topic, likelier if named more often.
FOLLOWING: dict[str, list[Any]] = {
    topic: [another_key, it] * 4 + [remark] * 3 + [letters_of_it] for topic in KEYS
}
FOLLOWING |= {topic: [another_key] * 2 + [remark] for topic in ("job", "tool", "season")}
FOLLOWING |= {topic: [another_key] for topic in ("define", "how")}
FOLLOWING |= {topic: [another_key, it, letters_of_it] for topic in ask.SPELLED}
for _topic in ask.TESTED:
    is_row = _topic.startswith(("next ", "last "))
    FOLLOWING[_topic] = [*FOLLOWING[_topic], doubt, *[onward] * 5 * is_row]
FOLLOWING |= {
    "tale": [next_tale], "verse": [next_tale], "yes": [remark, yes_again],
    "bigger": [remark, lambda dice, _: ask.ask_bigger(dice, "and bigger")],
    "sum": [reckon_on] * 4 + [sum_again] * 3 + [doubled, remark, remark],
    "letters": [after_letters, after_letters, remark], "list": [after_list],
    "letter": [ask.another_letter],
}  # fmt: skip
