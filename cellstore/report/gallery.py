"""Pictures of cells, of wells or of whole fields, beside each other.

:func:`show` draws them for a notebook, as axes of matplotlib; :class:`WellPictures` for a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sqlalchemy import func, select

from ..config import ImageInput, Selection
from ..db.bulk import in_lists
from ..enums import PROJECTION_CHANNEL
from ..errors import CellstoreError, UnknownNameError, UserInputError
from ..jobs.lookup import find_channels, find_image, images_of
from ..jobs.planes import NUCLEAR, channel_files, read_image
from ..jobs.workspace import Workspace
from ..models import Image, Plate, Recipe, Segmentation, Well
from ..query.cell_tables import CellTable
from ..query.cells import plane_of, read_masks
from ..query.engine import Questions, open_questions
from ..query.exclusions import image_counts
from ..query.guard import literal, quoted
from ..settings import need, track
from .drawing import (
    GREY,
    OUTLINE_COLOUR,
    Limits,
    brief,
    coloured,
    grey_limits,
    jpeg,
    outline_overlay,
    short,
)

GROUPS = 8
"""Groups that are drawn at once."""
OF_GROUP, FIELDS_OF_GROUP = 6, 2
MOST = 200
"""Pictures that are drawn at once."""
PER_LINE = 8
TILE, FIELD_TILE = 1.25, 2.6
"""Inches of a picture."""

CELLS = """
    SELECT c.id AS unit, s.image_id, s.id AS segmentation_id,
        s.mask_artifact_id IS NOT NULL AS masked, i.plate, i.well, i.site, i.control,
        c.object_number, c.min_row, c.min_col, c.max_row, c.max_col, {columns}
    FROM given AS g
    JOIN cells AS c ON c.id = g.cell_id
    JOIN segmentations AS s ON s.id = c.segmentation_id
    JOIN image_table AS i ON i.image_id = s.image_id
    JOIN images AS m ON m.id = s.image_id
    LEFT JOIN cell_table AS t ON t.cell_id = c.id
    WHERE m.content_sha256 IS NOT NULL AND c.max_row > c.min_row
"""
FIELDS = """
    SELECT t.image_id AS unit, t.image_id, s.segmentation_id, true AS masked, t.plate, t.well,
        t.site, t.control, {columns}
    FROM given AS g
    JOIN image_table AS t ON t.image_id = g.image_id
    JOIN images AS m ON m.id = t.image_id
    LEFT JOIN (
        SELECT image_id, max(id) AS segmentation_id FROM segmentations
        WHERE mask_artifact_id IS NOT NULL GROUP BY image_id
    ) AS s ON s.image_id = t.image_id
    WHERE m.content_sha256 IS NOT NULL
"""
# One of each well before the second of any. The md5 of id and seed is the same draw everywhere.
DRAWN = """
    WITH these AS ({query}),
    in_wells AS (
        SELECT *, row_number() OVER (
            PARTITION BY group_name, plate, well ORDER BY md5({seed} || ' ' || unit), unit
        ) AS of_well
        FROM these
    ),
    turns AS (
        SELECT *, row_number() OVER (
            PARTITION BY group_name ORDER BY of_well, md5({seed} || ' ' || unit), unit
        ) AS turn
        FROM in_wells
    )
    SELECT * FROM turns WHERE turn <= {each} ORDER BY group_name NULLS LAST, turn LIMIT {most}
