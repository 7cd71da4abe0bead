"""The primer: a small world in simple English, from which a very small model learns to talk.

`document(split, index)` is a page for pretraining, `conversation(split, index)` one for midtraining
and SFT, `quiz(split, kind, index)` a question with a known answer. Each sequence is endless, and an
item depends on its name alone. Imports nothing else of this repository.

    *.txt          the tables: words, facts, ways of asking, talk, pages, strangers, their subjects
    world.py       reads them and fills their templates
    strangers.py   the noise of those who type in a hurry
    questions.py   questions with correct or honest replies, quizzes; the held-out tenth
    tales.py       stories and poems about anything
    talks.py       conversations of all these, and what follows from the turn before
    pages.py       pages of many kinds
"""

from primer.pages import document, document_prompt
from primer.questions import LETTERS, Question, quiz
from primer.talks import conversation, matching

__all__ = [
    "LETTERS", "Question", "conversation", "document", "document_prompt", "matching", "quiz",
]  # fmt: skip
