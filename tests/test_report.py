"""The report card: sections, tables, report.json, the page that nothing can act in, the charts."""

import json
import math
import re
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from nanochat import report
from nanochat.common import base_dir, report_dir
from nanochat.core_eval import Score
from nanochat.report import MAX_POINTS, draw_run, format_value
from tests.models import refuses


@pytest.fixture(autouse=True)
def folder(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base folder and a working folder of the test's own."""
    monkeypatch.chdir(tmp_path)


def section(stage: str, results: dict | None = None, **more) -> None:
    report.write_section(stage, f"The title of {stage}", {"depth": 2}, results or {}, **more)


def table_rows(title: str = "Summary") -> dict[str, list[str]]:
    """First cell -> the other cells, of the table in that chapter of report.md."""
    text = Path("report.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_report_lists_stages_in_pipeline_order_and_ends_with_table_and_time() -> None:
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


def test_total_time_runs_from_reset_to_the_last_stage_not_to_generate() -> None:
    section("tok_train")
    report.reset()  # forgets that
    refuses("no stage has reported", report.generate)
    section("base_train")
    for name, moment in (("start", 1000.0), ("base_train", 1000.0 + 187)):
        path = report_dir() / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"time": moment}))
    report.generate()
    assert "Total wall clock time: 3m 07s\n" in Path("report.md").read_text()


def test_a_section_replaces_its_old_one_on_the_main_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    section("base_train", {"val_bpb": 9.0})
    section("tok_eval", {"bytes per token": 3.5})
    section("base_train", {"val_bpb": 2.0}, seconds=61.0)
    monkeypatch.setenv("RANK", "1")
    section("base_train", {"val_bpb": 9.0})
    monkeypatch.delenv("RANK")
    report.generate()
    text = Path("report.md").read_text()
    assert "- val_bpb: 2.0000" in text and "9.0" not in text
    assert "- bytes per token: 3.5000" in text and "took 1m 01s" in text


def test_no_sample_or_value_leaves_its_place() -> None:
    samples = [f"before\n{run}\n# not a heading\n{run}text\nafter" for run in ("`", "~~~", "`````")]
    section("chat_eval_sft", {"a|b\n# c": 0.5}, samples=samples)
    report.generate()
    text = Path("report.md").read_text()
    # CommonMark: a block closes at the first later line of only as many backticks or more.
    found = re.findall(r"^(`{3,})text\n(.*?)\n\1`*$", text, re.M | re.S)
    assert [sample for _, sample in found] == samples
    assert "| a\\|b # c | - | - | 50.0 % | - |" in text and "\n# c" not in text


@pytest.mark.parametrize("stage", ["start", "base_train"])
@pytest.mark.parametrize("content", [b"", b"[1]", b'{"title": "only"}', b"null", b"\xff"])
def test_an_unreadable_section_is_named_in_one_line(stage: str, content: bytes) -> None:
    section("base_train")
    path = report_dir() / f"{stage}.json"
    path.write_bytes(content)
    refuses(rf"{stage}\.json is damaged .*; delete it", report.generate)
    assert not Path("report.md").exists()


def test_tables_put_centered_means_first_and_dash_what_was_not_measured() -> None:
    core = {"copa": Score(0.6, 0.049), "both": 0.5, "CORE (21 of 22)": Score(0.2219, 0.00312)}
    section("base_train", {"val_bpb": 2.5})
    section("base_loss", {"val_bpb": 1.25})
    section("base_eval", core)
    section("chat_eval_rl", {"both": Score(0.875, 0.0125), "GSM8K": 1.0, "ChatCORE": -0.02})
    report.generate()
    assert table_rows() == {
        "Metric": ["BASE", "MID", "SFT", "RL"],
        "---": ["---:"] * 4,
        "val_bpb": ["1.2500", "-", "-", "-"],
        "CORE (21 of 22)": ["0.2219 ± 0.0031", "-", "-", "-"],
        "ChatCORE": ["-", "-", "-", "-0.0200"],
        "both": ["50.0 %", "-", "-", "87.5 % ± 1.2"],
        "GSM8K": ["-", "-", "-", "100.0 %"],
    }
    assert list(table_rows())[2:] == ["val_bpb", "CORE (21 of 22)", "ChatCORE", "both", "GSM8K"]
    own = table_rows("The title of base_eval")
    assert own["copa"] == ["60.0 % ± 4.9"] and own["CORE (21 of 22)"] == ["0.2219 ± 0.0031"]


