"""Midtrain: a base model learns the form of conversations, tools and multiple choice.

    python -m scripts.mid_train                                        # one GPU
    torchrun --nproc_per_node=8 -m scripts.mid_train                   # eight
    python -m scripts.mid_train --mixture primer --total_batch_size 4096 --device_batch_size 16  # laptop

reads: base/<model tag>/, the mixture's data sets
writes: mid/<model tag>/ (checkpoints, metrics.jsonl, tokenizer, config.json), report/mid_train.json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nanochat.finetuning import finetune
from nanochat.report import write_section
from nanochat.runtime import run_script
from tasks.mixtures import build_mixture


@dataclass
class Config:
    # from where
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = (
        "base"  # stage of the checkpoint to start from
    )
    model_tag: Annotated[str, tyro.conf.arg(aliases=["-g"])] = (
        ""  # its run; empty: the one written last
    )
    step: Annotated[int | None, tyro.conf.arg(aliases=["-s"])] = (
        None  # its step; the newest if left out
    )
    # data
    mixture: Literal["default", "primer"] = (
        "default"  # default: public data sets; primer: the embedded world
    )
    custom: Path | None = None  # your own conversations, .jsonl, added to the mixture
    num_epochs: int = 1  # passes over the mixture
    num_iterations: int = -1  # steps; -1: all epochs
    # batch and steps
    max_seq_len: int = -1  # tokens of a row; -1: the model's context
    total_batch_size: int = 524288  # tokens a step over all ranks
    device_batch_size: int | Literal["auto"] = 32  # rows per micro-batch; auto: what fits
    lr_scale: float = 1.0  # times the learning rates of pretraining
    warmdown: float = 0.2  # last part of the run, in which the learning rate falls to 0
    # machine
    device_type: str = ""  # cpu, cuda or mps; empty: the best there is
    dtype: str = "auto"  # of the matmuls: auto, float32 or bfloat16; master weights are fp32
    compile: Literal["auto", "yes", "no"] = "auto"  # torch.compile; auto: on a GPU
    seed: int = 0  # of the order of the conversations
    # the run
    run: str = "dummy"  # wandb name; dummy: no wandb
    fresh: bool = False  # start over instead of resuming
    log_every: int = 10  # steps between console lines
    eval_every: int = 150  # steps between validations; <= 0: at the end alone
    eval_tokens: int = 10_485_760  # tokens of one validation
    save_every: int = 500  # steps between checkpoints; <= 0: at the end alone
    keep_last: int = 3  # newest checkpoints to keep; <= 0: all


def main(cfg: Config) -> None:
    """Midtrain, or go on midtraining, one model."""
    train = build_mixture("mid", cfg.mixture, cfg.custom)
    val = build_mixture("val", cfg.mixture)
    results = finetune("mid", cfg, train, val)
    if results is not None:
        write_section("mid_train", "Midtraining", vars(cfg), results, seconds=results["seconds"])


if __name__ == "__main__":
    run_script(main, Config)
