"""Generates for many requests at once, each with its own sampling, seed and tool calls.

Requests queue for a free slot of the KV cache. A step prefills at most a chunk of prompt tokens,
then decodes one token for every prefilled request, until it ends its turn or has max_tokens.

Each prompt is prefilled alone, in chunks whose shapes depend on its length only; where flash reads
the cache, all prompts of a step fill one chunk that always has the same shape. Decoding takes the
slots in use, and a prompt may start from what another left in the cache: so the last bits of the
logits depend on other requests. Not in a `deterministic` engine, which always decodes all slots.

Shapes: N slots, V vocabulary, C channels, P length of a padded chunk.
"""

import codecs
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from os.path import commonprefix  # of any sequences
from typing import Literal, NamedTuple

import torch

from nanochat.calculator import calculate
from nanochat.common import UserError, free_memory
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache
from nanochat.sampling import SamplingBatch, counter_uniform, sample, with_logprobs
from nanochat.tokenizer import ChatTokens, Tokenizer, chat_tokens

CHUNK = 256  # prompt tokens per step, padding included
PACKED_CHUNK = 2048  # the same where prompts are packed, on a GPU with flash; not measured
ROUND_UP = 16  # chunks are padded to a multiple of this, so that few shapes occur
MIN_SHARED = 16  # tokens; shorter common prefixes are prefilled again
SAMPLE_PROMPTS = (
    "The capital of France is", "If yesterday was Friday, then today is", "The opposite of hot is",
    "Once upon a time", "My favourite colour is", "Two and three make",
)  # fmt: skip
UTF8 = codecs.getincrementaldecoder("utf-8")
NUM_WARM_UPS = 3  # eager runs before capture, in which cuBLAS allocates its workspaces


@dataclass(eq=False)
class Request:
    """What to continue and how; compared by identity."""

    prompt: list[int]  # not to be changed once submitted
    max_tokens: int  # generated tokens, forced ones included; 0: only score the prompt
    temperature: float = 1.0  # 0: the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    seed: int = 0
    logprobs: int | None = None  # n: those of each sampled text token and of the n likeliest
    min_p: float = 0.0  # drops what is less likely than this share of the likeliest; 0: off
    # Divides the logits of text tokens in prompt or reply if positive, else multiplies; 1: off.
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0  # taken off the logits of tokens in the reply
    frequency_penalty: float = 0.0  # the same, for each time that it is there
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to an id's logit
    # n: also the logprobs of the prompt's tokens, each with its n likeliest alternatives; such a
    # prompt is read whole, whatever the slots hold.
    prompt_logprobs: int | None = None

    @property
    def is_penalised(self) -> bool:
        added = self.presence_penalty or self.frequency_penalty or self.logit_bias
        return bool(added) or self.repetition_penalty != 1


IDLE = Request([], 0, temperature=0.0)  # stands in for an empty slot when sampling


class Event(NamedTuple):
    """A request's next token, and what it adds to the reply."""

    request: Request
    token: int
    mask: int  # 0 if the tool forced the token
    text: str = ""  # characters it completes; tool calls and results are not text
    tool: tuple[str, str | None] | None = None  # (expression, result if any) of the call it closes
    logprobs: list[tuple[int, float]] | None = None  # (id, logprob): itself, then the likeliest
    finish: Literal["stop", "length"] | None = None  # set on the last token
    # On the first, if asked for: the same for each token of the prompt but the first one. A request
    # for nothing else has this event alone, without a token: it is -1, mask 0.
    prompt: list[list[tuple[int, float]]] | None = None


