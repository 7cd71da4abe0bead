"""A hub of data sets on the loopback address: as much of one as hf_hub_download asks for, with faults on demand."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["", "cut", "longer", "error"]  # a transfer cut in the middle, a wrong length, a 500


class Hub(ThreadingHTTPServer):
    """Serves `files` of the data set `repo`; `fault` says what befalls the n-th download, from 0."""

    def __init__(
        self, repo: str, files: dict[str, bytes], fault: Callable[[int], Fault] = lambda _: ""
    ) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repo, self.files, self.fault = repo, files, fault
        self.gets: list[tuple[str, str]] = []  # (file, range asked for)
        self.address = f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def serving(self) -> Iterator["Hub"]:
        """The hub, answering until the end of the block."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield self
        self.shutdown()
        thread.join()
        self.server_close()


class HubHandler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub = self.server
        name = self.path.rsplit("/", 1)[-1]
        data = hub.files.get(name)
        if data is None or self.path != f"/datasets/{hub.repo}/resolve/main/{name}":
            self.refuse(404)
            return
        asked = self.headers.get("Range", "")
        fault = ""
        if body:
            fault = hub.fault(len(hub.gets))
            hub.gets.append((name, asked))
        if fault == "error":
            self.refuse(500)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start + 7 * (fault == "longer")))
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        if body:
            self.wfile.write(data[start : len(data) // 2 if fault == "cut" else None])
            self.close_connection = True

    def refuse(self, status: int) -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
