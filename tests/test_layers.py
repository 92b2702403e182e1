"""Packages stay apart: what is light stays light, and every module has a name of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cellstore import settings
from cellstore.errors import MissingExtraError

ROOT = Path(__file__).parents[1]
MODULES = [
    path
    for folder in ("cellstore", "cli", "migrations")
    for path in (ROOT / folder).rglob("*.py")
    if "versions" not in path.parts
]
HEAVY = ("torch", "cellpose", "skimage", "sklearn", "lightning", "matplotlib", "torchvision")


def imported_by(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_the_core_needs_no_extra():
    stages = sorted(path.stem for path in (ROOT / "cellstore" / "stages").iterdir())
    stages = [stage for stage in stages if not stage.startswith("_")]
    lines = ["import cellstore, cellstore.store, cellstore.demo, cellstore_cli.app"]
    lines += [f"import cellstore.stages.{stage}" for stage in stages]
    found = imported_by("\n".join(lines))
    assert "cellstore.stages.train" in found
    assert found.isdisjoint(HEAVY)


def test_the_command_line_starts_light():
    found = imported_by("import cellstore, cellstore.store, cellstore_cli.app")
    assert "cellstore_cli.app" in found
    assert found.isdisjoint({*HEAVY, "pandas", "numpy", "duckdb", "pyarrow", "sqlalchemy", "rich"})


def test_measuring_needs_numpy_only():
    found = imported_by("import cellstore.analysis.features")
    assert "numpy" in found
    assert found.isdisjoint({*HEAVY, "scipy", "numba", "pandas", "pyarrow"})


def test_no_two_modules_share_a_name():
    names = [path.name for path in MODULES if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("extra", settings.EXTRAS)
def test_a_missing_extra_says_how_to_get_it(monkeypatch, extra: str):
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'cellstore\[{extra}\]'"):
        settings.need(extra)


def test_every_extra_is_declared():
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(settings.EXTRAS) <= set(declared["optional-dependencies"])
