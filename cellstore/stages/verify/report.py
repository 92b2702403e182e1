"""What a look at all files of a store found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A file that is not as it should be; ``path`` is relative to the artifacts folder."""

    path: str
    reason: str


@dataclass(frozen=True)
class VerifyResult:
    """What was found. ``orphans`` are files that no row names; ``young`` may still get a row.

    ``segmentations`` are those whose masks are known, ``feature_files`` the files of feature sets.
    """

    files: int
    segmentations: int
    problems: tuple[Problem, ...]
    orphans: tuple[str, ...]
    young: int
    removed: int
    feature_files: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong (orphans that were removed are not)."""
        return not self.problems and len(self.orphans) == self.removed
