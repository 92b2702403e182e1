"""The last line against a question that takes too much: what DuckDB itself does not hold to.

DuckDB does not count a text while a function makes it (``repeat('x', 4000000000)``), and does not
hear that it shall stop while it plans. Here the operating system refuses memory, and a clock ends
the program. Only for a command of its own: both are about the whole process.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cellstore.query.guard import Limits

from .context import say

GRACE_SECONDS = 15.0
SLACK_MB = 1536
"""What the rest of the program may take: Arrow, the tables that are read live, new snapshots."""

TOO_LONG = 2


@contextmanager
def confined(limits: Limits, spill: Path) -> Iterator[None]:
    """Hold this process to ``limits``, the memory with some slack, the time with some grace.

    ``spill``: what is left in it by this process is removed if the clock ends it.
    """
    before = set(_folders(spill))
    clock = threading.Timer(limits.seconds + GRACE_SECONDS, _end, (limits, spill, before))
    clock.daemon = True
    with _memory(limits.memory_mb + SLACK_MB):
        clock.start()
        try:
            yield
        finally:
            clock.cancel()


def _folders(spill: Path) -> list[Path]:
    with suppress(OSError):
        return list(spill.iterdir())
    return []


def _end(limits: Limits, spill: Path, before: set[Path]) -> None:
    say(
        f"Error: The question took longer than {limits.seconds:g} seconds and did not stop when "
        "told to, so the program ends. Ask for less, or allow more time with --seconds."
    )
    own = [folder for folder in _folders(spill) if folder.name.startswith(f"{os.getpid()}-")]
    for folder in set(own) - before:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stdout.flush()
    os._exit(TOO_LONG)


@contextmanager
def _memory(megabytes: int) -> Iterator[None]:
    if sys.platform != "linux":  # elsewhere the limit is not kept, or there is none
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = _taken() + (megabytes << 20)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _taken() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    return 0
