"""What a request may say, and what a client sees of the tokens of an answer.

Oracles: the tables of OpenAI's API reference, written out; for prompts, the tokenizer's own
rendering; for stop strings, the whole text, cut at the earliest of them; else, what was put in.
"""

import json
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import openai
import pytest
from pydantic import ValidationError

from nanochat.chat_api import (
    ApiError,
    ChatRequest,
    Choice,
    Completion,
    DetokenizeRequest,
    Message,
    ServerConfig,
    TextCompletion,
    TextRequest,
    TokenizeRequest,
    engine_requests,
    fold_messages,
    validation_error,
)
from nanochat.engine import Engine, Event, Request
from nanochat.tokenizer import chat_tokens, render_prompt
from tests.models import TOKENIZER, random_gpt

CHAT = chat_tokens(TOKENIZER)
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
    "functions": [[{"name": "f"}]],
    "response_format": [{"type": "json_object"}],
    "suffix": ["after"],
    "best_of": [3, "2"],
    "grammar": ["root ::= x"],
}
WRONG = UNSUPPORTED | {
    "model": [None, "", 5],
    "temperature": [float("nan"), 2.1, -0.1, "1", True, 10**400],
    "top_p": [1.5],
    "top_k": [-2, 10**30, 1.5, "5"],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, float("inf")],
    "repeat_penalty": [0],
    "presence_penalty": [2.1, -2.1],
    "frequency_penalty": ["0"],
    "logit_bias": [{str(i): 1 for i in range(301)}, {"265": 1}, [[5, 1]], 5],
    "max_tokens": [-2, 1.5, 0],
    "max_completion_tokens": [-3],
    "seed": [2**63],
    "stop": [["a"] * 17, "a" * 257, 5],
    "n": [0, 5, True],
    "stream": ["yes"],
    "logprobs": ["2"],
}
WRONG_MESSAGES = [
    (123, "messages.0"),
    ({"role": "user", "content": None}, "messages.0.content"),
    ({"role": "user"}, "messages.0.content"),
    ({"role": "robot", "content": "x"}, "messages.0.role"),
    ({"role": "user", "content": PARTS}, "messages.0.content.1.type"),
]
WRONG_PROMPTS = [
    *((prompt, "prompt") for prompt in (None, [], [265], [[1], [265]], ["a"] * 7, ["a"] * 501)),
    *((prompt, "prompt.0") for prompt in ([[]], [-1], [1, True])),
]


def answer_to(make: Any, body: dict[str, Any], max_len: int = 64, kind: str = "chat") -> Any:
    """The engine's requests for a body, or the error of its refusal."""
    engine = cast(Engine, SimpleNamespace(tokenizer=TOKENIZER, max_len=max_len, num_slots=4))
    try:
        if hasattr(make, "answer"):
            return make.model_validate(body).answer(engine, kind)
        config = ServerConfig(temperature=0.5, top_k=40, max_tokens=30, queue=2)
        return engine_requests(make.model_validate(body), engine, kind, config)
    except ValidationError as error:
        return validation_error([e | {"loc": ("body", *e["loc"])} for e in error.errors()])
    except ApiError as error:
        return error


