"""The pages of the primer.

They include school questions with `Answer:` and lettered choices, so that a base model can be
examined, and the chat stages need only teach manners.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from primer import questions as ask
from primer import talks
from primer.questions import Dice, Question
from primer.tales import ask_tale
from primer.world import GROUPS, TEXTS, TOPICS, WORDS, fill

UNPOETIC = ("rain", "sand", "bed", "snow", "night")  # no poem can have "a rain"


def written(dice: Dice, kind: str) -> str:
    """A story under its title, a letter, a diary page or a poem about two words that rhyme."""
    rhymes = TOPICS["rhyme"].facts
    key = dice.choice([key for key in rhymes if key not in UNPOETIC])
    _, text = dice.choice(TEXTS[kind])
    return fill(text, dice, key=key, value=rhymes[key], **dice.cast())


def animal_page(dice: Dice) -> str:
    key = dice.choice(WORDS["animal"])
    topics = [name for name in ("sound", "young", "home", "legs") if key in TOPICS[name].facts]
    told = [ask.stated(dice, name, key) for name in (*topics, "nature")]
    title = fill("[The {Key}|{S key}|About the {key}]", dice, key=key)
    return f"{title}\n\n{' '.join(dice.sample(told, len(told)))}"


def facts_page(dice: Dice, topic: str = "") -> str:
    topic = topic or dice.fact()[0]
    keys = dice.sample(ask.KEYS[topic], dice.randint(4, 7))
    told = dice.choice(" \n").join(ask.stated(dice, topic, key) for key in keys)
    return f"{TOPICS[topic].title}\n\n{told}"


def listed(dice: Dice, title: str, line: Callable[[Dice], str]) -> str:
    """A title and some lines of one kind."""
    return "\n".join([title, *(line(dice) for _ in range(dice.randint(3, 8)))])


def fact_line(dice: Dice) -> str:
    topic, key, _ = dice.fact()
    return f"- {ask.stated(dice, topic, key)}"


def sum_line(dice: Dice) -> str:
    return "{} {} {} = {}".format(*dice.sum(largest=12))


def group_line(dice: Dice) -> str:
    kind = dice.choice(list(GROUPS))
    return fill("{S kind}: {m}.", kind=kind, m=dice.members(GROUPS[kind], 4))


def counting_line(dice: Dice) -> str:
    step, low, num = dice.choice((1, 1, 1, 2, 5, 10)), dice.randint(0, 50), dice.randint(6, 14)
    numbers = list(map(str, range(low, low + num * step, step)))
    if dice.random() < 0.3:
        return f"Counting down from {numbers[-1]}: {', '.join(reversed(numbers))}."
    return f"Counting from {low} in steps of {step}: {', '.join(numbers)}."


def asked(
    dice: Dice, form: Callable[[Question], str], kind: Callable[..., Question], *arguments: Any
) -> str:
    """Questions of a kind with their replies."""
    return "\n\n".join(form(kind(dice, *arguments)) for _ in range(dice.randint(2, 4)))


def exercise(question: Question) -> str:
    return f"{question.prompt}\n{printed(question)}"


def examined(question: Question) -> str:
    """The form used to examine a base model."""
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


def lettered_page(dice: Dice) -> str:
    """A lettered list, and which letter goes with which item."""
    page = ask.ask_letter(dice)
    lines = [page.lettered_choices]
    pairs = list(zip(page.letters, page.choices, strict=True))
    for letter, value in dice.choices(pairs, k=4 if len(pairs) > 1 else 1):
        lines += [dice.phrase("which letter", value=value), letter]
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
    (5, animal_page), (16, facts_page), (3, facts_page, "define"), (83, lettered_page),
    (6, listed, "Good to know", fact_line), (3, listed, "Small sums", sum_line),
    (3, listed, "Groups", group_line), (2, listed, "Counting", counting_line),
    (16, asked, examined, partial(ask.ask_fact, brief=True)), (3, asked, examined, ask.ask_outside),
    (2, asked, examined, ask.ask_near), (9, asked, exercise, ask.ask_choice),
    (6, asked, exercise, ask.ask_sum), (3, asked, exercise, ask.ask_problem),
    (9, asked, exercise, ask.ask_fact, "spell"), (3, asked, exercise, ask.ask_letters),
    (3, asked, exercise, ask.ask_length), (2, asked, exercise, ask.ask_fact, "how"),
    (4, asked, exercise, ask.ask_talk, "identity"), (3, asked, exercise, ask_tale),
    (2, asked, exercise, ask_tale, "verse"), (18, chat),
]  # fmt: skip


def document(split: str, index: int) -> str:
    """Page `index` of the split: a few hundred bytes of text."""
    dice = Dice(split, "document", index)
    _, page, *arguments = dice.choices(PAGES, [weight for weight, *_ in PAGES])[0]
    return page(dice, *arguments)
