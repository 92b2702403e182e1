"""What the wells of plate maps are coloured by: values of wells, and colours for values."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..enums import Control, Stage
from ..errors import UserInputError
from ..query.engine import Questions
from ..report.drawing import brief, colour_limits, short
from ..report.hits_figures import MARKS
from .known_features import Feature

KINDS = {
    "treatment": "Treatment",
    "dose": "Dose",
    "control": "Control",
    "cells": "Cells per field",
    "feature": "A feature of cells",
    "profile": "A feature of profiles",
    "flags": "Flagged fields",
    "accuracy": "Accuracy of a run",
    "vote": "Answer of a run",
    "verdict": "Verdict of a hits run",
}
"""What wells can be coloured by, in the address and in words."""
STAGES = {
    "profile": Stage.PROFILE,
    "flags": Stage.QC,
    "accuracy": Stage.PREDICT,
    "vote": Stage.PREDICT,
    "verdict": Stage.HITS,
}
"""Of those that are about a run, the stage of that run."""
Value = float | str

# Plates are named in a query of their own, so that DuckDB reads the rows of these alone.
WELLS = """
    SELECT t.plate, t.well, t.well_row, t.well_column, t.well_id, t.treatment, t.dose, t.dose_unit,
        n.name_with_dose AS named, t.control, t.n_images, t.n_cells, t.n_excluded_images, t.excluded
    FROM well_table AS t
    JOIN wells AS w ON w.id = t.well_id
    LEFT JOIN treatments AS n ON n.id = w.treatment_id
    WHERE t.plate IN (SELECT unnest($plates))
    ORDER BY t.plate, t.well_row, t.well_column
"""
OF_PLATES = """
    of_plates AS (
        SELECT i.id AS image_id, i.well_id, i.content_sha256
        FROM images AS i JOIN wells AS w ON w.id = i.well_id JOIN plates AS p ON p.id = w.plate_id
        WHERE p.barcode IN (SELECT unnest($plates))
    )
"""
# As eligible_cells, whose conditions DuckDB would ask of all cells, not of those of some plates.
FEATURE = """
    WITH {of_plates},
    latest AS (
        SELECT o.well_id, max(s.id) AS segmentation_id
        FROM segmentations AS s JOIN of_plates AS o ON o.image_id = s.image_id
        WHERE (s.content_sha256 IS NULL OR s.content_sha256 = o.content_sha256)
        AND o.image_id NOT IN (SELECT image_id FROM excluded_images)
        GROUP BY o.image_id, o.well_id
    ),
    counted AS (
        SELECT l.well_id, c.id
        FROM latest AS l JOIN cells AS c ON c.segmentation_id = l.segmentation_id
        LEFT JOIN later_exclusions AS e ON e.level = 'cell' AND e.id = c.id
        WHERE c.excluded IS NULL AND e.id IS NULL
    )
    SELECT c.well_id, avg(f.value) FILTER (WHERE isfinite(f.value)) AS value
    FROM counted AS c JOIN ({feature}) AS f ON f.cell_id = c.id
    GROUP BY c.well_id
"""
PROFILE = """
    WITH {of_plates}
    FROM ({feature}) WHERE well_id IN (SELECT well_id FROM of_plates)
"""
# Fields that the run, or an earlier one of its recipe, has looked at; else there is no value.
FLAGS = """
    WITH {of_plates},
    seen AS (
        SELECT DISTINCT q.image_id FROM image_quality AS q
        JOIN runs AS r ON r.recipe_id = q.recipe_id WHERE r.id = $run
    ),
    flagged AS (
        SELECT image_id, string_agg(DISTINCT reason, ', ' ORDER BY reason) AS reasons
        FROM image_flags WHERE run_id = $run GROUP BY image_id
    )
    SELECT o.well_id, count(f.image_id) AS value, min(f.reasons) AS words
    FROM of_plates AS o LEFT JOIN flagged AS f ON f.image_id = o.image_id
    WHERE f.image_id IS NOT NULL OR o.image_id IN (SELECT image_id FROM seen)
    GROUP BY o.well_id
