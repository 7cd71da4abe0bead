"""The web server: an OpenAI-compatible API over one or more models, and the chat page.

    POST /v1/chat/completions, /v1/completions, /v1/tokenize, /v1/detokenize
    GET  /v1/models, /v1/models/{id}    and all of these without /v1
    GET  /health (alive), /ready (would answer), /metrics, /openapi.json, /docs
    GET  / and /ui/... (the chat page), /report, /runs, /runs/data

A request is validated, its model is loaded if need be, its prompt is rendered in a thread, and the
model's EngineWorker takes it as a job. To make room for a model, those that are not in use leave
the memory, the one unused for longest first.
"""

import asyncio
import json
import math
import re
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import prometheus_client as prometheus
import uvicorn
import yaml
from fastapi import APIRouter, Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import TypedDict
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat import chat_api
from nanochat.chat_api import ApiError, ChatRequest, Completion, ServerConfig, TextRequest
from nanochat.common import UserError, report_dir
from nanochat.jobs import ANSWER_SECONDS, EngineWorker, Job, Metrics, ServedModel, log
from nanochat.runs import Runs

STALLED_SECONDS = 60.0  # a client may leave an answer unread for this long
DRAIN_SECONDS = 30.0  # for answers in progress at shutdown
ROOM_SECONDS = 5.0  # that a request waits for models in use to make room for its own
UI = Path(__file__).parent / "ui"
PUBLIC = re.compile(r"/(ui/.*|health|ready|runs|docs|openapi.json)?")  # needs no API key
POLICY = (  # the last line: no script may turn text into markup or code
    "default-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
)


class ErrorBody(TypedDict):
    error: dict[Literal["message", "type", "param", "code"], str | None]


class EventStream(StreamingResponse):
    """A job's answer as a stream; its end, of whatever kind, ends the job."""

    def __init__(self, job: Job, worker: EngineWorker) -> None:
        headers = {"X-Accel-Buffering": "no"}
        super().__init__(job.stream(), headers=headers, media_type="text/event-stream")
        self.job, self.worker = job, worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.worker.cancel(self.job.choices)


class Connection(H11Protocol):
    """Breaks off once its client has stopped reading."""

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(sys.maxsize)

    def _watch(self, num_before: int) -> None:
        """Break off if none of the bytes that waited before has left since."""
        if (num_waiting := self.transport.get_write_buffer_size()) >= num_before:
            self.transport.abort()
        else:
            self.stalled = self.loop.call_later(STALLED_SECONDS, self._watch, num_waiting)

    def resume_writing(self) -> None:
        self.stalled.cancel()
        super().resume_writing()


