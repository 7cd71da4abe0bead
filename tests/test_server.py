"""The server from outside, over HTTP on a loopback port, and with OpenAI's own client.

Oracles: the echo engine, which says back what it was asked, so every answer is known; for sampling
a small random model, asked alone and among noisy mates.
"""

import gc
import json
import logging
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import httpx
import openai
import pytest
import yaml

from nanochat.chat_api import ServerConfig
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.jobs import ServedModel
from nanochat.server import POLICY
from tests.models import TOKENIZER, random_gpt
from tests.serving import CHAT, EchoEngine, Running, Stream, question, serving, serving_models

USAGE = {"stream_options": {"include_usage": True}}
STRANGE = "né 汉字 👩‍👩‍👧 🏳️‍🌈 <|assistant_end|><|bos|>"  # what is spelled out is text


@pytest.fixture(scope="module")
def echo() -> Iterator[Running]:
    """A server that echoes, shared by the tests that leave it as it is."""
    with serving([EchoEngine(max_len=512)]) as running:
        yield running


# What a client of OpenAI's API expects


def said(response: httpx.Response) -> str:
    return response.json()["choices"][0]["message"]["content"]


def test_a_whole_answer(echo: Running) -> None:
    answer = echo.ask("hello").json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    message = {"role": "assistant", "content": "hello", "refusal": None}
    choice = {"index": 0, "finish_reason": "stop", "logprobs": None, "message": message}
    assert answer["choices"] == [choice]
    assert answer["usage"] == {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}
    *chunks, last = echo.stream("hello", **USAGE).chunks
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]) == ([], answer["usage"])
    timings = last["timings"]
    assert 0 <= timings["queue_seconds"] <= timings["first_token_seconds"]
    assert timings["tokens_per_second"] > 0


def test_a_streamed_answer(echo: Running) -> None:
    stream = echo.stream(STRANGE)
    headers = stream.response.headers
    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
    assert stream.text() == STRANGE == said(echo.ask(STRANGE))
    heads = {(c["id"], c["object"], c["created"], c["model"]) for c in stream.chunks}
    assert len(heads) == 1 and heads.pop()[1] == "chat.completion.chunk"
    deltas = [choice["delta"] for choice in stream.choices]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert not any("role" in delta for delta in deltas[1:])
    assert (stream.finish, stream.num_done, stream.last) == (["stop"], 1, "[DONE]")
    assert all(choice["logprobs"] is None for choice in stream.choices)
    assert all("usage" not in chunk and chunk["choices"] for chunk in stream.chunks)


def test_ends(echo: Running) -> None:
    cases: list[tuple[dict[str, Any], str, str, int]] = [
        ({}, "hello", "stop", 6),
        ({"max_tokens": 1}, "h", "length", 1),
        ({"max_completion_tokens": 5}, "hello", "length", 5),
        ({"max_tokens": 6}, "hello", "stop", 6),
        ({"max_tokens": 9999}, "hello", "stop", 6),
        ({"stop": "l"}, "he", "stop", 2),
        ({"stop": ["zz", "lo"]}, "hel", "stop", 3),
        ({"stop": "hello"}, "", "stop", 0),
    ]
    for fields, text, finish, num_tokens in cases:
        answer, stream = echo.ask("hello", **fields).json(), echo.stream("hello", **fields, **USAGE)
        (choice,) = answer["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, finish)
        assert (stream.text(), stream.finish) == (text, [finish])
        for usage in (answer["usage"], stream.chunks[-1]["usage"]):
            assert usage["completion_tokens"] == num_tokens


def test_several_choices_and_logprobs(echo: Running) -> None:
    answer = echo.ask("hi", n=3, logprobs=True, top_logprobs=2).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 9, "total_tokens": 15}
    for choice in answer["choices"]:
        content = choice["logprobs"]["content"]
        assert [entry["token"] for entry in content] == ["h", "i"]
        assert [len(entry["top_logprobs"]) for entry in content] == [2, 2]
    stream = echo.stream("hi", n=3, logprobs=True)
    assert [stream.text(index) for index in range(3)] == ["hi"] * 3
    assert stream.finish == ["stop"] * 3 and stream.num_done == 1
    entries = [e for c in stream.choices if c["logprobs"] for e in c["logprobs"]["content"]]
    assert sorted(entry["token"] for entry in entries) == ["h"] * 3 + ["i"] * 3
    assert all(entry["top_logprobs"] == [] and -0.01 < entry["logprob"] <= 0 for entry in entries)


