"""Bits per byte against a token-by-token sum, and what must not count."""

import math
from dataclasses import replace

import pytest
import torch

from nanochat.core_eval import evaluate_bpb
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig

V = 40
TOKEN_BYTES = [1 + i % 4 for i in range(V - 3)] + [0, 0, 0]  # the last three are specials


def model_and_batches(num: int) -> tuple[GPT, list[Batch]]:
    config = GPTConfig(sequence_len=16, vocab_size=V, n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
    model = GPT(config)
    model.init_weights(3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.5, generator=generator)
    batches = []
    for _ in range(num):
        inputs = torch.randint(0, V, (3, 16), generator=generator)
        targets = torch.randint(-1, V, (3, 16), generator=generator)
        batches.append(Batch(inputs, targets, 48))
    return model, batches


@torch.inference_mode()
def slow_bpb(model: GPT, batches: list[Batch]) -> float:
    """From the full logits, one target at a time."""
    nats, num_bytes = 0.0, 0
    for batch in batches:
        probabilities = model(batch.inputs).double().log_softmax(-1)
        for row, targets in enumerate(batch.targets.tolist()):
            for time, target in enumerate(targets):
                if target >= 0 and TOKEN_BYTES[target] > 0:
                    nats -= float(probabilities[row, time, target])
                    num_bytes += TOKEN_BYTES[target]
    return nats / math.log(2) / num_bytes


def test_equals_the_slow_sum() -> None:
    model, batches = model_and_batches(3)
    measured = evaluate_bpb(model, iter(batches), TOKEN_BYTES, num_steps=3, rows=2)
    assert measured == pytest.approx(slow_bpb(model, batches), rel=1e-5)
    assert evaluate_bpb(model, iter(batches), TOKEN_BYTES, num_steps=2) == pytest.approx(
        slow_bpb(model, batches[:2]), rel=1e-5
    )


def test_specials_and_ignored_targets_do_not_count() -> None:
    model, [batch] = model_and_batches(1)
    silent = torch.where(batch.targets >= V - 3, -1, batch.targets)
    without = replace(batch, targets=silent)
    assert bool((silent != batch.targets).any())
    assert evaluate_bpb(model, iter([batch]), TOKEN_BYTES, 1) == pytest.approx(
        evaluate_bpb(model, iter([without]), TOKEN_BYTES, 1)
    )


def test_no_bytes_is_no_division_by_zero() -> None:
    model, [batch] = model_and_batches(1)
    nothing = replace(batch, targets=torch.full_like(batch.targets, -1))
    assert evaluate_bpb(model, iter([nothing]), TOKEN_BYTES, 1) == math.inf
