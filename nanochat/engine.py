"""The one way to generate: many different requests at once, each with its own sampling, seed and tool calls.

A request waits until it is the oldest and a slot of the KV cache is free. Its prompt is read into the slot, and
from then on every `step` gives it one token, as all others in flight, until it samples a stop token (its own,
`<|assistant_end|>` or `<|bos|>`) or has max_tokens tokens. A step reads at most CHUNK tokens of prompts, so that
nobody waits long for somebody else's. `run` and its kin drive the steps themselves; a server calls `submit`,
`cancel` and `step`.

What would surprise: every prompt is read alone, in chunks whose shapes follow from its length, and decoding always
takes all the slots, used or not. So the shapes, and with them the last bit of every logit, do not depend on what
else is in flight, unless `prefix_reuse` lets a prompt begin with what another has read .

N slots, V vocabulary, P length of a padded chunk of a prompt.

Which slot of the cache a prompt goes to, and what need not be read again.

A slot keeps its tokens when its request leaves. A new prompt gets, of all slots in use or free,

- all of a prompt that one has read whole, with the logits after it: a copy, as exact as reading it anew;
- else, with `prefix_reuse`, the longest beginning that it has in common with what one holds, such as the history
  of a conversation. The rest is then read in chunks that begin elsewhere than those of a fresh reading, so the
  last bits of the logits depend on who came before: right for a server, not for an evaluation.

It goes where these tokens are if that slot is free and loses little, else to the slot unused for longest.

Both presume that the weights stay as they are; after a change, make new ones (Engine.reset).

V vocabulary, C channels.

A request and what becomes of it: its tokens one by one, its tool calls, its end. No tensors.

When the model closes a tool call, the calculator's answer is forced as the next tokens; they have mask 0 and count
as generated. Where the calculator has no answer nothing is forced, and the model goes on by itself.

One decode step of a GPU, captured once as a CUDA graph: a replay launches its hundreds of kernels at once.

Works because the shapes never change (all slots, one token each, the whole cache as keys) and because what does
change lies in static buffers: the ids here, the rest in `KVCache.layout`. `KVCache.begin` and `finish` do before and
after a replay what they do in an eager step, so lengths are checked and counted as ever.

The oracle is the eager step: tests/test_engine.py compares both where there is a GPU.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. N slots, V vocabulary.

The tokens of a reply -> its text as it comes, and the parts of a message.

Only whole code points are given out: a character split over tokens waits for its last byte.
"""

import codecs
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from nanochat.calculator import calculate
from nanochat.common import UserError, free_memory
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache
from nanochat.sampling import Settings, counter_uniform, derive_seed, sample, with_logprobs
from nanochat.tokenizer import ChatTokens, Tokenizer, chat_tokens

WORTH_SHARING = 16  # tokens; a shorter beginning is read again and leaves its slot alone


class Prompt(NamedTuple):
    """A prompt that a slot has read to its end, and what the model made of it."""

    ids: list[int]
    logits: torch.Tensor  # (V,) after its last token
    previous: torch.Tensor  # (C,) see KVCache.previous


@dataclass(eq=False)
class Slot:
    """One sequence of the cache."""

    index: int
    held: list[int] = field(default_factory=list)  # the tokens whose keys and values it has
    prompt: Prompt | None = None  # what `held` begins with, once that is read whole


