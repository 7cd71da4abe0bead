"""GSM8K: school maths word problems, solved in steps that each call the calculator.

One row (train):
    {"question": "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of
     babysitting. How much did she earn?", "answer": "Weng earns 12/60 = $<<12/60=0.2>>0.2 per
     minute.\\nWorking 50 minutes, she earned 0.2 x 50 = $<<0.2*50=10>>10.\\n#### 10"}

`<<12/60=0.2>>` becomes a tool call, `12/60`, and its output, `0.2`. The output is the row's, even
if rounded or ending in zeros ("3.50"; one mark in 34), since the following text repeats that form.

Source: openai/gsm8k on the Hugging Face hub, configuration "main" (arXiv 2110.14168), MIT.
"""

import re
from decimal import Decimal
from typing import Any

from nanochat.tokenizer import Conversation
from tasks.common import HubTask, exchange, in_parts

MARK = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
# Possessive (++), so that "#### 18.5/3" is not read as 18.
FINAL = re.compile(r"####\s*([-+]?)\s*\$?\s*([-+]?)([0-9][0-9,]*+(?:\.[0-9]+)?+|\.[0-9]++)(?![/])")


class GSM8K(HubTask):
    """Splits: train (7,473 rows), test (1,319)."""

    name, config = "openai/gsm8k", "main"

    def convert(self, row: dict[str, Any]) -> Conversation:
        if final_number(row["answer"]) is None:
            raise ValueError("the answer has no number after ####")
        # Split at two groups: text, expression, result, text, expression, result, ..., text.
        messages = exchange(row["question"], in_parts(MARK.split(row["answer"])))
        return {"messages": messages, "answer": row["answer"].rpartition("####")[2].strip()}

    def score(self, conversation: Conversation, reply: str) -> float:
        said = final_number(reply)
        return said is not None and said == final_number(f"#### {conversation['answer']}")


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`: `"#### -$1,080.50 a year"` -> `Decimal("-1080.50")`."""
    _, marked, said = text.rpartition("####")
    found = FINAL.match(marked + said)
    if not found:
        return None
    before, after, digits = found.groups()
    return Decimal((before or after) + digits.replace(",", ""))
