"""Text <-> token ids, and conversations -> ids and loss mask. Only this file spells special tokens.

Byte-level BPE: rustbpe trains the merges, tiktoken encodes. Ids are the 256 bytes, then one per
merge, then the special tokens, which text never produces, even if it spells one. A lone surrogate
in a Python string becomes the three bytes UTF-8 would give it, so decode(encode(text)) == text for
every str. A tokenizer is one JSON file.

Sources: Sennrich et al. 2016 (arXiv 1508.07909); the split pattern is GPT-4's (`cl100k_base` of
tiktoken), with numbers cut to at most two digits, which takes less of a small vocabulary.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

import tiktoken

from nanochat.common import UserError, write_file

SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
FILE_NAME = "tokenizer.json"
# tiktoken's regex engine backtracks over blanks; 0.1 to 1 million of them overflow its stack.
MAX_BLANKS = 50_000
# What tiktoken cannot encode directly: lone surrogates, very long runs of blanks.
ODD = re.compile(rf"([\ud800-\udfff]+|(?<!\s)\s{{{MAX_BLANKS},}})")


class Tokenizer:
    """One trained vocabulary; thread-safe."""

    def __init__(self, tokens: Sequence[bytes], specials: Sequence[str], pattern: str) -> None:
        """`tokens[i]` are the bytes of id i, in merge order; the ids of `specials` follow."""
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
        """A tokenizer of `vocab_size` ids, specials included; fewer if merges run out."""
        import rustbpe  # here: loading a tokenizer does not need the compiled extension

        smallest = 256 + len(specials)
        if vocab_size < smallest:
            raise UserError(f"--vocab_size={vocab_size} is too small; use at least {smallest}")
        tokens = rustbpe.train(texts, vocab_size - smallest, SPLIT_PATTERN)
        return cls(tokens, specials, SPLIT_PATTERN)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """The tokenizer saved in `folder`; UserError if missing or damaged."""
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
        saved = {
            "pattern": self.pattern,
            "specials": list(self.specials),
            "tokens": [base64.b64encode(token).decode() for token in self._tokens],
        }
        saved["sha256"] = _checksum(saved)
        write_file(folder / FILE_NAME, json.dumps(saved, indent=0) + "\n")

    @property
    def bos_id(self) -> int:
        return len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; special tokens spelled in it are ordinary text."""
        try:
            text.encode()
            if len(text) < MAX_BLANKS:
                return self._encoding.encode_ordinary(text)
        except UnicodeEncodeError:
            pass  # lone surrogates
        ids = []
        for number, piece in enumerate(ODD.split(text)):  # every second one is odd
            if number % 2 == 0:
                ids += self._encoding.encode_ordinary(piece)
            elif piece.isspace():
                for i in range(0, len(piece), MAX_BLANKS):
                    ids += self._encoding.encode_ordinary(piece[i : i + MAX_BLANKS])
            else:
                ids += [self._byte_ids[byte] for byte in piece.encode("utf-8", "surrogatepass")]
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 2) -> list[list[int]]:
        """The ids of each text, encoded in parallel: tiktoken releases the GIL."""
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        data = self.decode_bytes(ids)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The raw bytes of `ids`; a special token gives its name."""
        return self._encoding.decode_bytes(ids)

    def token_bytes(self) -> list[int]:
        return [len(token) for token in self._tokens] + [0] * len(self.specials)


def _checksum(saved: dict) -> str:
    content = [saved["pattern"], saved["specials"], saved["tokens"]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# {"messages": [{"role": ..., "content": ...}, ...]}: an optional system message, then user and
# assistant in turns. Content is a string or, for the assistant, a list of parts {"type": one of
# PART_TYPES, "text": ...}.
Conversation = dict[str, Any]
PART_TYPES = ("text", "python", "python_output")


class ChatTokens(NamedTuple):
    bos: int  # starts every document and conversation
    user_start: int
    user_end: int
    assistant_start: int
    assistant_end: int
    python_start: int  # the assistant calls a tool
    python_end: int
    output_start: int  # the tool answers
    output_end: int


SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in ChatTokens._fields)


def chat_tokens(tokenizer: Tokenizer) -> ChatTokens:
    """The special ids of this tokenizer; UserError if it was trained without them."""
    missing = [name for name in SPECIAL_TOKENS if name not in tokenizer.specials]
    if missing:
        raise UserError(f"the tokenizer lacks {missing[0]}; run `python -m scripts.tok_train`")
    return ChatTokens(*(tokenizer.specials[name] for name in SPECIAL_TOKENS))


def check_conversation(conversation: Conversation) -> None:
    """Raise UserError, naming the bad message, if the conversation cannot be rendered."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise UserError('a conversation needs "messages": a list of at least one user message')
    num_system = 0
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f'message {i} is not an object with "role" and "content"')
        role = message["role"]
        _check_content(i, role, message["content"])
        wanted = ("user", "assistant")[(i - num_system) % 2]
        if i == 0 and role == "system":
            num_system = 1
        elif role != wanted:
            raise UserError(f"message {i} has the role {role!r}; expected {wanted!r}")
    if len(messages) == num_system:
        raise UserError("message 0 is a system message and no user message follows")


