"""The pages of the primer.

They already hold school questions with `Answer:` and lettered choices, so that a base model can be
examined, and the chat stages only have to teach manners.
"""

import random
from collections.abc import Callable
from functools import partial

from primer import questions as ask
from primer.questions import Ask, Question, cast
from primer.world import GROUPS, PHRASES, REPLIES, TALK, TEXTS, TOPICS, WORDS, fill

UNPOETIC = ("rain", "sand", "bed", "snow", "night")  # no poem can have "a rain"


def written(rng: random.Random, split: str, kind: str) -> str:
    """A story under its title, a letter or a page of a diary."""
    title, text = rng.choice(TEXTS[kind])
    return fill(text, rng, **cast(rng, split, title or kind))


def fable(rng: random.Random, split: str) -> str:
    """A fable without a title."""
    return printed(ask.ask_story(rng, split))


def poem(rng: random.Random, split: str) -> str:
    """Four lines around a rhyme."""
    slots, rhymes = cast(rng, split, "poem"), TOPICS["rhyme"].facts
    key = rng.choice([key for key in rhymes if key not in UNPOETIC])
    _, text = rng.choice(TEXTS["poem"])
    return fill(text, rng, key=key, value=rhymes[key], **slots)


def animal_page(rng: random.Random, split: str) -> str:
    """What there is to know about one animal, in any order."""
    key = rng.choice(WORDS["animal"])
    topics = [TOPICS[name] for name in ("sound", "young", "home", "legs")]
    known = [topic for topic in topics if key in topic.facts]
    told = [fill(topic.sentences[0], key=key, value=topic.facts[key]) for topic in known]
    told.append(REPLIES["nature"][key])
    title = fill("[The {Key}|{S key}|About the {key}]", rng, key=key)
    return f"{title}\n\n{' '.join(rng.sample(told, len(told)))}"


def facts_page(rng: random.Random, split: str) -> str:
    """Some facts of one topic."""
    topic = TOPICS[ask.pick_topic(rng)]
    facts = rng.sample(list(topic.facts.items()), rng.randint(4, 7))
    told = [fill(rng.choice(topic.sentences), key=key, value=value) for key, value in facts]
    return f"{topic.title}\n\n" + rng.choice(" \n").join(told)


def mixed_page(rng: random.Random, split: str) -> str:
    """Facts from here and there."""
    facts = [ask.ask_fact(rng, split, brief=False) for _ in range(rng.randint(3, 6))]
    title = rng.choice(("Did you know?", "What we learned today", "Good to know"))
    return "\n".join([title, *(f"- {fact.reply}" for fact in facts)])


def school_page(rng: random.Random, split: str) -> str:
    """Questions with short answers, in the form in which a base model is examined."""
    facts = [ask.ask_fact(rng, split, brief=True) for _ in range(rng.randint(3, 6))]
    return "\n\n".join(f"{document_prompt(fact.text)} {fact.answer}" for fact in facts)


def document_prompt(question: str) -> str:
    """The question as a school page puts it; the answer follows after a space."""
    return f"Question: {question}\nAnswer:"


def exercises(rng: random.Random, split: str, ask: Ask, most: int) -> str:
    """Two or more questions with their replies."""
    asked = [ask(rng, split) for _ in range(rng.randint(2, most))]
    return "\n\n".join(f"{each.prompt}\n{printed(each)}" for each in asked)


def printed(question: Question) -> str:
    """The reply on a page: what is typed into the calculator, and what it shows."""
    if isinstance(question.reply, str):
        return question.reply
    form = {"text": "{}", "python": "Calculator: {}", "python_output": " -> {}\n"}
    return "".join(form[part["type"]].format(part["text"]) for part in question.reply)


def ask_calculation(rng: random.Random, split: str) -> Question:
    """A sum, at times in a story."""
    return ask.ask_sum(rng, split, in_words=rng.random() < 0.3)


def lettered_page(rng: random.Random, split: str) -> str:
    """A list with letters, and which letter stands by what."""
    page = ask.ask_letter(rng, split)
    rows = [page.lettered_choices]
    pairs = list(zip(page.letters, page.choices, strict=True))
    for letter, value in rng.choices(pairs, k=4 if len(pairs) > 1 else 1):
        rows += [fill(rng.choice(PHRASES["which letter"]), value=value), letter]
    return "\n".join(rows)


