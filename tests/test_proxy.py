"""The configuration in dev/proxy.md, tried: nginx before two servers, on loopback ports."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from nanochat.chat_api import ServerConfig
from tests.launch import FORK, free_port
from tests.serving import EchoEngine, Stream, question, serving

NGINX = shutil.which("nginx")
PAGE = Path(__file__).resolve().parent.parent / "dev/proxy.md"
COMPLETIONS = "v1/chat/completions"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="no nginx; run `apt-get install nginx-light`"),
]


@contextmanager
def proxy(folder: Path, *ports: int) -> Iterator[httpx.Client]:
    """A client of nginx, which runs the page's configuration before servers on these ports."""
    (config,) = re.findall("```nginx\n(.*?)```", PAGE.read_text(), re.DOTALL)
    own = free_port()
    for number, port in enumerate(ports, 1):
        config = config.replace(f"10.0.0.{number}:8000", f"127.0.0.1:{port}")
    config = config.replace("listen 8080", f"listen 127.0.0.1:{own}")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/log;\n"
        f"events {{}}\nhttp {{ access_log off; {paths}{config}}}"
    )
    nginx = subprocess.Popen([str(NGINX), "-e", f"{folder}/log", "-c", f"{folder}/nginx.conf"])
    try:
        limits = httpx.Limits()
        url = f"http://127.0.0.1:{own}/chat/"
        with httpx.Client(base_url=url, timeout=20, verify=False, limits=limits) as client:
            until_status(client, "ready", 200)
            yield client
    finally:
        nginx.kill()
        nginx.wait()


def until_status(client: httpx.Client, path: str, status: int) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            if client.get(path).status_code == status:
                return
        except httpx.ConnectError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"{path} never was {status}")


def test_streams_come_through_at_once_and_so_does_the_page(tmp_path: Path) -> None:
    engine = EchoEngine()
    with serving([engine]) as server, proxy(tmp_path, server.address[1], free_port()) as client:
        page = client.get("")
        addresses = re.findall(r'(?:src|href)="(ui/[^"]+)"', page.text)
        assert len(addresses) > 3
        assert {client.get(address).status_code for address in addresses} == {200}
        redirect = client.get(str(client.base_url).rstrip("/"))
        assert (redirect.status_code, redirect.headers["location"]) == (301, "/chat/")
        body = question("hello, you there") | {"stream": True}
        with client.stream("POST", COMPLETIONS, json=body) as response:
            lines = response.iter_lines()
            while '"content":"h"' not in next(lines):
                pass
            engine.go.clear()  # what came before is here, though no more will come
            assert response.status_code == 200
            engine.go.set()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        too_large = client.post(COMPLETIONS, json=question("x" * 1_200_000))
        assert too_large.json()["error"]["code"] == "request_too_large"
        engine.pace = 0.01
        with client.stream("POST", COMPLETIONS, json=question("x" * 99) | {"stream": True}):
            server.until(lambda: bool(engine.running))
        server.until(lambda: len(engine.cancelled) == 1)  # who leaves nginx leaves the server


def be_a_server(port: int) -> None:
    with serving([EchoEngine(pace=0.005)], ServerConfig(queue=64), port=port):
        time.sleep(60)


def test_one_machine_is_killed_and_the_other_answers(tmp_path: Path) -> None:
    ports = free_port(), free_port()
    servers = [FORK.Process(target=be_a_server, args=(port,)) for port in ports]
    for server in servers:
        server.start()
    try:
        for port in ports:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as direct:
                until_status(direct, "ready", 200)
        with proxy(tmp_path, *ports) as client, ThreadPoolExecutor(60) as pool:

            def ask(number: int) -> str:
                """whole, broken (a stream), or the error's code."""
                text, is_stream = f"client {number} asks", number % 2 == 0
                try:
                    answer = client.post(COMPLETIONS, json=question(text) | {"stream": is_stream})
                except httpx.RemoteProtocolError:
                    assert is_stream
                    return "broken"
                assert answer.status_code == 200, answer.text
                if is_stream:
                    assert (Stream(answer).text(), Stream(answer).num_done) == (text, 1)
                else:
                    assert answer.json()["choices"][0]["message"]["content"] == text
                return "whole"

            asked = [pool.submit(ask, number) for number in range(60)]
            while sum(each.done() for each in asked) < 10:
                time.sleep(0.01)
            servers[0].kill()
            ends = [each.result() for each in asked]
            assert 0 < ends.count("broken") < 30  # only streams that had begun there
            assert {ask(number) for number in range(10)} == {"whole"}
            servers[1].kill()
            servers[1].join()
            away = client.post(COMPLETIONS, json=question("a"))
            assert away.status_code == 503 and away.headers["retry-after"] == "5"
            assert set(away.json()["error"]) == {"message", "type", "param", "code"}
    finally:
        for server in servers:
            server.kill()
            server.join()


def test_who_comes_while_a_machine_shuts_down_is_answered_by_the_other(tmp_path: Path) -> None:
    engines = EchoEngine(), EchoEngine()
    with serving([engines[0]]) as leaving, serving([engines[1]]) as staying:
        ports = leaving.address[1], staying.address[1]
        with proxy(tmp_path, *ports) as client, ThreadPoolExecutor(1) as pool:
            engines[0].go.clear()
            stream = pool.submit(leaving.stream, "at work")
            leaving.until(lambda: leaving.num_jobs() == 1)
            leaving.server.should_exit = True
            leaving.until(lambda: leaving.client.get("/ready").status_code == 503)
            for number in range(10):
                answer = client.post(COMPLETIONS, json=question(str(number)))
                assert answer.json()["choices"][0]["message"]["content"] == str(number)
            engines[0].go.set()
            assert stream.result().text() == "at work"
