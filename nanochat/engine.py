"""The one way to generate: many different requests at once, each with its own sampling, seed and tool calls.

A request waits until it is the oldest and a slot of the KV cache is free. Its prompt is read into the slot, and
from then on every `step` gives it one token, as all others in flight, until it samples a stop token (its own,
`<|assistant_end|>` or `<|bos|>`) or has max_tokens tokens. A step reads at most CHUNK tokens of prompts, so that
nobody waits long for somebody else's. `run` and its kin drive the steps themselves; a server calls `submit`,
`cancel` and `step`.

What would surprise: every prompt is read alone, in chunks whose shapes follow from its length, and decoding always
takes all the slots, used or not. So the shapes, and with them the last bit of every logit, do not depend on what
else is in flight, unless `prefix_reuse` lets a prompt begin with what another has read (nanochat/slots.py).

N slots, V vocabulary, P length of a padded chunk of a prompt.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from nanochat.chat_format import ChatTokens, chat_tokens
from nanochat.decode_graph import DecodeGraph
from nanochat.flight import Event, Flight, Request
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache, slot_bytes
from nanochat.paths import UserError
from nanochat.runtime import free_memory
from nanochat.sampling import Settings, counter_uniform, derive_seed, sample, with_logprobs
from nanochat.slots import Prompt, Slots
from nanochat.tokenizer import Tokenizer

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
    each = slot_bytes(model.config, max_len or model.config.sequence_len, model.compute_dtype)
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
        sizes = (num_slots, self.max_len, self.device, model.compute_dtype)
        self.cache = KVCache(model.config, *sizes)
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
