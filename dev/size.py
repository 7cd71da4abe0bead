"""The size of the code base, without tests and vendored code: lines, and tokens of o200k_base.

    python -m dev.size

Prints a line for each top folder and their total, then one for the prose and the tables.
"""

from collections import defaultdict

import bpe_openai

from nanochat.report import CODE, tracked_texts

PROSE = ("*.md", "*.json", "*.txt", "*.svg", "*.yml")


def main() -> None:
    folders = defaultdict(list)
    for path, text in tracked_texts(CODE).items():
        folders[f"{path.parts[0]}/" if len(path.parts) > 1 else "top"].append(text)
    folders["total"] = [text for texts in folders.values() for text in texts]
    folders["prose, tables"] = list(tracked_texts(PROSE).values())
    encoding = bpe_openai.get_encoding("o200k_base")
    print(f"{'':13}  lines   tokens")
    for name, texts in folders.items():
        lines = sum(text.count("\n") for text in texts)
        tokens = sum(len(encoding.encode(text)) for text in texts)
        print(f"{name:13} {lines:6,} {tokens:8,}")


if __name__ == "__main__":
    main()
