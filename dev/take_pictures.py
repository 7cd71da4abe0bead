"""Takes the pictures of the page that the README shows.

    python -m scripts.chat_web &            # of the models to be seen, in the folder of their runs
    python -m dev.take_pictures             # writes dev/pictures/*.png

Needs chromium (apt-get install chromium).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

QUESTIONS = ("Hello! Who are you?", "What is 12 + 30?", "Tell me a short story.")
SIZES = {"page": (1280, 800, 1), "phone": (390, 800, 2)}  # name -> width, height, scale
FOLDER = Path(__file__).parent / "pictures"


@dataclass
class Config:
    url: str = "http://127.0.0.1:8000"  # of the server
    chromium: str = "/usr/bin/chromium"  # the browser


def open_page(browser: Browser, name: str, scheme: Literal["light", "dark"], url: str) -> Page:
    width, height, scale = SIZES[name]
    size = ViewportSize(width=width, height=height)
    page = browser.new_page(viewport=size, device_scale_factor=scale, color_scheme=scheme)
    page.goto(url)
    page.locator("#model option").first.wait_for(state="attached")
    return page


def ask(page: Page, question: str) -> None:
    page.fill("#input", question)
    page.keyboard.press("Enter")
    for state in page.locator("#log > :last-child .state").all():
        expect(state).to_have_text(re.compile("tok/s"), timeout=120_000)


def main(cfg: Config) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=cfg.chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        for name in SIZES:
            for scheme in ("light", "dark"):
                page = open_page(browser, name, scheme, cfg.url)
                for question in QUESTIONS:
                    ask(page, question)
                page.screenshot(path=FOLDER / f"{name}-{scheme}.png")
        page = open_page(browser, "page", "light", cfg.url)
        page.click("#settingsButton")
        page.check("[name=odds]")
        page.click("#done")
        if page.is_enabled("#other"):
            page.select_option("#other", index=page.locator("#other option").count() - 1)
        ask(page, QUESTIONS[-1])
        page.locator(".token").nth(5).focus()
        page.screenshot(path=FOLDER / "compare.png")
        page.goto(f"{cfg.url}/runs")
        page.locator("section").first.wait_for()
        page.screenshot(path=FOLDER / "runs.png")


if __name__ == "__main__":
    main(tyro.cli(Config))
