"""Images, wells, channels, runs, recipes and splits by what people type; selections of images.

A name of nothing is an ``UnknownNameError`` that lists similar names; one that is not written like
a name, or that means several things, a ``UserInputError``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, exists, func, or_, select
from sqlalchemy.orm import Session

from ..config import EVERYTHING, RunName, Selection
from ..db.bulk import in_lists
from ..enums import Stage, Status
from ..errors import UnknownNameError, UserInputError
from ..io.filenames import format_well, parse_well
from ..models import (
    METADATA,
    Base,
    Cell,
    CellFeatures,
    Image,
    ImageFile,
    Job,
    Perturbation,
    Plate,
    Recipe,
    Run,
    Segmentation,
    Split,
    Treatment,
    Well,
)
from .run_names import find_named_run

# Names are looked up in the tables themselves: the first query of their classes takes 0.15 s.
images, image_files, wells, plates = (
    METADATA.tables[name] for name in ("images", "image_files", "wells", "plates")
)
cells, events, segmentations = (
    METADATA.tables[name] for name in ("cells", "events", "segmentations")
)

SHORTEST_SHA256 = 6
"""Hexadecimal digits that name a file at least; fewer are as likely a word or a number."""

_HEX = re.compile(rf"[0-9a-f]{{{SHORTEST_SHA256},64}}")
_NAME = re.compile(r"(.*?)(?: plane (\d{1,9}))?(?: time (\d{1,9}))?", re.DOTALL)
_LISTED = 6
_NEAR = 3
_FORMS = "PLATE/A01/1 (plate, well, site), r01c01f01, a file name, an id, or the start of a sha256"


IS_CURRENT = and_(
    Segmentation.image_id == Image.id,
    or_(
        Segmentation.content_sha256.is_(None),
        Segmentation.content_sha256 == Image.content_sha256,
    ),
)
"""The condition that joins an image to its segmentations that still hold.