@dataclass
class Reply:
    """What a request has generated so far."""

    tokens: list[int] = field(default_factory=list)
    masks: list[int] = field(default_factory=list)
    parts: list[dict[str, str]] = field(default_factory=list)  # the content of a chat message

    @property
    def text(self) -> str:
        """The reply without tool calls and their results."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    def add(self, event: Event) -> None:
        self.tokens.append(event.token)
        self.masks.append(event.mask)
        self.add_part("text", event.text)
        if event.tool:
            self.add_tool(*event.tool)

    def add_part(self, kind: str, text: str) -> None:
        """Append a part; adjacent texts are joined."""
        if kind == "text" and self.parts and self.parts[-1]["type"] == "text":
            self.parts[-1]["text"] += text
        elif kind != "text" or text:
            self.parts.append({"type": kind, "text": text})

    def add_tool(self, expression: str, result: str | None) -> None:
        self.add_part("python", expression)
        if result is not None:
            self.add_part("python_output", result)


class Penalties:
    """What a request's own words and wishes do to its logits; `count` every token of the reply.

    Sources: the repetition penalty, arXiv 1909.05858; the others, OpenAI's API reference.
    """

    def __init__(
        self, request: Request, num_text: int, vocab_size: int, device: torch.device | str
    ) -> None:
        """Ids below `num_text` are of text, and so count where they are in the prompt."""
        said = [token for token in request.prompt if token < num_text]
        self.request = request
        self.in_prompt = torch.zeros(vocab_size, dtype=torch.bool, device=device)  # (V,)
        self.in_prompt[torch.tensor(said, dtype=torch.int64)] = True
        self.counts = torch.zeros(vocab_size, device=device)  # (V,) times in the reply
        self.bias = torch.zeros(vocab_size, device=device)  # (V,)
        if bias := request.logit_bias:
            self.bias[list(bias)] = torch.tensor(list(bias.values()), device=device)

    def count(self, token: int) -> None:
        self.counts[token] += 1

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The changed copy of one row (V,)."""
        asked, said = self.request, self.counts > 0
        repetition = asked.repetition_penalty
        weaker = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(said | self.in_prompt, weaker, logits)
        logits = logits - asked.frequency_penalty * self.counts - asked.presence_penalty * said
        return logits + self.bias


@dataclass(eq=False)
class Slot:
    """A place in the cache: what it holds, and how far its newest request is."""

    index: int
    request: Request = IDLE  # may have ended; a new one gets a new Slot
    cached: list[int] = field(default_factory=list)  # tokens whose keys and values are there
    end: torch.Tensor | None = None  # (V,) logits after the prompt, once that is fully read
    scores: list[list[tuple[int, float]]] = field(default_factory=list)  # see Event.prompt
    num_generated: int = 0
    last: int | None = None  # the newest token, next to be fed to the model
    part: str = "text"  # of the next token: text, python or python_output
    expression: list[int] = field(default_factory=list)  # tokens of an open tool call
    forced: deque[int] = field(default_factory=deque)  # pending tokens of a tool result
    decoder: codecs.IncrementalDecoder = field(default_factory=partial(UTF8, "replace"))
    penalties: Penalties | None = None

    @property
    def is_scored(self) -> bool:
        return self.request.prompt_logprobs is not None

    def score(self, logits: torch.Tensor) -> None:
        """Note the logprobs of the prompt's tokens that follow a chunk of T, from (T, V) logits."""
        begin, num_top = len(self.cached) + 1, self.request.prompt_logprobs or 0
        following = self.request.prompt[begin : begin + len(logits)]
        ids = torch.tensor(following, dtype=torch.int64, device=logits.device)
        pairs = with_logprobs(ids, logits[: len(ids)], num_top).tolist()
        self.scores += [[(int(id), value) for id, value in each] for each in pairs]


