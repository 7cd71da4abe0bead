"""The web server: an OpenAI-compatible API over one or more engines, and the chat page.

`create_app` wires it up on FastAPI. A request is checked, its prompt is rendered in a worker thread, and the
replica with the least to do takes it on as a job; from then on an `Answer` waits for events and passes them on.

    GET  /v1/models, /v1/models/{id}    POST /v1/chat/completions    and the same without /v1
    GET  /health (the process lives), /ready (it would answer), /metrics, /, /ui/..., /report

What would surprise:
- Middleware here is plain ASGI: FastAPI's decorator for it would hide a client's leaving from a stream.
- After a SIGTERM the doors stay open until what is under way has ended, so that /ready can tell that they close.
- FastAPI's /docs is off, as it loads from a CDN; /openapi.json is there.

An engine in a thread of its own, and the queues between it and the event loop.

The thread owns the engine and all of torch. The event loop sends it orders (submit, cancel) through an inbox, and
gets the events of each step back in one call. Who waits for what, and since when, lives on the event loop alone
and needs no lock. Both ways are bounded: `submit` refuses what finds no place, and a job whose reader falls too far
behind fails.

What would surprise: a step that fails costs the jobs that it concerns, and the engine goes on; but after several in
a row, or any error of the engine itself, the thread gives up: every job is told, and the server is not ready again.
"""

import asyncio
import json
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.chat_api import (
    MAX_BODY_BYTES,
    ApiError,
    ChatRequest,
    Choice,
    Completion,
    Settings,
    engine_requests,
    sse,
    validation_error,
)
from nanochat.common import UserError, report_dir
from nanochat.engine import Engine, Event, Request, StepFailed

MAX_UNREAD = 512  # events of one choice that its reader may be behind
MAX_FAILURES = 8  # steps in a row that may fail before the engine counts as dead
MAX_STEP_SECONDS = 120.0  # a longer step counts as hung; the first ones on a GPU compile
SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"x-accel-buffering", b"no"),
]
PING_SECONDS, QUEUE_SECONDS = 15.0, 1.0  # a sign of life on a silent stream; a look at the queue
SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

log = logging.getLogger("uvicorn.error")  # the one that a server shows


