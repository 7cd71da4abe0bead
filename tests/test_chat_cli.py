"""The terminal chat: the rolling window, tool calls on the screen, commands, and whole sessions.

Sessions are piped through standard input, or typed key by key into prompt_toolkit's pipe.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from nanochat.common import Source
from nanochat.engine import Engine, Event, Request
from nanochat.tokenizer import check_conversation, render_prompt
from scripts.chat_cli import HELP, Config, answer, fit_window, main, obey, questions, show
from tests.models import TOKENIZER, random_gpt, refuses
from tests.serving import save_chat_model

CONTEXT = 64


def random_engine() -> Engine:
    model = random_gpt(CONTEXT)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    return Engine(model, TOKENIZER, num_slots=1)


def talk(*lengths: int) -> list[dict[str, Any]]:
    """A conversation of messages with so many characters, the user's first."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": "x" * n} for i, n in enumerate(lengths)]


def test_the_window_forgets_the_oldest_turns_only() -> None:
    messages = talk(20, 10, 20, 10, 5)
    prompt, num_left = fit_window(TOKENIZER, messages, 50)
    assert num_left == 2 and len(prompt) <= 50
    assert prompt == render_prompt(TOKENIZER, {"messages": messages[2:]})
    assert fit_window(TOKENIZER, talk(20), 50)[1] == 0


def test_a_message_that_is_too_long_alone_is_refused() -> None:
    """A byte is a token here; a question has four marks around it, a page has one before it."""
    for is_base, most in ((False, 26), (True, 29)):
        assert len(fit_window(TOKENIZER, talk(9, 9, most), 30, is_base)[0]) == 30
        told = f"your message has {most + 1} tokens, and {most} fit"
        refuses(told, fit_window, TOKENIZER, talk(9, 9, most + 1), 30, is_base)


@pytest.mark.parametrize("source", ["sft", "base"])
def test_five_contexts_never_crash(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    """A random model says anything, special tokens included, to messages of any length."""
    engine, messages = random_engine(), list[dict[str, Any]]()
    lengths = [20, 7, 1, 20, 13, 20, 20, 2 * CONTEXT, 15, 20]
    for turn, length in enumerate(lengths):
        question = {"role": "user", "content": "é" * length}  # two tokens each
        cfg = Config(source=source, max_tokens=40, temperature=2.0, seed=turn)
        if length > CONTEXT:
            before = list(messages)
            refuses("your message has", answer, engine, cfg, messages, question["content"])
            assert messages == before
            continue
        answer(engine, cfg, messages, question["content"])
        assert messages[-2] == question
    printed = capsys.readouterr()
    assert len(printed.out) > 100
    assert ("(too long for 64 tokens: left out the oldest" in printed.err) == (source == "sft")


def test_tool_calls_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    request = Request([0], 1)
    for text, tool in (("It is ", None), ("", ("1+1", "2")), (" two.", None), ("", ("1/0", None))):
        show(Event(request, 0, 1, text, tool))
    assert capsys.readouterr().out == "It is [1+1 = 2] two.[1/0]"


def test_ctrl_c_keeps_what_was_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = random_engine()
    step, num_steps = engine.step, 0

    def interrupted() -> list[Event]:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    messages = list[dict[str, Any]]()
    answer(engine, Config(max_tokens=30, temperature=2.0, seed=1), messages, "hello")
    assert num_steps == 3 and [message["role"] for message in messages] == ["user", "assistant"]
    monkeypatch.undo()
    answer(engine, Config(max_tokens=5), messages, "and now?")
    assert len(messages) == 4 and capsys.readouterr().out.count("\n") >= 2


def test_commands(tmp_path: Path) -> None:
    cfg, messages = Config(), talk(3, 2)
    saved = tmp_path / "my chats.jsonl"
    assert "2 messages" in obey(f"/save '{saved}'", cfg, messages)
    assert json.loads(saved.read_text()) == {"messages": messages}
    check_conversation(json.loads(saved.read_text()))
    assert obey("/save /proc/nowhere/file", cfg, messages).startswith("/save /proc/nowhere/file: ")
    assert "1.5" in obey("/temperature 1.5", cfg, messages) and cfg.temperature == 1.5
    for wrong in ("/temperature hot", "/save 'half", "/temperature 1,5"):
        assert obey(wrong, cfg, messages).startswith(wrong + ": ") and cfg.temperature == 1.5
    for unknown in ("/help", "/nonsense", "/temperature", "/temperature -1", "/save", "/clear all"):
        assert obey(unknown, cfg, messages) == HELP and len(messages) == 2
    assert obey("/clear", cfg, messages) and messages == []


def test_typing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter sends, Alt-Enter and pasted line ends do not; Ctrl-C drops a line."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    with create_pipe_input() as keyboard, create_app_session(keyboard, DummyOutput()):
        keyboard.send_text("one\x1b\rtwo\rdropped\x03\x1b[200~a\n\nb\x1b[201~\r\x04")
        assert list(questions()) == ["one\ntwo", "a\n\nb"]
    assert "+one\n+two\n" in (tmp_path / "chat_history").read_text()


def test_a_session_and_one_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_chat_model(tmp_path, monkeypatch)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/clear\n\nhello\n/help\nquit\nnever\n"))
    main(Config(device_type="cpu"))
    out = capsys.readouterr().out
    assert "sft/d2 step 3" in out and "You: hello\n" in out and HELP in out and "never" not in out
    first, second = (part.split("\n")[0] for part in out.split("Model: ")[1:])
    assert first == second  # the same question to an empty memory, with the same seed
    main(Config(device_type="cpu", prompt="hello"))
    assert capsys.readouterr().out.split("\n")[0] == first
    main(Config(device_type="cpu", prompt=""))  # one like any other
    assert "You: " not in capsys.readouterr().out and sys.stdin.read() == "never\n"
    # What is too long is refused: the conversation goes on, one question fails.
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 999 + "\nhello\n"))
    main(Config(device_type="cpu"))
    printed = capsys.readouterr()
    assert printed.err.startswith("error: your message has ") and first in printed.out
    refuses("your message has", main, Config(device_type="cpu", prompt="x" * 999))
