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


def train(texts: list[str], vocab_size: int, **options: str) -> rustbpe.Tokenizer:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, **options)
    return tokenizer


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


def token_bytes(tokenizer: rustbpe.Tokenizer) -> list[bytes]:
    ranks = tokenizer.get_mergeable_ranks()
    assert [rank for _, rank in ranks] == list(range(len(ranks)))
    return [token for token, _ in ranks]


def test_merges_equal_hugging_face_up_to_the_first_tie() -> None:
    rng = random.Random(4)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(300)]
    texts = [f"{word} " * rng.randint(1, 1000) for word in words]
    expected, num_untied = naive_train(texts, 256 + 100)
    assert num_untied >= 40, "the text must allow a comparison"
    assert token_bytes(train(texts, 256 + 100)) == expected
    model = json.loads(train_hugging_face(texts, 256 + 100).to_str())["model"]
    theirs = [(left + right).replace("Ġ", " ").encode() for left, right in model["merges"]]
    assert theirs[:num_untied] == expected[256 : 256 + num_untied]


def test_patterns() -> None:
    # Any other string, equal in meaning or not, would go through the far slower regex engine.
    assert rustbpe.Tokenizer().get_pattern() == SPLIT_PATTERN
    tokenizer = train(["ab ab ab-ab"], 300, pattern=r"\S+|\s")
    assert tokenizer.get_pattern() == r"\S+|\s"
    assert token_bytes(tokenizer)[256:] == [b"ab", b"-ab", b"ab-ab"]  # text for no more than these


def test_batches_change_nothing() -> None:
    texts = (MULTILINGUAL * 3 + made_up_texts(300, 7))[:20]
    megabyte = 100_000 * "some words "  # a batch of its own, whose counts only grow
    spread = [part for text in texts for part in (text, megabyte)]
    together = [*texts, megabyte * len(texts)]
    assert train(spread, 400).get_mergeable_ranks() == train(together, 400).get_mergeable_ranks()


def broken_off() -> Iterator[str]:
    yield "some text"
    raise KeyError("the shard is gone")


def test_errors() -> None:
    tokenizer = train(["low low"], 258)
    cases: list[tuple[Any, dict, type[Exception], str]] = [
        (["a"], {"vocab_size": 255}, ValueError, "at least 256.* is 255"),
        (["a"], {"vocab_size": -(2**63)}, ValueError, "at least 256"),
        (["a"], {"pattern": "(open"}, ValueError, "split pattern.*parenthesis"),
        ([], {}, ValueError, "nothing to train on"),
        (["", ""], {}, ValueError, "nothing to train on"),
        (["a", b"b"], {}, TypeError, "text 1 .* not bytes"),
        (["a\ud800"], {}, UnicodeEncodeError, "surrogates"),
        (7, {}, TypeError, "not iterable"),
        (broken_off(), {}, KeyError, "the shard is gone"),
    ]
    for texts, options, error, message in cases:
        with pytest.raises(error, match=message):
            tokenizer.train_from_iterator(texts, **{"vocab_size": 300, **options})
        assert len(token_bytes(tokenizer)) == 258  # a failed training changes nothing


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_bounded_by_the_unique_pieces() -> None:
    def resident_megabytes() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 1e6

    texts = made_up_texts(1000, 8)
    num_texts = 30_000_000 // len(texts[0])
    train(texts, 1000)
    before = resident_megabytes()
    # 30 MB of text that is never there as a whole, with the same unique pieces over and over
    stream = (texts[index % len(texts)] + "" for index in range(num_texts))
    rustbpe.Tokenizer().train_from_iterator(stream, 1000)
    assert resident_megabytes() - before < 15
