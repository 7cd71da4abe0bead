"""The primer as tasks: its conversations for training, its quizzes for practice, evaluation and RL.

One row of PrimerArithmetic:
    user: How much is 347 plus 58?
    assistant: [python] 347+58 [output] 405 [text] 347 + 58 = 405.

A quiz of the split "train" is for practice and RL, of "test" for evaluation: the two share no sum, no pair
of fact and phrasing, no pair of word and letter (see nanochat/primer_questions.py).

The choice that would surprise: a fact may be answered in one word or in any of the sentences that state it,
and nothing else: a reply that merely contains the right word may say the opposite.
"""

import re

from nanochat import primer
from nanochat.primer_questions import NUM_CHOICES, Question
from nanochat.tokenizer import Conversation
from tasks.common import Task, exchange

NUM_TRAIN, NUM_TEST = 20_000, 400  # the primer is endless; these are the parts that tasks use


class PrimerConversations(Task):
    """Talks of every kind: `size` of them, from number `first` on, since there is no last one."""

    def __init__(self, split: str, size: int, first: int = 0) -> None:
        self.split, self.size, self.first = split, size, first
        super().__init__()

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        return primer.conversation(self.split, self.first + index)


class PrimerQuiz(Task):
    """One kind of the primer's quizzes; the row also carries the answer that `score` compares with."""

    quiz: str

    def __init__(self, split: str, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        self.split = split
        super().__init__(start, stop, step)

    def num_examples(self) -> int:
        return NUM_TRAIN if self.split == "train" else NUM_TEST

    def get_example(self, index: int) -> Conversation:
        question = primer.quiz(self.split, self.quiz, index)
        messages = exchange(question.prompt(), question.reply)
        return {"messages": messages, **self.details(question)}

    def details(self, question: Question) -> Conversation:
        """What `score` needs to know besides the messages."""
        return {"answer": question.answer}


class PrimerChoice(PrimerQuiz):
    """Facts with lettered choices. A base model is asked the same in document form."""

    quiz = "choice"
    kind = "choice"
    baseline = 1 / NUM_CHOICES

    def details(self, question: Question) -> Conversation:
        return {
            "letters": list(question.letters),
            "answer": question.reply,
            "document": primer.document_prompt(question.text),
            "continuations": [f" {choice}" for choice in question.choices],
            "gold": question.choices.index(question.answer),
        }


class PrimerLetter(PrimerQuiz):
    """Which letter stands by a choice: practice for PrimerChoice."""

    quiz = "letter"


class PrimerExact(PrimerQuiz):
    """Facts, answered in a word or a sentence."""

    quiz = "exact"

    def details(self, question: Question) -> Conversation:
        return {"answer": question.answer, "accepted": [question.answer, *question.accepted]}

    def score(self, conversation: Conversation, reply: str) -> float:
        return float(normalized(reply) in map(normalized, conversation["accepted"]))


class PrimerArithmetic(PrimerQuiz):
    """Two operands, bare or in a little story, through the calculator."""

    quiz = "arithmetic"

    def score(self, conversation: Conversation, reply: str) -> float:
        return float(last_number(reply) == conversation["answer"])


class PrimerSpelling(PrimerQuiz):
    """A word letter by letter, or the count of a letter."""

    quiz = "spelling"

    def score(self, conversation: Conversation, reply: str) -> float:
        answer = conversation["answer"]
        said = last_count(reply) if answer.isdecimal() else normalized(reply)
        return float(said == normalized(answer))


def normalized(text: str) -> str:
    """The text in lower case, without punctuation at its ends and with single spaces."""
    return " ".join(text.lower().split()).strip(" .!?")


def last_number(text: str) -> str | None:
    """The last number of the text without a trailing full stop, or None: `"37 + 58 = 95."` -> `"95"`."""
    numbers = re.findall(r"(?<![\d.])-?\d+(?:\.\d+)?", text)
    return numbers[-1] if numbers else None


def last_count(text: str) -> str | None:
    """The number before the last "time" or "times": `"... appears 2 times in 'egg'."` -> `"2"`."""
    counts = re.findall(r"(\d+) times?\b", text)
    return counts[-1] if counts else last_number(text)
