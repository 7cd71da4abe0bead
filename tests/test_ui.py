"""The chat page in a headless browser, against a server of scripted replies.

Every test ends with three checks: no error in the script, no violation of the content security
policy, and no request to anywhere but the loopback address.
"""

import json
import os
import random
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import pytest

from nanochat.engine import Engine
from nanochat.jobs import ServedModel
from tasks.customjson import CustomJSON
from tests.chat_page import (
    KILL,
    UI,
    Answer,
    FakeServer,
    card,
    ending,
    event,
    piece,
    reply,
    text_piece,
    token,
)
from tests.models import TOKENIZER, random_gpt
from tests.serving import EchoEngine, serving, serving_models

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
TIMEOUT_MS = 20_000  # of one expectation; the machine may be busy
DONE = re.compile("tok/s")
PROBLEM = ".problem:not([hidden]) p"
CUT_REPLIES = """(() => {
  const whole = fetch;
  const cut = (chunk, out) => chunk.forEach((byte) => out.enqueue(Uint8Array.of(byte)));
  window.fetch = async (...request) => {
    const response = await whole(...request);
    const body = response.body?.pipeThrough(new TransformStream({ transform: cut }));
    return new Response(body, response);
  };
})()"""
RICH = (
    "# Title\n\nText with **emphasis**, `code`, [a link](https://example.org) and\na second line."
    "\n\n1. one\n   - nested\n2. two\n\n> quote\n\n```python\nprint('a very long line of code, so "
    "long that a phone cannot show it', 1, 2, 3, 4, 5)\n```\n\n| a long column title | another "
    "long column title | and a third |\n| --- | :-: | --: |\n| 1 | 2 | 3 |\n\n---\n\n"
) + "unbroken" * 30


class Chat:
    """A browser's page and its server, with the steps that most tests share."""

    def __init__(self, browser: Any, server: FakeServer, **options: Any) -> None:
        viewport = {"width": 1200, "height": 800}
        self.context = browser.new_context(**({"viewport": viewport} | options))
        self.context.set_default_timeout(TIMEOUT_MS)
        self.server = server
        self.urls: list[str] = []
        self.faults: list[str] = []
        self.context.on("request", lambda request: self.urls.append(request.url))
        self.context.on("weberror", lambda fault: self.faults.append(str(fault.error)))
        self.context.on("dialog", lambda dialog: self.faults.append(f"dialog {dialog.message}"))
        self.context.on("console", self._hear)
        self.open()

    def _hear(self, line: Any) -> None:
        if "Failed to load resource" not in line.text:  # the report, which need not be there
            self.faults.append(line.text)

    def open(self) -> None:
        """A page of a browser that remembers nothing, and a server that has heard nothing."""
        for page in self.context.pages:
            page.close()
        self.server.reset()
        self.page = self.context.new_page()
        self.page.goto(f"{self.server.url}ui/logo.svg")
        self.page.evaluate("localStorage.clear()")
        self.page.goto(self.server.url)

    def tab(self) -> Any:
        """A second page of this browser."""
        page = self.context.new_page()
        page.goto(self.server.url)
        page.wait_for_selector("#model option", state="attached")
        return page

    def fill_storage(self) -> None:
        """Let the page's storage be full from now on."""
        full = "() => { throw new DOMException('full', 'QuotaExceededError'); }"
        self.page.evaluate(f"() => {{ Storage.prototype.setItem = {full}; }}")

    def check(self) -> None:
        assert self.faults == []
        hosts = {urlsplit(url).hostname for url in self.urls if not url.startswith("blob:")}
        assert hosts == {"127.0.0.1"}

    def see(self, selector: str, text: str | re.Pattern[str] | None = None) -> Any:
        """Wait until `selector` shows the text, or anything; its locator."""
        found = self.page.locator(selector)
        expect = playwright.expect(found)
        expect.to_be_visible() if text is None else expect.to_have_text(text)
        return found

    def count(self, selector: str, number: int) -> None:
        playwright.expect(self.page.locator(selector)).to_have_count(number)

    def ask(self, question: str, steps: Answer) -> None:
        self.server.replies.append(steps)
        self.page.fill("#input", question)
        self.page.keyboard.press("Enter")

    def chat(self, question: str, *answer: str) -> None:
        """Ask, and wait for the whole answer."""
        self.ask(question, reply(*answer))
        self.see(".question:nth-last-child(2) .said", question)
        self.see("#log > .reply:last-child .state", DONE)

    def click(self, name: str, then: Answer | None = None) -> None:
        """Click the last visible button of this name, which asks for a reply of these steps."""
        self.server.replies += [then] if then else []
        self.page.get_by_role("button", name=name, exact=True).locator("visible=true").last.click()

    def offer(self, *models: dict[str, Any]) -> None:
        """Let the server have these models."""
        self.server.models = list(models)
        self.page.reload()
        self.count("#model option", len(models))

    def edit(self, number: int) -> None:
        self.page.locator(".question").nth(number).get_by_role("button", name="Edit").focus()
        self.page.keyboard.press("Enter")

    def type(self, *keys: str) -> None:
        """Press these keys, and type what is no key."""
        for key in keys:
            known = re.fullmatch(r"(Control\+|Shift\+)*(Enter|Escape|Tab|/|[A-Z])", key)
            self.page.keyboard.press(key) if known else self.page.keyboard.type(key)

    def stored(self) -> list[dict[str, Any]]:
        """The conversations in the browser's storage."""
        entries = self.page.evaluate("Object.entries(localStorage)")
        return [json.loads(value) for key, value in entries if "conversation" in key]


@pytest.fixture(scope="module")
def desk() -> Iterator[Chat]:
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM}: apt-get install chromium")
    playwright.expect.set_options(timeout=TIMEOUT_MS)
    with playwright.sync_playwright() as running, FakeServer() as server:
        browser = running.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        desk = Chat(browser, server, permissions=["clipboard-read", "clipboard-write"])
        desk.context.add_init_script(CUT_REPLIES)
        yield desk
        browser.close()
        server.shutdown()


@pytest.fixture
def chat(desk: Chat) -> Iterator[Chat]:
    """Any character and any event of a reply comes in pieces of one byte."""
    desk.faults.clear()  # of the test before
    desk.urls.clear()
    desk.open()
    yield desk
    desk.check()


def parts(conversation: dict[str, Any]) -> list[str]:
    """The texts of a stored conversation."""
    contents = [message["content"] for message in conversation["messages"]]
    return [c if isinstance(c, str) else "".join(part["text"] for part in c) for c in contents]


# ---- a reply ----


