"""OpenAI's chat API: the shapes of requests, errors and answers.

A body is parsed as a `ChatRequest`; `engine_requests` makes one engine request per choice. A
`Choice` follows the events of one answer, hiding stop strings and keeping tool calls apart from the
text; `Completion` puts choices into OpenAI's shapes.

Extensions that other clients ignore: a tool call is a delta {"tool": {"expression": ..., "result":
...}}, result null if the calculator had no answer; a whole answer with one has `parts` in its
message, which may be sent back as that turn's content; the chunk with a stream's usage has
`timings`; comments give a waiting request's place in the queue.

Unknown fields are ignored, as clients send many; unsupported ones that would change the answer are
refused by name. Nothing is ever cut to fit the context.

Source: https://platform.openai.com/docs/api-reference/chat
"""

import json
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from nanochat.common import Count, Natural, Temperature
from nanochat.engine import Event, Reply, Request
from nanochat.sampling import derive_seed
from nanochat.tokenizer import Tokenizer, render_prompt

MAX_BODY_BYTES, MAX_MESSAGES, MAX_CHARS = 1 << 20, 500, 32_000
INT64 = 2**63
# Accepted only if empty.
REFUSED = ("tools", "functions", "logit_bias", "presence_penalty", "frequency_penalty")


@dataclass
class ServerConfig:
    """The flags of scripts.chat_web that set a server's behaviour."""

    queue: Natural = 64  # requests that may wait per GPU; more are refused
    temperature: Temperature = 0.6  # default for requests
    top_k: Natural = 50  # default for requests; 0: off
    max_tokens: Count = 512  # default for requests, if the context has room


class ApiError(Exception):
    """An error in OpenAI's shape; the client may retry after `retry_after` seconds."""

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
    """The 400 for pydantic's errors: the deepest one, as a union reports one per member."""
    worst = max(errors, key=lambda error: len(error["loc"]))
    if worst["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {worst['ctx']['error']}")
    if isinstance(worst["input"], bytes):  # without the header, pages of other sites could send it
        return ApiError(400, "the request lacks the header content-type: application/json")
    steps = map(str, worst["loc"][1:])  # the first is "body"
    # Without the names that pydantic gives to a union's members: str, constrained-str, list[...].
    param = ".".join(step for step in steps if re.fullmatch(r"\w+", step) and step != "str")
    return ApiError(400, f"{param or 'body'}: {worst['msg']}", param=param or None)


Item = TypeVar("Item")
# Else reporting a megabyte of bad items would take seconds.
Quick = Annotated[list[Item], Field(fail_fast=True)]


