"""The report card: sections, the summary table, report.json, fences, the size of the code base."""

import json
import subprocess
from pathlib import Path

import pytest

from nanochat import report
from nanochat.common import UserError, report_dir
from nanochat.report import format_value


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base folder and a working folder of the test's own."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def section(stage: str, results: dict | None = None, **more) -> None:
    report.write_section(stage, f"The title of {stage}", {"depth": 2}, results or {}, **more)


def table_rows(title: str = "Summary") -> dict[str, list[str]]:
    """First cell -> the other cells, of the table in that chapter of report.md."""
    text = Path("report.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_report_lists_stages_in_pipeline_order_and_ends_with_table_and_time(folder: Path) -> None:
    report.reset()
    for stage in reversed(report.STAGES):
        section(stage)
    report.generate()
    text = Path("report.md").read_text()
    places = [text.index(f"## The title of {stage}\n") for stage in report.STAGES]
    assert places == sorted(places)
    assert places[-1] < text.index("| Metric | BASE | MID | SFT | RL |")
    assert text.splitlines()[-1].startswith("| val_bpb |") and "Total wall clock time: 0s" in text
    for name in ("report.md", "report.html"):
        assert Path(name).read_bytes() == (report_dir() / name).read_bytes()


def test_summary_table_fills_what_was_measured_and_dashes_the_rest() -> None:
    section("base_train", {"val_bpb": 2.5})
    section("base_loss", {"val_bpb": 1.25})
    section("base_eval", {"quiz": 0.25, "quiz_stderr": 0.021})
    section("chat_eval_sft", {"quiz": 0.875, "quiz_stderr": 0.0125, "sums": 1.0})
    report.generate()
    assert table_rows() == {
        "Metric": ["BASE", "MID", "SFT", "RL"],
        "---": ["---:"] * 4,
        "val_bpb": ["1.2500", "-", "-", "-"],
        "quiz": ["25.0 % ± 2.1", "-", "87.5 % ± 1.2", "-"],
        "sums": ["-", "-", "100.0 %", "-"],
    }


def test_total_time_runs_from_reset_to_the_last_stage_not_to_generate() -> None:
    report.reset()
    section("base_train")
    for name, moment in (("start", 1000.0), ("base_train", 1000.0 + 187)):
        path = report_dir() / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"time": moment}))
    report.generate()
    assert "Total wall clock time: 3m 07s\n" in Path("report.md").read_text()


def test_reset_forgets_earlier_sections() -> None:
    section("base_train", {"val_bpb": 2.0})
    report.reset()
    with pytest.raises(UserError, match="no stage has reported"):
        report.generate()


def test_a_stage_that_runs_again_replaces_its_own_section_only() -> None:
    section("base_train", {"val_bpb": 9.0})
    section("tok_eval", {"bytes per token": 3.5})
    section("base_train", {"val_bpb": 2.0}, seconds=61.0)
    report.generate()
    text = Path("report.md").read_text()
    assert "- val_bpb: 2.0000" in text and "9.0" not in text
    assert "- bytes per token: 3.5000" in text and "took 1m 01s" in text


def test_only_the_main_rank_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    section("base_train")
    assert not report_dir().exists()


@pytest.mark.parametrize("run", ["`", "```", "~~~", "`````"])
def test_a_sample_cannot_leave_its_block(run: str) -> None:
    sample = f"before\n{run}\n# not a heading\n{run}text\nafter"
    section("chat_sft", samples=[sample])
    report.generate()
    lines = Path("report.md").read_text().splitlines()
    # CommonMark: a block closes at the first later line of only backticks, at least as many as opened it.
    begin = lines.index(next(line for line in lines if line.startswith("```")))
    width = len(lines[begin]) - len(lines[begin].lstrip("`"))
    end = next(
        i
        for i in range(begin + 1, len(lines))
        if lines[i].strip("`") == "" and len(lines[i]) >= width
    )
    assert "\n".join(lines[begin + 1 : end]) == sample


def test_a_value_cannot_leave_its_line_or_cell() -> None:
    section("chat_eval_sft", {"a|b\n# c": 0.5})
    report.generate()
    text = Path("report.md").read_text()
    assert "| a\\|b # c | - | - | 50.0 % | - |" in text
    assert "\n# c" not in text


@pytest.mark.parametrize("stage", ["start", "base_train"])
@pytest.mark.parametrize("content", ["", "{", "[1]", '{"title": "only"}', "null", b"\xff"])
def test_an_unreadable_section_is_named_in_one_line(stage: str, content: str | bytes) -> None:
    section("base_train")
    path = report_dir() / f"{stage}.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=rf"{stage}\.json is damaged .*; delete it") as caught:
        report.generate()
    assert "\n" not in str(caught.value) and not Path("report.md").exists()