class Metrics:
    """What /metrics tells; vLLM's names after `nanochat_`, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        ProcessCollector(registry=own)  # memory, CPU time
        self.running = Gauge("nanochat_num_requests_running", "In a slot", registry=own)
        self.waiting = Gauge("nanochat_num_requests_waiting", "In the queue", registry=own)
        self.step_age = Gauge("nanochat_engine_step_age_seconds", "Longest under way", registry=own)
        self.prompt_tokens = Counter("nanochat_prompt_tokens", "Tokens of prompts", registry=own)
        self.tokens = Counter("nanochat_generation_tokens", "Tokens generated", registry=own)
        self.ended = Counter("nanochat_request_success", "Ended", ["finished_reason"], registry=own)
        self.refused = Counter("nanochat_requests_refused", "Refused", ["code"], registry=own)
        self.queued = Histogram(
            "nanochat_request_queue_time_seconds", "In the queue", buckets=LONG, registry=own
        )
        self.first = Histogram(
            "nanochat_time_to_first_token_seconds", "Since it came", buckets=LONG, registry=own
        )
        self.between = Histogram(
            "nanochat_inter_token_latency_seconds", "Between two", buckets=SHORT, registry=own
        )


class Job:
    """The engine requests of one HTTP request, one per choice, and the way back for their events."""

    def __init__(self, requests: Sequence[Request], seconds: float) -> None:
        self.requests = requests
        self.unread: list[Event] = []
        self.error: ApiError | None = None
        self.news = asyncio.Event()
        self.arrived = time.monotonic()
        self.deadline = self.arrived + seconds
        self.begun = 0.0  # when it left the queue
        self.first = self.last = 0.0  # when its first and its newest token came

    async def read(self, seconds: float) -> list[Event]:
        """What came since the last call; [] when nothing comes for `seconds`.

        Raises ApiError when the job has failed or its time is over.
        """
        if (left := self.deadline - time.monotonic()) <= 0:
            raise ApiError(503, "the answer takes too long", "timeout", retry_after=10)
        with suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, left)):
                await self.news.wait()
        self.news.clear()
        if self.error:
            raise self.error
        events, self.unread = self.unread, []
        return events


class Replica:
    """One engine and everything in flight on it."""

    def __init__(self, engine: Engine, metrics: Metrics, max_waiting: int) -> None:
        self.engine, self.metrics = engine, metrics
        self.capacity = engine.num_slots + max_waiting
        self.state = "loading"  # then ready, at the end dead
        self.in_flight: dict[Request, Job] = {}  # in order of arrival; the event loop's
        self.inbox: SimpleQueue[tuple[Callable[[Request], None], Request] | None] = SimpleQueue()
        self.step_began: float | None = None
        self.thread = threading.Thread(target=self._live, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread; called on the event loop."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        """Let the thread end after its present step."""
        self.inbox.put(None)
        self.thread.join(timeout=5)

    @property
    def step_age(self) -> float:
        """Seconds that the step under way has taken so far."""
        return 0.0 if (began := self.step_began) is None else time.monotonic() - began

    @property
    def ready(self) -> bool:
        """True where a request would be served."""
        return self.state == "ready" and self.step_age < MAX_STEP_SECONDS

    def submit(self, job: Job) -> None:
        """Take the job on. Raises ApiError when slots and queue are full."""
        if len(self.in_flight) + len(job.requests) > self.capacity:
            text = "all slots and the queue are full; try again soon"
            raise ApiError(429, text, "queue_full", retry_after=1)
        for request in job.requests:
            self.in_flight[request] = job
            self.inbox.put((self.engine.submit, request))
        self.metrics.prompt_tokens.inc(len(job.requests[0].prompt))
        self._note_begun()

    def cancel(self, requests: Iterable[Request], reason: str = "abort") -> None:
        """Forget those of `requests` that are still in flight."""
        for request in requests:
            if self.in_flight.pop(request, None):
                self.inbox.put((self.engine.cancel, request))
                self.metrics.ended.labels(reason).inc()
        self._note_begun()

    def fail(self, requests: Iterable[Request], error: ApiError) -> None:
        """Tell the jobs of `requests` that they have failed, and forget them."""
        for request in requests:
            if job := self.in_flight.get(request):
                job.error = error
                job.news.set()
                self.cancel(job.requests, "error")

    def place(self, job: Job) -> int:
        """The job's place in the queue, from 1; 0 once it has left it."""
        first = job.requests[0]
        if job.begun or first not in self.in_flight:
            return 0
        return list(self.in_flight).index(first) - self.engine.num_slots + 1

    def _note_begun(self) -> None:
        """Note who has left the queue: first come, first served, so the oldest have the slots."""
        for job in islice(self.in_flight.values(), self.engine.num_slots):
            if not job.begun:
                job.begun = time.monotonic()
                self.metrics.queued.observe(job.begun - job.arrived)

    def _deliver(self, events: Sequence[Event]) -> None:
        now = time.monotonic()
        for event in events:
            if (job := self.in_flight.get(event.request)) is None:
                continue  # cancelled since
            since = self.metrics.between if job.first else self.metrics.first
            since.observe(now - (job.last or job.arrived))
            job.first, job.last = job.first or now, now
            self.metrics.tokens.inc()
            if event.finish:
                del self.in_flight[event.request]
                self.metrics.ended.labels(event.finish).inc()
                self._note_begun()
            job.unread.append(event)
            job.news.set()
            if len(job.unread) > MAX_UNREAD * len(job.requests):
                self.fail(job.requests, ApiError(503, "the client reads too slowly", "slow_reader"))

    def _die(self) -> None:
        self.state = "dead"
        self.fail(
            list(self.in_flight), ApiError(500, "the engine has stopped; see the server's log")
        )

    # From here on: the thread.

    def _tell(self, action: Callable[..., object], *arguments: object) -> None:
        """Let the event loop do `action`."""
        self.loop.call_soon_threadsafe(action, *arguments)

    def _live(self) -> None:
        try:
            if self.engine.device.type == "cuda":
                torch.cuda.set_device(self.engine.device)
            self.engine.submit(Request([self.engine.chat.bos], 2))  # warm-up
            while self.engine.busy:
                self.engine.step()
            self._tell(setattr, self, "state", "ready")
            self._work()
        except Exception:
            log.exception("the engine's thread has ended")
        self._tell(self._die)

    def _work(self) -> None:
        num_failures = 0
        while True:
            while not self.engine.busy or not self.inbox.empty():
                if (order := self.inbox.get()) is None:
                    return
                action, request = order
                action(request)
            self.step_began = time.monotonic()
            try:
                if events := self.engine.step():
                    self._tell(self._deliver, events)
                num_failures = 0
            except StepFailed as failure:
                num_failures += 1
                if num_failures == MAX_FAILURES:
                    raise
                log.exception("the model failed")
                self._tell(self.fail, failure.requests, ApiError(500, "the model failed"))
            finally:
                self.step_began = None


