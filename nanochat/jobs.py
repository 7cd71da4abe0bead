"""What a server does with an engine: its thread, its jobs, and what it counts.

An EngineWorker has a thread, in which alone its engine runs: it receives orders (submit, cancel)
through an inbox and hands each step's events to the event loop, where everything else runs without
locks. A ServedModel has a worker while it is loaded.
"""

import asyncio
import gc
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from queue import SimpleQueue
from typing import Literal

import prometheus_client as prometheus
import torch
from prometheus_client.multiprocess import MultiProcessCollector

from nanochat import chat_api
from nanochat.chat_api import ApiError, Completion
from nanochat.common import UserError, git_revision
from nanochat.engine import Engine, Event, Request, StepFailed

ANSWER_SECONDS = 600.0  # limit for an answer, queue included; what OpenAI's client waits
PING_SECONDS, QUEUE_SECONDS = 15.0, 1.0  # between pings on a silent stream; queue updates
MAX_UNREAD = 512  # events per choice that a reader may lag behind
MAX_FAILURES = 8  # failed steps in a row after which the engine counts as dead
PREPARE_SECONDS = 1.0  # enough between asking for a model and the job
MAX_STEP_SECONDS = 120.0  # a longer step counts as hung; the first ones on a GPU compile
SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

log = logging.getLogger("uvicorn.error")  # the one that a server shows


class Metrics:
    """The metrics of /metrics, named as vLLM's after `nanochat_`.

    With $PROMETHEUS_MULTIPROC_DIR, which prometheus_client reads, those of all processes.
    """

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        self.is_shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        if not self.is_shared:
            prometheus.ProcessCollector(registry=self.registry)  # memory, CPU time
        any_gauge = partial(prometheus.Gauge, namespace="nanochat", registry=self.registry)
        gauge = partial(any_gauge, multiprocess_mode="livesum")
        longest = partial(any_gauge, multiprocess_mode="livemax")
        counter = partial(prometheus.Counter, namespace="nanochat", registry=self.registry)
        histogram = partial(prometheus.Histogram, namespace="nanochat", registry=self.registry)
        long, short = partial(histogram, buckets=LONG), partial(histogram, buckets=SHORT)
        labels = ["version", "revision", "torch"]
        info = longest("build_info", "Always 1; the labels name the software.", labels)
        info.labels(version("nanochat"), git_revision(), torch.__version__).set(1)
        self.running = gauge("num_requests_running", "Choices that have a slot of an engine.")
        self.waiting = gauge("num_requests_waiting", "Choices that wait for a slot.")
        self.step_age = longest(
            "engine_step_age_seconds", "Seconds that the current step has taken."
        )
        self.speed = gauge("generation_tokens_per_second", "Tokens generated in the last second.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens in the prompts of all choices.")
        self.prefilled = counter("prefill_tokens", "Those of them that the model had to read.")
        self.tokens = counter("generation_tokens", "Tokens generated, the calculator's included.")
        self.ended = counter("request_success", "Choices ended, well or not.", ["finished_reason"])
        self.refused = counter("requests_refused", "Requests refused, by the error.", ["code"])
        self.queued = long("request_queue_time_seconds", "Seconds of waiting for a slot.")
        self.first = long("time_to_first_token_seconds", "Seconds from request to first token.")
        self.between = short("inter_token_latency_seconds", "Seconds from one token to the next.")
        self.num_tokens, self.told = 0, (0, time.monotonic())  # generated; when last told

    def refresh(self, workers: Sequence["EngineWorker"]) -> None:
        """Set the gauges."""
        engines = [worker.engine for worker in workers if worker.state == "ready"]
        self.running.set(sum(len(engine.running) for engine in engines))
        self.waiting.set(sum(len(engine.waiting) for engine in engines))
        self.step_age.set(max((worker.step_age for worker in workers), default=0.0))
        (before, then), now = self.told, time.monotonic()
        if now - then >= 1:
            self.speed.set((self.num_tokens - before) / (now - then))
            self.told = self.num_tokens, now

    def text(self) -> bytes:
        """In Prometheus's format."""
        registry = self.registry
        if self.is_shared:
            registry = prometheus.CollectorRegistry()
            MultiProcessCollector(registry)
        return prometheus.generate_latest(registry)


