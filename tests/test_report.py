"""The report card: sections, the summary table, fences, the size of the code base."""

import json
import subprocess
from pathlib import Path

import pytest

from nanochat import report
from nanochat.paths import UserError, report_dir


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base folder and a working folder of the test's own."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def section(stage: str, results: dict | None = None, **more) -> None:
    report.write_section(stage, f"The title of {stage}", {"depth": 2}, results or {}, **more)


def table_rows(text: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of the report's only table."""
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
    assert text.splitlines()[-1].startswith("Total wall clock time: ")
    assert text == (report_dir() / "report.md").read_text()


def test_summary_table_fills_what_was_measured_and_dashes_the_rest() -> None:
    section("base_train", {"val_bpb": 2.5})
    section("base_loss", {"val_bpb": 1.25})
    section("base_eval", {"quiz": 0.25, "quiz_stderr": 0.021})
    section("chat_eval_sft", {"quiz": 0.875, "quiz_stderr": 0.0125, "sums": 1.0})
    report.generate()
    assert table_rows(Path("report.md").read_text()) == {
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
    assert Path("report.md").read_text().endswith("Total wall clock time: 3m 07s\n")


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


def test_an_unreadable_section_is_named() -> None:
    section("base_train")
    (report_dir() / "base_train.json").write_text("{")
    with pytest.raises(UserError, match="base_train.json"):
        report.generate()


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
        (32768, "32,768"),
        (True, "True"),
        ("a\nb", "a b"),
    ],
)
def test_values_print_short(value: object, text: str) -> None:
    assert report.format_value(value) == text