def test_a_reply_streams_and_tells_what_it_cost(chat: Chat) -> None:
    gates = [Event(), Event()]
    begin = [b": queued 3\n\n", gates[0], piece(role="assistant", content="")]
    text = "naïve 中文 😀 👩‍👩‍👧 שלום."
    steps = [*begin, piece(content="First **ha"), gates[1], *reply("lf** ", *text)]
    chat.ask("Hello", [s.replace(b"\n", b"\r\n") if isinstance(s, bytes) else s for s in steps])
    chat.see(".reply .state", "queued: 3")
    chat.see("#send", "Stop")
    gates[0].set()
    chat.see(".reply.live .said", "First **ha")
    chat.see(".reply .state", "")
    select = "(p) => getSelection().setBaseAndExtent(p.firstChild, 0, p.firstChild, 5)"
    chat.page.locator(".reply p").first.evaluate(select)
    log = chat.page.get_by_role("log", name="Conversation")
    assert log.get_attribute("aria-live") == "off"
    assert chat.page.inner_text("#announcer") == "", "read aloud before it is complete"
    gates[1].set()
    chat.see("#announcer", f"nanochat: First **half** {text}")
    chat.see(".reply .said", f"First half {text}")
    chat.see(".reply strong", "half")
    assert chat.page.evaluate("getSelection().toString()") == "First"
    chat.see(".reply .state", "42 tok/s · first token 0.05 s · context 64")
    chat.see("#context", "context 64 of 1,024")
    chat.see("#send", "Send")
    asked = chat.server.asked[0]
    assert asked["messages"] == [{"role": "user", "content": "Hello"}]
    assert asked["model"] == "toy" and asked["stream"] is True
    assert asked["stream_options"] == {"include_usage": True}
    chat.chat("And then?", "Then more.")
    history = [message["content"] for message in chat.server.asked[1]["messages"]]
    assert history == ["Hello", [{"type": "text", "text": f"First **half** {text}"}], "And then?"]


def test_a_suggested_question_is_asked(chat: Chat) -> None:
    chat.click("What is 12 + 30?", then=reply("42"))
    chat.see(".question .said", "What is 12 + 30?")
    chat.see(".reply .said", "42")
    assert not chat.page.is_visible("#welcome")


def test_what_was_said_is_kept(chat: Chat) -> None:
    for end in (lambda: chat.type("Escape"), lambda: chat.click("Stop"), chat.page.reload):
        chat.type("Control+Shift+O")
        chat.server.left.clear()
        chat.ask("Count", [piece(content="one, two"), Event()])
        chat.see(".reply .said", "one, two")
        end()
        chat.see(".reply .state", re.compile("^(stopped|interrupted) · first token"))
        chat.see(".reply .said", "one, two")
        assert chat.server.left.wait(20), "the server was not told"
        chat.chat("Go on", "three")
        assert parts(chat.server.asked[-1]) == ["Count", "one, two", "Go on"]


def test_a_question_is_kept_while_the_server_is_silent(chat: Chat) -> None:
    chat.server.ready.clear()
    chat.page.reload()
    chat.ask("Hello", reply("Hi"))
    chat.see(".question .said", "Hello")
    chat.see("#send", "Stop")
    assert parts(chat.stored()[0]) == ["Hello", ""]
    chat.type("Escape")
    chat.see(".reply .state", "stopped")
    chat.click("Regenerate")
    chat.see("#send", "Stop")
    chat.click("New conversation")
    chat.see("#welcome")
    with chat.page.expect_response("**/completions"):
        chat.server.ready.set()
    assert chat.page.is_visible("#welcome"), "taken away from what is in view"
    chat.page.click("#list a")
    chat.see(".reply .state", DONE)
    assert [parts(each) for each in chat.stored()] == [["Hello", "Hi"]]


def test_tool_call_is_a_card_in_the_sentence(chat: Chat) -> None:
    call = piece(tool={"expression": "'<b>'.count('b')", "result": "1"})
    failed = piece(tool={"expression": "1 / 0", "result": None})
    steps = [piece(content="**There is"), call, piece(content=" 1.** `"), failed, *ending("length")]
    chat.ask("Count", steps)
    chat.see(".reply .said", "There is'<b>'.count('b') = 1 1. `1 / 0")
    chat.see(".reply strong > .tool output", "1")
    chat.see(".reply .state", re.compile("^ended by the limit on tokens · 42 tok/s"))
    assert chat.page.get_by_role("group", name="Calculator").count() == 2
    chat.chat("And then?", "Nothing.")  # the model is to see what it asked the tool
    content = chat.server.asked[1]["messages"][1]["content"]
    assert [p["type"] for p in content] == ["text", "python", "python_output", "text", "python"]


def test_errors_are_told_and_retried(chat: Chat) -> None:
    gate = Event()
    chat.ask("Hello", 429)
    chat.see(PROBLEM, "a fault of number 429 · try again in 2 s")
    failure = event({"error": {"message": "the engine failed"}})
    chat.click("Retry", then=[piece(content="Half"), failure])
    chat.see(PROBLEM, "the engine failed")
    chat.see(".reply .said", "Half")
    chat.click("Retry", then=[piece(content="Half of"), gate, KILL])
    chat.see(".reply .said", "Half of")
    chat.server.is_dead = True
    gate.set()
    chat.see(PROBLEM, "the connection broke off before the answer was complete")
    chat.see(".reply .said", "Half of")
    chat.click("Retry")
    chat.see(PROBLEM, "the server does not answer; is it running?")
    chat.server.is_dead = False
    chat.click("Retry", then=reply("The whole"))
    chat.see(".reply .said", "The whole")
    assert not chat.page.is_visible(".problem")
    assert [parts(asked) for asked in chat.server.asked] == [["Hello"]] * 4
    chat.ask("And", 401)
    chat.see(PROBLEM, "a fault of number 401 · enter the key in the settings")
    with chat.context.expect_event("weberror"):  # a fault of the code is not told as one of the net
        chat.click("Retry", then=[b"data: {\n\n"])
    chat.see(PROBLEM, re.compile("JSON"))
    assert "JSON" in chat.faults.pop()


def test_scrolling_yields_to_the_reader(chat: Chat) -> None:
    gates = [Event(), Event(), Event()]
    lines = [piece(content=f"line {i}\n\n") for i in range(60)]
    chat.ask("Go", [*lines, gates[0], *lines, gates[1], piece(content="end"), gates[2], *ending()])
    chat.count(".said p", 60)

    def place() -> tuple[float, float]:
        """How far the view is from the top, and from the end."""
        distances = "(s) => [s.scrollTop, s.scrollHeight - s.scrollTop - s.clientHeight]"
        return chat.page.locator("#scroller").evaluate(distances)

    assert place()[1] < 2
    chat.page.mouse.move(600, 400)
    chat.page.mouse.wheel(0, -500)
    chat.see("#latest")
    before = place()[0]
    gates[0].set()
    chat.count(".said p", 120)
    assert place()[0] == before, "the view moved away from the reader"
    chat.page.click("#latest")
    assert place()[1] < 2
    gates[1].set()
    chat.count(".said p", 121)
    assert place()[1] < 2
    gates[2].set()
    chat.see("#send", "Send")


