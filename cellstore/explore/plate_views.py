"""Home, plates and wells."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from ..enums import Control, Stage
from ..errors import CellstoreError, UnknownNameError, UserInputError
from ..io.filenames import format_well, parse_well
from ..jobs.lookup import find_cell, find_image, find_well, readable
from ..jobs.planes import channel_files
from ..jobs.run_names import find_named_run
from ..models import Plate, Treatment, Well
from ..query.saved_queries import find_question
from ..report.audit import KINDS as KINDS_OF_NAMES
from ..report.audit import audit_well, kind_of
from ..report.audit import shown as in_words
from ..report.drawing import brief, plate_layout, short
from ..stages.status import next_step, status
from .known_features import Feature, features_known, profile_features
from .pixels import usual_channels
from .requests import (
    ask,
    asking,
    choice,
    explorer_of,
    kept,
    page,
    runs_done,
    text,
    url_of,
    usual_run,
    whole,
)
from .well_colours import (
    KINDS,
    STAGES,
    WELLS,
    WRITTEN,
    Scale,
    WellValues,
    ink_on,
    make_scale,
    of_wells,
    read_values,
)

MOST_PLATES = 12
"""Plates that are shown side by side."""
LISTED_PLATES = 500
LISTED_RUNS = 48
PICTURE = 320
"""Pixels of a picture of a field, at least."""

Record = Mapping[str, Any]


# Home


def home(request: Request) -> Response:
    """The store at a glance; what takes longer follows as parts of the page."""
    explorer = explorer_of(request)
    with explorer.workspace.database.read() as session:
        steps = next_step(session)
    return page(
        request,
        "home.html.j2",
        store=explorer.workspace.settings.root,
        plates=_list_plates(request),
        most=LISTED_PLATES,
        steps=[_command(explorer.command(step)) for step in steps],
    )


def _command(step: str) -> tuple[str, str]:
    """A command that can be copied, and what is said about it."""
    typed, _, words = step.partition("  ")
    return typed, words.strip("()")


def _list_plates(request: Request) -> list[dict[str, Any]]:
    query = find_question(explorer_of(request).workspace, "plates").query
    return kept(request, ("plates",), lambda: ask(request, query))


def stages(request: Request) -> Response:
    """What each stage has left to do, and what is wrong: counted after the page is there."""
    found = kept(request, ("status",), lambda: status(explorer_of(request).workspace))
    return page(request, "home_stages.html.j2", found=found)


def small_maps(request: Request) -> Response:
    """Small maps of the first plates by treatment: a part of a page."""
    listed = _list_plates(request)[:MOST_PLATES]
    names = tuple(row["plate"] for row in listed if row["wells"])

    def read() -> tuple[Scale, dict[str, Any]]:
        wells = wells_of(request, names)
        scale = make_scale(of_wells(wells, "treatment"), wells)
        own = {name: [row for row in wells if row["plate"] == name] for name in names}
        return scale, {name: _small_map(some, scale) for name, some in own.items()}

    scale, maps = kept(request, ("small maps", names), read)
    more = len(_list_plates(request)) - len(maps)
    cells = {row["plate"]: row["cells"] for row in listed}
    return page(
        request, "small_maps.html.j2", scale=scale, maps=maps, names=names, more=more, cells=cells
    )


def _small_map(wells: Sequence[Record], scale: Scale) -> dict[str, Any]:
    """A plate without words: its size in wells, and a path for the wells of each colour."""
    rows, columns = plate_layout([(row["well_row"], row["well_column"]) for row in wells])
    paths: dict[str, str] = {}
    for row in wells:
        x, y = row["well_column"] - 1, row["well_row"] - 1
        drawn = f"M{x}.06 {y}.06h.88v.88h-.88z"
        if row["control"] == Control.NEGATIVE:  # round, as on the large map
            drawn = f"M{x}.06 {y}.5a.44.44 0 1 0 .88 0a.44.44 0 1 0 -.88 0z"
        colour = scale.colours.get(row["well_id"], "")
        paths[colour] = paths.get(colour, "") + drawn
    return {"rows": rows, "columns": columns, "wells": len(wells), "paths": paths}


# Search

NEAR = 12


def search(request: Request) -> Response:
    """Go to what a text names: a plate, a well, an image, a cell, a run, a file, a treatment.

    What names nothing, or several things, has a page that says so, with names that are near.
    """
    asked = readable(text(request, "q") or "")
    if not asked:
        return RedirectResponse("/plates", 303)
    links: dict[str, str] = {}
    words = ""
    with explorer_of(request).workspace.database.read() as session:
        try:
            return RedirectResponse(_found(session, asked), 303)
        except CellstoreError as error:
            words = str(error)
        like = select(Treatment.name).where(Treatment.name.icontains(asked, autoescape=True))
        for name in session.scalars(like.distinct().order_by(Treatment.name).limit(NEAR)):
            links[name] = url_of("plates", treatment=name)
        if asked.isdecimal():
            words = f"{asked} is the number of what?"
            links |= {f"{of} {asked}": url_of(of, asked) for of in ("field", "cell", "run")}
        barcodes = session.scalars(select(Plate.barcode).limit(5_000))
        for name in get_close_matches(asked, list(barcodes), NEAR, 0.5):
            links[name] = url_of("plate", name)
    if len(links) == 1 and asked.lower() in (name.lower() for name in links):
        return RedirectResponse(next(iter(links.values())), 303)
    status = 200 if links else 404
    return page(request, "search.html.j2", status, asked=asked, words=words, links=links)


def _found(session: Session, asked: str) -> str:
    """The address of what a text names; raises as :func:`..report.audit.audit` does."""
    first, _, rest = asked.partition(" ")
    kind: str | None = first.lower()
    if kind in KINDS_OF_NAMES and rest.strip():
        asked = rest.strip()
    else:
        kind = kind_of(session, asked, on_disk=False)
    if kind == "plate":
        return url_of("plate", asked)
    if kind == "well":
        found = session.get_one(Well, find_well(session, asked))
        return url_of("well", found.plate.barcode, found.name)
    if kind == "image":
        return url_of("field", find_image(session, asked))
    if kind == "cell":
        return url_of("cell", find_cell(session, asked)[0])
    if kind == "run":
        return url_of("run", find_named_run(session, asked).id)
    return url_of("lineage", "artifact", asked)


# Plates


_PARTS = re.compile(r"\w{5}(?=\w{3})|\w+|\W+")
"""The parts of a name, between which a line may end."""


def plates(request: Request) -> Response:
    """Several plates side by side on one colour scale; without names or a colour, their list."""
    barcodes = list(dict.fromkeys(request.query_params.getlist("plate")))
    treatment = text(request, "treatment")
    if not barcodes and treatment is not None:
        barcodes = [row["plate"] for row in ask(request, PLATES_OF, [treatment])]
        if not barcodes:
            raise UnknownNameError(f"No well has the treatment {treatment[:200]!r}.")
    elif not barcodes and text(request, "colour") is not None:
        barcodes = [row["plate"] for row in _list_plates(request)]
    if not barcodes:
        listed = _list_plates(request)
        return page(request, "plates.html.j2", plates=listed, most=LISTED_PLATES)
    return _maps(request, barcodes, treatment)


PLATES_OF = """
    SELECT DISTINCT plate FROM well_table WHERE treatment = ? ORDER BY plate
