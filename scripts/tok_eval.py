"""Measure the tokenizer's compression on several kinds of text, compared with GPT-2's and GPT-4's.

    python -m scripts.tok_eval                              # in seconds, on one CPU core
    TIKTOKEN_CACHE_DIR=vocabularies python -m scripts.tok_eval   # beside GPT-2 and GPT-4

tiktoken reads those vocabularies from TIKTOKEN_CACHE_DIR or downloads them into it; if it is unset,
bytes and words are the yardsticks. The measure is bytes per token, not characters, so that a script
of three bytes a letter does not look badly compressed.

reads:  tokenizer/tokenizer.json, the first documents of a training and of the validation shard
writes: report/tok_eval.json
"""

import os
import re
from collections.abc import Callable, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tiktoken

from nanochat.common import Count, print0, run_script, tokenizer_dir
from nanochat.dataset import find_corpus, read_texts
from nanochat.report import write_section
from nanochat.tokenizer import Tokenizer

REFERENCES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}  # name here -> tiktoken's
# Kind of text -> an example of it.
TEXT = Path(__file__).with_suffix(".txt").read_text("utf-8")
SAMPLES = dict(part.split("\n", 1) for part in re.split("^== ", TEXT, flags=re.MULTILINE)[1:])


@dataclass
class Config:
    data: str = ""  # name of the corpus; default: the one prepared last
    num_documents: Count = 500  # of a training shard and of the validation shard


def find_yardsticks() -> dict[str, Callable[[str], Sized]]:
    """Name -> function that cuts a text up: the references, else into bytes and into words."""
    found = {}
    for name, encoding in REFERENCES.items() if os.environ.get("TIKTOKEN_CACHE_DIR") else ():
        try:
            found[name] = tiktoken.get_encoding(encoding).encode_ordinary
        except (OSError, ValueError) as error:
            print0(f"{name}'s vocabulary cannot be loaded: left out ({error})")
    return found or {"bytes": str.encode, "words": str.split}


def main(cfg: Config) -> None:
    tokenizer = Tokenizer.load(tokenizer_dir())
    corpus, texts = find_corpus(cfg.data), {name: [text] for name, text in SAMPLES.items()}
    for split, shard in (("train", corpus.train[0]), ("val", corpus.val)):
        texts[f"{corpus.name}, {split}"] = list(islice(read_texts([shard]), cfg.num_documents))
    yardsticks = {"ours": tokenizer.encode, **find_yardsticks()}
    results: dict[str, str | float] = {"vocabulary": tokenizer.vocab_size}
    print0(f"{'bytes per token':20}" + "".join(f"{name:>9}" for name in yardsticks))
    for kind, documents in texts.items():
        num_bytes = sum(len(text.encode()) for text in documents)
        line = f"{kind:20}"
        for name, cut in yardsticks.items():
            ratio = num_bytes / max(1, sum(len(cut(text)) for text in documents))
            results[f"{kind}: bytes per token, {name}"] = round(ratio, 3)
            line += f"{ratio:9.3f}"
        print0(line)
    write_section("tok_eval", "Tokenizer compression", vars(cfg), results)


if __name__ == "__main__":
    run_script(main, Config)
