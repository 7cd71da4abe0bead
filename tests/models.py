"""What many tests share: refusals, a tokenizer of bytes, and small random models on the CPU."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.checkpoint import save_checkpoint
from nanochat.common import Runtime, UserError, run_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

CPU = Runtime(torch.device("cpu"), torch.float32, 0, 1, "cpu")
TOKENIZER = Tokenizer([bytes([byte]) for byte in range(256)], SPECIAL_TOKENS, SPLIT_PATTERN)


def refuses(match: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """What `function` raises of `arguments`: a UserError of one line that `match` is found in."""
    with pytest.raises(UserError, match=match) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def random_gpt(
    context: int = 64,
    vocab_size: int = TOKENIZER.vocab_size,
    width: int = 32,
    head_std: float = 0.0,  # with 0 every token is as likely
) -> GPT:
    config = GPTConfig(context, vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=width)
    model = GPT(config)
    model.init_weights(0)
    if head_std:
        generator = torch.Generator().manual_seed(1)
        torch.nn.init.normal_(model.lm_head.weight, 0, head_std, generator)
    return model.eval()


def busy_gpt(config: GPTConfig, seed: int = 0) -> GPT:
    """Every parameter is random: the zeros of initialisation would hide faults."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.15, generator=generator)
    return model.eval()


def random_ids(rows: int, time: int, vocab_size: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (rows, time), generator=generator)


def save_model(
    model: GPT, stage: str, tag: str, step: int, tokenizer: Tokenizer = TOKENIZER, **state: Any
) -> Path:
    """The folder of a run, with one checkpoint in it; `state` is more of what it holds."""
    folder = run_dir(stage, tag)
    tokenizer.save(folder / "tokenizer")
    state |= {"step": step, "model_config": asdict(model.config)}
    save_checkpoint(folder, state, model.state_dict(), {}, None, CPU)
    return folder


def memorise(model: GPT, rows: list[list[int]], masks: list[list[int]], steps: int) -> None:
    """Train until the model knows by heart the tokens whose mask is 1."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    scored = torch.tensor([mask + [0] * (longest - len(mask)) for mask in masks])
    targets = torch.where(scored == 1, ids, -1)[:, 1:].contiguous()
    names, params = zip(*model.named_parameters(), strict=True)
    options = {"kind": "adamw", "lr": 0.02, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
    optimizer = MuonAdamW([options | {"params": list(params), "names": list(names)}])
    for _ in range(steps):
        model(ids[:, :-1].contiguous(), targets).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)


def slow_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
    seqused_k: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    """What torch's documentation says of its flash kernel, which no CPU has; sequence by sequence.

    Tokens that no sequence has come out as NaN, as whatever lies in memory may be.
    """
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size[1] == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert (seqused_k is not None) == (num_splits == 1)
    groups = query.shape[1] // key.shape[1]
    out = torch.full_like(query, torch.nan)
    for b in range(len(cu_seq_q) - 1):
        begin, end = int(cu_seq_q[b]), int(cu_seq_q[b + 1])
        first = int(cu_seq_k[b])
        count = int(cu_seq_k[b + 1]) - first if seqused_k is None else int(seqused_k[b])
        assert end - begin <= max_q and count <= max_k
        k, v = (part[first : first + count].repeat_interleave(groups, 1) for part in (key, value))
        age = torch.arange(count - (end - begin), count)[:, None] - torch.arange(count)
        hidden = (age < 0) | ((age > window_size[0]) & (window_size[0] >= 0))
        scores = torch.einsum("qhd,khd->hqk", query[begin:end], k) * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, v)
    return out
