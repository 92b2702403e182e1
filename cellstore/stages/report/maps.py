"""What the wells of the scored plates show: accuracy, cells, and any feature that was measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...analytics import Questions
from ...analytics.schema import quoted
from ...drawing.plates import layout_of, well_names
from ...drawing.svg import svg
from ...errors import UnknownNameError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_PLATES = 12
USUAL = ("area", "mean_intensity")
"""Features that are shown if none is named, and they were measured."""
ABSENT = (0.54, 0.56, 0.6, 0.25)
"""Colour of a well without a value, seen on white as on black."""
SMALL, LARGE = 3.6, 7.4
LEFT, BAR, ABOVE = 0.3, 0.7, 0.35
"""Inches: widths of a map, and what is left for letters, colours and numbers."""

WELLS = """
    SELECT p.id AS plate_id, p.barcode AS plate, w.id, w.name, w."row", w."column"
    FROM wells AS w JOIN plates AS p ON p.id = w.plate_id
    WHERE w.plate_id IN (SELECT plate_id FROM wells WHERE list_contains(?, id))
    ORDER BY p.barcode, w."row", w."column"
"""
USED = """
    WITH used AS (
        SELECT DISTINCT c.segmentation_id FROM predictions AS p JOIN cells AS c ON c.id = p.cell_id
        WHERE p.run_id = ? AND p.rank = 1
    ),
    found AS (
        SELECT c.id, s.image_id, i.well_id FROM cells AS c
        JOIN segmentations AS s ON s.id = c.segmentation_id
        JOIN images AS i ON i.id = s.image_id
        WHERE c.excluded IS NULL AND s.id IN (SELECT segmentation_id FROM used)
    )
