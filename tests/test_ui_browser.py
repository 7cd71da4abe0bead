"""The chat page in a headless browser, against a server of scripted replies: what a person does and sees.

Every test ends with three checks: no error in the script, no violation of the content security policy, and
no request to anywhere but the loopback address.
"""

import json
import re
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tasks.customjson import CustomJSON
from tests.chat_page import (
    KILL,
    UI,
    FakeServer,
    Steps,
    ending,
    event,
    open_browser,
    piece,
    reply,
)

pytestmark = pytest.mark.slow

TIMEOUT_MS = 20_000  # of one expectation; the machine may be busy
AXE = "axe-core@4.14.1"
RICH = (
    "# Title\n\nText with **emphasis**, `code`, [a link](https://example.org) and\na second line.\n\n"
    "1. one\n   - nested\n2. two\n\n> quote\n\n"
    "```python\nprint('a very long line of code, so long that a phone cannot show it', 1, 2, 3, 4, 5, 6, 7)\n```\n\n"
    "| a long column title | another long column title | and a third |\n| --- | :-: | --: |\n| 1 | 2 | 3 |\n\n---\n\n"
    + "unbroken"
    * 30
)


class Chat:
    """One page and its server, with the steps that most tests share."""

    def __init__(self, browser: Any, server: FakeServer, **options: Any) -> None:
        self.context = browser.new_context(
            **({"viewport": {"width": 1200, "height": 800}} | options)
        )
        self.context.set_default_timeout(TIMEOUT_MS)
        self.server = server
        self.urls: list[str] = []
        self.faults: list[str] = []
        self.context.on("request", lambda request: self.urls.append(request.url))
        self.context.on("weberror", lambda fault: self.faults.append(str(fault.error)))
        self.context.on(
            "console", lambda line: self.faults.append(line.text) if "Policy" in line.text else None
        )
        self.page = self.context.new_page()
        self.page.goto(server.url)

    def see(
        self, selector: str, text: str | re.Pattern[str] | None = None, count: int | None = None
    ) -> Any:
        """Wait until `selector` shows the text, or occurs so often; its locator."""
        from playwright.sync_api import expect

        found = self.page.locator(selector)
        if count is not None:
            expect(found).to_have_count(count, timeout=TIMEOUT_MS)
        elif text is None:
            expect(found).to_be_visible(timeout=TIMEOUT_MS)
        else:
            expect(found).to_have_text(text, timeout=TIMEOUT_MS)
        return found

    def ask(self, question: str, steps: Steps | int) -> None:
        self.server.replies.append(steps)
        self.page.fill("#input", question)
        self.page.keyboard.press("Enter")

    def chat(self, question: str, answer: str) -> None:
        """Ask, and wait for the whole answer."""
        self.ask(question, reply(answer))
        self.see(".question:nth-last-child(2) .said", question)
        self.see(".reply:last-child .state", re.compile("tok/s"))

    def click(self, name: str) -> None:
        """Click the one visible button of this name."""
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").last.click()

    def close(self) -> None:
        self.context.close()
        assert self.faults == []
        assert {urlsplit(url).hostname for url in self.urls if not url.startswith("blob:")} == {
            "127.0.0.1"
        }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.kill()


@pytest.fixture
def chat(browser: Any, server: FakeServer) -> Iterator[Chat]:
    chat = Chat(browser, server, permissions=["clipboard-read", "clipboard-write"])
    yield chat
    chat.close()


