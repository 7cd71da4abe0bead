"""The primer: a small world in simple English, the book from which a very small model learns to talk.

`document(split, index)` is a page for pretraining, `conversation(split, index)` a talk for midtraining and
SFT, `quiz(split, kind, index)` a question whose answer is known. Each is endless and made from its own name
alone, so item 7 is the same whoever asks first, on every machine.

    primer_words.py, primer_facts.py, primer_texts.py    the tables: words, what is true, how it is said
    primer_questions.py                                  questions with right replies; the test split

The choice that would surprise: the pages already hold school questions with `Answer:` and lettered choices,
so that a base model can be examined, and the chat stages only have to teach manners.
"""

import random
from typing import Any

from nanochat import primer_questions as ask
from nanochat import primer_texts as texts
from nanochat import primer_words as world
from nanochat.primer_facts import HOMES, LEGS, RHYMES, SOUNDS, SPELLED, TOPICS, UNPOETIC, YOUNG
from nanochat.primer_questions import Question, fill

# --- pages


def story(rng: random.Random, split: str) -> str:
    """A story under its title."""
    title = rng.choice(list(texts.STORIES))
    slots = ask.cast(rng, split, title)
    return f"{fill(title, **slots)}\n\n{' '.join(fill(line, rng, **slots) for line in texts.STORIES[title])}"


def _written(templates: tuple[str, ...], label: str, rng: random.Random, split: str) -> str:
    return fill(rng.choice(templates), rng, **ask.cast(rng, split, label))


def letter(rng: random.Random, split: str) -> str:
    """A letter or a note."""
    return _written(texts.LETTERS, "letter", rng, split)


def diary(rng: random.Random, split: str) -> str:
    """A page of a diary: weather, season, what happened."""
    return _written(texts.DIARY, "diary", rng, split)


def fable(rng: random.Random, split: str) -> str:
    """A fable without a title."""
    slots = ask.cast(rng, split, "fable")
    return " ".join(fill(line, rng, **slots) for line in rng.choice(texts.FABLES))


def poem(rng: random.Random, split: str) -> str:
    """Four lines around a rhyme."""
    slots = ask.cast(rng, split, "poem")
    slots["key"] = rng.choice([key for key in RHYMES if key not in UNPOETIC])
    return fill(rng.choice(texts.POEMS), rng, value=RHYMES[slots["key"]], **slots)


def animal_page(rng: random.Random, split: str) -> str:
    """What there is to know about one animal, in any order."""
    key = rng.choice(world.ANIMALS)
    facts = [
        fill(TOPICS[name].sentences[0], key=key, value=facts[key])
        for name, facts in (("sound", SOUNDS), ("young", YOUNG), ("home", HOMES), ("legs", LEGS))
        if key in facts
    ]
    facts.append(fill("{A key} {nature}.", key=key, nature=world.NATURE[key]))
    return f"{fill('[The {Key}|{S key}|About the {key}]', rng, key=key)}\n\n{' '.join(rng.sample(facts, len(facts)))}"


def facts_page(rng: random.Random, split: str) -> str:
    """Some facts of one topic."""
    topic = TOPICS[rng.choices(ask.TOPIC_NAMES, cum_weights=ask.TOPIC_WEIGHTS)[0]]
    keys = rng.sample(list(topic.facts), rng.randint(4, 7))
    rows = [fill(rng.choice(topic.sentences), key=key, value=topic.facts[key]) for key in keys]
    return f"{topic.title}\n\n{rng.choice((' ', chr(10))).join(rows)}"


def mixed_page(rng: random.Random, split: str) -> str:
    """Facts from here and there."""
    rows = [f"- {ask.ask_fact(rng, split, brief=False).reply}" for _ in range(rng.randint(3, 6))]
    return "\n".join(
        [rng.choice(("Did you know?", "What we learned today", "Good to know")), *rows]
    )


def school_page(rng: random.Random, split: str) -> str:
    """Questions with short answers, in the form in which a base model is examined."""
    rows = [ask.ask_fact(rng, split, brief=True) for _ in range(rng.randint(3, 6))]
    return "\n\n".join(f"{document_prompt(row.text)} {row.answer}" for row in rows)


def choice_page(rng: random.Random, split: str) -> str:
    """Questions with lettered choices and the right letter below."""
    rows = [ask.ask_choice(rng, split) for _ in range(rng.randint(2, 3))]
    return "\n\n".join(f"{row.prompt()}\n{row.reply}" for row in rows)


