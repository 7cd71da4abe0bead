"""What the tests of the server share: an engine that echoes, and a server on a loopback port.

`EchoEngine` is the real engine around a model that says the last user message back, one byte and so
one token per step, or what `scripts` holds for that message. It can be held, slowed and made to
fail.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import torch
import uvicorn
from torch import nn

from nanochat.chat_api import ServerConfig
from nanochat.engine import Engine, Event, Request
from nanochat.gpt import GPT, GPTConfig
from nanochat.jobs import ServedModel
from nanochat.kv_cache import KVCache
from nanochat.server import ChatServer, Server, create_app, listen
from nanochat.tokenizer import chat_tokens
from tests.models import TOKENIZER, random_gpt, save_model

CHAT = chat_tokens(TOKENIZER)


def save_chat_model(base: Path, monkeypatch: pytest.MonkeyPatch, context: int = 64) -> None:
    """Make `base` the folder of all artifacts, with a random model in it: sft/d2, step 3."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    save_model(random_gpt(context), "sft", "d2", step=3)


class ScriptedModel(nn.Module):
    """Says for certain what `next_token` gives it for a slot and the newest token there."""

    def __init__(self, context: int, next_token: Callable[[int, int], int]) -> None:
        super().__init__()
        self.next_token = next_token
        self.config = GPTConfig(
            context, TOKENIZER.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=2, smear=False
        )
        self.compute_dtype = torch.float32
        self.one = nn.Parameter(torch.ones(1))

    def make_cache(self, num_slots: int, max_len: int, device: str = "cpu") -> KVCache:
        return KVCache(1, num_slots, 1, max_len, 2, 2, device, self.compute_dtype)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, 2)

    def forward(
        self,
        ids: torch.Tensor,
        *,
        cache: KVCache,
        slots: torch.Tensor | None = None,
        num_new: torch.Tensor,
        packed: bool = False,
        last_only: bool,
    ) -> torch.Tensor:
        assert last_only and not packed
        step = cache.begin(len(ids), ids.shape[1], slots, num_new)
        cache.finish(step)
        newest = ids.flatten()[step.last].tolist()
        logits = torch.zeros(len(ids), 1, TOKENIZER.vocab_size)
        for row, (slot, count) in enumerate(zip(step.slots, step.num_new, strict=True)):
            if count:
                logits[row, 0, self.next_token(slot, newest[row])] = 50
        return logits


class EchoEngine(Engine):
    """Says the last user message back."""

    def __init__(self, num_slots: int = 4, max_len: int = 256, pace: float = 0.0) -> None:
        model = cast(GPT, ScriptedModel(max_len, self.token))
        super().__init__(model, TOKENIZER, num_slots, deterministic=True)
        self.scripts: dict[str, list[int]] = {}
        self.go = threading.Event()  # cleared: the next step waits
        self.go.set()
        self.pace = pace  # seconds that a step takes at least
        self.num_failures = 0  # so many of the next steps fail
        self.cancelled: list[Request] = []

    def cancel(self, request: Request) -> None:
        self.cancelled.append(request)
        super().cancel(request)

    def step(self) -> list[Event]:
        assert self.go.wait(20)
        time.sleep(self.pace)
        return super().step()

    def token(self, slot: int, _: int) -> int:
        """The next token of the answer in this slot."""
        if self.num_failures:
            self.num_failures -= 1
            raise RuntimeError("out of order")
        [asked] = [each for each in self.running if each.index == slot]
        prompt, said = asked.request.prompt, list[int]()
        if CHAT.user_start in prompt:  # else it is the warm-up
            begin = len(prompt) - prompt[::-1].index(CHAT.user_start)
            said = prompt[begin : prompt.index(CHAT.user_end, begin)]
            said = self.scripts.get(TOKENIZER.decode(said), said)
        return [*said, CHAT.assistant_end][asked.num_generated]


def question(content: Any) -> dict[str, Any]:
    """The body of a request."""
    return {"messages": [{"role": "user", "content": content}]}


class Running:
    """A server under test."""

    def __init__(self, server: Server, address: tuple[str, int]) -> None:
        self.server, self.address = server, address
        self.url = f"http://{address[0]}:{address[1]}"
        self.chat: ChatServer = server.config.app.state.chat  # type: ignore[union-attr]
        self.client = httpx.Client(base_url=self.url, timeout=20, verify=False)

    def ask(self, content: Any = "hello", **more: Any) -> httpx.Response:
        """The response to one question; `more` are fields of the body."""
        return self.client.post("/v1/chat/completions", json=question(content) | more)

    def stream(self, content: Any = "hello", **more: Any) -> "Stream":
        """The whole stream that answers one question."""
        response = self.ask(content, stream=True, **more)
        assert response.status_code == 200, response.text
        return Stream(response)

    def connect(self, content: str, **more: Any) -> socket.socket:
        """A connection that has asked, and can be closed at any moment."""
        data = json.dumps(question(content) | more).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)  # soon full
        connection.settimeout(20)
        connection.connect(self.address)
        connection.sendall(head.encode() + data)
        return connection

    def num_jobs(self) -> int:
        """Engine requests under way."""
        return sum(len(worker.jobs) for worker in self.chat.workers)

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
    engines: Sequence[Engine],
    config: ServerConfig | None = None,
    loaded: bool = True,
    **options: Any,
) -> Iterator[Running]:
    """A server for `engines` on a free loopback port, in a thread, until the block ends.

    They are chat models named nanochat, nanochat-1, ..., all loaded; for others there is
    `serving_models`. The block begins once they are warm, unless `loaded` is False. `options` are
    serving_models' and create_app's.
    """
    names = ["nanochat", *(f"nanochat-{number}" for number in range(1, len(engines)))]
    models = [
        ServedModel(name, "chat", engine.max_len, 1, load=EchoEngine, preloaded=engine)
        for name, engine in zip(names, engines, strict=True)
    ]
    with serving_models(models, config, loaded, **options) as running:
        yield running


@contextmanager
def serving_models(
    models: Sequence[ServedModel],
    config: ServerConfig | None = None,
    loaded: bool = True,
    ready: Callable[[], None] | None = None,
    port: int = 0,
    **options: Any,
) -> Iterator[Running]:
    """The same for `models`, of which those preloaded are loaded; `ready` is Server's."""
    app = create_app(models, config or ServerConfig(), **options)
    server = Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=2), ready)
    with listen("127.0.0.1", port) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # soon full
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        running = Running(server, listener.getsockname())
        try:
            running.until(lambda: server.started)
            running.until(lambda: not loaded or all(w.ready for w in running.chat.workers))
            yield running
        finally:
            for worker in running.chat.workers:
                if isinstance(engine := getattr(worker, "engine", None), EchoEngine):
                    engine.go.set()
            running.client.close()
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
