"""What is fitted plate by plate: on the training side, else on what is on the plate itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from factories import Factory
from small_training import Opener, pixels
from sqlalchemy import select, update

from cellstore.config import ImageInput
from cellstore.enums import Stage, Subset
from cellstore.errors import ImageError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.learn.normalising import (
    Scale,
    Scaler,
    add_plates,
    describe_plates,
    fit_inputs,
    plates_of,
)
from cellstore.models import Cell, FeatureSet, Image, ImageFile, Recipe, SplitMember, Well
from cellstore.query.cells import CellSource, list_blocks
from cellstore.query.feature_files import open_set

pytestmark = pytest.mark.one_database

VALUES = {
    # plate, well: treatment, side, the value of each cell
    ("P1", 1): ("DMSO", Subset.TRAIN, (1.0, 3.0)),
    ("P1", 2): ("drug", Subset.TRAIN, (5.0, 7.0)),
    ("P1", 3): ("DMSO", Subset.TEST, (100.0, 900.0)),
    ("P2", 1): ("DMSO", Subset.VALIDATION, (10.0, 30.0)),
    ("P2", 2): ("drug", Subset.VALIDATION, (40.0, 50.0)),
    ("P3", 1): ("drug", None, (1.0, 2.0)),
    ("P4", 1): ("DMSO", None, (6.0, 8.0)),
}


@dataclass(frozen=True)
class Plates:
    """A store of :data:`VALUES`, its split, and the recipe of its cells."""

    workspace: Workspace
    segment: Recipe
    split_id: int
    measured: FeatureSet

    def source(self) -> CellSource:
        with self.workspace.database.read() as session:
            features = open_set(session, self.workspace.artifacts, self.measured.recipe_id)
        return CellSource(
            self.segment.id, self.measured.recipe_id, self.split_id, features=features
        )


@pytest.fixture
def plates(workspace: Workspace) -> Plates:
    make = Factory(workspace)
    treatments = {name: make.treatment(name) for name in ("DMSO", "drug")}
    labels = {name: make.label(name) for name in treatments}
    barcodes = {name: make.plate(name) for name in sorted({name for name, _ in VALUES})}
    run = make.run(Stage.SEGMENT)
    members, cells, values = [], [], []
    for (barcode, column), (name, side, numbers) in VALUES.items():
        image = make.image(make.well(barcodes[barcode], 1, column, treatments[name]))
        segmentation = make.segmentation(image, run, len(numbers))
        cells += make.cells_of(segmentation)
        values += numbers
        if side is not None:
            members.append((image, side, labels[name]))
    with workspace.database.read() as session:
        segment = session.get_one(Recipe, run.recipe_id)
    measured = make.feature_files("set", cells, {"x": values}, segment)
    return Plates(workspace, segment, make.split(members).id, measured)


@pytest.mark.each_database
def test_controls_of_the_training_side_count_and_those_of_plates_that_are_not_in_it(
    plates: Plates,
) -> None:
    source, database = plates.source(), plates.workspace.database
    with database.read() as session:
        scaler = fit_inputs(session, database, source, "plate-controls", (), (Subset.VALIDATION,))
        more = add_plates(session, database, source, (), scaler, ["P4"])
    # P1: 1 and 3, not the test wells 100 and 900; P2, only in validation: its own, 10 and 30.
    assert more.plates == {
        "P1": Scale((2.0,), (1.0,), 2),
        "P2": Scale((20.0,), (10.0,), 2),
        "P4": Scale((7.0,), (1.0,), 2),
    }
    assert (scaler.own, more.own) == (("P2",), ("P2", "P4"))
    # What comes out is scaled as the training side is: -1, 1, 3 and 5 have mean 2.
    assert (scaler.mean, scaler.scale) == ((2.0,), (pytest.approx(5**0.5),))
    assert more.transform([[50.0]], "P2") == pytest.approx((3 - 2) / 5**0.5)
    (note,) = describe_plates(more)
    assert note.endswith("are normalised against their own negative controls: P2, P4.")
    assert describe_plates(Scaler()) == []


def test_a_selection_says_what_is_learned_from_and_all_controls_how_a_plate_looks(
    plates: Plates,
) -> None:
    source, database = plates.source(), plates.workspace.database
    with database.read() as session:
        ids = session.scalars(select(Cell.id).order_by(Cell.id)).all()
        values = [value for _, _, some in VALUES.values() for value in some]
        bits = np.zeros(ids[-1] + 1, dtype=bool)
        bits[[i for i, value in zip(ids, values, strict=True) if value in (5, 7, 40, 50)]] = True
        chosen = replace(source, chosen=np.packbits(bits, bitorder="little").tobytes())
        scaler = fit_inputs(session, database, chosen, "plate-controls", (), (Subset.VALIDATION,))
        plain = fit_inputs(session, database, chosen, "train")
        assert {block.n_cells for block in list_blocks(session, chosen)} == {2}
        assert len(list_blocks(session, chosen)) == 2
    assert scaler.plates == {"P1": Scale((2.0,), (1.0,), 2), "P2": Scale((20.0,), (10.0,), 2)}
    assert (scaler.mean, scaler.scale) == ((4.0,), (1.0,))  # 5 and 7 are 3 and 5 on P1
    assert (plain.mean, plain.scale) == ((6.0,), (1.0,))


def test_a_plate_without_controls_is_named(plates: Plates) -> None:
    source, database = plates.source(), plates.workspace.database
    with database.begin() as session:
        scaler = fit_inputs(session, database, source, "plate-controls")
        with pytest.raises(UserInputError, match="'P3' has 0 measured cells of neg"):
            add_plates(session, database, source, (), scaler, ["P3"])
        session.execute(update(Well).values(control=None))
        with pytest.raises(UserInputError, match=r"'P1' has 0 .* in the training subset.* negcon"):
            fit_inputs(session, database, source, "plate-controls")


def test_the_usual_scaler_knows_no_plates(plates: Plates) -> None:
    database = plates.workspace.database
    with database.read() as session:
        scaler = fit_inputs(session, database, plates.source(), "train")
        assert plates_of(session, plates.source()) == ["P1", "P2"]
    assert scaler == Scaler(("x",), (4.0,), (5**0.5,), gaps=True)


PLANES = (ImageInput(), ImageInput(("DNA",)))
NO_PLATES = Scaler(intensities={})


@pytest.fixture
def store(built: Path, opened: Opener) -> tuple[Workspace, CellSource]:
    """The small store on SQLite, whose images have pixels."""
    workspace = opened(built)
    with workspace.database.read() as session:
        split_id = session.scalars(select(SplitMember.split_id)).first()
        segment, measure = session.scalars(select(Recipe.id).order_by(Recipe.id).limit(2)).all()
    return workspace, CellSource(segment, measure, split_id)


def bright(index: int) -> float:
    return float(np.percentile(pixels(index), 99.9))


def test_the_intensity_scale_of_a_plate_comes_from_its_training_images(
    store: tuple[Workspace, CellSource],
) -> None:
    workspace, source = store
    with workspace.database.read() as session:
        side = select(SplitMember.image_id).where(SplitMember.subset == Subset.TRAIN)
        named = session.scalars(select(Image.core_name).where(Image.id.in_(side))).all()
        database, also = workspace.database, (Subset.VALIDATION,)
        scale = fit_inputs(session, database, source, None, PLANES, also)
        more = add_plates(session, database, source, PLANES, NO_PLATES, ["P1"])
    training = [int(name[4:6]) - 1 for name in named]
    assert 0 < len(training) < 6
    expected = np.median([bright(index) for index in training])
    assert scale.intensities == {"P1": (expected, expected)}
    assert scale.own == ()
    everything = np.median([bright(index) for index in range(6)])
    assert more.intensities == {"P1": (everything, everything)}
    (note,) = describe_plates(more)
    assert note.endswith("have the intensity scale of their own images: P1.")


def test_images_that_cannot_be_read_do_not_count(
    store: tuple[Workspace, CellSource],
) -> None:
    workspace, source = store
    source = replace(source, split_id=None)
    with workspace.database.begin() as session:
        session.execute(update(ImageFile).where(ImageFile.image_id != 3).values(sha256=None))
    nothing = fit_of(workspace, source)
    assert nothing.intensities["P1"][0] == bright(2)
    with workspace.database.begin() as session:
        session.execute(update(ImageFile).values(sha256=None))
    with pytest.raises(ImageError, match="No image of plate 'P1' can be read"):
        fit_of(workspace, source)


def fit_of(workspace: Workspace, source: CellSource) -> Scaler:
    with workspace.database.read() as session:
        return add_plates(session, workspace.database, source, PLANES[:1], NO_PLATES, ["P1"])
