"""What somebody changed behind the back of cellstore is found and named, on both databases."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import delete, func, insert, select, text
from sqlalchemy.orm import Session
from unguarded import as_owner

pytest.importorskip("sklearn")
pytest.importorskip("torch")

from small_training import add_masks, build

from cellstore.config import PredictParams, SplitParams
from cellstore.db.events import event_digest, run_digests
from cellstore.enums import Level, Stage
from cellstore.errors import UserInputError
from cellstore.jobs.runs import RecipeSpec, register, running
from cellstore.jobs.workspace import Workspace
from cellstore.models import METADATA, Artifact, Event, Image, Run, RunArtifact, RunMetric
from cellstore.stages import verify as verify_step
from cellstore.stages.annotate import set_excluded
from cellstore.stages.predict import predict
from cellstore.stages.split import create_split
from cellstore.stages.train_baselines import train_baselines
from cellstore.stages.verify import seal, verify

pytestmark = pytest.mark.one_database


@dataclass(frozen=True)
class Store:
    """A small store made by commands: measured, split, trained by a baseline, predicted."""

    workspace: Workspace
    train: int
    predict: int
    ingest: int

    def found(self, against: Path | None = None) -> list[str]:
        """What verify says, a line for each problem."""
        problems = verify(self.workspace, against=against).problems
        return [f"{problem.path}: {problem.reason}" for problem in problems]


@pytest.fixture
def store(workspace: Workspace, tmp_path: Path) -> Store:
    (tmp_path / "images").mkdir()
    build(workspace, tmp_path / "images")
    create_split(workspace, "by-well", SplitParams(test_size=0.3, validation_size=0.3))
    (trained,) = train_baselines(workspace, ["logistic"])
    predicted = predict(workspace, PredictParams(subset=None), run=str(trained.run_id))
    set_excluded(workspace, Level.WELL, "P1/A06", True, reason="bubble")
    with workspace.database.begin() as session:
        brought = register(session, RecipeSpec(Stage.INGEST, 1, {"masks": "theirs"}))
        theirs = register(session, RecipeSpec(Stage.SEGMENT, 1, {"imported": "masks"}))
        image = session.scalars(select(func.max(Image.id))).one()
    with running(workspace.database, brought) as run, workspace.database.begin() as session:
        add_masks(session, workspace, image, theirs.id, run.id)
    return Store(workspace, trained.run_id, predicted.run_id, run.id)


PREDICTION = "(SELECT min(cell_id) FROM predictions)"
NEW_RUN = ", ".join(c.name for c in METADATA.tables["runs"].columns if c.name != "id")
TAMPERING = {
    "a prediction changed": (
        f"UPDATE predictions SET label_id = label_id % 2 + 1 WHERE cell_id = {PREDICTION}",
        "P1/r01c01f01: rows of predict recipe",
    ),
    "a prediction taken away": (
        f"DELETE FROM predictions WHERE cell_id = {PREDICTION}",
        "P1/r01c01f01: rows of predict recipe",
    ),
    "a prediction added": (
        "INSERT INTO predictions SELECT {predict}, min(id), 1, 1, 1 FROM cells WHERE excluded > ''",
        "P1/r01c01f01: rows of predict recipe",
    ),
    "the truth of a frozen split": (
        "UPDATE split_members SET label_id = 3 - label_id WHERE image_id = 1",
        "split by-well: table split_members",
    ),
    "the name of a class": (
        "UPDATE labels SET value = 'other' WHERE value = 'drug'",
        "split by-well: table split_members or labels",
    ),
    "who ran": (
        "UPDATE runs SET user_name = 'eve' WHERE id = {predict}",
        "run {predict}: table runs: user_name is eve",
    ),
    "when": (
        "UPDATE runs SET started_at = ended_at WHERE id = {predict}",
        "run {predict}: table runs: started_at is",
    ),
    "where": (
        "UPDATE runs SET host = 'elsewhere' WHERE id = {predict}",
        "run {predict}: table runs: host is elsewhere",
    ),
    "how it ended": (
        "UPDATE runs SET status = 'done', error = 'none' WHERE id = {train}",
        "run {train}: table runs: error is none",
    ),
    "the name of a treatment": (
        "UPDATE treatments SET name = 'taxol' WHERE name = 'drug'",
        "table treatments: name is taxol, and its parts say drug",
    ),
    "a name, and that of the compound": (
        "UPDATE perturbations SET target = 'TUBB' WHERE name = 'drug'",
        "table perturbations: its rows",
    ),
    "the treatment of a well": (
        "UPDATE wells SET treatment_id = 1 WHERE name = 'A02'",
        "table wells: its rows",
    ),
    "a whole run taken away": (
        """DELETE FROM predictions WHERE run_id = {predict};
        DELETE FROM jobs WHERE run_id = {predict}; DELETE FROM runs WHERE id = {predict}""",
        "run {predict}: table runs: the run is gone",
    ),
    "a whole run added": (
        f"INSERT INTO runs (id, {NEW_RUN}) SELECT 99, {NEW_RUN} FROM runs WHERE id = {{predict}}",
        "run 99: table runs: the ledger knows no such run",
    ),
    "an exclusion taken away": (
        "DELETE FROM annotations",
        "table annotations: its rows",
    ),
    "a job taken away": (
        "DELETE FROM jobs WHERE run_id = {predict} AND image_id = 1",
        "run {predict}: table jobs",
    ),
    "a metric": (
        "INSERT INTO run_metrics VALUES ({train}, 1, 'accuracy', 1.0)",
        "run {train}: table run_metrics",
    ),
    "a measurement": (
        "UPDATE features SET area = area + 1 WHERE cell_id = (SELECT min(cell_id) FROM features)",
        "P1/r01c01f01: rows of measure recipe",
    ),
    "the parameters of a recipe": (
        "UPDATE recipes SET version = version + 1 WHERE stage = 'predict'",
        "table recipes: its fingerprint",
    ),
    "a measurement given to another cell": (
        """UPDATE features SET cell_id = (SELECT max(id) FROM cells)
        WHERE cell_id = (SELECT max(cell_id) FROM features)""",
        "P1/r01c06f01: rows of measure recipe",
    ),
    "the box of a cell that was brought": (
        "UPDATE cells SET max_row = max_row + 1 WHERE id = (SELECT max(id) FROM cells)",
        "run {ingest}: table cells",
    ),
    "an image moved to another well": (
        "UPDATE images SET well_id = (SELECT max(id) FROM wells), site = 2 WHERE id = 1",
        "plate P1: table images: its rows",
    ),
    "an image file, with the digest of its bytes": (
        f"UPDATE image_files SET sha256 = '{'e' * 64}' WHERE image_id = 1",
        "plate P1: table image_files: its rows",
    ),
    "the digest of an image": (
        f"UPDATE images SET content_sha256 = '{'e' * 64}' WHERE id = 1",
        "plate P1: table images: its rows",
    ),
    "a channel called by another name": (
        "UPDATE image_files SET channel = 'RNA' WHERE image_id = 1",
        "plate P1: table image_files: its rows",
    ),
    "an event": (
        "UPDATE events SET reason = 'none' WHERE table_name = 'runs'",
        "is not what was written",
    ),
}


def rounds() -> list[list[str]]:
    """Kinds of tampering that do not get in each other's way: of other tables, with other words."""
    found: list[tuple[set[str], list[str]]] = []
    for kind, (statements, wanted) in TAMPERING.items():
        touched = set(re.findall(r"(?:UPDATE|FROM|INTO) (\w+)", statements)) | {wanted}
        for taken, kinds in found:
            if not taken & touched:
                taken |= touched
                kinds.append(kind)
                break
        else:
            found.append((touched, [kind]))
    return [kinds for _, kinds in found]