def test_a_tool_call_is_a_delta_of_its_own() -> None:
    engine = EchoEngine()
    call = [CHAT.python_start, *b"1+1", CHAT.python_end, CHAT.output_start, *b"2", CHAT.output_end]
    engine.scripts["sum"] = [*b"it is ", *call, *b"two"]
    with serving([engine]) as server:
        stream = server.stream("sum")
        tools = [c["delta"]["tool"] for c in stream.choices if "tool" in c["delta"]]
        assert tools == [{"expression": "1+1", "result": "2"}]
        message = server.ask("sum").json()["choices"][0]["message"]
        assert stream.text() == message["content"] == "it is two"
        parts = [("text", "it is "), ("python", "1+1"), ("python_output", "2"), ("text", "two")]
        assert message["parts"] == [{"type": kind, "text": text} for kind, text in parts]
        turns = [("user", "sum"), ("assistant", message["parts"]), ("user", "hi")]
        messages = [{"role": role, "content": content} for role, content in turns]
        message = server.ask(messages=messages).json()["choices"][0]["message"]
        assert message["content"] == "hi" and "parts" not in message


def test_models(echo: Running) -> None:
    for prefix in ("/v1", ""):
        listed = echo.client.get(f"{prefix}/models").json()
        assert listed["object"] == "list"
        (card,) = listed["data"]
        assert (card["id"], card["object"], card["context_length"]) == ("nanochat", "model", 512)
        assert echo.client.get(f"{prefix}/models/nanochat").json() == card
        assert echo.client.get(f"{prefix}/models/sft/d4").json()["error"]["param"] == "model"
        body = question("a") | {"model": "nanochat"}
        response = echo.client.post(f"{prefix}/chat/completions", json=body)
        assert response.status_code == 200


JSON = {"content-type": "application/json"}
COMPLETIONS = "/v1/chat/completions"
NAN = b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}'
MANY = [{"role": "user", "content": "a"}] * 10_000
STRANGERS: list[tuple[str, str, dict[str, Any], int, str | None]] = [
    ("POST", COMPLETIONS, {"content": b'{"messages": [', "headers": JSON}, 400, None),
    ("POST", COMPLETIONS, {"content": b"", "headers": JSON}, 400, None),
    ("POST", COMPLETIONS, {"content": b"[" * 900_000, "headers": JSON}, 400, None),
    ("POST", COMPLETIONS, {"content": b"\xff\xfe", "headers": JSON}, 400, None),
    ("POST", COMPLETIONS, {"content": b"{}"}, 400, None),  # a page elsewhere can send this
    ("POST", COMPLETIONS, {"json": []}, 400, None),
    ("POST", COMPLETIONS, {"content": NAN, "headers": JSON}, 400, None),
    ("POST", COMPLETIONS, {"json": {"messages": MANY}}, 400, None),
    ("POST", COMPLETIONS, {"json": {"messages": "x" * 2_000_000}}, 413, "request_too_large"),
    ("POST", COMPLETIONS, {"content": iter([b"x" * 60_000] * 30)}, 413, "request_too_large"),
    ("GET", COMPLETIONS, {}, 405, None),
    ("DELETE", "/v1/models", {}, 405, None),
    ("OPTIONS", COMPLETIONS, {}, 405, None),
    ("GET", "/nowhere", {}, 404, None),
    ("GET", "/ui/../server.py", {}, 404, None),
    ("GET", "/v1/models/gpt-4", {}, 404, "model_not_found"),
]


def test_strangers_get_openais_errors(echo: Running) -> None:
    for method, path, sent, status, code in STRANGERS:
        response = echo.client.request(method, path, **sent)
        assert response.status_code == status
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        assert (error["type"], error["code"]) == ("invalid_request_error", code)
        assert response.headers["x-content-type-options"] == "nosniff"
        if sent == {"content": b"{}"}:
            assert "content-type: application/json" in error["message"]


