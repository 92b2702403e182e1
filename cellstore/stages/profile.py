"""Average the cells of each well, make wells comparable, and keep the profiles as a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Select, case, func, null, select
from sqlalchemy.orm import Session

from ..analysis.well_profiles import (
    WELL_COLUMNS,
    WellProfiles,
    correct_batches,
    correct_positions,
    normalise,
    select_features,
)
from ..config import ProfileParams, RunName, Selection, VoteOptions
from ..db.bulk import in_lists
from ..db.fields import changed_since
from ..enums import ArtifactKind, Stage
from ..errors import UserInputError
from ..jobs.lookup import find_run, images_of
from ..jobs.runs import (
    RecipeSpec,
    digest_of_images,
    files_of,
    finished_run,
    keep_files,
    result_of,
    running,
)
from ..jobs.workspace import Workspace
from ..models import FeatureSet, Image, Plate, Recipe, Run, Treatment, TreatmentPart, Well
from ..notebooks import Shown
from ..query.cell_tables import LIMITS
from ..query.cells import choose_recipes
from ..query.engine import Questions, open_questions
from ..query.exclusions import image_counts, qc_run_for, unseen_notes
from ..query.feature_files import open_set
from ..query.guard import quoted
from ..settings import need, track

if TYPE_CHECKING:
    import pandas as pd

VERSION = 1

VALUES_AT_ONCE = 10_000_000
"""So many values of cells are held while medians are found: some 200 MB."""

COLUMNS_AT_ONCE = 100
"""The time in which DuckDB plans a question grows with the square of its columns."""

ROWS_AT_ONCE = 2_000
"""Wells of a row group."""

NOT_FEATURES = ("well_id", "n_cells", "n_images")
"""The first columns of a file of profiles."""

PLACES = ("centroid_y", "centroid_x")
"""Of the built-in measurements: where a cell is, which says nothing of what it looks like."""

IMAGES = """
    SELECT i.id AS image_id, i.well_id, w.plate_id, s.id AS segmentation_id
    FROM segmentations AS s
    JOIN images AS i ON i.id = s.image_id
    JOIN wells AS w ON w.id = i.well_id
    WHERE s.recipe_id = $segment
    AND (s.content_sha256 IS NULL OR s.content_sha256 = i.content_sha256)
    AND (len($plates::BIGINT[]) = 0 OR list_contains($plates::BIGINT[], w.plate_id))
    AND NOT EXISTS (FROM excluded_images AS e WHERE e.image_id = i.id)
"""
"""The images that count and are segmented."""

EXTENTS = """
    SELECT plate_id, min(segmentation_id), max(segmentation_id) FROM profile_images
    GROUP BY plate_id ORDER BY plate_id
"""
CELLS = """
    SELECT e.cell_id, i.well_id, i.image_id
    FROM eligible_cells AS e
    JOIN profile_images AS i ON i.segmentation_id = e.segmentation_id
    WHERE i.plate_id = $plate AND e.segmentation_id BETWEEN $first AND $last
"""
"""The cells of a plate that count: of other plates not even a part of the copies is read."""

COUNTS = """
    SELECT c.image_id, count(*), count(f.cell_id)
    FROM profile_cells AS c LEFT JOIN ({features}) AS f ON f.cell_id = c.cell_id
    GROUP BY c.image_id
"""
VALUES = """
    SELECT c.well_id, c.image_id, {values}
    FROM profile_cells AS c JOIN ({features}) AS f ON f.cell_id = c.cell_id
"""
AVERAGES = {"median": "median(v{0})", "mean": "favg(v{0})"}
OF_WELLS = "SELECT well_id, {averages} FROM ({values}) GROUP BY well_id"
OF_IMAGES = """
    SELECT well_id, {averages} FROM (
        SELECT well_id, image_id, {of_images} FROM ({values}) GROUP BY well_id, image_id
    ) GROUP BY well_id
