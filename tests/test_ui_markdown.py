"""The page's Markdown against markdown-it-py on the subset that both know, and against texts that mean harm.

Every text is rendered by nanochat/ui/markdown.js in a headless browser, under the page's content security
policy, and compared as HTML. That hostile texts take linear time is read from the browser's execution counts
(how often each block of the script ran), not from a clock.
"""

import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chat_page import FakeServer, open_browser

pytestmark = pytest.mark.slow

RENDER = """async (texts) => {
  const { MarkdownView } = await import("/ui/markdown.js");
  return texts.map((text) => {
    const root = document.createElement("div");
    new MarkdownView(root).update(text);
    return root.innerHTML;
  });
}"""
ALLOWED = {
    "p": set(), "h2": set(), "h3": set(), "h4": set(), "h5": set(), "h6": set(), "em": set(), "strong": set(),
    "ul": set(), "ol": {"start"}, "li": set(), "blockquote": set(), "hr": set(), "br": set(), "code": set(),
    "figure": set(), "figcaption": set(), "span": set(), "button": {"type", "class"}, "pre": {"tabindex"},
    "div": {"tabindex"}, "table": set(), "thead": set(), "tbody": set(), "tr": set(), "th": {"class"},
    "td": {"class"}, "a": {"href", "rel", "target"},
}  # fmt: skip
AUDIT = """async ([texts, allowed]) => {
  const { MarkdownView } = await import("/ui/markdown.js");
  const faults = [];
  for (const text of texts) {
    const root = document.createElement("div");
    new MarkdownView(root).update(text);
    for (const element of root.querySelectorAll("*")) {
      const names = element.getAttributeNames();
      const fits = names.every((name) => allowed[element.localName]?.includes(name));
      const safe = element.localName !== "a" || ["http:", "https:", "mailto:"].includes(element.protocol);
      if (!allowed[element.localName] || !fits || !safe) faults.push([text, element.outerHTML]);
    }
  }
  return faults;
}"""

CASES = [
    "plain text",
    "two lines\nof one paragraph",
    "a paragraph\n\nand another",
    "# One\n## Two\n### Three\n#### Four\n##### Five",
    "# closed #\n## also closed ####\n### not closed#",
    "#no heading",
    "####### seven",
    "a *b* c",
    "a **b** c",
    "a ***b*** c",
    "*a **b** c*",
    "**a *b* c**",
    "_a_ and __b__",
    "snake_case_name and 2 * 3 * 4",
    "*a _b* c_",
    "**a*",
    "*a**",
    "***a** b*",
    "a*b*c a_b_c",
    '"*quoted*" and (*set aside*)',
    "**中文**后面 *日本* 語",
    "**😀** *é*",
    r"\*not emphasis\* \# \` \[ \\",
    "`code` and ``a ` b`` and `` ` ``",
    "`*no emphasis*` and `<b>`",
    "`unclosed and *emphasis*",
    "hard  \nbreak and\\\nanother",
    "soft \nbreak",
    "[text](http://example.org)",
    "[**bold** text](https://example.org/a?b=c#d)",
    '[a](http://example.org/x_(y)) [b](<http://example.org/z>) [c](http://example.org "title")',
    "[mail](mailto:someone@example.org) <https://example.org> <mailto:a@example.org>",
    "[not a link] [a](http://example.org [b](c d) ](http://example.org)",
    "[outer [inner](http://in.example) text](http://out.example)",
    "*[a*](http://example.org) **[b](http://example.org)**",
    "<b>html</b> <img src=x onerror=alert(1)> <script>alert(1)</script>",
    "- one\n- two\n- three",
    "* one\n+ another list",
    "- one\n\n- loose\n\n- list",
    "- one\n  - two\n    - three\n  - two\n- one",
    "1. one\n2. two\n3. three",
    "3. from three\n4. on",
    "7) other\n8) sign",
    "1. one\n   - under it\n\n     more\n2. two",
    "- a\n    - four spaces\n        - and eight",
    "- a\n\t- a tab",
    "- a paragraph\n\n  and its second\n- tight again",
    "- a\nlazy",
    "text\n- a list right after",
    "text\n2. no list",
    "- # heading\n- > quote\n- ```\n  code\n  ```",
    "-\n-  \n- c",
    "* * *",
    "---\n***\n___\n- - -",
    "a\n\n---\n\nb",
    "> quote\n> goes on\nlazily",
    "> one\n>\n> two",
    "> > nested\n> outer",
    "> - list\n> - in quote\n\n- list\n\n  > quote in list",
    "> # heading\n> ```\n> code\n> ```",
    "```\ncode\n```",
    "```python\nx = 1\n\ny = [x]  # *no emphasis*\n```",
    "~~~~\n```\n~~~\n~~~~\nafter",
    "```\nunclosed\n  code",
    "   ```\n   indented\n     more\n   ```",
    "`` ```not a fence`` `",
    "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |",
    "| left | middle | right |\n| :-- | :-: | --: |\n| 1 | *2* | `3` |",
    "a | b\n-- | --\n1 | 2\n\nafter",
    "| a | b |\n| --- |\n| not | a table |",
    "| a |\n| --- |\n| one | too many |",
    "| pipe \\| here | b |\n|---|---|\n| `a \\| b` | c |",
    "text before\n| a | b |\n|---|---|\n| 1 | 2 |\n- and a list after",
    "- item\n\n  | a | b |\n  |---|---|\n  | 1 | 2 |",
]

