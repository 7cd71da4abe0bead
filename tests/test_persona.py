"""runcpu.sh with a persona, which shares the plain run's base model and leaves its chat models."""

import re
from pathlib import Path

import pytest

from nanochat.common import FOLDER_NAME
from tests.test_speedrun import Tier

CHAT = [
    "mid_train", "chat_eval_mid", "chat_sft", "chat_eval_sft", "chat_rl", "chat_eval_rl",
]  # fmt: skip


@pytest.fixture
def tier(tmp_path: Path) -> Tier:
    return Tier(tmp_path, "runcpu.sh")


def starts(tier: Tier) -> dict[str, int]:
    """How often each run was started since its folder was last cleared."""
    files = tier.base_dir.glob("*/*/starts")
    counted = {f"{file.parent.parent.name}/{file.parent.name}": file for file in files}
    return {name: len(file.read_text().split()) for name, file in counted.items()}


def test_a_persona_begins_after_the_base_model(tier: Tier) -> None:
    plain = tier.run()
    persona, facts = tier.folder / "my owl.v2.jsonl", tier.folder / "me.json"
    persona.write_text("{}")
    facts.write_text("{}")
    with_it = ["--custom", str(persona), f"--identity={facts}"]
    assert tier.run(*with_it) == CHAT
    calls = (tier.folder / "calls").read_text().splitlines()
    for stage in ("mid_train", "chat_sft"):
        call = next(call for call in calls if f"scripts.{stage}" in call)
        assert f"--custom={persona} --identity={facts}" in call and "--fresh" not in call
        assert "--model_tag=laptop-primer-my-owl.v2 " in call
    base = tier.base_dir / "base"
    assert (base / "laptop-primer-my-owl.v2").resolve() == (base / "laptop-primer").resolve()
    assert tier.run() == tier.run(*with_it) == []
    # A changed file, another weight, --fresh: its own stages start over, each cleared once.
    changes = [([], "[]"), ([f"--custom={facts}:3"], "[]"), (["--fresh"], "[]")]
    for more, text in changes:
        persona.write_text(text)
        assert tier.run(*with_it, *more) == CHAT
    expected = {f"{stage}/laptop-primer-my-owl.v2": 1 for stage in ("mid", "sft", "rl")}
    expected |= {f"{stage}/laptop-primer": 1 for stage in ("mid", "sft", "rl", "base")}
    assert starts(tier) == {**expected, "base/laptop-primer-my-owl.v2": 1}
    assert tier.run() == [] and tier.run("--fresh") == plain


def test_a_persona_of_the_large_tiers(tmp_path: Path) -> None:
    tier = Tier(tmp_path, "speedrun.sh")
    persona = tmp_path / "my owl.jsonl"
    persona.write_text("{}")
    plain = tier.run()
    with_it = tier.run(f"--custom={persona}:2", "--identity", str(persona))
    assert with_it == plain[plain.index("mid_train") :]
    calls = (tier.folder / "calls").read_text()
    assert calls.count(f"--custom={persona}:2 --identity={persona}") == 3  # and the check
    assert calls.count("--model_tag=d24-my-owl ") == 6 and tier.run() == []
    tags = set()
    for name in ("小红", "小明", ""):  # whose letters are none of a folder's
        (tmp_path / f"{name}.jsonl").write_text("{}")
        tier.run(f"--custom={tmp_path}/{name}.jsonl")
        calls = (tier.folder / "calls").read_text()
        tags |= set(re.findall("scripts.chat_rl .*--model_tag=(\\S+)", calls))
    assert len(tags) == 3 and all(re.fullmatch(FOLDER_NAME, tag) for tag in tags)
    (tier.base_dir / "base/d24-data").mkdir()
    (tmp_path / "data.json").write_text("{}")
    process = tier.start(f"--custom={tmp_path}/data.json")
    assert "base/d24-data is a model of its own" in process.communicate(timeout=60)[0]


def test_a_killed_persona_goes_on(tier: Tier) -> None:
    persona = tier.folder / "owl.jsonl"
    persona.write_text("{}")
    everything = tier.run("--custom", str(persona), KILL_IN="chat_sft")
    assert everything[-1] == "chat_sft" and "base_train" in everything
    assert tier.run("--custom", str(persona)) == CHAT[2:]
    assert starts(tier)["sft/laptop-primer-owl"] == 2
    assert tier.run() == CHAT  # of the plain run, whose base model is there


def test_what_is_wrong_is_told_before_anything_runs(tier: Tier) -> None:
    for arguments, told in {
        ("--custom",): "error: --custom needs a value",
        ("--identity=",): "error: --identity needs a value",
    }.items():
        process = tier.start(*arguments)
        assert told in process.communicate(timeout=60)[0] and process.returncode == 2
    stand_in = tier.folder / "bin" / "python"
    stand_in.write_text(stand_in.read_text().replace("scripts.* |", "scripts.* | tasks.* |"))
    assert tier.run("--custom", str(tier.folder / "nowhere"), KILL_BEFORE="mixtures") == []
