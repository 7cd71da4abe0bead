"""rustbpe against a slow trainer written from the definition, Hugging Face tokenizers, and tiktoken.

What may be asked of Hugging Face's trainer: it breaks ties by its own numbering of the bytes, so its merges
must equal ours up to the first tie, and no further. After it both choices are as good, so on other text of
the same kind the number of tokens must agree to within half a percent.

`python -m pytest tests/test_rustbpe.py -v -s` prints the speed of each.
"""

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator

import pytest
import regex
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

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
    word = lambda: "".join(rng.choices(SYLLABLES, k=1 + int(rng.expovariate(0.7))))  # noqa: E731
    return [" ".join(word() for _ in range(100)) + f" {i}.\n" for i in range(num_texts)]


def train(texts: list[str], vocab_size: int, **options: object) -> rustbpe.Tokenizer:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, **options)  # type: ignore[arg-type]
    return tokenizer


def naive_train(texts: list[str], vocab_size: int) -> tuple[list[bytes], int]:
    """(bytes of every token, number of merges before the first tie), all pairs counted anew each time."""
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
    result: list[int] = []
    at = 0
    while at < len(ids):
        found = tuple(ids[at : at + 2]) == pair
        result.append(token if found else ids[at])
        at += 2 if found else 1
    return result


def train_hugging_face(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_bytes(tokenizer: rustbpe.Tokenizer) -> list[bytes]:
    ranks = tokenizer.get_mergeable_ranks()
    assert [rank for _, rank in ranks] == list(range(tokenizer.vocab_size))
    return [token for token, _ in ranks]


def as_tiktoken(tokenizer: rustbpe.Tokenizer) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "test",
        pat_str=tokenizer.get_pattern(),
        mergeable_ranks=dict(tokenizer.get_mergeable_ranks()),
        special_tokens={},
        explicit_n_vocab=tokenizer.vocab_size,
    )


@pytest.mark.parametrize("texts", [MULTILINGUAL, made_up_texts(20, 1)], ids=["languages", "words"])
def test_merges_equal_the_naive_trainer(texts: list[str]) -> None:
    begin = time.perf_counter()
    expected, _ = naive_train(texts, 400)
    middle = time.perf_counter()
    assert token_bytes(train(texts, 400)) == expected
    end = time.perf_counter()
    num_bytes = sum(len(text.encode()) for text in texts)
    print(
        f"\n144 merges on {num_bytes} bytes: naive {middle - begin:.3f} s, rustbpe {end - middle:.4f} s"
    )


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


def test_as_good_as_hugging_face_and_the_speed_of_each() -> None:
    texts, others = made_up_texts(3000, 2), made_up_texts(300, 3)
    begin = time.perf_counter()
    ours = train(texts, 4096)
    middle = time.perf_counter()
    theirs = train_hugging_face(texts, 4096)
    end = time.perf_counter()
    assert ours.vocab_size == theirs.get_vocab_size() == 4096
    our_ids = ours.batch_encode(others)
    num_ours = sum(map(len, our_ids))
    num_theirs = sum(len(encoding.ids) for encoding in theirs.encode_batch(others))
    assert num_ours == pytest.approx(num_theirs, rel=0.005)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    for name, seconds in ("rustbpe", middle - begin), ("Hugging Face tokenizers", end - middle):
        print(
            f"\n{name}: {megabytes:.1f} MB, vocabulary 4096: {seconds:.3f} s, {megabytes / seconds:.1f} MB/s",
            end="",
        )
    print()


def test_ids_equal_tiktoken() -> None:
    tokenizer = train(MULTILINGUAL + made_up_texts(200, 5), 1500)
    encoding = as_tiktoken(tokenizer)
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x30000)]))
    texts = [*MULTILINGUAL, *made_up_texts(50, 6), "a" * 2000, "", everything]
    expected = encoding.encode_ordinary_batch(texts)
    assert tokenizer.batch_encode(texts) == expected
    assert [tokenizer.encode(text) for text in texts] == expected
    assert [tokenizer.decode(ids) for ids in expected] == texts


