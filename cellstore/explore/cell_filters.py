"""Which cells the filters of an address mean."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from starlette.requests import Request

from ..enums import Control, Subset
from ..errors import UnknownNameError, UserInputError
from ..jobs.run_names import find_predict_run
from ..models import Plate, Treatment, Well
from ..query.cell_tables import chosen_cells as as_bits
from ..query.cell_tables import selecting
from ..query.cells import choose_recipes
from ..query.exclusions import find_qc_run
from ..query.feature_files import set_of_recipe
from .known_features import feature_of
from .requests import LONGEST_TEXT, Explorer, choice, explorer_of, text, whole

MOST_VALUES = 500
"""Values of one filter."""
MOST_NAMES = 5_000
"""Names among which one that is near to a wrong one is looked for."""
MOST_SELECTIONS = 8
NEWEST = "latest"

YES_NO = ("yes", "no")
RIGHT_WRONG = ("right", "wrong")
CONTROLS = (*(item.value for item in Control), "none")
SUBSETS = (*(item.value for item in Subset), "outside")
EXCLUDED = ("no", "yes", "all")

_RANGE = re.compile(r"(\S*?)\.\.(\S*)")

OF_CELLS = """SELECT c.id AS cell_id, s.image_id, c.excluded IS NOT NULL AS excluded
    FROM cells AS c
    JOIN (
        SELECT max(s.id) AS segmentation_id, s.image_id
        FROM segmentations AS s
        JOIN images AS i ON i.id = s.image_id
        WHERE s.content_sha256 IS NULL OR s.content_sha256 = i.content_sha256
        GROUP BY s.image_id
    ) AS s ON s.segmentation_id = c.segmentation_id"""
"""All cells, of the segmentation made last of the present bytes of each image."""
OF_RUN = """SELECT cell_id, image_id, excluded, label_id, probability
    FROM predictions_with_image
    WHERE run_id = {run} AND rank = 1 AND cell_id IS NOT NULL"""
"""The cells that a predict run has labelled, by whichever segmentation."""
OF_IMAGES = """SELECT i.id AS image_id
    FROM images AS i
    JOIN wells AS w ON w.id = i.well_id
    JOIN plates AS p ON p.id = w.plate_id
    LEFT JOIN treatment_table AS t ON t.treatment_id = w.treatment_id"""
COUNTS = """NOT t.excluded
    AND NOT EXISTS (FROM excluded_images AS e WHERE e.image_id = t.image_id)
    AND NOT EXISTS (FROM later_exclusions AS e WHERE e.level = 'cell' AND e.id = t.cell_id)"""
TRUE_LABELS = """SELECT r.image_id, l.id AS label_id
    FROM run_images AS r JOIN labels AS l ON l.value = r.truth WHERE r.run_id = {run}"""
LABELLED_BY_PEOPLE = "SELECT a.row_id FROM current_labels AS a WHERE a.level = 'cell'"


@dataclass(frozen=True)
class Chosen:
    """The cells that an address means.

    ``query`` is SQL of ours that gives ``cell_id`` and ``image_id`` of each cell, and where
    ``run``, the number of a predict run, is not None also ``label_id`` and ``probability`` of its
    first choice; ``values`` are its parameters. ``images``: SQL that gives the ``image_id`` of the
    images that they may be of. ``active``: the filters in the address.
    """

    query: str
    values: dict[str, Any]
    images: str
    run: int | None
    active: tuple[tuple[str, str], ...]


def chosen_cells(request: Request, prefix: str = "", *, of_run: bool = False) -> Chosen:
    """Return the cells that the filters of an address mean: ``FILTERS``, and ranges of features.

    The filters are combined by AND, the values of one filter that is there several times by OR.
    ``prefix`` stands before the names of all of them. Nothing that is joined has a row for each
    cell and a text in it, so that some million cells are looked through in a fraction of a second.
    ``of_run``: those that a predict run has labelled, also where no filter is about it.
    Raises UserInputError or UnknownNameError or QueryError.
    """
    return _Filters(request, prefix, of_run=of_run).chosen()


class _Filters:
    """Turns the filters of an address into SQL; see :func:`chosen_cells`."""

    def __init__(self, request: Request, prefix: str, *, of_run: bool = False) -> None:
        self.request, self.prefix, self.of_run = request, prefix, of_run
        self.values: dict[str, Any] = {}
        self.active: list[tuple[str, str]] = []
        self.given: dict[str, list[str]] = {}
        self.ranges: list[tuple[str, re.Match[str]]] = []
        self.of_image: list[str] = []
        self.of_cell: list[str] = []
        for whole_name, value in request.query_params.multi_items():
            name = whole_name.removeprefix(prefix)
            if not value.strip() or whole_name.startswith(prefix or OTHER) != bool(prefix):
                continue
            if name in FILTERS:
                self.given.setdefault(name, []).append(value)
                self.active.append((whole_name, value))
                if len(value) > LONGEST_TEXT or len(self.given[name]) > MOST_VALUES:
                    raise UserInputError(f"{whole_name} has too many values, or too long ones.")
            elif found := _RANGE.fullmatch(value.strip()):
                self.ranges.append((name, found))
                self.active.append((whole_name, found[0]))

    def text(self, name: str) -> str | None:
        return self.given[name][-1] if name in self.given else None

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """A filter that is one of some words, or empty."""
        return choice(self.request, self.prefix + name, choices, "") if name in self.given else ""

    def ids(self, name: str) -> list[int]:
        """Whole numbers, with commas between or one at a time."""
        return id_list(self.prefix + name, ",".join(self.given.get(name, ())))

    def bind(self, name: str, value: Any) -> str:
        """Take a value as a parameter of the SQL; return how the SQL names it."""
        self.values[name] = value
        return f"${name}"

    def known(self, noun: str, *columns: Any) -> None:
        """Check that a filter names what the store has: a name typed wrongly would mean no cell."""
        unknown = set(self.given.get(noun, ()))
        with explorer_of(self.request).workspace.database.read() as session:
            for column in columns if unknown else ():
                asked = [item for item in unknown if "\0" not in item]  # PostgreSQL knows no such
                unknown -= set(session.scalars(select(column).where(column.in_(asked))))
            if unknown:
                names = session.scalars(select(columns[0]).distinct().limit(MOST_NAMES))
                raise UnknownNameError.of(noun, min(unknown), sorted(map(str, names)))

    def among(self, name: str, *columns: str) -> str:
        """The condition that one of some columns has one of the values of a filter, or nothing."""
        if name not in self.given:
            return ""
        listed = self.bind(name, self.given[name])
        return " OR ".join(f"list_contains({listed}, {column})" for column in columns)

    def chosen(self) -> Chosen:
        run = self.wells_and_run()
        self.exclusions()
        self.features()
        self.listed()
        if self.of_image:
            every = " AND ".join(f"({item})" for item in self.of_image)
            images = f"{OF_IMAGES}\n    WHERE {every}"
            self.of_cell.append(f"t.image_id IN ({images})")
        else:
            images = "SELECT i.id AS image_id FROM images AS i"
        source = OF_CELLS if run is None else OF_RUN.format(run=run)
        columns = "t.cell_id, t.image_id" + ("" if run is None else ", t.label_id, t.probability")
        every = " AND ".join(f"({item})" for item in self.of_cell) or "true"
        query = f"SELECT {columns} FROM (\n{source}\n) AS t WHERE {every}"  # noqa: S608 - ours
        return Chosen(query, self.values, images, run, tuple(self.active))

    def wells_and_run(self) -> int | None:
        """The filters by well and treatment, and by what a predict run has said."""
        self.known("plate", Plate.barcode)
        self.known("well", Well.name)
        self.known("treatment", Treatment.name, Treatment.name_with_dose)
        conditions = [
            self.among("plate", "p.barcode"),
            self.among("well", "w.name"),
            self.among("treatment", "t.treatment", "t.name_with_dose"),
        ]
        if doses := [_number(f"{self.prefix}dose", item) for item in self.given.get("dose", ())]:
            conditions.append(f"list_contains({self.bind('dose', doses)}, t.dose)")
        if control := self.choice("control", CONTROLS):
            same = "IS NULL" if control == "none" else f"= {self.bind('control', control)}"
            conditions.append(f"w.control {same}")
        if images := self.ids("image"):
            conditions.append(f"i.id IN ({', '.join(map(str, images))})")
        named, other = self.text("run"), whole(self.request, f"{self.prefix}other")
        truth, predicted = self.among("label", "truth"), self.among("predicted", "value")
        subset, result = self.choice("subset", SUBSETS), self.choice("result", RIGHT_WRONG)
        between = [
            f"t.probability {sign} {self.bind(name, _number(name, given))}"
            for name, sign in (("min_probability", ">="), ("max_probability", "<="))
            if (given := self.text(name)) is not None
        ]
        sorted_by = (text(self.request, "sort") or "").removeprefix("-")
        self.of_image += filter(None, conditions)
        # Of the cells that the run has labelled; a subset alone is about images of its split.
        of_run = bool(predicted or result or between or other is not None or self.of_run)
        of_run = of_run or sorted_by == "probability" or (named is not None and not subset)
        if not (of_run or truth or subset):
            return None
        with explorer_of(self.request).workspace.database.read() as session:
            found = find_predict_run(session, named or NEWEST)
            if other is not None:
                find_predict_run(session, str(other))
        if found.folds:
            raise UserInputError(
                f"{named} is several runs. Name one of them: {', '.join(map(str, found.folds))}."
            )
        run = found.id
        its_images = f"SELECT image_id FROM run_images WHERE run_id = {run}"  # noqa: S608 - ours
        if truth or subset:
            every = [f"({truth})"] if truth else []
            every += [f"subset = {self.bind('subset', subset)}"] if subset else []
            self.of_image.append(f"i.id IN ({its_images} AND {' AND '.join(every)})")
        if predicted:
            ids = f"SELECT id FROM labels WHERE {predicted}"  # noqa: S608 - ours
            self.of_cell.append(f"t.label_id IN ({ids})")
        if result:
            right = f"""EXISTS (
                FROM ({TRUE_LABELS.format(run=run)}) AS r
                WHERE r.image_id = t.image_id AND r.label_id = t.label_id)"""
            self.of_cell.append(right if result == "right" else f"NOT {right}")
            self.of_image.append(f"i.id IN ({its_images} AND truth IS NOT NULL)")
        if other is not None:
            self.of_cell.append(f"""EXISTS (
                FROM predictions_with_image AS o WHERE o.run_id = {other} AND o.rank = 1
                AND o.cell_id = t.cell_id AND o.label_id <> t.label_id)""")
        self.of_cell += between
        return run if of_run else None

    def exclusions(self) -> None:
        """What counts, what is flagged, and what people have labelled."""
        excluded = self.choice("excluded", EXCLUDED) or "no"
        if excluded != "all":
            self.of_cell.append(COUNTS if excluded == "no" else f"NOT ({COUNTS})")
        if (flagged := self.text("flagged")) is not None:
            with explorer_of(self.request).workspace.database.read() as session:
                qc = find_qc_run(session, NEWEST).id
            of_run = f"WHERE f.run_id = {qc}"
            if flagged not in YES_NO:
                of_run += f" AND f.reason = {self.bind('flagged', flagged)}"
            found = f"""t.cell_id IN (SELECT f.cell_id FROM cell_flags AS f {of_run})
                OR t.image_id IN (SELECT f.image_id FROM image_flags AS f {of_run})"""  # noqa: S608
            self.of_cell.append(f"NOT ({found})" if flagged == "no" else found)
        if (annotated := self.text("annotated")) is not None:
            people = LABELLED_BY_PEOPLE
            if annotated not in YES_NO:
                people += f" AND a.label = {self.bind('annotated', annotated)}"
            no = "NOT " if annotated == "no" else ""
            self.of_cell.append(f"t.cell_id {no}IN ({people})")

    def features(self) -> None:
        """Ranges of measurements: any name whose value has two dots."""
        for name, found in self.ranges:
            bounds = [
                f"value {sign} {self.bind(f'bound{len(self.values)}', _number(name, bound))}"
                for bound, sign in zip(found.groups(), (">=", "<="), strict=True)
                if bound
            ]
            measured = feature_of(self.request, name)
            every = " AND ".join(bounds) or "value IS NOT NULL"
            self.of_cell.append(
                f"t.cell_id IN (SELECT cell_id FROM ({measured.query}) AS f WHERE {every})"  # noqa: S608
            )

    def listed(self) -> None:
        """Cells by their ids, by a selection, or by a condition in SQL."""
        if ids := self.ids("cells"):
            self.of_cell.append(f"t.cell_id IN ({', '.join(map(str, ids))})")
        explorer = explorer_of(self.request)
        bits = {}
        if (digest := self.text("selection")) is not None:
            bits["selection"] = kept_selection(explorer, digest)
        if (where := self.text("where")) is not None:
            bits["where"] = _cells_where(explorer, where)
        for name, found in bits.items():
            # The bits of a byte stand there from the lowest; DuckDB counts from the highest.
            self.of_cell.append(
                f"CASE WHEN t.cell_id < {len(found) * 8} THEN get_bit("
                f"CAST(CAST({self.bind(name, found)} AS BLOB) AS BIT), "
                "CAST(xor(t.cell_id, 7) AS INTEGER)) = 1 ELSE false END"
            )


OTHER = "b."
"""Stands before the names of the second filter, for cells beside those of the first."""
FILTERS = (
    *("plate", "well", "treatment", "dose", "control", "image", "run", "other", "label"),
    *("predicted", "subset", "result", "min_probability", "max_probability", "excluded"),
    *("flagged", "annotated", "cells", "selection", "where"),
)
"""The filters that are not ranges of features."""


def id_list(name: str, given: str) -> list[int]:
    """Return whole numbers that stand with commas between; raises UserInputError."""
    numbers = [item.strip() for item in given.split(",") if item.strip()]
    for number in numbers:
        if not (number.isdecimal() and len(number) <= 18):
            raise UserInputError(
                f"{name} has to be whole numbers with commas between, not {number[:40]!r}."
            )
    return [int(number) for number in numbers]


def _number(name: str, given: str) -> float:
    try:
        found = float(given)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise UserInputError(f"{name} has to be a number, not {given[:40]!r}.")
    return found


def keep_selection(explorer: Explorer, bits: bytes) -> str:
    """Keep some cells in memory, for a while; return the name of them for an address.

    ``bits``: of cell N bit N % 8 of byte N // 8. The same cells have the same name.
    """
    bits = bits.rstrip(b"\0") or b"\0"
    return _keep(explorer, hashlib.sha256(bits).hexdigest()[:16], bits)


def kept_selection(explorer: Explorer, name: str) -> bytes:
    """Return the bits of a selection; raises UnknownNameError if it is no longer kept."""
    found = explorer.selections.get(name)
    if found is None:
        raise UnknownNameError(
            "This selection is no longer kept. Select the cells again, in the scatter plot."
        )
    return found


def bits_of(ids: NDArray[np.int64]) -> bytes:
    """Return numbers (N,) as bits."""
    found = np.zeros(int(ids.max(initial=0)) + 1, bool)
    found[ids] = True
    return np.packbits(found, bitorder="little").tobytes()


def ids_of(bits: bytes) -> NDArray[np.int64]:
    """Return the numbers that bits say, ascending."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little"))


def _keep(explorer: Explorer, name: str, bits: bytes) -> str:
    explorer.selections.pop(name, None)
    explorer.selections[name] = bits
    for old in list(explorer.selections)[:-MOST_SELECTIONS]:
        explorer.selections.pop(old, None)
    return name


def _cells_where(explorer: Explorer, where: str) -> bytes:
    """The cells of a condition, as bits; found once as long as the store does not change."""
    name = f"where {explorer.reader.mark()} {where}"
    if (known := explorer.selections.get(name)) is not None:
        return known
    with explorer.workspace.database.read() as session:
        segment, measure = choose_recipes(session, None, None)
        found = set_of_recipe(session, measure.id)
        set_name = None if found is None else found.name
        segment_id, measure_id = segment.id, measure.id
    with explorer.reader.questions() as questions:
        chosen = selecting(questions, where, None, segment_id, measure_id, set_name)
        last = questions.ask_ours("SELECT coalesce(max(id), 0) AS n FROM cells").records()[0]["n"]
        bits = as_bits(questions, chosen, int(last))
    _keep(explorer, name, bits)
    return bits
