"""Short stories and poems about whatever a stranger asks for, the word copied as it was typed."""

import re
from typing import NamedTuple

from primer import world
from primer.questions import Dice, Question, pool
from primer.world import a, capital, fill, plural

NOUNS = ("creature", "magic", "person", "plant", "thing", "machine", "place", "food")
KINDS = {
    "noun": 44, "tail": 6, "clause": 4, "two": 3, "many": 12,
    "name": 18, "mine": 6, "bare": 4, "named": 3,
}  # fmt: skip
ONSETS = (*"bdfghjklmnprstvwz", "bl", "br", "ch", "dr", "fl", "gr", "kl", "pl", "qu", "sh", "sn")
CODAS = ("", "", "", *"bdklmnprtx", "ng", "rt")

COMMON = {"a", "the", "your", "in", "of", "with", "and", "who", "that", "from", "one", "two"}
TOLD = {  # kind -> its texts, each with the words that are no hero's if it is told of one
    kind: [(text, {*re.findall(r"\w+", text.lower())} - COMMON) for _, text in world.TEXTS[kind]]
    for kind in ("tale", "more", "verse")
}


class Hero(NamedTuple):
    """What a text is about: as asked for, and as it is called first and later in the text."""

    asked: str
    first: str
    later: str
    noun: str = ""  # without an article, if it has one
    name: bool = False


def invented(dice: Dice) -> str:
    """A word that nobody has seen: `"snorbel"`."""
    syllables = [dice.choice(ONSETS) + dice.choice("aeiou") for _ in range(dice.randint(2, 3))]
    return "".join([*syllables, dice.choice(CODAS)])


def noun(dice: Dice) -> str:
    """A noun, sometimes an invented one, sometimes after an adjective."""
    word = dice.choice(pool(f"tale {dice.choice(NOUNS)}", dice.split))
    if dice.random() < 0.1:
        word = invented(dice)
    return f"{dice.choice(world.HEROES['adjective'])} {word}" if dice.random() < 0.3 else word


def common(dice: Dice, kind: str) -> Hero:
    """A hero with an article, or many of a kind."""
    word = noun(dice)
    one, the = a(word), f"the {word}"
    if kind == "tail":
        one += f" {dice.choice(world.HEROES['tail'])}"
    if kind == "two":
        other = noun(dice)
        one, the = f"{one} and {a(other)}", f"{the} and the {other}"
    if kind == "many":
        one = plural(word) if word[-1] not in "fo" else dice.choice(pool("tale many", dice.split))
        the = f"the {one}"
    asked = f"{one} {dice.choice(world.HEROES['clause'])}" if kind == "clause" else one
    return Hero(asked, one, the, word if kind == "noun" else "")


def some_name(dice: Dice) -> str:
    """A first name as it may be typed."""
    names = [*world.WORDS["hero"], *pool("tale name", dice.split)]
    word = dice.choice([name for name in names if " " not in name])
    word = capital(invented(dice)) if dice.random() < 0.2 else word
    return word.lower() if dice.random() < 0.5 else word


def choose(dice: Dice) -> Hero:
    """Whoever a stranger may think of."""
    kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
    if kind in ("noun", "tail", "clause", "two") or (kind == "many" and dice.random() < 0.4):
        return common(dice, kind)
    word = dice.choice(pool(f"tale {kind}", dice.split))
    if kind == "name" and dice.random() < 0.2:
        word = capital(invented(dice))
    *_, last = word.split()
    name = kind == "name" or (kind == "mine" and last.istitle())
    if dice.random() < 0.5:
        word, last = word.lower(), last.lower()
    if kind == "mine":
        yours = f"your {word.split(' ', 1)[1]}"
        return Hero(word, yours, last if name else yours, name=name)
    return Hero(word, word, f"the {word}" if kind == "many" else word, name=name)


def told(dice: Dice, kind: str, hero: Hero) -> str:
    """A text of that kind about the hero; a name stays as it was typed, at the beginning too."""
    words = set(hero.first.lower().split())
    texts = [text for text, used in TOLD[kind] if not words & used]
    text = dice.choice(texts or [text for text, _ in TOLD[kind]])
    for slot, name in (("a subject", hero.first), ("the subject", hero.later)):
        start = name if hero.name and " " not in name else capital(name)
        text = text.replace(f"{{{slot}}}", name).replace(f"{{{capital(slot)}}}", start)
    slots = {}
    for name in ("place", "food", "colour", "day", "animal", "thing"):  # not the hero again
        others = dice.sample(world.WORDS[name], 3)
        slots[name] = next((word for word in others if not words & {*word.split()}), others[0])
    return fill(text, dice, **slots)


def asked(dice: Dice, way: str, hero: Hero) -> str:
    """The wish for a text about the hero."""
    return dice.say(way.replace("{a subject}", hero.asked), hero.asked, subject=hero.noun)


def ask_tale(dice: Dice, kind: str = "tale") -> Question:
    """A story or a poem (kind "verse") about a hero, sometimes about any."""
    if dice.random() < 0.07:
        hero = Hero("", *[dice.choice(world.WORDS["hero"])] * 2, name=True)
        text = dice.say(dice.choice(world.TALE_ANY[f"{kind} any"]))
        return Question(text, told(dice, kind, hero), topic=kind, key=hero)
    hero, ways = choose(dice), world.TALE_ASKED[kind]
    if hero.noun and dice.random() < 0.15:
        ways = world.TALE_ASKED[f"{kind} noun"]
    elif kind == "tale" and hero.asked.startswith(("a ", "an ")) and dice.random() < 0.05:
        ways = world.TALE_ASKED["tale one"]
    text = asked(dice, dice.choice(ways), hero)
    return Question(text, told(dice, kind, hero), keep=(hero.asked,), topic=kind, key=hero)


def next_tale(dice: Dice, last: Question) -> Question:
    """What follows a story or a poem: another, more of it, or the other kind."""
    hero, kind = last.key, last.topic
    other = "verse" if kind == "tale" else "tale"
    wishes = ["again", "again", f"to {other}", "another"]
    wish = dice.choice(wishes + ["more", "longer"] * (kind == "tale"))
    if wish == "another":
        hero = choose(dice)
    if wish == f"to {other}":
        kind = other
    text = asked(
        dice, dice.choice(world.TALE_NEXT[wish]).replace("{the subject}", hero.later), hero
    )
    reply = told(dice, "more" if wish == "more" else kind, hero)
    if wish == "longer":
        reply += f" {told(dice, 'more', hero)}"
    return last._replace(
        text=text, reply=reply, keep=(hero.later,), alone=True, topic=kind, key=hero
    )
