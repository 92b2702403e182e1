"""Audits of files, the names that people type, and the plan of every query of an audit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from factories import Factory, sha
from screens import SmallScreen, small_screen
from sqlalchemy import event, select, text

from cellstore.db.events import Change, record_events
from cellstore.enums import ArtifactKind, Stage
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.jobs.lookup import find_image, find_run, find_well
from cellstore.jobs.workspace import Workspace
from cellstore.models import IngestFile, Recipe, Well
from cellstore.report.audit import audit

audit_image = partial(audit, kind="image")
audit_well = partial(audit, kind="well")
audit_cell = partial(audit, kind="cell")
audit_run = partial(audit, kind="run")
audit_artifact = partial(audit, kind="artifact")

BIG = (
    *("images", "image_files", "segmentations", "cells", "features", "predictions", "jobs"),
    *("artifacts", "run_artifacts", "split_members", "events", "ingest_files", "wells"),
    *("image_flags", "cell_flags", "feature_files", "run_metrics", "image_quality"),
    "treatment_scores",
)
"""Tables that grow with the screen: none of them may be read from end to end."""


def table_of(screen: SmallScreen, name: str = "map.csv", digest: str = "map") -> IngestFile:
    counts = {"n_rows": 2, "n_created": 0, "n_updated": 2, "n_unchanged": 0, "n_refused": 0}
    run = screen.factory.run(Stage.INGEST)
    return screen.factory.add(
        IngestFile(
            run_id=run.id, name=name, sha256=sha(digest), size_bytes=9, layout="platemap", **counts
        )
    )


def downstream(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What came of something, by what it is."""
    return {item["what"]: item for item in record["downstream"]}


TYPED = (
    *("BR1/B02/1", "BR1 B02 1", " BR1 / b2 / 1 ", "BR1/r02c02/1", "B02/1", "b2 1"),
    *("r02c02f01", "BR1/r02c02f01", "BR1 r02c02f01", "r02c02f01-DNA.tiff"),
    *("/some/where/r02c02f01-DNA.tiff", r"C:\images\r02c02f01-DNA.tiff"),
)


