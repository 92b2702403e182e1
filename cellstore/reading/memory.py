"""How much memory a machine has for what is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MOST = 64 << 30
"""No more than this is kept unless asked for: a plate of 384 wells as windows takes some 20 GB."""

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def default_memory() -> int:
    """Bytes of cells to keep between epochs: a quarter of what this process may have."""
    return min(memory_there() // 4, MOST)


def memory_there() -> int:
    """Bytes of memory of this machine, or of the container or job that this process is in."""
    return min([_physical(), *_limits()])


def _physical() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 4 << 30  # a system that does not tell


def _limits() -> list[int]:
    """The limits of the control groups of this process, each within the ones before."""
    texts = [path.read_text().strip() for path in _limit_files() if path.is_file()]
    return [int(text) for text in texts if text.isdigit()]


def _limit_files() -> Iterator[Path]:
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else []
    for _, controllers, place in (line.split(":", 2) for line in lines):
        if controllers == "":  # version 2: one tree
            root, name = GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(place.lstrip("/"))
        yield from (root / part / name for part in (group, *group.parents))