class ChatServer:
    """What the routes share: models and metrics."""

    def __init__(self, models: Sequence[ServedModel], config: ServerConfig, memory: float) -> None:
        """The first of `models` is the default; those loaded take at most `memory` bytes."""
        self.models = {model.name: model for model in models}
        self.default, self.config, self.memory = models[0], config, memory
        self.metrics, self.runs, self.created = Metrics(), Runs(), int(time.time())
        self.drain_until = 0.0  # deadline for answers in progress, once shutting down

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Start and stop the engines with the server."""
        for model in self.models.values():
            if model.preloaded:
                self._start(model)
        yield
        workers = self.workers
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.thread.join(timeout=5)

    @property
    def workers(self) -> list[EngineWorker]:
        return [model.worker for model in self.models.values() if model.worker]

    @property
    def is_broken(self) -> bool:
        """An engine has died or hangs, or none can be loaded: only a new process helps."""
        some_ready = any(worker.ready for worker in self.workers)
        return any(
            worker.hangs or (worker.failed and not (worker.error and some_ready))
            for worker in self.workers
        )

    def card(self, model: ServedModel) -> dict[str, Any]:
        loaded = model.worker is not None and model.worker.ready
        return {
            "id": model.name, "object": "model", "created": self.created, "owned_by": "nanochat",
            "context_length": model.max_len, "kind": model.kind, "loaded": loaded,
        }  # fmt: skip

    def look_up(self, name: str) -> ServedModel:
        """The model, loaded or not, the default one for ""; ApiError if there is none."""
        if name and name not in self.models:
            text = f"there is no model {name[:80]!r} here; /v1/models lists those there are"
            raise ApiError(404, text, "model_not_found", "model")
        return self.models[name] if name else self.default

    async def find(self, name: str) -> ServedModel:
        """As look_up, once loading has ended, well or not; ApiError if there is no room for it."""
        self.check_open()
        model = self.look_up(name)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._load(model)
        except TimeoutError as error:
            text = "the model takes too long to load"
            raise ApiError(503, text, "timeout", retry_after=10) from error
        self.check_open()
        return model

    async def _load(self, model: ServedModel) -> None:
        """Load it, unless it is loaded; models are loaded one at a time."""
        deadline = time.monotonic() + ROOM_SECONDS
        while model.worker is None or model.worker.error:  # which the next request tries again
            others = [worker for worker in self.workers if worker.state == "loading"]
            if others:
                await others[0].settled.wait()
            elif (leaving := self._find_room(model)) is not None:
                self._start(model, leaving)
            elif time.monotonic() < deadline:
                await asyncio.sleep(0.1)
            else:
                text = f"there is no room for {model.name} while the other models are in use"
                raise ApiError(503, text, "model_busy", retry_after=5)
        worker, model.used = model.worker, time.monotonic()
        await worker.settled.wait()
        model.used = time.monotonic()

    def _start(self, model: ServedModel, leaving: Sequence[ServedModel] = ()) -> None:
        workers = [other.worker for other in leaving if other.worker]
        for other in leaving:
            other.worker = None
        for worker in workers:
            worker.stop()
        model.worker = EngineWorker(model.open, self.metrics, self.config.queue, workers)

    def _find_room(self, model: ServedModel) -> list[ServedModel] | None:
        """Which models are to leave for `model`; None if that would not do at present."""
        if model.num_bytes > self.memory:
            text = f"{model.name} needs more memory than this server has; see --memory"
            raise ApiError(400, text, "model_too_large", "model")
        held = [each for each in self.models.values() if each.worker and not each.worker.error]
        excess = sum(each.num_bytes for each in held) + model.num_bytes - self.memory
        leaving = []
        for other in sorted(held, key=lambda each: each.used):
            if excess > 0 and other.is_idle:
                leaving.append(other)
                excess -= other.num_bytes
        return leaving if excess <= 0 else None

    def check_open(self) -> None:
        """Raise ApiError if the server is shutting down."""
        if self.drain_until:
            raise self._closing()

    def drained(self) -> bool:
        """Refuse new jobs; True once none is left, all being failed after DRAIN_SECONDS."""
        self.drain_until = self.drain_until or time.monotonic() + DRAIN_SECONDS
        if time.monotonic() < self.drain_until and any(worker.jobs for worker in self.workers):
            return False
        self.fail_all(self._closing())
        return True

    def fail_all(self, error: ApiError) -> None:
        for worker in self.workers:
            worker.fail(list(worker.jobs), error)

    def _closing(self) -> ApiError:
        return ApiError(503, "the server is shutting down", "shutting_down", retry_after=5)


async def chat_server(request: HttpRequest) -> ChatServer:
    return request.app.state.chat


Chat = Annotated[ChatServer, Depends(chat_server)]
ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "An error; its code says which."}
}
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, whole or as a stream.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    }
}
api, others = APIRouter(responses=ERRORS), APIRouter(responses=ERRORS)


@api.get("/models")
async def list_models(chat: Chat) -> dict[str, Any]:
    """The models that may be asked for, the default one first."""
    return {"object": "list", "data": [chat.card(model) for model in chat.models.values()]}


@api.get("/models/{model_id:path}")
async def show_model(model_id: str, chat: Chat) -> dict[str, Any]:
    """One model; asking it something loads it."""
    return chat.card(chat.look_up(model_id))


async def answer(body: chat_api.Body, http: HttpRequest, chat: ChatServer) -> Response:
    """The response to `body`, whole or as a stream; its end, of whatever kind, ends the job."""
    body.check_supported()  # before another model is loaded for it
    model = await chat.find(body.model)
    # In a thread, since 32,000 characters take 5 ms, and tiktoken works without the GIL.
    prepare = chat_api.engine_requests
    requests = await asyncio.to_thread(prepare, body, model.engine, model.kind, chat.config)
    shape = chat_api.TextCompletion if isinstance(body, TextRequest) else Completion
    completion = shape(model.name, body, model.engine.tokenizer, requests)
    job, worker = Job(requests, completion), model.choose_worker()
    worker.submit(job)
    if body.stream:
        return EventStream(job, worker)
    try:
        async for _ in job.follow():
            if await http.is_disconnected():
                return Response()  # to nobody
        return JSONResponse(completion.whole())
    finally:
        worker.cancel(job.choices)


@api.post("/chat/completions", responses=ANSWER)
async def complete_chat(body: ChatRequest, http: HttpRequest, chat: Chat) -> Response:
    """The model's turn in a conversation."""
    return await answer(body, http, chat)


