"""Load on a server: time to first token and between tokens, tokens per second, refusals.

    python -m dev.bench.serve_load               # 16 clients: 16 slots against one at a time
    python -m dev.bench.serve_load --slots 4 --clients 200 --leave 0.5 --seconds 60
    python -m dev.bench.serve_load --url http://127.0.0.1:8000 --rate 5

Without --url it starts two servers with one random model, one with --slots and one with a single
slot, and loads them in turns, so that a busy machine affects both alike. A client asks again once
answered; with --rate, requests come at random times instead, that many a second. "lost" requests
were neither answered whole, nor refused, nor abandoned on purpose.
"""

import asyncio
import json
import multiprocessing
import random
import re
import statistics
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace

import httpx
import torch
import tyro
import uvicorn

from dev.bench.engine_speed import random_model
from nanochat.chat_api import ServerConfig
from nanochat.engine import Engine
from nanochat.server import Server, create_app


@dataclass
class Config:
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
    seed: int = 0  # of the requests


class Seen:
    """What the clients of one server measured, over all rounds."""

    def __init__(self) -> None:
        # Seconds to the first token, between two chunks, and that /health took.
        self.times: dict[str, list[float]] = {"first token": [], "between": [], "/health": []}
        self.num_tokens = 0
        self.speeds: list[float] = []  # tokens per second, by round
        self.ends = Counter[str]()

    def report(self, name: str) -> None:
        print(f"{name}: {statistics.median(self.speeds):.0f} tok/s (median of {len(self.speeds)})")
        for label, seconds in self.times.items():
            if len(seconds) > 1:
                cuts = statistics.quantiles(seconds, n=100, method="inclusive")
                shown = ", ".join(f"p{p} {1000 * cuts[p - 1]:.1f}" for p in (50, 95, 99))
                print(f"  {label:11} {shown} ms ({len(seconds)})")
        print("  " + ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items())))


def serve(port: int, slots: int, depth: int) -> None:
    """Serve a random model; runs as a separate process."""
    model, tokenizer = random_model(depth, "cuda" if torch.cuda.is_available() else "cpu")
    app = create_app([Engine(model, tokenizer, slots)], ServerConfig(temperature=1.0))
    Server(uvicorn.Config(app, port=port, log_level="warning")).run()


async def ask(http: httpx.AsyncClient, cfg: Config, rng: random.Random, seen: Seen) -> None:
    """Stream one answer, recording it in `seen`."""
    content = "".join(rng.choices("abcdefgh ", k=rng.randint(*cfg.prompt_chars)))
    body = {"messages": [{"role": "user", "content": content}], "stream": True}
    body |= {"max_tokens": rng.randint(*cfg.max_tokens), "stream_options": {"include_usage": True}}
    patience = rng.uniform(0, 3) if rng.random() < cfg.leave else None
    end, last, label = "lost", time.perf_counter(), "first token"
    try:
        async with (
            asyncio.timeout(patience),
            http.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
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
    except TimeoutError:
        end = "left by the client"
    except httpx.TransportError:
        end = "lost"
    seen.ends[end] += 1
    if end == "refused with 429":
        await asyncio.sleep(rng.uniform(0.5, 1.5))


async def watch_health(http: httpx.AsyncClient, seen: Seen) -> None:
    while True:
        begin = time.perf_counter()
        (await http.get("/health")).raise_for_status()
        seen.times["/health"].append(time.perf_counter() - begin)
        await asyncio.sleep(0.1)


async def load(http: httpx.AsyncClient, cfg: Config, seed: int, seen: Seen) -> None:
    """One round: load for `seconds`, then let requests in progress finish."""
    rng, begin, num_before = random.Random(seed), time.perf_counter(), seen.num_tokens

    async def client(own: random.Random) -> None:
        while time.perf_counter() < begin + cfg.seconds:
            await ask(http, cfg, own, seen)

    health = asyncio.create_task(watch_health(http, seen))
    async with asyncio.TaskGroup() as group:
        while cfg.rate and time.perf_counter() < begin + cfg.seconds:
            group.create_task(ask(http, cfg, random.Random(rng.random()), seen))
            await asyncio.sleep(rng.expovariate(cfg.rate))
        for _ in range(0 if cfg.rate else cfg.clients):
            group.create_task(client(random.Random(rng.random())))
    health.cancel()
    seen.speeds.append((seen.num_tokens - num_before) / (time.perf_counter() - begin))


async def show_state(name: str, http: httpx.AsyncClient) -> None:
    """Print the idle server's load and memory, which would show a leak."""
    await asyncio.sleep(0.5)
    text = (await http.get("/metrics")).text
    shown = re.findall(r"^(nanochat_num_req\w+|process_resident\w+) (\S+)$", text, re.MULTILINE)
    print(f"{name}: " + ", ".join(f"{key} {float(value):.0f}" for key, value in shown))


async def run(cfg: Config, servers: dict[str, str]) -> dict[str, Seen]:
    """The measurements of each server, from interleaved rounds."""
    limits = httpx.Limits(max_connections=None)
    seen = {name: Seen() for name in servers}
    clients = {
        name: httpx.AsyncClient(base_url=url, timeout=None, limits=limits)
        for name, url in servers.items()
    }
    for name, http in clients.items():
        ready = False
        while not ready:
            await asyncio.sleep(0.2)
            with suppress(httpx.TransportError):
                ready = (await http.get("/ready")).status_code == 200
        await load(http, replace(cfg, clients=2, rate=0, seconds=2), 0, Seen())  # warm-up
        await show_state(name, http)
    for number in range(cfg.num_rounds):
        for name, http in clients.items():
            await load(http, cfg, cfg.seed + number, seen[name])
            await show_state(name, http)
    return seen


def main(cfg: Config) -> None:
    servers = {cfg.url: cfg.url} if cfg.url else {}
    slots = {} if cfg.url else {f"{cfg.slots} slots": cfg.slots, "one at a time": 1}
    process = multiprocessing.get_context("spawn").Process
    for port, (name, number) in enumerate(slots.items(), 8701):
        process(target=serve, args=(port, number, cfg.depth), daemon=True).start()  # ends with us
        servers[name] = f"http://127.0.0.1:{port}"
    seen = asyncio.run(run(cfg, servers))
    for name, own in seen.items():
        own.report(name)
    if len(seen) == 2:
        many, one = (statistics.median(own.speeds) for own in seen.values())
        print(f"{many / one:.2f} times the tokens of one at a time")


if __name__ == "__main__":
    main(tyro.cli(Config))
