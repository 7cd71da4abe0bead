"""A file of requests answered without a server.

Oracles: the server's own answers to the same bodies; a batch that nobody stopped; the echo engine.
"""

import fcntl
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat.checkpoint import load_model
from nanochat.common import set_up
from nanochat.engine import Engine, Event
from nanochat.jobs import ServedModel
from scripts.chat_batch import Config, Line, answer_lines, main
from tests.launch import start
from tests.models import TOKENIZER, random_gpt, refuses, save_model
from tests.serving import EchoEngine, question, serving_models

BODIES: list[dict[str, Any]] = [
    question("hi") | {"seed": 1},
    question("several") | {"seed": 2, "n": 3, "max_tokens": 9, "logprobs": True},
    question("é") | {"seed": 3, "stop": ["e", "\n"], "temperature": 1.3, "stream": True},
    question("by name") | {"seed": 4, "model": "nanochat-d2-sft", "temperature": 0},
    {"prompt": ["plain", "text"], "seed": 5, "n": 2, "logprobs": 2, "echo": True},
    {"prompt": "scored alone", "max_tokens": 0, "echo": True},
    question("too hot") | {"temperature": 9},
    question("elsewhere") | {"model": "gpt-4"},
    question("too long" * 9),
    question("too many") | {"n": 99},
    question("tools") | {"tools": [{"type": "function"}]},
    question([{"type": "image_url", "text": "x"}]),
    {},
    {"messages": "hello"},
]
NUM_FINE = 6
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def url_of(body: dict[str, Any]) -> str:
    return TEXT if "prompt" in body else CHAT


