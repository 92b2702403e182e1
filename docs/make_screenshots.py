"""Write docs/pictures/ from the pages of the explorer: python docs/make_screenshots.py STORE.

STORE is that of ``make demo``. Needs Playwright and Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import imagecodecs
from playwright.sync_api import Page, sync_playwright

TARGET = Path(__file__).with_name("pictures")
WIDTH, HEIGHT, QUALITY = 1280, 800, 70
SERVE = """
import sys
from pathlib import Path
from cellstore.store import Store
with Store.open(Path(sys.argv[1])) as store:
    store.explore(port=0, write=True, ready=lambda address: print(address, flush=True))
"""
COMPLETE = """() => !document.querySelector("[aria-busy=true]")
    && [...document.images].every((image) => image.complete)"""


def main() -> None:
    """Serve the store, and draw its pages in a browser."""
    TARGET.mkdir(exist_ok=True)
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    words = [sys.executable, "-c", SERVE, sys.argv[1]]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip().rstrip("/")
        with sync_playwright() as playwright:
            arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
            browser = playwright.chromium.launch(executable_path=path, args=arguments)
            size: Any = {"width": WIDTH, "height": HEIGHT}
            draw(browser.new_context(viewport=size, base_url=address).new_page())
            browser.close()
    finally:
        server.terminate()
        server.wait(20)


def draw(page: Page) -> None:
    """Go through the pages as a person would, by their links, and keep a picture of each."""
    keep(page, "home", "/")
    plate = links(page, "/plates", "/plate/")[0]
    keep(page, "plate", plate)
    keep(page, "accuracy", f"{plate}?colour=accuracy")
    well = links(page, "/cells?result=wrong&sort=-probability", "/well/")
    field = links(page, "/cells?result=wrong&sort=-probability", "/field/")[0]
    keep(page, "cells", "/cells?result=wrong&sort=-probability")
    keep(page, "field", field)
    keep(page, "well", (well or links(page, field, "/well/"))[0])
    keep(page, "scatter", "/scatter?colour=treatment")
    network = links(page, "/runs", "/run/")[0]
    keep(page, "run", network)
    keep(page, "lineage", links(page, network, "/lineage/")[0])
    keep(page, "sql", "/questions/confident-mistakes")
    keep(page, "annotations", "/annotations")


def links(page: Page, path: str, start: str) -> list[str]:
    """The addresses of a kind on a page."""
    page.goto(path, wait_until="networkidle")
    found = page.locator(f'main a[href^="{start}"]')
    return [
        address for at in range(found.count()) if (address := found.nth(at).get_attribute("href"))
    ]


def keep(page: Page, name: str, path: str) -> None:
    """Keep what the window shows of a page, when all of it is there."""
    answer = page.goto(path, wait_until="networkidle")
    assert answer is not None
    assert answer.ok, (path, answer.status)
    page.wait_for_function(COMPLETE)
    page.wait_for_timeout(300)
    pixels = imagecodecs.png_decode(page.screenshot(animations="disabled"))
    data = imagecodecs.webp_encode(pixels[..., :3].copy(), level=QUALITY, lossless=False)
    (TARGET / f"{name}.webp").write_bytes(data)
    sys.stdout.write(f"{name:12} {len(data) / 1024:6.0f} kB  {path}\n")


if __name__ == "__main__":
    main()