UI = Path(__file__).parent / "ui"
PUBLIC = re.compile(r"/(ui/.*|health|ready|report)?")  # what needs no API key
POLICY = (  # the last line: no script may make markup or code of a text
    "default-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
)
DRAIN_SECONDS = 30.0  # that answers under way get when the server is to end


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


class ChatServer:
    """The handlers behind the routes, and the replicas that they share."""

    def __init__(self, engines: Sequence[Engine], settings: Settings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.replicas = [Replica(e, self.metrics, settings.max_waiting) for e in engines]
        self.engine = engines[0]  # all are alike
        about = {"id": settings.model, "object": "model", "created": int(time.time())}
        self.card = about | {"owned_by": "nanochat", "context_length": self.engine.max_len}
        self.drain_until = 0.0  # when what is under way must have ended, once the server is to end

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Start the engines with the server, and end them with it."""
        for replica in self.replicas:
            replica.start()
        yield
        for replica in self.replicas:
            replica.stop()

    def choose_replica(self) -> Replica:
        """The least loaded. Raises ApiError when none would serve."""
        if self.drain_until:
            raise self._closing()
        ready = [replica for replica in self.replicas if replica.ready]
        if not ready and any(replica.state == "loading" for replica in self.replicas):
            raise ApiError(503, "the model is being loaded", "loading", retry_after=2)
        if not ready:
            raise ApiError(503, "no engine is alive; restart the server", retry_after=30)
        return min(ready, key=lambda replica: len(replica.in_flight))

    def drained(self) -> bool:
        """Take no more jobs; True once none is in flight, or DRAIN_SECONDS are over and the rest were told."""
        self.drain_until = self.drain_until or time.monotonic() + DRAIN_SECONDS
        if time.monotonic() < self.drain_until and any(r.in_flight for r in self.replicas):
            return False
        for replica in self.replicas:
            replica.fail(list(replica.in_flight), self._closing())
        return True

    def _closing(self) -> ApiError:
        return ApiError(503, "the server is shutting down", "shutting_down", retry_after=5)

    async def models(self) -> dict[str, Any]:
        """The list of models."""
        return {"object": "list", "data": [self.card]}

    async def model(self, model_id: str) -> dict[str, Any]:
        """The one model. Raises ApiError for any other."""
        if model_id != self.settings.model:
            text = f"there is no model {model_id[:80]!r} here, only {self.settings.model!r}"
            raise ApiError(404, text, "model_not_found", "model")
        return self.card

    async def chat(self, body: ChatRequest) -> Response:
        """Answer a conversation, streaming or whole."""
        self.choose_replica()  # before any work, in case there is none
        await self.model(body.model or self.settings.model)
        body.check_supported(self.engine.num_slots)
        tokenizer, max_len = self.engine.tokenizer, self.engine.max_len
        # In a thread, since 32,000 characters take 5 ms, and tiktoken works without the GIL.
        requests = await asyncio.to_thread(engine_requests, body, tokenizer, max_len, self.settings)
        choices = [Choice(tokenizer, body.stops, body.top_logprobs or 0) for _ in requests]
        completion = Completion(
            self.settings.model, choices, len(requests[0].prompt), body.stream_usage
        )
        job, replica = Job(requests, self.settings.answer_seconds), self.choose_replica()
        replica.submit(job)
        return Answer(replica, job, completion, body, self.settings)

    async def health(self) -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    async def ready(self) -> dict[str, str]:
        """A request would be served."""
        self.choose_replica()
        return {"status": "ready"}

    async def show_metrics(self) -> Response:
        """Prometheus's text format."""
        in_flight = [len(replica.in_flight) for replica in self.replicas]
        running = sum(min(num, self.engine.num_slots) for num in in_flight)
        self.metrics.running.set(running)
        self.metrics.waiting.set(sum(in_flight) - running)
        self.metrics.step_age.set(max(replica.step_age for replica in self.replicas))
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def page(self) -> Response:
        """The chat page."""
        return FileResponse(UI / "index.html")

    async def report(self) -> Response:
        """The report card of the model's training."""
        path = report_dir() / "report.html"
        if not path.is_file():
            raise ApiError(404, "there is no report; run `python -m nanochat.report generate`")
        return FileResponse(path, headers={"Content-Security-Policy": REPORT_POLICY})

    async def handle_error(self, request: HttpRequest, error: Exception) -> Response:
        """Errors of every kind, FastAPI's own among them, in OpenAI's shape."""
        headers = {}
        if isinstance(error, RequestValidationError):
            error = validation_error(error.errors())
        elif isinstance(error, HTTPException):
            headers = dict(error.headers or {})
            code = "request_too_large" if error.status_code == 413 else None
            text = f"{error.detail}: {request.method} {request.url.path[:80]}"
            error = ApiError(error.status_code, text, code)
        elif isinstance(error, UserError):
            error = ApiError(400, str(error))
        elif not isinstance(error, ApiError):
            error = ApiError(500, "the server failed; its log says why")
        self.metrics.refused.labels(error.code or str(error.status)).inc()
        return JSONResponse(error.body, error.status, headers | error.headers)


class Guard:
    """Refuses who may not come in and what is too large, and gives every response its security headers."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
            return message

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", POLICY)
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        error = self._refusal(scope) if scope["type"] == "http" else None
        respond = JSONResponse(error.body, error.status) if error else self.app
        await respond(scope, receive_limited, send_guarded)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers, settings = Headers(scope=scope), self.settings
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if settings.host_names and host not in settings.host_names:
            # Else a page elsewhere could reach this server under a name of its own (DNS rebinding).
            return ApiError(403, "this server answers to localhost alone; --host opens it")
        if not settings.api_key or PUBLIC.fullmatch(scope["path"]):
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if secrets.compare_digest(given.encode(), settings.api_key.encode()):
            return None
        return ApiError(401, "no valid API key; send Authorization: Bearer KEY", "invalid_api_key")


def create_app(engines: Sequence[Engine], settings: Settings) -> FastAPI:
    """The application; `app.state.chat` is its ChatServer."""
    chat = ChatServer(engines, settings)
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, lifespan=chat.lifespan)
    app.state.chat = chat
    routes = APIRouter()
    routes.add_api_route("/models", chat.models)
    routes.add_api_route("/models/{model_id:path}", chat.model)
    routes.add_api_route("/chat/completions", chat.chat, methods=["POST"])
    app.include_router(routes, prefix="/v1")
    app.include_router(routes, include_in_schema=False)
    app.add_api_route("/health", chat.health)
    app.add_api_route("/ready", chat.ready)
    app.add_api_route("/metrics", chat.show_metrics)
    for path, page in (("/", chat.page), ("/report", chat.report)):
        app.add_api_route(path, page, methods=["GET", "HEAD"], include_in_schema=False)
    app.mount("/ui", StaticFiles(directory=UI))
    for kind in (ApiError, RequestValidationError, HTTPException, UserError, Exception):
        app.add_exception_handler(kind, chat.handle_error)
    app.add_middleware(Guard, settings=settings)
    if origin := settings.cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=[origin], allow_methods=["*"], allow_headers=["*"]
        )
    return app


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError when the address is taken or not this machine's."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise UserError(f"{host}:{port}: {error}; choose another --port or --host") from error
    # Inherited by every connection; asyncio overlooks sockets made like this one, and each answer took 40 ms more.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class Server(uvicorn.Server):
    """uvicorn that lets the answers under way finish when it is told to end; a second Ctrl-C ends it at once."""

    async def on_tick(self, counter: int) -> bool:
        """True when the server is to close its doors."""
        ending = await super().on_tick(counter)
        return ending and (self.force_exit or self.config.app.state.chat.drained())  # type: ignore