# ---- what a person does ----


def test_regenerate_and_edit(chat: Chat) -> None:
    chat.chat("First", "one")
    chat.click("Regenerate", then=reply("another one"))
    chat.see(".reply .said", "another one")
    assert chat.server.asked[1]["messages"] == chat.server.asked[0]["messages"]
    chat.chat("Second", "two")
    chat.edit(0)
    chat.server.replies.append(reply("three"))
    chat.type("Control+A", "Changed", "Enter")
    chat.see(".reply .said", "three")
    chat.see(".question .said", "Changed")
    chat.click("Undo")
    chat.see(".reply:last-child .said", "two")
    assert parts(chat.stored()[0]) == ["First", "another one", "Second", "two"]
    chat.edit(1)
    chat.type("Escape")
    chat.see(".question:nth-last-child(2) .said", "Second")


def test_copy_message_and_code(chat: Chat) -> None:
    pasted = "navigator.clipboard.readText()"
    chat.chat("Code", "Here:\n\n```py\nx = 1\n\ty = 2\n```\n\nDone.")
    chat.page.click(".copy-code")
    chat.see(".copy-code", "Copied")
    assert chat.page.evaluate(pasted) == "x = 1\n\ty = 2"
    chat.page.locator(".reply > .actions button").first.click()
    chat.see(".reply > .actions button:first-child", "Copied")
    assert chat.page.evaluate(pasted).startswith("Here:\n\n```py")
    none = "{ value: undefined, configurable: true }"  # as on a page without https
    chat.page.evaluate(f"Object.defineProperty(navigator, 'clipboard', {none})")
    chat.page.hover(".question")
    chat.page.locator(".question .actions button", has_text="Copy").click()
    chat.page.evaluate("delete navigator.clipboard")
    assert chat.page.evaluate(pasted) == "Code"


def test_conversations_are_kept_and_deleted_and_a_full_storage_is_told(chat: Chat) -> None:
    gate = Event()
    chat.ask("Alpha", [piece(content="begun"), gate, piece(content=" and ended"), *ending()])
    chat.see(".reply .said", "begun")
    chat.click("New conversation")
    chat.see("#welcome")
    chat.chat("Beta", "b")
    chat.count("#list a", 2)
    gate.set()  # what is out of view goes on
    chat.see(".reply .said", "b")
    chat.page.click("#list a:has-text('Alpha')")
    chat.see(".reply .said", "begun and ended")
    chat.page.go_back()
    chat.page.reload()
    chat.see("#title", "Beta")
    chat.see(".reply .said", "b")
    chat.see(".reply .state", DONE)
    chat.click("Delete “Beta”")
    chat.see("#list a", "Alpha")
    chat.see("#welcome")
    chat.click("Undo")
    chat.see(".reply .said", "b")
    assert sorted(conversation["title"] for conversation in chat.stored()) == ["Alpha", "Beta"]
    chat.fill_storage()
    chat.chat("Hello", "Hi")
    chat.see("#toast", re.compile("storage is full"))
    other = chat.tab()
    other.click("#list a:has-text('Alpha')")
    other.click("text=Delete >> visible=true")  # which this tab hears of
    chat.count("#list a", 1)
    chat.see(".reply:last-child .said", "Hi")


def test_export_and_import(chat: Chat, tmp_path: Path) -> None:
    tool = piece(tool={"expression": "6 * 7", "result": "42"})
    chat.ask("Six times seven?", [piece(content="It is "), tool, piece(content="42."), *ending()])
    chat.see(".reply .state", DONE)
    chat.type("Control+Shift+O")
    chat.chat("Bye", "Bye.")
    with chat.page.expect_download() as download:
        chat.click("Export")
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert re.fullmatch(r"nanochat-\d{4}-\d\d-\d\d\.jsonl", file.name)
    task = CustomJSON(file)  # nanochat can train on it as it is
    assert len(task) == 2
    content = task[1]["messages"][1]["content"]
    assert [part["type"] for part in content] == ["text", "python", "python_output", "text"]
    exported = chat.stored()

    chat.open()
    for expected in ("2 new conversations.", "0 new conversations."):
        chat.page.set_input_files("#file", file)
        chat.see("#toast", expected)
    assert sorted(map(parts, chat.stored())) == sorted(map(parts, exported))
    chat.page.click("#list a:has-text('Six')")
    chat.see(".tool", "6 * 7 = 42")
    number = '{"title": "x", "messages": [{"role": "user", "content": 5}]}'
    tokens = '[{"role": "assistant", "content": "x", "tokens": {"toLocaleString": 1}}]'
    model = '[{"role": "assistant", "content": "x", "model": {"toString": 1}}]'
    for bad in (tokens, model, number, "no json", '{"messages": []}', "null"):
        (tmp_path / "bad.json").write_text('[{"role": "user", "content": "good"}]\n' + bad)
        chat.page.set_input_files("#file", tmp_path / "bad.json")
        chat.see("#toast", re.compile("^bad.json was not imported"))
    chat.count("#list a", 2)


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
    assert all(asked[name] == float(value) for name, value in entered.items())
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}
    assert asked["authorization"] == "Bearer secret"
    chat.click("Settings")
    chat.page.fill("[name=temperature]", "3")  # more than the model's maximum
    chat.type("Escape")
    chat.page.reload()
    chat.click("Settings")
    assert chat.page.input_value("[name=temperature]") == "0.7"
    chat.page.fill("[name=temperature]", "3")
    chat.type("Escape")
    playwright.expect(chat.page.locator("[name=temperature]")).to_have_value("0.7")
    chat.page.select_option("#theme", "dark")
    chat.page.reload()
    assert chat.page.input_value("#theme") == "dark", "what is chosen later was not kept"
    chat.click("Settings")
    chat.click("Clear all")
    chat.click("Done")
    chat.chat("Cleared", "c")
    asked = chat.server.asked[2]
    assert not set(entered) & set(asked) and asked["authorization"] is None