def test_what_is_refused_names_its_parameter() -> None:
    chat, text = {"messages": HELLO}, {"prompt": "hello"}
    fields = [({name: value}, name) for name, values in WRONG.items() for value in values]
    cases: list[tuple[Any, dict[str, Any], str]] = [
        *((ChatRequest, chat | each, name) for each, name in fields),
        *((TextRequest, text | each, name) for each, name in fields),
        (ChatRequest, chat | {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        (ChatRequest, chat | {"top_logprobs": 2}, "top_logprobs"),
        (ChatRequest, chat | {"max_tokens": 0, "echo": True}, "max_tokens"),
        (TextRequest, text | {"logprobs": 21}, "logprobs"),
        (TextRequest, text | {"logit_bias": {"5": 101}}, "logit_bias.5"),
        (TextRequest, text | {"logit_bias": {"x": 1}}, "logit_bias.x"),
        (TextRequest, {"prompt": ["a"] * 2, "n": 4}, "prompt"),
        *((ChatRequest, {"messages": value}, "messages") for value in ([], None, "a", HELLO * 501)),
        *((ChatRequest, {"messages": [message]}, param) for message, param in WRONG_MESSAGES),
        *((TextRequest, {"prompt": prompt}, param) for prompt, param in WRONG_PROMPTS),
        *((TokenizeRequest, body, "prompt") for body in ({}, {"content": "a", "prompt": "a"})),
        (DetokenizeRequest, {"tokens": [1, 265]}, "tokens"),
        (DetokenizeRequest, {"tokens": [1, "2"]}, "tokens.1"),
    ]
    for make, body, param in cases:
        error = answer_to(make, body)
        told = error.body["error"]
        assert (error.status, told["type"], told["param"]) == (400, "invalid_request_error", param)
        assert told["code"] == ("unsupported_parameter" if param in UNSUPPORTED else None)


def test_a_megabyte_of_bad_items_is_refused_at_the_first() -> None:
    bodies: list[tuple[Any, dict[str, Any]]] = [
        (ChatRequest, {"messages": [{}] * 300_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 600}] * 500}),
        (TextRequest, {"prompt": [1] * 30_000 + ["a"] * 30_000}),
        (TextRequest, {"prompt": [[]] * 300_000}),
        (TextRequest, {"prompt": "a", "stop": [1] * 300_000}),
        (TextRequest, {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(60_000)), "x")}),
    ]
    for make, body in bodies:
        with pytest.raises(ValidationError) as caught:
            make.model_validate(body)
        assert caught.value.error_count() <= 4


# What a body says, and what it means to the engine. Null or empty is as good as absent.
TAKEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"temperature": 0.5, "top_k": 40, "top_p": 1.0, "logprobs": None, "min_p": 0.0}),
    ({}, {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}),
    *(({name: None}, {}) for name in WRONG if name not in ("model", *UNSUPPORTED)),
    *(({name: empty}, {}) for name in UNSUPPORTED for empty in (None, [], {}, "")),
    *(({name: []}, {}) for name in ("stop", "logit_bias")),
    ({"user": "me", "metadata": {}, "store": True, "tool_choice": "auto", "unheard_of": [1]}, {}),
    ({"model": "m", "best_of": 1.0, "response_format": {"type": "text"}, "stop": ""}, {}),
    ({"stop": ["a", ""] * 8, "stream_options": {"include_usage": True}, "stream": True}, {}),
    ({"temperature": 1, "top_p": 1}, {"temperature": 1.0, "top_p": 1.0}),
    ({"temperature": 0, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
    ({"top_k": 0}, {"top_k": 0}),
    ({"top_k": -1}, {"top_k": 0}),
    ({"top_k": 8.0}, {"top_k": 8}),
    ({"top_k": 10**6}, {"top_k": TOKENIZER.vocab_size}),
    ({"min_p": 0.05}, {"min_p": 0.05}),
    ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ({"repeat_penalty": 2}, {"repetition_penalty": 2.0}),
    ({"presence_penalty": -2, "frequency_penalty": 0.5}, {"presence_penalty": -2.0}),
    ({"presence_penalty": -2, "frequency_penalty": 0.5}, {"frequency_penalty": 0.5}),
    ({"logit_bias": {"5": -100, "264": 1.5}}, {"logit_bias": {5: -100.0, 264: 1.5}}),
    ({"max_tokens": 3.0}, {"max_tokens": 3}),
    ({"max_tokens": 4096}, {"max_tokens": "room"}),
    ({"max_tokens": -1}, {"max_tokens": "room"}),
    ({"max_completion_tokens": 3, "max_tokens": 9}, {"max_tokens": 3}),
    ({"max_completion_tokens": -1, "max_tokens": 9}, {"max_tokens": "room"}),
]


def test_what_is_taken() -> None:
    for make, prompt, num_prompt, num_default in (
        (ChatRequest, {"messages": HELLO}, 9, 30),  # bos, user start and end, assistant start
        (TextRequest, {"prompt": "hello"}, 6, 16),  # bos
    ):
        for fields, expected in [*TAKEN, ({"max_tokens": None}, {"max_tokens": num_default})]:
            [request] = answer_to(make, prompt | fields)
            assert len(request.prompt) == num_prompt
            for name, value in expected.items():
                value = 64 - num_prompt if value == "room" else value
                assert getattr(request, name) == value, fields
        [request] = answer_to(make, prompt, max_len=num_prompt + 10)
        assert request.max_tokens == 10  # the default yields to the context


def test_logprobs_are_asked_for_as_each_api_has_it() -> None:
    chat, text = {"messages": HELLO}, {"prompt": "hello", "echo": True}
    for make, body, num, num_prompt, limit in (
        (ChatRequest, chat | {"logprobs": True}, 0, None, 30),
        (ChatRequest, chat | {"logprobs": True, "top_logprobs": 20.0}, 20, None, 30),
        (TextRequest, text, None, None, 16),
        (TextRequest, text | {"logprobs": 0}, 0, 0, 16),
        (TextRequest, text | {"logprobs": 5}, 5, 5, 16),
        (TextRequest, text | {"logprobs": 5, "echo": False}, 5, None, 16),
        (TextRequest, text | {"logprobs": 5, "max_tokens": 0}, 5, 5, 0),
        (TextRequest, text | {"max_tokens": 0}, None, 0, 0),
    ):
        [request] = answer_to(make, body)
        asked = (request.logprobs, request.prompt_logprobs, request.max_tokens)
        assert asked == (num, num_prompt, limit), body


def test_prompts_are_text_after_bos_or_ids_as_they_are() -> None:
    """Several stay in order, each with its choices; a chat with a base model is plain text."""
    bos, ids = TOKENIZER.bos_id, [5, 264]
    spelled = "<|bos|>"
    for prompt, expected in (
        ("", [[bos]]),
        (spelled, [[bos, *spelled.encode()]]),
        (["a", ""], [[bos, 97], [bos]]),
        (ids, [ids]),
        ([ids, [1]], [ids, [1]]),
    ):
        requests = answer_to(TextRequest, {"prompt": prompt, "n": 2, "seed": 1})
        assert [request.prompt for request in requests] == [p for p in expected for _ in range(2)]
        seeds = [request.seed for request in requests]
        assert len(set(seeds[:2])) == 2 and seeds == seeds[:2] * len(expected)
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": texts([("input_text", "b"), ("output_text", "c")])},
        {"role": "assistant", "content": texts([("text", "d"), ("python", "1"), ("text", "e")])},
        {"role": "tool", "content": "f"},
    ]
    [request] = answer_to(ChatRequest, {"messages": messages}, kind="base")
    assert request.prompt == [bos, *b"a\n\nbc\n\nde\n\nf"]


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


