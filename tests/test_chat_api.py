"""What a request may say, and what a client sees of the tokens of an answer.

Oracles: the tables of OpenAI's API reference, written out; for prompts, the tokenizer's own
rendering; for stop strings, the whole text, cut at the earliest of them; else, what was put in.
"""

import random
from typing import Any

import pytest
from pydantic import ValidationError

from nanochat.chat_api import (
    ApiError,
    ChatRequest,
    Choice,
    Message,
    ServerConfig,
    engine_requests,
    fold_messages,
    validation_error,
)
from nanochat.engine import Event, Request
from nanochat.tokenizer import render_prompt
from tests.serving import TOKENIZER

HELLO = [{"role": "user", "content": "hello"}]


def talk(*turns: str) -> list[Message]:
    """Messages from strings such as "user: hello"."""
    pairs = (turn.split(": ", 1) for turn in turns)
    return [Message.model_validate({"role": role, "content": text}) for role, text in pairs]


def refusal(num_slots: int = 4, **fields: Any) -> ApiError:
    """The error of a body with these fields."""
    with pytest.raises((ValidationError, ApiError)) as caught:
        ChatRequest.model_validate({"messages": HELLO} | fields).check_supported(num_slots)
    error = caught.value
    if isinstance(error, ApiError):
        return error
    return validation_error([e | {"loc": ("body", *e["loc"])} for e in error.errors()])


PARTS = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:"}}]
REFUSALS = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [123]}, "messages.0"),
    ({"messages": "hello"}, "messages"),
    ({"messages": HELLO * 501}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": PARTS}]}, "messages.0.content.1.type"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 10**30}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_completion_tokens": -3}, "max_completion_tokens"),
    ({"seed": 2**63}, "seed"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"n": 0}, "n"),
    ({"n": 5}, "n"),
    ({"stream": "yes"}, "stream"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": -0.5}, "frequency_penalty"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSALS)
def test_what_is_refused_names_its_parameter(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)
    shown = error.body["error"]
    assert (error.status, shown["type"], shown["param"]) == (400, "invalid_request_error", param)
    unsupported = param in ("tools", "logit_bias", "response_format") or "penalty" in param
    assert shown["code"] == ("unsupported_parameter" if unsupported else None)


def test_a_megabyte_of_bad_items_is_refused_at_the_first() -> None:
    for messages in ([{}] * 300_000, [{"role": "user", "content": [{}] * 600}] * 500):
        with pytest.raises(ValidationError) as caught:
            ChatRequest.model_validate({"messages": messages})
        assert caught.value.error_count() <= 3


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {}, "store": True, "service_tier": "auto"},
        {"parallel_tool_calls": True, "tools": [], "logit_bias": {}, "unheard_of": [1]},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "response_format": {"type": "text"}},
        {"temperature": None, "top_p": None, "max_tokens": None, "stop": None, "n": None},
        {"temperature": 1, "top_p": 0.5, "top_k": 0, "seed": -5, "stop": ["a", "b"], "n": 4},
        {"logprobs": True, "top_logprobs": 20, "stream_options": {"include_usage": True}},
        {"messages": [{"role": "developer", "content": "", "name": "x"}]},
        {"messages": [{"role": "user", "content": PARTS[:1] * 2}]},
    ],
)
def test_what_is_taken(fields: dict[str, Any]) -> None:
    ChatRequest.model_validate({"messages": HELLO} | fields).check_supported(4)


def test_messages_fold_into_turns() -> None:
    turns = ("system: a", "developer: b", "user: c", "assistant: d", "assistant: e", "user: f")
    assert fold_messages(talk(*turns)) == [
        {"role": "user", "content": "a\n\nb\n\nc"},
        {"role": "assistant", "content": "d\n\ne"},
        {"role": "user", "content": "f"},
    ]
    parts = [("text", "It "), ("text", "is "), ("python", "6*7"), ("python_output", "42")]
    reply = {"role": "assistant", "content": [{"type": k, "text": t} for k, t in parts]}
    called = [Message.model_validate(message) for message in (*HELLO, reply, reply, *HELLO)]
    whole = [("text", "It is "), *parts[2:], ("text", "\n\nIt is "), *parts[2:]]
    assert fold_messages(called)[1]["content"] == [{"type": k, "text": t} for k, t in whole]
    with pytest.raises(ApiError, match="only the assistant's"):
        fold_messages([Message.model_validate(reply | {"role": "user"})])
    plain = ("system: be brief", "user: hi")
    said = [{"role": role, "content": text} for role, text in (t.split(": ") for t in plain)]
    folded = fold_messages(talk(*plain))
    assert render_prompt(TOKENIZER, {"messages": folded}) == render_prompt(
        TOKENIZER, {"messages": said}
    )
    with pytest.raises(ApiError, match="last message"):
        fold_messages(talk("user: a", "assistant: b"))
    with pytest.raises(ApiError, match="more than 32000 characters") as caught:
        fold_messages(talk("user: " + "a" * 20_000, "user: " + "b" * 12_001))
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")


def requests_of(max_len: int = 64, **fields: Any) -> list[Any]:
    body = ChatRequest.model_validate({"messages": HELLO} | fields)
    return engine_requests(
        body, TOKENIZER, max_len, ServerConfig(temperature=0.5, top_k=40, max_tokens=30)
    )