def test_keyboard_alone(chat: Chat) -> None:
    chat.page.evaluate("document.activeElement.blur()")
    chat.type("/", "line 1", "Shift+Enter", "line/2")
    composing = "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true })"
    chat.page.evaluate(f"document.activeElement.dispatchEvent({composing})")
    assert chat.server.asked == [], "Enter inside an input method chooses a word"
    chat.server.replies += [reply("answer"), reply("second")]
    chat.type("Enter")
    chat.see(".reply .state", DONE)
    assert parts(chat.server.asked[0]) == ["line 1\nline/2"]

    def press(name: str) -> None:
        """Tab backwards to the button of this name, and press it."""
        for _ in range(40):
            chat.type("Shift+Tab")
            label = "document.activeElement.ariaLabel || document.activeElement.textContent"
            if chat.page.evaluate(label) == name:
                ring = chat.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert ring == "solid", "no focus ring"
                return chat.type("Enter")
        pytest.fail(f"{name} cannot be reached")

    press("Edit")
    chat.type("Control+A", "again", "Tab", "Enter")
    chat.see(".reply .said", "second")
    press("Rename “line 1 line/2”")
    chat.type("by keys", "Enter")
    chat.see("#title", "by keys")
    press("Delete “by keys”")
    chat.count("#list a", 0)
    press("Undo")
    chat.see("#title", "by keys")
    press("Settings")
    chat.see("#settings")
    chat.type("Escape")
    assert not chat.page.is_visible("#settings")
    chat.type("Control+Shift+O")
    chat.see("#welcome")
    assert chat.page.evaluate("document.activeElement.id") == "input"
    chat.offer(SFT, BASE)
    chat.page.focus("#other")
    chat.page.keyboard.press("End")
    chat.server.replies.append({SFT["id"]: reply("1"), BASE["id"]: reply("2")})
    chat.page.focus("#input")
    chat.type("Both", "Enter")
    chat.see(".pair .reply:last-child .state", DONE)
    chat.see(".pair .reply:first-child .state", DONE)
    chat.type("Control+Shift+O")
    chat.page.focus("#model")
    chat.page.keyboard.press("End")
    chat.server.replies.append([text_piece(" upon"), *ending()])
    chat.type("Control+Shift+O", "Once", "Control+Enter")
    draft = playwright.expect(chat.page.locator("#draft"))
    draft.to_have_value("Once upon")
    chat.see("#send", "Continue")
    chat.type("Tab", "Enter")
    draft.to_have_value("Once")


# ---- several models, probabilities, texts, runs ----

SFT, RL, BASE = card("nanochat-d6-sft"), card("nanochat-d8-rl"), card("nanochat-d6-base", "base")


def test_models_are_chosen_and_remembered(chat: Chat) -> None:
    chat.see("#model")
    assert chat.page.is_disabled("#model") and not chat.page.is_visible("#other")
    chat.chat("Hello", "from one")
    chat.see(".reply .who", "nanochat")
    chat.offer(SFT, RL)
    chat.see(".reply .who", "toy")  # by which it was made
    chat.page.select_option("#model", RL["id"])
    chat.chat("And you?", "from another")
    chat.page.reload()
    chat.see(".reply:last-child .who", "d8-rl")
    chat.click("Regenerate", then=reply("from another again"))
    chat.see(".reply:last-child .said", "from another again")
    chat.offer(SFT, BASE)  # the one that is remembered is gone
    chat.click("Regenerate", then=reply("from the first"))
    chat.see(".reply:last-child .who", "sft")  # both are of d6
    chat.page.select_option("#other", BASE["id"])
    chat.offer(BASE)  # it alone, asked within the conversation
    chat.chat("Who else?", "nobody")
    models = [asked["model"] for asked in chat.server.asked]
    assert models == ["toy", *[RL["id"]] * 2, SFT["id"], BASE["id"]]


def test_two_models_answer_side_by_side(chat: Chat, tmp_path: Path) -> None:
    chat.offer(SFT, RL, BASE)
    chat.page.select_option("#other", BASE["id"])
    gates = [Event(), Event()]
    first = [piece(content="One"), gates[0], *reply(" and only")]
    second = [piece(content="Two"), gates[1], *reply(" of them")]
    chat.ask("Who?", {SFT["id"]: first, BASE["id"]: second})
    left, right = ".pair .reply:first-child", ".pair .reply:last-child"
    chat.see(f"{left} .said", "One")  # both at the same time
    chat.see(f"{right} .said", "Two")
    boxes = [chat.page.locator(column).bounding_box() for column in (left, right)]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"] and boxes[0]["y"] == boxes[1]["y"]
    gates[1].set()
    chat.see(f"{right} .state", DONE)
    chat.see("#send", "Stop")
    gates[0].set()
    chat.see("#announcer", "d6-sft: One and only d6-base: Two of them")
    chat.page.reload()
    chat.see(f"{right} .who", "d6-base")
    chat.see(f"{right} .said", "Two of them")
    again = {SFT["id"]: [piece(content="1"), Event()], BASE["id"]: reply("2")}
    chat.click("Regenerate", then=again)
    chat.see(f"{right} .state", DONE)
    chat.type("Escape")
    chat.see(f"{left} .state", re.compile("^stopped"))
    chat.click("Regenerate", then={SFT["id"]: 503, BASE["id"]: reply("2")})
    chat.see(f"{left} {PROBLEM}", "a fault of number 503")
    chat.see(f"{right} .state", DONE)
    chat.click("Retry", then=reply("1"))  # the answer of the other stays
    chat.see(f"{left} .said", "1")
    chat.see(f"{left} .state", DONE)
    chat.see(f"{right} .said", "2")
    chat.page.select_option("#other", "")
    chat.chat("And?", "Nothing.")
    assert parts(chat.server.asked[-1]) == ["Who?", "1", "And?"], "the other's is not sent"
    with chat.page.expect_download() as download:
        chat.click("Export")
    download.value.save_as(tmp_path / "both.jsonl")
    assert len(CustomJSON(tmp_path / "both.jsonl")) == 1
    before = chat.stored()
    chat.open()
    chat.page.set_input_files("#file", tmp_path / "both.jsonl")
    chat.see("#toast", "1 new conversation.")
    assert chat.stored() == before
    bad = tmp_path / "bad.json"
    bad.write_text('[{"role": "user", "content": "x", "other": 5}]')
    chat.page.set_input_files("#file", bad)
    chat.see("#toast", re.compile("^bad.json was not imported"))


