"""scripts.chat_rl: advantages, masks, useless groups, and the gradient against its definition."""

from functools import partial
from pathlib import Path

import pytest
import torch

from nanochat.dataloader import Batch
from nanochat.gpt import call
from nanochat.scaling import make_optimizer
from nanochat.trainer import Run
from scripts import chat_rl
from scripts.chat_rl import Rollout
from tests.models import CPU, TOKENIZER, random_gpt

# A prompt of two tokens; in the first answer the tool forced tokens 8 and 9.
GROUP = [
    Rollout([1, 2, 3, 8, 9, 4], [0, 0, 1, 0, 0, 1], 1.0, ""),
    Rollout([1, 2, 5], [0, 0, 1], 0.0, ""),
]
USELESS = [Rollout([1, 6, 7], [0, 1, 1], 1.0, ""), Rollout([1, 6], [0, 1], 1.0, "")]


def test_only_sampled_tokens_of_useful_groups_are_targets() -> None:
    inputs, targets, advantages = chat_rl.policy_batch([USELESS, GROUP], pad_id=0)
    assert inputs.shape == targets.shape == (2, 32)
    assert inputs[0, :6].tolist() == [1, 2, 3, 8, 9, 0]
    assert targets[0, :6].tolist() == [-1, 3, -1, -1, 4, -1]
    assert targets[1, :3].tolist() == [-1, 5, -1]
    assert int((targets >= 0).sum()) == 3
    assert advantages.tolist() == [[0.5], [-0.5]]
    inputs, targets, _ = chat_rl.policy_batch([USELESS], pad_id=0)  # a step without any of use
    assert inputs.shape == (1, 32) and (targets == -1).all()
    inputs, targets, advantages = chat_rl.policy_batch([GROUP], pad_id=0, whole_rows=4)
    assert inputs.shape == targets.shape == (4, 128)
    assert int((targets >= 0).sum()) == 3 and advantages.tolist() == [[0.5], [-0.5], [0], [0]]


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_is_that_of_the_definition(compiled: bool, base: Path) -> None:
    model = random_gpt(32, vocab_size=16, head_std=1.0)
    if compiled:  # only the shapes are: whole micro-batches of powers of two
        model.call_part = partial(call)
    expected = torch.zeros(())
    for rollout, advantage in zip(GROUP, (0.5, -0.5), strict=True):
        log_probabilities = model(torch.tensor([rollout.ids[:-1]])).log_softmax(-1)[0]
        for t, (token, sampled) in enumerate(zip(rollout.ids[1:], rollout.mask[1:], strict=True)):
            if sampled:
                expected = expected - advantage * log_probabilities[t, token] / 3
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    num_rows = 3 if compiled else 1
    with Run("rl", "d2", {"fresh": False, "run": "dummy", "log_every": 1}, CPU) as run:
        run.start(model, make_optimizer(model, 32, 4), TOKENIZER, rows=num_rows)
        whole_rows = num_rows if compiled else 0
        inputs, targets, advantages = chat_rl.policy_batch([GROUP], 0, whole_rows)
        loss = run.accumulate(Batch(inputs, targets), advantages)
    torch.testing.assert_close(loss, expected.detach())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_answers_are_sampled_from_16_bit_weights_that_follow_the_model() -> None:
    cfg, model = chat_rl.Config(max_tokens=8, num_slots=2), random_gpt(64)
    question = {"messages": [{"role": "user", "content": "?"}]}
    assert chat_rl.make_engine(cfg, model, TOKENIZER, [question]).model is model
    model.compute_dtype = torch.bfloat16
    engine = chat_rl.make_engine(cfg, model, TOKENIZER, [question])
    for _ in range(2):
        for ours, theirs in zip(engine.model.parameters(), model.parameters(), strict=True):
            assert ours.dtype == torch.bfloat16 and torch.equal(ours, theirs.bfloat16())
            theirs.data.mul_(1.5)
        chat_rl.refresh(engine, model)