def test_a_slash_at_the_end_changes_nothing(echo: Running) -> None:
    for path in ("/v1/models/", "/models/", "/v1/models/nanochat/", "/metrics/", "/health/"):
        response = echo.client.get(path, follow_redirects=path == "/health/")
        assert response.status_code == 200, path
    for path in (COMPLETIONS + "/", "/chat/completions/"):
        assert said(echo.client.post(path, json=question("hi"))) == "hi"
    assert echo.client.get("/ui/", follow_redirects=True).status_code == 404


def test_metrics_are_explained_and_count_tokens() -> None:
    with serving([EchoEngine(max_len=512)]) as server:
        for _ in range(2):  # the second time the prompt is in the cache
            server.ask("hello")
        text = server.client.get("/metrics").text
    helps = [line for line in text.splitlines() if line.startswith("# HELP nanochat_")]
    assert len(helps) > 10 and all(line.endswith(".") for line in helps)
    assert re.search(r'^nanochat_build_info\{.*torch="[\d.]+.*"\} 1.0$', text, re.M)
    for line in ("prompt_tokens_total 18.0", "prefill_tokens_total 9.0"):
        assert f"nanochat_{line}\n" in text
    assert "nanochat_generation_tokens_total 12.0\n" in text


def test_the_api_describes_itself(echo: Running) -> None:
    """Each route says what it does, answers and refuses; /docs says the same as plain text."""
    schema, page = echo.client.get("/openapi.json").json(), echo.client.get("/docs")
    assert page.headers["content-type"].startswith("text/plain")
    assert page.headers["content-security-policy"] == POLICY
    assert yaml.safe_load(page.text) == schema
    for methods in schema["paths"].values():
        for route in methods.values():
            error = route["responses"]["default"]["content"]["application/json"]["schema"]
            assert error["$ref"].endswith("/ErrorBody") and "422" not in route["responses"]
            assert route["description"]
    temperature = schema["components"]["schemas"]["ChatRequest"]["properties"]["temperature"]
    assert {"type": "number", "minimum": 0.0, "maximum": 2.0} in temperature["anyOf"]


# OpenAI's own client


def client_of(server: Running) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


def asked(content: str, **more: Any) -> dict[str, Any]:
    return question(content) | {"model": "nanochat"} | more


def test_openais_client(echo: Running) -> None:
    length = len(STRANGE.encode())
    with client_of(echo) as client:
        (card,) = client.models.list().data
        assert client.models.retrieve(card.id).id == "nanochat"
        ask = asked(STRANGE, extra_body={"top_k": 5}, seed=1, logprobs=True)
        whole = client.chat.completions.create(**ask)
        assert whole.choices[0].message.content == STRANGE
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + length + 1
        assert len(whole.choices[0].logprobs.content) == length
        chunks = list(client.chat.completions.create(**ask, **USAGE, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == STRANGE
        assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == "stop"
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**asked("x" * 600))
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError, match="no model"):
            client.models.retrieve("sft/d20")


def test_plain_text_and_its_tokens() -> None:
    """Of a real model: streamed and whole alike, and tokens counted as they are charged."""
    engine = Engine(random_gpt(), TOKENIZER, num_slots=4, deterministic=True)
    with serving([engine]) as server, client_of(server) as client:
        ask: dict[str, Any] = {"model": "nanochat", "prompt": ["né", ""], "n": 2, "seed": 1}
        whole = client.completions.create(**ask, echo=True, logprobs=2, max_tokens=4)
        assert [choice.text[:2] for choice in whole.choices[:2]] == ["né"] * 2
        chunks = list(client.completions.create(**ask, echo=True, max_tokens=4, stream=True))
        for choice in whole.choices:
            mine = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
            assert "".join(piece.text for piece in mine) == choice.text
            assert mine[-1].finish_reason == choice.finish_reason
        counts = []
        for path in ("/tokenize", "/v1/tokenize"):
            for prompt in ask["prompt"]:
                counts.append(server.client.post(path, json={"prompt": prompt}).json())
        assert sum(each["count"] for each in counts) == 2 * whole.usage.prompt_tokens
        before = server.chat.metrics.num_tokens
        scored = client.completions.create(
            model="nanochat", prompt="né", echo=True, logprobs=1, max_tokens=0
        )
        assert scored.usage.completion_tokens == server.chat.metrics.num_tokens - before == 0
        back = server.client.post("/detokenize", json={"tokens": counts[0]["tokens"][1:]})
        assert back.json()["prompt"] == "né"
        for name, tokens in (("detokenize", [999]), ("tokenize", None)):
            refused = server.client.post(f"/v1/{name}", json={"tokens": tokens})
            assert refused.status_code == 400 and refused.json()["error"]["message"]


