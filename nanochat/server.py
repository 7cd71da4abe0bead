"""The web server: an OpenAI-compatible API over one or more engines, and the chat page.

`create_app` wires it up on FastAPI. A request is checked, its prompt is rendered in a worker thread, and the
replica with the least to do takes it on as a job; from then on an `Answer` waits for events and passes them on.

    GET  /v1/models, /v1/models/{id}    POST /v1/chat/completions    and the same without /v1
    GET  /health (the process lives), /ready (it would answer), /metrics, /, /ui/..., /report

What would surprise:
- Middleware here is plain ASGI: FastAPI's decorator for it would hide a client's leaving from a stream.
- After a SIGTERM the doors stay open until what is under way has ended, so that /ready can tell that they close.
- FastAPI's /docs is off, as it loads from a CDN; /openapi.json is there.
"""

import asyncio
import re
import secrets
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.api import (
    MAX_BODY_BYTES,
    ApiError,
    ChatRequest,
    Settings,
    engine_requests,
    validation_error,
)
from nanochat.completion import Answer, Choice, Completion
from nanochat.engine import Engine
from nanochat.paths import UserError, report_dir
from nanochat.replica import Job, Metrics, Replica

UI = Path(__file__).parent / "ui"
PUBLIC = re.compile(r"/(ui/.*|health|ready|report)?")  # what needs no API key
POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
)
DRAIN_SECONDS = 30.0  # that answers under way get when the server is to end


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

    async def handle_error(self, request: Request, error: Exception) -> Response:
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
