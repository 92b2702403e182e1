"""What a model that is not of cellstore made: predictions, and embeddings of cells.

Predictions become a train and a predict run, embeddings a measure run with a feature set. These
runs are *declared*: somebody said what made their rows, cellstore has not seen it. Every row is
checked before the first is written. Predictions are then written image by image like those of any
other predict run, so that votes, reports and audits read them as they read the others.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from sqlalchemy import select
from sqlalchemy.orm import Session, aliased

from ..artifacts import sha256_of
from ..config import AddedParams, ApplyParams, RunName
from ..db.bulk import in_lists, insert_new
from ..db.events import Change, record_events, record_runs, recording_removed
from ..enums import Origin, Stage, Status, Subset
from ..errors import (
    CellstoreError,
    ImageError,
    StorageError,
    StoreError,
    UserInputError,
    first_line,
)
from ..io.filenames import format_well, parse_well
from ..io.tables import KEYS, MISSING, Refusal, disarmed_name, open_table, plain_name
from ..jobs.execute import ImageStage, RunCounter, run_jobs
from ..jobs.lookup import find_split, readable, renamed_plates
from ..jobs.queue import CONTENT, JobScope, Task, requeue
from ..jobs.run_names import find_predict_run
from ..jobs.runs import RecipeSpec, digest_of_numbers, finished_run, register, running
from ..jobs.workspace import Workspace
from ..learn.trackers import of_mlflow
from ..models import (
    FeatureSet,
    Image,
    Job,
    Label,
    Plate,
    Recipe,
    Run,
    Segmentation,
    Split,
    SplitMember,
)
from ..notebooks import Shown
from ..query.cells import choose_recipes, read_masks
from ..query.engine import Questions, open_questions
from ..query.feature_files import (
    FeatureWriter,
    forget_lost_files,
    list_files,
    make_set,
    register_files,
    stream_ids,
)
from ..query.guard import literal
from ..query.source import check_set_name
from .export import FILE_COLUMNS, exported_columns
from .predict import PredictionRows, check_alone, insert_predictions, latest_run

VERSION = 1
SHOWN = 5
"""Rows with mistakes that a message names."""

NAMES: Mapping[str, tuple[str, ...]] = {
    "cell_id": ("cellid",),
    **KEYS,
    "plane": ("plane",),
    "time_point": ("timepoint", "timeid"),
    "object_number": ("objectnumber", "object", "objectid"),
    "y": ("centroidrow", "centroidy", "locationcentery", "y"),
    "x": ("centroidcol", "centroidx", "locationcenterx", "x"),
    "label": ("label", "class", "prediction", "predicted", "predictedlabel", "predictedclass"),
    "probability": ("probability", "confidence", "prob", "score"),
}
"""Names of columns, as ``plain_name`` gives them; the first one counts."""

TREATED_FOR, TIME_POINT = "Metadata_time_point", "Metadata_Timepoint"
"""Columns of an export: how long a plate was treated, as text, and the number of the time point."""

ROWS_AT_ONCE = 65_536
"""Rows of a table in memory of which the digest is made at once; another number changes it."""

ADDS_UP = 1e-3
"""By how much the probabilities of a cell may add up to more than 1."""

NOT_DECLARED = (
    "Nobody said which subset of the split this model was trained on, so reports cannot "
    "say whether it has seen the wells before. If you know: --trained-on train"
)

_WHOLE = """
    CASE WHEN TRY_CAST({0} AS BIGINT) = TRY_CAST({0} AS DOUBLE) THEN TRY_CAST({0} AS BIGINT) END
"""
BY_ID = """
    SELECT g.*, c.id AS cell, s.image_id, s.recipe_id,
        s.content_sha256 IS DISTINCT FROM i.content_sha256 AND s.content_sha256 IS NOT NULL AS stale
    FROM rows_given AS g
    LEFT JOIN cells AS c ON c.id = g.cell_id
    LEFT JOIN segmentations AS s ON s.id = c.segmentation_id
    LEFT JOIN images AS i ON i.id = s.image_id
"""
BY_IMAGE = """
    SELECT g.*, i.image_id AS cell, i.image_id, NULL AS recipe_id, false AS stale
    FROM rows_given AS g LEFT JOIN images_given AS i ON i.{keys}
"""
BY_NUMBER = """
    SELECT g.*, c.id AS cell, i.image_id, s.recipe_id, false AS stale
    FROM rows_given AS g
    LEFT JOIN images_given AS i ON i.{keys}
    LEFT JOIN segmentations_given AS s ON s.image_id = i.image_id
    LEFT JOIN cells AS c ON c.segmentation_id = s.id AND c.object_number = g.object_number
"""
CHECKED = """
    SELECT r.*{label_id},
        CASE
            WHEN {unknown_image} THEN 'no such image'
            WHEN r.cell IS NULL THEN 'no such cell'
            WHEN r.stale THEN 'the image has changed since the cell was found'
            {asked}
        END AS problem
    FROM rows_given AS r {labels}
