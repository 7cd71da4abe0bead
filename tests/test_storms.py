"""Many clients at once, some of which leave, stall or come while the server restarts.

Nobody is lost without a word: each client ends with its answer, with an error in OpenAI's shape, or
with a connection that was broken by a kill; all are counted. Nothing of a request stays in memory.
"""

import gc
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from statistics import median

import httpx
import openai
import pytest

from nanochat.chat_api import Completion, ServerConfig
from nanochat.engine import IDLE, Request
from nanochat.jobs import Job
from tests.launch import FORK, free_port
from tests.serving import EchoEngine, Running, Stream, question, serving

pytestmark = pytest.mark.slow
MANY = 2000  # tokens, more than all buffers hold


def say(number: int) -> str:
    return f"client {number} says {'x' * (number % 20)}"


def client_of(url: str) -> httpx.Client:
    """One whose pool of connections has no limit, at which threads would meet."""
    return httpx.Client(base_url=url, timeout=20, verify=False, limits=httpx.Limits())


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_two_hundred_clients_on_four_slots() -> None:
    """Slots and queue take 68 of them; the others are refused at once, and try again."""
    engine = EchoEngine(num_slots=4)
    with serving([engine], ServerConfig(queue=64)) as server, ThreadPoolExecutor(200) as pool:
        server.client = client_of(server.url)
        engine.go.clear()
        answers = [pool.submit(server.ask, say(number)) for number in range(200)]
        server.until(lambda: sum(answer.done() for answer in answers) == 200 - 68)
        engine.go.set()
        assert Counter(each.result().status_code for each in answers) == {200: 68, 429: 132}
        for number, answer in enumerate(answers):
            body = answer.result().json()
            if answer.result().status_code == 200:
                assert body["choices"][0]["message"]["content"] == say(number)
            else:
                assert body["error"]["code"] == "queue_full"
                assert answer.result().headers["retry-after"] == "1"
        with openai_client(server) as client:
            again = pool.map(partial(patient, client), range(200))
            assert list(again) == [say(number) for number in range(200)]
        server.until(lambda: server.num_jobs() == 0 and not engine.busy)


def openai_client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=9)


def patient(client: openai.OpenAI, number: int) -> str:
    """The answer that the client gets, which tries again by itself."""
    answer = client.chat.completions.create(model="nanochat", **question(say(number)))
    return answer.choices[0].message.content or ""


def test_a_restart_finishes_the_streams_and_late_clients_are_answered_by_the_next() -> None:
    port = free_port()
    with ThreadPoolExecutor(100) as pool:
        engine = EchoEngine(pace=0.003)
        with serving([engine], ServerConfig(queue=64), port=port) as server:
            server.client = client_of(server.url)
            engine.go.clear()
            streams = [pool.submit(server.stream, say(number)) for number in range(50)]
            server.until(lambda: server.num_jobs() == 50)
            engine.go.set()
            server.until(lambda: server.num_jobs() < 45)
            server.server.should_exit = True  # what a first SIGTERM does
            server.until(lambda: server.client.get("/ready").status_code == 503)
            client = openai_client(server)
            late = [pool.submit(patient, client, number) for number in range(50)]
            for number, stream in enumerate(streams):
                whole = stream.result()
                told = whole.text(), whole.finish, whole.num_done
                assert told == (say(number), ["stop"], 1)
        with serving([EchoEngine()], ServerConfig(queue=64), port=port):
            assert [each.result() for each in late] == [say(number) for number in range(50)]
        client.close()


def be_a_server(port: int, pace: float) -> None:
    with serving([EchoEngine(pace=pace)], ServerConfig(queue=64), port=port):
        time.sleep(60)


def insist(client: httpx.Client, number: int) -> tuple[Counter[str], str]:
    """(how often each end was met, the whole answer); comes again until it has one."""
    ends = Counter[str]()
    body = question(say(number)) | {"stream": True}
    while sum(ends.values()) < 500:
        try:
            response = client.post("/v1/chat/completions", json=body)
        except httpx.TransportError as error:
            ends["absent" if isinstance(error, httpx.ConnectError) else "broken"] += 1
            time.sleep(0.05)
            continue
        if response.status_code == 200:
            stream = Stream(response)
            assert (stream.finish, stream.num_done) == (["stop"], 1)  # never cut without a word
            return ends, stream.text()
        ends[response.json()["error"]["code"]] += 1
        time.sleep(0.05)
    raise AssertionError(f"client {number} was never answered: {ends}")


def test_a_kill_breaks_connections_and_whoever_comes_again_is_answered() -> None:
    port = free_port()
    servers = [FORK.Process(target=be_a_server, args=(port, pace)) for pace in (0.003, 0)]
    try:
        with client_of(f"http://127.0.0.1:{port}") as client, ThreadPoolExecutor(50) as pool:
            servers[0].start()
            clients = [pool.submit(insist, client, number) for number in range(50)]
            while sum(each.done() for each in clients) < 10:
                assert servers[0].is_alive()
                time.sleep(0.01)
            servers[0].kill()
            servers[0].join()
            servers[1].start()
            ends = [each.result() for each in clients]
        assert [text for _, text in ends] == [say(number) for number in range(50)]
        total = sum((counts for counts, _ in ends), Counter[str]())
        assert 10 <= total["broken"] <= 40 and set(total) <= {"broken", "absent", "loading"}
        assert max(counts["broken"] for counts, _ in ends) == 1
    finally:
        for server in servers:
            if server.pid:
                server.kill()
                server.join()


def storm(server: Running, engine: EchoEngine, number: int) -> None:
    """40 clients with long questions: they wait for a whole answer, read, leave, or stall."""

    def one(i: int) -> None:
        asked = f"{number} {i} {'x' * 2000}"
        engine.scripts[asked] = [ord("y")] * (20 if i else MANY)
        more = {} if i else {"max_tokens": MANY}
        with server.connect(asked, stream=i % 3 != 1, **more) as connection:
            if i == 0:  # reads nothing
                return server.until(lambda: any(r.max_tokens == MANY for r in engine.cancelled))
            for count, line in enumerate(connection.makefile("rb")):
                if (i % 3 == 0 and count > i) or b"[DONE]" in line or b'"usage"' in line:
                    return

    with ThreadPoolExecutor(40) as pool:
        list(pool.map(one, range(40)))
    server.until(lambda: server.num_jobs() == 0 and not engine.busy)
    engine.scripts.clear()
    engine.cancelled.clear()


def test_nothing_of_a_request_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request here is about 20 KB, mostly its prompt: 40 of them are 800 KB a round."""
    monkeypatch.setattr("nanochat.jobs.MAX_UNREAD", 64)
    engine, sizes, counts = EchoEngine(max_len=8192), list[int](), list[int]()
    with serving([engine], ServerConfig(queue=64)) as server:
        for number in range(7):
            storm(server, engine, number)
            gc.collect()
            kinds = (Job, Completion, Request)
            held = [each for each in gc.get_objects() if type(each) in kinds]
            counts.append(sum(each is not IDLE for each in held))
            del held
            sizes.append(resident_bytes())
    assert max(counts) <= engine.num_slots  # each slot keeps its last, for its prompt
    growths = [after - before for before, after in pairwise(sizes)]
    assert median(growths) < 400_000
