"""All tables of a store, in the order in which a screen fills them.

Each docstring says what one row is. Keys that make writing a row twice harmless are unique
constraints; lineage is foreign keys.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, Float, ForeignKey, Index, Text, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from ..enums import (
    ArtifactKind,
    Control,
    FeatureStorage,
    LabelField,
    Perturbation,
    Severity,
    Stage,
    Status,
)
from .quality_models import CellFlag as CellFlag
from .quality_models import ImageFlag as ImageFlag
from .quality_models import ImageQuality as ImageQuality
from .split_models import Split as Split
from .split_models import SplitGroup as SplitGroup
from .split_models import SplitMember as SplitMember
from .types import Base, BigId, Id, Name, Sha256, by_value


def _only(condition: str) -> dict[str, Any]:
    """Return what makes an index one of those rows alone that meet ``condition``."""
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


_WHERE_SEEN = _only("sha256 IS NOT NULL")
_WHERE_KNOWN_BYTES = _only("content_sha256 IS NOT NULL")
_WHERE_UNKNOWN_BYTES = _only("content_sha256 IS NULL")


class Plate(Base):
    """A physical assay plate."""

    __tablename__ = "plates"

    id: Mapped[Id]
    barcode: Mapped[Name] = mapped_column(unique=True)
    batch: Mapped[Name | None]


class Treatment(Base):
    """What was done to a well. ``identity`` is kind, name and identifier in one text."""

    __tablename__ = "treatments"

    id: Mapped[Id]
    identity: Mapped[str] = mapped_column(Text, unique=True)
    kind: Mapped[Perturbation] = mapped_column(by_value(Perturbation))
    pert_iname: Mapped[Name] = mapped_column(index=True)
    target: Mapped[str | None] = mapped_column(Text)  # may be a long list
    control: Mapped[Control | None] = mapped_column(by_value(Control))
    identifier: Mapped[Name | None] = mapped_column(index=True)
    inchikey: Mapped[Name | None]
    smiles: Mapped[str | None] = mapped_column(Text)
    pubchem_cid: Mapped[Name | None]


class Well(Base):
    """A well of a plate; row and column count from 1, ``name`` is like ``D14``."""

    __tablename__ = "wells"
    __table_args__ = (UniqueConstraint("plate_id", "row", "column"),)

    id: Mapped[Id]
    plate_id: Mapped[int] = mapped_column(BigId, ForeignKey("plates.id"))
    row: Mapped[int]
    column: Mapped[int]
    name: Mapped[Name]
    treatment_id: Mapped[int | None] = mapped_column(BigId, ForeignKey("treatments.id"), index=True)


class Image(Base):
    """One field of view at one time point and plane.

    ``content_sha256`` is the digest over the bytes of all its files; null while one is missing.
    """

    __tablename__ = "images"
    __table_args__ = (
        UniqueConstraint("well_id", "site", "plane", "time_point"),
        Index(None, "content_sha256", **_WHERE_KNOWN_BYTES),
    )

    id: Mapped[Id]
    well_id: Mapped[int] = mapped_column(BigId, ForeignKey("wells.id"))
    site: Mapped[int]
    plane: Mapped[int] = mapped_column(default=1)
    time_point: Mapped[int] = mapped_column(default=1)
    core_name: Mapped[Name] = mapped_column(index=True)
    content_sha256: Mapped[Sha256 | None]


class Folder(Base):
    """A place of image files: a folder of some machine, or of an object store (``s3://...``)."""

    __tablename__ = "folders"

    id: Mapped[Id]
    uri: Mapped[str] = mapped_column(Text, unique=True)


class ImageFile(Base):
    """One channel of an image, or a projection of several; no ``sha256``: not seen yet.

    ``folder_id``: where it was seen, else where a table says it is; null where nothing says.
    """

    __tablename__ = "image_files"
    __table_args__ = (
        UniqueConstraint("image_id", "channel"),
        # Of a screen whose images are elsewhere no row is in this index.
        Index(None, "sha256", **_WHERE_SEEN),
    )

    id: Mapped[Id]
    image_id: Mapped[int] = mapped_column(BigId, ForeignKey("images.id"))
    channel: Mapped[Name]
    position: Mapped[int]
    name: Mapped[Name] = mapped_column(index=True)
    folder_id: Mapped[int | None] = mapped_column(BigId, ForeignKey("folders.id"))
    sha256: Mapped[Sha256 | None]
    size_bytes: Mapped[int | None] = mapped_column(BigId)
    modified_ns: Mapped[int | None] = mapped_column(BigId)
    height: Mapped[int | None]
    width: Mapped[int | None]
    dtype: Mapped[Name | None]
    folder: Mapped[Folder | None] = relationship(lazy="joined")

    @property
    def uri(self) -> str | None:
        """Where the file was seen, else where a table says it is."""
        return None if self.folder is None else f"{self.folder.uri.rstrip('/')}/{self.name}"


class Recipe(Base):
    """A parameter set of a stage; the same fingerprint means the same result."""

    __tablename__ = "recipes"
    __table_args__ = (UniqueConstraint("stage", "fingerprint"),)

    id: Mapped[Id]
    stage: Mapped[Stage] = mapped_column(by_value(Stage))
    version: Mapped[int]
    parameters: Mapped[dict[str, Any]]
    weights_sha256: Mapped[Sha256 | None]
    fingerprint: Mapped[Sha256]
    created_at: Mapped[datetime]


class RecipeInput(Base):
    """A recipe reads what another one wrote."""

    __tablename__ = "recipe_inputs"

    recipe_id: Mapped[int] = mapped_column(BigId, ForeignKey("recipes.id"), primary_key=True)
    input_id: Mapped[int] = mapped_column(
        BigId, ForeignKey("recipes.id"), primary_key=True, index=True
    )


class Label(Base):
    """A class: one value of a field of the treatments."""

    __tablename__ = "labels"
    __table_args__ = (UniqueConstraint("field", "value"),)

    id: Mapped[Id]
    field: Mapped[LabelField] = mapped_column(by_value(LabelField))
    value: Mapped[str] = mapped_column(Text)


class Run(Base):
    """One execution of a stage. ``query`` is the SQL through which it read its cells.

    ``process`` names the process that runs it, so that one that died is known.
    """

    __tablename__ = "runs"
    __table_args__ = (Index(None, "stage", "recipe_id"),)

    id: Mapped[Id]
    stage: Mapped[Stage] = mapped_column(by_value(Stage))
    recipe_id: Mapped[int] = mapped_column(BigId, ForeignKey("recipes.id"))
    parent_id: Mapped[int | None] = mapped_column(BigId, ForeignKey("runs.id"), index=True)
    split_id: Mapped[int | None] = mapped_column(BigId, ForeignKey("splits.id"), index=True)
    status: Mapped[Status] = mapped_column(by_value(Status))
    seed: Mapped[int | None]
    command: Mapped[str] = mapped_column(Text)
    query: Mapped[str | None] = mapped_column(Text)
    code_version: Mapped[Name]
    environment: Mapped[dict[str, Any]]
    host: Mapped[Name]
    user: Mapped[Name]
    process: Mapped[Name | None]
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[str | None] = mapped_column(Text)


class Job(Base):
    """One image's share of a recipe, for the bytes that the image had (``content_sha256``).

    ``attempts`` counts its starts, ``deaths`` those that ended with the worker. Moments
    (``lease_until``, ``not_before``) are seconds since 1970, ``seconds`` is what the work took.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("recipe_id", "image_id", "content_sha256"),
        Index(None, "recipe_id", "status", "id"),
    )

    id: Mapped[Id]
    recipe_id: Mapped[int] = mapped_column(BigId, ForeignKey("recipes.id"))
    image_id: Mapped[int] = mapped_column(BigId, ForeignKey("images.id"), index=True)
    content_sha256: Mapped[Sha256]
    run_id: Mapped[int] = mapped_column(BigId, ForeignKey("runs.id"), index=True)
    status: Mapped[Status] = mapped_column(by_value(Status))
    attempts: Mapped[int] = mapped_column(default=0)
    deaths: Mapped[int] = mapped_column(default=0)
    worker: Mapped[Name | None]
    lease_until: Mapped[float | None] = mapped_column(Float(53))
    not_before: Mapped[float | None] = mapped_column(Float(53))
    seconds: Mapped[float | None] = mapped_column(Float(53))
    error: Mapped[str | None] = mapped_column(Text)


class Artifact(Base):
    """A file we wrote; ``path`` is relative to the artifacts folder of the store."""

    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("sha256", "kind"),)

    id: Mapped[Id]
    kind: Mapped[ArtifactKind] = mapped_column(by_value(ArtifactKind))
    path: Mapped[str] = mapped_column(Text, unique=True)
    sha256: Mapped[Sha256]
    size_bytes: Mapped[int] = mapped_column(BigId)
    created_at: Mapped[datetime]


class RunArtifact(Base):
    """A run wrote, or relies on, this file."""

    __tablename__ = "run_artifacts"

    run_id: Mapped[int] = mapped_column(BigId, ForeignKey("runs.id"), primary_key=True)
    artifact_id: Mapped[int] = mapped_column(
        BigId, ForeignKey("artifacts.id"), primary_key=True, index=True
    )


class Segmentation(Base):
    """The cells of one image, as its bytes were, by one recipe; ``diameter`` in pixels.

    Of cells that another tool found, the masks, the flows and the bytes it saw may be unknown. A
    segmentation of unknown bytes counts as current: nothing can contradict it.
    """

    __tablename__ = "segmentations"
    __table_args__ = (
        UniqueConstraint("image_id", "recipe_id", "content_sha256"),
        Index(
            "uq_segmentations_of_unknown_bytes",
            "image_id",
            "recipe_id",
            unique=True,
            **_WHERE_UNKNOWN_BYTES,
        ),
    )

    id: Mapped[Id]
    image_id: Mapped[int] = mapped_column(BigId, ForeignKey("images.id"))
    recipe_id: Mapped[int] = mapped_column(BigId, ForeignKey("recipes.id"), index=True)
    content_sha256: Mapped[Sha256 | None]
    run_id: Mapped[int] = mapped_column(BigId, ForeignKey("runs.id"), index=True)
    n_cells: Mapped[int]
    diameter: Mapped[float | None] = mapped_column(Float(53))
    mask_artifact_id: Mapped[int | None] = mapped_column(
        BigId, ForeignKey("artifacts.id"), index=True
    )
    flow_artifact_id: Mapped[int | None] = mapped_column(
        BigId, ForeignKey("artifacts.id"), index=True
    )
    created_at: Mapped[datetime]


class Cell(Base):
    """One labelled region; the box is half open, in pixels; ``excluded``: why it does not count.

    Box and centre are null where another tool found the cell and does not say.
    """

    __tablename__ = "cells"
    __table_args__ = (UniqueConstraint("segmentation_id", "label"),)

    id: Mapped[Id]
    segmentation_id: Mapped[int] = mapped_column(BigId, ForeignKey("segmentations.id"))
    label: Mapped[int]
    min_row: Mapped[int | None]
    min_col: Mapped[int | None]
    max_row: Mapped[int | None]
    max_col: Mapped[int | None]
    centroid_row: Mapped[float | None] = mapped_column(Float(53))
    centroid_col: Mapped[float | None] = mapped_column(Float(53))
    excluded: Mapped[Name | None]


class FeatureSet(Base):
    """A named block of measurements; ``columns`` lists name, dtype, unit and source of each.

    The built-in ones live in table ``features``, all others in columnar files (``feature_files``).
    """

    __tablename__ = "feature_sets"

    id: Mapped[Id]
    name: Mapped[Name] = mapped_column(unique=True)
    recipe_id: Mapped[int] = mapped_column(BigId, ForeignKey("recipes.id"), unique=True)
    columns: Mapped[list[dict[str, Any]]]
    storage: Mapped[FeatureStorage] = mapped_column(by_value(FeatureStorage))


class FeatureFile(Base):
    """A Parquet file of a feature set: ``cell_id`` and a column each; rows by ``cell_id``."""

    __tablename__ = "feature_files"

    feature_set_id: Mapped[int] = mapped_column(
        BigId, ForeignKey("feature_sets.id"), primary_key=True
    )
    artifact_id: Mapped[int] = mapped_column(
        BigId, ForeignKey("artifacts.id"), primary_key=True, index=True
    )
    run_id: Mapped[int] = mapped_column(BigId, ForeignKey("runs.id"), index=True)
    n_rows: Mapped[int]
    first_cell_id: Mapped[int] = mapped_column(BigId)
    last_cell_id: Mapped[int] = mapped_column(BigId)


Number = Mapped[float | None]


class CellFeatures(Base):
    """The built-in measurements of one cell by one recipe; lengths in pixels."""

    __tablename__ = "features"

    cell_id: Mapped[int] = mapped_column(BigId, ForeignKey("cells.id"), primary_key=True)
    recipe_id: Mapped[int] = mapped_column(BigId, ForeignKey("recipes.id"), primary_key=True)
    run_id: Mapped[int] = mapped_column(BigId, ForeignKey("runs.id"), index=True)
    area: Number = mapped_column(Float(53))
    convex_area: Number = mapped_column(Float(53))
    perimeter: Number = mapped_column(Float(53))
    eccentricity: Number = mapped_column(Float(53))
    mean_intensity: Number = mapped_column(Float(53))
    min_intensity: Number = mapped_column(Float(53))
    max_intensity: Number = mapped_column(Float(53))
    major_axis_length: Number = mapped_column(Float(53))
    minor_axis_length: Number = mapped_column(Float(53))
    orientation: Number = mapped_column(Float(53))
    solidity: Number = mapped_column(Float(53))
    extent: Number = mapped_column(Float(53))
    centroid_y: Number = mapped_column(Float(53))
    centroid_x: Number = mapped_column(Float(53))


class IngestFile(Base):
    """A file that an ingest run read, and what became of its rows.

    ``n_rows = n_created + n_updated + n_unchanged + n_refused``.
    """

    __tablename__ = "ingest_files"

    id: Mapped[Id]
    run_id: Mapped[int] = mapped_column(BigId, ForeignKey("runs.id"), index=True)
    name: Mapped[str] = mapped_column(Text, index=True)
    sha256: Mapped[Sha256] = mapped_column(index=True)
    size_bytes: Mapped[int] = mapped_column(BigId)
    layout: Mapped[Name]
    n_rows: Mapped[int] = mapped_column(BigId)
    n_created: Mapped[int] = mapped_column(BigId)
    n_updated: Mapped[int] = mapped_column(BigId)
    n_unchanged: Mapped[int] = mapped_column(BigId)
    n_refused: Mapped[int] = mapped_column(BigId)


class IngestIssue(Base):
    """A row that an ingest run refused, or something that looks wrong; ``line`` from 1."""

    __tablename__ = "ingest_issues"

    id: Mapped[Id]
    run_id: Mapped[int] = mapped_column(BigId, ForeignKey("runs.id"), index=True)
    severity: Mapped[Severity] = mapped_column(by_value(Severity))
    file: Mapped[str] = mapped_column(Text)
    line: Mapped[int | None] = mapped_column(BigId)
    reason: Mapped[Name]
    detail: Mapped[str] = mapped_column(Text)


class WellChange(Base):
    """A later table said something else of a well: what it had, what it has, who said so where."""

    __tablename__ = "well_changes"

    id: Mapped[Id]
    run_id: Mapped[int] = mapped_column(BigId, ForeignKey("runs.id"), index=True)
    well_id: Mapped[int] = mapped_column(BigId, ForeignKey("wells.id"), index=True)
    old_treatment_id: Mapped[int | None] = mapped_column(BigId, ForeignKey("treatments.id"))
    new_treatment_id: Mapped[int | None] = mapped_column(BigId, ForeignKey("treatments.id"))
    file: Mapped[str] = mapped_column(Text)
    line: Mapped[int | None] = mapped_column(BigId)
    changed_at: Mapped[datetime]


class RunMetric(Base):
    """A metric of a run at an epoch, for example ``validation_loss``."""

    __tablename__ = "run_metrics"

    run_id: Mapped[int] = mapped_column(BigId, ForeignKey("runs.id"), primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[Name] = mapped_column(primary_key=True)
    value: Mapped[float | None] = mapped_column(Float(53))


class Prediction(Base):
    """What one run said about one cell; rank 1 is its first choice. Append only (triggers)."""

    __tablename__ = "predictions"
    __table_args__ = (
        CheckConstraint("probability >= 0 AND probability <= 1", name="probability"),
        CheckConstraint("rank >= 1", name="rank"),
    )

    run_id: Mapped[int] = mapped_column(BigId, ForeignKey("runs.id"), primary_key=True)
    cell_id: Mapped[int] = mapped_column(
        BigId, ForeignKey("cells.id"), primary_key=True, index=True
    )
    rank: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    label_id: Mapped[int] = mapped_column(BigId, ForeignKey("labels.id"))
    probability: Mapped[float] = mapped_column(Float(53))


METADATA = Base.metadata
"""All tables, for migrations."""
