"""Seconds for the tasks of CORE with a random model of depth 4, and how much reading items together saves.

    NANOCHAT_EVAL_BUNDLE=FOLDER python -m dev.bench.core_speed   # with the tokenizer in $NANOCHAT_BASE_DIR

First the same few items of each task are scored in turn by core_eval and plainly: one document at a time, in one
forward pass, with the logits of all its tokens. Then all tasks are timed once with core_eval.
"""

import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro

from nanochat.common import tokenizer_dir
from nanochat.core_eval import CoreTask, GPTReader, encode_item, evaluate, find_bundle, load_tasks
from nanochat.gpt import GPT
from nanochat.scaling import depth_to_config
from nanochat.tokenizer import Tokenizer


@dataclass
class Config:
    depth: int = 4  # layers
    max_seq_len: int = 2048  # tokens of context
    max_per_task: int = 100  # items of each task in the long run
    batch_size: int = 32  # items read at once
    num_compared: int = 8  # items of each task that are also scored plainly
    num_rounds: int = 3  # of the comparison
    eval_bundle: str = ""  # folder with core.yaml; empty: downloaded once


@torch.inference_mode()
def score_plainly(reader: GPTReader, task: CoreTask, num: int) -> list[list[float]]:
    """Mean nats of every option of the first `num` items."""
    losses: list[list[float]] = []
    for number in range(min(num, len(task.rows))):
        item = encode_item(reader, task, number)
        losses.append([])
        for tail, num_scored in zip(item.tails, item.num_scored, strict=True):
            ids = torch.tensor(item.prefix + tail)
            logits = reader.model(ids[None])[0, :-1]  # (T, V)
            nats = F.cross_entropy(logits, ids[1:], reduction="none")
            losses[-1].append(float(nats[-num_scored:].mean()))
    return losses


def compare(reader: GPTReader, tasks: list[CoreTask], cfg: Config) -> None:
    """Print the median seconds of both ways, their ratio, and how far their losses are apart."""
    seconds: dict[str, list[float]] = {"together": [], "plainly": []}
    together, plain = [], []
    for _ in range(cfg.num_rounds):
        begin = time.perf_counter()
        results = [evaluate(reader, task, cfg.batch_size, cfg.num_compared) for task in tasks]
        middle = time.perf_counter()
        plain = [own for task in tasks for own in score_plainly(reader, task, cfg.num_compared)]
        seconds["together"].append(middle - begin)
        seconds["plainly"].append(time.perf_counter() - middle)
        together = [record["losses"] for result in results for record in result.records]
    pairs = [pair for own in zip(together, plain, strict=True) for pair in zip(*own, strict=True)]
    apart = max(abs(loss - other) for loss, other in pairs if loss is not None)
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    ratio = medians["plainly"] / medians["together"]
    print(f"{len(together)} items: {medians}, {ratio:.2f} times faster, losses {apart:.1e} apart")


def main(cfg: Config) -> None:
    """Compare, then time all tasks."""
    tokenizer = Tokenizer.load(tokenizer_dir())
    model = GPT(depth_to_config(cfg.depth, tokenizer.vocab_size, cfg.max_seq_len)).eval()
    model.init_weights()
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, 0, 0.02)  # so that no matrix is zero
    reader = GPTReader(model, tokenizer, cfg.batch_size)
    tasks = load_tasks(find_bundle(cfg.eval_bundle))
    compare(reader, tasks, cfg)
    begin = time.perf_counter()
    nums = [len(evaluate(reader, task, cfg.batch_size, cfg.max_per_task).records) for task in tasks]
    print(f"{len(nums)} tasks, {sum(nums)} items: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Config))
