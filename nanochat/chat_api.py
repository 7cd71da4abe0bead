"""OpenAI's API: the shapes of requests, errors and answers, for chats and for plain text.

A body is parsed as a `ChatRequest` or a `TextRequest`; `engine_requests` makes one engine request
per prompt and choice. A `Choice` follows the events of one answer, hiding stop strings and keeping
tool calls apart from the text; a `Completion` puts choices into OpenAI's shapes.

Extensions that other clients ignore: a tool call is a delta {"tool": {"expression": ..., "result":
...}}, result null if the calculator had no answer; a whole answer with one has `parts` in its
message, which may be sent back as that turn's content; the chunk with a stream's usage has
`timings`; comments give a waiting request's place in the queue.

Lenient as llama.cpp's server and vLLM are: null is as good as absent, except for `model`; 8.0 is 8;
-1 is no `max_tokens`, no `top_k`, a random `seed`; a limit above the context's room is that room.
But no prompt is ever cut. Unknown fields are ignored, as clients send many; unsupported ones that
would change the answer are refused by name.

Sources: https://platform.openai.com/docs/api-reference/chat and .../completions; from vLLM and
llama.cpp min_p, repetition_penalty, /tokenize, /detokenize.
"""

import json
import re
import secrets
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field
from typing_extensions import TypedDict

from nanochat.common import Count, Natural, Temperature
from nanochat.engine import UTF8, Engine, Event, Reply, Request
from nanochat.sampling import derive_seed
from nanochat.tokenizer import Tokenizer, render_prompt

MAX_BODY_BYTES, MAX_MESSAGES, MAX_PROMPTS, MAX_CHARS = 1 << 20, 500, 500, 32_000
MAX_STOPS, MAX_BIASES, INT64 = 16, 300, 2**63
MAX_SCORES = 200_000  # logprobs of prompts in one answer, which is made on the event loop
# Accepted only if empty.
REFUSED = ("tools", "functions", "audio", "suffix", "grammar", "json_schema", "structured_outputs")
LEAST_LOGPROB = -9999.0  # what OpenAI writes for minus infinity, which JSON lacks


@dataclass
class ServerConfig:
    """The flags of scripts.chat_web that set a server's behaviour."""

    queue: Natural = 64  # answers that may wait per loaded model; more are refused
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
    """The 400 for the most telling of pydantic's errors, as a union reports one per member."""
    # A wrong value rather than a wrong type, and the deepest.
    worst = max(errors, key=lambda error: (not error["type"].endswith("_type"), len(error["loc"])))
    if worst["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {worst['ctx']['error']}")
    if isinstance(worst["input"], bytes):  # without the header, pages of other sites could send it
        return ApiError(400, "the request lacks the header content-type: application/json")
    steps = map(str, worst["loc"][1:])  # the first is "body"
    # Without the names that pydantic gives to a union's members: str, constrained-str, list[...].
    param = ".".join(step for step in steps if re.fullmatch(r"\w+", step) and step != "str")
    return ApiError(400, f"{param or 'body'}: {worst['msg']}", param=param or None)


def read_whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_size(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES} entries")
    return value


Item = TypeVar("Item")
# Else reporting a megabyte of bad items would take seconds.
Quick = Annotated[list[Item], Field(fail_fast=True)]
Whole = Annotated[int, BeforeValidator(read_whole)]
Limit = Annotated[Whole, Field(ge=-1, lt=INT64)]
NumTop = Annotated[Whole, Field(ge=0, le=20)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[Quick[TokenId], Field(min_length=1)]
ModelName = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(max_length=256)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Bias], BeforeValidator(check_size)
]