INLINE = (
    "word", "two words", "*", "**", "_", "__", "`", "``", "*it*", "**bo**", "`co`", "[t](http://a.b)", "[", "]",
    "(x", ")", "!", ".", "é", "中", "😀", "\\*", "\\", "<http://a.b>", "<", "&", "#", "-", "1.", " ", " ", "  ",
)  # fmt: skip
STARTS = ("", "", "", "- ", "- ", "* ", "1. ", "2. ", "> ", "> > ", "  ", "# ", "### ", "  - ")
TABLE = "| a | b |\n| :-- | --: |\n| 1 | *2* |"
WHOLE = ("", "", "---", "```py\nx = *1*\n\n- y\n```", "~~~\n~~~", TABLE, "  ", "> ")


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    server = FakeServer()
    try:
        with open_browser() as browser:
            page = browser.new_page()
            page.goto(server.url)
            yield page
    finally:
        server.kill()


def random_document(rng: random.Random) -> str:
    """Lines that mostly make sense: a mark, then words, signs and emphasis."""
    lines = []
    for _ in range(rng.randint(1, 9)):
        if rng.random() < 0.3:
            lines.append(rng.choice(WHOLE))
        else:
            text = "".join(rng.choice(INLINE) for _ in range(rng.randint(1, 7)))
            lines.append(rng.choice(STARTS) + (text.rstrip(" \\") or "x"))
    return "\n".join(lines).rstrip() + "\n"


def expected(text: str) -> str:
    """What markdown-it-py makes of it, without what the page leaves out on purpose."""
    markdown_it = pytest.importorskip("markdown_it", reason="needs markdown-it-py")
    renderer = markdown_it.MarkdownIt("commonmark", {"html": False, "maxNesting": 100}).enable(
        "table"
    )
    off = ["image", "html_inline", "html_block", "entity", "reference", "code", "lheading"]
    html = renderer.disable(off).render(text)
    html = re.sub(r"\n</code></pre>", "</code></pre>", html)
    html = re.sub(r'<code class="[^"]*">', "<code>", html)
    html = re.sub(r'<t([dh]) style="text-align:(\w+)">', r'<t\1 class="\2">', html)
    html = re.sub(r"<t([dh])>", r'<t\1 class="left">', html)
    html = re.sub(r"<(/?)h(\d)>", lambda m: f"<{m[1]}h{min(6, int(m[2]) + 1)}>", html)
    html = re.sub(r'(<a href="[^"]*")(?: title="[^"]*")?>', r"\1>", html)
    html = re.sub(r"<br />\n?", "<br>", html).replace("<hr />", "<hr>").replace("&quot;", '"')
    return tidy(html)


def plain(html: str) -> str:
    """What the page made, without the frames of code and tables and without the attributes of links."""
    html = re.sub(
        r"<figure>.*?(<pre).*?>(.*?)</pre></figure>", r"\1>\2</pre>", html, flags=re.DOTALL
    )
    html = re.sub(r'<div tabindex="0">(<table>.*?</table>)</div>', r"\1", html, flags=re.DOTALL)
    return tidy(html.replace(' rel="noopener noreferrer" target="_blank"', ""))


def tidy(html: str) -> str:
    """Without white space that no browser shows, and without empty cells at the end of a row."""
    html = re.sub(r'(?:<td class="\w+"></td>\s*)+</tr>', "</tr>", html)
    blocks = r"(?:p|h\d|[uo]l|li|blockquote|hr|table|thead|tbody|t[rdh]|pre)"
    pieces = re.split(r"(<pre>.*?</pre>)", html, flags=re.DOTALL)
    for i in range(0, len(pieces), 2):
        spaced = pieces[i].replace("<code>", "<code> ").replace("</code>", " </code>")
        code = re.sub(
            r"<code>.*?</code>", lambda m: " ".join(m[0].split()), spaced, flags=re.DOTALL
        )
        pieces[i] = re.sub(rf"\s*(</?{blocks}(?: [^>]*)?>)\s*", r"\1", code).strip()
    return "".join(pieces)


def test_agrees_with_markdown_it_on_what_people_write(page: Any) -> None:
    for text, html in zip(CASES, page.evaluate(RENDER, CASES), strict=True):
        assert plain(html) == expected(text), text


def test_agrees_with_markdown_it_on_random_documents(page: Any) -> None:
    rng = random.Random(0)
    texts = [random_document(rng) for _ in range(3000)]
    for text, html in zip(texts, page.evaluate(RENDER, texts), strict=True):
        assert plain(html) == expected(text), text


