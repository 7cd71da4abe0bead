"""What the tests of the server share: an engine that echoes, and a server on a loopback port.

`EchoEngine` has the incremental interface of Engine and needs no model: it says the last user message back, one
byte and so one token per step, or what `scripts` holds for that message. It can be held, slowed and made to fail.
"""

import json
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import torch
import uvicorn

from nanochat.chat_api import Settings
from nanochat.checkpoint import save_checkpoint
from nanochat.common import Runtime, run_dir
from nanochat.engine import Engine, Event, Request, StepFailed
from nanochat.gpt import GPT, GPTConfig
from nanochat.server import ChatServer, Server, create_app, listen
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, chat_tokens

TOKENIZER = Tokenizer([bytes([byte]) for byte in range(256)], SPECIAL_TOKENS, SPLIT_PATTERN)
CHAT = chat_tokens(TOKENIZER)


def save_chat_model(base: Path, monkeypatch: pytest.MonkeyPatch, context: int = 64) -> None:
    """Make `base` the folder of all artifacts, with a random model in it: sft/d2, step 3."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    model = GPT(
        GPTConfig(context, TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    )
    model.init_weights(0)
    TOKENIZER.save(run_dir("sft", "d2") / "tokenizer")
    state = {"step": 3, "model_config": asdict(model.config)}
    runtime = Runtime(torch.device("cpu"), torch.float32, 0, 1, "cpu")
    save_checkpoint(run_dir("sft", "d2"), state, model.state_dict(), {}, None, runtime)


class EchoEngine:
    """Says the last user message back; `cast(Engine, ...)` it is."""

    def __init__(self, num_slots: int = 4, max_len: int = 256) -> None:
        self.num_slots, self.max_len = num_slots, max_len
        self.tokenizer, self.chat, self.device = TOKENIZER, CHAT, torch.device("cpu")
        self.scripts: dict[str, list[int]] = {}
        self.queue: deque[Request] = deque()
        self.slots: dict[Request, deque[int]] = {}
        self.said: dict[Request, int] = {}
        self.go = threading.Event()  # cleared: the next step waits
        self.go.set()
        self.pace = 0.0  # seconds that a step takes at least
        self.num_failures = 0  # so many of the next steps fail
        self.cancelled: list[Request] = []
        self.submitted: list[Request] = []

    @property
    def busy(self) -> bool:
        return bool(self.queue or self.slots)

    @property
    def num_waiting(self) -> int:
        return len(self.queue)

    @property
    def num_running(self) -> int:
        return len(self.slots)

    def submit(self, request: Request) -> None:
        assert len(request.prompt) + request.max_tokens <= self.max_len
        self.queue.append(request)
        self.submitted.append(request)

    def cancel(self, request: Request) -> None:
        self.cancelled.append(request)
        self.slots.pop(request, None)
        if request in self.queue:
            self.queue.remove(request)

    def reset(self) -> None:
        self.queue.clear()
        self.slots.clear()

    def step(self) -> list[Event]:
        assert self.go.wait(20)
        time.sleep(self.pace)
        if self.queue and len(self.slots) < self.num_slots:
            request = self.queue.popleft()
            self.slots[request] = deque(self._answer(request))
            self.said[request] = 0
        if self.num_failures:
            self.num_failures -= 1
            lost = list(self.slots)
            self.slots.clear()
            raise StepFailed(lost)
        return [self._event(request) for request in list(self.slots)]

    def _answer(self, request: Request) -> list[int]:
        if CHAT.user_start not in request.prompt:
            return [CHAT.assistant_end]  # the warm-up
        begin = len(request.prompt) - request.prompt[::-1].index(CHAT.user_start)
        said = request.prompt[begin : request.prompt.index(CHAT.user_end, begin)]
        return [*self.scripts.get(TOKENIZER.decode(said), said), CHAT.assistant_end]

    def _event(self, request: Request) -> Event:
        token = self.slots[request].popleft()
        self.said[request] += 1
        finish = "stop" if token == CHAT.assistant_end else None
        if self.said[request] == request.max_tokens:
            finish = finish or "length"
        if finish:
            del self.slots[request]
        pairs = [(token, -0.5), *((i, -1.0 - i) for i in range(request.logprobs))]
        return Event(request, token, 1, pairs if request.logprobs else None, finish)


class Running:
    """A server under test."""

    def __init__(self, server: Server, address: tuple[str, int]) -> None:
        self.server, self.address = server, address
        self.url = f"http://{address[0]}:{address[1]}"
        self.chat: ChatServer = server.config.app.state.chat  # type: ignore[union-attr]
        self.client = httpx.Client(base_url=self.url, timeout=20, verify=False)

    def ask(self, content: Any = "hello", **more: Any) -> httpx.Response:
        """The response to one question; `more` are fields of the body."""
        body = {"messages": [{"role": "user", "content": content}]} | more
        return self.client.post("/v1/chat/completions", json=body)

    def stream(self, content: Any = "hello", **more: Any) -> "Stream":
        """The whole stream that answers one question."""
        response = self.ask(content, stream=True, **more)
        assert response.status_code == 200, response.text
        return Stream(response)

    def connect(self, content: str, **more: Any) -> socket.socket:
        """A connection that has asked, and can be closed at any moment."""
        body = {"messages": [{"role": "user", "content": content}]} | more
        data = json.dumps(body).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)  # soon full
        connection.settimeout(20)
        connection.connect(self.address)
        connection.sendall(head.encode() + data)
        return connection

    def until(self, condition: Any, seconds: float = 10) -> None:
        """Wait until `condition()` holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never happened"
            time.sleep(0.005)


class Stream:
    """A finished stream, taken apart."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        lines = response.text.split("\n")
        self.comments = [line for line in lines if line.startswith(":")]
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        self.num_done = data.count("[DONE]")
        self.last = data[-1] if data else ""
        self.chunks = [json.loads(event) for event in data if event != "[DONE]"]
        self.choices = [choice for chunk in self.chunks for choice in chunk.get("choices", [])]

    def text(self, index: int = 0) -> str:
        return "".join(c["delta"].get("content", "") for c in self.choices if c["index"] == index)

    @property
    def finish(self) -> list[str]:
        return [c["finish_reason"] for c in self.choices if c["finish_reason"]]


@contextmanager
def serving(
    engines: Sequence[Any], settings: Settings | None = None, loaded: bool = True
) -> Iterator[Running]:
    """A server for `engines` on a free loopback port, in a thread, until the block ends.

    The block begins once the engines are warm, unless `loaded` is False.
    """
    app = create_app([cast(Engine, engine) for engine in engines], settings or Settings())
    config = uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=2)
    server = Server(config)
    with listen("127.0.0.1", 0) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # soon full
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running = Running(server, listener.getsockname())
        try:
            running.until(lambda: server.started)
            running.until(lambda: not loaded or all(r.ready for r in running.chat.replicas))
            yield running
        finally:
            for engine in engines:
                if isinstance(engine, EchoEngine):
                    engine.go.set()
            running.client.close()
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