def snapshot(store: Store) -> Iterator[None]:
    """Keep all rows, yield once, and put them back."""
    with store.workspace.database.engine.connect() as reader:
        rows = {
            table: [dict(row) for row in reader.execute(select(table)).mappings()]
            for table in METADATA.sorted_tables
        }
    yield
    with as_owner(store.workspace) as owner:
        for table, there in rows.items():
            owner.execute(delete(table))
            if there:
                owner.execute(insert(table), there)


@pytest.mark.each_database
def test_each_kind_of_tampering_is_found_and_named(store: Store, tmp_path: Path):
    assert store.found() == []
    missed = []
    ids = {"train": store.train, "predict": store.predict, "ingest": store.ingest}
    for kinds in rounds():
        for _ in snapshot(store):
            with as_owner(store.workspace) as owner:
                for kind in kinds:
                    for statement in TAMPERING[kind][0].split(";"):
                        done = owner.execute(text(statement.format(**ids)))
                        assert done.rowcount, kind
            said = store.found()
            wanted = {kind: TAMPERING[kind][1].format(**ids) for kind in kinds}
            missed += [k for k, words in wanted.items() if not any(words in line for line in said)]
    assert missed == []
    assert store.found() == []


def test_a_file_that_is_changed_with_its_digest_is_found(store: Store):
    """The network of a training, and the row that says what its file should be."""
    query = select(Artifact).join(RunArtifact).where(RunArtifact.run_id == store.train)
    with store.workspace.database.read() as session:
        file = session.scalars(query.where(Artifact.path.not_like("%.json"))).first()
    path = store.workspace.artifacts.locate(file.path)
    path.chmod(0o644)
    path.write_bytes(b"another network")
    digest = hashlib.sha256(b"another network").hexdigest()
    with as_owner(store.workspace) as owner:
        values = {"digest": digest, "id": file.id}
        owner.execute(text("UPDATE artifacts SET sha256 = :digest WHERE id = :id"), values)
    said = store.found()
    assert f"run {store.train}: table run_artifacts: its rows are not what the run wrote" in said
    network = f"table artifacts: its network is no file of run {store.train} any more"
    assert f"run {store.predict}: {network}" in said


