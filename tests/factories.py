"""A factory per table: small true rows for tests that need no pixels.

``Factory(workspace)`` inserts through SQLAlchemy on SQLite and PostgreSQL alike; what a row needs
and is not given is made. Module ``screens`` fills a store end to end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import select
from sqlalchemy.orm import Session
from unguarded import open_runs

from cellstore.analysis.features import FEATURE_NAMES
from cellstore.artifacts import StoredFile
from cellstore.enums import (
    PERTURBATION,
    AnnotationKind,
    ArtifactKind,
    CellFlagReason,
    Control,
    FeatureStorage,
    GroupLevel,
    ImageFlagReason,
    Level,
    PerturbationKind,
    ScoreLevel,
    Stage,
    Status,
    Subset,
    Verdict,
)
from cellstore.io.treatments import TreatmentRecord
from cellstore.jobs.runs import keep_files
from cellstore.jobs.workspace import Workspace
from cellstore.models import (
    Annotation,
    Artifact,
    Base,
    Cell,
    CellFeatures,
    CellFlag,
    Event,
    FeatureFile,
    FeatureSet,
    Folder,
    Image,
    ImageFile,
    ImageFlag,
    ImageQuality,
    Job,
    Label,
    Perturbation,
    Plate,
    Prediction,
    Recipe,
    RecipeInput,
    Run,
    RunArtifact,
    RunMetric,
    Segmentation,
    Split,
    SplitMember,
    Treatment,
    TreatmentPart,
    TreatmentScore,
    Well,
)
from cellstore.stages.ingest.write_treatments import treatment_values

MOMENT = datetime(2026, 3, 4, 5, 6, 7, 89, tzinfo=UTC)
NUMBERS = count(1)
"""Shared by all factories, so that two of them on one store make different rows."""

Row = TypeVar("Row", bound=Base)


def sha(text: str) -> str:
    """A sha256 that belongs to ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()


def well_name(row: int, column: int) -> str:
    """``A01`` of (1, 1)."""
    return f"{chr(64 + row)}{column:02d}"


def treatment(session: Session, name: str, **values: Any) -> Treatment:
    """A treatment of one perturbation; another sample where the name is there otherwise."""
    values = {"kind": PerturbationKind.COMPOUND, "identifier": None} | values
    key = {"kind": values["kind"], "name": name, "identifier": values["identifier"]}
    known = session.scalars(select(Perturbation).filter_by(**key)).one_or_none()
    if known is not None and any(getattr(known, item) != values[item] for item in values):
        key["identifier"] = f"sample {next(NUMBERS)}"
        known = None
    if known is not None:
        return known.treatments[0]
    perturbation = Perturbation(**values | key)
    record = TreatmentRecord(key["kind"], name, identifier=key["identifier"])
    row = Treatment(**treatment_values([record]), target=values.get("target"))
    row.parts.append(TreatmentPart(position=1, perturbation=perturbation))
    session.add(row)
    session.flush()
    return row


