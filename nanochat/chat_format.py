"""A conversation becomes token ids and a loss mask; the only file that spells a special token.

A conversation is {"messages": [{"role": ..., "content": ...}, ...]}: an optional system message, then user
and assistant in turns. Content is a string; an assistant's may be a list of parts, each
{"type": "text" | "python" | "python_output", "text": ...}. It is rendered as

    <|bos|> <|user_start|> question <|user_end|>
    <|assistant_start|> text <|python_start|> code <|python_end|> <|output_start|> result <|output_end|>
    text <|assistant_end|> ...

without the spaces and line breaks shown here. The mask is 1 on what the assistant itself says (text, code,
the marks of code, the end of its turn) and 0 on everything else: questions, and what the tool printed.

The choice that would surprise: there is no system token; a system message is put before the first
question, two line breaks between them, as a small model learns one role less.

`python -m nanochat.chat_format --file=chats.jsonl --index=3` shows a conversation as the model sees it.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from nanochat.flags import Natural, run_script
from nanochat.paths import UserError, tokenizer_dir
from nanochat.runtime import say
from nanochat.tokenizer import Tokenizer

SPECIAL_TOKENS = (
    "<|bos|>",  # starts every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the tool
    "<|python_end|>",
    "<|output_start|>",  # the tool answers
    "<|output_end|>",
)
PART_TYPES = ("text", "python", "python_output")
GREEN, GREY, RESET = "\033[32m", "\033[90m", "\033[0m"

Conversation = dict[str, Any]


@dataclass(frozen=True)
class ChatTokens:
    """The ids of the special tokens, in the order of SPECIAL_TOKENS."""

    bos: int
    user_start: int
    user_end: int
    assistant_start: int
    assistant_end: int
    python_start: int
    python_end: int
    output_start: int
    output_end: int


def chat_tokens(tokenizer: Tokenizer) -> ChatTokens:
    """The special ids of this tokenizer. Raises UserError when it was trained without them."""
    missing = [name for name in SPECIAL_TOKENS if name not in tokenizer.specials]
    if missing:
        raise UserError(f"the tokenizer lacks {missing[0]}; run `python -m scripts.tok_train`")
    return ChatTokens(*(tokenizer.specials[name] for name in SPECIAL_TOKENS))


def check_conversation(conversation: Conversation) -> None:
    """Raises UserError, naming the message that is wrong, unless the conversation can be rendered."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError('a conversation needs "messages": a list of at least one user message')
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f'message {i} is not an object with "role" and "content"')
        _check_content(i, message["role"], message["content"])
    roles = [message["role"] for message in messages]
    num_system = int(roles[0] == "system")
    for i, role in enumerate(roles[num_system:]):
        wanted = ("user", "assistant")[i % 2]
        if role != wanted:
            raise UserError(f"message {i + num_system} has the role {role!r}; expected {wanted!r}")
    if len(roles) == num_system:
        raise UserError("message 0 is a system message and no user message follows")


def _check_content(i: int, role: object, content: object) -> None:
    if isinstance(content, str):
        return
    if role != "assistant" or not isinstance(content, list):
        allowed = "a string or a list of parts" if role == "assistant" else "a string"
        raise UserError(f"message {i} (role {role!r}): content must be {allowed}")
    for k, part in enumerate(content):
        if (
            not isinstance(part, dict)
            or part.get("type") not in PART_TYPES
            or not isinstance(part.get("text"), str)
        ):
            raise UserError(
                f'message {i}, part {k}: needs a "type" ({", ".join(PART_TYPES)}) and a string "text"'
            )


def _fold_system(messages: list[dict]) -> list[dict]:
    """The messages without a system message: its text goes before the first question."""
    if messages[0]["role"] != "system":
        return messages
    system, first, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def _render_reply(
    tokenizer: Tokenizer, tokens: ChatTokens, content: str | list[dict]
) -> tuple[list[int], list[int]]:
    """Ids and mask of one assistant turn, its start and end included."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    ids, mask = [tokens.assistant_start], [0]
    for part in parts:
        piece = tokenizer.encode(part["text"])
        if part["type"] == "python":
            piece = [tokens.python_start, *piece, tokens.python_end]
        elif part["type"] == "python_output":
            piece = [tokens.output_start, *piece, tokens.output_end]
        ids += piece
        mask += [int(part["type"] != "python_output")] * len(piece)
    return [*ids, tokens.assistant_end], [*mask, 1]


def render_conversation(
    tokenizer: Tokenizer, conversation: Conversation
) -> tuple[list[int], list[int]]:
    """(ids, mask) of the whole conversation; mask 1 marks the tokens that the assistant is to learn.

    Raises UserError when the conversation is malformed.
    """
    check_conversation(conversation)
    tokens = chat_tokens(tokenizer)
    ids, mask = [tokens.bos], [0]
    for message in _fold_system(conversation["messages"]):
        if message["role"] == "user":
            piece = [tokens.user_start, *tokenizer.encode(message["content"]), tokens.user_end]
            piece_mask = [0] * len(piece)
        else:
            piece, piece_mask = _render_reply(tokenizer, tokens, message["content"])
        ids += piece
        mask += piece_mask
    return ids, mask


def render_prompt(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """The ids after which the model is to answer: a trailing reply is dropped, a new one is opened."""
    check_conversation(conversation)
    messages = conversation["messages"]
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    ids, _ = render_conversation(tokenizer, {"messages": messages})
    return [*ids, chat_tokens(tokenizer).assistant_start]


def visualize(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[int]) -> str:
    """The decoded conversation, green where the mask is 1; with NO_COLOR set, in square brackets there."""
    marks = ("[", "]", "", "") if os.environ.get("NO_COLOR") else (GREEN, RESET, GREY, RESET)
    text = ""
    for learned, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        start, end = marks[:2] if learned else marks[2:]
        text += start + tokenizer.decode([id for id, _ in run]) + end
    return text


@dataclass
class Config:
    """Show one conversation of a file with its loss mask."""

    file: Path  # .jsonl, one conversation a line
    index: Natural = 0  # which line, from 0


def main(cfg: Config) -> None:
    """Print the conversation as `visualize` renders it."""
    tokenizer = Tokenizer.load(tokenizer_dir())
    try:
        lines = cfg.file.read_text().splitlines()
        conversation = json.loads(lines[cfg.index])
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"--file={cfg.file}: line {cfg.index} cannot be read ({error})") from error
    say(visualize(tokenizer, *render_conversation(tokenizer, conversation)))


if __name__ == "__main__":
    run_script(main, Config)