"""
CLASSES = """
            WHEN r.label IS NULL THEN 'no class'
            WHEN l.id IS NULL THEN 'a class that is not in the split'
            WHEN r.p IS NULL OR isnan(r.p) OR r.p < 0 OR r.p > 1
                THEN 'a probability that is not from 0 to 1'
            WHEN count(*) OVER (PARTITION BY r.cell, r.label) > 1
                THEN 'the same {unit} and class twice'
            WHEN sum(r.p) OVER (PARTITION BY r.cell) > {most}
                THEN 'probabilities of one {unit} that add up to more than 1'
"""
NUMBERS = """
            WHEN r.odd IS NOT NULL THEN 'no number'
            WHEN count(*) OVER (PARTITION BY r.cell) > 1 THEN 'the same cell twice'
"""
ADDED = """
    SELECT image_id, cell AS cell_id, label_id, p AS probability,
        row_number() OVER (PARTITION BY cell ORDER BY p DESC, label) AS rank
    FROM rows_given ORDER BY image_id, cell_id, rank
"""
OF_IMAGES = """
    SELECT image_id, cell_id, rank, label_id, probability FROM rows_added
    WHERE image_id BETWEEN $first AND $last AND list_contains($images, image_id)
    ORDER BY image_id, cell_id, rank