def test_who_called_a_tool_may_be_silent_and_its_result_counts_as_the_users() -> None:
    call: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    result = {"role": "tool", "content": "42", "tool_call_id": "1"}
    for silent in (call, {"role": "assistant"}, {"role": "assistant", "content": []}):
        for role in ("tool", "function"):
            said = [*HELLO, silent, result | {"role": role}]
            assert fold_messages([Message.model_validate(each) for each in said]) == [
                *HELLO, {"role": "assistant", "content": ""}, {"role": "user", "content": "42"},
            ]  # fmt: skip


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


def requests_of(**fields: Any) -> list[Request]:
    return answer_to(ChatRequest, {"messages": HELLO} | fields)


def test_a_seed_gives_each_choice_its_own() -> None:
    first, again = ([request.seed for request in requests_of(seed=7, n=3)] for _ in range(2))
    assert first == again and len(set(first)) == 3
    for seed in (None, -1):
        assert requests_of(seed=seed)[0].seed != requests_of(seed=seed)[0].seed


def test_the_prompt_is_never_cut() -> None:
    for make, body, max_len in (
        (ChatRequest, {"messages": HELLO}, 9),
        (ChatRequest, {"messages": HELLO, "max_tokens": -1}, 9),
        (TextRequest, {"prompt": "hello", "max_tokens": 1}, 6),
        (TextRequest, {"prompt": ["a", "hello"], "max_tokens": 0, "echo": True}, 5),
    ):
        error = answer_to(make, body, max_len)
        assert (error.status, error.code) == (400, "context_length_exceeded")
        assert f"context is {max_len} " in str(error)
        assert len(answer_to(make, body, max_len + 1)) >= 1
    assert answer_to(TextRequest, {"prompt": "a" * 32_001}).status == 413


def test_scored_prompts_are_few_enough_for_one_answer() -> None:
    body = {"prompt": [[1] * 2000], "echo": True, "max_completion_tokens": 0, "logprobs": 20}
    assert [each.max_tokens for each in answer_to(TextRequest, body | {"n": 2}, 3000)] == [0] * 2
    error = answer_to(TextRequest, body | {"prompt": [[1] * 3000] * 4}, 3000)
    assert (error.status, error.code) == (413, "request_too_large")


