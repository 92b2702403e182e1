"""From what people type to images and wells, every step by index.

``BR00116991/F15/8``, ``BR00116991 F15 8``, ``r06c15f08``, a file name, an id, a piece of a sha256.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, and_, select
from sqlalchemy.orm import Session

from ..db.models import Image, ImageFile, Plate, Well
from ..errors import UnknownNameError, UserInputError
from ..formats.names import parse_well

SHORTEST_SHA256 = 6
"""Hexadecimal digits that name a file at least; fewer are as likely a word or a number."""

_HEX = re.compile(rf"[0-9a-f]{{{SHORTEST_SHA256},64}}")
_LISTED = 6
_NEAR = 3
_FORMS = "PLATE/A01/1 (plate, well, site), r01c01f01, a file name, an id, or the start of a sha256"


def well_name(text: str) -> str:
    """Return the name of a well as it is stored: ``D04`` of ``d4``; other words as they are."""
    match = re.fullmatch(r"([A-Za-z]{1,2})0*(\d{1,2})", text.strip())
    return f"{match[1].upper()}{int(match[2]):02d}" if match else text


def starts_with(column: Any, start: str) -> ColumnElement[bool]:
    """Return whether the hexadecimal text of ``column`` starts so; as a range, for an index."""
    return and_(column >= start, column < start + "g")  # g: the letter after all digits


def readable(text: str) -> str:
    """Return what was typed as text that a database takes: without NUL and broken letters."""
    return text.encode("utf-8", "replace").decode().replace("\0", "").strip()


def hex_start(text: str) -> str | None:
    """Return ``text`` in small letters if it may be the start of a sha256."""
    lowered = text.strip().lower()
    return lowered if _HEX.fullmatch(lowered) else None


def find_image(session: Session, text: str) -> Image:
    """Return the image that ``text`` names.

    Accepts ``PLATE/A01/1`` (plate, well, site; spaces do as well, and the plate may be left out
    where there is one only), a core file name (``r01c01f01``, with ``PLATE/`` before it where
    several plates have it), an id (``17``), the name or path of one of its files, or the first
    digits of the sha256 of its content or of one of its files.

    Raises:
        UnknownNameError: nothing has that name; the names nearby are told.
        UserInputError: several images have it.

    """
    text = readable(text)
    for query in _image_queries(session, text):
        found = list(session.scalars(query.distinct().limit(_LISTED)))
        if len(found) == 1:
            return found[0]
        if found:
            raise UserInputError(_several(session, text, found))
    raise _unknown_image(session, text)


class _Words(NamedTuple):
    """``PLATE/A01/1`` taken apart; a plate that is not named is the only one."""

    barcode: str | None
    well: str
    site: str | None = None


def _taken_apart(text: str) -> list[str]:
    parts = text.split("/") if "/" in text else text.split()
    return [part.strip() for part in parts if part.strip()]


def _image_queries(session: Session, text: str) -> Iterator[Select[Image]]:
    base = select(Image).join(Well, Well.id == Image.well_id).join(Plate)
    parts = _taken_apart(text)
    if text.isdecimal() and len(text) < 19:
        yield base.where(Image.id == int(text))
    words = _words_of_image(session, parts)
    if words is not None and words.site is not None:
        place = _at(words)
        if place is not None:
            yield base.where(*place, Image.site == int(words.site))
    if len(parts) == 2:
        yield base.where(Plate.barcode == parts[0], Image.core_name == parts[1])
        if words is None and _is_site(parts[1]) and (well := _as_well(parts[0])) is not None:
            place = Well.row == well[0], Well.column == well[1]  # on whichever plate
            yield base.where(*place, Image.site == int(parts[1]))
    yield base.where(Image.core_name == text)
    yield base.where(_has_file(ImageFile.name == text))
    if "/" in text or "\\" in text:
        yield base.where(_has_file(ImageFile.name == re.split(r"[/\\]", text)[-1]))
    start = hex_start(text)
    if start is not None:
        yield base.where(
            Image.content_sha256.is_not(None), starts_with(Image.content_sha256, start)
        )
        yield base.where(_has_file(starts_with(ImageFile.sha256, start)))


def _words_of_image(session: Session, parts: Sequence[str]) -> _Words | None:
    if len(parts) == 3 and _is_site(parts[2]):
        return _Words(parts[0], parts[1], parts[2])
    if len(parts) == 2 and _is_site(parts[1]) and (plate := only_plate(session)) is not None:
        return _Words(plate.barcode, parts[0], parts[1])
    return None


def _is_site(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def _at(words: _Words) -> tuple[ColumnElement[bool], ...] | None:
    try:
        row, column = parse_well(words.well)
    except UserInputError:
        return None
    return Plate.barcode == words.barcode, Well.row == row, Well.column == column


def _has_file(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    return Image.id.in_(select(ImageFile.image_id).where(condition))


def _several(session: Session, text: str, found: Sequence[Image]) -> str:
    names = ", ".join(_full_names(session, found[: _LISTED - 1]))
    more = ", ..." if len(found) == _LISTED else ""
    return f"{text!r} names several images: {names}{more}. Name one of them, or its id."


def _full_names(session: Session, images: Sequence[Image]) -> list[str]:
    query = select(Image.id, Plate.barcode, Image.core_name).join(Well, Well.id == Image.well_id)
    query = query.join(Plate, Plate.id == Well.plate_id)
    rows = session.execute(query.where(Image.id.in_([item.id for item in images])))
    full = {row.id: f"{row.barcode}/{row.core_name}" for row in rows}
    twice = len(set(full.values())) < len(full)
    return [f"{name} (id {key})" if twice else name for key, name in sorted(full.items())]


def _unknown_image(session: Session, text: str) -> UnknownNameError:
    words = _words_of_image(session, _taken_apart(text))
    if words is not None and words.barcode is not None and _at(words) is not None:
        plate, well = _well_named(session, words)
        sites = session.scalars(select(Image.site).where(Image.well_id == well.id).distinct())
        return UnknownNameError.of(f"site of well {plate.barcode}/{well.name}", words.site, sites)
    near = neighbours(session, Image.core_name, _taken_apart(text)[-1] if text else text)
    if not near:
        return UnknownNameError.of("image", text, near)
    return UnknownNameError(
        f"Unknown image {text!r}. Did you mean {' or '.join(near)}? Images are named by {_FORMS}."
    )


def neighbours(session: Session, column: Any, text: str) -> list[str]:
    """Return the names that stand beside ``text`` in the index of a column."""
    after = select(column).where(column >= text).distinct().order_by(column).limit(_NEAR)
    before = select(column).where(column < text).distinct().order_by(column.desc()).limit(_NEAR)
    found = [*session.scalars(before), *session.scalars(after)]
    # Those that begin most like it.
    return sorted(found, key=lambda name: -_shared(name, text))[:_NEAR]


def _shared(one: str, other: str) -> int:
    pairs = enumerate(zip(one.lower(), other.lower(), strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def only_plate(session: Session) -> Plate | None:
    """Return the plate of a store that has one only."""
    found = session.scalars(select(Plate).order_by(Plate.id).limit(2)).all()
    return found[0] if len(found) == 1 else None


def find_well(session: Session, text: str) -> tuple[Plate, Well]:
    """Return the plate and the well that ``text`` names: ``PLATE/A01``, ``PLATE A1``, ``A01``.

    Without a plate there has to be one only. What names an image names its well, too.

    Raises:
        UnknownNameError: there is no such plate or well.
        UserInputError: the text names no well, or one on several plates.

    """
    text = readable(text)
    parts = _taken_apart(text)
    if len(parts) == 1 and (well := _as_well(parts[0])) is not None:
        plate = only_plate(session)
        if plate is None:
            raise _of_which_plate(session, parts[0], well)
        return _well_named(session, _Words(plate.barcode, parts[0]))
    if len(parts) == 2 and not _is_site(parts[1]) and _as_well(parts[1]) is not None:
        return _well_named(session, _Words(parts[0], parts[1]))
    return _well_of_image(session, text)


def looks_like_well(text: str) -> bool:
    """Whether a text is written like a well, with a plate or without."""
    parts = _taken_apart(text)
    return 1 <= len(parts) <= 2 and not _is_site(parts[-1]) and _as_well(parts[-1]) is not None


def _as_well(text: str) -> tuple[int, int] | None:
    if text.isdecimal():
        return None  # "0101" may be a well, and is as likely an id
    try:
        return parse_well(text)
    except UserInputError:
        return None


def _of_which_plate(session: Session, text: str, well: tuple[int, int]) -> UserInputError:
    row, column = well
    query = select(Plate.barcode).join(Well, Well.plate_id == Plate.id).order_by(Plate.id)
    on = query.where(Well.row == row, Well.column == column).limit(_LISTED)
    plates = [f"{barcode}/{text}" for barcode in session.scalars(on)]
    if not plates:
        return UnknownNameError(f"No plate has a well {text!r} with images.")
    return UserInputError(f"Well {text!r} of which plate? Name one: {', '.join(plates)}.")


def _well_named(session: Session, words: _Words) -> tuple[Plate, Well]:
    plate = session.scalars(select(Plate).where(Plate.barcode == words.barcode)).first()
    if plate is None:
        known = session.scalars(select(Plate.barcode).order_by(Plate.id).limit(500))
        raise UnknownNameError.of("plate", words.barcode, known)
    row, column = parse_well(words.well)
    place = (Well.plate_id == plate.id, Well.row == row, Well.column == column)
    well = session.scalars(select(Well).where(*place)).first()
    if well is None:
        known = session.scalars(select(Well.name).where(Well.plate_id == plate.id).limit(1536))
        raise UnknownNameError.of("well", words.well, known)
    return plate, well


def _well_of_image(session: Session, text: str) -> tuple[Plate, Well]:
    image = None
    # Not by number: that of an image says nothing about wells.
    if not text.isdecimal():
        queries = _image_queries(session, text)
        found = (list(session.scalars(query.distinct().limit(2))) for query in queries)
        image = next((images[0] for images in found if len(images) == 1), None)
    if image is None:
        raise UserInputError(f"A well is named PLATE/A01, not {text!r}.")
    well = session.get_one(Well, image.well_id)
    return session.get_one(Plate, well.plate_id), well