def test_a_base_model_goes_on_with_a_text(chat: Chat) -> None:
    usage = event({"choices": [], "usage": {"total_tokens": 96}})
    end = [usage, event("[DONE]")]
    chat.offer(SFT, BASE)
    chat.page.select_option("#model", BASE["id"])
    assert not chat.page.is_visible("#input") and not chat.page.is_visible("#other")
    chat.page.focus("#draft")
    gate, turn = Event(), Event()
    upon = [text_piece(" upon"), gate, text_piece(" a time"), *end]
    chat.server.replies.append([b": queued 2\n\n", turn, *upon])
    chat.type("Once", "Control+Enter")
    chat.see("#keys", "queued: 2")
    turn.set()
    chat.see("#keys", re.compile("^Ctrl"))
    chat.see("#send", "Stop")
    draft = chat.page.locator("#draft")
    value = playwright.expect(draft)
    value.to_have_value("Once upon")
    value.not_to_be_editable()
    gate.set()
    value.to_have_value("Once upon a time")
    chat.see("#context", "context 96 of 1,024")
    chat.see("#announcer", " upon a time")
    chat.click("Continue", then=[text_piece(" there"), Event()])
    value.to_have_value("Once upon a time there")
    chat.type("Escape")
    chat.see("#send", "Continue")
    assert chat.server.left.wait(20), "the server was not told"
    chat.page.reload()
    value.to_have_value("Once upon a time there")
    draft.fill("Once upon a time then")
    assert chat.page.is_disabled("#undo"), "what would be taken back is no longer there"
    draft.fill("Once upon a time there")
    chat.click("Undo")
    value.to_have_value("Once upon a time")
    draft.press_sequentially("!")  # what was written since stays
    chat.click("Undo")
    value.to_have_value("Once!")
    assert chat.page.is_disabled("#undo")
    chat.click("Continue", then=503)
    chat.see("#toast", "a fault of number 503")
    asked = chat.server.asked
    assert [each["prompt"] for each in asked] == ["Once", "Once upon a time", "Once!"]
    chat.server.left.clear()
    chat.click("Continue", then=[Event()])
    chat.see("#send", "Stop")
    chat.page.select_option("#model", SFT["id"])
    assert chat.server.left.wait(20), "it went on out of sight"
    chat.page.select_option("#model", BASE["id"])
    paths, models = {each["path"] for each in asked}, {each["model"] for each in asked}
    assert (paths, models) == ({"/v1/completions"}, {BASE["id"]})
    assert chat.stored() == [], "a text is no conversation"
    chat.page.select_option("#model", SFT["id"])
    chat.chat("Hello", "Hi")
    chat.page.select_option("#model", BASE["id"])
    chat.see(".reply .said", "Hi")
    chat.click("New conversation")
    value.to_have_value("Once!")
    chat.fill_storage()
    chat.click("Continue", then=[text_piece(" Upon"), *end])
    value.to_have_value("Once! Upon")
    chat.click("Undo")
    value.to_have_value("Once!")


def test_a_text_in_two_tabs(chat: Chat) -> None:
    chat.offer(BASE)
    other = chat.tab()
    draft = playwright.expect(chat.page.locator("#draft"))
    chat.page.fill("#draft", "Once")
    playwright.expect(other.locator("#draft")).to_have_value("Once")
    chat.click("Continue", then=[text_piece(" upon"), Event()])
    draft.to_have_value("Once upon")
    other.fill("#draft", "Once, then")
    draft.to_have_value("Once, then")
    assert chat.server.left.wait(20), "it went on with a text that is no more"
    chat.see("#send", "Continue")
    assert "Once, then" in chat.page.evaluate("localStorage['nanochat:draft']")
    chat.page.locator("#toast button").click()
    draft.to_have_value("Once upon")
    playwright.expect(other.locator("#draft")).to_have_value("Once upon")
    chat.click("Continue", then=[text_piece(" a time"), Event()])
    draft.to_have_value("Once upon a time")
    chat.page.reload()
    draft.to_have_value("Once upon a time")
    chat.click("Undo")
    draft.to_have_value("Once upon")


def test_nothing_takes_an_open_edit_away(chat: Chat) -> None:
    chat.offer(SFT, BASE, RL)
    chat.page.evaluate("localStorage['nanochat:conversation:damaged'] = '{'")
    other = chat.tab()
    chat.chat("Hello", "Hi")
    chat.edit(0)
    chat.type("Control+A", "Changed")
    other.evaluate("""localStorage["nanochat:draft"] = '{"text": "a", "added": []}'""")
    other.fill("#input", "New")
    chat.server.replies.append(reply("yes"))
    other.keyboard.press("Enter")
    chat.count("#list a", 2)
    chat.page.focus("#model")
    for model in (BASE, RL):
        chat.page.keyboard.press("ArrowDown")
        playwright.expect(chat.page.locator("#model")).to_have_value(model["id"])
    assert chat.page.input_value(".edit textarea") == "Changed"
    chat.see("#title", "Hello")
    kept = chat.tab()  # by another tab the choice is heard of, and what it means for the composer
    chat.click("New conversation")
    kept.select_option("#model", BASE["id"])
    chat.see("#draft")
    kept.select_option("#model", SFT["id"])
    chat.see("#input")


def test_tokens_tell_how_likely_they_were(chat: Chat) -> None:
    chat.click("Settings")
    chat.page.check("[name=odds]")
    chat.click("Done")
    call = piece(tool={"expression": "1 + 1", "result": "2"})
    tokens = [token("It", 0.95), token(" is", 0.004, was=0.7, s=0.0001), call, token("\n\n", 0.2)]
    chat.ask("How much?", [*tokens, token("2", 1.0), *ending()])
    chat.see(".reply .state", DONE)
    assert (chat.server.asked[0]["logprobs"], chat.server.asked[0]["top_logprobs"]) == (True, 5)
    names = [each.get_attribute("aria-label") for each in chat.page.locator(".token").all()]
    assert names == ["It, 95 %", "is, 0.4 %", "line break, 20 %", "2, 100 %"]
    chat.see(".tokens > code", "1 + 1 = 2")
    line = "(each) => getComputedStyle(each).borderBottomWidth"
    widths = [each.evaluate(line) for each in chat.page.locator(".token").all()]
    assert widths == ["0px", "4px", "2px", "0px"], "told by colour alone"
    chat.count(".token[tabindex='0']", 1)
    chat.page.locator(".token").first.focus()
    chat.see(".choices", "It 95 %")
    chat.page.keyboard.press("ArrowRight")
    chat.see(".choices", "was 70 % is 0.4 % s under 0.1 %")
    chat.see(".choices b", "is 0.4 %")
    focus = "document.activeElement.ariaLabel ?? document.activeElement.textContent"
    for key, name in (("ArrowLeft", "It, 95 %"), ("ArrowLeft", "It, 95 %"), ("End", "2, 100 %")):
        chat.page.keyboard.press(key)
        assert chat.page.evaluate(focus) == name
    chat.page.keyboard.press("Tab")
    assert chat.page.evaluate(focus) == "Copy", "one stop for all tokens"
    chat.page.locator(".token").nth(2).click()
    chat.see(".choices", "↵↵ 20 %")
    chat.click("Settings")
    chat.page.uncheck("[name=odds]")
    chat.see(".reply .said.markdown", re.compile("^It is1 [+] 1 = 2"))