class Strict(BaseModel):
    """No coercion ("1" is not a number), no NaN."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ContentPart(TypedDict):  # no model: checking 30,000 of those takes 100 ms, of these 8
    """Text, or a calculator call (python) and its result (python_output)."""

    type: Literal["text", "python", "python_output"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Quick[ContentPart]

    @property
    def parts(self) -> list[ContentPart]:
        text = self.content
        return [ContentPart(type="text", text=text)] if isinstance(text, str) else text


Stop = Annotated[str, Field(min_length=1, max_length=256)]
Positive = Annotated[int, Field(ge=1, lt=INT64)]


class ChatRequest(Strict, extra="allow"):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[Quick[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=INT64)] | None = None  # not OpenAI's; 0: off
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None  # the newer name of max_tokens
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: Positive | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def check_supported(self, num_slots: int) -> None:
        """Raise ApiError for what this server cannot do and must not ignore."""
        others = self.model_extra or {}
        wrong = [name for name in REFUSED if others.get(name)]
        if others.get("response_format") not in (None, {"type": "text"}):
            wrong.append("response_format")
        if wrong:
            text = f"{wrong[0]} is not supported by this server; leave it out"
            raise ApiError(400, text, "unsupported_parameter", wrong[0])
        if (self.n or 1) > num_slots:
            raise ApiError(400, f"n is at most {num_slots}, the slots of this server", param="n")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")


def fold_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """User and assistant in turns, whatever the roles; system and developer count as the user.

    Raises ApiError unless the user is last.
    """
    if sum(len(part["text"]) for message in messages for part in message.parts) > MAX_CHARS:
        text = f"the messages have more than {MAX_CHARS} characters in all"
        raise ApiError(413, text, "request_too_large", "messages")
    folded: list[dict[str, Any]] = []
    for role, turn in groupby(messages, lambda m: "assistant" if m.role == "assistant" else "user"):
        between = ContentPart(type="text", text="\n\n")
        said = Reply()  # which joins neighbouring texts, as the tokenizer would read them otherwise
        for part in [part for message in turn for part in (between, *message.parts)][1:]:
            said.add_part(part["type"], part["text"])
        if all(part["type"] == "text" for part in said.parts):
            folded.append({"role": role, "content": said.text})
        elif role == "assistant":
            folded.append({"role": role, "content": said.parts})
        else:
            text = "only the assistant's messages may have parts that are not text"
            raise ApiError(400, text, param="messages")
    if folded[-1]["role"] == "assistant":
        raise ApiError(400, "the last message must not be the assistant's", param="messages")
    return folded


def engine_requests(
    body: ChatRequest, tokenizer: Tokenizer, max_len: int, config: ServerConfig
) -> list[Request]:
    """One request per choice, each with its seed; ApiError if it cannot fit."""
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
    top_k = config.top_k if body.top_k is None else body.top_k
    return [
        Request(
            prompt,
            max_tokens=asked or min(config.max_tokens, room),
            temperature=config.temperature if body.temperature is None else body.temperature,
            top_k=min(top_k, tokenizer.vocab_size),
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=derive_seed(seed, index),
            logprobs=max(1, body.top_logprobs or 0) if body.logprobs else 0,
        )
        for index in range(body.n or 1)
    ]


LEAST_LOGPROB = -9999.0  # what OpenAI writes for minus infinity, which JSON lacks


class Choice:
    """One answer in progress: `feed` it events, `take` what became visible."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), top_logprobs: int = 0
    ) -> None:
        self.tokenizer, self.stops, self.top_logprobs = tokenizer, stops, top_logprobs
        self.num_tokens = 0
        self.finish: str | None = None  # stop or length, once it has ended
        self.held = ""  # text that may be the beginning of a stop string
        self.num_chars = 0  # of the text released
        self.shown = Reply()  # everything released
        self.deltas: list[dict[str, Any]] = []  # the part of it not yet taken
        self.logprobs: list[tuple[int, dict[str, Any]]] = []  # (where the text begins, entry)

    def feed(self, event: Event) -> None:
        self.num_tokens += 1
        if event.logprobs:
            begin = self.num_chars + len(self.held)
            self.logprobs.append((begin, self._logprob(event.logprobs)))
        if event.tool:
            expression, result = event.tool
            self._give_out(len(self.held))
            self.shown.add_tool(expression, result)
            self.deltas.append({"tool": {"expression": expression, "result": result}})
        self._add_text(event.text)
        if event.finish and not self.finish:
            self._give_out(len(self.held))
            self.finish = event.finish

    def take(self) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """(deltas, logprobs of their text) since the last call."""
        deltas, self.deltas = self.deltas, []
        said = [entry for begin, entry in self.logprobs if begin < self.num_chars]
        del self.logprobs[: len(said)]
        return deltas, {"content": said, "refusal": None} if said else None

    def _add_text(self, text: str) -> None:
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self._give_out(min(found))
            self.finish = "stop"
            return
        begun = (stop[:length] for stop in self.stops for length in range(1, len(stop)))
        num_begun = max((len(part) for part in begun if self.held.endswith(part)), default=0)
        self._give_out(len(self.held) - num_begun)

    def _give_out(self, num_chars: int) -> None:
        text, self.held = self.held[:num_chars], self.held[num_chars:]
        self.num_chars += num_chars
        self.shown.add_part("text", text)
        if text and self.deltas and "content" in self.deltas[-1]:
            self.deltas[-1]["content"] += text
        elif text:
            self.deltas.append({"content": text})

    def _logprob(self, pairs: Sequence[tuple[int, float]]) -> dict[str, Any]:
        """OpenAI's entry for a token, from (id, logprob) pairs: its own, then the likeliest."""
        entries = []
        for token, logprob in pairs:
            raw = self.tokenizer.decode_bytes([token])
            shown = {"token": raw.decode("utf-8", "replace"), "bytes": list(raw)}
            entries.append(shown | {"logprob": max(logprob, LEAST_LOGPROB)})
        return entries[0] | {"top_logprobs": entries[1 : 1 + self.top_logprobs]}


class Completion:
    """The answer to one request, as the events of a stream or whole."""

    def __init__(
        self, model: str, body: ChatRequest, tokenizer: Tokenizer, num_prompt_tokens: int
    ) -> None:
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        num_top, num_choices = body.top_logprobs or 0, body.n or 1
        self.choices = [Choice(tokenizer, stops, num_top) for _ in range(num_choices)]
        self.num_prompt_tokens = num_prompt_tokens
        self.open = list(range(len(self.choices)))  # the choices whose end has not been told
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        if body.stream and (body.stream_options or {}).get("include_usage"):
            self.head["usage"] = None

    @property
    def usage(self) -> dict[str, int]:
        """Token counts of the prompt and all choices, forced and hidden ones included."""
        num_said = sum(choice.num_tokens for choice in self.choices)
        counts = {"prompt_tokens": self.num_prompt_tokens, "completion_tokens": num_said}
        return counts | {"total_tokens": self.num_prompt_tokens + num_said}

    def begin(self) -> bytes:
        return b"".join(self._chunk(i, {"role": "assistant", "content": ""}) for i in self.open)

    def news(self) -> bytes:
        events = b""
        for index in list(self.open):
            choice = self.choices[index]
            deltas, logprobs = choice.take()
            for delta in deltas:
                is_text = "content" in delta
                events += self._chunk(index, delta, logprobs if is_text else None)
                logprobs = None if is_text else logprobs
            if choice.finish:
                events += self._chunk(index, {}, finish=choice.finish)
                self.open.remove(index)
        return events

    def end(self, timings: dict[str, float]) -> bytes:
        """The events that close the stream, with the usage if it was requested."""
        last = self.head | {"choices": [], "usage": self.usage, "timings": timings}
        return (sse(last) if "usage" in self.head else b"") + b"data: [DONE]\n\n"

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, choice in enumerate(self.choices):
            parts = choice.shown.parts
            message = {"role": "assistant", "content": choice.shown.text, "refusal": None}
            if any(part["type"] != "text" for part in parts):
                message |= {"parts": parts}
            about = {"index": index, "finish_reason": choice.finish, "logprobs": choice.take()[1]}
            choices.append(about | {"message": message})
        return self.head | {"object": "chat.completion", "choices": choices, "usage": self.usage}

    def _chunk(
        self, index: int, delta: dict, logprobs: dict | None = None, finish: str | None = None
    ) -> bytes:
        about = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return sse(self.head | {"choices": [about]})


def sse(data: dict[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"