def test_a_failure_amid_a_stream_is_no_stop() -> None:
    engine = EchoEngine(pace=0.01)
    with serving([engine]) as server, client_of(server) as client:
        with background(server, 1) as (failing,):
            server.until(lambda: any(each.num_generated > 3 for each in engine.running))
            engine.num_failures = 1
            stream = failing.result()
        assert json.loads(stream.last)["error"]["type"] == "server_error"
        assert not stream.finish and stream.num_done == 0 and stream.text()
        with pytest.raises(openai.APIError, match="the model failed"):
            for _ in client.chat.completions.create(**asked("x" * 50), stream=True):
                engine.num_failures = 1


# Sampling, with a real model


def test_a_seed_decides_whatever_else_is_in_flight() -> None:
    engine = Engine(random_gpt(), TOKENIZER, num_slots=16, deterministic=True)
    with serving([engine], ServerConfig(temperature=1.0, max_tokens=20)) as server:
        alone = server.ask("a", seed=3).json()["choices"]
        assert alone != server.ask("a", seed=4).json()["choices"]
        assert server.stream("a", seed=3).text() == alone[0]["message"]["content"]
        assert said(server.ask("a", temperature=0)) == said(server.ask("a", temperature=0))
        with ThreadPoolExecutor(16) as pool:
            mates = [pool.submit(server.ask, f"noise {i}", seed=i) for i in range(15)]
            assert server.ask("a", seed=3).json()["choices"] == alone
            assert all(mate.result().status_code == 200 for mate in mates)


# Queue, leavers, limits


@contextmanager
def background(server: Running, count: int) -> Iterator[list[Future[Stream]]]:
    """`count` questions under way in threads."""
    with ThreadPoolExecutor(16) as pool:
        yield [pool.submit(server.stream, f"question {i}") for i in range(count)]


def test_a_full_queue_refuses_before_any_event_and_the_others_are_served_in_turn() -> None:
    engine = EchoEngine(num_slots=2)

    def shown(*lines: str) -> bool:
        metrics = server.client.get("/metrics").text
        return all(f"nanochat_{line}\n" in metrics for line in lines)

    with serving([engine], ServerConfig(queue=3)) as server, client_of(server) as client:
        engine.pace = 0.2
        with background(server, 5) as streams:
            server.until(lambda: server.num_jobs() == 5)
            for stream in (True, False):
                refused = server.ask("one more", stream=stream)
                assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
                assert refused.headers["connection"] == "close"  # maybe another process has room
                error = refused.json()["error"]
                assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            server.until(lambda: shown("num_requests_running 2.0", "num_requests_waiting 3.0"))
            assert shown('requests_refused_total{code="queue_full"} 2.0')
            with pytest.raises(openai.RateLimitError):
                client.with_options(max_retries=0).chat.completions.create(**asked("a"))
            engine.pace = 0.05
            answer = client.with_options(max_retries=5).chat.completions.create(**asked("a"))
            assert answer.choices[0].message.content == "a"  # it tried again
            answers = [stream.result() for stream in streams]
        assert [stream.text() for stream in answers] == [f"question {i}" for i in range(5)]
        first = sorted(stream.comments[0] for stream in answers if stream.comments)
        assert first == [": queued 1", ": queued 2", ": queued 3"]
        assert shown("request_queue_time_seconds_count 6.0")


