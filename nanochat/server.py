"""The web server: an OpenAI-compatible API over one or more engines, and the chat page.

    GET  /v1/models, /v1/models/{id}    POST /v1/chat/completions    and the same without /v1
    GET  /health (alive), /ready (would answer), /metrics, /, /ui/..., /report

A request is validated, its prompt is rendered in a thread, and the least busy EngineWorker takes it
as a job. The worker's thread owns an engine and all use of torch: it receives orders (submit,
cancel) through an inbox and hands each step's events to the event loop, where everything else runs
without locks.
"""

import asyncio
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

import prometheus_client as prometheus
import torch
import uvicorn
from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat import chat_api
from nanochat.chat_api import ApiError, ChatRequest, Completion, ServerConfig
from nanochat.common import UserError, report_dir
from nanochat.engine import Engine, Event, Request, StepFailed

ANSWER_SECONDS = 600.0  # limit for an answer, queue included; what OpenAI's client waits
STALLED_SECONDS = 60.0  # a client may leave a stream unread for this long
DRAIN_SECONDS = 30.0  # for answers in progress at shutdown
PING_SECONDS, QUEUE_SECONDS = 15.0, 1.0  # between pings on a silent stream; queue updates
MAX_UNREAD = 512  # events per choice that a reader may lag behind
MAX_FAILURES = 8  # failed steps in a row after which the engine counts as dead
MAX_STEP_SECONDS = 120.0  # a longer step counts as hung; the first ones on a GPU compile
SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
UI = Path(__file__).parent / "ui"
PUBLIC = re.compile(r"/(ui/.*|health|ready|report)?")  # what needs no API key
POLICY = (  # the last line: no script may turn text into markup or code
    "default-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
)

log = logging.getLogger("uvicorn.error")  # the one that a server shows


class Metrics:
    """The metrics of /metrics, named as vLLM's after `nanochat_`."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)  # memory, CPU time
        gauge = partial(prometheus.Gauge, namespace="nanochat", registry=self.registry)
        counter = partial(prometheus.Counter, namespace="nanochat", registry=self.registry)
        histogram = partial(prometheus.Histogram, namespace="nanochat", registry=self.registry)
        self.running = gauge("num_requests_running", "In a slot")
        self.waiting = gauge("num_requests_waiting", "In the queue")
        self.step_age = gauge("engine_step_age_seconds", "Longest under way")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.tokens = counter("generation_tokens", "Tokens generated")
        self.ended = counter("request_success", "Ended", ["finished_reason"])
        self.refused = counter("requests_refused", "Refused", ["code"])
        self.queued = histogram("request_queue_time_seconds", "In the queue", buckets=LONG)
        self.first = histogram("time_to_first_token_seconds", "Since it came", buckets=LONG)
        self.between = histogram("inter_token_latency_seconds", "Between two", buckets=SHORT)


class Job:
    """One HTTP request in an engine, with an engine request for each choice."""

    def __init__(self, requests: Sequence[Request], completion: Completion) -> None:
        self.completion = completion
        self.choices = dict(zip(requests, completion.choices, strict=True))
        self.num_unread = 0  # events that the client has not been sent
        self.error: ApiError | None = None
        self.news = asyncio.Event()
        self.place = 0  # in the queue, from 1
        self.arrived = time.monotonic()
        self.started = 0.0  # when it left the queue
        self.first = self.last = 0.0  # when its first and its newest token came

    async def follow(self) -> AsyncIterator[bytes]:
        """Yield a comment for the stream, or b"", whenever there may be news, until the end.

        Raises ApiError if the job fails or times out.
        """
        place, heard = 0, self.arrived
        while any(choice.finish is None for choice in self.completion.choices):
            if (left := self.arrived + ANSWER_SECONDS - time.monotonic()) <= 0:
                raise ApiError(503, "the answer takes too long", "timeout", retry_after=10)
            with suppress(TimeoutError):
                async with asyncio.timeout(min(QUEUE_SECONDS, left)):
                    await self.news.wait()
            self.news.clear()
            if self.error:
                raise self.error
            now, comment = time.monotonic(), b""
            if self.place not in (0, place):
                comment = b": queued %d\n\n" % self.place
            elif self.num_unread == 0 and now - heard >= PING_SECONDS:
                comment = b": ping\n\n"
            if comment or self.num_unread:
                heard = now
            place, self.num_unread = self.place, 0
            yield comment

    async def stream(self) -> AsyncIterator[bytes]:
        """The events of the answer; an error comes last."""
        completion = self.completion
        try:
            yield completion.begin()
            async for comment in self.follow():
                if data := comment + completion.news():
                    yield data
            yield completion.news() + completion.end(self.timings)
        except ApiError as error:
            yield chat_api.sse(error.body)

    @property
    def timings(self) -> dict[str, float]:
        """What accompanies a stream's usage."""
        num_tokens = self.completion.usage["completion_tokens"]
        speed = (num_tokens - 1) / (self.last - self.first) if self.last > self.first else 0.0
        queue, first = self.started - self.arrived, self.first - self.arrived
        return {"queue_seconds": queue, "first_token_seconds": first, "tokens_per_second": speed}