class Factory:
    """Makes rows in one store. Every method inserts at once and returns the row."""

    def __init__(self, workspace: Workspace, *, closed: bool = False) -> None:
        """``closed``: rows come to a run only while it runs, as everywhere."""
        self.workspace = workspace
        if not closed:
            open_runs(workspace)

    def add(self, row: Row) -> Row:
        """Insert one row."""
        with self.workspace.database.begin() as session:
            session.add(row)
        return row

    def add_all(self, rows: Sequence[Row]) -> list[Row]:
        """Insert many rows of one table."""
        with self.workspace.database.begin() as session:
            session.add_all(rows)
        return list(rows)

    def plate(self, barcode: str | None = None, batch: str | None = None) -> Plate:
        return self.add(Plate(barcode=barcode or f"P{next(NUMBERS):03d}", batch=batch))

    def treatment(self, name: str = "DMSO", target: str | None = None, **more: Any) -> Treatment:
        """A treatment of one perturbation; another sample where the name is there otherwise."""
        with self.workspace.database.begin() as session:
            return treatment(session, name, target=target, **more)

    def doses(self, *parts: tuple[str, float | None]) -> Treatment:
        """A treatment of compounds, each by its name with its dose in uM."""
        with self.workspace.database.begin() as session:
            of_name = {name: treatment(session, name).perturbations[0] for name, _ in parts}
            dosed = [
                TreatmentRecord(of_name[name].kind, name, dose=dose, unit=dose and "uM")
                for name, dose in parts
            ]
            targets = [item.target for item in of_name.values() if item.target]
            row = Treatment(**treatment_values(dosed), target="|".join(targets) or None)
            for position, (name, dose) in enumerate(sorted(parts), start=1):
                unit = None if dose is None else "uM"
                row.parts.append(
                    TreatmentPart(
                        position=position, perturbation=of_name[name], dose=dose, dose_unit=unit
                    )
                )
            session.add(row)
        return row

    def well(
        self, plate: Plate, row: int, column: int, treatment: Treatment | None = None, **more: Any
    ) -> Well:
        values: dict[str, Any] = {
            "plate_id": plate.id,
            "well_row": row,
            "well_column": column,
            "name": well_name(row, column),
            "treatment_id": treatment.id if treatment else None,
            "control": Control.NEGATIVE if treatment and treatment.name == "DMSO" else None,
        }
        return self.add(Well(**{**values, **more}))

    def well_change(self, well: Well, new: Treatment, run: Run | None = None, **more: Any) -> Event:
        """A file gave ``well`` another treatment: the event, and the well itself."""
        run = run or self.run(Stage.INGEST)
        values: dict[str, Any] = {
            "created_at": MOMENT,
            "user_name": run.user_name,
            "host": run.host,
            "command": run.command,
            "run_id": run.id,
            "table_name": "wells",
            "row_id": well.id,
            "old": {"treatment_id": well.treatment_id},
            "new": {"treatment_id": new.id},
            "file": "platemap.csv",
            "line": 2,
            "sha256": "0" * 64,
        }
        with self.workspace.database.begin() as session:
            session.get_one(Well, well.id).treatment_id = new.id
        return self.add(Event(**{**values, **more}))

    def image(self, well: Well, site: int = 1, *, missing: bool = False, **more: Any) -> Image:
        """An image with one file; ``missing``: its bytes have not been found."""
        core = more.pop("core_name", f"r{well.well_row:02d}c{well.well_column:02d}f{site:02d}")
        digest = None if missing else sha(f"image {well.id} {site}")
        image = self.add(
            Image(well_id=well.id, site=site, core_name=core, content_sha256=digest, **more)
        )
        self.image_file(image, missing=missing)
        return image

    def folder(self, uri: str) -> Folder:
        """The folder ``uri``, made if the store does not know it."""
        with self.workspace.database.read() as session:
            found = session.scalars(select(Folder).where(Folder.uri == uri)).one_or_none()
        return found or self.add(Folder(uri=uri))

    def image_file(self, image: Image, channel: str = "DNA", *, missing: bool = False) -> ImageFile:
        found: dict[str, Any] = {
            "folder_id": self.folder("/images").id,
            "sha256": sha(f"file {image.id} {channel}"),
            "size_bytes": 1000,
            "modified_ns": 1,
            "height": 64,
            "width": 64,
            "dtype": "uint16",
        }
        return self.add(
            ImageFile(
                image_id=image.id,
                channel=channel,
                position=1,
                name=f"{image.core_name}-{channel}.tiff",
                **({} if missing else found),
            )
        )

    def recipe(
        self,
        stage: Stage,
        *,
        parameters: dict[str, Any] | None = None,
        weights_sha256: str | None = None,
        inputs: Sequence[Recipe] = (),
    ) -> Recipe:
        values = parameters if parameters is not None else DEFAULT_PARAMETERS.get(stage, {})
        recipe = self.add(
            Recipe(
                stage=stage,
                version=1,
                parameters=values,
                weights_sha256=weights_sha256,
                fingerprint=sha(f"recipe {stage.value} {next(NUMBERS)}"),
                created_at=MOMENT,
            )
        )
        self.add_all([RecipeInput(recipe_id=recipe.id, input_id=item.id) for item in inputs])
        return recipe

    def run(self, stage: Stage, recipe: Recipe | None = None, **more: Any) -> Run:
        """A finished run, unless ``status`` says otherwise."""
        number = next(NUMBERS)
        started = MOMENT + timedelta(minutes=number)
        status = more.pop("status", Status.DONE)
        values: dict[str, Any] = {
            "stage": stage,
            "recipe_id": (recipe or self.recipe(stage)).id,
            "status": status,
            "command": f"cellstore {stage.value}",
            "code_version": "0.1.0+gabc",
            "environment": {"python": "3.11"},
            "host": "bench",
            "user_name": "ada",
            "started_at": started,
            "ended_at": None if status == Status.RUNNING else started + timedelta(seconds=30),
        }
        return self.add(Run(**{**values, **more}))

    def artifact(self, kind: ArtifactKind, text: str | None = None, suffix: str = "") -> Artifact:
        """The row of a file; no file is written."""
        digest = sha(text or f"artifact {next(NUMBERS)}")
        return self.add(
            Artifact(
                kind=kind,
                path=f"{kind.value}/{digest[:2]}/{digest}{suffix}",
                sha256=digest,
                size_bytes=10,
                created_at=MOMENT,
            )
        )

    def attach(self, run: Run, artifact: Artifact) -> RunArtifact:
        return self.add(RunArtifact(run_id=run.id, artifact_id=artifact.id))

    def job(self, run: Run, image: Image, status: Status = Status.DONE, **more: Any) -> Job:
        return self.add(
            Job(
                recipe_id=run.recipe_id,
                image_id=image.id,
                content_sha256=image.content_sha256 or sha("missing"),
                run_id=run.id,
                status=status,
                **more,
            )
        )

    def segmentation(self, image: Image, run: Run, n_cells: int = 0, **more: Any) -> Segmentation:
        """The masks of an image (rows only), with ``n_cells`` cells on a grid."""
        values: dict[str, Any] = {
            "image_id": image.id,
            "recipe_id": run.recipe_id,
            "content_sha256": image.content_sha256,
            "run_id": run.id,
            "n_cells": n_cells,
            "diameter": 20.0,
            "created_at": MOMENT,
        }
        for key, kind in (
            ("mask_artifact_id", ArtifactKind.MASK),
            ("flow_artifact_id", ArtifactKind.FLOW),
        ):
            if key not in more:  # None, if it is given: unknown
                values[key] = self.artifact(kind, suffix=".tif").id
        found = self.add(Segmentation(**{**values, **more}))
        self.cells(found, n_cells)
        return found

    def cells(
        self, segmentation: Segmentation, number: int, *, excluded: str | None = None
    ) -> list[Cell]:
        """More cells of a segmentation, labelled on from those that it has."""
        first = len(self.cells_of(segmentation)) + 1
        return self.add_all(
            [_cell(segmentation.id, label, excluded) for label in range(first, first + number)]
        )

    def cells_of(self, segmentation: Segmentation) -> list[Cell]:
        """The cells of a segmentation in the order of their labels."""
        with self.workspace.database.read() as session:
            query = session.query(Cell).filter_by(segmentation_id=segmentation.id)
            return query.order_by(Cell.object_number).all()

    def quality(
        self,
        image: Image,
        run: Run,
        channel: str = "DNA",
        recipe: Recipe | None = None,
        **more: Any,
    ) -> ImageQuality:
        """What was measured of a channel: numbers of a usual field unless given."""
        usual = {"power_log_log_slope": -2.0, "sharpness": 0.3, "saturated": 0.0, "maximal": 1e-6}
        usual |= {"background": 400.0, "median": 700.0, "mean": 900.0, "std": 500.0}
        return self.add(
            ImageQuality(
                image_id=image.id,
                recipe_id=recipe.id if recipe else run.recipe_id,
                content_sha256=image.content_sha256,
                channel=channel,
                run_id=run.id,
                **{**usual, **more},
            )
        )

    def flag_image(
        self, run: Run, image: Image, reason: ImageFlagReason, channel: str = "", value: float = 1.0
    ) -> ImageFlag:
        key = {"run_id": run.id, "image_id": image.id, "channel": channel}
        return self.add(ImageFlag(**key, reason=reason, value=value, low=2.0, high=None))

    def flag_cell(
        self, run: Run, cell: Cell, reason: CellFlagReason = CellFlagReason.BORDER
    ) -> CellFlag:
        return self.add(CellFlag(run_id=run.id, cell_id=cell.id, reason=reason, value=None))

    def exclude(
        self, level: Level, row_id: int, reason: str | None = "debris", **more: Any
    ) -> Annotation:
        """A person says that something does not count."""
        values: dict[str, Any] = {"kind": AnnotationKind.EXCLUSION, "user_name": "ada"}
        values |= {"created_at": MOMENT, **more}
        return self.add(Annotation(level=level, row_id=row_id, reason=reason, **values))

    def label_row(self, level: Level, row_id: int, value: str, **more: Any) -> Annotation:
        """A person gives something a label, in field annotation."""
        values: dict[str, Any] = {"field": "annotation", "value": value, **more}
        return self.exclude(level, row_id, None, kind=AnnotationKind.LABEL, **values)

    def undo(self, earlier: Annotation) -> Annotation:
        more: dict[str, Any] = {"kind": earlier.kind, "undoes_id": earlier.id}
        return self.exclude(earlier.level, earlier.row_id, None, **more)

    def feature_set(self, recipe: Recipe, name: str = "basic") -> FeatureSet:
        columns = [
            {
                "name": item,
                "dtype": "float64",
                "unit": "pixel^2" if item == "area" else "pixel",
                "source": "test",
            }
            for item in FEATURE_NAMES
        ]
        return self.add(
            FeatureSet(
                name=name, recipe_id=recipe.id, columns=columns, storage=FeatureStorage.TABLE
            )
        )

    def feature_files(
        self,
        name: str,
        cells: Sequence[Cell],
        columns: Mapping[str, Sequence[Any]],
        segment: Recipe,
        *,
        rows_of_file: int = 1000,
    ) -> FeatureSet:
        """Real Parquet files of a feature set, which is made on its first use.

        ``columns``: the values of the cells by column; ``segment``: the recipe that found them.
        """
        table = pa.table({"cell_id": [cell.id for cell in cells], **columns}).sort_by("cell_id")
        found = self._set_in_files(name, table.schema, segment)
        run = self.run(Stage.INGEST)
        for start in range(0, table.num_rows, rows_of_file):
            self._feature_file(found, run, table.slice(start, rows_of_file))
        return found

    def _set_in_files(self, name: str, schema: pa.Schema, segment: Recipe) -> FeatureSet:
        with self.workspace.database.read() as session:
            found = session.scalars(select(FeatureSet).where(FeatureSet.name == name)).one_or_none()
        if found is not None:
            return found
        parameters = {"imported": "test", "name": name}
        recipe = self.recipe(Stage.MEASURE, parameters=parameters, inputs=[segment])
        dtypes = {"double": "float64"}
        listed = [
            {"name": field.name, "dtype": dtypes.get(str(field.type), str(field.type))}
            for field in schema
            if field.name != "cell_id"
        ]
        unknown = {"unit": None, "source": None}
        return self.add(
            FeatureSet(
                name=name,
                recipe_id=recipe.id,
                columns=[{**item, **unknown} for item in listed],
                storage=FeatureStorage.FILES,
            )
        )

    def _feature_file(self, found: FeatureSet, run: Run, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=3)
        stored = self.workspace.artifacts.write(
            ArtifactKind.FEATURES, sink.getvalue().to_pybytes(), ".parquet"
        )
        with self.workspace.database.begin() as session:
            artifact_id = keep_files(session, [stored])[0]
            ids = table.column("cell_id")
            session.add(
                FeatureFile(
                    feature_set_id=found.id,
                    artifact_id=artifact_id,
                    run_id=run.id,
                    n_rows=table.num_rows,
                    first_cell_id=ids[0].as_py(),
                    last_cell_id=ids[-1].as_py(),
                )
            )

    def profiles(
        self, run: Run, wells: Sequence[Well], columns: Mapping[str, Sequence[float | None]]
    ) -> StoredFile:
        """What a profile run keeps: a real Parquet file with a row for each of its wells."""
        counts = {"n_cells": [10] * len(wells), "n_images": [1] * len(wells)}
        sink = pa.BufferOutputStream()
        names = ["well_id", *counts, *columns]
        values = [[well.id for well in wells], *counts.values(), *columns.values()]
        types = [*(3 * [pa.int64()]), *(len(columns) * [pa.float64()])]
        arrays = [pa.array(v, kind) for v, kind in zip(values, types, strict=True)]
        pq.write_table(pa.Table.from_arrays(arrays, names), sink)
        stored = self.workspace.artifacts.write(
            ArtifactKind.PROFILES, sink.getvalue().to_pybytes(), ".parquet"
        )
        with self.workspace.database.begin() as session:
            keep_files(session, [stored], run.id)
        return stored

    def features(self, cells: Sequence[Cell], run: Run, **values: float) -> list[CellFeatures]:
        """Measurements: each column 1.0 unless given; the centroid is that of the cell."""
        numbers = {**dict.fromkeys(FEATURE_NAMES[:-2], 1.0), **values}
        return self.add_all(
            [
                CellFeatures(cell_id=cell.id, recipe_id=run.recipe_id, run_id=run.id, **numbers)
                for cell in cells
            ]
        )

    def label(self, value: str, field: str = PERTURBATION) -> Label:
        return self.add(Label(field=field, value=value))

    def split(
        self,
        members: Sequence[tuple[Image, Subset, Label]],
        name: str = "main",
        group_level: GroupLevel = GroupLevel.WELL,
        **more: Any,
    ) -> Split:
        number = next(NUMBERS)
        values: dict[str, Any] = {
            "name": name,
            "recipe_id": more.pop("recipe_id", None) or self.recipe(Stage.SPLIT).id,
            "protocol": "grouped",
            "field": PERTURBATION,
            "group_level": group_level,
            "seed": 0,
            "query": "SELECT 1",
            "fingerprint": sha(f"split {number}"),
            "excluded": {},
            "created_at": MOMENT,
            "frozen_at": None,
        }
        moment = more.pop("frozen_at", MOMENT)
        split = self.add(Split(**{**values, **more}))
        self.add_all(
            [
                SplitMember(split_id=split.id, image_id=image.id, subset=subset, label_id=label.id)
                for image, subset, label in members
            ]
        )
        if moment is not None:  # only now: a frozen split takes no members
            with self.workspace.database.begin() as session:
                session.get_one(Split, split.id).frozen_at = moment
            split.frozen_at = moment
        return split

    def metrics(self, run: Run, **series: Sequence[float]) -> list[RunMetric]:
        """Metrics by name: one value per epoch, from epoch 1."""
        return self.add_all(
            [
                RunMetric(run_id=run.id, epoch=epoch, name=name, value=value)
                for name, values in series.items()
                for epoch, value in enumerate(values, start=1)
            ]
        )

    def predict(
        self, run: Run, cells: Sequence[Cell], answers: Sequence[Sequence[tuple[Label, float]]]
    ) -> list[Prediction]:
        """Predictions: for each cell its (label, probability) pairs, first choice first."""
        return self.add_all(
            [
                Prediction(
                    run_id=run.id,
                    cell_id=cell.id,
                    rank=rank,
                    label_id=label.id,
                    probability=probability,
                )
                for cell, choices in zip(cells, answers, strict=True)
                for rank, (label, probability) in enumerate(choices, start=1)
            ]
        )

    def score(
        self, run: Run, measure: str, treatment: Treatment | None = None, **more: Any
    ) -> TreatmentScore:
        """What a hits run says of a treatment, or of the perturbation or target ``name``."""
        values: dict[str, Any] = {
            "run_id": run.id,
            "level": ScoreLevel.TREATMENT if treatment else ScoreLevel.TARGET,
            "name": treatment.name_with_dose if treatment else "TUBB",
            "treatment_id": treatment.id if treatment else None,
            "plate_set": "all plates",
            "measure": measure,
            **dict.fromkeys(("n_wells", "n_controls", "n_plates"), 1),
        }
        return self.add(TreatmentScore(**values | more))


