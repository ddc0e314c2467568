"""Opens a report in headless Chromium as on a desk and on a phone, holds it to what it promises, and takes pictures.

    python tests/app/browser/report.py outputs/report.html outputs/pictures

The page asks for nothing, says nothing, is no wider than the window, and every plot has a name and labelled axes.
"""

import argparse
from pathlib import Path

from driver import DESK, PHONE, chromium
from playwright.sync_api import Request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("pictures", type=Path, help="folder for desk.png and phone.png")
    options = parser.parse_args()
    options.pictures.mkdir(parents=True, exist_ok=True)
    address = options.page.absolute().as_uri()
    with chromium() as browser:
        for name, size in (("desk", DESK), ("phone", PHONE)):
            page = browser.new_context(viewport=size).new_page()
            asked: list[str] = []
            said: list[str] = []

            def note(request: Request, asked: list[str] = asked) -> None:
                if not request.url.startswith("data:"):
                    asked.append(request.url)

            page.on("request", note)
            page.on("console", lambda line, said=said: said.append(line.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.goto(address)
            assert asked == [address], asked
            assert said == [], said
            assert page.evaluate("document.documentElement.scrollWidth") == size["width"], "it is wider than the window"
            assert page.evaluate("[...document.querySelectorAll('svg')].every(plot => plot.ariaLabel)")
            assert page.evaluate("[...document.images].every(picture => picture.naturalWidth > 0 && picture.alt)")
            plots, pictures = page.locator("svg").count(), page.locator("img").count()
            page.screenshot(path=options.pictures / f"{name}.png", full_page=True)
            print(f"{name}: {plots} plots, {pictures} pictures, nothing asked for, no wider than {size['width']} px")


if __name__ == "__main__":
    main()
