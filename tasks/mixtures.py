"""What midtraining and SFT are made of, and which tasks evaluate a chat model: tables in one place.

The choice that would surprise: midtraining and SFT on the primer see the same kinds of talk. A model this
small forgets a skill within a few hundred steps, so SFT is not narrower, only on other conversations, with
more of the quizzes. The default mixtures are for a model that holds more, and there SFT is the narrower one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError
from tasks.arc import ARC
from tasks.common import Task, TaskMixture
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.identity import Identity
from tasks.mmlu import MMLU
from tasks.primer import (
    PrimerArithmetic,
    PrimerChoice,
    PrimerConversations,
    PrimerExact,
    PrimerLetter,
    PrimerSpelling,
)
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SpellingBee, SpellWord

# (stage, mixture) -> the tasks it is made of, given a file of words to spell or None for the primer's words;
# "val" is what both stages measure their loss on. Nothing is read or downloaded until a mixture is built.
MIXTURES: dict[tuple[str, str], Callable[[Path | None], list[Task]]] = {
    ("mid", "default"): lambda words: [  # 849 K rows
        SmolTalk("train"),  # 460 K
        MMLU("auxiliary_train"),  # 100 K
        GSM8K("train"),  # 7.5 K
        Identity(),  # 1 K, twice
        Identity(),
        SpellWord("train", stop=200_000, words=words),
        SpellingBee("train", stop=80_000, words=words),
    ],
    ("sft", "default"): lambda words: [  # 22 K rows
        ARC("ARC-Easy", "train"),  # 2.3 K
        ARC("ARC-Challenge", "train"),  # 1.1 K
        GSM8K("train"),  # 7.5 K
        SmolTalk("train", stop=10_000),
        Identity(),  # 1 K
        SpellWord("train", start=200_000, stop=200_300, words=words),
        SpellingBee("train", start=80_000, stop=80_300, words=words),
    ],
    ("val", "default"): lambda words: [  # 3.7 K rows
        SmolTalk("test", stop=2_400),
        MMLU("validation", stop=500),
        GSM8K("test", stop=400),
        SpellWord("val", stop=200, words=words),
        SpellingBee("val", stop=200, words=words),
    ],
    ("mid", "primer"): lambda _: [
        PrimerConversations("train", size=20_000),
        PrimerLetter("train", stop=14_000),
        PrimerChoice("train", stop=6_000),
        PrimerArithmetic("train", stop=4_000),
        PrimerSpelling("train", stop=2_000),
    ],
    ("sft", "primer"): lambda _: [
        PrimerConversations("train", size=10_000, first=20_000),
        PrimerLetter("train", start=14_000, stop=17_000),
        PrimerChoice("train", start=6_000, stop=9_000),
        PrimerExact("train", stop=3_000),
        PrimerArithmetic("train", start=4_000, stop=6_000),
        PrimerSpelling("train", start=2_000, stop=4_000),
    ],
    ("val", "primer"): lambda _: [PrimerConversations("val", size=400)],
}

# The six tasks of ChatCORE, in the order of the report.
CHAT_CORE = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")


@dataclass(frozen=True)
class Options:
    """What a user may set of an evaluation."""

    words: Path | None = None  # file of words to spell; None: the primer's
    allow_unsafe_exec: bool = False  # run model-written programs even where nothing isolates them


# name -> the task of a split, which is "test" or, for practice, "train"
EVALUATIONS: dict[str, Callable[[str, Options], Task]] = {
    "ARC-Easy": lambda split, _: ARC("ARC-Easy", split),
    "ARC-Challenge": lambda split, _: ARC("ARC-Challenge", split),
    "MMLU": lambda split, _: MMLU("auxiliary_train" if split == "train" else split),
    "GSM8K": lambda split, _: GSM8K(split),
    "HumanEval": lambda split, options: HumanEval(
        split, allow_unsafe_exec=options.allow_unsafe_exec
    ),
    "SpellingBee": lambda split, options: SpellingBee(split, words=options.words),
    "primer-choice": lambda split, _: PrimerChoice(split),
    "primer-exact": lambda split, _: PrimerExact(split),
    "primer-arithmetic": lambda split, _: PrimerArithmetic(split),
    "primer-spelling": lambda split, _: PrimerSpelling(split),
}


def build_mixture(
    stage: str, name: str, custom: Path | None = None, seed: int = 0, words: Path | None = None
) -> TaskMixture:
    """The conversations of a stage (mid, sft or val), with a user's own file among them if one is given.

    `words` is a file of words to spell. Raises UserError for a mixture that does not exist, a data set that
    cannot be had and a malformed file.
    """
    if (stage, name) not in MIXTURES:
        known = ", ".join(mixture for each, mixture in MIXTURES if each == stage)
        raise UserError(f"--mixture={name} is unknown; choose one of: {known}")
    own = [CustomJSON(custom)] if custom else []
    return TaskMixture([*MIXTURES[stage, name](words), *own], seed=seed)


def build_task(name: str, split: str = "test", options: Options | None = None) -> Task:
    """The evaluation task of that name; with split "train" its practice part, for RL.

    Raises UserError for a task that does not exist.
    """
    if name not in EVALUATIONS:
        raise UserError(f"the task {name!r} is unknown; choose one of: {', '.join(EVALUATIONS)}")
    return EVALUATIONS[name](split, options or Options())
