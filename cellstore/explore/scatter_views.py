"""Scatter plots of cells and of wells: points for the browser, or how many lie where."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any
from urllib.parse import urlencode

import numpy as np
from anyio import from_thread
from numpy.typing import NDArray
from sqlalchemy import select
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..db.bulk import IN_AT_ONCE
from ..enums import Stage
from ..errors import UnknownNameError, UserInputError
from ..jobs.lookup import find_run
from ..models import Cell, Recipe, Run, Well
from ..query.guard import quoted, reading_files
from ..stages.profile import PLACES
from .cell_filters import (
    Chosen,
    bits_of,
    chosen_cells,
    ids_of,
    keep_selection,
    kept_selection,
)
from .known_features import Feature, features_known, profile_features
from .plate_views import plate_maps, wells_of
from .point_maps import COMPONENTS, NotYetError, PointMap, Rows, filled, point_map
from .requests import ask, asking, explorer_of, kept, page, row_of, runs_done, text, url_of, whole
from .sql_views import as_file
from .well_colours import OKABE_ITO, WellValues, make_scale

MOST_POINTS = 1_000_000
"""Points that a browser gets; of more, how many lie in each part of the plane."""
BINS = 256
"""Parts of the plane along each axis."""
SECONDS = 120.0
SHOWN_FEATURES = 1_000
"""Of a feature set, in the form."""
NAMED_GROUPS = 7
"""Groups with a colour of their own: the most frequent ones."""
OTHERS, CONTROLS, NOTHING = 8, 9, 10
"""Numbers of what is in none of them: of another group, a negative control, of no group."""
SHOWN_PLATES, SHOWN_TREATMENTS = 6, 20
"""Of a selection."""

GROUPS = {
    "treatment": "treatment",
    "target": "target",
    "control": "control",
    "plate": "plate",
    "batch": "batch",
    "dose": "dose",
}
"""What points are coloured by, besides any feature, and what it is called."""
GROUPS_OF_RUN = {
    "label": "true label",
    "predicted": "predicted label",
    "result": "right or wrong",
    "subset": "subset of the split",
}
"""The same, of a predict run."""
NAMES_OF_TREATMENTS = ("treatment", "label", "predicted")
"""Of these, negative controls are one group of its own."""

OF_WELLS = """SELECT well_id AS key, treatment, target, control, plate, batch, dose,
        NULL AS label, NULL AS subset
    FROM well_table ORDER BY key"""
OF_IMAGES = """SELECT i.image_id AS key, i.treatment, i.target, i.control, i.plate, i.batch, i.dose,
        r.truth AS label, r.subset
    FROM image_table AS i LEFT JOIN run_images AS r ON r.run_id = $run AND r.image_id = i.image_id
    ORDER BY key"""
"""What colours points, by well and by image; two columns are of a predict run."""
RIGHT_WRONG = {"right": "#0072b2", "wrong": "#d55e00"}

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


class Plot:
    """What an address means: which cells or wells, what is on the axes, and what colours them.

    ``profiles``: the number of a profile run whose wells are shown; None: cells are. ``notes`` say
    how the maps were made that :meth:`axis` has returned.
    """

    def __init__(self, request: Request) -> None:
        self.request, self.explorer = request, explorer_of(request)
        with self.explorer.workspace.database.read() as session:
            named = text(request, "profiles")
            self.profiles = (
                None if named is None else find_run(session, named, Stage.PROFILE).id
            )  # fmt: skip
        self.unit = "cells" if self.profiles is None else "wells"
        usual = self.usual()
        self.x = text(request, "x", usual[0]) or ""
        self.y = text(request, "y", usual[1]) or ""
        self.colour = text(request, "colour", "treatment") or ""
        self.of_run = self.profiles is None and self.colour in GROUPS_OF_RUN
        self.notes: dict[str, None] = {}

    @cached_property
    def chosen(self) -> Chosen:
        """The cells."""
        return chosen_cells(self.request, of_run=self.of_run)

    @cached_property
    def sets(self) -> dict[str, dict[str, Feature]]:
        """The measurements by the set that they are of, then by their names in the address."""
        if self.profiles is not None:
            return {"profile": profile_features(self.request, self.profiles)}
        found: dict[str, dict[str, Feature]] = {}
        for name, item in features_known(self.request).items():
            found.setdefault(name.rpartition(".")[0] or "basic", {})[name] = item
        return found

    def usual(self) -> tuple[str, str]:
        """What is on the axes where the address does not say it."""
        if self.profiles is not None:
            return "pca:profile:1", "pca:profile:2"
        known = list(features_known(self.request))
        wanted = [name for name in ("area", "mean_intensity") if name in known]
        names = [*wanted, *(name for name in known if name not in wanted)]
        return (names[0], names[-1] if len(names) < 2 else names[1]) if names else ("", "")

    def axis(self, name: str) -> Feature:
        """Return what an axis of this name shows: a feature, or ``pca:SET:1``, ``umap:SET:2``.

        Raises UnknownNameError or NotYetError.
        """
        kind, _, rest = name.partition(":")
        if kind in ("pca", "umap") and rest:
            of, _, number = rest.rpartition(":")
            if of not in self.sets:
                raise UnknownNameError.of("feature set", of, list(self.sets))
            found = self.map(kind, of)
            self.notes[found.note] = None
            if not number.isdecimal() or not 1 <= int(number[:9]) <= len(found.titles):
                raise UnknownNameError(f"{name[:60]!r} is none of its {len(found.titles)} axes.")
            title = f"{found.titles[int(number) - 1]} of {of}"
            return Feature(title, f"c{int(number)}", reading_files([found.path]), id="id")
        for axes in self.sets.values():
            if name in axes:
                return axes[name]
        known = [name for axes in self.sets.values() for name in axes]
        raise UnknownNameError.of("feature", name, known)

    def map(self, kind: str, of: str) -> PointMap:
        """Return the map of a feature set: of all its cells, UMAP of those that are chosen."""
        axes = {n: a for n, a in self.sets[of].items() if n not in PLACES}
        columns = tuple(f"f{at}" for at in range(len(axes)))
        first = next(iter(axes.values()), None)
        if first is None or len(axes) < 2:
            raise UserInputError(f"{of} has too few features for a map.")
        values = ", ".join(
            f"{axis.value} AS {quoted(column)}"
            for axis, column in zip(axes.values(), columns, strict=True)
        )
        sql = f"SELECT {first.id} AS id, {values} FROM {first.origin}"  # noqa: S608 - checked names
        given: Mapping[str, Any] = {}
        alike = False
        if self.profiles is not None:
            with self.explorer.workspace.database.read() as session:
                query = select(Recipe.parameters).join(Run, Run.recipe_id == Recipe.id)
                parameters = session.scalars(query.where(Run.id == self.profiles)).one()
            alike = parameters.get("normalise") not in (None, "none")
            key = f"profile {self.profiles} {sorted(axes)}"
        else:
            asked = f"""SELECT count(*) AS n, max(cell_id) AS last,
                (SELECT max(id) FROM runs WHERE stage = 'measure') AS run FROM {first.origin}"""  # noqa: S608
            state = kept(self.request, asked, lambda: tuple(ask(self.request, asked)[0].values()))
            key = f"{of} {sorted(axes)} {state}"
            if kind == "umap":
                chosen = self.chosen
                sql = f"""SELECT f.* FROM ({sql}) AS f
                    JOIN ({chosen.query}) AS t ON t.cell_id = f.id"""  # noqa: S608 - ours
                given = chosen.values
                key += f" {chosen.query} {sorted(given.items())}"
        found = Rows(key, self.unit, sql, given, columns, alike)
        return point_map(self.explorer, kind, found)

    def options(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """What the axes may show, in groups: the name in the address, and in words."""
        maps = []
        for of, axes in self.sets.items():
            if len(axes) > 2:
                maps += [(f"pca:{of}:{at}", f"PC {at} of {of}") for at in range(1, COMPONENTS + 1)]
                maps += [(f"umap:{of}:{at}", f"UMAP {at} of {of}") for at in (1, 2)]
        groups = [
            (of, [(axis.name, axis.title) for axis in list(axes.values())[:SHOWN_FEATURES]])
            for of, axes in self.sets.items()
        ]
        return [*groups, *([("maps of all features", maps)] if maps else [])]

    def groups(self) -> dict[str, str]:
        """What points may be coloured by, besides features."""
        if self.profiles is not None:
            return GROUPS
        has_run = runs_done(self.request, Stage.PREDICT)
        return GROUPS | GROUPS_OF_RUN if has_run else GROUPS

    def colour_title(self) -> str:
        """Say what colours the points."""
        known = GROUPS | GROUPS_OF_RUN
        return known[self.colour] if self.colour in known else self.axis(self.colour).title

    # Rows

    def joined(self, window: tuple[float, ...] | None) -> tuple[str, dict[str, Any]]:
        """Return SQL that gives ``id``, ``key``, ``x``, ``y``, ``c`` of each point, with values."""
        axes = {"x": self.axis(self.x), "y": self.axis(self.y)}
        if self.colour not in GROUPS | GROUPS_OF_RUN:
            axes["c"] = self.axis(self.colour)
        values: dict[str, Any] = {}
        if self.profiles is None:
            values |= self.chosen.values
            more = ", t.label_id" if self.of_run else ""
            source = (
                f"SELECT t.cell_id AS id, t.image_id AS key{more} FROM ({self.chosen.query}) AS t"  # noqa: S608
            )
        else:
            source = "SELECT well_id AS id, well_id AS key FROM well_table WHERE excluded IS NULL"
        by_origin: dict[tuple[str, str], list[str]] = {}
        for letter, axis in axes.items():
            mine = by_origin.setdefault((axis.id, axis.origin), [])
            mine.append(f"CAST({axis.value} AS FLOAT) AS {letter}")
        joins = "".join(
            f"\nJOIN (SELECT {id_} AS id, {', '.join(columns)} FROM {origin}) AS s{at}"  # noqa: S608
            f" ON s{at}.id = t.id"
            for at, ((id_, origin), columns) in enumerate(by_origin.items())
        )
        number = "c" if "c" in axes else "CAST(NULL AS FLOAT)"
        label = "t.label_id" if self.of_run else "CAST(NULL AS BIGINT)"
        where = "isfinite(x) AND isfinite(y)"
        if window is not None:
            values |= dict(zip(("x0", "x1", "y0", "y1"), window, strict=True))
            where += " AND x BETWEEN $x0 AND $x1 AND y BETWEEN $y0 AND $y1"
        sql = f"""SELECT t.id, t.key, {label} AS label_id, x, y, {number} AS c
            FROM ({source}) AS t{joins} WHERE {where}"""  # noqa: S608 - ours
        return sql, values

    def count(self, window: tuple[float, ...] | None) -> int:
        """How many points there are at most; within a window, how many exactly."""
        if window is None and self.profiles is not None:
            return 0  # wells are few
        sql, values = (self.chosen.query, self.chosen.values) if window is None else (
            self.joined(window)
        )  # fmt: skip
        counting = f"SELECT count(*) AS n FROM ({sql})"  # noqa: S608 - ours
        found = kept(self.request, (counting, values), lambda: ask(self.request, counting, values))
        return int(found[0]["n"])

    def points(
        self, window: tuple[float, ...] | None
    ) -> tuple[Ids, Floats, Floats, NDArray[Any], list[dict[str, Any]] | None]:
        """Return ids, x and y of points (N,), their colours, and what groups these are.

        Colours are numbers, NaN where there is none, or with groups the number of each. The order
        is of chance: none of a group lies above all others.
        """
        sql, values = self.joined(window)
        with asking(self.request, SECONDS) as questions:
            arrays = questions.ask_ours(sql, values).arrays()
        x, y, colour = (filled(arrays[name], np.nan).astype(np.float32) for name in "xyc")
        groups = None
        if self.colour in GROUPS | GROUPS_OF_RUN:
            colour, groups = self._grouped(np.asarray(arrays["key"]), arrays["label_id"])
        ids = np.asarray(arrays["id"], np.int64)
        order = np.random.default_rng(0).permutation(len(ids))
        return ids[order], x[order], y[order], colour[order], groups

    def _grouped(self, keys: Ids, labels: NDArray[Any]) -> tuple[NDArray[Any], list[Any] | None]:
        """Return what colours points whose image or well is ``keys``: numbers, or of groups."""
        about = self._about()
        known = about["key"].astype(np.int64)
        at = np.minimum(np.searchsorted(known, keys), max(0, len(known) - 1))
        if self.colour == "dose":
            return np.asarray(about["dose"], np.float32)[at], None
        numbers: dict[Any, int] = {None: 0}
        if self.colour in ("predicted", "result"):
            names = {row["id"]: row["value"] for row in ask(self.request, "FROM labels")}
            known, label_codes = np.unique(filled(labels, -1), return_inverse=True)
            codes = _codes([names.get(int(item)) for item in known], numbers)[label_codes]
            if self.colour == "result":
                truth = _codes(about["label"], numbers)[at]
                codes = np.where(truth == 0, 0, np.where(codes == truth, 1, 2))
                numbers = {None: 0, "right": 1, "wrong": 2}
        else:
            codes = _codes(about[self.colour], numbers)[at]
        controls, ranks = set[Any](), Counter[Any]()
        if self.colour in NAMES_OF_TREATMENTS:
            both = zip(about["control"], about["treatment"], strict=True)
            controls = {name for control, name in both if control == "negative" and name}
            ranks = Counter(about["treatment"])  # as on plate maps, so that colours are the same
        return named_groups(list(numbers), codes, controls, ranks)

    def _about(self) -> dict[str, NDArray[Any]]:
        """What is known of each image or well, by what colours points."""
        run = self.chosen.run if self.of_run else None
        rows = kept(self.request, ("about", self.unit, run), lambda: (
            ask(self.request, OF_WELLS) if self.profiles is not None
            else ask(self.request, OF_IMAGES, {"run": run})
        ))  # fmt: skip
        names = ("key", *GROUPS, "label", "subset")
        return {name: np.array([*(row[name] for row in rows), None], object)[:-1] for name in names}


def _codes(names: Iterable[Any], numbers: dict[Any, int]) -> NDArray[np.int64]:
    """Return the number of each name; new ones get the next."""
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def named_groups(
    names: list[Any],
    codes: NDArray[np.int64],
    controls: set[Any],
    ranks: Mapping[Any, int] | None = None,
) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Return the group of each point (N,), and what the groups are called, as a legend lists them.

    ``codes`` (N,): numbers of ``names``. The most frequent names have a group each, the
    ``controls`` one together, all others one; None is none. ``ranks``: how frequent names are,
    where that is not the number of their points.
    """
    counts = np.bincount(codes, minlength=len(names))
    often = [ranks.get(name, 0) for name in names] if ranks else counts
    ranked = sorted(np.flatnonzero(counts), key=lambda at: (-int(often[at]), str(names[at])))
    groups = np.full(len(names), NOTHING, np.uint8)
    members: dict[int, list[int]] = {}
    free = iter(range(NAMED_GROUPS))
    for at in ranked:
        is_control = names[at] in controls
        code = NOTHING if names[at] is None else CONTROLS if is_control else next(free, OTHERS)
        groups[at] = code
        members.setdefault(code, []).append(at)
    legend: list[dict[str, Any]] = []
    for code, some in sorted(members.items()):
        first = ", ".join(str(names[at]) for at in some[:3])
        first += f" and {len(some) - 3} more" if len(some) > 3 else ""
        words = {CONTROLS: f"{first} (negative controls)", NOTHING: "unknown"}.get(code, first)
        if code == OTHERS and len(some) > 1:
            words = f"{len(some)} others"
        legend.append({"code": code, "name": words, "count": int(counts[some].sum())})
        if code < OTHERS:
            legend[-1]["colour"] = RIGHT_WRONG.get(words, OKABE_ITO[code])
    return groups[codes] if len(codes) else np.zeros(0, np.uint8), legend


