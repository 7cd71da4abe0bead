"""Finetune on chosen conversations (SFT): the midtrained model learns to answer well.

    python -m scripts.chat_sft                                        # one GPU
    torchrun --nproc_per_node=8 -m scripts.chat_sft                   # eight
    python -m scripts.chat_sft --mixture primer --total_batch_size 4096 --device_batch_size 16  # laptop

reads: mid/<model tag>/, the mixture's data sets
writes: sft/<model tag>/ (checkpoints, metrics.jsonl, tokenizer, config.json), report/chat_sft.json
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
        "mid"  # stage of the checkpoint to start from
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
    total_batch_size: int = 65536  # tokens a step over all ranks
    device_batch_size: int | Literal["auto"] = 32  # rows per micro-batch; auto: what fits
    lr_scale: float = 0.1  # times the learning rates of pretraining
    warmdown: float = 1.0  # last part of the run, in which the learning rate falls to 0
    # machine
    device_type: str = ""  # cpu, cuda or mps; empty: the best there is
    dtype: str = "auto"  # of the matmuls: auto, float32 or bfloat16; master weights are fp32
    compile: Literal["auto", "yes", "no"] = "auto"  # torch.compile; auto: on a GPU
    seed: int = 0  # of the order of the conversations
    # the run
    run: str = "dummy"  # wandb name; dummy: no wandb
    fresh: bool = False  # start over instead of resuming
    log_every: int = 10  # steps between console lines
    eval_every: int = 100  # steps between validations; <= 0: at the end alone
    eval_tokens: int = 1_048_576  # tokens of one validation
    save_every: int = 500  # steps between checkpoints; <= 0: at the end alone
    keep_last: int = 3  # newest checkpoints to keep; <= 0: all


def main(cfg: Config) -> None:
    """Finetune, or go on finetuning, one model."""
    train = build_mixture("sft", cfg.mixture, cfg.custom)
    val = build_mixture("val", cfg.mixture)
    results = finetune("sft", cfg, train, val)
    if results is not None:
        write_section(
            "chat_sft", "Supervised finetuning", vars(cfg), results, seconds=results["seconds"]
        )


if __name__ == "__main__":
    run_script(main, Config)
