"""For the tests of the chat page: a server that gives the page and scripted replies.

A reply is a list of steps (bytes to send, an Event to wait for, or KILL to drop the connection), or
the number of an error, or {model: a list of steps} for models that are asked at the same time. The
server asks for no more than any OpenAI-compatible one would.
"""

import json
import math
import threading
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nanochat.server import POLICY, UI

KILL = object()
MODEL = {"id": "toy", "object": "model", "context_length": 1024, "kind": "chat"}

Steps = Sequence[bytes | threading.Event | object]
Answer = Steps | int | dict[str, Steps | int]


def card(name: str, kind: str = "chat") -> dict[str, Any]:
    """Another model than the one."""
    return MODEL | {"id": name, "kind": kind}


def event(data: object) -> bytes:
    """One event of a server-sent stream."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def piece(**delta: object) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


def token(text: str, probability: float, **others: float) -> bytes:
    """A piece of one token, with its probability and those of the others that were likely."""
    entries = [
        {"token": t, "logprob": math.log(p)} for t, p in {text: probability, **others}.items()
    ]
    logprobs = {"content": [entries[0] | {"top_logprobs": entries}]}
    about = {"index": 0, "finish_reason": None, "logprobs": logprobs}
    return event({"choices": [about | {"delta": {"content": text}}]})


def text_piece(text: str) -> bytes:
    """A piece of what a base model adds to a text."""
    return event({"choices": [{"text": text, "index": 0, "finish_reason": None}]})


def ending(reason: str = "stop") -> list[bytes]:
    """What closes a complete reply: the reason, what it cost, and the mark of the end."""
    usage = {"prompt_tokens": 24, "completion_tokens": 40, "total_tokens": 64}
    timings = {"queue_seconds": 0.0, "first_token_seconds": 0.05, "tokens_per_second": 41.6}
    return [
        event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}),
        event({"choices": [], "usage": usage, "timings": timings}),
        event("[DONE]"),
    ]


def reply(*texts: str) -> list[bytes]:
    pieces = [piece(content=text) for text in texts]
    return [piece(role="assistant", content=""), *pieces, *ending()]


class FakeServer(ThreadingHTTPServer):
    """Serves the page and, one by one, `replies`; `asked` holds what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(UI.parent)))
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.reset()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def reset(self) -> None:
        self.replies: list[Answer] = []
        self.asked: list[dict[str, Any]] = []
        self.left = threading.Event()  # set when a reader has gone before the end of its reply
        self.has_report = False
        self.models: list[dict[str, Any]] = [MODEL]
        self.is_dead = False  # drops every connection
        self.ready = threading.Event()  # unless it is set, the models are not told
        self.ready.set()


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def end_headers(self) -> None:
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def do_HEAD(self) -> None:
        self._answer(200 if self.server.has_report else 404)

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.server.ready.wait()
            return self._answer(200, {"data": self.server.models})
        if self.path == "/":
            self.path = "/ui/index.html"
        super().do_GET()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.is_dead:
            self.close_connection = True
            return
        about = {"path": self.path, "authorization": self.headers["Authorization"]}
        self.server.asked.append({**body, **about})
        steps = first = self.server.replies[0]
        if isinstance(first, dict):
            steps = first.pop(body["model"])
        if not isinstance(first, dict) or not first:
            self.server.replies.pop(0)
        if isinstance(steps, int):
            return self._answer(steps, {"error": {"message": f"a fault of number {steps}"}})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._take(steps)
        except OSError:
            self.server.left.set()
            self.close_connection = True

    def _take(self, steps: Steps) -> None:
        for step in steps:
            if step is KILL:
                self.close_connection = True
                return
            while isinstance(step, threading.Event) and not step.wait(0.02):
                self._send(b": ping\n\n")  # or it would not be noticed that the reader has gone
            if isinstance(step, bytes):
                self._send(step)
        self._send(b"")

    def _send(self, chunk: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))

    def _answer(self, status: int, data: object = None) -> None:
        content = json.dumps(data).encode() if data else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == 429:
            self.send_header("Retry-After", "2")
        self.end_headers()
        self.wfile.write(content)