STANDINGS = {
    ("base_eval", "CORE", 0.2): "CORE 0.200 is above GPT-2 355M (0.1849) and below GPT-2 774M (0.2146)",
    ("base_eval", "CORE", 0.05): "CORE 0.050 is below GPT-2 124M (0.1139)",
    ("base_eval", "CORE", 0.3): "CORE 0.300 is above karpathy's d24 at ratio 8 (0.2626)",
    ("base_eval", "CORE", 0.2565): "CORE 0.257 is above GPT-2 XL (0.2565) and below karpathy's d24",
    ("chat_eval_sft", "ChatCORE", 0.33): "ChatCORE 0.330 is above karpathy's SFT without a loss mask",
    ("chat_eval_sft", "ChatCORE", 0.1): "ChatCORE 0.100 is below karpathy's SFT without a loss mask",
}  # fmt: skip


def test_a_score_has_its_place_among_known_models() -> None:
    for (stage, name, value), line in STANDINGS.items():
        section(stage, {name: Score(value, 0.01)})
        report.generate()
        (said,) = re.findall(rf"^{name} .*$", Path("report.md").read_text(), re.M)
        assert said.startswith(line)
    # The latest stage that has it counts; what is a part of it, or no number, has no place.
    section("chat_eval_rl", {"ChatCORE": 0.4})
    section("base_eval", {"CORE (21 of 22)": 0.2})
    report.generate()
    assert "\nChatCORE 0.400 is above karpathy's SFT (0.355).\n" in Path("report.md").read_text()
    assert "\nCORE " not in Path("report.md").read_text()
    section("base_eval", {"CORE": float("nan")})
    report.generate()
    assert "\nCORE " not in Path("report.md").read_text()


def test_report_json_holds_what_the_sections_hold() -> None:
    report.reset()
    section("base_train", {"val_bpb": 2.5}, samples=["a\nb"], seconds=3.5)
    section("chat_eval_sft", {"quiz": Score(0.875, 0.0125)})
    report.generate()
    found = json.loads((report_dir() / "report.json").read_text())
    assert list(found) == ["started", "total_seconds", "machine", "code", "sections", "summary"]
    assert list(found["sections"]) == ["base_train", "chat_eval_sft"]
    for stage, written in found["sections"].items():
        assert written == json.loads((report_dir() / f"{stage}.json").read_text())
    assert found["summary"] == {
        "BASE": {"val_bpb": 2.5},
        "MID": {"val_bpb": None},
        "SFT": {"val_bpb": None, "quiz": {"value": 0.875, "stderr": 0.0125}},
        "RL": {"val_bpb": None},
    }
    last = found["sections"]["chat_eval_sft"]["time"]
    assert found["total_seconds"] == last - found["started"] >= 0


def test_results_are_listed_and_what_is_not_a_number_is_missing() -> None:
    section("base_train", {"loss": float("nan"), "val_bpb": float("inf"), "note": None})
    section("chat_rl", {"accuracy": Score(0.5, 0.0441)})
    report.generate()
    text = Path("report.md").read_text()
    assert "- loss: -\n" in text and "- note: -\n" in text and table_rows()["val_bpb"][0] == "-"
    assert "- accuracy: 0.5000 ± 0.0441\n" in text
    strict = json.loads((report_dir() / "report.json").read_text(), parse_constant=pytest.fail)
    assert strict["sections"]["base_train"]["results"]["loss"] is None


