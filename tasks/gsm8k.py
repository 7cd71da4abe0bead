"""GSM8K: word problems of school mathematics, solved in steps, each with a call of the calculator.

One row (train):
    {"question": "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of
     babysitting. How much did she earn?", "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per
     minute.\\nWorking 50 minutes, she earned 0.2 x 50 = $<<0.2*50=10>>10.\\n#### 10"}

`<<12/60=0.2>>` becomes a call of the tool, `12/60`, and what it printed, `0.2`; the text goes on
behind it. What the tool is shown to print is what the row says, even where it is rounded or ends in
zeros ("3.50"; one mark in 34), since the text behind the mark repeats it in that form.

Source: openai/gsm8k on the Hugging Face hub, configuration "main" (arXiv 2110.14168), MIT.
"""

import re
from decimal import Decimal
from typing import Any

from nanochat.tokenizer import Conversation
from tasks.common import HubTask, exchange

MARK = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
# Possessive (++), so that "#### 18.5/3" is not read as 18: what stands behind a number counts.
FINAL = re.compile(r"####\s*([-+]?)\s*\$?\s*([-+]?)([0-9][0-9,]*+(?:\.[0-9]+)?+|\.[0-9]++)(?![/])")


class GSM8K(HubTask):
    """The splits are train (7,473 rows) and test (1,319)."""

    name, config = "openai/gsm8k", "main"

    def convert(self, row: dict[str, Any]) -> Conversation:
        if final_number(row["answer"]) is None:
            raise ValueError("the answer has no number after ####")
        messages = exchange(row["question"], solution_parts(row["answer"]))
        return {"messages": messages, "answer": row["answer"].rpartition("####")[2].strip()}

    def score(self, conversation: Conversation, reply: str) -> float:
        said = final_number(reply)
        return float(said is not None and said == final_number(f"#### {conversation['answer']}"))


def solution_parts(answer: str) -> list[dict[str, str]]:
    """The solution as an assistant says it: text, a call of the tool, its output, text again."""
    # re.split with two groups: text, expression, result, text, expression, result, ..., text
    kinds = ("text", "python", "python_output")
    pieces = [(kinds[i % 3], piece) for i, piece in enumerate(MARK.split(answer))]
    return [{"type": kind, "text": text} for kind, text in pieces if text]


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`: `"#### -$1,080.50 a year"` -> `Decimal("-1080.50")`."""
    _, marked, said = text.rpartition("####")
    found = FINAL.match(marked + said)
    if not found:
        return None
    before, after, digits = found.groups()
    return Decimal((before or after) + digits.replace(",", ""))
