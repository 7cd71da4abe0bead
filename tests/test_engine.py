"""The engine: cached equals full, batched equals alone, tools, limits, streaming.

Oracles: the model's own full forward pass without a cache; a request run by itself; and a scripted model
whose next token is a table of its last one, so that a whole generation is known beforehand.
"""

import random
from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from torch import nn

from nanochat.chat_format import SPECIAL_TOKENS, chat_tokens
from nanochat.engine import Engine, ReplyReader, Request, reply_parts
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import KVCache
from nanochat.paths import UserError
from nanochat.sampling import derive_seed
from nanochat.tokenizer import SPLIT_PATTERN, Tokenizer

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

    def forward(
        self, ids: torch.Tensor, *, cache: KVCache, num_new: torch.Tensor, last_only: bool
    ) -> torch.Tensor:
        assert last_only
        self.num_prefills += ids.shape[1] > 1
        step = cache.begin(ids.shape[0], ids.shape[1], num_new=num_new)
        cache.finish(step)
        last = ids[torch.arange(len(ids)), step.last].tolist()
        logits = torch.zeros(len(ids), 1, V)
        for row, token in enumerate(last):
            logits[row, 0, self.script.get(token, CHAT.assistant_end)] = 50
        return logits


def scripted(said: list[int], num_slots: int = 2) -> tuple[Engine, ScriptedModel]:
    """An engine that answers the prompt [bos] with `said` (each token at most once) and ends its turn."""
    model = ScriptedModel(dict(zip([CHAT.bos, *said], said, strict=False)))
    return Engine(cast(Any, model), TOKENIZER, num_slots), model


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
    """Requests among random mates, in any slot and at any time, say what they say alone."""
    random_ = random.Random(1)
    engine = Engine(tiny_gpt(), TOKENIZER, num_slots=4, max_len=80)
    watched = [random_request(random_) for _ in range(4)]
    alone = [collect(engine, [request])[0] for request in watched]
    assert len({tuple(tokens) for tokens, _ in alone}) > 2
    for _ in range(num_mixes):
        mates = [random_request(random_) for _ in range(random_.randint(0, 6))]
        mixed: list[Request | int] = [*mates, *range(len(watched))]
        random_.shuffle(mixed)
        requests = [watched[item] if isinstance(item, int) else item for item in mixed]
        said = dict(zip(requests, collect(engine, requests), strict=True))
        assert [said[request] for request in watched] == alone


def test_batched_equals_alone() -> None:
    check_mixes(5)


@pytest.mark.slow
def test_batched_equals_alone_in_a_thousand_mixes() -> None:
    check_mixes(1000)


def test_logits_do_not_see_batch_mates() -> None:
    """To the bit: the logits of a slot, alone and among mates that come, go and differ in length."""
    engine = Engine(tiny_gpt(), TOKENIZER, num_slots=4)
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


def test_poison_in_free_slots_changes_nothing() -> None:
    request = Request([CHAT.bos, 1, 2, 3], 10)
    engine = Engine(tiny_gpt(), TOKENIZER, num_slots=3)
    [clean] = collect(engine, [request])
    engine.cache.keys.fill_(torch.nan)
    engine.cache.values.fill_(torch.nan)
    engine.cache.previous.fill_(torch.nan)
    engine.logits = torch.full((3, V), torch.nan)
    assert collect(engine, [request]) == [clean]
    assert collect(engine, [random_request(random.Random(3)) for _ in range(5)])


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
