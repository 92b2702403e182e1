"""The page of a lineage: a picture, and the facts of the audit as tables."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...artifacts import write_atomically
from ...drawing.page import render
from ...extras import need
from ...runs import Workspace
from ...settings import check_not_of_a_store
from .facts import ArtifactAudit, CellAudit, ImageAudit, RunAudit, WellAudit
from .figures import draw_lineage
from .graph import lineage_of

ROWS = 200
"""Rows of a table on the page; the rest are counted."""

Audited = ImageAudit | WellAudit | CellAudit | RunAudit | ArtifactAudit


def write_lineage(workspace: Workspace, audit: Audited, path: Path) -> Path:
    """Write the page, one file that needs nothing else, and return where it is.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
        StorageError: the file cannot be written.
    """
    need("report")
    lineage = lineage_of(workspace, audit)
    content = {
        "title": _title(audit),
        "picture": draw_lineage(lineage),
        "boxes": len(lineage.nodes),
        "facts": _facts(audit),
        "tables": _tables(audit),
        "made_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "version": version("cellstore"),
        "database": workspace.database.shown,
    }
    path = path.resolve()
    check_not_of_a_store(path)
    write_atomically(path, render(__package__, content).encode("utf-8", "replace"))
    return path


def _title(audit: Audited) -> str:
    if isinstance(audit, ImageAudit):
        return f"Image {audit.plate}/{audit.well}/{audit.site}"
    if isinstance(audit, WellAudit):
        return f"Well {audit.plate}/{audit.well}"
    if isinstance(audit, CellAudit):
        return f"Cell {audit.cell_id} of {audit.image}"
    if isinstance(audit, RunAudit):
        return f"Run {audit.run.id}: {audit.run.stage}"
    return f"File {audit.known[0].name}"


def _facts(audit: Audited) -> list[tuple[str, str]]:
    """The values of the audit that are no lists."""
    found = []
    for name, value in asdict(audit).items():
        if isinstance(value, dict):
            found += [(f"{name} {key}", _text(item)) for key, item in value.items()]
        elif not isinstance(value, list | tuple):
            found.append((name, _text(value)))
    return [(name.replace("_", " "), text) for name, text in found]


def _tables(audit: Audited) -> list[dict[str, Any]]:
    """The lists of records of the audit, each as a table."""
    tables = []
    for name, value in asdict(audit).items():
        if not isinstance(value, list | tuple) or not value or not isinstance(value[0], dict):
            continue
        heads = list(value[0])
        rows = [[_text(row[head]) for head in heads] for row in value[:ROWS]]
        title = name.replace("_", " ")
        heads = [head.replace("_", " ") for head in heads]
        tables.append(
            {"title": title, "heads": heads, "rows": rows, "more": len(value) - len(rows)}
        )
    return tables


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        shown = "; ".join(_text(item) for item in value[:12])
        return f"{shown}; and {len(value) - 12} more" if len(value) > 12 else shown
    return f"{value:.6g}" if isinstance(value, float) else str(value)
