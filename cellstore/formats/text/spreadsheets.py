"""Texts that a spreadsheet would run as formulas, made harmless."""

from __future__ import annotations

import re
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

_FORMULA = "^[=+\\-@\t\r]"
"""What a spreadsheet takes for the beginning of a formula."""

Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)


def disarmed(rows: Rows) -> Rows:
    """Return a table or batch with a ' before every text, and name, that begins a formula."""
    for index, field in enumerate(rows.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            texts = pc.replace_substring_regex(rows.column(index), f"({_FORMULA})", r"'\1")
            rows = rows.set_column(index, field, texts)
    return rows.rename_columns([disarmed_name(name) for name in rows.schema.names])


def disarmed_name(name: str) -> str:
    """Return a text, for example the name of a column, as :func:`disarmed` has it."""
    return re.sub(f"({_FORMULA})", r"'\1", name)
