"""The primer: a small world in simple English, from which a very small model learns to talk.

`document(split, index)` is a page for pretraining, `conversation(split, index)` one for midtraining
and SFT, `quiz(split, kind, index)` a question with a known answer. Each sequence is endless, and an
item depends on its name alone. Imports nothing else of this repository.

    words.txt facts.txt pages.txt talk.txt    the tables
    world.py       reads them and fills their templates
    strangers.py   the noise of those who type in a hurry
    questions.py   questions with correct replies, conversations, quizzes; the held-out tenth
    pages.py       pages of many kinds
"""

from primer.pages import document, document_prompt
from primer.questions import LETTERS, Question, conversation, held_out, quiz

__all__ = ["LETTERS", "Question", "conversation", "document", "document_prompt", "held_out", "quiz"]
