"""The tokenizer against a naive BPE; conversations against ids and masks written by hand."""

import json
import random
import re

import pytest
import regex

from nanochat.tokenizer import (
    FILE_NAME,
    MAX_BLANKS,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    Tokenizer,
    chat_tokens,
    crop_prompt,
    render_conversation,
    render_prompt,
)
from tests.models import refuses
from tests.test_rustbpe import MULTILINGUAL as TEXTS
from tests.test_rustbpe import naive_train, replace

SPECIALS = ("<|bos|>", "<|end|>")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 350, SPECIALS)


def test_training_and_encoding_equal_naive_bpe():
    tokenizer = Tokenizer.train(TEXTS, 400 + len(SPECIALS), SPECIALS)
    tokens, _ = naive_train(TEXTS, 400)
    assert [tokenizer.decode_bytes([i]) for i in range(400)] == tokens
    for text in [*TEXTS, "then the hathen 99 hens'll they're café"]:
        pieces = [[*piece.encode()] for piece in regex.findall(SPLIT_PATTERN, text)]
        for id, token in enumerate(tokens[256:], start=256):
            # The pair behind a token is not stored: every split of it into two tokens is tried.
            for cut in range(1, len(token)):
                if token[:cut] in tokens and token[cut:] in tokens:
                    pair = tokens.index(token[:cut]), tokens.index(token[cut:])
                    pieces = [replace(piece, pair, id) for piece in pieces]
        assert tokenizer.encode(text) == [id for piece in pieces for id in piece]


ODD = [
    "", " ", "\x00\x7f\r\n\t", "<|bos|> spelled <|end|> out", "\ud800",
    "a\udfffb\ud83d\ude00c 日本", "e\u0301\u200d\U0001f469\U0010ffff\ufffd",
    " " * (2 * MAX_BLANKS + 1) + "word", "\n" * MAX_BLANKS + "\ud800", "a" * 200_000,
    " " * 1_200_000,  # tiktoken alone panics here
]  # fmt: skip


def fixture_strings() -> list[str]:
    """2,000 strings of many scripts, code, blanks and what could be taken for a special token."""
    alphabets = [
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ     ",
        "0123456789 .,-",
        "日本語漢字你好世界的一是不了人我在有他这、。",
        "안녕하세요세계 ",
        "مرحبا بالعالم السلام ",
        "नमस्ते दुनिया ",
        "Привет мир Ελλάδα ßéïñøåſİ ",
        "👩🚀👨👧👦🇳🇴🏳️🌈✊🏽\u200d\ufe0f",
        " \t\n\r\u00a0\u2003\u3000\x85",
        "def f(x):\n    return {}[]<>|=+-*/'\"\\#;",
        "'sS'tT're'LL'vE'd",
        "\x00\x7f\u0300\ufeff\uffff\U0001f9ff\U0010ffff<",
    ]
    specials = [*SPECIAL_TOKENS, "<|", "|>", "<|bos", "<|bos|><|bos|>"]
    random_, strings = random.Random(0), []
    for i in range(2000):
        own = random_.sample(alphabets, random_.randint(1, 3))
        pieces = ["".join(random_.choices(a, k=random_.randint(1, 20))) for a in own]
        if i % 5 == 0:
            pieces.insert(random_.randrange(len(pieces) + 1), random_.choice(specials))
        strings.append(" " * random_.choice((0, 0, 1, 2, 7)) + "".join(pieces))
    return strings


def test_round_trip_of_odd_and_random_strings(tokenizer: Tokenizer):
    texts, sizes = [*ODD, *fixture_strings()], tokenizer.token_bytes()
    batch = tokenizer.encode_batch(texts, num_threads=3)
    for text, ids in zip(texts, batch, strict=True):
        assert ids == tokenizer.encode(text), repr(text[:20])
        assert tokenizer.decode(ids) == text
        assert all(i < tokenizer.bos_id for i in ids), "a special token came out of plain text"
        assert sum(sizes[i] for i in ids) == len(text.encode("utf-8", "surrogatepass"))


def test_parts_of_characters_and_numbers(tokenizer: Tokenizer):
    sizes = tokenizer.token_bytes()
    assert sizes == [len(tokenizer.decode_bytes([i])) for i in range(tokenizer.bos_id)] + [0, 0]
    assert sizes[:256] == [1] * 256, "a lone byte >= 0x80 is one byte, not the three of U+FFFD"
    ids = tokenizer.encode("\U00012345")
    assert len(ids) > 1
    assert tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.decode_bytes(ids) == "\U00012345".encode()
    digits = Tokenizer.train(["1234567 " * 100], 400, SPECIALS)
    assert [digits.decode([i]) for i in digits.encode("1234567")] == ["12", "34", "56", "7"]


def test_vocabulary_counts_the_specials(tokenizer: Tokenizer):
    assert tokenizer.vocab_size == 350
    assert tokenizer.specials == {"<|bos|>": tokenizer.bos_id, "<|end|>": 349}
    assert Tokenizer.train(TEXTS, 258, SPECIALS).encode("the") == list(b"the")
    refuses("at least 258", Tokenizer.train, TEXTS, 257, SPECIALS)


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    loaded = Tokenizer.load(tmp_path / "new")
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert (loaded.specials, loaded.pattern) == (tokenizer.specials, SPLIT_PATTERN)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FILE_NAME]