"""


@dataclass(frozen=True)
class AddedPredictions(Shown):
    """What was added: ``run_id`` is the predict run, ``train_run_id`` that of the model.

    ``rows`` of ``cells`` cells of ``images`` images were written now; none where the same table was
    added before (``already_done``). ``cells`` is 0 for a model that sees whole images.
    ``trained_on``: the subsets of the split that were declared. ``trackers``: the MLflow run that
    was named, with a link to it if ``$MLFLOW_TRACKING_URI`` is that of a server.
    """

    run_id: int
    train_run_id: int
    name: str
    split: str
    trained_on: tuple[str, ...] | None
    rows: int
    cells: int
    images: int
    already_done: bool = False
    notes: tuple[str, ...] = ()
    trackers: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class AddedEmbeddings(Shown):
    """What was added: ``columns`` numbers of each of ``cells`` cells, in ``feature_set``."""

    run_id: int
    feature_set: str
    cells: int
    columns: int
    already_done: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AddPredictions(ImageStage[PredictionRows, PredictionRows]):
    """The stage: the rows of an image are looked up in ``questions``, and written.

    ``whole``: they are about the image itself, whose id stands in the place of those of cells.
    """

    label = "add predictions"

    questions: Questions
    whole: bool

    def fetch(self, session: Session, tasks: Sequence[Task]) -> Mapping[int, PredictionRows]:
        """Return the rows about each image."""
        ids = sorted(task.image_id for task in tasks)
        values = {"images": ids, "first": ids[0], "last": ids[-1]}
        found = self.questions.ask_ours(OF_IMAGES, values).arrays()
        columns = [found[name] for name in ("cell_id", "rank", "label_id", "probability")]
        ends = np.searchsorted(found["image_id"], ids, side="right").tolist()
        return {
            image: PredictionRows(*(column[first:end] for column in columns))
            for image, first, end in zip(ids, [0, *ends], ends, strict=False)
        }

    def digest(self, recipe_id: int, output: PredictionRows) -> str | None:
        """Return the digest of the rows of cells; of images the ledger keeps one itself."""
        return None if self.whole else digest_of_numbers(np.column_stack(output))

    def insert(
        self,
        session: Session,
        run: RunCounter,
        done: Sequence[tuple[Task, PredictionRows]],
        files: None,
    ) -> int:
        """Write the predictions."""
        insert_predictions(session, run.run_id, (rows for _, rows in done), whole=self.whole)
        return 0 if self.whole else sum(len(np.unique(rows.cell_ids)) for _, rows in done)


def add_predictions(
    workspace: Workspace,
    table: Path | pa.Table,
    params: AddedParams,
    parameters: Mapping[str, Any] | None = None,
    query: str | None = None,
) -> AddedPredictions:
    """Keep what a model that is not of cellstore says of cells; see ``Store.add_predictions``.

    Nothing is written if a row cannot be used. A call that was killed is completed by the same
    call.
    """
    source = _TableSource(table)
    weights = _sha256_of_weights(params.model)
    with workspace.database.read() as session:
        split = find_split(session, params.split)
        classes = classes_of(session, split.id)
        named = params.segmentation
        segment = choose_recipes(session, named, None)[0] if named else None
        details: dict[str, Any] = {"weights": params.model and params.model.name}
        details["parameters"] = dict(parameters or {})
        train = declared_training(session, split, params, details, weights)
    trackers = {} if params.mlflow_run is None else {"mlflow": of_mlflow(params.mlflow_run)}
    told = {"note": params.note, **({"trackers": trackers} if trackers else {})}
    with open_questions(workspace) as questions:
        keys = source.bring(workspace, questions, *source.classes(classes))
        notes = list(source.notes)
        segment_id = _find_rows(workspace, questions, keys, segment, source.name, classes)
        (about,) = questions.ask_ours(
            "SELECT count(*) AS rows, count(DISTINCT cell_id) AS cells, max(rank) AS top_k "
            "FROM rows_added"
        ).records()
        n_cells = 0 if segment_id is None else int(about["cells"])
        images = _column(questions, "SELECT DISTINCT image_id FROM rows_added")
        kept = {"labels": list(classes), **told}
        train_run_id = declare_training(workspace, train, split.id, kept, query)
        with workspace.database.begin() as session:
            inputs = [register(session, train)]
            if segment_id is not None:
                inputs.append(session.get_one(Recipe, segment_id))
            values = {"declared": params.name, "table": source.sha256, "top_k": int(about["top_k"])}
            recipe = register(
                session, RecipeSpec(Stage.PREDICT, VERSION, values, weights, tuple(inputs))
            )
            latest = latest_run(session, recipe.id)
        check_not_withdrawn(latest)
        done = latest is not None and latest.status is Status.DONE
        if latest is not None and done:
            run_id, trackers = latest.id, (latest.result or {}).get("trackers", {})
        else:
            with running(
                workspace.database,
                recipe,
                parent_id=train_run_id,
                split_id=split.id,
                query=query,
                resume=None if latest is None else latest.id,
                origin=Origin.DECLARED,
            ) as run:
                run_id = run.id
                if latest is None:
                    check_alone(workspace, recipe.id, run.id)
                _open_jobs(workspace, recipe.id, run.id, images)
                job = aliased(Job)  # those of this stage are looked up around it
                mine = select(Image.id).where(
                    Image.id.in_(select(job.image_id).where(job.recipe_id == recipe.id))
                )
                scope = JobScope({recipe.id: run.id}, mine, unseen=True)
                whole = segment_id is None
                did = run_jobs(workspace, AddPredictions(questions, whole), scope)[recipe.id]
                run.result = {
                    "images": len(images),
                    "cells": n_cells,
                    "file": source.name,
                    **told,
                    **code_of_caller(),
                }
                if did.failures:
                    raise StoreError(
                        f"Predictions of {len(did.failures):,} images could not be written: "
                        f"{did.failures[0][1]} Give the same command again to complete them."
                    )
    if params.trained_on is None:
        notes.append(NOT_DECLARED)
    return AddedPredictions(
        run_id=run_id,
        train_run_id=train_run_id,
        name=params.name,
        split=split.name,
        trained_on=params.trained_on,
        rows=0 if done else int(about["rows"]),
        cells=0 if done else n_cells,
        images=0 if done else len(images),
        already_done=done,
        notes=tuple(notes),
        trackers=trackers,
    )


def classes_of(session: Session, split_id: int, subset: Subset | None = None) -> dict[str, int]:
    """Return the ids of the classes of a split, or of one subset of it, by class, sorted."""
    query = select(Label.value, Label.id).join(SplitMember, SplitMember.label_id == Label.id)
    query = query.where(SplitMember.split_id == split_id).distinct()
    if subset is not None:
        query = query.where(SplitMember.subset == subset)
    return dict(sorted(session.execute(query).all()))


def check_not_withdrawn(latest: Run | None) -> None:
    """Refuse to make predictions again that were withdrawn."""
    if latest is not None and latest.status is Status.WITHDRAWN:
        raise UserInputError(
            f"These predictions were withdrawn: run {latest.id}, {latest.error}. If they are "
            "right after all, add them with another --name."
        )


def declared_training(
    session: Session,
    split: Split,
    params: AddedParams | ApplyParams,
    details: Mapping[str, Any],
    weights: str | None = None,
) -> RecipeSpec:
    """Return the recipe of the training of a model that is not of cellstore.

    ``details``: what else is known of the model, ``weights``: their sha256. The folds of a
    cross-validation have one recipe, so the fingerprint of the split is part of it.
    """
    learned = None if params.trained_on is None else ",".join(params.trained_on)
    declared = {
        "declared": params.name,
        "trained_on": learned,
        "split": split.fingerprint,
        **details,
    }
    inputs = (session.get_one(Recipe, split.recipe_id),)
    return RecipeSpec(Stage.TRAIN, VERSION, declared, weights, inputs)


def declare_training(
    workspace: Workspace,
    spec: RecipeSpec,
    split_id: int,
    kept: Mapping[str, Any],
    query: str | None = None,
) -> int:
    """Return the run of a training that is declared, made with what is ``kept`` if it is new.

    ``query``: the SQL of the cells that it has learned from.
    """
    with workspace.database.read() as session:
        trained = finished_run(session, spec, split_id)
    if trained is not None:
        return trained.id
    with running(
        workspace.database, spec, split_id=split_id, query=query, origin=Origin.DECLARED
    ) as made:
        made.result = {**kept, **code_of_caller()}
    return made.id


def add_embeddings(
    workspace: Workspace,
    table: Path | pa.Table,
    name: str,
    *,
    model: Path | None = None,
    segmentation: str | None = None,
    note: str | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> AddedEmbeddings:
    """Keep numbers that a model of somebody's own made of cells; see ``Store.add_embeddings``.

    The same table again adds only what is lacking: a file was lost, or cells were found anew.
    """
    source = _TableSource(table)
    check_set_name(name, "name")
    weights = _sha256_of_weights(model)
    with workspace.database.read() as session:
        sets = session.scalars(select(FeatureSet).where(FeatureSet.name != name))
        known = exported_columns(sets) & set(source.columns)
    known |= {*source.found.values()}
    known |= {c for c in source.columns if c.startswith(("Metadata_", *FILE_COLUMNS))}
    columns = [column for column in source.columns if column not in known]
    names = [column.strip().casefold() for column in columns]  # SQL knows no capitals
    for column, name_in_set in zip(columns, names, strict=True):
        if name_in_set in ("", "cell_id") or names.count(name_in_set) > 1:
            raise UserInputError(
                f"{source.name} has a column {column!r}, which cannot be a name in the set: it "
                "is empty, cell_id, or there twice. Rename it."
            )
    if left := known - {source.found[key] for key in source.named_by() if key in source.found}:
        more = f" and {len(left) - SHOWN} more" if len(left) > SHOWN else ""
        what = f"{', '.join(sorted(left)[:SHOWN])}{more}"
        source.notes.append(f"Columns that were not kept: {what}.")
    if not columns:
        raise UserInputError(
            f"{source.name} has no column of numbers beside those that name cells."
        )
    with workspace.database.read() as session:
        segment = choose_recipes(session, segmentation, None)[0] if segmentation else None
    with open_questions(workspace) as questions:
        missing, values, odd = ", ".join(map(literal, MISSING)), [], []
        for at, column in enumerate(columns):
            given, text = source.sql(column), f"CAST({source.sql(column)} AS VARCHAR)"
            values.append(f"TRY_CAST({given} AS FLOAT) AS v{at}")
            odd.append(
                f"WHEN (v{at} IS NULL OR isinf(v{at})) AND trim({text}) NOT IN ({missing}) "
                f"THEN {literal(f'{column} ')} || {text}"
            )
        values.append(f"CASE {' '.join(odd)} END AS odd")
        segment_id = _find_rows(
            workspace,
            questions,
            source.bring(workspace, questions, columns, ", ".join(values)),
            segment,
            source.name,
            None,
        )
        if segment_id is None:
            raise UserInputError(f"{source.name} names images, not cells: add object_number.")
        with workspace.database.begin() as session:
            inputs = (session.get_one(Recipe, segment_id),)
            declared: dict[str, Any] = {"declared": name, "table": source.sha256}
            declared |= {"weights": model and model.name, "parameters": dict(parameters or {})}
            spec = RecipeSpec(Stage.MEASURE, VERSION, declared, weights, inputs)
            before = finished_run(session, spec)
            taken = session.scalars(select(FeatureSet).where(FeatureSet.name == name)).one_or_none()
            recipe = register(session, spec)
            if taken is not None and taken.recipe_id != recipe.id:
                raise UserInputError(
                    f"Feature set {name!r} is there already, with other rows. Give another name."
                )
        _keep_new_rows(workspace, questions, name)
        (cells,) = _column(questions, "SELECT count(*) FROM rows_new")
        if before is not None and cells == 0:
            return AddedEmbeddings(before.id, name, 0, len(columns), True, tuple(source.notes))
        with running(workspace.database, recipe, origin=Origin.DECLARED) as run:
            schema = pa.schema([(column, pa.float32()) for column in columns])
            writer = FeatureWriter(workspace.artifacts, schema)
            listed = ", ".join(f"v{at}" for at in range(len(columns)))
            rows = f"SELECT cell, {listed} FROM rows_new ORDER BY cell"  # noqa: S608
            made = []
            try:
                for batch in questions.ask_ours(rows).batches():
                    ids = batch.column(0).to_numpy()
                    writer.write(ids, batch.drop_columns(["cell"]))
                    if before is not None:  # rows that are lost are made again
                        made.append(ids)
                writer.finish()
            finally:
                writer.abandon()
            run.result = {"cells": cells, "feature_set": name, "note": note}
            run.result |= {"file": source.name, **code_of_caller()}
            details = {"dtype": "float32", "source": note or name}
            details["description"] = "Made by a model that is not of cellstore."

            def keep(session: Session) -> None:
                found = make_set(session, name, recipe.id, columns, **details)
                assert found is not None
                if before is not None:
                    with recording_removed(session, ()):
                        gone = np.concatenate(made)
                        forget_lost_files(session, workspace.artifacts, recipe.id, gone)
                register_files(session, workspace.artifacts, found.id, run.id, writer.files)

            run.at_end.append(keep)
    return AddedEmbeddings(run.id, name, cells, len(columns), notes=tuple(source.notes))


def _keep_new_rows(workspace: Workspace, questions: Questions, name: str) -> None:
    """Make table ``rows_new``: those of ``rows_given`` that no file of a feature set has."""
    with workspace.database.read() as session:
        paths = [row.path for row in list_files(session, FeatureSet.name == name)]
    files = [path for item in paths if (path := workspace.artifacts.locate(item)).is_file()]
    schema = pa.schema([("cell", pa.int64())])
    batches = (
        pa.RecordBatch.from_arrays([pa.array(ids)], schema=schema)
        for file in files
        for ids in stream_ids(file)
    )
    try:
        questions.bring("cells_there", pa.RecordBatchReader.from_batches(schema, batches))
    except duckdb.Error as error:
        raise StorageError(
            f"A file of feature set {name!r} is damaged. See which with: cellstore verify; then "
            "remove it with --fix, and run the same command again."
        ) from error
    new = "SELECT r.* FROM rows_given AS r ANTI JOIN cells_there AS c ON c.cell = r.cell"
    questions.keep("rows_new", new)


def withdraw(workspace: Workspace, run: RunName, reason: str) -> int:
    """Mark added predictions as wrong; see ``Store.withdraw_predictions``."""
    if not (reason := readable(reason)):
        raise UserInputError("Say why: --reason TEXT.")
    with workspace.database.begin() as session:
        found = session.get_one(Run, find_predict_run(session, run).id)
        if found.parent is None or found.parent.origin is not Origin.DECLARED:
            raise UserInputError(
                f"Run {found.id} was made by cellstore, and is not withdrawn. To leave out images "
                "or cells that are wrong: cellstore exclude"
            )
        if found.status is not Status.DONE:
            raise UserInputError(f"Run {found.id} is {found.status.value} already.")
        old, new = ({"status": item.value} for item in (found.status, Status.WITHDRAWN))
        found.status, found.error = Status.WITHDRAWN, reason
        session.flush()
        record_events(session, [Change("runs", found.id, old, new)], reason=reason)
        record_runs(session, [found.id])
        return found.id


@dataclass
class _TableSource:
    """A table that somebody brought; ``sha256`` is that of its file, or of its rows."""

    table: Path | pa.Table
    name: str = "the table"
    sha256: str = ""
    notes: list[str] = field(default_factory=list)
    failed: CellstoreError | None = None

    def __post_init__(self) -> None:
        if isinstance(self.table, Path):
            self.text = open_table(self.table)
            self.name, self.columns = self.table.name, list(self.text.columns)
            self.sha256 = sha256_of(self.table)
            self.notes += self.text.notes
        else:
            fields = list(self.table.schema)
            kinds = [pa.float32() if pa.types.is_float16(f.type) else f.type for f in fields]
            schema = [f.with_type(kind) for f, kind in zip(fields, kinds, strict=True)]
            self.table = self.table.cast(pa.schema(schema))  # DuckDB does not know half floats
            self.columns = list(self.table.column_names)
            digest = hashlib.sha256(repr(self.columns).encode())
            for start in range(0, self.table.num_rows, ROWS_AT_ONCE):
                for column in self.table.slice(start, ROWS_AT_ONCE).columns:
                    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
                        digest.update(column.cast(pa.float64(), safe=False).to_numpy().tobytes())
                    else:
                        digest.update("\0".join(map(str, column.to_pylist())).encode())
            self.sha256 = digest.hexdigest()
        truth = {*NAMES["label"], *NAMES["probability"]}  # where Metadata_ is before it
        plain = [plain_name(name) for name in self.columns]
        plain = [
            "" if name in truth and column.startswith("Metadata_") else name
            for name, column in zip(plain, self.columns, strict=True)
        ]
        if {TREATED_FOR, TIME_POINT} <= set(self.columns):  # both are plain the same
            plain[self.columns.index(TREATED_FOR)] = ""
        self.found = {
            key: self.columns[plain.index(name)]
            for key, names in NAMES.items()
            for name in reversed(names)
            if name in plain
        }

    def classes(self, known: Mapping[str, int]) -> tuple[list[str], str]:
        """Return the columns that say classes, and the SQL of ``label`` and ``p``, by class."""
        found = self.found
        used = {found[key] for key in (*self.named_by(), "label", "probability") if key in found}
        if "label" not in found:
            used.discard(found.get("probability", ""))
        wide = {
            column: match
            for column in self.columns
            if (match := _class_of(column, known)) is not None and column not in used
        }
        if "label" in found and wide:  # the label may be the truth
            raise UserInputError(
                f"{self.name} has a column {found['label']!r}, and columns of classes "
                f"({', '.join(list(wide)[:SHOWN])}). Remove those that are no predictions."
            )
        if "label" not in found:
            if not wide:
                raise UserInputError(
                    f"{self.name} says no class: it has no column label, and none that is named "
                    f"like a class of the split ({', '.join(list(known)[:SHOWN])}). It has "
                    f"{', '.join(self.columns[:12])}."
                )
            labels = ", ".join(map(literal, wide.values()))
            numbers = ", ".join(f"TRY_CAST({self.sql(c)} AS DOUBLE)" for c in wide)
            return list(wide), f"unnest([{labels}]) AS label, unnest([{numbers}]) AS p"
        label = f"trim(CAST({self.sql(found['label'])} AS VARCHAR))"
        if "probability" not in found:
            self.notes.append("There is no column probability: each label counts with 1.")
            return [found["label"]], f"{label} AS label, 1.0 AS p"
        number = f"TRY_CAST({self.sql(found['probability'])} AS DOUBLE)"
        return [found["label"], found["probability"]], f"{label} AS label, {number} AS p"

    def sql(self, column: str) -> str:
        """The name that a column has in ``rows_given``: its own may be any text."""
        return f"c{self.columns.index(column)}"

    def named_by(self) -> set[str]:
        """Return the keys of ``NAMES`` by which the rows say what they are about."""
        found = self.found.keys()
        if "cell_id" in found:
            return {"cell_id"}
        keys = {"plate", "well", "site"} | (found & {"plane", "time_point"})
        if "object_number" in found:
            return keys | {"object_number"}
        return keys | {"x", "y"} if found & {"x", "y"} else keys

    def bring(
        self, workspace: Workspace, questions: Questions, columns: Sequence[str], values: str
    ) -> set[str]:
        """Make table ``rows_given``; return which keys of ``NAMES`` it has.

        It has ``line``, the keys, and ``values``, SQL over some ``columns``.
        """
        found, keys = self.found, self.named_by()
        if lacking := keys - found.keys():
            raise UserInputError(
                f"{self.name} does not say what it is about: it lacks "
                f"{', '.join(sorted(lacking))}. A cell is named by cell_id, or by plate, well, "
                "site and object_number, or by plate, well, site and a point x, y in pixels; a "
                "whole image by plate, well and site."
            )
        wanted = dict.fromkeys([*(found[key] for key in sorted(keys)), *columns])
        for column in wanted:
            if self.columns.count(column) > 1:
                raise UserInputError(
                    f"{self.name} has the column {column!r} more than once. Remove or rename the "
                    "ones that are not meant."
                )
        try:
            questions.bring("rows_given", self._reader(list(wanted)))
        except duckdb.Error as error:
            if self.failed is not None:  # while it was read
                raise self.failed from error
            raise UserInputError(f"{self.name} cannot be read: {first_line(error)}") from error
        of_keys = {key: f"CAST({self.sql(found[key])} AS VARCHAR)" for key in keys}
        for key in keys - {"plate", "well"}:
            made = f"TRY_CAST({self.sql(found[key])} AS DOUBLE)"
            of_keys[key] = made if key in "xy" else _WHOLE.format(self.sql(found[key]))
        for key in sorted(keys & {"plate", "well"}):
            details = of_keys[key]
            texts = f"SELECT DISTINCT {details} FROM rows_given"  # noqa: S608 - our own names
            names = [text for text in _column(questions, texts) if text]
            meant = [_well_of(name) for name in names]
            if key == "plate":
                with workspace.database.read() as session:
                    absent = set(names) - set(session.scalars(select(Plate.barcode)))
                    now = {old: name for old, (_, name) in renamed_plates(session, absent).items()}
                meant = [now.get(name, name) for name in names]
                self.notes += [f"Plate {old} was renamed: read as {now[old]}." for old in now]
            columns_of = [pa.array(some, pa.string()) for some in (names, meant)]
            questions.bring(f"{key}s_given", pa.table(columns_of, names=["text", "meant"]))
            of_keys[key] = f"(SELECT meant FROM {key}s_given WHERE text = {details})"  # noqa: S608
        listed = ", ".join(f"{value} AS {key}" for key, value in of_keys.items())
        made = f"SELECT line, {listed}, {values} FROM rows_given"  # noqa: S608 - our own names
        questions.keep("rows_given", made)
        return keys

    def _reader(self, columns: Sequence[str]) -> pa.RecordBatchReader:
        """The columns with the line of each row (the header is line 1), in pieces."""
        positions, names = [self.columns.index(c) for c in columns], map(self.sql, columns)
        if isinstance(self.table, Path):
            schema = pa.schema([("line", pa.int64()), *((name, pa.string()) for name in names)])

            def batches() -> Iterator[pa.RecordBatch]:
                try:
                    for batch in self.text.batches(positions):
                        for refused in batch.refused:
                            raise UserInputError(_nothing_added(self.name, 1, [refused]))
                        lines = pa.array(batch.lines, pa.int64())
                        texts = [column.cast(pa.string()) for column in batch.columns]
                        yield pa.RecordBatch.from_arrays([lines, *texts], schema=schema)
                except CellstoreError as error:
                    self.failed = error  # of which DuckDB makes one of its own
                    raise

            return pa.RecordBatchReader.from_batches(schema, batches())
        lines = pa.array(range(2, self.table.num_rows + 2), pa.int64())
        given = self.table.select(positions).rename_columns(list(names))
        return given.add_column(0, "line", lines).to_reader()


def _well_of(text: str) -> str:
    """The name of a well as the store writes it; of what is none, the text."""
    try:
        return format_well(*parse_well(text))
    except UserInputError:
        return text


def _class_of(column: str, classes: Mapping[str, int]) -> str | None:
    """The class whose probability a column holds: it is called like it, perhaps with a prefix."""
    for prefix in ("", "probability_", "prob_", "p_"):
        if column.startswith(prefix) and column.removeprefix(prefix) in classes:
            return column.removeprefix(prefix)
    return None


def _find_rows(
    workspace: Workspace,
    questions: Questions,
    keys: set[str],
    segment: Recipe | None,
    name: str,
    classes: Mapping[str, int] | None,
) -> int | None:
    """Find and check what ``rows_given`` are about; return the recipe that found the cells.

    None: the rows are about whole images. With ``classes``, ``rows_added`` has the predictions.
    It is one table through all steps, so that memory holds the rows once or twice.
    """
    if classes is not None:
        ids = pa.array(classes.values(), pa.int64())
        questions.bring("classes_given", pa.table({"value": list(classes), "id": ids}))
    unknown_image, whole = "false", False
    if "cell_id" in keys:
        questions.keep("rows_given", BY_ID)
    else:
        whole = keys.isdisjoint({"object_number", "x"})
        if segment is None and not whole:
            with workspace.database.read() as session:
                segment = choose_recipes(session, None, None)[0]
        unknown_image = "r.image_id IS NULL"
        of_image = [key for key in ("plate", "well", "site", "plane", "time_point") if key in keys]
        listed = ", ".join(of_image)
        questions.keep(
            "images_given",
            f"SELECT {listed}, min(image_id) AS image_id, count(*) AS n FROM image_table "  # noqa: S608
            f"WHERE (plate, well) IN (SELECT plate, well FROM rows_given) GROUP BY {listed}",
        )
        several = questions.ask_ours("FROM images_given WHERE n > 1 LIMIT 1").records()
        if several:
            where = "/".join(str(several[0][key]) for key in of_image)
            raise UserInputError(
                f"There are {several[0]['n']} images of {where}. Add the columns plane and "
                "time_point to the table."
            )
        joined = " AND i.".join(f"{key} = g.{key}" for key in of_image)
        if whole or segment is None:
            questions.keep("rows_given", BY_IMAGE.format(keys=joined))
        else:
            questions.keep(
                "segmentations_given",
                "SELECT s.id, s.image_id, s.recipe_id, s.mask_artifact_id FROM segmentations AS s "
                "JOIN images AS i ON i.id = s.image_id WHERE s.recipe_id = $recipe "
                "AND (s.content_sha256 IS NULL OR s.content_sha256 = i.content_sha256)",
                {"recipe": segment.id},
            )
            if "object_number" not in keys:
                _find_points(workspace, questions, joined)
            questions.keep("rows_given", BY_NUMBER.format(keys=joined))
    unit = "image" if whole else "cell"
    asked = NUMBERS if classes is None else CLASSES
    labels = "" if classes is None else "LEFT JOIN classes_given AS l ON l.value = r.label"
    checked = CHECKED.format(
        unknown_image=unknown_image,
        labels=labels,
        label_id="" if classes is None else ", l.id AS label_id",
        asked=asked.format(unit=unit, most=1 + ADDS_UP),
    )
    questions.keep("rows_given", checked)
    # A line with a column for each class is several rows, and counts once.
    first = "line" if classes is None else "p DESC, label"
    problems = (
        "SELECT * FROM rows_given WHERE problem IS NOT NULL "  # noqa: S608 - our own names
        f"QUALIFY row_number() OVER (PARTITION BY line ORDER BY {first}) = 1 ORDER BY line"
    )
    (wrong,) = _column(questions, f"SELECT count(*) FROM ({problems})")  # noqa: S608
    if wrong:
        refusals = []
        for row in questions.ask_ours(f"{problems} LIMIT {SHOWN}").records():
            about = {**dict.fromkeys(NAMES), "p": "probability", "odd": ""}
            details = ", ".join(
                f"{key if called is None else called} {row[key]}".strip()
                for key, called in about.items()
                if row.get(key) is not None
            )
            refusals.append(Refusal(row["line"], row["problem"], details))
        refused = _nothing_added(name, wrong, refusals)
        if classes is not None and any("not in the split" in row.reason for row in refusals):
            known = [disarmed_name(value) for value in list(classes)[:SHOWN]]
            more = ["..."] if len(classes) > SHOWN else []
            refused += f"\nThe classes of the split: {', '.join(known + more)}"
        raise UserInputError(refused)
    recipes = _column(questions, "SELECT DISTINCT recipe_id FROM rows_given")
    if not recipes:
        raise UserInputError(f"{name} has no rows.")
    if len(recipes) > 1:
        raise UserInputError(
            f"{name} is about cells of {len(recipes)} segmentations (recipes "
            f"{', '.join(map(str, sorted(recipes)))}), so that some cells would vote twice. Give "
            "a table for each."
        )
    if classes is not None:
        questions.keep("rows_added", ADDED)
    found: int | None = recipes[0]
    return found


def _column(questions: Questions, sql: str) -> list[Any]:
    return [value for (value,) in questions.ask_ours(sql).rows()]


def _find_points(workspace: Workspace, questions: Questions, joined: str) -> None:
    """Give ``rows_given`` the object numbers of the masks at its points (x, y)."""
    points = (
        "SELECT g.line, g.x, g.y, s.id FROM rows_given AS g "  # noqa: S608 - our own names
        f"JOIN images_given AS i ON i.{joined} "
        "JOIN segmentations_given AS s ON s.image_id = i.image_id ORDER BY s.id"
    )
    questions.keep("points_given", points)
    parts = []
    for segmentation in _column(questions, "SELECT DISTINCT id FROM points_given"):
        of_image = "SELECT line, x, y FROM points_given WHERE id = ?"
        found = questions.ask_ours(of_image, [segmentation]).arrays()
        with workspace.database.read() as session:
            row = session.get_one(Segmentation, segmentation)
            try:
                masks = read_masks(session, workspace.artifacts, row)
            except (ImageError, StorageError) as error:
                raise UserInputError(f"Points cannot be looked up: {error}") from error
        at = np.floor(np.column_stack([found["y"], found["x"]]) + 0.5)
        inside = ((at >= 0) & (at < masks.shape)).all(axis=1)
        rows, columns = np.where(inside[:, None], at, 0).astype(np.int64).T
        numbers = np.where(inside, masks[rows, columns], 0).astype(np.int64)
        parts.append(pa.table({"line": found["line"], "object_number": numbers}))
    schema = pa.schema([("line", pa.int64()), ("object_number", pa.int64())])
    questions.bring("points_found", pa.concat_tables([schema.empty_table(), *parts]))
    found_rows = (
        "SELECT g.*, p.object_number FROM rows_given AS g LEFT JOIN "
        "(SELECT DISTINCT line, object_number FROM points_found) AS p ON p.line = g.line"
    )
    questions.keep("rows_given", found_rows)


def _nothing_added(name: str, wrong: int, refusals: Sequence[Refusal]) -> str:
    """Say which rows cannot be used, and that nothing was written."""
    lines = [
        f"  line {item.line}: {item.reason} ({disarmed_name(item.detail)})" for item in refusals
    ]
    more = [f"  and {wrong - len(refusals):,} more"] if wrong > len(refusals) else []
    rows = "1 row" if wrong == 1 else f"{wrong:,} rows"
    head = f"Nothing was added: {rows} of {name} cannot be used."
    return "\n".join([head, *lines, *more])


def _open_jobs(workspace: Workspace, recipe_id: int, run_id: int, images: Sequence[int]) -> None:
    """Make a job for each image that the table is about."""
    start = {"recipe_id": recipe_id, "run_id": run_id, "status": Status.PENDING}
    start |= {"attempts": 0, "deaths": 0}
    with workspace.database.begin() as session:
        for some in in_lists(images):
            rows = session.execute(select(Image.id, CONTENT).where(Image.id.in_(some)))
            keys = [{"image_id": image, "content_sha256": content} for image, content in rows]
            insert_new(session, Job, [{**start, **key} for key in keys])
        requeue(session, Job.recipe_id == recipe_id)


def _sha256_of_weights(path: Path | None) -> str | None:
    """The digest of a file of weights, which is not opened: it may hold code."""
    if path is None:
        return None
    if not path.is_file():
        raise UserInputError(f"There is no file {path} with the weights of the model.")
    return sha256_of(path)


def code_of_caller() -> dict[str, str]:
    """The commit of the folder that this is called in, if it is a git repository."""
    words = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=.changed"]
    try:
        made = subprocess.run(  # noqa: S603 - fixed words, no shell
            words, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"code_commit": made.stdout.strip()}
