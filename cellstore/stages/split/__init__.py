"""Split: who trains, who validates, who tests; as rows that never change."""

from __future__ import annotations

from .check import check_split as check_split
from .check import check_tables as check_tables
from .create import create_folds as create_folds
from .create import create_split as create_split
from .facts import CheckResult as CheckResult
from .facts import Deleted as Deleted
from .facts import SplitLine as SplitLine
from .facts import SplitResult as SplitResult
from .imported import import_split as import_split
from .remove import delete_split as delete_split
from .remove import find_deletable as find_deletable
from .show import list_splits as list_splits
from .show import show_split as show_split