"""


def plate(request: Request) -> Response:
    """The map of one plate."""
    return _maps(request, [request.path_params["barcode"]], text(request, "treatment"))


def _maps(request: Request, barcodes: Sequence[str], treatment: str | None) -> Response:
    shown = tuple(barcodes[:MOST_PLATES])
    kind = choice(request, "colour", KINDS, "treatment")
    feature, run = text(request, "feature"), whole(request, "run")
    # The form sends the run and the feature of the choice before, too: perhaps they are of no use.
    changed = text(request, "was", kind) != kind
    runs: list[dict[str, Any]] = []
    if kind in STAGES:
        runs = runs_done(request, STAGES[kind])
        if run is not None and run not in [row["id"] for row in runs]:
            if not changed:
                raise UnknownNameError(f"There is no {STAGES[kind].value} run {run} that is done.")
            run = None
        run = run if run is not None else usual_run(request, STAGES[kind])
    else:
        run = None
    wells = wells_of(request, shown)

    def read() -> tuple[WellValues, Scale, list[str], str | None, str]:
        known: dict[str, Feature] = {}
        chosen, problem = feature, ""
        try:
            if kind in STAGES and run is None:
                stage = STAGES[kind].value
                raise UserInputError(f"No {stage} run has ended yet. Next: cellstore {stage}")
            if kind == "feature":
                known = features_known(request)
            elif kind == "profile" and run is not None:
                known = profile_features(request, run)
            if kind in ("feature", "profile"):
                if not known:
                    raise UserInputError("No cell is measured yet. Next: cellstore measure")
                if feature is None or (changed and feature not in known):
                    chosen = "area" if "area" in known else next(iter(known))
                elif feature not in known:
                    raise UnknownNameError.of("feature", feature, known)
            with asking(request) as questions:
                found = read_values(
                    questions, wells, kind, run=run, feature=known.get(chosen or "")
                )
        except UserInputError as error:  # a map without colours says what is missing
            found, problem = WellValues(KINDS[kind], {}), str(error)
        return found, make_scale(found, wells, treatment), list(known), chosen, problem

    key = ("map", shown, kind, feature, changed, run, treatment if kind == "treatment" else None)
    found, scale, features, feature, problem = kept(request, key, read)
    maps, there = plate_maps(shown, wells, found, scale, treatment)
    beside = _neighbours(request, barcodes[0]) if len(barcodes) == 1 else {}
    return page(
        request,
        "plate.html.j2",
        barcodes=shown,
        more=len(barcodes) - len(shown),
        kinds=KINDS,
        kind=kind,
        runs=runs,
        run=run,
        features=features,
        feature=feature,
        title=found.title,
        unit=found.unit,
        scale=scale,
        problem=problem,
        maps=maps,
        missing=len(wells) - len(scale.colours),
        treatment=treatment,
        treatments=sorted({row["treatment"] for row in wells if row["treatment"]})[:5_000],
        beside=beside,
        there=there,
    )


def _neighbours(request: Request, barcode: str) -> dict[str, str | None]:
    """The plates before and after one, by name."""
    name = Plate.barcode
    with explorer_of(request).workspace.database.read() as session:
        before = session.scalar(select(func.max(name)).where(name < barcode))
        after = session.scalar(select(func.min(name)).where(name > barcode))
    return {"before": before, "after": after}


def plate_maps(
    barcodes: Sequence[str],
    wells: Sequence[Record],
    found: WellValues,
    scale: Scale,
    treatment: str | None = None,
) -> tuple[list[tuple[str, int, int, list[Any]]], set[str]]:
    """Return name, rows, columns and lines of each map, and what kinds of wells there are.

    A line is its letter, and what is known of its wells, or None where there is none.
    """
    groups: dict[str, int] = {}
    maps, there = [], set[str]()
    for barcode in barcodes:
        own = [row for row in wells if row["plate"] == barcode]
        rows, columns = plate_layout([(row["well_row"], row["well_column"]) for row in own])
        grid: list[list[dict[str, Any] | None]] = [[None] * columns for _ in range(rows)]
        for row in own:
            made = _mapped(row, found, scale, groups, treatment)
            grid[row["well_row"] - 1][row["well_column"] - 1] = made
            there.update(made["kinds"])
        lines = [(format_well(at, 1)[:-2], line) for at, line in enumerate(grid, 1)]
        maps.append((barcode, rows, columns, lines))
    return maps, there


def _mapped(
    row: Record,
    found: WellValues,
    scale: Scale,
    groups: dict[str, int],
    treatment: str | None,
) -> dict[str, Any]:
    """A well of a map: what is written in it, in parts, what is said of it, and how it looks."""
    well, value = row["well_id"], found.values.get(row["well_id"])
    shown = brief(value) if isinstance(value, float) else value or ""
    kinds, control = [], row["control"]
    phrases = [short(row["named"] or "no treatment known", 120)]
    if control is not None:
        kinds.append(control)
        phrases.append(f"{control} control")
    cells = "not segmented" if row["n_cells"] is None else f"{row['n_cells']:,} cells"
    phrases.append(f"{cells} in {row['n_images']} field{'' if row['n_images'] == 1 else 's'}")
    if row["n_excluded_images"] and row["excluded"] is None:
        kinds.append("partly")
        phrases.append(f"{row['n_excluded_images']} of its fields excluded")
    if value is None:
        kinds.append("novalue")
        phrases.append(f"{found.title}: no value")
    elif isinstance(value, float) or found.title not in (KINDS["treatment"], KINDS["control"]):
        number = short(f"{shown} {found.unit}".strip(), 120)
        more = f" ({found.words[well]})" if well in found.words else ""
        phrases.append(f"{found.title}: {number}{more}")
    if well in found.seen:
        kinds.append("seen")
        phrases.append("seen in training")
    if row["excluded"] is not None:
        kinds.append("excluded")
        phrases.append(f"does not count: {row['excluded']}")
    if treatment is not None and treatment == row["treatment"]:
        kinds.append("chosen")
    colour = scale.colours.get(well)
    # A round well has no room for it, and its shape says so.
    written = [] if shown.endswith(" control") else _PARTS.findall(short(shown, WRITTEN))
    return {
        "url": url_of("well", row["plate"], row["well"]),
        "colour": colour,
        "ink": "" if colour is None else ink_on(colour),
        "written": written,
        "words": f"{row['well']}: {', '.join(phrases)}",
        "kinds": kinds,
        "group": groups.setdefault(row["named"] or "", len(groups)),
    }


# Wells

BESIDE, FIELDS_BESIDE = 2, 4
"""Negative controls that are shown beside a well, and how many fields of each."""
MOST_FIELDS = 60
FIELDS = """
    SELECT i.image_id, i.well_id, i.site, i.plane, i.time_point, i.n_cells, i.n_excluded_cells,
        i.excluded, f.flags
    FROM image_table AS i LEFT JOIN (
        SELECT image_id, string_agg(DISTINCT reason || coalesce(' (' || channel || ')', ''), ', '
            ORDER BY reason || coalesce(' (' || channel || ')', '')) AS flags
        FROM image_flags
        WHERE run_id = (SELECT max(id) FROM runs WHERE stage = 'qc' AND status = 'done')
        GROUP BY image_id
    ) AS f ON f.image_id = i.image_id
    WHERE i.well_id IN (SELECT unnest($wells))
    ORDER BY i.well_id, i.site, i.plane, i.time_point
