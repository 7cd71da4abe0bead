"""How long training a BPE takes: ours, the `rustbpe` package of PyPI, and Hugging Face tokenizers.

    python -m dev.bench.bpe_speed --data FOLDER            parquet shards with a column `text`
    python -m dev.bench.bpe_speed --data FOLDER --megabytes=50 --num-threads=2 --num-runs=3

Each run is a process of its own, and the three take turns, so that a busy machine hurts all alike. PyPI's
package has the same module name and lives in a virtual environment made for it in a temporary folder. Only
the training is timed: the texts are in memory before. The bar: ours takes at most half the time of PyPI's.
"""

import json
import os
import shutil
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
RUSTBPE = """
import json, sys, time
import rustbpe
texts, pattern = json.load(open(sys.argv[1])), sys.argv[3]
begin = time.perf_counter()
rustbpe.Tokenizer().train_from_iterator(iter(texts), int(sys.argv[2]), pattern=pattern)
print(time.perf_counter() - begin)
"""
HUGGING_FACE = """
import json, sys, time
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
texts, pattern = json.load(open(sys.argv[1])), sys.argv[3]
tokenizer = Tokenizer(models.BPE())
split = pre_tokenizers.Split(Regex(pattern), "isolated")
to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(
    vocab_size=int(sys.argv[2]), show_progress=False, initial_alphabet=alphabet
)
begin = time.perf_counter()
tokenizer.train_from_iterator(iter(texts), trainer)
print(time.perf_counter() - begin)
"""


@dataclass
class Config:
    """Compare the speed of three BPE trainers."""

    data: Path  # a folder of parquet shards
    megabytes: float = 50.0  # of text to train on
    vocab_size: int = 32768
    num_threads: int = 2
    num_runs: int = 3


def write_texts(data: Path, megabytes: float, path: Path) -> float:
    """Write the first `megabytes` of text as a JSON list; returns how many there are."""
    texts: list[str] = []
    num_bytes = 0
    for text in read_texts(sorted(data.glob("*.parquet"))):
        texts.append(text)
        num_bytes += len(text.encode())
        if num_bytes >= megabytes * 1e6:
            break
    path.write_text(json.dumps(texts))
    return num_bytes / 1e6


def make_environment(folder: Path) -> Path:
    """A virtual environment with PyPI's rustbpe; returns its Python."""
    python = folder / "bin" / "python"
    if uv := shutil.which("uv"):
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder], check=True)
        install = [uv, "pip", "install", "-q", "--python", str(python)]
    else:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [str(python), "-m", "pip", "install", "-q"]
    subprocess.run([*install, PYPI_PACKAGE], check=True)
    return python


def main(cfg: Config) -> None:
    """Print the median seconds of each trainer, and its ratio to PyPI's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        megabytes = write_texts(cfg.data, cfg.megabytes, folder / "texts.json")
        trainers = {
            "rustbpe (ours)": (Path(sys.executable), RUSTBPE),
            f"{PYPI_PACKAGE} (PyPI)": (make_environment(folder / "env"), RUSTBPE),
            "Hugging Face tokenizers": (Path(sys.executable), HUGGING_FACE),
        }
        threads = str(cfg.num_threads)
        environment = {**os.environ, "RUSTBPE_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(cfg.num_runs):
            for name, (python, code) in trainers.items():
                arguments = [folder / "texts.json", str(cfg.vocab_size), SPLIT_PATTERN]
                # In the temporary folder, so that no folder named rustbpe is nearer than the package.
                result = subprocess.run(
                    [python, "-c", code, *arguments],
                    env=environment,
                    cwd=folder,
                    check=True,
                    stdout=subprocess.PIPE,
                )
                seconds[name].append(float(result.stdout))
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    pypi = medians[f"{PYPI_PACKAGE} (PyPI)"]
    print(f"{megabytes:.1f} MB, vocabulary {cfg.vocab_size}, {threads} threads, median of runs:")
    for name, median in medians.items():
        runs = " ".join(f"{run:.2f}" for run in seconds[name])
        print(f"{name:24} {median:6.2f} s  {median / pypi:5.2f} of PyPI's   ({runs})")


if __name__ == "__main__":
    main(tyro.cli(Config))
