"""HumanEval: Python functions to complete from their signature and docstring, checked by running.

One row, its docstring and checks cut short:
    {"task_id": "HumanEval/53", "prompt": "\\n\\ndef add(x: int, y: int):\\n    \\"\\"\\"Add ...",
     "canonical_solution": "    return x + y\\n", "entry_point": "add",
     "test": "\\n\\ndef check(candidate):\\n    assert candidate(0, 1) == 1\\n ..."}

A reply may be the whole function or its body, fenced or bare. It follows the prompt, which has the
imports and sometimes a helper that the checks need, too: they run in another process, which sees
only what the function returns (nanochat/sandbox_child.py).

Source: openai/openai_humaneval on the Hugging Face hub (arXiv 2107.03374), MIT.
"""

import re
import textwrap
from typing import Any

from nanochat.sandbox import run_program
from nanochat.tokenizer import Conversation
from tasks.common import HubTask, exchange

FENCED = re.compile(r"```[ \t]*\w*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


class HumanEval(HubTask):
    """The only split is test (164 rows). `allow_unsafe_exec` scores without isolation, too."""

    name, config = "openai/openai_humaneval", "openai_humaneval"

    def __init__(self, split: str, allow_unsafe_exec: bool = False) -> None:
        self.allow_unsafe_exec = allow_unsafe_exec
        super().__init__(split)

    def convert(self, row: dict[str, Any]) -> Conversation:
        prompt, solution = row["prompt"].strip("\n"), row["canonical_solution"].strip("\n")
        question = f"Complete this Python function:\n```python\n{prompt}\n```"
        reply = f"```python\n{prompt}\n{solution}\n```"
        kept = {key: row[key] for key in ("task_id", "prompt", "entry_point", "test")}
        return {"messages": exchange(question, reply), **kept}

    def score(self, conversation: Conversation, reply: str) -> float:
        """1 if the program passes; thread-safe. UserError without isolation."""
        prompt, name = conversation["prompt"], conversation["entry_point"]
        program = complete(prompt, name, reply)
        checks = f"{prompt}\n{conversation['test']}"
        return not run_program(program, name, checks, allow_unsafe=self.allow_unsafe_exec)


def complete(prompt: str, name: str, reply: str) -> str:
    """The program that `reply` makes of `prompt`: a whole function `name` replaces the prompt's."""
    blocks = FENCED.findall(reply) or [reply]
    whole = re.compile(rf"^(?:async )?def {name}\b|^{name} *=", re.MULTILINE)
    for block in blocks:
        if whole.search(block):
            return f"{prompt}\n{block}"
    body = blocks[0].lstrip("\n")
    return prompt + (body if body.startswith((" ", "\t")) else textwrap.indent(body, "    "))