"""
FINITE = " FILTER (WHERE isfinite(v{0}))"


@dataclass(frozen=True)
class ProfileResult(Shown):
    """Profiles of ``wells`` wells on ``plates`` plates.

    ``wells_without_cells``: their only number is 0 cells. ``wells_without_values``: these, and
    wells of plates that cannot be compared. ``controls``: negative controls. ``cells`` that count.
    ``measured`` features came in, ``features`` are left; ``gone`` says why the others went, and
    which. ``already_done``: the run was there before this call.
    """

    run_id: int
    recipe_id: int
    already_done: bool
    feature_set: str
    plates: int
    wells: int
    wells_without_cells: int
    wells_without_values: int
    controls: int
    cells: int
    measured: int
    features: int
    gone: dict[str, list[str]]
    notes: tuple[str, ...]


def profile(
    workspace: Workspace,
    params: ProfileParams | None = None,
    *,
    segmentation: str | None = None,
    measurement: str | None = None,
    force: bool = False,
) -> ProfileResult:
    """Average the cells of each well, and compare wells; see :meth:`Store.profile`.

    Excluded cells do not count, nor do values that are missing or infinite. A well whose images
    are segmented and hold no cell is kept: its features are missing, its number of cells is 0.
    """
    need("hits")
    params = params or ProfileParams()
    if params.harmony != "none":
        need("harmony")
    notes: list[str] = []
    with workspace.database.read() as session:
        asked = params.features
        if (asked, segmentation, measurement) == (None, None, None):
            sets = session.scalars(select(FeatureSet.name).limit(2)).all()
            asked = sets[0] if len(sets) == 1 else None  # also one that another tool made
        segment, measure = choose_recipes(session, segmentation, measurement, asked)
        features = open_set(session, workspace.artifacts, measure.id)
        images = images_of(session, Selection(plates=params.plates))
        flagged, inputs = None, [segment, measure]
        if params.exclude_flagged is not None:
            qc, unseen = qc_run_for(session, params.exclude_flagged, images, [segment.id])
            notes += unseen_notes(qc, unseen)
            flagged = str(qc.id)
            inputs.append(session.get_one(Recipe, qc.recipe_id))
        counting = image_counts(None if flagged is None else int(flagged))
        wells = select(func.count(Image.well_id.distinct())).where(Image.id.in_(images), counting)
        n_wells = session.scalar(wells) or 0
        mark = features.mark(session, segment.id, images)
        plate_ids = session.scalars(select(Plate.id).where(Plate.barcode.in_(params.plates))).all()
    assert features.name is not None  # each measurement makes a set
    votes = VoteOptions(exclude_flagged=flagged)
    with open_questions(workspace, LIMITS, vote_options=votes) as questions:
        chosen = {"segment": segment.id, "plates": list(plate_ids)}
        questions.keep("profile_images", IMAGES, chosen)
        averaging = _Averaging(workspace, questions, features.name, params.average)
        counts = averaging.count()
        with workspace.database.read() as session:
            spec = RecipeSpec(
                Stage.PROFILE,
                VERSION,
                _parameters(session, params, images, counts, mark),
                None,
                tuple(inputs),
                {"exclude_flagged": None if flagged is None else int(flagged)},
            )
            earlier = None if force else finished_run(session, spec)
            if earlier is not None:
                files = files_of(session, earlier.id, ArtifactKind.PROFILES)
                if not workspace.artifacts.missing(file.path for file in files):
                    return result_of(earlier, ProfileResult, already_done=True)
        if not any(measured for _, measured in counts.values()):
            raise UserInputError(_nothing_measured(counts, measure, params))
        with running(workspace.database, spec, seed=0, query=averaging.query) as run:
            notes += averaging.notes(counts)
            if lacking := n_wells - len(set(averaging.well_of.values())):
                what = "well has" if lacking == 1 else "wells have"
                notes.append(
                    f"{lacking:,} {what} images, but none that is segmented by recipe "
                    f"{segment.id}: no profile. Run: cellstore segment"
                )
            profiles = _compared(averaging.profiles(counts), params)
            stored = workspace.artifacts.write(
                ArtifactKind.PROFILES, _as_parquet(profiles), ".parquet"
            )
            with workspace.database.begin() as session:
                keep_files(session, [stored], run.id)
            table = profiles.table
            run.result = {
                "feature_set": features.name,
                "plates": int(table["plate"].nunique()),
                "barcodes": sorted(set(table["plate"])),
                "wells": len(table),
                "wells_without_cells": int((table["n_cells"] == 0).sum()),
                "wells_without_values": int((~profiles.known).sum()),
                "controls": int(profiles.controls.sum()),
                "cells": int(table["n_cells"].sum()),
                "measured": len(averaging.columns),
                "features": len(profiles.columns),
                "gone": {reason: list(names) for reason, names in profiles.gone.items()},
                "notes": [*notes, *profiles.notes],
            }
    with workspace.database.read() as session:
        return result_of(session.get_one(Run, run.id), ProfileResult, already_done=False)


def open_profiles(
    workspace: Workspace, reference: RunName | None = None
) -> tuple[int, WellProfiles]:
    """Return the number of a profile run, and its profiles; default: the latest that is done.

    What was done to a well is as the store has it now. Wells that were excluded since are left out;
    the first of ``notes`` says how many were changed since.
    """
    with workspace.database.read() as session:
        run = find_run(session, "latest" if reference is None else reference, Stage.PROFILE)
        files = files_of(session, run.id, ArtifactKind.PROFILES)
        if not files:
            raise UserInputError(
                f"Profile run {run.id} is {run.status.value} and has no profiles. Run: cellstore "
                "profile, or name another run."
            )
        read = pq.read_table(
            pa.BufferReader(workspace.artifacts.read(files[0].path, files[0].sha256))
        )
        ids = read["well_id"].to_pylist()
        table = _well_table(session, ids)
        for name in NOT_FEATURES[1:]:
            table[name] = read[name].to_numpy()
        columns = tuple(read.column_names[len(NOT_FEATURES) :])
        values = np.full((len(ids), len(columns)), np.nan)
        for at, name in enumerate(columns):
            values[:, at] = read[name].to_numpy()
        counting = set[int]()  # the others were excluded, or deleted, since
        for some in in_lists(ids):
            query = select(Image.well_id).where(Image.well_id.in_(some), image_counts())
            counting.update(session.scalars(query.distinct()))
        there = np.isin(ids, list(counting))
        table = table[there].reset_index(drop=True)
        result = run.result or {}
        gone = {reason: tuple(names) for reason, names in result.get("gone", {}).items()}
        notes = (*changed_since(session, run.id), *result.get("notes", ()))
        return run.id, WellProfiles(table, values[there], columns, gone, notes)


def _parameters(
    session: Session,
    params: ProfileParams,
    images: Select[int],
    counts: Mapping[int, Sequence[int]],
    mark: str | None,
) -> dict[str, Any]:
    """Return what decides the profiles: also which wells are controls, and how many cells count."""
    batch = Plate.batch if params.harmony == "batch" else null()
    wells = select(Image.id, Well.control, batch).join(Well, Well.id == Image.well_id)
    wells = wells.join(Plate, Plate.id == Well.plate_id)
    details: dict[int, Any] = {}
    for some in in_lists(counts):
        for image_id, *of_well in session.execute(wells.where(Image.id.in_(some))):
            details[image_id] = [*of_well, *counts[image_id]]
    found = asdict(params) | {"cells": digest_of_images(session, images, details)}
    for name in ("features", "plates", "exclude_flagged"):  # the cells say it
        del found[name]
    return found if mark is None else found | {"feature_files": mark}


def _nothing_measured(
    counts: Mapping[int, Sequence[int]], measure: Recipe, params: ProfileParams
) -> str:
    where = f" of {', '.join(params.plates)}" if params.plates else ""
    if not counts:
        return f"No image{where} that counts is segmented. Run: cellstore segment"
    if not any(cells for cells, _ in counts.values()):
        return (
            f"None of the segmented images{where} has a cell that counts, so there is nothing to "
            "average. See why: cellstore ask wells-without-cells"
        )
    group = measure.parameters.get("group")
    option = f" --features {group}" if group else ""
    return f"No cell{where} that counts is measured. Run: cellstore measure{option}"


class _Averaging:
    """Averages the cells of wells, plate by plate and some columns at a time.

    ``columns``: the features, each with what it is called in the set. ``query``: what is kept with
    the run.
    """

    def __init__(
        self, workspace: Workspace, questions: Questions, feature_set: str, average: str
    ) -> None:
        self.workspace, self.questions = workspace, questions
        self.feature_set, self.average = feature_set, average
        self.columns: dict[str, str] = {}
        self.texts: list[str] = []
        for name, kind in questions.columns(feature_set)[1:]:
            if kind not in ("BIGINT", "FLOAT", "DOUBLE"):
                self.texts.append(name)
            elif name not in PLACES:
                self.columns[f"{name}_1" if name.lower() in NOT_FEATURES else name] = name
        self.extents = list(questions.ask_ours(EXTENTS).rows())
        rows = questions.ask_ours("SELECT image_id, well_id FROM profile_images").rows()
        self.well_of = dict(rows)
        self.query = OF_WELLS.format(
            averages=f"{average}(...)", values=VALUES.format(values="...", features=feature_set)
        )

    def _keep_cells(self, plate: int, first: int, last: int) -> tuple[int, int] | None:
        """Keep the cells of a plate as a table; return the first and the last id, if there are."""
        values = {"plate": plate, "first": first, "last": last}
        self.questions.keep("profile_cells", CELLS, values)
        ids = "SELECT min(cell_id), max(cell_id) FROM profile_cells"
        low, high = next(self.questions.ask_ours(ids).rows())
        return None if low is None else (low, high)

    def count(self) -> dict[int, tuple[int, int]]:
        """Return by image how many of its cells count, and how many of these are measured."""
        found = dict.fromkeys(self.well_of, (0, 0))
        progress = self.workspace.progress
        for extent in track(progress, "count cells", len(self.extents), self.extents):
            if (ids := self._keep_cells(*extent)) is not None:
                features = self.questions.reading(self.feature_set, *ids)
                counts = self.questions.ask_ours(COUNTS.format(features=features))
                found |= {image_id: (cells, known) for image_id, cells, known in counts.rows()}
        return found

    def profiles(self, counts: Mapping[int, Sequence[int]]) -> WellProfiles:
        """Return the averages of all wells that have a segmented image, by plate and position."""
        with self.workspace.database.read() as session:
            table = _well_table(session, sorted(set(self.well_of.values())))
        table = table.sort_values(["plate", "well_row", "well_column"], ignore_index=True)
        cells, images = Counter[int](), Counter[int](self.well_of.values())
        for image_id, (number, _) in counts.items():
            cells[self.well_of[image_id]] += number
        ids = table["well_id"].tolist()
        table["n_cells"] = [cells[well_id] for well_id in ids]
        table["n_images"] = [images[well_id] for well_id in ids]
        row_of = {well_id: row for row, well_id in enumerate(ids)}
        names = list(self.columns)
        values = np.full((len(ids), len(names)), np.nan)
        of_plate = table.groupby("plate", sort=False)["n_cells"].sum().tolist()
        at_once = max(1, min(COLUMNS_AT_ONCE, VALUES_AT_ONCE // max(1, *of_plate)))
        progress = self.workspace.progress
        for extent in track(progress, "profile", len(self.extents), self.extents):
            if (span := self._keep_cells(*extent)) is None:
                continue
            for first in range(0, len(names), at_once):
                columns = [self.columns[name] for name in names[first : first + at_once]]
                features = self.questions.reading(self.feature_set, *span, columns)
                found = self._averages(features, columns)
                rows = [row_of[well_id] for well_id in found.pop("well_id").tolist()]
                for at, column in enumerate(found.values(), first):
                    values[rows, at] = column
        return WellProfiles(table, values, tuple(names))

    def _averages(self, features: str, columns: Sequence[str]) -> dict[str, Any]:
        """Return ``well_id`` and the average of each column, of the cells that are kept."""
        numbers = range(len(columns))
        listed = ", ".join(
            f"CAST(f.{quoted(name)} AS DOUBLE) AS v{at}" for at, name in enumerate(columns)
        )
        values = VALUES.format(values=listed, features=features)

        def each(*templates: str) -> str:
            return ", ".join(text.format(at) for at in numbers for text in templates)

        if self.average == "weighted":
            of_images = each(
                f"median(v{{0}}){FINITE} AS m{{0}}", f"count(v{{0}}){FINITE} AS k{{0}}"
            )
            averages = each("coalesce(sum(m{0} * k{0}) / nullif(sum(k{0}), 0), 'nan') AS a{0}")
            query = OF_IMAGES.format(averages=averages, of_images=of_images, values=values)
        else:
            averages = each(f"coalesce({AVERAGES[self.average]}{FINITE}, 'nan') AS a{{0}}")
            query = OF_WELLS.format(averages=averages, values=values)
        return self.questions.ask_ours(query).arrays()

    def notes(self, counts: Mapping[int, Sequence[int]]) -> list[str]:
        """Return what a reader has to know of the cells and columns that were averaged."""
        notes = []
        cells, measured = (sum(row[at] for row in counts.values()) for at in (0, 1))
        if measured < cells:
            notes.append(
                f"{cells - measured:,} of {cells:,} cells are not in feature set "
                f"{self.feature_set}: they count in the numbers of cells alone. Measure them, too."
            )
        if self.texts:
            some = ", ".join(self.texts[:5])
            notes.append(f"Left out, because they are no numbers: {len(self.texts)} ({some}).")
        return notes


def _compared(profiles: WellProfiles, params: ProfileParams) -> WellProfiles:
    """Make wells comparable, step by step. Only what is left is sphered."""
    sphere = params.normalise == "sphere"
    profiles = correct_positions(profiles, params.positions)
    profiles = normalise(profiles, "mad" if sphere else params.normalise, params.against)
    profiles = select_features(profiles, params.select)
    if sphere:
        profiles = normalise(profiles, "sphere", params.against)
    return correct_batches(profiles, params.harmony)


def _well_table(session: Session, well_ids: Sequence[int]) -> pd.DataFrame:
    """Return the columns that describe wells (``WELL_COLUMNS``), in the order of their ids."""
    import pandas as pd

    number, parts = func.count(), TreatmentPart
    part = (
        select(parts.treatment_id.label("id"))
        .add_columns(case((number == 1, func.max(parts.dose))).label("dose"))
        .add_columns(case((number == 1, func.max(parts.dose_unit))).label("unit"))
        .group_by(parts.treatment_id)
        .subquery()
    )
    query = (
        select(Well.id, Plate.barcode, Well.name, Well.well_row, Well.well_column)
        .add_columns(Plate.batch, Plate.cell_line, Plate.time_point)
        .add_columns(Well.treatment_id, Treatment.name, Treatment.name_with_dose)
        .add_columns(Treatment.name.label("perturbation"), part.c.dose, part.c.unit)
        .add_columns(Treatment.target, Well.control)
        .join(Plate, Plate.id == Well.plate_id)
        .outerjoin(Treatment, Treatment.id == Well.treatment_id)
        .outerjoin(part, part.c.id == Treatment.id)
    )
    rows = [
        tuple(r)
        for some in in_lists(well_ids)
        for r in session.execute(query.where(Well.id.in_(some)))
    ]
    table = pd.DataFrame(rows, columns=list(WELL_COLUMNS[:-2])).set_index("well_id")
    table = table.reindex(list(well_ids)).reset_index()
    table["control"] = [None if pd.isna(mark) else str(mark) for mark in table["control"]]
    kinds = {"treatment_id": "Int64", "dose": "float64"}
    return table.astype(kinds).assign(n_cells=0, n_images=0)


def _as_parquet(profiles: WellProfiles) -> bytes:
    """Return the file of profiles: ``NOT_FEATURES``, then the features; a missing value is null."""
    arrays = [pa.array(profiles.table[name].to_numpy(dtype=np.int64)) for name in NOT_FEATURES]
    arrays += [pa.array(column, from_pandas=True) for column in profiles.values.T]
    table = pa.table(arrays, [*NOT_FEATURES, *profiles.columns])
    sink = BytesIO()
    pq.write_table(
        table, sink, row_group_size=ROWS_AT_ONCE, use_dictionary=False, compression="zstd"
    )
    return sink.getvalue()