@pytest.mark.parametrize("stage", report.STAGES)
def test_one_stage_alone_makes_a_report(stage: str) -> None:
    section(stage)
    report.generate()
    assert f"## The title of {stage}\n" in Path("report.md").read_text()
    assert table_rows() == {
        "Metric": ["BASE", "MID", "SFT", "RL"],
        "---": ["---:"] * 4,
        "val_bpb": ["-"] * 4,
    }


def test_centred_means_stand_first_and_core_keeps_its_tasks_to_itself() -> None:
    core = {"copa": 0.6, "copa_stderr": 0.049, "both": 0.5, "CORE (21 of 22)": 0.2219}
    section("base_eval", core | {"CORE (21 of 22)_stderr": 0.00312})
    section("chat_eval_rl", {"both": 0.75, "GSM8K": 0.031, "ChatCORE": -0.02})
    report.generate()
    assert list(table_rows().items())[2:] == [
        ("val_bpb", ["-", "-", "-", "-"]),
        ("CORE (21 of 22)", ["0.2219 ± 0.0031", "-", "-", "-"]),
        ("ChatCORE", ["-", "-", "-", "-0.0200"]),
        ("both", ["50.0 %", "-", "-", "75.0 %"]),
        ("GSM8K", ["-", "-", "-", "3.1 %"]),
    ]
    own = table_rows("The title of base_eval")
    assert own["copa"] == ["60.0 % ± 4.9"] and own["CORE (21 of 22)"] == ["0.2219 ± 0.0031"]


def test_report_json_holds_what_the_sections_hold() -> None:
    report.reset()
    section("base_train", {"val_bpb": 2.5}, samples=["a\nb"], seconds=3.5)
    section("chat_eval_sft", {"quiz": 0.875, "quiz_stderr": 0.0125})
    report.generate()
    found = json.loads((report_dir() / "report.json").read_text())
    assert list(found) == ["started", "total_seconds", "machine", "code", "sections", "summary"]
    assert list(found["sections"]) == ["base_train", "chat_eval_sft"]
    for stage, written in found["sections"].items():
        assert written == json.loads((report_dir() / f"{stage}.json").read_text())
    assert found["sections"]["base_train"]["samples"] == ["a\nb"]
    assert found["summary"] == {
        "BASE": {"val_bpb": 2.5},
        "MID": {"val_bpb": None},
        "SFT": {"val_bpb": None, "quiz": 0.875, "quiz_stderr": 0.0125},
        "RL": {"val_bpb": None},
    }
    last = found["sections"]["chat_eval_sft"]["time"]
    assert found["total_seconds"] == last - found["started"] >= 0


def test_what_is_not_a_number_is_missing_for_people_and_null_for_programs() -> None:
    section("base_train", {"loss": float("nan"), "val_bpb": float("inf"), "note": None})
    report.generate()
    text = Path("report.md").read_text()
    assert "- loss: -\n" in text and "- note: -\n" in text and table_rows()["val_bpb"][0] == "-"
    strict = json.loads((report_dir() / "report.json").read_text(), parse_constant=pytest.fail)
    assert strict["sections"]["base_train"]["results"]["loss"] is None


def test_a_standard_error_joins_its_value() -> None:
    section("chat_rl", {"accuracy": 0.5, "accuracy_stderr": 0.0441, "alone_stderr": 2})
    report.generate()
    text = Path("report.md").read_text()
    assert "- accuracy: 0.5000 ± 0.0441\n- alone_stderr: 2\n" in text


def test_code_size_counts_tracked_sources_without_tests(tmp_path: Path) -> None:
    files = {
        "a.py": "x = 1\n" * 4,
        "src/b.rs": "fn b() {}\n",
        "tests/test_a.py": "y\n" * 99,
        "requirements.lock": "pin\n" * 7,
        "untracked.py": "z\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", *(name for name in files if name != "untracked.py")], check=True)
    assert report.code_size(tmp_path) == {
        "characters": 34,
        "lines": 5,
        "files": 2,
        "approximate tokens": 8,
        "lines of the dependency lock": 7,
    }


def test_code_size_outside_git_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "a.py").write_text("x = 1\n")
    assert report.code_size(tmp_path) == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0.0000"),
        (0.85, "0.8500"),
        (3e-5, "3e-05"),
        (1.5e15, "1.5e+15"),
        (15784.98, "15,785"),
        (-20000.4, "-20,000"),
        (32768, "32,768"),
        (True, "True"),
        ("", "-"),
        ("auto", "auto"),
    ],
)
def test_values_print_short(value: object, text: str) -> None:
    assert format_value(value) == text
