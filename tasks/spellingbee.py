"""SpellingBee: spell a word, or count a letter in it, by hand and then checked with the tool.

One row of each:
    user: Please spell crow for me.              assistant: c-r-o-w
    user: How many e are there in 'bee'?
    assistant: b, e 1, e 2. By hand I count 2. I check it: [python] 'bee'.count('e') [output] 2
               [text] The letter e appears 2 times in 'bee'.

A model reads tokens, not letters, so how a word is spelled has to be learned word by word. The
words are those of spellingbee.txt, or of a file of your own. A word belongs to one split by a hash
of the word alone: a test word is held out whichever file it comes from, and for spelling and
counting alike.
"""

import hashlib
import random
import re
from functools import cache
from pathlib import Path
from string import ascii_lowercase

from nanochat.common import UserError
from nanochat.tokenizer import Conversation
from tasks.common import GeneratedTask, exchange, in_parts

WORDS = Path(__file__).with_suffix(".txt")
ASK_SPELLING = (
    "How do you spell {word}? | Spell the word {word}. | Please spell {word} for me. | "
    "What are the letters of {word}? | Can you spell {word}? | Write {word} letter by letter. | "
    "spell {word} | Which letters make the word '{word}'?"
)
ASK_COUNT = (
    "How many times is the letter {letter} in '{word}'? | "
    "How many {letter} are there in '{word}'? | "
    "Count the letter {letter} in '{word}'. | How often does {letter} appear in '{word}'? | "
    "Count the letter {letter} in '{word}' by hand, then check. | "
    "Spell '{word}', count each {letter}, and check it. | "
    "how many {letter} in {word} | {word}: how many {letter}?"
)


class SpellWord(GeneratedTask):
    """A word letter by letter."""

    num_train = 1_000_000

    def __init__(self, split: str, words: Path | None = None) -> None:
        self.words = words_of(split, words or WORDS)
        super().__init__(split)

    def get_example(self, number: int) -> Conversation:
        rng = random.Random(f"{self.split}/spell a word/{number}")
        word = rng.choice(self.words)
        spelled = "-".join(word)
        question = rng.choice(ASK_SPELLING.split(" | ")).format(word=word)
        return {"messages": exchange(question, spelled), "answer": spelled}

    def score(self, conversation: Conversation, reply: str) -> float:
        return normalized(reply) == conversation["answer"]


class SpellingBee(SpellWord):
    """How often a letter is in a word; most often one that is."""

    def get_example(self, number: int) -> Conversation:
        rng = random.Random(f"{self.split}/count a letter/{number}")
        word = rng.choice(self.words)
        letter = rng.choice(word if rng.random() < 0.8 else ascii_lowercase)
        count, tally = 0, []
        for each in word:
            count += each == letter
            tally.append(f"{each} {count}" if each == letter else each)
        times = "1 time" if count == 1 else f"{count} times"
        by_hand = f"{', '.join(tally)}. By hand I count {count}. I check it: "
        said = f"The letter {letter} appears {times} in '{word}'."
        reply = in_parts([by_hand, f"'{word}'.count('{letter}')", str(count), said])
        question = rng.choice(ASK_COUNT.split(" | ")).format(word=word, letter=letter)
        return {"messages": exchange(question, reply), "answer": str(count)}

    def score(self, conversation: Conversation, reply: str) -> float:
        return last_count(reply) == conversation["answer"]


@cache
def words_of(split: str, file: Path) -> tuple[str, ...]:
    """The words of the split, sorted; val and test share a tenth of all. UserError without any."""
    try:
        words = set(file.read_text(encoding="utf-8").lower().split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--words={file}: {error}; give a text file of words") from error
    own = []
    for word in sorted(words):
        digest = hashlib.blake2b(f"word/{word}".encode(), digest_size=4).digest()
        held_out = int.from_bytes(digest, "big") % 10 == 0
        if re.fullmatch("[a-z]{2,}", word) and held_out == (split != "train"):
            own.append(word)
    if not own:
        raise UserError(f"--words={file}: no word for {split}; give some hundreds")
    return tuple(own)


def normalized(text: str) -> str:
    """Lower case, single spaces, bare ends: `" A  fox. "` -> `"a fox"`."""
    return " ".join(text.lower().split()).strip(" .!?")


def last_number(text: str) -> str | None:
    """The last number: `"37 + 58 = 95."` -> `"95"`."""
    numbers = re.findall(r"(?<![\d.])-?\d+(?:\.\d+)?", text)
    return numbers[-1] if numbers else None


def last_count(text: str) -> str | None:
    """The number before the last "time(s)": `"... appears 2 times in 'egg'."` -> `"2"`."""
    counts = re.findall(r"(\d+) times?\b", text)
    return counts[-1] if counts else last_number(text)
