"""What midtraining and SFT are made of, and which tasks evaluate a chat model.

On the primer both stages see the same kinds of conversation, SFT with more quizzes: a model this
small forgets a skill within a few hundred steps. The default SFT mixture is narrower than
midtraining's.

    python -m tasks.mixtures --custom FILE    # checks a user's files
"""

import copy
import hashlib
import re
from collections import defaultdict
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

from nanochat.common import UserError, print0, run_script
from nanochat.finetuning import FinetuneConfig
from nanochat.task_eval import Task
from nanochat.tokenizer import Conversation
from primer.world import TALK
from tasks import primer
from tasks.arc import ARC
from tasks.common import TaskMixture
from tasks.customjson import ENOUGH, CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.identity import Identity
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SpellingBee, SpellWord
from tasks.visitor import DEVELOPMENT, UNTOUCHED, Visitor

NAMING = re.compile(r"\b(am|is|me|only|called|program:) nanochat\b")
PRIMER = {  # task -> its row at which midtraining ends and SFT begins, and where that ends
    primer.Conversations: (32_000, 47_000),
    primer.Matching: (6_000, 8_000),
    primer.Choice: (8_000, 12_000),
    primer.Exact: (10_000, 16_000),
    primer.Arithmetic: (2_000, 3_000),
    primer.Spelling: (2_000, 3_000),
}
# (stage, mixture) -> the tasks it is made of; "val" is what both stages measure their loss on.
# Nothing is read or downloaded until a mixture is built.
MIXTURES: dict[tuple[str, str], Callable[[Identity], list[Task]]] = {
    # How often MMLU and GSM8K: best in karpathy/nanochat's sweeps of its only chat stage, which has
    # midtraining's SmolTalk and learning rates. SFT's pass at a tenth of them comes on top.
    ("mid", "default"): lambda facts: [  # 1,071 K rows
        SmolTalk("train"),  # 460 K
        *[MMLU("train")] * 3,  # 100 K, three times
        *[GSM8K("train")] * 4,  # 7.5 K, four times
        facts,  # 1 K, twice
        facts,
        SpellWord("train")[:200_000],
        SpellingBee("train")[:80_000],
    ],
    ("sft", "default"): lambda facts: [  # 22 K rows
        ARC("ARC-Easy", "train"),  # 2.3 K
        ARC("ARC-Challenge", "train"),  # 1.1 K
        GSM8K("train"),  # 7.5 K
        SmolTalk("train")[:10_000],
        facts,  # 1 K
        SpellWord("train")[200_000:200_300],
        SpellingBee("train")[80_000:80_300],
    ],
    ("val", "default"): lambda _: [  # 3.7 K rows
        SmolTalk("test")[:2_400],
        MMLU("validation")[:500],
        GSM8K("test")[:400],
        SpellWord("val")[:200],
        SpellingBee("val")[:200],
    ],
    ("mid", "primer"): lambda _: [task("train")[:cut] for task, (cut, _) in PRIMER.items()],
    ("sft", "primer"): lambda _: [task("train")[cut:end] for task, (cut, end) in PRIMER.items()],
    ("val", "primer"): lambda _: [primer.Conversations("val")],
}

# Name -> the task of a split, which is "test" or, for practice, "train"; ChatCORE's six first.
EVALUATIONS: dict[str, Callable[..., Task]] = {
    "ARC-Easy": partial(ARC, "ARC-Easy"),
    "ARC-Challenge": partial(ARC, "ARC-Challenge"),
    "MMLU": MMLU,
    "GSM8K": GSM8K,
    "HumanEval": HumanEval,
    "SpellingBee": SpellingBee,
    "primer-choice": primer.Choice,
    "primer-exact": primer.Exact,
    "primer-arithmetic": primer.Arithmetic,
    "primer-spelling": primer.Spelling,
    "primer-quizzes": primer.Quizzes,
    "primer-visitor-dev": partial(Visitor, DEVELOPMENT),
    "primer-visitor": partial(Visitor, UNTOUCHED),
}
CHAT_CORE = tuple(EVALUATIONS)[:6]


