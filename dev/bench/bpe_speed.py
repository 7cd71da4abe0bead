"""How long training a BPE takes: ours and the `rustbpe` package of PyPI.

    python -m dev.bench.bpe_speed --data FOLDER            parquet shards with a column `text`

Each run is a process of its own, and the two take turns, so that a busy machine hurts all alike. PyPI's
package has the same module name; uv installs it into a temporary folder. Only the training is timed: the
texts are in memory before. The bar: ours takes at most half the time of PyPI's.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from nanochat.dataset import read_texts
from nanochat.tokenizer import SPLIT_PATTERN

PYPI_PACKAGE = "rustbpe==0.1.0"
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
    """Compare the speed of two BPE trainers."""

    data: Path  # a folder of parquet shards
    megabytes: float = 50.0  # of text to train on
    vocab_size: int = 32768  # of the tokenizers
    num_threads: int = 2  # of ours and theirs
    num_runs: int = 3  # of each, interleaved


def write_texts(data: Path, megabytes: float, path: Path) -> None:
    """Write the first `megabytes` of text as a JSON list."""
    texts: list[str] = []
    num_bytes = 0
    for text in read_texts(sorted(data.glob("*.parquet"))):
        texts.append(text)
        num_bytes += len(text.encode())
        if num_bytes >= megabytes * 1e6:
            break
    path.write_text(json.dumps(texts))


def main(cfg: Config) -> None:
    """Print the median seconds of both trainers, and their ratio."""
    threads = str(cfg.num_threads)
    environment = {**os.environ, "RUSTBPE_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
    with tempfile.TemporaryDirectory() as folder:
        packages = f"{folder}/packages"
        install = ["uv", "pip", "install", "-q", "--python", sys.executable, "--target", packages]
        subprocess.run([*install, PYPI_PACKAGE], check=True)
        texts = Path(folder, "texts.json")
        write_texts(cfg.data, cfg.megabytes, texts)
        command = [sys.executable, "-c", TRAIN, texts, str(cfg.vocab_size), SPLIT_PATTERN]
        trainers = {"PyPI": {**environment, "PYTHONPATH": packages}, "ours": environment}
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(cfg.num_runs):
            for name, env in trainers.items():
                # In the temporary folder, so that no folder named rustbpe is nearer than the package.
                printed = subprocess.check_output(command, env=env, cwd=folder)
                seconds[name].append(float(printed))
    pypi = statistics.median(seconds["PyPI"])
    for name, runs in seconds.items():
        median = statistics.median(runs)
        print(f"{name} {median:6.2f} s, {median / pypi:.2f} of PyPI's, median of {runs}")


if __name__ == "__main__":
    main(tyro.cli(Config))