def test_a_real_server_of_several_models(chat: Chat) -> None:
    """The second is loaded once it is asked."""
    go = Event()

    def load() -> EchoEngine:
        assert go.wait(20)
        return EchoEngine()

    first = ServedModel("nanochat-d2-sft", "chat", 256, 1, load=load, preloaded=EchoEngine())
    second = ServedModel("nanochat-d2-rl", "chat", 256, 1, load=load)
    engine = Engine(random_gpt(64), TOKENIZER, num_slots=2)
    base = ServedModel("nanochat-d2-base", "base", 64, 1, load=load, preloaded=engine)
    with serving_models([first, second, base], loaded=False) as running:
        chat.page.goto(running.url)
        chat.click("Settings")
        chat.page.check("[name=odds]")
        chat.page.fill("[name=seed]", "1")
        chat.click("Done")
        chat.page.select_option("#other", "nanochat-d2-rl")
        chat.page.fill("#input", "echo")
        chat.type("Enter")
        left, right = ".pair .reply:first-child", ".pair .reply:last-child"
        chat.see(f"{left} .state", DONE)
        chat.see(f"{right} .state", "the model is being loaded")
        go.set()
        chat.see(f"{right} .state", DONE)
        assert chat.page.inner_text(f"{right} .tokens") == "echo"
        chat.page.locator(f"{right} .token").nth(1).focus()
        chat.see(f"{right} .choices b", "c 100 %")
        chat.count(f"{right} .choices > *", 5)
        chat.page.select_option("#model", base.name)
        chat.click("New conversation")
        chat.page.fill("#draft", "Once")
        chat.page.click("#send")
        chat.see("#context", re.compile("context [1-9]"))
        assert re.match("Once.", chat.page.input_value("#draft"), re.DOTALL)
        chat.page.click("#undo")
        playwright.expect(chat.page.locator("#draft")).to_have_value("Once")


def test_the_runs_are_shown_as_they_train(
    desk: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(desk.context.browser, desk.server)  # with a clock of its own
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))

    def log(step: int, **more: object) -> None:
        figures = {"step": step, "progress": step / 400, "seconds": step, "loss": 9 - step / 50}
        with (tmp_path / "base/d6/metrics.jsonl").open("a") as file:
            file.write(json.dumps(figures | {"tok_per_second": 5000.4, "mfu": 0.25} | more) + "\n")

    with serving([EchoEngine()], api_key="secret") as running:
        chat.page.clock.install()
        chat.page.goto(f"{running.url}/runs")
        chat.see("#state", re.compile("enter the key in the settings$"))
        chat.page.evaluate("localStorage['nanochat:settings'] = '{\"key\": \"secret\"}'")
        chat.page.clock.run_for(3000)
        chat.see("#state", "There is no run in this server's folder yet.")
        chat.page.goto(running.url)
        (tmp_path / "base/d6").mkdir(parents=True)
        (tmp_path / "base/d6/.lock").write_text(str(os.getpid()))
        log(100, val_bpb=2.5, samples=["<b>Once</b>"])
        chat.page.click("text=Runs")
        chat.see("h2", "base · d6running")
        facts = re.compile("^step 100 of 400 · 5 min 0 s left · 5,000 tok/s")
        chat.see("section > p >> nth=0", facts)
        chat.see("pre", "<b>Once</b>")
        chat.count("figure", 2)
        label = chat.page.locator("svg").first
        playwright.expect(label).to_have_attribute("aria-label", "from 7.00 to 7.00")
        log(200)
        chat.page.clock.run_for(3000)
        playwright.expect(label).to_have_attribute("aria-label", "from 7.00 to 5.00")
        chat.see("pre", "<b>Once</b>")
        change = "new Event('visibilitychange', { bubbles: true })"
        hide = "Object.defineProperty(document, 'hidden', { value: is, writable: true })"
        hidden = f"(is) => {{ {hide}; document.dispatchEvent({change}); }}"
        asked = len(chat.urls)
        chat.page.evaluate(hidden, True)
        log(300)
        chat.page.clock.run_for(30_000)
        chat.page.evaluate("fetch('ui/logo.svg').then(() => null)")
        assert len(chat.urls) == asked + 1, "asked while nobody could see it"
        chat.page.evaluate(hidden, False)
        playwright.expect(label).to_have_attribute("aria-label", "from 7.00 to 3.00")

        def damage(route: Any) -> None:
            runs = route.fetch().json()
            route.fulfill(json=[runs[0] | {"samples": None}, *runs])

        chat.page.route("**/runs/data", damage)
        chat.page.clock.run_for(3000)
        chat.see("#runs > p", "The log of base · d6 is damaged.")
        chat.count("section", 1)  # which it does not hide
        chat.page.get_by_role("link", name="Chat").click()
        chat.see("#welcome")
    chat.check()
    chat.context.close()


# ---- how it looks ----


def test_theme_follows_the_system_until_chosen(chat: Chat) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    colours = {}
    for scheme in ("dark", "light"):
        chat.page.emulate_media(color_scheme=scheme)
        colours[scheme] = chat.page.evaluate(paper)
    assert colours["light"] != colours["dark"]
    for theme in ("light", "dark"):
        chat.page.select_option("#theme", theme)
        assert chat.page.evaluate(paper) == colours[theme]
    chat.page.reload()
    chat.see("#welcome")
    assert chat.page.input_value("#theme") == "dark"
    assert chat.page.evaluate(paper) == colours["dark"]


