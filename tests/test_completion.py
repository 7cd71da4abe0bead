"""Tokens of an answer -> what a client sees: stop strings, characters split over tokens, tool calls, logprobs.

Oracle of the stop strings: the whole text, cut at the earliest of them; of the rest: what was put in.
"""

import json
import random
from typing import Any, Literal

import pytest

from nanochat.chat_api import Choice, Completion
from nanochat.engine import Event, Request
from tests.serving import CHAT, TOKENIZER

REQUEST = Request([CHAT.bos], 100)


def follow(
    choice: Choice, tokens: list[int], finish: Literal["stop", "length"] = "stop"
) -> list[list[dict[str, Any]]]:
    """The deltas that each token brings; the last token ends the answer."""
    taken = []
    for i, token in enumerate(tokens):
        if choice.finish is None:
            last = finish if i == len(tokens) - 1 else None
            choice.feed(Event(REQUEST, token, 1, [(token, -0.25)], last))
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
        said = spoken(follow(choice, [*text.encode(), CHAT.assistant_end]))
        # The first stop to be complete decides; of those complete at once, the one that begins first.
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        assert said == (text[: min(ends)[1]] if ends else text), (text, stops)
        num_stopped += bool(ends)
        assert choice.finish == "stop"
    assert 500 < num_stopped < 1900


def test_nothing_of_a_stop_string_is_shown_early() -> None:
    choice = Choice(TOKENIZER, ["END", "N!"])
    shown = [spoken([some]) for some in follow(choice, list(b"an EN. EN! more"))]
    assert shown == ["a", "n", " ", "", "", "EN.", " ", "", "", "E"]
    assert choice.finish == "stop"
    unfinished = Choice(TOKENIZER, ["END"])
    assert spoken(follow(unfinished, list(b"an EN"), "length")) == "an EN"
    assert unfinished.finish == "length"


def test_characters_arrive_whole() -> None:
    family = "a👩‍👩‍👧é汉🏳️‍🌈"
    shown = follow(Choice(TOKENIZER), list(family.encode()))
    assert [spoken([some]) for some in shown if some] == list(family)
    cut = Choice(TOKENIZER)
    assert spoken(follow(cut, list("né".encode())[:-1], "length")) == "n\ufffd"


def test_tool_calls_are_told_apart_when_they_are_complete() -> None:
    one = [CHAT.python_start, *b"1+1", CHAT.python_end]
    result = [CHAT.output_start, *b"2", CHAT.output_end]
    shown = follow(Choice(TOKENIZER), [*b"a", *one, *result, *b"b", CHAT.assistant_end])
    assert sum(shown, []) == [
        {"content": "a"}, {"tool": {"expression": "1+1", "result": "2"}}, {"content": "b"},
    ]  # fmt: skip
    assert shown[8] == [
        {"tool": {"expression": "1+1", "result": "2"}}
    ]  # with the end of its output
    silent = follow(Choice(TOKENIZER), [*one, *one, *b"b", CHAT.assistant_end])
    tool = {"tool": {"expression": "1+1", "result": None}}
    assert sum(silent, []) == [tool, tool, {"content": "b"}]
    cut = follow(Choice(TOKENIZER), [*b"x", *one[:-2]], "length")
    assert sum(cut, []) == [{"content": "x"}, {"tool": {"expression": "1+", "result": None}}]


def test_logprobs_come_with_their_text() -> None:
    choice = Choice(TOKENIZER, ["END"], top_logprobs=2)
    shown = []
    for token in b"aE\xc3\xa9ENDb":
        if choice.finish is None:
            pairs = [(token, -0.5), (66, -1.0), (67, float("-inf")), (68, -3.0)]
            choice.feed(Event(REQUEST, token, 1, pairs, None))
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


@pytest.mark.parametrize("stream_usage", [True, False])
def test_a_stream_in_openais_shape(stream_usage: bool) -> None:
    choices = [Choice(TOKENIZER), Choice(TOKENIZER)]
    completion = Completion("m", choices, 7, stream_usage)
    data = completion.begin()
    for choice in choices:
        choice.feed(Event(REQUEST, ord("x"), 1, None, None))
    data += completion.news()
    for choice in choices:
        choice.feed(Event(REQUEST, ord("y"), 1, None, "length"))
    data += completion.news() + completion.news() + completion.end({"queue_seconds": 0.5})
    events = data.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    last = chunks.pop() if stream_usage else {}
    assert last.get("usage") == (
        {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11} if stream_usage else None
    )
    assert all(("usage" in chunk) == stream_usage and not chunk.get("usage") for chunk in chunks)
    for index in (0, 1):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        deltas = [c["delta"] for c in mine]
        assert deltas == [
            {"role": "assistant", "content": ""}, {"content": "x"}, {"content": "y"}, {},
        ]  # fmt: skip
        assert [c["finish_reason"] for c in mine] == [None, None, None, "length"]
