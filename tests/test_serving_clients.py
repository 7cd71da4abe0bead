"""The clients that people use, against the server: openai, llm, langchain-openai and curl; each that is installed.

Oracle: the echo engine says back what it was asked.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from nanochat.chat_api import ServerConfig
from tests.serving import EchoEngine, Running, serving

QUESTION = "né 汉字 👩‍👩‍👧"


@pytest.fixture(scope="module")
def echo() -> Iterator[Running]:
    with serving([EchoEngine()]) as running:
        yield running


def test_openai(echo: Running) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{echo.url}/v1", api_key="none") as client:
        (card,) = client.models.list().data
        assert client.models.retrieve(card.id).id == "nanochat"
        ask: dict[str, Any] = {
            "model": card.id, "messages": [{"role": "user", "content": QUESTION}],
            "extra_body": {"top_k": 5}, "seed": 1, "logprobs": True,
        }  # fmt: skip
        whole = client.chat.completions.create(**ask)
        assert whole.choices[0].message.content == QUESTION
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + len(QUESTION.encode()) + 1
        assert len(whole.choices[0].logprobs.content) == len(QUESTION.encode())
        options = {"include_usage": True}
        chunks = list(client.chat.completions.create(**ask, stream=True, stream_options=options))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == QUESTION
        assert chunks[-1].usage == whole.usage and chunks[-2].choices[0].finish_reason == "stop"
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**ask, max_tokens=10_000)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError, match="no model"):
            client.models.retrieve("sft/d20")


def test_openai_tries_again_while_the_queue_is_full() -> None:
    openai = pytest.importorskip("openai")
    engine = EchoEngine(num_slots=1)
    engine.pace = 0.03
    with serving([engine], ServerConfig(queue=0)) as server, server.connect("x" * 20):
        server.until(lambda: bool(engine.running))
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            ask: dict[str, Any] = {
                "model": "nanochat",
                "messages": [{"role": "user", "content": "a"}],
            }
            with pytest.raises(openai.RateLimitError):
                client.with_options(max_retries=0).chat.completions.create(**ask)
            answer = client.with_options(max_retries=5).chat.completions.create(**ask)
            assert answer.choices[0].message.content == "a"


def test_openai_is_told_of_a_failure_amid_a_stream() -> None:
    openai = pytest.importorskip("openai")
    engine = EchoEngine()
    engine.pace = 0.01
    with (
        serving([engine]) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
    ):
        messages: Any = [{"role": "user", "content": "x" * 50}]
        stream = client.chat.completions.create(model="nanochat", messages=messages, stream=True)
        with pytest.raises(openai.APIError, match="the model failed"):
            for _ in stream:
                engine.num_failures = 1


def test_llm(echo: Running) -> None:
    models = pytest.importorskip("llm.default_plugins.openai_models")
    model = models.Chat(model_id="nanochat", api_base=f"{echo.url}/v1")
    for stream in (True, False):
        response = model.prompt(QUESTION, stream=stream, key="none", system="be brief")
        assert response.text() == f"be brief\n\n{QUESTION}"
        assert response.usage().output == len(response.text().encode()) + 1


def test_langchain(echo: Running) -> None:
    langchain = pytest.importorskip("langchain_openai")
    for usage in (None, True):
        chat = langchain.ChatOpenAI(
            model="nanochat", base_url=f"{echo.url}/v1", api_key="none", stream_usage=usage
        )
        assert chat.invoke(QUESTION).content == QUESTION
        assert "".join(chunk.content for chunk in chat.stream(QUESTION)) == QUESTION


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl(echo: Running) -> None:
    def curl(*arguments: str) -> str:
        done = subprocess.run(
            ["curl", "-sSN", *arguments], capture_output=True, text=True, check=True, timeout=20
        )
        return done.stdout

    assert json.loads(curl(f"{echo.url}/v1/models"))["data"][0]["id"] == "nanochat"
    body = {"messages": [{"role": "user", "content": QUESTION}], "stream": True}
    url = [f"{echo.url}/v1/chat/completions", "--json"]
    assert curl(*url, json.dumps(body)).endswith("data: [DONE]\n\n")
    whole = json.loads(curl(*url, json.dumps(body | {"stream": False})))
    assert whole["choices"][0]["message"]["content"] == QUESTION