class Strict(BaseModel):
    """No coercion ("1" is not a number), no NaN."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class ContentPart(TypedDict):  # no model: checking 30,000 of those takes 100 ms, of these 8
    """Text, or a calculator call (python) and its result (python_output)."""

    type: Literal["text", "input_text", "output_text", "python", "python_output"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Quick[ContentPart] | None = None  # only the assistant may be silent

    @property
    def parts(self) -> list[ContentPart]:
        text = self.content or ""
        return [ContentPart(type="text", text=text)] if isinstance(text, str) else text


Messages = Annotated[Quick[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


class AnswerRequest(Strict, extra="allow"):
    """What the bodies that ask for an answer share; null is as good as absent, but for `model`."""

    model: ModelName = Field(default_factory=str)  # absent: the server's default
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Limit | None = None  # 0 or -1: off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        None, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | Annotated[list[Any], Field(max_length=0)] | None = None
    max_tokens: Limit | None = None  # -1: as many as there is room for
    max_completion_tokens: Limit | None = None  # its newer name
    seed: Annotated[Whole, Field(ge=-INT64, lt=INT64)] | None = None  # -1: a random one
    stop: Stop | Annotated[Quick[Stop], Field(max_length=MAX_STOPS)] | None = None
    n: Annotated[Whole, Field(ge=1, lt=INT64)] | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check_supported(self) -> None:
        """Raise ApiError for what this server cannot do and must not ignore."""
        others = self.model_extra or {}
        wrong = [name for name in REFUSED if others.get(name)]
        if (others.get("response_format") or {"type": "text"}) != {"type": "text"}:
            wrong.append("response_format")
        if (others.get("best_of") or 1) not in (1, self.n):
            wrong.append("best_of")
        if wrong:
            text = f"{wrong[0]} is not supported by this server; leave it out"
            raise ApiError(400, text, "unsupported_parameter", wrong[0])


class ChatRequest(AnswerRequest):
    """The body of POST /v1/chat/completions."""

    messages: Messages
    logprobs: bool | None = False
    top_logprobs: NumTop | None = None

    param: ClassVar = "messages"
    default_tokens: ClassVar = None  # the server's
    num_prompt_logprobs: ClassVar = None

    @property
    def num_top(self) -> int | None:
        """How many alternatives to each token are wanted; None: no logprobs at all."""
        return self.top_logprobs or 0 if self.logprobs else None

    def check_supported(self) -> None:
        super().check_supported()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")

    def prompts(self, tokenizer: Tokenizer, kind: str) -> Iterator[list[int]]:
        """The ids of each prompt, for a model of `kind`: chat or base."""
        yield chat_prompt(self.messages, tokenizer, kind)

    def repeated(self, _: list[int]) -> list[int]:
        """What of a prompt the answer begins with."""
        return []


class TextRequest(AnswerRequest):
    """The body of POST /v1/completions.

    A prompt of text follows <|bos|>, which is neither echoed nor scored; ids are taken as they are.
    """

    prompt: (
        str
        | Annotated[Quick[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[Quick[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: bool | None = False  # begin with the prompt
    num_top: NumTop | None = Field(None, alias="logprobs")  # with the echo, of the prompt too

    param: ClassVar = "prompt"
    default_tokens: ClassVar = 16

    @property
    def num_prompt_logprobs(self) -> int | None:
        wanted = self.echo and (self.num_top is not None or self.limit == 0)
        return self.num_top or 0 if wanted else None

    def prompts(self, tokenizer: Tokenizer, _: str) -> Iterator[list[int]]:
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        for prompt in [self.prompt] if one else self.prompt:
            encode: Any = text_prompt if isinstance(prompt, str) else check_ids
            yield encode(prompt, tokenizer, "prompt")

    def repeated(self, prompt: list[int]) -> list[int]:
        is_text = isinstance(self.prompt, str) or isinstance(self.prompt[0], str)
        if not self.echo:
            return []
        return prompt[1:] if is_text else prompt


Body = ChatRequest | TextRequest


def check_length(texts: Iterable[str], param: str) -> None:
    if sum(map(len, texts)) > MAX_CHARS:
        text = f"{param}: more than {MAX_CHARS} characters in all"
        raise ApiError(413, text, "request_too_large", param)


def check_ids(ids: list[int], tokenizer: Tokenizer, param: str) -> list[int]:
    """The ids themselves; ApiError if this tokenizer lacks one."""
    if (largest := max(ids, default=0)) >= tokenizer.vocab_size:
        text = f"{param}: no token {largest}; this model has {tokenizer.vocab_size}"
        raise ApiError(400, text, param=param)
    return ids


def text_prompt(text: str, tokenizer: Tokenizer, param: str) -> list[int]:
    check_length([text], param)
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def chat_prompt(messages: list[Message], tokenizer: Tokenizer, kind: str) -> list[int]:
    """What asks a model of `kind` for its turn; a base model knows plain text only."""
    turns = fold_messages(messages)
    if kind == "chat":
        return render_prompt(tokenizer, {"messages": turns})
    said = (turn["content"] for turn in turns)
    texts = [text if isinstance(text, str) else Reply(parts=text).text for text in said]
    return [tokenizer.bos_id, *tokenizer.encode("\n\n".join(texts))]


def fold_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """User and assistant in turns, whatever the roles; all but the assistant count as the user.

    Raises ApiError unless the user is last.
    """
    for index, message in enumerate(messages):
        if message.content is None and message.role != "assistant":
            param = f"messages.{index}.content"
            raise ApiError(400, f"{param}: only the assistant's may be null", param=param)
    check_length((part["text"] for message in messages for part in message.parts), "messages")
    folded: list[dict[str, Any]] = []
    for role, turn in groupby(messages, lambda m: "assistant" if m.role == "assistant" else "user"):
        between = ContentPart(type="text", text="\n\n")
        said = Reply()  # which joins neighbouring texts, as the tokenizer would read them otherwise
        for part in [part for message in turn for part in (between, *message.parts)][1:]:
            said.add_part("text" if part["type"].endswith("text") else part["type"], part["text"])
        is_text = all(part["type"] == "text" for part in said.parts)
        if not (is_text or role == "assistant"):
            text = "only the assistant's messages may have parts that are not text"
            raise ApiError(400, text, param="messages")
        folded.append({"role": role, "content": said.text if is_text else said.parts})
    if folded[-1]["role"] == "assistant":
        raise ApiError(400, "the last message must not be the assistant's", param="messages")
    return folded


def engine_requests(body: Body, engine: Engine, kind: str, config: ServerConfig) -> list[Request]:
    """One request per choice of each prompt, to a model of `kind`; ApiError if it cannot be served.

    The choices of a prompt differ in their seeds, which do not depend on the other prompts.
    """
    body.check_supported()
    if (body.n or 1) > engine.num_slots:
        raise ApiError(400, f"n is at most {engine.num_slots}, the slots of a model", param="n")
    biases = {int(token): bias for token, bias in dict(body.logit_bias or {}).items()}
    check_ids(list(biases), engine.tokenizer, "logit_bias")
    top_k = config.top_k if body.top_k is None else max(body.top_k, 0)
    like = Request(
        [],
        max_tokens=0,
        temperature=config.temperature if body.temperature is None else body.temperature,
        top_k=min(top_k, engine.tokenizer.vocab_size),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=biases,
        logprobs=body.num_top,
        prompt_logprobs=body.num_prompt_logprobs,
    )
    seed = secrets.randbits(63) if body.seed in (None, -1) else body.seed
    seeds = [derive_seed(seed, index) for index in range(body.n or 1)]
    most, requests = engine.num_slots + config.queue, list[Request]()
    for prompt in body.prompts(engine.tokenizer, kind):
        limit = fit(body, prompt, engine.max_len, config)
        if len(requests) + len(seeds) > most:
            raise ApiError(400, f"at most {most} answers in one request", param=body.param)
        requests += [replace(like, prompt=prompt, max_tokens=limit, seed=each) for each in seeds]
    num_scores = sum(len(each.prompt) for each in requests) * (1 + (like.prompt_logprobs or 0))
    if like.prompt_logprobs is not None and num_scores > MAX_SCORES:
        text = f"{num_scores} logprobs of prompts are more than {MAX_SCORES}; send fewer at once"
        raise ApiError(413, text, "request_too_large", body.param)
    return requests


def fit(body: Body, prompt: list[int], max_len: int, config: ServerConfig) -> int:
    """How many tokens to generate at most; ApiError if there is no room for any."""
    limits = (body.limit, body.default_tokens, config.max_tokens)
    asked = next(limit for limit in limits if limit is not None)
    if asked == 0 and body.num_prompt_logprobs is None:
        raise ApiError(400, "max_tokens may be 0 only with echo", param="max_tokens")
    room = max_len - len(prompt)
    if room < min(abs(asked), 1):
        text = f"{body.param}: {len(prompt)} tokens, but the context is {max_len} with the answer"
        raise ApiError(400, text, "context_length_exceeded", body.param)
    return room if asked == -1 else min(asked, room)


class Entry(NamedTuple):
    """A token of an answer, or of the prompt that it repeats."""

    begin: int  # characters before it
    token: int
    logprobs: list[tuple[int, float]] | None  # its own, then the likeliest; None: not known


class Choice:
    """One answer in progress: `feed` it events, `take` what became visible.

    It ends where a stop string begins. `num_tokens` counts what was sent: the tokens whose text
    begins before that, and the hidden ones before it, such as the tool's.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], echo: Sequence[int]) -> None:
        """`echo` is the end of the prompt that the answer is to begin with."""
        self.tokenizer, self.stops, self.echo = tokenizer, stops, echo
        self.num_tokens = 0  # generated, up to a stop string
        self.num_safe = 0  # up to the newest special one, which no stop string contains
        self.finish: str | None = None  # stop or length, once it has ended
        self.held = ""  # text that may be the beginning of a stop string
        self.num_chars = 0  # of the text released
        self.shown = Reply()  # everything released
        self.deltas: list[dict[str, Any]] = []  # the part of it not yet taken
        self.entries: list[Entry] = []
        self.num_taken = 0  # of the entries

    def feed(self, event: Event) -> None:
        if self.echo and not self.entries:
            self._repeat_prompt(event.prompt)
        if event.token >= 0:
            self.num_tokens += 1
            self._note(event.token, event.logprobs)
            if event.token >= self.tokenizer.bos_id:
                self.num_safe = self.num_tokens
        if event.tool:
            expression, result = event.tool
            self._give_out(len(self.held))
            self.shown.add_tool(expression, result)
            self.deltas.append({"tool": {"expression": expression, "result": result}})
        self._add_text(event.text)
        if event.finish and not self.finish:
            self._give_out(len(self.held))
            self.finish = event.finish

    def take(self) -> tuple[list[dict[str, Any]], list[Entry]]:
        """(deltas, entries of their text) since the last call."""
        deltas, self.deltas = self.deltas, []
        end = len(self.echo) + self.num_tokens if self.finish else self._entries_before()
        begin, self.num_taken = self.num_taken, end
        return deltas, self.entries[begin:end]

    def _repeat_prompt(self, scores: list[list[tuple[int, float]]] | None) -> None:
        known = [None, *(scores or [None] * len(self.echo))]
        decoder = UTF8("replace")
        for token, logprobs in zip(self.echo, known[-len(self.echo) :], strict=True):
            self._note(token, logprobs)
            self.held += decoder.decode(self.tokenizer.decode_bytes([token]))
        self.held += decoder.decode(b"", final=True)
        self._give_out(len(self.held))

    def _note(self, token: int, logprobs: list[tuple[int, float]] | None) -> None:
        shown = logprobs and [(each, max(value, LEAST_LOGPROB)) for each, value in logprobs]
        self.entries.append(Entry(self.num_chars + len(self.held), token, shown))

    def _entries_before(self) -> int:
        """How many tokens begin in the text released."""
        return bisect_left(self.entries, self.num_chars, key=lambda entry: entry.begin)

    def _add_text(self, text: str) -> None:
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self._give_out(min(found))
            self.finish = "stop"
            self.num_tokens = max(self.num_safe, self._entries_before() - len(self.echo))
            return
        longest = len(self.held)
        begun = (stop[:n] for stop in self.stops for n in range(1, min(len(stop), longest + 1)))
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


