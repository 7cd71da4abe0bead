"""scripts.plan: its stages are those of the scripts, and money buys what it says."""

import itertools
import re
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from nanochat import scaling
from scripts import base_loss, base_train, chat_eval, chat_rl, chat_sft, mid_train, plan
from tests.models import refuses

CHANGES = [
    (base_train, {"eval_every": 10}), (base_train, {"eval_tokens": 2**26}),
    (base_loss, {"eval_tokens": 2**30}), (mid_train, {"num_epochs": 2}),
    (mid_train, {"eval_every": 1}), (chat_sft, {"num_epochs": 20}), (chat_rl, {"num_steps": 467}),
    (chat_rl, {"eval_every": 5}), (chat_rl, {"eval_problems": 1319}),
    (chat_rl, {"eval_samples": 16}), (chat_rl, {"num_slots": 8}), (chat_eval, {"batch_size": 4}),
]  # fmt: skip


@pytest.mark.parametrize(("script", "defaults"), CHANGES)
def test_a_script_s_defaults_change_its_own_hours(
    script: ModuleType, defaults: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan.make_plan(plan.Config(), 24, 12).hours
    monkeypatch.setattr(script, "Config", partial(script.Config, **defaults))
    after = plan.make_plan(plan.Config(), 24, 12).hours
    longer = {stage for stage in before if after[stage] > before[stage] * 1.001}
    assert longer == {script.__name__.removeprefix("scripts.")}
    assert all(after[stage] == before[stage] for stage in before.keys() - longer)


def test_reinforcement_counts_what_is_trained_on_and_what_is_held_out() -> None:
    """Answer by answer, on a GPU so slow at sampling that nothing else counts."""
    cfg = chat_rl.Config()
    measured = {*range(0, cfg.num_steps, cfg.eval_every), cfg.num_steps}
    answers = len(measured) * cfg.eval_problems * cfg.eval_samples
    answers += cfg.num_steps * cfg.questions_per_step * cfg.num_samples
    rate = plan.DECODE_STEPS_PER_SECOND * cfg.num_slots * 8
    hours = plan.stage_hours(plan.Config(), 1.0, 10**9, 2**19)  # a token costs one FLOP
    assert hours["chat_rl"] == pytest.approx(answers * plan.ANSWER_TOKENS / rate / 3600, rel=1e-6)


def test_the_stages_are_those_of_the_100_dollar_tier() -> None:
    """Each by its name, but that the three examinations are one; RL is examined in GSM8K alone."""
    text = (Path(__file__).parent.parent / "speedrun.sh").read_text()
    stages = re.findall(r"^stage (\w+) launch scripts\.(\w+)(.*)", text, re.M)
    examined = [rest for _, script, rest in stages if script == "chat_eval"]
    assert [re.findall(r"-i (\w+)(?: -a (\w+))?", rest) for rest in examined] == [
        [("mid", "")], [("sft", "")], [("rl", "GSM8K")],
    ]  # fmt: skip
    hours = plan.make_plan(plan.Config(), 24, 12).hours
    assert {script for _, script, _ in stages} | {"tok_train"} == set(hours)


@pytest.mark.parametrize("depth", [None, 20])
@pytest.mark.parametrize("budget", [85, 1000])
def test_money_buys_as_many_tokens_as_it_pays_for(budget: int, depth: int | None) -> None:
    cfg = plan.Config(depth=depth)
    chosen = plan.choose(cfg, budget)
    cost = sum(chosen.hours.values()) * plan.hourly_price(cfg)
    assert 0.97 * budget < cost <= budget and chosen.depth == (depth or chosen.depth)
    if depth is None:
        ratios = [plan.choose(plan.Config(depth=chosen.depth + by), budget).ratio for by in (-2, 2)]
        assert ratios[0] > chosen.ratio > ratios[1]
        assert ratios[0] > plan.BEST_RATIO > ratios[1]


def test_mistakes_are_told() -> None:
    unknown = plan.Config(gpu="h9")
    refuses(
        "--gpu=h9 is unknown; choose one of: gb200, b200, .*4060-ti",
        plan.make_plan,
        unknown,
        24,
        12,
    )
    refuses("is not usually rented; .* --price", plan.choose, plan.Config(gpu="4060"), 100)
    refuses("--dollars=0.5 pays for no run on 8 h100", plan.choose, plan.Config(), 0.5)


def test_more_memory_or_speed_is_never_worse() -> None:
    """Over all cards of the table, each alone; first to fit, then to recompute nothing, then rows.

    Depth 12 fits on 8 GB, depth 20 on 24 GB.
    """
    cards = {card.key: card for card in plan.CARDS}
    for depth, needed in ((4, 0), (12, 7), (20, 22), (24, 30)):
        plans = {key: plan.make_plan(plan.Config(gpus=1, gpu=key), depth, 12) for key in cards}
        assert all(plans[key].fits for key in cards if cards[key].memory_gib > needed)
        order = {key: (p.fits, not p.recompute, p.device_batch_size) for key, p in plans.items()}
        for less, more in itertools.permutations(cards, 2):
            if cards[less].memory_gib <= cards[more].memory_gib:
                assert order[less] <= order[more]
                if cards[less].peak <= cards[more].peak:
                    hours = plans[more].hours
                    assert all(hours[stage] <= plans[less].hours[stage] for stage in hours)


def test_recomputed_activations_cost_a_third_of_training() -> None:
    cfg = plan.Config(gpus=1, gpu="h100")
    without, again = (plan.stage_hours(cfg, 1e12, 10**9, 2**19, on) for on in (False, True))
    ratios = {stage: again[stage] / without[stage] for stage in without}
    assert ratios["base_train"] == pytest.approx(4 / 3, rel=0.02)
    assert ratios["base_loss"] == ratios["base_eval"] == 1


def test_the_page_and_one_number_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(plan.Config(depth=12, device_batch_size=32, gpus=2))
    page = capsys.readouterr().out
    line = r"([\d,]+) steps of ([\d,]+) tokens = 2 GPUs x (\d+) rows x (\d+) micro-batches"
    ((steps, tokens, rows, parts),) = re.findall(line, page)
    assert int(tokens.replace(",", "")) == 2 * int(rows) * int(parts) * 2048 and rows == "32"
    costs = [float(dollars) for dollars in re.findall(r" h  \$ *([\d.]+)", page)]
    assert costs[-1] == pytest.approx(sum(costs[:-1]), abs=0.05) and int(steps.replace(",", "")) > 9
    sizes = get_args(plan.Size)
    plan.main(plan.Config(only=sizes, ratio=9.5))
    numbers = dict(zip(sizes, capsys.readouterr().out.split(), strict=True))
    assert (numbers["depth"], numbers["ratio"], numbers["fp8"]) == ("24", "9.5", "1")


def test_the_goals_are_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    """The best model is the budget's depth, with a reserve; GPT-2's is the published run."""
    depth, ratio, _ = plan.GOALS["best"]
    affordable = plan.choose(plan.Config(), 85)
    assert affordable.depth == depth and affordable.ratio - 1 < ratio <= affordable.ratio
    plan.main(plan.Config(goal="gpt2"))
    page = capsys.readouterr().out
    assert page.startswith("goal: GPT-2's CORE") and "(assumed)" in page
    assert "5.84 B tokens (ratio 8), 2.79e+19 FLOPs, in fp8" in page  # as published


@pytest.mark.parametrize(
    ("depth", "gpu", "fp8"), [(24, "h100", 1), (20, "4090", 1), (24, "a100", 0), (12, "h100", 0)]
)
def test_fp8_where_the_card_has_it_and_the_model_gains(depth: int, gpu: str, fp8: int) -> None:
    assert plan.make_plan(plan.Config(gpu=gpu), depth, 12).fp8 == fp8


def test_minutes_become_steps_of_the_laptop_s_stages() -> None:
    few, many = (plan.plan_laptop(minutes, 0.2) for minutes in (10, 30))
    for minutes, planned in ((10, few), (30, many)):
        assert sum(seconds for _, seconds in planned.values()) == pytest.approx(
            60 * minutes, rel=0.01
        )
    assert many["base_train"][0] > 3 * few["base_train"][0]  # examinations take the same
    slower = plan.plan_laptop(30, 0.4)
    assert slower["base_train"][0] < many["base_train"][0] / 2
    assert slower["base_eval"] == (0, pytest.approx(2 * few["base_eval"][1]))
    own, as_slow = (plan.plan_laptop(None, seconds) for seconds in (0.2, 0.4))  # its own steps
    assert [num for num, _ in own.values()] == [num for num, _ in as_slow.values()]
    refuses("--minutes=1 is too short on this machine; 3 is the least", plan.plan_laptop, 1, 0.2)


def test_the_laptop_s_model_is_the_one_that_runcpu_trains() -> None:
    script = (Path(__file__).parent.parent / "runcpu.sh").read_text().replace("\\\n", " ")
    command = re.search(r"-m scripts.base_train (.*)", script)
    assert command
    flags = dict(re.findall(r"--(\w+)=(\d+)", command[1]))
    vocab_size = re.search(r"--vocab_size=(\d+)", script)
    assert vocab_size and int(flags["total_batch_size"]) == plan.LAPTOP_BATCH
    length, aspect, dim = (int(flags[n]) for n in ("max_seq_len", "aspect_ratio", "head_dim"))
    sizes = int(flags["depth"]), int(vocab_size[1]), length, aspect, dim
    assert scaling.depth_to_config(*sizes) == plan.LAPTOP
    stages = re.findall(r"^stage (\w+)", script, re.M)
    assert stages == list(plan.LAPTOP_STAGES)
