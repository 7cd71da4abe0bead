"""For the tests of the chat page: a headless browser, and a server that gives the page and scripted replies.

A reply is a list of steps, taken in turn: bytes to send, an Event to wait for, or KILL to drop the connection.
The server sends the content security policy that the page must live under, and asks for no more than
the page may expect of any OpenAI-compatible server.
"""

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

UI = Path(__file__).resolve().parent.parent / "nanochat/ui"
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
KILL = object()
MODEL = {"id": "toy", "object": "model", "context_length": 1024}

Steps = Sequence[bytes | threading.Event | object]  # of one reply


@contextmanager
def open_browser() -> Iterator[Any]:
    """A headless Chromium with an empty profile; skips the test where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM}: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def event(data: object) -> bytes:
    """One event of a server-sent stream."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def piece(**delta: object) -> bytes:
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


def ending(reason: str = "stop", total_tokens: int = 64) -> list[bytes]:
    """What closes a complete reply: the reason, what it cost, and the mark of the end."""
    usage = {
        "prompt_tokens": 24,
        "completion_tokens": total_tokens - 24,
        "total_tokens": total_tokens,
    }
    timings = {"queue_seconds": 0.0, "first_token_seconds": 0.05, "tokens_per_second": 41.6}
    return [
        event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}),
        event({"choices": [], "usage": usage, "timings": timings}),
        event("[DONE]"),
    ]


def reply(*texts: str) -> list[bytes]:
    return [
        piece(role="assistant", content=""),
        *(piece(content=text) for text in texts),
        *ending(),
    ]


class FakeServer:
    """Serves the page and, one after another, the replies in `replies`; `asked` holds the bodies of the requests."""

    def __init__(self) -> None:
        self.replies: list[Steps | int] = []  # a number: an error of that status
        self.asked: list[dict[str, Any]] = []
        self.left = threading.Event()  # set when a reader has gone before the end of its reply
        self.has_report = False
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Listen; again on the same port after `kill`."""
        owner = self

        class Handler(_Handler):
            fake = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def kill(self) -> None:
        """Stop listening. A reply that is under way ends with its next step KILL."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._answer(
            200 if self.path == "/report" and self.fake.has_report else 404, "text/html", b""
        )

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            return self._answer(200, "application/json", json.dumps({"data": [MODEL]}).encode())
        name = {"/": "index.html", "/report": "index.html"}.get(
            self.path, self.path.removeprefix("/ui/")
        )
        file = UI / name
        if not file.is_file():
            return self._answer(404, "text/plain", b"not found")
        self._answer(200, TYPES[file.suffix], file.read_bytes())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.fake.asked.append({**json.loads(body), "authorization": self.headers["Authorization"]})
        steps = self.fake.replies.pop(0)
        if isinstance(steps, int):
            error = {
                "message": f"a fault of number {steps}",
                "type": "x",
                "param": None,
                "code": None,
            }
            return self._answer(steps, "application/json", json.dumps({"error": error}).encode())
        self._start(200, "text/event-stream", [("Transfer-Encoding", "chunked")])
        try:
            self._take(steps)
        except OSError:
            self.fake.left.set()
            self.close_connection = True

    def _take(self, steps: Steps) -> None:
        for step in steps:
            if step is KILL:
                self.close_connection = True
                return
            if isinstance(step, threading.Event):
                self._wait(step)
            elif isinstance(step, bytes):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(step), step))
        self.wfile.write(b"0\r\n\r\n")

    def _wait(self, gate: threading.Event) -> None:
        """Wait for the gate; raises OSError when the reader goes meanwhile, or after 20 s."""
        self.connection.settimeout(0.01)
        for _ in range(2000):
            if gate.is_set():
                self.connection.settimeout(None)
                return
            try:
                if not self.connection.recv(1, socket.MSG_PEEK):
                    break
            except TimeoutError:
                continue
        raise ConnectionError("gone")

    def _answer(self, status: int, kind: str, content: bytes) -> None:
        self._start(
            status,
            kind,
            [("Content-Length", str(len(content))), *([("Retry-After", "2")] * (status == 429))],
        )
        if self.command != "HEAD":
            self.wfile.write(content)

    def _start(self, status: int, kind: str, headers: list[tuple[str, str]]) -> None:
        self.send_response(status)
        policy = [("Content-Security-Policy", POLICY), ("Cache-Control", "no-store")]
        for name, value in [("Content-Type", kind), *policy, *headers]:
            self.send_header(name, value)
        self.end_headers()
