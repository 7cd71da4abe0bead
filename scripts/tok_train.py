"""Train the tokenizer on the first characters of a corpus.

    python -m scripts.tok_train                                         # 32,768 ids
    python -m scripts.tok_train --vocab_size=4096 --max_chars=20000000  # a laptop, in seconds

Runs on CPU threads. Only the first 10,000 characters of a document count, so that a few books do
not decide the vocabulary of a corpus of pages.

reads:  base_data/NAME/shard_*.parquet (the training shards)
writes: tokenizer/tokenizer.json, report/tok_train.json
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from nanochat.common import Count, print0, run_script, tokenizer_dir
from nanochat.dataset import find_corpus, read_texts
from nanochat.report import write_section
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer


@dataclass
class Config:
    vocab_size: int = 32_768  # ids in all, the special tokens included
    max_chars: Count = 2_000_000_000  # characters to train on
    max_doc_chars: Count = 10_000  # characters of one document that count
    data: str = ""  # name of the corpus; default: the one prepared last


def beginnings(texts: Iterable[str], cfg: Config, read: Counter[str]) -> Iterator[str]:
    """The beginnings of documents, `max_chars` characters in all; `read` counts what it gave."""
    for text in texts:
        text = text[: min(cfg.max_doc_chars, cfg.max_chars - read["characters"])]
        read.update(characters=len(text), documents=1)
        yield text
        if read["characters"] >= cfg.max_chars:
            return


def main(cfg: Config) -> None:
    corpus, read = find_corpus(cfg.data), Counter[str]()
    print0(f"training a tokenizer of {cfg.vocab_size:,} ids on the corpus {corpus.name}")
    begin = time.perf_counter()
    texts = beginnings(read_texts(corpus.train), cfg, read)
    tokenizer = Tokenizer.train(texts, cfg.vocab_size, SPECIAL_TOKENS)
    seconds = time.perf_counter() - begin
    tokenizer.save(tokenizer_dir())
    text = f"{read['characters']:,} characters of {read['documents']:,} documents"
    print0(f"{text} in {seconds:.1f} s")
    if (num_ids := tokenizer.vocab_size) < cfg.vocab_size:
        print0(f"the text holds no more than {num_ids:,} ids: nothing is left to merge")
    lengths = [length for length in tokenizer.token_bytes() if length > 0]
    results = {
        "corpus": corpus.name,
        "vocabulary": num_ids,
        **read,
        "mean bytes of a token": sum(lengths) / len(lengths),
        "longest token in bytes": max(lengths),
    }
    write_section("tok_train", "Tokenizer training", vars(cfg), results, seconds=seconds)


if __name__ == "__main__":
    run_script(main, Config)
