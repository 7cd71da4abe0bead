"""Several processes behind one listener, one per GPU: threads would share one interpreter's lock.

All accept connections from one socket, which they inherit: with one of its own (SO_REUSEPORT) a
process that dies takes those along that wait for it, and one that is busy gets as many as the rest.
What a process counts lies in files that prometheus_client adds up.
"""

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection

from prometheus_client.multiprocess import mark_process_dead

from nanochat.common import UserError, print0

MAX_STARTS = 3  # of a successor, before the server gives up
POLL_SECONDS = 0.2  # after which a signal is seen
# serve(ready) serves until a signal; it calls ready() once it would answer.
Serve = Callable[[Callable[[], None]], None]


def supervise(serve: Serve, num_replicas: int, drain_seconds: float) -> None:
    """Run `serve` in `num_replicas` processes until SIGTERM or Ctrl-C, replacing those that die.

    The end reaches them as SIGTERM, and those that are left after `drain_seconds` or a second
    signal are killed. Raises UserError if a process cannot start.
    """
    seen: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda got, _: seen.append(got))
    with tempfile.TemporaryDirectory(prefix="nanochat-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        replicas: list[Replica] = []
        try:
            replicas += [Replica(serve, index) for index in range(num_replicas)]
            while not seen:
                for each in replicas:
                    each.replace_if_dead()
                connection.wait([each.process.sentinel for each in replicas], POLL_SECONDS)
        finally:
            stop(replicas, seen, drain_seconds)
    signal.signal(seen[0], signal.SIG_DFL)
    signal.raise_signal(seen[0])  # to end as one process would


def stop(replicas: "list[Replica]", seen: list[int], drain_seconds: float) -> None:
    processes, end = [each.process for each in replicas], time.monotonic() + drain_seconds
    for process in processes:
        process.terminate()
    while processes and len(seen) < 2 and time.monotonic() < end:
        connection.wait([process.sentinel for process in processes], POLL_SECONDS)
        processes = [process for process in processes if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()


class Replica:
    """The process number `index`, and its successors."""

    def __init__(self, serve: Serve, index: int) -> None:
        self.serve, self.index = serve, index
        self.num_failures = MAX_STARTS - 1  # in a row; the first start must do
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.news, told = context.Pipe(duplex=False)
        args = (self.serve, self.index, told)
        self.process = context.Process(target=live, args=args, daemon=True)
        # Inherited until `live`: a Ctrl-C amid the imports would print a traceback. Starting the
        # tracker, as the first process would, unblocks it.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        self.process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        told.close()

    def replace_if_dead(self) -> None:
        """Raises UserError, with what it said, if it has failed to start too often."""
        process, said = self.process, None
        if process.is_alive():
            return
        try:
            said = self.news.recv()
        except EOFError:
            said = f"a server process ended with status {process.exitcode} at its start; see above"
        self.num_failures = self.num_failures + 1 if said else 0
        if self.num_failures == MAX_STARTS:
            raise UserError(said)
        print0(f"process {self.index} has ended with status {process.exitcode}; another starts")
        mark_process_dead(process.pid)
        self.news.close()
        process.close()
        self._start()


def live(serve: Serve, index: int, told: Connection) -> None:
    """What a process does: `told` gets "" once it would answer, or why it cannot."""
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index)}  # one prints; each has its GPU
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        serve(lambda: told.send(""))
    except UserError as error:
        told.send(str(error))
    except KeyboardInterrupt:
        pass
    os._exit(1)  # a thread that hangs in an engine would hold up a regular end


def end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