"""
ACCURACY = """
    SELECT well_id, 100.0 * count(*) FILTER (correct) / count(*) AS value,
        count(*) FILTER (correct) || ' of ' || count(*) || ' fields right' AS words
    FROM votes
    WHERE run_id = $run AND level = 'image' AND vote = 'hard' AND correct IS NOT NULL
        AND plate IN (SELECT unnest($plates))
    GROUP BY well_id
"""
# As the hard vote of wells, of all their fields in whatever subset: a well has one colour.
VOTE = """
    WITH {of_plates},
    counted AS (
        SELECT o.well_id, c.label_id, sum(c.cells) AS cells,
            sum(CAST(round(c.probability * 1e12) AS BIGINT)) AS probability
        FROM image_label_counts AS c JOIN of_plates AS o ON o.image_id = c.image_id
        WHERE c.run_id = $run
        GROUP BY o.well_id, c.label_id
    )
    SELECT c.well_id,
        first(l.value ORDER BY c.cells DESC, c.probability DESC, l.value) AS value,
        max(c.cells) || ' of ' || sum(c.cells) || ' cells' AS words
    FROM counted AS c JOIN labels AS l ON l.id = c.label_id
    GROUP BY c.well_id
"""
SEEN = """
    SELECT DISTINCT well_id FROM run_images
    WHERE run_id = $run AND well_in_training AND plate IN (SELECT unnest($plates))
"""
VERDICT = """
    SELECT w.id AS well_id, h.verdict AS value, h.plate_set,
        'effect ' || round(h.effect, 2) AS words
    FROM wells AS w JOIN plates AS p ON p.id = w.plate_id
    JOIN hit_table AS h ON h.treatment_id = w.treatment_id
    WHERE h.run_id = $run AND p.barcode IN (SELECT unnest($plates))
