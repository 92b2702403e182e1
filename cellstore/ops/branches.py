"""What a network can look at. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from cellstore.errors import UnknownNameError, UserInputError

MASK, FLOW, TABULAR = BRANCHES = ("mask", "flow", "tabular")
"""A cell's mask crop, its flow crop and its features: what the published network looks at."""

IMAGE = "image"
"""A crop of named channels of the image."""

ALL_BRANCHES = (MASK, FLOW, IMAGE, TABULAR)
"""What a network may look at, in the order in which it puts together what it saw."""


def check_branches(names: Sequence[str]) -> tuple[str, ...]:
    """Return ``names`` in the order of ``ALL_BRANCHES``.

    Raises ``UnknownNameError`` for a name that is none of them, ``UserInputError`` for no name.
    """
    for name in names:
        if name not in ALL_BRANCHES:
            raise UnknownNameError.of("branch", name, ALL_BRANCHES)
    if not names:
        raise UserInputError(f"A network needs one branch or more of {', '.join(ALL_BRANCHES)}.")
    return tuple(name for name in ALL_BRANCHES if name in names)