# Pages


def scatter(request: Request) -> Response:
    """The page: what is on its axes, and a place for the points, which come after it."""
    plot = Plot(request)
    active = () if plot.profiles is not None else plot.chosen.active
    return page(
        request,
        "scatter.html.j2",
        plot=plot,
        options=plot.options(),
        groups=plot.groups(),
        runs={
            stage.value: [row["id"] for row in runs_done(request, stage)]
            for stage in (Stage.PREDICT, Stage.PROFILE)
        },
        run=text(request, "run", ""),
        most=IN_AT_ONCE,
        chips=[
            {"name": name, "value": value, "without": _without(request, (name, value))}
            for name, value in active
        ],
        cells=url_of("cells") + (f"?{urlencode(active)}" if active else ""),
    )


def _without(request: Request, item: tuple[str, str]) -> str:
    given = [other for other in request.query_params.multi_items() if other != item]
    return f"/scatter?{urlencode(given)}" if given else "/scatter"


def _window(request: Request) -> tuple[float, ...] | None:
    """The part of the plane that is asked for: x from and to, y from and to."""
    given = text(request, "window")
    if given is None:
        return None
    try:
        found = tuple(float(item) for item in given.split(","))
    except ValueError:
        found = ()
    if len(found) != 4 or not np.isfinite(found).all():
        raise UserInputError("window has to be four numbers: x from, x to, y from, y to.")
    return found


