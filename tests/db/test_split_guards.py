"""What the database itself refuses of a split, whoever holds the connection."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import pytest
from factories import MOMENT, Factory
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import DBAPIError

from cellstore.enums import GroupLevel, Stage, Subset
from cellstore.errors import UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import Image, Run, Split, SplitGroup, SplitMember, Well

ONE_SUBSET = "one subset only"
FROZEN = "A run relies on this split.*cellstore split create NAME"


class Plates:
    """Two plates with two wells of two images each; the first well of each has drug a, else b."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.make = make = Factory(workspace)
        drugs = [make.treatment("a"), make.treatment("b")]
        self.wells = [
            make.well(plate, 1, column, drugs[column - 1])
            for plate in (make.plate("P1"), make.plate("P2"))
            for column in (1, 2)
        ]
        self.images = [[make.image(well, site) for site in (1, 2)] for well in self.wells]
        self.label = make.label("a")

    def split(self, level: GroupLevel, sides: str, **more: Any) -> Split:
        """A split of the first images of the four wells: ``t`` trains, ``e`` tests, ``-``: out."""
        names = {"t": Subset.TRAIN, "e": Subset.TEST}
        members = [
            (images[0], names[side], self.label)
            for images, side in zip(self.images, sides, strict=True)
            if side != "-"
        ]
        return self.make.split(
            members, **{"name": level.value, "group_level": level, "frozen_at": None, **more}
        )

    def run(self, statement: str, **values: Any) -> None:
        with self.workspace.database.begin() as session:
            session.execute(text(statement), values)

    def insert(self, split: Split, well: int, site: int, side: str, how: str = "INSERT") -> None:
        self.run(
            f"{how} INTO split_members (split_id, image_id, subset, label_id) "
            "VALUES (:split, :image, :side, :label)",
            split=split.id,
            image=self.images[well][site - 1].id,
            side=side,
            label=self.label.id,
        )

    def count(self, table: type) -> int:
        with self.workspace.database.read() as session:
            return session.scalar(select(func.count()).select_from(table)) or 0


@pytest.fixture
def plates(workspace: Workspace) -> Plates:
    return Plates(workspace)


@pytest.mark.parametrize(
    ("level", "well", "site", "side"),
    [
        # Wells by number: P1 a, P1 b, P2 a, P2 b. The first trains, the last tests.
        (GroupLevel.WELL, 0, 2, "test"),
        (GroupLevel.PLATE, 1, 1, "test"),
        (GroupLevel.PERTURBATION, 2, 1, "test"),
    ],
)
def test_a_group_cannot_sit_on_two_sides(plates: Plates, level, well, site, side) -> None:
    split = plates.split(level, "t--e")
    with pytest.raises(UserInputError, match=ONE_SUBSET):
        plates.insert(split, well, site, side)
    assert plates.count(SplitMember) == plates.count(SplitGroup) == 2
    plates.insert(split, well, site, "train")
    with pytest.raises(UserInputError, match=ONE_SUBSET):
        plates.run("UPDATE split_members SET subset = 'test' WHERE subset = 'train'")
    with pytest.raises(UserInputError, match=ONE_SUBSET):
        plates.run("UPDATE split_groups SET subset = 'test'")
    with pytest.raises(UserInputError, match=ONE_SUBSET):
        plates.run("DELETE FROM split_groups")
    assert (plates.count(SplitMember), plates.count(SplitGroup)) == (3, 2)


def test_the_sides_of_images_are_free_in_a_split_by_image(plates: Plates) -> None:
    split = plates.split(GroupLevel.IMAGE, "t--e")
    plates.insert(split, 0, 2, "test")
    plates.run("UPDATE split_members SET subset = 'validation' WHERE subset = 'test'")
    assert (plates.count(SplitMember), plates.count(SplitGroup)) == (3, 0)
    with pytest.raises(UserInputError, match=r"protocol.*stays as it is"):
        plates.run("UPDATE splits SET group_level = 'well'")
    with pytest.raises(UserInputError, match="protocol"):
        plates.run("UPDATE splits SET protocol = 'published'")


