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
from collections.abc import Callable, Sized
from dataclasses import dataclass
from itertools import islice

import tiktoken

from nanochat.common import Count, print0, run_script, tokenizer_dir
from nanochat.dataset import find_corpus, read_texts
from nanochat.report import write_section
from nanochat.tokenizer import Tokenizer

REFERENCES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}  # name here -> tiktoken's
SAMPLES = {
    "English": """\
The lighthouse keeper had two rules. The lamp must be lit before the last boat leaves the
harbour, and nobody climbs the stairs with wet boots. On the night of the storm she broke the
second rule eleven times, and the first one not at all. "It's only water," she told the inspector.
He didn't answer.
""",
    "code": '''\
def longest_run(values: list[int]) -> tuple[int, int]:
    """Return (start, length) of the longest run of equal neighbours."""
    best_start, best_length, start = 0, 0, 0
    for i, value in enumerate(values):
        if i > 0 and value != values[i - 1]:
            start = i
        if i - start + 1 > best_length:
            best_start, best_length = start, i - start + 1
    return best_start, best_length
for (int row = 0; row < height; row++) { sum += pixels[row * width + column] & 0xFF; }
''',
    "maths": r"""
Let $a_1 = 3$ and $a_{n+1} = 2a_n - 1$ for $n \geq 1$. Then $a_n - 1$ doubles at each step, so
$a_n = 2^n + 1$; the sum of the first 10 terms is $\sum_{n=1}^{10} (2^n + 1) = 2046 + 10 = 2056$.
Check: 3 + 5 + 9 + 17 + 33 + 65 + 129 + 257 + 513 + 1025 = 2056. A car that covers 184.5 km in
2 h 15 min moves at 184.5 / 2.25 = 82 km/h, and \frac{7}{8} of 1,296 is 1,134.
""",
    "languages": """\
Der Zug nach Köln fährt heute von Gleis 7, nicht von Gleis 12. La boulangère ferme à
dix-huit heures, sauf le jeudi. Mañana volveremos a la playa si deja de llover.
Завтра в библиотеке откроют новый зал.
今天下午我们在河边看见了三只白色的鸟。夏の朝、庭に小さな猫が来ました。오늘은 바람이 불고 조금 춥습니다.
في الصباح نشرب الشاي قرب النافذة.
बच्चे स्कूल के बाद मैदान में खेलते हैं। Η θάλασσα ήταν ήσυχη χθες το βράδυ.
""",
}


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
