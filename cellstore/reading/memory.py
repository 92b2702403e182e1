"""How much memory a machine has for what is read."""

from __future__ import annotations

import os
from pathlib import Path

MOST = 64 << 30
"""No more than this is kept unless asked for: a plate of 384 wells as windows takes some 20 GB."""

_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def default_memory() -> int:
    """Bytes of cells to keep between epochs: a quarter of what this process may have."""
    return min(memory_there() // 4, MOST)


def memory_there() -> int:
    """Bytes of memory of this machine, or of the container that this process is in."""
    return min([_physical(), *_limits()])


def _physical() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 4 << 30  # a system that does not tell


def _limits() -> list[int]:
    texts = [path.read_text().strip() for path in _LIMITS if path.is_file()]
    return [int(text) for text in texts if text.isdigit()]