Those of the bytes that it has now, and those of unknown bytes: nothing contradicts them.
"""


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


def image_name(barcode: str, core_name: str, plane: int, time_point: int) -> str:
    """Return the name of an image for people: ``P1/r01c01f01``, with its plane and time if any."""
    name = f"{barcode}/{core_name}" + (f" plane {plane}" if plane != 1 else "")
    return name + (f" time {time_point}" if time_point != 1 else "")


def name_of(session: Session, table: str, row_id: int | None) -> str:
    """Return what a row is called: ``P1``, ``P1/A01``, ``P1/A01/1``, ``cell 7 of P1/A01/1``.

    One that is gone or has no name has its number; without a number it is its table.
    """
    if row_id is None:
        return table
    known = {mapper.class_.__tablename__: mapper.class_ for mapper in Base.registry.mappers}
    row = session.get(known[table], row_id) if table in known else None
    return _called(row) or f"{table.removesuffix('s').replace('_', ' ')} {row_id}"


def _called(row: Any) -> str:
    match row:
        case Plate():
            return row.barcode
        case Perturbation():
            return row.name
        case Well():
            return f"{row.plate.barcode}/{row.name}"
        case Image():
            return f"{_called(row.well)}/{row.site}"
        case ImageFile():
            return f"channel {row.channel} of {_called(row.image)}"
        case Cell():
            return f"cell {row.id} of {_called(row.segmentation.image)}"
    return ""


def find_image(session: Session, text: str) -> int:
    """Return the id of the image that ``text`` names.

    Accepts ``PLATE/A01/1`` (plate, well, site; spaces do as well, and the plate may be left out
    where that names one image), a core file name (``r01c01f01``, with ``PLATE/`` before it where
    several plates have it), an id (``17``), the name or path of one of its files, or the first
    digits of the sha256 of its content or of one of its files.
    """
    text = readable(text)
    found = _images(session, _image_condition(session, text), _LISTED)
    if len(found) == 1:
        return int(found[0].id)
    rows = found[: _LISTED - 1]
    shown = [f"{row.barcode}/{row.core_name}" for row in rows]
    if len(set(shown)) < len(rows):  # every plane and time point is said, so that each has a name
        at = [f"plane {row.plane} time {row.time_point}" for row in rows]
        shown = [f"{name} {where}" for name, where in zip(shown, at, strict=True)]
    more = ", ..." if len(found) == _LISTED else ""
    raise UserInputError(
        f"{text!r} names several images: {', '.join(shown)}{more}. Name one of them, or its id."
    )


def images_named(session: Session, text: str) -> ColumnElement[bool]:
    """Return the condition on the images that ``text`` names: one, or all of a well."""
    text = readable(text)
    if looks_like_well(text):
        return Image.well_id == find_well(session, text)
    of_tables = images.join(wells, wells.c.id == images.c.well_id).join(plates)
    named = select(images.c.id).select_from(of_tables).where(_image_condition(session, text))
    return Image.id.in_(named)


def _image_condition(session: Session, text: str) -> ColumnElement[bool]:
    """The likeliest meaning of a text that some image meets."""
    for named in _conditions(text):
        if _images(session, named, 1):
            return named
    *well, last = _parts(text) or [text]
    if _of_well(well) is not None and last.isdecimal():
        of_well = images.c.well_id == find_well(session, "/".join(well))
        sites = session.scalars(select(images.c.site).where(of_well).distinct())
        raise UnknownNameError.of(f"site of well {'/'.join(well)}", last, sites)
    if looks_like_well(text):
        find_well(session, text)
        name = "/".join([*well, last])
        raise UserInputError(
            f"{name} is a well: an image of it is {name}/SITE. See its images with: "
            f"cellstore audit well {shlex.quote(name)}"
        )
    if len(well) == 1:
        of_plate = select(wells.c.name).join(plates).where(plates.c.barcode == well[0])
        if names := session.scalars(of_plate.limit(1536)).all():
            raise UnknownNameError.of(f"well or image of plate {well[0]}", last, names)
    near = neighbours(session, images.c.core_name, last)
    if not near:
        raise UnknownNameError.of("image", text, near)
    raise UnknownNameError(
        f"Unknown image {text!r}. Did you mean {' or '.join(near)}? Images are named by {_FORMS}."
    )


def _parts(text: str) -> list[str]:
    parts = text.split("/") if "/" in text else text.split()
    return [part.strip() for part in parts if part.strip()]


def _of_well(parts: Sequence[str]) -> ColumnElement[bool] | None:
    """The condition on a well that ``PLATE/A01`` or ``A01`` names; none: it names none."""
    if not 1 <= len(parts) <= 2 or parts[-1].isdecimal():  # 0101 is as likely an id
        return None
    try:
        row, column = parse_well(parts[-1])
    except UserInputError:
        return None
    named = and_(wells.c.well_row == row, wells.c.well_column == column)
    return named if len(parts) == 1 else and_(plates.c.barcode == parts[0], named)


def _images(session: Session, named: ColumnElement[bool], limit: int) -> list[Row[Any]]:
    """Id, core name, well and barcode of the images that meet a condition, by id."""
    query = select(images.c.id, images.c.core_name, images.c.well_id, plates.c.barcode)
    query = query.add_columns(images.c.plane, images.c.time_point)
    query = query.join(wells, wells.c.id == images.c.well_id).join(plates).where(named)
    return sorted(session.execute(query.distinct().limit(limit)), key=lambda row: row.id)


def _conditions(text: str) -> Iterator[ColumnElement[bool]]:
    """What ``text`` may mean, the likeliest first, as conditions on images, wells and plates."""
    name, plane, time_point = _NAME.fullmatch(text).groups()  # type: ignore[union-attr]
    if plane or time_point:  # as image_name says it
        for named in _conditions(name):
            at_plane, at_time = images.c.plane == int(plane or 1), images.c.time_point
            yield and_(named, at_plane, at_time == int(time_point or 1))
        return

    def has_file(condition: ColumnElement[bool]) -> ColumnElement[bool]:
        return images.c.id.in_(select(image_files.c.image_id).where(condition))

    *first, last = _parts(text) or [text]
    if text.isdecimal() and len(text) < 19:
        yield images.c.id == int(text)
    if last.isdecimal() and len(last) < 10 and (of_well := _of_well(first)) is not None:
        yield and_(of_well, images.c.site == int(last))
    if len(first) == 1:
        yield and_(plates.c.barcode == first[0], images.c.core_name == last)
    yield images.c.core_name == text
    yield has_file(image_files.c.name.in_({text, re.split(r"[/\\]", text)[-1]}))
    if (start := hex_start(text)) is not None:
        known = images.c.content_sha256.is_not(None)
        yield and_(known, starts_with(images.c.content_sha256, start))
        yield has_file(starts_with(image_files.c.sha256, start))


def neighbours(session: Session, column: Any, text: str) -> list[str]:
    """Return the names that stand beside ``text`` in the index of a column."""
    after = select(column).where(column >= text).distinct().order_by(column).limit(_NEAR)
    before = select(column).where(column < text).distinct().order_by(column.desc()).limit(_NEAR)

    def in_common(name: str) -> int:
        pairs = enumerate(zip(name.lower(), text.lower(), strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(name), len(text)))

    found = [*session.scalars(before), *session.scalars(after)]
    return sorted(found, key=in_common, reverse=True)[:_NEAR]


def find_well(session: Session, text: str) -> int:
    """Return the id of the well that ``text`` names: ``PLATE/A01``, ``PLATE A1``, ``A01``.

    Without a plate there has to be one only. What names an image names its well, too.
    """
    text = readable(text)
    parts = _parts(text)
    if (named := _of_well(parts)) is not None:
        query = select(wells.c.id, plates.c.barcode).join(plates).order_by(plates.c.id)
        found = session.execute(query.where(named).limit(_LISTED)).all()
        if len(found) == 1:
            return int(found[0].id)
        if found:
            names = ", ".join(f"{row.barcode}/{parts[-1]}" for row in found)
            raise UserInputError(f"Well {parts[-1]!r} of which plate? Name one: {names}.")
        known = select(wells.c.name).distinct().limit(1536)
        if len(parts) == 2:
            known = known.where(wells.c.plate_id == find_plate(session, parts[0]))
        raise UnknownNameError.of("well", parts[-1], session.scalars(known))
    # Not by number: that of an image says nothing about wells.
    for condition in () if text.isdecimal() else _conditions(text):
        of_images = _images(session, condition, 2)
        if len(of_images) == 1:
            return int(of_images[0].well_id)
    raise UserInputError(f"A well is named PLATE/A01, not {text!r}.")


def looks_like_well(text: str) -> bool:
    """Whether a text is written like a well, with a plate or without."""
    return _of_well(_parts(text)) is not None


def renamed_plates(session: Session, absent: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Return the plates that once had the names ``absent``, which no plate has now.

    The value is (id, barcode); of two plates that had a name, the one that had it last.
    """
    wanted, of = set(absent), events.c.table_name == "plates"
    old = events.c.old["barcode"].as_string()
    query = select(old, plates.c.id, plates.c.barcode)
    query = query.join(plates, plates.c.id == events.c.row_id).where(of, old.is_not(None))
    rows = session.execute(query.order_by(events.c.id)) if wanted else ()
    return {name: (int(key), now) for name, key, now in rows if name in wanted}


