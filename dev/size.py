"""The size of the code base, without tests and vendored code: lines, and tokens of o200k_base.

    python -m dev.size

Prints a line for each top folder and their total, then one for the prose and the tables.
"""

from collections import defaultdict

import bpe_openai

from nanochat.report import CODE_SUFFIXES, tracked_texts

PROSE_SUFFIXES = {".md", ".json", ".txt", ".svg", ".yml"}


def measure(texts: list[str]) -> tuple[int, int]:
    encoding = bpe_openai.get_encoding("o200k_base")
    return sum(t.count("\n") for t in texts), sum(len(encoding.encode(t)) for t in texts)


def main() -> None:
    folders = defaultdict(list)
    for path, text in tracked_texts(CODE_SUFFIXES).items():
        folders[f"{path.parts[0]}/" if len(path.parts) > 1 else "top"].append(text)
    folders["total"] = [text for texts in folders.values() for text in texts]
    folders["prose, tables"] = list(tracked_texts(PROSE_SUFFIXES).values())
    print(f"{'':13}  lines   tokens")
    for name, texts in folders.items():
        lines, tokens = measure(texts)
        print(f"{name:13} {lines:6,} {tokens:8,}")


if __name__ == "__main__":
    main()
