"""Load on a server: time to first token and between tokens, tokens per second, refusals.

    python -m dev.bench.serve_load               # 16 clients of a server with a random model
    python -m dev.bench.serve_load --slots 4 --clients 200
    python -m dev.bench.serve_load --url http://127.0.0.1:8000

A client asks again once answered. "lost" requests were neither answered whole nor refused.
"""

import asyncio
import json
import multiprocessing
import random
import statistics
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, product

import httpx
import tyro
import uvicorn

from nanochat.chat_api import ServerConfig
from nanochat.checkpoint import build_model
from nanochat.common import set_up
from nanochat.engine import Engine
from nanochat.jobs import ServedModel
from nanochat.scaling import depth_to_config
from nanochat.server import Server, create_app
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer


@dataclass
class Config:
    url: str = ""  # of a server that is there; empty: start one
    clients: int = 16  # at once
    seconds: float = 60.0  # of load
    slots: int = 16  # of the server that is started
    depth: int = 4  # layers of its model


class Seen:
    """What the clients measured."""

    def __init__(self) -> None:
        # Seconds to the first token, and between two chunks.
        self.times: dict[str, list[float]] = defaultdict(list)
        self.num_tokens = 0
        self.tok_per_second = 0.0
        self.ends = Counter[str]()


def letter_tokenizer(vocab_size: int = 32_768) -> Tokenizer:
    """Tokens are bytes and letter combinations, so that none need be trained."""
    words = (bytes(word) for size in (2, 3, 4) for word in product(range(97, 123), repeat=size))
    num_words = vocab_size - 256 - len(SPECIAL_TOKENS)
    tokens = [*(bytes([byte]) for byte in range(256)), *islice(words, num_words)]
    return Tokenizer(tokens, SPECIAL_TOKENS, SPLIT_PATTERN)


def serve(port: int, slots: int, depth: int) -> None:
    """Serve a random model with a context of 512; runs as a separate process."""
    runtime, tokenizer = set_up(), letter_tokenizer()
    model = build_model(depth_to_config(depth, tokenizer.vocab_size, 512), None, runtime)
    engine = Engine(model.to(runtime.dtype).eval(), tokenizer, slots)
    model = ServedModel("random", "chat", engine.max_len, 0, lambda: engine, preloaded=engine)
    app = create_app([model], ServerConfig(temperature=1.0))
    Server(uvicorn.Config(app, port=port, log_level="warning")).run()


async def ask(http: httpx.AsyncClient, rng: random.Random, seen: Seen) -> None:
    """Stream one answer, recording it in `seen`."""
    content = "".join(rng.choices("abcdefgh ", k=rng.randint(20, 200)))
    body = {"messages": [{"role": "user", "content": content}], "stream": True}
    body |= {"max_tokens": rng.randint(32, 96), "stream_options": {"include_usage": True}}
    end, last, label = "lost", time.perf_counter(), "first token"
    with suppress(httpx.TransportError):
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                end = f"refused with {response.status_code}"
            async for line in response.aiter_lines():
                if '"delta":{"content"' in line:
                    seen.times[label].append(time.perf_counter() - last)
                    label, last = "between", time.perf_counter()
                elif '"completion_tokens"' in line:
                    usage = json.loads(line[len("data: ") :])["usage"]
                    seen.num_tokens += usage["completion_tokens"]
                elif "[DONE]" in line:
                    end = "answered"
    seen.ends[end] += 1
    if end == "refused with 429":
        await asyncio.sleep(rng.uniform(0.5, 1.5))


async def load(http: httpx.AsyncClient, cfg: Config) -> Seen:
    """What `seconds` of load show, and the requests then in progress, which may finish."""
    seen, begin = Seen(), time.perf_counter()

    async def client(number: int) -> None:
        rng = random.Random(number)
        while time.perf_counter() < begin + cfg.seconds:
            await ask(http, rng, seen)

    await asyncio.gather(*map(client, range(cfg.clients)))
    seen.tok_per_second = seen.num_tokens / (time.perf_counter() - begin)
    return seen


async def run(cfg: Config, url: str) -> Seen:
    """The measurements of the server at `url`, once it is ready and warm."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as http:
        ready = False
        while not ready:
            await asyncio.sleep(0.2)
            with suppress(httpx.TransportError):
                ready = (await http.get("/ready")).status_code == 200
        await load(http, replace(cfg, clients=2, seconds=2))
        return await load(http, cfg)


def main(cfg: Config) -> None:
    url = cfg.url
    if not url:
        own = (8701, cfg.slots, cfg.depth)
        multiprocessing.get_context("spawn").Process(target=serve, args=own, daemon=True).start()
        url = f"http://127.0.0.1:{own[0]}"
    seen = asyncio.run(run(cfg, url))
    print(f"tok/s  {seen.tok_per_second:.0f}")
    for end in {"lost", *seen.ends}:
        print(f"{end}  {seen.ends[end]}")
    for label, seconds in seen.times.items():
        cuts = statistics.quantiles(seconds, n=100, method="inclusive")
        for percent in (50, 95, 99):
            print(f"{label}, ms of {percent} %  {1000 * cuts[percent - 1]:.1f}")


if __name__ == "__main__":
    main(tyro.cli(Config))