def test_phone(desk: Chat) -> None:
    size = {"width": 360, "height": 640}
    browser, server = desk.context.browser, desk.server
    chat = Chat(browser, server, viewport=size, has_touch=True, is_mobile=True)
    chat.page.fill("#input", "Wide" * 40)
    chat.type("Enter", "second line")
    text = chat.page.input_value("#input")
    assert text.endswith("\nsecond line"), "on a touch screen Enter is a new line"
    tool = piece(tool={"expression": "9" * 90, "result": "9" * 90})
    server.replies.append([piece(content=RICH), tool, *ending()])
    chat.page.tap("#send")
    chat.see(".reply .state", DONE)
    wide = """Array.from(document.querySelectorAll("*")).filter((each) =>
      getComputedStyle(each).overflowX === "visible" && each.getBoundingClientRect().right > 360 &&
      !each.closest("pre, [tabindex='0'], .unseen, #side")).map((each) => each.outerHTML)"""

    def check_width() -> None:
        assert chat.page.evaluate("document.documentElement.scrollWidth") == 360
        assert chat.page.evaluate("document.querySelector('#scroller').scrollWidth") <= 360
        assert chat.page.evaluate(wide) == []

    check_width()
    chat.page.tap("text=Menu")
    chat.see("#list a")
    box = chat.page.locator("#side").bounding_box()
    assert box["x"] + box["width"] <= 360
    chat.page.tap("#new")
    chat.see("#welcome")
    assert not chat.page.is_visible("#list")
    chat.page.evaluate("localStorage['nanochat:settings'] = '{\"odds\": \"on\"}'")
    chat.offer(SFT, BASE)
    chat.page.select_option("#other", BASE["id"])
    long = [token("unbroken" * 9, 0.3), *[token(f" {n}", 0.1) for n in range(50)], *ending()]
    server.replies.append({SFT["id"]: long, BASE["id"]: reply(RICH)})
    chat.page.fill("#input", "Both")
    chat.page.tap("#send")
    left, right = ".pair .reply:first-child", ".pair .reply:last-child"
    chat.see(f"{right} .state", DONE)
    chat.see(f"{left} .state", DONE)
    tops = [chat.page.locator(column).bounding_box()["y"] for column in (left, right)]
    assert tops[0] < tops[1]
    chat.page.locator(".token").nth(9).tap()
    chat.see(f"{left} .choices", "8 10 %")
    check_width()
    chat.page.select_option("#model", BASE["id"])
    chat.page.tap("text=Menu")
    chat.page.tap("#new")
    chat.page.fill("#draft", "Wide" * 40)
    check_width()
    chat.check()
    chat.context.close()


