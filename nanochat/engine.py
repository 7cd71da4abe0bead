"""The one way to generate: many different requests at once, each with its own sampling, seed and tool calls.

`run` keeps `num_slots` places. Each round it gives free places to waiting requests, first come first
served, samples one token for every place, and then decodes all places in one forward call. A request
leaves when it samples a stop token (its own, `<|assistant_end|>` or `<|bos|>`) or has max_tokens tokens.
When it closes a tool call, the calculator's answer is forced as its next tokens; they have mask 0 and
count as generated. Where the calculator has no answer nothing is forced, and the model goes on by itself.

What would surprise: every prompt is read alone, in pieces whose shapes follow from its length, into a
staging cache that is then copied to a place; and decoding always takes all the places, used or not. So
the shapes, and with them the last bit of every logit, do not depend on what else is in flight. Requests
that follow each other with the same prompt (samples of one question) share one reading: a copy is exact.

N slots, V vocabulary, P length of a padded piece of a prompt.
"""

import codecs
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch

from nanochat.calculator import calculate
from nanochat.chat_format import ChatTokens, chat_tokens
from nanochat.gpt import GPT
from nanochat.kv_cache import KVCache
from nanochat.paths import UserError
from nanochat.sampling import counter_uniform, derive_seed, sample
from nanochat.tokenizer import Tokenizer

LONGEST_PIECE = 256  # tokens of a prompt that one forward call takes
SHORTEST_PIECE = 16  # pieces are padded to powers of two from here on, so that few shapes occur


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


IDLE = Request([], 0, temperature=0.0)  # what a free slot samples with


@dataclass
class Slot:
    """A request in flight: what it has generated so far, and whether it is inside a tool call."""

    request: Request
    num_generated: int = 0
    last: int = 0  # the newest token, next to be fed to the model
    finished: bool = False
    forced: deque[int] = field(default_factory=deque)  # what the tool still has to say
    expression: list[int] | None = None  # tokens of an open tool call