def _check_content(i: int, role: object, content: object) -> None:
    if isinstance(content, str):
        return
    if role != "assistant" or not isinstance(content, list):
        allowed = "a string or a list of parts" if role == "assistant" else "a string"
        raise UserError(f"message {i} (role {role!r}): content must be {allowed}")
    for k, part in enumerate(content):
        kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else ("", "")
        if kind not in PART_TYPES or not isinstance(text, str):
            wanted = f'a "type" ({", ".join(PART_TYPES)}) and a string "text"'
            raise UserError(f"message {i}, part {k}: needs {wanted}")


def render_conversation(
    tokenizer: Tokenizer, conversation: Conversation
) -> tuple[list[int], list[int]]:
    """(ids, mask) of a conversation; mask 1 marks what the assistant learns.

        <|bos|> <|user_start|> question <|user_end|>
        <|assistant_start|> text <|python_start|> code <|python_end|>
        <|output_start|> result <|output_end|> text <|assistant_end|> ...

    without the spaces and line breaks. Learned: text, code, the code marks and the end of the turn.
    A system message has no token; it precedes the first question, followed by a blank line. Raises
    UserError if malformed.
    """
    check_conversation(conversation)
    tokens = chat_tokens(tokenizer)
    ids, mask, system = [tokens.bos], [0], ""

    def add(piece: list[int], learned: int) -> None:
        ids.extend(piece)
        mask.extend([learned] * len(piece))

    for message in conversation["messages"]:
        content = message["content"]
        if message["role"] == "system":
            system = f"{content}\n\n"
        elif message["role"] == "user":
            question = tokenizer.encode(system + content)
            add([tokens.user_start] + question + [tokens.user_end], 0)
            system = ""
        else:
            add([tokens.assistant_start], 0)
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                piece = tokenizer.encode(part["text"])
                if part["type"] == "text":
                    add(piece, 1)
                elif part["type"] == "python":
                    add([tokens.python_start] + piece + [tokens.python_end], 1)
                else:
                    add([tokens.output_start] + piece + [tokens.output_end], 0)
            add([tokens.assistant_end], 1)
    return ids, mask


def render_prompt(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """The ids that the model is to continue; a reply at the end is left out."""
    check_conversation(conversation)
    messages = conversation["messages"]
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    ids, _ = render_conversation(tokenizer, {"messages": messages})
    return [*ids, chat_tokens(tokenizer).assistant_start]


def crop_prompt(prompt: list[int], max_len: int) -> list[int]:
    """A chat's prompt; if longer than `max_len`, its <|bos|>, its <|user_start|> and its end."""
    return prompt if len(prompt) <= max_len else prompt[:2] + prompt[len(prompt) - max_len + 2 :]


def render_choices(question: str, choices: Sequence[str]) -> str:
    """A multiple-choice question in the form that all tasks use.

    The letter directly follows its choice, so that smear passes the choice on to it.
    """
    lines = "\n".join(map("- {} {}".format, choices, ascii_uppercase))
    return f"{question}\n{lines}\nAnswer with the letter only."