def test_defaults_and_what_overrides_them() -> None:
    (plain,) = requests_of()
    length = len(plain.prompt)
    assert length == len("hello") + 4  # bos, user start and end, assistant start
    assert (plain.temperature, plain.top_k, plain.top_p) == (0.5, 40, 1.0)
    assert (plain.max_tokens, plain.logprobs) == (30, 0)
    (small,) = requests_of(max_len=length + 10)
    assert small.max_tokens == 10  # the default yields to the context
    (own,) = requests_of(temperature=0, top_k=0, top_p=0.9, max_tokens=7, logprobs=True)
    assert (own.temperature, own.top_k, own.top_p, own.max_tokens) == (0, 0, 0.9, 7)
    assert own.logprobs == 1
    assert requests_of(max_completion_tokens=3, max_tokens=9)[0].max_tokens == 3
    assert requests_of(logprobs=True, top_logprobs=5)[0].logprobs == 5


def test_seeds() -> None:
    first, again = requests_of(seed=7, n=3), requests_of(seed=7, n=3)
    assert [r.seed for r in first] == [r.seed for r in again]
    assert len({r.seed for r in first}) == 3
    assert requests_of()[0].seed != requests_of()[0].seed


def test_the_context_is_never_cut() -> None:
    assert requests_of(max_tokens=64 - 9)[0].max_tokens == 64 - 9
    with pytest.raises(ApiError, match="context is 64 tokens") as caught:
        requests_of(max_tokens=64 - 8)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    with pytest.raises(ApiError, match="context is 9 tokens"):
        requests_of(max_len=9)


REQUEST = Request([0], 100)


def follow(choice: Choice, text: str, finish: Any = "stop") -> list[list[dict[str, Any]]]:
    """The deltas that each character brings; the last one ends the answer."""
    taken = []
    for i, char in enumerate(text):
        if choice.finish is None:
            last = finish if i == len(text) - 1 else None
            choice.feed(Event(REQUEST, 0, 1, char, finish=last))
            taken.append(choice.take()[0])
    return taken


def spoken(deltas: list[list[dict[str, Any]]]) -> str:
    return "".join(delta.get("content", "") for some in deltas for delta in some)


def test_stop_strings_cut_where_the_whole_text_would_be_cut() -> None:
    """2,000 random texts and stop strings over two letters, so that beginnings of stops abound."""
    rng = random.Random(0)
    num_stopped = 0
    for _ in range(2000):
        text = "".join(rng.choices("ab", k=rng.randint(1, 20)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 6))) for _ in range(rng.randint(0, 4))]
        choice = Choice(TOKENIZER, stops)
        said = spoken(follow(choice, text))
        # The first stop to be complete decides; of those complete at once, the one that begins
        # first.
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        assert said == (text[: min(ends)[1]] if ends else text), (text, stops)
        num_stopped += bool(ends)
        assert choice.finish == "stop"
    assert 500 < num_stopped < 1900


def test_nothing_of_a_stop_string_is_shown_early() -> None:
    choice = Choice(TOKENIZER, ["END", "N!"])
    shown = [spoken([some]) for some in follow(choice, "an EN. EN! more")]
    assert shown == ["a", "n", " ", "", "", "EN.", " ", "", "", "E"]
    unfinished = Choice(TOKENIZER, ["END"])
    assert spoken(follow(unfinished, "an EN", "length")) == "an EN"
    assert (choice.finish, unfinished.finish) == ("stop", "length")


def test_tool_calls_are_deltas_of_their_own() -> None:
    """What was held back for a stop string comes before the call."""
    choice = Choice(TOKENIZER, ["END"])
    for text, tool in (("an EN", None), ("", ("1+1", "2")), ("D", None), ("", ("8/0", None))):
        choice.feed(Event(REQUEST, 0, 1, text, tool))
    assert choice.take()[0] == [
        {"content": "an EN"},
        {"tool": {"expression": "1+1", "result": "2"}},
        {"content": "D"},
        {"tool": {"expression": "8/0", "result": None}},
    ]
    parts = [("text", "an EN"), ("python", "1+1"), ("python_output", "2"), ("text", "D")]
    assert choice.shown.parts == [{"type": k, "text": t} for k, t in [*parts, ("python", "8/0")]]


def test_logprobs_come_with_their_text() -> None:
    """A token's entry waits as long as its text, be it for a stop string or for the rest of a
    character.
    """
    choice = Choice(TOKENIZER, ["END"], top_logprobs=2)
    shown = []
    for token, text in [
        *zip(b"aE\xc3\xa9", ("a", "E", "", "é"), strict=True),
        *zip(b"END", "END", strict=True),
    ]:
        pairs = [(token, -0.5), (66, -1.0), (67, float("-inf")), (68, -3.0)]
        choice.feed(Event(REQUEST, token, 1, text, None, pairs))
        deltas, logprobs = choice.take()
        entries = logprobs["content"] if logprobs else []
        shown.append((spoken([deltas]), [entry["bytes"][0] for entry in entries]))
        for entry in entries:
            assert entry["logprob"] == -0.5
            likeliest = [(top["token"], top["logprob"]) for top in entry["top_logprobs"]]
            assert likeliest == [("B", -1.0), ("C", -9999.0)]
    assert shown == [
        ("a", [97]), ("", []), ("", []), ("Eé", [69, 195, 169]), ("", []), ("", []), ("", []),
    ]  # fmt: skip
