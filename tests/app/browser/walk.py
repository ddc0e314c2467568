"""A walk through a running demo in headless Chromium: python tests/app/browser/walk.py URL FOLDER [PART ...]

Needs `pip install playwright`, Debian's chromium, and a server started with `sparse-dit demo --places 2`. Every part
checks what it sees and ends with a line; FOLDER gets the screenshots, to be looked at.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from driver import PHONE, Visitor, chromium, shoot, visit
from playwright.sync_api import Browser


def first(browser: Browser, url: str, out: Path) -> list[Visitor]:
    """What somebody sees who opens the page and presses Generate, and how long it takes."""
    start = time.monotonic()
    visitor = visit(browser, url)
    stands = time.monotonic() - start
    paint = visitor.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000")
    print(f"first picture after {paint:.2f} s, the page stands after {stands:.2f} s")
    visitor.page.locator("#go").click()
    print(f"the comparison as the page proposes it took {visitor.wait('is done'):.0f} s")
    shoot(visitor, out / "first.png")
    assert stands <= 3, stands
    return [visitor]


def keyboard(browser: Browser, url: str, out: Path) -> list[Visitor]:
    """A run and a look at it without a pointer."""
    visitor = visit(browser, url)
    page = visitor.page

    def tab_to(selector: str) -> None:
        for _ in range(80):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.closest(selector) !== null", selector):
                return
        raise AssertionError(f"{selector} is not reached by Tab")

    def fill(selector: str, value: str) -> None:
        tab_to(selector)
        page.keyboard.press("Control+a")
        page.keyboard.type(value)

    fill("#prompt", "a small striped blue triangle moving up over a dark wall")
    fill("#dense-steps", "1")
    fill("#steps", "2")
    tab_to("button.label-wrap")
    page.keyboard.press("Enter")
    for name, value in (("width", "64"), ("height", "64"), ("frames", "9")):
        fill(f"#{name}", value)
    tab_to("#go")
    shoot(visitor, out / "keyboard-focus.png", whole=False)
    page.keyboard.press("Enter")
    visitor.wait("is done")
    tab_to("#both")
    page.keyboard.press("Enter")
    tab_to("[role=tab]")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#mask img')?.naturalWidth > 0")
    before = page.locator("#mask img").get_attribute("src")
    tab_to("#query-column input[type=range]")
    for _ in range(2):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("before => document.querySelector('#mask img')?.getAttribute('src') !== before", arg=before)
    shoot(visitor, out / "keyboard.png")
    print("a run was made and looked into by keys alone")
    return [visitor]


def generate(browser: Browser, url: str, out: Path) -> list[Visitor]:
    """A comparison, the frame slider, the handle between dense and sparse, a query point, light and dark, phone."""
    visitor = visit(browser, url)
    page = visitor.page
    shoot(visitor, out / "start.png")
    visitor.small(None, steps=6)
    visitor.set("dense-steps", 2)
    page.locator("#go").click()
    print(f"compared in {visitor.wait('is done'):.0f} s: {page.locator('#numbers .told').inner_text()}")
    page.wait_for_function("document.querySelectorAll('#clips video').length === 2")
    shoot(visitor, out / "frame.png")

    videos = "[...document.querySelectorAll('#clips video')]"
    page.evaluate(f"{videos}[1].currentTime = 0.3; {videos}[1].pause()")
    page.wait_for_timeout(800)
    times = page.evaluate(f"{videos}.map(video => [video.currentTime, video.paused])")
    assert all(paused for _, paused in times), times
    assert abs(times[0][0] - times[1][0]) < 0.1, times

    before = page.locator("#difference img").get_attribute("src")
    page.locator("#frame input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "before => document.querySelector('#difference img')?.getAttribute('src') !== before", arg=before
    )
    page.locator("#slider").scroll_into_view_if_needed()
    before, box = page.locator("#slider").screenshot(), page.locator("#slider").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2, steps=5)
    page.mouse.up()
    assert page.locator("#slider").screenshot() != before, "the handle did not move"
    shoot(visitor, out / "slider.png")

    page.get_by_role("tab", name="Inside the model").click()
    # A click on a picture that is not there yet has no place in it.
    for name in ("mask", "strip"):
        page.wait_for_function("name => document.querySelector(`#${name} img`)?.naturalWidth > 0", arg=name)
    before = page.locator("#mask img").get_attribute("src")
    row = page.locator("#query-row input[type=number]").input_value()
    page.locator("#mask img").click(position={"x": 30, "y": 30})
    page.wait_for_function("before => document.querySelector('#mask img')?.getAttribute('src') !== before", arg=before)
    assert page.locator("#query-row input[type=number]").input_value() != row
    shoot(visitor, out / "inside.png")
    page.get_by_role("button", name="Light / dark").click()
    shoot(visitor, out / "inside-dark.png")
    page.get_by_role("tab", name="One frame").click()
    shoot(visitor, out / "frame-dark.png")
    page.set_viewport_size(PHONE)
    shoot(visitor, out / "phone-dark.png")
    page.get_by_role("button", name="Light / dark").click()
    for tab in ("One frame", "Inside the model", "Files"):
        page.get_by_role("tab", name=tab).click()
        shoot(visitor, out / f"phone-{tab.split()[0].lower()}.png")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], f"{tab} scrolls sideways"
    names = page.locator(".file-preview").inner_text().replace("\n", "")
    assert all(name in names for name in ("dense", "sparse", "side-by-side", "result", "recipe")), names
    return [visitor]


def stop(browser: Browser, url: str, out: Path) -> list[Visitor]:
    """A run is stopped, and the next one starts."""
    visitor = visit(browser, url)
    visitor.small(None, steps=30)
    visitor.page.locator("#go").click()
    visitor.wait("step 1")
    shoot(visitor, out / "running.png")
    visitor.page.locator("#stop").click()
    print(f"stopped in {visitor.wait('Stopped'):.1f} s")
    visitor.set("steps", 2)
    visitor.page.locator("#go").click()
    print(f"the next run took {visitor.wait('is done'):.0f} s")
    return [visitor]


def queue(browser: Browser, url: str, out: Path) -> list[Visitor]:
    """Two visitors take turns, a third is asked to come back, and each sees a run of its own."""
    one, two, three = (visit(browser, url) for _ in range(3))
    for visitor, seed in ((one, 11), (two, 22), (three, 33)):
        visitor.small(None, steps=3)
        visitor.set("seed", seed)
    one.page.locator("#go").click()
    one.wait("step")
    two.page.locator("#go").click()
    two.wait("1 ahead")
    three.page.locator("#go").click()
    three.wait("the server is busy")
    shoot(two, out / "in-line.png")
    shoot(three, out / "busy.png", whole=False)
    for visitor, seed in ((one, 11), (two, 22)):
        visitor.wait("is done")
        assert f"seed {seed}" in visitor.page.locator("#numbers").inner_text()
        assert visitor.page.locator("#gallery .thumbnail-item").count() == 1
    print("two visitors took turns, a third was asked to come back")
    return [one, two, three]


def wrong(browser: Browser, url: str, out: Path) -> list[Visitor]:
    """Input that is refused, in words, and the page goes on."""
    visitor = visit(browser, url)
    page = visitor.page
    good = "a large plain red circle moving right over a gray gradient"
    for name, value, back in (
        ("prompt", "", good),
        ("prompt", "<script>alert(1)</script>", good),
        ("density", 7, 0.25),
        ("steps", 4000, 3),
        ("seed", -4, 0),
    ):
        visitor.set(name, value)
        page.locator("#go").click()
        visitor.wait("Not possible")
        print(f"{name} {value!r}: {visitor.status()}")
        shoot(visitor, out / f"wrong-{name}.png", whole=False)
        visitor.set(name, back)
        page.locator("#status").evaluate("element => element.querySelector('p').remove()")
    return [visitor]


PARTS: dict[str, Callable[[Browser, str, Path], list[Visitor]]] = {
    "first": first,
    "keyboard": keyboard,
    "wrong": wrong,
    "generate": generate,
    "stop": stop,
    "queue": queue,
}


def main(url: str, folder: str, *parts: str) -> int:
    """Walks through the parts; 1 if a page said something bad or asked another host for anything."""
    out, bad = Path(folder), 0
    out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for name in parts or PARTS:
            for visitor in PARTS[name](browser, url, out):
                bad += len(visitor.spoken) + len(visitor.outside)
                print(f"{name}: console {visitor.spoken or 'silent'}, other hosts {visitor.outside or 'none'}")
                visitor.page.context.close()
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