class Completion:
    """The answer to a ChatRequest, as the events of a stream or whole; a choice per request."""

    prefix, whole_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, model: str, body: Body, tokenizer: Tokenizer, requests: Sequence[Request]
    ) -> None:
        self.tokenizer, self.num_top = tokenizer, body.num_top
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        stops = [stop for stop in stops if stop]
        self.choices = [Choice(tokenizer, stops, body.repeated(each.prompt)) for each in requests]
        self.num_prompt_tokens = sum(len(each.prompt) for each in requests[:: body.n or 1])
        self.field = "delta" if body.stream else "message"
        self.open = list(range(len(self.choices)))  # the choices whose end has not been told
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": self.chunk_name if body.stream else self.whole_name,
            "created": int(time.time()),
            "model": model,
        }
        if body.stream and (body.stream_options or {}).get("include_usage"):
            self.head["usage"] = None

    @property
    def usage(self) -> dict[str, int]:
        """Token counts of the prompts and all choices, as Choice counts them."""
        num_said = sum(choice.num_tokens for choice in self.choices)
        counts = {"prompt_tokens": self.num_prompt_tokens, "completion_tokens": num_said}
        return counts | {"total_tokens": self.num_prompt_tokens + num_said}

    def begin(self) -> bytes:
        return b"".join(self.chunk(i, {"role": "assistant", "content": ""}) for i in self.open)

    def news(self) -> bytes:
        events = b""
        for index in list(self.open):
            choice = self.choices[index]
            deltas, entries = choice.take()
            logprobs = self.logprobs(entries)
            for delta in deltas:
                is_text = "content" in delta
                events += self.chunk(index, delta, logprobs if is_text else None)
                logprobs = None if is_text else logprobs
            if choice.finish:
                events += self.chunk(index, {}, logprobs, choice.finish)
                self.open.remove(index)
        return events

    def end(self, timings: dict[str, float]) -> bytes:
        """The events that close the stream, with the usage if it was requested."""
        last = self.head | {"choices": [], "usage": self.usage, "timings": timings}
        return (sse(last) if "usage" in self.head else b"") + b"data: [DONE]\n\n"

    def whole(self) -> dict[str, Any]:
        choices = []
        for index, choice in enumerate(self.choices):
            said = {"role": "assistant", "content": choice.shown.text, "refusal": None}
            if any(part["type"] != "text" for part in choice.shown.parts):
                said["parts"] = choice.shown.parts
            logprobs = self.logprobs(choice.take()[1])
            about = {"index": index, "finish_reason": choice.finish, "logprobs": logprobs}
            choices.append(about | self.shape(said))
        return self.head | {"choices": choices, "usage": self.usage}

    def chunk(
        self, index: int, delta: dict, logprobs: dict | None = None, finish: str | None = None
    ) -> bytes:
        about = {"index": index, "finish_reason": finish, "logprobs": logprobs}
        return sse(self.head | {"choices": [about | self.shape(delta)]})

    def shape(self, said: dict[str, Any]) -> dict[str, Any]:
        return {self.field: said}

    def logprobs(self, entries: list[Entry]) -> dict[str, Any] | None:
        content = [self._logprob(entry.logprobs) for entry in entries if entry.logprobs]
        return {"content": content, "refusal": None} if content else None

    def _logprob(self, pairs: Sequence[tuple[int, float]]) -> dict[str, Any]:
        entries = []
        for token, logprob in pairs:
            raw = self.tokenizer.decode_bytes([token])
            shown = {"token": raw.decode("utf-8", "replace"), "bytes": list(raw)}
            entries.append(shown | {"logprob": logprob})
        return entries[0] | {"top_logprobs": entries[1:]}


