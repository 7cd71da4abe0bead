"""A user's own conversations from a .jsonl file, for midtraining and SFT (`--custom FILE`).

One conversation a line, as an object or as the bare list of its messages:
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Pip."}]

The whole file is checked up front: a bad line 4,000 would otherwise stop training after an hour.
"""

import re
from pathlib import Path

from nanochat.common import UserError
from nanochat.dataset import numbered_jsonl
from nanochat.task_eval import Task
from nanochat.tokenizer import check_conversation

ENOUGH = 4_000  # conversations that a file is listed to, if nobody says how often


class CustomJSON(Task):
    """The conversations of a file, to be listed `epochs` times; UserError names a bad line."""

    def __init__(self, file: str | Path) -> None:
        """`file` is PATH or PATH:EPOCHS; a path may hold colons."""
        path, epochs = Path(file), 0
        if (counted := re.fullmatch(r"(.+):([1-9]\d*)", str(file))) and not path.exists():
            path, epochs = Path(counted[1]), int(counted[2])
        conversations = []
        for number, row in numbered_jsonl(path):
            conversation = {"messages": row} if isinstance(row, list) else row
            where = f"--custom={path}, line {number}"
            if not isinstance(conversation, dict):
                raise UserError(f'{where}: expected {{"messages": [...]}} or a list of messages')
            try:
                check_conversation(conversation)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            if not any(message["role"] == "assistant" for message in conversation["messages"]):
                raise UserError(f"{where}: no assistant message, so there is nothing to learn from")
            conversations.append(conversation)
        if not conversations:
            raise UserError(f"--custom={path}: the file holds no conversation")
        self.path, self.epochs = path, epochs or -(-ENOUGH // len(conversations))
        super().__init__(conversations)
