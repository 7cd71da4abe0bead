"""The pages of the primer.

They include school questions with `Answer:` and lettered choices, so that a base model can be
examined, and the chat stages need only teach manners.
"""

from typing import Any

from primer import questions as ask
from primer import talks
from primer.questions import Dice, Question
from primer.tales import ask_tale
from primer.world import TEXTS, TOPICS, WORDS, fill


def written(dice: Dice, kind: str) -> str:
    """A story under its title, a letter, a diary page or a poem."""
    return fill(dice.choice(TEXTS[kind]), dice, **dice.cast())


def animal_page(dice: Dice) -> str:
    key = dice.choice(WORDS["animal"])
    topics = [name for name in ("sound", "young", "home", "legs") if key in TOPICS[name].facts]
    told = [dice.choice(TOPICS[name].told(key)) for name in (*topics, "nature")]
    title = fill("[The {Key}|{S key}|About the {key}]", dice, key=key)
    return f"{title}\n\n{' '.join(dice.sample(told, len(told)))}"


def facts_page(dice: Dice, topic: str = "") -> str:
    topic = topic or dice.topic()
    keys = dice.sample(ask.KEYS[topic], dice.randint(4, 7))
    told = dice.choice(" \n").join(dice.choice(TOPICS[topic].told(key)) for key in keys)
    return f"{TOPICS[topic].title}\n\n{told}"


def asked(dice: Dice, form: Any, most: int, kind: Any, *rest: Any) -> str:
    """Questions of a kind in that form."""
    return "\n\n".join(form(kind(dice, *rest)) for _ in range(dice.randint(2, most)))


def sentence(question: Question) -> str:
    """What is asked, told instead."""
    return question.accepted[0]


def exercise(question: Question) -> str:
    return f"{question.prompt}\n{printed(question)}"


def examined(question: Question) -> str:
    """As a base model is examined."""
    return f"{document_prompt(question.text)} {question.answer or question.reply}"


def document_prompt(question: str) -> str:
    """The question in a school page's form; the answer follows after a space."""
    return f"Question: {question}\nAnswer:"


def printed(question: Question) -> str:
    """The reply as text, with calculator input and output."""
    if isinstance(question.reply, str):
        return question.reply
    form = {"text": "{}", "python": "Calculator: {}", "python_output": " -> {}\n"}
    return "".join(form[part["type"]].format(part["text"]) for part in question.reply)


def lettered_page(dice: Dice, recalled: float = 0) -> str:
    """A lettered list, and which letter goes with which item: asked for, or just said again.

    The latter has most to match in the fewest tokens, and the very tokens of the list, so that the
    skill of matching comes early; the former must be sure before a question has to be answered,
    too, or it is lost again (dev/LOG.md). With `recalled`, letters are always asked for, in that
    share by a question that the item answers.
    """
    page = ask.ask_letter(dice)
    lines = [page.lettered_choices]
    num = len(page.choices)
    if recalled or dice.random() < 0.7:
        for _ in range(8 if num > 1 else 1):
            turn = ask.another_letter(dice, page, "which letter", recalled)
            lines += [turn.text, str(turn.reply)]
    else:
        pairs = list(zip(page.choices, page.letters, strict=True))
        said = dice.choices(pairs, k=12 if num > 1 else 1)
        lines += [ask.lettered(value, letter) for value, letter in said]
    return "\n".join(lines)


def chat(dice: Dice) -> str:
    """Two people talk, one of them as strangers type."""
    dice.free, people = True, dice.cast()
    turns = talks.prolonged(dice, [ask.ask_fact(dice)], dice.randint(2, 5))
    line = "{hero}: {q}\n{friend}: {r}"
    said = [(talks.typed(dice, turn), printed(turn)) for turn in turns if not turn.choices]
    return "\n".join(fill(line, q=text, r=reply, **people) for text, reply in said)


PAGES: list[tuple[Any, ...]] = [  # (weight, kind, its arguments)
    (16, written, "story"), (3, written, "letter"), (5, written, "diary"), (2, written, "poem"),
    (5, animal_page), (26, facts_page), (4, facts_page, "define"),
    (130, lettered_page), (40, lettered_page, 0.8), (200, chat),
    (12, asked, sentence, 8, ask.ask_fact), (3, asked, sentence, 9, ask.ask_sum),
    (45, asked, examined, 6, ask.ask_fact),
    (3, asked, examined, 4, ask.ask_outside), (2, asked, examined, 4, ask.ask_near),
    (25, asked, exercise, 3, ask.ask_choice), (6, asked, exercise, 4, ask.ask_sum),
    (2, asked, exercise, 4, ask.ask_sum, True), (6, asked, exercise, 8, ask.ask_fact, "spell"),
    (3, asked, exercise, 5, ask.ask_letters), (2, asked, exercise, 5, ask.ask_fact, "length"),
    (3, asked, exercise, 5, ask.ask_counting), (2, asked, exercise, 5, ask.ask_list),
    (2, asked, exercise, 2, ask.ask_fact, "how"), (3, asked, exercise, 5, ask.ask_talk, "identity"),
    (4, asked, exercise, 2, ask_tale), (3, asked, exercise, 2, ask_tale, "verse"),
]  # fmt: skip


def document(split: str, index: int) -> str:
    """Page `index` of the split: a few hundred bytes of text."""
    dice = Dice(split, "document", index)
    _, page, *arguments = dice.choices(PAGES, [weight for weight, *_ in PAGES])[0]
    return page(dice, *arguments)
