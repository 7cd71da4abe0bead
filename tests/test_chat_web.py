"""The web server's script: mistakes, slots, and a whole life up to SIGTERM amid a stream."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest

from nanochat.common import TIME_IS_UP, free_memory, set_up
from nanochat.server import listen
from scripts.chat_web import Config, main, offer
from tests.models import random_gpt, refuses, save_model
from tests.serving import save_chat_model


def test_mistakes_are_told_and_what_is_offered_fits_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_chat_model(tmp_path, monkeypatch)
    for stage, tag in (("base", "d2"), ("rl", "d2"), ("sft", "other")):
        save_model(random_gpt(64), stage, tag, step=3)
    runtime = set_up("cpu")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refuses(f"127.0.0.1:{port}: .*choose another --port", listen, "127.0.0.1", port)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    refuses("--replicas=2: more than the 1 GPUs", main, Config(replicas=2))
    shared = Mock()
    monkeypatch.setattr("scripts.chat_web.supervise", shared)
    main(Config(device_type="cpu", port=0, replicas=4))  # each may take its share of what is free
    chosen, listener = shared.call_args.args[0].args
    listener.close()
    assert 0.1 < chosen.memory * 2**30 / free_memory(runtime.device) < 0.3
    refuses("lower --slots or raise", offer, Config(model_tag="d2", slots=10**9), runtime)
    refuses("lower --slots or raise", offer, Config(model_tag="d2", memory=1e-6), runtime)
    models, memory = offer(Config(model_tag="d2"), runtime)
    names = ["nanochat-d2-sft", "nanochat-d2-base", "nanochat-d2-rl"]
    assert [model.name for model in models] == names
    assert [model.kind for model in models] == ["chat", "base", "chat"]
    assert models[0].preloaded and models[0].preloaded.num_slots == 8
    weights = (tmp_path / "sft/d2/step_000003/model.safetensors").stat().st_size
    slots = models[0].preloaded.slots.cache.num_bytes
    assert all(model.num_bytes == weights + slots for model in models) and memory > 2**20
    (tmp_path / "rl/d2/step_000003/state.json").write_text("{")
    small = Config("base", "d2", models="all", memory=(weights + slots * 3 / 8) / 2**30)
    models, _ = offer(small, runtime)
    assert [model.name for model in models] == [names[1], names[0], "nanochat-other-sft"]
    assert models[0].preloaded and models[0].preloaded.num_slots == 3
    assert "rl/d2 is not offered" in capsys.readouterr().out


@contextmanager
def started(*flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(the script on a free port of this CPU, its address), until the block ends."""
    command = [sys.executable, "-m", "scripts.chat_web", "--device_type=cpu", "--port=0", *flags]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        assert server.stdout
        said = []
        while not said or not said[-1].startswith("chat at"):
            said.append(server.stdout.readline())
            assert said[-1], said
        assert any(line.startswith("serving sft/d2 step 3, 8 slots of 2048 tok") for line in said)
        yield server, said[-1].split()[2].rstrip(",")
    finally:
        server.kill()
        print(server.communicate()[0])  # shown where a test fails


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGUSR1, TIME_IS_UP)]
)
def test_from_start_to_the_end_amid_a_stream(
    number: signal.Signals, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_chat_model(tmp_path, monkeypatch, context=2048)
    monkeypatch.setenv("NANOCHAT_API_KEY", "sesame")
    with started() as (server, url):
        body = {"messages": [{"role": "user", "content": "my secret"}], "max_tokens": 1000}
        with httpx.Client(base_url=url, timeout=60) as client:
            while client.get("/ready").status_code == 503:
                time.sleep(0.05)
            assert client.get("/v1/models").status_code == 401
            client.headers["authorization"] = "Bearer sesame"
            model = client.get("/v1/models").json()["data"][0]["id"]
            body |= {"model": model, "stream": True, "stream_options": {"include_usage": True}}
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                events = response.iter_lines()
                assert '"role":"assistant"' in next(events)
                server.send_signal(number)
                rest = [line for line in events if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][len("data: ") :])["usage"]["completion_tokens"] > 0
        output = server.communicate(timeout=20)[0]
        assert server.returncode == status and "my secret" not in output


