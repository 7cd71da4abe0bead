"""What midtraining and SFT are made of, and which tasks evaluate a chat model.

On the primer both stages see the same kinds of conversation, SFT with more quizzes: a model this
small forgets a skill within a few hundred steps. The default SFT mixture is narrower than
midtraining's.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from nanochat.common import UserError
from nanochat.task_eval import Task
from tasks import primer
from tasks.arc import ARC
from tasks.common import TaskMixture
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.identity import Identity
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SpellingBee, SpellWord
from tasks.visitor import DEVELOPMENT, UNTOUCHED, Visitor

# (stage, mixture) -> the tasks it is made of; "val" is what both stages measure their loss on.
# Nothing is read or downloaded until a mixture is built.
MIXTURES: dict[tuple[str, str], Callable[[], list[Task]]] = {
    # How often MMLU and GSM8K: best in karpathy/nanochat's sweeps of its only chat stage, which has
    # midtraining's SmolTalk and learning rates. SFT's pass at a tenth of them comes on top.
    ("mid", "default"): lambda: [  # 1,071 K rows
        SmolTalk("train"),  # 460 K
        *[MMLU("train")] * 3,  # 100 K, three times
        *[GSM8K("train")] * 4,  # 7.5 K, four times
        Identity(),  # 1 K, twice
        Identity(),
        SpellWord("train")[:200_000],
        SpellingBee("train")[:80_000],
    ],
    ("sft", "default"): lambda: [  # 22 K rows
        ARC("ARC-Easy", "train"),  # 2.3 K
        ARC("ARC-Challenge", "train"),  # 1.1 K
        GSM8K("train"),  # 7.5 K
        SmolTalk("train")[:10_000],
        Identity(),  # 1 K
        SpellWord("train")[200_000:200_300],
        SpellingBee("train")[80_000:80_300],
    ],
    ("val", "default"): lambda: [  # 3.7 K rows
        SmolTalk("test")[:2_400],
        MMLU("validation")[:500],
        GSM8K("test")[:400],
        SpellWord("val")[:200],
        SpellingBee("val")[:200],
    ],
    ("mid", "primer"): lambda: [
        primer.Conversations("train")[:32_000],
        primer.Matching("train")[:6_000],
        primer.Choice("train")[:8_000],
        primer.Exact("train")[:10_000],
        primer.Arithmetic("train")[:2_000],
        primer.Spelling("train")[:2_000],
    ],
    ("sft", "primer"): lambda: [
        primer.Conversations("train")[32_000:47_000],
        primer.Matching("train")[6_000:8_000],
        primer.Choice("train")[8_000:12_000],
        primer.Exact("train")[10_000:16_000],
        primer.Arithmetic("train")[2_000:3_000],
        primer.Spelling("train")[2_000:3_000],
    ],
    ("val", "primer"): lambda: [primer.Conversations("val")],
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


def build_mixture(stage: str, name: str, custom: Path | None = None) -> TaskMixture:
    """The conversations of a stage (mid, sft or val), plus those of a user's file."""
    own = [CustomJSON(custom)] if custom else []
    return TaskMixture([*MIXTURES[stage, name](), *own])


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
