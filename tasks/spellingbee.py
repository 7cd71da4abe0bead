"""SpellingBee: spell a word, or count a letter in it, by hand and then checked with the tool.

One row of each:
    user: Please spell crow for me.              assistant: c-r-o-w
    user: How many e are there in 'bee'?
    assistant: b, e 1, e 2. By hand I count 2. I check it: [python] 'bee'.count('e') [output] 2
               [text] The letter e appears 2 times in 'bee'.

A model reads tokens, not letters, so what its tokens are spelled like has to be learned word by word. The
words are those of the primer's first pages, or of a file with one word a line. Every row is made from its
number, so there is no last one; a task is the part that `start` and `stop` pick.

The choice that would surprise: a word belongs to one split by a hash of the word alone, so a test word is
held out whichever file it comes from, and for spelling and counting alike.
"""

import re
from functools import cache
from pathlib import Path

from nanochat import primer
from nanochat.common import UserError
from nanochat.primer_questions import fill, generator, held_out, tally, times
from nanochat.primer_texts import COUNT_QUESTIONS, HAND_QUESTIONS, SPELL_QUESTIONS
from nanochat.primer_words import ALPHABET
from nanochat.tokenizer import Conversation
from tasks.common import Task, exchange
from tasks.primer import last_count, normalized

NUM_TRAIN, NUM_TEST = 1_000_000, 400  # the parts of the endless rows that tasks can use
NUM_PAGES = 600  # of the primer, with about 1,300 words
ASK_COUNT = (*COUNT_QUESTIONS, *HAND_QUESTIONS, "how many {letter} in {word}", "{word}: how many {letter}?")  # fmt: skip
ASK_SPELLING = (*SPELL_QUESTIONS, "spell {word}", "Which letters make the word '{word}'?")


class SpellWord(Task):
    """A word letter by letter."""

    def __init__(
        self,
        split: str,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
        words: Path | None = None,
    ) -> None:
        self.split, self.words = split, words_of(split, words)
        super().__init__(start, stop, step)

    def num_examples(self) -> int:
        return NUM_TRAIN if self.split == "train" else NUM_TEST

    def get_example(self, index: int) -> Conversation:
        rng = generator(self.split, "spell a word", index)
        word = rng.choice(self.words)
        spelled = "-".join(word)
        question = fill(rng.choice(ASK_SPELLING), word=word)
        return {"messages": exchange(question, spelled), "answer": spelled}

    def score(self, conversation: Conversation, reply: str) -> float:
        return float(normalized(reply) == conversation["answer"])


class SpellingBee(SpellWord):
    """How often a letter is in a word; most often one that is."""

    def get_example(self, index: int) -> Conversation:
        rng = generator(self.split, "count a letter", index)
        word = rng.choice(self.words)
        letter = rng.choice(word if rng.random() < 0.8 else ALPHABET)
        count = str(word.count(letter))
        parts = (
            ("text", f"{tally(word, letter)}. By hand I count {count}. I check it: "),
            ("python", f"'{word}'.count('{letter}')"),
            ("python_output", count),
            ("text", f"The letter {letter} appears {times(int(count))} in '{word}'."),
        )
        question = fill(rng.choice(ASK_COUNT), word=word, letter=letter)
        reply = [{"type": kind, "text": text} for kind, text in parts]
        return {"messages": exchange(question, reply), "answer": count}

    def score(self, conversation: Conversation, reply: str) -> float:
        return float(last_count(reply) == conversation["answer"])


@cache
def words_of(split: str, file: Path | None = None) -> tuple[str, ...]:
    """The words of the split, sorted: one tenth of all for val and test. Raises UserError where none is left."""
    if file is None:
        text = " ".join(primer.document("train", index) for index in range(NUM_PAGES))
        words = set(re.findall(r"(?<![\w'])[a-z]{3,}(?![\w'])", text))
    else:
        try:
            lines = file.read_text(encoding="utf-8").lower().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--words={file}: {error}; give a text file of words") from error
        words = {word for line in lines if re.fullmatch("[a-z]{2,}", word := line.strip())}
    own = sorted(word for word in words if held_out("word", word) == (split != "train"))
    if not own:
        raise UserError(f"--words={file}: no word for {split}; give some hundreds, one a line")
    return tuple(own)
