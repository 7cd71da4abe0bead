"""A report as Markdown and as HTML: chapters of blocks, each of which is written both ways in one place.

The HTML page is one file that needs no other: style sheet, logo and charts are inside, there is no script, and a
content security policy forbids the browser to fetch anything.

The choice that would surprise: the HTML page begins with the last chapter, the summary; a terminal ends with it.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

TITLE = "nanochat report"
ASSETS = Path(__file__).resolve().parent


class Block(NamedTuple):
    """What stands under one caption."""

    caption: str
    markdown: str
    html: str


class Chapter(NamedTuple):
    """A heading, a sentence, and blocks; `anchor` is its address in the HTML page."""

    anchor: str
    title: str
    text: str
    blocks: Sequence[Block]


def facts(caption: str, values: Mapping[str, Any]) -> Block:
    """Named values of any kind."""
    texts = {name: show(values, name) for name in own_names(values)}
    lines = [f"- {cell(name)}: {cell(text)}\n" for name, text in texts.items()]
    pairs = [f"<div><dt>{escape(n)}</dt><dd>{number(t)}</dd></div>" for n, t in texts.items()]
    return Block(caption, "".join(lines), f"<dl>{''.join(pairs)}</dl>")


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Block:
    """Rows whose first cell names the row; the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [f"| {' | '.join(map(cell, row))} |\n" for row in (header, rule, *rows)]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = ""
    for name, *values in rows:
        cells = "".join(f"<td>{number(text)}</td>" for text in values)
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>\n'
    # The box scrolls, not the page; the keyboard reaches it by its tabindex.
    box = f'<div class="box" role="region" tabindex="0" aria-label="{escape(caption)}">'
    html = f"{box}<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
    return Block(caption, "".join(lines), html)


def charts(caption: str, figures: Mapping[str, str]) -> Block:
    """Figures (title -> HTML) side by side; Markdown, which cannot hold them, says where they are."""
    text = f"{', '.join(figures)}: see report.html.\n"
    return Block(caption, text, f'<div class="charts">{"".join(figures.values())}</div>')


def samples(caption: str, texts: Sequence[str]) -> Block:
    """Texts as a model wrote them; in Markdown behind a fence longer than any run of backticks."""
    fences = ["`" + max(["``", *re.findall("`+", text)], key=len) for text in texts]
    fenced = [f"{fence}text\n{text}\n{fence}\n" for fence, text in zip(fences, texts, strict=True)]
    return Block(caption, "\n".join(fenced), "\n".join(f"<pre>{escape(t)}</pre>" for t in texts))


def markdown_page(chapters: Sequence[Chapter]) -> str:
    """The whole report as Markdown."""
    parts = [f"# {TITLE}\n"]
    for chapter in chapters:
        parts.append(f"## {chapter.title}\n\n{chapter.text}\n")
        parts += [f"{block.caption}:\n\n{block.markdown}" for block in chapter.blocks]
    return "\n".join(parts)


def html_page(chapters: Sequence[Chapter]) -> str:
    """The whole report as one HTML file, the last chapter first."""
    links, parts = "", ""
    for chapter in (chapters[-1], *chapters[:-1]):
        link = f'<a href="#{chapter.anchor}">{escape(chapter.title)}</a>'
        links += f"<li>{link}</li>"
        parts += (
            f'<section>\n<h2 id="{chapter.anchor}">{link}</h2>\n<p>{escape(chapter.text)}</p>\n'
        )
        parts += "".join(f"<h3>{escape(b.caption)}</h3>\n{b.html}\n" for b in chapter.blocks)
        parts += "</section>\n"
    logo = (ASSETS / "ui" / "logo.svg").read_text(encoding="utf-8")
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{TITLE}</title>
<style>
{style}</style>
</head>
<body>
<header>{logo}<h1>{TITLE}</h1></header>
<nav aria-label="Contents"><ul>{links}</ul></nav>
<main>
{parts}</main>
</body>
</html>
"""


def number(text: str) -> str:
    """A value for HTML, its standard error set smaller."""
    return re.sub(" ± (.*)", r" <small>± \1</small>", escape(text))


def cell(text: str) -> str:
    """A value that cannot break out of a Markdown line or table cell, nor begin a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def own_names(values: Mapping[str, Any]) -> list[str]:
    """All names but those of standard errors: `x_stderr` belongs to `x`."""
    return [
        n for n in values if not (n.endswith("_stderr") and n.removesuffix("_stderr") in values)
    ]


def show(values: Mapping[str, Any], name: str, percent: bool = False) -> str:
    """`0.2219 ± 0.0031`, or `85.0 % ± 1.2`; without the standard error where there is none."""
    value, stderr = values.get(name), values.get(f"{name}_stderr")
    if percent and isinstance(value, float):
        return f"{100 * value:.1f} %" + ("" if stderr is None else f" ± {100 * stderr:.1f}")
    return format_value(value) + ("" if stderr is None else f" ± {format_value(stderr)}")


def format_value(value: Any) -> str:
    """A number short enough to compare by eye; anything else as it prints; `-` for what is missing."""
    if value is None or value == "":
        return "-"
    if type(value) is int or (isinstance(value, float) and 1e4 <= abs(value) < 1e9):
        return f"{value:,.0f}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