def test_missing_or_damaged_file_is_one_line(tokenizer: Tokenizer, tmp_path):
    refuses("no tokenizer in .*python -m scripts.tok_train", Tokenizer.load, tmp_path)
    tokenizer.save(tmp_path)
    path = tmp_path / FILE_NAME
    whole = path.read_bytes()
    swapped = json.loads(whole)
    swapped["tokens"][65:67] = reversed(swapped["tokens"][65:67])
    cuts = (whole[: len(whole) // 2], whole[:-3], b"\xff" + whole)
    for content in [b"", b"{}", b"[]", *cuts, json.dumps(swapped).encode()]:
        path.write_bytes(content)
        refuses("damaged", Tokenizer.load, tmp_path)


SAID = [("text", "It is "), ("python", "2+3"), ("python_output", "5"), ("text", "5.")]
TOOL_CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in SAID]},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes"},
    ]
}


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    """Bytes and specials alone: every expected id can be written down by hand."""
    return Tokenizer.train(["x"], 256 + len(SPECIAL_TOKENS), SPECIAL_TOKENS)


def test_the_nine_special_tokens_in_order(letters: Tokenizer):
    names = "bos user_start user_end assistant_start assistant_end python_start python_end"
    names = [*names.split(), "output_start", "output_end"]
    assert [f"<|{name}|>" for name in names] == list(SPECIAL_TOKENS)
    assert chat_tokens(letters) == tuple(range(256, 265))
    refuses("lacks <.user_start.>", chat_tokens, Tokenizer.train(["x"], 257, SPECIAL_TOKENS[:1]))


def test_golden_ids_and_mask_with_tool_parts(letters: Tokenizer):
    text = (  # what is in [brackets] is learned
        "<|bos|><|user_start|>Be brief.\n\n2+3?<|user_end|>"
        "<|assistant_start|>[It is <|python_start|>2+3<|python_end|>]"
        "<|output_start|>5<|output_end|>[5.<|assistant_end|>]"
        "<|user_start|>Sure?<|user_end|><|assistant_start|>[Yes<|assistant_end|>]"
    )
    ids, mask, learned = [], [], 0
    for piece in re.split(r"(<\|\w+\|>|[\[\]])", text):
        if piece in ("[", "]"):
            learned = int(piece == "[")
            continue
        found = [letters.specials[piece]] if piece in SPECIAL_TOKENS else list(piece.encode())
        ids += found
        mask += [learned] * len(found)
    before = json.dumps(TOOL_CHAT)
    assert render_conversation(letters, TOOL_CHAT) == (ids, mask)
    assert json.dumps(TOOL_CHAT) == before, "rendering must not change the conversation"
    prompt = ids[: -len("Yes") - 1]  # the conversation up to the last reply, there or not
    assert render_prompt(letters, TOOL_CHAT) == prompt
    assert render_prompt(letters, {"messages": TOOL_CHAT["messages"][:-1]}) == prompt


def test_spelled_special_tokens_stay_plain_text(letters: Tokenizer):
    spelled = "".join(SPECIAL_TOKENS)
    part = {"type": "python_output", "text": spelled}
    messages = [
        {"role": "system", "content": spelled},
        {"role": "user", "content": spelled},
        {"role": "assistant", "content": [part, {"type": "python", "text": spelled}]},
    ]
    ids, _ = render_conversation(letters, {"messages": messages})
    tokens = chat_tokens(letters)
    assert [i for i in ids if i >= tokens.bos] == [
        *(tokens.bos, tokens.user_start, tokens.user_end, tokens.assistant_start),
        *(tokens.output_start, tokens.output_end, tokens.python_start, tokens.python_end),
        tokens.assistant_end,
    ]


USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "ho"}
SYSTEM = {"role": "system", "content": "be"}


def test_a_cropped_prompt_is_a_shorter_one(letters: Tokenizer):
    """The oracle is the prompt of what is left of the question; a letter is a token."""
    prompt = render_prompt(letters, {"messages": [{"role": "user", "content": "abcdefgh"}]})
    for length in range(1, 9):
        rest = {"messages": [{"role": "user", "content": "abcdefgh"[-length:]}]}
        assert crop_prompt(prompt, length + 4) == render_prompt(letters, rest)
    assert crop_prompt(prompt, 99) == prompt


def test_bad_conversations_name_the_message(letters: Tokenizer):
    for conversation, complaint in (
        ([USER, REPLY], '"messages"'),
        ({}, '"messages"'),
        ({"messages": []}, "at least one user message"),
        ({"messages": [SYSTEM]}, "message 0 is a system message"),
        ({"messages": [REPLY]}, "message 0 .*expected 'user'"),
        ({"messages": [SYSTEM, REPLY]}, "message 1 .*expected 'user'"),
        ({"messages": [USER, USER]}, "message 1 .*expected 'assistant'"),
        ({"messages": [USER, REPLY, SYSTEM]}, "message 2 has the role 'system'"),
        ({"messages": [USER, {"role": "bot", "content": "x"}]}, "message 1 has the role 'bot'"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 1 is not an object"),
        ({"messages": [USER, "ho"]}, "message 1 is not an object"),
        ({"messages": [{"role": "user", "content": None}]}, "message 0 .*a string$"),
        ({"messages": [USER | {"content": [{"type": "text", "text": "x"}]}]}, "message 0"),
        ({"messages": [USER, REPLY | {"content": 3}]}, "message 1 .*list of parts"),
        ({"messages": [USER, REPLY | {"content": [{"type": "image", "text": ""}]}]}, "1, part 0"),
        ({"messages": [USER, REPLY | {"content": [{"type": "text", "text": 1}]}]}, "1, part 0"),
    ):
        for render in (render_conversation, render_prompt):
            refuses(complaint, render, letters, conversation)
