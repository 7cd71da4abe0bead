"""Text to token ids and back: rustbpe trains the merges, tiktoken encodes with them.

Byte-level BPE: the 256 bytes are the first tokens, so that every text can be encoded; each merge adds one;
special tokens come last and are never produced from text, even where a text spells one. The split pattern
is GPT-4's, with numbers cut to at most two digits, which spends less of a small vocabulary on them. A
tokenizer is one JSON file, hence whole or absent, with the pattern and a checksum over the tokens.

The choice that would surprise: a lone surrogate, which no UTF-8 text can hold but a Python string can, is
encoded as the three bytes that UTF-8 would give it, so that decode(encode(text)) == text for every str.

Sources: Sennrich et al. 2016 (arXiv 1508.07909); the GPT-4 pattern is `cl100k_base` of tiktoken.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiktoken

from nanochat.paths import UserError, write_file

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
FILE_NAME = "tokenizer.json"
# tiktoken's regex engine backtracks over blanks and panics (StackOverflow) at 0.1 to 1 million of them.
MAX_BLANKS = 50_000
# What tiktoken cannot take as it is: lone surrogates, very long runs of blanks.
ODD = re.compile(rf"[\ud800-\udfff]+|(?<!\s)\s{{{MAX_BLANKS},}}")


class Tokenizer:
    """Encodes and decodes with one trained vocabulary; safe to use from many threads."""

    def __init__(self, tokens: Sequence[bytes], specials: Sequence[str], pattern: str) -> None:
        """`tokens[i]` are the bytes of id i, in the order of the merges; `specials` get the ids after."""
        self.pattern = pattern
        self.specials = {name: len(tokens) + i for i, name in enumerate(specials)}
        self.vocab_size = len(tokens) + len(specials)
        self._tokens = list(tokens)
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self._byte_ids = [ranks[bytes([byte])] for byte in range(256)]
        self._encoding = tiktoken.Encoding(
            "nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.specials
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, specials: Sequence[str]) -> "Tokenizer":
        """A tokenizer of `vocab_size` ids, specials included; fewer where the texts hold no more merges."""
        import rustbpe  # here, so that loading a tokenizer does without the compiled extension

        smallest = 256 + len(specials)
        if vocab_size < smallest:
            raise UserError(f"--vocab_size={vocab_size} is too small; use at least {smallest}")
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iter(texts), vocab_size - len(specials), pattern=SPLIT_PATTERN)
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        # Two merges may spell the same bytes; an id for each would leave one that decodes to nothing.
        tokens = list(dict.fromkeys(bytes(token) for token, _ in ranks))
        return cls(tokens, specials, trainer.get_pattern())

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """The tokenizer saved in `folder`. Raises UserError when it is missing or damaged."""
        path = folder / FILE_NAME
        retrain = "run `python -m scripts.tok_train`"
        if not path.is_file():
            raise UserError(f"no tokenizer in {folder}; {retrain}")
        try:
            saved = json.loads(path.read_bytes())
            if saved["sha256"] != _checksum(saved):
                raise ValueError("checksum differs")
            tokens = [base64.b64decode(token) for token in saved["tokens"]]
            return cls(tokens, saved["specials"], saved["pattern"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"the tokenizer in {path} is damaged; {retrain}") from error

    def save(self, folder: Path) -> None:
        """Write the tokenizer into `folder`, whole or not at all."""
        saved = {
            "pattern": self.pattern,
            "specials": list(self.specials),
            "tokens": [base64.b64encode(token).decode() for token in self._tokens],
        }
        saved["sha256"] = _checksum(saved)
        write_file(folder / FILE_NAME, json.dumps(saved, indent=0) + "\n")

    @property
    def bos_id(self) -> int:
        """The id that starts every document and conversation: the first special."""
        return len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """The ids of ordinary text; a special token that it spells out stays plain text."""
        if len(text) < MAX_BLANKS and _is_utf8(text):
            return self._encoding.encode_ordinary(text)
        ids, start = [], 0
        for odd in ODD.finditer(text):
            ids += self._encoding.encode_ordinary(text[start : odd.start()])
            ids += self._encode_odd(odd[0])
            start = odd.end()
        return ids + self._encoding.encode_ordinary(text[start:])

    def _encode_odd(self, text: str) -> list[int]:
        if not text.isspace():
            return [self._byte_ids[byte] for byte in text.encode("utf-8", "surrogatepass")]
        cuts = range(0, len(text), MAX_BLANKS)
        return [id for i in cuts for id in self._encoding.encode_ordinary(text[i : i + MAX_BLANKS])]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 2) -> list[list[int]]:
        """The ids of each text, encoded in parallel: tiktoken works without the GIL."""
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8, such as half a character, become U+FFFD."""
        data = self.decode_bytes(ids)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The raw bytes of `ids`; a special token gives its name."""
        return self._encoding.decode_bytes(ids)

    def token_bytes(self) -> list[int]:
        """For each id the number of raw bytes it stands for, 0 for specials; bits per byte needs it."""
        return [len(token) for token in self._tokens] + [0] * len(self.specials)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checksum(saved: dict) -> str:
    content = [saved["pattern"], saved["specials"], saved["tokens"]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
