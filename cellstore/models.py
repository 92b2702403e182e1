"""All tables of a store, in the order in which a screen fills them.

Each docstring describes one row; ``query/schema.toml`` says what each column holds. Keys that make
writing a row twice harmless are unique constraints; lineage is foreign keys, which can be walked::

    with store.session() as session:
        plate = session.scalars(select(Plate).where(Plate.barcode == "BR00116991")).one()
        plate.wells[0].images[0].segmentations[0].cells

Sessions are for reading. Writing goes through the methods of ``Store``, which keep the account.
"""

# Without "from __future__ import annotations": SQLAlchemy would evaluate each text by itself.

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Enum,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    select,
    text,
)
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    column_property,
    mapped_column,
    relationship,
)
from sqlalchemy.types import JSON, TypeDecorator

from .enums import (
    AnnotationKind,
    ArtifactKind,
    CellFlagReason,
    Control,
    FeatureStorage,
    GroupLevel,
    ImageFlagReason,
    Level,
    Origin,
    PerturbationKind,
    ScoreLevel,
    Severity,
    Stage,
    Status,
    Subset,
    Verdict,
)

NAMING = {
    "ix": "ix_%(column_0_N_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

# SQLite numbers rows by itself only where the type is INTEGER; 75 million cells need 64 bits.
BigId = BigInteger().with_variant(Integer, "sqlite")


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC on both databases; SQLite keeps no zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse a naive moment: its zone would be a guess."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("A moment without a time zone cannot be stored.")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Give the zone back."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Base of all tables."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        dict[str, Any]: JSON(none_as_null=True),
        list[dict[str, Any]]: JSON(none_as_null=True),
        datetime: UtcDateTime,
        float: Float(53),
        StrEnum: Enum(  # each of our enums is kept as the text of its value
            StrEnum,
            values_callable=lambda members: [member.value for member in members],
            native_enum=False,
            create_constraint=False,
            length=20,
        ),
    }


def refers_to(column: str, **options: Any) -> Any:
    """Return the column of a foreign key."""
    return mapped_column(BigId, ForeignKey(column), **options)


def _only(condition: str) -> dict[str, Any]:
    """Return what makes an index one of those rows alone that meet ``condition``.

    On PostgreSQL, too: the migration says so. Here it would load the code for that database.
    """
    return {"sqlite_where": text(condition)}


Id = Annotated[int, mapped_column(BigId, primary_key=True)]
Name = Annotated[str, mapped_column(String(255))]
Sha256 = Annotated[str, mapped_column(String(64))]


class Plate(Base):
    """A physical assay plate."""

    __tablename__ = "plates"

    id: Mapped[Id]
    barcode: Mapped[Name] = mapped_column(unique=True)
    batch: Mapped[Name | None]
    cell_line: Mapped[Name | None]
    time_point: Mapped[Name | None]
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    wells: Mapped[list["Well"]] = relationship(back_populates="plate", order_by="Well.id")


class Perturbation(Base):
    """A thing that acts on cells: a compound, a gene that is made more or less of, a genotype.

    Two samples of one compound (``identifier``) are two rows.
    """

    __tablename__ = "perturbations"
    __table_args__ = (
        UniqueConstraint("kind", "name", "identifier"),
        Index(
            "uq_perturbations_without_identifier",
            "kind",
            "name",
            unique=True,
            **_only("identifier IS NULL"),
        ),
    )

    id: Mapped[Id]
    kind: Mapped[PerturbationKind]
    name: Mapped[Name] = mapped_column(index=True)
    identifier: Mapped[Name | None] = mapped_column(index=True)
    target: Mapped[str | None] = mapped_column(Text)  # may be a long list
    inchikey: Mapped[Name | None]
    smiles: Mapped[str | None] = mapped_column(Text)
    pubchem_cid: Mapped[Name | None]
    parts: Mapped[list["TreatmentPart"]] = relationship(back_populates="perturbation")
    treatments: Mapped[list["Treatment"]] = relationship(
        secondary="treatment_parts", back_populates="perturbations", viewonly=True
    )