class Engine:
    """Generates with `model` for up to `num_slots` requests at a time, each of at most `max_len` tokens."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, num_slots: int = 16, max_len: int | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.chat: ChatTokens = chat_tokens(tokenizer)
        self.num_slots = num_slots
        self.max_len = max_len or model.config.sequence_len
        self.device = next(model.parameters()).device
        sizes = (self.max_len, self.device, model.compute_dtype)
        self.cache = KVCache(model.config, num_slots, *sizes)
        self.staging = KVCache(model.config, 1, *sizes)
        self.staged: list[int] = []  # the prompt that `staging` holds
        self.staged_logits = torch.zeros(model.config.vocab_size, device=self.device)  # (V,)
        self.logits = torch.zeros(num_slots, model.config.vocab_size, device=self.device)  # (N, V)
        self.running = False

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[Request, int, int]]:
        """Yield (request, token, mask) as tokens come; mask 0 where the tool forced the token.

        The stop token is yielded too, with mask 1. Tokens of one request come in order, those of several
        are interleaved. Raises UserError, before any work, for a request that cannot fit.
        """
        waiting = deque(requests)
        for request in waiting:
            self._check(request)
        return self._serve(waiting)

    def complete(
        self, requests: Iterable[Request]
    ) -> Iterator[tuple[Request, list[int], list[int]]]:
        """Yield (request, tokens, masks) as each request ends, its stop token included; as `run` else."""
        said: dict[Request, tuple[list[int], list[int]]] = {}
        for request, token, mask in self.run(requests):
            tokens, masks = said.setdefault(request, ([], []))
            tokens.append(token)
            masks.append(mask)
            if self._ends(request, token, mask, len(tokens)):
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
        rows: list[list[tuple[int, int]]] = [[] for _ in requests]
        place = {request: i for i, request in enumerate(requests)}
        still_open, step = set(requests), 0
        for request, token, mask in self.run(requests):
            row = rows[place[request]]
            row.append((token, mask))
            if self._ends(request, token, mask, len(row)):
                still_open.remove(request)
            # A column is whole when every sample that goes on has reached it.
            while step < min(
                (len(rows[place[r]]) for r in still_open), default=max(map(len, rows))
            ):
                column = [r[step] if step < len(r) else (self.chat.assistant_end, 0) for r in rows]
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
        said = {request: (ids, masks) for request, ids, masks in self.complete(requests)}
        results, all_masks = [], []
        for request in requests:
            ids, masks = said[request]
            length = len(ids) - bool(masks[-1] and ids[-1] in self._stops(request))
            results.append(tokens + ids[:length])
            all_masks.append([0] * len(tokens) + masks[:length])
        return results, all_masks

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

    def _check(self, request: Request) -> None:
        if not request.prompt or request.max_tokens < 1:
            raise UserError("a request needs a prompt and --max_tokens of at least 1")
        if len(request.prompt) + request.max_tokens > self.max_len:
            raise UserError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_tokens} to generate exceed "
                f"the context of {self.max_len}; shorten the prompt or lower --max_tokens"
            )

    def _stops(self, request: Request) -> AbstractSet[int]:
        return request.stop | {self.chat.assistant_end, self.chat.bos}

    def _ends(self, request: Request, token: int, mask: int, num_generated: int) -> bool:
        """True where `token` is the request's last."""
        stopped = bool(mask) and token in self._stops(request)
        return stopped or num_generated >= request.max_tokens

    def _serve(self, waiting: deque[Request]) -> Iterator[tuple[Request, int, int]]:
        assert not self.running, "one run at a time: exhaust or close the one before"
        self.running, self.staged = True, []  # the weights may have changed since the last run
        slots: list[Slot | None] = [None] * self.num_slots
        try:
            while waiting or any(slots):
                for index, slot in enumerate(slots):
                    if slot is None and waiting:
                        slots[index] = self._admit(index, waiting.popleft())
                for index, token in enumerate(self._sample(slots)):
                    if (slot := slots[index]) is not None:
                        newest, mask = self._advance(slot, token)
                        yield slot.request, newest, mask
                        slots[index] = None if slot.finished else slot
                if any(slots):
                    self._decode(slots)
        finally:
            self.running = False

    @torch.inference_mode()
    def _admit(self, index: int, request: Request) -> Slot:
        """Give slot `index` to the request: its past and the logits after its prompt."""
        if request.prompt != self.staged:
            self._read(request.prompt)
        for name in ("keys", "values"):  # (L, N, ...)
            getattr(self.cache, name)[:, index] = getattr(self.staging, name)[:, 0]
        for name in ("previous", "lengths"):  # (N, ...)
            getattr(self.cache, name)[index] = getattr(self.staging, name)[0]
        self.logits[index] = self.staged_logits
        return Slot(request)

    def _read(self, prompt: list[int]) -> None:
        """Prefill: put `prompt` into the staging cache, piece by piece."""
        self.staging.reset()
        self.staged = list(prompt)
        for begin in range(0, len(prompt), LONGEST_PIECE):
            piece = prompt[begin : begin + LONGEST_PIECE]
            padded = max(SHORTEST_PIECE, 1 << (len(piece) - 1).bit_length())
            ids = torch.tensor([piece + [self.chat.bos] * (padded - len(piece))])  # (1, P)
            logits = self.model(
                ids.to(self.device),
                cache=self.staging,
                num_new=torch.tensor([len(piece)]),
                last_only=True,
            )
            self.staged_logits = logits[0, 0]

    @torch.inference_mode()
    def _sample(self, slots: Sequence[Slot | None]) -> list[int]:
        """One token per slot; a free one gets a token that nobody looks at."""
        rows = [IDLE if slot is None else slot.request for slot in slots]
        counts = [0 if slot is None else slot.num_generated for slot in slots]
        seeds = torch.tensor([request.seed & (2**63 - 1) for request in rows])
        ids = sample(
            self.logits,
            torch.tensor([request.temperature for request in rows]),
            torch.tensor([request.top_k for request in rows]),
            torch.tensor([request.top_p for request in rows]),
            counter_uniform(seeds, torch.tensor(counts)),
        )
        return ids.tolist()

    @torch.inference_mode()
    def _decode(self, slots: Sequence[Slot | None]) -> None:
        """Feed every slot its newest token, for the logits of the next."""
        ids = torch.tensor([[0 if slot is None else slot.last] for slot in slots])  # (N, 1)
        num_new = torch.tensor([int(slot is not None) for slot in slots])
        logits = self.model(
            ids.to(self.device), cache=self.cache, num_new=num_new, last_only=True
        )  # (N, 1, V)
        self.logits = logits[:, 0]

    def _advance(self, slot: Slot, sampled: int) -> tuple[int, int]:
        """(token, mask) that the slot takes next: what the tool still has to say, else what was sampled."""
        mask = int(not slot.forced)
        slot.last = sampled if mask else slot.forced.popleft()
        slot.num_generated += 1
        if mask:
            self._watch_tool(slot)
        slot.finished = self._ends(slot.request, slot.last, mask, slot.num_generated)
        return slot.last, mask

    def _watch_tool(self, slot: Slot) -> None:
        """Follow the tool call of which the slot's newest token may be a part; answer it when it ends."""
        if slot.last == self.chat.python_start:
            slot.expression = []
        elif slot.expression is not None and slot.last == self.chat.python_end:
            result = calculate(self.tokenizer.decode(slot.expression))
            slot.expression = None
            if result is not None:
                said = self.tokenizer.encode(result)
                slot.forced.extend([self.chat.output_start, *said, self.chat.output_end])
        elif slot.expression is not None:
            slot.expression.append(slot.last)


class ReplyReader:
    """Turns the tokens of one reply into text as they come, and into the parts of a message.

    Only whole code points are given out: a character split over tokens waits for its last byte.
    """

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
    engine = Engine(model, tokenizer, num_slots=len(prompts), max_len=max_len)
    said = {request: tokens for request, tokens, _ in engine.complete(requests)}
    return [
        prompt + "".join(part["text"] for part in reply_parts(tokenizer, said[request]))
        for prompt, request in zip(prompts, requests, strict=True)
    ]
