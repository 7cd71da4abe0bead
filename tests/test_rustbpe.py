"""rustbpe against a slow trainer written from the definition, and Hugging Face tokenizers.

Hugging Face's trainer breaks ties by its own numbering of the bytes, so its merges must equal ours
up to the first tie, and no further.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import regex
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

import rustbpe
from nanochat.tokenizer import SPLIT_PATTERN

MULTILINGUAL = [
    "The quick brown fox's 12 dens aren't 3,456.78 m away; I'LL go!\n\n  - it'ſ \tindented\r\n",
    "Żółw i gęś; naïve façade; ŒUVRE Straße ﬁn — „cudzysłów” … ½ Ⅷ ٣٤٥ ² ௧௨\n",
    "日本語のテキスト、漢字とカタカナ。今日は2024年10月13日です。\u3000全角　スペース",
    "Русский текст: «ёжик». Ελληνικά; עברית, العربية, हिन्दी में पाठ, ภาษาไทย, 한국어",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 a\u0308\u0323 zero\u200dwidth\u00a0nbsp\u2028line\x85next\x0b\x00",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 22, 333]}  # 100%\n\n\n" + " " * 50 + "a" * 40,
]
SYLLABLES = ["ta", "re", "in", "mo", "é", "th", "el", "ka", "ши", "ed", "an", "ver", "ness", "qu"]


def made_up_texts(num_texts: int, seed: int) -> list[str]:
    """Texts of 100 words of made-up syllables, short words far more frequent than long ones."""
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choices(SYLLABLES, k=1 + int(rng.expovariate(0.7))))

    return [" ".join(word() for _ in range(100)) + f" {i}.\n" for i in range(num_texts)]


def naive_train(texts: list[str], vocab_size: int) -> tuple[list[bytes], int]:
    """(bytes of every token, merges before the first tie), all pairs counted anew each time."""
    words = Counter(piece for text in texts for piece in regex.findall(SPLIT_PATTERN, text))
    pieces = [([*word.encode()], count) for word, count in words.items()]
    tokens, first_tie = [bytes([byte]) for byte in range(256)], None
    while len(tokens) < vocab_size:
        pairs: Counter[tuple[int, int]] = Counter()
        for ids, count in pieces:
            for pair in zip(ids, ids[1:], strict=False):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if first_tie is None and sum(count == pairs[best] for count in pairs.values()) > 1:
            first_tie = len(tokens) - 256
        pieces = [(replace(ids, best, len(tokens)), count) for ids, count in pieces]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens, len(tokens) - 256 if first_tie is None else first_tie


def replace(ids: list[int], pair: tuple[int, int], token: int) -> list[int]:
    result, at = [], 0
    while at < len(ids):
        found = tuple(ids[at : at + 2]) == pair
        result.append(token if found else ids[at])
        at += 2 if found else 1
    return result


def train_hugging_face(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, **options)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def test_merges_equal_hugging_face_up_to_the_first_tie() -> None:
    rng = random.Random(4)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(300)]
    texts = [f"{word} " * rng.randint(1, 1000) for word in words]
    expected, num_untied = naive_train(texts, 256 + 100)
    assert num_untied >= 40, "the text must allow a comparison"
    assert rustbpe.train(iter(texts), 100, SPLIT_PATTERN) == expected
    model = json.loads(train_hugging_face(texts, 256 + 100).to_str())["model"]
    theirs = [(left + right).replace("Ġ", " ").encode() for left, right in model["merges"]]
    assert theirs[:num_untied] == expected[256 : 256 + num_untied]


def test_patterns() -> None:
    # Any other string, equal in meaning or not, would go through the far slower regex engine.
    assert rustbpe.DEFAULT_PATTERN == SPLIT_PATTERN
    tokens = rustbpe.train(["ab ab ab-ab"], 50, r"\S+|\s")
    assert tokens[256:] == [b"ab", b"-ab", b"ab-ab"]  # text for no more than these


def test_batches_change_nothing() -> None:
    texts = (MULTILINGUAL * 3 + made_up_texts(300, 7))[:20]
    megabyte = 100_000 * "some words "  # a batch of its own, whose counts only grow
    spread = [part for text in texts for part in (text, megabyte)]
    together = [*texts, megabyte * len(texts)]
    tokens = rustbpe.train(spread, 144, SPLIT_PATTERN)
    assert tokens == rustbpe.train(together, 144, SPLIT_PATTERN) and len(tokens) == 400


def broken_off() -> Iterator[str]:
    yield "some text"
    raise KeyError("the shard is gone")


def test_errors() -> None:
    cases: list[tuple[Any, int, str, type[Exception], str]] = [
        (["a"], -1, SPLIT_PATTERN, OverflowError, "negative"),
        (["a"], 9, "(open", ValueError, "split pattern.*parenthesis"),
        ([], 9, SPLIT_PATTERN, ValueError, "nothing to train on"),
        (["", ""], 9, SPLIT_PATTERN, ValueError, "nothing to train on"),
        (["a", b"b"], 9, SPLIT_PATTERN, TypeError, "text 1 .* not bytes"),
        (["a\ud800"], 9, SPLIT_PATTERN, UnicodeEncodeError, "surrogates"),
        (7, 9, SPLIT_PATTERN, TypeError, "not iterable"),
        (broken_off(), 9, SPLIT_PATTERN, KeyError, "the shard is gone"),
    ]
    for texts, num_merges, pattern, error, message in cases:
        with pytest.raises(error, match=message):
            rustbpe.train(texts, num_merges, pattern)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_bounded_by_the_unique_pieces() -> None:
    def resident_megabytes() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 1e6

    texts = made_up_texts(1000, 8)
    num_texts = 30_000_000 // len(texts[0])
    rustbpe.train(texts, 744, SPLIT_PATTERN)
    before = resident_megabytes()
    # 30 MB of text that is never there as a whole, with the same unique pieces over and over
    stream = (texts[index % len(texts)] + "" for index in range(num_texts))
    rustbpe.train(stream, 744, SPLIT_PATTERN)
    assert resident_megabytes() - before < 15