class Treatment(Base):
    """What was done to a well: one or more perturbations, each with its dose (``parts``).

    ``name``, ``name_with_dose`` and ``target`` repeat what the parts say, for those who read many
    rows.
    """

    __tablename__ = "treatments"

    id: Mapped[Id]
    identity: Mapped[str] = mapped_column(Text, unique=True)
    name: Mapped[str] = mapped_column(Text, index=True)
    name_with_dose: Mapped[str] = mapped_column(Text)
    target: Mapped[str | None] = mapped_column(Text)
    perturbations_key: Mapped[int] = mapped_column(BigInteger)
    parts: Mapped[list["TreatmentPart"]] = relationship(
        back_populates="treatment", order_by="TreatmentPart.position"
    )
    perturbations: Mapped[list["Perturbation"]] = relationship(
        secondary="treatment_parts",
        order_by="TreatmentPart.position",
        back_populates="treatments",
        viewonly=True,
    )
    wells: Mapped[list["Well"]] = relationship(back_populates="treatment", order_by="Well.id")
    scores: Mapped[list["TreatmentScore"]] = relationship(
        back_populates="treatment", order_by="TreatmentScore.id"
    )


class TreatmentPart(Base):
    """A perturbation of a treatment with its dose."""

    __tablename__ = "treatment_parts"

    treatment_id: Mapped[int] = refers_to("treatments.id", primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    perturbation_id: Mapped[int] = refers_to("perturbations.id", index=True)
    dose: Mapped[float | None]
    dose_unit: Mapped[Name | None]
    dose_original: Mapped[Name | None]
    treatment: Mapped["Treatment"] = relationship(back_populates="parts")
    perturbation: Mapped["Perturbation"] = relationship(back_populates="parts")


class Well(Base):
    """A well of a plate; ``control``: its role in the assay."""

    __tablename__ = "wells"
    __table_args__ = (UniqueConstraint("plate_id", "well_row", "well_column"),)

    id: Mapped[Id]
    plate_id: Mapped[int] = refers_to("plates.id")
    well_row: Mapped[int]
    well_column: Mapped[int]
    name: Mapped[Name]
    treatment_id: Mapped[int | None] = refers_to("treatments.id", index=True)
    control: Mapped[Control | None]
    metadata_: Mapped[dict[str, Any] | None] = mapped_column("metadata")
    plate: Mapped["Plate"] = relationship(back_populates="wells")
    treatment: Mapped["Treatment | None"] = relationship(back_populates="wells")
    images: Mapped[list["Image"]] = relationship(back_populates="well", order_by="Image.id")


class Image(Base):
    """One field of view at one time point and plane, of all channels together."""

    __tablename__ = "images"
    __table_args__ = (
        UniqueConstraint("well_id", "site", "plane", "time_point"),
        Index(None, "content_sha256", **_only("content_sha256 IS NOT NULL")),
    )

    id: Mapped[Id]
    well_id: Mapped[int] = refers_to("wells.id")
    site: Mapped[int]
    plane: Mapped[int] = mapped_column(default=1)
    time_point: Mapped[int] = mapped_column(default=1)
    core_name: Mapped[Name] = mapped_column(index=True)
    content_sha256: Mapped[Sha256 | None]
    pixel_size: Mapped[float | None]
    well: Mapped["Well"] = relationship(back_populates="images")
    files: Mapped[list["ImageFile"]] = relationship(
        back_populates="image", order_by="ImageFile.position"
    )
    segmentations: Mapped[list["Segmentation"]] = relationship(
        back_populates="image", order_by="Segmentation.id"
    )
    jobs: Mapped[list["Job"]] = relationship(back_populates="image")
    quality: Mapped[list["ImageQuality"]] = relationship(back_populates="image")
    flags: Mapped[list["ImageFlag"]] = relationship(back_populates="image")
    split_members: Mapped[list["SplitMember"]] = relationship(back_populates="image")
    predictions: Mapped[list["ImagePrediction"]] = relationship(back_populates="image")


class Folder(Base):
    """A folder of image files, of some machine or of an object store (``s3://...``)."""

    __tablename__ = "folders"

    id: Mapped[Id]
    uri: Mapped[str] = mapped_column(Text, unique=True)
    files: Mapped[list["ImageFile"]] = relationship(back_populates="folder")


class ImageFile(Base):
    """One channel of an image, or a projection of several; no ``sha256``: not seen yet."""

    __tablename__ = "image_files"
    __table_args__ = (
        UniqueConstraint("image_id", "channel"),
        # Of a screen whose images are elsewhere no row is in this index.
        Index(None, "sha256", **_only("sha256 IS NOT NULL")),
    )

    id: Mapped[Id]
    image_id: Mapped[int] = refers_to("images.id")
    channel: Mapped[Name]
    position: Mapped[int]
    name: Mapped[Name] = mapped_column(index=True)
    folder_id: Mapped[int | None] = refers_to("folders.id")
    sha256: Mapped[Sha256 | None]
    size_bytes: Mapped[int | None] = mapped_column(BigId)
    modified_ns: Mapped[int | None] = mapped_column(BigId)
    height: Mapped[int | None]
    width: Mapped[int | None]
    dtype: Mapped[Name | None]
    image: Mapped["Image"] = relationship(back_populates="files")
    folder: Mapped["Folder | None"] = relationship(back_populates="files", lazy="joined")

    @property
    def uri(self) -> str | None:
        """Where the file was found, else where a table expects it."""
        return None if self.folder is None else f"{self.folder.uri.rstrip('/')}/{self.name}"


class Recipe(Base):
    """A parameter set of a stage; the same fingerprint means the same result in every store.

    ``parameters`` are complete: what was not asked for stands there with its default.
    """

    __tablename__ = "recipes"
    __table_args__ = (UniqueConstraint("stage", "fingerprint"),)

    id: Mapped[Id]
    stage: Mapped[Stage]
    version: Mapped[int]
    parameters: Mapped[dict[str, Any]]
    weights_sha256: Mapped[Sha256 | None]
    fingerprint: Mapped[Sha256]
    created_at: Mapped[datetime]
    inputs: Mapped[list["Recipe"]] = relationship(
        secondary="recipe_inputs",
        primaryjoin="Recipe.id == RecipeInput.recipe_id",
        secondaryjoin="Recipe.id == RecipeInput.input_id",
        viewonly=True,
    )
    used_by: Mapped[list["Recipe"]] = relationship(
        secondary="recipe_inputs",
        primaryjoin="Recipe.id == RecipeInput.input_id",
        secondaryjoin="Recipe.id == RecipeInput.recipe_id",
        viewonly=True,
    )
    runs: Mapped[list["Run"]] = relationship(back_populates="recipe", order_by="Run.id")
    jobs: Mapped[list["Job"]] = relationship(back_populates="recipe")
    segmentations: Mapped[list["Segmentation"]] = relationship(back_populates="recipe")
    feature_set: Mapped["FeatureSet | None"] = relationship(back_populates="recipe")


class RecipeInput(Base):
    """A recipe reads what another one wrote."""

    __tablename__ = "recipe_inputs"

    recipe_id: Mapped[int] = refers_to("recipes.id", primary_key=True)
    input_id: Mapped[int] = refers_to("recipes.id", primary_key=True, index=True)


class Label(Base):
    """A class: one value of a field."""

    __tablename__ = "labels"
    __table_args__ = (UniqueConstraint("field", "value"),)

    id: Mapped[Id]
    field: Mapped[Name]
    value: Mapped[str] = mapped_column(Text)


class Run(Base):
    """One execution of a stage.

    ``changed_rows`` grows with each row it wrote that is changed or deleted later: triggers count
    them.
    """

    __tablename__ = "runs"
    __table_args__ = (Index(None, "stage", "recipe_id"),)

    id: Mapped[Id]
    stage: Mapped[Stage]
    recipe_id: Mapped[int] = refers_to("recipes.id")
    parent_id: Mapped[int | None] = refers_to("runs.id", index=True)
    split_id: Mapped[int | None] = refers_to("splits.id", index=True)
    status: Mapped[Status]
    origin: Mapped[Origin] = mapped_column(default=Origin.OBSERVED)
    seed: Mapped[int | None]
    command: Mapped[str] = mapped_column(Text)
    query: Mapped[str | None] = mapped_column(Text)
    code_version: Mapped[Name]
    environment: Mapped[dict[str, Any]]
    host: Mapped[Name]
    user_name: Mapped[Name]
    process: Mapped[Name | None]
    started_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    result: Mapped[dict[str, Any] | None]
    error: Mapped[str | None] = mapped_column(Text)
    changed_rows: Mapped[int] = mapped_column(BigId, default=0, server_default="0")
    recipe: Mapped["Recipe"] = relationship(back_populates="runs")
    parent: Mapped["Run | None"] = relationship(back_populates="children", remote_side="Run.id")
    children: Mapped[list["Run"]] = relationship(back_populates="parent", order_by="Run.id")
    split: Mapped["Split | None"] = relationship(back_populates="runs")
    jobs: Mapped[list["Job"]] = relationship(back_populates="run")
    segmentations: Mapped[list["Segmentation"]] = relationship(back_populates="run")
    artifacts: Mapped[list["Artifact"]] = relationship(
        secondary="run_artifacts", back_populates="runs", viewonly=True
    )
    metrics: Mapped[list["RunMetric"]] = relationship(
        back_populates="run", order_by="RunMetric.epoch"
    )
    predictions: Mapped[list["Prediction"]] = relationship(back_populates="run")
    image_predictions: Mapped[list["ImagePrediction"]] = relationship(back_populates="run")
    image_flags: Mapped[list["ImageFlag"]] = relationship(back_populates="run")
    cell_flags: Mapped[list["CellFlag"]] = relationship(back_populates="run")
    scores: Mapped[list["TreatmentScore"]] = relationship(
        back_populates="run", order_by="TreatmentScore.id"
    )
    files: Mapped[list["IngestFile"]] = relationship(back_populates="run", order_by="IngestFile.id")
    issues: Mapped[list["IngestIssue"]] = relationship(
        back_populates="run", order_by="IngestIssue.id"
    )


class Job(Base):
    """One image's share of a recipe, for the bytes that the image had (``content_sha256``)."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("recipe_id", "image_id", "content_sha256"),
        Index(None, "recipe_id", "status", "id"),
    )

    id: Mapped[Id]
    recipe_id: Mapped[int] = refers_to("recipes.id")
    image_id: Mapped[int] = refers_to("images.id", index=True)
    content_sha256: Mapped[Sha256]
    run_id: Mapped[int] = refers_to("runs.id", index=True)
    status: Mapped[Status]
    attempts: Mapped[int] = mapped_column(default=0)
    deaths: Mapped[int] = mapped_column(default=0)
    worker: Mapped[Name | None]
    lease_until: Mapped[datetime | None]
    not_before: Mapped[datetime | None]
    seconds: Mapped[float | None]
    digest: Mapped[Sha256 | None]
    error: Mapped[str | None] = mapped_column(Text)
    recipe: Mapped["Recipe"] = relationship(back_populates="jobs")
    image: Mapped["Image"] = relationship(back_populates="jobs")
    run: Mapped["Run"] = relationship(back_populates="jobs")


class Artifact(Base):
    """A file we wrote."""

    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("sha256", "kind"),)

    id: Mapped[Id]
    kind: Mapped[ArtifactKind]
    path: Mapped[str] = mapped_column(Text, unique=True)
    sha256: Mapped[Sha256]
    size_bytes: Mapped[int] = mapped_column(BigId)
    created_at: Mapped[datetime]
    runs: Mapped[list["Run"]] = relationship(
        secondary="run_artifacts", back_populates="artifacts", viewonly=True
    )


class RunArtifact(Base):
    """A run wrote, or relies on, this file."""

    __tablename__ = "run_artifacts"

    run_id: Mapped[int] = refers_to("runs.id", primary_key=True)
    artifact_id: Mapped[int] = refers_to("artifacts.id", primary_key=True, index=True)


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
            **_only("content_sha256 IS NULL"),
        ),
    )

    id: Mapped[Id]
    image_id: Mapped[int] = refers_to("images.id")
    recipe_id: Mapped[int] = refers_to("recipes.id", index=True)
    content_sha256: Mapped[Sha256 | None]
    run_id: Mapped[int] = refers_to("runs.id", index=True)
    n_cells: Mapped[int]
    diameter: Mapped[float | None]
    mask_artifact_id: Mapped[int | None] = refers_to("artifacts.id", index=True)
    flow_artifact_id: Mapped[int | None] = refers_to("artifacts.id", index=True)
    created_at: Mapped[datetime]
    image: Mapped["Image"] = relationship(back_populates="segmentations")
    recipe: Mapped["Recipe"] = relationship(back_populates="segmentations")
    run: Mapped["Run"] = relationship(back_populates="segmentations")
    mask: Mapped["Artifact | None"] = relationship(foreign_keys=mask_artifact_id)
    flow: Mapped["Artifact | None"] = relationship(foreign_keys=flow_artifact_id)
    cells: Mapped[list["Cell"]] = relationship(
        back_populates="segmentation", order_by="Cell.object_number"
    )


class Cell(Base):
    """One region of a mask; the box is half open, in pixels.

    ``excluded``: why the segmentation, or the table that brought it, excludes it; ``EXCLUSIONS``
    has the reasons that came later, too.
    ``object_number`` is its value in the mask. Box and centre are null where another tool found
    the cell and does not say.
    """

    __tablename__ = "cells"
    __table_args__ = (
        UniqueConstraint("segmentation_id", "object_number"),
        # Few cells are excluded, and the view ``exclusions`` reads no others.
        Index(None, "id", "excluded", **_only("excluded IS NOT NULL")),
    )

    id: Mapped[Id]
    segmentation_id: Mapped[int] = refers_to("segmentations.id")
    object_number: Mapped[int]
    min_row: Mapped[int | None]
    min_col: Mapped[int | None]
    max_row: Mapped[int | None]
    max_col: Mapped[int | None]
    centroid_row: Mapped[float | None]
    centroid_col: Mapped[float | None]
    excluded: Mapped[Name | None]
    segmentation: Mapped["Segmentation"] = relationship(back_populates="cells")
    features: Mapped[list["CellFeatures"]] = relationship(back_populates="cell")
    predictions: Mapped[list["Prediction"]] = relationship(
        back_populates="cell", order_by="Prediction.run_id, Prediction.rank"
    )
    flags: Mapped[list["CellFlag"]] = relationship(back_populates="cell")


class FeatureSet(Base):
    """A named block of measurements; ``columns`` lists name, dtype, unit and source of each.

    The built-in ones live in table ``features``, all others in columnar files (``feature_files``).
    """

    __tablename__ = "feature_sets"

    id: Mapped[Id]
    name: Mapped[Name] = mapped_column(unique=True)
    recipe_id: Mapped[int] = refers_to("recipes.id", unique=True)
    columns: Mapped[list[dict[str, Any]]]
    storage: Mapped[FeatureStorage]
    recipe: Mapped["Recipe"] = relationship(back_populates="feature_set")
    files: Mapped[list["FeatureFile"]] = relationship(back_populates="feature_set")


class FeatureFile(Base):
    """A Parquet file of a feature set: ``cell_id`` and a column each; rows by ``cell_id``."""

    __tablename__ = "feature_files"

    feature_set_id: Mapped[int] = refers_to("feature_sets.id", primary_key=True)
    artifact_id: Mapped[int] = refers_to("artifacts.id", primary_key=True, index=True)
    run_id: Mapped[int] = refers_to("runs.id", index=True)
    n_rows: Mapped[int]
    first_cell_id: Mapped[int] = mapped_column(BigId)
    last_cell_id: Mapped[int] = mapped_column(BigId)
    feature_set: Mapped["FeatureSet"] = relationship(back_populates="files")
    artifact: Mapped["Artifact"] = relationship()
    run: Mapped["Run"] = relationship()


def _of_cell(column: Any, cell_id: Any) -> Any:
    query = select(column).where(Cell.id == cell_id)
    return query.correlate_except(Cell).scalar_subquery()


class CellFeatures(Base):
    """The built-in measurements of one cell by one recipe; lengths in pixels.

    The centroid is read from ``cells``: a cell has one, whoever measures it.
    """

    __tablename__ = "features"

    cell_id: Mapped[int] = refers_to("cells.id", primary_key=True)
    recipe_id: Mapped[int] = refers_to("recipes.id", primary_key=True)
    run_id: Mapped[int] = refers_to("runs.id", index=True)
    area: Mapped[float | None]
    convex_area: Mapped[float | None]
    perimeter: Mapped[float | None]
    eccentricity: Mapped[float | None]
    mean_intensity: Mapped[float | None]
    min_intensity: Mapped[float | None]
    max_intensity: Mapped[float | None]
    major_axis_length: Mapped[float | None]
    minor_axis_length: Mapped[float | None]
    orientation: Mapped[float | None]
    solidity: Mapped[float | None]
    extent: Mapped[float | None]
    centroid_y: Mapped[float | None] = column_property(_of_cell(Cell.centroid_row, cell_id))
    centroid_x: Mapped[float | None] = column_property(_of_cell(Cell.centroid_col, cell_id))
    cell: Mapped["Cell"] = relationship(back_populates="features")
    recipe: Mapped["Recipe"] = relationship()
    run: Mapped["Run"] = relationship()


class IngestFile(Base):
    """A file that an ingest run read, and what became of its rows."""

    __tablename__ = "ingest_files"

    id: Mapped[Id]
    run_id: Mapped[int] = refers_to("runs.id", index=True)
    name: Mapped[str] = mapped_column(Text, index=True)
    sha256: Mapped[Sha256] = mapped_column(index=True)
    size_bytes: Mapped[int] = mapped_column(BigId)
    layout: Mapped[Name]
    n_rows: Mapped[int] = mapped_column(BigId)
    n_created: Mapped[int] = mapped_column(BigId)
    n_updated: Mapped[int] = mapped_column(BigId)
    n_unchanged: Mapped[int] = mapped_column(BigId)
    n_refused: Mapped[int] = mapped_column(BigId)
    run: Mapped["Run"] = relationship(back_populates="files")


class IngestIssue(Base):
    """A row that an ingest run refused, or something that looks wrong; ``line`` from 1."""

    __tablename__ = "ingest_issues"

    id: Mapped[Id]
    run_id: Mapped[int] = refers_to("runs.id", index=True)
    severity: Mapped[Severity]
    file: Mapped[str] = mapped_column(Text)
    line: Mapped[int | None] = mapped_column(BigId)
    reason: Mapped[Name]
    detail: Mapped[str] = mapped_column(Text)
    run: Mapped["Run"] = relationship(back_populates="issues")


class RunMetric(Base):
    """A metric of a run at an epoch, for example ``validation_loss``."""

    __tablename__ = "run_metrics"

    run_id: Mapped[int] = refers_to("runs.id", primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[Name] = mapped_column(primary_key=True)
    value: Mapped[float | None]
    run: Mapped["Run"] = relationship(back_populates="metrics")


class Prediction(Base):
    """What one run predicted for one cell; rank 1 is its first choice. Append only (triggers)."""

    __tablename__ = "predictions"
    __table_args__ = (
        CheckConstraint("probability >= 0 AND probability <= 1", name="probability"),
        CheckConstraint("rank >= 1", name="rank"),
    )

    run_id: Mapped[int] = refers_to("runs.id", primary_key=True)
    cell_id: Mapped[int] = refers_to("cells.id", primary_key=True, index=True)
    rank: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    label_id: Mapped[int] = refers_to("labels.id")
    probability: Mapped[float]
    run: Mapped["Run"] = relationship(back_populates="predictions")
    cell: Mapped["Cell"] = relationship(back_populates="predictions")
    label: Mapped["Label"] = relationship()


class ImagePrediction(Base):
    """What one run predicted for a whole image, as a model that sees fields does. Append only."""

    __tablename__ = "image_predictions"
    __table_args__ = (
        CheckConstraint("probability >= 0 AND probability <= 1", name="probability"),
        CheckConstraint("rank >= 1", name="rank"),
    )

    run_id: Mapped[int] = refers_to("runs.id", primary_key=True)
    image_id: Mapped[int] = refers_to("images.id", primary_key=True, index=True)
    rank: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    label_id: Mapped[int] = refers_to("labels.id")
    probability: Mapped[float]
    run: Mapped["Run"] = relationship(back_populates="image_predictions")
    image: Mapped["Image"] = relationship(back_populates="predictions")
    label: Mapped["Label"] = relationship()


class ImageQuality(Base):
    """What is measured of one channel of an image, as its bytes were; see ``analysis.quality``."""

    __tablename__ = "image_quality"

    image_id: Mapped[int] = refers_to("images.id", primary_key=True)
    recipe_id: Mapped[int] = refers_to("recipes.id", primary_key=True)
    content_sha256: Mapped[Sha256] = mapped_column(primary_key=True)
    channel: Mapped[Name] = mapped_column(primary_key=True)
    run_id: Mapped[int] = refers_to("runs.id", index=True)
    power_log_log_slope: Mapped[float | None]
    sharpness: Mapped[float | None]
    saturated: Mapped[float]
    maximal: Mapped[float]
    background: Mapped[float]
    median: Mapped[float]
    mean: Mapped[float]
    std: Mapped[float]
    image: Mapped["Image"] = relationship(back_populates="quality")
    recipe: Mapped["Recipe"] = relationship()
    run: Mapped["Run"] = relationship()


class ImageFlag(Base):
    """A quality-control run holds an image to be odd: its value is not from ``low`` to ``high``.

    ``channel`` is an empty text where the reason is about the image and no channel of it. The
    limits depend on the other images of the plate, so flags belong to a run and never change.
    """

    __tablename__ = "image_flags"

    run_id: Mapped[int] = refers_to("runs.id", primary_key=True)
    image_id: Mapped[int] = refers_to("images.id", primary_key=True, index=True)
    reason: Mapped[ImageFlagReason] = mapped_column(primary_key=True)
    channel: Mapped[Name] = mapped_column(primary_key=True)
    value: Mapped[float]
    low: Mapped[float | None]
    high: Mapped[float | None]
    run: Mapped["Run"] = relationship(back_populates="image_flags")
    image: Mapped["Image"] = relationship(back_populates="flags")


class CellFlag(Base):
    """A quality-control run holds a cell to be odd; ``value``: its area in pixels, if that is why.

    Cells without perimeter are not here: they never count (``cells.excluded``).
    """

    __tablename__ = "cell_flags"

    run_id: Mapped[int] = refers_to("runs.id", primary_key=True)
    cell_id: Mapped[int] = refers_to("cells.id", primary_key=True, index=True)
    reason: Mapped[CellFlagReason] = mapped_column(primary_key=True)
    value: Mapped[float | None]
    run: Mapped["Run"] = relationship(back_populates="cell_flags")
    cell: Mapped["Cell"] = relationship(back_populates="flags")


class TreatmentScore(Base):
    """What a hits run measured of a treatment, a perturbation or a target. Append only (triggers).

    ``run.result["plate_sets"]`` lists the plates of each ``plate_set``.
    """

    __tablename__ = "treatment_scores"

    id: Mapped[Id]
    run_id: Mapped[int] = refers_to("runs.id", index=True)
    level: Mapped[ScoreLevel]
    name: Mapped[str] = mapped_column(Text)
    treatment_id: Mapped[int | None] = refers_to("treatments.id", index=True)
    dose: Mapped[float | None]
    dose_unit: Mapped[Name | None]
    cell_line: Mapped[Name | None]
    time_point: Mapped[Name | None]
    plate_set: Mapped[Name]
    measure: Mapped[Name]
    quantity: Mapped[Name | None]
    value: Mapped[float | None]
    low: Mapped[float | None]
    high: Mapped[float | None]
    p: Mapped[float | None]
    q: Mapped[float | None]
    n_wells: Mapped[int]
    n_controls: Mapped[int]
    n_plates: Mapped[int]
    verdict: Mapped[Verdict | None]
    note: Mapped[str | None] = mapped_column(Text)
    run: Mapped["Run"] = relationship(back_populates="scores")
    treatment: Mapped["Treatment | None"] = relationship(back_populates="scores")


class Split(Base):
    """A named assignment of images to subsets; ``frozen_at``: since when a run relies on it.

    Splits of one ``family`` are the folds of a cross-validation, numbered from 1 (``fold``).
    Triggers: a frozen split never changes, nor does the group level of any; the first run that
    names a split freezes it.
    """

    __tablename__ = "splits"

    id: Mapped[Id]
    name: Mapped[Name] = mapped_column(unique=True)
    recipe_id: Mapped[int] = refers_to("recipes.id")
    protocol: Mapped[Name]
    field: Mapped[Name]
    group_level: Mapped[GroupLevel]
    seed: Mapped[int]
    query: Mapped[str] = mapped_column(Text)
    fingerprint: Mapped[Sha256]
    excluded: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    frozen_at: Mapped[datetime | None]
    family: Mapped[Name | None]
    fold: Mapped[int | None]
    recipe: Mapped["Recipe"] = relationship()
    members: Mapped[list["SplitMember"]] = relationship(back_populates="split")
    groups: Mapped[list["SplitGroup"]] = relationship(back_populates="split")
    runs: Mapped[list["Run"]] = relationship(back_populates="split", order_by="Run.id")


class SplitMember(Base):
    """The subset and the label of one image in one split.

    Triggers: none comes, changes or goes once the split is frozen, and its subset is that of its
    group (:class:`SplitGroup`).
    """

    __tablename__ = "split_members"

    split_id: Mapped[int] = refers_to("splits.id", primary_key=True)
    image_id: Mapped[int] = refers_to("images.id", primary_key=True, index=True)
    subset: Mapped[Subset]
    label_id: Mapped[int] = refers_to("labels.id")
    split: Mapped["Split"] = relationship(back_populates="members")
    image: Mapped["Image"] = relationship(back_populates="split_members")
    label: Mapped["Label"] = relationship()


class SplitGroup(Base):
    """The one subset of a group in a split: what keeps a well, plate or perturbation together.

    ``group_id`` is the id of the well or plate, or ``treatments.perturbations_key``, as the group
    level of the split says; splits by image have no groups. Triggers write these rows as members
    come in, and refuse a member of another subset, so that no two programs at once can put a group
    into two.
    """

    __tablename__ = "split_groups"

    split_id: Mapped[int] = refers_to("splits.id", primary_key=True)
    group_id: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=False)
    subset: Mapped[Subset]
    split: Mapped["Split"] = relationship(back_populates="groups")


class Annotation(Base):
    """What a person noted about a plate, well, image or cell (``level``, ``row_id``). Append only.

    A later row with ``undoes_id`` takes an earlier one back.
    """

    __tablename__ = "annotations"
    __table_args__ = (Index(None, "level", "row_id"),)

    id: Mapped[Id]
    level: Mapped[Level]
    row_id: Mapped[int] = mapped_column(BigId)
    kind: Mapped[AnnotationKind]
    field: Mapped[Name | None]
    value: Mapped[str | None] = mapped_column(Text)
    reason: Mapped[str | None] = mapped_column(Text)
    user_name: Mapped[Name]
    created_at: Mapped[datetime]
    undoes_id: Mapped[int | None] = refers_to("annotations.id", index=True)
    undoes: Mapped["Annotation | None"] = relationship(remote_side="Annotation.id")


class Event(Base):
    """A command changed a row of the store: who, when, why, from what to what. Append only.

    What one transaction changed has the same ``created_at``. ``sha256`` is the digest of the row
    and of ``previous_sha256``, the digest of the event before, so that none can be changed or
    removed without notice.
    """

    __tablename__ = "events"
    __table_args__ = (Index(None, "table_name", "row_id"),)

    id: Mapped[Id]
    created_at: Mapped[datetime]
    user_name: Mapped[Name]
    host: Mapped[Name]
    role: Mapped[Name | None]
    command: Mapped[str] = mapped_column(Text)
    run_id: Mapped[int | None] = refers_to("runs.id", index=True)
    reason: Mapped[str | None] = mapped_column(Text)
    file: Mapped[str | None] = mapped_column(Text)
    line: Mapped[int | None] = mapped_column(BigId)
    table_name: Mapped[Name]
    row_id: Mapped[int | None] = mapped_column(BigId)
    old: Mapped[dict[str, Any] | None]
    new: Mapped[dict[str, Any] | None]
    previous_sha256: Mapped[Sha256 | None]
    sha256: Mapped[Sha256]
    run: Mapped["Run | None"] = relationship()


METADATA = Base.metadata
"""All tables, for migrations."""

EXCLUSIONS = Table(
    "exclusions",
    MetaData(),
    Column("level", String(20)),
    Column("id", BigId),
    Column("reason", Text),
    Column("source", String(20)),
    Column("run_id", BigId),
    Column("annotation_id", BigId),
)
"""A view: what does not count. One row per reason; ``id`` is that of the plate, well, image or cell
(``level``). ``source`` is ``segmentation`` (the cell was excluded when it was found, as those whose
outline has the length 0), ``quality`` (a flag of the quality-control run ``run_id``, which counts
only where that run is asked for) or ``annotation`` (a person said so: ``annotation_id``). What
excludes a well excludes its images and their cells."""
