"""The tokens of an answer -> what a client of OpenAI's chat API sees, whole or in a stream of chunks.

`Choice` follows one answer: whole characters only, nothing of a stop string, tool calls apart from the text.
`Completion` puts one or several of them into OpenAI's shapes, and `Answer` sends them as the job's events come.

Added to OpenAI's shapes, and passed over by other clients: a tool call is a delta {"tool": {"expression": ...,
"result": ...}}, result null where the calculator had no answer, and where a whole answer has one, its message holds
`parts` too, which may come back as the content of that turn; the chunk with a stream's usage holds `timings`; while a
request waits, comments tell its place in the queue.

What would surprise: text that may turn out to be the beginning of a stop string is held back. So a chunk may hold
several tokens or none, and a token's logprob comes with its text.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from nanochat.api import ApiError, ChatRequest, Part, Settings
from nanochat.flight import Event
from nanochat.replica import Job, Replica, log
from nanochat.replies import ReplyReader
from nanochat.tokenizer import Tokenizer

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),
]
PING_SECONDS, QUEUE_SECONDS = 15.0, 1.0  # a sign of life on a silent stream; a look at the queue
LEAST_LOGPROB = -9999.0  # what OpenAI writes for minus infinity, which JSON lacks


class Choice:
    """One answer in the making: `feed` it events, `take` what they made visible."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), top_logprobs: int = 0
    ) -> None:
        self.tokenizer, self.stops, self.top_logprobs = tokenizer, stops, top_logprobs
        self.reader = ReplyReader(tokenizer)
        self.num_tokens = 0
        self.finish: str | None = None  # stop or length, once it has ended
        self.held = ""  # text that may be the beginning of a stop string
        self.num_chars = 0  # of the text given out
        self.num_parts = 0  # of the reader's parts, seen through for tool calls
        self.deltas: list[dict[str, Any]] = []
        self.logprobs: list[tuple[int, dict[str, Any]]] = []  # with where the token's text begins

    def feed(self, event: Event) -> None:
        """Read the next token of this answer."""
        self.num_tokens += 1
        begin = self.num_chars + len(self.held)
        pieces = self.reader.feed(event.token)
        if event.finish:
            pieces += self.reader.close()
        if event.logprobs and event.token < self.tokenizer.bos_id and self.reader.kind == "text":
            self.logprobs.append((begin, self._logprob(event.logprobs)))
        self._add_tools(bool(event.finish))
        self._add_text("".join(text for kind, text in pieces if kind == "text"))
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
        begun = [
            length
            for stop in self.stops
            for length in range(1, len(stop))
            if self.held.endswith(stop[:length])
        ]
        self._give_out(len(self.held) - max(begun, default=0))

    def _give_out(self, num_chars: int) -> None:
        text, self.held = self.held[:num_chars], self.held[num_chars:]
        self.num_chars += num_chars
        if text and self.deltas and "content" in self.deltas[-1]:
            self.deltas[-1]["content"] += text
        elif text:
            self.deltas.append({"content": text})

    def _add_tools(self, ended: bool) -> None:
        """A delta for each tool call that is complete, its result included."""
        parts = self.reader.parts
        growing = not (ended or self.reader.new_part)
        while self.num_parts < len(parts) - growing:
            part, *rest = parts[self.num_parts :]
            if part["type"] == "python":
                answered = bool(rest) and rest[0]["type"] == "python_output"
                if not (rest or ended) or (answered and len(rest) == 1 and growing):
                    return  # its result may yet come, or grow
                self._give_out(len(self.held))
                result = rest[0]["text"] if answered else None
                self.deltas.append({"tool": {"expression": part["text"], "result": result}})
            self.num_parts += 1

    def _logprob(self, pairs: Sequence[tuple[int, float]]) -> dict[str, Any]:
        """OpenAI's entry for one token from (id, logprob) pairs: what was chosen, then the likeliest."""
        entries = []
        for token, logprob in pairs:
            raw = self.tokenizer.decode_bytes([token])
            shown = {"token": raw.decode("utf-8", "replace"), "bytes": list(raw)}
            entries.append(shown | {"logprob": max(logprob, LEAST_LOGPROB)})
        return entries[0] | {"top_logprobs": entries[1 : 1 + self.top_logprobs]}


