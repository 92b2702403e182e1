"""Texts that a spreadsheet would run: names of compounds and files may begin like formulas."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

_FORMULA = "^([=+\\-@\t\r])"
"""What a spreadsheet takes for the beginning of a formula (OWASP, CSV injection)."""


def disarmed(table: pa.Table) -> pa.Table:
    """Return the table with a ' before texts, and names of columns, that begin like formulas."""
    for index, field in enumerate(table.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            texts = pc.replace_substring_regex(table.column(index), _FORMULA, r"'\1")
            table = table.set_column(index, field, texts)
    return table.rename_columns([re.sub(_FORMULA, r"'\1", name) for name in table.column_names])
