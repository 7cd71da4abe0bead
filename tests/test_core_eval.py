"""Multiple choice in document form, against an evaluator that reads one choice at a time.

The oracle is written from the definition: no batches, no padding, the loss from the full logits.
"""

import math
import random

import pytest
import torch

from nanochat.chat_format import SPECIAL_TOKENS
from nanochat.core_eval import score_choices
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPLIT_PATTERN, Tokenizer

TOKENIZER = Tokenizer([bytes([byte]) for byte in range(256)], SPECIAL_TOKENS, SPLIT_PATTERN)
CONTEXT = 48


def random_model() -> GPT:
    config = GPTConfig(CONTEXT, TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model = GPT(config)
    model.init_weights(1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def random_items(num: int) -> list[tuple[list[str], int]]:
    """Documents of 5 to 90 characters, so that some are longer than the context, of 2 to 5 choices."""
    random_ = random.Random(2)
    items = []
    for _ in range(num):
        prompt = "".join(random_.choices("abc é日", k=random_.randint(5, 60)))
        choices = [
            "".join(random_.choices("xyz", k=random_.randint(1, 9)))
            for _ in range(random_.randint(2, 5))
        ]
        items.append(
            ([f"{prompt} {choice}" for choice in choices], random_.randrange(len(choices)))
        )
    return items


@torch.inference_mode()
def slow_losses(model: GPT, texts: list[str]) -> list[float]:
    rows = [[TOKENIZER.bos_id, *TOKENIZER.encode(text)] for text in texts]
    common = 0
    while all(len(row) > common and row[common] == rows[0][common] for row in rows):
        common += 1
    losses = []
    for row in rows:
        scored = row[common:]
        if len(row) > CONTEXT:
            row = [TOKENIZER.bos_id, *row[-(CONTEXT - 1) :]]
        scored = scored[-(CONTEXT - 1) :]
        logs = model(torch.tensor([row]))[0].double().log_softmax(-1)
        first = len(row) - len(scored)
        nats = [-float(logs[first + i - 1, token]) for i, token in enumerate(scored)]
        losses.append(sum(nats) / len(nats) if nats else math.inf)
    return losses


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_equals_one_at_a_time(batch_size: int) -> None:
    model, items = random_model(), random_items(25)
    scores = score_choices(model, TOKENIZER, items, batch_size)
    assert len(scores) == len(items)
    for score, (texts, gold) in zip(scores, items, strict=True):
        expected = slow_losses(model, texts)
        assert score.losses == pytest.approx(expected, rel=1e-4)
        assert score.prediction == min(range(len(texts)), key=lambda i: expected[i])
        assert score.gold == gold and score.correct == (gold == score.prediction)


def test_a_choice_that_begins_another_has_no_tokens_of_its_own() -> None:
    [score] = score_choices(random_model(), TOKENIZER, [(["a b", "a b c"], 1)], 4)
    assert score.losses[0] == math.inf and score.prediction == 1 and score.correct


def test_what_the_model_has_learned_wins() -> None:
    """A model trained on one document prefers its ending, few-shot examples before it or not."""
    model = random_model()
    ids = torch.tensor([[TOKENIZER.bos_id, *TOKENIZER.encode("the sky is blue")]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:].contiguous()).backward()
        optimizer.step()
    items = [([f"the sky is {colour}" for colour in ("red", "blue", "green")], 1)]
    assert score_choices(model, TOKENIZER, items, 8)[0].correct
