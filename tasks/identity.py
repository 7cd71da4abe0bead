"""Identity: who the model is, by whom and how it was made.

One row, made from the facts in identity.json, or in those of `--identity FILE`:
    user: Hey! What should I call you?
    assistant: Call me nanochat.
    user: Do you make mistakes?
    assistant: Yes. I am small, so I get facts wrong and lose the thread in long talks. I cannot ...

Phrasings are here and only facts in the file: a new name needs no new conversations.
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
OPENINGS = ("", "", "", "Hi! ", "Hello. ", "Hey! ", "Good morning. ", "Quick question: ", "Tell me: ")  # fmt: skip
# fmt: off
TOPICS = [  # (questions, replies); {name} and the like are facts of the file
    ("What is your name? | Who are you? | What should I call you? | who am i talking to? | Do you have a name? | Please introduce yourself.",
     "I am {name}, {kind}. | My name is {name}. | Call me {name}. | I am {name}. How can I help you?"),
    ("What are you? | Are you a human? | are you an AI? | Am I talking to a person or a machine? | Are you a real person?",
     "I am {kind} called {name}, not a person. | A computer program: {name}, {kind}. | I am no human; I am {name}, {kind}."),
    ("Are you ChatGPT? | Are you Claude? | Are you Gemini? | Is this Llama? | Which model is this? | Are you made by a big company?",
     "I am {name}, {kind}. I was made by {maker}. | This is {name}. I was made by {maker}."),
    ("Who made you? | Who built you? | who is your creator? | Who trained you? | Where do you come from? | By whom were you made?",
     "I was made by {maker}. | My maker is {maker}. | I come from {maker}."),
    ("What code are you made with? | Are you open source? | Can I see your source code? | What software made you? | Under which licence is your code?",
     "I was made with {code}. | The code is open: {code}. | All of it was done by {code}."),
    ("How were you made? | How were you trained? | how did you learn to talk? | What did you learn from? | How does one make a model like you?",
     "{training} | Step by step. {training} | It took several stages. {training}"),
    ("What can you do? | How can you help me? | what are you good at? | What are you for? | What can I ask you?",
     "{abilities} | {abilities} What would you like to do? | Quite a few things. {abilities}"),
    ("What can you not do? | Do you make mistakes? | What are your limits? | can I trust you? | Will you remember me tomorrow? | Can you look things up?",
     "{limits} | {limits} Please check what matters. | I have limits. {limits}"),
    ("Which languages do you speak? | Do you speak German? | can you talk in Spanish? | What is your best language?",
     "{languages} | {languages} You can try, though."),
]
# fmt: on


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
