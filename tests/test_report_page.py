"""report.html: one file that needs no other, sound HTML, nothing that a model wrote can act, the numbers of report.md.

The oracle is html.parser, which reads the page back.
"""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nanochat import report
from nanochat.common import base_dir
from nanochat.report import Chapter, html_page, samples, table

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
        return [
            value or ""
            for _, found in self.elements
            for name, value in found.items()
            if name in names
        ]


def write_sections() -> None:
    """A run with hostile texts everywhere and the metrics of two trainings."""
    for stage, kind in (("base_train", "base"), ("chat_rl", "rl")):
        folder = base_dir() / kind / "d2"
        folder.mkdir(parents=True)
        for step in range(1, 6):
            figures = {
                "step": step,
                "tokens": step,
                "seconds": step,
                "loss": 5 / step,
                "lrm": 1 / step,
            }
            if kind == "rl":
                figures |= {"reward": 0.1 * step, "accuracy": 0.5, "accuracy_stderr": 0.1}
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(figures) + "\n")
        results = {"folder": f"{kind}/d2", HOSTILE: HOSTILE, "loss": 1.0}
        report.write_section(stage, stage, {"data": HOSTILE}, results, [HOSTILE, "plain"])
    scores = {"quiz": 0.875, "quiz_stderr": 0.0125, HOSTILE: 0.5, "skipped": HOSTILE}
    report.write_section("chat_eval_rl", HOSTILE, {}, scores)
    report.write_section("mid_train", "Without metrics.jsonl", {}, {"folder": "mid/none"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the report of such a run."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        patch.delenv("RANK", raising=False)
        patch.chdir(folder)
        report.reset()
        write_sections()
        report.generate()
    return folder


@pytest.fixture
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def test_elements_are_closed_and_ids_are_unique(page: Page) -> None:
    assert page.open == []
    ids = page.attributes("id")
    assert len(ids) == len(set(ids)) > 20


def test_the_page_needs_nothing_else(page: Page) -> None:
    assert not {tag for tag, _ in page.elements} & {
        "script", "link", "img", "image", "iframe", "object", "embed", "base", "form", "video", "audio",
    }  # fmt: skip
    ids = set(page.attributes("id"))
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


def test_the_browser_is_told_to_fetch_nothing(page: Page) -> None:
    metas = [found for tag, found in page.elements if tag == "meta"]
    policy = next(m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_hostile_text_reads_as_it_was_written(page: Page) -> None:
    assert page.texts["pre"] == [HOSTILE, "plain"] * 2
    assert page.texts["dd"].count(HOSTILE) == 4 and page.texts["dt"].count(HOSTILE) == 2
    assert HOSTILE in page.texts["th"] and HOSTILE in page.texts["td"]
    assert HOSTILE in page.texts["h2"]


def test_contents_lead_to_the_chapters_summary_first(page: Page) -> None:
    anchors = [name[1:] for name in page.attributes("href")]
    chapters = ["summary", "start", "base_train", "mid_train", "chat_rl", "chat_eval_rl"]
    assert anchors[: len(chapters)] == chapters
    assert [found["id"] for tag, found in page.elements if tag == "h2"] == chapters
    assert page.texts["h1"] == ["nanochat report"] and page.texts["li"] == page.texts["h2"]


def test_tables_hold_the_numbers_of_the_sections_under_scoped_headers(
    page: Page, folder: Path
) -> None:
    assert all(found.get("scope") in ("row", "col") for tag, found in page.elements if tag == "th")
    rows = [text for text in page.texts["tr"] if text.startswith("quiz")]
    assert rows == ["quiz---87.5 % ± 1.2", "quiz87.5 % ± 1.2"]
    markdown = (folder / "report.md").read_text().splitlines()
    assert [line for line in markdown if line.startswith("| quiz")] == [
        "| quiz | 87.5 % ± 1.2 |",
        "| quiz | - | - | - | 87.5 % ± 1.2 |",
    ]


def test_charts_are_named_and_left_out_without_metrics(page: Page) -> None:
    labels = [found["aria-label"] for tag, found in page.elements if tag == "svg"]
    assert labels[1:] == [  # after the logo
        "Loss over tokens, from 5.0000 to 1.0000",
        "Loss over time, from 5.0000 to 1.0000",
        "Learning rate multiplier over steps, from 1.0000 to 0.2000",
        "Reward over steps, from 0.1000 to 0.5000",
        "Held-out accuracy over steps, from 50.0 % to 50.0 %",
        "Learning rate multiplier over steps, from 1.0000 to 0.2000",
    ]
    assert all(found["role"] == "img" for tag, found in page.elements if tag == "svg")
    assert page.texts["figcaption"][0] == "Loss over tokens 1.0000"


def test_style_sheet_has_every_variable_that_is_used() -> None:
    style = (Path(report.__file__).parent / "report.css").read_text()
    plots = (Path(report.__file__).parent / "report.py").read_text()
    light, dark = (set(re.findall(r"(--\w+):", part)) for part in style.split("@media screen"))
    used = set(re.findall(r"var\((--\w+)\)", style)) | {
        f"--{name}" for name in re.findall(r'\("(\w+)", [A-Z]+\)', plots)
    }
    assert used == light and light - dark == {"--mark"}  # amber does for both


def test_a_cell_cannot_leave_its_row_in_markdown() -> None:
    assert table("T", ["a", "b"], [["x|y\n# z", "<!--"]]).markdown == (
        "| a | b |\n| --- | ---: |\n| x\\|y # z | &lt;!-- |\n"
    )


def test_chapters_without_blocks_and_blocks_without_content_are_sound() -> None:
    page = Page(
        html_page([Chapter("a", "A", "", []), Chapter("b", "B", "text", [samples("S", [])])])
    )
    assert page.open == [] and page.texts["h2"] == ["B", "A"]
