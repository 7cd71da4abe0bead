"""Answer a file of requests, in the shape of OpenAI's batches, without a server.

    python -m scripts.chat_batch --input=questions.jsonl --output=answers.jsonl   # one GPU
    python -m scripts.chat_batch -i rl -g d20 --input=q.jsonl --output=a.jsonl --slots=128
    python -m scripts.chat_batch --device_type=cpu --slots=4 --input=q.jsonl --output=a.jsonl
    (one process; for eight GPUs `split -n r/8` the input, and set CUDA_VISIBLE_DEVICES for each)

A line of the input: {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body":
{...}}, or /v1/completions. Each has a line in the output, in the order in which they end, with what
the server would answer, a refusal included. A batch that was stopped goes on when started again.

reads: <source>/<model tag>/, the file of --input
writes: the file of --output
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from pydantic import ValidationError

from nanochat import chat_api
from nanochat.chat_api import ApiError, Completion, ServerConfig
from nanochat.checkpoint import load_model
from nanochat.common import CheckpointFlags, Count, UserError, progress_bar, run_script, set_up
from nanochat.engine import Engine, Request

SHAPES = {
    "/v1/chat/completions": (chat_api.ChatRequest, Completion),
    "/v1/completions": (chat_api.TextRequest, chat_api.TextCompletion),
}
START = b'{"id": "batch_req_'  # of a line of the output


@dataclass(kw_only=True)
class Config(CheckpointFlags):
    input: Path  # requests, one a line
    output: Path  # their answers, one a line; those that it holds already stay
    slots: Count = 32  # concurrent answers
    deterministic: bool = False  # answers do not depend on what else is under way; slower


class Line(NamedTuple):
    """A request of the input."""

    id: str  # the answer's; of the line's text and the model's weights
    asked: dict[str, Any]

    def output(self, status: int, body: dict[str, Any]) -> dict[str, Any]:
        response = {"status_code": status, "request_id": self.id, "body": body}
        about = {"id": self.id, "custom_id": self.asked["custom_id"]}
        return about | {"response": response, "error": None}


def read_lines(path: Path, weights: str) -> Iterator[Line]:
    """The requests of the file; UserError for one that cannot have an answer."""
    names = set[str]()
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                asked = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}); mend it") from error
            name = asked.get("custom_id") if isinstance(asked, dict) else None
            if not isinstance(name, str) or name in names:
                raise UserError(
                    f"{path}, line {number}: custom_id {name!r} is not a string, or occurs twice"
                )
            names.add(name)
            digest = hashlib.sha256(weights.encode() + text.strip()).hexdigest()
            yield Line(f"batch_req_{digest[:24]}", asked)


def read_answered(file: IO[bytes]) -> set[str]:
    """The ids of the answers in the output; a last line without its end is cut off."""
    answered, num_bytes = set[str](), 0
    file.seek(0)
    for number, text in enumerate(file, 1):
        is_ours, name = text.startswith(START[: len(text)]), None
        if is_ours and not text.endswith(b"\n"):
            break
        with suppress(ValueError, KeyError):
            name = json.loads(text)["id"] if is_ours else None
        if name is None:
            raise UserError(f"{file.name}, line {number}: not an answer; choose another --output")
        answered.add(name)
        num_bytes += len(text)
    file.truncate(num_bytes)
    return answered


def prepare(asked: dict[str, Any], engine: Engine, name: str) -> tuple[list[Request], Completion]:
    """(what to ask the engine, the answer to be); ApiError as the server's."""
    if asked.get("method") != "POST" or str(asked.get("url")) not in SHAPES:
        raise ApiError(404, f"a batch has requests to POST {' or '.join(SHAPES)}", param="url")
    request, shape = SHAPES[asked["url"]]
    try:
        body = request.model_validate(asked.get("body"))
        body.stream = False
    except ValidationError as invalid:
        errors = [{**error, "loc": ("body", *error["loc"])} for error in invalid.errors()]
        raise chat_api.validation_error(errors) from invalid
    if body.model not in ("", name):
        raise ApiError(404, f"only the model {name} is here", "model_not_found", "model")
    kind = "base" if name.endswith("-base") else "chat"
    requests = chat_api.engine_requests(body, engine, kind, ServerConfig())
    return requests, shape(name, body, engine.tokenizer, requests)


def answer_lines(engine: Engine, name: str, lines: Iterator[Line]) -> Iterator[dict[str, Any]]:
    """The output of each line, as it ends; more are read while fewer wait than there are slots."""
    under_way: dict[Request, tuple[Line, Completion, chat_api.Choice]] = {}
    for line in chain(lines, [None]):  # None: there are no more
        if line:
            try:
                requests, completion = prepare(line.asked, engine, name)
            except ApiError as error:
                yield line.output(error.status, error.body)
                continue
            for request, choice in zip(requests, completion.choices, strict=True):
                under_way[request] = line, completion, choice
                engine.submit(request)
        while under_way and (line is None or len(engine.waiting) >= engine.num_slots):
            for event in engine.step():
                own, completion, choice = under_way[event.request]
                choice.feed(event)
                if choice.finish:
                    engine.cancel(event.request)  # it goes on after a stop string
                    del under_way[event.request]
                    if all(each.finish for each in completion.choices):
                        yield own.output(200, completion.whole())


def main(cfg: Config) -> None:
    with cfg.output.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            text = f"another batch writes {cfg.output}; wait for its end or choose another --output"
            raise UserError(text) from error
        model, tokenizer, meta = load_model(cfg, set_up(cfg.device_type, cfg.dtype))
        answered = read_answered(file)
        asked = {line.id for line in read_lines(cfg.input, meta["weights"])}
        if answered - asked:
            what = f"{cfg.output} answers lines that {cfg.input} lacks, or as another model"
            raise UserError(f"{what}; choose another --output")
        total, num_refused = len(asked - answered), 0
        print(f"{meta['name']}: {total} requests; {len(answered)} more were answered before")
        lines = (new for new in read_lines(cfg.input, meta["weights"]) if new.id not in answered)
        name = f"nanochat-{meta['model_tag']}-{cfg.source}"
        engine = Engine(model, tokenizer, cfg.slots, deterministic=cfg.deterministic)
        answers = answer_lines(engine, name, lines)
        for line in progress_bar(answers, " requests", total):
            num_refused += line["response"]["status_code"] >= 400
            text = json.dumps(line, ensure_ascii=False) + "\n"
            file.write(text.encode("utf-8", "backslashreplace"))  # \ud800, as JSON has it, too
            file.flush()
    print(f"wrote {cfg.output}: {total} lines, {num_refused} of them refusals")


if __name__ == "__main__":
    run_script(main, Config)