def counting_page(rng: random.Random, split: str) -> str:
    """Numbers in a row: in words, by steps, forwards and backwards."""
    if rng.random() < 0.2:
        return f"We count: {', '.join(WORDS['number'][1 : rng.randint(5, 20)])}."
    step, low, num = rng.choice((1, 1, 1, 2, 5, 10)), rng.randint(0, 50), rng.randint(6, 14)
    numbers = list(map(str, range(low, low + num * step, step)))
    if rng.random() < 0.3:
        return f"Counting down from {numbers[-1]}: {', '.join(reversed(numbers))}."
    return f"Counting from {low} in steps of {step}: {', '.join(numbers)}."


def sums_page(rng: random.Random, split: str) -> str:
    """Small sums to know by heart."""
    sums = [ask.pick_sum(rng, split, largest=12) for _ in range(rng.randint(5, 9))]
    return "\n".join(["Small sums\n", *("{} {} {} = {}".format(*each) for each in sums)])


def spelling_page(rng: random.Random, split: str) -> str:
    """Words letter by letter."""
    spelled = rng.sample(list(REPLIES["spell"].items()), rng.randint(5, 9))
    return "\n".join(["Spelling\n", *map(": ".join, spelled)])


def dialogue(rng: random.Random, split: str) -> str:
    """Two children talk: a greeting, questions and answers."""
    slots = cast(rng, split, "dialogue")
    talk = [ask.ask_greeting(rng, split)]
    kinds = (ask.ask_fact, ask.ask_yes_no, ask.ask_bigger, ask.ask_list, ask.ask_nature)
    talk += [rng.choice(kinds)(rng, split) for _ in range(rng.randint(2, 4))]
    line = "{hero}: {q}\n{friend}: {r}"
    return "\n".join(fill(line, q=each.text, r=each.reply, **slots) for each in talk)


def recipe(rng: random.Random, split: str) -> str:
    """How to do something."""
    aim, steps = rng.choice(list(REPLIES["how"].items()))
    return f"How to {aim.replace('my ', 'your ')}\n\n{steps}"


def dictionary(rng: random.Random, split: str) -> str:
    """What some words mean."""
    return "\n".join(rng.sample(list(REPLIES["define"].values()), rng.randint(3, 5)))


def groups_page(rng: random.Random, split: str) -> str:
    """The members of some groups, and who is bigger than whom."""
    told = []
    for kind in rng.sample(list(GROUPS), 3):
        members = ask.members(rng, kind, rng.randint(3, 5))
        told.append(fill("{S kind}: {members}.", kind=kind, members=members))
    return "\n".join([*told, ask.compare(*rng.sample(WORDS["size"], 2))])


def about_me(rng: random.Random, split: str) -> str:
    """Who is writing here."""
    known = [(question, reply) for question, (reply,) in TALK["identity"].items()]
    if rng.random() < 0.5:
        return "\n\n".join(map("\n".join, rng.sample(known, rng.randint(3, 5))))
    alone = [reply for _, reply in known if reply.startswith(("I ", "My "))]
    return "About nanochat\n\n" + " ".join(rng.sample(alone, 4))


PAGES: dict[Callable[[random.Random, str], str], int] = {  # with their weights
    partial(written, kind="story"): 16, partial(written, kind="letter"): 3,
    partial(written, kind="diary"): 5, fable: 4, poem: 2, animal_page: 5, facts_page: 16,
    mixed_page: 6, school_page: 12, partial(exercises, ask=ask.ask_choice, most=3): 10,
    lettered_page: 70, counting_page: 3, sums_page: 3,
    partial(exercises, ask=ask_calculation, most=4): 8, spelling_page: 6,
    partial(exercises, ask=ask.ask_by_hand, most=3): 5, dialogue: 8, recipe: 2, dictionary: 4,
    groups_page: 3, about_me: 3,
}  # fmt: skip


def document(split: str, index: int) -> str:
    """Page `index` of the split: a few hundred bytes of text."""
    rng = ask.generator(split, "document", index)
    page = rng.choices(list(PAGES), list(PAGES.values()))[0]
    return page(rng, split)