@pytest.fixture(scope="module")
def axe(pytestconfig: pytest.Config) -> str:
    """The source of axe-core, which npm fetches once; skips the test where it cannot."""
    folder = pytestconfig.cache.mkdir("axe")  # pyright: ignore[reportOptionalMemberAccess]
    archive = folder / (AXE.replace("@", "-") + ".tgz")
    if not archive.exists():
        npm = shutil.which("npm") or pytest.skip("needs npm, for axe-core")
        done = subprocess.run(
            [npm, "pack", AXE], cwd=folder, capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            pytest.skip(f"npm could not fetch {AXE}: {done.stderr.strip().splitlines()[-1]}")
    with tarfile.open(archive) as files:
        member = files.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


def parts(conversation: dict[str, Any]) -> list[str]:
    """The texts of a stored conversation."""
    contents = [message["content"] for message in conversation["messages"]]
    return [
        text if isinstance(text, str) else "".join(part["text"] for part in text)
        for text in contents
    ]


def stored(chat: Chat) -> list[dict[str, Any]]:
    keys = "Object.entries(localStorage).filter(([key]) => key.includes('conversation')).map(([, value]) => value)"
    return [json.loads(value) for value in chat.page.evaluate(keys)]


def test_a_reply_streams_and_tells_what_it_cost(chat: Chat) -> None:
    gate = threading.Event()
    chat.ask(
        "Hello",
        [
            piece(role="assistant", content=""),
            piece(content="First **ha"),
            gate,
            piece(content="lf**."),
            *ending(),
        ],
    )
    chat.see(".reply.live .said", "First **ha")
    chat.see("#send", "Stop")
    gate.set()
    chat.see(".reply .said", "First half.")
    chat.see(".reply strong", "half")
    chat.see(".reply .state", "42 tok/s · first token 0.05 s · context 64")
    chat.see("#context", "context 64 of 1,024")
    chat.see("#send", "Send")
    asked = chat.server.asked[0]
    assert asked["messages"] == [{"role": "user", "content": "Hello"}]
    assert (asked["model"], asked["stream"], asked["stream_options"]) == (
        "toy",
        True,
        {"include_usage": True},
    )
    chat.chat("And then?", "Then more.")
    history = [message["content"] for message in chat.server.asked[1]["messages"]]
    assert history == ["Hello", [{"type": "text", "text": "First **half**."}], "And then?"]


def test_characters_and_events_may_be_cut_anywhere(browser: Any, server: FakeServer) -> None:
    """The page's fetch hands out one byte at a time, and lines end in both ways."""
    chat = Chat(browser, server)
    chat.context.add_init_script("""const whole = fetch;
      window.fetch = async (...request) => {
        const response = await whole(...request);
        if (!response.body || !response.headers.get("Content-Type").includes("event-stream")) return response;
        const cut = new TransformStream({ transform(chunk, out) { for (const byte of chunk) out.enqueue(Uint8Array.of(byte)); } });
        return new Response(response.body.pipeThrough(cut), response);
      };""")
    chat.page.reload()
    text = "naïve 中文 😀 👩‍👩‍👧 שלום."
    chat.ask(
        "Say it",
        [
            step.replace(b"\n", b"\r\n") if isinstance(step, bytes) else step
            for step in reply(*text)
        ],
    )
    chat.see(".reply .state", re.compile("tok/s"))
    chat.see(".reply .said", text)
    chat.close()


@pytest.mark.parametrize("way", ["Escape", "Stop"])
def test_stop_keeps_what_was_said(chat: Chat, way: str) -> None:
    chat.ask("Count", [piece(content="one, two"), threading.Event()])
    chat.see(".reply .said", "one, two")
    chat.page.keyboard.press("Escape") if way == "Escape" else chat.click("Stop")
    chat.see(".reply .state", re.compile("^stopped · first token"))
    chat.see(".reply .said", "one, two")
    assert chat.server.left.wait(20), "the server was not told"
    chat.chat("Go on", "three")
    assert [message["content"] for message in chat.server.asked[1]["messages"]] == [
        "Count",
        [{"type": "text", "text": "one, two"}],
        "Go on",
    ]


def test_regenerate_and_edit(chat: Chat) -> None:
    chat.chat("First", "one")
    chat.server.replies.append(reply("another one"))
    chat.click("Regenerate")
    chat.see(".reply .said", "another one")
    assert chat.server.asked[1]["messages"] == chat.server.asked[0]["messages"]
    chat.chat("Second", "two")
    chat.page.hover(".question >> nth=0")
    chat.page.locator(".question").first.get_by_role("button", name="Edit").click()
    chat.page.keyboard.press("Control+A")
    chat.page.keyboard.type("Changed")
    chat.server.replies.append(reply("three"))
    chat.page.keyboard.press("Enter")
    chat.see(".reply .said", "three")
    chat.see(".question .said", "Changed")
    chat.click("Undo")
    chat.see(".reply:last-child .said", "two")
    assert parts(stored(chat)[0]) == ["First", "another one", "Second", "two"]
    chat.page.hover(".question >> nth=1")
    chat.page.locator(".question").last.get_by_role("button", name="Edit").click()
    chat.page.keyboard.press("Escape")
    chat.see(".question:nth-last-child(2) .said", "Second")


def test_copy_message_and_code(chat: Chat) -> None:
    chat.chat("Code", "Here:\n\n```py\nx = 1\n\ty = 2\n```\n\nDone.")
    chat.page.click(".copy-code")
    chat.see(".copy-code", "Copied")
    assert chat.page.evaluate("navigator.clipboard.readText()") == "x = 1\n\ty = 2"
    chat.page.locator(".reply > .actions button").first.click()
    chat.see(".reply > .actions button:first-child", "Copied")
    assert chat.page.evaluate("navigator.clipboard.readText()").startswith("Here:\n\n```py")
    chat.page.evaluate(
        "Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })"
    )
    chat.page.hover(".question")
    chat.page.locator(
        ".question .actions button", has_text="Copy"
    ).click()  # as on a page without https
    chat.page.evaluate("delete navigator.clipboard")
    assert chat.page.evaluate("navigator.clipboard.readText()") == "Code"


def test_conversations_are_kept_renamed_and_deleted(chat: Chat) -> None:
    chat.chat("Alpha", "a")
    chat.click("New conversation")
    chat.see("#welcome")
    chat.chat("Beta", "b")
    chat.see("#list a", count=2)
    chat.click("Rename “Beta”")
    chat.page.keyboard.type("Gamma")
    chat.page.keyboard.press("Enter")
    chat.see("#title", "Gamma")
    chat.page.reload()
    chat.see("#title", "Gamma")
    chat.see(".reply .said", "b")
    chat.see(".reply .state", re.compile("tok/s"))
    chat.page.click("#list a:has-text('Alpha')")
    chat.see(".reply .said", "a")
    chat.page.go_back()
    chat.see(".reply .said", "b")
    chat.click("Delete “Gamma”")
    chat.see("#list a", "Alpha")
    chat.see("#welcome")
    chat.click("Undo")
    chat.see(".reply .said", "b")
    assert sorted(conversation["title"] for conversation in stored(chat)) == ["Alpha", "Gamma"]


def test_reload_in_the_middle_of_a_reply_keeps_what_came(chat: Chat) -> None:
    chat.ask("Hi", [piece(content="partly"), threading.Event()])
    chat.see(".reply .said", "partly")
    chat.page.reload()
    chat.see(".reply .said", "partly")
    chat.see("#send", "Send")


def test_a_reply_goes_on_while_another_conversation_is_in_view(chat: Chat) -> None:
    gate = threading.Event()
    chat.ask("Slow", [piece(content="begun"), gate, piece(content=" and ended"), *ending()])
    chat.see(".reply .said", "begun")
    chat.page.keyboard.press("Control+Shift+O")
    chat.chat("Quick", "quick")
    gate.set()
    chat.see(".reply .said", "quick")
    chat.page.click("#list a:has-text('Slow')")
    chat.see(".reply .said", "begun and ended")


def test_export_and_import(browser: Any, server: FakeServer, chat: Chat, tmp_path: Path) -> None:
    tool = piece(tool={"expression": "6 * 7", "result": "42"})
    chat.ask("Six times seven?", [piece(content="It is "), tool, piece(content="42."), *ending()])
    chat.see(".reply .state", re.compile("tok/s"))
    chat.page.keyboard.press("Control+Shift+O")
    chat.chat("Bye", "Bye.")
    with chat.page.expect_download() as download:
        chat.click("Export")
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert re.fullmatch(r"nanochat-\d{4}-\d\d-\d\d\.jsonl", file.name)
    task = CustomJSON(file)  # nanochat can train on it as it is
    assert task.num_examples() == 2
    assert [part["type"] for part in task.get_example(1)["messages"][1]["content"]] == [
        "text",
        "python",
        "python_output",
        "text",
    ]

    other = Chat(browser, server)
    for expected in ("2 new conversations.", "0 new conversations."):
        other.page.set_input_files("#file", file)
        other.see("#toast", expected)
    assert sorted(map(parts, stored(other))) == sorted(map(parts, stored(chat)))
    other.page.click("#list a:has-text('Six')")
    other.see(".tool", "6 * 7 = 42")
    for bad in (
        '{"title": "x", "messages": [{"role": "user", "content": 5}]}',
        "no json",
        '{"messages": []}',
        "null",
    ):
        (tmp_path / "bad.json").write_text('[{"role": "user", "content": "good"}]\n' + bad)
        other.page.set_input_files("#file", tmp_path / "bad.json")
        other.see("#toast", re.compile("^bad.json was not imported"))
    other.see("#list a", count=2)
    other.close()


def test_settings_are_sent_and_kept(chat: Chat) -> None:
    entered = {"temperature": "0.7", "top_k": "40", "top_p": "0.9", "max_tokens": "99", "seed": "0"}
    chat.chat("Before", "b")
    assert not set(entered) & set(chat.server.asked[0]), "what is not set is up to the server"
    chat.click("Settings")
    for name, value in (entered | {"system": "Be brief.", "key": "secret"}).items():
        chat.page.fill(f"[name={name}]", value)
    chat.click("Done")
    chat.page.reload()
    chat.chat("After", "a")
    asked = chat.server.asked[1]
    assert {name: asked[name] for name in entered} == {
        name: float(value) for name, value in entered.items()
    }
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert asked["authorization"] == "Bearer secret"
    chat.click("Settings")
    chat.page.fill("[name=temperature]", "3")  # more than the model's maximum
    chat.page.keyboard.press("Escape")
    chat.page.reload()
    chat.click("Settings")
    assert chat.page.input_value("[name=temperature]") == "0.7"
    chat.click("Clear all")
    chat.click("Done")
    chat.chat("Cleared", "c")
    assert (
        not set(entered) & set(chat.server.asked[2])
        and chat.server.asked[2]["authorization"] is None
    )


def test_errors_are_told_and_retried(chat: Chat) -> None:
    chat.ask("Hello", 429)
    chat.see(".problem:not([hidden]) p", "a fault of number 429 · try again in 2 s")
    chat.server.replies.append(
        [piece(content="Half"), event({"error": {"message": "the engine failed"}})]
    )
    chat.click("Retry")
    chat.see(".problem:not([hidden]) p", "the engine failed")
    chat.see(".reply .said", "Half")
    chat.server.replies.append(reply("Whole"))
    chat.click("Retry")
    chat.see(".reply .said", "Whole")
    assert not chat.page.is_visible(".problem")
    assert [len(asked["messages"]) for asked in chat.server.asked] == [1, 1, 1]
    chat.ask("And", 401)
    chat.see(".problem:not([hidden]) p", "a fault of number 401 · enter the key in the settings")


def test_server_killed_in_the_middle_of_a_reply(chat: Chat) -> None:
    gate = threading.Event()
    chat.ask("Hello", [piece(content="Half of"), gate, KILL])
    chat.see(".reply .said", "Half of")
    chat.server.kill()
    gate.set()
    chat.see(".problem:not([hidden]) p", "the connection broke off before the answer was complete")
    chat.see(".reply .said", "Half of")
    chat.click("Retry")
    chat.see(".problem:not([hidden]) p", "the server does not answer; is it running?")
    chat.server.start()
    chat.server.replies.append(reply("The whole"))
    chat.click("Retry")
    chat.see(".reply .said", "The whole")


def test_place_in_the_queue(chat: Chat) -> None:
    gates = [threading.Event(), threading.Event()]
    chat.ask(
        "Hello",
        [b": queued 3\n\n", gates[0], b": ping\n\n", piece(content="Now"), gates[1], *ending()],
    )
    chat.see(".reply .state", "queued: 3")
    gates[0].set()
    chat.see(".reply .said", "Now")
    chat.see(".reply .state", "")
    gates[1].set()
    chat.see(".reply .state", re.compile("tok/s"))


def test_tool_call_is_a_card_in_the_sentence(chat: Chat) -> None:
    call = piece(tool={"expression": "'<b>'.count('b')", "result": "1"})
    failed = piece(tool={"expression": "1 / 0", "result": None})
    steps = [piece(content="**There is"), call, piece(content=" 1.**"), failed, *ending("length")]
    chat.ask("Count", steps)
    chat.see(".reply .said", "There is'<b>'.count('b') = 1 1.1 / 0")
    chat.see(".reply strong > .tool output", "1")
    chat.see(".reply .state", re.compile("^ended by the limit on tokens · 42 tok/s"))
    assert chat.page.get_by_role("group", name="Calculator").count() == 2
    chat.chat("And then?", "Nothing.")  # the model is to see what it asked the tool
    parts = chat.server.asked[1]["messages"][1]["content"]
    assert [part["type"] for part in parts] == ["text", "python", "python_output", "text", "python"]


def test_scrolling_yields_to_the_reader(chat: Chat) -> None:
    gates = [threading.Event() for _ in range(3)]
    lines = [piece(content=f"line {i}\n\n") for i in range(60)]
    chat.ask("Go", [*lines, gates[0], *lines, gates[1], piece(content="end"), gates[2], *ending()])
    chat.see(".said p", count=60)
    gap = "(() => { const s = document.querySelector('#scroller'); return s.scrollHeight - s.scrollTop - s.clientHeight; })()"
    top = "document.querySelector('#scroller').scrollTop"
    assert chat.page.evaluate(gap) < 2
    chat.page.mouse.move(600, 400)
    chat.page.mouse.wheel(0, -500)
    chat.see("#latest")
    before = chat.page.evaluate(top)
    gates[0].set()
    chat.see(".said p", count=120)
    assert chat.page.evaluate(top) == before, "the view moved away from the reader"
    chat.page.click("#latest")
    assert chat.page.evaluate(gap) < 2
    gates[1].set()
    chat.see(".said p", count=121)
    assert chat.page.evaluate(gap) < 2
    gates[2].set()
    chat.see("#send", "Send")


def test_theme_follows_the_system_until_chosen(browser: Any, server: FakeServer) -> None:
    chat = Chat(browser, server, color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = chat.page.evaluate(paper)
    chat.page.emulate_media(color_scheme="light")
    light = chat.page.evaluate(paper)
    assert light != dark
    for theme, colour in (("light", light), ("dark", dark)):
        chat.page.select_option("#theme", theme)
        assert chat.page.evaluate(paper) == colour
    chat.page.reload()
    chat.see("#welcome")
    assert chat.page.input_value("#theme") == "dark"
    assert chat.page.evaluate(paper) == dark
    chat.close()


def test_phone(browser: Any, server: FakeServer) -> None:
    size = {"width": 360, "height": 640}
    chat = Chat(browser, server, viewport=size, has_touch=True, is_mobile=True)
    chat.page.fill("#input", "Wide" * 40)
    chat.page.locator("#input").press("Enter")
    chat.page.keyboard.type("second line")
    assert chat.page.input_value("#input").endswith("\nsecond line"), (
        "on a touch screen Enter is a new line"
    )
    server.replies.append(
        [piece(content=RICH), piece(tool={"expression": "9" * 90, "result": "9" * 90}), *ending()]
    )
    chat.page.tap("#send")
    chat.see(".reply .state", re.compile("tok/s"))
    wide = "[...document.querySelectorAll('*')].filter((e) => getComputedStyle(e).overflowX === 'visible' && e.getBoundingClientRect().right > 360 && !e.closest('pre, [tabindex=\"0\"], .unseen, #side')).map((e) => e.outerHTML)"
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 360
    assert chat.page.evaluate("document.querySelector('#scroller').scrollWidth") <= 360
    assert chat.page.evaluate(wide) == []
    chat.page.tap("text=Menu")
    chat.see("#list a")
    assert (
        chat.page.evaluate("document.querySelector('#side').getBoundingClientRect().right") <= 360
    )
    chat.page.tap("#new")
    chat.see("#welcome")
    assert not chat.page.is_visible("#list")
    chat.close()


def test_typing(chat: Chat) -> None:
    keys = chat.page.keyboard
    chat.page.evaluate("document.activeElement.blur()")
    keys.press("/")
    keys.type("line 1")
    keys.press("Shift+Enter")
    keys.type("line/2")
    composing = "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true })"
    chat.page.evaluate(f"document.activeElement.dispatchEvent({composing})")
    assert chat.server.asked == [], "Enter inside an input method chooses a word"
    chat.server.replies.append(reply("answer"))
    keys.press("Enter")
    chat.see(".reply .state", re.compile("tok/s"))
    assert chat.server.asked[0]["messages"][0]["content"] == "line 1\nline/2"
    keys.press("Control+Shift+O")
    chat.see("#welcome")
    assert chat.page.evaluate("document.activeElement.id") == "input"


def test_keyboard_alone(chat: Chat) -> None:
    keys = chat.page.keyboard

    def tab_to(name: str) -> None:
        for _ in range(40):
            keys.press("Shift+Tab")
            text = "document.activeElement.ariaLabel || document.activeElement.textContent"
            if chat.page.evaluate(text) == name:
                ring = "getComputedStyle(document.activeElement).outlineStyle"
                assert chat.page.evaluate(ring) == "solid", "no focus ring"
                return
        pytest.fail(f"{name} cannot be reached")

    chat.chat("first", "answer")
    tab_to("Edit")
    chat.server.replies.append(reply("second"))
    keys.press("Enter")
    keys.press("Control+A")
    keys.type("again")
    keys.press("Tab")
    keys.press("Enter")
    chat.see(".reply .said", "second")
    tab_to("Rename “first”")
    keys.press("Enter")
    keys.type("by keys")
    keys.press("Enter")
    chat.see("#title", "by keys")
    tab_to("Delete “by keys”")
    keys.press("Enter")
    chat.see("#list a", count=0)
    tab_to("Undo")
    keys.press("Enter")
    chat.see("#title", "by keys")
    tab_to("Settings")
    keys.press("Enter")
    chat.see("#settings")
    keys.press("Escape")
    assert not chat.page.is_visible("#settings")


def test_only_the_finished_reply_is_announced(chat: Chat) -> None:
    chat.page.evaluate("""() => {
      window.heard = [];
      const region = document.querySelector("#announcer");
      new MutationObserver(() => heard.push(region.textContent)).observe(region, { childList: true });
    }""")
    gate = threading.Event()
    chat.ask("Hello", [piece(content="one"), gate, piece(content=" two"), *ending()])
    chat.see(".reply .said", "one")
    assert chat.page.evaluate("heard") == []
    log = chat.page.get_by_role("log")
    assert log.get_attribute("aria-live") == "off" and log.get_attribute("aria-label")
    gate.set()
    chat.see("#announcer", "nanochat: one two")
    assert chat.page.evaluate("heard") == ["nanochat: one two"]


def test_markup_is_shown_as_text(chat: Chat) -> None:
    bad = "<img src=x onerror=alert(1)><script>alert(2)</script>[x](javascript:alert(3))"
    chat.context.on("dialog", lambda dialog: chat.faults.append("a script ran"))
    chat.chat(bad, f"{bad}\n\n```\n{bad}\n```\n\n| {bad} |\n|---|\n")
    chat.see(".reply code", bad)
    assert chat.page.locator("#log img, #log script, #log a").count() == 0
    chat.page.reload()
    chat.see(".question .said", bad)
    chat.see("#title", re.compile("^<img src=x"))


def test_full_storage_is_told(chat: Chat) -> None:
    chat.page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; }"
    )
    chat.chat("Hello", "Hi")
    chat.see("#toast", re.compile("storage is full"))