"""
# The hard vote of a well, of all its fields in whatever subset, and of each of its fields.
VOTES_OF_WELL = """
    WITH counted AS (
        SELECT c.run_id, c.image_id, l.value AS label, c.cells,
            CAST(round(c.probability * 1e12) AS BIGINT) AS probability
        FROM image_label_counts AS c JOIN labels AS l ON l.id = c.label_id
        WHERE c.image_id IN (SELECT id FROM images WHERE well_id = $well)
    ),
    of_labels AS (
        SELECT run_id, label, sum(cells) AS cells, sum(probability) AS probability
        FROM counted GROUP BY run_id, label
    ),
    of_wells AS (
        SELECT run_id, sum(cells) AS cells,
            list({'label': label, 'cells': cells} ORDER BY cells DESC, probability DESC, label)
                AS labels
        FROM of_labels GROUP BY run_id
    ),
    of_fields AS (
        SELECT run_id, image_id, first(label ORDER BY cells DESC, probability DESC, label) AS label
        FROM counted GROUP BY run_id, image_id
    ),
    fields AS (
        SELECT f.run_id, count(*) AS fields, count(*) FILTER (f.label = r.truth) AS n_right,
            max(r.truth) AS truth, bool_or(r.well_in_training) AS seen,
            string_agg(DISTINCT r.subset, ', ' ORDER BY r.subset) AS subsets
        FROM of_fields AS f
        LEFT JOIN run_images AS r ON r.run_id = f.run_id AND r.image_id = f.image_id
        GROUP BY f.run_id
    )
    SELECT w.run_id AS run, w.cells, w.labels, f.* EXCLUDE (run_id)
    FROM of_wells AS w JOIN fields AS f ON f.run_id = w.run_id ORDER BY w.run_id DESC
