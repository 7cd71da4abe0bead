"""Finetune on chosen conversations (SFT): the midtrained model learns to answer well.

    python -m scripts.chat_sft                                                # one GPU
    torchrun --nproc_per_node=8 -m scripts.chat_sft                           # eight
    python -m scripts.chat_sft --mixture primer --total_batch_size 4096       # laptop

reads: mid/<model tag>/, the mixture's data sets
writes: sft/<model tag>/ (checkpoints, metrics.jsonl, tokenizer, config.json), report/chat_sft.json
"""

from dataclasses import dataclass

from nanochat.common import Count, Positive, Source, run_script
from nanochat.finetuning import FinetuneConfig, finetune
from tasks.mixtures import Mixtures


@dataclass
class Config(FinetuneConfig):
    source: Source = "mid"  # stage of the checkpoint to start from
    total_batch_size: Count = 65536  # tokens a step over all ranks
    lr_scale: Positive = 0.1  # multiplies the learning rates of pretraining
    eval_every: int = 100  # steps between validations; <= 0: only at the end
    eval_tokens: Count = 1_048_576  # tokens of one validation


def main(cfg: Config) -> None:
    mixtures = Mixtures(cfg)
    finetune("sft", "Supervised finetuning", cfg, mixtures.build, mixtures.digest)


if __name__ == "__main__":
    run_script(main, Config)
