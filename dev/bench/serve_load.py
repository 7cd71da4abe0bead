"""Load on a server: time to the first token and between tokens, tokens per second, who is refused, who is lost.

    python -m dev.bench.serve_load                                     # 16 clients: 16 slots against one at a time
    python -m dev.bench.serve_load --slots 4 --clients 200 --leave 0.5 --seconds 60
    python -m dev.bench.serve_load --url http://127.0.0.1:8000 --rate 5

Without --url it starts two servers with the same random model, one with --slots and one that answers one request at
a time, and loads them in turns, so that a busy machine disturbs both alike. A client asks again as soon as it is
answered; with --rate, requests come at random moments instead, so many a second, whoever has been answered.

"lost" is who was neither answered whole, nor refused, nor left by himself.
"""

import asyncio
import json
import multiprocessing
import random
import re
import statistics
import time
from asyncio import StreamReader
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice, product
from urllib.parse import urlsplit

import torch
import tyro
import uvicorn

from nanochat.chat_api import ServerConfig
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.scaling import depth_to_config
from nanochat.server import Server, create_app
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

PATH = "/v1/chat/completions"


@dataclass
class Config:
    """Load a server and print what its clients saw."""

    url: str = ""  # of a server that is there; empty: start two
    clients: int = 16  # at once
    rate: float = 0.0  # requests a second at random moments; 0: each client asks again at once
    seconds: float = 20.0  # of each round
    num_rounds: int = 3  # for each server
    prompt_chars: tuple[int, int] = (20, 200)  # least and most
    max_tokens: tuple[int, int] = (32, 96)  # least and most
    leave: float = 0.0  # share of the requests that are left within 3 seconds
    slots: int = 16  # of the server that is started
    depth: int = 4  # layers of its model
    vocab_size: int = 32768  # likewise
    seed: int = 0  # of the requests


@dataclass
class Seen:
    """What the clients of one server saw, in all rounds so far."""

    first: list[float] = field(default_factory=list)  # seconds to the first token
    between: list[float] = field(default_factory=list)  # seconds between two chunks
    health: list[float] = field(default_factory=list)  # seconds that /health took
    speeds: list[float] = field(default_factory=list)  # tokens per second, by round
    ends: Counter[str] = field(default_factory=Counter)

    def report(self, name: str) -> None:
        """Print it."""
        print(f"{name}: {statistics.median(self.speeds):.0f} tok/s (median of {len(self.speeds)})")
        times = {"first token": self.first, "between": self.between, "/health": self.health}
        for label, seconds in times.items():
            if len(seconds) > 1:
                cuts = statistics.quantiles(seconds, n=100, method="inclusive")
                shown = ", ".join(f"p{p} {1000 * cuts[p - 1]:.1f}" for p in (50, 95, 99))
                print(f"  {label:11} {shown} ms ({len(seconds)})")
        print("  " + ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items())))


def serve(port: int, slots: int, cfg: Config) -> None:
    """Serve a random model; a process of its own."""
    words = (bytes(w) for size in (2, 3, 4) for w in product(range(97, 123), repeat=size))
    num_words = cfg.vocab_size - 256 - len(SPECIAL_TOKENS)
    tokens = [*(bytes([byte]) for byte in range(256)), *islice(words, num_words)]
    tokenizer = Tokenizer(tokens, SPECIAL_TOKENS, SPLIT_PATTERN)
    model = GPT(depth_to_config(cfg.depth, tokenizer.vocab_size, 512))
    model.init_weights()
    if torch.cuda.is_available():
        model.to("cuda", torch.bfloat16)
        model.set_compute_dtype(torch.bfloat16)
    app = create_app([Engine(model.eval(), tokenizer, slots)], ServerConfig(temperature=1.0))
    Server(uvicorn.Config(app, port=port, log_level="warning")).run()


@asynccontextmanager
async def response(url: str, path: str, body: dict | None = None) -> AsyncIterator[StreamReader]:
    """The response to a GET, or to a POST of `body`, on a connection that closes with the block."""
    data = json.dumps(body).encode() if body else b""
    head = (
        f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    )
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        writer.write(head.encode() + data)
        yield reader
    finally:
        writer.close()