"""


def well(request: Request) -> Response:
    """All fields of a well, beside negative controls of its plate, and what runs say of it."""
    barcode, name = request.path_params["barcode"], request.path_params["well"]
    wells = wells_of(request, (barcode,))
    with suppress(UserInputError):  # it is not found, then
        name = format_well(*parse_well(name))
    at = next((at for at, row in enumerate(wells) if row["well"] == name), None)
    if at is None:
        raise UnknownNameError.of(f"well of plate {barcode}", name, [row["well"] for row in wells])
    one = wells[at]
    beside = _nearest_controls(wells, one)
    wanted = [row["well_id"] for row in (one, *beside)]

    fields = kept(request, ("fields", *wanted), lambda: ask(request, FIELDS, {"wells": wanted}))
    own = [row for row in fields if row["well_id"] == one["well_id"]]
    planes, times = (sorted({row[key] for row in own}) for key in ("plane", "time_point"))
    plane = whole(request, "plane", planes[0] if planes else 1)
    time_point = whole(request, "time", times[0] if times else 1)
    shown = [row for row in fields if (row["plane"], row["time_point"]) == (plane, time_point)]
    image = own[0]["image_id"] if own else 0
    with explorer_of(request).workspace.database.read() as session:
        channels = [file.channel for file in channel_files(session, [image])[image]]
    given = [name for name in request.query_params.getlist("channels") if name in channels]
    outlines = text(request, "outlines") is not None
    pictures: dict[int, list[dict[str, Any]]] = {}
    for row in shown:
        picture = url_of(
            *("field", row["image_id"], "thumbnail"),
            width=PICTURE,
            channels=given or None,
            outlines=1 if outlines else None,
        )
        pictures.setdefault(row["well_id"], []).append(row | {"picture": picture})
    mine = pictures.get(one["well_id"], [])
    few = max(1, min(FIELDS_BESIDE, len(mine)))
    return page(
        request,
        "well.html.j2",
        barcode=barcode,
        well=one,
        before=wells[at - 1] if at else None,
        after=wells[at + 1] if at + 1 < len(wells) else None,
        fields=mine[:MOST_FIELDS],
        more=len(mine) - MOST_FIELDS,
        beside=[(row, pictures.get(row["well_id"], [])[:few]) for row in beside],
        channels=channels,
        chosen=given or usual_channels(channels),
        outlines=outlines,
        planes=planes,
        plane=plane,
        times=times,
        time_point=time_point,
        here={"channels": given or None, "outlines": 1 if outlines else None},
    )


def wells_of(request: Request, barcodes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the wells of plates in order, rows of ``WELLS``."""
    found = kept(
        request, ("wells", barcodes), lambda: ask(request, WELLS, {"plates": list(barcodes)})
    )
    there = {row["plate"] for row in found}
    for barcode in barcodes:
        if barcode not in there:
            known = [row["barcode"] for row in ask(request, "SELECT barcode FROM plates")]
            if barcode in known:
                raise UserInputError(f"Plate {barcode} has no wells yet.")
            raise UnknownNameError.of("plate", barcode, known)
    return found


