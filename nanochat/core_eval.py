"""Multiple choice as the CORE metric scores it: the choice whose own tokens surprise the model least.

Every choice is a full document, few-shot examples included. All choices of an item share a beginning; what
is scored is the mean loss of the tokens after it. Rows of all items are sorted by length and batched.

The choice that would surprise: `<|bos|>` stays first even where a prompt is longer than the context. The
text is then cropped from the left behind it, because the model has never seen a row without.

Source: DCLM, arXiv 2406.11794, and its multiple-choice evaluation in document form.

B rows, T time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChoiceScore:
    """What the model made of one item."""

    prediction: int  # index of the choice with the lowest loss; the first of equals
    gold: int
    losses: list[float]  # mean nats per scored token; infinite for a choice with none of its own

    @property
    def correct(self) -> bool:
        """True where the model chose as it should have."""
        return self.prediction == self.gold


@dataclass
class Row:
    """One choice, ready for the model: tokens from `begin` on are scored."""

    ids: list[int]
    begin: int


def score_choices(
    model: GPT, tokenizer: Tokenizer, items: Sequence[tuple[Sequence[str], int]], batch_size: int
) -> list[ChoiceScore]:
    """The score of every item (full text of each choice, index of the right one), in order.

    `batch_size` counts choices, not items.
    """
    rows: list[Row] = []
    for texts, _ in items:
        rows += choice_rows(tokenizer, texts, model.config.sequence_len)
    losses = iter(span_losses(model, rows, batch_size))
    scores = []
    for texts, gold in items:
        own = [next(losses) for _ in texts]
        scores.append(ChoiceScore(own.index(min(own)), gold, own))
    return scores


def choice_rows(tokenizer: Tokenizer, texts: Sequence[str], max_len: int) -> list[Row]:
    """The rows of one item; scored is what follows the tokens that all of its choices begin with."""
    choices = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    same = takewhile(lambda column: len(set(column)) == 1, zip(*choices, strict=False))
    num_common = sum(1 for _ in same)
    rows = []
    for ids in choices:
        num_cut = max(0, len(ids) - max_len)
        # Position 0 is `<|bos|>`, which nothing predicts.
        rows.append(Row(ids[:1] + ids[1 + num_cut :], max(1, num_common - num_cut)))
    return rows


@torch.inference_mode()
def span_losses(model: GPT, rows: Sequence[Row], batch_size: int) -> list[float]:
    """Mean nats per scored token of each row; infinity where there is none."""
    device = next(model.parameters()).device
    means = [0.0] * len(rows)
    order = sorted(
        range(len(rows)), key=lambda i: -len(rows[i].ids)
    )  # longest first: OOM comes early
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(rows[i].ids) for i in batch)
        ids = torch.full((len(batch), longest), rows[batch[0]].ids[0])  # (B, T), padded with bos
        targets = torch.full((len(batch), longest), -1)
        for b, i in enumerate(batch):
            row, length = torch.tensor(rows[i].ids), len(rows[i].ids)
            ids[b, :length] = row
            targets[b, rows[i].begin - 1 : length - 1] = row[rows[i].begin :]
        targets = targets.to(device)
        nats = model(ids.to(device), targets, reduction="none").reshape(targets.shape).double()
        counts = (targets >= 0).sum(1)
        sums = torch.where(targets >= 0, nats, 0.0).sum(1)
        mean = torch.where(counts > 0, sums / counts.clamp(min=1), torch.inf)
        for i, value in zip(batch, mean.tolist(), strict=True):
            means[i] = value
    return means