class Slots:
    """All slots of `cache`, which is emptied: those in use, and free ones that hold what was said there."""

    def __init__(self, model: GPT, cache: KVCache, prefix_reuse: bool) -> None:
        cache.reset()
        self.model, self.cache, self.prefix_reuse = model, cache, prefix_reuse
        self.all = [Slot(index) for index in range(cache.num_slots)]
        self.free = deque(self.all)  # the one unused for longest first

    def take(self, prompt: list[int]) -> Slot:
        """A slot that was free, holding as much of the beginning of `prompt` as could be found."""
        source, shared = self._longest_prefix(prompt)
        in_place = source in self.free and 2 * shared >= len(source.held)
        slot = source if in_place else self.free[0]
        whole = source.prompt if shared == len(prompt) else None
        previous: torch.Tensor | float = 0.0
        if whole:
            previous = whole.previous
        elif shared:
            newest = torch.tensor(prompt[shared - 1], device=self.cache.keys.device)
            previous = self.model.embed(newest)
        self.cache.keep(slot.index, shared, source.index, previous)
        slot.held, slot.prompt = prompt[:shared], whole
        self.free.remove(slot)
        return slot

    def give_back(self, slot: Slot) -> None:
        """Free a slot; it goes on holding what it holds."""
        self.free.append(slot)

    def _longest_prefix(self, prompt: list[int]) -> tuple[Slot, int]:
        """(the slot to begin from, how many of its tokens to keep).

        The last token of a prompt is only kept together with the logits after it.
        """
        best, longest = self.free[0], 0
        for slot in self.all:
            if slot.prompt and slot.prompt.ids == prompt:
                return slot, len(prompt)
            if self.prefix_reuse:
                limit = min(len(slot.held), len(prompt) - 1)
                pairs = zip(slot.held, prompt[:limit], strict=False)
                shared = next((i for i, (old, new) in enumerate(pairs) if old != new), limit)
                if shared >= max(WORTH_SHARING, longest + 1):
                    best, longest = slot, shared
        return best, longest


@dataclass(eq=False)
class Request:
    """What to continue and how; compared by identity, so that equal requests stay apart."""

    prompt: list[int]
    max_tokens: int  # generated tokens, what the tool forces included
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    seed: int = 0
    stop: AbstractSet[int] = frozenset()  # ids; <|assistant_end|> and <|bos|> always stop
    logprobs: int = 0  # 0: none; n: of each sampled token and of the n likeliest there


class Event(NamedTuple):
    """One more token of a request."""

    request: Request
    token: int
    mask: int  # 0 where the tool forced the token
    logprobs: list[tuple[int, float]] | None  # (id, logprob) of the token, then of the likeliest
    finish: Literal["stop", "length"] | None  # why this is the last one, if it is


@dataclass(eq=False)
class Flight:
    """A request in its slot: what it has generated so far, and whether it is inside a tool call."""

    request: Request
    slot: Slot
    num_generated: int = 0
    last: int = 0  # the newest token, next to be fed to the model
    forced: deque[int] = field(default_factory=deque)  # what the tool still has to say
    expression: list[int] | None = None  # tokens of an open tool call

    def take(
        self, sampled: Sequence[Sequence[float]], tokenizer: Tokenizer, chat: ChatTokens
    ) -> Event:
        """The next token: what the tool still has to say, else what was sampled.

        `sampled` is (id,), or (id, logprob) followed by those of at least `request.logprobs` likely tokens.
        """
        request, mask, logprobs = self.request, int(not self.forced), None
        self.last = int(sampled[0][0]) if mask else self.forced.popleft()
        self.num_generated += 1
        finish = "length" if self.num_generated >= request.max_tokens else None
        if mask:
            self._watch_tool(tokenizer, chat)
            if self.last in request.stop or self.last in (chat.assistant_end, chat.bos):
                finish = "stop"
            if request.logprobs:
                logprobs = [(int(id), value) for id, value in sampled[: 1 + request.logprobs]]
        return Event(request, self.last, mask, logprobs, finish)

    def _watch_tool(self, tokenizer: Tokenizer, chat: ChatTokens) -> None:
        """Follow the tool call of which the newest token may be a part; answer it when it ends."""
        if self.last == chat.python_start:
            self.expression = []
        elif self.expression is not None and self.last == chat.python_end:
            result = calculate(tokenizer.decode(self.expression))
            self.expression = None
            if result is not None:
                said = tokenizer.encode(result)
                self.forced.extend([chat.output_start, *said, chat.output_end])
        elif self.expression is not None:
            self.expression.append(self.last)


