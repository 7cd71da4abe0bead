"""Midtrain: a base model learns the form of conversations, tools and multiple choice.

    python -m scripts.mid_train                                                # one GPU
    torchrun --nproc_per_node=8 -m scripts.mid_train                           # eight
    python -m scripts.mid_train --mixture primer --total_batch_size 4096       # laptop

reads: base/<model tag>/, the mixture's data sets
writes: mid/<model tag>/ (checkpoints, metrics.jsonl, tokenizer, config.json), report/mid_train.json
"""

from dataclasses import dataclass

from nanochat.common import run_script
from nanochat.finetuning import FinetuneConfig, finetune
from tasks.mixtures import Mixtures


@dataclass
class Config(FinetuneConfig):
    """Midtrain a model."""


def main(cfg: Config) -> None:
    mixtures = Mixtures(cfg)
    finetune("mid", "Midtraining", cfg, mixtures.build, mixtures.digest)


if __name__ == "__main__":
    run_script(main, Config)
