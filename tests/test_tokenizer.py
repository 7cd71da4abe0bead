"""The tokenizer against a naive BPE written here, and its promises on every kind of string and file."""

import json
import random

import pytest
import regex

from nanochat.common import UserError
from nanochat.tokenizer import FILE_NAME, MAX_BLANKS, SPLIT_PATTERN, Tokenizer

SPECIALS = ("<|bos|>", "<|end|>")
TEXTS = [
    "The hen sat on the hay; the hat is on the hen. It's 12345 o'clock, isn't it?\n" * 3,
    "naïve café, Straße, Ελλάδα, 日本語のテキスト, 안녕하세요, 👩‍🚀🚀\r\n",
    "def f(x):\n    return x**2 + 3*x\n\n\nprint(f(10), f(2024))\n",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 350, SPECIALS)


def naive_merges(texts: list[str], num_merges: int) -> list[bytes]:
    """The oracle: recount every pair after each merge; ties go to the smaller pair of ids."""
    pieces = [
        [bytes([b]) for b in m.encode()] for t in texts for m in regex.findall(SPLIT_PATTERN, t)
    ]
    tokens = [bytes([b]) for b in range(256)]
    for _ in range(num_merges):
        counts: dict[tuple[bytes, bytes], int] = {}
        for piece in pieces:
            for pair in zip(piece, piece[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda p: (-counts[p], tokens.index(p[0]), tokens.index(p[1])))
        tokens.append(best[0] + best[1])
        pieces = [merge(piece, best) for piece in pieces]
    return tokens


def merge(piece: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged, i = [], 0
    while i < len(piece):
        if tuple(piece[i : i + 2]) == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(piece[i])
            i += 1
    return merged


def test_training_and_encoding_equal_naive_bpe():
    tokenizer = Tokenizer.train(TEXTS, 300 + len(SPECIALS), SPECIALS)
    tokens = naive_merges(TEXTS, 44)
    assert [tokenizer.decode_bytes([i]) for i in range(300)] == tokens
    for text in [*TEXTS, "then the hathen 99 hens'll they're café"]:
        pieces = [[bytes([b]) for b in m.encode()] for m in regex.findall(SPLIT_PATTERN, text)]
        for token in tokens[256:]:
            # The pair behind a token is not stored, so every split of it that is two tokens is tried.
            for cut in range(1, len(token)):
                if token[:cut] in tokens and token[cut:] in tokens:
                    pieces = [merge(piece, (token[:cut], token[cut:])) for piece in pieces]
        assert tokenizer.encode(text) == [tokens.index(t) for piece in pieces for t in piece]


def test_numbers_are_cut_to_two_digits():
    tokenizer = Tokenizer.train(["1234567 " * 100], 400, SPECIALS)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1234567")] == ["12", "34", "56", "7"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\x00\x7f\r\n\t",
        "<|bos|> spelled <|end|> out",
        "\ud800",
        "a\udfffb\ud83d\ude00c 日本",
        "e\u0301\u200d\U0001f469\U0010ffff\ufffd",
        " " * (2 * MAX_BLANKS + 1) + "word",
        "\n" * MAX_BLANKS + "\ud800",
        " " * 1_200_000,  # tiktoken alone panics here
        "a" * 200_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_round_trip_of_odd_strings(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(i < tokenizer.bos_id for i in ids), "a special token came out of plain text"
    sizes = tokenizer.token_bytes()
    assert sum(sizes[i] for i in ids) == len(text.encode("utf-8", "surrogatepass"))


def test_round_trip_of_random_strings(tokenizer: Tokenizer):
    rng = random.Random(0)
    ranges = [(0, 0x7F), (0, 0x7F), (0x80, 0x7FF), (0x800, 0xFFFF), (0x10000, 0x10FFFF)]
    texts = [
        "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 60)))
        for _ in range(500)
    ]
    batch = tokenizer.encode_batch(texts, num_threads=3)
    assert batch == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in batch] == texts


def test_half_a_character_decodes_to_the_replacement_character(tokenizer: Tokenizer):
    ids = tokenizer.encode("\U00012345")
    assert len(ids) > 1
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.decode_bytes(ids) == "\U00012345".encode()


def test_token_bytes_are_the_raw_lengths(tokenizer: Tokenizer):
    sizes = tokenizer.token_bytes()
    assert len(sizes) == tokenizer.vocab_size
    assert sizes[:256] == [1] * 256, "a lone byte >= 0x80 is one byte, not the three of U+FFFD"
    assert sizes == [len(tokenizer.decode_bytes([i])) for i in range(tokenizer.bos_id)] + [0, 0]


def test_vocabulary_counts_the_specials(tokenizer: Tokenizer):
    assert tokenizer.vocab_size == 350
    assert tokenizer.specials == {"<|bos|>": 348, "<|end|>": 349}
    assert tokenizer.bos_id == 348
    assert tokenizer.pattern == SPLIT_PATTERN
    assert Tokenizer.train(TEXTS, 258, SPECIALS).encode("the") == list(b"the")
    with pytest.raises(UserError, match="at least 258"):
        Tokenizer.train(TEXTS, 257, SPECIALS)


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    loaded = Tokenizer.load(tmp_path / "new")
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert (loaded.specials, loaded.pattern) == (tokenizer.specials, tokenizer.pattern)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FILE_NAME]


def test_missing_or_damaged_file_is_one_line(tokenizer: Tokenizer, tmp_path):
    with pytest.raises(UserError, match="no tokenizer in .*python -m scripts.tok_train"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    path = tmp_path / FILE_NAME
    whole = path.read_text()
    swapped = json.loads(whole)
    swapped["tokens"][65], swapped["tokens"][66] = swapped["tokens"][66], swapped["tokens"][65]
    for content in ["", "{}", "[]", whole[: len(whole) // 2], whole[:-3], json.dumps(swapped)]:
        path.write_text(content)
        with pytest.raises(UserError, match="damaged") as caught:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff" + whole.encode())
    with pytest.raises(UserError, match="damaged"):
        Tokenizer.load(tmp_path)