class Completion:
    """The shapes of the answer to one request: the events of a stream, or the whole."""

    def __init__(
        self, model: str, choices: Sequence[Choice], num_prompt_tokens: int, stream_usage: bool
    ) -> None:
        self.choices, self.num_prompt_tokens = choices, num_prompt_tokens
        self.open = list(range(len(choices)))  # the choices whose end has not been told
        self.head: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        if stream_usage:
            self.head["usage"] = None

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of the prompt and of all choices, what a tool forced or a stop string hid included."""
        num_said = sum(choice.num_tokens for choice in self.choices)
        total = self.num_prompt_tokens + num_said
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_said,
            "total_tokens": total,
        }

    def begin(self) -> bytes:
        """The events that open the stream: who speaks."""
        return b"".join(self._chunk(i, {"role": "assistant", "content": ""}) for i in self.open)

    def news(self) -> bytes:
        """The events due since the last call."""
        events = []
        for index in list(self.open):
            choice = self.choices[index]
            deltas, logprobs = choice.take()
            for delta in deltas:
                events.append(self._chunk(index, delta, logprobs if "content" in delta else None))
                logprobs = None if "content" in delta else logprobs
            if choice.finish:
                events.append(self._chunk(index, {}, finish=choice.finish))
                self.open.remove(index)
        return b"".join(events)

    def end(self, timings: dict[str, float]) -> bytes:
        """The events that close the stream, the usage among them where it was asked for."""
        last = self.head | {"choices": [], "usage": self.usage, "timings": timings}
        return (sse(last) if "usage" in self.head else b"") + b"data: [DONE]\n\n"

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for index, choice in enumerate(self.choices):
            deltas, logprobs = choice.take()
            text = "".join(delta.get("content", "") for delta in deltas)
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if any("tool" in delta for delta in deltas):
                message["parts"] = [part for delta in deltas for part in as_parts(delta)]
            about = {"index": index, "finish_reason": choice.finish, "logprobs": logprobs}
            choices.append(about | {"message": message})
        return self.head | {"object": "chat.completion", "choices": choices, "usage": self.usage}

    def _chunk(
        self, index: int, delta: dict, logprobs: dict | None = None, finish: str | None = None
    ) -> bytes:
        about = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return sse(self.head | {"choices": [about]})


class Answer(Response):
    """A job's way to its client, whole or in a stream. However it ends, the job is cancelled."""

    def __init__(
        self,
        replica: Replica,
        job: Job,
        completion: Completion,
        body: ChatRequest,
        settings: Settings,
    ) -> None:
        super().__init__()
        self.replica, self.job, self.completion = replica, job, completion
        self.body, self.settings = body, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, unless the client leaves first. Raises ApiError before the first byte only."""

        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        path = self._stream(send) if self.body.stream else self._whole(scope, receive, send)
        work, gone = asyncio.create_task(path), asyncio.create_task(leave())
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            with suppress(TimeoutError):  # it does not read; returning now closes the connection
                if work.done():
                    work.result()
        finally:
            work.cancel()
            gone.cancel()
            self.replica.cancel(self.job.requests)
        if self.settings.log_conversations:
            said = [message.model_dump() for message in self.body.messages]
            replies = [choice.reader.parts for choice in self.completion.choices]
            log.info("%s", json.dumps({"messages": said, "replies": replies}, ensure_ascii=False))

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        async for _ in self._follow():
            pass
        await JSONResponse(self.completion.whole())(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        async def pass_on(data: bytes, more: bool = True) -> None:
            async with asyncio.timeout(self.settings.stalled_seconds):
                await send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": SSE_HEADERS})
        try:
            await pass_on(self.completion.begin())
            async for comment in self._follow():
                if data := comment + self.completion.news():
                    await pass_on(data)
            last = self.completion.end(self._timings())
        except ApiError as error:
            last = sse(error.body)
        await pass_on(last, more=False)

    async def _follow(self) -> AsyncIterator[bytes]:
        """Feed events to the choices until all have ended; yields after each batch, or with a comment."""
        choices = dict(zip(self.job.requests, self.completion.choices, strict=True))
        place, heard = 0, time.monotonic()
        while any(choice.finish is None for choice in choices.values()):
            before, place = place, self.replica.place(self.job)
            comment = b": queued %d\n\n" % place if place not in (0, before) else b""
            if not comment and time.monotonic() - heard >= PING_SECONDS:
                comment = b": ping\n\n"
            if comment:
                heard = time.monotonic()
                yield comment
            for event in (events := await self.job.read(QUEUE_SECONDS)):
                if (choice := choices[event.request]).finish is None:
                    choice.feed(event)
                if choice.finish:  # perhaps by a stop string, of which the engine knows nothing
                    self.replica.cancel([event.request], choice.finish)
            if events:
                heard = time.monotonic()
                yield b""

    def _timings(self) -> dict[str, float]:
        job, num_said = self.job, self.completion.usage["completion_tokens"]
        speed = (num_said - 1) / (job.last - job.first) if job.last > job.first else 0.0
        queue, first = job.begun - job.arrived, job.first - job.arrived
        return {"queue_seconds": queue, "first_token_seconds": first, "tokens_per_second": speed}


def as_parts(delta: dict[str, Any]) -> list[Part]:
    """A delta of an answer in the form that a request's messages have."""
    if "content" in delta:
        return [Part(type="text", text=delta["content"])]
    call, result = (delta["tool"][key] for key in ("expression", "result"))
    answer = [] if result is None else [Part(type="python_output", text=result)]
    return [Part(type="python", text=call), *answer]


def sse(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"
