"""The primer: a small world in simple English, from which a very small model learns to talk.

`document(split, index)` is a page for pretraining, `conversation(split, index)` a talk for
midtraining and SFT, `quiz(split, kind, index)` a question whose answer is known. Each is endless
and made from its own name alone, so item 7 is the same whoever asks first, on every machine.
Nothing else of this repository is imported here.

    words.txt facts.txt pages.txt talk.txt    what there is, what is true, told and said
    world.py       reads these tables and fills their templates
    questions.py   questions with right replies, conversations, quizzes; what is kept for the test
    pages.py       pages of many kinds
"""

from primer.pages import document, document_prompt
from primer.questions import LETTERS, Question, conversation, held_out, quiz

__all__ = ["LETTERS", "Question", "conversation", "document", "document_prompt", "held_out", "quiz"]
