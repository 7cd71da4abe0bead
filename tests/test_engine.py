"""The engine: cached equals full, batched equals alone, prefixes are read once, tools, failures.

Oracles: the model's own full forward pass without a cache; a request run by itself; and a scripted
model whose next token is a table of its last one, so that a whole generation is known beforehand.
"""

import random
from collections.abc import Iterable, Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from nanochat.attention import choose_kernel
from nanochat.engine import (
    Engine,
    Event,
    Penalties,
    Reply,
    Request,
    StepFailed,
    StepGraphs,
    slots_that_fit,
)
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import Append, KVCache
from tests.models import TOKENIZER, busy_gpt, refuses
from tests.serving import CHAT, ScriptedModel

V = TOKENIZER.vocab_size


def tiny_gpt() -> GPT:
    """A random model with every addition on and a window (128) shorter than its context (512)."""
    sizes: Any = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
    return busy_gpt(GPTConfig(sequence_len=512, vocab_size=V, **sizes))


def scripted(said: list[int]) -> Engine:
    """An engine that answers [bos] with `said`, each token at most once, and ends its turn."""
    script = dict(zip([CHAT.bos, *said], said, strict=False))
    model = ScriptedModel(200, lambda _, newest: script.get(newest, CHAT.assistant_end))
    return Engine(cast(Any, model), TOKENIZER, num_slots=2, deterministic=True)


def collect(engine: Engine, requests: Iterable[Request]) -> list[tuple[list[int], list[int]]]:
    """(tokens, masks) of each request, in the order of the requests."""
    replies = dict(engine.complete(requests := list(requests)))
    assert len(replies) == len(requests)
    return [(replies[request].tokens, replies[request].masks) for request in requests]


def random_request(random_: random.Random, max_prompt: int = 60) -> Request:
    return Request(
        prompt=[CHAT.bos, *random_.choices(range(256), k=random_.randint(0, max_prompt))],
        max_tokens=random_.randint(1, 7),
        temperature=random_.choice([0.0, 0.8, 1.5]),
        top_k=random_.choice([0, 1, 5, 2 * V]),
        top_p=random_.choice([1.0, 0.8]),
        seed=random_.randrange(-5, 1 << 62),
        min_p=random_.choice([0.0, 0.0, 0.1]),
        repetition_penalty=random_.choice([1.0, 1.0, 1.4]),
        frequency_penalty=random_.choice([0.0, 0.0, 0.7]),
    )


def words(seed: int, num: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=num)


def drain(engine: Engine) -> list[Event]:
    """Every event until nothing is left to do."""
    events = []
    while engine.busy:
        events += engine.step()
    return events


def check_slots(engine: Engine) -> None:
    """No slot is lost, and every one holds in the cache what it says."""
    held = [*engine.slots.free, *engine.running]
    assert sorted(held, key=lambda slot: slot.index) == engine.slots.all
    assert [slot.index for slot in engine.slots.all] == list(range(engine.num_slots))
    for slot, length in zip(engine.slots.all, engine.slots.cache.lengths.tolist(), strict=True):
        assert len(slot.cached) == length


@torch.inference_mode()
def worst_logit(engine: Engine, model: GPT, request: Request) -> float:
    """The largest difference of the engine's logits to the full forward pass's, over its tokens."""
    engine.submit(request)
    ids, worst = list(request.prompt), 0.0
    finish = None
    while finish is None:
        for event in engine.step():
            if event.request is request:
                [row] = [i for i, slot in enumerate(engine.slots.rows) if slot.cached == ids]
                full = model(torch.tensor([ids]))[0, -1]
                worst = max(worst, float((engine.slots.logits[row] - full).abs().max()))
                ids.append(event.token)
                finish = event.finish
    return worst


@pytest.mark.parametrize("length", [1, 17, 140, 256, 257, 500])
def test_cached_equals_the_full_forward(length: int) -> None:
    """Prompts of one chunk and of two, shorter and longer than the attention window."""
    model = tiny_gpt()
    engine = Engine(model, TOKENIZER, num_slots=3)
    assert worst_logit(engine, model, Request(words(0, length), 9)) < 1e-4
    assert engine.slots.num_prefilled == length


