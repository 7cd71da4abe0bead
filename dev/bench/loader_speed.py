"""How many tokens per second the text loader delivers alone, with its background thread.

    python -m dev.bench.loader_speed        the corpus and tokenizer prepared last

Per CPU second is printed too, since other processes on the machine disturb it less. The bar: at least 1 M
tokens/s on two cores at T = 512.
"""

import time
from dataclasses import dataclass

import tyro

from nanochat.common import tokenizer_dir
from nanochat.dataloader import TextLoader
from nanochat.dataset import find_corpus
from nanochat.tokenizer import Tokenizer


@dataclass
class Config:
    """Measure the text loader."""

    data: str = ""  # name of the corpus; default: the one prepared last
    num_rows: int = 8  # of a batch
    seq_len: int = 512  # tokens of a row
    num_tokens: int = 10_000_000  # in all


def main(cfg: Config) -> None:
    """Print the speed after the first batch."""
    tokenizer = Tokenizer.load(tokenizer_dir())
    shards = find_corpus(cfg.data).train
    loader = TextLoader(tokenizer, shards, cfg.num_rows, cfg.seq_len, 0, 1, "cpu")
    next(loader)
    count, begin, cpu_begin = 0, time.perf_counter(), time.process_time()
    while count < cfg.num_tokens:
        count += next(loader).inputs.numel()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    loader.close()
    print(
        f"{count / seconds / 1e6:.2f} M tokens/s, {count / cpu_seconds / 1e6:.2f} M per CPU second"
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