@api.post("/completions", responses=ANSWER)
async def complete_text(body: TextRequest, http: HttpRequest, chat: Chat) -> Response:
    """What the model writes after each prompt."""
    return await answer(body, http, chat)


async def convert(body: chat_api.Conversion, chat: ChatServer) -> Response:
    model = chat.look_up(body.model)
    return JSONResponse(await asyncio.to_thread(body.answer, model.engine, model.kind))


@api.post("/tokenize")
async def tokenize(body: chat_api.TokenizeRequest, chat: Chat) -> Response:
    """The tokens of a text, or of a chat's prompt."""
    return await convert(body, chat)


@api.post("/detokenize")
async def detokenize(body: chat_api.DetokenizeRequest, chat: Chat) -> Response:
    """The text of tokens."""
    return await convert(body, chat)


@others.get("/health")
async def health() -> dict[str, str]:
    """The server is alive."""
    return {"status": "ok"}


@others.get("/ready")
async def ready(chat: Chat) -> dict[str, str]:
    """A request would be served."""
    chat.check_open()
    if chat.is_broken:
        text = "an engine has stopped or none can be loaded; see the log and restart the server"
        raise ApiError(503, text, retry_after=30)
    if (worker := chat.default.worker) and not worker.error:  # else it is loaded when asked for
        chat.default.choose_worker()
    return {"status": "ready"}


@others.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
async def show_metrics(chat: Chat) -> Response:
    """Prometheus's text format."""
    chat.metrics.refresh(chat.workers)
    return Response(chat.metrics.text(), media_type=prometheus.CONTENT_TYPE_LATEST)


@others.get("/docs", include_in_schema=False)
async def docs(http: HttpRequest) -> Response:
    """What /openapi.json says, for people: the usual pages load scripts from elsewhere."""
    return PlainTextResponse(yaml.safe_dump(http.app.openapi(), sort_keys=False))


@others.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page() -> Response:
    return FileResponse(UI / "index.html")


@others.api_route("/report", methods=["GET", "HEAD"], include_in_schema=False)
async def report() -> Response:
    path = report_dir() / "report.html"
    if not path.is_file():
        raise ApiError(404, "there is no report; run `python -m nanochat.report generate`")
    return FileResponse(path, headers={"Content-Security-Policy": REPORT_POLICY})


@others.api_route("/runs", methods=["GET", "HEAD"], include_in_schema=False)
async def runs_page() -> Response:
    return FileResponse(UI / "runs.html")


