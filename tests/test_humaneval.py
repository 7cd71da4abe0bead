"""HumanEval as a task. Oracle: one real row, rendered by hand, solved rightly and wrongly."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat import sandbox
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, render_conversation
from tasks.humaneval import HumanEval
from tests.models import refuses

ROW = {  # of openai/openai_humaneval, MIT
    "task_id": "HumanEval/53",
    "prompt": '\n\ndef add(x: int, y: int):\n    """Add two numbers x and y\n'
    '    >>> add(2, 3)\n    5\n    >>> add(5, 7)\n    12\n    """\n',
    "entry_point": "add",
    "canonical_solution": "    return x + y\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    import random\n\n"
    "    assert candidate(0, 1) == 1\n    assert candidate(1, 0) == 1\n"
    "    assert candidate(2, 3) == 5\n    assert candidate(5, 7) == 12\n"
    "    assert candidate(7, 5) == 12\n\n    for i in range(100):\n"
    "        x, y = random.randint(0, 1000), random.randint(0, 1000)\n"
    "        assert candidate(x, y) == x + y\n\n",
}
# Like HumanEval/32: an import and a helper in the prompt, which the program and the checks use.
HELPED = {
    "task_id": "made by hand",
    "prompt": "from math import floor\n\n\ndef half(x):\n    return floor(x / 2)\n\n\n"
    'def quarter(x):\n    """A fourth of x, rounded down twice."""\n',
    "entry_point": "quarter",
    "canonical_solution": "    return half(half(x))\n",
    "test": "def check(candidate):\n    for x in range(9):\n"
    "        assert candidate(x) == half(half(x))\n",
}


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HumanEval:
    """The two rows; these programs mean well, so they run where there is no bubblewrap too."""
    monkeypatch.setenv("NANOCHAT_DATASETS", str(tmp_path))
    file = tmp_path / "openai/openai_humaneval/openai_humaneval/test.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("\n".join(map(json.dumps, (ROW, HELPED))))
    return HumanEval("test", allow_unsafe_exec=True)


@pytest.fixture
def rows(task: HumanEval) -> dict[str, dict]:
    return {row["entry_point"]: row for row in task}


def test_a_row_to_the_token(rows: dict[str, dict]) -> None:
    tokenizer = Tokenizer.train(["Complete this Python function:"], 300, SPECIAL_TOKENS)
    ids, mask = render_conversation(tokenizer, rows["add"])
    function = ROW["prompt"].strip("\n")
    prompt = (
        f"<|bos|><|user_start|>Complete this Python function:\n```python\n{function}\n```"
        "<|user_end|><|assistant_start|>"
    )
    reply = f"```python\n{function}\n    return x + y\n```<|assistant_end|>"
    assert tokenizer.decode(ids) == prompt + reply
    assert tokenizer.decode(ids[mask.index(1) :]) == reply and 0 not in mask[mask.index(1) :]


def test_solutions_are_scored_by_running_them(task: HumanEval, rows: dict[str, dict]) -> None:
    whole = "def add(a, b):\n    return a + b"
    replies = {
        ("add", rows["add"]["messages"][1]["content"]): 1,
        ("add", "    return x + y\n"): 1,
        ("add", "return x + y"): 1,
        ("add", whole): 1,
        ("add", f"Sure:\n```python\n{whole}\n```\nThis adds."): 1,
        ("add", f"```\n{whole}"): 1,
        ("add", "```py\n    return x + y\n```"): 1,
        ("add", f"First:\n```\npip install nothing\n```\nthen\n```python\n{whole}\n```"): 1,
        ("add", "z = x\nreturn z + y"): 1,
        ("add", "```python\nz = x\nreturn z + y```"): 1,
        ("add", "\ndef add(x, y): return x + y"): 1,
        ("add", "    def add2(x):\n        return x + y\n    return add2(x)"): 1,
        ("add", "add = lambda x, y: y + x"): 1,
        ("add", "    return x - y\n"): 0,
        ("add", "def plus(x, y):\n    return x + y"): 0,
        ("add", "I do not know."): 0,
        ("add", "\ud800\x00"): 0,
        ("add", ""): 0,
        ("quarter", rows["quarter"]["messages"][1]["content"]): 1,
        ("quarter", "```python\ndef quarter(x):\n    return half(floor(half(x)))\n```"): 1,
        ("quarter", "    return half(x) / 2"): 0,
    }
    with ThreadPoolExecutor(4) as pool:
        scores = list(pool.map(lambda asked: task.score(rows[asked[0]], asked[1]), replies))
    assert dict(zip(replies, scores, strict=True)) == replies


def test_nothing_runs_without_isolation(
    task: HumanEval, rows: dict[str, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "isolation", lambda: "there is none")
    asked = rows["add"], "    return x + y"
    refuses("there is none; --allow_unsafe_exec", HumanEval("test").score, *asked)
    assert task.score(*asked) == 1