def points(request: Request) -> Response:
    """The points as bytes, or of too many their density, or how far the map of them is.

    Bytes (little endian): the length of a JSON text (uint32), that text, filled up with spaces so
    that what follows begins at a multiple of 8; of N points then their ids (N float64), x (N
    float32), y (N float32) and colour (N float32, or uint8 if ``groups`` are in the text); of a
    density the counts (BINS x BINS float64, rows upwards).
    """
    plot, window = Plot(request), _window(request)
    try:
        axes = [plot.axis(plot.x), plot.axis(plot.y)]
        head: dict[str, Any] = {
            "unit": plot.unit,
            "titles": [axis.title for axis in axes],
            "colour": {"title": plot.colour_title()},
            "notes": list(plot.notes),
        }
        n = plot.count(window)
        if n > MOST_POINTS:
            return _packed(*_density(plot, window, head))
        ids, x, y, colour, groups = plot.points(window)
    except NotYetError as error:
        return JSONResponse({"progress": str(error)}, 202)
    head |= {"kind": "points", "n": len(ids), "whole": window is None}
    if groups is not None:
        head["colour"]["groups"] = groups
    else:
        known = colour[np.isfinite(colour)]
        low, high = np.percentile(known, [2, 98]) if len(known) else (0, 1)
        head["colour"] |= {"low": float(low), "high": float(high), "known": len(known)}
    return _packed(head, ids.astype("<f8"), x, y, colour)


