"""Short stories and poems about whatever a stranger asks for, the word copied as it was typed.

A hero is a dict of what the slots of wordings and texts hold: `{a subject}`, as asked for and at
the first mention, `{the subject}` later, and `{subject}` where a noun can stand without an article.
"""

import re

from primer.questions import Dice, Question, pool
from primer.world import HEROES, TEXTS, WORDS, a, capital, fill

KINDS = {"noun": 44, "tail": 10, "many": 14, "name": 18, "mine": 6, "bare": 8}  # and their weights
NOUNS = ("creature", "magic", "person", "plant", "thing", "machine", "place", "food")
ONSETS = (*"bdfghjklmnprstvwz", "bl", "br", "ch", "dr", "fl", "gr", "kl", "pl", "qu", "sh", "sn")
CODAS = ("", "", "", *"bdklmnprtx", "ng", "rt")

# What may be wished for after a text, and the kinds of texts that fulfil it.
NEXT = {
    "tale": {
        "again": "tale", "another": "tale", "to verse": "verse", "more": "more",
        "longer": "tale more",
    },
    "verse": {"again": "verse", "another": "verse", "to tale": "tale"},
}  # fmt: skip


def invented(dice: Dice) -> str:
    """A word that nobody has seen: `"snorbel"`."""
    syllables = [dice.choice(ONSETS) + dice.choice("aeiou") for _ in range(dice.randint(2, 3))]
    return "".join([*syllables, dice.choice(CODAS)])


def some_name(dice: Dice) -> str:
    """A first name as it may be typed."""
    return dice.word("tale name") if dice.random() < 0.8 else capital(invented(dice))


def some_hero(dice: Dice) -> dict[str, str]:
    """Whoever a stranger may think of."""
    kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
    if kind in ("noun", "tail"):
        noun = invented(dice)
        if dice.random() < 0.9:
            noun = dice.choice(pool(f"tale {dice.choice(NOUNS)}", dice.split))
        if dice.random() < 0.3:
            noun = f"{dice.choice(HEROES['adjective'])} {noun}"
        hero = {"a subject": a(noun), "the subject": f"the {noun}"}
        if kind == "noun":
            return hero | {"subject": noun}
        return hero | {"a subject": f"{a(noun)} {dice.choice(HEROES['tail'])}"}
    word = some_name(dice) if kind == "name" else dice.word(f"tale {kind}")
    return {"a subject": word, "the subject": f"the {word}" if kind == "many" else word}


def told(dice: Dice, kind: str, hero: dict[str, str]) -> str:
    """A text of that kind about the hero; no fox meets a fox."""
    *_, own = hero["the subject"].lower().split()
    texts = [text for _, text in TEXTS[kind] if not re.search(rf"\b{own}", text.lower())]
    slots = {slot: re.sub("^(my|our) ", "your ", name) for slot, name in hero.items()}
    for name in ("place", "food", "colour", "day", "animal", "thing"):
        words = [word for word in WORDS[name] if own not in word.lower()]
        slots[name] = dice.choice(words or WORDS[name])
    return fill(dice.choice(texts), dice, **slots)


def tale(dice: Dice, kinds: str, hero: dict[str, str], text: str) -> Question:
    """The wish for texts of some kinds, fulfilled."""
    reply = " ".join(told(dice, kind, hero) for kind in kinds.split())
    keep = hero.get("subject", hero["a subject"])
    return Question(text, reply, keep=keep, topic="verse" if kinds == "verse" else "tale", key=hero)


def ask_tale(dice: Dice, kind: str = "tale") -> Question:
    """A story or a poem (kind "verse") about a hero, sometimes about any."""
    if dice.random() < 0.07:
        name = dice.choice(WORDS["hero"])
        hero = {"a subject": name, "the subject": name}
        return tale(dice, kind, hero, dice.phrase(f"{kind} any"))
    hero = some_hero(dice)
    names = [kind, f"{kind} noun"] if "subject" in hero else [kind]
    return tale(dice, kind, hero, dice.phrase(*names, **hero))


def next_tale(dice: Dice, last: Question) -> Question:
    """What follows a story or a poem: another, more of it, or the other kind."""
    wishes = NEXT[last.topic]
    wish = dice.choice(list(wishes))
    hero = some_hero(dice) if wish == "another" else last.key
    return tale(dice, wishes[wish], hero, dice.phrase(f"tale {wish}", **hero))
