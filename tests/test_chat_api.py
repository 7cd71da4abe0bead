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
from tests.models import TOKENIZER

HELLO = [{"role": "user", "content": "hello"}]


def texts(parts: list[tuple[str, str]]) -> list[dict[str, str]]:
    """A message's content."""
    return [{"type": kind, "text": text} for kind, text in parts]


def talk(*turns: str) -> list[Message]:
    """Messages from strings such as "user: hello"."""
    pairs = (turn.split(": ") for turn in turns)
    return [Message.model_validate({"role": role, "content": text}) for role, text in pairs]


PARTS = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "data:"}}]
UNSUPPORTED = {
    "tools": [[{"type": "function"}]],
    "logit_bias": [{"5": 1}],
    "presence_penalty": [0.5],
    "frequency_penalty": [-0.5],
    "response_format": [{"type": "json_object"}],
}
WRONG = UNSUPPORTED | {
    "messages": [[], None, "hello", HELLO * 501],
    "temperature": [float("nan"), 2.1, -0.1, "1"],
    "top_p": [1.5],
    "top_k": [-1, 10**30],
    "max_tokens": [0, 1.5],
    "max_completion_tokens": [-3],
    "seed": [2**63],
    "stop": [["a"] * 5, ""],
    "n": [0, 5],
    "stream": ["yes"],
    "top_logprobs": [2],
}
WRONG_MESSAGES = [
    (123, "messages.0"),
    ({"role": "user", "content": None}, "messages.0.content"),
    ({"role": "user"}, "messages.0.content"),
    ({"role": "tool", "content": "x"}, "messages.0.role"),
    ({"role": "user", "content": PARTS}, "messages.0.content.1.type"),
]


def test_what_is_refused_names_its_parameter() -> None:
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        *(({name: value}, name) for name, values in WRONG.items() for value in values),
        *(({"messages": [message]}, param) for message, param in WRONG_MESSAGES),
    ]
    for fields, param in refusals:
        with pytest.raises((ValidationError, ApiError)) as caught:
            ChatRequest.model_validate({"messages": HELLO} | fields).check_supported(num_slots=4)
        error = caught.value
        if isinstance(error, ValidationError):
            error = validation_error([e | {"loc": ("body", *e["loc"])} for e in error.errors()])
        told = error.body["error"]
        assert (error.status, told["type"], told["param"]) == (400, "invalid_request_error", param)
        assert told["code"] == ("unsupported_parameter" if param in UNSUPPORTED else None)


def test_a_megabyte_of_bad_items_is_refused_at_the_first() -> None:
    for messages in ([{}] * 300_000, [{"role": "user", "content": [{}] * 600}] * 500):
        with pytest.raises(ValidationError) as caught:
            ChatRequest.model_validate({"messages": messages})
        assert caught.value.error_count() <= 3


def test_what_is_taken() -> None:
    for fields in (
        {"user": "me", "metadata": {}, "store": True, "service_tier": "auto"},
        {"parallel_tool_calls": True, "tools": [], "logit_bias": {}, "unheard_of": [1]},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "response_format": {"type": "text"}},
        {"temperature": None, "top_p": None, "max_tokens": None, "stop": None, "n": None},
        {"temperature": 1, "top_p": 0.5, "top_k": 0, "seed": -5, "stop": ["a", "b"], "n": 4},
        {"logprobs": True, "top_logprobs": 20, "stream_options": {"include_usage": True}},
        {"messages": [{"role": "developer", "content": "", "name": "x"}]},
        {"messages": [{"role": "user", "content": PARTS[:1] * 2}]},
    ):
        ChatRequest.model_validate({"messages": HELLO} | fields).check_supported(4)


def test_messages_fold_into_turns() -> None:
    turns = ("system: a", "developer: b", "user: c", "assistant: d", "assistant: e", "user: f")
    assert fold_messages(talk(*turns)) == [
        {"role": "user", "content": "a\n\nb\n\nc"},
        {"role": "assistant", "content": "d\n\ne"},
        {"role": "user", "content": "f"},
    ]
    said = [{"role": "system", "content": "be brief"}, *HELLO]
    folded = fold_messages(talk("system: be brief", "user: hello"))
    prompts = [render_prompt(TOKENIZER, {"messages": messages}) for messages in (folded, said)]
    assert prompts[0] == prompts[1]


def test_tool_calls_come_back_as_parts_of_the_assistants_alone() -> None:
    parts = [("text", "It "), ("text", "is "), ("python", "6*7"), ("python_output", "42")]
    reply = {"role": "assistant", "content": texts(parts)}
    called = [Message.model_validate(message) for message in (*HELLO, reply, reply, *HELLO)]
    whole = [("text", "It is "), *parts[2:], ("text", "\n\nIt is "), *parts[2:]]
    assert fold_messages(called)[1]["content"] == texts(whole)
    with pytest.raises(ApiError, match="only the assistant's"):
        fold_messages([Message.model_validate(reply | {"role": "user"})])


def test_the_last_word_is_the_users_and_what_is_said_is_bounded() -> None:
    with pytest.raises(ApiError, match="last message"):
        fold_messages(talk("user: a", "assistant: b"))
    with pytest.raises(ApiError, match="more than 32000 characters") as caught:
        fold_messages(talk("user: " + "a" * 20_000, "user: " + "b" * 12_001))
    assert (caught.value.status, caught.value.code) == (413, "request_too_large")


