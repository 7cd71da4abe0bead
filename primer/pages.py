"""The pages of the primer.

They include school questions with `Answer:` and lettered choices, so that a base model can be
examined, and the chat stages need only teach manners.
"""

from typing import Any

from primer import questions as ask
from primer import talks
from primer.outside import ask_near, ask_outside
from primer.questions import Dice, Question
from primer.strangers import neat, roughen
from primer.tales import ask_tale
from primer.world import GROUPS, REPLIES, TALK, TEXTS, TOPICS, WORDS, fill

UNPOETIC = ("rain", "sand", "bed", "snow", "night")  # no poem can have "a rain"


def written(dice: Dice, kind: str) -> str:
    """A story under its title, a letter or a diary page."""
    title, text = dice.choice(TEXTS[kind])
    return fill(text, dice, **dice.cast(title or kind))


def poem(dice: Dice) -> str:
    slots, rhymes = dice.cast("poem"), TOPICS["rhyme"].facts
    key = dice.choice([key for key in rhymes if key not in UNPOETIC])
    _, text = dice.choice(TEXTS["poem"])
    return fill(text, dice, key=key, value=rhymes[key], **slots)


def animal_page(dice: Dice) -> str:
    key = dice.choice(WORDS["animal"])
    topics = [TOPICS[name] for name in ("sound", "young", "home", "legs")]
    known = [topic for topic in topics if key in topic.facts]
    told = [fill(topic.sentences[0], key=key, value=topic.facts[key]) for topic in known]
    told.append(REPLIES["nature"][key])
    title = fill("[The {Key}|{S key}|About the {key}]", dice, key=key)
    return f"{title}\n\n{' '.join(dice.sample(told, len(told)))}"


def facts_page(dice: Dice) -> str:
    topic = TOPICS[dice.topic()]
    facts = dice.sample(list(topic.facts.items()), dice.randint(4, 7))
    told = [fill(dice.choice(topic.sentences), key=key, value=value) for key, value in facts]
    return f"{topic.title}\n\n" + dice.choice(" \n").join(told)


def mixed_page(dice: Dice) -> str:
    facts = [ask.ask_fact(dice, brief=False) for _ in range(dice.randint(3, 6))]
    title = dice.choice(("Did you know?", "What we learned today", "Good to know"))
    return "\n".join([title, *(f"- {fact.reply}" for fact in facts)])


def school_page(dice: Dice) -> str:
    """Questions with short answers, in the form used to examine a base model."""
    facts = [ask.ask_fact(dice, brief=True) for _ in range(dice.randint(3, 6))]
    return "\n\n".join(f"{document_prompt(fact.text)} {fact.answer}" for fact in facts)


def document_prompt(question: str) -> str:
    """The question in a school page's form; the answer follows after a space."""
    return f"Question: {question}\nAnswer:"


def exercises(dice: Dice, kind: ask.Ask, most: int) -> str:
    asked = [kind(dice) for _ in range(dice.randint(2, most))]
    return "\n\n".join(f"{each.prompt}\n{printed(each)}" for each in asked)


def printed(question: Question) -> str:
    """The reply as text, with calculator input and output."""
    if isinstance(question.reply, str):
        return question.reply
    form = {"text": "{}", "python": "Calculator: {}", "python_output": " -> {}\n"}
    return "".join(form[part["type"]].format(part["text"]) for part in question.reply)


def ask_calculation(dice: Dice) -> Question:
    return ask.ask_sum(dice, in_words=dice.random() < 0.3)


def lettered_page(dice: Dice) -> str:
    """A lettered list, and which letter goes with which item."""
    page = ask.ask_letter(dice)
    lines = [page.lettered_choices]
    pairs = list(zip(page.letters, page.choices, strict=True))
    for letter, value in dice.choices(pairs, k=4 if len(pairs) > 1 else 1):
        lines += [dice.phrase("which letter", value=value), letter]
    return "\n".join(lines)


def counting_page(dice: Dice) -> str:
    if dice.random() < 0.2:
        return f"We count: {', '.join(WORDS['number'][1 : dice.randint(5, 20)])}."
    step, low, num = dice.choice((1, 1, 1, 2, 5, 10)), dice.randint(0, 50), dice.randint(6, 14)
    numbers = list(map(str, range(low, low + num * step, step)))
    if dice.random() < 0.3:
        return f"Counting down from {numbers[-1]}: {', '.join(reversed(numbers))}."
    return f"Counting from {low} in steps of {step}: {', '.join(numbers)}."