NUM_WARM_UPS = 3  # eager runs before the capture, in which cuBLAS takes its workspaces


class DecodeGraph:
    """The next logits of all slots of an empty `cache`, for weights that change in place only."""

    @torch.inference_mode()
    def __init__(self, model: GPT, cache: KVCache) -> None:
        self.cache, self.dtype = cache, model.compute_dtype
        self.ids = torch.zeros(cache.num_slots, 1, dtype=torch.int64, device=cache.keys.device)
        with torch.cuda.device(cache.keys.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(NUM_WARM_UPS):
                    model(self.ids, cache=cache, last_only=True)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.logits = model(self.ids, cache=cache, last_only=True)[:, 0]  # (N, V)
        cache.reset()

    def __call__(self, ids: torch.Tensor, num_new: torch.Tensor) -> torch.Tensor:
        """(N, V) logits, valid until the next call; `ids` (N, 1) and `num_new` (N,) as of GPT.forward."""
        step = self.cache.begin(len(ids), 1, num_new=num_new, dtype=self.dtype)
        self.ids.copy_(ids)
        self.graph.replay()
        self.cache.finish(step)
        return self.logits


CHUNK = 256  # tokens of prompts, padding included, that one step reads
ROUND_UP = 16  # chunks are padded to a multiple of this, so that few shapes occur
IDLE = Request([], 0, temperature=0.0)  # what a slot without a request samples with


class StepFailed(RuntimeError):
    """The model broke in a step: `requests` are lost, all others go on with the next step."""

    def __init__(self, requests: Sequence[Request]) -> None:
        super().__init__(f"a step of the engine failed for {len(requests)} requests")
        self.requests = requests


def slots_that_fit(model: GPT, max_len: int | None = None) -> int:
    """How many slots of `max_len` tokens the free memory of the model's device has room for, a fifth left over."""
    each = model.make_cache(1, max_len or model.config.sequence_len, device="meta").num_bytes
    return int(0.8 * free_memory(next(model.parameters()).device)) // each


class Engine:
    """Generates with `model` for up to `num_slots` requests at a time, each of at most `max_len` tokens."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        num_slots: int = 16,
        max_len: int | None = None,
        prefix_reuse: bool = True,
    ) -> None:
        """Raises UserError when the slots would not fit into the memory that is free."""
        self.model, self.tokenizer = model, tokenizer
        self.chat: ChatTokens = chat_tokens(tokenizer)
        self.num_slots, self.prefix_reuse = num_slots, prefix_reuse
        self.max_len = max_len or model.config.sequence_len
        self.device = next(model.parameters()).device
        if num_slots > (room := slots_that_fit(model, self.max_len)):
            raise UserError(
                f"{num_slots} slots are more than the {room} that the free memory holds; "
                "lower --slots (of chat_eval: --batch_size, of chat_rl: --num_slots)"
            )
        self.cache = model.make_cache(num_slots, self.max_len)
        self.graph = DecodeGraph(model, self.cache) if self.device.type == "cuda" else None
        self.logits = torch.zeros(num_slots, model.config.vocab_size, device=self.device)  # (N, V)
        self.num_read = 0  # tokens of prompts that went through the model so far
        self.reset()

    def reset(self) -> None:
        """Drop every request, and forget what the slots hold."""
        self.slots = Slots(self.model, self.cache, self.prefix_reuse)
        self.waiting: deque[Request] = deque()
        self.reading: Flight | None = None  # its prompt is not read to the end
        self.running: list[Flight] = []
        self.settings: Settings | None = None  # of sampling, until a flight begins or ends

    @property
    def flights(self) -> list[Flight]:
        """Every request with a slot."""
        return [*self.running, *filter(None, [self.reading])]

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self.waiting)

    @property
    def num_running(self) -> int:
        """Requests with a slot, the one whose prompt is being read included."""
        return len(self.flights)

    @property
    def busy(self) -> bool:
        """True while there is something for `step` to do."""
        return bool(self.num_waiting or self.num_running)

    def submit(self, request: Request) -> None:
        """Queue the request. Raises UserError where it cannot fit."""
        self._check(request)
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Forget the request, wherever it is; it gets no more events, and its slot is free at once."""
        if request in self.waiting:
            self.waiting.remove(request)
        for flight in self.flights:
            if flight.request is request:
                self._leave(flight)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Read a chunk of the oldest prompts, then give every request whose prompt is read its next token.

        Raises StepFailed where the model does, with those requests dropped that it concerns.
        """
        self._read_prompts()
        if not self.running:
            return []
        with self._at_stake(self.running):
            self._decode()
            rows = self._sample()
            chat = (self.tokenizer, self.chat)
            events = [flight.take(rows[flight.slot.index], *chat) for flight in self.running]
        for flight, event in zip(self.running.copy(), events, strict=True):
            if event.finish:
                self._leave(flight)
        return events

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[Request, int, int]]:
        """Yield (request, token, mask) as tokens come; mask 0 where the tool forced the token.

        The stop token is yielded too, with mask 1. Tokens of one request come in order, those of several
        are interleaved. Raises UserError, before any work, for a request that cannot fit.
        """
        requests = list(requests)
        for request in requests:
            self._check(request)
        return ((event.request, event.token, event.mask) for event in self._drive(requests))

    def complete(
        self, requests: Iterable[Request]
    ) -> Iterator[tuple[Request, list[int], list[int]]]:
        """Yield (request, tokens, masks) as each request ends, its stop token included; as `run` else."""
        said: dict[Request, tuple[list[int], list[int]]] = {}
        for request, token, mask, _, finish in self._drive(requests):
            tokens, masks = said.setdefault(request, ([], []))
            tokens.append(token)
            masks.append(mask)
            if finish:
                yield request, *said.pop(request)

    def generate(
        self,
        tokens: list[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (token_column, token_masks) per step: the next token of each of `num_samples` samples.

        A sample that has ended is filled up with `<|assistant_end|>`, mask 0. Without `max_tokens` the
        context is the limit. More samples than slots: the first columns wait for the last samples.
        """
        requests = self._samples(tokens, num_samples, max_tokens, temperature, top_k, seed)
        rows: dict[Request, list[tuple[int, int]]] = {request: [] for request in requests}
        still_open, step = dict(rows), 0
        for request, token, mask, _, finish in self._drive(requests):
            rows[request].append((token, mask))
            if finish:
                del still_open[request]
            # A column is whole when every sample that goes on has reached it.
            while step < min(map(len, still_open.values()), default=max(map(len, rows.values()))):
                ended = (self.chat.assistant_end, 0)
                column = [row[step] if step < len(row) else ended for row in rows.values()]
                yield [token for token, _ in column], [mask for _, mask in column]
                step += 1

    def generate_batch(
        self,
        tokens: list[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 42,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """(results, masks): per sample the prompt (mask 0) and what followed, without the stop token.

        The same samples as those of `generate`.
        """
        requests = self._samples(tokens, num_samples, max_tokens, temperature, top_k, seed)
        said: dict[Request, tuple[list[int], list[int]]] = {
            request: (list(tokens), [0] * len(tokens)) for request in requests
        }
        for request, token, mask, _, finish in self._drive(requests):
            if finish != "stop":
                said[request][0].append(token)
                said[request][1].append(mask)
        return [ids for ids, _ in said.values()], [masks for _, masks in said.values()]

    def _samples(
        self,
        tokens: list[int],
        num_samples: int,
        max_tokens: int | None,
        temperature: float,
        top_k: int | None,
        seed: int,
    ) -> list[Request]:
        """One request per sample, each with a seed derived from `seed` and its number."""
        limit = self.max_len - len(tokens) if max_tokens is None else max_tokens
        return [
            Request(list(tokens), limit, temperature, top_k or 0, seed=derive_seed(seed, i))
            for i in range(num_samples)
        ]

    def _drive(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Submit the requests and step until they have ended; the events of no others."""
        assert not self.busy, "one run at a time: exhaust or close the one before"
        if not self.prefix_reuse:
            self.reset()  # the weights may have changed since the last run
        unfinished = dict.fromkeys(requests)
        try:
            for request in unfinished:
                self.submit(request)
            while unfinished:
                for event in self.step():
                    if event.request in unfinished:
                        if event.finish:
                            del unfinished[event.request]
                        yield event
        finally:
            for request in unfinished:
                self.cancel(request)

    def _check(self, request: Request) -> None:
        if not request.prompt or request.max_tokens < 1:
            raise UserError("a request needs a prompt and --max_tokens of at least 1")
        if len(request.prompt) + request.max_tokens > self.max_len:
            raise UserError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_tokens} to generate exceed "
                f"the context of {self.max_len}; shorten the prompt or lower --max_tokens"
            )

    @contextmanager
    def _at_stake(self, flights: Iterable[Flight]) -> Iterator[None]:
        """Where something fails inside, it costs these flights and no others."""
        try:
            yield
        except Exception as error:
            lost = list(flights)
            for flight in lost:
                flight.slot.held, flight.slot.prompt = [], None
                self._leave(flight)
            raise StepFailed([flight.request for flight in lost]) from error

    def _leave(self, flight: Flight) -> None:
        """Free the flight's slot, which goes on holding its tokens."""
        if flight is self.reading:
            self.reading = None
        else:
            self.running.remove(flight)
        self.slots.give_back(flight.slot)
        self.settings = None

    def _admit(self) -> Flight | None:
        """Give the oldest waiting request a slot, if there is one of either."""
        if not (self.waiting and self.slots.free):
            return None
        self.reading = Flight(self.waiting[0], self.slots.take(self.waiting[0].prompt))
        self.waiting.popleft()
        return self.reading

    def _read_prompts(self) -> None:
        """Read at most CHUNK tokens, the oldest prompt first; whose prompt is read to its end, runs."""
        room = CHUNK
        while flight := self.reading or self._admit():
            prompt, held = flight.request.prompt, flight.slot.held
            chunk = prompt[len(held) : len(held) + CHUNK]
            padded = -(-len(chunk) // ROUND_UP) * ROUND_UP  # P
            if padded > room:
                return
            room -= padded
            if chunk:  # else all of it was copied
                with self._at_stake([flight]):
                    self._read(flight, chunk, padded)
            if len(held) == len(prompt):
                self.reading, self.settings = None, None
                self.running.append(flight)

    def _read(self, flight: Flight, chunk: list[int], padded: int) -> None:
        """Put `chunk` into the flight's slot, behind what that holds."""
        slot = flight.slot
        ids = torch.tensor([chunk + [self.chat.bos] * (padded - len(chunk))])  # (1, P)
        logits = self._forward(ids, torch.tensor([len(chunk)]), torch.tensor([slot.index]))
        slot.held += chunk
        self.num_read += len(chunk)
        if len(slot.held) == len(flight.request.prompt):
            previous = self.cache.previous[slot.index].clone()
            slot.prompt = Prompt(slot.held.copy(), logits[0], previous)

    def _forward(
        self, ids: torch.Tensor, num_new: torch.Tensor, slots: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, V) logits after each row's last token; arguments as of GPT.forward."""
        return self.model(
            ids.to(self.device), cache=self.cache, slots=slots, num_new=num_new, last_only=True
        )[:, 0]

    def _decode(self) -> None:
        """Put into `logits` what comes next for every running request."""
        ids, num_new = [[0] for _ in range(self.num_slots)], [0] * self.num_slots
        fed = [flight for flight in self.running if flight.num_generated]
        for flight in fed:
            ids[flight.slot.index], num_new[flight.slot.index] = [flight.last], 1
        if fed:
            forward = self.graph or self._forward
            self.logits = forward(torch.tensor(ids), torch.tensor(num_new))
        for flight in self.running:
            if flight.num_generated:
                flight.slot.held.append(flight.last)
            elif flight.slot.prompt:
                self.logits[flight.slot.index] = flight.slot.prompt.logits

    def _sample(self) -> list[list[list[float]]]:
        """Per slot a sampled id, or where some request asks what `with_logprobs` says of it; in one transfer."""
        requests, counts = [IDLE] * self.num_slots, [0] * self.num_slots
        for flight in self.running:
            requests[flight.slot.index] = flight.request
            counts[flight.slot.index] = flight.num_generated
        if self.settings is None:
            rows = [(r.temperature, r.top_k, r.top_p) for r in requests]
            self.settings = Settings(rows, self.logits.shape[1], self.device)
        seeds = torch.tensor([request.seed & (2**63 - 1) for request in requests])
        uniform = counter_uniform(seeds, torch.tensor(counts)).to(self.device)
        ids = sample(self.logits, self.settings, uniform)
        num_top = max(request.logprobs for request in requests)
        if num_top == 0:
            return ids[:, None, None].tolist()
        return with_logprobs(ids, self.logits, num_top).tolist()


class ReplyReader:
    """Turns the tokens of one reply into text as they come, and into the parts of a message."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        chat = chat_tokens(tokenizer)
        # Special id -> the kind of what follows it.
        self.kinds = dict.fromkeys(tokenizer.specials.values(), "text")
        self.kinds |= {chat.python_start: "python", chat.output_start: "python_output"}
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.kind = "text"
        self.parts: list[dict[str, str]] = []
        self.new_part = True

    def feed(self, token: int) -> list[tuple[str, str]]:
        """The (kind, text) that `token` completes; kind is text, python or python_output."""
        if token not in self.kinds:
            return self._emit(self.decoder.decode(self.tokenizer.decode_bytes([token])))
        rest = self.close()
        self.kind, self.new_part = self.kinds[token], True
        return rest

    def close(self) -> list[tuple[str, str]]:
        """What an unfinished character leaves behind: a replacement character, if anything."""
        rest = self._emit(self.decoder.decode(b"", final=True))
        self.decoder.reset()
        return rest

    def _emit(self, text: str) -> list[tuple[str, str]]:
        if not text:
            return []
        if self.new_part:
            self.parts.append({"type": self.kind, "text": ""})
            self.new_part = False
        self.parts[-1]["text"] += text
        return [(self.kind, text)]


def reply_parts(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[dict[str, str]]:
    """The parts of an assistant message from its tokens; special tokens end up as the kinds of parts."""
    reader = ReplyReader(tokenizer)
    for token in tokens:
        reader.feed(token)
    reader.close()
    return reader.parts


def sample_texts(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], max_tokens: int = 32
) -> list[str]:
    """How a base model goes on, greedily, after each prompt; the prompt included."""
    requests = [
        Request([tokenizer.bos_id, *tokenizer.encode(prompt)], max_tokens, temperature=0.0)
        for prompt in prompts
    ]
    # As long as they need it: prompts may be longer than the context of a very small model.
    max_len = max(len(request.prompt) for request in requests) + max_tokens
    engine = Engine(model, tokenizer, len(prompts), max_len, prefix_reuse=False)
    said = {request: tokens for request, tokens, _ in engine.complete(requests)}
    return [
        prompt + "".join(part["text"] for part in reply_parts(tokenizer, said[request]))
        for prompt, request in zip(prompts, requests, strict=True)
    ]
