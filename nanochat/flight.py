"""A request and what becomes of it: its tokens one by one, its tool calls, its end. No tensors.

When the model closes a tool call, the calculator's answer is forced as the next tokens; they have mask 0 and count
as generated. Where the calculator has no answer nothing is forced, and the model goes on by itself.
"""

from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from nanochat.calculator import calculate
from nanochat.chat_format import ChatTokens
from nanochat.slots import Slot
from nanochat.tokenizer import Tokenizer


@dataclass(eq=False)
class Request:
    """What to continue and how; compared by identity, so that equal requests stay apart."""

    prompt: list[int]
    max_tokens: int  # generated tokens, what the tool forces included
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    seed: int = 0
    stop: AbstractSet[int] = frozenset()  # ids; <|assistant_end|> and <|bos|> always stop
    logprobs: int = 0  # 0: none; n: of each sampled token and of the n likeliest there


class Event(NamedTuple):
    """One more token of a request."""

    request: Request
    token: int
    mask: int  # 0 where the tool forced the token
    logprobs: list[tuple[int, float]] | None  # (id, logprob) of the token, then of the likeliest
    finish: Literal["stop", "length"] | None  # why this is the last one, if it is


@dataclass(eq=False)
class Flight:
    """A request in its slot: what it has generated so far, and whether it is inside a tool call."""

    request: Request
    slot: Slot
    num_generated: int = 0
    last: int = 0  # the newest token, next to be fed to the model
    forced: deque[int] = field(default_factory=deque)  # what the tool still has to say
    expression: list[int] | None = None  # tokens of an open tool call

    def take(
        self, sampled: Sequence[Sequence[float]], tokenizer: Tokenizer, chat: ChatTokens
    ) -> Event:
        """The next token: what the tool still has to say, else what was sampled.

        `sampled` is (id,), or (id, logprob) followed by those of at least `request.logprobs` likely tokens.
        """
        request, mask, logprobs = self.request, int(not self.forced), None
        self.last = int(sampled[0][0]) if mask else self.forced.popleft()
        self.num_generated += 1
        finish = "length" if self.num_generated >= request.max_tokens else None
        if mask:
            self._watch_tool(tokenizer, chat)
            if self.last in request.stop or self.last in (chat.assistant_end, chat.bos):
                finish = "stop"
            if request.logprobs:
                logprobs = [(int(id), value) for id, value in sampled[: 1 + request.logprobs]]
        return Event(request, self.last, mask, logprobs, finish)

    def _watch_tool(self, tokenizer: Tokenizer, chat: ChatTokens) -> None:
        """Follow the tool call of which the newest token may be a part; answer it when it ends."""
        if self.last == chat.python_start:
            self.expression = []
        elif self.expression is not None and self.last == chat.python_end:
            result = calculate(tokenizer.decode(self.expression))
            self.expression = None
            if result is not None:
                said = tokenizer.encode(result)
                self.forced.extend([chat.output_start, *said, chat.output_end])
        elif self.expression is not None:
            self.expression.append(self.last)
