"""Time of training a BPE: ours and PyPI's `rustbpe`.

    python -m dev.bench.bpe_speed --data FOLDER            parquet shards with a column `text`

Runs are separate, interleaved processes, so that a busy machine affects both alike. uv installs
PyPI's package, whose module has the same name, into a temporary folder. Only training is timed, not
reading. The bar: at most half of PyPI's time.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import run_script
from nanochat.dataset import read_texts
from nanochat.tokenizer import SPLIT_PATTERN

# Run with: texts as JSON, vocabulary size, pattern. Prints the seconds.
TRAIN = """
import json, sys, time
import rustbpe
texts, pattern = json.load(open(sys.argv[1])), sys.argv[3]
begin = time.perf_counter()
rustbpe.Tokenizer().train_from_iterator(iter(texts), int(sys.argv[2]), pattern=pattern)
print(time.perf_counter() - begin)
"""


@dataclass
class Config:
    data: Path  # a folder of parquet shards
    megabytes: float = 50.0  # of text to train on
    vocab_size: int = 32768  # of the tokenizers
    num_threads: int = 2  # of ours and theirs
    num_runs: int = 3  # of each, interleaved


def main(cfg: Config) -> None:
    texts, num_bytes = [], 0
    for text in read_texts(sorted(cfg.data.glob("*.parquet"))):
        texts.append(text)
        num_bytes += len(text.encode())
        if num_bytes >= cfg.megabytes * 1e6:
            break
    threads = str(cfg.num_threads)
    ours = {**os.environ, "RUSTBPE_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
    with tempfile.TemporaryDirectory() as folder:
        install = ["uv", "pip", "install", "-q", "--python", sys.executable, "--target", folder]
        subprocess.run([*install, "rustbpe==0.1.0"], check=True)
        path = Path(folder, "texts.json")
        path.write_text(json.dumps(texts))
        command = [sys.executable, "-P", "-c", TRAIN, path, str(cfg.vocab_size), SPLIT_PATTERN]
        environments = {"PyPI": {**ours, "PYTHONPATH": folder}, "ours": ours}
        seconds: dict[str, list[float]] = {name: [] for name in environments}
        for _ in range(cfg.num_runs):
            for name, env in environments.items():
                seconds[name].append(float(subprocess.check_output(command, env=env)))
    pypi = statistics.median(seconds["PyPI"])
    for name, runs in seconds.items():
        median = statistics.median(runs)
        print(f"{name} {median:6.2f} s, {median / pypi:.2f} of PyPI's, median of {runs}")


if __name__ == "__main__":
    run_script(main, Config)
