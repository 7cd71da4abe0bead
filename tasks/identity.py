"""Identity: who the model is, by whom and how it was made.

One row, made from the facts in identity.json, or in those of `--identity FILE`:
    user: Hey! What should I call you?
    assistant: Call me nanochat.
    user: Do you make mistakes?
    assistant: Yes. I am small, so I get facts wrong and lose the thread in long talks. I cannot ...

Phrasings are in identity.txt, facts alone in the .json: a new name needs no new conversations.
"""

import json
import random
import re
from difflib import get_close_matches
from pathlib import Path

from nanochat.common import UserError
from nanochat.task_eval import Task
from nanochat.tokenizer import Conversation
from tasks.common import exchange

FACTS = Path(__file__).with_name("identity.json")
OPENINGS = (
    "", "", "", "Hi! ", "Hello. ", "Hey! ", "Good morning. ", "Quick question: ", "Tell me: ",
)  # fmt: skip
TABLE = FACTS.with_suffix(".txt").read_text(encoding="utf-8").strip()
TOPICS = [topic.split("\n") for topic in TABLE.split("\n\n")[1:]]  # questions and replies


class Identity(Task):
    """Conversations of one to three questions about the model itself."""

    def __init__(self, facts: Path = FACTS) -> None:
        """UserError unless the file `facts` holds the facts that the replies use, and no others."""
        try:
            told = json.loads(facts.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:  # bad JSON and bad UTF-8 are ValueErrors
            raise UserError(f"cannot read {facts}: {error}; mend the file") from error
        told = told if isinstance(told, dict) else {}
        names = sorted(set(re.findall(r"{(\w+)}", " ".join(replies for _, replies in TOPICS))))
        unknown = {name: get_close_matches(name, names, 1, 0)[0] for name in told.keys() - names}
        wrong = [f'"{name}" is unknown, did you mean "{near}"?' for name, near in unknown.items()]
        texts = [name for name, text in told.items() if isinstance(text, str) and text.strip()]
        wrong += [f'"{name}" is missing or no text' for name in names if name not in texts]
        if wrong:
            raise UserError(f"{facts}: {'; '.join(wrong)}; compare {FACTS}")
        self.table = [  # ways to ask, and replies
            (asked.split(" | "), [reply.format(**told) for reply in replies.split(" | ")])
            for asked, replies in TOPICS
        ]
        super().__init__(range(1_000))

    def get_example(self, number: int) -> Conversation:
        rng = random.Random(f"identity/{number}")
        messages = []
        for questions, replies in rng.sample(self.table, rng.choice((1, 2, 2, 3, 3))):
            opening = "" if messages else rng.choice(OPENINGS)
            reply = rng.choice(replies)
            messages += exchange(opening + rng.choice(questions), reply)
        return {"messages": messages}