async def ask(url: str, cfg: Config, rng: random.Random, seen: Seen) -> int:
    """One question, streamed; how it went is noted in `seen`. Returns the tokens of the answer."""
    content = "".join(rng.choices("abcdefgh ", k=rng.randint(*cfg.prompt_chars)))
    body = {"messages": [{"role": "user", "content": content}], "stream": True}
    body |= {"max_tokens": rng.randint(*cfg.max_tokens), "stream_options": {"include_usage": True}}
    patience = rng.uniform(0, 3) if rng.random() < cfg.leave else None
    end, last, num_tokens = "lost", time.perf_counter(), 0
    times = seen.first
    try:
        async with asyncio.timeout(patience), response(url, PATH, body) as lines:
            status = int((await lines.readline()).split()[1])
            end = end if status == 200 else f"refused with {status}"
            async for line in lines:
                if b'"delta":{"content"' in line:
                    times.append(time.perf_counter() - last)
                    times, last = seen.between, time.perf_counter()
                elif b'"completion_tokens"' in line:
                    usage = json.loads(line.removeprefix(b"data: "))["usage"]
                    num_tokens = usage["completion_tokens"]
                elif b"[DONE]" in line:
                    end = "answered"
    except TimeoutError:
        end = "left by the client"
    except OSError:
        end = "lost"
    seen.ends[end] += 1
    if end == "refused with 429":
        await asyncio.sleep(rng.uniform(0.5, 1.5))
    return num_tokens


async def watch_health(url: str, seen: Seen) -> None:
    """Ask /health ten times a second."""
    while True:
        begin = time.perf_counter()
        async with response(url, "/health") as reader:
            assert b" 200 " in await reader.readline()
        seen.health.append(time.perf_counter() - begin)
        await asyncio.sleep(0.1)


async def load(url: str, cfg: Config, seed: int, seen: Seen) -> None:
    """One round: load for `seconds`, then let what is under way end."""
    rng, begin, num_tokens = random.Random(seed), time.perf_counter(), 0

    async def client(own: random.Random) -> None:
        nonlocal num_tokens
        while True:
            said = await ask(url, cfg, own, seen)
            num_tokens += said  # in two steps: another client may have added since
            if cfg.rate or time.perf_counter() > begin + cfg.seconds:
                return

    health = asyncio.create_task(watch_health(url, seen))
    async with asyncio.TaskGroup() as group:
        while cfg.rate and time.perf_counter() < begin + cfg.seconds:
            group.create_task(client(random.Random(rng.random())))
            await asyncio.sleep(rng.expovariate(cfg.rate))
        for _ in range(0 if cfg.rate else cfg.clients):
            group.create_task(client(random.Random(rng.random())))
    health.cancel()
    seen.speeds.append(num_tokens / (time.perf_counter() - begin))


async def run(cfg: Config, servers: dict[str, str]) -> dict[str, Seen]:
    """What was seen of each server, the rounds interleaved."""
    seen = {name: Seen() for name in servers}
    for name, url in servers.items():
        while True:
            with suppress(OSError):
                async with response(url, "/ready") as reader:
                    if b" 200 " in await reader.readline():
                        break
            await asyncio.sleep(0.2)
        await load(url, replace(cfg, clients=2, rate=0, seconds=2), 0, Seen())  # warm-up
        await show_state(name, url)
    for number in range(cfg.num_rounds):
        for name, url in servers.items():
            await load(url, cfg, cfg.seed + number, seen[name])
            await show_state(name, url)
    return seen


async def show_state(name: str, url: str) -> None:
    """Print what the server holds when nobody asks any more: a leak would show here."""
    await asyncio.sleep(0.5)
    async with response(url, "/metrics") as reader:
        text = (await reader.read()).decode()
    shown = re.findall(r"^(nanochat_num_req\w+|process_resident\w+) (\S+)$", text, re.MULTILINE)
    print(f"{name}: " + ", ".join(f"{key} {float(value):.0f}" for key, value in shown))


def main(cfg: Config) -> None:
    """Load one server, or two in turns, and print what was seen."""
    ports = {} if cfg.url else {f"{cfg.slots} slots": cfg.slots, "one at a time": 1}
    start = multiprocessing.get_context("spawn").Process
    processes = [
        start(target=serve, args=(8701 + i, slots, cfg)) for i, slots in enumerate(ports.values())
    ]
    servers = {name: f"http://127.0.0.1:{8701 + i}" for i, name in enumerate(ports)}
    try:
        for process in processes:
            process.start()
        seen = asyncio.run(run(cfg, servers or {cfg.url: cfg.url}))
    finally:
        for process in processes:
            process.terminate()
            process.join()
    for name, own in seen.items():
        own.report(name)
    if len(seen) == 2:
        many, one = (statistics.median(own.speeds) for own in seen.values())
        print(f"{many / one:.2f} times the tokens of one at a time")


if __name__ == "__main__":
    main(tyro.cli(Config))