def requests_of(max_len: int = 64, **fields: Any) -> list[Request]:
    body = ChatRequest.model_validate({"messages": HELLO} | fields)
    config = ServerConfig(temperature=0.5, top_k=40, max_tokens=30)
    return engine_requests(body, TOKENIZER, max_len, config)


OWN = {"temperature": 0, "top_k": 0, "top_p": 0.9, "max_tokens": 64 - 9}


def test_defaults_and_what_overrides_them() -> None:
    cases: list[tuple[dict[str, Any], dict[str, float]]] = [
        ({}, {"temperature": 0.5, "top_k": 40, "top_p": 1.0, "max_tokens": 30, "logprobs": 0}),
        ({"max_len": 9 + 10}, {"max_tokens": 10}),  # the default yields to the context
        *[({name: value}, {name: value}) for name, value in OWN.items()],
        ({"logprobs": True}, {"logprobs": 1}),
        ({"logprobs": True, "top_logprobs": 5}, {"logprobs": 5}),
        ({"max_completion_tokens": 3, "max_tokens": 9}, {"max_tokens": 3}),
    ]
    for fields, expected in cases:
        [request] = requests_of(**fields)
        assert {name: getattr(request, name) for name in expected} == expected
        assert len(request.prompt) == 9  # bos, user start and end, assistant start, "hello"


def test_a_seed_gives_each_choice_its_own() -> None:
    first, again = ([request.seed for request in requests_of(seed=7, n=3)] for _ in range(2))
    assert first == again and len(set(first)) == 3
    assert requests_of()[0].seed != requests_of()[0].seed


def test_the_context_is_never_cut() -> None:
    for max_len, fields in ((64, {"max_tokens": 64 - 8}), (9, {})):
        with pytest.raises(ApiError, match=f"context is {max_len} tokens") as caught:
            requests_of(max_len, **fields)
        assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")


def feed(
    choice: Choice, text: str, tool: Any = None, finish: Any = None, logprobs: Any = None
) -> tuple[str, Any]:
    """(text, logprobs) that one more token brings."""
    token = logprobs[0][0] if logprobs else 0
    choice.feed(Event(Request([0], 100), token, 1, text, tool, logprobs, finish))
    deltas, shown = choice.take()
    return "".join(delta.get("content", "") for delta in deltas), shown


def follow(choice: Choice, text: str, finish: str = "stop") -> list[str]:
    """What each character brings; the last one ends the answer."""
    told = []
    for number, char in enumerate(text, 1):
        if choice.finish is None:
            told.append(feed(choice, char, finish=finish if number == len(text) else None)[0])
    return told


def test_stop_strings_cut_where_the_whole_text_would_be_cut() -> None:
    """2,000 random texts and stop strings over two letters, so that beginnings of stops abound."""
    rng = random.Random(0)
    num_stopped = 0
    for _ in range(2000):
        text = "".join(rng.choices("ab", k=rng.randint(1, 20)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 6))) for _ in range(rng.randint(0, 4))]
        choice = Choice(TOKENIZER, stops)
        said = "".join(follow(choice, text))
        # The first stop to be complete decides; of two at once, the one that begins first.
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        assert said == (text[: min(ends)[1]] if ends else text), (text, stops)
        num_stopped += bool(ends)
        assert choice.finish == "stop"
    assert 500 < num_stopped < 1900


def test_nothing_of_a_stop_string_is_shown_early() -> None:
    choice = Choice(TOKENIZER, ["END", "N!"])
    assert follow(choice, "an EN. EN! more") == ["a", "n", " ", "", "", "EN.", " ", "", "", "E"]
    unfinished = Choice(TOKENIZER, ["END"])
    assert "".join(follow(unfinished, "an EN", "length")) == "an EN"
    assert (choice.finish, unfinished.finish) == ("stop", "length")


def test_tool_calls_are_deltas_of_their_own() -> None:
    """What was held back for a stop string comes before the call."""
    choice = Choice(TOKENIZER, ["END"])
    for text, tool in (("an EN", None), ("", ("1+1", "2")), ("D", None), ("", ("8/0", None))):
        choice.feed(Event(Request([0], 100), 0, 1, text, tool))
    assert choice.take()[0] == [
        {"content": "an EN"},
        {"tool": {"expression": "1+1", "result": "2"}},
        {"content": "D"},
        {"tool": {"expression": "8/0", "result": None}},
    ]
    parts = [("text", "an EN"), ("python", "1+1"), ("python_output", "2"), ("text", "D")]
    assert choice.shown.parts == texts([*parts, ("python", "8/0")])


def test_logprobs_come_with_their_text() -> None:
    """A token's entry waits with it: for a stop string, or for the rest of a character."""
    choice = Choice(TOKENIZER, ["END"], top_logprobs=2)
    shown = []
    for token, char in zip("aEéEND".encode(), ("a", "E", "", *"éEND"), strict=True):
        pairs = [(token, -0.5), (66, -1.0), (67, float("-inf")), (68, -3.0)]
        text, logprobs = feed(choice, char, logprobs=pairs)
        entries = logprobs["content"] if logprobs else []
        shown.append((text, [entry["bytes"][0] for entry in entries]))
        for entry in entries:
            assert entry["logprob"] == -0.5
            likeliest = [(top["token"], top["logprob"]) for top in entry["top_logprobs"]]
            assert likeliest == [("B", -1.0), ("C", -9999.0)]
    assert shown == [
        ("a", [97]), ("", []), ("", []), ("Eé", [69, 195, 169]), ("", []), ("", []), ("", []),
    ]  # fmt: skip