"""

Row = dict[str, Any]
Read = tuple[list[NDArray[np.float32]], NDArray[np.integer[Any]] | None]
"""The channels (H, W) of an image, and its masks (H, W) if they are known and wanted."""


def show(
    workspace: Workspace,
    what: Any = None,
    *,
    by: str | None = "treatment",
    n: int | None = None,
    channels: Sequence[str] = (),
    numbers: Sequence[str] = (),
    outlines: bool = True,
    seed: int = 0,
) -> NDArray[Any]:
    """Draw cells or fields; see :meth:`cellstore.Store.show`."""
    need("report")
    if n is not None and n < 1:
        raise UserInputError(f"n must be at least 1, not {n}.")
    unit, source = _given(workspace, what)
    of_cells = unit == "cell_id"
    numbers = list(numbers) or (["area"] if of_cells else ["n_cells"])
    each = n or (MOST if not isinstance(source, str) else OF_GROUP if of_cells else FIELDS_OF_GROUP)
    with open_questions(workspace) as questions:
        groups = _drawn(questions, unit, source, by, each, numbers, seed)
        if not groups:
            raise UserInputError(
                "There is nothing to show: no cell or image with its files is meant. "
                "See what is there with: cellstore status"
            )
        controls: dict[str, list[Row]] = {}
        if by == "treatment":
            controls = _controls(questions, unit, groups, numbers, seed)
    with workspace.database.read() as session:
        named = tuple(find_channels(session, channels)) if channels else ()
    rows = [row for some in (*groups.values(), *controls.values()) for row in some]
    images = {_image_of(row): row["masked"] and outlines for row in rows}
    read: dict[tuple[int, int | None], Read] = {}
    problems = []
    for image, masked in track(workspace.progress, "show", len(images), images.items()):
        try:
            read[image] = read_planes(workspace, *image, named, masked=masked)
        except CellstoreError as error:
            problems.append(error)
    if problems and not read:
        raise problems[0]
    if problems:
        workspace.progress.note(f"{len(problems)} images cannot be read: {problems[0]}")
    return _laid_out(read, named, groups, controls, numbers, of_cells=of_cells, by=by)


def _image_of(row: Row) -> tuple[int, int | None]:
    return row["image_id"], row["segmentation_id"]


def _given(workspace: Workspace, what: Any) -> tuple[str, Any]:
    """Return ``cell_id`` or ``image_id``, and a query, or a table, that has it as a column."""
    if what is None:
        with workspace.database.read() as session:
            segmented = session.query(Segmentation).filter(Segmentation.n_cells > 0).first()
        unit, relation = ("cell_id", "cell_table") if segmented else ("image_id", "image_table")
        return unit, f"SELECT {unit} FROM {relation} WHERE excluded IS NULL"  # noqa: S608
    if isinstance(what, CellTable):
        return "cell_id", what.query
    if isinstance(what, Selection):
        with workspace.database.read() as session:
            return "image_id", {"image_id": list(session.scalars(images_of(session, what)))}
    if isinstance(what, str) and not _is_name(what):
        return "cell_id", f"SELECT cell_id FROM cell_table WHERE excluded IS NULL AND (\n{what}\n)"  # noqa: S608
    if hasattr(what, "to_pandas") and not hasattr(what, "iloc"):
        what = what.to_pandas()
    if hasattr(what, "columns"):
        for column in ("cell_id", "image_id"):
            if column in what.columns:
                return column, what.drop_duplicates(column)
        raise UserInputError("The table needs a column cell_id, or image_id for whole fields.")
    values = [what] if isinstance(what, str) or not hasattr(what, "__iter__") else list(what)
    if values and all(isinstance(value, str) for value in values):
        with workspace.database.read() as session:
            return "image_id", {
                "image_id": list(dict.fromkeys(find_image(session, value) for value in values))
            }
    try:
        return "cell_id", {"cell_id": list(dict.fromkeys(int(value) for value in values))}
    except (TypeError, ValueError):
        raise UserInputError(
            "Give ids of cells, a table with cell_id or image_id, names of images, a Selection of "
            "images, or a condition such as \"treatment = 'taxol' AND area > 500\"."
        ) from None


def _is_name(text: str) -> bool:
    return not any(mark in text for mark in "<>='") and " " not in text.strip()


def _bring(questions: Questions, unit: str, source: Any, wanted: Sequence[str]) -> list[str]:
    """Bring what is meant as the relation ``given``; return the wanted columns that it has."""
    if isinstance(source, str):
        known = questions.ask(f"FROM (\n{source}\n) LIMIT 0").names
        own = [name for name in wanted if name in known]
        columns = ", ".join(map(quoted, [unit, *own]))
        given = questions.ask(f"SELECT {columns} FROM (\n{source}\n)").table()  # noqa: S608
    else:
        own = [name for name in wanted if name in source]
        try:
            ids = [int(value) for value in source[unit]]
        except (TypeError, ValueError) as error:
            raise UserInputError(f"Column {unit} needs a number in each row.") from error
        columns_of = {}
        for name in own:
            try:
                columns_of[name] = pa.array(source[name])
            except pa.ArrowException:  # texts and numbers in one column
                columns_of[name] = pa.array([None if x is None else str(x) for x in source[name]])
        given = pa.table({unit: pa.array(ids, pa.int64()), **columns_of})
    questions.bring("given", given)
    return own


def _drawn(
    questions: Questions,
    unit: str,
    source: Any,
    by: str | None,
    each: int,
    numbers: Sequence[str],
    seed: int,
) -> dict[str, list[Row]]:
    """The rows to draw, by the name of their group."""
    relation = "cell_table" if unit == "cell_id" else "image_table"
    wanted = list(dict.fromkeys([*numbers, *([by] if by else [])]))
    own = _bring(questions, unit, source, wanted)
    known = questions.ask(f"FROM {relation} LIMIT 0").names
    place = {name: f"{'g' if name in own else 't'}.{quoted(name)}" for name in wanted}
    for name in wanted:
        if name not in known and name not in own:
            raise UnknownNameError.of("column", name, known)
    columns = [f"{place[name]} AS {quoted(f'number {name}')}" for name in numbers]
    columns.append(f"CAST({place[by] if by else 'NULL'} AS VARCHAR) AS group_name")
    query = (CELLS if unit == "cell_id" else FIELDS).format(columns=", ".join(columns))
    text = DRAWN.format(query=query, seed=int(seed), each=each, most=each * 1000)
    groups: dict[str, list[Row]] = {}
    for row in questions.ask_ours(text).records():
        name = row["group_name"]
        groups.setdefault("" if by is None else "none" if name is None else name, []).append(row)
    return groups


def _controls(
    questions: Questions,
    unit: str,
    groups: Mapping[str, list[Row]],
    numbers: Sequence[str],
    seed: int,
) -> dict[str, list[Row]]:
    """By group some negative controls of the plates of its first pictures."""
    relation = "cell_table" if unit == "cell_id" else "image_table"
    known = questions.ask(f"FROM {relation} LIMIT 0").names
    own = [name for name in numbers if name in known]
    found = {}
    for number, (name, rows) in enumerate(list(groups.items())[:GROUPS]):
        if any(row["control"] == "negative" for row in rows):
            continue
        plates = ", ".join(literal(plate) for plate in dict.fromkeys(row["plate"] for row in rows))
        beside = f"""
            SELECT {unit} FROM {relation}
            WHERE control = 'negative' AND excluded IS NULL AND plate IN ({plates})
        """  # noqa: S608 - names are quoted
        few = 2 if unit == "cell_id" else 1
        # Others beside each group; the plates may have none.
        drawn = _drawn(questions, unit, beside, None, few, own, seed + number)
        found[name] = drawn.get("", [])
    return found


def _limits(read: Mapping[Any, Read], rows: Sequence[Row]) -> dict[str, list[Limits]]:
    """Black and white of each channel, the same for all pictures of a plate."""
    found: dict[str, list[list[Limits]]] = {}
    for image, plate in dict.fromkeys((_image_of(row), row["plate"]) for row in rows):
        if image in read:
            found.setdefault(plate, []).append([grey_limits(plane) for plane in read[image][0]])
    return {
        plate: [
            (float(np.median([low for low, _ in of])), float(max(high for _, high in of)))
            for of in zip(*some, strict=True)
        ]
        for plate, some in found.items()
    }


def _laid_out(
    read: Mapping[Any, Read],
    channels: Sequence[str],
    groups: Mapping[str, list[Row]],
    controls: Mapping[str, list[Row]],
    numbers: Sequence[str],
    *,
    of_cells: bool,
    by: str | None,
) -> NDArray[Any]:
    """A line of axes for each group, with its controls to the right."""
    from matplotlib import pyplot

    hidden = len(groups) - GROUPS
    lines: list[tuple[str, list[Row], list[Row]]] = []
    for name, rows in list(groups.items())[:GROUPS]:
        per_line = PER_LINE if of_cells else 4
        for first in range(0, min(len(rows), MOST), per_line):
            beside = controls.get(name, []) if first == 0 else []
            lines.append((name if first == 0 else "", rows[first : first + per_line], beside))
    wide = max(len(rows) for _, rows, _ in lines)
    right = max(len(beside) for _, _, beside in lines)
    every = [row for _, rows, beside in lines for row in (*rows, *beside)]
    limits, tile = _limits(read, every), TILE if of_cells else FIELD_TILE
    side = _side(every) if of_cells else 0
    names = 1.4 if by is not None else 0.1
    above, below = 0.35 if right else 0.1, 0.2 + 0.13 * len(numbers)
    size = (
        names + tile * (wide + right + 0.25 * bool(right)),
        above + (tile + below) * len(lines) + 0.15,
    )
    figure = pyplot.figure(figsize=size)
    figure.patch.set_alpha(0)  # the page behind may be dark
    axes = np.empty((len(lines), wide + right), object)
    height = size[1]
    for line, (name, rows, beside) in enumerate(lines):
        top = height - above - (tile + below) * line
        figure.text(0.08 / size[0], (top - tile / 2) / height, short(name, 18),
                    size=9, color=GREY, va="center")  # fmt: skip
        for column, row in enumerate(_filled(rows, wide, beside, right)):
            left = names + tile * (column + 0.25 * (column >= wide))
            box = (left / size[0], (top - tile) / height, 0.95 * tile / size[0],
                   0.95 * tile / height)  # fmt: skip
            axes[line, column] = one = figure.add_axes(box)
            one.set_axis_off()
            if row is not None:
                found = read.get(_image_of(row))
                _draw(one, found, channels, row, limits.get(row["plate"], []), side)
                _say(one, row, numbers, of_cells=of_cells)
    caption = " + ".join(channels) or "the plane that was segmented"
    if of_cells:
        caption = f"{side} x {side} pixels each, {caption}"
    if hidden > 0:
        caption += f"; {hidden} more groups are not shown"
    figure.text(names / size[0], 0.04 / height, caption, size=7, color=GREY)
    if right:
        x = (names + tile * (wide + 0.25)) / size[0]
        figure.text(x, 1 - 0.22 / height, "controls, same plates", size=8, color=GREY)
    return axes


def _filled(rows: Sequence[Row], wide: int, beside: Sequence[Row], right: int) -> list[Row | None]:
    return [
        *(row for row, _ in zip_longest(rows, range(wide))),
        *(row for row, _ in zip_longest(beside, range(right))),
    ]


def _side(rows: Sequence[Row]) -> int:
    """Pixels of the side of a square that holds nearly every cell, with a margin."""
    sides = [max(r["max_row"] - r["min_row"], r["max_col"] - r["min_col"]) for r in rows]
    return int(np.ceil(1.3 * np.percentile(sides, 90) / 4) * 4)


def _draw(
    axes: Any,
    read: Read | None,
    channels: Sequence[str],
    row: Row,
    limits: Sequence[Limits],
    side: int,
) -> None:
    """One picture: the part around a cell, or, with no ``side``, the whole field."""
    if read is None:
        axes.text(0.5, 0.5, "cannot be\nread", size=7, color=GREY, ha="center", va="center")
        return
    planes, masks = read
    if side == 0:
        picture = coloured(planes, limits, channels)
        if masks is not None:
            edge = outline_overlay(planes[0], masks, limits[0])
            drawn = (edge == OUTLINE_COLOUR).all(axis=-1)
            picture[drawn] = np.array(OUTLINE_COLOUR, np.float32) / 255
        axes.imshow(picture, interpolation="antialiased")
        return
    top = (row["min_row"] + row["max_row"] - side) // 2
    left = (row["min_col"] + row["max_col"] - side) // 2
    shape = planes[0].shape
    part = np.s_[max(0, top) : top + side, max(0, left) : left + side]
    before = max(0, -top), max(0, -left)
    picture = np.zeros((side, side, 3), np.float32)
    inner = coloured([plane[part] for plane in planes], limits, channels)
    target = np.s_[before[0] : before[0] + inner.shape[0], before[1] : before[1] + inner.shape[1]]
    picture[target] = inner
    axes.imshow(picture, interpolation="bicubic")
    if masks is not None and masks.shape == shape:
        own = np.zeros((side, side), np.float32)
        own[target] = masks[part] == row["object_number"]
        if own.any():
            colour = tuple(part / 255 for part in OUTLINE_COLOUR)
            axes.contour(own, levels=[0.5], colors=[colour], linewidths=0.9)


def _say(axes: Any, row: Row, numbers: Sequence[str], *, of_cells: bool) -> None:
    """Write below a picture which cell or field it is, and its numbers."""
    name = f"cell {row['unit']}" if of_cells else f"{row['plate']}/{row['well']}/{row['site']}"
    texts = []
    for number in numbers:
        value = row.get(f"number {number}")
        known = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        shown = brief(float(value)) if known and value is not None else str(value)
        if value is not None:
            texts.append(f"{number.replace('_', ' ')} {shown}")
    lines = [short(name, 24), *(short(text, 26) for text in texts)]
    axes.text(0, -0.04, "\n".join(lines), size=7, color=GREY, va="top",
              transform=axes.transAxes, parse_math=False)  # fmt: skip


def read_planes(
    workspace: Workspace,
    image_id: int,
    segmentation_id: int | None,
    channels: Sequence[str] = (),
    *,
    masked: bool = True,
) -> Read:
    """Return channels of an image, and its masks unless they are not wanted.

    Without ``channels`` the plane that was segmented, or is usual.

    Raises:
        CellstoreError: the image or the masks cannot be read.
    """
    wanted, masks = ImageInput(), None
    if segmentation_id is not None:
        with workspace.database.read() as session:
            found = session.get_one(Segmentation, segmentation_id)
            wanted = plane_of(session.get_one(Recipe, found.recipe_id))
            if masked:
                masks = read_masks(session, workspace.artifacts, found)
    inputs = [ImageInput((name,)) for name in channels] or [wanted]
    return [read_image(workspace.database, image_id, one) for one in inputs], masks


def read_field(
    workspace: Workspace, image_id: int, segmentation_id: int | None
) -> tuple[NDArray[np.float32], NDArray[np.integer[Any]] | None]:
    """Return the plane (H, W) that was segmented, or is usual, and the masks (H, W) if known."""
    (plane,), masks = read_planes(workspace, image_id, segmentation_id)
    return plane, masks


WINDOW = 256
"""Pixels of the middle of a field that are shown."""


class WellPictures:
    """Pictures of wells, each beside a control of the same plate, in the same contrast.

    Kept are the picture of the control of each plate and its grey levels, nothing else.
    ``images``: the field of each well that is shown.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.names: dict[int, tuple[str, str]] = {}
        self.images: dict[int, int] = {}
        self.channels: dict[int, list[str]] = {}
        self.limits: dict[tuple[str, tuple[str, ...]], list[Limits]] = {}
        self.controls: dict[int, Row] = {}

    def look_up(self, wells: set[int], chosen: Mapping[int, int] | None = None) -> None:
        """Find a field of each well, and its channels: the first that counts, or the ``chosen``."""
        first = select(Image.well_id, func.min(Image.id)).group_by(Image.well_id)
        first = first.where(Image.content_sha256.is_not(None), image_counts(None))
        named = select(Well.id, Plate.barcode, Well.name).join(Plate, Plate.id == Well.plate_id)
        with self.workspace.database.read() as session:
            for some in in_lists(sorted(wells)):
                for well, plate, name in session.execute(named.where(Well.id.in_(some))):
                    self.names[well] = plate, name
                for well, image in session.execute(first.where(Image.well_id.in_(some))):
                    self.images[well] = image
            self.images.update(chosen or {})
            files = channel_files(session, list(self.images.values()))
        for image_id, channels in files.items():
            names = [file.channel for file in channels if file.channel != PROJECTION_CHANNEL]
            nuclear = [name for name in names if NUCLEAR.search(name)][:1]
            self.channels[image_id] = (nuclear + [n for n in names if n not in nuclear])[:3]

    def colours(self) -> str:
        """Say in which colours channels are shown."""
        several = [names for names in self.channels.values() if len(names) > 1]
        if not several:
            return ""
        names = list(several[0])
        caption = [f"{name} blue" for name in names if NUCLEAR.search(name)]
        others = [name for name in names if not NUCLEAR.search(name)]
        caption += [
            f"{name} {of}" for name, of in zip(others, ("green", "pink", "orange"), strict=False)
        ]
        return ", ".join(caption)

    def pair(self, well: int, control: int) -> tuple[Row, Row]:
        """A well and a control of the same plate."""
        if control not in self.controls:
            self.controls[control] = self._picture(control, control)
        return self._picture(well, control), self.controls[control]

    def _picture(self, well: int, control: int) -> Row:
        plate, name = self.names[well]
        image = self.images.get(well)
        shown = {"title": f"{plate} {name}", "image": image, "picture": None, "problem": None}
        if image is None:
            return shown | {"problem": "No field of this well counts, or its files are missing."}
        channels = self.channels[image]
        try:
            planes, _ = read_planes(self.workspace, image, None, channels)
        except CellstoreError as error:
            return shown | {"problem": str(error)}
        key = (plate, tuple(channels))
        if well == control or key not in self.limits:
            self.limits[key] = [grey_limits(plane) for plane in planes]
        middle = coloured([_middle(plane) for plane in planes], self.limits[key], channels)
        return shown | {"picture": jpeg(np.rint(255 * middle).astype(np.uint8))}


def _middle(plane: NDArray[np.float32]) -> NDArray[np.float32]:
    """The middle of a plane (H, W), at most ``WINDOW`` pixels wide and high."""
    starts = [max(0, (length - WINDOW) // 2) for length in plane.shape]
    return plane[tuple(slice(start, start + WINDOW) for start in starts)]
