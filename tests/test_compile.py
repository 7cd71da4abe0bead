"""torch.compile of every trainer's step: no graph break, and nothing is compiled twice.

The backend only traces, so that seconds suffice: what breaks a graph, or makes dynamo compile anew,
does so before any code is generated.
"""

import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from nanochat import trainer
from nanochat.finetuning import FinetuneConfig, finetune
from nanochat.gpt import GPTConfig
from nanochat.task_eval import Task
from scripts import base_train, chat_rl
from tests.models import busy_gpt, random_ids
from tests.serving import save_chat_model

pytestmark = pytest.mark.slow
Count = Callable[..., int]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    """Runs a function with a fresh compiler; returns how many graphs were made."""
    whole = torch.compile

    def run(function: Callable[..., Any], *arguments: Any) -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")

        def compile_parts(part: Any, dynamic: bool) -> Any:
            return whole(part, dynamic=dynamic, fullgraph=True, backend=counter)

        monkeypatch.setattr(torch, "compile", compile_parts)
        function(*arguments)
        return counter.frame_count

    return run


def test_pretraining(base_dir: Path, count: Count) -> None:
    """20 steps with evaluation and samples make as many graphs as two; and so does resuming."""
    cfg = base_train.Config(
        depth=4, aspect_ratio=16, head_dim=16, max_seq_len=256, total_batch_size=1024,
        device_batch_size=2, device_type="cpu", compile="yes", eval_tokens=512,
        num_iterations=2, eval_every=10, sample_every=10, save_every=10, model_tag="few",
    )  # fmt: skip
    # Smear, and the loss; layers with and without window or value embedding, of four kinds, and the
    # first one, whose input is x0 itself, is of a kind of its own. All with and without gradients.
    assert count(base_train.main, cfg) == 12
    many = replace(cfg, num_iterations=20, model_tag="many")
    assert count(base_train.main, many) == 12
    (base_dir / "base" / "many" / "result.json").unlink()
    for path in (base_dir / "base" / "many").glob("step_000020"):
        path.rename(path.with_name("away"))
    assert count(base_train.main, many) == 12


def test_two_shapes_are_compiled_once_each(count: Count) -> None:
    """Recomputing activations does not compile the layers anew."""
    model = busy_gpt(GPTConfig(256, 90, n_layer=4, n_head=2, n_kv_head=2, n_embd=32))
    shapes = [(2, 256), (4, 128), (2, 256), (4, 128), (2, 256)]

    def step(rows: int, time: int) -> torch.Tensor:
        ids = random_ids(rows, time, 90)
        model.zero_grad()
        model(ids, ids.clone(), reduction="sum").backward()
        gradient = model.get_parameter("blocks.0.mlp.c_fc.weight").grad
        assert gradient is not None
        return gradient.clone()

    eager = [step(*shape) for shape in shapes]

    def train() -> None:
        trainer.compile_parts(model, "yes")
        for model.recompute in (False, True):
            for shape, gradient in zip(shapes, eager, strict=True):
                assert torch.allclose(step(*shape), gradient, rtol=1e-4, atol=1e-5)

    assert count(train) == 2 * 6


def test_gradients_come_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that they are averaged over the ranks meanwhile; compiled whole, all come at the end."""
    model = busy_gpt(GPTConfig(64, 90, n_layer=4, n_head=2, n_kv_head=2, n_embd=32))
    came: list[str] = []
    for name, weight in model.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda _, name=name: came.append(name))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))

    def train(part: Any, *inputs: Any) -> torch.Tensor:
        y = compiled(part, *inputs)
        if part is model.blocks[0]:
            y.register_hook(lambda _: came.append("backward reaches the first layer"))
        return y

    trainer.compile_parts(model, "yes")
    compiled, model.call_part = model.call_part, train
    ids = random_ids(2, 64, 90)
    model(ids, ids.clone(), reduction="sum").backward()
    reached = came.index("backward reaches the first layer")
    matrices = [name for name in came[:reached] if name.startswith("blocks.")]
    assert {name.split(".")[1] for name in matrices} == {"1", "2", "3"}


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_chat_stages(
    stage: str, count: Count, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both share a loop; here one keeps conversations from seeing each other."""
    save_chat_model(tmp_path, monkeypatch)
    talk = [
        {"messages": [{"role": r, "content": "ab" * n} for r in ("user", "assistant")]}
        for n in range(1, 20)
    ]
    cfg = FinetuneConfig(
        source="sft", total_batch_size=256, device_batch_size=2, eval_every=5, eval_tokens=128,
        device_type="cpu", compile="yes", fresh=True, save_every=-1, mask_documents=stage == "sft",
    )  # fmt: skip
    few, many = replace(cfg, num_iterations=2), replace(cfg, num_iterations=20)
    made = count(finetune, stage, "A stage", few, lambda _: talk)
    assert 6 <= made <= 8  # of two layers; the eager rest of masks is no part
    assert count(finetune, stage, "A stage", many, lambda _: talk) == made


class Lottery(Task):
    """Rewards replies at random, so that all groups are useful."""

    def score(self, conversation: Any, reply: str) -> float:
        return zlib.crc32(reply.encode()) % 2


def test_reinforcement(count: Count, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of all lengths are cut into few shapes: powers of two of tokens, whole rows."""
    save_chat_model(tmp_path, monkeypatch, context=256)
    asked = [
        {"messages": [{"role": "user", "content": "?" * n}, {"role": "assistant", "content": ""}]}
        for n in (5, 60, 90, 150)
    ]
    monkeypatch.setattr(chat_rl, "build_task", lambda *_: Lottery(asked))
    cfg = chat_rl.Config(
        source="sft", num_steps=20, questions_per_step=2, num_samples=4, max_tokens=16,
        num_slots=8, device_batch_size=3, eval_every=-1, eval_problems=2, eval_samples=2,
        save_every=-1, device_type="cpu", compile="yes", fresh=True,
    )  # fmt: skip
    made = count(chat_rl.main, replace(cfg, num_steps=2))  # both pairs of questions
    assert made == 2 * 4  # 128 and 256 tokens; smear, two layers, the loss
    assert count(chat_rl.main, cfg) == made
