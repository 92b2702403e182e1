"""Where the real public data lie; tests that want them skip when they are absent."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def real_data(name: str) -> Path:
    """The path of ``name`` below the real data; skips the test where it is absent."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"real data {name} is absent")
    return path
