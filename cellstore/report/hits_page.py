"""The hits of a screen as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..config import HitsParams
from ..errors import by_number
from ..jobs.workspace import Workspace
from ..models import Recipe, Run
from ..settings import need, track
from ..stages.hits import DoseRow, cell_ratios, hits_result, plate_sets
from ..stages.profile import open_profiles
from .drawing import brief, draw_curve, interval_bar, write_html
from .feature_words import changes
from .gallery import WINDOW, WellPictures
from .hits_figures import (
    ALIKE,
    CHANGED,
    CHANGES,
    MARKS,
    SIMILAR,
    Clusters,
    Judged,
    Screen,
    clusters_of,
    heat_map,
    plate_figures,
    position_map,
    strip,
    volcano,
    well_figure,
)

SECTIONS = 60
"""Treatments with a section of their own."""
ROWS = 2_000
"""Treatments of the ranked table."""
PAIRS = 3
"""Plates of a treatment whose wells are shown in pictures."""
CURVES = 4
"""Dose curves of a perturbation that are drawn."""
QUANTITIES = {"effect": "effect, SD", "cell_count": "cells, of the controls"}


def write_hits_page(workspace: Workspace, run_id: int, path: Path) -> None:
    """Write the page of a hits run."""
    need("report")
    need("hits")
    with workspace.database.read() as session:
        run = session.get_one(Run, run_id)
        recipe = session.get_one(Recipe, run.recipe_id)
        profile_run = session.get_one(Run, (run.result or {})["profile_run"])
        profile_recipe = session.get_one(Recipe, profile_run.recipe_id)
        result = hits_result(session, run)
    screen = read_screen(workspace, result, recipe.parameters)
    clusters = clusters_of(screen)
    wells, method = well_figure(screen, recipe.parameters["seed"])
    maps, more_plates = plate_figures(screen)
    pictures = WellPictures(workspace)
    content = {
        "screen": screen,
        "result": result,
        "run": run,
        "recipe": recipe,
        "profile_run": profile_run,
        "profile_recipe": profile_recipe,
        "marks": MARKS,
        "counts": Counter(item.row.verdict for item in screen.judged),
        "rows": ranked_rows(screen, clusters),
        "more_rows": max(0, len(screen.judged) - ROWS),
        "volcano": volcano(screen, recipe.parameters["q"]),
        "sections": list(sections(workspace, screen, pictures)),
        "more_sections": max(0, len(screen.judged) - SECTIONS),
        "channels": pictures.colours(),
        "window": WINDOW,
        "heat_map": heat_map(screen, clusters) if len(clusters.rows) > 1 else "",
        "clusters": clusters,
        "cluster_rows": cluster_rows(screen, clusters),
        "wells": wells,
        "method": method,
        "maps": maps,
        "more_plates": more_plates,
        "alike": ALIKE,
        "changed": f"{CHANGED:g}",
    }
    write_html(path, "hits.html.j2", content, {"q": q_text, "sd": sd_text})


def read_screen(workspace: Workspace, result: Any, parameters: Mapping[str, Any]) -> Screen:
    """Return the wells that a hits run compared, with its parameters, and what it found."""
    import pandas as pd

    from ..analysis.activity import Wells, against_controls, effects
    from ..analysis.well_profiles import on_edge

    _, profiles = open_profiles(workspace, str(result.profile_run))
    every = sorted({plate for plates in result.plate_sets.values() for plate in plates})
    params = HitsParams(control=parameters["control"], plates=tuple(every))
    parts = {part.name: part for part in plate_sets(profiles, params)}
    rows = {(row.plate_set, row.treatment_id): row for row in result.rows}
    first, judged, tables = 0, list[Judged](), []
    for part in parts.values():
        tables.append(part.table)
        for code, about in enumerate(part.treatments):
            row = rows.get((part.name, about.treatment_id))
            if row is None:
                continue
            mine = part.compared & (part.groups == code)
            usual = part.compared & part.controls & np.isin(part.plates, part.plates[mine])
            wells, controls = (first + np.flatnonzero(some) for some in (mine, usual))
            judged.append(Judged(0, row, about.perturbation, about.dose, wells, controls))
        first += len(part.table)
    order = list(MARKS)
    judged.sort(
        key=lambda item: (
            order.index(item.row.verdict),
            -(item.row.effect or 0),
            by_number(item.row.name),
        )
    )
    table = pd.concat(tables, ignore_index=True)
    away = [effects(Wells(p.values, p.groups, p.controls, p.plates))[1] for p in parts.values()]
    return Screen(
        result=result,
        table=table,
        z=np.concatenate(
            [against_controls(p.values, p.controls, p.plates) for p in parts.values()]
        ),
        columns=profiles.columns,
        effects=np.concatenate(away),
        cells=np.concatenate([cell_ratios(part) for part in parts.values()]),
        controls=np.concatenate([part.controls for part in parts.values()]),
        on_edge=np.asarray(on_edge(table), bool),
        judged=[replace(item, number=number) for number, item in enumerate(judged, start=1)],
    )


def q_text(value: float | None) -> str:
    """A q value in few digits."""
    if value is None:
        return "\u2013"
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.01 else f"{value:.2f}"


def sd_text(value: float | None) -> str:
    """A distance in standard deviations, with its sign."""
    if value is None:
        return "\u2013"
    return (f"{value:+.0f}" if abs(value) >= 10 else f"{value:+.1f}").replace("-", "\u2212")


def ranked_rows(screen: Screen, clusters: Clusters) -> list[dict[str, Any]]:
    """The rows of the ranked table, each with a bar on the scale of all."""
    shown = [item.row for item in screen.judged[:ROWS]]
    values = [row.effect for row in shown if row.effect is not None]
    ends = [row.effect_high for row in shown if row.effect_high is not None]
    high = float(np.percentile(ends, 98)) if ends else 1.0
    limits = min([-1.0, *values]), max([high, 1.0, *values])
    cluster_of = dict(zip(clusters.rows, clusters.numbers, strict=True))
    rows = []
    for at, row in enumerate(shown):
        item = screen.judged[at]
        ends_of, colour = (row.effect_low, row.effect_high), MARKS[item.row.verdict][2]
        bar = interval_bar("effect", row.effect, *ends_of, limits=limits, colour=colour)
        rows.append({"item": item, "bar": bar, "cluster": cluster_of.get(at)})
    return rows


# Of each treatment


def sections(
    workspace: Workspace, screen: Screen, pictures: WellPictures
) -> Iterator[dict[str, Any]]:
    """What the page shows of each of the first treatments."""
    shown = screen.judged[:SECTIONS]
    pairs = {item.number: pairs_of(screen, item) for item in shown if item.is_different}
    pictures.look_up({well for some in pairs.values() for pair in some for well in pair})
    first: dict[str, int] = {}
    for item in track(workspace.progress, "page", len(shown), shown):
        drawn_at = first.setdefault(item.perturbation, item.number)
        yield {
            "item": item,
            "mark": MARKS[item.row.verdict],
            "changes": changes(screen.columns, screen.middles[item.number - 1], CHANGED, CHANGES),
            "strip": strip(screen, item),
            "map": position_map(screen, item) if len(item.wells) else "",
            "edge": edge_wells(screen, item),
            "pairs": [pictures.pair(*pair) for pair in pairs.get(item.number, ())],
            "curves": curves_of(screen, item) if drawn_at == item.number else [],
            "curve_at": drawn_at if drawn_at != item.number and doses_of(screen, item) else None,
            "similar": similar(screen, item),
            "replicates": replicates(screen, item),
        }


def edge_wells(screen: Screen, item: Judged) -> str:
    """Say which wells of a treatment are at the edge of their plate; nothing where none is."""
    number, every = int(screen.on_edge[item.wells].sum()), len(item.wells)
    if not number:
        return ""
    alone = number == every and not screen.on_edge[item.controls].any()
    warning = " No control is: its position alone may have changed them." if alone else ""
    return f"{'⚠ ' * alone}{number} of {every} wells are at the edge of the plate.{warning}"


def similar(screen: Screen, item: Judged) -> list[tuple[Judged, float]]:
    """The treatments that differ and whose median profiles point where that of ``item`` does."""
    own = screen.directions[item.number - 1]
    if not item.is_different or not own.any():
        return []
    cosines = screen.directions @ own
    order = np.argsort(-cosines, kind="stable")
    others = (screen.judged[i] for i in order if cosines[i] >= ALIKE)
    found = (other for other in others if other.is_different and other.number != item.number)
    return [(other, float(cosines[other.number - 1])) for other in found][:SIMILAR]


def replicates(screen: Screen, item: Judged) -> str:
    """Say how many wells a treatment would have needed."""
    from ..analysis.activity import replicates_needed

    own = item.wells[screen.usable[item.wells]]
    result, plates = screen.result, len(set(screen.plates[item.controls].tolist()))
    number = replicates_needed(
        screen.z[own],
        screen.z[item.controls],
        beside=len(item.controls) / max(1, plates),
        level=0.05 * (result.hits + 1) / max(1, result.tested),
    )
    if number is None:
        return (
            "No number can be given: it has fewer than two wells, they are hardly more alike than "
            "wells of treatments that do nothing, or more than 100 were needed."
        )
    return (
        f"To find an effect of this size in four of five screens takes about {number} wells; it "
        f"has {len(own)}."
    )


def cluster_rows(screen: Screen, found: Clusters) -> list[dict[str, Any]]:
    """Of each cluster its treatments, their targets, and what they share in words."""
    rows = []
    for number in dict.fromkeys(found.numbers):
        members = [i for i, of in zip(found.rows, found.numbers, strict=True) if of == number]
        items = [screen.judged[i] for i in members]
        targets = Counter(item.row.target for item in items if item.row.target)
        changed = changes(
            screen.columns, np.median(screen.middles[members], axis=0), CHANGED, CHANGES
        )
        rows.append(
            {
                "number": number,
                "items": items,
                "targets": targets.most_common(3),
                "changes": changed,
            }
        )
    return rows


# Dose curves


def doses_of(screen: Screen, item: Judged) -> list[DoseRow]:
    """What was said of the doses of a perturbation."""
    key = item.perturbation, item.row.plate_set
    return [row for row in screen.result.doses if (row.name, row.plate_set) == key]


def curves_of(screen: Screen, item: Judged) -> list[dict[str, Any]]:
    """The dose curves of the perturbation of ``item``, each in words and as a figure.

    Probabilities of labels are not drawn: they are not in the profiles.
    """
    from ..analysis.dose_curves import effect_curve, fit_curve

    rows, key = doses_of(screen, item)[:CURVES], (item.perturbation, item.row.plate_set)
    if not rows:
        return []
    same = [
        other
        for other in screen.judged
        if (other.perturbation, other.row.plate_set) == key and other.dose is not None
    ]
    doses = np.concatenate([np.full(len(other.wells), other.dose) for other in same])
    wells = np.concatenate([other.wells for other in same])
    usual = np.unique(np.concatenate([other.controls for other in same]))
    found = []
    for row in rows:
        figure = ""
        values = {"effect": screen.effects, "cell_count": screen.cells}.get(row.quantity)
        if row.quantity in screen.columns:
            values = screen.z[:, screen.columns.index(row.quantity)]
        if values is not None:
            given = doses, values[wells], values[usual]
            if row.quantity == "effect":
                both = np.concatenate([wells, usual])
                dose = np.r_[doses, np.full(len(usual), np.nan)]
                curve, moved = effect_curve(values[both], screen.z[both], dose)
                given = doses, moved[: len(wells)], moved[len(wells) :]
            else:
                curve = fit_curve(*given)
            name = f"curve {item.number} {row.quantity}"
            label = QUANTITIES.get(row.quantity, f"{row.quantity}, SD")
            lists = (some.tolist() for some in given)
            figure = draw_curve(name, curve, *lists, unit=row.unit or "", label=label)
        found.append({"said": _curve_in_words(row), "figure": figure})
    return found


def _curve_in_words(row: DoseRow) -> str:
    from_dose = "no dose from which on all are active"
    if row.lowest_active is not None:
        from_dose = f"active from {brief(row.lowest_active)} {row.unit or ''}".rstrip() + " on"
    trend = f"; trend with the dose p {q_text(row.trend_p)}" if row.trend_p is not None else ""
    return f"{QUANTITIES.get(row.quantity, row.quantity)}: {from_dose}{trend}."


# Pictures


def pairs_of(screen: Screen, item: Judged) -> list[tuple[int, int]]:
    """Wells of a treatment on different plates, each with the most usual control of its plate.

    By their ids.
    """
    ids = screen.table["well_id"]
    found: dict[str, tuple[int, int]] = {}
    for well in item.wells.tolist():
        plate = screen.plates[well]
        usual = item.controls[screen.plates[item.controls] == plate]
        known = usual[np.isfinite(screen.effects[usual])]
        if len(known):
            away = np.abs(screen.effects[known] - np.median(screen.effects[known]))
            usual = known[np.argsort(away, kind="stable")]
        if len(usual):
            found.setdefault(plate, (int(ids.iat[well]), int(ids.iat[int(usual[0])])))
    return list(found.values())[:PAIRS]
