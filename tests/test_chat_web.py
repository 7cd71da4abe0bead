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

from nanochat.common import set_up
from nanochat.server import listen
from scripts.chat_web import Config, offer
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
        line = server.stdout.readline()
        assert line.startswith("serving sft/d2 step 3, 8 slots of 2048 tokens")
        (url,) = re.findall(r"chat at (http://127\.0\.0\.1:\d+),", server.stdout.readline())
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
