"""scripts.plan: its stages are those of the scripts, and hours and money buy what it says."""

import itertools
import math
import re
import shlex
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import get_args

import pytest
import torch
import tyro

from nanochat import scaling
from nanochat.scaling import CARDS, named_card
from scripts import base_loss, base_train, chat_eval, chat_rl, chat_sft, mid_train, plan
from tests.models import refuses

ROOT = Path(__file__).parent.parent
H100S = plan.Gpus(named_card("h100"), 8)
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
    before = plan.make_plan(plan.Config(), H100S, 24, 12).hours
    monkeypatch.setattr(script, "Config", partial(script.Config, **defaults))
    after = plan.make_plan(plan.Config(), H100S, 24, 12).hours
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
    hours = plan.stage_hours(plan.Config(), H100S, 1.0, 10**9, 2**19)  # a token costs one FLOP
    assert hours["chat_rl"] == pytest.approx(answers * plan.ANSWER_TOKENS / rate / 3600, rel=1e-6)


def test_the_stages_are_those_of_the_100_dollar_tier() -> None:
    """Each by its name, but that the three examinations are one; RL is examined in GSM8K alone."""
    text = (ROOT / "speedrun.sh").read_text()
    stages = re.findall(r"^stage (\w+) launch scripts\.(\w+)(.*)", text, re.M)
    examined = [rest for _, script, rest in stages if script == "chat_eval"]
    assert [re.findall(r"-i (\w+)(?: -a (\w+))?", rest) for rest in examined] == [
        [("mid", "")], [("sft", "")], [("rl", "GSM8K")],
    ]  # fmt: skip
    hours = plan.make_plan(plan.Config(), H100S, 24, 12).hours
    assert {script for _, script, _ in stages} | {"tok_train"} == set(hours)


SMALL_TO_LARGE = [
    "3050 6gb", "1660", "t4", "3060", "4060 ti 16gb", "v100", "l4", "4090", "5090", "a100", "h100",
    "b200",
]  # fmt: skip
BUDGETS = [1, 1.5, 2, 4, 6, 8, 12, 24, 48, 100, 300, 1000]


@pytest.mark.parametrize("num", [1, 8])
@pytest.mark.parametrize("name", SMALL_TO_LARGE)
def test_more_hours_buy_a_larger_and_better_model(name: str, num: int) -> None:
    """Each budget is used and kept; depth never falls, expected bits per byte always do.

    Nor would a neighbouring depth have been better, whatever its ratio.
    """
    gpus, before = plan.Gpus(named_card(name), num), (0, math.inf, math.inf)
    for hours in BUDGETS:
        chosen = plan.choose(plan.Config(), gpus, hours)
        assert 0.99 * hours < chosen.total <= hours + 1e-6 and chosen.fits
        bpb, *_ = scaling.predict(chosen.flops, chosen.ratio)
        depth = chosen.config.n_layer
        assert depth >= before[0] and bpb < before[1], (hours, before)
        for other, power in itertools.product((depth - 2, depth + 2), range(16)):
            tried = plan.make_plan(plan.Config(), gpus, max(4, other), 1.5**power, cut=True)
            if tried.fits and tried.total <= hours:
                assert scaling.predict(tried.flops, tried.ratio)[0] >= bpb
        before = depth, bpb