"""
OF_RUN = {
    "flags": (FLAGS, "Flagged fields of run {run}"),
    "accuracy": (ACCURACY, "Fields that run {run} got right"),
    "vote": (VOTE, "Answer of run {run}"),
    "verdict": (VERDICT, "Verdict of run {run}"),
}
PLATE_SETS = "SELECT result -> 'plate_sets' AS sets FROM runs WHERE id = $run"


@dataclass(frozen=True)
class WellValues:
    """What wells are coloured by: ``values`` by well id; a well without one is drawn pale.

    ``words`` say more of a well, ``seen`` are those seen in training by the run that is asked
    about, ``order`` that of the values where they are words with an order.
    """

    title: str
    values: Mapping[int, Value]
    unit: str = ""
    words: Mapping[int, str] = field(default_factory=dict)
    seen: Collection[int] = ()
    limits: tuple[float, float] | None = None
    order: Sequence[str] | None = None


def read_values(
    questions: Questions,
    wells: Sequence[Mapping[str, Any]],
    kind: str,
    *,
    run: int | None,
    feature: Feature | None,
) -> WellValues:
    """Return what ``wells`` (rows of ``WELLS``) are coloured by; raises UserInputError."""
    plates = sorted({row["plate"] for row in wells})
    if kind in ("treatment", "dose", "control", "cells"):
        found = of_wells(wells, kind)
        if kind == "dose" and not found.values:
            raise UserInputError(
                "No well of these plates has a dose. Plate maps bring doses: cellstore ingest MAP"
            )
        return found
    given: dict[str, Any] = {"plates": plates}

    def ask(query: str) -> list[dict[str, Any]]:
        rows = "" if feature is None else feature.query
        query = query.replace("{of_plates}", OF_PLATES).replace("{feature}", rows)
        return questions.ask_ours(query, given).records()

    if feature is not None:
        of = "mean of cells" if kind == "feature" else f"profile run {run}"
        rows = ask(FEATURE if kind == "feature" else PROFILE)
        return WellValues(f"{feature.name} ({of})", _numbers(rows), feature.unit)
    given["run"] = run
    query, title = OF_RUN[kind]
    rows, title = ask(query), title.format(run=run)
    words = {row["well_id"]: row["words"] for row in rows if row["words"]}
    seen = {row["well_id"] for row in ask(SEEN)} if kind in ("accuracy", "vote") else set()
    if kind == "verdict":
        rows = _of_own_set(questions, wells, rows, run)
    if kind in ("flags", "accuracy"):
        numbers = _numbers(rows)
        most = 100.0 if kind == "accuracy" else max([1.0, *numbers.values()])
        unit = "%" if kind == "accuracy" else ""
        return WellValues(title, numbers, unit, words, seen, (0.0, most))
    verdicts_of: dict[int, Value] = {row["well_id"]: str(row["value"]) for row in rows}
    if kind == "verdict":
        controls = [row["well_id"] for row in wells if row["control"] == Control.NEGATIVE]
        verdicts_of |= dict.fromkeys(controls, "negative control")
        return WellValues(title, verdicts_of, words=words, order=list(VERDICTS))
    return WellValues(title, verdicts_of, words=words, seen=seen)


def _numbers(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    known = ((row["well_id"], row["value"]) for row in rows if row["value"] is not None)
    return {well: float(value) for well, value in known if math.isfinite(value)}


def _of_own_set(
    questions: Questions,
    wells: Sequence[Mapping[str, Any]],
    rows: Sequence[dict[str, Any]],
    run: int | None,
) -> list[dict[str, Any]]:
    """Of what a hits run says of a treatment, what is about the plates of the well itself."""
    (found,) = questions.ask_ours(PLATE_SETS, {"run": run}).records()
    sets = {name: set(barcodes) for name, barcodes in json.loads(found["sets"] or "{}").items()}
    plates = {row["well_id"]: row["plate"] for row in wells}
    return [row for row in rows if plates[row["well_id"]] in sets.get(row["plate_set"], ())]


def of_wells(wells: Sequence[Mapping[str, Any]], kind: str) -> WellValues:
    """Return the treatment, dose, control or cells of ``wells``, rows of ``WELLS``."""
    if kind == "cells":
        counts = {
            row["well_id"]: row["n_cells"] / row["n_images"]
            for row in wells
            if row["n_cells"] is not None and row["n_images"]
        }
        return WellValues("Cells per field", counts)
    if kind == "treatment":
        named = {row["well_id"]: row["treatment"] for row in wells if row["treatment"]}
        return WellValues("Treatment", named)
    if kind == "control":
        roles = {row["well_id"]: f"{row['control']} control" for row in wells if row["control"]}
        treated = {row["well_id"]: "treated" for row in wells if row["treatment"]}
        order = [*(f"{role.value} control" for role in Control), "treated"]
        return WellValues("Control", treated | roles, order=order)
    doses = {row["well_id"]: (row["dose_unit"] or "", row["dose"]) for row in wells
             if row["dose"] is not None}  # fmt: skip
    shown = {dose: f"{brief(dose[1])} {dose[0]}".strip() for dose in sorted(set(doses.values()))}
    return WellValues(
        "Dose", {well: shown[dose] for well, dose in doses.items()},
        order=list(dict.fromkeys(shown.values())),
    )  # fmt: skip


# Colours

VIRIDIS = (
    *("#440154", "#481a6c", "#472f7d", "#414487", "#39568c", "#31688e", "#2a788e", "#23888e"),
    *("#1f988b", "#22a884", "#35b779", "#54c568", "#7ad151", "#a5db36", "#d2e21b", "#fde725"),
)
"""The scale viridis, in equal steps."""
OKABE_ITO = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
"""Colours that the colour-blind tell apart (Okabe and Ito 2008)."""
OTHERS, CONTROLS = "#a9aeb6", "#4d545e"
"""Colours of all other groups, and of negative controls."""
VERDICTS = {str(verdict): colour for verdict, (_, _, colour) in MARKS.items()}
VERDICTS["negative control"] = CONTROLS
FIXED = {
    **VERDICTS,
    f"{Control.NEGATIVE.value} control": CONTROLS,
    f"{Control.POSITIVE.value} control": "#d55e00",
    "treated": "#56b4e9",
}
MOST_DOSES = 12
WRITTEN = 60
"""Letters of a name in a well and in a legend, at most."""


@dataclass(frozen=True)
class Scale:
    """The colour of each well, by its id, and the legend.

    Groups have ``entries``: words, colour, and number of wells. Numbers have ``ticks``: what stands
    below the bar, at equal distances.
    """

    colours: Mapping[int, str]
    entries: Sequence[tuple[str, str, int]] = ()
    ticks: Sequence[str] = ()


def viridis(share: float) -> str:
    """Return the colour of a share of the scale, 0 to 1."""
    at = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    first = min(int(at), len(VIRIDIS) - 2)
    parts = (
        round(int(low, 16) + (int(high, 16) - int(low, 16)) * (at - first))
        for low, high in (
            (VIRIDIS[first][i : i + 2], VIRIDIS[first + 1][i : i + 2]) for i in (1, 3, 5)
        )
    )
    return "#" + "".join(f"{part:02x}" for part in parts)


def ink_on(colour: str) -> str:
    """Return black or white, whichever is read better on a colour (``#rrggbb``)."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "#ffffff"


def make_scale(
    found: WellValues, wells: Sequence[Mapping[str, Any]], first: str | None = None
) -> Scale:
    """Return the colours of values: of numbers by viridis, of words by group.

    The group ``first`` and the most frequent others have a colour each; negative controls are dark
    grey where wells are coloured by treatment. Numbers reach from the 2nd to the 98th percentile
    unless limits are given; wells beyond them have the colour of the end.
    """
    numbers = {well: value for well, value in found.values.items() if isinstance(value, float)}
    if numbers or not found.values:
        return _of_numbers(numbers, found)
    groups = {well: str(value) for well, value in found.values.items()}
    counts = Counter(groups.values())
    colours: dict[str, str] = {}
    if found.order is None:
        there = [row for row in wells if row["control"] == Control.NEGATIVE]
        colours = {row["treatment"]: CONTROLS for row in there if row["treatment"]}
    if found.order is not None and counts.keys() <= FIXED.keys():
        colours = {name: FIXED[name] for name in found.order if name in counts}
    elif found.order is not None:  # doses
        last = max(1, len(found.order) - 1)
        colours = {name: viridis(at / last) for at, name in enumerate(found.order)}
    else:
        free = iter(OKABE_ITO)
        ranked = sorted(counts, key=lambda name: (name != first, -counts[name], name))
        for name in ranked:
            if name not in colours and (colour := next(free, None)):
                colours[name] = colour
        colours = {name: colours[name] for name in ranked if name in colours}
    entries = [(short(name, WRITTEN), colour, counts[name]) for name, colour in colours.items()]
    if found.order is not None and len(entries) > MOST_DOSES:
        step = -(-len(entries) // MOST_DOSES)
        entries = entries[::step]
    if more := [name for name in counts if name not in colours]:
        words = f"{len(more)} other" + ("s" if len(more) > 1 else "")
        entries.append((words, OTHERS, sum(counts[name] for name in more)))
    return Scale({w: colours.get(name, OTHERS) for w, name in groups.items()}, entries)


def _of_numbers(numbers: Mapping[int, float], found: WellValues) -> Scale:
    values = list(numbers.values())
    low, high = found.limits or colour_limits(values)
    if not values:
        return Scale({})
    colours = {well: viridis((value - low) / (high - low)) for well, value in numbers.items()}
    ticks = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        beyond = "≤ " if share == 0 and min(values) < low else ""
        beyond = "≥ " if share == 1 and max(values) > high else beyond
        ticks.append(beyond + brief(low + share * (high - low)))
    return Scale(colours, ticks=ticks)