def test_axe_finds_no_violation(
    desk: Chat, pytestconfig: pytest.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all states, wide and narrow, light and dark (only colours can differ)."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = pytestconfig.cache.mkdir("axe")  # pyright: ignore[reportOptionalMemberAccess]
    archive = folder / "axe-core-4.14.1.tgz"
    fetch = ["npm", "pack", "axe-core@4.14.1"]
    if not archive.exists() and subprocess.run(fetch, cwd=folder).returncode:
        pytest.skip("npm could not fetch axe-core")
    with tarfile.open(archive) as files:
        axe = files.extractfile("package/axe.min.js").read().decode()  # pyright: ignore
    chat = Chat(desk.context.browser, desk.server, reduced_motion="reduce")
    assert chat.page.evaluate("fetch('report', { method: 'HEAD' }).then(({ ok }) => ok)") is False
    assert not chat.page.is_visible("#report")
    chat.server.has_report = True
    chat.page.reload()
    assert chat.see("#report", "Report").get_attribute("href") == "report"
    chat.page.evaluate(axe)

    def audit() -> None:
        for width in (1200, 360):
            chat.page.set_viewport_size({"width": width, "height": 800})
            colours = ("dark", {"runOnly": ["color-contrast"]})  # the same at both widths
            for scheme, options in (("light", {}), colours)[: 2 if width == 1200 else 1]:
                chat.page.emulate_media(color_scheme=scheme)
                found = chat.page.evaluate("(options) => axe.run(options)", options)
                assert "color-contrast" in {rule["id"] for rule in found["passes"]}
                assert found["violations"] == [], (width, scheme)
        chat.page.set_viewport_size({"width": 1200, "height": 800})

    audit()
    tool = piece(tool={"expression": "1 + 1", "result": "2"})
    chat.ask("Everything", [piece(content=RICH), tool, *ending()])
    chat.see(".reply .state", DONE)
    chat.ask("More", [piece(content="broken"), event({"error": {"message": "it failed"}})])
    chat.see(PROBLEM, "it failed")
    chat.edit(0)
    audit()
    chat.click("Delete “Everything”")
    audit()
    chat.click("Settings")
    audit()
    chat.page.check("[name=odds]")
    chat.click("Done")
    chat.offer(SFT, BASE)
    chat.page.evaluate(axe)
    chat.page.select_option("#other", BASE["id"])
    unlikely = [token("a", 0.99, b=0.01), token(" b", 0.3), token("c", 0.001), *ending()]
    chat.ask("Compare", {SFT["id"]: unlikely, BASE["id"]: reply("plain")})
    chat.see(".pair .reply:last-child .state", DONE)
    chat.page.locator(".token").first.focus()
    audit()
    chat.page.select_option("#model", BASE["id"])
    chat.click("New conversation")
    chat.page.fill("#draft", "Once")
    audit()
    folder = tmp_path / "base/d6"
    folder.mkdir(parents=True)
    record = {"step": 1, "loss": 5.0, "samples": ["a sample"], "tok_per_second": 9.0}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    with serving([EchoEngine()]) as running:
        chat.page.goto(f"{running.url}/runs")
        chat.see("figure")
        chat.page.evaluate(axe)
        audit()
    chat.check()
    chat.context.close()


# ---- Markdown ----

LINK = 'rel="noopener noreferrer" target="_blank"'
CASES = {
    "# a\n## b #\none\ntwo  \n***three** x* `c*` \\*": "<h2>a</h2><h3>b</h3>"  # the page has the h1
    "<p>one<br>two<br><em><strong>three</strong> x</em> <code>c*</code> *</p>",
    "a\n- b\n- c\n  3) d": '<p>a</p><ul><li>b</li><li>c<br>3) d</li></ul>',
    "3) a\n\n   b\n\n> c\nd\n***": '<ol start="3"><li><p>a</p><p>b</p></li></ol>'
    "<blockquote><p>c<br>d</p></blockquote><hr>",
    '[a](http://a.b/_(c) "t") <mailto:a@b.c>': f'<p><a href="http://a.b/_(c)" {LINK}>a</a> '
    f'<a href="mailto:a@b.c" {LINK}>mailto:a@b.c</a></p>',
    "~~~ py 3\n\tx\n\n    y\n~~~": '<figure><figcaption><span>py</span><button type="button" '
    'class="copy-code">Copy</button></figcaption><pre tabindex="0"><code>\tx\n\n    y</code></pre></figure>',
    "|a|b|\n|-|-:|\n|`c`|": '<div tabindex="0"><table><thead><tr><th class="left">a</th>'
    '<th class="right">b</th></tr></thead><tbody><tr><td class="left"><code>c</code></td>'
    '<td class="right"></td></tr></tbody></table></div>',
    "a\n===\n\n    b &lt; [c]\n\n[c]: http://d.e": "<p>a<br>===</p><p>b &amp;lt; [c]</p><p>[c]: http://d.e</p>",
}  # fmt: skip
GROWING = (
    "# Title\n\nSome *text* that **grows** with `code` and [a link](http://a.b) in\nit.\n\n- c\n- d"
    "\n  1. e\n\n```py\nx = `1`\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n\n> f\n> g"
)
PLAIN = {
    "p", "h2", "h3", "h4", "h5", "h6", "em", "strong", "ul", "ol start", "li", "blockquote", "hr", "br",
    "code", "figure", "figcaption", "span", "button type class", "pre tabindex", "div tabindex", "table",
    "thead", "tbody", "tr", "th class", "td class", "a http:", "a https:", "a mailto:",
}  # fmt: skip


def render(chat: Chat, texts: list[str], step: int = 0) -> list[dict[str, Any]]:
    """What each text becomes that grows by `step` characters, and how long that took."""
    script = """async ([texts, step]) => {
      const { showMarkdown } = await import("/ui/markdown.js");
      const root = document.querySelector("#log");
      const shape = (each) =>
        [each.localName, ...(each.protocol ? [each.protocol] : each.getAttributeNames())].join(" ");
      return texts.map((text) => {
        root.replaceChildren();
        const [seen, start] = [new Set(), performance.now()];
        for (let end = step || text.length; end < text.length; end += step) {
          showMarkdown(root, [{ type: "text", text: text.slice(0, end) }], true);
          for (const each of root.querySelectorAll(":not(p, br)")) seen.add(each);
        }
        showMarkdown(root, [{ type: "text", text }], false);
        const milliseconds = performance.now() - start;
        const shapes = Array.from(root.querySelectorAll("*"), shape);
        const lost = [...seen].filter((each) => !each.isConnected).map((each) => each.outerHTML);
        return { html: root.innerHTML, shapes, lost, milliseconds };
      });
    }"""
    return chat.page.evaluate(script, [texts, step])


def test_markdown_whole_and_growing(chat: Chat) -> None:
    texts = [*CASES, GROWING, "\n\n".join([*CASES, RICH])]
    whole, slowly, fast = (render(chat, texts, step) for step in (0, 1, 7))
    assert [found["html"] for found in whole[: len(CASES)]] == list(CASES.values())
    for a, b, c in zip(whole, slowly, fast, strict=True):
        assert a["html"] == b["html"] == c["html"]
    assert slowly[len(CASES)]["lost"] == [], "what is there stays while the rest grows"


def test_no_text_becomes_markup_that_acts(chat: Chat) -> None:
    """Only plain elements are made, and links to the web and to mail; all else is shown."""
    evil, run = "//evil.example/x", "<script>alert(1)</script>"
    texts = [
        f"<img src={evil} onerror=alert(1)>", run, f"<script src={evil}></script>", "<svg onload=alert(1)>",
        f"<iframe src={evil}></iframe>", f"<base href={evil}>", f"<style>@import url({evil})</style>",
        f'<meta http-equiv="refresh" content="0;url={evil}">', "<a onclick=alert(1)>", f"![x](https:{evil})",
        f"[x][y]\n\n![z][y]\n\n[y]: https:{evil}", f"[![x](https:{evil})](https:{evil})",
        f'```"><img/src=x/onerror=alert(1)>\n</code>{run}', f"`{run}`", f"| {run} |\n|-|\n| {run}",
        '[x](http://a.b "\\" onclick=alert(1)")', '[x](http://a.b/"onclick=alert(1))', f"<!-- {run} -->",
        "<http://a.b/\"onclick='alert(1)'>", "&lt;script&gt;alert(1)&lt;/script&gt;", f"<![CDATA[{run}]]>",
    ]  # fmt: skip
    links = [
        "javascript:alert(1)", "JaVaScRiPt:alert(1)", "javascript&colon;alert(1)", "&#106;avascript:alert(1)",
        "java\\script:alert(1)", "%6aavascript:alert(1)", f"data:text/html,{run}", "vbscript:x", "blob:x",
        "file:///etc/passwd", "ftp://x", evil, "/etc", "x", "#x", "\x01javascript:alert(1)",
    ]  # fmt: skip
    links = [f"[a]({link}) [b](<{link}>) <{link}> ![c]({link})" for link in links]
    signs = [*"*_`[]()<>|#-+~:\\!&\"' \n\t\r\0\u2028\u202e\ud83d\ue000😀", *texts, *links]
    signs += ["```", "1. ", "- ", "> ", "|-|-|\n", "[x](http://a.b)", "\n\n", "](", "](<"]
    rng = random.Random(1)
    mixed = ["".join(rng.choices(signs, k=rng.randint(0, 40))) for _ in range(1000)]
    for text, found in zip(mixed + texts, render(chat, mixed + texts), strict=True):
        assert set(found["shapes"]) <= PLAIN, text
    assert all(set(found["shapes"]) == {"p"} for found in render(chat, links))
    bad = " ".join(texts[:2])
    chat.chat(bad, f"{bad}\n\n```\n{bad}\n```")
    chat.see(".reply code", bad)
    chat.page.reload()
    chat.see(".question .said", bad)
    chat.see("#title", re.compile("^<img src=//evil"))


def test_hostile_text_takes_no_quadratic_time(chat: Chat) -> None:
    units = [
        "*a **a ", "[", "[a](", "[a](<", "[a](b(c", "[a](http://b.c)", "` `` ", "`a``b", "> ", "- ", "1. ",
        "***a ", "_a b_ ", "a**b c* ", "<http:", "<a ", "\\", "* * ", "| ", "|-", "# ", "#", "\t", "\n", "*_",
        "> a\n", "```\n", "a\n", "- a\n", "  - a\n", "|a|b\n|-|-\n", "![[", "**a*_b__ ", '[a](b "', "😀*", "&",
    ]  # fmt: skip
    texts = [unit * (10_000 // len(unit)) + end for unit in units for end in ("", "*`]|")]
    for text, found in zip(texts, render(chat, texts), strict=True):
        assert found["milliseconds"] < 5000, text[:20]  # tens of milliseconds, in fact


def test_no_script_of_the_page_may_make_markup_of_text(chat: Chat) -> None:
    ways = [
        "document.body.innerHTML = 'x'", "document.write('x')",
        "new DOMParser().parseFromString('x', 'text/html')", "document.createElement('script').text = '1'",
    ]  # fmt: skip
    for number, way in enumerate(ways, 1):
        with chat.page.expect_event("console"):
            chat.page.evaluate(f"() => {{ try {{ {way} }} catch {{}} }}")
        assert len(chat.faults) >= number, way
    assert all("Trusted" in fault for fault in chat.faults), chat.faults
    chat.faults.clear()
    assert "http" not in (UI / "index.html").read_text(encoding="utf-8").replace("http-equiv", "")