def renamed_channels(session: Session, of: Collection[int]) -> dict[int, dict[str, str]]:
    """Return what the channels of plates (ids) are called now, by each name that they once had.

    A name that was there before any rename means the channel that had it then, so that tables are
    read right after a swap, too; a name that a rename gave means the channel that got it last.
    """
    found: dict[int, dict[str, str]] = {}
    first: set[tuple[int, str]] = set()
    old, new = (column["channel"].as_string() for column in (events.c.old, events.c.new))
    query = select(events.c.row_id, old, new).order_by(events.c.id)
    query = query.where(events.c.table_name == "plates", old.is_not(None))
    for some in in_lists(of):
        for plate, before, after in session.execute(query.where(events.c.row_id.in_(some))):
            now = found.setdefault(plate, {})
            if before not in now:
                first.add((plate, before))
                now[before] = before
            now |= {name: after for name, channel in now.items() if channel == before}
            if (plate, after) not in first:
                now[after] = after
    return found


IN_RECIPES = "in_recipes"
"""Where an event that renames a channel keeps what recipes call it, if it is not the new name."""


def recipe_channels(session: Session) -> dict[int | None, dict[str, str]]:
    """Return what recipes and models call the channels of plates (ids), by their names now.

    ``None``: on plates that are not named, such as those that came later. Empty if no channel was
    ever renamed. A recipe keeps the name that a channel had, so that a rename changes none.
    """
    query = select(events.c.row_id, events.c.old, events.c.new).order_by(events.c.id)
    renames = events.c.old["channel"].as_string().is_not(None)
    rows = session.execute(query.where(events.c.table_name == "plates", renames)).all()
    return channels_after(rows) if rows else {}


def channels_after(renames: Iterable[Any]) -> dict[int | None, dict[str, str]]:
    """Return what :func:`recipe_channels` does, after events: plate id, old and new values."""
    found: dict[int | None, dict[str, str]] = {}
    for plate, old, new in renames:
        names = found.setdefault(plate, {})
        names.pop(old["channel"], None)
        names[new["channel"]] = new.get(IN_RECIPES, new["channel"])
    later = found.get(None, {})
    return {plate: {**later, **names} for plate, names in found.items()}


