"""Rendered conversations against ids and masks written out by hand."""

import json

import pytest

from nanochat import tokenizer as chat_format
from nanochat.common import UserError
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    Tokenizer,
    chat_tokens,
    check_conversation,
    render_conversation,
    render_prompt,
    visualize,
)

TOOL_CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+3?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "It is "},
                {"type": "python", "text": "2+3"},
                {"type": "python_output", "text": "5"},
                {"type": "text", "text": "5."},
            ],
        },
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes"},
    ]
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes and specials alone: every expected id can be written down by hand."""
    return Tokenizer.train(["x"], 256 + len(SPECIAL_TOKENS), SPECIAL_TOKENS)


def pieces(tokenizer: Tokenizer, *texts: tuple[str, int]) -> tuple[list[int], list[int]]:
    """Ids and mask of hand-written (text or special token, mask) pieces."""
    ids, mask = [], []
    for text, learned in texts:
        piece = [tokenizer.specials[text]] if text in SPECIAL_TOKENS else list(text.encode())
        ids += piece
        mask += [learned] * len(piece)
    return ids, mask


def test_the_nine_special_tokens_in_order(tokenizer: Tokenizer):
    assert (
        *("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"),
        *("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"),
    ) == SPECIAL_TOKENS
    tokens = chat_tokens(tokenizer)
    for name in SPECIAL_TOKENS:
        assert getattr(tokens, name.strip("<|>")) == tokenizer.specials[name]
    assert tokens.bos == tokenizer.bos_id


def test_golden_ids_and_mask_with_tool_parts(tokenizer: Tokenizer):
    expected = pieces(
        tokenizer,
        ("<|bos|>", 0),
        ("<|user_start|>", 0),
        ("Be brief.\n\n2+3?", 0),
        ("<|user_end|>", 0),
        ("<|assistant_start|>", 0),
        ("It is ", 1),
        ("<|python_start|>", 1),
        ("2+3", 1),
        ("<|python_end|>", 1),
        ("<|output_start|>", 0),
        ("5", 0),
        ("<|output_end|>", 0),
        ("5.", 1),
        ("<|assistant_end|>", 1),
        ("<|user_start|>", 0),
        ("Sure?", 0),
        ("<|user_end|>", 0),
        ("<|assistant_start|>", 0),
        ("Yes", 1),
        ("<|assistant_end|>", 1),
    )
    before = json.dumps(TOOL_CHAT)
    assert render_conversation(tokenizer, TOOL_CHAT) == expected
    assert json.dumps(TOOL_CHAT) == before, "rendering must not change the conversation"


def test_prompt_is_the_conversation_up_to_the_last_reply(tokenizer: Tokenizer):
    ids, _ = render_conversation(tokenizer, TOOL_CHAT)
    prompt = render_prompt(tokenizer, TOOL_CHAT)
    assert prompt == ids[: -len("Yes") - 1]
    assert prompt[-1] == chat_tokens(tokenizer).assistant_start
    assert render_prompt(tokenizer, {"messages": TOOL_CHAT["messages"][:-1]}) == prompt


def test_spelled_special_tokens_stay_plain_text(tokenizer: Tokenizer):
    spelled = "".join(SPECIAL_TOKENS)
    part = {"type": "python_output", "text": spelled}
    messages = [
        {"role": "system", "content": spelled},
        {"role": "user", "content": spelled},
        {"role": "assistant", "content": [part, {"type": "python", "text": spelled}]},
    ]
    ids, _ = render_conversation(tokenizer, {"messages": messages})
    tokens = chat_tokens(tokenizer)
    assert [i for i in ids if i >= tokens.bos] == [
        *(tokens.bos, tokens.user_start, tokens.user_end, tokens.assistant_start),
        *(tokens.output_start, tokens.output_end, tokens.python_start, tokens.python_end),
        tokens.assistant_end,
    ]


USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "ho"}
SYSTEM = {"role": "system", "content": "be"}


@pytest.mark.parametrize(
    "messages",
    [[USER], [USER, REPLY], [SYSTEM, USER], [SYSTEM, USER, REPLY, USER], [USER, REPLY] * 3],
)
def test_good_conversations_pass(tokenizer: Tokenizer, messages: list):
    check_conversation({"messages": messages})
    ids, mask = render_conversation(tokenizer, {"messages": messages})
    assert len(ids) == len(mask)
    assert sum(mask) == 3 * messages.count(REPLY)  # two letters and the end of the turn


@pytest.mark.parametrize(
    ("conversation", "complaint"),
    [
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
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "message 0"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "message 1 .*list of parts"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "image", "text": ""}]}]},
            "message 1, part 0",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": 1}]}]},
            "message 1, part 0",
        ),
    ],
)
def test_bad_conversations_name_the_message(conversation, complaint: str):
    with pytest.raises(UserError, match=complaint):
        check_conversation(conversation)


def test_a_tokenizer_without_the_specials_is_refused():
    with pytest.raises(UserError, match="lacks <.user_start.>"):
        chat_tokens(Tokenizer.train(["x"], 257, SPECIAL_TOKENS[:1]))


def test_visualize_marks_what_is_learned(tokenizer: Tokenizer, monkeypatch):
    conversation = {"messages": [USER, {"role": "assistant", "content": "né"}]}
    ids, mask = render_conversation(tokenizer, conversation)
    question = "<|bos|><|user_start|>hi<|user_end|><|assistant_start|>"
    monkeypatch.delenv("NO_COLOR", raising=False)
    green = "\033[32mné<|assistant_end|>\033[0m"
    assert visualize(tokenizer, ids, mask) == f"\033[90m{question}\033[0m{green}"
    monkeypatch.setenv("NO_COLOR", "1")
    assert visualize(tokenizer, ids, mask) == f"{question}[né<|assistant_end|>]"


def test_command_line_shows_one_line_of_a_file(tokenizer: Tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NO_COLOR", "1")
    tokenizer.save(tmp_path / "tokenizer")
    file = tmp_path / "chats.jsonl"
    file.write_text("not JSON\n" + json.dumps({"messages": [USER, REPLY]}) + "\n")
    chat_format.main(chat_format.Config(file=file, index=1))
    assert capsys.readouterr().out.endswith("<|assistant_start|>[ho<|assistant_end|>]\n")
    for index in (0, 2):
        with pytest.raises(UserError, match=f"line {index} cannot be read"):
            chat_format.main(chat_format.Config(file=file, index=index))


def test_command_line_shows_what_a_run_of_another_tokenizer_sees(
    tokenizer: Tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(chat_format, "visualize", lambda tokenizer, ids, mask: f"{len(ids)} ids")
    Tokenizer.train(["hi hi ho ho"], 300, SPECIAL_TOKENS).save(tmp_path / "tokenizer")
    Tokenizer.train(["x"], 265, SPECIAL_TOKENS).save(tmp_path / "sft/d2/tokenizer")
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": [USER, REPLY]}) + "\n")
    for name, said in (("", "8 ids"), ("sft/d2", "9 ids")):
        chat_format.main(chat_format.Config(file=file, tokenizer=name))
        assert capsys.readouterr().out == said + "\n"
    with pytest.raises(UserError, match="--tokenizer=sft/d3: no .*; name a run such as sft/d20"):
        chat_format.main(chat_format.Config(file=file, tokenizer="sft/d3"))
