"""What a GPU computes, against plainer ways. Without a GPU the CPU rehearses these tests.

Oracles: the full forward pass; bf16; the same run once more. Kernels are in test_attention.py.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanochat import fp8
from nanochat.checkpoint import build_model, file_digest
from nanochat.common import Runtime, run_dir, set_up
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT, GPTConfig
from scripts import base_train
from tests.models import TOKENIZER, random_ids

pytestmark = pytest.mark.gpu
ON_GPU = torch.cuda.is_available()
TIME, LAYERS, WIDTH = (512, 4, 256) if ON_GPU else (64, 1, 128)


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return set_up("cuda" if ON_GPU else "cpu", exact=True)


def busy_model(runtime: Runtime) -> GPT:
    """No matrix is zero: that would hide faults."""
    heads = WIDTH // 128
    config = GPTConfig(TIME, TOKENIZER.vocab_size, LAYERS, heads, heads, WIDTH)
    model = build_model(config, None, runtime).eval()
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, 0, weight.shape[1] ** -0.5)
    return model


def test_the_engine_sees_what_the_full_forward_pass_sees(runtime: Runtime) -> None:
    """Captured steps and prompts of several chunks included."""
    model, rng = busy_model(runtime), random.Random(0)
    prompts = [rng.choices(range(256), k=TIME // 8 * number) for number in range(1, 7)]
    requests = [Request(prompt, 8, temperature=0.0, logprobs=1) for prompt in prompts]
    engine = Engine(model, TOKENIZER, num_slots=4, deterministic=True)
    events = list(engine.stream(requests))
    for request in requests:
        own = [event for event in events if event.request is request]
        ids = torch.tensor([[*request.prompt, *(event.token for event in own)]])
        with torch.no_grad():
            logits = model(ids.to(runtime.device))[0, len(request.prompt) - 1 : -1]
        for event, row in zip(own, logits.log_softmax(-1).tolist(), strict=True):
            for token, value in event.logprobs or ():
                assert abs(value - row[token]) < (0.1 if ON_GPU else 1e-3)


def test_fp8_gives_the_gradients_of_bf16(runtime: Runtime) -> None:
    if ON_GPU and not fp8.is_there(runtime):
        pytest.skip("this GPU has no 8-bit matmuls")
    model = busy_model(runtime)
    model.compute_dtype = torch.bfloat16
    ids = random_ids(LAYERS, TIME // 4 + 1, TOKENIZER.vocab_size).to(runtime.device)
    found = []
    for _ in range(2):
        model(ids[:, :-1], ids[:, 1:]).backward()
        grads = [weight.grad for weight in model.blocks.parameters() if weight.grad is not None]
        found.append(torch.cat([grad.flatten() for grad in grads]))
        model.zero_grad()
        fp8.enable(model.blocks)
    assert 0.98 < F.cosine_similarity(found[0], found[1], dim=0) < 0.99999


@pytest.fixture
def deterministic() -> Iterator[None]:
    """base_train turns this on for its whole process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
def test_a_deterministic_run_is_the_same_once_more(base_dir: Path, deterministic: None) -> None:
    shared = {
        "device_type": "cuda" if ON_GPU else "cpu", "deterministic": True, "model_tag": "twice",
        "fresh": True, "depth": LAYERS, "max_seq_len": TIME, "total_batch_size": 8 * TIME,
        "device_batch_size": 4, "num_iterations": 20 if ON_GPU else 2, "eval_tokens": TIME,
        "eval_every": 0, "sample_every": 0, "save_every": 0,
    }  # fmt: skip
    digests = []
    for _ in range(2):
        base_train.main(base_train.Config(**shared))
        (weights,) = run_dir("base", "twice").glob("step_*/model.safetensors")
        digests.append(file_digest(weights))
    assert digests[0] == digests[1]
