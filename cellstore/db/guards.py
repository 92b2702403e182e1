"""What the triggers of a store refuse, as sentences.

The database raises a short text (migration 0010); here it becomes what a person can act on.
"""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy.exc import DBAPIError

from ..errors import UserInputError

FROZEN = "split is frozen"
TOGETHER = "split keeps each group in one subset"
NO_GROUP = "split member is in no group"
FIXED = "split keeps its protocol and group level"
TAKEN = "split is there already"
MEANT = "split says what it is about"

_NEW = "Make a new one with: cellstore split create NAME"
SENTENCES: Mapping[str, str] = {
    FROZEN: f"A run relies on this split, so it can neither change nor be deleted. {_NEW}",
    TOGETHER: (
        "In this split a well (plate, perturbation: its group level) is in one subset only, and "
        f"this would put one in two subsets or move it. {_NEW}"
    ),
    NO_GROUP: (
        "This split goes by perturbation, and an image without a treatment cannot be in it. "
        "Give its well a treatment first: cellstore ingest TABLE"
    ),
    FIXED: f"The protocol and the group level of a split never change. {_NEW}",
    MEANT: (
        "A split names what is changed here (an image's well, a well's plate, a class), or a run "
        f"relies on it; what a split is about does not change. {_NEW}"
    ),
    TAKEN: "A split of this name is there already, and a split never changes. Choose another name.",
}


def refusal(error: DBAPIError) -> UserInputError | None:
    """Return the sentence for what a trigger refused; ``None``: it was something else."""
    text = str(error.orig)
    for mark, sentence in SENTENCES.items():
        if mark in text:
            return UserInputError(sentence)
    return None
