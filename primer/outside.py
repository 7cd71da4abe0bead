"""Honest replies to what lies outside the primer's world, and kind ones to nonsense."""

import re
from string import ascii_lowercase

from primer.questions import Dice, Question, pool
from primer.world import AROUND, ASKED, NEAR, TOPICS, UNKNOWN, chosen, fill

NEAR_WEIGHTS = [len(keys) ** 0.5 for keys in NEAR.values()]


def typed(dice: Dice, name: str) -> str:
    """A name as a stranger types it; replies copy it, since a small model copies best."""
    return name.lower() if dice.random() < 0.5 else name


def ask_outside(dice: Dice) -> Question:
    """Something on earth that no table knows, or that cannot be done."""
    name = dice.choice(list(ASKED))
    way = chosen(dice.choice(ASKED[name]), dice)  # its choices first: they hold slots
    slots = {
        slot: typed(dice, dice.choice(pool(slot, dice.split)))
        for slot in re.findall(r"\{(?:[as] )?(\w{2,})\}", way)
    }
    numbers = {"a": dice.randint(2, 999), "b": dice.randint(2, 20), "c": dice.randint(2, 99)}
    subject = slots.get(name, "")
    bare = UNKNOWN["unknown bare"] if not subject else UNKNOWN["unknown"]
    reply = fill(dice.choice(UNKNOWN.get(name, bare)), subject=subject, **slots)
    text = dice.say(way, subject, **slots, **numbers)
    return Question(text, reply, keep=tuple(slots.values()), topic=f"outside {name}", key=subject)


def ask_near(dice: Dice) -> Question:
    """A question as about a fact, but the key is not in the world."""
    name = dice.choices(list(NEAR), NEAR_WEIGHTS)[0]
    key = near_key(dice, name)
    topic = TOPICS.get(name)
    ways = [*topic.questions, *topic.wordings] if topic else dice.ways(name)
    reply = fill(dice.choice(UNKNOWN[f"near {name}"]), key=key)
    text = dice.say(dice.choice(ways), key, key=key, word=key)
    return Question(text, reply, keep=(key,), topic=f"near {name}", key=key)


def near_key(dice: Dice, topic: str) -> str:
    return typed(dice, dice.choice(pool(f"near {topic}", dice.split)))


def ask_nonsense(dice: Dice) -> Question:
    text = dice.choice(AROUND["nonsense"]) if dice.random() < 0.6 else mash(dice)
    return Question(text, dice.choice(UNKNOWN["nonsense"]), keep=(text,), alone=True)


def mash(dice: Dice) -> str:
    """Letters without sense, as from a cat on the keyboard."""
    letters = dice.choice((ascii_lowercase, "asdfghjkl", "sdfghjklqwrtp", "bcdfghjklmnpqrstvwxz"))
    words = [
        "".join(dice.choices(letters, k=dice.randint(4, 9))) for _ in range(dice.randint(1, 3))
    ]
    return " ".join(words)