def channels_now(session: Session, barcode: str) -> dict[str, str]:
    """Return what the channels of a plate are called now, by what recipes call them."""
    named = recipe_channels(session)
    plate = session.scalar(select(plates.c.id).where(plates.c.barcode == barcode))
    return {kept: now for now, kept in named.get(plate, named.get(None, {})).items()}


def in_recipes(session: Session, channels: Sequence[str]) -> tuple[str, ...]:
    """Return what a recipe calls ``channels``, which are spelled as the store spells them."""
    named = recipe_channels(session)
    if not named or not channels:
        return tuple(channels)
    query = select(wells.c.plate_id, ImageFile.channel).distinct()
    query = query.select_from(ImageFile).join(Image, Image.id == ImageFile.image_id)
    query = query.join(wells, wells.c.id == Image.well_id).order_by(wells.c.plate_id)
    plates_with: dict[int, list[str]] = {}
    for plate, channel in session.execute(query):
        plates_with.setdefault(plate, []).append(channel)
    used = channels_of_recipes(session)
    chosen = []
    for channel in channels:
        of = {p: named.get(p, named.get(None, {})) for p, own in plates_with.items()}
        having = [plate for plate, own in plates_with.items() if channel in own]
        names = dict.fromkeys([*(of[plate].get(channel, channel) for plate in having), channel])
        # One that a recipe has already, so that what it did is not done again.
        ranked = sorted(names, key=lambda name: used.get(name.lower(), len(used)))
        for name in ranked:
            meant = (channels_by_name(plates_with[p], of[p]).get(name.lower()) for p in having)
            if all(found == channel for found in meant):
                chosen.append(name)
                break
        else:
            raise UserInputError(
                f"{channel} was renamed on some plates after it was used: no recipe can mean it "
                "on all of them. Delete those plates and ingest them under the right names."
            )
    return tuple(chosen)


def channels_by_name(channels: Sequence[str], names: Mapping[str, str]) -> dict[str, str]:
    """Return the channels of an image by every name (in lower case) that a recipe may give.

    ``names`` is what recipes call them where that differs; it goes before what they are called.
    """
    found = {channel.lower(): channel for channel in reversed(channels)}
    return found | {names.get(c, c).lower(): c for c in reversed(channels) if c in names}


def channels_of_recipes(session: Session) -> dict[str, int]:
    """Return the channels that recipes name (in lower case), numbered from the first to do so."""
    found: dict[str, int] = {}
    for parameters in session.scalars(select(Recipe.parameters).order_by(Recipe.id)):
        for key in ("channels", "nuclei"):
            for name in parameters.get(key) or ():
                found.setdefault(str(name).lower(), len(found))
    return found


def find_plate(session: Session, barcode: str | None) -> int:
    """Return the id of the plate with this barcode."""
    found = session.scalar(select(plates.c.id).where(plates.c.barcode == barcode))
    if found is None and (renamed := renamed_plates(session, [barcode or ""])):
        (now,) = (name for _, name in renamed.values())
        raise UnknownNameError(f"Plate {barcode} was renamed: it is {now} now.")
    if found is None:
        known = session.scalars(select(plates.c.barcode).order_by(plates.c.id).limit(500))
        raise UnknownNameError.of("plate", barcode, known)
    return int(found)


def find_cell(session: Session, number: str) -> tuple[int, int]:
    """Return the id of a cell, and that of its image, by its number in table ``cells``."""
    query = select(cells.c.id, segmentations.c.image_id).join(segmentations)
    known = number.isdecimal() and len(number) < 19
    found = session.execute(query.where(cells.c.id == int(number))).first() if known else None
    if found is None:
        raise UnknownNameError(
            f"There is no cell {number}. A cell is named by its id in table cells; see some "
            "with: cellstore sql 'FROM cells LIMIT 5'"
        )
    return int(found[0]), int(found[1])


def find_run(session: Session, reference: RunName, *stages: Stage) -> Run:
    """Return the run with this number or name; see :func:`find_named_run`, which raises errors."""
    return session.get_one(Run, find_named_run(session, reference, stages).id)


def has_results() -> ColumnElement[bool]:
    """Whether a run has done any image: one that made nothing is never taken by default."""
    job = exists().where(Job.run_id == Run.id, Job.status == Status.DONE)
    return or_(job, exists().where(CellFeatures.run_id == Run.id))