class Mixtures:
    """The conversations of each stage: of the mixture that is named, and of a user's files."""

    def __init__(self, cfg: FinetuneConfig) -> None:
        """Reads the files, before anything slow; UserError names what is wrong."""
        self.name = cfg.mixture
        self.files = [CustomJSON(file) for file in cfg.custom]
        self.facts = Identity(cfg.identity) if cfg.identity else None
        self.held_out: dict[str, Conversation] = {}  # by its messages, where nothing else validates
        if self.name == "none":
            rows = chain.from_iterable(self.files)
            different = [*{str(row["messages"]): row for row in rows}.items()]
            if len(different) < 2:
                needed = "--custom FILE, with two conversations or more"
                raise UserError(f"--mixture=none needs {needed}")
            self.held_out = dict(different[19::20] or different[-1:])

    @property
    def digest(self) -> str:
        """Of all that the files hold, and how often it counts."""
        told = [(file.epochs, [row["messages"] for row in file]) for file in self.files]
        facts = self.facts.table if self.facts else ""
        return hashlib.sha256(repr((told, facts)).encode()).hexdigest()[:16]

    def build(self, stage: str) -> TaskMixture:
        """The conversations of a stage: mid, sft, or "val", which validates both.

        Of the mixture "none", which has nothing else, "val" gets one of 20 different conversations.
        """
        facts = self.facts or Identity()
        tasks = [] if self.name == "none" else MIXTURES[stage, self.name](facts)
        if self.facts and self.name != "default" and stage != "val":
            tasks.append(self.facts)
        if own := self.own_replies():
            tasks = [Overruled(task, own) for task in tasks]
        if stage == "val":
            return TaskMixture([*tasks, Task([*self.held_out.values()])])
        for file in self.files:
            rows = [row for row in file if str(row["messages"]) not in self.held_out]
            tasks += [Task(rows)] * file.epochs
        return TaskMixture(tasks)

    def own_replies(self) -> dict[str, dict[str, Any]]:
        """What the primer's talk and Identity say -> a user's questions and replies in its place.

        Those of facts, and of the beginnings of conversations. Under "" is what takes the place of
        all else that names nanochat, once something does.
        """
        table = self.facts.table if self.facts else []
        pairs = {way.lower(): replies[0] for ways, replies in table for way in ways}
        small = [file for file in self.files if len(file) < ENOUGH]  # no data set
        for question, reply, *_ in (row["messages"] for row in chain.from_iterable(small)):
            if question["role"] == "user":
                pairs[question["content"].lower()] = reply["content"]
        talk = [row for kind in ("identity", "greeting", "small talk") for row in TALK[kind]]
        own: dict[str, dict[str, Any]] = defaultdict(dict)
        for ways, replies in talk if self.facts else [*talk, *Identity().table]:
            # The ways may hold choices such as `[hi|hello] there`; letters alone are compared.
            letters = re.sub(r"[^\w\[\]|]", "", "|".join(ways).lower())
            asked = re.compile(letters.replace("[", "(?:").replace("]", ")"))
            found = [way for way in pairs if asked.fullmatch(re.sub(r"\W", "", way))]
            for way, reply in product(found, replies):
                own[reply][way] = pairs[way]
        # Where there is a greeting, but no reply to who it is, it takes the place of itself alone.
        who = chain.from_iterable(said for _, said in chain(TALK["identity"], Identity().table))
        naming = [own[reply] for reply in who if reply in own and NAMING.search(reply)]
        return own | {"": naming[0]} if naming else own


class Overruled(Task):
    """A task whose replies give way to those of `own`, to that of the likest question.

    A mixture that says who the model is would drown a persona of 50 conversations. So the persona
    speaks there, too, and is learned in all the ways in which the primer knows to ask.
    """

    def __init__(self, task: Task, own: dict[str, dict[str, Any]]) -> None:
        super().__init__(task)
        self.own = own

    def get_example(self, row: Conversation) -> Conversation:
        row = copy.deepcopy(row)
        turns = [pair for pair in pairwise(row["messages"]) if pair[1]["role"] == "assistant"]
        for asked, reply in turns:
            said = str(reply["content"])
            if found := self.own.get(said) or (NAMING.search(said) and self.own.get("")):
                likest = get_close_matches(asked["content"].lower(), found, 1, cutoff=0)
                reply["content"] = found[likest[0]]
        return row


def check_task(name: str) -> None:
    """Raise UserError unless there is such an evaluation."""
    if name not in EVALUATIONS:
        raise UserError(f"the task {name!r} is unknown; choose one of: {', '.join(EVALUATIONS)}")


def build_task(
    name: str, split: str = "test", words: Path | None = None, allow_unsafe_exec: bool = False
) -> Task:
    """The evaluation `name`; `words` is for SpellingBee, `allow_unsafe_exec` for HumanEval."""
    check_task(name)
    if name == "SpellingBee":
        return SpellingBee(split, words)
    if name == "HumanEval":
        return HumanEval(split, allow_unsafe_exec)
    return EVALUATIONS[name](split)


def main(cfg: FinetuneConfig) -> None:
    mixtures = Mixtures(cfg)
    for file in mixtures.files:
        print0(f"{file.path}: {len(file)} conversations, each listed {file.epochs} times")
    print0(f"replies of the mixture that give way to yours: {len(mixtures.own_replies())}")


if __name__ == "__main__":
    run_script(main, FinetuneConfig)