def test_an_image_by_what_people_type(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    with workspace.database.read() as session:
        for name in TYPED:
            assert find_image(session, name) == screen.images["B02"].id, name


def test_an_image_by_the_start_of_a_sha256(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    image = screen.images["B02"]
    of_file = sha(f"file {image.id} DNA")
    with workspace.database.read() as session:
        for digest in (image.content_sha256 or "", of_file):
            for typed in (digest, digest[:12], digest[:7].upper()):
                assert find_image(session, typed) == image.id
        with pytest.raises(UnknownNameError):
            find_image(session, (image.content_sha256 or "")[:5])  # too short to be meant


def test_what_is_not_there_is_answered_with_what_is_near(read_screen: SmallScreen) -> None:
    workspace = read_screen.workspace
    with workspace.database.read() as session:
        for name, hint in (
            ("r02c03f02", "r02c03f01"),
            ("BR1/B02/7", "site of well BR1/B02 '7'. Known: 1"),
            ("BR7/B02/1", "plate 'BR7'. Known: BR1"),
            ("BR1/H02/1", "well 'H02'"),
        ):
            with pytest.raises(UnknownNameError, match=re.escape(hint)):
                find_image(session, name)


@pytest.mark.one_database
def test_a_name_of_several_images_says_how_to_choose(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    with workspace.database.read() as session:
        well = session.get_one(Well, find_well(session, "BR1/B01"))
    deeper = make.image(well, 1, plane=2)
    with workspace.database.read() as session:
        with pytest.raises(UserInputError, match="BR1/r02c01f01 plane 2 time 1"):
            find_image(session, "BR1/B01/1")
        assert find_image(session, "BR1/r02c01f01 plane 2 time 1") == deeper.id
        assert find_image(session, str(deeper.id)) == deeper.id


@pytest.mark.one_database
def test_a_well_by_what_people_type(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    with workspace.database.read() as session:
        for name in ("BR1/B02", "BR1 b2", "B02", "r02c02", "BR1/B02/1", "r02c02f01"):
            assert session.get_one(Well, find_well(session, name)).name == "B02"
    screen.factory.well(screen.factory.plate("BR2"), 2, 2)
    with (
        workspace.database.read() as session,
        pytest.raises(UserInputError, match="BR1/B02, BR2/B02"),
    ):
        find_well(session, "B02")


def test_a_run_by_what_people_type(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    train, predict = screen.train_run.id, screen.predict_run.id
    with workspace.database.read() as session:
        for name, wanted in (
            *((f"{train}", train), (f"#{train}", train), (f"run {train}", train)),
            *(("latest", predict), ("latest predict", predict), ("last train", train)),
            *(("train", train), ("Predict-latest", predict), (f"train {train}", train)),
        ):
            assert find_run(session, name).id == wanted, name
        with pytest.raises(UserInputError, match="needs a predict run"):
            find_run(session, "latest train", Stage.PREDICT)
        for name in ("lastest", "predict 1 2", "", "train predict"):
            with pytest.raises(UserInputError):
                find_run(session, name)


HARM = ["'; DROP TABLE images; --", "a\0b", "\udcff", "%", "_" * 500, "x" * 5000, "../" * 9]


def test_names_that_mean_harm_are_unknown(read_screen: SmallScreen) -> None:
    workspace = read_screen.workspace
    for asked, name in product((audit_image, audit_artifact, audit, audit_well), HARM):
        with pytest.raises(UserInputError):
            asked(workspace, name)


@pytest.mark.one_database
def test_a_checkpoint_and_what_came_of_it(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    screen.factory.job(screen.predict_run, screen.images["B01"])
    digest = sha("model")
    found = audit_artifact(workspace, digest[:6])
    (known,) = found.record["known"]
    assert (found.record["sha256"], known["kind"]) == (digest, "checkpoint")
    assert [run["run_id"] for run in known["runs"]] == [screen.train_run.id]
    came = downstream(known)
    assert came["predict runs"]["runs"] == [screen.predict_run.id]
    assert came["images labelled"]["count"] == 1
    for name in (known["path"], f"{digest}.safetensors", str(known["key"]), digest):
        assert audit_artifact(workspace, str(name)).record["sha256"] == digest
    json.dumps(found.record, allow_nan=False)


def test_a_mask_and_an_image_file(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    image = screen.images["B01"]
    file = audit_artifact(workspace, "r02c01f01-DNA.tiff").record["known"][0]
    assert (file["kind"], file["about"]) == (
        "image file",
        ["channel DNA of image BR1/B01/1 r02c01f01"],
    )
    came = downstream(file)
    assert (came["segmentations"]["count"], came["cells"]["count"]) == (1, 3)
    assert (came["measured cells"]["count"], came["labelled cells"]["count"]) == (3, 3)
    assert came["splits"]["names"] == ["main"]
    assert came["trainings on these splits"]["runs"] == [screen.train_run.id]
    with workspace.database.read() as session:
        mask = session.execute(
            text(
                "SELECT a.sha256 FROM artifacts a JOIN segmentations s ON s.mask_artifact_id = a.id"
                " WHERE s.image_id = :image"
            ),
            {"image": image.id},
        ).scalar_one()
    (known,) = audit_artifact(workspace, mask).record["known"]
    assert (known["kind"], known["about"]) == ("mask", ["of image BR1/r02c01f01"])
    assert [run["run_id"] for run in known["runs"]] == [screen.segment_run.id]
    assert known["downstream"] == file["downstream"]


def test_weights_and_all_that_was_made_with_them(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    (known,) = audit_artifact(workspace, sha("cellpose weights")[:8]).record["known"]
    assert (known["kind"], known["name"]) == ("weights", "test")
    assert [run["run_id"] for run in known["runs"]] == [screen.segment_run.id]
    came = downstream(known)
    assert (came["segmentations"]["count"], came["cells"]["count"]) == (6, 10)
    assert came["train runs"]["runs"] == [screen.train_run.id]
    assert came["predict runs"]["runs"] == [screen.predict_run.id]


def test_an_ingested_table_and_the_wells_it_changed(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    table = table_of(screen)
    with workspace.database.read() as session:
        well = session.get_one(Well, find_well(session, "BR1/B01"))
        run = find_run(session, str(table.run_id))
    screen.factory.well_change(well, screen.factory.treatment("new"), run, file="map.csv")
    image = screen.images["B02"].id
    with workspace.database.begin() as session:
        new = Change("images", image, None, {"first_id": image, "last_id": image})
        record_events(session, [new], run_id=table.run_id)
    (known,) = audit_artifact(workspace, "map.csv").record["known"]
    assert known["kind"] == "ingested table"
    assert [run["run_id"] for run in known["runs"]] == [table.run_id]
    came = {what: item["count"] for what, item in downstream(known).items()}
    assert came["wells with another treatment"] == 1
    assert came["labelled cells of these wells"] == 3
    assert (came["new images"], came["labelled cells of these images"]) == (1, 2)
    table_of(screen, digest="another")
    with pytest.raises(UserInputError, match=r"names several files: .*start of its sha256"):
        audit_artifact(workspace, "map.csv")


@pytest.mark.one_database
def test_a_file_of_features(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    cells = screen.factory.cells_of(screen.segmentations["B01"])
    with workspace.database.read() as session:
        segment = session.scalars(select(Recipe).where(Recipe.stage == Stage.SEGMENT)).one()
    screen.factory.feature_files("cp", cells, {"a": [1.0, 2.0, 3.0]}, segment)
    with workspace.database.read() as session:
        digest = session.execute(
            text("SELECT sha256 FROM artifacts WHERE kind = :kind"),
            {"kind": ArtifactKind.FEATURES.value},
        ).scalar_one()
    (known,) = audit_artifact(workspace, digest[:9]).record["known"]
    assert "of feature set cp: 3 cells" in known["about"][0]
    assert [run["stage"] for run in known["runs"]] == ["ingest"]


@pytest.mark.one_database
def test_a_file_on_disk_is_looked_up_by_its_bytes(workspace: Workspace, tmp_path: Path) -> None:
    screen = small_screen(workspace)
    table = table_of(screen, digest="the bytes")
    path = tmp_path / "renamed.csv"
    path.write_text("the bytes")
    found = audit_artifact(workspace, str(path))
    assert (found.record["hashed"], found.record["known"][0]["key"]) == (str(path), table.id)
    changed = tmp_path / "map.csv"
    changed.write_text("other bytes")
    with pytest.raises(UnknownNameError, match=f"known with sha256 {table.sha256[:12]}"):
        audit_artifact(workspace, str(changed))


@pytest.mark.one_database
def test_the_same_digits_of_two_files_list_both(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    row = screen.factory.artifact(ArtifactKind.NETWORK)
    twin = row.sha256[:10] + ("0" * 54 if row.sha256[10:] != "0" * 54 else "1" * 54)
    with workspace.database.begin() as session:
        session.execute(
            text(
                "INSERT INTO artifacts (kind, path, sha256, size_bytes, created_at) "
                "SELECT kind, 'report/twin', :twin, 1, created_at FROM artifacts WHERE id = :id"
            ),
            {"twin": twin, "id": row.id},
        )
    with pytest.raises(UserInputError, match=f"{row.sha256[:12]}.*{twin[:12]}|{twin[:12]}"):
        audit_artifact(workspace, row.sha256[:10])


def test_a_name_without_a_kind(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    for name, kind in (
        *(("BR1/B02/1", "image"), ("r02c02f01", "image"), ("BR1/B02", "well")),
        *(("latest train", "run"), (f"#{screen.train_run.id}", "run")),
        (sha("model")[:8], "artifact"),
    ):
        assert audit(workspace, name).kind == kind, name
    with pytest.raises(UserInputError, match=r"number of what.*audit image 3"):
        audit(workspace, "3")


# The plan of every query.


@contextmanager
def statements(workspace: Workspace) -> Iterator[list[tuple[str, Any]]]:
    """Collects every question that is put to the database."""
    found: list[tuple[str, Any]] = []

    def listen(_c: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if statement.lstrip().upper().startswith("SELECT"):
            found.append((statement, values))

    event.listen(workspace.database.engine, "before_cursor_execute", listen)
    try:
        yield found
    finally:
        event.remove(workspace.database.engine, "before_cursor_execute", listen)


def scans_of_sqlite(workspace: Workspace, statement: str, values: Any) -> list[str]:
    with workspace.database.read() as session:
        rows = session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).all()
    lines = [str(row[3]) for row in rows]
    return [line for line in lines if line.startswith("SCAN") and line.split()[1] in BIG]


def scans_of_postgres(workspace: Workspace, statement: str, values: Any) -> list[str]:
    # On a tiny table a scan is right; the question is whether an index can serve.
    with workspace.database.read() as session:
        session.execute(text("SET LOCAL enable_seqscan = off"))
        explain = f"EXPLAIN (FORMAT JSON) {statement}"
        found = session.connection().exec_driver_sql(explain, values).scalar_one()
    return [
        f"{node['Node Type']} {node['Relation Name']}"
        for node in nodes(found[0]["Plan"])
        if node.get("Relation Name") in BIG and not {"Index Cond", "Recheck Cond"} & set(node)
    ]


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


def refused(audit: Callable[[Workspace, str], object], workspace: Workspace, name: str) -> None:
    with pytest.raises(UserInputError):
        audit(workspace, name)


def audits(screen: SmallScreen) -> dict[str, Callable[[Workspace], object]]:
    image = screen.images["B01"]
    return {
        "image by place": lambda w: audit_image(w, "BR1/B01/1"),
        "image by core name": lambda w: audit_image(w, "r02c01f01"),
        "image by file": lambda w: audit_image(w, "r02c01f01-DNA.tiff"),
        "image by sha256": lambda w: audit_image(w, (image.content_sha256 or "")[:8]),
        "well": lambda w: audit_well(w, "BR1/B01"),
        "well alone": lambda w: audit_well(w, "B01"),
        "cell": lambda w: audit_cell(w, "3"),
        "checkpoint": lambda w: audit_artifact(w, sha("model")[:8]),
        "image file": lambda w: audit_artifact(w, "r02c01f01-DNA.tiff"),
        "weights": lambda w: audit_artifact(w, sha("cellpose weights")),
        "table": lambda w: audit_artifact(w, "map.csv"),
        "artifact by id": lambda w: audit_artifact(w, "1"),
        "run": lambda w: audit_run(w, "latest predict"),
        "unknown image": lambda w: refused(audit_image, w, "r02c01f99"),
        "unknown file": lambda w: refused(audit_artifact, w, "abcdef0123"),
    }


def test_no_query_of_an_audit_reads_a_big_table_from_end_to_end(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    table_of(screen)
    scans = scans_of_sqlite if workspace.database.is_sqlite else scans_of_postgres
    for name, ask in audits(screen).items():
        with statements(workspace) as asked:
            ask(workspace)
        assert asked, name
        for statement, values in dict.fromkeys((s, _hashable(v)) for s, v in asked):
            assert scans(workspace, statement, _plain(values)) == [], (name, statement)


def _hashable(values: Any) -> Any:
    return tuple(values.items()) if isinstance(values, dict) else tuple(values)


def _plain(values: Any) -> Any:
    return dict(values) if values and isinstance(values[0], tuple) else values


def test_the_watch_over_plans_sees_a_scan(read_screen: SmallScreen) -> None:
    workspace = read_screen.workspace
    scans = scans_of_sqlite if workspace.database.is_sqlite else scans_of_postgres
    values: Any = () if workspace.database.is_sqlite else None
    for bad in (
        "SELECT count(*) FROM predictions",
        "SELECT cells.id FROM cells WHERE cells.min_row = 7",
        "SELECT images.id FROM images ORDER BY images.core_name",
    ):
        assert scans(workspace, bad, values), bad


@pytest.mark.one_database
def test_counts_are_those_of_what_was_asked_for(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = Factory(workspace)
    run = make.run(Stage.SEGMENT)
    make.segmentation(screen.images["B02"], run, 5)
    came = downstream(audit_image(workspace, "BR1/B01/1").record)
    assert came["cells"]["count"] == 3
    well = downstream(audit_well(workspace, "BR1/B02").record)
    assert well["cells"]["count"] == 7
