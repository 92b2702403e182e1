"""Ingest: tables, indexes, folders and databases of others become rows of the store."""

from .account import Issue, UndoneError
from .preview import Preview, PreviewRow, preview
from .refresh import RefreshResult, refresh
from .stage import IngestResult, ingest

__all__ = [
    "IngestResult",
    "Issue",
    "Preview",
    "PreviewRow",
    "RefreshResult",
    "UndoneError",
    "ingest",
    "preview",
    "refresh",
]
