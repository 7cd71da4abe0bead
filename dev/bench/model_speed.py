"""What one training step of the model costs on a CPU, with autograd's own operations and with nanochat.fused.

    python -m dev.bench.model_speed

Measures CPU seconds of one thread, step by step in turn, so that a busy machine disturbs both sides alike.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from nanochat import gpt, loss

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
    name: getattr(loss, name) for name in ("norm", "rotate", "relu_squared", "softcap_loss")
}
PLAIN: dict[str, Callable] = {
    "norm": lambda x: F.rms_norm(x, (x.shape[-1],), eps=loss.NORM_EPS),
    "rotate": plain_rotate,
    "relu_squared": lambda x: F.relu(x).square(),
    "softcap_loss": plain_loss,
}


def time_training(name: str) -> None:
    """Print the best step with none, each and all of our operations."""
    rows, tokens, channels, vocab = SIZES[name]
    heads = channels // 64
    model = gpt.GPT(gpt.GPTConfig(tokens, vocab, 4, heads, heads, channels))
    model.init_weights()
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, 0, 0.02)  # so that no matrix is zero
    ids = torch.randint(0, vocab, (rows, tokens + 1))
    variants = {"plain": PLAIN, **{f"only {k}": {**PLAIN, k: OURS[k]} for k in OURS}, "all": OURS}
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(REPEATS):
        for variant, operations in variants.items():
            for operation, function in operations.items():
                setattr(gpt, operation, function)
            begin = time.thread_time()
            model.zero_grad()
            model(ids[:, :-1], ids[:, 1:]).backward()
            times[variant].append(1e3 * (time.thread_time() - begin))
    for variant, every in times.items():
        print(f"{name}, {rows} x {tokens} tokens, {variant:20} {min(every):7.0f} ms")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for size in SIZES:
        time_training(size)
