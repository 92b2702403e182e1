"""How long the pages of the explorer take in a browser, on a store of 5 million cells.

python benchmarks/explore_speed.py [--store FOLDER] [--plates 10] [--sites 8]

The store is made by ``explore_store.py`` where it is not there yet. Each page is opened twice in
Chromium: the first time it is asked for at all, and again. Of a page the time is that of its
answer; where the target is about pictures or a map, that until they are drawn. The last line of
each block is a fixed page of the same server, which asks nothing of the store: what this machine
and this browser take anyway.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

SERVE = """
import sys
from pathlib import Path
from cellstore.store import Store
with Store.open(Path(sys.argv[1])) as store:
    store.explore(port=0, ready=lambda address: print(address, flush=True))
"""
WATCH = """
    // When the last part of the page was filled in or drawn.
    window.settled = 0;
    new MutationObserver((changes) => {
      if (changes.some((change) => !change.target.hasAttribute("aria-busy")))
        window.settled = performance.now();
    }).observe(document, {subtree: true, attributes: true, attributeFilter: ["aria-busy"]});
"""
DRAWN = """() => Math.max(window.settled, ...["navigation", "resource"].flatMap(
    (kind) => performance.getEntriesByType(kind).map((entry) => entry.responseEnd))) / 1000"""
"""When the last picture had come, and the last part was filled in, in seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--store", type=Path, default=Path("explore-speed/store"))
    parser.add_argument("--plates", type=int, default=10)
    parser.add_argument("--sites", type=int, default=8)
    args = parser.parse_args()
    if not (args.store / "cellstore.toml").exists():
        from explore_store import make_store

        print(f"{make_store(args.store, args.plates, args.sites):,} cells", flush=True)
    with serving(args.store) as (address, process), browsing() as browser:
        measure(address, process, browser)


@contextmanager
def serving(store: Path) -> Iterator[tuple[str, int]]:
    """Serve the store in a process of its own; yield its address and number once it is warm."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(store)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        began, before = time.perf_counter(), -1.0
        while (now := cpu_seconds(server.pid)) - before > 0.05:
            before = now
            time.sleep(2.0)
        print(f"warm after some {time.perf_counter() - began:.0f} s, {now:.1f} s of CPU")
        yield address.rstrip("/"), server.pid
    finally:
        server.terminate()
        server.wait(20)


@contextmanager
def browsing() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def memory(process: int, what: str = "VmRSS") -> float:
    """Return the memory of a process in MB; ``VmHWM`` is the most it ever had."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


class Tab:
    """A tab of the browser, in which nothing is kept from page to page."""

    def __init__(self, browser: Any, address: str) -> None:
        self.address = address
        self.page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
        self.page.add_init_script(WATCH)

    def open(self, path: str) -> tuple[float, float]:
        """Open a page; return the seconds until its answer was there, and until all was drawn."""
        found = self.page.goto(self.address + path, wait_until="commit")
        if found.status != 200:
            raise LookupError(f"{found.status}")
        self.page.wait_for_load_state("networkidle", timeout=60_000)
        self.page.wait_for_function("!document.querySelector('[aria-busy=true]')", timeout=60_000)
        script = "(({responseEnd, requestStart}) => (responseEnd - requestStart) / 1000)"
        answer = f"{script}(performance.getEntriesByType('navigation')[0])"
        return float(self.page.evaluate(answer)), float(self.page.evaluate(DRAWN))

    def answer(self, path: str) -> float:
        """Return the seconds until the answer was there."""
        return self.open(path)[0]

    def drawn(self, path: str) -> float:
        """Return the seconds until all was drawn."""
        return self.open(path)[1]


def measure(address: str, process: int, browser: Any) -> None:
    tab = Tab(browser, address)
    tab.answer("/static/page.css")  # the browser itself has started
    plates = links(tab, "/plates", "/plate/")
    plate, other = plates[0], plates[1]
    well = links(tab, plate, "/well/")[40]
    fields = links(tab, well, "/field/")[:2]
    runs = links(tab, "/runs", "/run/") or ["/run/8"]
    answers = [
        *("/", "/plates", plate, f"{other}?colour=accuracy", well, fields[0], "/cells"),
        *("/cells?result=wrong&sort=-probability", "/scatter", "/runs", *runs[:2], "/sql"),
        *("/sql?q=SELECT+plate,+count(*)+FROM+image_table+GROUP+BY+plate", "/questions/plates"),
        *("/lineage/run/8", "/annotations", "/search?q=BR00117003"),
    ]
    fixed = "/static/page.css"
    head("answer of a page", 0.3)
    for path in (*answers, fixed):
        line(path, partial(tab.answer, path), process, 0.3)
    head("a plate map, drawn", 0.5)
    colours = ("feature", "profile", "accuracy", "vote", "cells", "flags", "verdict")
    for path in (*(f"{plate}?colour={name}" for name in colours), fixed):
        line(path, partial(tab.drawn, path), process, 0.5)
    head("pictures, drawn", 0.7)
    galleries = ("/cells", "/cells?control=negative", "/cells?result=wrong&sort=-probability")
    for path in (well, *galleries, *fields, "/scatter", fixed):
        line(path, partial(tab.drawn, path), process, 0.7)
    beside(tab, browser, address, process)
    print(
        f"\nmemory of the server: {memory(process):.0f} MB now, "
        f"{memory(process, 'VmHWM'):.0f} MB at most (target 700)"
    )


def links(tab: Tab, path: str, start: str) -> list[str]:
    """The addresses of a kind on a page, each once."""
    try:
        tab.open(path)
    except LookupError:
        return []
    script = (
        f"[...document.querySelectorAll('a[href^=\"{start}\"]')].map((a) => a.getAttribute('href'))"
    )
    return list(dict.fromkeys(address.split("?")[0] for address in tab.page.evaluate(script)))


def head(words: str, target: float) -> None:
    print(f"\n{f'{words} (target {target:g} s)':48} {'first':>7} {'again':>7} {'CPU':>6} {'MB':>5}")


def line(name: str, work: Callable[[], float], process: int, target: float) -> None:
    """Print the first and the second time, and what CPU the server took for the first."""
    try:
        before = cpu_seconds(process)
        first = work()
        cpu = cpu_seconds(process) - before
        again = work()
    except LookupError as error:
        print(f"{name:48.48} {error}")
        return
    late = "  late" if first > target else ""
    shown = f"{first:7.2f} {again:7.2f} {cpu:6.2f} {memory(process):5.0f}"
    print(f"{name:48.48} {shown}{late}", flush=True)


def beside(tab: Tab, browser: Any, address: str, process: int) -> None:
    """Pages while a slow question is answered, and that it ends when its tab is closed."""
    slow = Tab(browser, address)
    slow.answer("/sql")
    question = "SELECT+count(*)+FROM+cells+AS+a,+cells+AS+b+WHERE+sin(a.id)%2Bsin(b.id)>3"
    # Asked as the page asks it, and left while it is answered.
    slow.page.evaluate(f"void fetch('/sql/answer?q={question}').catch(() => 0)")
    time.sleep(1.0)
    head("a page while a question of minutes is answered", 0.3)
    for path in ("/", "/plates", "/cells"):
        line(path, partial(tab.answer, path), process, 0.3)
    before = cpu_seconds(process)
    time.sleep(1.0)
    busy = cpu_seconds(process) - before
    slow.page.close()
    time.sleep(1.5)
    before = cpu_seconds(process)
    time.sleep(1.0)
    after = cpu_seconds(process) - before
    print(f"CPU of the server: {busy:.1f} s a second, {after:.1f} after its tab was closed")


if __name__ == "__main__":
    main()
