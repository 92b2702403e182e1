"""Every error that cellstore raises on purpose.

A message is one or two sentences: what is wrong, then what to do next.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

SHOWN_NAMES = 8


class CellstoreError(Exception):
    """Base of all errors below. ``exit_code`` is what the command line ends with."""

    exit_code = 2


class UserInputError(CellstoreError, ValueError):
    """Something typed or handed over cannot be used."""


class UnknownNameError(UserInputError, LookupError):
    """No such run, image, split, model, label, table or column."""

    @classmethod
    def of(cls, kind: str, name: object, known: Iterable[object]) -> UnknownNameError:
        """The error for an unknown ``name``, with the known ones: all of a few or the nearest."""
        names = [str(item) for item in known]
        lower = {item.lower(): item for item in names}
        close = difflib.get_close_matches(str(name).lower(), lower, n=3, cutoff=0.5)
        near = [lower[item] for item in close] or names[:5]
        near = names if len(names) <= SHOWN_NAMES else near
        more = f", and {len(names) - len(near)} more" if len(names) > len(near) else ""
        hint = f" Known: {', '.join(near)}{more}." if near else f" There is no {kind} yet."
        meant = f" Did you mean {lower[close[0]]}?" if close else ""
        return cls(f"Unknown {kind} {str(name)!r}.{hint}{meant}")


class BadTableError(UserInputError):
    """A table that is empty, lacks columns, or is not what its name says."""


class QueryError(UserInputError):
    """An SQL question that is wrong, or that would do more than read.

    ``line``: the line of the question that is wrong, from 1, where that is known.
    """

    line: int | None = None


class ImageError(CellstoreError, ValueError):
    """Pixels that cannot be used."""


class StoreError(CellstoreError, RuntimeError):
    """The store itself is missing, of another version, or out of reach."""


class StoreNotFoundError(StoreError):
    """No store in this folder or upwards."""


class SchemaError(StoreError):
    """The schema of the store and of the library differ."""


class DatabaseError(StoreError):
    """The database cannot be reached, or refused."""


class ConflictError(DatabaseError):
    """Two transactions waited for each other, and this one was undone: do it again."""


class StorageError(CellstoreError, OSError):
    """A file of the store could not be written, read, or has changed."""


class MissingExtraError(CellstoreError, ImportError):
    """An optional part of cellstore is not installed."""

    @classmethod
    def of(cls, module: str, extra: str) -> MissingExtraError:
        """The error for ``module`` that comes with the extra ``extra``."""
        return cls(
            f"This needs {module}, which is not installed. "
            f"Install it with: pip install 'cellstore[{extra}]'"
        )


class TeamError(CellstoreError, RuntimeError):
    """One of several processes that train together is gone."""

    exit_code = 1


class RunCancelledError(CellstoreError, RuntimeError):
    """A run was cancelled by ``cellstore cancel``."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """Return what ``error`` says first, or what it is if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def some_of(names: Sequence[object], most: int = 5) -> str:
    """Return the first ``names`` with commas between, and ``...`` where there are more."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def by_number(name: object) -> list[Any]:
    """Return what names with doses are sorted by: 3 uM comes before 10 uM."""
    parts = re.split(r"(\d+(?:\.\d+)?)", str(name))
    return [float(part) if at % 2 else part for at, part in enumerate(parts)]
