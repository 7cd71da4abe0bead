"""MMLU: examination questions on 57 subjects. Multiple choice, always four.

One row (dev):
    {"question": "Find all c in Z_3 such that Z_3[x]/(x^2 + c) is a field.",
     "subject": "abstract_algebra", "choices": ["0", "1", "2", "3"], "answer": 1}

The split "train" is the hub's `auxiliary_train` (100 K rows from other data sets of school
questions); validation and test are the examinations themselves.

Source: cais/mmlu on the Hugging Face hub, configuration "all" (arXiv 2009.03300), MIT.
"""

from typing import Any

from nanochat.tokenizer import Conversation
from tasks.common import ChoiceTask


class MMLU(ChoiceTask):
    """Splits: train, dev (five rows a subject), validation, test."""

    name, config = "cais/mmlu", "all"

    def __init__(self, split: str) -> None:
        super().__init__("auxiliary_train" if split == "train" else split)

    def convert(self, row: dict[str, Any]) -> Conversation:
        return self.ask(row["question"], row["choices"], row["answer"])
