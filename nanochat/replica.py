"""An engine in a thread of its own, and the queues between it and the event loop.

The thread owns the engine and all of torch. The event loop sends it orders (submit, cancel) through an inbox, and
gets the events of each step back in one call. Who waits for what, and since when, lives on the event loop alone
and needs no lock. Both ways are bounded: `submit` refuses what finds no place, and a job whose reader falls too far
behind fails.

What would surprise: a step that fails costs the jobs that it concerns, and the engine goes on; but after several in
a row, or any error of the engine itself, the thread gives up: every job is told, and the server is not ready again.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import islice
from queue import SimpleQueue

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from nanochat.api import ApiError
from nanochat.engine import Engine, StepFailed
from nanochat.flight import Event, Request

MAX_UNREAD = 512  # events of one choice that its reader may be behind
MAX_FAILURES = 8  # steps in a row that may fail before the engine counts as dead
MAX_STEP_SECONDS = 120.0  # a longer step counts as hung; the first ones on a GPU compile
SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

log = logging.getLogger("uvicorn.error")  # the one that a server shows


class Metrics:
    """What /metrics tells; vLLM's names after `nanochat_`, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        ProcessCollector(registry=own)  # memory, CPU time
        self.running = Gauge("nanochat_num_requests_running", "In a slot", registry=own)
        self.waiting = Gauge("nanochat_num_requests_waiting", "In the queue", registry=own)
        self.step_age = Gauge("nanochat_engine_step_age_seconds", "Longest under way", registry=own)
        self.prompt_tokens = Counter("nanochat_prompt_tokens", "Tokens of prompts", registry=own)
        self.tokens = Counter("nanochat_generation_tokens", "Tokens generated", registry=own)
        self.ended = Counter("nanochat_request_success", "Ended", ["finished_reason"], registry=own)
        self.refused = Counter("nanochat_requests_refused", "Refused", ["code"], registry=own)
        self.queued = Histogram(
            "nanochat_request_queue_time_seconds", "In the queue", buckets=LONG, registry=own
        )
        self.first = Histogram(
            "nanochat_time_to_first_token_seconds", "Since it came", buckets=LONG, registry=own
        )
        self.between = Histogram(
            "nanochat_inter_token_latency_seconds", "Between two", buckets=SHORT, registry=own
        )


class Job:
    """The engine requests of one HTTP request, one per choice, and the way back for their events."""

    def __init__(self, requests: Sequence[Request], seconds: float) -> None:
        self.requests = requests
        self.unread: list[Event] = []
        self.error: ApiError | None = None
        self.news = asyncio.Event()
        self.arrived = time.monotonic()
        self.deadline = self.arrived + seconds
        self.begun = 0.0  # when it left the queue
        self.first = self.last = 0.0  # when its first and its newest token came

    async def read(self, seconds: float) -> list[Event]:
        """What came since the last call; [] when nothing comes for `seconds`.

        Raises ApiError when the job has failed or its time is over.
        """
        if (left := self.deadline - time.monotonic()) <= 0:
            raise ApiError(503, "the answer takes too long", "timeout", retry_after=10)
        with suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, left)):
                await self.news.wait()
        self.news.clear()
        if self.error:
            raise self.error
        events, self.unread = self.unread, []
        return events


