"""Masks of other tools become segmentations of the images they are named like."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from factories import Factory
from numpy.typing import NDArray
from realdata import real_data
from skimage.measure import regionprops
from sqlalchemy import func, select

from cellstore.analysis.features import BASIC_GROUP
from cellstore.config import IngestParams
from cellstore.enums import Severity, Stage, Status
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.io.image_files import decode_tiff, probe
from cellstore.jobs.workspace import Workspace
from cellstore.models import (
    Artifact,
    Cell,
    CellFeatures,
    Image,
    ImageFile,
    IngestIssue,
    Plate,
    Recipe,
    Segmentation,
)
from cellstore.stages.ingest.account import Account, Issue, issues_of
from cellstore.stages.ingest.ingest import ingest
from cellstore.stages.ingest.ingest_masks import ingest_masks
from cellstore.stages.measure import measure

pytestmark = pytest.mark.one_database

SHAPE = (20, 30)


def labels_of(*boxes: tuple[int, int, int, int, int]) -> NDArray[np.uint16]:
    """Masks with a rectangle (label, top, left, bottom, right) for each of ``boxes``."""
    masks = np.zeros(SHAPE, np.uint16)
    for label, top, left, bottom, right in boxes:
        masks[top:bottom, left:right] = label
    return masks


# Touching objects, labels with gaps, and one pixel that is too small to count.
MASKS = labels_of((3, 2, 2, 8, 8), (4, 2, 8, 8, 14), (300, 10, 4, 16, 20), (9, 18, 28, 19, 29))


@dataclass
class Bench:
    """A store whose images are files in ``images``, and a folder of masks."""

    workspace: Workspace
    images: Path
    masks: Path
    plates: dict[str, Plate] = field(default_factory=dict)
    account: Account = field(default_factory=lambda: Account(0, "masks"))

    def __post_init__(self) -> None:
        self.make = Factory(self.workspace)

    def image(self, name: str, plate: str = "P1", pixels: Any = None, **more: Any) -> Image:
        """An image of one file that is there."""
        row = self.plates.get(plate) or self.make.plate(plate)
        self.plates[plate] = row
        number = len(list(self.images.rglob("*.tif"))) + 1
        path = self.images / plate / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(number)
        tifffile.imwrite(path, rng.integers(1, 999, SHAPE, np.uint16) if pixels is None else pixels)
        image = self.make.image(self.make.well(row, 1, number), **more)
        found, folder = probe(path), self.make.folder(str(path.parent)).id
        with self.workspace.database.begin() as session:
            file = session.scalars(select(ImageFile).where(ImageFile.image_id == image.id)).one()
            file.name, file.folder_id = name, folder
            file.sha256, file.size_bytes = found.sha256, found.size_bytes
            file.modified_ns, file.height, file.width = found.mtime_ns, found.height, found.width
        return image

    def save(self, name: str, masks: NDArray[Any] = MASKS) -> Path:
        path = self.masks / name
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, masks)
        return path

    def ingest(self, **options: Any) -> Account:
        run = self.make.run(Stage.INGEST, status=Status.RUNNING)
        self.account = Account(run.id, self.masks.name)
        ingest_masks(self.workspace, self.masks, IngestParams(**options), self.account)
        return self.account

    @property
    def counts(self) -> tuple[int, int, int, int]:
        found = self.account
        return found.rows, found.created, found.unchanged, found.refused

    def issues(self) -> tuple[Issue, ...]:
        with self.workspace.database.read() as session:
            return issues_of(session, self.account.run_id)

    def refusals(self) -> list[tuple[str, str]]:
        """File and reason of what the last run refused."""
        with self.workspace.database.read() as session:
            query = select(IngestIssue.file, IngestIssue.reason).where(
                IngestIssue.run_id == self.account.run_id,
                IngestIssue.severity == Severity.REFUSED,
            )
            return [tuple(row) for row in session.execute(query.order_by(IngestIssue.id))]

    def count(self, table: type) -> int:
        with self.workspace.database.read() as session:
            return session.scalar(select(func.count()).select_from(table)) or 0


@pytest.fixture
def bench(workspace: Workspace, tmp_path: Path) -> Bench:
    made = Bench(workspace, tmp_path / "images", tmp_path / "masks")
    made.images.mkdir()
    made.masks.mkdir()
    return made


@pytest.mark.each_database
def test_masks_become_a_segmentation_and_its_cells(bench: Bench) -> None:
    image = bench.image("A01_1.tif")
    bench.save("A01_1_cp_masks.tif")
    result = bench.ingest()
    assert (bench.counts, result.cells) == ((1, 1, 0, 0), 4)
    with bench.workspace.database.read() as session:
        found = session.scalars(select(Segmentation)).one()
        cells = session.scalars(select(Cell).order_by(Cell.object_number)).all()
        recipe = session.get_one(Recipe, found.recipe_id)
        artifact = session.get_one(Artifact, found.mask_artifact_id)
    masks = decode_tiff(bench.workspace.artifacts.read(artifact.path, artifact.sha256))
    np.testing.assert_array_equal(masks, MASKS)
    assert masks.dtype == np.uint16
    assert (found.image_id, found.content_sha256) == (image.id, image.content_sha256)
    assert (found.run_id, found.n_cells, found.flow_artifact_id) == (bench.account.run_id, 4, None)
    # Areas 36, 36, 96 and 1: the median is the diameter of a disc of 36 pixels.
    assert found.diameter == pytest.approx(2 * (36 / np.pi) ** 0.5)
    assert [cell.object_number for cell in cells] == [3, 4, 9, 300]
    assert [cell.excluded for cell in cells] == [None, None, "perimeter is 0", None]
    assert (cells[3].min_row, cells[3].min_col, cells[3].max_row, cells[3].max_col) == (
        10,
        4,
        16,
        20,
    )
    assert (recipe.stage, recipe.parameters["imported"]) == (Stage.SEGMENT, "masks")
    assert result.segmentations == (recipe.id,)
    (lost,) = bench.workspace.artifacts.root.glob("mask/*/*.tif")
    data = lost.read_bytes()
    lost.unlink()
    bench.ingest()
    assert (bench.counts, lost.read_bytes()) == ((1, 0, 1, 0), data)


def test_they_are_measured_like_our_own(bench: Bench) -> None:
    bench.image("A01_1.tif")
    bench.save("A01_1_cp_masks.tif")
    (recipe,) = bench.ingest().segmentations
    assert measure(bench.workspace).cells == 4  # as the segmentation that was made last
    assert measure(bench.workspace, segmentation=str(recipe)).done == 0
    pixels = tifffile.imread(bench.images / "P1" / "A01_1.tif")
    assert_measured(bench.workspace, MASKS, pixels)


def assert_measured(workspace: Workspace, masks: NDArray[Any], pixels: NDArray[Any]) -> None:
    """The table ``features`` holds what scikit-image says of each label."""
    with workspace.database.read() as session:
        query = select(Cell.object_number, CellFeatures).join(Cell, Cell.id == CellFeatures.cell_id)
        found = {row.object_number: row.CellFeatures for row in session.execute(query)}
    regions = regionprops(masks.astype(np.int64), intensity_image=pixels.astype(np.float32))
    assert sorted(found) == [region.label for region in regions]
    for region in regions:
        for feature in BASIC_GROUP.features:
            name, _, axis = feature.source.rsplit(" ", 1)[1].partition("-")
            wanted = region[name][int(axis)] if axis else region[name]
            got = getattr(found[region.label], feature.name)
            assert got == pytest.approx(wanted, rel=1e-12, abs=1e-12), (region.label, feature.name)


@pytest.mark.each_database
def test_the_same_masks_again_change_nothing(bench: Bench) -> None:
    bench.image("A01_1.tif")
    bench.save("A01_1_cp_masks.tif")
    first = bench.ingest()
    again = bench.ingest()
    assert (bench.counts, again.cells, again.segmentations) == (
        (1, 0, 1, 0),
        0,
        first.segmentations,
    )
    assert (bench.count(Segmentation), bench.count(Cell), bench.count(Artifact)) == (1, 4, 1)


def test_other_masks_need_another_name(bench: Bench) -> None:
    bench.image("A01_1.tif")
    bench.save("A01_1_cp_masks.tif")
    bench.ingest()
    bench.save("A01_1_cp_masks.tif", MASKS[::-1])
    bench.ingest()
    assert (bench.counts, bench.refusals()) == (
        (1, 0, 0, 1),
        [("A01_1_cp_masks.tif", "other masks are there")],
    )
    bench.ingest(name="by hand")
    assert bench.counts == (1, 1, 0, 0)
    assert (bench.count(Segmentation), bench.count(Recipe)) == (2, 2 + 3)  # three ingest runs


def test_a_changed_image_gets_new_masks_under_the_same_name(bench: Bench) -> None:
    image = bench.image("A01_1.tif")
    bench.save("A01_1_cp_masks.tif")
    bench.ingest()
    with bench.workspace.database.begin() as session:
        session.get_one(Image, image.id).content_sha256 = "f" * 64
    bench.save("A01_1_cp_masks.tif", MASKS[::-1])
    bench.ingest()
    assert bench.counts == (1, 1, 0, 0)
    assert bench.count(Segmentation) == 2


def test_masks_of_an_image_whose_files_are_elsewhere(bench: Bench) -> None:
    plate = bench.make.plate("P1")
    bench.make.image(bench.make.well(plate, 1, 1), missing=True)
    bench.save("r01c01f01.tif")
    bench.ingest()
    assert bench.counts == (1, 1, 0, 0)
    with bench.workspace.database.read() as session:
        assert session.scalars(select(Segmentation)).one().content_sha256 is None
    bench.ingest()
    assert bench.counts == (1, 0, 1, 0)


def test_each_kind_of_objects_is_a_set_of_its_own(bench: Bench) -> None:
    bench.image("B7_01_1_3_DAPI_001.tif")
    bench.save("B7_01_1_3_DAPI_001_MaskNuclei.tiff")
    bench.save("B7_01_1_3_DAPI_001_MaskCells.tiff", MASKS[::-1])
    assert len(bench.ingest().segmentations) == 2
    with bench.workspace.database.read() as session:
        recipes = session.scalars(select(Recipe).where(Recipe.stage == Stage.SEGMENT))
        assert {recipe.parameters["objects"] for recipe in recipes} == {"nuclei", "cells"}


def test_black_and_white_masks_are_refused_unless_asked_for(bench: Bench) -> None:
    bench.image("a.tif")
    bench.image("b.tif")
    bench.save("a_mask.tif", np.where(MASKS > 0, 255, 0).astype(np.uint8))
    bench.save("b_mask.tif", (MASKS > 0).astype(np.uint8))  # one label, in several parts
    bench.ingest()
    assert bench.counts == (2, 0, 0, 2)
    assert all("--binary-masks" in issue.detail for issue in bench.issues())
    result = bench.ingest(binary=True)
    # The two that touch have become one object.
    assert (bench.counts, result.cells) == ((2, 2, 0, 0), 6)
    with bench.workspace.database.read() as session:
        recipe = session.scalars(select(Recipe).where(Recipe.stage == Stage.SEGMENT)).one()
    assert recipe.parameters["binary"] is True


def test_a_label_in_several_pieces_is_kept_and_noticed(bench: Bench) -> None:
    bench.image("a.tif")
    bench.save("a_mask.tif", labels_of((5, 1, 1, 4, 4), (5, 10, 10, 14, 14), (6, 1, 20, 4, 24)))
    assert bench.ingest().cells == 2
    (issue,) = bench.issues()
    assert (issue.severity, issue.detail) == (Severity.SUSPICIOUS, "1 of 2 labels: 5")


def test_every_file_is_accounted_for(bench: Bench) -> None:
    for name in ("a.tif", "b.tif", "c.tif"):
        bench.image(name)
    bench.save("a_mask.tif")
    bench.save("b_mask.tif", MASKS[:5])
    (bench.masks / "c_mask.png").write_bytes(b"nothing")
    bench.save("d_mask.tif")
    bench.image("e.tif")
    huge = bench.save("e_mask.tif", MASKS)
    with tifffile.TiffFile(huge, mode="r+") as tiff:
        tiff.pages.first.tags["ImageLength"].overwrite(1 << 30)
    (bench.masks / "c_seg.npy").write_bytes(b"\x80pickle")
    bench.ingest()
    assert bench.counts == (5, 1, 0, 4)
    assert bench.refusals() == [
        ("b_mask.tif", "another shape than the image"),
        ("c_mask.png", "not a label image"),
        ("d_mask.tif", "no such image"),
        ("e_mask.tif", "not a label image"),
    ]


def test_an_image_is_not_taken_for_its_own_masks(bench: Bench) -> None:
    bench.image("a.tif")
    shutil.copy(bench.images / "P1" / "a.tif", bench.masks / "a.tif")
    bench.ingest()
    assert bench.refusals() == [("a.tif", "this is an image")]


def test_a_dry_run_refuses_other_masks_of_the_same_image(bench: Bench) -> None:
    bench.image("a.tif")
    bench.save("a_label.tif")
    bench.save("a_mask.tif", MASKS[::-1])
    found = ingest(bench.workspace, bench.masks, IngestParams(kind="masks"), dry_run=True)
    assert (found.created, found.refused) == (1, 1)
    assert found.issues[0].reason == "other masks are there"


def test_a_dry_run_of_masks_shows_their_images(bench: Bench) -> None:
    bench.image("a.tif", plane=2, time_point=3)
    bench.save("a_MaskNuclei.tif")
    bench.save("x_mask.tif")
    params = IngestParams(kind="masks")
    found = ingest(bench.workspace, bench.masks, params, dry_run=True)
    assert (found.layout, found.rows, found.created, found.refused) == ("masks", 2, 1, 1)
    (row,) = found.preview
    assert tuple(row.values()) == ("a_MaskNuclei.tif", "P1", "A01", 1, 2, 3, "nuclei", 4)
    assert [(issue.file, issue.reason) for issue in found.issues] == [
        ("x_mask.tif", "no such image")
    ]
    assert (bench.count(Segmentation), bench.count(IngestIssue)) == (0, 0)


def test_the_plates_of_the_images_are_told(bench: Bench) -> None:
    bench.image("a.tif")
    bench.image("b.tif", "P2")
    bench.image("c.tif", "P3")
    for name in ("b_mask.tif", "a_mask.tif", "x_mask.tif"):
        bench.save(name)
    plates = (bench.plates["P1"].id, bench.plates["P2"].id)
    assert tuple(bench.ingest().plates) == plates
    assert tuple(bench.ingest().plates) == plates


def test_core_file_names_find_their_field(bench: Bench) -> None:
    bench.image("r01c01f01p01-ch1sk1fk1fl1.tif", core_name="r01c01f01")
    for number, name in enumerate(
        (
            "r01c01f01p01-ch5sk1fk1fl1_cp_masks.tif",  # the file of another channel of the field
            "r01c01f01_cp_masks.tif",
            "R01C01F01.tif",
        )
    ):
        bench.save(name)
        bench.ingest(name=f"set {number}")
        assert bench.counts == (1, 1, 0, 0)
        (bench.masks / name).unlink()


def test_the_plane_of_a_name_decides_between_planes(bench: Bench) -> None:
    plate = bench.make.plate("P1")
    well = bench.make.well(plate, 1, 1)
    images = [bench.make.image(well, 1, plane=plane, missing=True) for plane in (1, 2)]
    bench.save("r01c01f01p02-ch1sk1fk1fl1_mask.tif")
    bench.save("r01c01f01_mask.tif")
    bench.ingest()
    assert bench.refusals() == [("r01c01f01_mask.tif", "several images have this name")]
    with bench.workspace.database.read() as session:
        assert session.scalars(select(Segmentation.image_id)).all() == [images[1].id]


def test_names_that_several_plates_have(bench: Bench) -> None:
    for plate in ("P1", "P2"):
        bench.image("a.tif", plate)
    bench.save("a_mask.tif")
    bench.ingest()
    assert bench.refusals() == [("a_mask.tif", "several images have this name")]
    assert "P1/A01/1, P2/A02/1" in bench.issues()[0].detail
    bench.ingest(plate="P2")
    assert bench.counts == (1, 1, 0, 0)
    with pytest.raises(UnknownNameError, match="plate 'P9'"):
        bench.ingest(plate="P9")


def test_a_folder_named_like_a_plate_decides(bench: Bench) -> None:
    images = {plate: bench.image("a.tif", plate) for plate in ("P1", "P2")}
    bench.save("P2__2021-05-02T12_00/Images/a_mask.tif")
    bench.ingest()
    with bench.workspace.database.read() as session:
        assert session.scalars(select(Segmentation.image_id)).all() == [images["P2"].id]


def test_a_folder_of_a_plate_without_that_image_is_no_reason_to_take_another(bench: Bench) -> None:
    bench.image("a.tif", "P1")
    bench.image("b.tif", "P2")
    bench.save("P2/a_mask.tif")
    bench.ingest()
    assert bench.refusals() == [("P2/a_mask.tif", "no such image")]


def test_masks_beside_their_images(bench: Bench) -> None:
    images = {plate: bench.image("a.tif", plate) for plate in ("one", "two")}
    with bench.workspace.database.begin() as session:  # folders are no longer named like plates
        for plate in session.scalars(select(Plate)):
            plate.barcode = f"BR-{plate.barcode}"
    bench.masks = bench.images
    tifffile.imwrite(bench.images / "two" / "a_cp_masks.tif", MASKS)
    bench.ingest()
    assert bench.counts == (1, 1, 0, 0)
    with bench.workspace.database.read() as session:
        assert session.scalars(select(Segmentation.image_id)).all() == [images["two"].id]


def test_the_plane_that_is_measured_can_be_named(bench: Bench) -> None:
    bench.image("a.tif")
    bench.save("a_mask.tif")
    (recipe,) = bench.ingest(channels=(("DNA", "DNA"),)).segmentations
    assert measure(bench.workspace, segmentation=str(recipe)).cells == 4
    with pytest.raises(UnknownNameError, match="channel"):
        bench.ingest(channels=(("Mito", "Mito"),))


def test_names_of_sets_are_checked(bench: Bench) -> None:
    bench.image("a.tif")
    bench.save("a_mask.tif")
    for name in ("", "x" * 101, "a\nb"):
        with pytest.raises(UserInputError, match="name of 1 to 100"):
            bench.ingest(name=name)


def test_a_file_name_that_is_no_text_is_refused_like_any_other(bench: Bench) -> None:
    bench.image("a.tif")
    odd = bench.masks / b"\xff_mask.tif".decode("utf-8", "surrogateescape")
    try:
        tifffile.imwrite(odd, MASKS)
    except OSError:
        pytest.skip("this file system takes no such names")
    bench.ingest()
    assert bench.refusals() == [("?_mask.tif", "no such image")]


def test_a_damaged_file_whose_folder_is_no_text_is_refused(bench: Bench) -> None:
    bench.image("a.tif")
    folder = bench.masks / os.fsdecode(b"\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes no such names")
    (folder / "a_mask.tif").write_bytes(b"II*")
    bench.ingest()
    assert bench.refusals() == [("?/a_mask.tif", "not a label image")]


@pytest.mark.real
def test_real_masks_of_stardist_measure_like_scikit_image(bench: Bench) -> None:
    pixels = tifffile.imread(real_data("stardist/img2d.tif"))
    masks = tifffile.imread(real_data("stardist/mask2d.tif"))
    bench.image("img2d.tif", pixels=pixels)
    bench.save("img2d_label.tif", masks)
    assert bench.ingest().cells == 125
    (recipe,) = bench.ingest().segmentations
    assert measure(bench.workspace, segmentation=str(recipe)).cells == 125
    assert_measured(bench.workspace, masks, pixels)
