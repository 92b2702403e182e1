"""What is asked of a split, checked before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from ...config import SplitParams
from ...errors import UnknownNameError, UserInputError
from ...ops.splitting import Cap
from ...ops.splitting.balancing import MEDIAN, SECOND_LARGEST
from ...terms import GroupLevel, LabelField
from .facts import GROUPED, PUBLISHED

PROTOCOLS = (GROUPED, PUBLISHED)
UNITS = ("image", "cell")
FIXED_BY_PUBLISHED = {
    "test_plates": "--test-plates",
    "validation_plates": "--validation-plates",
    "folds": "--folds",
    "downsample": "--downsample",
    "downsample_by": "--downsample-by",
}


def checked_name(name: str, more: int = 0) -> str:
    """Return the name of a split, to which ``more`` characters can be added.

    Raises:
        UserInputError: it is empty, too long, or not printable.
    """
    if not name.strip() or len(name) + more > 255 or not name.isprintable():
        raise UserInputError("A split needs a name of 1 to 255 printable characters.")
    return name.strip()


def checked(params: SplitParams) -> SplitParams:
    """Return ``params`` with what follows from them, as they are kept.

    Raises:
        UnknownNameError: no such protocol, field, level or unit.
        UserInputError: they contradict each other.
    """
    _known("split protocol", params.protocol, PROTOCOLS)
    _known("unit of --downsample-by", params.downsample_by, UNITS)
    known = with_known_words(params)
    if params.protocol == PUBLISHED:
        _check_published(params)
        return replace(known, group_level=GroupLevel.IMAGE, validation_size=0.0)
    _check_level(known)
    caps(known)
    if known.folds is not None:
        share = 1 / known.folds if known.folds > 0 else 0.0
        validation = share if known.validation_size else 0.0
        return replace(known, test_size=share, validation_size=validation)
    return known


def with_known_words(params: SplitParams) -> SplitParams:
    """Return ``params`` with its field and group level as what they name.

    Raises:
        UnknownNameError: there is no such field or level.
    """
    _known("label field", params.field, list(LabelField))
    _known("group level", params.group_level, list(GroupLevel))
    return replace(
        params, field=LabelField(params.field), group_level=GroupLevel(params.group_level)
    )


def _known(kind: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UnknownNameError.of(kind, value, known)


def _check_published(params: SplitParams) -> None:
    usual = {item.name: item.default for item in fields(SplitParams)}
    for name, option in FIXED_BY_PUBLISHED.items():
        if getattr(params, name) != usual[name]:
            raise UserInputError(
                f"The published protocol draws as the study did, without {option}. "
                "Split by image without it: --group image."
            )


def _check_level(params: SplitParams) -> None:
    if params.group_level is GroupLevel.TREATMENT and params.field is LabelField.PERT_INAME:
        raise UserInputError(
            "By treatment, each compound is on one side only, so compounds cannot be the classes: "
            "none would be both trained and tested. Predict something coarser: --field target."
        )
    named = params.test_plates or params.validation_plates
    if not named:
        return
    if params.group_level is not GroupLevel.PLATE:
        raise UserInputError("Plates are named for a side where whole plates are: --group plate.")
    if params.folds is not None:
        raise UserInputError("With --folds each plate tests in turn: name none, or leave it out.")
    if not params.test_plates:
        raise UserInputError("Name the plates that test, too: --test-plates A,B.")


def caps(params: SplitParams) -> tuple[Cap, ...] | None:
    """Return how the classes are to be cut.

    Raises:
        UserInputError: one says neither a number nor a word that is known.
    """
    if params.downsample is None:
        return None
    return tuple(Cap(label, _limit(label, text)) for label, text in params.downsample)


def _limit(label: str, text: str) -> int | str:
    if text in (SECOND_LARGEST, MEDIAN):
        return text
    if text.isdecimal() and 0 < int(text) < 2**31:
        return int(text)
    raise UserInputError(
        f"Cut {label!r} to {text!r}? Say --downsample {label}=N with a number, "
        f"{label}={SECOND_LARGEST} or {label}={MEDIAN}."
    )