"""
COUNTED = "SELECT well_id, count(*) / count(DISTINCT image_id) AS value FROM found GROUP BY 1"
SETS = "SELECT name FROM feature_sets ORDER BY id DESC"
NUMBERS = ("DOUBLE", "FLOAT", "BIGINT", "INTEGER", "SMALLINT", "TINYINT", "BOOLEAN", "HUGEINT")


@dataclass(frozen=True)
class Place:
    """A well of a scored plate."""

    well_id: int
    name: str
    row: int
    column: int


@dataclass(frozen=True)
class Measure:
    """A number for each well (by id). ``low`` and ``high``: from where to where colours go."""

    title: str
    unit: str
    values: Mapping[int, float]
    low: float
    high: float


@dataclass(frozen=True)
class PlateMap:
    """One plate by one measure, drawn, and in words how its lowest and highest wells are called."""

    plate: str
    svg: str
    extremes: str


@dataclass(frozen=True)
class MapGroup:
    """One measure on every plate that is shown."""

    measure: Measure
    maps: tuple[PlateMap, ...]


def plates_of(questions: Questions, wells: Sequence[int]) -> dict[str, list[Place]]:
    """Return all wells of the plates that ``wells`` are on, by barcode."""
    found: dict[str, list[Place]] = defaultdict(list)
    for row in questions.ask(WELLS, [list(wells)]).to_pylist():
        found[row["plate"]].append(Place(row["id"], row["name"], row["row"], row["column"]))
    return dict(found)


def measures(
    questions: Questions, run_id: int, images: Sequence[Mapping[str, Any]], wanted: Sequence[str]
) -> list[Measure]:
    """Return accuracy and cells by well, and the features ``wanted``, else the usual ones.

    ``images``: rows of the view ``verdicts``, one per image. A feature is a column of a feature
    set, or SET.COLUMN; its value is the mean over the cells of a well that the run could label.

    Raises:
        UnknownNameError: no feature set has such a column of numbers.
    """
    columns = _columns(questions)
    chosen = [_find(columns, name) for name in wanted]
    if not wanted:
        chosen = [columns[name] for name in USUAL if name in columns]
    cells = questions.ask(f"{USED} {COUNTED}", [run_id]).to_pylist()
    return [
        Measure("Accuracy", "images with the right label, %", _accuracy(images), 0, 100),
        _measure("Cells", "cells in an image", {row["well_id"]: row["value"] for row in cells}),
        *_features(questions, run_id, chosen),
    ]


def _accuracy(images: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    by_well: dict[int, list[bool]] = defaultdict(list)
    for row in images:
        if row["correct"] is not None:
            by_well[row["well_id"]].append(row["correct"])
    return {well: 100 * sum(right) / len(right) for well, right in by_well.items()}


def _columns(questions: Questions) -> dict[str, tuple[str, str]]:
    """Return set and column by the names that mean them; a bare name means the newest set."""
    found: dict[str, tuple[str, str]] = {}
    for name in questions.ask(SETS)["name"].to_pylist():
        try:
            columns = questions.columns(name)
        except UnknownNameError:  # a set that is hidden by a table of that name
            continue
        for column, kind in columns:
            if kind in NUMBERS and column != "cell_id":
                found[f"{name}.{column}"] = (name, column)
                found.setdefault(column, (name, column))
    return found


def _find(columns: Mapping[str, tuple[str, str]], name: str) -> tuple[str, str]:
    if name not in columns:
        raise UnknownNameError.of("feature", name, sorted(columns))
    return columns[name]


def _features(
    questions: Questions, run_id: int, chosen: Sequence[tuple[str, str]]
) -> list[Measure]:
    by_set: dict[str, list[str]] = defaultdict(list)
    for name, column in dict.fromkeys(chosen):
        by_set[name].append(column)
    found: dict[tuple[str, str], Measure] = {}
    for name, columns in by_set.items():
        rows = questions.ask(_question(name, columns), [run_id]).to_pylist()
        for place, column in enumerate(columns):
            values = {row["well_id"]: row[f"v{place}"] for row in rows}
            known = {well: value for well, value in values.items() if value is not None}
            found[name, column] = _measure(column, f"mean of the cells, set {name}", known)
    return [found[key] for key in dict.fromkeys(chosen)]


def _question(name: str, columns: Sequence[str]) -> str:
    means = ", ".join(
        f"avg(f.{quoted(column)}) FILTER (WHERE isfinite(f.{quoted(column)}::DOUBLE)) AS v{place}"
        for place, column in enumerate(columns)
    )
    return (
        f"{USED} SELECT found.well_id, {means} FROM found "  # noqa: S608 - names are quoted
        f"JOIN {quoted(name)} AS f ON f.cell_id = found.id GROUP BY 1"
    )


def _measure(title: str, unit: str, values: Mapping[int, float]) -> Measure:
    """Colours end at the 2nd and 98th percentile: odd wells must not take them all."""
    if not values:
        return Measure(title, unit, values, 0, 1)
    numbers = list(values.values())
    low, high = (float(x) for x in np.percentile(numbers, [2, 98]))
    if low == high:
        low, high = min(numbers), max(numbers)
    return Measure(title, unit, values, low, high if high > low else low + 1)


def drawn(plates: Mapping[str, Sequence[Place]], found: Sequence[Measure]) -> list[MapGroup]:
    """Draw each measure on each of the first plates."""
    shown = list(plates.items())[:SHOWN_PLATES]
    small = len(shown) > 1
    return [
        MapGroup(
            item,
            tuple(
                PlateMap(plate, _map(plate, places, item, small=small), _extremes(places, item))
                for plate, places in shown
            ),
        )
        for item in found
    ]


def _extremes(places: Sequence[Place], found: Measure) -> str:
    values = found.values
    known = sorted((values[item.well_id], item.name) for item in places if item.well_id in values)
    if not known:
        return "no well has a value"
    (low, first), (high, last) = known[0], known[-1]
    if low == high:
        return f"{len(known)} wells, {_brief(low)} in each"
    return f"{len(known)} wells, from {_brief(low)} ({first}) to {_brief(high)} ({last})"


def _map(plate: str, places: Sequence[Place], found: Measure, *, small: bool) -> str:
    rows, columns = layout_of([(item.row, item.column, None) for item in places])
    values = np.full((rows, columns), np.nan)
    there = np.zeros((rows, columns, 4))
    for item in places:
        there[item.row - 1, item.column - 1] = ABSENT
        values[item.row - 1, item.column - 1] = found.values.get(item.well_id, np.nan)
    width = SMALL if small else LARGE
    height = (width - LEFT - BAR) * rows / columns + ABOVE

    def draw(figure: Figure) -> None:
        # Fixed places: to lay out dozens of maps by their texts takes seconds.
        figure.set_layout_engine("none")
        base, tall = 0.05 / height, (height - ABOVE - 0.05) / height
        axes = figure.add_axes((LEFT / width, base, (width - LEFT - BAR) / width, tall))
        # A picture of one pixel for each well: a path for each is long.
        spread: dict[str, Any] = {
            "interpolation": "none",
            "extent": (0.5, columns + 0.5, rows + 0.5, 0.5),
        }
        axes.imshow(there, **spread)
        picture = axes.imshow(values, cmap="viridis", vmin=found.low, vmax=found.high, **spread)
        axes.set_ylim(0.5, rows + 0.5)
        well_names(axes, rows, columns, small=small)
        axes.spines[:].set(visible=True, alpha=0.3)
        beside = figure.add_axes(((width - BAR + 0.08) / width, base, 0.1 / width, tall))
        scale = figure.colorbar(picture, cax=beside)
        scale.outline.set_visible(False)
        scale.ax.tick_params(length=0, labelsize=7 if small else 8)

    alt = f"Plate {plate}, {found.title} ({found.unit}): {_extremes(places, found)}."
    return svg(f"{plate} {found.title} {found.unit}", (width, height), draw, alt)


def _brief(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"
