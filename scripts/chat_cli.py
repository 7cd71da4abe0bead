"""Talk to a model in the terminal; words appear as they are sampled, and tool calls as [sum = result].

    python -m scripts.chat_cli                              # the newest finetuned model, on the best device
    python -m scripts.chat_cli -i rl -g d20 -p "Why is the sky blue?"  # one answer, then the end
    python -m scripts.chat_cli --device_type=cpu --temperature=0
    (one process: eight GPUs answer one person no faster)

The context is a rolling window: when a conversation outgrows it, the oldest turns are forgotten. A base
model has not learned to converse; it continues what is typed.

reads: <source>/<model tag>/
writes: nothing
"""

import sys
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from nanochat.chat_format import render_prompt
from nanochat.checkpoint import load_model
from nanochat.engine import Engine, ReplyReader, Request
from nanochat.runtime import run_script, say, set_up
from nanochat.sampling import derive_seed
from nanochat.tokenizer import Tokenizer


@dataclass
class Config:
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "sft"  # stage: base, mid, sft or rl
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = ""  # empty: the one written last
    step: Annotated[int | None, tyro.conf.arg(aliases=["-s"])] = None  # the newest if left out
    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = ""  # answer this and end
    temperature: float = 0.6  # 0: always the likeliest token
    top_k: int = 50  # sample among this many tokens; 0: off
    top_p: float = 1.0  # and among the likeliest that hold this share; 1: off
    max_tokens: int = 512  # of one answer; at most half the context
    seed: int = 0  # of the sampling
    device_type: str = ""  # cpu, cuda or mps; empty: the best there is
    dtype: str = "auto"  # of the matmuls: auto, float32 or bfloat16


def fit_window(tokenizer: Tokenizer, messages: list[dict[str, Any]], max_len: int) -> list[int]:
    """The prompt for the newest message; forgets the oldest turns in `messages` until it fits `max_len`.

    A single message that is too long by itself keeps its end.
    """
    prompt = render_prompt(tokenizer, {"messages": messages})
    while len(prompt) > max_len and len(messages) > 1:
        del messages[:2]  # a question and its answer
        prompt = render_prompt(tokenizer, {"messages": messages})
    return prompt if len(prompt) <= max_len else prompt[:1] + prompt[len(prompt) - max_len + 1 :]


def ask(
    engine: Engine, cfg: Config, messages: list[dict[str, Any]], reader: ReplyReader
) -> Generator[tuple[str, str], None, None]:
    """The pieces of the answer to the newest message, as they come; `reader` holds what was said."""
    max_tokens = max(1, min(cfg.max_tokens, engine.max_len // 2))
    room = engine.max_len - max_tokens
    if cfg.source == "base":
        ids = engine.tokenizer.encode(messages[-1]["content"])
        prompt = [engine.tokenizer.bos_id, *ids[max(0, len(ids) - room + 1) :]]
    else:
        prompt = fit_window(engine.tokenizer, messages, room)
    seed = derive_seed(cfg.seed, len(messages), *prompt)
    sampling = (cfg.temperature, cfg.top_k, cfg.top_p, seed)
    for _, token, _ in engine.run([Request(prompt, max_tokens, *sampling)]):
        yield from reader.feed(token)
    yield from reader.close()


def show(pieces: Iterable[tuple[str, str]]) -> None:
    """Print the pieces as they come, tool calls in brackets."""
    marks = {"text": "]", "python": "[", "python_output": " = "}
    before = "text"
    for kind, text in pieces:
        if kind != before:
            print(marks[kind], end="")
        print(text, end="", flush=True)
        before = kind
    print("" if before == "text" else "]")


def answer(engine: Engine, cfg: Config, messages: list[dict[str, Any]], question: str) -> None:
    """Add the question and its printed answer to `messages`; Ctrl-C keeps what was said so far."""
    messages.append({"role": "user", "content": question})
    reader = ReplyReader(engine.tokenizer)
    pieces = ask(engine, cfg, messages, reader)
    try:
        show(pieces)
    except KeyboardInterrupt:
        pieces.close()
        print("\n(stopped)")
    messages.append({"role": "assistant", "content": reader.parts})


def main(cfg: Config) -> None:
    """Answer the prompt given, or whatever is typed until the input ends."""
    runtime = set_up(cfg.device_type, cfg.dtype)
    model, tokenizer, meta = load_model(cfg.source, cfg.model_tag, cfg.step, runtime)
    engine = Engine(model, tokenizer, num_slots=1)
    messages: list[dict[str, Any]] = []
    if cfg.prompt:
        answer(engine, cfg, messages, cfg.prompt)
        return
    name = f"{cfg.source}/{meta['model_tag']} step {meta['step']}"
    say(f"{name} on {runtime.device_name}. `clear` starts over, `quit` (or Ctrl-D) ends.")
    while True:
        try:
            question = input("\nYou: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not sys.stdin.isatty():
            print(question)  # a terminal has shown it already
        if question in ("quit", "exit"):
            return
        if question == "clear":
            messages.clear()
            say("The conversation is forgotten.")
        elif question:
            print("Model: ", end="", flush=True)
            answer(engine, cfg, messages, question)
            sys.stdout.flush()


if __name__ == "__main__":
    run_script(main, Config)