def say(
    engine: Engine, one: Request, others: list[Request], random_: random.Random
) -> list[tuple[int, int, list[float]]]:
    """(token, mask, logits) of each step of `one`, while all requests come at random moments."""
    engine.reset()
    queue, ids, said, slot = [one, *others], list(one.prompt), [], engine.slots.all[0]
    random_.shuffle(queue)
    while queue or engine.busy:
        for _ in range(random_.randint(1, 8)):
            if queue:
                engine.submit(queue.pop())
        for event in engine.step():
            if event.request is one:
                # Its own slot, as a mate with the same prompt may hold the same tokens; at the last
                # token it is no longer running, and if that is the first, any such slot will do.
                mine = [slot for slot in engine.running if slot.request is one]
                same = [slot for slot in engine.slots.all if slot.cached == ids]
                slot = (mine or ([slot] if said else same))[0]
                said.append(
                    (
                        event.token,
                        event.mask,
                        engine.slots.logits[engine.slots.rows.index(slot)].tolist(),
                    )
                )
                ids.append(event.token)
    return said


@pytest.mark.parametrize("num_mixes", [20, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("deterministic", [True, False])
def test_batched_equals_alone(num_mixes: int, deterministic: bool) -> None:
    """To the bit or within rounding of the logits, whatever 15 mates do, whenever they come."""
    random_, tolerance = random.Random(1), 0 if deterministic else 1e-4
    options: Any = {"max_len": 80, "deterministic": deterministic}
    engine = Engine(tiny_gpt(), TOKENIZER, 16, **options)
    watched = [random_request(random_) for _ in range(6)]
    alone = [say(engine, request, [], random_) for request in watched]
    assert len({tuple(token for token, *_ in said) for said in alone}) > 2
    for mix in range(num_mixes):
        one = watched[mix % len(watched)]
        mates = [random_request(random_) for _ in range(15)]
        mates[0].prompt = one.prompt  # one reading for both
        tokens, masks, logits = zip(*say(engine, one, mates, random_), strict=True)
        expected = tuple(zip(*alone[mix % len(watched)], strict=True))
        assert (tokens, masks) == expected[:2]
        assert (torch.tensor(logits) - torch.tensor(expected[2])).abs().max() <= tolerance


@pytest.mark.parametrize("sizes", [range(1, 7), [1, 2, 4, 6], [6]])
def test_a_step_takes_no_more_slots_than_it_must(sizes: Sequence[int]) -> None:
    """And gives the logits of the full forward pass; as on a CPU, as on a GPU, deterministic."""
    model = tiny_gpt()
    engine, all_sizes = Engine(model, TOKENIZER, num_slots=6), set[int]()
    engine.slots.sizes = sizes
    for i, max_tokens in enumerate([2, 5, 7, 3, 4, 6, 9, 11]):
        engine.submit(Request(words(i, 20 + i), max_tokens))
    while engine.busy:
        ready = engine.step()
        assert len(engine.slots.rows) == min(size for size in sizes if size >= len(ready))
        all_sizes.add(len(engine.slots.rows))
        for slot in engine.running:
            logits = engine.slots.logits[engine.slots.rows.index(slot)]
            with torch.inference_mode():
                full = model(torch.tensor([slot.cached]))[0, -1]
            assert (logits - full).abs().max() < 1e-4
    assert all_sizes == set(sizes)


@pytest.mark.parametrize("deterministic", [False, True])
def test_poison_in_free_slots_changes_nothing(deterministic: bool) -> None:
    """Nor does what it leaves in a slot that is used next."""
    engine = Engine(tiny_gpt(), TOKENIZER, num_slots=3, deterministic=deterministic)
    requests = [Request([CHAT.bos, i, 2, 3], 10, seed=i) for i in range(5)]
    clean = collect(engine, requests)
    assert clean == [collect(engine, [request])[0] for request in requests]
    for request, expected in zip(requests, clean, strict=True):
        cache = engine.slots.cache
        for buffer in (cache.keys, cache.values, cache.previous):
            buffer.fill_(torch.nan)
        engine.slots.logits = torch.full((3, V), torch.nan)
        assert collect(engine, [request]) == [expected]


def test_what_ends_a_reply() -> None:
    engine = scripted([10, 11, 12])
    ends = {
        Request([CHAT.bos], 9): ([10, 11, 12, CHAT.assistant_end], "stop"),
        Request([CHAT.bos], 2): ([10, 11], "length"),
        Request([10], 1): ([11], "length"),
    }
    events = list(engine.stream(ends))
    for request, (tokens, finish) in ends.items():
        own = [event for event in events if event.request is request]
        assert [event.token for event in own] == tokens
        assert [event.finish for event in own] == [None] * (len(own) - 1) + [finish]
    engine = scripted([10, CHAT.bos])
    assert collect(engine, [Request([CHAT.user_end, 9, CHAT.bos], 9)])[0][0] == [10, CHAT.bos]


def test_what_cannot_fit_is_refused_before_any_work() -> None:
    engine = scripted([10])
    for request in (Request([CHAT.bos] * 191, 10), Request([], 10), Request([CHAT.bos], 0)):
        refuses("prompt", list, engine.stream([Request([CHAT.bos], 5), request]))
    assert engine.slots.num_prefilled == 0 and not engine.busy
    [(tokens, _)] = collect(engine, [Request([CHAT.bos] * 190, 10)])
    assert tokens == [10, CHAT.assistant_end]


def test_an_abandoned_run_leaves_the_engine_usable() -> None:
    engine = scripted([10, 11])
    stream = engine.stream([Request([CHAT.bos], 5)])
    next(stream)
    with pytest.raises(AssertionError):
        next(engine.stream([Request([CHAT.bos], 5)]))
    stream.close()
    assert collect(engine, [Request([CHAT.bos], 5)])[0][0] == [10, 11, CHAT.assistant_end]


def reply_to(said: Iterable[int], max_tokens: int = 50) -> tuple[list[Event], Reply]:
    """The events of a scripted answer, and the reply that they make."""
    events = list(scripted(list(said)).stream([Request([CHAT.bos], max_tokens)]))
    reply = Reply()
    for event in events:
        reply.add(event)
    return events, reply


CALL = [CHAT.python_start, *b"34*2", CHAT.python_end]
RESULT = [CHAT.output_start, *b"68", CHAT.output_end]
NO_CALL = [CHAT.python_start, *b"8/0", CHAT.python_end]
ODD_CALL = [CHAT.python_start, 0xED, 0xA0, 0x80, CHAT.python_end]
MADE_UP = [CHAT.python_start, *b"1", CHAT.output_start, *b"2", CHAT.output_end, 65]
END = CHAT.assistant_end
A = ("text", "A")
USED = [("python", "34*2"), ("python_output", "68")]
TOOLS = {
    "answered": ([65, *CALL], 50, [65, *CALL, *RESULT, END], 4, [A, *USED]),
    "cut in the result": ([65, *CALL], 9, [65, *CALL, *RESULT[:2]], 2, [A, *USED]),
    "cut in the call": (CALL, 4, CALL[:4], 0, [("python", "34*")]),
    "half a surrogate pair": (ODD_CALL, 5, ODD_CALL[:5], 0, [("python", "\ufffd" * 3)]),
    "no value": (NO_CALL, 50, [*NO_CALL, END], 0, [("python", "8/0")]),
    "never opened": ([CHAT.python_end, 65], 50, [CHAT.python_end, 65, END], 0, [A]),
    "made-up result": (MADE_UP, 7, [*MADE_UP, END], 0, [("python", "1"), A]),
}


@pytest.mark.parametrize("case", TOOLS)
def test_tool_calls(case: str) -> None:
    """What the tool says is forced and counted, and neither it nor the call is text."""
    said, max_tokens, expected, num_forced, parts = TOOLS[case]
    events, reply = reply_to(said, max_tokens)
    assert reply.tokens == expected
    assert reply.parts == [{"type": kind, "text": text} for kind, text in parts]
    assert [event.token for event in events if event.mask == 0] == RESULT[:num_forced]
    assert reply.text == "".join(event.text for event in events) == "A" * (65 in expected)
    texts = [text for kind, text in parts if kind != "text"]
    tools = [event.tool for event in events if event.tool]
    assert tools == ([] if not texts else [(texts[0], "68" if len(texts) == 2 else None)])


def test_text_comes_in_whole_characters() -> None:
    text = "naïf 日🙂"  # no byte of it twice, as a script needs it
    events, reply = reply_to(text.encode())
    assert reply.text == text and [event.text for event in events if event.text] == list(text)
    events, reply = reply_to("é🙂".encode()[:-1])
    assert reply.text == "é\ufffd" and events[-1].finish == "stop"
    assert reply_to("é🙂".encode(), 4)[1].text == "é\ufffd"


def test_a_next_turn_does_not_read_its_history_again() -> None:
    """Two conversations in turn, longer than the window; a turn reads what is new, and a token."""
    model = tiny_gpt()
    engine = Engine(model, TOKENIZER, num_slots=2)
    histories = [[CHAT.bos, *words(seed, 150)] for seed in range(2)]
    for turn in range(4):
        for history in histories:
            before = engine.slots.num_prefilled
            request = Request(history.copy(), 12, temperature=0.9, seed=turn)
            assert worst_logit(engine, model, request) < 1e-4
            held = next(s.cached for s in engine.slots.all if s.cached[: len(history)] == history)
            fresh = len(history) if turn == 0 else 1 + 20
            assert engine.slots.num_prefilled - before == fresh
            # 7 instead of the last token, which is not fed.
            history[:] = [*held, 7, *words(turn, 20)]
    check_slots(engine)


def test_where_a_shared_beginning_comes_from() -> None:
    """From a slot in use or a free one that keeps its own; not from a few tokens in common."""
    model = tiny_gpt()
    engine = Engine(model, TOKENIZER, num_slots=4)
    system = words(1, 100)
    long = Request([*system, *words(2, 200)], 30)
    engine.submit(long)
    for _ in range(5):
        engine.step()
    assert worst_logit(engine, model, Request([*system, 1, 2, 3], 5)) < 1e-4  # of the running slot
    assert engine.slots.num_prefilled == 300 + 3
    drain(engine)
    [kept] = [slot for slot in engine.slots.all if slot.cached[:300] == long.prompt]
    held = list(kept.cached)
    # A copy: too little is shared to overwrite it.
    assert worst_logit(engine, model, Request([*system, 9], 5)) < 1e-4
    assert kept in engine.slots.all and kept.cached == held
    assert engine.slots.num_prefilled == 304
    assert worst_logit(engine, model, Request([*system[:10], 9], 5)) < 1e-4  # read anew
    assert engine.slots.num_prefilled == 304 + 11
    # The other three were unused for longer.
    assert kept in engine.slots.all and kept.cached == held
    assert worst_logit(engine, model, Request(held[:290], 5)) < 1e-4  # regenerated where it is
    assert engine.slots.num_prefilled == 315 + 1
    assert engine.slots.all[kept.index].cached[:290] == held[:290]
    check_slots(engine)


@pytest.mark.parametrize("kernel", ["dense", "flash"])
def test_a_shared_beginning_is_read_once(kernel: Any, slow_flash: None) -> None:
    """Also for requests that come while it is being read."""
    model, system = tiny_gpt(), words(1, 300)
    model.kernel = kernel
    engine = Engine(model, TOKENIZER, num_slots=4)
    requests = [Request([*system, i, *words(i, 9)], 5) for i in range(6)]
    engine.submit(requests[0])
    if kernel == "dense":
        assert engine.step() == []  # one chunk of two
    for request in requests[1:]:
        engine.submit(request)
    drain(engine)
    assert engine.slots.num_prefilled == 300 + 6 * 10


def test_copies_of_a_prompt_are_exact_and_without_reuse_nothing_else_is_copied() -> None:
    engine = Engine(tiny_gpt(), TOKENIZER, num_slots=3, deterministic=True)
    prompt = words(3, 200)
    engine.submit(Request(prompt, 20))
    engine.step()
    first = engine.slots.logits[0].clone()
    engine.step()
    engine.submit(Request(list(prompt), 4))
    engine.step()
    assert torch.equal(engine.slots.logits[1], first) and engine.slots.num_prefilled == 200
    drain(engine)
    engine.submit(Request(prompt[:150], 4))
    engine.submit(Request(prompt, 4))
    drain(engine)
    assert engine.slots.num_prefilled == 350
    check_slots(engine)
    collect(engine, [Request(prompt, 4) for _ in range(8)])  # anew: the weights may have changed
    assert engine.slots.num_prefilled == 550


def test_requests_may_come_and_go_between_steps() -> None:
    """Cancelled while its prompt is read, while it decodes, or in the queue, none keeps a slot."""
    engine = Engine(tiny_gpt(), TOKENIZER, num_slots=1)
    reading, decoding, queued, last = (Request(words(i, 400), 50) for i in range(4))
    for request in (reading, decoding, queued, last):
        engine.submit(request)
    assert engine.step() == [] and (len(engine.running), len(engine.waiting)) == (1, 3)
    engine.cancel(reading)
    assert len(engine.running) == 0
    assert engine.step() == [] and len(engine.running) == 1  # the first of two chunks
    assert [event.request for _ in range(3) for event in engine.step()] == [decoding] * 3
    engine.cancel(queued)
    engine.cancel(decoding)
    assert (len(engine.running), len(engine.waiting)) == (0, 1)
    engine.step()
    assert [event.request for event in engine.step()] == [last]
    assert {event.request for event in drain(engine)} == {last}
    engine.cancel(last)  # too late, and harmless
    check_slots(engine)


def test_a_prompt_that_is_running_already_is_sampled_as_asked() -> None:
    """It is copied, not prefilled, amid steps that laid out their sampling without it."""
    engine = Engine(tiny_gpt(), TOKENIZER, num_slots=2)
    greedy = Request([CHAT.bos, 1], 9, temperature=0)
    wild = Request([CHAT.bos, 1], 5, temperature=1.5, seed=3)
    [(alone, _)] = collect(engine, [wild])
    engine.submit(greedy)
    engine.step()
    engine.submit(wild)
    assert [event.token for event in drain(engine) if event.request is wild] == alone


def test_a_long_prompt_delays_nobody_by_more_than_a_chunk() -> None:
    engine = Engine(tiny_gpt(), TOKENIZER, num_slots=3)
    talking, long, short = Request([1], 9), Request([2] * 500, 3), Request([3], 3)
    engine.submit(talking)
    engine.step()
    engine.submit(long)
    engine.submit(short)
    seen = [[event.request for event in engine.step()] for _ in range(3)]
    assert seen == [[talking], [talking, long], [talking, long, short]]
    assert engine.slots.num_prefilled == 502


def test_logprobs_are_those_of_the_full_forward() -> None:
    model = tiny_gpt()
    engine = Engine(model, TOKENIZER, num_slots=3)
    asked = Request(words(9, 30), 6, temperature=1.5, top_k=9, logprobs=4)
    one = Request(words(9, 30), 6, temperature=1.5, top_k=9, logprobs=0)
    silent = Request(words(6, 30), 6)
    for request in (asked, one, silent):
        engine.submit(request)
    events = drain(engine)
    ids = list(asked.prompt)
    for event in events:
        if event.request is asked:
            with torch.inference_mode():
                full = model(torch.tensor([ids]))[0, -1].log_softmax(0)
            ids.append(event.token)
            assert event.logprobs and event.logprobs[0][0] == event.token
            likeliest = full.topk(4)
            assert [id for id, _ in event.logprobs[1:]] == likeliest.indices.tolist()
            for id, logprob in event.logprobs:
                assert logprob == pytest.approx(float(full[id]), abs=1e-4)
    told = {r: [e.logprobs for e in events if e.request is r] for r in (asked, one, silent)}
    for four, pairs in zip(told[asked], told[one], strict=True):
        assert four and pairs and len(four) == 5 and len(pairs) == 1
        for (expected, likely), (id, logprob) in zip(four[:1], pairs, strict=True):
            # In another row of the batch some processors round otherwise.
            assert id == expected and logprob == pytest.approx(likely, abs=1e-5)
    assert set(map(str, told[silent])) == {"None"}


@pytest.mark.parametrize("kernel", ["dense", "flash"])
@pytest.mark.parametrize("length", [1, 2, 255, 257, 500])
def test_a_scored_prompt(length: int, kernel: Any, slow_flash: None) -> None:
    """Its logprobs are the full forward's, even if slots hold it, in chunks, with mates."""
    model = tiny_gpt()
    model.kernel = kernel
    engine, ids = Engine(model, TOKENIZER, num_slots=4), words(9, length)
    model.kernel = "dense"
    with torch.inference_mode():
        full = model(torch.tensor([ids]))[0].log_softmax(1)
    asked = Request(ids, 2, temperature=0.0, prompt_logprobs=3)
    only = Request(ids, 0, prompt_logprobs=0)
    for request in (Request(ids, 3), asked, only, Request(words(5, 90), 3)):
        engine.submit(request)
    events = drain(engine)
    [first, *rest] = [event for event in events if event.request is asked]
    assert first.prompt is not None and len(first.prompt) == length - 1
    assert first.token == int(full[-1].argmax())
    assert all(event.prompt is None for event in rest)
    for place, (own, *likeliest) in enumerate(first.prompt):
        assert own[0] == ids[place + 1]
        assert [id for id, _ in likeliest] == full[place].topk(3).indices.tolist()
        for id, logprob in (own, *likeliest):
            assert logprob == pytest.approx(float(full[place, id]), abs=1e-4)
    [event] = [event for event in events if event.request is only]
    assert (event.token, event.mask, event.text, event.finish) == (-1, 0, "", "length")
    assert event.prompt == [pairs[:1] for pairs in first.prompt]
    check_slots(engine)


def test_penalties() -> None:
    """Against the definitions, id by id; special ones in the prompt do not count."""
    said, bias = [4, 9, 4, 4], {9: -100.0, 20: 1.5}
    row = 2 * torch.randn(V, generator=torch.Generator().manual_seed(0))
    asked = Request(
        [3, 3, 9, CHAT.bos], 5, repetition_penalty=1.3, presence_penalty=0.25,
        frequency_penalty=0.5, logit_bias=bias,
    )  # fmt: skip
    assert asked.is_penalised and not Request([3], 5).is_penalised
    penalties = Penalties(asked, CHAT.bos, V, "cpu")
    for token in said:
        penalties.count(token)
    for id, (before, after) in enumerate(zip(row.tolist(), penalties.apply(row), strict=True)):
        expected = before
        if id in {3, 4, 9}:
            expected = before / 1.3 if before > 0 else before * 1.3
        expected -= 0.5 * said.count(id) + 0.25 * (id in said) - bias.get(id, 0)
        assert float(after) == pytest.approx(expected, abs=1e-5)
    assert torch.equal(Penalties(Request([3], 5), CHAT.bos, V, "cpu").apply(row), row)


def test_penalties_look_at_prompt_and_reply() -> None:
    """Greedy, against the full forward pass and the penalties' own definition."""
    model, ids = tiny_gpt(), words(4, 40)
    asked = Request(
        ids.copy(), 12, 0.0, repetition_penalty=1.5, presence_penalty=0.5,
        frequency_penalty=1.0, logit_bias={77: 2.0, CHAT.assistant_end: -100, CHAT.bos: -100},
    )  # fmt: skip
    [(said, _)] = collect(Engine(model, TOKENIZER, num_slots=2), [asked])
    penalties = Penalties(asked, CHAT.bos, V, "cpu")
    for token in said:
        with torch.inference_mode():
            row = penalties.apply(model(torch.tensor([ids]))[0, -1])
        assert float(row.max() - row[token]) < 1e-4
        ids.append(token)
        if token < CHAT.bos:
            penalties.count(token)
    [(plain, _)] = collect(Engine(model, TOKENIZER, 2), [Request(asked.prompt, 12, 0.0)])
    assert plain != said


def test_a_failing_step_costs_only_those_in_it() -> None:
    """A prompt that cannot be read costs its request; a failed decode, those that were running."""
    model = tiny_gpt()
    engine = Engine(model, TOKENIZER, num_slots=2)
    forward, broken = model.forward, set[int]()

    def fragile(ids: torch.Tensor, **more: Any) -> torch.Tensor:
        if ids.shape[1] in broken:
            raise RuntimeError("out of memory")
        return forward(ids, **more)

    model.forward = cast(Any, fragile)
    first, second, third = (Request(words(i, 20 * i), 8) for i in (1, 2, 3))
    alone = {request: collect(engine, [request])[0][0] for request in (first, second)}
    engine.reset()
    for request in (first, second, third):
        engine.submit(request)
    broken.add(48)  # the second prompt, padded
    with pytest.raises(StepFailed) as lost:
        engine.step()
    assert lost.value.requests == [second]
    assert (len(engine.running), len(engine.waiting)) == (1, 1)
    assert str(lost.value.__cause__) == "out of memory"
    events = engine.step()
    assert [event.request for event in events] == [first, third]
    engine.submit(second)
    broken.add(1)
    with pytest.raises(StepFailed) as lost:
        engine.step()
    assert lost.value.requests == [first, third] and len(engine.waiting) == 1
    broken.clear()
    assert [event.token for event in drain(engine)] == alone[second]
    check_slots(engine)
    broken.add(1)
    with pytest.raises(StepFailed):
        collect(engine, [first, second])
    assert not engine.busy
    broken.clear()
    assert collect(engine, [first])[0][0] == alone[first]


@pytest.mark.parametrize("counted", [False, True])
def test_ctrl_c_within_a_step_does_not_spoil_the_next_turn(counted: bool) -> None:
    """Before and after the cache has counted the token that was on its way."""
    model = tiny_gpt()
    engine = Engine(model, TOKENIZER, num_slots=1)
    forward, prompt, said = model.forward, words(1, 200), list[int]()

    def stopped(ids: torch.Tensor, **more: Any) -> torch.Tensor:
        logits = forward(ids, **more) if counted or len(said) < 5 else None
        if len(said) == 5 or logits is None:
            raise KeyboardInterrupt
        return logits

    model.forward = cast(Any, stopped)
    with pytest.raises(KeyboardInterrupt):
        for event in engine.stream([Request(prompt, 50)]):
            said.append(event.token)
    model.forward = forward
    before = engine.slots.num_prefilled
    assert worst_logit(engine, model, Request([*prompt, *said, 5, 6], 9)) < 1e-4
    assert engine.slots.num_prefilled - before == 3  # the newest token was not held yet


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("chunk", [64, 2048])
def test_packed_prompts_are_answered_as_one_by_one(
    chunk: int, deterministic: bool, slow_flash: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU with flash: prompts of all lengths in one chunk, the last one often cut."""
    monkeypatch.setattr("nanochat.engine.PACKED_CHUNK", chunk)
    model, random_ = tiny_gpt(), random.Random(5)
    requests = [random_request(random_, 150) for _ in range(24)]
    for request in requests:
        request.temperature = 0.0
    for request in requests[9:12]:
        request.prompt = requests[8].prompt
    expected = collect(Engine(model, TOKENIZER, 6, deterministic=True), requests)
    model.kernel = "flash"
    engine = Engine(model, TOKENIZER, 6, deterministic=deterministic)
    assert engine.slots.cache.flashes and collect(engine, requests) == expected
    read = sum(len(request.prompt) for request in requests)
    copied = 3 * len(requests[8].prompt)
    assert engine.slots.num_prefilled <= read - copied
    check_slots(engine)


@pytest.mark.parametrize("deterministic", [False, True])
def test_no_slot_leaks(deterministic: bool) -> None:
    """Arrivals, departures and ends at random; what ends has said all it had to."""
    random_ = random.Random(7)
    engine = Engine(tiny_gpt(), TOKENIZER, 4, max_len=120, deterministic=deterministic)
    open_: dict[Request, int] = {}
    prompts = [random_request(random_).prompt for _ in range(5)]
    num_ended = 0
    for _ in range(200):
        if random_.random() < 0.5:
            request = random_request(random_)
            request.prompt = random_.choice(prompts) + request.prompt[:20]
            open_[request] = 0
            engine.submit(request)
        if open_ and random_.random() < 0.2:
            request = random_.choice(list(open_))
            engine.cancel(request)
            del open_[request]
        for event in engine.step():
            open_[event.request] += 1
            if event.finish:
                assert event.finish == "stop" or open_[event.request] == event.request.max_tokens
                del open_[event.request]
                num_ended += 1
        assert len(open_) == len(engine.running) + len(engine.waiting)
        check_slots(engine)
    assert num_ended > 30
    drain(engine)
    assert len(engine.slots.free) == 4


def test_slots_are_refused_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt()
    each = model.make_cache(1, 512).num_bytes
    monkeypatch.setattr("nanochat.engine.free_memory", lambda device: 10 * each)
    assert slots_that_fit(model) == 8 and slots_that_fit(model, 255) == 16
    Engine(model, TOKENIZER, num_slots=8)
    refuses("9 slots are more than the 8 .* --slots", Engine, model, TOKENIZER, num_slots=9)


def rehearse(
    graphs: StepGraphs, ids: torch.Tensor, num_keys: int, packed: bool = False
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """StepGraphs._record on a CPU: a replay knows what is in the static buffers, and no more."""
    (rows, time), cache = ids.shape, graphs.cache
    size = cache.num_slots if packed else rows
    logits = torch.zeros(size, V)
    plan = list(range(size)), [0] * size, [1] * size, list(range(size))

    def replay() -> None:
        step = Append(cache, cache.layout[:, :size], (rows, time), packed, *plan)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache, "begin", lambda *_: step)
            patch.setattr(cache, "finish", lambda _: None)
            patch.setattr(cache, "recorded_keys", num_keys)
            logits.copy_(graphs.model(ids, cache=cache, packed=packed, last_only=True)[:, 0])

    return ids, SimpleNamespace(replay=replay), logits


@pytest.mark.parametrize("kernel", ["dense", "flash"])
def test_recorded_steps_of_a_few_sizes_serve_all(
    kernel: Any, slow_flash: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, random_ = tiny_gpt(), random.Random(3)
    requests = [random_request(random_, 200) for _ in range(20)]
    expected = collect(Engine(model, TOKENIZER, num_slots=5), requests)
    model.kernel = kernel
    monkeypatch.setattr(KVCache, "in_blocks", True)
    monkeypatch.setattr(StepGraphs, "_record", rehearse)
    monkeypatch.setattr("nanochat.kv_cache.GPU_DECODE_BLOCK", 64)
    engine = Engine(model, TOKENIZER, num_slots=5)
    pool, pool.sizes = engine.slots, [1, 2, 4, 5]
    pool.graphs = StepGraphs(model, pool.cache, pool.sizes, pool.chunk)
    assert collect(engine, requests) == expected
    lengths = [512] if kernel == "flash" else [64, 128, 256, 512]
    assert pool.graphs.decoding.keys() == set(product(pool.sizes, lengths))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_equals_an_eager_one(dtype: torch.dtype) -> None:
    """As lengths grow, as requests come and go, and after the weights have changed in place."""
    model = tiny_gpt().cuda()
    model.compute_dtype = dtype
    capability, head_dim = torch.cuda.get_device_capability(), model.config.head_dim
    model.kernel = choose_kernel("cuda", capability, dtype, head_dim)
    random_ = random.Random(0)
    for _ in range(2):
        requests = [random_request(random_, 200) for _ in range(20)]
        captured = Engine(model, TOKENIZER, num_slots=4)
        eager = Engine(model, TOKENIZER, num_slots=4)
        assert captured.slots.graphs
        eager.slots.graphs = None
        assert collect(captured, requests) == collect(eager, requests)
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        captured.reset()
        eager.reset()
        assert collect(captured, requests) == collect(eager, requests)