class SlotPool:
    """The model, its cache, and the allocation of slots; `reset` it if the weights change.

    A released slot keeps its tokens. A new prompt copies from any slot

    - a whole identical prompt with the logits after it: as exact as reading it again;
    - else, unless `deterministic`, the longest common prefix, such as a conversation's history. The
      rest is then read in other chunks, so the last bits of the logits depend on what came before:
      fine for a server, not for an evaluation.
    """

    def __init__(self, model: GPT, num_slots: int, max_len: int, deterministic: bool) -> None:
        self.model, self.deterministic = model, deterministic
        self.device = next(model.parameters()).device
        self.cache = model.make_cache(num_slots, max_len)
        self.chunk = min(PACKED_CHUNK, num_slots * max_len) if self.cache.flashes else CHUNK
        # Of a step of decoding: any on a CPU, few where each is compiled or recorded.
        self.sizes: Sequence[int] = range(1, num_slots + 1)
        if self.device.type != "cpu":
            self.sizes = [*(1 << i for i in range((num_slots - 1).bit_length())), num_slots]
        if deterministic:
            self.sizes = [num_slots]
        self.graphs = None
        if self.device.type == "cuda":
            self.graphs = StepGraphs(model, self.cache, self.sizes, self.chunk)
        self.rows: list[Slot] = []  # of the newest step of decoding
        self.logits = torch.empty(0, model.config.vocab_size)  # (B, V) of these rows
        self.num_prefilled = 0  # prompt tokens run through the model so far
        self.reset()

    def reset(self) -> None:
        self.cache.reset()
        self.all = [Slot(index) for index in range(self.cache.num_slots)]
        self.free = deque(self.all)  # least recently used first

    def allocate(self, request: Request) -> Slot:
        """A slot for the request, holding as much of the beginning of its prompt as any slot does.

        In the place of the slot that already holds it, if free and at least half of what it holds
        is shared; else of the least recently used. For a prompt to be scored nothing is shared.
        """
        prompt, is_scored = request.prompt, request.prompt_logprobs is not None
        source, num_shared = (self.free[0], 0) if is_scored else self._longest_prefix(prompt)
        in_place = source in self.free and 2 * num_shared >= len(source.cached)
        old = source if in_place else self.free[0]
        previous: torch.Tensor | float = 0.0
        if num_shared:
            previous = self.model.embed(torch.tensor(prompt[num_shared - 1], device=self.device))
        self.cache.keep(old.index, num_shared, source.index, previous)
        end = source.end if num_shared == len(prompt) else None
        self.free.remove(old)
        self.all[old.index] = slot = Slot(old.index, request, prompt[:num_shared], end)
        return slot

    def next_chunk(self, slot: Slot, room: int) -> tuple[list[int], int]:
        """(what to read next of its prompt, the room it takes); nothing where `room` is short."""
        rest = slot.request.prompt[len(slot.cached) :]
        if self.cache.flashes:
            if slot.is_scored:  # a row of logits for each token, of which few fit
                room = min(room, CHUNK)
            return rest[:room], min(len(rest), room)
        chunk = rest[:CHUNK]
        padded = len(chunk) + -len(chunk) % ROUND_UP  # P
        return (chunk, padded) if padded <= room else ([], 0)

    def prefill(self, chunks: dict[Slot, list[int]]) -> None:
        """Read the chunks; together where flash reads the cache, else it must be one.

        So must be one that is scored.
        """
        counts = [len(chunks.get(slot, [])) for slot in self.all]
        ids = [token for slot in self.all for token in chunks.get(slot, [])]
        if self.cache.flashes and not any(slot.is_scored for slot in chunks):
            row = torch.tensor([ids + [0] * (self.chunk - len(ids))])  # (1, P)
            logits = self._run(row, None, torch.tensor(counts), packed=True)  # (N, V)
        else:
            (slot,) = chunks
            row = torch.tensor([ids + [0] * (-len(ids) % ROUND_UP)], device=self.device)  # (1, P)
            where, num_new = torch.tensor([slot.index]), torch.tensor([len(ids)])
            logits = self.model(
                row, cache=self.cache, slots=where, num_new=num_new, last_only=not slot.is_scored
            )  # (1, 1 or P, V)
            if slot.is_scored:
                logits = logits[:, : len(ids)]
                slot.score(logits[0])
            logits = logits[:, -1].expand(len(self.all), -1)
        self.num_prefilled += len(ids)
        for slot, chunk in chunks.items():
            slot.cached += chunk
            if len(slot.cached) == len(slot.request.prompt):
                slot.end = logits[slot.index].clone()

    def _run(
        self, ids: torch.Tensor, slots: torch.Tensor | None, num_new: torch.Tensor, packed: bool
    ) -> torch.Tensor:
        """(B, V) logits after appending num_new[b] tokens to slots[b]; valid until next called."""
        if self.graphs is not None:
            return self.graphs.replay(ids, slots, num_new, packed)
        ids, cache = ids.to(self.device), self.cache
        return self.model(
            ids, cache=cache, slots=slots, num_new=num_new, packed=packed, last_only=True
        )[:, 0]

    def decode(self, ready: Sequence[Slot]) -> torch.Tensor:
        """(B, V) logits of `rows` after feeding each slot's newest token, or after its prompt.

        `rows` are these slots and, up to the next size, idle ones.
        """
        live, size = set(ready), next(size for size in self.sizes if size >= len(ready))
        idle = (slot for slot in self.all if slot not in live)
        rows = [*ready, *islice(idle, size - len(ready))]
        self.rows = sorted(rows, key=lambda slot: slot.index)
        fed = [slot.last if slot in live else None for slot in self.rows]
        if any(token is not None for token in fed):
            ids = torch.tensor([[token or 0] for token in fed])  # (B, 1)
            num_new = torch.tensor([int(token is not None) for token in fed])  # (B,)
            slots = torch.tensor([slot.index for slot in self.rows])
            self.logits = self._run(ids, slots, num_new, packed=False)
        elif len(self.logits) != size:
            self.logits = torch.zeros(size, self.model.config.vocab_size, device=self.device)
        for row, (slot, token) in enumerate(zip(self.rows, fed, strict=True)):
            if token is not None:
                slot.cached.append(token)
            elif slot in live and slot.end is not None:
                self.logits[row] = slot.end
        return self.logits

    def can_copy(self, old: list[int], new: list[int]) -> bool:
        """True if, once `old` is read, `new` need not be read from its beginning."""
        shares = not self.deterministic and len(old) > MIN_SHARED
        return old == new or (shares and old[:MIN_SHARED] == new[:MIN_SHARED])

    def _longest_prefix(self, prompt: list[int]) -> tuple[Slot, int]:
        """(slot to copy from, how many of its tokens to keep); the last only with its logits."""
        best, longest = self.free[0], 0
        for slot in self.all:
            if slot.end is not None and slot.request.prompt == prompt:
                return slot, len(prompt)
            if not self.deterministic:
                shared = len(commonprefix((slot.cached, prompt[:-1])))
                if shared >= max(MIN_SHARED, longest + 1):
                    best, longest = slot, shared
        return best, longest


