"""status, verify, doctor, and how commands end."""

from __future__ import annotations

import os

import pytest
from factories import Factory

from cellstore.enums import ArtifactKind, Stage, Status
from cellstore.io.image_files import encode_tiff
from cellstore.jobs.runs import keep_files
from cellstore.models import Image
from cellstore.store import Store


@pytest.fixture(autouse=True)
def _without_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the factory stand in no ledger; ``test_verify_ledger`` is about that."""
    monkeypatch.setattr("cellstore.stages.verify.check_ledger", lambda *_: [])


@pytest.fixture
def masked(cellstore, store):
    """The store with one segmentation whose mask is a real file of two cells."""
    with Store.open(store) as opened:
        workspace = opened.workspace
        mask = [[0, 1, 1], [2, 2, 0]]
        stored = workspace.artifacts.write(ArtifactKind.MASK, encode(mask), ".tif")
        flow = workspace.artifacts.write(ArtifactKind.FLOW, encode([[7]]), ".tif")
        with workspace.database.begin() as session:
            ids = {
                "mask_artifact_id": keep_files(session, [stored])[0],
                "flow_artifact_id": keep_files(session, [flow])[0],
            }
            image = session.get_one(Image, 1)
        make = Factory(workspace)
        run = make.run(Stage.SEGMENT)
        make.segmentation(image, run, 2, **ids)
        make.job(run, image)
    return store / "artifacts" / stored.path


def encode(rows: list[list[int]]) -> bytes:
    import numpy as np

    return encode_tiff(np.array(rows, dtype=np.uint16))


def age(path) -> None:
    os.utime(path, (0, 0))


def test_status_counts(cellstore, store, masked):
    found = cellstore("status", "--store", store, "--json").json
    counts = {name: found[name] for name in ("plates", "wells", "images", "segmented", "measured")}
    assert counts == {"plates": 1, "wells": 6, "images": 12, "segmented": 1, "measured": 0}
    assert (found["cells"], found["missing_images"]) == (2, 0)
    shown = cellstore("status", "--store", store).out
    assert "wells         6" in shown
    assert "segment" in shown


def test_an_image_that_has_changed_is_stale(cellstore, store, masked):
    with Store.open(store) as opened, opened.workspace.database.begin() as session:
        session.get_one(Image, 1).content_sha256 = "f" * 64
    found = cellstore("status", "--store", store, "--json").json
    assert found["segmented"] == 0
    assert [(item["done"], item["stale"]) for item in found["recipes"]] == [(0, 1)]


def test_failed_images_are_listed_with_the_reason(cellstore, store):
    assert "No image has failed" in cellstore("jobs", "--failed", "--store", store).out
    with Store.open(store) as opened:
        with opened.workspace.database.read() as session:
            image = session.get_one(Image, 1)
        make = Factory(opened.workspace)
        error = "Traceback (most recent call last):\n  ...\nValueError: bad \x1b[31mpixels"
        make.job(make.run(Stage.SEGMENT), image, Status.FAILED, attempts=2, error=error)
    said = cellstore("jobs", "--failed", "--store", store)
    assert "P1/r01c01f01, 2 tries" in said.out
    assert "ValueError: bad" in said.out
    assert "\x1b" not in said.out


def test_verify_finds_nothing_wrong(cellstore, store, masked):
    cellstore("init", "other")
    assert cellstore("verify", "--store", "other", "--json").json["ok"]
    found = cellstore("verify", "--store", store, "--json").json
    assert (found["files"], found["segmentations"]) == (2, 1)
    assert (found["ok"], found["problems"]) == (True, [])


def test_verify_finds_a_changed_and_a_lost_file(cellstore, store, masked):
    masked.write_bytes(b"changed")
    assert "sha256 differs" in cellstore("verify", "--store", store, code=1).out
    masked.unlink()
    assert "the file is gone" in cellstore("verify", "--store", store, code=1).out


def test_verify_compares_masks_with_cells(cellstore, store, masked):
    with Store.open(store) as opened, opened.workspace.database.begin() as session:
        session.connection().exec_driver_sql("DELETE FROM cells WHERE object_number = 2")
    said = cellstore("verify", "--store", store, code=1)
    assert "the mask has 2 cells, the database 1" in said.out
    assert "P1/r01c01f01" in said.out


def test_verify_removes_old_unknown_files_only_when_told(cellstore, store, masked):
    orphan = masked.parent / "orphan.tif"
    orphan.write_bytes(b"left by a crash")
    age(orphan)
    assert "orphan.tif" in cellstore("verify", "--store", store, code=1).out
    assert orphan.exists()
    assert "1 removed" in cellstore("verify", "--fix", "--store", store).out
    assert not orphan.exists()
    assert masked.exists()


def test_verify_leaves_young_files_to_the_command_that_writes_them(cellstore, store, masked):
    young = masked.parent / ".part-young"
    young.write_bytes(b"half")
    said = cellstore("verify", "--fix", "--store", store)
    assert young.exists()
    assert "left alone" in said.err
    cellstore("verify", "--fix", "--older-than", "0", "--store", store)
    assert not young.exists()


def test_verify_removes_a_link_but_not_what_it_points_to(cellstore, store, masked, tmp_path):
    treasure = tmp_path / "treasure"
    treasure.write_text("gold")
    link = masked.parent / "link.tif"
    link.symlink_to(treasure)
    cellstore("verify", "--fix", "--older-than", "0", "--store", store)
    assert (link.is_symlink(), treasure.read_text()) == (False, "gold")


def test_doctor_works_with_and_without_a_store(cellstore):
    without = {
        item["topic"]: item for item in cellstore("doctor", "--json", code=None).json["findings"]
    }
    assert without["store"]["state"] == "absent"
    cellstore("init", "store")
    found = cellstore("doctor", "--store", "store", "--json", code=None).json["findings"]
    assert [item["state"] for item in found if item["topic"] == "store"] == ["ok"]


def test_doctor_fits_a_terminal_but_for_paths(cellstore):
    lines = cellstore("doctor", code=None).out.splitlines()
    paths = [line for line in lines if any(len(word) > 50 for word in line.split())]
    assert all(len(line) <= 80 for line in lines if line not in paths)
    assert all(line.startswith(" ") for line in paths)


def test_doctor_finds_a_broken_store(cellstore, store):
    (store / "cellstore.db").write_bytes(b"this is no database" * 300)
    for extra in ("-wal", "-shm"):
        (store / f"cellstore.db{extra}").unlink(missing_ok=True)
    said = cellstore("doctor", "--store", store, code=1)
    assert "broken" in said.out


def test_doctor_names_a_store_that_is_not_there(cellstore):
    assert "is not a store" in cellstore("doctor", "--store", "nowhere", code=2).err


def test_version_and_unknown_commands(cellstore):
    assert cellstore("--version").out.startswith("cellstore 0.")
    assert "No such command" in cellstore("segmnt", code=2).err


def stopped(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("a bug")


def test_a_stop_says_how_to_go_on(cellstore, store, monkeypatch):
    monkeypatch.setattr(Store, "status", stopped)
    said = cellstore("status", "--store", store, code=130)
    assert "run the same command again" in said.err


def test_a_bug_is_a_sentence_that_says_how_to_see_more(cellstore, store, monkeypatch):
    monkeypatch.setattr(Store, "status", broken)
    said = cellstore("status", "--store", store, code=70)
    assert "CELLSTORE_DEBUG=1" in said.err
