"""Chat with a model in the terminal; tool calls are shown as [sum = result].

    python -m scripts.chat_cli                # the newest finetuned model, on the best device
    python -m scripts.chat_cli -i rl -g d20 -p "Why is the sky blue?"   # one answer on stdout
    python -m scripts.chat_cli --device_type=cpu --temperature=0 < questions.txt   # one per line
    (one process: eight GPUs answer one person no faster)

/help lists the commands. Ctrl-C stops an answer, Ctrl-D ends. A conversation that outgrows the
context loses its oldest turns, and a line says so; a message that is too long by itself is refused,
never cut. A base model continues the text instead of answering.

reads: <source>/<model tag>/
writes: chat_history, what was typed; the file of /save
"""

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from nanochat.checkpoint import load_model
from nanochat.common import (
    CheckpointFlags,
    Count,
    Natural,
    Share,
    Temperature,
    UserError,
    base_dir,
    print0,
    run_script,
    set_up,
    write_file,
)
from nanochat.engine import Engine, Event, Reply, Request
from nanochat.sampling import derive_seed
from nanochat.tokenizer import Tokenizer, render_prompt

HELP = """\
/clear                forget the conversation
/save FILE            write it to FILE, as one line of JSON that --custom can train on
/temperature NUMBER   0: always the likeliest word; 1: as the model sees it
/quit                 end, as Ctrl-D does
Enter sends, Alt-Enter begins a new line, text of many lines can be pasted, the arrow keys find old
questions. Ctrl-C stops an answer."""


@dataclass
class Config(CheckpointFlags):
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None  # answer this and end
    temperature: Temperature = 0.6  # 0: always the likeliest token
    top_k: Natural = 50  # sample among this many tokens; 0: off
    top_p: Share = 1.0  # and among the likeliest that hold this share; 1: off
    max_tokens: Count = 512  # of one answer; a quarter of the context is kept free for it
    seed: int = 0  # of the sampling


def fit_window(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], max_len: int, is_base: bool = False
) -> tuple[list[int], int]:
    """(the prompt of at most `max_len` tokens, how many of the oldest messages it leaves out).

    Turns are left out whole; UserError if the newest message alone is too long. A base model gets
    nothing but that one.
    """
    prompt = list[int]()
    for first in range(0, len(messages), 2):  # a question and its answer
        prompt = render_prompt(tokenizer, {"messages": messages[first:]})
        if is_base:
            prompt = [tokenizer.bos_id, *tokenizer.encode(messages[-1]["content"])]
        if len(prompt) <= max_len:
            return prompt, first
    num_tokens = len(tokenizer.encode(messages[-1]["content"]))
    fitting = num_tokens - (len(prompt) - max_len)
    raise UserError(
        f"your message has {num_tokens} tokens, and {fitting} fit beside an answer; shorten it"
    )


def show(event: Event) -> None:
    call = "" if event.tool is None else f"[{' = '.join(filter(None, event.tool))}]"
    print(call + event.text, end="", flush=True)


def answer(
    engine: Engine, cfg: Config, messages: list[dict[str, Any]], question: str, name: str = ""
) -> None:
    """Add the question and its printed answer to `messages`; Ctrl-C keeps the answer so far."""
    asked = [*messages, {"role": "user", "content": question}]
    room = engine.max_len - max(1, min(cfg.max_tokens, engine.max_len // 4))
    prompt, num_left = fit_window(engine.tokenizer, asked, room, cfg.source == "base")
    if num_left:
        what = f"left out the oldest {num_left} messages"
        print(f"(too long for {engine.max_len} tokens: {what})", file=sys.stderr)
    messages[:] = asked[num_left:]
    seed = derive_seed(cfg.seed, len(messages), *prompt)
    max_tokens = min(cfg.max_tokens, engine.max_len - len(prompt))
    request = Request(prompt, max_tokens, cfg.temperature, cfg.top_k, cfg.top_p, seed)
    reply = Reply()
    print(name, end="", flush=True)
    with suppress(KeyboardInterrupt), closing(engine.stream([request])) as events:
        for event in events:
            reply.add(event)
            show(event)
    print(flush=True)
    messages.append({"role": "assistant", "content": reply.parts})


def obey(command: str, cfg: Config, messages: list[dict[str, Any]]) -> str:
    """Run a slash command; returns the text to print."""
    try:
        name, *arguments = shlex.split(command)
        if name == "/clear" and not arguments:
            messages.clear()
            return "The conversation is forgotten."
        if name == "/save" and len(arguments) == 1:
            path = Path(arguments[0]).expanduser()
            write_file(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            return f"{len(messages)} messages are in {path}."
        if name == "/temperature" and len(arguments) == 1 and 0 <= float(arguments[0]) <= 100:
            cfg.temperature = float(arguments[0])
            return f"The temperature is {cfg.temperature:g}."
    except (ValueError, OSError) as error:
        return f"{command}: {error}"
    return HELP


def questions() -> Iterator[str]:
    """What is typed, or the lines of standard input."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            print(f"\nYou: {line.strip()}")  # a terminal would have shown it
            yield line.strip()
        return
    from prompt_toolkit import PromptSession  # where a person types; it takes 0.2 s to import
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    base_dir().mkdir(parents=True, exist_ok=True)
    history = FileHistory(str(base_dir() / "chat_history"))
    session = PromptSession(history=history, key_bindings=keys)
    while True:
        try:
            yield session.prompt("\nYou: ").strip()
        except KeyboardInterrupt:
            continue  # the line is dropped
        except EOFError:
            return


def main(cfg: Config) -> None:
    runtime = set_up(cfg.device_type, cfg.dtype)
    model, tokenizer, meta = load_model(cfg, runtime)
    engine = Engine(model, tokenizer, num_slots=1)
    where = f"{meta['name']} on {runtime.device_name}"
    messages: list[dict[str, Any]] = []
    try:
        if cfg.prompt is not None:
            print(where, file=sys.stderr, flush=True)  # standard output is for the answer
            return answer(engine, cfg, messages, cfg.prompt)
        print0(f"{where}. /help lists what you can do; Ctrl-D ends.")
        for question in questions():
            if question in ("/quit", "quit", "exit"):
                return
            if question.startswith("/"):
                print(obey(question, cfg, messages))
            elif question:
                try:
                    answer(engine, cfg, messages, question, name="Model: ")
                except UserError as error:
                    print(f"error: {error}", file=sys.stderr)
    except BrokenPipeError:  # whoever read the answer has had enough, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_script(main, Config)