def feed(choice: Choice, text: str, tool: Any = None, finish: Any = None, token: int = 0) -> str:
    """The text that one more token brings."""
    choice.feed(Event(Request([0], 100), token, 1, text, tool, None, finish))
    return "".join(delta.get("content", "") for delta in choice.take()[0])


def follow(choice: Choice, pieces: Sequence[str], finish: str = "stop") -> list[str]:
    """What each token's text brings; the last one ends the answer."""
    told = []
    for number, piece in enumerate(pieces, 1):
        if choice.finish is None:
            told.append(feed(choice, piece, finish=finish if number == len(pieces) else None))
    return told


def test_stop_strings_cut_where_the_whole_text_would_be_cut() -> None:
    """2,000 random texts and stop strings over two letters, so that beginnings of stops abound.

    In tokens of 0 to 3 letters; those are charged whose text begins before the cut.
    """
    rng = random.Random(0)
    num_stopped = 0
    for _ in range(2000):
        sizes = (rng.randint(0, 3) for _ in range(rng.randint(1, 12)))
        pieces = ["".join(rng.choices("ab", k=size)) for size in sizes]
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 6))) for _ in range(rng.randint(0, 4))]
        choice = Choice(TOKENIZER, stops, [])
        said = "".join(follow(choice, pieces))
        begins = [len("".join(pieces[:i])) for i in range(len(pieces))]
        # The first token that completes a stop decides; of two at once, the one that begins first.
        texts = ["".join(pieces[: i + 1]) for i in range(len(pieces))]
        cuts = [[t.find(stop) for stop in stops if stop in t] for t in texts]
        cut = next((min(found) for found in cuts if found), None)
        assert said == texts[-1][:cut], (pieces, stops)
        charged = len(pieces) if cut is None else sum(begin < cut for begin in begins)
        assert choice.num_tokens == charged, (pieces, stops)
        num_stopped += cut is not None
        assert choice.finish == "stop"
    assert 500 < num_stopped < 1900


def test_nothing_of_a_stop_string_is_shown_early() -> None:
    choice = Choice(TOKENIZER, ["END", "N!"], [])
    assert follow(choice, "an EN. EN! more") == ["a", "n", " ", "", "", "EN.", " ", "", "", "E"]
    unfinished = Choice(TOKENIZER, ["END"], [])
    assert "".join(follow(unfinished, "an EN", "length")) == "an EN"
    assert (choice.finish, unfinished.finish) == ("stop", "length")


def test_tool_calls_are_deltas_of_their_own() -> None:
    """What was held back for a stop string comes before the call."""
    choice = Choice(TOKENIZER, ["END"], [])
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


def test_the_tools_tokens_are_charged_though_no_text_of_theirs_is_sent() -> None:
    """But not what comes of a stop string after them, split character included."""
    choice = Choice(TOKENIZER, ["éN"], [])
    hidden = (CHAT.python_start, *b"1+1", CHAT.python_end, CHAT.output_start, 50, CHAT.output_end)
    feed(choice, "é")
    for token in hidden:
        feed(choice, "", ("1+1", "2") if token == CHAT.python_end else None, token=token)
    assert choice.num_tokens == 1 + len(hidden)
    for text in ("", "é", "N"):
        feed(choice, text)
    assert (choice.finish, choice.num_tokens, choice.shown.text) == ("stop", 1 + len(hidden), "é")


def test_logprobs_come_with_their_text() -> None:
    """A token's entry waits with it: for a stop string, or for the rest of a character."""
    body: Any = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "stop": "END"}
    [request] = answer_to(ChatRequest, body)
    completion = Completion("m", ChatRequest.model_validate(body), TOKENIZER, [request])
    [choice], shown = completion.choices, []
    for token, char in zip("aEéEND".encode(), ("a", "E", "", *"éEND"), strict=True):
        pairs = [(token, -0.5), (66, -1.0), (67, float("-inf"))]
        choice.feed(Event(request, token, 1, char, None, pairs))
        deltas, entries = choice.take()
        logprobs = (completion.logprobs(entries) or {"content": []})["content"]
        text = "".join(delta["content"] for delta in deltas)
        shown.append((text, [entry["bytes"][0] for entry in logprobs]))
        for entry in logprobs:
            assert entry["logprob"] == -0.5
            likeliest = [(top["token"], top["logprob"]) for top in entry["top_logprobs"]]
            assert likeliest == [("B", -1.0), ("C", -9999.0)]
    assert shown == [
        ("a", [97]), ("", []), ("", []), ("Eé", [69, 195, 169]), ("", []), ("", []), ("", []),
    ]  # fmt: skip


