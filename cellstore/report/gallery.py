"""Pictures of cells, of wells or of whole fields, beside each other.

:func:`show` draws them for a notebook, as axes of matplotlib; :class:`WellPictures` for a page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
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
from ..query.guard import quoted
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
    SELECT c.id AS unit, s.image_id, s.id AS segmentation_id, i.plate, i.well, i.site, i.control,
        c.object_number, c.min_row, c.min_col, c.max_row, c.max_col, {columns}
    FROM cells AS c
    JOIN segmentations AS s ON s.id = c.segmentation_id
    JOIN image_table AS i ON i.image_id = s.image_id
    JOIN images AS m ON m.id = s.image_id
    LEFT JOIN cell_table AS t ON t.cell_id = c.id
    WHERE m.content_sha256 IS NOT NULL AND c.max_row > c.min_row AND ({chosen})
"""
FIELDS = """
    SELECT t.image_id AS unit, t.image_id, s.segmentation_id, t.plate, t.well, t.site, t.control,
        {columns}
    FROM image_table AS t
    JOIN images AS m ON m.id = t.image_id
    LEFT JOIN (
        SELECT image_id, max(id) AS segmentation_id FROM segmentations
        WHERE mask_artifact_id IS NOT NULL GROUP BY image_id
    ) AS s ON s.image_id = t.image_id
    WHERE m.content_sha256 IS NOT NULL AND ({chosen})
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


class Asked(NamedTuple):
    """What is to be shown.

    ``chosen``: a condition in SQL on ``t``; ``extra``: columns by unit; ``split``: SQL with the
    label and the subset of cells of a split.
    """

    of_cells: bool
    chosen: str
    parameters: list[Any]
    extra: Mapping[str, Mapping[int, Any]]
    listed: bool
    split: str = ""


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
    """Draw cells or fields; see :meth:`cellstore.Store.show`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UnknownNameError: there is no such image, column or channel.
        UserInputError: nothing is there to be shown.
        CellstoreError: none of the images can be read; the problem of the first.
    """
    need("report")
    if n is not None and n < 1:
        raise UserInputError(f"n must be at least 1, not {n}.")
    asked = _asked(workspace, what)
    numbers = list(numbers) or (["area"] if asked.of_cells else ["n_cells"])
    with open_questions(workspace) as questions:
        groups = _drawn(questions, asked, by, n, numbers, seed)
        controls: dict[str, list[Row]] = {}
        if by == "treatment":
            controls = _controls(questions, asked, groups, numbers, seed)
    with workspace.database.read() as session:
        named = tuple(find_channels(session, channels)) if channels else ()
    pictures = _Pictures(workspace, named, outlines=outlines)
    shown = [*groups.values(), *controls.values()]
    images = dict.fromkeys((r["image_id"], r["segmentation_id"]) for rows in shown for r in rows)
    for image in track(workspace.progress, "show", len(images), images):
        pictures.read(*image)
    pictures.check()
    return _laid_out(pictures, groups, controls, numbers, of_cells=asked.of_cells, by=by)


def _asked(workspace: Workspace, what: Any) -> Asked:
    """What is meant by ids, a table, a condition, names of images or a selection."""
    if what is None:
        with workspace.database.read() as session:
            segmented = session.query(Segmentation).filter(Segmentation.n_cells > 0).first()
        return Asked(segmented is not None, "t.excluded IS NULL", [], {}, False)
    if isinstance(what, CellTable):
        chosen = f"c.id IN (SELECT cell_id FROM (\n{what.query}\n))"  # noqa: S608 - guarded
        return Asked(True, chosen, [], {}, False, what.query)
    if isinstance(what, Selection):
        with workspace.database.read() as session:
            ids = list(session.scalars(images_of(session, what)))
        return _by_ids(False, ids, {})
    if isinstance(what, str) and not _is_name(what):
        cells = f"SELECT cell_id FROM cell_table WHERE excluded IS NULL AND (\n{what}\n)"  # noqa: S608
        chosen = f"c.id IN ({cells})"
        return Asked(True, chosen, [], {}, False)
    if hasattr(what, "to_pandas") and not hasattr(what, "iloc"):
        what = what.to_pandas()
    if hasattr(what, "columns"):
        unit = next((name for name in ("cell_id", "image_id") if name in what.columns), None)
        if unit is None:
            raise UserInputError("The table needs a column cell_id, or image_id for whole fields.")
        first = what.drop_duplicates(unit)
        try:
            ids = [int(value) for value in first[unit]]
        except (TypeError, ValueError) as error:
            raise UserInputError(f"Column {unit} needs a number in each row.") from error
        others = [name for name in what.columns if name != unit]
        extra = {str(name): dict(zip(ids, first[name], strict=True)) for name in others}
        return _by_ids(unit == "cell_id", ids, extra)
    values = [what] if isinstance(what, str) or not hasattr(what, "__iter__") else list(what)
    if values and all(isinstance(value, str) for value in values):
        with workspace.database.read() as session:
            return _by_ids(False, [find_image(session, value) for value in values], {})
    try:
        return _by_ids(True, [int(value) for value in values], {})
    except (TypeError, ValueError):
        raise UserInputError(
            "Give ids of cells, a table with cell_id or image_id, names of images, a Selection of "
            "images, or a condition such as \"treatment = 'taxol' AND area > 500\"."
        ) from None


def _is_name(text: str) -> bool:
    return not any(mark in text for mark in "<>='") and " " not in text.strip()


def _by_ids(of_cells: bool, ids: list[int], extra: Mapping[str, Mapping[int, Any]]) -> Asked:
    unit = "c.id" if of_cells else "t.image_id"
    return Asked(of_cells, f"list_contains(?, {unit})", [ids], extra, True)


def _drawn(
    questions: Questions,
    asked: Asked,
    by: str | None,
    n: int | None,
    numbers: Sequence[str],
    seed: int,
) -> dict[str, list[Row]]:
    """The rows to draw, by the name of their group."""
    relation = "cell_table" if asked.of_cells else "image_table"
    known = questions.ask(f"FROM {relation} LIMIT 0").names
    of_split = by in ("label", "subset") and bool(asked.split)
    if of_split:
        known = [*known, str(by)]
    for name in (*numbers, *([by] if by else [])):
        if name not in known and name not in asked.extra:
            raise UnknownNameError.of("column", name, [*asked.extra, *known])
    columns = [f"t.{quoted(name)} AS {quoted(f'number {name}')}" for name in numbers
               if name in known]  # fmt: skip
    of_table = by is not None and by not in asked.extra
    group = f"CAST(t.{quoted(by)} AS VARCHAR)" if by is not None and of_table else "NULL"
    if of_split:
        group = f"(SELECT o.{by} FROM (\n{asked.split}\n) AS o WHERE o.cell_id = c.id)"  # noqa: S608
    columns.append(f"{group} AS group_name")
    usual = OF_GROUP if asked.of_cells else FIELDS_OF_GROUP
    each = n or (MOST if asked.listed else usual)
    sql = (CELLS if asked.of_cells else FIELDS).format(
        columns=", ".join(columns), chosen=asked.chosen
    )
    by_frame = by is not None and not of_table
    sample = MOST * 1000 if by_frame else each
    text = DRAWN.format(query=sql, seed=int(seed), each=sample, most=sample * 1000)
    groups: dict[str, list[Row]] = {}
    answer = questions.ask(text, asked.parameters)
    for values in answer.rows():
        row = dict(zip(answer.names, values, strict=True))
        if by_frame:
            row["group_name"] = str(asked.extra[str(by)].get(row["unit"]))
        for name in numbers:
            if name in asked.extra:
                row[f"number {name}"] = asked.extra[name].get(row["unit"])
        name = row["group_name"]
        rows = groups.setdefault("" if by is None else "none" if name is None else name, [])
        if len(rows) < each:
            rows.append(row)
    if not groups:
        raise UserInputError(
            "There is nothing to show: no cell or image with its files is meant. "
            "See what is there with: cellstore status"
        )
    return dict(sorted(groups.items())) if by_frame else groups


def _controls(
    questions: Questions,
    asked: Asked,
    groups: Mapping[str, list[Row]],
    numbers: Sequence[str],
    seed: int,
) -> dict[str, list[Row]]:
    """By group some negative controls of the plates of its first pictures."""
    found = {}
    for number, (name, rows) in enumerate(list(groups.items())[:GROUPS]):
        if any(row["control"] == "negative" for row in rows):
            continue
        plates = list(dict.fromkeys(row["plate"] for row in rows))
        chosen = "t.control = 'negative' AND t.excluded IS NULL AND list_contains(?, t.plate)"
        beside = Asked(asked.of_cells, chosen, [plates], {}, False)
        own = [column for column in numbers if column not in asked.extra]
        few = 2 if asked.of_cells else 1
        try:  # others beside each group
            drawn = _drawn(questions, beside, None, few, own, seed + number)
            found[name] = next(iter(drawn.values()))
        except UserInputError:  # the plates have none
            continue
    return found


class _Pictures:
    """The pixels of the images that are shown, read once each."""

    def __init__(self, workspace: Workspace, channels: tuple[str, ...], *, outlines: bool) -> None:
        self.workspace, self.channels, self.outlines = workspace, channels, outlines
        self.planes: dict[tuple[int, int | None], list[NDArray[np.float32]]] = {}
        self.masks: dict[tuple[int, int | None], NDArray[Any] | None] = {}
        self.problems: dict[int, CellstoreError] = {}

    def read(self, image_id: int, segmentation_id: int | None) -> None:
        """Read the channels (H, W), and the masks (H, W) if they are known."""
        key, wanted, masks = (image_id, segmentation_id), ImageInput(), None
        database = self.workspace.database
        try:
            with database.read() as session:
                if segmentation_id is not None:
                    found = session.get_one(Segmentation, segmentation_id)
                    wanted = plane_of(session.get_one(Recipe, found.recipe_id))
                    if found.mask_artifact_id is not None and self.outlines:
                        masks = read_masks(session, self.workspace.artifacts, found)
            inputs = [ImageInput((name,)) for name in self.channels] or [wanted]
            self.planes[key] = [read_image(database, image_id, one) for one in inputs]
            self.masks[key] = masks
        except CellstoreError as error:
            self.problems[image_id] = error

    def check(self) -> None:
        """Say which images cannot be read; raise the first problem, if none can."""
        if self.problems:
            first = next(iter(self.problems.values()))
            if not self.planes:
                raise first
            self.workspace.progress.note(f"{len(self.problems)} images cannot be read: {first}")

    def limits(self, rows: Sequence[Row]) -> dict[str, list[Limits]]:
        """Black and white of each channel, the same for all pictures of a plate."""
        found: dict[str, list[list[Limits]]] = {}
        for image_id, segmentation_id, plate in dict.fromkeys(
            (row["image_id"], row["segmentation_id"], row["plate"]) for row in rows
        ):
            if (image_id, segmentation_id) in self.planes:
                planes = self.planes[image_id, segmentation_id]
                found.setdefault(plate, []).append([grey_limits(plane) for plane in planes])
        return {
            plate: [
                (float(np.median([low for low, _ in of])), float(max(high for _, high in of)))
                for of in zip(*some, strict=True)
            ]
            for plate, some in found.items()
        }


def _laid_out(
    pictures: _Pictures,
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
    limits, tile = pictures.limits(every), TILE if of_cells else FIELD_TILE
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
                _draw(one, pictures, row, limits.get(row["plate"], []), side)
                _say(one, row, numbers, of_cells=of_cells)
    said = " + ".join(pictures.channels) or "the plane that was segmented"
    if of_cells:
        said = f"{side} x {side} pixels each, {said}"
    if hidden > 0:
        said += f"; {hidden} more groups are not shown"
    figure.text(names / size[0], 0.04 / height, said, size=7, color=GREY)
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


def _draw(axes: Any, pictures: _Pictures, row: Row, limits: Sequence[Limits], side: int) -> None:
    """One picture: the part around a cell, or, with no ``side``, the whole field."""
    key = row["image_id"], row["segmentation_id"]
    if key not in pictures.planes:
        axes.text(0.5, 0.5, "cannot be\nread", size=7, color=GREY, ha="center", va="center")
        return
    planes, masks = pictures.planes[key], pictures.masks[key]
    if side == 0:
        picture = coloured(planes, limits, pictures.channels)
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
    inner = coloured([plane[part] for plane in planes], limits, pictures.channels)
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


def read_field(
    workspace: Workspace, image_id: int, segmentation_id: int | None
) -> tuple[NDArray[np.float32], NDArray[np.integer[Any]] | None]:
    """Return the plane (H, W) that was segmented, or is usual, and the masks (H, W) if known.

    Raises:
        CellstoreError: the image or the masks cannot be read.
    """
    wanted, masks = ImageInput(), None
    if segmentation_id is not None:
        with workspace.database.read() as session:
            found = session.get_one(Segmentation, segmentation_id)
            wanted = plane_of(session.get_one(Recipe, found.recipe_id))
            masks = read_masks(session, workspace.artifacts, found)
    return read_image(workspace.database, image_id, wanted), masks


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
        said = [f"{name} blue" for name in names if NUCLEAR.search(name)]
        others = [name for name in names if not NUCLEAR.search(name)]
        said += [
            f"{name} {of}" for name, of in zip(others, ("green", "pink", "orange"), strict=False)
        ]
        return ", ".join(said)

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
        inputs = [ImageInput((one,)) for one in channels] or [ImageInput()]
        try:
            planes = [read_image(self.workspace.database, image, one) for one in inputs]
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
