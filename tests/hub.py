"""A hub of data sets on the loopback address, for snapshot_download, with faults on demand."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["", "cut", "longer", "error"]  # a transfer cut half-way, a wrong length, a 500


class Hub(ThreadingHTTPServer):
    """Serves `files` of the data set `repo`; `fault` says what befalls the n-th download."""

    def __init__(
        self, repo: str, files: dict[str, bytes], fault: Callable[[int], Fault] = lambda _: ""
    ) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repo, self.files, self.fault = repo, files, fault
        self.gets: list[tuple[str, str]] = []  # (file, range asked for)
        self.revision = "0" * 40  # a new one when `files` change: the client keeps what it was told
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
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        api = f"/api/datasets/{hub.repo}"
        if path == api:
            self.send(200, json.dumps({"id": hub.repo, "sha": hub.revision}).encode())
        elif path == f"{api}/tree/{hub.revision}":
            sizes = {name: len(data) for name, data in hub.files.items()}
            tree = [{"type": "file", "path": n, "size": sizes[n], "oid": n} for n in sizes]
            self.send(200, json.dumps(tree).encode())
        elif path == f"/datasets/{hub.repo}/resolve/{hub.revision}/{name}" and name in hub.files:
            self.send_file(name, hub.files[name])
        else:
            self.send(404)

    def send_file(self, name: str, data: bytes) -> None:
        hub, asked, fault = self.server, self.headers.get("Range", ""), ""
        if self.command == "GET":
            fault = hub.fault(len(hub.gets))
            hub.gets.append((name, asked))
        if fault == "error":
            self.send(500)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": hub.revision}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        headers["Content-Length"] = str(len(data) - start + 7 * (fault == "longer"))
        sent = data[start : len(data) // 2 if fault == "cut" else None]
        self.send(206 if asked else 200, sent, headers)
        self.close_connection = True

    def send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
