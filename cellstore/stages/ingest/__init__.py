"""Ingest: tables, indexes, folders and databases of others become rows of the store."""

from .account import Issue, UndoneError
from .preview import Preview, PreviewRow, preview
from .stage import IngestResult, ingest

__all__ = [
    "IngestResult",
    "Issue",
    "Preview",
    "PreviewRow",
    "UndoneError",
    "ingest",
    "preview",
]