def find_recipe(session: Session, stage: Stage, reference: str) -> Recipe:
    """Return a recipe by its number, else by the start of its fingerprint."""
    recipes = session.scalars(select(Recipe).where(Recipe.stage == stage)).all()
    matches = [item for item in recipes if reference == str(item.id)]
    matches = matches or [item for item in recipes if item.fingerprint.startswith(reference)]
    if len(matches) != 1:
        known = [f"{item.id} ({item.fingerprint[:8]})" for item in recipes]
        raise UnknownNameError.of(f"{stage.value} recipe", reference, known)
    return matches[0]


def find_split(session: Session, name: str | None) -> Split:
    """Return the split of this name; without a name the only or the latest one."""
    query = select(Split).order_by(Split.id.desc())
    found = session.scalars(query.where(Split.name == name) if name else query).first()
    if found is None and name is None:
        raise UnknownNameError("There is no split yet. Make one with: cellstore split create NAME")
    if found is None:
        raise UnknownNameError.of("split", name, [item.name for item in session.scalars(query)])
    return found


def find_channels(session: Session, typed: Sequence[str]) -> tuple[str, ...]:
    """Return channels as the store spells them, by name or by number.

    ``typed`` is what was written between commas: a name with commas in it is put together again.
    A name that only recipes still have is read as what the channel is called now.
    """
    if not typed:
        return ()
    query = select(ImageFile.channel, ImageFile.position).distinct().order_by(ImageFile.position)
    rows = session.execute(query).all()
    known = {row.channel for row in rows}
    renamed = [pair for item in recipe_channels(session).values() for pair in item.items()]
    pairs = [(kept, now) for now, kept in reversed(renamed) if now in known]
    pairs += [(row.channel, row.channel) for row in reversed(rows)]
    names = {",".join(map(str.strip, name.split(","))).lower(): now for name, now in pairs}
    found: list[str] = []
    left = [part.strip() for text in typed for part in text.split(",")]
    while left:
        ends = (end for end in range(len(left), 0, -1) if ",".join(left[:end]).lower() in names)
        end = next(ends, 0)
        numbered = {row.channel for row in rows if str(row.position) == left[0]} if not end else {}
        if end:
            found.append(names[",".join(left[:end]).lower()])
        elif not numbered:
            raise UnknownNameError.of("channel", left[0], sorted({row.channel for row in rows}))
        elif len(numbered) > 1:
            raise UserInputError(
                f"Channel {left[0]} is {' or '.join(sorted(numbered))}, by plate. Give its name."
            )
        else:
            found += numbered
        del left[: end or 1]
    return tuple(found)


def images_of(session: Session, selection: Selection = EVERYTHING) -> Select[int]:
    """Return the query of the ids of the images of a selection.

    Its conditions are on single rows, so that more can be added and one image looked up at once.
    """
    query = select(Image.id)
    if selection.plates or selection.wells or selection.where is not None:
        query = query.join(Well, Well.id == Image.well_id)
    if selection.plates:
        ids = [find_plate(session, barcode) for barcode in selection.plates]
        query = query.where(Well.plate_id.in_(ids))
    if selection.wells:
        named: dict[str, str] = {}
        ids = []
        for name in selection.wells:
            parts = _parts(name)
            if _of_well(parts) is None or len(parts) > 1:  # PLATE/A01
                ids.append(find_well(session, name))
            else:
                named[format_well(*parse_well(parts[0]))] = name
        of_names = select(Well.name).where(Well.name.in_(named)).distinct()
        for missing in named.keys() - set(session.scalars(of_names)):
            there = session.scalars(select(wells.c.name).distinct().limit(1536))
            raise UnknownNameError.of("well", named[missing], there)
        query = query.where(or_(Well.name.in_(named), Well.id.in_(ids)))
    if selection.images:
        query = query.where(or_(*(images_named(session, name) for name in selection.images)))
    if selection.where is not None:
        from .conditions import condition  # its parser loads slowly

        query = query.join(Plate, Plate.id == Well.plate_id)
        query = query.outerjoin(Treatment, Treatment.id == Well.treatment_id)
        query = query.where(condition(selection.where))
    return query if selection.limit is None else first_of(session, query, selection.limit)


def first_of(session: Session, query: Select[int], limit: int) -> Select[int]:
    """Return the query of the first ``limit`` images of ``query``, which asks for their ids."""
    # By the id of the last of them, so that what is added later does not change which they are.
    ids = query.order_by(Image.id).limit(limit).subquery()
    last = session.scalar(select(func.max(ids.c.id)))
    return query.where(Image.id <= (last or 0))