def _density(
    plot: Plot, window: tuple[float, ...] | None, head: dict[str, Any]
) -> tuple[dict[str, Any], NDArray[Any]]:
    """Count the points in each part of the plane."""
    if window is None:
        limits = []
        for name in (plot.x, plot.y):
            axis = plot.axis(name)
            value = f"CAST({axis.value} AS FLOAT)"
            sql = f"""SELECT min({value}) AS low, max({value}) AS high
                FROM (FROM {axis.origin}) WHERE isfinite({value})"""  # noqa: S608 - checked names
            row = ask(plot.request, sql)[0]
            limits += [float(row["low"] or 0), float(row["high"] or 0)]
        window = tuple(limits)
    counts = np.zeros((BINS, BINS))
    sql, values = plot.joined(window)
    parts = ", ".join(
        f"least({BINS - 1}, CAST(floor((CAST({c} AS DOUBLE) - ${c}0) / "
        f"greatest(${c}1 - ${c}0, 1e-30) * {BINS}) AS INTEGER)) AS {c}_bin"
        for c in "xy"
    )
    binned = f"SELECT {parts}, count(*) AS n FROM ({sql}) GROUP BY ALL"  # noqa: S608 - ours

    def find() -> dict[str, Any]:
        with asking(plot.request, SECONDS) as questions:
            return questions.ask_ours(binned, values).arrays()

    rows = kept(plot.request, ("density", binned, values), find)
    counts[np.asarray(rows["y_bin"]), np.asarray(rows["x_bin"])] = np.asarray(rows["n"])
    head |= {"kind": "density", "n": int(counts.sum()), "bins": BINS, "window": window}
    return head, counts