# Plain text


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A random model, so that no two tokens are as likely."""
    return Engine(random_gpt(head_std=0.3), TOKENIZER, num_slots=4, deterministic=True)


LETTERS = {str(token): -100 for token in range(265) if token not in list(b"abcdefgh")}


def complete(engine: Engine, **fields: Any) -> tuple[dict[str, Any], list[list[Event]]]:
    """(whole answer, its choices' events); as a stream it must come to the same."""
    body = TextRequest.model_validate({"temperature": 0.0, "logit_bias": LETTERS} | fields)
    requests = engine_requests(body, engine, "base", ServerConfig())
    whole, streamed = (TextCompletion("m", body, TOKENIZER, requests) for _ in range(2))
    heard = {request: list[Event]() for request in requests}
    data = streamed.begin()
    for event in engine.stream(requests):
        heard[event.request].append(event)
        for completion in (whole, streamed):
            choice = completion.choices[requests.index(event.request)]
            if choice.finish is None:
                choice.feed(event)
        data += streamed.news()
    pieces = [json.loads(line[6:])["choices"][0] for line in data.decode().splitlines() if line]
    answer = whole.whole()
    for index, choice in enumerate(answer["choices"]):
        mine = [piece for piece in pieces if piece["index"] == index]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert [p["finish_reason"] for p in mine if p["finish_reason"]] == [choice["finish_reason"]]
        for name, values in (choice["logprobs"] or {}).items():
            assert values == [v for p in mine if p["logprobs"] for v in p["logprobs"][name]]
    shown = json.loads(json.dumps(answer), object_hook=without_null_logprobs)
    parsed = openai.types.Completion.model_validate(shown)
    assert parsed.object == "text_completion" and parsed.id.startswith("cmpl-")
    return answer, list(heard.values())


def without_null_logprobs(object: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's types know no null among logprobs, though its API gives the first as one."""
    for name, filler in (("token_logprobs", 0.0), ("top_logprobs", {})):
        if object.get(name):
            object[name] = [filler if value is None else value for value in object[name]]
    return object


SPLIT = [CHAT.bos, *b"caf", 0xC3, 0xA9, 0xE2, 0x82, *b"ab"]  # ends a character, then breaks one off


@pytest.mark.parametrize("ends", [True, False])
def test_an_echo_is_scored_as_harnesses_read_it(engine: Engine, ends: bool) -> None:
    """As lm-eval does: an entry for each id that it sent and one more, whatever that is."""
    bias = {str(CHAT.bos): 100 if ends else -100, str(CHAT.python_start): -100}
    answer, [events] = complete(
        engine, prompt=[SPLIT], max_tokens=1, logprobs=1, echo=True, logit_bias=bias
    )
    [choice], logprobs = answer["choices"], answer["choices"][0]["logprobs"]
    assert {len(values) for values in logprobs.values()} == {len(SPLIT) + 1}
    assert choice["finish_reason"] == ("stop" if ends else "length")
    assert (logprobs["token_logprobs"][-1] is None) == ends
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    scores = events[0].prompt
    assert scores
    for context in range(1, len(SPLIT)):
        expected = scores[context - 1 :]
        assert logprobs["token_logprobs"][context:-1] == [pairs[0][1] for pairs in expected]
        tops = logprobs["top_logprobs"][context:-1]
        own = logprobs["token_logprobs"][context:-1]
        greedy = [score == max(top.values()) for score, top in zip(own, tops, strict=True)]
        assert greedy == [pairs[0][0] == pairs[1][0] for pairs in expected]
        assert [len(top) for top in tops] == [2 - each for each in greedy]
    assert choice["text"].startswith("<|bos|>café\ufffdab")
    assert logprobs["tokens"][4:8] == ["bytes:\\xc3", "bytes:\\xa9", "bytes:\\xe2", "bytes:\\x82"]
    assert logprobs["text_offset"][:10] == [0, 7, 8, 9, 10, 10, 11, 11, 11, 13]
    assert answer["usage"]["prompt_tokens"] == len(SPLIT)
    assert answer["usage"]["completion_tokens"] == 1
    bare, _ = complete(engine, prompt=SPLIT[:7], max_tokens=1, logprobs=1, logit_bias=bias)
    assert len(bare["choices"][0]["logprobs"]["tokens"]) == 1
    echoed, _ = complete(engine, prompt=SPLIT[:8], max_tokens=0, echo=True)
    assert echoed["choices"][0]["text"] == "<|bos|>café\ufffd"


def test_an_echoed_text_has_no_bos_but_its_scores_do(engine: Engine) -> None:
    prompts = ["né <|bos|>", "b"]
    settings: dict[str, Any] = {"logprobs": 2, "echo": True, "max_tokens": 5, "n": 2}
    answer, events = complete(engine, prompt=prompts, **settings)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 1 + 11 + 1 + 1
    assert answer["usage"]["completion_tokens"] == 4 * 5
    for choice, heard in zip(answer["choices"], events, strict=True):
        prompt, logprobs = prompts[choice["index"] // 2], choice["logprobs"]
        said = prompt + "".join(event.text for event in heard)
        assert choice["text"] == said
        pairs = [*(heard[0].prompt or []), *(event.logprobs or [] for event in heard)]
        assert logprobs["token_logprobs"] == [each[0][1] for each in pairs]
        for top, each in zip(logprobs["top_logprobs"], pairs, strict=True):
            assert sorted(top.values()) == sorted(dict(each).values())
        for token, begin in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert token.startswith("bytes:") or said[begin : begin + len(token)] == token
    only, _ = complete(engine, prompt=prompts, **settings | {"max_tokens": 0, "n": 1})
    for choice, whole in zip(only["choices"], answer["choices"][::2], strict=True):
        assert choice["text"] == prompts[choice["index"]] and choice["finish_reason"] == "length"
        length = len(prompts[choice["index"]].encode())
        for name, values in choice["logprobs"].items():
            assert values == whole["logprobs"][name][:length]
    assert only["usage"]["completion_tokens"] == 0


def test_a_stop_string_is_looked_for_in_the_answer_alone(engine: Engine) -> None:
    answer, [events] = complete(engine, prompt="abc", max_tokens=8)
    text = answer["choices"][0]["text"]
    assert text == "".join(event.text for event in events) and len(text) > 3
    for echo, shown in ((False, ""), (True, "abc")):
        stopped, _ = complete(
            engine, prompt="abc", max_tokens=8, echo=echo, stop=["ab", text[1:3]], logprobs=0
        )
        [choice] = stopped["choices"]
        assert (choice["text"], choice["finish_reason"]) == (shown + text[0], "stop")
        assert stopped["usage"]["completion_tokens"] == 1
        assert len(choice["logprobs"]["tokens"]) == len(shown) + 1
        assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [1] * len(shown + "d")


def test_text_to_tokens_and_back() -> None:
    bos, text = TOKENIZER.bos_id, "né <|bos|>"
    ids = list(text.encode())
    chat = render_prompt(TOKENIZER, {"messages": HELLO})
    for body, expected in (
        ({"content": text}, ids),  # llama.cpp's
        ({"content": text, "add_special": True}, [bos, *ids]),
        ({"prompt": text}, [bos, *ids]),  # vLLM's
        ({"prompt": text, "add_special_tokens": False}, ids),
        ({"prompt": "", "model": "m", "unheard_of": 1}, [bos]),
        ({"content": ""}, []),
        ({"messages": HELLO}, chat),
    ):
        answer = answer_to(TokenizeRequest, body)
        assert answer == {"tokens": expected, "count": len(expected), "max_model_len": 64}
    answer = answer_to(TokenizeRequest, {"messages": HELLO}, kind="base")
    assert answer["tokens"] == [bos, *b"hello"]
    assert answer_to(TokenizeRequest, {"content": "é", "with_pieces": True})["tokens"] == [
        {"id": 0xC3, "piece": "bytes:\\xc3"}, {"id": 0xA9, "piece": "bytes:\\xa9"},
    ]  # fmt: skip
    for tokens, said in (([bos, *ids], "<|bos|>" + text), ([], ""), ([0xC3, 97], "\ufffda")):
        back = answer_to(DetokenizeRequest, {"tokens": tokens})
        assert back == {"prompt": said, "content": said}
