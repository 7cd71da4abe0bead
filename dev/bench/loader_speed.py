"""How many tokens per second the text loader delivers alone, and where its time goes.

    python -m dev.bench.loader_speed                               the corpus and tokenizer prepared last
    python -m dev.bench.loader_speed --data=FOLDER --tokenizer=FOLDER --seq-len=512

First the whole loader with its background thread, as a trainer sees it; then its packer on this thread, with a
clock around each part. The bar: at least 1 M tokens/s on two cores at T = 512.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from nanochat.dataloader import TextLoader, Texts
from nanochat.dataset import find_corpus
from nanochat.packing import Packer, Shape
from nanochat.paths import tokenizer_dir
from nanochat.tokenizer import Tokenizer


@dataclass
class Config:
    """Measure the text loader."""

    data: str = (
        ""  # a corpus by name, or a folder of parquet shards; empty: the corpus prepared last
    )
    tokenizer: str = ""  # a folder; empty: the tokenizer trained last
    num_rows: int = 8
    seq_len: int = 512
    num_tokens: int = 10_000_000


class TimedTexts(Texts):
    """Texts that keep the seconds spent in reading and in tokenising."""

    seconds_reading = seconds_tokenising = 0.0

    def read(self, first: int) -> Iterator[str]:
        texts = super().read(first)
        while True:
            begin = time.perf_counter()
            text = next(texts)
            self.seconds_reading += time.perf_counter() - begin
            yield text

    def encode(self, documents: list[str]) -> list[tuple[np.ndarray, bool]]:
        begin = time.perf_counter()
        pieces = super().encode(documents)
        self.seconds_tokenising += time.perf_counter() - begin
        return pieces


def find_shards(data: str) -> list[Path]:
    """The training shards of a corpus by name, or all but the last of a folder."""
    if Path(data).is_dir() and data:
        return sorted(Path(data).glob("*.parquet"))[:-1]
    return find_corpus(data).train


def measure_loader(loader: Any, num_tokens: int) -> tuple[float, float, float]:
    """(tokens per second, tokens per CPU second, both after the first batch; seconds until the first batch)."""
    begin = time.perf_counter()
    next(loader)
    first = time.perf_counter() - begin
    count, begin, cpu_begin = 0, time.perf_counter(), time.process_time()
    while count < num_tokens:
        count += next(loader).inputs.numel()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    return count / seconds, count / cpu_seconds, first


def main(cfg: Config) -> None:
    """Print both measurements."""
    shards = find_shards(cfg.data)
    tokenizer = Tokenizer.load(Path(cfg.tokenizer) if cfg.tokenizer else tokenizer_dir())
    loader = TextLoader(tokenizer, shards, cfg.num_rows, cfg.seq_len, 0, 1, "cpu")
    speed, cpu_speed, first = measure_loader(loader, cfg.num_tokens)
    loader.close()
    print(
        f"loader: {speed / 1e6:.2f} M tokens/s ({cpu_speed / 1e6:.2f} M per CPU second, which other processes "
        f"on the machine disturb less); first batch after {first:.2f} s"
    )

    source = TimedTexts(tokenizer, shards)
    packer = Packer(source, Shape(cfg.num_rows, cfg.seq_len), None)
    begin, count, seconds_snapshots = time.perf_counter(), 0, 0.0
    while count < cfg.num_tokens:
        count += packer.next_rows().size
        before = time.perf_counter()
        packer.snapshot()
        seconds_snapshots += time.perf_counter() - before
    total = time.perf_counter() - begin
    parts = {
        "reading": source.seconds_reading,
        "tokenising": source.seconds_tokenising,
        "snapshots": seconds_snapshots,
    }
    parts["dealing and packing"] = total - sum(parts.values())
    print(" | ".join(f"{name} {seconds / total:.1%}" for name, seconds in parts.items()))


if __name__ == "__main__":
    main(tyro.cli(Config))