def test_a_well_may_be_on_other_sides_of_other_splits(plates: Plates) -> None:
    plates.split(GroupLevel.WELL, "te-t", name="one")
    plates.split(GroupLevel.WELL, "et-e", name="two")
    assert plates.count(SplitGroup) == 6


def test_an_image_without_a_treatment_is_in_no_split_by_treatment(plates: Plates) -> None:
    split = plates.split(GroupLevel.PERTURBATION, "t--e")
    plates.run("UPDATE wells SET treatment_id = NULL WHERE id = :id", id=plates.wells[1].id)
    with pytest.raises(UserInputError, match="without a treatment"):
        plates.insert(split, 1, 1, "train")


@pytest.mark.parametrize("level", [GroupLevel.WELL, GroupLevel.IMAGE])
def test_a_frozen_split_never_changes(plates: Plates, level: GroupLevel) -> None:
    split = plates.split(level, "t--e", frozen_at=MOMENT)
    for statement in (
        "UPDATE split_members SET label_id = label_id",
        "UPDATE split_members SET subset = 'validation'",
        "DELETE FROM split_members",
        "UPDATE splits SET frozen_at = NULL",
        "UPDATE splits SET name = 'other'",
        "DELETE FROM splits",
    ):
        with pytest.raises(UserInputError, match=FROZEN):
            plates.run(statement)
    with pytest.raises(UserInputError, match=FROZEN):
        plates.insert(split, 1, 1, "train")
    with plates.workspace.database.read() as session:
        assert session.scalars(select(Split.frozen_at)).one() == MOMENT
    assert plates.count(SplitMember) == 2


def test_a_member_cannot_move_out_of_or_into_a_frozen_split(plates: Plates) -> None:
    frozen = plates.split(GroupLevel.WELL, "t---", name="frozen", frozen_at=MOMENT)
    free = plates.split(GroupLevel.WELL, "-t--", name="free")
    move = "UPDATE split_members SET split_id = :to WHERE split_id = :of"
    for source, target in ((frozen, free), (free, frozen)):
        with pytest.raises(UserInputError, match=FROZEN):
            plates.run(move, of=source.id, to=target.id)


def test_the_first_run_that_names_a_split_freezes_it(plates: Plates) -> None:
    split = plates.split(GroupLevel.WELL, "t--e")
    other = plates.make.run(Stage.SPLIT)
    plates.insert(split, 1, 1, "train")
    run = plates.make.run(Stage.TRAIN, split_id=split.id)
    with pytest.raises(UserInputError, match=FROZEN):
        plates.insert(split, 2, 1, "train")
    with plates.workspace.database.read() as session:
        assert session.scalars(select(Split.frozen_at)).one() == run.started_at
        assert session.get_one(Run, other.id).split_id is None


def test_a_split_that_no_run_uses_can_go(plates: Plates) -> None:
    plates.split(GroupLevel.WELL, "t--e")
    for table in ("split_members", "split_groups", "splits"):
        plates.run(f"DELETE FROM {table}")
    assert plates.count(SplitGroup) == plates.count(Split) == 0


def test_replace_is_no_way_around(sqlite_workspace: Workspace) -> None:
    plates = Plates(sqlite_workspace)
    free = plates.split(GroupLevel.WELL, "t--e")
    for well, site in ((0, 1), (0, 2)):
        with pytest.raises(UserInputError, match=ONE_SUBSET):
            plates.insert(free, well, site, "test", how="INSERT OR REPLACE")
    group = (
        "INSERT OR REPLACE INTO split_groups SELECT split_id, group_id, 'test' FROM split_groups"
    )
    with pytest.raises(UserInputError, match=ONE_SUBSET):
        plates.run(group)
    again = "INSERT OR REPLACE INTO splits SELECT * FROM splits"
    with pytest.raises(UserInputError, match="there already"):
        plates.run(again)
    plates.make.run(Stage.TRAIN, split_id=free.id)
    with pytest.raises(UserInputError, match=FROZEN):
        plates.insert(free, 0, 1, "train", how="INSERT OR REPLACE")
    with pytest.raises(UserInputError, match="there already"):
        plates.run(again)


