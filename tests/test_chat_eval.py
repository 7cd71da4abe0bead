"""The examination script: results, records and report of a small random model; what it refuses."""

import json
from pathlib import Path

import pytest

from nanochat.common import report_dir
from scripts.chat_eval import Config, main
from tests.models import random_gpt, refuses, save_model


@pytest.fixture
def run(base: Path) -> Path:
    """The folder of a run with one checkpoint."""
    return save_model(random_gpt(128), "mid", "d1", step=7)


def test_two_tasks_are_recorded_and_reported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = "primer-choice|primer-arithmetic"
    sampling = {"num_samples": 2, "temperature": 1.0, "max_tokens": 8, "batch_size": 4}
    main(Config("mid", tasks=tasks, max_problems=5, device_type="cpu", **sampling))
    rows = {}
    for name, num_replies in (("primer-choice", 1), ("primer-arithmetic", 2)):
        lines = (run / f"chat_eval_{name}.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
        assert [row["index"] for row in rows[name]] == list(range(5))
        assert all(row["step"] == 7 and len(row["replies"]) == num_replies for row in rows[name])
    section = json.loads((report_dir() / "chat_eval_mid.json").read_text())
    results = section["results"]
    expected = sum(row["scores"][0] for row in rows["primer-choice"])
    assert results["primer-choice"]["value"] == pytest.approx(expected / 5)
    assert {"primer-arithmetic", "primer-arithmetic pass@2"} <= results.keys()
    assert len(section["samples"]) == 4 and "User: " in section["samples"][0]
    assert "primer-choice:" in capsys.readouterr().out


def test_a_task_whose_rows_have_kinds_is_shown_kind_by_kind(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = "primer-visitor-dev"
    main(Config("mid", tasks=tasks, max_problems=40, device_type="cpu", max_tokens=4))
    lines = (run / f"chat_eval_{tasks}.jsonl").read_text().splitlines()
    kinds = sorted({json.loads(line)["conversation"]["kind"] for line in lines})
    section = json.loads((report_dir() / "chat_eval_mid.json").read_text())
    names = [f"{tasks}: {kind}" for kind in kinds]
    assert list(section["results"]) == [tasks, *names] and len(kinds) == 7
    assert all(section["results"][name].keys() == {"value", "stderr"} for name in names)
    line = f"{tasks}: 0.0 % ± 0.0 of 40; {' % ± 0.0, '.join(f'{kind} 0.0' for kind in kinds)} % ±"
    assert line in capsys.readouterr().out
    samples = section["samples"]
    assert len(samples) == 7 and samples[1].count("User: ") == samples[1].count("Model: ") > 1


def test_refusals_leave_nothing_behind(run: Path) -> None:
    for told, config in (
        ("'no-such-task' is unknown", Config("mid", tasks="no-such-task")),
        ("--temperature above 0", Config("mid", num_samples=3)),
        ("scripts.chat_rl", Config("rl", tasks="primer-choice", device_type="cpu")),
        ("d99", Config("mid", tasks="primer-choice", model_tag="d99", device_type="cpu")),
    ):
        refuses(told, main, config)
        assert not list(run.glob("*.jsonl")) and not report_dir().exists()