def lettered_page(rng: random.Random, split: str) -> str:
    """A list with letters, and which letter stands by what."""
    page = ask.ask_letter(rng, split)
    rows = list(zip(page.letters, page.choices, strict=True))
    asked = [
        f"{fill(rng.choice(texts.WHICH_LETTER), value=value)}\n{letter}"
        for letter, value in rng.choices(rows, k=4 if len(rows) > 1 else 1)
    ]
    return "\n".join([ask.letter_choices(page.letters, page.choices), *asked])


def counting_page(rng: random.Random, split: str) -> str:
    """Numbers in a row: in words, by steps, forwards and backwards."""
    if rng.random() < 0.2:
        return f"We count: {', '.join(world.NUMBERS[1 : rng.randint(5, 20)])}."
    step, low, num = rng.choice((1, 1, 1, 2, 5, 10)), rng.randint(0, 50), rng.randint(6, 14)
    numbers = list(range(low, low + num * step, step))
    if rng.random() < 0.3:
        return f"Counting down from {numbers[-1]}: {', '.join(map(str, reversed(numbers)))}."
    return f"Counting from {low} in steps of {step}: {', '.join(map(str, numbers))}."


def sums_page(rng: random.Random, split: str) -> str:
    """Small sums to know by heart."""
    sums = (ask.pick_sum(rng, split, largest=12) for _ in range(rng.randint(5, 9)))
    return "Small sums\n\n" + "\n".join("{} {} {} = {}".format(*each) for each in sums)


def calculator_page(rng: random.Random, split: str) -> str:
    """Large sums, which are left to the calculator."""
    rows = []
    for _ in range(rng.randint(2, 4)):
        question = ask.ask_problem(rng, split) if rng.random() < 0.3 else ask.ask_sum(rng, split)
        rows.append(f"{question.text}\n{_spoken(question)}")
    return "\n\n".join(rows)


def _spoken(question: Question) -> str:
    """The reply as a page prints it: what is typed into the calculator, and what it shows."""
    form = {"text": "{}", "python": "Calculator: {}", "python_output": " -> {}\n"}
    if isinstance(question.reply, str):
        return question.reply
    return "".join(form[part["type"]].format(part["text"]) for part in question.reply)


def spelling_page(rng: random.Random, split: str) -> str:
    """Words letter by letter."""
    rows = [f"{word}: {'-'.join(word)}" for word in rng.sample(SPELLED, rng.randint(5, 9))]
    return "Spelling\n\n" + "\n".join(rows)


def letters_page(rng: random.Random, split: str) -> str:
    """Letters counted in words."""
    rows = [ask.ask_letters(rng, split, by_hand=True) for _ in range(rng.randint(2, 3))]
    return "\n\n".join(f"{row.text}\n{_spoken(row)}" for row in rows)


def dialogue(rng: random.Random, split: str) -> str:
    """Two children talk: a greeting, questions and answers."""
    slots = ask.cast(rng, split, "dialogue")
    hello = rng.choice(list(texts.GREETINGS))
    rows = [Question(hello, rng.choice(texts.GREETINGS[hello]))]
    kinds = (
        ask.ask_fact,
        ask.ask_yes_no,
        ask.ask_bigger,
        ask.ask_list,
        ask.ask_nature,
    )
    rows += [rng.choice(kinds)(rng, split) for _ in range(rng.randint(2, 4))]
    return "\n".join(
        fill("{hero}: {q}\n{friend}: {r}", q=row.text, r=row.reply, **slots) for row in rows
    )


def recipe(rng: random.Random, split: str) -> str:
    """How to do something."""
    key = rng.choice(list(texts.RECIPES))
    return f"How to {key.replace('my ', 'your ')}\n\n{texts.RECIPES[key]}"


def dictionary(rng: random.Random, split: str) -> str:
    """What some words mean."""
    return "\n".join(map(ask.define, rng.sample(ask.DEFINED, rng.randint(3, 5))))


def groups_page(rng: random.Random, split: str) -> str:
    """The members of some groups, and who is bigger than whom."""
    rows = []
    for kind in rng.sample(ask.KINDS, 3):
        members = rng.sample(world.CATEGORIES[kind], rng.randint(3, 5))
        rows.append(fill("{S kind}: {members}.", kind=kind, members=ask.listed(members)))
    small, big = sorted(rng.sample(range(len(world.SIZES)), 2))
    rows.append(
        fill("{A big} is bigger than {a small}.", big=world.SIZES[big], small=world.SIZES[small])
    )
    return "\n".join(rows)