@pytest.mark.parametrize("num_before", [0, 1])
def test_who_leaves_frees_what_he_held(num_before: int) -> None:
    """In the slot, or in the queue behind another; and so does a stop string."""
    engine = EchoEngine(num_slots=1, pace=0.01)
    with serving([engine]) as server:
        for stream in (True, False):
            engine.cancelled.clear()
            with background(server, num_before) as others:
                server.until(lambda: server.num_jobs() == num_before)
                with server.connect("x" * 200, stream=stream):
                    server.until(lambda: server.num_jobs() == num_before + 1)
                    server.until(lambda: num_before or len(engine.running) == 1)
                server.until(lambda: len(engine.cancelled) == 1)
                assert TOKENIZER.decode(engine.cancelled[0].prompt).count("x") == 200
                assert [other.result().num_done for other in others] == [1] * num_before
            assert server.num_jobs() == 0 and server.ask("next").status_code == 200
        engine.pace = 0
        assert server.stream("a" * 20 + "END" + "b" * 200, stop="END").text() == "a" * 20
        server.until(lambda: len(engine.cancelled) == 2)
        assert server.num_jobs() == 0


@pytest.mark.parametrize(("max_unread", "stalled_seconds"), [(64, 60.0), (10**9, 0.2)])
def test_who_does_not_read_is_dropped(
    max_unread: int,
    stalled_seconds: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Because too many events wait for him, or because his socket stays full for too long."""
    monkeypatch.setattr("nanochat.jobs.MAX_UNREAD", max_unread)
    monkeypatch.setattr("nanochat.server.STALLED_SECONDS", stalled_seconds)
    engine = EchoEngine(num_slots=1, max_len=1 << 20)
    engine.scripts["endless"] = [ord("x")] * 900_000
    ask: dict[str, Any] = {"max_tokens": 900_000, "stream": True}
    with serving([engine]) as server, server.connect("endless", **ask):
        server.until(lambda: len(engine.cancelled) == 1, 20)
        assert server.num_jobs() == 0 and server.ask("next").status_code == 200
        if stalled_seconds < 1:
            connections: set[Any] = server.server.server_state.connections
            server.until(lambda: not any(each.flow.write_paused for each in connections), 2)
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


def test_an_answer_that_takes_too_long_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.jobs.ANSWER_SECONDS", 0.5)
    engine = EchoEngine(pace=0.02)
    with serving([engine]) as server:
        response = server.ask("x" * 100)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "timeout")
        stream = server.stream("x" * 100)
        assert json.loads(stream.last)["error"]["code"] == "timeout"
        assert stream.num_done == 0 and not stream.finish and 0 < len(stream.text()) < 100
        server.until(lambda: not engine.busy)


def test_a_silent_stream_is_pinged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.jobs.PING_SECONDS", 0.1)
    monkeypatch.setattr("nanochat.jobs.QUEUE_SECONDS", 0.02)
    with serving([EchoEngine(num_slots=1, pace=0.25)]) as server:
        comments = server.stream("a").comments
        assert set(comments) == {": ping"} and len(comments) >= 2


# Failures


def test_a_failing_step_fails_only_what_it_computed_and_a_dead_engine_is_told() -> None:
    engine = EchoEngine(num_slots=2)
    with serving([engine]) as server, ThreadPoolExecutor(4) as pool:
        engine.go.clear()
        answers = []
        for i in range(4):
            answers.append(pool.submit(server.ask, f"q{i}"))
            server.until(lambda: server.num_jobs() == len(answers))
        engine.num_failures = 1
        engine.go.set()
        statuses = [answer.result().status_code for answer in answers]
        assert statuses == [500, 200, 200, 200]  # the first alone had a slot by then
        error = answers[0].result().json()["error"]
        assert (error["type"], error["code"]) == ("server_error", None)
        assert said(server.ask("again")) == "again"
        engine.num_failures = 99
        assert [server.ask("a").status_code for _ in range(8)] == [500] * 8
        server.until(lambda: server.client.get("/ready").status_code == 503)
        assert server.ask("b").status_code == 503
        assert server.client.get("/health").status_code == 200


def test_loading_is_told_and_requests_wait_for_it() -> None:
    engine = EchoEngine()
    engine.go.clear()
    with serving([engine], loaded=False) as server, ThreadPoolExecutor(1) as pool:
        response = server.client.get("/ready")
        assert response.status_code == 503 and response.headers["retry-after"]
        assert response.json()["error"]["code"] == "loading"
        waiting = pool.submit(server.ask, "a")
        assert not server.client.get("/v1/models").json()["data"][0]["loaded"]
        engine.go.set()
        assert said(waiting.result()) == "a"
        assert server.client.get("/ready").status_code == 200


# Several models


class Shelf:
    """Models a, b, c of size 1 that echo, and some that cannot be loaded."""

    def __init__(self) -> None:
        sizes = {"a": 1, "b": 1, "c": 1, "big": 3, "damaged": 1, "lost": 1}
        self.models = [
            ServedModel(name, "chat", 256, size, partial(self.load, name))
            for name, size in sizes.items()
        ]
        self.engines: dict[str, EchoEngine] = WeakValueDictionary()  # type: ignore[assignment]
        self.loads: list[str] = []
        self.may_load = threading.Event()
        self.may_load.set()
        self.models[0].preloaded = self.load("a")

    def load(self, name: str) -> EchoEngine:
        self.loads.append(name)
        assert self.may_load.wait(20)
        if name == "damaged":
            raise UserError("model.safetensors is damaged; use --step=3")
        if name == "lost":
            raise RuntimeError("nobody expected this")
        engine = self.engines[name] = EchoEngine(num_slots=2)
        return engine


def loaded(server: Running) -> set[str]:
    cards = server.client.get("/v1/models").json()["data"]
    return {card["id"] for card in cards if card["loaded"]}


def test_models_are_loaded_when_asked_for_and_make_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("nanochat.jobs.PREPARE_SECONDS", 0.0)
    monkeypatch.setattr("nanochat.server.ROOM_SECONDS", 0.2)
    shelf = Shelf()
    with serving_models(shelf.models, memory=2) as server, ThreadPoolExecutor(4) as pool:
        assert loaded(server) == {"a"} and said(server.ask("hi")) == "hi"
        assert said(server.ask("hi", model="b")) == "hi" and loaded(server) == {"a", "b"}
        assert server.ask("hi", model="a").json()["model"] == "a"
        assert said(server.ask("hi", model="c")) == "hi" and loaded(server) == {"a", "c"}
        gc.collect()
        assert set(shelf.engines) == {"a", "c"}  # the memory of b is free
        refusals = {
            "big": (400, "model_too_large", "memory"),
            "damaged": (503, "model_unavailable", "see the server's log"),
            "lost": (503, "model_unavailable", "see the server's log"),
            "d": (404, "model_not_found", "no model 'd'"),
        }
        for name, (status, code, text) in refusals.items():
            response = server.ask("hi", model=name)
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (status, code)
            assert text in error["message"]
        assert "safetensors is damaged; use --step=3" in caplog.text  # and not in answers
        for name in ("c", "b"):  # a second time what failed; then the least recently used leaves
            assert said(server.ask("hi", model=name)) == "hi"
        for path in ("tokenize", "detokenize"):  # which make no room for models
            body = {"model": "a", "prompt": "hi", "tokens": [1]}
            error = server.client.post(f"/{path}", json=body).json()["error"]
            assert error["code"] == "model_not_loaded" and loaded(server) == {"b", "c"}
        held = list(shelf.engines.values())
        for engine in held:
            engine.go.clear()
        waiting = [pool.submit(server.ask, name, model=name) for name in ("b", "c")]
        server.until(lambda: server.num_jobs() == 2)
        busy = server.ask("hi", model="a")
        assert (busy.status_code, busy.json()["error"]["code"]) == (503, "model_busy")
        assert int(busy.headers["retry-after"]) > 0 and loaded(server) == {"b", "c"}
        for engine in held:
            engine.go.set()
        assert [said(answer.result()) for answer in waiting] == ["b", "c"]
        assert said(server.ask("hi", model="a")) == "hi"


def test_a_model_that_could_not_be_loaded_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where none is left, and the server lives on; as if for want of memory."""
    monkeypatch.setattr("nanochat.jobs.PREPARE_SECONDS", 0.0)
    shelf = Shelf()
    with serving_models(shelf.models, memory=1) as server:
        for _ in range(2):
            assert server.ask("hi", model="lost").json()["error"]["code"] == "model_unavailable"
            assert server.client.get("/metrics").status_code == 200
            assert server.client.get("/ready").status_code == 503
        assert shelf.loads == ["a", "lost", "lost"]
        shelf.models[-1].load = shelf.models[0].load
        assert said(server.ask("hi", model="lost")) == "hi" and loaded(server) == {"lost"}
        assert server.client.get("/ready").status_code == 200


def test_a_model_leaves_the_memory_while_its_answer_is_still_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nanochat.jobs.PREPARE_SECONDS", 0.0)
    shelf = Shelf()
    shelf.engines["a"].scripts["long"] = [ord("x")] * 200
    ask: dict[str, Any] = {"max_tokens": 200, "logprobs": True, "top_logprobs": 20, "stream": True}
    with serving_models(shelf.models, memory=1) as server, server.connect("long", **ask):
        server.until(lambda: server.chat.metrics.num_tokens == 200)
        assert said(server.ask("hi", model="b")) == "hi"
        assert server.server.server_state.tasks, "the answer was sent"
        gc.collect()
        assert set(shelf.engines) == {"b"}


def test_others_are_answered_while_a_model_loads_once() -> None:
    shelf = Shelf()
    with serving_models(shelf.models) as server, ThreadPoolExecutor(4) as pool:
        shelf.may_load.clear()
        waiting = [pool.submit(server.ask, "hi", model=name) for name in ("b", "b", "c", "damaged")]
        server.until(lambda: len(shelf.loads) == 2)
        assert said(server.ask("hi")) == "hi" and loaded(server) == {"a"}
        shelf.may_load.set()
        assert [answer.result().status_code for answer in waiting] == [200, 200, 200, 503]
        assert shelf.loads[0] == "a" and sorted(shelf.loads) == ["a", "b", "c", "damaged"]


@pytest.mark.parametrize("hangs", [True, False])
def test_one_of_several_processes_leaves_with_its_engine(
    hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it has told its jobs; but not because a model cannot be loaded."""
    shelf, said_ready = Shelf(), list[int]()
    engine = shelf.engines["a"]
    with serving_models(shelf.models, ready=lambda: said_ready.append(1)) as server:
        server.until(lambda: said_ready == [1])
        for name, status in (("damaged", 503), ("lost", 503), ("a", 200)):
            assert server.ask("hi", model=name).status_code == status
        engine.pace = 0.01
        with background(server, 1) as (under_way,):
            server.until(lambda: any(each.num_generated > 3 for each in engine.running))
            if hangs:
                engine.go.clear()
                server.until(lambda: server.chat.workers[0].step_age > 0.1)
                monkeypatch.setattr("nanochat.jobs.MAX_STEP_SECONDS", 0.1)
            else:  # the thread itself fails
                server.chat.workers[0].inbox.put(lambda: engine.scripts["none"].clear())
            error = json.loads(under_way.result().last)["error"]
            assert "the engine has stopped" in error["message"]
            engine.go.set()
        server.until(lambda: not server.server.server_state.connections)
        server.until(lambda: not server.chat.workers[0].thread.is_alive())
        with pytest.raises(httpx.TransportError):
            server.client.get("/health")


def test_models_take_turns_where_there_is_room_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.jobs.PREPARE_SECONDS", 0.3)
    monkeypatch.setattr("nanochat.server.ROOM_SECONDS", 20.0)
    shelf = Shelf()
    with serving_models(shelf.models, memory=1) as server, ThreadPoolExecutor(8) as pool:
        names = ["a", "b", "c"] * 4
        answers = pool.map(lambda name: server.ask(name, model=name), names)
        assert [said(answer) for answer in answers] == names
        assert len(loaded(server)) == 1


@pytest.mark.parametrize("in_time", [True, False])
def test_the_end_waits_for_answers(in_time: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.server.DRAIN_SECONDS", 20.0 if in_time else 0.3)
    engine = EchoEngine(pace=0.01 if in_time else 0.05)
    with serving([engine]) as server:
        with background(server, 1) as (under_way,):
            server.until(lambda: bool(engine.running))
            server.server.should_exit = True  # what a first SIGTERM does
            server.until(lambda: server.client.get("/ready").status_code == 503)
            refused = server.ask("late")
            assert refused.status_code == 503 and refused.headers["retry-after"]
            assert refused.json()["error"]["code"] == "shutting_down"
            stream = under_way.result()
        if in_time:
            assert (stream.text(), stream.finish, stream.num_done) == ("question 0", ["stop"], 1)
        else:
            assert json.loads(stream.last)["error"]["code"] == "shutting_down"
            assert not stream.finish and stream.num_done == 0


# Who may come in, and what is said about it


def test_an_api_key() -> None:
    with serving([EchoEngine()], api_key="sesame") as server:
        wrong = ("Bearer wrong", "Bearer sésame", "sesam", "sesame", "Basic sesame", "Bearer")
        for given in (None, *wrong):
            headers: dict[str, Any] = {"authorization": given.encode()} if given else {}
            response = server.client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        for page in ("metrics", "report", "runs/data"):  # the last two hold samples
            assert server.client.get(f"/{page}").status_code == 401, page
        assert server.ask("a").status_code == 401
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/ui/logo.svg").status_code == 200
        for given in ("Bearer sesame", "bearer sesame", "BEARER  sesame"):
            server.client.headers["authorization"] = given
            assert server.ask("a").status_code == 200


def test_other_names() -> None:
    with serving([EchoEngine()], host_names=frozenset({"localhost"})) as server:
        assert server.client.get("/health", headers={"host": "localhost:1"}).status_code == 200
        rebound = server.client.get("/health", headers={"host": "evil.example"})
        assert rebound.status_code == 403 and rebound.json()["error"]["message"]


def test_prompts_stay_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="uvicorn")
    engine = EchoEngine()
    with serving([engine]) as server:
        server.ask("my secret", stream=True)
        server.ask("my secret", temperature=9)
        server.ask("my secret", response_format={"type": "my secret"})
        engine.num_failures = 1
        server.ask("my secret")
    assert "my secret" not in caplog.text and "the model failed" in caplog.text


def test_pages_and_their_policies(
    echo: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    logo = echo.client.get("/ui/logo.svg")
    assert logo.headers["content-type"] == "image/svg+xml" and b"<svg" in logo.content
    policy = logo.headers["content-security-policy"]
    assert policy == (
        "default-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    library = echo.client.get("/ui/vendor/markdown-it.umd.min.js")
    assert library.headers["content-type"].startswith("text/javascript")
    assert library.headers["cache-control"] == "no-cache" and library.headers["etag"]
    page = echo.client.get("/", headers={"origin": "http://elsewhere.example"})
    assert "access-control-allow-origin" not in page.headers
    assert "<title>" in page.text and page.headers["content-security-policy"] == policy
    for address in re.findall(r'(?:src|href)="([^"#]+)"', page.text):
        assert "//" not in address  # nothing from elsewhere
        assert address == "report" or echo.client.get(f"/{address}").status_code == 200, address
    assert echo.client.get("/report").json()["error"]["code"] is None
    (tmp_path / "report").mkdir()
    (tmp_path / "report/report.html").write_text("<h1>Report</h1>")
    report = echo.client.get("/report")
    assert report.text == "<h1>Report</h1>"
    assert "style-src 'unsafe-inline'" in report.headers["content-security-policy"]


def test_a_crowd_of_leavers_leaks_nothing() -> None:
    """100 clients at once on 4 slots, half of which leave after so many lines."""
    engine = EchoEngine(num_slots=4, pace=0.001)

    def one(i: int) -> int:
        with server.connect("x" * 50, stream=bool(i % 3)) as connection:
            lines = connection.makefile("rb")
            status = int(next(lines).split()[1])
            for count, line in enumerate(lines):
                if (i % 2 and count > i % 60) or b"[DONE]" in line or b'"usage"' in line:
                    break
            return status

    with serving([engine], ServerConfig(queue=32)) as server:
        with ThreadPoolExecutor(100) as pool:
            assert set(pool.map(one, range(100))) == {200, 429}
        server.until(lambda: server.num_jobs() == 0 and not engine.busy)
        assert server.ask("next").status_code == 200
