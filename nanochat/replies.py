"""The tokens of a reply -> its text as it comes, and the parts of a message.

Only whole code points are given out: a character split over tokens waits for its last byte.
"""

import codecs
from collections.abc import Iterable, Sequence

from nanochat.chat_format import chat_tokens
from nanochat.engine import Engine
from nanochat.flight import Request
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer


class ReplyReader:
    """Turns the tokens of one reply into text as they come, and into the parts of a message."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        chat = chat_tokens(tokenizer)
        # Special id -> the kind of what follows it.
        self.kinds = dict.fromkeys(tokenizer.specials.values(), "text")
        self.kinds |= {chat.python_start: "python", chat.output_start: "python_output"}
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.kind = "text"
        self.parts: list[dict[str, str]] = []
        self.new_part = True

    def feed(self, token: int) -> list[tuple[str, str]]:
        """The (kind, text) that `token` completes; kind is text, python or python_output."""
        if token not in self.kinds:
            return self._emit(self.decoder.decode(self.tokenizer.decode_bytes([token])))
        rest = self.close()
        self.kind, self.new_part = self.kinds[token], True
        return rest

    def close(self) -> list[tuple[str, str]]:
        """What an unfinished character leaves behind: a replacement character, if anything."""
        rest = self._emit(self.decoder.decode(b"", final=True))
        self.decoder.reset()
        return rest

    def _emit(self, text: str) -> list[tuple[str, str]]:
        if not text:
            return []
        if self.new_part:
            self.parts.append({"type": self.kind, "text": ""})
            self.new_part = False
        self.parts[-1]["text"] += text
        return [(self.kind, text)]


def reply_parts(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[dict[str, str]]:
    """The parts of an assistant message from its tokens; special tokens end up as the kinds of parts."""
    reader = ReplyReader(tokenizer)
    for token in tokens:
        reader.feed(token)
    reader.close()
    return reader.parts


def sample_texts(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], max_tokens: int = 32
) -> list[str]:
    """How a base model goes on, greedily, after each prompt; the prompt included."""
    requests = [
        Request([tokenizer.bos_id, *tokenizer.encode(prompt)], max_tokens, temperature=0.0)
        for prompt in prompts
    ]
    # As long as they need it: prompts may be longer than the context of a very small model.
    max_len = max(len(request.prompt) for request in requests) + max_tokens
    engine = Engine(model, tokenizer, len(prompts), max_len, prefix_reuse=False)
    said = {request: tokens for request, tokens, _ in engine.complete(requests)}
    return [
        prompt + "".join(part["text"] for part in reply_parts(tokenizer, said[request]))
        for prompt, request in zip(prompts, requests, strict=True)
    ]