class Job:
    """One HTTP request in an engine, with an engine request for each choice."""

    def __init__(self, requests: Sequence[Request], completion: Completion) -> None:
        self.completion = completion
        self.choices = dict(zip(requests, completion.choices, strict=True))
        self.num_unread = 0  # events that the client has not been sent
        self.error: ApiError | None = None
        self.news = asyncio.Event()
        self.place = 0  # in the queue, from 1
        self.arrived = time.monotonic()
        self.started = 0.0  # when it left the queue
        self.first = self.last = 0.0  # when its first and its newest token came

    async def follow(self) -> AsyncIterator[bytes]:
        """Yield a comment for the stream, or b"", whenever there may be news, until the end.

        Raises ApiError if the job fails or times out.
        """
        place, heard = 0, self.arrived
        while any(choice.finish is None for choice in self.completion.choices):
            if (left := self.arrived + ANSWER_SECONDS - time.monotonic()) <= 0:
                raise ApiError(503, "the answer takes too long", "timeout", retry_after=10)
            with suppress(TimeoutError):
                async with asyncio.timeout(min(QUEUE_SECONDS, left)):
                    await self.news.wait()
            self.news.clear()
            if self.error:
                raise self.error
            now, comment = time.monotonic(), b""
            if self.place not in (0, place):
                comment = b": queued %d\n\n" % self.place
            elif self.num_unread == 0 and now - heard >= PING_SECONDS:
                comment = b": ping\n\n"
            if comment or self.num_unread:
                heard = now
            place, self.num_unread = self.place, 0
            yield comment

    async def stream(self) -> AsyncIterator[bytes]:
        """The events of the answer; an error comes last."""
        completion = self.completion
        try:
            yield completion.begin()
            async for comment in self.follow():
                if data := comment + completion.news():
                    yield data
            yield completion.news() + completion.end(self.timings)
        except ApiError as error:
            yield chat_api.sse(error.body)

    @property
    def timings(self) -> dict[str, float]:
        """What accompanies a stream's usage."""
        num_tokens = self.completion.usage["completion_tokens"]
        seconds = self.last - self.first
        speed = max(num_tokens - 1, 0) / seconds if seconds > 0 else 0.0
        queue, first = self.started - self.arrived, self.first - self.arrived
        return {"queue_seconds": queue, "first_token_seconds": first, "tokens_per_second": speed}