def test_any_string_makes_allowed_elements_only(page: Any) -> None:
    rng = random.Random(1)
    signs = [
        *"*_`[]()<>|#-+~:\\!&\"' \n\t\r\0\u00a0\u2028\u202e\ud83d\ue000",
        "<img src=x onerror=alert(1)>",
    ]
    signs += [
        "<script>",
        "javascript:",
        "[x](javascript:alert(1))",
        "[x](data:text/html,y)",
        "```",
        "1. ",
        "- ",
        "> ",
    ]
    signs += [
        "[x](http://a.b)",
        "|-|-|\n",
        "&lt;",
        "style=",
        "😀",
        "[x](JaVaScRiPt:y)",
        "<javascript:y>",
        "\n\n",
    ]
    texts = ["".join(rng.choice(signs) for _ in range(rng.randint(0, 40))) for _ in range(10_000)]
    assert (
        page.evaluate(AUDIT, [texts, {name: sorted(names) for name, names in ALLOWED.items()}])
        == []
    )


@pytest.mark.parametrize(
    "target",
    [
        "javascript:alert(1)",
        "JAVASCRIPT:x",
        "data:text/html,x",
        "vbscript:x",
        "/etc",
        "//x.y",
        "ftp://x",
        "x",
    ],
)
def test_other_links_stay_text(page: Any, target: str) -> None:
    html = page.evaluate(RENDER, [f"[a]({target}) <{target}> [b](<{target}>)"])[0]
    assert "<a" not in html and html.count(target) == 3


def test_growing_text_ends_as_the_whole_text_does(page: Any) -> None:
    rng = random.Random(2)
    texts = [*CASES, *(random_document(rng) for _ in range(150))]
    script = """async (texts) => {
      const { MarkdownView } = await import("/ui/markdown.js");
      return texts.map((text) => {
        const root = document.createElement("div");
        const view = new MarkdownView(root);
        for (let length = 1; length <= text.length; length++) view.update(text.slice(0, length));
        return root.innerHTML;
      });
    }"""
    assert page.evaluate(script, texts) == page.evaluate(RENDER, texts)


def test_what_is_finished_is_never_touched_again(page: Any) -> None:
    script = """async (texts) => {
      const { MarkdownView } = await import("/ui/markdown.js");
      const root = document.createElement("div");
      const view = new MarkdownView(root);
      view.update(texts[0]);
      const first = [...root.children].slice(0, -1);
      const observer = new MutationObserver(() => {});
      for (const element of first) observer.observe(element, { subtree: true, childList: true, characterData: true });
      for (const text of texts) view.update(text);
      return [first.length, observer.takeRecords().length, first.every((element, i) => root.children[i] === element)];
    }"""
    start = "# Title\n\nText *with* emphasis.\n\n- a\n- b\n\nThe last"
    whole = start + " paragraph grows.\n\n```py\nx = 1\n```\n\n1. and\n2. on"
    grown = [whole[:length] for length in range(len(start), len(whole) + 1)]
    assert page.evaluate(script, grown) == [3, 0, True]


def test_objects_stand_in_the_sentence(page: Any) -> None:
    script = """async () => {
      const { MarkdownView, node } = await import("/ui/markdown.js");
      const root = document.createElement("div");
      new MarkdownView(root, [node("output", ["42"])]).update("**It is \\ue000.** \\ue001");
      return root.innerHTML;
    }"""
    assert page.evaluate(script) == "<p><strong>It is <output>42</output>.</strong> </p>"


HOSTILE = [
    "*a **a ", "[", "[a](", "[a](<", "[a](b(c", "[a](http://b.c)", "` `` ", "`a``b", "> ", "- ", "1. ", "*_", "***a ",
    "_a b_ ", "a**b c* ", "<http:", "\\", "* * ", "| ", "|-", "# ", "#", "\t", "\n", "- a\n", "> a\n", "```\n", "a\n",
    "  - a\n", "|a|b\n|-|-\n", "![[", "*a_ ", "**a*_b__ ", '[a](b "', "[x](http://a.b ", "😀*", "\ud83d", "  \n",
]  # fmt: skip


def test_hostile_text_takes_linear_time(page: Any) -> None:
    """Four times the text runs the blocks of the script at most five times as often.

    Only code compiled while counting is counted block by block, so a page of its own counts from before it loads.
    """
    counted = page.context.browser.new_context().new_page()
    session = counted.context.new_cdp_session(counted)
    session.send("Profiler.enable")
    session.send("Profiler.startPreciseCoverage", {"callCount": True, "detailed": True})
    counted.goto(page.url)

    def num_steps(text: str) -> int:
        session.send("Profiler.takePreciseCoverage")  # sets the counts to zero
        counted.evaluate(RENDER, [text])
        scripts = session.send("Profiler.takePreciseCoverage")["result"]
        ours = [script for script in scripts if script["url"].endswith("markdown.js")]
        return sum(
            part["count"]
            for script in ours
            for run in script["functions"]
            for part in run["ranges"]
        )

    for unit in HOSTILE:
        for end in ("", "x", "*`]|"):
            few, many = (num_steps(unit * (size // len(unit)) + end) for size in (2_000, 8_000))
            assert many < 5 * few + 1000, (unit, end, few, many)
    counted.context.close()