def test_a_driver_of_its_own_is_refused_too(plates: Plates) -> None:
    plates.split(GroupLevel.WELL, "t--e", frozen_at=MOMENT)
    with (
        pytest.raises(DBAPIError, match="split is frozen"),
        plates.workspace.database.engine.begin() as raw,
    ):
        raw.exec_driver_sql("DELETE FROM split_members")


@pytest.mark.postgres
@pytest.mark.parametrize("table", ["splits", "split_members", "split_groups"])
def test_truncate_is_no_way_around(postgres_workspace: Workspace, table: str) -> None:
    plates = Plates(postgres_workspace)
    plates.split(GroupLevel.WELL, "t--e", frozen_at=MOMENT)
    with pytest.raises(UserInputError, match=FROZEN):
        plates.run(f"TRUNCATE {table} CASCADE")


def insert_within(plates: Plates, limit: str, **values: Any) -> None:
    with plates.workspace.database.begin() as session:
        session.execute(text(f"SET LOCAL lock_timeout = '{limit}'"))
        session.execute(insert(SplitMember).values(**values))


@pytest.mark.postgres
def test_two_programs_at_once_cannot_put_a_well_on_two_sides(postgres_workspace: Workspace) -> None:
    plates = Plates(postgres_workspace)
    split = plates.split(GroupLevel.WELL, "---e")
    row = {"split_id": split.id, "label_id": plates.label.id}
    one, two = (image.id for image in plates.images[0])
    with plates.workspace.database.begin() as first:
        first.execute(insert(SplitMember).values(image_id=one, subset=Subset.TRAIN, **row))
        with pytest.raises(Exception, match="lock timeout"):
            insert_within(plates, "200ms", image_id=two, subset=Subset.TEST, **row)
    with pytest.raises(UserInputError, match=ONE_SUBSET):
        plates.insert(split, 0, 2, "test")


@pytest.mark.postgres
def test_a_split_is_not_frozen_while_members_come_in(postgres_workspace: Workspace) -> None:
    plates = Plates(postgres_workspace)
    split = plates.split(GroupLevel.WELL, "---e")
    row = {"split_id": split.id, "label_id": plates.label.id, "subset": Subset.TRAIN}
    freeze = "SET LOCAL lock_timeout = '200ms'; UPDATE splits SET frozen_at = now()"
    with plates.workspace.database.begin() as first:
        first.execute(insert(SplitMember).values(image_id=plates.images[0][0].id, **row))
        with pytest.raises(Exception, match="lock timeout"):
            plates.run(freeze)
    plates.run(freeze)
    with pytest.raises(UserInputError, match=FROZEN):
        plates.insert(split, 0, 2, "train")


def test_a_member_costs_no_more_in_a_large_group(workspace: Workspace) -> None:
    # A plate of 6,000 images: a guard that looked at the other images would look 18 million times.
    make = Factory(workspace)
    plate, label = make.plate(), make.label("a")
    with workspace.database.begin() as session:
        wells = [
            {
                "plate_id": plate.id,
                "well_row": n // 24 + 1,
                "well_column": n % 24 + 1,
                "name": f"W{n}",
            }
            for n in range(300)
        ]
        session.execute(insert(Well), wells)
        ids = session.scalars(select(Well.id)).all()
        images = [
            {"well_id": well, "site": site, "core_name": "x"} for well in ids for site in range(20)
        ]
        session.execute(insert(Image), images)
        ids = session.scalars(select(Image.id)).all()
    split = make.split([], group_level=GroupLevel.PLATE, frozen_at=None)
    rows = [
        {"split_id": split.id, "image_id": i, "subset": Subset.TRAIN, "label_id": label.id}
        for i in ids
    ]
    started = time.perf_counter()
    with workspace.database.begin() as session:
        session.execute(insert(SplitMember), rows)
    guarded = time.perf_counter() - started
    assert guarded < 8, guarded  # 0.1 s on SQLite, 0.3 s on PostgreSQL, where nobody else works