class StepGraphs:
    """The engine's steps as CUDA graphs: one launch instead of hundreds.

    One of prefilling takes a whole chunk; of decoding there is one for each size, which takes a
    token of so many slots. What changes lies in static buffers: the ids here, the rest in KVCache;
    so weights may only change in place. Without flash there is no graph of prefilling, and one of
    decoding for each size and each of a few key lengths; the shortest that suffices is replayed.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    @torch.inference_mode()
    def __init__(self, model: GPT, cache: KVCache, sizes: Sequence[int], chunk: int) -> None:
        self.model, self.cache, self.pool = model, cache, None
        doublings = (cache.block << i for i in range(cache.max_len.bit_length()))
        shorter = [n for n in doublings if n < cache.max_len and not cache.flashes]
        self.lengths = [*shorter, cache.max_len]
        ids = torch.zeros(cache.num_slots, 1, dtype=torch.int64, device=cache.keys.device)
        self.decoding = {  # the largest first: the others fit into its memory
            (size, length): self._record(ids[:size].clone(), length)
            for size in reversed(sizes)
            for length in reversed(self.lengths)
        }
        self.prefilling = None
        if cache.flashes:
            self.prefilling = self._record(ids.new_zeros(1, chunk), 0, packed=True)
        cache.reset()

    def _record(
        self, ids: torch.Tensor, num_keys: int, packed: bool = False
    ) -> tuple[torch.Tensor, torch.cuda.CUDAGraph, torch.Tensor]:
        """(the ids that it reads, the graph, the (B, V) logits that it writes)."""
        slots = torch.arange(self.cache.num_slots if packed else len(ids))
        num_new = torch.zeros_like(slots)
        cache = self.cache
        cache.recorded_keys = num_keys

        def run() -> torch.Tensor:
            return self.model(
                ids, cache=cache, slots=slots, num_new=num_new, packed=packed, last_only=True
            )[:, 0]

        with torch.cuda.device(ids.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(NUM_WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.pool, capture_error_mode="thread_local"):
                logits = run()
        self.pool, self.cache.recorded_keys = graph.pool(), 0
        return ids, graph, logits

    def replay(
        self, ids: torch.Tensor, slots: torch.Tensor | None, num_new: torch.Tensor, packed: bool
    ) -> torch.Tensor:
        """As SlotPool._run; `ids` are (B, 1) of a size, or packed."""
        (rows, time), dtype = ids.shape, self.model.compute_dtype
        step = self.cache.begin(rows, time, slots, num_new, dtype, packed)
        recorded = self.prefilling
        if not packed:
            needed = 1 + max(s for s, n in zip(step.starts, step.num_new, strict=True) if n)
            length = next(length for length in self.lengths if length >= needed)
            recorded = self.decoding[rows, length]
        assert recorded is not None
        buffer, graph, logits = recorded
        buffer.copy_(ids)
        graph.replay()
        self.cache.finish(step)
        return logits


class StepFailed(RuntimeError):
    """The model failed in a step: `requests` are lost, the others continue."""

    def __init__(self, requests: list[Request]) -> None:
        super().__init__(f"a step of the engine failed for {len(requests)} requests")
        self.requests = requests


def slots_that_fit(model: GPT, max_len: int | None = None) -> int:
    """How many slots of `max_len` tokens fit into four fifths of the free memory."""
    each = model.make_cache(1, max_len or model.config.sequence_len, device="meta").num_bytes
    return int(0.8 * free_memory(next(model.parameters()).device)) // each


class Engine:
    """Generates for up to `num_slots` requests of at most `max_len` tokens at a time.

    `stream` and `complete` run the steps; a server calls `submit`, `cancel` and `step`.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        num_slots: int = 16,
        max_len: int | None = None,
        deterministic: bool = False,
    ) -> None:
        """`deterministic`: no request changes another's logits, in their last bits either.

        Raises UserError if the slots would not fit into the free memory.
        """
        self.model, self.tokenizer = model, tokenizer
        self.chat: ChatTokens = chat_tokens(tokenizer)
        self.num_slots, self.max_len = num_slots, max_len or model.config.sequence_len
        if num_slots > (room := slots_that_fit(model, self.max_len)):
            raise UserError(
                f"{num_slots} slots are more than the {room} that the free memory holds; "
                "lower --slots (of chat_eval: --batch_size, of chat_rl: --num_slots)"
            )
        self.slots = SlotPool(model, num_slots, self.max_len, deterministic)
        self.device = self.slots.device
        self.lay_out = lru_cache(1)(SamplingBatch)  # the same in most steps
        self.reset()

    def reset(self) -> None:
        """Drop all requests and the slots' contents."""
        self.slots.reset()
        self.waiting: deque[Request] = deque()
        self.started: list[Request] = []  # got a slot in the last step
        self.running: list[Slot] = []  # all but the last are prefilled

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, request: Request) -> None:
        """Queue the request; UserError if it cannot fit."""
        if not request.prompt or request.max_tokens < (request.prompt_logprobs is None):
            raise UserError("a request needs a prompt and --max_tokens of at least 1")
        if len(request.prompt) + request.max_tokens > self.max_len:
            raise UserError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_tokens} to generate "
                f"exceed the context of {self.max_len}; shorten the prompt or lower --max_tokens"
            )
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Drop the request: no more events, and its slot is free at once."""
        if request in self.waiting:
            self.waiting.remove(request)
        for slot in self.running.copy():
            if slot.request is request:
                self._leave(slot)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Prefill a chunk of tokens, oldest prompt first, then decode one per prefilled request.

        Raises StepFailed if the model fails, dropping the requests concerned.
        """
        self.started = []
        self._prefill()
        ready = [slot for slot in self.running if slot.end is not None]
        if not ready:
            return []
        with self._dropping(ready):
            sampled = self._sample(ready, self.slots.decode(ready))
            events = [self._append(slot, sampled[slot]) for slot in ready]
        for slot, event in zip(ready, events, strict=True):
            if event.finish:
                self._leave(slot)
        return events

    def stream(self, requests: Iterable[Request]) -> Generator[Event]:
        """Yield events as they come, stop tokens included.

        Raises UserError, before any work, for a request that cannot fit.
        """
        assert not self.busy, "one stream at a time: exhaust or close the one before"
        if self.slots.deterministic:
            self.reset()  # the weights may have changed since
        unfinished = dict.fromkeys(requests)
        try:
            for request in unfinished:
                self.submit(request)
            while unfinished:
                for event in self.step():
                    if event.finish:
                        del unfinished[event.request]
                    yield event
        finally:
            for request in unfinished:
                self.cancel(request)

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Reply]]:
        """Yield (request, whole reply) as each request ends."""
        replies: dict[Request, Reply] = {}
        for event in self.stream(requests):
            replies.setdefault(event.request, Reply()).add(event)
            if event.finish:
                yield event.request, replies.pop(event.request)

    @contextmanager
    def _dropping(self, group: list[Slot]) -> Iterator[None]:
        """On an error inside, drop the requests of these slots only."""
        try:
            yield
        except Exception as error:
            for slot in group:
                self._leave(slot)
            raise StepFailed([slot.request for slot in group]) from error

    def _leave(self, slot: Slot) -> None:
        self.running.remove(slot)
        slot.penalties = None  # three tensors of the vocabulary's size
        self.slots.free.append(slot)

    def _prefill(self) -> None:
        """Read a chunk of prompt tokens, oldest first, giving free slots to waiting requests."""
        room = self.slots.chunk
        batch: dict[Slot, list[int]] = {}  # what is to be read of each
        while True:
            newest = self.running[-1] if self.running else None
            if newest and newest.end is None and newest not in batch:
                chunk, size = self.slots.next_chunk(newest, room)
                if not chunk:
                    break
                alone = newest.is_scored or not self.slots.cache.flashes
                if alone:
                    self._read(batch)
                batch[newest], room = chunk, room - size
                if alone:
                    self._read(batch)
                elif room == 0:
                    break
            elif self.waiting and self.slots.free:
                request = self.waiting[0]
                if any(self.slots.can_copy(slot.request.prompt, request.prompt) for slot in batch):
                    self._read(batch)
                slot = self.slots.allocate(self.waiting.popleft())
                self.started.append(request)
                self.running.append(slot)
                with self._dropping([slot]):
                    if request.is_penalised:
                        num_text, size = self.tokenizer.bos_id, self.model.config.vocab_size
                        slot.penalties = Penalties(request, num_text, size, self.device)
            else:
                break
        self._read(batch)

    def _read(self, batch: dict[Slot, list[int]]) -> None:
        """Prefill what the batch says, and empty it."""
        reading = batch.copy()
        batch.clear()
        if reading:
            with self._dropping(list(reading)):
                self.slots.prefill(reading)

    def _sample(self, ready: list[Slot], logits: torch.Tensor) -> dict[Slot, list[list[float]]]:
        """Of each slot [[id]], or `with_logprobs` rows if any wants them; one transfer."""
        live, slots = set(ready), self.slots.rows
        requests = [slot.request if slot in live else IDLE for slot in slots]
        settings = tuple((r.temperature, r.top_k, r.top_p, r.min_p) for r in requests)
        batch = self.lay_out(settings, logits.shape[1], self.device)
        seeds = torch.tensor([request.seed & (2**63 - 1) for request in requests])
        counts = torch.tensor([slot.num_generated for slot in slots])
        uniform = counter_uniform(seeds, counts).to(self.device)
        wanted = logits
        for row, slot in enumerate(slots):
            if slot in live and slot.penalties:
                wanted = logits.clone() if wanted is logits else wanted
                wanted[row] = slot.penalties.apply(logits[row])
        ids = sample(wanted, batch, uniform)
        wishes = [request.logprobs for request in requests if request.logprobs is not None]
        sampled = with_logprobs(ids, logits, max(wishes)) if wishes else ids[:, None, None]
        return dict(zip(slots, sampled.tolist(), strict=True))

    def _append(self, slot: Slot, sampled: list[list[float]]) -> Event:
        """The slot's next token: forced by the tool, else sampled.

        `sampled` is [[id]], or [id, logprob] followed by at least `request.logprobs` alternatives.
        """
        request, mask, scores = slot.request, int(not slot.forced), None
        if slot.is_scored and slot.num_generated == 0:
            scores, slot.scores = slot.scores, []
        if request.max_tokens == 0:
            return Event(request, -1, 0, finish="length", prompt=scores)
        token = slot.last = slot.forced.popleft() if slot.forced else int(sampled[0][0])
        slot.num_generated += 1
        finish = None
        if mask and token in (self.chat.assistant_end, self.chat.bos):
            finish = "stop"
        elif slot.num_generated >= request.max_tokens:
            finish = "length"
        raw, logprobs = b"", None
        special = token >= self.tokenizer.bos_id
        if slot.penalties and not special:
            slot.penalties.count(token)
        if slot.part == "python" and not special:
            slot.expression.append(token)
        elif slot.part == "text" and not special:
            raw = self.tokenizer.decode_bytes([token])
            if request.logprobs is not None:
                logprobs = [(int(id), value) for id, value in sampled[: 1 + request.logprobs]]
        # A character split over tokens waits for its last byte, at most until its part ends.
        text = slot.decoder.decode(raw, final=special or finish is not None)
        tool = self._end_part(slot, token) if special or finish else None
        return Event(request, token, mask, text, tool, logprobs, finish, scores)

    def _end_part(self, slot: Slot, token: int) -> tuple[str, str | None] | None:
        """(expression, result) of a tool call, if `token` ends one.

        Any result is queued as forced tokens.
        """
        chat, ended = self.chat, slot.expression
        begun = {chat.python_start: "python", chat.output_start: "python_output"}
        slot.part, slot.expression = begun.get(token, "text"), []
        if not ended:
            return None
        raw = self.tokenizer.decode_bytes(ended)
        expression = raw.decode("utf-8", "replace")  # no lone surrogate, which no JSON can hold
        result = calculate(expression) if token == chat.python_end else None
        if result is not None:
            slot.forced += [chat.output_start, *self.tokenizer.encode(result), chat.output_end]
        return expression, result


def sample_texts(model: GPT, tokenizer: Tokenizer, max_tokens: int = 32) -> list[str]:
    """Each of SAMPLE_PROMPTS with the greedy continuation of a base model."""
    requests = [
        Request([tokenizer.bos_id, *tokenizer.encode(prompt)], max_tokens, temperature=0.0)
        for prompt in SAMPLE_PROMPTS
    ]
    # Prompts may be longer than the context of a very small model.
    max_len = max(len(request.prompt) for request in requests) + max_tokens
    engine = Engine(model, tokenizer, len(requests), max_len, deterministic=True)
    replies = dict(engine.complete(requests))
    return [p + replies[r].text for p, r in zip(SAMPLE_PROMPTS, requests, strict=True)]
