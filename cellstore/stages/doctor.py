"""Doctor: what is installed, and whether it works here."""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ..enums import DEFAULT_MODEL
from ..errors import CellstoreError, first_line
from ..jobs.workspace import open_workspace
from ..settings import EXTRAS, StoreSettings

CORE = ("sqlalchemy", "alembic", "duckdb", "pandas", "pyarrow", "numpy", "tifffile", "imagecodecs")
LARGEST = 500_000_000
"""Bytes of a database that is looked through; of a larger one that takes too long."""
DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``state``: ``ok``, ``absent`` (optional, not there) or ``broken``."""

    topic: str
    name: str
    state: str
    detail: str


@dataclass(frozen=True)
class DoctorResult:
    """All findings."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is broken; optional parts that are absent are not."""
        return all(finding.state != "broken" for finding in self.findings)


def doctor(settings: StoreSettings | None = None) -> DoctorResult:
    """Look at the installation and, if ``settings`` are given, at a store."""
    findings = [
        Finding("python", platform.python_version(), "ok", sys.executable),
        *(_module("core", module) for module in CORE),
        *_extras(),
        *_device(),
        *_weights(),
        *_store(settings),
    ]
    return DoctorResult(tuple(findings))


def _extras() -> Iterator[Finding]:
    missing = {
        extra: [name for name in modules if find_spec(name) is None]
        for extra, modules in EXTRAS.items()
    }
    for extra, absent in missing.items():
        if absent and extra == "segment-sam" and not missing["segment"]:
            yield Finding("extra", extra, "absent", "instead of segment, in its own environment")
        elif absent:
            detail = f"{', '.join(absent)} not installed: pip install 'cellstore[{extra}]'"
            yield Finding("extra", extra, "absent", detail)
        else:
            yield from (_module(f"extra {extra}", module) for module in EXTRAS[extra])


def _module(topic: str, name: str) -> Finding:
    # Imported for real: packages that do not fit together fail only then.
    try:
        importlib.import_module(name)
    except Exception as error:
        return Finding(topic, name, "broken", f"import fails: {first_line(error)}")
    try:
        found = version(DISTRIBUTIONS.get(name, name.replace("_", "-")))
    except PackageNotFoundError:
        found = "version unknown"
    return Finding(topic, name, "ok", found)


def _device() -> Iterator[Finding]:
    try:
        torch = importlib.import_module("torch")
    except Exception:
        return  # absent or broken: said under its extra
    if torch.cuda.is_available():
        yield Finding("device", "cuda", "ok", torch.cuda.get_device_name(0))
    else:
        threads = torch.get_num_threads()
        yield Finding("device", "cpu", "ok", f"{threads} threads; no GPU that torch can use")


def _weights() -> Iterator[Finding]:
    from ..analysis.segmentation import find_model, installed_generation

    if installed_generation() == 4:  # which has networks of its own
        return
    try:
        files = find_model(DEFAULT_MODEL)
        shown = f"{files.network} ({files.sha256[:12]})"
        yield Finding("weights", DEFAULT_MODEL, "ok", shown)
    except CellstoreError as error:
        yield Finding("weights", DEFAULT_MODEL, "broken", str(error))


def _store(settings: StoreSettings | None) -> Iterator[Finding]:
    if settings is None:
        yield Finding("store", "none here", "absent", "make one with: cellstore init")
        return
    try:
        workspace = open_workspace(settings)
    except CellstoreError as error:
        yield Finding("store", str(settings.root), "broken", str(error))
        return
    shown = workspace.database.shown
    yield Finding("store", str(settings.root), "ok", shown)
    from .verify import FROM_BACKUP, schema_problems

    try:
        broken = schema_problems(workspace.database)
        if (size := workspace.database.size()) <= LARGEST:
            broken += [
                f"{reason}. {FROM_BACKUP}" for reason in workspace.database.damage(quick=True)
            ]
        else:
            detail = f"{size / 1e9:.1f} GB, too large to be looked through here: cellstore verify"
            yield Finding("database", shown, "ok", detail)
    except CellstoreError as error:
        broken = [str(error)]
    workspace.database.close()
    for reason in broken:
        yield Finding("database", shown, "broken", reason)
