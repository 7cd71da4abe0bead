"""Short stories and poems about whatever a stranger asks for, the word copied as it was typed.

A hero is a dict of what the slots of wordings and texts hold: `{a subject}`, as asked for and at
the first mention, `{the subject}` later, and `{subject}` where a noun can stand without an article.
"""

import re

from primer.questions import Dice, Question
from primer.world import SUBJECTS, TEXTS, WORDS, a, capital, fill

KINDS = {"noun": 46, "many": 14, "name": 18, "named": 8, "mine": 6, "bare": 8}  # and their weights
NOUNS = ("creature", "magic", "person", "plant", "thing", "machine", "place", "food")
FORMS = {"noun": "subject", "name": "name"}  # more wordings for heroes with that slot
# What may be wished for after a text, and the kinds of texts that fulfil it.
NEXT = {
    "tale": {"again": "tale", "more": "more", "longer": "tale more", "to verse": "verse"},
    "verse": {"again": "verse", "to tale": "tale"},
}


def invented(dice: Dice) -> str:
    """A word that nobody has seen: `"snorbel"`."""
    onsets = dice.choices(SUBJECTS["tale onset"], k=dice.randint(1, 3))
    syllables = [onset + dice.choice("aeiou") for onset in onsets]
    return "".join(syllables) + dice.choice(SUBJECTS["tale ending"])


def some_name(dice: Dice) -> str:
    """A first name as it may be typed."""
    return dice.word("tale name") if dice.random() < 0.8 else capital(invented(dice))


def some_hero(dice: Dice) -> dict[str, str]:
    """Whoever a stranger may think of."""
    kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
    if kind in ("noun", "named"):
        word = dice.word(f"tale {dice.choice(NOUNS)}")
        noun = word if dice.random() < 0.9 else invented(dice)
        if dice.random() < 0.3:
            noun = f"{dice.choice(SUBJECTS['tale adjective'])} {noun}"
        if kind == "noun":
            tail = f" {dice.choice(SUBJECTS['tale tail'])}" if dice.random() < 0.25 else ""
            return {"a subject": a(noun) + tail, "the subject": f"the {noun}", "subject": noun}
        name, called = some_name(dice), dice.choice(("named", "called"))
        return {"a subject": f"{a(noun)} {called} {name}", "the subject": name, "own": noun}
    if kind == "name":
        name = some_name(dice)
        return dict.fromkeys(("a subject", "the subject", "name"), name)
    word = dice.word(f"tale {kind}")
    return {"a subject": word, "the subject": f"the {word}" if kind == "many" else word}


def told(dice: Dice, kind: str, hero: dict[str, str]) -> str:
    """A text of that kind about the hero; no fox meets a fox."""
    own = hero.get("own", hero["the subject"]).lower().split()[-1]
    texts = [text for text in TEXTS[kind] if not re.search(rf"\b{own}", text.lower())]
    slots = {slot: re.sub("^(my|our) ", "your ", name) for slot, name in hero.items()}
    for name in ("place", "food", "colour", "day", "animal", "thing"):
        slots[name] = dice.choice([word for word in WORDS[name] if own not in word] or [own])
    opening = "Here is a poem about {a subject}:\n" if kind == "verse" else ""
    return fill(opening + dice.choice(texts or TEXTS[kind]), dice, **slots)


def tale(dice: Dice, kinds: str, hero: dict[str, str], text: str) -> Question:
    """The wish for texts of some kinds, fulfilled."""
    reply = " ".join(told(dice, kind, hero) for kind in kinds.split())
    keep = hero.get("subject") or hero.get("name") or hero["a subject"]
    return Question(text, reply, keep=keep, topic="verse" if kinds == "verse" else "tale", key=hero)


def ask_tale(dice: Dice, kind: str = "tale") -> Question:
    """A story or a poem (kind "verse") about a hero, sometimes about any."""
    hero, names = some_hero(dice), [kind]
    if dice.random() < 0.07:
        hero, names = dict.fromkeys(hero, dice.choice(WORDS["hero"])), [f"{kind} any"]
    else:
        names += [f"{kind} {form}" for form, slot in FORMS.items() if slot in hero]
    return tale(dice, kind, hero, dice.phrase(*names, **hero))


def next_tale(dice: Dice, last: Question) -> Question:
    """What follows a story or a poem: another, more of it, or the other kind."""
    if dice.random() < 0.2:
        hero = some_hero(dice)
        return tale(dice, last.topic, hero, dice.phrase("tale another", **hero))
    wish, kinds = dice.choice(list(NEXT[last.topic].items()))
    return tale(dice, kinds, last.key, dice.phrase(f"tale {wish}", **last.key))