class TextCompletion(Completion):
    """The answer to a TextRequest, in which calls of the calculator are not shown.

    With logprobs every token has its entry, so that their number is known to who counts them; it is
    null for the first of a prompt given as ids, and for special tokens and the tool's.
    """

    prefix, whole_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def begin(self) -> bytes:
        return b""

    def shape(self, said: dict[str, Any]) -> dict[str, Any]:
        return {"text": said.get("content", "")}

    def logprobs(self, entries: list[Entry]) -> dict[str, Any] | None:
        if self.num_top is None or not entries:
            return None
        name = cache(partial(spell, self.tokenizer))
        known = [entry.logprobs for entry in entries]
        return {
            "tokens": [name(entry.token) for entry in entries],
            "token_logprobs": [pairs and pairs[0][1] for pairs in known],
            "top_logprobs": [pairs and {name(id): value for id, value in pairs} for pairs in known],
            "text_offset": [entry.begin for entry in entries],
        }


def spell(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, or bytes:\\xe2 as OpenAI has it; never that of another token."""
    raw = tokenizer.decode_bytes([token])
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class TokenizeRequest(Strict, extra="allow"):
    """The body of POST /tokenize: content (llama.cpp), prompt (vLLM) or a chat's messages."""

    model: ModelName = Field(default_factory=str)
    content: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    # Begin with <|bos|>; by default a prompt does, as in a completion, and content does not.
    add_special: bool | None = Field(
        None, validation_alias=AliasChoices("add_special", "add_special_tokens")
    )
    with_pieces: bool | None = False

    def answer(self, engine: Engine, kind: str) -> dict[str, Any]:
        """{tokens, count, max_model_len}; a token is an id, with pieces {id, piece}."""
        tokenizer = engine.tokenizer
        if [self.content, self.prompt, self.messages].count(None) != 2:
            raise ApiError(400, "give one of prompt, content and messages", param="prompt")
        if self.messages:
            ids = chat_prompt(self.messages, tokenizer, kind)
        else:
            ids = text_prompt(self.content or self.prompt or "", tokenizer, "prompt")
            special = self.content is None if self.add_special is None else self.add_special
            ids = ids if special else ids[1:]
        tokens = ids
        if self.with_pieces:
            tokens = [{"id": token, "piece": spell(tokenizer, token)} for token in ids]
        return {"tokens": tokens, "count": len(ids), "max_model_len": engine.max_len}


class DetokenizeRequest(Strict, extra="allow"):
    """The body of POST /detokenize."""

    model: ModelName = Field(default_factory=str)
    tokens: Annotated[Quick[TokenId], Field(max_length=MAX_CHARS)]

    def answer(self, engine: Engine, kind: str) -> dict[str, Any]:
        """The text, under vLLM's name for it and llama.cpp's."""
        ids = check_ids(self.tokens, engine.tokenizer, "tokens")
        text = engine.tokenizer.decode_bytes(ids).decode("utf-8", "replace")
        return {"prompt": text, "content": text}


Conversion = TokenizeRequest | DetokenizeRequest


def sse(data: dict[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"