def line(number: int, body: Any, **more: Any) -> str:
    return json.dumps(
        {"custom_id": f"no. {number}", "method": "POST", "url": url_of(body), "body": body} | more
    )


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The answers of a file by custom_id, without what differs each time."""
    answers = [json.loads(text) for text in path.read_text().splitlines()]
    for each in answers:
        each["response"]["body"] |= {"id": 0, "created": 0}
    assert len({each["custom_id"] for each in answers}) == len(answers)
    return {each["custom_id"]: each for each in answers}


@pytest.fixture
def cfg(base: Path, tmp_path: Path) -> Config:
    """Of a batch of BODIES, asked of a random model."""
    save_model(random_gpt(64, head_std=1.0), "sft", "d2", step=3)
    lines = [line(number, body) for number, body in enumerate(BODIES)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    files = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    return Config(input=files[0], output=files[1], slots=4, device_type="cpu", deterministic=True)


def test_each_line_has_what_the_server_answers(cfg: Config) -> None:
    with cfg.input.open("a") as file:
        file.write(f"{line(100, {}, url=['/v1/embeddings'])}\n\n{line(101, {}, method='GET')}")
        file.write("\n" + line(102, {}, custom_id="\ud800", url="/v1"))
    main(cfg)
    answers = read(cfg.output)
    model = load_model(cfg, set_up("cpu"))[0]
    engine = Engine(model, TOKENIZER, 4, deterministic=True)
    card = ServedModel("nanochat-d2-sft", "chat", engine.max_len, 1, EchoEngine, engine)
    with serving_models([card]) as server:
        for number, body in enumerate(BODIES):
            asked = {key: value for key, value in body.items() if key != "stream"}
            told = server.client.post(url_of(body), json=asked)
            said = answers.pop(f"no. {number}")
            assert said["response"]["status_code"] == told.status_code
            assert (told.status_code == 200) == (number < NUM_FINE)
            if told.status_code != 404:  # which tells of other models
                assert said["response"]["body"] == told.json() | {"id": 0, "created": 0}
            assert said["error"] is None and said["id"].startswith("batch_req_")
    for said in answers.values():
        assert said["response"]["status_code"] == 404 and said["response"]["body"]["error"]


def slowly() -> None:
    step = Engine.step

    def slow(self: Engine) -> list[Event]:
        time.sleep(0.02)
        return step(self)

    Engine.step = slow


@pytest.mark.slow
def test_a_batch_that_was_killed_goes_on(cfg: Config, base: Path) -> None:
    bodies = [
        question(f"{number} asks") | {"seed": number, "max_tokens": 12} for number in range(40)
    ]
    cfg.input.write_text("\n".join(map(line, range(40), bodies)))
    main(cfg)
    cfg.output.rename(cfg.output.with_suffix(".unbroken"))
    flags = [f"--input={cfg.input}", f"--output={cfg.output}", "--slots=4"]
    flags += ["--device_type=cpu", "--deterministic"]
    for num_before in (3, 20):
        batch = start(base, "chat_batch", flags, meddle=slowly)
        while not cfg.output.exists() or cfg.output.read_bytes().count(b"\n") < num_before:
            assert batch.processes[0].is_alive(), batch.log.read_text()
            time.sleep(0.01)
        batch.signal(signal.SIGKILL)
        assert batch.wait() == [-signal.SIGKILL]
        kept = cfg.output.read_text()
        assert num_before <= kept.count("\n") < 40
        with cfg.output.open("a") as file:
            file.write('{"id": "batch_req_12')  # a full disk leaves such an end
    main(cfg)
    assert cfg.output.read_text().startswith(kept)
    assert read(cfg.output) == read(cfg.output.with_suffix(".unbroken"))
    now = cfg.output.read_text()
    main(cfg)  # with nothing left to do
    assert cfg.output.read_text() == now


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(cfg: Config, base: Path) -> None:
    lines = (line(number, question("hi") | {"seed": number}) for number in range(999))
    cfg.input.write_text("\n".join(lines))
    flags = [f"--input={cfg.input}", f"--output={cfg.output}", "--device_type=cpu"]
    batch = start(base, "chat_batch", flags, meddle=slowly)
    batch.wait_for("999 requests")
    batch.signal(signal.SIGINT)
    assert batch.wait() == [130]
    said = batch.log.read_text().splitlines()
    assert said[1:] == ["interrupted; run the same command again"]


def test_files_that_cannot_be_meant_are_refused(cfg: Config) -> None:
    fine = line(1, BODIES[0])
    for text, told in (
        (f"{fine}\n{{'custom_id': 2}}", "in.jsonl, line 2: not JSON"),
        (f"{fine}\n[]", "line 2: custom_id None is not a string"),
        (f"{fine}\n{line(2, {}, custom_id=2)}", "line 2: custom_id 2 is not a string"),
        (f"{fine}\n{line(2, {})}\n{line(1, {})}", "line 3: custom_id 'no. 1' .*occurs twice"),
    ):
        cfg.input.write_text(text)
        refuses(told, main, cfg)
        assert cfg.output.read_text() == ""
    for text in ('{"id": "batch_req_1", garbage\n', '{"id": "batch_req_\\uFFF"}\n'):
        cfg.output.write_text(text)
        refuses("out.jsonl, line 1: not an answer", main, cfg)
    cfg.output.unlink()
    cfg.input.write_text(fine)
    main(cfg)
    before = cfg.output.read_text()
    cfg.input.write_text(f"{fine.replace('hi', 'ho')}\n{line(2, BODIES[0])}")
    refuses("out.jsonl answers lines that .*in.jsonl lacks.*choose another --output", main, cfg)
    save_model(random_gpt(64, head_std=2.0), "sft", "d2", step=4)
    cfg.input.write_text(fine)
    refuses("or as another model; choose", main, cfg)
    assert cfg.output.read_text() == before
    with cfg.output.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refuses("another batch writes .*out.jsonl", main, cfg)
    cfg.output = cfg.input
    refuses("in.jsonl, line 1: not an answer; choose another --output", main, cfg)
    assert cfg.input.read_text() == fine


def test_the_slots_stay_full_and_few_lines_are_read_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, num_steps, num_tokens, num_read, num_said = EchoEngine(num_slots=4), 0, 0, 0, 0
    make_step = engine.step

    def step() -> list[Event]:
        nonlocal num_steps
        num_steps += 1
        return make_step()

    def lines() -> Iterator[Line]:
        nonlocal num_read
        for number in range(200):
            num_read += 1
            body = question("x" * (number % 7)) if number % 5 else {}
            yield Line(str(number), json.loads(line(number, body)))

    monkeypatch.setattr(engine, "step", step)
    for said in answer_lines(engine, "echo", lines()):
        num_said += 1
        assert num_read - num_said <= 2 * engine.num_slots
        if said["response"]["status_code"] == 200:
            number = int(said["custom_id"].removeprefix("no. "))
            body = said["response"]["body"]
            assert body["choices"][0]["message"]["content"] == "x" * (number % 7)
            num_tokens += body["usage"]["completion_tokens"]
    assert num_said == 200 and not engine.busy
    assert num_steps <= 1.1 * num_tokens / engine.num_slots
