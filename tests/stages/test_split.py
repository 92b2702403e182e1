"""Splits as rows: the same in every store, never changed, and honest about what they leak."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import factories
import pytest
from published_metadata import PLATE, write_published_metadata
from realdata import real_data
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from cellstore.analysis.leaks import LeakKind, LeakSeverity
from cellstore.config import IngestParams, SplitParams
from cellstore.enums import TARGET, GroupLevel, Stage, Subset
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace, create_workspace
from cellstore.models import (
    Image,
    ImageFile,
    Label,
    Plate,
    Run,
    Split,
    SplitMember,
    Treatment,
    Well,
)
from cellstore.stages.ingest.ingest import ingest
from cellstore.stages.split import check_split, create_split, show_split

PUBLISHED = SplitParams(protocol="published")
DESIGN = {"DMSO": 6, "drug-a": 3, "drug-b": 3}
"""Wells of each treatment of ``fill``; each well has two images."""


def fill(
    workspace: Workspace,
    design: dict[str, int],
    sites: int = 2,
    backwards: bool = False,
    barcode: str = "P1",
) -> None:
    """Wells of a plate by treatment, in the given or the reverse order of ids."""
    wells = [name for name, count in design.items() for _ in range(count)]
    numbered = list(enumerate(wells, start=1))
    with workspace.database.begin() as session:
        plate = Plate(barcode=barcode)
        session.add(plate)
        session.flush()
        ids = {name: treatment(session, name) for name in design}
        for column, name in reversed(numbered) if backwards else numbered:
            add_well(session, plate.id, column, ids[name], sites)


def treatment(session: Session, name: str) -> int:
    row = session.scalars(select(Treatment).where(Treatment.name == name)).one_or_none()
    return (row or factories.treatment(session, name)).id


def add_well(
    session: Session, plate_id: int, column: int, treatment_id: int | None, sites: int
) -> None:
    well = Well(
        plate_id=plate_id,
        well_row=1,
        well_column=column,
        name=f"A{column:02d}",
        treatment_id=treatment_id,
    )
    session.add(well)
    session.flush()
    for site in range(1, sites + 1):
        digest = f"{plate_id:02d}{column:02d}{site:02d}".ljust(64, "0")
        image = Image(
            well_id=well.id,
            site=site,
            core_name=f"r01c{column:02d}f{site:02d}",
            content_sha256=digest,
        )
        session.add(image)
        session.flush()
        session.add(
            ImageFile(image_id=image.id, channel="DNA", position=1, name="x", sha256=digest)
        )


def sides(workspace: Workspace, name: str) -> dict[str, Subset]:
    query = (
        select(Image.core_name, SplitMember.subset)
        .join(SplitMember, SplitMember.image_id == Image.id)
        .join(Split, Split.id == SplitMember.split_id)
        .where(Split.name == name)
    )
    with workspace.database.read() as session:
        return dict(session.execute(query).all())


def count(workspace: Workspace, table: type) -> int:
    with workspace.database.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_a_grouped_split_keeps_wells_together(workspace: Workspace) -> None:
    fill(workspace, DESIGN)
    result = create_split(workspace, "by-well", SplitParams(seed=3))
    assert result.counts == {"train": 6, "validation": 6, "test": 6}
    assert (result.classes, result.wells_in_both_subsets, result.leaking) == (3, 0, False)
    assert result.excluded["downsampled"] == {"DMSO": {"before": 12, "after": 6}}
    wells: dict[str, set[Subset]] = {}
    for core_name, side in sides(workspace, "by-well").items():
        wells.setdefault(core_name[:6], set()).add(side)
    assert {len(found) for found in wells.values()} == {1}
    (remark,) = check_split(workspace, "by-well").findings
    assert (remark.severity, remark.kind) == (LeakSeverity.REMARK, LeakKind.PLATE)


@pytest.mark.one_database
def test_the_published_protocol_names_its_leak(workspace: Workspace) -> None:
    fill(workspace, DESIGN)
    result = create_split(workspace, "published", PUBLISHED)
    assert (result.images, result.group_level) == (18, "image")
    assert result.counts == {"train": 14, "validation": 0, "test": 4}
    assert result.leaking
    check = check_split(workspace)
    assert check.wells_in_both_subsets == result.wells_in_both_subsets > 0
    assert check.labels_in_both_subsets == 3
    assert [finding.kind for finding in check.findings] == [LeakKind.WELL, LeakKind.PLATE]
    assert (check.leaks, check.warnings) == (1, 0)


def test_seed_and_images_decide_not_the_order_of_ids(workspace: Workspace, tmp_path: Path) -> None:
    fill(workspace, DESIGN)
    other, _ = create_workspace(tmp_path / "other")
    fill(other, DESIGN, backwards=True)
    for params in (SplitParams(), PUBLISHED, SplitParams(group_level=GroupLevel.IMAGE)):
        name = f"{params.protocol} {params.group_level}"
        one, two = create_split(workspace, name, params), create_split(other, name, params)
        assert sides(workspace, name) == sides(other, name)
        assert one.fingerprint == two.fingerprint
    changed = create_split(workspace, "another seed", SplitParams(seed=1))
    assert changed.fingerprint != show_split(workspace, "grouped well").fingerprint
    other.database.close()


@pytest.mark.one_database
def test_the_same_split_again_changes_nothing_another_of_its_name_is_refused(
    workspace: Workspace,
) -> None:
    fill(workspace, DESIGN)
    first = create_split(workspace, "s", SplitParams())
    assert first.created
    again = create_split(workspace, "s", SplitParams())
    assert again == replace(first, created=False, run_id=None)
    with pytest.raises(UserInputError, match="never changes"):
        create_split(workspace, "s", SplitParams(seed=1))
    assert count(workspace, Split) == count(workspace, Run) == 1
    with workspace.database.read() as session:
        run = session.scalars(select(Run)).one()
        assert (run.id, run.stage, run.query) == (first.run_id, Stage.SPLIT, first.query)


def test_the_stored_query_runs_as_it_stands(workspace: Workspace) -> None:
    fill(workspace, DESIGN)
    result = create_split(workspace, "s", SplitParams(plates=("P1",)))
    with workspace.database.read() as session:
        assert len(session.execute(text(result.query)).all()) == 24


def test_images_without_files_or_treatment_stay_out_and_are_counted(workspace: Workspace) -> None:
    fill(workspace, DESIGN)
    with workspace.database.begin() as session:
        add_well(session, session.scalars(select(Plate.id)).one(), 24, None, 2)
        lost = session.scalars(select(Image).where(Image.core_name == "r01c07f01")).one()
        lost.content_sha256 = None
    result = create_split(workspace, "s", SplitParams())
    assert (result.excluded["missing_files"], result.excluded["without_label"]) == (1, 2)
    assert "r01c07f01" not in sides(workspace, "s")
    create_split(workspace, "all", SplitParams(allow_missing=True))
    assert "r01c07f01" in sides(workspace, "all")


def test_a_class_in_one_well_is_left_out_by_name(sqlite_workspace: Workspace) -> None:
    fill(sqlite_workspace, {**DESIGN, "lonely": 1})
    result = create_split(sqlite_workspace, "s", SplitParams())
    (left,) = result.excluded["classes"]
    assert (left["label"], left["images"]) == ("lonely", 2)
    assert result.classes == 3


def test_whole_plates_are_left_out_where_labels_repeat(sqlite_workspace: Workspace) -> None:
    for barcode in ("P1", "P2", "P3"):
        fill(sqlite_workspace, {"DMSO": 1, "drug-a": 1}, barcode=barcode)
    params = SplitParams(group_level=GroupLevel.PLATE)
    result = create_split(sqlite_workspace, "by-plate", params)
    assert result.counts == {"train": 4, "validation": 4, "test": 4}
    check = check_split(sqlite_workspace)
    assert (check.plates_in_both_subsets, check.labels_in_both_subsets) == (0, 2)
    one = create_split(sqlite_workspace, "one", replace(PUBLISHED, plates=("P2",), test_size=0.5))
    assert one.images == 4


def test_one_plate_can_be_chosen_and_left_out(sqlite_workspace: Workspace) -> None:
    fill(sqlite_workspace, DESIGN)
    with pytest.raises(UnknownNameError, match="Unknown plate 'P2'"):
        create_split(sqlite_workspace, "s", SplitParams(plates=("P2",)))
    with pytest.raises(UserInputError, match="finer group level"):
        create_split(sqlite_workspace, "s", SplitParams(group_level=GroupLevel.PLATE))
    assert count(sqlite_workspace, Split) == count(sqlite_workspace, Run) == 0


def test_wrong_parameters_are_one_sentence(sqlite_workspace: Workspace) -> None:
    fill(sqlite_workspace, DESIGN)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"protocol": "random"}, "Unknown protocol 'random'"),
        ({"field": "color"}, "Unknown label field 'color'"),
        ({"field": TARGET}, "24 have no target"),
        ({"test_size": 1.5}, "--test-size must be below 1"),
    ]
    for params, message in wrong:
        with pytest.raises(UserInputError, match=message):
            create_split(sqlite_workspace, "s", SplitParams(**params))
    assert count(sqlite_workspace, Run) == 0


def test_what_cannot_be_split(sqlite_workspace: Workspace) -> None:
    with pytest.raises(UserInputError, match="cellstore ingest"):
        create_split(sqlite_workspace, "s", SplitParams())
    with pytest.raises(UnknownNameError, match="no split yet"):
        show_split(sqlite_workspace)
    fill(sqlite_workspace, {"DMSO": 3})
    with pytest.raises(UserInputError, match="two classes"):
        create_split(sqlite_workspace, "s", PUBLISHED)
    with pytest.raises(UserInputError, match="printable"):
        create_split(sqlite_workspace, " ", SplitParams())


def test_a_label_with_a_single_image_cannot_follow_the_published_protocol(
    sqlite_workspace: Workspace,
) -> None:
    fill(sqlite_workspace, {"DMSO": 3, "once": 1}, sites=1)
    with pytest.raises(UserInputError, match="both subsets: DMSO, once"):
        create_split(sqlite_workspace, "s", PUBLISHED)


def test_check_names_same_bytes_and_two_spellings(sqlite_workspace: Workspace) -> None:
    fill(sqlite_workspace, {"ME-0328": 3, "ME0328": 3})
    create_split(sqlite_workspace, "s", SplitParams())
    placed = sides(sqlite_workspace, "s")
    chosen = [
        next(name for name, side in placed.items() if side is one) for one in list(Subset)[::2]
    ]
    with sqlite_workspace.database.begin() as session:
        for image in session.scalars(select(Image).where(Image.core_name.in_(chosen))):
            file = session.scalars(select(ImageFile).where(ImageFile.image_id == image.id)).one()
            file.sha256 = "f" * 64
    found = {finding.kind: finding for finding in check_split(sqlite_workspace).findings}
    assert found.keys() == {LeakKind.FILE, LeakKind.SPELLING, LeakKind.PLATE}
    assert (found[LeakKind.FILE].count, found[LeakKind.FILE].examples) == (1, ("f" * 64,))
    assert found[LeakKind.SPELLING].severity is LeakSeverity.LEAK


@pytest.mark.one_database
@pytest.mark.real
def test_the_published_study_as_a_split(workspace: Workspace, tmp_path: Path) -> None:
    table = write_published_metadata(real_data("cpjump1"), tmp_path / "metadata.csv")
    ingest(workspace, table, IngestParams(plate=PLATE))
    with pytest.raises(UserInputError, match="2867 lack their files"):
        create_split(workspace, "published", PUBLISHED)
    result = create_split(workspace, "published", replace(PUBLISHED, allow_missing=True))
    assert (result.images, result.classes) == (2376, 250)
    assert result.counts == {"train": 1900, "validation": 0, "test": 476}
    assert result.excluded["downsampled"] == {"DMSO": {"before": 509, "after": 18}}
    check = check_split(workspace, "published")
    assert (check.labels_in_both_subsets, check.labels) == (250, 250)
    assert check.wells_in_both_subsets > 200
    kinds = {LeakKind.WELL, LeakKind.SPELLING, LeakKind.PLATE}
    assert kinds == {finding.kind for finding in check.findings}
    dmso = (
        select(func.count())
        .select_from(SplitMember)
        .join(Label, Label.id == SplitMember.label_id)
        .where(Label.value == "DMSO")
    )
    with workspace.database.read() as session:
        assert session.scalar(dmso) == 18