@pytest.mark.parametrize("hours", [0.4, 2, 20])
def test_stages_that_are_cut_take_no_longer_than_planned(
    hours: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same arithmetic with the flags in place of the scripts' defaults."""
    gpus = plan.Gpus(named_card("4060"), 1)
    chosen = plan.choose(plan.Config(), gpus, hours)
    flags = plan.stage_flags(chosen.share)
    tokens = flags["mid_steps"] * mid_train.Config().total_batch_size
    assert tokens <= plan.MID_RATIO * scaling.scaling_parameters(chosen.config)
    monkeypatch.setattr(plan, "MID_TOKENS", tokens)
    evaluation = {"eval_tokens": flags["eval_tokens"]}
    rl = {"num_steps": flags["rl_steps"], "eval_problems": flags["problems"]}
    for script, defaults in {base_train: evaluation, mid_train: evaluation, chat_rl: rl}.items():
        monkeypatch.setattr(script, "Config", partial(script.Config, **defaults))
    flops = chosen.flops / chosen.num_tokens
    own = plan.stage_hours(plan.Config(), gpus, flops, chosen.num_tokens, chosen.batch)
    for stage in ("base_train", "mid_train", "chat_rl"):
        assert own[stage] <= 1.02 * chosen.hours[stage]
    assert own["tok_train"] == chosen.hours["tok_train"]


def test_money_is_the_hours_that_it_rents() -> None:
    cfg = plan.Config(dollars=85)
    hours = plan.budget_hours(cfg, H100S)
    assert hours == 3.54  # 85 / (8 x 3)
    chosen = plan.choose(cfg, H100S, 3.54)
    assert 0.99 * 85 < chosen.total * plan.hourly_price(cfg, H100S) <= 85
    assert plan.budget_hours(plan.Config(dollars=85, hours=2), H100S) == 2
    refuses(
        "not usually rented; .*--price", plan.budget_hours, cfg, plan.Gpus(named_card("4060"), 1)
    )
    assert plan.budget_hours(plan.Config(dollars=85, price=10), H100S) == 1.06


def test_mistakes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refuses("--gpu=h9 is unknown; the nearest are", plan.main, plan.Config(gpu="h9"))
    few = partial(plan.choose, plan.Config(), plan.Gpus(named_card("3050-6gb"), 1))
    said = refuses(r"0.1 hours are too few for depth 4 .*--hours=0\.\d+ is the least", few, 0.1)
    least = float(re.findall(r"--hours=(\S+)", said)[0])
    assert few(least).total <= least
    refuses("hours are too few", few, least - 0.02)
    refuses(
        "no memory for depth 40", plan.choose, plan.Config(depth=40), plan.Gpus(CARDS[-1], 1), 9
    )
    refuses("no GPU is here: .*runcpu.sh --minutes 480", plan.main, plan.Config(hours=8))
    refuses("a budget chooses it", plan.main, plan.Config(hours=8, gpu="4090", ratio=3))


# Names as people write them are in tests/test_scaling.py; here, what torch reports.
FAKES = {
    "NVIDIA GeForce RTX 4090": (25_250_627_584, (8, 9)),
    "NVIDIA GeForce RTX 3080": (12_622_168_064, (8, 6)),  # that of 12 GB
    "NVIDIA GeForce RTX 4090 Laptop GPU": (17_170_956_288, (8, 9)),
}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Device names of this machine, to be filled; an unlisted one multiplies at 90 TFLOP/s."""
    names: list[str] = []

    def properties(index: int) -> SimpleNamespace:
        memory, (major, minor) = FAKES[names[index]]
        return SimpleNamespace(name=names[index], total_memory=memory, major=major, minor=minor)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(plan, "set_up", lambda _: None)
    monkeypatch.setattr(scaling, "measure_flops", lambda _: 90e12)
    return names


def test_the_gpus_that_are_here(fakes: list[str]) -> None:
    """Several wait for the slowest and fit what the smallest holds; a name overrides them."""
    listed, small, laptop = FAKES
    assert plan.find_gpus(plan.Config()) == H100S
    assert plan.find_gpus(plan.Config(gpu="4090")).num == 1
    fakes += [listed, listed]
    card, num, are_here = plan.find_gpus(plan.Config(hours=8))
    assert (card.name, num, are_here) == ("RTX 4090", 2, True) and card.peak == 165.2
    assert card.memory_gib == pytest.approx(23.5, abs=0.1)
    assert plan.find_gpus(plan.Config(gpus=1)).num == 1
    fakes[1] = small
    card = plan.find_gpus(plan.Config()).card
    assert (card.name, round(card.memory_gib, 1)) == ("RTX 3080", 11.8)
    fakes[:] = [laptop]
    card = plan.find_gpus(plan.Config(hours=8)).card
    assert (card.name, card.peak, card.price) == (laptop, 90.0, None)
    assert card.capability == (8, 9) and card.memory_gib == pytest.approx(16, abs=0.1)
    assert plan.choose(plan.Config(), plan.Gpus(card, 1), 8).fits
    assert plan.find_gpus(plan.Config(gpu="h100", gpus=8)) == H100S


def test_the_disk_of_all_checkpoints(
    fakes: list[str], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of pretraining and midtraining, one of SFT, two of RL, and one being written."""
    large = plan.make_plan(plan.Config(), H100S, 20, 12)
    base_steps, sft = large.num_tokens // large.batch, chat_sft.Config()
    mid, rl = mid_train.Config(), chat_rl.Config()
    kept = min(3, math.ceil(base_steps / base_train.Config().save_every))
    kept += min(3, math.ceil(plan.MID_TOKENS / mid.total_batch_size / mid.save_every))
    kept += math.ceil(plan.SFT_TOKENS / sft.total_batch_size / sft.save_every)
    kept += math.ceil(rl.num_steps / rl.save_every)
    assert kept == plan.KEPT
    # Weights and two moments of the tables and the head, one of the matrices, in fp32.
    counts = scaling.parameter_counts(large.config)
    each = 12 * counts["total"] - 4 * counts["blocks"]
    (line,) = plan.disk_lines(H100S, large)
    found = re.findall(r"disk: (\d+) GB for (\d+) shards of text and (\d+) checkpoints", line)[0]
    assert int(found[0]) == pytest.approx(0.1 * int(found[1]) + 10 * each / 1e9, rel=0.01)
    assert int(found[0]) > 100 and found[2] == "10"
    fakes.append("NVIDIA GeForce RTX 4090")
    here = plan.find_gpus(plan.Config())
    for free, verdict in ((1e13, "it fits in the 10,000"), (5e10, "IT DOES NOT FIT in the 50")):
        monkeypatch.setattr(
            plan.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free)
        )
        assert f"{verdict} GB that are free in {base.parent}" in plan.disk_lines(here, large)[1]


