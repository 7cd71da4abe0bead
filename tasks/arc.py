"""ARC: school science questions, an easy and a challenge set. Multiple choice.

One row of ARC-Easy (train):
    {"id": "ARC-Easy/train/1", "question": "Lichens are symbiotic organisms made of green algae and
     fungi. What do the green algae supply to the fungi in this symbiotic relationship?",
     "choices": {"text": ["carbon dioxide", "food", "protection", "water"],
                 "label": ["A", "B", "C", "D"]}, "answerKey": "B"}

Choices are relettered A, B, C, ... by position: some rows use 1, 2, 3, 4, some have three or five.

Source: allenai/ai2_arc on the Hugging Face hub (arXiv 1803.05457), CC BY-SA 4.0.
"""

from typing import Any

from nanochat.tokenizer import Conversation
from tasks.common import ChoiceTask


class ARC(ChoiceTask):
    """`config` is ARC-Easy or ARC-Challenge; splits: train, validation, test."""

    name = "allenai/ai2_arc"

    def __init__(self, config: str, split: str) -> None:
        self.config = config
        super().__init__(split)

    def convert(self, row: dict[str, Any]) -> Conversation:
        choices = row["choices"]
        right = choices["label"].index(row["answerKey"])
        return self.ask(row["question"], choices["text"], right)
