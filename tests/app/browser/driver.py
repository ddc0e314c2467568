"""A headless Chromium on the page, with everything written down that the page says or asks for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}
SLOW = 900_000  # milliseconds


@dataclass
class Visitor:
    """A page and what it did.

    Attributes:
        page: the page, in a browser context of its own.
        spoken: errors and warnings of the console, uncaught errors, and answers from 400 on.
        outside: requests to other hosts than the server's.
    """

    page: Page
    spoken: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def field(self, name: str) -> Any:
        """The input of a component by its id on the page."""
        return self.page.locator(f"#{name} input, #{name} textarea").first

    def set(self, name: str, value: Any) -> None:
        """Types a value into a component and leaves it."""
        self.field(name).fill(str(value))
        self.field(name).blur()

    def choose(self, name: str, value: str) -> None:
        """Picks an entry of a dropdown."""
        self.field(name).click()
        self.page.get_by_role("option", name=value, exact=True).click()

    def small(self, model: str | None, steps: int = 3) -> None:
        """A run that is done soon."""
        if model:
            self.choose("model", model)
        self.set("steps", steps)
        self.page.get_by_text("Size, and a look inside").click()
        for name, value in (("width", 64), ("height", 64), ("frames", 9)):
            self.set(name, value)

    def status(self) -> str:
        """What the page says under its buttons."""
        return self.page.locator("#status").inner_text()

    def wait(self, text: str, timeout: float = SLOW) -> float:
        """Waits until the status holds a text; seconds it took."""
        start = time.monotonic()
        self.page.wait_for_function(
            "text => document.querySelector('#status')?.innerText.includes(text)", arg=text, timeout=timeout
        )
        return time.monotonic() - start


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium of the system."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def visit(browser: Browser, url: str, size: Any = None, dark: bool = False) -> Visitor:
    """Opens the page in a context of its own and waits until it stands."""
    context = browser.new_context(
        viewport=size or DESK, color_scheme="dark" if dark else "light", device_scale_factor=1
    )
    visitor = Visitor(context.new_page())
    page, host = visitor.page, urlsplit(url).netloc
    page.on("console", lambda line: visitor.spoken.append(line.text) if line.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: visitor.spoken.append(f"uncaught: {error}"))

    def answered(response: Any) -> None:
        if response.status >= 400:
            visitor.spoken.append(f"{response.status} {response.url}")

    page.on("response", answered)

    def asked(request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.netloc != host:
            visitor.outside.append(request.url)

    page.on("request", asked)
    page.goto(url)
    page.locator("#go").wait_for()
    return visitor


def shoot(visitor: Visitor, file: Path, whole: bool = True) -> None:
    """A picture of the page."""
    visitor.page.wait_for_timeout(600)
    visitor.page.screenshot(path=file, full_page=whole)
