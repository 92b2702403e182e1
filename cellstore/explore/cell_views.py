"""The gallery: crops of the cells that an address means, one or two filters beside each other."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlencode

from sqlalchemy import and_, func, select
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from ..db.fields import is_label_now
from ..enums import (
    CellFlagReason,
    Control,
    ImageFlagReason,
    Level,
    Stage,
)
from ..errors import UnknownNameError, UserInputError, some_of
from ..models import (
    Annotation,
    Cell,
    Image,
    ImageFile,
    Label,
    Plate,
    Prediction,
    Segmentation,
    Treatment,
    Well,
)
from ..report.drawing import brief
from .cell_filters import (
    COUNTS,
    FILTERS,
    OF_CELLS,
    OF_RUN,
    OTHER,
    Chosen,
    chosen_cells,
    id_list,
)
from .known_features import feature_of, features_known
from .pixels import LARGEST_SIDE, SHEET_COLUMNS, jpeg, sheet_pixels, usual_channels
from .requests import (
    ask,
    choice,
    explorer_of,
    kept,
    page,
    row_of,
    runs_done,
    text,
    url_of,
    usual_run,
    whole,
)

PER_SHEET = 100
"""Crops of a sheet, which are one picture; half of that for each of two filters."""
FIRST = 4_096
"""Cells that are looked at first where many are sorted by a number."""
SIDES = (32, 48, 64, 96, 128, 192, 256)
MOST_NAMES, MOST_ORDERS, MOST_CHANNELS = 1_000, 30, 20
"""Names that a list of the form offers; features to sort by; channels of a crop."""
WITH_CONTROLS = ("treatment", "label", "predicted", "result", "well")
"""Filters beside whose cells negative controls are shown unless the address says none."""
OF_PAGE = ("sort", "seed", "beside", "side", "channels", "outlines", "after", "pane")
"""What else the address of a gallery may say."""
OF_FORM = ("feature", "min", "max")
"""What the form sends for a range of a feature."""
CERTAIN, MEASURED_KEY = "probability", "coalesce(k.key, 'infinity')"
SHOWN_IN_FORM = {
    *("plate", "well", "treatment", "dose", "control", "run", "label", "predicted", "result"),
    *("subset", "min_probability", "max_probability", "other", "flagged", "annotated", "excluded"),
    *("where", "sort", "seed", "beside", "side", "channels", "outlines", "b.plate", "b.well"),
    *("b.treatment", "b.dose", "b.control", "b.run", "b.label", "b.predicted", "b.result"),
}
SHORT_WORDS = {
    "control": "role",
    "image": "field",
    "other": "labelled otherwise by run",
    "label": "true label",
    "result": "prediction",
    "min_probability": "probability from",
    "max_probability": "probability to",
    "annotated": "labelled by people",
}
PIXEL_SIZES = "SELECT min(pixel_size) AS low, max(pixel_size) AS high FROM images"
SIZES = """
    SELECT quantile_cont(greatest(max_row - min_row, max_col - min_col), 0.9) AS size
    FROM (SELECT max_row, min_row, max_col, min_col FROM cells LIMIT 5000)