def test_default_pattern_is_the_one_that_nanochat_passes() -> None:
    """Any other string, equal in meaning or not, would go through the regex engine, which is far slower."""
    assert rustbpe.Tokenizer().get_pattern() == SPLIT_PATTERN


def test_another_pattern() -> None:
    tokenizer = train(["ab ab ab-ab"], 300, pattern=r"\S+|\s")
    assert tokenizer.get_pattern() == r"\S+|\s"
    assert token_bytes(tokenizer)[256:] == [b"ab", b"-ab", b"ab-ab"]
    assert tokenizer.encode("ab-ab ab") == as_tiktoken(tokenizer).encode_ordinary("ab-ab ab")


@pytest.mark.parametrize("buffer_size", [1, 7, 8192])
def test_threads_and_buffers_change_nothing(
    buffer_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = MULTILINGUAL * 3 + made_up_texts(300, 7)
    merges = []
    for num_threads in "1", "4":
        monkeypatch.setenv("RUSTBPE_NUM_THREADS", num_threads)
        merges.append(train(texts, 1000, buffer_size=buffer_size).get_mergeable_ranks())
    assert merges[0] == merges[1] == train(texts, 1000).get_mergeable_ranks()


def test_too_little_text_gives_a_smaller_vocabulary() -> None:
    tokenizer = train(["low low"], 1000)
    assert token_bytes(tokenizer)[256:] == [b"lo", b"low", b" low"]
    assert tokenizer.vocab_size == 259


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        (["a"], {"vocab_size": 255}, ValueError, "at least 256.* is 255"),
        (["a"], {"vocab_size": -1}, ValueError, "at least 256"),
        (["a"], {"pattern": "(open"}, ValueError, "split pattern.*parenthesis"),
        (["a"], {"buffer_size": 0}, ValueError, "buffer_size"),
        ([], {}, ValueError, "nothing to train on"),
        (["", ""], {}, ValueError, "nothing to train on"),
        (["a", b"b"], {}, TypeError, "text 1 .* not bytes"),
        (["a\ud800"], {}, UnicodeEncodeError, "surrogates"),
        (7, {}, TypeError, "not iterable"),
    ],
)
def test_errors(
    texts: object, options: dict[str, object], error: type[Exception], message: str
) -> None:
    tokenizer = train(["low low"], 258)
    with pytest.raises(error, match=message):
        tokenizer.train_from_iterator(texts, **{"vocab_size": 300, **options})  # type: ignore
    assert tokenizer.vocab_size == 258  # a failed training changes nothing


def test_what_the_iterator_raises_passes_through() -> None:
    def texts() -> Iterator[str]:
        yield "some text"
        raise KeyError("the shard is gone")

    with pytest.raises(KeyError, match="the shard is gone"):
        rustbpe.Tokenizer().train_from_iterator(texts(), 300)


def test_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train(["low"], 258)
    for unknown in 258, -1:
        with pytest.raises(ValueError, match=f"{unknown} is not in the vocabulary"):
            tokenizer.decode([108, unknown])
    assert tokenizer.decode([0xFF, 108]) == "\ufffdl"
    monkeypatch.setenv("RUSTBPE_NUM_THREADS", "many")
    with pytest.raises(ValueError, match="RUSTBPE_NUM_THREADS"):
        tokenizer.batch_encode(["low"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_bounded_by_the_unique_pieces() -> None:
    def resident_megabytes() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 1e6

    texts = made_up_texts(1000, 8)
    num_texts = 30_000_000 // len(texts[0])
    train(texts, 1000)
    before = resident_megabytes()
    for _ in range(2):
        tokenizer = rustbpe.Tokenizer()
        # 30 MB of text that is never there as a whole, with the same unique pieces over and over
        stream = (texts[index % len(texts)] + "" for index in range(num_texts))
        tokenizer.train_from_iterator(stream, 1000)
        assert resident_megabytes() - before < 15
