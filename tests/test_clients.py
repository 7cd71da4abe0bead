"""Programs of others that speak OpenAI's API, against the server on a loopback port.

They live in .venv-clients, which .ci/run makes of dev/clients.txt; without it these tests are
skipped. Oracles: the echo engine, which says back what it was asked; the model's own forward pass.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanochat.engine import Engine
from nanochat.hf_export import text_files
from nanochat.jobs import ServedModel
from tests.models import TOKENIZER, random_gpt
from tests.serving import EchoEngine, Running, serving, serving_models

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv-clients/bin"
MODEL = "nanochat"
SAID = "né 汉字 👩‍👩‍👧"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BIN.exists(), reason="no .venv-clients; .ci/run makes it"),
]
OPENAI = """
import os, openai
with openai.OpenAI() as client:
    print([card.id for card in client.models.list()])
    ask = {"model": MODEL, "messages": [{"role": "user", "content": SAID}]}
    print(client.chat.completions.create(**ask).choices[0].message.content)
    chunks = client.chat.completions.create(**ask, stream=True)
    print("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
"""
LANGCHAIN = """
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(model=MODEL)
print(chat.invoke(SAID).content)
print("".join(chunk.content for chunk in chat.stream(SAID)))
"""
LM_EVAL = """
import json, lm_eval
from lm_eval.tasks import TaskManager
told = {}
for task, tokenized in ("choices", False), ("pages", True):
    about = {"model": MODEL, "base_url": URL, "tokenizer": ".", "max_length": 63}
    result = lm_eval.simple_evaluate(
        "local-completions", about | {"tokenized_requests": tokenized, "num_concurrent": 4},
        tasks=[task], task_manager=TaskManager(include_path="."), bootstrap_iters=0)
    told[task] = [row["filtered_resps"] for row in result["samples"][task]]
print(json.dumps(told))
"""
TASK = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}}
TASK |= {"test_split": "test", "doc_to_text": "{{question}}", "doc_to_choice": "{{options}}"}
CHOICES = TASK | {"task": "choices", "output_type": "multiple_choice", "doc_to_target": "{{gold}}"}
PAGES = TASK | {"task": "pages", "output_type": "loglikelihood_rolling", "doc_to_text": ""}
PAGES |= {"doc_to_target": "{{question}}", "metric_list": [{"metric": "bits_per_byte"}]}
ROWS = [
    {"question": "The hen, called Zoé,", "options": ["lays eggs", "is é blue"], "gold": 0},
    {"question": "1 + 1", "options": ["is 2", "汉字", "are three"], "gold": 0},
]


@pytest.fixture(scope="module")
def echo() -> Iterator[Running]:
    with serving([EchoEngine(max_len=512)]) as running:
        yield running


def run(server: Running, folder: Path, program: str, *arguments: str) -> str:
    """What a program of .venv-clients prints, started in `folder`; it must not fail."""
    own = {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "none", "PYTHONPATH": ""}
    own |= {"LLM_USER_PATH": str(folder), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    command = [str(BIN / program), *arguments]
    options = {"cwd": folder, "env": os.environ | own, "text": True}
    done = subprocess.run(command, **options, stdout=-1, stderr=-2, timeout=120)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("script", [OPENAI, LANGCHAIN], ids=["openai", "langchain"])
def test_libraries_answer_and_stream(echo: Running, tmp_path: Path, script: str) -> None:
    lines = f"MODEL, SAID = {MODEL!r}, {SAID!r}\n{script}"
    listed = [str([MODEL])] if script == OPENAI else []  # langchain asks for no list
    assert run(echo, tmp_path, "python", "-c", lines).splitlines() == [*listed, SAID, SAID]


def test_llm_answers_and_streams(echo: Running, tmp_path: Path) -> None:
    model = {"model_id": "mine", "model_name": MODEL, "api_base": f"{echo.url}/v1"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
    assert "OpenAI Chat: mine" in run(echo, tmp_path, "llm", "models")
    for flags in ([], ["--no-stream"]):
        assert run(echo, tmp_path, "llm", "-m", "mine", *flags, SAID).strip() == SAID


def test_the_schema_tells_the_truth(tmp_path: Path) -> None:
    """Whatever fits /openapi.json has an answer that it describes, and nothing costs a 5xx."""
    engine = Engine(random_gpt(64, head_std=0.3), TOKENIZER, num_slots=4)
    with serving_models([ServedModel(MODEL, "chat", 64, 1, EchoEngine, engine)]) as server:
        run(
            server, tmp_path, "schemathesis", "run", f"{server.url}/openapi.json", "--seed=1",
            "--max-examples=40", "--phases=coverage,fuzzing", "--no-shrink", "--checks=all",
            # A length, or a name, can fit the schema and still be refused.
            "--exclude-checks=positive_data_acceptance",
        )  # fmt: skip


def test_lm_eval_measures_what_the_model_says(tmp_path: Path) -> None:
    """The log-likelihoods behind accuracy and perplexity are those of a forward pass."""
    model = random_gpt(64, head_std=0.3)
    files = text_files(model.config, TOKENIZER, step=0)
    files |= {"rows.jsonl": "\n".join(map(json.dumps, ROWS))}
    files |= {"choices.yaml": CHOICES, "pages.yaml": PAGES}
    for name in set(files) - {"config.json", "generation_config.json"}:
        text = files[name] if isinstance(files[name], str) else json.dumps(files[name])
        (tmp_path / name).write_text(text)

    def score(before: str, text: str) -> float:
        ids = [TOKENIZER.bos_id, *TOKENIZER.encode(before + text)]
        with torch.no_grad():
            likely = model(torch.tensor([ids[:-1]])).float().log_softmax(-1)[0]
        each = likely[torch.arange(len(ids) - 1), ids[1:]]
        return float(each[len(TOKENIZER.encode(before)) :].sum())

    engine = Engine(model, TOKENIZER, num_slots=4)
    with serving_models([ServedModel(MODEL, "base", 64, 1, EchoEngine, engine)]) as server:
        script = f"MODEL, URL = {MODEL!r}, '{server.url}/v1/completions'\n{LM_EVAL}"
        told = json.loads(run(server, tmp_path, "python", "-c", script).splitlines()[-1])
    for row, choices, (page,) in zip(ROWS, told["choices"], told["pages"], strict=True):
        expected = [score(row["question"], f" {option}") for option in row["options"]]
        assert [likelihood for likelihood, _ in choices] == pytest.approx(expected, abs=1e-3)
        assert page == pytest.approx(score("", row["question"]), abs=1e-3)