def _packed(head: dict[str, Any], *arrays: NDArray[Any]) -> Response:
    words = json.dumps(head).encode()
    words += b" " * (-(len(words) + 4) % 8)
    parts = [struct.pack("<I", len(words)), words]
    parts += [array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays]
    return Response(b"".join(parts), media_type="application/octet-stream")


def point(request: Request) -> Response:
    """What a point is, in words, and its page."""
    number = whole(request, "id", 0) or 0
    with explorer_of(request).workspace.database.read() as session:
        if text(request, "profiles") is not None:
            well, of_cell = row_of(session, Well, number), None
        else:
            of_cell = row_of(session, Cell, number).segmentation.image
            well = of_cell.well
        there = [well.plate.barcode, well.name]
        treatment = well.treatment.name_with_dose if well.treatment else "treatment unknown"
        role = f" ({well.control.value} control)" if well.control else ""
        lines = [" ".join(there), treatment + role]
        if of_cell is not None:
            lines[0] += f", field {of_cell.site}"
            lines.append(f"cell {number}")
    url = url_of("well", *there) if of_cell is None else url_of("cell", number)
    return JSONResponse({"lines": lines, "url": url})


# Selections


def keep(request: Request) -> Response:
    """Keep the points within a lasso, whose ids come as bits: of id N bit N % 8 of byte N // 8."""
    from .server import check_csrf

    check_csrf(request)
    bits = from_thread.run(request.body).rstrip(b"\0")
    last = "SELECT greatest((SELECT max(id) FROM cells), (SELECT max(id) FROM wells)) AS id"
    most = ask(request, last)[0]["id"] or 0
    # Before they are unpacked: each bit takes eight bytes then.
    ids = ids_of(bits) if len(bits) <= most // 8 + 1 else np.array([most + 1])
    if len(ids) and not 0 < ids[0] <= ids[-1] <= most:
        raise UserInputError("A selection is a list of ids of cells or wells.")
    if text(request, "profiles") is not None:
        sql = """SELECT c.id FROM cells AS c JOIN segmentations AS s ON s.id = c.segmentation_id
            JOIN images AS i ON i.id = s.image_id
            WHERE i.well_id IN (SELECT unnest($wells))"""
        with explorer_of(request).reader.questions(SECONDS) as questions:
            arrays = questions.ask_ours(sql, {"wells": ids[:10_000].tolist()}).arrays()
        bits = bits_of(np.asarray(arrays["id"], np.int64))
    return JSONResponse({"selection": keep_selection(explorer_of(request), bits)})