DEFAULT_PARAMETERS: dict[Stage, dict[str, Any]] = {
    Stage.SEGMENT: {"model": "test", "channels": [], "projection": "median"},
}


def hits_run(make: Factory, verdicts: Mapping[str, str], **result: object) -> Run:
    """A hits run with a verdict and an effect for each treatment: ``{"a": "hit 5.0"}``."""
    recipe = make.recipe(Stage.HITS, parameters={"q": 0.05, "measure": "activity"})
    made = {"rule": "q < 0.05", "plate_sets": {"all plates": ["P1"]}, "feature_set": "own"}
    profile = make.run(Stage.PROFILE)
    run = make.run(Stage.HITS, recipe, parent_id=profile.id, result={**made, **result})
    for name, said in verdicts.items():
        verdict, _, effect = said.rpartition(" ")
        treatment = make.treatment(name)
        make.score(run, "hit", treatment, verdict=Verdict(verdict))
        make.score(run, "effect", treatment, value=None if effect == "-" else float(effect))
    return run


def _cell(segmentation_id: int, label: int, excluded: str | None) -> Cell:
    row, column = 10 * (label // 6), 10 * (label % 6)
    return Cell(
        segmentation_id=segmentation_id,
        object_number=label,
        min_row=row,
        min_col=column,
        max_row=row + 8,
        max_col=column + 8,
        centroid_row=row + 3.5,
        centroid_col=column + 3.5,
        excluded=excluded,
    )