LONG = {
    "messages": [{"role": "user", "content": "a"}],
    "temperature": 0,
    "max_tokens": 1500,
    "stream": True,
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--replicas=2",)])
def test_a_second_ctrl_c_ends_it_at_once(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_chat_model(tmp_path, monkeypatch, context=2048)
    with started(*flags) as (server, url), httpx.Client(base_url=url, timeout=60) as http:
        with http.stream("POST", "/v1/chat/completions", json=LONG) as response:
            lines = response.iter_lines()
            assert "assistant" in next(lines)
            for _ in range(2):
                time.sleep(0.3)
                os.killpg(server.pid, signal.SIGINT)  # as a terminal does
            with pytest.raises(httpx.TransportError):
                list(lines)
        assert server.wait(10) == -signal.SIGINT
        assert server.stdout and "Traceback" not in server.stdout.read()


def owner(response: httpx.Response, parent: int) -> int:
    """The process, a child of `parent`, that has the other end of the connection."""
    stream = response.extensions["network_stream"]
    ours, theirs = (stream.get_extra_info(end)[1] for end in ("client_addr", "server_addr"))
    ends = f":{theirs:04X} 0100007F:{ours:04X} "
    lines = Path("/proc/net/tcp").read_text().splitlines()
    (inode,) = {line.split()[9] for line in lines if ends in line}  # read while it changes
    for process in replicas(parent):
        for file in Path(f"/proc/{process}/fd").iterdir():
            if file.is_symlink() and str(file.readlink()) == f"socket:[{inode}]":
                return process
    raise AssertionError("nobody's")


def replicas(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    found = list[int]()
    for child in children:
        with suppress(OSError):  # it has ended since
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_replica_that_dies_is_replaced_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_chat_model(tmp_path, monkeypatch, context=2048)
    with started("--replicas=2") as (server, url), httpx.Client(base_url=url, timeout=60) as http:

        def answer() -> int:
            """How often a connection broke before the answer; clients' libraries try again, too."""
            body = LONG | {"max_tokens": 3, "stream": False}
            headers = {"connection": "close"}  # a new one, to any process
            for num_broken in range(3):
                try:
                    response = http.post("/v1/chat/completions", json=body, headers=headers)
                except httpx.TransportError as error:
                    print(f"{time.time():.3f} {error!r}, {replicas(server.pid)} live")
                else:
                    assert response.json()["usage"]["completion_tokens"] == 3
                    return num_broken
            raise AssertionError("not answered")

        def until_both_answer() -> list[int]:
            """Their process ids."""
            seen = set[int]()
            with ExitStack() as clients:  # kept open: the next goes to the other one
                while len(seen) < 2:
                    client = clients.enter_context(httpx.Client(timeout=60))
                    response = clients.enter_context(client.stream("GET", f"{url}/ready"))
                    if response.status_code == 200:
                        seen.add(owner(response, server.pid))
            return sorted(seen)

        victim, other = until_both_answer()
        with ExitStack() as streams:
            owners, lines = list[int](), iter(list[str]())
            while victim not in owners:
                stream = http.stream("POST", "/v1/chat/completions", json=LONG)
                response = streams.enter_context(stream)
                lines = response.iter_lines()
                assert "assistant" in next(lines)
                owners.append(owner(response, server.pid))
            os.kill(victim, signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                list(lines)
            print(f"{time.time():.3f} {victim} of {owners} is dead")
            assert sum(answer() for _ in range(20)) <= 1
        last = until_both_answer()
        assert other in last and victim not in last
        lines = http.get("/metrics").text.splitlines()
        assert 'nanochat_request_success_total{finished_reason="length"} 20.0' in lines
        with ExitStack() as streams:
            responses = [
                streams.enter_context(http.stream("POST", "/v1/chat/completions", json=LONG))
                for _ in range(4)
            ]
            server.send_signal(signal.SIGTERM)
            for response in responses:
                assert response.read().endswith(b"data: [DONE]\n\n")
        assert server.wait(30) == -signal.SIGTERM
        assert not any(Path(f"/proc/{process}").exists() for process in last)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_amid_the_imports_of_replicas_ends_them(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "scripts.chat_web", "--device_type=cpu", "--replicas=2"]
    server = subprocess.Popen(
        [*command, "--port=0"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while len(replicas(server.pid)) < 2:
            assert server.poll() is None
            time.sleep(0.01)
        os.killpg(server.pid, number)
        assert server.communicate(timeout=60)[1] == ""
        assert server.returncode == -number
    finally:
        server.kill()


@pytest.mark.slow
def test_replicas_that_cannot_start_end_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_chat_model(tmp_path, monkeypatch)
    with (tmp_path / "sft/d2/step_000003/model.safetensors").open("ab") as weights:
        weights.write(b"0")
    command = [sys.executable, "-m", "scripts.chat_web", "--device_type=cpu", "--replicas=2"]
    ended = subprocess.run([*command, "--port=0"], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert ended.stderr.count("is damaged") == ended.stderr.count("error: ") == 1