def about_me(rng: random.Random, split: str) -> str:
    """Who is writing here."""
    if rng.random() < 0.5:
        rows = rng.sample(list(texts.IDENTITY.items()), rng.randint(3, 5))
        return "\n\n".join(f"{question}\n{reply}" for question, reply in rows)
    alone = [reply for reply in texts.IDENTITY.values() if reply.startswith(("I ", "My "))]
    return "About nanochat\n\n" + " ".join(rng.sample(alone, 4))


PAGES = {
    story: 16, letter: 3, diary: 5, fable: 4, poem: 2, animal_page: 5, facts_page: 16, mixed_page: 6,
    school_page: 12, choice_page: 10, lettered_page: 70, counting_page: 3, sums_page: 3, calculator_page: 8, spelling_page: 6,
    letters_page: 5, dialogue: 8, recipe: 2, dictionary: 4, groups_page: 3, about_me: 3,
}  # fmt: skip
QUESTIONS = {
    ask.ask_fact: 22, ask.ask_choice: 14, ask.ask_letter: 8, ask.ask_sum: 14, ask.ask_problem: 6, ask.ask_spelling: 8,
    ask.ask_letters: 6, ask.ask_by_hand: 2, ask.ask_identity: 5, ask.ask_small_talk: 8, ask.ask_unknown: 1,
    ask.ask_story: 3, ask.ask_definition: 4, ask.ask_yes_no: 5, ask.ask_bigger: 3, ask.ask_list: 3,
    ask.ask_counting: 2, ask.ask_repeat: 3, ask.ask_how: 2, ask.ask_nature: 3,
}  # fmt: skip
QUIZZES = {
    "choice": (ask.ask_choice,),
    "letter": (ask.ask_letter,),
    "exact": (ask.ask_fact,),
    "arithmetic": (ask.ask_sum, ask.ask_sum, ask.ask_problem),
    "spelling": (ask.ask_spelling, ask.ask_letters),
}


def document(split: str, index: int) -> str:
    """Page `index` of the split: a few hundred bytes of text."""
    rng = ask.generator(split, "document", index)
    page = rng.choices(list(PAGES), list(PAGES.values()))[0]
    return page(rng, split)


def document_prompt(question: str) -> str:
    """The question as a school page puts it; the answer follows after a space."""
    return f"Question: {question}\nAnswer:"


def quiz(split: str, kind: str, index: int) -> Question:
    """Question `index` of a kind of quiz: choice, letter, exact, arithmetic or spelling."""
    rng = ask.generator(split, kind, index)
    return rng.choice(QUIZZES[kind])(rng, split)


def conversation(split: str, index: int) -> dict[str, Any]:
    """Talk `index` of the split: one to three questions, at times a system message, at times a name to remember."""
    rng = ask.generator(split, "conversation", index)
    messages: list[dict[str, Any]] = []
    style = rng.random()
    if style < 0.04:
        turns = _brief_turns(rng, split, messages)
    elif style < 0.08:
        turns = _name_turns(rng, split)
    else:
        if rng.random() < 0.08:
            messages.append({"role": "system", "content": rng.choice(texts.SYSTEM)})
        num_turns = rng.choices((1, 2, 3), (60, 28, 12))[0]
        kinds = rng.choices(list(QUESTIONS), list(QUESTIONS.values()), k=num_turns)
        turns = [kind(rng, split) for kind in kinds]
    for turn in turns:
        messages.append({"role": "user", "content": turn.prompt()})
        messages.append({"role": "assistant", "content": turn.reply})
    return {"messages": messages}


def _brief_turns(rng: random.Random, split: str, messages: list[dict[str, Any]]) -> list[Question]:
    """Facts under a system message that asks for one word; the message goes into `messages`."""
    messages.append({"role": "system", "content": rng.choice(texts.BRIEF_SYSTEM)})
    return [ask.ask_fact(rng, split, brief=True) for _ in range(rng.randint(1, 3))]


def _name_turns(rng: random.Random, split: str) -> list[Question]:
    """A user who tells a name, talks of something else or not, and asks for it."""
    slots = ask.cast(rng, split, "name")
    hello = Question(
        fill(rng.choice(texts.NAME_LINES), **slots), fill(rng.choice(texts.NAME_REPLIES), **slots)
    )
    between = [ask.ask_fact(rng, split)] if rng.random() < 0.5 else []
    return [
        hello,
        *between,
        Question(rng.choice(texts.NAME_QUESTIONS), fill("Your name is {hero}.", **slots)),
    ]