COMMANDS = {
    "--hours 8 --gpu rtx4090": "HOURS=8 bash speedrun.sh",
    "--hours 0.5 --gpu b200 --mfu 0.3": "HOURS=0.5 MFU=0.3 bash speedrun.sh",
    "--dollars 85": "HOURS=3.54 bash speedrun.sh",
    "--hours 8 --gpu 4090 --depth 8": "HOURS=8 DEPTH=8 bash speedrun.sh",
    "": "bash speedrun.sh",
    "--goal gpt2": "GOAL=gpt2 bash speedrun.sh",
    "--gpu t4": "--hours chooses a model that fits",
    "--depth 32 --ratio 29": "DEPTH=32 RATIO=29 bash speedrun.sh",
    "--hours 8 --gpu 4090 --gpus 2 --max_seq_len 1024": "torchrun --nproc_per_node=2 "
    "-m scripts.base_train -- --depth=D --target_param_data_ratio=R --max_seq_len=1024",
}  # fmt: skip


@pytest.mark.parametrize("flags", COMMANDS)
def test_the_page_ends_with_the_command(
    flags: str, fakes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tyro.cli(plan.Config, args=shlex.split(flags))
    plan.main(cfg)
    page = capsys.readouterr().out
    depth, ratio = re.findall(r"1 x the hours: .*\(depth (\d+), ratio (\S+)\)", page)[0]
    command = COMMANDS[flags].replace("=D ", f"={depth} ").replace("=R ", f"={ratio} ")
    assert page.endswith(f"\nnext: {command}\n")


def test_more_hours_are_on_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(plan.Config(hours=8, gpu="rtx 3060"))
    page = capsys.readouterr().out
    found = re.findall(r"(\d) x the hours: (\S+) \+- (\S+) bits.*CORE (\S+) \+- \S+ \(depth", page)
    assert [factor for factor, *_ in found] == ["1", "2", "4"]
    bpbs, cores = ([float(row[column]) for row in found] for column in (1, 3))
    assert bpbs == sorted(bpbs, reverse=True) and cores == sorted(cores)
    chosen = plan.choose(plan.Config(), plan.Gpus(named_card("3060"), 1), 16)
    assert bpbs[1] == pytest.approx(scaling.predict(chosen.flops, chosen.ratio)[0], abs=2e-3)
    assert f"CORE {cores[0]:.3f} is below GPT-2 124M (0.1139)\n" in page


def test_more_memory_or_speed_is_never_worse() -> None:
    """Over all cards of the table, each alone; first to fit, then to recompute nothing, then rows.

    Depth 12 fits on 8 GB, depth 20 on 24 GB.
    """
    cards = {card.key: card for card in CARDS}
    for depth, needed in ((4, 0), (12, 7), (20, 22), (24, 30)):
        plans = {
            key: plan.make_plan(plan.Config(), plan.Gpus(card, 1), depth, 12)
            for key, card in cards.items()
        }
        assert all(plans[key].fits for key in cards if cards[key].memory_gib > needed)
        order = {key: (p.fits, not p.recompute, p.device_batch_size) for key, p in plans.items()}
        for less, more in itertools.permutations(cards, 2):
            if cards[less].memory_gib <= cards[more].memory_gib:
                assert order[less] <= order[more]
                if cards[less].peak <= cards[more].peak:
                    hours = plans[more].hours
                    assert all(hours[stage] <= plans[less].hours[stage] for stage in hours)


def test_recomputed_activations_cost_a_third_of_training() -> None:
    without, again = (
        plan.stage_hours(plan.Config(), H100S, 1e12, 10**9, 2**19, recompute=on)
        for on in (False, True)
    )
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
    plan.main(plan.Config(only=("eval_tokens", "ratio"), hours=8, gpu="4090"))
    assert re.fullmatch(r"\d{7} \d+\.\d+\n", capsys.readouterr().out)  # for a shell: no exponent
    plan.main(plan.Config(only=sizes, ratio=9.5, gpu="h100"))
    numbers = dict(zip(sizes, capsys.readouterr().out.split(), strict=True))
    assert (numbers["depth"], numbers["ratio"], numbers["fp8"]) == ("24", "9.5", "1")
    assert [numbers[name] for name in sizes[5:]] == ["0"] * 4  # the scripts' own
    plan.main(plan.Config(only=sizes, hours=2, gpu="3060"))
    numbers = dict(zip(sizes, capsys.readouterr().out.split(), strict=True))
    assert numbers["depth"] < "9" and all(int(numbers[name]) > 0 for name in sizes[5:])


def test_the_goals_are_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    """The best model is the budget's depth, with a reserve; GPT-2's is the published run."""
    depth, ratio, _ = plan.GOALS["best"]
    affordable = plan.choose(plan.Config(), H100S, 3.54)  # $85
    assert affordable.config.n_layer == depth
    assert affordable.ratio - 1 < ratio <= affordable.ratio
    plan.main(plan.Config(goal="gpt2", gpu="h100", gpus=8))
    page = capsys.readouterr().out
    assert page.startswith("goal: GPT-2's CORE") and "(assumed)" in page
    assert "5.84 B tokens (ratio 8), 2.79e+19 FLOPs, in fp8" in page  # as published


@pytest.mark.parametrize(
    ("depth", "gpu", "fp8"), [(24, "h100", 1), (20, "4090", 1), (24, "a100", 0), (12, "h100", 0)]
)
def test_fp8_where_the_card_has_it_and_the_model_gains(depth: int, gpu: str, fp8: int) -> None:
    assert plan.make_plan(plan.Config(), plan.Gpus(named_card(gpu), 1), depth, 12).fp8 == fp8


def row_cells(name: str) -> list[list[str]]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize(
    ("name", "units"),
    [("README.md", ("seconds", " h ", " m")), ("README.zh.md", ("数秒", " 小时 ", " 分"))],
)
def test_the_hours_in_the_readme_are_the_plan_s(name: str, units: tuple[str, str, str]) -> None:
    """Every stage of the $100 tier in whole minutes, and what the examples of budgets get."""
    hours = plan.make_plan(plan.Config(), H100S, *plan.GOALS["best"][:2]).hours
    planned = {
        row[1].strip("`").removeprefix("scripts."): row[4]
        for row in row_cells(name)
        if len(row) == 6
    }
    for stage, expected in hours.items():
        whole, minutes = divmod(round(60 * expected), 60)
        words = f"{whole}{units[1]}{minutes}{units[2]}" if whole else f"{minutes}{units[2]}"
        assert planned[stage] == (words if whole + minutes else units[0]), stage
    examples = [row for row in row_cells(name) if " x " in row[0]]
    assert len(examples) == 6
    for gpus, budget, *cells in examples:
        num, card = gpus.split(" x ")
        chosen = plan.choose(plan.Config(), plan.Gpus(named_card(card), int(num)), float(budget))
        bpb, error, core, core_error = scaling.predict(chosen.flops, chosen.ratio)
        assert cells == [
            str(chosen.config.n_layer), f"{chosen.ratio:.1f}", f"{bpb:.3f} ± {error:.3f}",
            f"{core:.2f} ± {core_error:.2f}",
        ]  # fmt: skip


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
    script = (ROOT / "runcpu.sh").read_text().replace("\\\n", " ")
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