@pytest.mark.each_database
def test_who_writes_the_chain_anew_is_found_by_a_seal_kept_elsewhere(store: Store, tmp_path: Path):
    kept, other = tmp_path / "elsewhere.json", tmp_path / "other.json"
    seal(store.workspace, kept)
    set_excluded(store.workspace, Level.WELL, "P1/A05", True, reason="bubble")  # work goes on
    assert store.found(against=kept) == []
    with as_owner(store.workspace) as owner:
        owner.execute(text("UPDATE runs SET user_name = 'eve'"))
        previous = None
        events = METADATA.tables["events"]
        for row in owner.execute(select(events).order_by(events.c.id)).mappings().all():
            new = dict(row["new"] or {})
            if "row" in new:
                new["row"] = {**new["row"], "user_name": "eve"}
            changed = {**row, "new": new or row["new"], "previous_sha256": previous}
            digest = event_digest(changed, previous)
            values = {"new": changed["new"], "previous_sha256": previous, "sha256": digest}
            owner.execute(events.update().where(events.c.id == row["id"]).values(**values))
            previous = digest
    assert store.found() == []  # whoever can drop triggers can write the chain anew, too
    (line,) = store.found(against=kept)
    assert "the last one when the ledger was sealed" in line
    shutil.copy(Path(__file__), other)
    with pytest.raises(UserInputError, match="cellstore seal"):
        verify(store.workspace, against=other)


def test_entries_of_a_run_are_two_and_its_own_way_opens_it(store: Store):
    entries = select(func.count()).where(Event.table_name == "runs", Event.row_id == Run.id)
    with store.workspace.database.read() as session:
        counts = session.execute(select(Run.id, entries.scalar_subquery())).all()
    assert {number for _, number in counts} == {2}


def test_what_others_do_meanwhile_is_no_problem(store: Store, monkeypatch: pytest.MonkeyPatch):
    database = store.workspace.database
    with database.read() as session:
        recipe = session.get_one(Run, store.predict).recipe

    def after_another_run(session: Session) -> dict[tuple[int, str], str]:
        with running(database, recipe):
            pass
        return run_digests(session)

    monkeypatch.setattr(verify_step, "run_digests", after_another_run)
    assert store.found() == []


def test_a_run_that_was_not_ended_by_cellstore_is_named(store: Store):
    database = store.workspace.database
    with database.read() as session:
        recipe = session.get_one(Run, store.predict).recipe
    with running(database, recipe) as run:
        with database.begin() as session:
            session.add(RunMetric(run_id=run.id, epoch=1, name="accuracy", value=1.0))
            session.flush()
            session.execute(text("UPDATE runs SET ended_at = started_at WHERE ended_at IS NULL"))
        said = store.found()
    assert any(line.startswith(f"run {run.id}: table runs: ended_at") for line in said)
    assert store.found() == []