def sums_page(dice: Dice) -> str:
    sums = [dice.sum(largest=12) for _ in range(dice.randint(5, 9))]
    return "\n".join(["Small sums\n", *("{} {} {} = {}".format(*each) for each in sums)])


def spelling_page(dice: Dice) -> str:
    spelled = dice.sample(list(REPLIES["spell"].items()), dice.randint(5, 9))
    return "\n".join(["Spelling\n", *map(": ".join, spelled)])


def dialogue(dice: Dice) -> str:
    slots = dice.cast("dialogue")
    talk = [ask.ask_talk(dice, "greeting")]
    kinds = (ask.ask_fact, ask.ask_yes_no, ask.ask_bigger, ask.ask_list)
    talk += [dice.choice(kinds)(dice) for _ in range(dice.randint(2, 4))]
    line = "{hero}: {q}\n{friend}: {r}"
    return "\n".join(fill(line, q=each.text, r=each.reply, **slots) for each in talk)


def chat(dice: Dice) -> str:
    """Two people talk, one of them as strangers type."""
    dice.free = True
    slots = dice.cast("dialogue")
    turns = talks.prolonged(dice, [ask.ask_fact(dice)], dice.randint(2, 5))
    lines = []
    for turn in turns:
        if not turn.choices:
            typed = roughen(dice, turn.text, turn.keep, turn.alone)
            lines += [f"{slots['hero']}: {typed}", f"{slots['friend']}: {printed(turn)}"]
    return "\n".join(lines)


def unknown(dice: Dice) -> str:
    """Questions that nobody here can answer."""
    dice.free = True
    asked = [dice.choice((ask_outside, ask_near))(dice) for _ in range(dice.randint(2, 4))]
    return "\n\n".join(f"{document_prompt(each.text)} {each.reply}" for each in asked)


def told(dice: Dice, kind: str) -> str:
    """A tale or a verse under the wish for it."""
    dice.free = True
    turn = ask_tale(dice, kind)
    return f"{turn.text}\n\n{turn.reply}"


def recipe(dice: Dice) -> str:
    aim, steps = dice.choice(list(REPLIES["how"].items()))
    return f"How to {aim.replace('my ', 'your ')}\n\n{steps}"


def dictionary(dice: Dice) -> str:
    return "\n".join(dice.sample(list(REPLIES["define"].values()), dice.randint(3, 5)))


def groups_page(dice: Dice) -> str:
    told = []
    for kind in dice.sample(list(GROUPS), 3):
        members = dice.members(kind, dice.randint(3, 5))
        told.append(fill("{S kind}: {members}.", kind=kind, members=members))
    return "\n".join([*told, ask.compare(*dice.sample(WORDS["size"], 2))])


def about_me(dice: Dice) -> str:
    known = [(neat(fill(said[0], dice)), replies[0]) for said, replies in TALK["identity"]]
    if dice.random() < 0.5:
        return "\n\n".join(map("\n".join, dice.sample(known, dice.randint(3, 5))))
    alone = [reply for _, reply in known if reply.startswith(("I ", "My "))]
    return "About nanochat\n\n" + " ".join(dice.sample(alone, 4))


PAGES: list[tuple[Any, ...]] = [  # (weight, kind, its arguments)
    (16, written, "story"), (3, written, "letter"), (5, written, "diary"),
    (8, told, "tale"), (4, told, "verse"), (2, poem), (5, animal_page), (16, facts_page),
    (6, mixed_page), (12, school_page), (10, exercises, ask.ask_choice, 3), (83, lettered_page),
    (3, counting_page), (3, sums_page), (8, exercises, ask_calculation, 4), (6, spelling_page),
    (5, exercises, ask.ask_by_hand, 3), (8, dialogue), (10, chat), (5, unknown), (2, recipe),
    (4, dictionary), (3, groups_page), (3, about_me),
]  # fmt: skip


def document(split: str, index: int) -> str:
    """Page `index` of the split: a few hundred bytes of text."""
    dice = Dice(split, "document", index)
    _, page, *arguments = dice.choices(PAGES, [weight for weight, *_ in PAGES])[0]
    return page(dice, *arguments)