"""


class Order(NamedTuple):
    """How cells are sorted: by ``key``, SQL on ``t``, then by id.

    ``source``: SQL that gives ``cell_id`` and ``key`` of all cells that have one, where it is
    cheaper to begin with the first of these than with the chosen cells; it is ``k`` where ``key``
    is ``MEASURED_KEY``. ``whole``: keys are whole
    numbers. ``shown``: a key is worth showing; it stands with its sign changed where ``falling``.
    """

    key: str
    source: str = ""
    whole: bool = True
    shown: bool = False
    falling: bool = False


class Pane(NamedTuple):
    """The cells of one of the filters of the page; ``prefix`` is that of the filter."""

    prefix: str
    title: str
    chosen: Chosen
    order: Order


def order_of(request: Request, chosen: Chosen) -> Order:
    """Return how the address sorts cells: at random unless it says something else.

    Raises UnknownNameError.
    """
    seed = whole(request, "seed", 1, high=2**31)
    # To look for another run's answer about each cell would take seconds.
    begin = f"SELECT cell_id, {{}} AS key FROM ({OF_RUN.format(run=chosen.run)})"  # noqa: S608
    costly = any(name.removeprefix(OTHER) == "other" for name, _ in chosen.active)
    drawn = f"hash(cell_id, {seed})"
    at_random = Order(f"hash(t.cell_id, {seed})", begin.format(drawn) if costly else "")
    given = text(request, "sort", "random") or "random"
    if given == "random":
        return at_random
    if given == "id":
        return Order("t.cell_id")
    name, falling = given.removeprefix("-"), given.startswith("-")
    sign = "-" if falling else ""
    if name == CERTAIN:
        if chosen.run is None:
            return at_random
        source = begin.format(f"{sign}probability") if costly else ""
        return Order(f"{sign}t.probability", source, False, True, falling)
    # What is no number, or was not measured, comes last.
    keyed = f"""SELECT cell_id, coalesce(nullif({sign}value, 'nan'), 'infinity') AS key
        FROM ({feature_of(request, name).query})"""  # noqa: S608 - ours
    return Order(MEASURED_KEY, keyed, False, True, falling)


def cells_after(
    request: Request, chosen: Chosen, order: Order, after: str | None, n: int
) -> list[dict[str, Any]]:
    """Return the first ``n`` cells behind a place in the order: ``cell_id``, ``image_id``, ``key``.

    ``after`` is the ``place`` of the last cell before them; so it matters not what was added to the
    store meanwhile.
    Raises UserInputError.
    """
    values, behind = dict(chosen.values), "true"
    if after is not None:
        key, _, cell_id = after.partition("~")
        try:
            values["after_key"] = int(key) if order.whole else float(key)
            values["after_id"] = int(cell_id)
        except ValueError:
            raise UserInputError("after has to be a position in the gallery.") from None
        if max(abs(values["after_id"]), abs(values["after_key"]) if order.whole else 0) >= 2**64:
            raise UserInputError("after has to be a position in the gallery.")
        behind = "key > $after_key OR (key = $after_key AND cell_id > $after_id)"
    last = f"ORDER BY key, cell_id LIMIT {n}"
    rows: list[dict[str, Any]] = []
    if order.source:
        rows = ask(
            request,
            f"""WITH first AS (
                SELECT cell_id, key FROM ({order.source}) WHERE {behind}
                ORDER BY key, cell_id LIMIT {FIRST}
            )
            SELECT t.cell_id, t.image_id, f.key FROM first AS f
            JOIN ({chosen.query}) AS t ON t.cell_id = f.cell_id {last}""",  # noqa: S608 - ours
            values,
        )
    if len(rows) < n or rows[-1]["key"] == math.inf:
        of_source = f" LEFT JOIN ({order.source}) AS k ON k.cell_id = t.cell_id"
        join = of_source if order.key == MEASURED_KEY else ""
        every = f"SELECT t.cell_id, t.image_id, {order.key} AS key FROM ({chosen.query}) AS t{join}"  # noqa: S608 - ours
        rows = ask(request, f"SELECT * FROM ({every}) WHERE {behind} {last}", values)  # noqa: S608
    return [row | {"place": f"{row['key']!r}~{row['cell_id']}"} for row in rows]


def _sheet_of(request: Request, pane: Pane, n: int) -> dict[str, Any]:
    """Return a sheet of the gallery: its crops with what is told of each, and what follows."""
    name = pane.prefix + "after"
    after = text(request, name)

    def find() -> tuple[list[dict[str, Any]], bool]:
        found = cells_after(request, pane.chosen, pane.order, after, n + 1)
        return _described(request, found[:n], pane), len(found) > n

    crops, more = kept(request, (pane.chosen, pane.order, after, n), find)
    columns = min(len(crops), SHEET_COLUMNS)
    following = behind = None
    if more and crops:
        behind = _changed(request, {name: crops[-1]["place"]})
        changes = {name: crops[-1]["place"], "pane": pane.prefix or None}
        following = _changed(request, changes, path="/cells/more")
    looks = _looks(request)
    ids = ",".join(str(crop["cell_id"]) for crop in crops)
    return {
        "pane": pane,
        "crops": crops,
        "columns": columns,
        "lines": -(-len(crops) // columns) if crops else 0,
        "sheet": url_of("cells", "sheet", cells=ids, **looks) if crops else None,
        "begin": after,
        "following": following,
        "next": behind,
    }


def _changed(
    request: Request,
    changes: Mapping[str, Any],
    without: tuple[str, str] | None = None,
    path: str = "/cells",
) -> str:
    """The address of this page with some parameters changed, or ``without`` one of them."""
    given = [
        item
        for item in request.query_params.multi_items()
        if item != without and item[0] not in changes and item[0] != "pane"
    ]
    given += [(name, value) for name, value in changes.items() if value is not None]
    return f"{path}?{urlencode(given)}" if given else path


def _described(request: Request, found: list[dict[str, Any]], pane: Pane) -> list[dict[str, Any]]:
    """Add to some cells what is shown of them, and ``told``: what they are, in words."""
    ids = [row["cell_id"] for row in found]
    run = pane.chosen.run or usual_run(request, Stage.PREDICT)
    query = select(Cell.id, Cell.excluded, Image.site, Well.name.label("well"), Well.control)
    query = query.add_columns(Plate.barcode, Treatment.name_with_dose, Prediction.probability)
    query = query.add_columns(Label.value.label("predicted")).where(Cell.id.in_(ids))
    query = query.join(Segmentation, Segmentation.id == Cell.segmentation_id)
    query = query.join(Image, Image.id == Segmentation.image_id)
    query = query.join(Well, Well.id == Image.well_id).join(Plate, Plate.id == Well.plate_id)
    query = query.outerjoin(Treatment, Treatment.id == Well.treatment_id)
    of_run = (Prediction.cell_id == Cell.id, Prediction.run_id == run, Prediction.rank == 1)
    query = query.outerjoin(Prediction, and_(*of_run))
    query = query.outerjoin(Label, Label.id == Prediction.label_id)
    labels = select(Annotation.row_id, Annotation.value).where(Annotation.level == Level.CELL)
    labels = labels.where(is_label_now(Annotation), Annotation.row_id.in_(ids))
    people: dict[int, list[str]] = {}
    with explorer_of(request).workspace.database.read() as session:
        about = {row.id: row for row in session.execute(query)}
        for cell_id, value in session.execute(labels.order_by(Annotation.id)):
            people.setdefault(cell_id, []).append(str(value))
    truths: dict[int, dict[str, Any]] = {}
    if any(row.predicted is not None for row in about.values()):
        images = ", ".join(str(row["image_id"]) for row in found)
        sql = f"""SELECT image_id, truth, well_in_training FROM run_images
            WHERE run_id = {run} AND image_id IN ({images})"""  # noqa: S608 - numbers
        truths = {row["image_id"]: row for row in ask(request, sql)}
    sorted_by = (text(request, "sort") or "").removeprefix("-")
    crops = []
    for row in found:
        cell = about.get(row["cell_id"])
        if cell is None:  # deleted a moment ago
            continue
        told = [cell.barcode, cell.well, f"field {cell.site}", f"cell {cell.id}"]
        told.append(cell.name_with_dose or "treatment unknown")
        if cell.control is not None:
            told.append(f"{Control(cell.control).value} control")
        result, seen, number = None, False, None
        if cell.predicted is not None:
            image = truths.get(row["image_id"], {"truth": None, "well_in_training": False})
            truth, seen = image["truth"], bool(image["well_in_training"])
            line = f"run {run}: {cell.predicted} {cell.probability:.0%}"
            if truth is not None:
                result = "right" if cell.predicted == truth else "wrong"
                line += f", {result}" + ("" if result == "right" else f" (it is {truth})")
            told.append(line)
            told += ["well seen in training"] if seen else []
        by_people = ", ".join(dict.fromkeys(people.get(cell.id, ())))
        told += [f"labelled {by_people}"] if by_people else []
        told += [f"excluded: {cell.excluded}"] if cell.excluded else []
        if pane.order.shown and row["key"] != math.inf:
            value = -row["key"] if pane.order.falling else row["key"]
            if sorted_by == CERTAIN:
                number = f"{value:.0%} {cell.predicted}"
            else:
                number = brief(value)
                told.append(f"{sorted_by} {number}")
        crops.append(row | {
            "result": result, "seen": seen, "excluded": cell.excluded, "people": by_people,
            "number": number, "told": " · ".join(told),
        })  # fmt: skip
    return crops


def _looks(request: Request) -> dict[str, Any]:
    """How crops look: pixels of a side, channels, and whether there are outlines (1 or 0)."""
    usual = kept(request, ("side of crops",), lambda: _usual_side(request))
    side = whole(request, "side", usual, low=SIDES[0], high=LARGEST_SIDE) or usual
    given = [item for item in request.query_params.getlist("channels") if item]
    known = {name.lower(): name for name in _channels(request)}
    for name in given[:MOST_CHANNELS]:
        if name.lower() not in known:
            raise UnknownNameError.of("channel", name, known.values())
    outlines = choice(request, "outlines", ["0", "1"], "1")
    channels = [known[name.lower()] for name in dict.fromkeys(given[:MOST_CHANNELS])]
    return {"side": side, "channels": channels, "outlines": int(outlines)}


def _usual_side(request: Request) -> int:
    size = ask(request, SIZES)[0]["size"]
    return next((side for side in SIDES if size is not None and side >= 1.4 * size), SIDES[2])


def _channels(request: Request) -> list[str]:
    def find() -> list[str]:
        position = func.min(ImageFile.position)
        query = select(ImageFile.channel).group_by(ImageFile.channel).order_by(position)
        with explorer_of(request).workspace.database.read() as session:
            return list(session.scalars(query))

    return kept(request, ("channels of images",), find)


def _panes(request: Request) -> list[Pane]:
    """The filters of the address: one, or two beside each other."""
    chosen = chosen_cells(request)
    panes = [Pane("", _title(chosen.active), chosen, order_of(request, chosen))]
    names = {name for name, _ in chosen.active}
    second = [name for name in request.query_params if name.startswith(OTHER)]
    if set(second) - {OTHER + "after"}:
        other = chosen_cells(request, OTHER)
        title = _title(tuple((name.removeprefix(OTHER), value) for name, value in other.active))
        return [*panes, Pane(OTHER, title, other, order_of(request, other))]
    usual = "controls" if names & set(WITH_CONTROLS) else "none"
    if choice(request, "beside", ["controls", "none"], usual) == "controls":
        panes += _controls_beside(request, chosen)
    return panes


def _controls_beside(request: Request, chosen: Chosen) -> list[Pane]:
    """The negative controls of the plates of some cells, unless these are the controls."""
    values = {
        name: value
        for name, value in chosen.values.items()
        if re.search(rf"\${re.escape(name)}\b", chosen.images)
    }
    named = f"""WITH mine AS (
            SELECT DISTINCT i.well_id FROM images AS i WHERE i.id IN ({chosen.images})
        ),
        plates_of AS (
            SELECT DISTINCT w.plate_id FROM wells AS w JOIN mine AS m ON m.well_id = w.id
        )
        SELECT p.barcode, p.id AS plate_id, t.treatment, w.control = 'negative' AS control
        FROM wells AS w JOIN plates AS p ON p.id = w.plate_id
        LEFT JOIN treatment_table AS t ON t.treatment_id = w.treatment_id
        WHERE w.id IN (SELECT well_id FROM mine)
        OR (w.control = 'negative' AND w.plate_id IN (SELECT plate_id FROM plates_of))
        GROUP BY ALL ORDER BY ALL"""  # noqa: S608 - ours
    wells = kept(request, (named, values), lambda: ask(request, named, values))
    controls = [row for row in wells if row["control"]]
    if not controls or len(controls) == len(wells):
        return []
    plates = {row["plate_id"]: row["barcode"] for row in controls}
    treatments = list(dict.fromkeys(row["treatment"] for row in controls if row["treatment"]))
    title = "Negative controls"
    title += f" ({some_of(treatments, 3)})" if treatments else ""
    title += f" of {'plate' if len(plates) == 1 else 'plates'} {some_of([*plates.values()], 4)}"
    images = f"""SELECT i.id AS image_id FROM images AS i JOIN wells AS w ON w.id = i.well_id
        WHERE w.control = 'negative' AND w.plate_id IN ({", ".join(map(str, plates))})"""  # noqa: S608
    query = f"""SELECT t.cell_id, t.image_id FROM ({OF_CELLS}) AS t
        WHERE {COUNTS} AND t.image_id IN ({images})"""  # noqa: S608 - ours
    found = Chosen(query, {}, images, None, ())
    return [Pane(OTHER, title, found, order_of(request, found))]


def _orders(request: Request, features: Sequence[str]) -> dict[str, str]:
    """The ways to sort cells in words, by what the address says; also that of this address."""
    orders = {
        "random": "in random order",
        "id": "in the order in which they were found",
        CERTAIN: "the least certain prediction first",
        f"-{CERTAIN}": "the most certain prediction first",
    }
    given = (text(request, "sort") or "").removeprefix("-")
    for name in dict.fromkeys([*features, *([given] if given not in orders and given else [])]):
        orders |= {name: f"{name}, the smallest first", f"-{name}": f"{name}, the largest first"}
    return orders


def _title(active: Collection[tuple[str, str]]) -> str:
    """Say in some words which cells are meant."""
    by_name: dict[str, list[str]] = {}
    for name, value in active:
        by_name.setdefault(name, []).append(value)
    words = [some_of(by_name[name], 3) for name in ("treatment", "label") if name in by_name]
    if "predicted" in by_name:
        words.append(f"predicted as {some_of(by_name['predicted'], 3)}")
    if by_name.get("result"):
        words.append(f"predicted {'rightly' if by_name['result'] == ['right'] else 'wrongly'}")
    if "control" in by_name:
        words.append(
            {"none": "no controls"}.get(by_name["control"][0])
            or f"{by_name['control'][0]} controls"
        )
    where = [some_of(by_name[name], 3) for name in ("plate", "well") if name in by_name]
    if not words:
        words = ["cells" if active else "all cells"]
    if not {"treatment", "label"} & set(by_name):  # names stay as they are written
        words[0] = words[0].capitalize()
    return " ".join([", ".join(words), *(["of", *where] if where else [])])


def _chips(request: Request, pane: Pane) -> list[dict[str, str]]:
    """The active filters in words, each with the address of the page without it."""
    return [
        {
            "words": SHORT_WORDS.get(name.removeprefix(OTHER), name.removeprefix(OTHER)),
            "value": value,
            "without": _changed(
                request, {"after": None, OTHER + "after": None}, without=(name, value)
            ),
        }
        for name, value in pane.chosen.active
    ]


def _scatter_of(request: Request, pane: Pane) -> str | None:
    """The address of the scatter plot of the cells of a filter."""
    given = [(name.removeprefix(pane.prefix), value) for name, value in pane.chosen.active]
    if pane.prefix and not given:
        return None
    return f"/scatter?{urlencode(given)}" if given else "/scatter"


def _tidied(request: Request) -> str | None:
    """The address that a form means, or none where this one is it.

    Without what was left empty, and with a feature and its bounds in one.
    """
    given = request.query_params.multi_items()
    usual = ("sort", "random")
    tidy = [item for item in given if item[1].strip() and item[0] not in OF_FORM and item != usual]
    feature, low, high = (request.query_params.get(name, "").strip() for name in OF_FORM)
    if feature and (low or high):
        tidy.append((feature, f"{low}..{high}"))
    if tidy == given:
        return None
    return f"/cells?{urlencode(tidy)}" if tidy else "/cells"


def gallery(request: Request) -> Response:
    """Show crops of cells."""
    if (tidy := _tidied(request)) is not None:
        return RedirectResponse(tidy, 303)
    panes = _panes(request)
    _check_names(request, panes)
    n = PER_SHEET // len(panes)
    pixels = kept(request, ("pixel sizes",), lambda: ask(request, PIXEL_SIZES)[0])
    looks = _looks(request)
    features = list(features_known(request))[:MOST_NAMES]
    size = pixels["low"] if pixels["low"] == pixels["high"] else None
    return page(
        request,
        "cells.html.j2",
        panes=[
            {
                "pane": pane,
                "chips": _chips(request, pane),
                "sheet": sheet,
                "count": _changed(request, {"pane": pane.prefix or None}, path="/cells/count"),
                "scatter": _scatter_of(request, pane),
                "first": _changed(request, {pane.prefix + "after": None}),
                "next": sheet["next"],
            }
            for pane, sheet in ((pane, _sheet_of(request, pane, n)) for pane in panes)
        ],
        looks=looks,
        drawn=looks["channels"] or usual_channels(_channels(request)),
        micrometres=None if size is None else looks["side"] * size,
        form=kept(request, ("form of cells",), lambda: _choices(request)),
        features=features,
        orders=_orders(request, features[:MOST_ORDERS]),
        shown=SHOWN_IN_FORM,
        pairs=lambda values: [(value, value) for value in values],
        shown_run=panes[0].chosen.run or usual_run(request, Stage.PREDICT),
        given=request.query_params,
        many=request.query_params.getlist,
    )


def _check_names(request: Request, panes: Sequence[Pane]) -> None:
    """Refuse what is no filter: it would show more cells than were meant."""
    known = {*OF_PAGE, *FILTERS, OTHER + "after", *(OTHER + name for name in FILTERS)}
    known.update(name for pane in panes for name, _ in pane.chosen.active)
    for name in request.query_params:
        if name not in known:
            raise UnknownNameError.of("filter", name, [*FILTERS, *OF_PAGE])


def _choices(request: Request) -> dict[str, Any]:
    """What the form offers."""

    def names(sql: str) -> list[Any]:
        return [row["name"] for row in ask(request, sql)]

    treatments = f"""SELECT DISTINCT t.treatment AS name FROM wells AS w
        JOIN treatment_table AS t ON t.treatment_id = w.treatment_id
        ORDER BY name LIMIT {MOST_NAMES}"""  # noqa: S608 - a number
    labels = f"""SELECT DISTINCT value AS name FROM labels
        WHERE id IN (SELECT label_id FROM split_members)
        ORDER BY name LIMIT {MOST_NAMES}"""  # noqa: S608 - a number
    people = """SELECT DISTINCT label AS name FROM current_labels WHERE level = 'cell'
        ORDER BY name LIMIT 100"""
    return {
        "treatments": names(treatments),
        "plates": names("SELECT barcode AS name FROM plates ORDER BY name LIMIT 1000"),
        "labels": names(labels),
        "run_names": [
            (row["id"], f"{row['id']} ({row['model']}, {row['split'] or 'no split'})")
            for row in runs_done(request, Stage.PREDICT)
        ],
        "people": names(people),
        "channels": _channels(request),
        "reasons": [reason.value for reason in (*ImageFlagReason, *CellFlagReason)],
        "sides": SIDES,
    }


def more(request: Request) -> Response:
    """Show the sheet of crops behind a place, as a part of the page."""
    panes = _panes(request)
    pane = _named_pane(request, panes)
    sheet = _sheet_of(request, pane, PER_SHEET // len(panes))
    return page(request, "cells_sheet.html.j2", sheet=sheet)


def _named_pane(request: Request, panes: Sequence[Pane]) -> Pane:
    prefix = choice(request, "pane", [OTHER], "") if text(request, "pane") else ""
    found = [pane for pane in panes if pane.prefix == prefix]
    if not found:
        raise UnknownNameError("There is no second filter here.")
    return found[0]


def count(request: Request) -> Response:
    """Say how many cells a filter has."""
    chosen = _named_pane(request, _panes(request)).chosen
    sql = f"""SELECT CAST(coalesce(sum(n), 0) AS BIGINT) AS cells, count(*) AS fields,
            count(DISTINCT i.well_id) AS wells
        FROM (SELECT image_id, count(*) AS n FROM ({chosen.query}) GROUP BY image_id) AS c
        JOIN images AS i ON i.id = c.image_id"""  # noqa: S608 - ours
    found = kept(request, ("count", chosen), lambda: ask(request, sql, chosen.values)[0])
    words = [f"{found[name]:,} {name if found[name] != 1 else name[:-1]}" for name in found]
    return PlainTextResponse(f"{words[0]} in {words[1]} of {words[2]}")


def sheet(request: Request) -> Response:
    """Return the picture of a sheet of crops."""
    ids = id_list("cells", text(request, "cells") or "")
    looks = _looks(request)
    if len(ids) * looks["side"] ** 2 > PER_SHEET * SIDES[-1] ** 2:
        raise UserInputError("These are too many cells for one picture. Ask for fewer at a time.")
    made = sheet_pixels(
        explorer_of(request),
        ids,
        side=looks["side"],
        channels=looks["channels"],
        outlines=bool(looks["outlines"]),
    )
    headers = {"Cache-Control": "private, max-age=600"}
    return Response(jpeg(made), media_type="image/jpeg", headers=headers)


def cell(request: Request) -> Response:
    """Lead to the field of a cell."""
    with explorer_of(request).workspace.database.read() as session:
        found = row_of(session, Cell, request.path_params["cell_id"])
        return RedirectResponse(url_of("field", found.segmentation.image_id, cell=found.id), 303)


ROUTES = [
    Route("/cells", gallery),
    Route("/cells/more", more),
    Route("/cells/count", count),
    Route("/cells/sheet", sheet),
    Route("/cell/{cell_id:int}", cell),
]
