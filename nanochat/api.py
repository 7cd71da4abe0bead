"""What a request to OpenAI's chat API may say, and how an error is told.

`ChatRequest` is what a stranger's JSON is checked against; what it leaves open the server's `Settings` say, and
`engine_requests` makes of it one engine request per choice.

What would surprise:
- System and developer messages count as the user's words and join the turn after them, as chat_format does
  with the one at the start; turns of one role in a row become one. So any order of roles has a meaning.
- Unknown fields are ignored, as clients send many; but what would change the answer and is not supported
  (tools, penalties, other response formats) is refused by name.
- Nothing is ever cut to fit the context: prompt and max_tokens together must fit.

Source: https://platform.openai.com/docs/api-reference/chat
"""

import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from nanochat.chat_format import render_prompt
from nanochat.flight import Request
from nanochat.sampling import derive_seed
from nanochat.tokenizer import Tokenizer

MAX_BODY_BYTES, MAX_MESSAGES, MAX_CHARS = 1 << 20, 500, 32_000
INT64 = 2**63
REFUSED = ("tools", "functions", "logit_bias", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class Settings:
    """How a server behaves; `scripts/chat_web.py` makes it of the command line."""

    model: str = "nanochat"  # its id
    temperature: float = 0.6  # where a request does not say
    top_k: int = 50  # likewise
    max_tokens: int = 512  # likewise, as far as the context has room
    max_waiting: int = 64  # requests that may wait for a slot of one engine
    api_key: str = ""  # empty: anybody may come
    cors_origin: str = ""  # a web page elsewhere that may call
    host_names: frozenset[str] = frozenset()  # the Host headers taken; empty: any
    log_conversations: bool = False
    answer_seconds: float = 600.0  # queue included; what OpenAI's client waits
    stalled_seconds: float = 60.0  # that a client may leave a stream unread


class ApiError(Exception):
    """What the client is told, in OpenAI's shape; after `retry_after` seconds it may come again."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        usual = "server_error" if status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, usual)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def validation_error(errors: Sequence[Any]) -> ApiError:
    """The 400 for what pydantic found: the deepest error, as a union reports one for each of its members."""
    worst = max(errors, key=lambda error: len(error["loc"]))
    if worst["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {worst['ctx']['error']}")
    if isinstance(worst["input"], bytes):  # without the header, pages of other sites could send it
        return ApiError(400, "the request lacks the header content-type: application/json")
    steps = map(str, worst["loc"][1:])  # the first is "body"
    # Neither of the names that pydantic gives to the members of a union: str, constrained-str, list[...].
    param = ".".join(step for step in steps if re.fullmatch(r"\w+", step) and step != "str")
    return ApiError(400, f"{param or 'body'}: {worst['msg']}", param=param or None)


Item = TypeVar("Item")
# Else a megabyte of bad items would take seconds to complain of.
Quick = Annotated[list[Item], Field(fail_fast=True)]


class Strict(BaseModel):
    """No coercion ("1" is no number), no NaN; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Part(TypedDict):  # no model: checking 30,000 of those takes 100 ms, of these 8
    """Text, or what a reply asked the calculator (python) and was told (python_output); the latter are ours alone."""

    type: Literal["text", "python", "python_output"]
    text: str


class Message(Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Quick[Part]

    @property
    def parts(self) -> list[Part]:
        """The content as parts."""
        text = self.content
        return [Part(type="text", text=text)] if isinstance(text, str) else text


Stop = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, lt=INT64)]


class ChatRequest(Strict):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[Quick[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=INT64)] | None = None  # not OpenAI's; 0: off
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None  # the newer name of max_tokens
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: Count | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    # Taken as long as they ask for nothing.
    tools: Any = None
    functions: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    response_format: Any = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def stream_usage(self) -> bool:
        """True where a stream is to end with its usage."""
        return bool(self.stream and (self.stream_options or {}).get("include_usage"))

    def check_supported(self, num_slots: int) -> None:
        """Raises ApiError for what this server cannot do and must not ignore."""
        wrong = [name for name in REFUSED if getattr(self, name)]
        if self.response_format not in (None, {"type": "text"}):
            wrong.append("response_format")
        if wrong:
            text = f"{wrong[0]} is not supported by this server; leave it out"
            raise ApiError(400, text, "unsupported_parameter", wrong[0])
        if (self.n or 1) > num_slots:
            raise ApiError(400, f"n is at most {num_slots}, the slots of this server", param="n")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")


def fold_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """User and assistant in turns, as chat_format wants them. Raises ApiError unless the user is the last."""
    if sum(len(part["text"]) for message in messages for part in message.parts) > MAX_CHARS:
        text = f"the messages have more than {MAX_CHARS} characters in all"
        raise ApiError(413, text, "request_too_large", "messages")
    folded = []
    for role, turn in groupby(messages, lambda m: "assistant" if m.role == "assistant" else "user"):
        between = Part(type="text", text="\n\n")
        parts = [part for message in turn for part in (between, *message.parts)][1:]
        said = join_text(parts)
        if [part["type"] for part in said] in ([], ["text"]):
            folded.append({"role": role, "content": "".join(part["text"] for part in said)})
        elif role == "assistant":
            folded.append({"role": role, "content": said})
        else:
            text = "only the assistant's messages may have parts that are no text"
            raise ApiError(400, text, param="messages")
    if folded[-1]["role"] == "assistant":
        raise ApiError(400, "the last message must not be the assistant's", param="messages")
    return folded


def join_text(parts: Iterable[Part]) -> list[Part]:
    """`parts` with neighbouring texts made one, which the tokenizer would not read alike apart."""
    joined: list[Part] = []
    for is_text, run in groupby(parts, lambda part: part["type"] == "text"):
        own = list(run)
        if is_text:
            own = [Part(type="text", text="".join(part["text"] for part in own))]
        joined += own
    return joined


def engine_requests(
    body: ChatRequest, tokenizer: Tokenizer, max_len: int, settings: Settings
) -> list[Request]:
    """One request per choice, each with a seed of its own. Raises ApiError when it cannot fit the context."""
    prompt = render_prompt(tokenizer, {"messages": fold_messages(body.messages)})
    asked = body.max_completion_tokens or body.max_tokens
    room = max_len - len(prompt)
    if room < (asked or 1):
        text = (
            f"this model's context is {max_len} tokens; the messages have {len(prompt)}, "
            f"and {asked or 1} were to be generated: shorten the messages or lower max_tokens"
        )
        raise ApiError(400, text, "context_length_exceeded", "messages")
    seed = secrets.randbits(63) if body.seed is None else body.seed
    top_k = settings.top_k if body.top_k is None else body.top_k
    return [
        Request(
            prompt,
            max_tokens=asked or min(settings.max_tokens, room),
            temperature=settings.temperature if body.temperature is None else body.temperature,
            top_k=min(top_k, tokenizer.vocab_size),
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=derive_seed(seed, index),
            logprobs=max(1, body.top_logprobs or 0) if body.logprobs else 0,
        )
        for index in range(body.n or 1)
    ]
