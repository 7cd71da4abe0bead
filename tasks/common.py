"""Base classes of tasks: mixed from others, generated, or read from a public data set.

Rows of Hugging Face data sets come from the hub or, with `NANOCHAT_DATASETS=<folder>`, from
`<folder>/<owner>/<name>/<config>/<split>.jsonl` or `.parquet`. They are shuffled once: MMLU is
sorted by subject, and the first hundred rows of any task should be a fair sample.
"""

import os
import random
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pyarrow.parquet as parquet

from nanochat.common import UserError
from nanochat.dataset import numbered_jsonl
from nanochat.task_eval import Task
from nanochat.tokenizer import PART_TYPES, Conversation, check_conversation, render_choices


class TaskMixture(Task):
    """Several tasks as one, shuffled by `seed`; a task listed twice counts twice."""

    def __init__(self, tasks: Sequence[Task], seed: int = 0) -> None:
        self.tasks = tasks
        places = [(t, i) for t, task in enumerate(tasks) for i in range(len(task))]
        random.Random(seed).shuffle(places)
        super().__init__(places)

    def get_example(self, place: tuple[int, int]) -> Conversation:
        task, row = place
        return self.tasks[task][row]


class GeneratedTask(Task):
    """Rows generated from their number; endless, so a task has as many as are used."""

    num_train, num_test = 20_000, 400

    def __init__(self, split: str) -> None:
        self.split = split
        super().__init__(range(self.num_train if split == "train" else self.num_test))


class HubTask(Task):
    """One split of a public data set."""

    name: str  # of the data set on the hub
    config: str

    def __init__(self, split: str) -> None:
        self._label = f"{self.name} ({self.config}, {split})"
        self._rows = load_rows(self.name, self.config, split)
        numbers = list(range(len(self._rows)))
        random.Random(self._label).shuffle(numbers)
        super().__init__(numbers)

    def get_example(self, number: int) -> Conversation:
        """Raises UserError, naming the row, if a field is missing or malformed."""
        try:
            conversation = self.convert(self._rows[number])
            check_conversation(conversation)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            where = f"{self._label}, row {number} from 0"
            raise UserError(f"{where}: {reason}; fetch the data set again") from error
        return conversation

    def convert(self, row: dict[str, Any]) -> Conversation:
        """A row as a conversation; any error means that the row is malformed."""
        raise NotImplementedError


class ChoiceTask(HubTask):
    """A public data set of multiple-choice questions, mostly with four choices."""

    kind = "choice"
    baseline = 0.25

    @staticmethod
    def ask(question: str, choices: Sequence[str], right: int) -> Conversation:
        """The question with lettered choices; `right` is the index of the correct one."""
        if not 0 <= right < len(choices):
            raise ValueError(f"answer {right} of {len(choices)} choices")
        letters = list(ascii_uppercase[: len(choices)])
        messages = exchange(render_choices(question, choices), letters[right])
        return {"messages": messages, "letters": letters, "answer": letters[right]}


def exchange(question: str, reply: str | list[dict[str, str]]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def in_parts(texts: Iterable[str]) -> list[dict[str, str]]:
    """Texts as a reply's parts: text, tool call, its output, text, ...; without empty ones."""
    kinds = zip(cycle(PART_TYPES), texts, strict=False)
    return [{"type": kind, "text": text} for kind, text in kinds if text]


def load_rows(name: str, config: str, split: str) -> Sequence[dict[str, Any]]:
    """The rows of, say, ("openai/gsm8k", "main", "train"), from the hub or local files.

    Raises UserError if the data set cannot be loaded or a local file is malformed.
    """
    if folder := os.environ.get("NANOCHAT_DATASETS"):
        return _read_local(Path(folder, name, config), split)
    try:
        import datasets  # here: most scripts need no hub

        rows: Any = datasets.load_dataset(name, config, split=split)
        return rows  # a Dataset, which reads them lazily
    # datasets raises subclasses of FileNotFoundError and ConnectionError, ValueError for splits
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        what = f"cannot load {name} ({config}, {split}): {reason}"
        raise UserError(f"{what}; or set NANOCHAT_DATASETS=<folder>") from error


def _read_local(folder: Path, split: str) -> Sequence[dict[str, Any]]:
    table, lines = folder / f"{split}.parquet", folder / f"{split}.jsonl"
    if table.is_file():
        try:
            return parquet.read_table(table).to_pylist()
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise UserError(f"{table} is not a readable parquet file; fetch it again") from error
    if lines.is_file():
        return [row for _, row in numbered_jsonl(lines)]
    raise UserError(f"NANOCHAT_DATASETS: there is no {split}.jsonl or {split}.parquet in {folder}")
