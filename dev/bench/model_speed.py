"""What one training step of the model costs on a CPU, with autograd's own operations and with nanochat.fused.

    python -m dev.bench.model_speed

Measures CPU seconds of one thread, step by step in turn, so that a busy machine disturbs both sides alike.
Then the decode step of 16 slots at two fillings of the cache.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nanochat import fused, gpt
from nanochat.kv_cache import KVCache

SIZES = {  # name -> rows, tokens, channels, vocabulary; 4 layers of heads of 64
    "width 256": (8, 512, 256, 4096),
    "width 128": (16, 256, 128, 1024),
}
REPEATS = 7


def plain_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), -1)


def plain_loss(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, _: int, softcap: float, __: str
) -> torch.Tensor:
    return F.cross_entropy(softcap * torch.tanh(F.linear(x, weight) / softcap), targets)


OURS: dict[str, Callable] = {
    name: getattr(fused, name) for name in ("norm", "rotate", "relu_squared", "softcap_loss")
}
PLAIN: dict[str, Callable] = {
    "norm": lambda x: F.rms_norm(x, (x.shape[-1],), eps=fused.NORM_EPS),
    "rotate": plain_rotate,
    "relu_squared": lambda x: F.relu(x).square(),
    "softcap_loss": plain_loss,
}


def build(tokens: int, channels: int, vocab: int) -> gpt.GPT:
    """A model of 4 layers whose every matrix is busy."""
    heads = channels // 64
    config = gpt.GPTConfig(tokens, vocab, 4, heads, heads, channels)
    model = gpt.GPT(config)
    model.init_weights()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(0, 0.02)
    return model


def milliseconds(work: Callable[[], object]) -> float:
    """CPU time of this thread."""
    begin = time.thread_time()
    work()
    return 1e3 * (time.thread_time() - begin)


def time_training(name: str) -> None:
    """Print the best step with none, each and all of our operations."""
    rows, tokens, channels, vocab = SIZES[name]
    model = build(tokens, channels, vocab)
    ids = torch.randint(0, vocab, (rows, tokens + 1))

    def step() -> None:
        model.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()

    variants = {"plain": PLAIN, **{f"only {k}": {**PLAIN, k: OURS[k]} for k in OURS}, "all": OURS}
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(REPEATS):
        for variant, operations in variants.items():
            for operation, function in operations.items():
                setattr(gpt, operation, function)
            times[variant].append(milliseconds(step))
    for variant, every in times.items():
        print(f"{name}, {rows} x {tokens} tokens, {variant:20} {min(every):7.0f} ms")


def time_decoding(name: str, num_slots: int = 16) -> None:
    """Print the best decode step of all slots, the cache an eighth full and nearly full."""
    _, tokens, channels, vocab = SIZES[name]
    model = build(tokens, channels, vocab)
    cache = KVCache(model.config, num_slots, tokens)
    ids = torch.randint(0, vocab, (num_slots, 1))
    with torch.inference_mode():
        for filled in (tokens // 8, tokens - 1):
            every = []
            for _ in range(4 * REPEATS):
                cache.lengths[:] = filled
                every.append(milliseconds(lambda: model(ids, cache=cache)))
            print(f"{name}, decode {num_slots} slots after {filled:4} tokens {min(every):7.2f} ms")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for size in SIZES:
        time_training(size)
        time_decoding(size)
