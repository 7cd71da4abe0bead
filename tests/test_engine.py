"""The engine: cached equals full, batched equals alone, prefixes read once, tools, limits, cancelling, failures.

Oracles: the model's own full forward pass without a cache; a request run by itself; and a scripted model
whose next token is a table of its last one, so that a whole generation is known beforehand.
"""

import random
from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from torch import nn

from nanochat.common import UserError
from nanochat.engine import (
    Engine,
    Event,
    ReplyReader,
    Request,
    StepFailed,
    reply_parts,
    slots_that_fit,
)
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import KVCache
from nanochat.sampling import derive_seed
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, chat_tokens

TOKENIZER = Tokenizer([bytes([byte]) for byte in range(256)], SPECIAL_TOKENS, SPLIT_PATTERN)
CHAT = chat_tokens(TOKENIZER)
V = TOKENIZER.vocab_size


def tiny_gpt(seed: int = 0) -> GPT:
    """A random model with every addition on and a window (128) shorter than its context (512)."""
    config = GPTConfig(sequence_len=512, vocab_size=V, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
    model = GPT(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


class ScriptedModel(nn.Module):
    """Says after token t the token script[t], for certain; else end of turn. Counts its prefills."""

    def __init__(self, script: dict[int, int]) -> None:
        super().__init__()
        self.config = GPTConfig(
            sequence_len=200, vocab_size=V, n_layer=1, n_head=1, n_kv_head=1, n_embd=2, smear=False
        )
        self.compute_dtype = torch.float32
        self.one = nn.Parameter(torch.ones(1))
        self.script = script
        self.num_prefills = 0

    def make_cache(self, num_slots: int, max_len: int, device: str = "cpu") -> KVCache:
        return KVCache(1, num_slots, 1, max_len, 2, 2, device, torch.float32)

    def forward(
        self,
        ids: torch.Tensor,
        *,
        cache: KVCache,
        slots: torch.Tensor | None,
        num_new: torch.Tensor,
        last_only: bool,
    ) -> torch.Tensor:
        assert last_only
        self.num_prefills += ids.shape[1] > 1
        step = cache.begin(len(ids), ids.shape[1], slots, num_new)
        cache.finish(step)
        last = ids[torch.arange(len(ids)), step.last].tolist()
        logits = torch.zeros(len(ids), 1, V)
        for row, token in enumerate(last):
            logits[row, 0, self.script.get(token, CHAT.assistant_end)] = 50
        return logits


def scripted(said: list[int], num_slots: int = 2) -> tuple[Engine, ScriptedModel]:
    """An engine that answers the prompt [bos] with `said` (each token at most once) and ends its turn."""
    model = ScriptedModel(dict(zip([CHAT.bos, *said], said, strict=False)))
    return Engine(cast(Any, model), TOKENIZER, num_slots, prefix_reuse=False), model


def collect(engine: Engine, requests: Iterable[Request]) -> list[tuple[list[int], list[int]]]:
    """(tokens, masks) of each request, in the order of the requests."""
    requests = list(requests)
    said = {request: (tokens, masks) for request, tokens, masks in engine.complete(requests)}
    assert len(said) == len(requests)
    return [said[request] for request in requests]


def random_request(random_: random.Random, max_prompt: int = 60) -> Request:
    return Request(
        prompt=[CHAT.bos, *random_.choices(range(256), k=random_.randint(0, max_prompt))],
        max_tokens=random_.randint(1, 7),
        temperature=random_.choice([0.0, 0.8, 1.5]),
        top_k=random_.choice([0, 1, 5, 2 * V]),
        top_p=random_.choice([1.0, 0.8]),
        seed=random_.randrange(-5, 1 << 62),
    )


@torch.inference_mode()
def full_forward_greedy(model: GPT, prompt: list[int], num: int) -> list[int]:
    """Greedy continuation that reads everything anew for every token."""
    ids = list(prompt)
    for _ in range(num):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [1, 17, 140, 300])
def test_greedy_equals_the_full_forward(length: int) -> None:
    """Prompts of one and of two pieces, shorter and longer than the attention window."""
    model = tiny_gpt()
    prompt = [CHAT.bos, *random.Random(length).choices(range(256), k=length - 1)]
    engine = Engine(model, TOKENIZER, num_slots=3)
    [(tokens, masks)] = collect(engine, [Request(prompt, 10, temperature=0)])
    expected = full_forward_greedy(model, prompt, 10)
    assert tokens == expected[: len(tokens)] and set(masks) == {1}
    assert len(tokens) == 10 or tokens[-1] in (CHAT.assistant_end, CHAT.bos)


def check_mixes(num_mixes: int) -> None:
    """Whatever 15 mates do, and whenever they come, a request says what it says alone."""
    random_ = random.Random(1)
    engine = Engine(tiny_gpt(), TOKENIZER, num_slots=16, max_len=80, prefix_reuse=False)
    watched = [random_request(random_) for _ in range(6)]
    alone = [collect(engine, [request])[0] for request in watched]
    assert len({tuple(tokens) for tokens, _ in alone}) > 2
    for mix in range(num_mixes):
        one = watched[mix % len(watched)]
        mates = [random_request(random_) for _ in range(15)]
        mates[0].prompt = one.prompt  # one reading for both
        queue: list[Request] = [one, *mates]
        random_.shuffle(queue)
        engine.reset()
        events: list[Event] = []
        while queue or engine.busy:
            for _ in range(random_.randint(1, 8)):
                if queue:
                    engine.submit(queue.pop())
            events += engine.step()
        said = [(event.token, event.mask) for event in events if event.request is one]
        assert said == list(zip(*alone[mix % len(watched)], strict=True))


def test_batched_equals_alone() -> None:
    check_mixes(60)


@pytest.mark.slow
def test_batched_equals_alone_in_a_thousand_mixes() -> None:
    check_mixes(1000)


def test_logits_do_not_see_batch_mates() -> None:
    """To the bit: the logits of a slot, alone and among mates that come, go and differ in length."""
    engine = Engine(tiny_gpt(), TOKENIZER, num_slots=4, prefix_reuse=False)
    prompt = [CHAT.bos, *range(30)]
    random_ = random.Random(2)

    def trace(mates: list[Request]) -> list[torch.Tensor]:
        request = Request(prompt, 8, temperature=0)
        seen = []
        for said, _, _ in engine.run([request, *mates]):
            if said is request:
                seen.append(engine.logits[0].clone())
        return seen

    alone = trace([])
    for _ in range(3):
        mixed = trace([random_request(random_, 200) for _ in range(9)])
        assert all(torch.equal(a, b) for a, b in zip(alone, mixed, strict=True))


@pytest.mark.parametrize("prefix_reuse", [False, True])
def test_poison_in_free_slots_changes_nothing(prefix_reuse: bool) -> None:
    """Nor does what it leaves in a slot that is used next."""
    engine = Engine(tiny_gpt(), TOKENIZER, num_slots=3, prefix_reuse=prefix_reuse)
    requests = [Request([CHAT.bos, i, 2, 3], 10, seed=i) for i in range(5)]
    clean = collect(engine, requests)
    assert clean == [collect(engine, [request])[0] for request in requests]
    for request, expected in zip(requests, clean, strict=True):
        for buffer in (engine.cache.keys, engine.cache.values, engine.cache.previous):
            buffer.fill_(torch.nan)
        engine.logits = torch.full((3, V), torch.nan)
        assert collect(engine, [request]) == [expected]


def test_samples_of_one_prompt_differ_from_the_first_token_on() -> None:
    engine = Engine(tiny_gpt(), TOKENIZER, num_slots=16)
    first, masks = next(
        iter(engine.generate([CHAT.bos], num_samples=64, max_tokens=4, temperature=1))
    )
    assert len(first) == 64 and len(set(first)) > 8 and set(masks) == {1}


def test_same_prompts_in_a_row_are_read_once() -> None:
    engine, model = scripted([10, 11], num_slots=3)
    assert len(collect(engine, [Request([CHAT.bos], 5) for _ in range(8)])) == 8
    assert model.num_prefills == 1
    collect(engine, [Request([CHAT.bos], 5)])  # the weights may have changed
    assert model.num_prefills == 2


def test_stop_tokens() -> None:
    engine, _ = scripted([10, 11, 12])
    requests = [
        Request([CHAT.bos], 9),
        Request([CHAT.bos], 9, stop={11}),
        Request([CHAT.bos], 2),
        Request([10], 1),
    ]
    said = [tokens for tokens, _ in collect(engine, requests)]
    assert said == [[10, 11, 12, CHAT.assistant_end], [10, 11], [10, 11], [11]]
    engine, _ = scripted([10, CHAT.bos])
    assert collect(engine, [Request([CHAT.user_end, 9, CHAT.bos], 9)])[0][0] == [10, CHAT.bos]


def test_tool_answer_is_forced_and_counted() -> None:
    call = [CHAT.python_start, *b"34*2", CHAT.python_end]
    answer = [CHAT.output_start, *b"68", CHAT.output_end]
    engine, _ = scripted([65, *call])
    expected = [65, *call, *answer, CHAT.assistant_end]
    masks = [1] * 7 + [0] * 4 + [1]
    assert collect(engine, [Request([CHAT.bos], 50)]) == [(expected, masks)]
    assert collect(engine, [Request([CHAT.bos], 9)]) == [(expected[:9], masks[:9])]


def test_no_answer_of_the_tool_forces_nothing() -> None:
    said = [CHAT.python_start, *b"8/0", CHAT.python_end]
    engine, _ = scripted(said)
    assert collect(engine, [Request([CHAT.bos], 50)]) == [([*said, CHAT.assistant_end], [1] * 6)]
    engine, _ = scripted([CHAT.python_end, 7])  # a call that was never opened
    assert collect(engine, [Request([CHAT.bos], 50)])[0][0] == [
        CHAT.python_end,
        7,
        CHAT.assistant_end,
    ]


def test_what_cannot_fit_is_refused_before_any_work() -> None:
    engine, model = scripted([10])
    for request in (Request([CHAT.bos] * 191, 10), Request([], 10), Request([CHAT.bos], 0)):
        with pytest.raises(UserError):
            engine.run([Request([CHAT.bos], 5), request])
    assert model.num_prefills == 0
    real = Engine(tiny_gpt(), TOKENIZER, num_slots=2, max_len=40)
    [(tokens, _)] = collect(real, [Request([CHAT.bos] * 36, 4)])
    assert 1 <= len(tokens) <= 4


def test_an_abandoned_run_leaves_the_engine_usable() -> None:
    engine, _ = scripted([10, 11])
    stream = engine.run([Request([CHAT.bos], 5)])
    next(stream)
    with pytest.raises(AssertionError):
        next(engine.run([Request([CHAT.bos], 5)]))
    cast(Any, stream).close()
    assert collect(engine, [Request([CHAT.bos], 5)])[0][0] == [10, 11, CHAT.assistant_end]


def test_generate_columns_are_the_same_samples_as_run() -> None:
    engine = Engine(tiny_gpt(), TOKENIZER, num_slots=2)
    options: dict[str, Any] = {"max_tokens": 9, "temperature": 1.2, "top_k": 20, "seed": 7}
    columns = list(engine.generate([CHAT.bos, 5], num_samples=5, **options))
    requests = [Request([CHAT.bos, 5], 9, 1.2, 20, seed=derive_seed(7, i)) for i in range(5)]
    for i, (tokens, masks) in enumerate(collect(engine, requests)):
        column = [(column[i], column_masks[i]) for column, column_masks in columns]
        ended = [(CHAT.assistant_end, 0)] * (len(columns) - len(tokens))
        assert column == [*zip(tokens, masks, strict=True), *ended]
    assert len(columns) == max(len(tokens) for tokens, _ in collect(engine, requests))


def test_generate_batch_leaves_the_stop_token_out() -> None:
    engine, _ = scripted([10, CHAT.python_start, 49, CHAT.python_end])
    results, masks = engine.generate_batch([CHAT.bos], num_samples=3, max_tokens=20, top_k=None)
    said = [
        CHAT.bos,
        10,
        CHAT.python_start,
        49,
        CHAT.python_end,
        CHAT.output_start,
        49,
        CHAT.output_end,
    ]
    assert results[0][:8] == said and masks[0][:8] == [0, 1, 1, 1, 1, 0, 0, 0]
    assert CHAT.assistant_end not in results[0] and len(results) == len(masks) == 3


def test_streaming_gives_whole_characters_only() -> None:
    text = "naïve 日本語 🙂 👩‍🚀 fin"
    reader = ReplyReader(TOKENIZER)
    pieces = [piece for byte in text.encode() for piece in reader.feed(byte)]
    assert "".join(piece for _, piece in pieces) == text and "\ufffd" not in str(pieces)
    assert reader.close() == []
    for byte in "🙂".encode()[:2]:
        assert reader.feed(byte) == []
    assert reader.close() == [("text", "\ufffd")]
    assert reader.parts == [{"type": "text", "text": text + "\ufffd"}]


def test_reply_parts() -> None:
    call = [CHAT.python_start, *b"1+1", CHAT.python_end, CHAT.output_start, *b"2", CHAT.output_end]
    parts = reply_parts(TOKENIZER, [*b"so ", *call, *b"two", CHAT.assistant_end])
    assert [(part["type"], part["text"]) for part in parts] == [
        ("text", "so "),
        ("python", "1+1"),
        ("python_output", "2"),
        ("text", "two"),
    ]


def drain(engine: Engine) -> list[Event]:
    """Every event until nothing is left to do."""
    events = []
    while engine.busy:
        events += engine.step()
    return events


def check_slots(engine: Engine) -> None:
    """No slot is lost, and every one holds in the cache what it says."""
    in_use = [flight.slot for flight in engine.flights]
    assert sorted(s.index for s in [*engine.slots.free, *in_use]) == list(range(engine.num_slots))
    for slot, length in zip(engine.slots.all, engine.cache.lengths.tolist(), strict=True):
        assert len(slot.held) in (length, 0)  # 0: a failed one


@torch.inference_mode()
def worst_logit(engine: Engine, model: GPT, request: Request) -> float:
    """The largest difference, over its tokens, of the engine's logits to the full forward pass's."""
    engine.submit(request)
    ids, worst = list(request.prompt), 0.0
    finish = None
    while finish is None:
        for event in engine.step():
            if event.request is request:
                [index] = [slot.index for slot in engine.slots.all if slot.held == ids]
                full = model(torch.tensor([ids]))[0, -1]
                worst = max(worst, float((engine.logits[index] - full).abs().max()))
                ids.append(event.token)
                finish = event.finish
    return worst


def words(seed: int, num: int) -> list[int]:
    return random.Random(seed).choices(range(256), k=num)


@pytest.mark.parametrize("length", [256, 257, 300, 500])
def test_a_prompt_read_in_chunks_equals_the_full_forward(length: int) -> None:
    model = tiny_gpt()
    engine = Engine(model, TOKENIZER, num_slots=2)
    assert worst_logit(engine, model, Request(words(0, length), 9)) < 1e-4
    assert engine.num_read == length


def test_a_next_turn_does_not_read_its_history_again() -> None:
    """Turns of two conversations in turn, longer than the window; each turn reads what is new, and one token."""
    model = tiny_gpt()
    engine = Engine(model, TOKENIZER, num_slots=2)
    histories = [[CHAT.bos, *words(seed, 150)] for seed in range(2)]
    for turn in range(4):
        for history in histories:
            before = engine.num_read
            request = Request(history.copy(), 12, temperature=0.9, seed=turn, stop={-1})
            assert worst_logit(engine, model, request) < 1e-4
            held = next(s.held for s in engine.slots.all if s.held[: len(history)] == history)
            fresh = len(history) if turn == 0 else 1 + 20
            assert engine.num_read - before == fresh
            history[:] = [
                *held,
                7,
                *words(turn, 20),
            ]  # 7 instead of the last token, which is not fed
    check_slots(engine)


def test_where_a_shared_beginning_comes_from() -> None:
    """From a slot in use, from a free one that keeps its own, and not from a few tokens in common."""
    model = tiny_gpt()
    engine = Engine(model, TOKENIZER, num_slots=4)
    system = words(1, 100)
    long = Request([*system, *words(2, 200)], 30, stop={-1})
    engine.submit(long)
    for _ in range(5):
        engine.step()
    assert worst_logit(engine, model, Request([*system, 1, 2, 3], 5)) < 1e-4  # of the running slot
    assert engine.num_read == 300 + 3
    drain(engine)
    [kept] = [slot for slot in engine.slots.all if slot.held[:300] == long.prompt]
    held = list(kept.held)
    assert (
        worst_logit(engine, model, Request([*system, 9], 5)) < 1e-4
    )  # a copy: too little to overwrite it
    assert kept.held == held and engine.num_read == 304
    assert worst_logit(engine, model, Request([*system[:10], 9], 5)) < 1e-4  # read anew
    assert engine.num_read == 304 + 11
    assert kept.held == held  # the other three were unused for longer
    assert worst_logit(engine, model, Request(held[:290], 5)) < 1e-4  # regenerated where it is
    assert engine.num_read == 315 + 1 and kept.held[:290] == held[:290]
    check_slots(engine)


def test_copies_of_a_prompt_are_exact_and_without_reuse_nothing_else_is_copied() -> None:
    engine = Engine(tiny_gpt(), TOKENIZER, num_slots=3, prefix_reuse=False)
    prompt = words(3, 200)
    engine.submit(Request(prompt, 20, stop={-1}))
    engine.step()
    first = engine.logits[0].clone()
    engine.step()
    engine.submit(Request(list(prompt), 4))
    engine.step()
    assert torch.equal(engine.logits[1], first) and engine.num_read == 200
    drain(engine)
    engine.submit(Request(prompt[:150], 4))
    engine.submit(Request(prompt, 4))
    drain(engine)
    assert engine.num_read == 350
    check_slots(engine)


def test_requests_may_come_and_go_between_steps() -> None:
    """Cancelled in the queue, while its prompt is read, while it decodes: its slot is free for the next step."""
    engine = Engine(tiny_gpt(), TOKENIZER, num_slots=1)
    reading, decoding, queued, last = (Request(words(i, 400), 50, stop={-1}) for i in range(4))
    for request in (reading, decoding, queued, last):
        engine.submit(request)
    assert engine.step() == [] and (engine.num_running, engine.num_waiting) == (1, 3)
    engine.cancel(reading)
    assert engine.num_running == 0
    assert engine.step() == [] and engine.num_running == 1  # the first of two chunks
    assert [event.request for _ in range(3) for event in engine.step()] == [decoding] * 3
    engine.cancel(queued)
    engine.cancel(decoding)
    assert (engine.num_running, engine.num_waiting) == (0, 1)
    engine.step()
    assert [event.request for event in engine.step()] == [last]
    assert {event.request for event in drain(engine)} == {last}
    engine.cancel(last)  # too late, and harmless
    check_slots(engine)


def test_a_long_prompt_delays_nobody_by_more_than_a_chunk() -> None:
    engine = Engine(tiny_gpt(), TOKENIZER, num_slots=3)
    talking, long, short = Request([1], 9, stop={-1}), Request([2] * 500, 3), Request([3], 3)
    engine.submit(talking)
    engine.step()
    engine.submit(long)
    engine.submit(short)
    seen = [[event.request for event in engine.step()] for _ in range(3)]
    assert seen == [[talking], [talking, long], [talking, long, short]]
    assert engine.num_read == 502


def test_logprobs_are_those_of_the_full_forward() -> None:
    model = tiny_gpt()
    engine = Engine(model, TOKENIZER, num_slots=3)
    asked = Request(words(5, 30), 6, temperature=1.5, top_k=9, logprobs=4, stop={-1})
    one = Request(words(5, 30), 6, temperature=1.5, top_k=9, logprobs=1, stop={-1})
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
    assert [pairs and pairs[:2] for pairs in told[asked]] == told[one]
    assert set(map(str, told[silent])) == {"None"}


def test_finish_says_why() -> None:
    engine, _ = scripted([10, 11])
    stopped, cut = Request([CHAT.bos], 9), Request([CHAT.bos], 2)
    engine.submit(stopped)
    engine.submit(cut)
    said = [(e.request, e.token, e.finish) for e in drain(engine) if e.finish]
    assert said == [(cut, 11, "length"), (stopped, CHAT.assistant_end, "stop")]


def test_a_failing_step_costs_only_those_in_it() -> None:
    """A prompt that cannot be read costs its request; a decode that fails, those that were running."""
    model = tiny_gpt()
    engine = Engine(model, TOKENIZER, num_slots=2)
    forward, broken = model.forward, set[int]()

    def fragile(ids: torch.Tensor, **more: Any) -> torch.Tensor:
        if ids.shape[1] in broken:
            raise RuntimeError("out of memory")
        return forward(ids, **more)

    model.forward = cast(Any, fragile)
    first, second, third = (Request(words(i, 20 * i), 8, stop={-1}) for i in (1, 2, 3))
    alone = {request: collect(engine, [request])[0][0] for request in (first, second, third)}
    engine.reset()
    for request in (first, second, third):
        engine.submit(request)
    broken.add(48)  # the second prompt, padded
    with pytest.raises(StepFailed) as lost:
        engine.step()
    assert lost.value.requests == [second] and (engine.num_running, engine.num_waiting) == (1, 1)
    assert str(lost.value.__cause__) == "out of memory"
    events = engine.step()
    assert [event.request for event in events] == [first, third]
    engine.submit(second)
    broken.add(1)
    with pytest.raises(StepFailed) as lost:
        engine.step()
    assert lost.value.requests == [first, third] and engine.num_waiting == 1
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
        for _, token, _ in engine.run([Request(prompt, 50, stop={-1})]):
            said.append(token)
    model.forward = forward
    before = engine.num_read
    assert worst_logit(engine, model, Request([*prompt, *said, 5, 6], 9, stop={-1})) < 1e-4
    assert engine.num_read - before == 3  # the newest token was not held yet


@pytest.mark.parametrize("prefix_reuse", [False, True])
def test_no_slot_leaks(prefix_reuse: bool) -> None:
    """A thousand steps of arrivals, departures and ends at random; what ends has said all it had to."""
    random_ = random.Random(7)
    engine = Engine(tiny_gpt(), TOKENIZER, 4, max_len=120, prefix_reuse=prefix_reuse)
    open_: dict[Request, int] = {}
    prompts = [random_request(random_).prompt for _ in range(5)]
    num_ended = 0
    for _ in range(300):
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
        assert len(open_) == engine.num_running + engine.num_waiting
        check_slots(engine)
    assert num_ended > 50
    drain(engine)
    assert len(engine.slots.free) == 4


def test_slots_are_refused_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gpt()
    each = model.make_cache(1, 512).num_bytes
    monkeypatch.setattr("nanochat.engine.free_memory", lambda device: 10 * each)
    assert slots_that_fit(model) == 8 and slots_that_fit(model, 255) == 16
    assert Engine(model, TOKENIZER, num_slots=8).num_slots == 8
    with pytest.raises(UserError, match="9 slots are more than the 8 .* --slots"):
        Engine(model, TOKENIZER, num_slots=9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_equals_an_eager_one(dtype: torch.dtype) -> None:
    """As lengths grow, as requests come and go, and after the weights have changed in place."""
    model = tiny_gpt().cuda()
    model.set_compute_dtype(dtype)
    random_ = random.Random(0)
    for _ in range(2):
        requests = [random_request(random_, 200) for _ in range(20)]
        captured = Engine(model, TOKENIZER, num_slots=4)
        eager = Engine(model, TOKENIZER, num_slots=4)
        assert captured.graph
        eager.graph = None
        assert collect(captured, requests) == collect(eager, requests)
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        captured.reset()
        eager.reset()
        assert collect(captured, requests) == collect(eager, requests)