@pytest.mark.parametrize("frozen_at", [None, MOMENT], ids=["open", "frozen"])
def test_what_a_split_is_about_stays(plates: Plates, frozen_at: datetime | None) -> None:
    split = plates.split(GroupLevel.WELL, "t--e", frozen_at=frozen_at)
    run = plates.make.run(Stage.TRAIN, split_id=split.id)
    member, other = plates.images[0]
    here, there = plates.wells[0], plates.wells[1]
    stays = "stays as it is.*cellstore split create NAME"
    for statement, number in (
        (f"UPDATE images SET well_id = {there.id} WHERE id = :id", member.id),
        (f"UPDATE wells SET plate_id = {plates.wells[3].plate_id} WHERE id = :id", here.id),
        ("UPDATE labels SET value = 'b' WHERE id = :id", plates.label.id),
        ("UPDATE runs SET split_id = NULL WHERE id = :id", run.id),
    ):
        with pytest.raises(UserInputError, match=stays):
            plates.run(statement, id=number)
    # What no split names, and what changes nothing, is nobody's business.
    plates.run("UPDATE images SET well_id = well_id WHERE id = :id", id=member.id)
    plates.run(f"UPDATE images SET well_id = {there.id}, site = 9 WHERE id = :id", id=other.id)
    plates.run("UPDATE runs SET split_id = split_id WHERE id = :id", id=run.id)


def test_no_later_migration_lost_a_trigger(workspace: Workspace) -> None:
    catalogue = (
        "SELECT name FROM sqlite_master WHERE type = 'trigger'"
        if workspace.database.is_sqlite
        else "SELECT tgname FROM pg_trigger WHERE NOT tgisinternal"
    )
    with workspace.database.read() as session:
        found = set(session.scalars(text(catalogue)))
    assert found == (ON_SQLITE if workspace.database.is_sqlite else ON_POSTGRESQL)


APPEND_ONLY = ("predictions", "image_predictions", "treatment_scores", "annotations", "events")
CLOSED = {
    *("predictions_closed", "image_predictions_closed", "run_metrics_closed", "cells_closed"),
    *("run_artifacts_closed", "segmentations_closed", "features_closed", "feature_files_closed"),
    *("image_quality_closed", "image_flags_closed", "cell_flags_closed", "ingest_files_closed"),
    *("ingest_issues_closed", "treatment_scores_closed"),
}
COUNTED = ("predictions", "features", "image_quality", "cell_flags", "segmentations", "cells")
ON_SQLITE = {
    *(f"{table}_counted_{verb}" for table in COUNTED for verb in ("UPDATE", "DELETE")),
    *(f"{table}_keep_{verb}" for table in APPEND_ONLY for verb in ("UPDATE", "DELETE")),
    *("split_members_frozen_insert", "split_members_frozen_update", "split_members_frozen_delete"),
    *("split_members_together_insert", "split_members_together_update"),
    *("split_groups_together_insert", "split_groups_together_update"),
    *("split_groups_together_delete", "splits_taken_insert", "splits_frozen_update"),
    *("splits_fixed_update", "splits_frozen_delete", "runs_freeze_insert", "runs_freeze_update"),
    *("images_stay_update", "wells_stay_update", "labels_stay_update", "runs_stay_update"),
    *("runs_begun_update", "runs_opened_update", "runs_kept_delete", *CLOSED),
}
ON_POSTGRESQL = {
    *(f"{table}_counted_{name}" for table in COUNTED for name in ("deleted", "before", "after")),
    *(f"{table}_keep" for table in APPEND_ONLY),
    *("split_members_guard", "split_groups_guard", "splits_guard"),
    *("images_stay", "wells_stay", "labels_stay", "runs_stay", "runs_begun", "runs_opened"),
    *CLOSED,
    *("runs_freeze", "splits_emptied", "split_members_emptied", "split_groups_emptied"),
    *(f"{name.removesuffix('_closed')}_emptied" for name in CLOSED),
    *("runs_emptied", "jobs_emptied"),
} - {"predictions_emptied", "image_predictions_emptied", "treatment_scores_emptied"}
