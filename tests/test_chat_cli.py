"""The terminal chat: the rolling window, tool calls on the screen, and a whole session with typed input."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.chat_format import SPECIAL_TOKENS, chat_tokens, render_prompt
from nanochat.checkpoint import config_dict, save_checkpoint
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.paths import run_dir
from nanochat.runtime import Runtime
from nanochat.tokenizer import SPLIT_PATTERN, Tokenizer
from scripts.chat_cli import Config, answer, fit_window, main, show

TOKENIZER = Tokenizer([bytes([byte]) for byte in range(256)], SPECIAL_TOKENS, SPLIT_PATTERN)
CONTEXT = 64


def random_model() -> GPT:
    model = GPT(
        GPTConfig(CONTEXT, TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    )
    model.init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    return model.eval()


def talk(lengths: list[int]) -> list[dict[str, Any]]:
    """A conversation of messages with so many characters, the user's first."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": "x" * n} for i, n in enumerate(lengths)]


def test_the_window_forgets_the_oldest_turns_only() -> None:
    messages = talk([20, 10, 20, 10, 5])
    prompt = fit_window(TOKENIZER, messages, 50)
    assert messages == talk([20, 10, 5]) and len(prompt) <= 50
    assert prompt == render_prompt(TOKENIZER, {"messages": messages})
    assert fit_window(TOKENIZER, messages, 50) == prompt


def test_one_message_longer_than_the_window_keeps_bos_and_its_end() -> None:
    chat = chat_tokens(TOKENIZER)
    prompt = fit_window(TOKENIZER, [{"role": "user", "content": "a" * 90 + "end"}], 30)
    assert len(prompt) == 30 and prompt[0] == chat.bos
    assert prompt[-5:] == [*b"end", chat.user_end, chat.assistant_start]


@pytest.mark.parametrize("source", ["sft", "base"])
def test_ten_contexts_of_talk_never_crash(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A random model says anything, special tokens included, to messages of any length."""
    engine, random_ = Engine(random_model(), TOKENIZER, num_slots=1), random.Random(0)
    messages: list[dict[str, Any]] = []
    num_tokens = 0
    for turn in range(30):
        question = "é" * random_.randint(1, 2 * CONTEXT if turn == 9 else 20)
        answer(
            engine,
            Config(source=source, max_tokens=40, temperature=2.0, seed=turn),
            messages,
            question,
        )
        num_tokens += 2 * len(question) + sum(len(part["text"]) for part in messages[-1]["content"])
        assert messages[-2] == {"role": "user", "content": question}
    assert num_tokens > 10 * CONTEXT and len(capsys.readouterr().out) > 100


def test_tool_calls_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    show(
        [
            ("text", "It "),
            ("text", "is "),
            ("python", "1+1"),
            ("python_output", "2"),
            ("text", " two."),
        ]
    )
    show([("python", "1/0")])
    assert capsys.readouterr().out == "It is [1+1 = 2] two.\n[1/0]\n"


def test_a_session_and_one_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    model = random_model()
    run = run_dir("sft", "d2")
    TOKENIZER.save(run / "tokenizer")
    state = {"step": 3, "model_config": config_dict(model.config)}
    runtime = Runtime(torch.device("cpu"), torch.float32, 0, 1, "cpu")
    save_checkpoint(run, state, model.state_dict(), {}, None, runtime)
    typed = iter(["hello", "clear", "", "hello", "quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    main(Config(device_type="cpu"))
    out = capsys.readouterr().out
    assert "sft/d2 step 3" in out
    first, second = (part.split("\n")[0] for part in out.split("Model: ")[1:])
    assert first == second  # the same question to an empty memory, with the same seed
    main(Config(device_type="cpu", prompt="hello"))
    assert capsys.readouterr().out.split("\n")[0] == first