def selected_ids(request: Request) -> Response:
    """The ids of a selection that is kept, as bits: of cells, or of wells."""
    bits = kept_selection(explorer_of(request), text(request, "selection") or "")
    if text(request, "profiles") is not None:
        bits = bits_of(np.array([row["well_id"] for row in _wells(request)], np.int64))
    return Response(bits, media_type="application/octet-stream")


def _wells(request: Request) -> list[dict[str, Any]]:
    """The wells of a selection, each with the number of its cells in it."""
    chosen = chosen_cells(request)
    sql = f"""SELECT w.plate, w.well_id, w.treatment, w.control, c.n
        FROM (
            SELECT i.well_id, count(*) AS n FROM ({chosen.query}) AS t
            JOIN images AS i ON i.id = t.image_id GROUP BY i.well_id
        ) AS c JOIN well_table AS w ON w.well_id = c.well_id
        ORDER BY w.plate, w.well_row, w.well_column"""  # noqa: S608 - ours
    return ask(request, sql, chosen.values)


def selected(request: Request) -> Response:
    """What is in a selection: a part of the page."""
    name = text(request, "selection") or ""
    wells = _wells(request)
    treatments: dict[tuple[str, bool], list[int]] = {}
    for row in wells:
        key = (row["treatment"] or "unknown", row["control"] == "negative")
        found = treatments.setdefault(key, [0, 0])
        found[0] += row["n"]
        found[1] += 1
    listed = sorted(treatments.items(), key=lambda item: -item[1][0])
    cells = Counter[str]()
    for row in wells:
        cells[row["plate"]] += row["n"]
    fullest = [plate for plate, _ in cells.most_common(SHOWN_PLATES)]
    of_plates = wells_of(request, tuple(sorted(fullest))) if fullest else []
    numbers = dict.fromkeys((row["well_id"] for row in of_plates), 0.0)
    numbers |= {row["well_id"]: float(row["n"]) for row in wells}
    values = WellValues("Selected cells", numbers, limits=(0.0, max(numbers.values(), default=1.0)))
    scale = make_scale(values, of_plates)
    maps, there = plate_maps(fullest, of_plates, values, scale)
    return page(
        request,
        "selected.html.j2",
        name=name,
        cells=cells.total(),
        wells=wells,
        maps=maps,
        there=there,
        scale=scale,
        n_plates=len(cells),
        treatments=listed[:SHOWN_TREATMENTS],
        n_treatments=len(listed),
    )


def selected_file(request: Request) -> Response:
    """The cells of a selection with their wells, as a file."""
    chosen = chosen_cells(request)
    sql = f"""SELECT t.cell_id, i.plate, i.well, i.site, i.treatment, i.dose, i.dose_unit,
            i.control, i.image_id
        FROM ({chosen.query}) AS t JOIN image_table AS i ON i.image_id = t.image_id
        ORDER BY t.cell_id"""  # noqa: S608 - ours
    name = f"selection.{request.path_params['kind']}"
    return as_file(request, name, lambda questions: questions.ask_ours(sql, chosen.values))


ROUTES = [
    Route("/scatter", scatter),
    Route("/scatter/points", points),
    Route("/scatter/point", point),
    Route("/scatter/selected", selected),
    Route("/scatter/selected.bin", selected_ids),
    Route("/scatter/selected.{kind}", selected_file),
    Route("/selection", keep, methods=["POST"]),
]