class Replica:
    """One engine and everything in flight on it."""

    def __init__(self, engine: Engine, metrics: Metrics, max_waiting: int) -> None:
        self.engine, self.metrics = engine, metrics
        self.capacity = engine.num_slots + max_waiting
        self.state = "loading"  # then ready, at the end dead
        self.in_flight: dict[Request, Job] = {}  # in order of arrival; the event loop's
        self.inbox: SimpleQueue[tuple[Callable[[Request], None], Request] | None] = SimpleQueue()
        self.step_began: float | None = None
        self.thread = threading.Thread(target=self._live, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread; called on the event loop."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        """Let the thread end after its present step."""
        self.inbox.put(None)
        self.thread.join(timeout=5)

    @property
    def step_age(self) -> float:
        """Seconds that the step under way has taken so far."""
        return 0.0 if (began := self.step_began) is None else time.monotonic() - began

    @property
    def ready(self) -> bool:
        """True where a request would be served."""
        return self.state == "ready" and self.step_age < MAX_STEP_SECONDS

    def submit(self, job: Job) -> None:
        """Take the job on. Raises ApiError when slots and queue are full."""
        if len(self.in_flight) + len(job.requests) > self.capacity:
            text = "all slots and the queue are full; try again soon"
            raise ApiError(429, text, "queue_full", retry_after=1)
        for request in job.requests:
            self.in_flight[request] = job
            self.inbox.put((self.engine.submit, request))
        self.metrics.prompt_tokens.inc(len(job.requests[0].prompt))
        self._note_begun()

    def cancel(self, requests: Iterable[Request], reason: str = "abort") -> None:
        """Forget those of `requests` that are still in flight."""
        for request in requests:
            if self.in_flight.pop(request, None):
                self.inbox.put((self.engine.cancel, request))
                self.metrics.ended.labels(reason).inc()
        self._note_begun()

    def fail(self, requests: Iterable[Request], error: ApiError) -> None:
        """Tell the jobs of `requests` that they have failed, and forget them."""
        for request in requests:
            if job := self.in_flight.get(request):
                job.error = error
                job.news.set()
                self.cancel(job.requests, "error")

    def place(self, job: Job) -> int:
        """The job's place in the queue, from 1; 0 once it has left it."""
        first = job.requests[0]
        if job.begun or first not in self.in_flight:
            return 0
        return list(self.in_flight).index(first) - self.engine.num_slots + 1

    def _note_begun(self) -> None:
        """Note who has left the queue: first come, first served, so the oldest have the slots."""
        for job in islice(self.in_flight.values(), self.engine.num_slots):
            if not job.begun:
                job.begun = time.monotonic()
                self.metrics.queued.observe(job.begun - job.arrived)

    def _deliver(self, events: Sequence[Event]) -> None:
        now = time.monotonic()
        for event in events:
            if (job := self.in_flight.get(event.request)) is None:
                continue  # cancelled since
            since = self.metrics.between if job.first else self.metrics.first
            since.observe(now - (job.last or job.arrived))
            job.first, job.last = job.first or now, now
            self.metrics.tokens.inc()
            if event.finish:
                del self.in_flight[event.request]
                self.metrics.ended.labels(event.finish).inc()
                self._note_begun()
            job.unread.append(event)
            job.news.set()
            if len(job.unread) > MAX_UNREAD * len(job.requests):
                self.fail(job.requests, ApiError(503, "the client reads too slowly", "slow_reader"))

    def _die(self) -> None:
        self.state = "dead"
        self.fail(
            list(self.in_flight), ApiError(500, "the engine has stopped; see the server's log")
        )

    # From here on: the thread.

    def _tell(self, action: Callable[..., object], *arguments: object) -> None:
        """Let the event loop do `action`."""
        self.loop.call_soon_threadsafe(action, *arguments)

    def _live(self) -> None:
        try:
            if self.engine.device.type == "cuda":
                torch.cuda.set_device(self.engine.device)
            self.engine.submit(Request([self.engine.chat.bos], 2))  # warm-up
            while self.engine.busy:
                self.engine.step()
            self._tell(setattr, self, "state", "ready")
            self._work()
        except Exception:
            log.exception("the engine's thread has ended")
        self._tell(self._die)

    def _work(self) -> None:
        num_failures = 0
        while True:
            while not self.engine.busy or not self.inbox.empty():
                if (order := self.inbox.get()) is None:
                    return
                action, request = order
                action(request)
            self.step_began = time.monotonic()
            try:
                if events := self.engine.step():
                    self._tell(self._deliver, events)
                num_failures = 0
            except StepFailed as failure:
                num_failures += 1
                if num_failures == MAX_FAILURES:
                    raise
                log.exception("the model failed")
                self._tell(self.fail, failure.requests, ApiError(500, "the model failed"))
            finally:
                self.step_began = None