def test_report_card_is_linked_when_there_is_one(chat: Chat) -> None:
    assert not chat.page.is_visible("#report")
    chat.server.has_report = True
    chat.page.reload()
    assert chat.see("#report", "Report card").get_attribute("href") == "report"


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 360), ("dark", 360)]
)
def test_axe_finds_no_violation(
    browser: Any, server: FakeServer, axe: str, scheme: str, width: int
) -> None:
    server.has_report = True
    chat = Chat(
        browser,
        server,
        color_scheme=scheme,
        viewport={"width": width, "height": 800},
        reduced_motion="reduce",
    )

    def audit() -> list[str]:
        found = chat.page.evaluate("axe.run()")
        assert "color-contrast" in {rule["id"] for rule in found["passes"]}
        return [
            f"{rule['id']}: {node['html']}"
            for rule in found["violations"]
            for node in rule["nodes"]
        ]

    chat.page.evaluate(axe)
    assert audit() == []
    tool = piece(tool={"expression": "1 + 1", "result": "2"})
    chat.ask("Everything", [piece(content=RICH), tool, *ending()])
    chat.see(".reply .state", re.compile("tok/s"))
    chat.ask("More", [piece(content="broken"), event({"error": {"message": "it failed"}})])
    chat.see(".problem:not([hidden]) p", "it failed")
    chat.page.locator(".question").first.get_by_role("button", name="Edit").focus()
    chat.page.keyboard.press("Enter")
    assert audit() == []
    if width < 500:
        chat.click("Menu")
    chat.click("Delete “Everything”")
    assert audit() == []
    if width < 500:
        chat.click("Menu")
    chat.click("Settings")
    assert audit() == []
    chat.close()


def test_sources_keep_to_the_policy() -> None:
    """No way for text to become markup, no address outside, no style or script inside the page."""
    scripts = "\n".join(file.read_text(encoding="utf-8") for file in UI.glob("*.js"))
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser",
        scripts,
    )
    page = (UI / "index.html").read_text(encoding="utf-8")
    assert not re.search(
        r"<style|\sstyle=|\son\w+=|https?:|<script(?! type=\"module\" src=\"ui/)", page
    )
    assert not re.search(r"https?:|@import|url\(", (UI / "style.css").read_text(encoding="utf-8"))