class EngineWorker:
    """An engine in its own thread, and its jobs; created on the event loop.

    A failed step costs the jobs concerned; after several in a row, or on any error of the engine
    itself, the thread ends and all jobs fail.
    """

    def __init__(self, engine: Engine, metrics: Metrics, queue: int) -> None:
        self.engine, self.metrics = engine, metrics
        self.capacity = engine.num_slots + queue
        self.state = "loading"  # then ready, at the end dead
        self.jobs: dict[Request, Job] = {}  # of requests that have not ended; the event loop's
        self.inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None: end
        self.step_began: float | None = None
        self.loop = asyncio.get_running_loop()
        self.thread = threading.Thread(target=self._live, name="engine", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Let the thread end after its current step."""
        self.inbox.put(None)
        self.thread.join(timeout=5)

    @property
    def step_age(self) -> float:
        return 0.0 if (began := self.step_began) is None else time.monotonic() - began

    @property
    def ready(self) -> bool:
        return self.state == "ready" and self.step_age < MAX_STEP_SECONDS

    def submit(self, job: Job) -> None:
        """Take the job; ApiError if slots and queue are full."""
        if len(self.jobs) + len(job.choices) > self.capacity:
            text = "all slots and the queue are full; try again soon"
            raise ApiError(429, text, "queue_full", retry_after=1)
        for request in job.choices:
            self.jobs[request] = job
            self.inbox.put(partial(self.engine.submit, request))
        self.metrics.prompt_tokens.inc(job.completion.num_prompt_tokens)

    def cancel(self, requests: Iterable[Request], reason: str = "abort") -> None:
        """Drop those of `requests` that have not ended."""
        for request in requests:
            if self.jobs.pop(request, None):
                self.inbox.put(partial(self.engine.cancel, request))
                self.metrics.ended.labels(reason).inc()

    def fail(self, requests: Iterable[Request], error: ApiError) -> None:
        """Fail and drop the jobs of `requests`."""
        for request in requests:
            if job := self.jobs.get(request):
                job.error = error
                job.news.set()
                self.cancel(job.choices, "error")

    def _deliver(
        self, started: Sequence[Request], waiting: Sequence[Request], events: Sequence[Event]
    ) -> None:
        """Pass on a step's outcome: who left the queue, who still waits, the tokens."""
        now = time.monotonic()
        for request in started:
            if (job := self.jobs.get(request)) and not job.started:
                job.started, job.place = now, 0
                self.metrics.queued.observe(now - job.arrived)
        for place, request in reversed(list(enumerate(waiting, 1))):
            if (job := self.jobs.get(request)) and not job.started:
                if job.place == 0:
                    job.news.set()  # to be told at once
                job.place = place
        for event in events:
            if job := self.jobs.get(event.request):  # else cancelled since
                self._deliver_event(job, event, now)

    def _deliver_event(self, job: Job, event: Event, now: float) -> None:
        since = self.metrics.between if job.first else self.metrics.first
        since.observe(now - (job.last or job.arrived))
        job.first, job.last = job.first or now, now
        self.metrics.tokens.inc()
        choice = job.choices[event.request]
        choice.feed(event)
        job.num_unread += 1
        job.news.set()
        if event.finish:
            del self.jobs[event.request]
            self.metrics.ended.labels(event.finish).inc()
        elif choice.finish:  # by a stop string, of which the engine knows nothing
            self.cancel([event.request], choice.finish)
        if job.num_unread > MAX_UNREAD * len(job.choices):
            self.fail(job.choices, ApiError(503, "the client reads too slowly", "slow_reader"))

    def _die(self) -> None:
        self.state = "dead"
        self.fail(list(self.jobs), ApiError(500, "the engine has stopped; see the server's log"))

    # The rest runs in the thread, which leaves the jobs to the event loop.

    def _live(self) -> None:
        try:
            if self.engine.device.type == "cuda":
                torch.cuda.set_device(self.engine.device)
            list(self.engine.stream([Request([self.engine.chat.bos], 2)]))  # warm-up
            self.state = "ready"
            self._work()
        except Exception:
            log.exception("the engine's thread has ended")
        self.loop.call_soon_threadsafe(self._die)

    def _work(self) -> None:
        tell, num_failures = self.loop.call_soon_threadsafe, 0
        while True:
            while not self.engine.busy or not self.inbox.empty():
                if (order := self.inbox.get()) is None:
                    return
                order()
            self.step_began = time.monotonic()
            events: list[Event] = []
            try:
                events = self.engine.step()
                num_failures = 0
            except StepFailed as failure:
                num_failures += 1
                if num_failures == MAX_FAILURES:
                    raise
                log.exception("the model failed")
                tell(self.fail, failure.requests, ApiError(500, "the model failed"))
            finally:
                self.step_began = None
            tell(self._deliver, self.engine.started, list(self.engine.waiting), events)


class EventStream(StreamingResponse):
    """A stream that closes its connection when the client stops reading."""

    async def stream_response(self, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(STALLED_SECONDS):
                await send(message)

        with suppress(TimeoutError):
            await super().stream_response(send_in_time)


class ChatServer:
    """What the routes share: workers, metrics, the model's card."""

    def __init__(self, engines: Sequence[Engine], config: ServerConfig, model: str) -> None:
        self.engines, self.config, self.model, self.metrics = engines, config, model, Metrics()
        self.engine = engines[0]  # all are alike
        about = {"id": model, "object": "model", "created": int(time.time())}
        self.card = about | {"owned_by": "nanochat", "context_length": self.engine.max_len}
        self.drain_until = 0.0  # deadline for answers in progress, once shutting down

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Start and stop the engines with the server."""
        queue = self.config.queue
        self.workers = [EngineWorker(engine, self.metrics, queue) for engine in self.engines]
        yield
        for worker in self.workers:
            worker.stop()

    def check_model(self, name: str) -> None:
        """Raise ApiError for any model but ours."""
        if name != self.model:
            text = f"there is no model {name[:80]!r} here, only {self.model!r}"
            raise ApiError(404, text, "model_not_found", "model")

    def choose_worker(self) -> EngineWorker:
        """The least busy worker; ApiError if none would serve."""
        if self.drain_until:
            raise self._closing()
        ready = [worker for worker in self.workers if worker.ready]
        if not ready and any(worker.state == "loading" for worker in self.workers):
            raise ApiError(503, "the model is being loaded", "loading", retry_after=2)
        if not ready:
            raise ApiError(503, "no engine is alive; restart the server", retry_after=30)
        return min(ready, key=lambda worker: len(worker.jobs))

    def drained(self) -> bool:
        """Refuse new jobs; True once none is left, all being failed after DRAIN_SECONDS."""
        self.drain_until = self.drain_until or time.monotonic() + DRAIN_SECONDS
        if time.monotonic() < self.drain_until and any(worker.jobs for worker in self.workers):
            return False
        for worker in self.workers:
            worker.fail(list(worker.jobs), self._closing())
        return True

    def _closing(self) -> ApiError:
        return ApiError(503, "the server is shutting down", "shutting_down", retry_after=5)


async def chat_server(request: HttpRequest) -> ChatServer:
    return request.app.state.chat


Chat = Annotated[ChatServer, Depends(chat_server)]
api, others = APIRouter(), APIRouter()


@api.get("/models")
async def list_models(chat: Chat) -> dict[str, Any]:
    return {"object": "list", "data": [chat.card]}


@api.get("/models/{model_id:path}")
async def show_model(model_id: str, chat: Chat) -> dict[str, Any]:
    chat.check_model(model_id)
    return chat.card


async def start_job(body: ChatRequest, chat: Chat) -> AsyncIterator[Job]:
    """The job that answers `body`, cancelled however the response ends."""
    chat.choose_worker()  # before any work, in case there is none
    chat.check_model(body.model or chat.model)
    tokenizer, max_len = chat.engine.tokenizer, chat.engine.max_len
    body.check_supported(chat.engine.num_slots)
    # In a thread, since 32,000 characters take 5 ms, and tiktoken works without the GIL.
    prepare = chat_api.engine_requests
    requests = await asyncio.to_thread(prepare, body, tokenizer, max_len, chat.config)
    completion = Completion(chat.model, body, tokenizer, len(requests[0].prompt))
    job, worker = Job(requests, completion), chat.choose_worker()
    worker.submit(job)
    try:
        yield job
    finally:
        worker.cancel(job.choices)


@api.post("/chat/completions")
async def complete_chat(
    http: HttpRequest, body: ChatRequest, job: Annotated[Job, Depends(start_job)]
) -> Response:
    if body.stream:
        headers = {"X-Accel-Buffering": "no"}
        return EventStream(job.stream(), headers=headers, media_type="text/event-stream")
    async for _ in job.follow():
        if await http.is_disconnected():
            return Response()  # to nobody
    return JSONResponse(job.completion.whole())


@others.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@others.get("/ready")
async def ready(chat: Chat) -> dict[str, str]:
    """A request would be served."""
    chat.choose_worker()
    return {"status": "ready"}


@others.get("/metrics")
async def show_metrics(chat: Chat) -> Response:
    """Prometheus's text format."""
    chat.metrics.running.set(sum(len(engine.running) for engine in chat.engines))
    chat.metrics.waiting.set(sum(len(engine.waiting) for engine in chat.engines))
    chat.metrics.step_age.set(max(worker.step_age for worker in chat.workers))
    text = prometheus.generate_latest(chat.metrics.registry)
    return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)


@others.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page() -> Response:
    return FileResponse(UI / "index.html")


@others.api_route("/report", methods=["GET", "HEAD"], include_in_schema=False)
async def report() -> Response:
    path = report_dir() / "report.html"
    if not path.is_file():
        raise ApiError(404, "there is no report; run `python -m nanochat.report generate`")
    return FileResponse(path, headers={"Content-Security-Policy": REPORT_POLICY})


async def handle_error(request: HttpRequest, error: Exception) -> Response:
    """Any error, FastAPI's included, in OpenAI's shape."""
    headers = {}
    if isinstance(error, RequestValidationError):
        error = chat_api.validation_error(error.errors())
    elif isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        code = "request_too_large" if error.status_code == 413 else None
        text = f"{error.detail}: {request.method} {request.url.path[:80]}"
        error = ApiError(error.status_code, text, code)
    elif isinstance(error, UserError):
        error = ApiError(400, str(error))
    elif not isinstance(error, ApiError):
        error = ApiError(500, "the server failed; its log says why")
    request.app.state.chat.metrics.refused.labels(error.code or str(error.status)).inc()
    return JSONResponse(error.body, error.status, headers | error.headers)


class SecurityMiddleware:
    """Refuses unauthorised and oversized requests, and adds security headers to responses.

    Plain ASGI: FastAPI's decorator for middleware would hide client disconnects from a stream.
    """

    def __init__(self, app: ASGIApp, api_key: str, host_names: frozenset[str]) -> None:
        self.app, self.api_key, self.host_names = app, api_key, host_names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > chat_api.MAX_BODY_BYTES:
                raise HTTPException(413, f"the body is larger than {chat_api.MAX_BODY_BYTES} bytes")
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
        headers = Headers(scope=scope)
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self.host_names and host not in self.host_names:
            # Else another site could reach this server through its own name (DNS rebinding).
            return ApiError(403, "this server answers to localhost alone; --host opens it")
        if not self.api_key or PUBLIC.fullmatch(scope["path"]):
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if secrets.compare_digest(given.encode(), self.api_key.encode()):
            return None
        return ApiError(401, "no valid API key; send Authorization: Bearer KEY", "invalid_api_key")


def create_app(
    engines: Sequence[Engine],
    config: ServerConfig,
    model: str = "nanochat",
    api_key: str = "",
    host_names: frozenset[str] = frozenset(),
) -> FastAPI:
    """The application for `engines`, all with the same `model`; `app.state.chat` is its ChatServer.

    With an `api_key` the API requires it; without `host_names` any Host header is accepted.
    """
    chat = ChatServer(engines, config, model)
    # /docs would load from a CDN; /openapi.json is there.
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, lifespan=chat.lifespan)
    app.state.chat = chat
    app.include_router(api, prefix="/v1")
    app.include_router(api, include_in_schema=False)
    app.include_router(others)
    app.mount("/ui", StaticFiles(directory=UI))
    for kind in (ApiError, RequestValidationError, HTTPException, UserError, Exception):
        app.add_exception_handler(kind, handle_error)
    app.add_middleware(SecurityMiddleware, api_key=api_key, host_names=host_names)
    return app


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; UserError if the address is in use or not this machine's."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise UserError(f"{host}:{port}: {error}; choose another --port or --host") from error
    # Inherited by every connection; asyncio does not set it here, which cost 40 ms an answer.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class Server(uvicorn.Server):
    """uvicorn, but finishing the answers in progress on shutdown; a second Ctrl-C exits at once.

    Until then it accepts connections, so that /ready can report the shutdown.
    """

    async def on_tick(self, counter: int) -> bool:
        """True when the server is to stop accepting connections."""
        ending = await super().on_tick(counter)
        return ending and (self.force_exit or self.config.app.state.chat.drained())  # type: ignore
