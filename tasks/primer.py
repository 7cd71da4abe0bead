"""The primer as tasks: its conversations for training, its quizzes for practice, evaluation and RL.

One row of Arithmetic:
    user: How much is 347 plus 58?
    assistant: [python] 347+58 [output] 405 [text] 347 + 58 = 405.

Quizzes of the splits "train" (practice, RL) and "test" (evaluation) share no sum, no pair of fact
and phrasing, no pair of word and letter (primer/questions.py). A fact must be answered in one word
or in a sentence stating it: a reply that merely contains the right word may say the opposite.
"""

import primer
from nanochat.core_eval import CoreTask
from nanochat.tokenizer import Conversation
from tasks.common import GeneratedTask, exchange
from tasks.spellingbee import last_count, last_number, normalized


class Conversations(GeneratedTask):
    """Talks of every kind."""

    num_train = 47_000

    def get_example(self, number: int) -> Conversation:
        return primer.conversation(self.split, number)


class Matching(GeneratedTask):
    """Which letters go with the items of a list: practice for Choice."""

    def get_example(self, number: int) -> Conversation:
        return primer.matching(self.split, number)


class Quiz(GeneratedTask):
    """One kind of quiz; rows also carry what `score` compares with."""

    quiz: str

    def get_example(self, number: int) -> Conversation:
        question = primer.quiz(self.split, self.quiz, number)
        return {"messages": exchange(question.prompt, question.reply), **self.details(question)}

    def details(self, question: primer.Question) -> Conversation:
        """What `score` needs besides the messages."""
        return {"answer": question.answer}


class Choice(Quiz):
    """Facts with lettered choices; on a page there are none, and the likeliest value counts."""

    quiz = "choice"
    kind = "choice"
    baseline = 1 / len(primer.LETTERS)

    def details(self, question: primer.Question) -> Conversation:
        return {
            "letters": list(question.letters),
            "answer": question.reply,
            "query": primer.document_prompt(question.text),
            "choices": [f" {choice}" for choice in question.choices],
            "gold": question.choices.index(question.answer),
        }

    def pages(self, name: str) -> CoreTask:
        rows = [{"id": i, **row} for i, row in enumerate(self)]
        return CoreTask(f"{name}: page", "multiple_choice", rows, self.baseline, delimiter="")


class Exact(Quiz):
    """Facts, answered in a word or a sentence."""

    quiz = "exact"

    def details(self, question: primer.Question) -> Conversation:
        return {"answer": question.answer, "accepted": [question.answer, *question.accepted]}

    def score(self, conversation: Conversation, reply: str) -> float:
        return normalized(reply) in map(normalized, conversation["accepted"])


class Arithmetic(Quiz):
    """Two operands, bare or in a short story, through the calculator."""

    quiz = "arithmetic"

    def score(self, conversation: Conversation, reply: str) -> float:
        return last_number(reply) == conversation["answer"]


class Spelling(Quiz):
    """A word letter by letter, or the count of a letter."""

    quiz = "spelling"

    def score(self, conversation: Conversation, reply: str) -> float:
        answer = conversation["answer"]
        said = last_count(reply) if answer.isdecimal() else normalized(reply)
        return said == normalized(answer)


class Quizzes(GeneratedTask):
    """Choice, Exact, Arithmetic and Spelling in turn: practice for RL."""

    def __init__(self, split: str) -> None:
        super().__init__(split)
        self.quizzes = [quiz(split) for quiz in (Choice, Exact, Arithmetic, Spelling)]

    def get_example(self, number: int) -> Conversation:
        turn, kind = divmod(number, len(self.quizzes))
        return {**self.quizzes[kind].get_example(turn), "quiz": kind}

    def score(self, conversation: Conversation, reply: str) -> float:
        return self.quizzes[conversation["quiz"]].score(conversation, reply)