def _nearest_controls(wells: Sequence[Record], one: Record) -> list[Record]:
    """The negative controls nearest to a well that have fields and count."""

    def distance(row: Record) -> tuple[float, int, int]:
        rows, columns = (row[key] - one[key] for key in ("well_row", "well_column"))
        return rows**2 + columns**2, row["well_row"], row["well_column"]

    controls = [
        row for row in wells
        if row["control"] == Control.NEGATIVE and row["n_images"] and row is not one
    ]  # fmt: skip
    return sorted(controls, key=distance)[:BESIDE]


def votes_of_well(request: Request) -> Response:
    """What each predict run answers for a well: a part of its page."""
    one = _one_well(request)

    def read() -> list[dict[str, Any]]:
        models = {row["id"]: row["model"] for row in runs_done(request, Stage.PREDICT)}
        rows = ask(request, VOTES_OF_WELL, {"well": one["well_id"]})
        found = [row | {"model": models.get(row["run"])} for row in rows]
        # Networks first, then baselines: the newest first.
        return sorted(found, key=lambda row: row["model"] != "network")

    answers = kept(request, ("votes of well", one["well_id"]), read)
    return page(request, "well_votes.html.j2", well=one, answers=answers, most=LISTED_RUNS)


def history_of_well(request: Request) -> Response:
    """The history of a well, as ``cellstore audit`` has it: a part of its page."""
    one = _one_well(request)
    with explorer_of(request).workspace.database.read() as session:
        record = audit_well(session, one["well_id"]).record
    return page(request, "well_history.html.j2", record=record, in_words=in_words)


def _one_well(request: Request) -> dict[str, Any]:
    barcode, name = request.path_params["barcode"], request.path_params["well"]
    found = [row for row in wells_of(request, (barcode,)) if row["well"] == name]
    if not found:
        raise UnknownNameError(f"Plate {barcode} has no well {name}.")
    return found[0]


ROUTES = [
    Route("/", home),
    Route("/home/stages", stages),
    Route("/search", search),
    Route("/plates", plates),
    Route("/plates/small", small_maps),
    Route("/plate/{barcode:path}", plate),
    Route("/well/{barcode:path}/{well}/votes", votes_of_well),
    Route("/well/{barcode:path}/{well}/history", history_of_well),
    Route("/well/{barcode:path}/{well}", well),
]
