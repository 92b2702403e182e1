"""The bytes that files of a known kind begin with."""

from __future__ import annotations

SQLITE = b"SQLite format 3\0"
PARQUET = b"PAR1"
