"""The web server's script: mistakes, slots, and a whole life up to SIGTERM amid a stream."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from nanochat.server import listen
from scripts.chat_web import Config, load_engines
from tests.models import refuses
from tests.serving import save_chat_model


def test_mistakes_are_told_and_slots_fit_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_chat_model(tmp_path, monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refuses(f"127.0.0.1:{port}: .*choose another --port", listen, "127.0.0.1", port)
    refuses("--num_gpus=2: there are 1", load_engines, Config(num_gpus=2, device_type="cpu"))
    refuses("lower --slots", load_engines, Config(slots=10**9, device_type="cpu"))
    (engine,), name = load_engines(Config(device_type="cpu"))
    assert (engine.num_slots, name) == (8, "nanochat-d2-sft")
    monkeypatch.setattr("scripts.chat_web.slots_that_fit", lambda model: 3)
    assert load_engines(Config(device_type="cpu"))[0][0].num_slots == 3


@pytest.mark.slow
def test_from_start_to_sigterm_amid_a_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_chat_model(tmp_path, monkeypatch, context=2048)
    monkeypatch.setenv("NANOCHAT_API_KEY", "sesame")
    command = [sys.executable, "-m", "scripts.chat_web", "--device_type=cpu", "--port=0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout
        assert server.stdout.readline().startswith("serving sft/d2 step ")
        lines = [server.stdout.readline(), server.stdout.readline()]
        assert "8 slots of 2048 tokens" in lines[0]
        (url,) = re.findall(r"chat at (http://127\.0\.0\.1:\d+),", lines[1])
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
                server.send_signal(signal.SIGTERM)
                rest = [line for line in events if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][len("data: ") :])["usage"]["completion_tokens"] > 0
        output = server.communicate(timeout=20)[0]
        assert server.returncode == -signal.SIGTERM and "my secret" not in output
    finally:
        server.kill()
        server.communicate()
