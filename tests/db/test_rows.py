"""Every table on both databases: write, read, keys, lineage, values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from factories import MOMENT, Factory
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, StatementError
from sqlalchemy.orm import Session
from unguarded import unguarded

from cellstore.db.bulk import insert_new
from cellstore.enums import (
    AnnotationKind,
    ArtifactKind,
    ImageFlagReason,
    Level,
    Severity,
    Stage,
    Subset,
    Verdict,
)
from cellstore.jobs.workspace import Workspace
from cellstore.models import (
    METADATA,
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
    ImagePrediction,
    ImageQuality,
    IngestFile,
    IngestIssue,
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
    SplitGroup,
    SplitMember,
    Treatment,
    TreatmentPart,
    TreatmentScore,
    Well,
)

TABLES = sorted(
    (mapper.class_ for mapper in Base.registry.mappers), key=lambda table: table.__name__
)


def values_of(row: Base) -> dict[str, Any]:
    key_of = row.__mapper__.get_property_by_column
    return {column.name: getattr(row, key_of(column).key) for column in row.__table__.columns}


def fill(workspace: Workspace) -> dict[type[Base], Base]:
    """One row in every table, end to end."""
    make = Factory(workspace)
    well = make.well(make.plate("P1", "B1"), 1, 2, make.treatment("aspirin", "PTGS1"))
    image = make.image(well)
    segment = make.run(Stage.SEGMENT)
    make.attach(segment, make.artifact(ArtifactKind.NETWORK))
    make.job(segment, image)
    segmentation = make.segmentation(image, segment, 2)
    cells = make.cells_of(segmentation)
    measure = make.run(Stage.MEASURE)
    make.features(cells, measure, area=12.5)
    label = make.label("aspirin")
    with workspace.database.begin() as session:
        recipe = session.get_one(Recipe, measure.recipe_id)
        session.add(RecipeInput(recipe_id=recipe.id, input_id=segment.recipe_id))
    make.feature_set(recipe)
    split = make.split([(image, Subset.TEST, label)])
    train = make.run(Stage.TRAIN, split_id=split.id)
    make.metrics(train, train_loss=[1.5])
    predict = make.run(Stage.PREDICT, parent_id=train.id, split_id=split.id)
    with workspace.database.begin() as session:
        row = Prediction(
            run_id=predict.id, cell_id=cells[0].id, rank=1, label_id=label.id, probability=0.75
        )
        session.add(row)
        session.add(
            ImagePrediction(
                run_id=predict.id, image_id=image.id, rank=1, label_id=label.id, probability=0.5
            )
        )
    fill_what_people_do(make, well)
    fill_what_an_ingest_writes(make, cells[0])
    qc = make.run(Stage.QC)
    make.quality(image, qc)
    make.flag_image(qc, image, ImageFlagReason.CELL_COUNT)
    make.flag_cell(qc, cells[1])
    make.score(make.run(Stage.HITS), "hit", make.treatment("aspirin", "PTGS1"), verdict=Verdict.HIT)
    with workspace.database.read() as session:
        return {table: session.scalars(select(table).limit(1)).one() for table in TABLES}


def fill_what_people_do(make: Factory, well: Well) -> None:
    note = make.add(
        Annotation(
            level=Level.WELL,
            row_id=well.id,
            kind=AnnotationKind.NOTE,
            reason="dust",
            user_name="ada",
            created_at=MOMENT,
        )
    )
    make.add(
        Event(
            created_at=MOMENT,
            user_name="ada",
            host="here",
            command="cellstore ingest map.txt",
            run_id=make.run(Stage.INGEST).id,
            table_name="wells",
            row_id=note.row_id,
            old={"treatment_id": None},
            new={"treatment_id": well.treatment_id},
            sha256="0" * 64,
        )
    )


def fill_what_an_ingest_writes(make: Factory, cell: Cell) -> None:
    run = make.run(Stage.INGEST)
    counts = dict.fromkeys(("n_created", "n_updated", "n_unchanged", "n_refused"), 0)
    make.add(
        IngestFile(
            run_id=run.id,
            name="t.csv",
            sha256="0" * 64,
            size_bytes=1,
            layout="x",
            n_rows=0,
            **counts,
        )
    )
    make.add(
        IngestIssue(
            run_id=run.id, severity=Severity.REFUSED, file="t.csv", line=2, reason="r", detail="d"
        )
    )
    with make.workspace.database.read() as session:
        found = session.scalars(select(FeatureSet)).first()
    assert found is not None
    make.add(
        FeatureFile(
            feature_set_id=found.id,
            artifact_id=make.artifact(ArtifactKind.FEATURES).id,
            run_id=run.id,
            n_rows=1,
            first_cell_id=cell.id,
            last_cell_id=cell.id,
        )
    )


def test_the_list_is_of_all_tables():
    assert {table.__tablename__ for table in TABLES} == set(METADATA.tables)


def test_a_row_comes_to_every_table_and_writing_it_twice_is_harmless(workspace: Workspace):
    rows = fill(workspace)
    assert set(rows) == set(TABLES)
    for table, row in rows.items():
        with workspace.database.begin() as session:
            before = session.scalar(select(func.count()).select_from(table))
            insert_new(session, table, [values_of(row)] * 2)
            assert session.scalar(select(func.count()).select_from(table)) == before, table


NATURAL_KEYS: dict[type[Base], tuple[str, ...]] = {
    Plate: ("barcode",),
    Perturbation: ("kind", "name", "identifier"),
    Treatment: ("identity",),
    Well: ("plate_id", "well_row", "well_column"),
    Image: ("well_id", "site", "plane", "time_point"),
    Folder: ("uri",),
    ImageFile: ("image_id", "channel"),
    Recipe: ("stage", "fingerprint"),
    Job: ("recipe_id", "image_id", "content_sha256"),
    Artifact: ("sha256", "kind"),
    Segmentation: ("image_id", "recipe_id", "content_sha256"),
    Cell: ("segmentation_id", "object_number"),
    FeatureSet: ("name",),
    Label: ("field", "value"),
    Split: ("name",),
}


def test_the_natural_key_is_unique_whatever_the_id(workspace: Workspace):
    rows = fill(workspace)
    for table in NATURAL_KEYS:
        with refusal(workspace, table.__name__) as session:
            session.execute(
                insert(table.__table__).values(**values_of(rows[table]) | {"id": 1_000})
            )


@contextmanager
def refusal(workspace: Workspace, name: str, *, guarded: bool = False) -> Iterator[Session]:
    """A transaction that the database has to refuse; ``guarded``: no trigger may do so first."""
    opened = unguarded(workspace) if guarded else workspace.database.begin()
    try:
        with opened as session:
            yield session
    except IntegrityError:
        return
    pytest.fail(f"accepted: {name}")


def test_tables_without_an_id_have_a_natural_primary_key():
    without = {table for table in TABLES if "id" not in table.__table__.columns}
    keys = {
        table: {column.name for column in table.__table__.primary_key.columns} for table in without
    }
    assert keys == {
        RecipeInput: {"recipe_id", "input_id"},
        FeatureFile: {"feature_set_id", "artifact_id"},
        SplitMember: {"split_id", "image_id"},
        SplitGroup: {"split_id", "group_id"},
        RunArtifact: {"run_id", "artifact_id"},
        CellFeatures: {"cell_id", "recipe_id"},
        ImageQuality: {"image_id", "recipe_id", "content_sha256", "channel"},
        ImageFlag: {"run_id", "image_id", "reason", "channel"},
        CellFlag: {"run_id", "cell_id", "reason"},
        RunMetric: {"run_id", "epoch", "name"},
        Prediction: {"run_id", "cell_id", "rank"},
        TreatmentPart: {"treatment_id", "position"},
        ImagePrediction: {"run_id", "image_id", "rank"},
    }
    append_only = {Run, IngestFile, IngestIssue, Annotation, Event, TreatmentScore}
    assert without | set(NATURAL_KEYS) | append_only == set(TABLES)


LINKS = [
    (table, column.name)
    for table in TABLES
    for column in table.__table__.columns
    if column.foreign_keys
]


def test_lineage_must_lead_to_a_row(sqlite_workspace: Workspace):
    rows = fill(sqlite_workspace)
    for table, column in LINKS:
        if not table.__table__.columns[column].primary_key:
            refuses_a_dangling(sqlite_workspace, rows, table, column)


@pytest.mark.postgres
def test_lineage_must_lead_to_a_row_on_postgres(postgres_workspace):
    rows = fill(postgres_workspace)
    with postgres_workspace.database.read() as session:
        found = {
            (row.table_name, row.column_name)
            for row in session.execute(
                text(
                    "SELECT k.table_name, k.column_name FROM information_schema.key_column_usage k "
                    "JOIN information_schema.table_constraints c USING (constraint_name) "
                    "WHERE c.constraint_type = 'FOREIGN KEY'"
                )
            )
        }
    assert found == {(table.__tablename__, column) for table, column in LINKS}
    refuses_a_dangling(postgres_workspace, rows, Segmentation, "image_id")


def refuses_a_dangling(
    workspace: Workspace, rows: dict[type[Base], Base], table: type[Base], column: str
) -> None:
    row = rows[table]
    if table in (Prediction, ImagePrediction):
        values = values_of(row) | {"rank": 9, column: 999_999}
        action: Callable[..., Any] = lambda session: session.add(table(**values))  # noqa: E731
    else:
        keys = [
            getattr(table, key.name) == getattr(row, key.name)
            for key in table.__mapper__.primary_key
        ]
        action = lambda session: session.execute(  # noqa: E731
            update(table).where(*keys).values({column: 999_999})
        )
    # A frozen split, or a run, would refuse before the foreign key is looked at.
    guarded = table in (Split, SplitMember, Image, Well, Run)
    with refusal(workspace, f"{table.__name__}.{column}", guarded=guarded) as session:
        action(session)


def test_predictions_are_in_range_and_append_only(workspace: Workspace):
    values = values_of(fill(workspace)[Prediction]) | {"rank": 2}
    for wrong in ({"probability": 1.01}, {"probability": -0.01}, {"rank": 0}):
        with refusal(workspace, str(wrong)) as session:
            session.add(Prediction(**values | wrong))
    for action in (
        *(update(Prediction).values(rank=3), delete(Prediction)),
        *(update(TreatmentScore).values(q=0), delete(TreatmentScore)),
    ):
        with pytest.raises(DBAPIError, match="append"), workspace.database.begin() as session:
            session.execute(action)
    with workspace.database.read() as session:
        (score,) = session.scalars(select(Run).where(Run.stage == Stage.HITS)).one().scores
        assert (score.verdict, score.treatment.scores) == (Verdict.HIT, [score])
        assert score.treatment.name == "aspirin"
        assert session.scalars(select(Prediction.rank)).all() == [1]
        # Enums are kept by value.
        stages = set(session.scalars(text("SELECT stage FROM runs")))
        sides = set(session.scalars(text("SELECT subset FROM split_members")))
        fields = set(session.scalars(text("SELECT field FROM labels")))
        back = set(session.scalars(select(Run.stage)))
    assert stages == {"ingest", "segment", "measure", "qc", "train", "predict", "hits"}
    assert (sides, fields) == ({"test"}, {"perturbation"})
    assert {stage.value for stage in back} == stages
    assert Stage.QC in back


def test_moments_come_back_in_utc(workspace: Workspace):
    summer = timezone(timedelta(hours=2))
    moment = datetime(2026, 7, 1, 0, 30, 15, 123456, tzinfo=summer)
    artifact = Artifact(
        kind=ArtifactKind.MASK, path="a", sha256="0" * 64, size_bytes=2**40, created_at=moment
    )
    with workspace.database.begin() as session:
        session.add(artifact)
    with workspace.database.read() as session:
        back = session.scalars(select(Artifact)).one()
    assert back.created_at == moment
    assert back.created_at.tzinfo is UTC
    assert back.created_at.hour == 22
    assert back.size_bytes == 2**40


def test_a_moment_without_a_zone_is_refused(workspace: Workspace):
    artifact = Artifact(
        kind=ArtifactKind.MASK,
        path="a",
        sha256="0" * 64,
        size_bytes=1,
        created_at=datetime(2026, 7, 1),  # noqa: DTZ001 - the mistake that is tested
    )
    with pytest.raises(StatementError, match="time zone"), workspace.database.begin() as session:
        session.add(artifact)


def test_numbers_and_documents_come_back_exactly(workspace: Workspace):
    parameters = {"µm": 0.1 + 0.2, "deep": [{"x": None}], "large": 2**53}
    recipe = Recipe(
        stage=Stage.SEGMENT,
        version=1,
        parameters=parameters,
        fingerprint="f" * 64,
        created_at=datetime.now(UTC),
    )
    with workspace.database.begin() as session:
        session.add(recipe)
    with workspace.database.read() as session:
        assert session.scalars(select(Recipe.parameters)).one() == parameters


def test_an_error_undoes_the_whole_transaction(workspace: Workspace):
    with pytest.raises(IntegrityError), workspace.database.begin() as session:
        session.add_all([Plate(barcode="P1"), Plate(barcode="P2"), Plate(barcode="P1")])
    with workspace.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Plate)) == 0


def test_many_rows_at_once_are_no_trouble(workspace: Workspace):
    rows = [{"barcode": f"P{number}", "batch": None} for number in range(40_000)]
    with workspace.database.begin() as session:
        insert_new(session, Plate, rows)
        assert session.scalar(select(func.count()).select_from(Plate)) == 40_000