def test_code_size_counts_tracked_code_without_tests_and_vendored_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "a.py": "x = 1\n" * 4, "src/b.rs": "fn b() {}\n", "tests/test_a.py": "y\n" * 99,
        "src/vendor/theirs.js": "v\n" * 99, "notes.md": "n\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.code_size(tmp_path) == {}  # outside of git nobody knows
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", *files], check=True)
    (tmp_path / "untracked.py").write_text("z\n")
    size = {"files": 2, "lines": 5, "characters": 34}
    assert report.code_size(tmp_path) == size


def test_values_print_short() -> None:
    printed = {
        None: "-", "": "-", 0.0: "0.0000", 0.85: "0.8500", 3e-5: "3e-05", 1.5e15: "1.5e+15",
        15784.98: "15,785", -20000.4: "-20,000", 32768: "32,768", True: "True", "auto": "auto",
    }  # fmt: skip
    assert {value: format_value(value) for value in printed} == printed


# The page: html.parser reads it back.

HOSTILE = (
    "</pre><script>alert(1)</script><img src=\"https://x.test/a.png\" onerror='f()'>&lt;&amp; <!--"
)
VOID = {"meta", "br", "hr", "img", "link", "input"}
SVG_NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


class Page(HTMLParser):
    """A page read back: its elements, its texts by tag, and the rows of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in {tag}"
        self.elements.append((tag, dict(attrs)))
        self.texts.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def attributes(self, *names: str) -> list[str]:
        found = [found.get(name) for _, found in self.elements for name in names if name in found]
        return [value or "" for value in found]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of a run: hostile texts, and metrics of two trainings."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        patch.delenv("RANK", raising=False)
        patch.chdir(folder)
        report.reset()
        for stage, run, records in (
            ("base_train", "base/d2", training(5)),
            ("chat_rl", "rl/d2", reinforcement(5)),
        ):
            (base_dir() / run).mkdir(parents=True)
            lines = [json.dumps(record) + "\n" for record in records]
            (base_dir() / run / "metrics.jsonl").write_text("".join(lines))
            results = {"folder": run, HOSTILE: HOSTILE, "loss": 1.0}
            report.write_section(stage, stage, {"data": HOSTILE}, results, [HOSTILE, "plain"])
        scores = {"quiz": Score(0.875, 0.0125), HOSTILE: 0.5, "skipped": HOSTILE}
        report.write_section("chat_eval_rl", HOSTILE, {}, scores)
        report.write_section("mid_train", "Without metrics.jsonl", {}, {"folder": "mid/none"})
        report.generate()
    return Page((folder / "report.html").read_text())


def test_the_page_is_well_formed_and_needs_nothing_else(page: Page) -> None:
    assert page.open == [] and len(page.attributes("id")) > 20
    assert not {tag for tag, _ in page.elements} & {
        "script", "link", "img", "image", "iframe", "object", "embed", "base", "form", "video",
        "audio",
    }  # fmt: skip
    metas = [found for tag, found in page.elements if tag == "meta"]
    policy = next(m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    ids = set(page.attributes("id"))
    assert len(ids) == len(page.attributes("id"))
    references = page.attributes("href", "xlink:href", "src", "srcset", "action", "data")
    assert references and {name[1:] for name in references if name[0] == "#"} <= ids
    assert all(name[0] == "#" for name in references)
    urls = [url for _, found in page.elements for url in re.findall(r"url\(([^)]*)\)", str(found))]
    assert urls and {url[1:] for url in urls} <= ids
    style = "".join(page.texts["style"])
    assert "url(" not in style and "@import" not in style and "//" not in style
    for tag, found in page.elements:
        assert not [name for name in found if name.startswith("on")]
        if tag != "meta":
            outside = [value for value in found.values() if value and "//" in value]
            assert set(outside) <= SVG_NAMESPACES | {HOSTILE}


def test_hostile_text_reads_as_it_was_written_and_contents_lead_to_the_chapters(page: Page) -> None:
    assert [text.rstrip("\n") for text in page.texts["pre"]] == [HOSTILE, "plain"] * 2
    items = [text for text in page.texts["li"] if HOSTILE in text]
    assert items.count(f"data: {HOSTILE}") == 2 and items.count(f"{HOSTILE}: {HOSTILE}") == 2
    assert page.texts["td"].count(HOSTILE) == 4 and HOSTILE in page.texts["h2"]
    anchors = [name[1:] for name in page.attributes("href")]
    chapters = ["summary", "start", "base_train", "mid_train", "chat_rl", "chat_eval_rl"]
    assert anchors[: len(chapters)] == chapters
    assert [found["id"] for tag, found in page.elements if tag == "h2"] == chapters
    assert page.texts["h1"] == ["nanochat report"]
    assert page.texts["li"][: len(chapters)] == page.texts["h2"]


def test_tables_and_charts_show_the_numbers_that_are_there(page: Page) -> None:
    rows = [text.split("\n") for text in page.texts["tr"] if "quiz" in text]
    cells = [[cell for cell in row if cell] for row in rows]
    assert cells == [["quiz", "-", "-", "-", "87.5 % ± 1.2"], ["quiz", "87.5 % ± 1.2"]]
    charts = [found for tag, found in page.elements if tag == "svg"]
    assert all(chart["role"] == "img" for chart in charts)
    assert [chart["aria-label"] for chart in charts[1:]] == [  # after the logo
        "Loss over tokens, from 5.0000 to 1.0000",
        "Loss over time, from 5.0000 to 1.0000",
        "Validation bits per byte over tokens, from 3.5000 to 3.5000",
        "Validation bits per byte over time, from 3.5000 to 3.5000",
        "Learning rate multiplier over steps, from 1.0000 to 0.2000",
        "Reward over steps, from 0.1000 to 0.5000",
        "Held-out accuracy over steps, from 44.0 % to 48.0 %",
    ]
    assert page.texts["figcaption"][0] == "Loss over tokens 1.0000"


def test_style_sheets_have_every_variable_that_is_used() -> None:
    sheets = [path.read_text() for path in (Path(report.__file__).parent / "ui").glob("*.css")]
    plots = (Path(report.__file__).parent / "report.py").read_text()
    used = set(re.findall(r"var\((--[\w-]+)\)", "".join(sheets))) | {
        f"--{name}" for name in re.findall(r'\("(\w+)", [A-Z]+\)', plots)
    }
    assert len(sheets) == 3 and used == set(re.findall(r"(--[\w-]+):", "".join(sheets)))
    figure = draw_run(training(20), "x")["Loss over tokens"]
    assert not re.findall(r"(?:fill|stroke): #", figure)
    drawn = set(re.findall(r"var\(--\w+\)", figure))
    assert drawn == {"var(--quiet)", "var(--line)", "var(--teal)"}


# The charts: the points of the SVG are those of the records.

SVG = "{http://www.w3.org/2000/svg}"


def training(num_steps: int) -> list[dict[str, float]]:
    """Records as a trainer writes them; validated at the first and every tenth step."""
    records = [{"step": 0, "tokens": 0, "seconds": 0.0, "val_bpb": 3.5}]
    for step in range(1, num_steps + 1):
        times = {"step": step, "tokens": 4096 * step, "seconds": 40.0 * step}
        records.append(times | {"loss": 5 / step, "lrm": 1 / step})
        if step % 10 == 0:
            records[-1]["val_bpb"] = 1 + 1 / step
    return records


def reinforcement(num_steps: int) -> list[dict[str, float]]:
    return [
        {"step": step, "tokens": step, "seconds": step, "loss": -0.1, "reward": step / 10}
        | ({"accuracy": 0.4 + step / 50, "accuracy_stderr": 0.04} if step % 2 == 0 else {})
        for step in range(1, num_steps + 1)
    ]


def element(figure: str, name: str) -> ET.Element:
    """The group of the chart whose id ends in `name`."""
    root = ET.fromstring(figure)
    return next(group for group in root.iter(f"{SVG}g") if group.get("id", "").endswith(name))


def curve_points(figure: str) -> np.ndarray:
    """(N, 2) places of the curve's points in the chart's units."""
    path = element(figure, "-curve").find(f"{SVG}path")
    assert path is not None
    return np.array(re.findall(r"[ML] (\S+) (\S+)", path.get("d", "")), float)


def assert_affine(drawn: np.ndarray, true: list[float]) -> None:
    """`drawn` is `true`, moved and scaled, up to the six decimals of the SVG."""
    scale, offset = np.polyfit(true, drawn, 1)
    assert np.allclose(scale * np.array(true) + offset, drawn, atol=1e-4)


def test_every_point_is_where_its_record_says() -> None:
    records = training(60)
    figures = draw_run(records, "base_train")
    assert len(figures) == 5 and ">tokens</text>" in figures["Loss over tokens"]
    for title, over, key in (
        ("Loss over tokens", "tokens", "loss"),
        ("Validation bits per byte over time", "seconds", "val_bpb"),
        ("Learning rate multiplier over steps", "step", "lrm"),
    ):
        points = curve_points(figures[title])
        rows = [record for record in records if key in record]
        assert len(points) == len(rows) == (7 if key == "val_bpb" else 60)
        assert_affine(points[:, 0], [row[over] for row in rows])
        assert_affine(-points[:, 1], [row[key] for row in rows])


def test_a_long_run_is_drawn_as_means_of_stretches() -> None:
    records = training(2 * MAX_POINTS)
    points = curve_points(draw_run(records, "base_train")["Loss over tokens"])
    losses = [record["loss"] for record in records[1:]]
    assert len(points) == MAX_POINTS
    assert_affine(-points[:, 1], [fmean(losses[i : i + 2]) for i in range(0, len(losses), 2)])


def test_reinforcement_shows_rewards_and_accuracy_with_its_error_instead_of_the_loss() -> None:
    figures = draw_run(reinforcement(8), "chat_rl")
    assert figures == draw_run(reinforcement(8), "chat_rl")  # byte for byte
    assert list(figures) == ["Reward over steps", "Held-out accuracy over steps"]
    accuracy = figures["Held-out accuracy over steps"]
    points = curve_points(accuracy)
    bars = [path.get("d", "") for path in element(accuracy, "-errors").iter(f"{SVG}path")]
    ends = np.array([re.findall(r"[ML] (\S+) (\S+)", bar) for bar in bars], float)  # (N, 2, 2)
    assert len(points) == len(ends) == 4
    assert np.allclose(ends.mean(axis=1), points, atol=1e-4)
    # An error of .04 is as long as the way from one point to the next, which is .04 higher.
    assert np.allclose(np.ptp(ends[:, :, 1], axis=1) / 2, points[0, 1] - points[1, 1], atol=1e-4)


def test_charts_show_the_numbers_that_are_there() -> None:
    assert draw_run([], "base_train") == {}
    for seconds, unit in ((40, "seconds"), (60, "minutes"), (4e3, "hours")):
        [figure] = draw_run([{"seconds": seconds, "mfu": 0.5}], "x").values()
        assert [text.text for text in ET.fromstring(figure).iter(f"{SVG}text")].count(unit) == 1
    titles = [f"Validation bits per byte over {what}" for what in ("tokens", "time")]
    assert list(draw_run(training(0), "x")) == titles
    diverged = training(5)
    diverged[-1]["loss"] = math.nan
    figure = draw_run(diverged, "x")["Loss over tokens"]
    assert len(curve_points(figure)) == 4 and "to nan" in figure