class EngineWorker:
    """An engine in its own thread, and its jobs; created on the event loop.

    A failed step costs the jobs concerned; after several in a row, or on any error of the engine
    itself, the thread ends and all jobs fail.
    """

    engine: Engine  # once loaded

    def __init__(
        self,
        load: Callable[[], Engine],
        metrics: Metrics,
        queue: int,
        leaving: Sequence["EngineWorker"] = (),
    ) -> None:
        """Loads once those `leaving` have ended and their memory is free."""
        self.metrics, self.queue = metrics, queue
        self.state = "loading"  # then ready, at the end dead
        self.settled = asyncio.Event()  # no longer loading
        self.error: ApiError | None = None  # why it could not be loaded
        self.failed = False  # by no fault of the user's: the device itself may be unusable
        self.jobs: dict[Request, Job] = {}  # of requests that have not ended; the event loop's
        self.inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None: end
        self.step_began: float | None = None
        self.loop = asyncio.get_running_loop()
        self.thread = threading.Thread(
            target=self._live, args=(load, leaving), name="engine", daemon=True
        )
        self.thread.start()

    def stop(self) -> None:
        """Let the thread end after its current step."""
        self.inbox.put(None)

    @property
    def step_age(self) -> float:
        return 0.0 if (began := self.step_began) is None else time.monotonic() - began

    @property
    def hangs(self) -> bool:
        return self.step_age >= MAX_STEP_SECONDS

    @property
    def ready(self) -> bool:
        return self.state == "ready" and not self.hangs

    def submit(self, job: Job) -> None:
        """Take the job; ApiError if slots and queue are full."""
        if len(self.jobs) + len(job.choices) > self.engine.num_slots + self.queue:
            text = "all slots and the queue are full; try again soon"
            raise ApiError(429, text, "queue_full", retry_after=1)
        for request in job.choices:
            self.jobs[request] = job
            self.inbox.put(partial(self.engine.submit, request))
        self.metrics.prompt_tokens.inc(job.completion.num_prompt_tokens)

    def cancel(self, requests: Iterable[Request], reason: str = "abort") -> None:
        """Drop those of `requests` that have not ended."""
        for request in requests:
            if self.jobs.pop(request, None):
                self.inbox.put(partial(self.engine.cancel, request))
                self.metrics.ended.labels(reason).inc()

    def fail(self, requests: Iterable[Request], error: ApiError) -> None:
        """Fail and drop the jobs of `requests`."""
        for request in requests:
            if job := self.jobs.get(request):
                job.error = error
                job.news.set()
                self.cancel(job.choices, "error")

    def _deliver(
        self, started: Sequence[Request], waiting: Sequence[Request], events: Sequence[Event]
    ) -> None:
        """Pass on a step's outcome: who left the queue, who still waits, the tokens."""
        now = time.monotonic()
        for request in started:
            if (job := self.jobs.get(request)) and not job.started:
                job.started, job.place = now, 0
                self.metrics.queued.observe(now - job.arrived)
        for place, request in reversed(list(enumerate(waiting, 1))):
            if (job := self.jobs.get(request)) and not job.started:
                if job.place == 0:
                    job.news.set()  # to be told at once
                job.place = place
        for event in events:
            if job := self.jobs.get(event.request):  # else cancelled since
                self._deliver_event(job, event, now)

    def _deliver_event(self, job: Job, event: Event, now: float) -> None:
        if event.token >= 0:  # else the prompt was only scored
            since = self.metrics.between if job.first else self.metrics.first
            since.observe(now - (job.last or job.arrived))
            self.metrics.tokens.inc()
            self.metrics.num_tokens += 1
        job.first, job.last = job.first or now, now
        choice = job.choices[event.request]
        choice.feed(event)
        job.num_unread += 1
        job.news.set()
        if event.finish:
            del self.jobs[event.request]
            self.metrics.ended.labels(event.finish).inc()
        elif choice.finish:  # by a stop string, of which the engine knows nothing
            self.cancel([event.request], choice.finish)
        if job.num_unread > MAX_UNREAD * len(job.choices):
            self.fail(job.choices, ApiError(503, "the client reads too slowly", "slow_reader"))

    def _die(self, failed: bool) -> None:
        if self.state == "loading":
            text = "the model could not be loaded; see the server's log"
            self.error = ApiError(503, text, "model_unavailable", retry_after=30)
        self.failed, self.state = failed, "dead"
        self.settled.set()
        self.fail(list(self.jobs), ApiError(500, "the engine has stopped; see the server's log"))

    # The rest runs in the thread, which leaves the jobs to the event loop.

    def _live(self, load: Callable[[], Engine], leaving: Sequence["EngineWorker"]) -> None:
        failed = False
        try:
            self._load(load, leaving)
            self._work()
        except Exception as error:
            failed = self.state == "ready" or not isinstance(error, UserError)
            log.error("the engine's thread has ended: %s", error, exc_info=failed)
        with suppress(RuntimeError):  # the loop may have ended
            self.loop.call_soon_threadsafe(self._die, failed)

    def _load(self, load: Callable[[], Engine], leaving: Sequence["EngineWorker"]) -> None:
        for worker in leaving:
            worker.thread.join(MAX_STEP_SECONDS)
            del worker.engine  # who still sends one of its answers holds the worker
        gc.collect()  # an engine and its graphs refer to each other; or loading has failed before
        torch.accelerator.empty_cache()
        engine = load()
        if engine.device.type == "cuda":
            torch.cuda.set_device(engine.device)  # of this thread: another may have loaded it
        list(engine.stream([Request([engine.chat.bos], 2)]))  # warm-up
        self.engine, self.state = engine, "ready"
        self.loop.call_soon_threadsafe(self.settled.set)

    def _work(self) -> None:
        engine, tell, num_failures = self.engine, self.loop.call_soon_threadsafe, 0
        while True:
            while not engine.busy or not self.inbox.empty():
                if (order := self.inbox.get()) is None:
                    return
                order()
            self.step_began, num_prefilled = time.monotonic(), engine.slots.num_prefilled
            events: list[Event] = []
            try:
                events = engine.step()
                num_failures = 0
            except StepFailed as failure:
                num_failures += 1
                if num_failures == MAX_FAILURES:
                    raise
                log.exception("the model failed")
                tell(self.fail, failure.requests, ApiError(500, "the model failed"))
            finally:
                self.step_began = None
            self.metrics.prefilled.inc(engine.slots.num_prefilled - num_prefilled)
            tell(self._deliver, engine.started, list(engine.waiting), events)


@dataclass(eq=False)
class ServedModel:
    """A model that a server offers; loaded when first asked for."""

    name: str  # in the API
    kind: Literal["chat", "base"]
    max_len: int  # tokens of its context
    num_bytes: int  # that it takes when loaded: weights and slots
    load: Callable[[], Engine]  # raises UserError
    preloaded: Engine | None = None
    worker: EngineWorker | None = None
    used: float = 0.0  # when it was last asked for

    def open(self) -> Engine:
        """The engine, which then belongs to the caller alone."""
        engine, self.preloaded = self.preloaded, None
        return engine or self.load()

    @property
    def is_idle(self) -> bool:
        """Nobody would miss it: no jobs, and none about to come."""
        is_new = time.monotonic() - self.used < PREPARE_SECONDS
        return self.worker is not None and not self.worker.jobs and not is_new

    @property
    def engine(self) -> Engine:
        """ApiError unless it is loaded."""
        return self.choose_worker().engine

    def choose_worker(self) -> EngineWorker:
        """The worker; ApiError if it would not serve."""
        worker = self.worker
        if worker is None:
            text = f"{self.name} is not loaded; asking it something loads it"
            raise ApiError(503, text, "model_not_loaded", retry_after=1)
        if worker.state == "loading":
            raise ApiError(503, "the model is being loaded", "loading", retry_after=2)
        if not worker.ready:
            text = "the engine has stopped; restart the server"
            raise worker.error or ApiError(503, text, retry_after=30)
        return worker