@others.get("/runs/data", include_in_schema=False)
def runs_data(chat: Chat) -> Response:  # in a thread, as this is no coroutine: it reads files
    return Response(json.dumps(chat.runs.read()), media_type="application/json")


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
    if error.status == 429:
        headers["Connection"] = "close"  # so that the next try may reach another process
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

        path = scope.get("path", "/")
        bare = path.rstrip("/") or "/"
        if not (PUBLIC.fullmatch(path) or PUBLIC.fullmatch(bare)):
            scope = {**scope, "path": bare}  # a redirect, as for pages, may lose a POST's body
        error = self._refusal(scope) if scope["type"] == "http" else None
        respond = JSONResponse(error.body, error.status, error.headers) if error else self.app
        await respond(scope, receive_limited, send_guarded)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if self.host_names and host not in self.host_names:
            # Else another site could reach this server through its own name (DNS rebinding).
            return ApiError(403, "this server answers to localhost alone; --host opens it")
        if not self.api_key or PUBLIC.fullmatch(scope["path"]):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        is_known = secrets.compare_digest(given.strip().encode(), self.api_key.encode())
        if is_known and scheme.lower() == "bearer":
            return None
        text = "no valid API key; send Authorization: Bearer KEY"
        error = ApiError(401, text, "invalid_api_key")
        error.headers["WWW-Authenticate"] = "Bearer"
        return error


def create_app(
    models: Sequence[ServedModel],
    config: ServerConfig,
    memory: float = math.inf,
    api_key: str = "",
    host_names: frozenset[str] = frozenset(),
) -> FastAPI:
    """The application that offers `models`; `app.state.chat` is its ChatServer.

    The first model is the default; those loaded take at most `memory` bytes. With an `api_key` the
    API requires it; without `host_names` any Host header is accepted.
    """
    chat = ChatServer(models, config, memory)
    app = FastAPI(
        title="nanochat", version=version("nanochat"), lifespan=chat.lifespan,
        docs_url=None, redoc_url=None,  # which load from a CDN
    )  # fmt: skip
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

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None] | None = None) -> None:
        """With `ready` it is one of several processes that share a listener.

        It calls that once it would answer, and ends if an engine does, to be replaced.
        """
        config.http = Connection
        super().__init__(config)
        self.ready, self.is_replaceable = ready, ready is not None
        self.chat: ChatServer = config.app.state.chat  # type: ignore[union-attr]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        shared = sockets if self.is_replaceable and sockets else []
        await super().startup([] if shared else sockets)
        self.accepting = [asyncio.create_task(self._accept(listener)) for listener in shared]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self.accepting:
            task.cancel()
        await super().shutdown(sockets)

    async def _accept(self, listener: socket.socket) -> None:
        """Take connections one by one; a busy process waits longer, so that the idlest takes each.

        Else the first to wake takes all of a burst: dev/LOG.md, "One listener for several
        processes".
        """
        loop, state, arrived = asyncio.get_running_loop(), self.server_state, asyncio.Event()
        protocol = partial(
            self.config.http_protocol_class,
            config=self.config,
            server_state=state,
            app_state=self.lifespan.state,
        )
        listener.setblocking(False)
        while True:
            try:
                loop.add_reader(listener, arrived.set)
                await arrived.wait()
                loop.remove_reader(listener)
                arrived.clear()
                await asyncio.sleep(min(0.5e-3 * len(state.connections), 10e-3))
                await loop.connect_accepted_socket(protocol, listener.accept()[0])
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                pass  # another was faster, or the client has left
            except Exception as error:  # such as too many open files
                log.error("a connection was lost: %r", error)
                await asyncio.sleep(1)

    async def on_tick(self, counter: int) -> bool:
        """True when the server is to stop accepting connections."""
        ending = await super().on_tick(counter)
        if counter % 10 == 0:
            self.chat.metrics.refresh(self.chat.workers)
        if self.is_replaceable and self.chat.is_broken:
            self.chat.fail_all(ApiError(503, "the engine has stopped; try again", retry_after=1))
            return True
        if self.ready and any(worker.ready for worker in self.chat.workers):
            self.ready()
            self.ready = None
        return ending and (self.force_exit or self.chat.drained())
