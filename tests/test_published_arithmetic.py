"""A small store whose every number is worked out by hand, as fractions.

Two plates, six compounds, seven test images of six wells. Each cell gives each compound some
32nds; a letter stands for a kind of cell. The split goes by image, as that of the published study,
and a field of well P1/A03 is on the training subset.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from math import log

import pytest
from factories import Factory
from scipy import stats
from sqlalchemy import select, update

from cellstore.config import VoteOptions
from cellstore.enums import GroupLevel, Stage, Subset
from cellstore.jobs.workspace import Workspace
from cellstore.models import Image, Label, Plate, Run, Treatment, Well
from cellstore.report.comparison import compare
from cellstore.report.scoring import report

TARGETS = {
    "DMSO": None,
    "alpha": "G1",
    "beta": "G1|G3",
    "delta": None,
    "epsilon": "G4",
    "gamma": "G2",
}
CELLS = {
    "D": {"DMSO": 16, "alpha": 8, "beta": 2, "delta": 2, "epsilon": 2, "gamma": 2},
    "a": {"alpha": 16, "beta": 8, "DMSO": 2, "delta": 2, "epsilon": 2, "gamma": 2},
    "w": {"alpha": 12, "beta": 10, "gamma": 4, "DMSO": 2, "delta": 2, "epsilon": 2},
    "b": {"beta": 16, "alpha": 8, "DMSO": 2, "delta": 2, "epsilon": 2, "gamma": 2},
    "g": {"gamma": 16, "beta": 8, "DMSO": 2, "alpha": 2, "delta": 2, "epsilon": 2},
    "x": {"DMSO": 12, "alpha": 8, "gamma": 5, "delta": 4, "epsilon": 2, "beta": 1},
}
"""What a kind of cell gives to the compounds, in 32nds, first choice first."""

IMAGES = {
    # name: plate, column, site, truth, cells
    "I1": ("P1", 1, 1, "DMSO", "DDa"),
    "I2": ("P1", 2, 1, "alpha", "ab"),
    "I3": ("P1", 2, 2, "alpha", "bba"),
    "I4": ("P1", 3, 1, "beta", "b"),
    "I5": ("P2", 1, 1, "alpha", "wwb"),
    "I6": ("P2", 2, 1, "gamma", "ga"),
    "I7": ("P2", 3, 1, "beta", "x"),
}
SECOND = {
    "I1": "DMSO",
    "I2": "beta",
    "I3": "alpha",
    "I4": "alpha",
    "I5": "gamma",
    "I6": "alpha",
    "I7": "DMSO",
}
"""What all cells of an image say by the second run, which keeps first choices only."""

# Votes of I1 to I7.
#   hard    DMSO 2:1 | alpha = beta, 1:1, both 24/32: alpha by the alphabet | beta 2:1 | beta
#           | alpha 2:1 | gamma = alpha, 1:1, both 18/32: alpha by the alphabet | DMSO
#   soft    DMSO 34:32 | alpha = beta, 24:24 | beta 40:32 | beta | beta 36:32 | gamma = alpha, 18:18
#           | DMSO
#   median  DMSO 16:8 | alpha = beta, 12:12 | beta 16:8 | beta | alpha 12:10 | gamma = alpha, 9:9
#           | DMSO
# So hard and median are right in I1, I2, I4, I5 and soft in I1, I2, I4.


@dataclass(frozen=True)
class Screen:
    """What :func:`made` made."""

    workspace: Workspace
    images: dict[str, Image]
    first: Run
    second: Run


@pytest.fixture
def screen(sqlite_workspace: Workspace) -> Screen:
    return made(sqlite_workspace)


def made(workspace: Workspace, field: str = "perturbation") -> Screen:
    """The store of this test, with two predict runs."""
    make = Factory(workspace)
    labels = {name: make.label(name) for name in TARGETS}
    treatments = {name: make.treatment(name, gene) for name, gene in TARGETS.items()}
    plates = {name: make.plate(name) for name in ("P1", "P2")}
    wells: dict[tuple[str, int], Well] = {}
    images: dict[str, Image] = {}
    for name, (plate, column, site, truth, _) in IMAGES.items():
        if (plate, column) not in wells:
            wells[plate, column] = make.well(plates[plate], 1, column, treatments[truth])
        images[name] = make.image(wells[plate, column], site)
    members = [
        (image, Subset.TEST, labels[truth])
        for (_, _, _, truth, _), image in zip(IMAGES.values(), images.values(), strict=True)
    ]
    members.append((make.image(wells["P1", 3], 2), Subset.TRAIN, labels["beta"]))
    members += _training(make, plates["P2"], treatments, labels)
    split = make.split(members, group_level=GroupLevel.IMAGE, field=field)
    recipes = [make.recipe(Stage.TRAIN, parameters={"epochs": number}) for number in (5, 9)]
    first, second = (
        make.run(
            Stage.PREDICT,
            make.recipe(Stage.PREDICT, parameters={"top_k": kept}, inputs=[recipe]),
            parent_id=make.run(Stage.TRAIN, recipe, split_id=split.id).id,
            split_id=split.id,
        )
        for recipe, kept in zip(recipes, (6, 1), strict=True)
    )
    source = make.run(Stage.SEGMENT)
    for name, (*_, kinds) in IMAGES.items():
        cells = make.cells_of(make.segmentation(images[name], source, len(kinds)))
        said = [[(labels[to], n / 32) for to, n in CELLS[kind].items()] for kind in kinds]
        make.predict(first, cells, said)
        make.predict(second, cells, [[(labels[SECOND[name]], 0.5)]] * len(cells))
    return Screen(workspace, images, first, second)


def _training(
    make: Factory, plate: Plate, treatments: dict[str, Treatment], labels: dict[str, Label]
) -> list[tuple[Image, Subset, Label]]:
    """Two images of DMSO and one of every other compound, in wells of their own."""
    names = ["DMSO", *TARGETS]
    return [
        (make.image(make.well(plate, 2, column, treatments[name])), Subset.TRAIN, labels[name])
        for column, name in enumerate(names, start=1)
    ]


def test_accuracy_ties_and_averages(workspace: Workspace) -> None:
    screen = made(workspace)
    found = report(screen.workspace, str(screen.first.id))
    right = {(item.level, item.vote): Fraction(item.correct, item.n) for item in found.scores}
    assert right == {
        ("image", "hard"): Fraction(4, 7),
        ("image", "soft"): Fraction(3, 7),
        ("image", "median"): Fraction(4, 7),
        # Wells: DMSO | of I2 and I3 together a b b b a: beta 3:2, wrong | beta | alpha 2:1 | tie,
        # wrong | wrong. Soft: beta 64:56, and beta 36:32 in P2/A01, so one less. Median: of
        # (16, 8, 8, 8, 16) and (8, 16, 16, 16, 8) beta; P2/A01 alpha.
        ("well", "hard"): Fraction(3, 6),
        ("well", "soft"): Fraction(2, 6),
        ("well", "median"): Fraction(3, 6),
        # 2 of 3, 1 of 2, 1 of 3, 1 of 1, 2 of 3, 1 of 2, 0 of 1
        ("cell", "hard"): Fraction(8, 15),
    }
    assert {(i.level, i.vote): i.ties for i in found.scores if i.ties} == {
        ("image", "hard"): 2,
        ("image", "soft"): 2,
        ("image", "median"): 2,
        ("well", "hard"): 1,
        ("well", "soft"): 1,
        ("well", "median"): 1,
    }
    hard = found.score("image", "hard")
    assert hard.accuracy == float(Fraction(4, 7))
    # Recall: DMSO 1/1, alpha 2/3, beta 1/2, gamma 0/1.
    assert hard.balanced_accuracy == pytest.approx(float((1 + Fraction(2, 3) + Fraction(1, 2)) / 4))
    # F1: DMSO 2/(1+2), alpha 4/(3+3), beta 2/(2+2), gamma 0/(1+0).
    assert hard.macro_f1 == pytest.approx(
        float((Fraction(2, 3) + Fraction(2, 3) + Fraction(1, 2)) / 4)
    )
    # In training DMSO has 2 images, beta 2, the others one: DMSO by the alphabet.
    assert found.majority_label == "DMSO"
    assert hard.majority == pytest.approx(1 / 7)
    assert found.score("well", "hard").majority == pytest.approx(1 / 6)
    assert found.score("cell", "hard").majority == pytest.approx(3 / 15)


def test_classes(screen: Screen) -> None:
    found = report(screen.workspace, str(screen.first.id))
    columns = ("label", "target", "support", "predicted", "correct", "same_target", "wells")
    assert [tuple(asdict(item)[name] for name in columns) for item in found.by_class] == [
        ("DMSO", None, 1, 2, 1, 0, 1),
        ("alpha", "G1", 3, 3, 2, 1, 2),  # I3 got beta, which shares G1
        ("beta", "G1|G3", 2, 2, 1, 0, 2),
        ("gamma", "G2", 1, 0, 0, 0, 1),
    ]
    ratios = [(item.recall, item.precision, item.f1) for item in found.by_class]
    assert ratios == [
        (1, Fraction(1, 2), float(Fraction(2, 3))),
        (float(Fraction(2, 3)), float(Fraction(2, 3)), float(Fraction(2, 3))),
        (Fraction(1, 2), Fraction(1, 2), Fraction(1, 2)),
        (0, None, 0),
    ]
    assert all(item.low is None for item in found.by_class)  # fewer than six wells
    assert any(
        note.startswith(
            "4 of 4 classes have fewer than 6 wells here, 2 of them one well only (DMSO, gamma)"
        )
        for note in found.notes
    )


def test_plates_targets_and_wells(screen: Screen) -> None:
    found = report(screen.workspace, str(screen.first.id))
    columns = ("name", "n", "correct", "same_target", "wells", "labels")
    assert [tuple(asdict(item)[name] for name in columns) for item in found.by_plate] == [
        ("P1", 4, 3, 1, 3, 3),  # I1, I2, I4; I3 got another compound of its gene
        ("P2", 3, 1, 0, 3, 3),  # I5
    ]
    assert [tuple(asdict(item)[name] for name in columns) for item in found.by_target] == [
        ("G1", 5, 3, 1, 4, 2),  # alpha and beta: I2, I4, I5 of five
        ("G2", 1, 0, 0, 1, 1),
        ("G3", 2, 1, 0, 2, 1),  # beta, once more
    ]
    assert [tuple(asdict(item).values()) for item in found.by_well] == [
        ("P1", "A01", "DMSO", "DMSO", 1, 1, False),
        ("P1", "A02", "alpha", "beta", 2, 1, False),
        ("P1", "A03", "beta", "beta", 1, 1, True),
        ("P2", "A01", "alpha", "alpha", 1, 1, False),
        ("P2", "A02", "gamma", "alpha", 1, 0, False),
        ("P2", "A03", "beta", "DMSO", 1, 0, False),
    ]


@pytest.mark.parametrize("field", ["perturbation", "treatment"])
def test_doses_of_one_class_are_scored_apart(sqlite_workspace: Workspace, field: str) -> None:
    screen = made(sqlite_workspace, field)
    assert report(screen.workspace, str(screen.first.id)).by_dose == ()
    make = Factory(screen.workspace)
    doses = {"P1": make.doses(("alpha", 2.0)), "P2": make.doses(("alpha", 10.0))}
    with screen.workspace.database.begin() as session:
        for plate, column in (("P1", 2), ("P2", 1)):
            of_plate = select(Plate.id).where(Plate.barcode == plate).scalar_subquery()
            here = (Well.plate_id == of_plate, Well.well_column == column)
            session.execute(update(Well).where(*here).values(treatment_id=doses[plate].id))
    found = report(screen.workspace, str(screen.first.id))
    columns = ("name", "n", "correct", "same_target", "wells", "labels")
    by_dose = [tuple(asdict(item)[name] for name in columns) for item in found.by_dose]
    apart = [
        ("alpha 2 uM", 2, 1, 1, 1, 1),  # I2 right, I3 got beta, which shares G1
        ("alpha 10 uM", 1, 1, 0, 1, 1),
    ]
    assert by_dose == (apart if field == "perturbation" else [])  # else the classes have the dose


def test_probabilities(screen: Screen) -> None:
    found = report(screen.workspace, str(screen.first.id))
    # The truth got, in 32nds: 16 16 2 | 16 8 | 8 8 16 | 16 | 12 12 8 | 16 2 | 1. As -log2: 6, 3, 5,
    # 1, twice log2(32/12) = 3 - log2(3), and 2, then 5 and 5: 33 - 2 log2(3) of 15 cells.
    cell = found.score("cell", "hard")
    assert cell.log_loss == pytest.approx((33 * log(2) - 2 * log(3)) / 15)
    # Means over cells: 34/96, 24/64, 32/96, 16/32, 32/96, 18/64, 1/32.
    means = (
        Fraction(17, 48),
        Fraction(3, 8),
        Fraction(1, 3),
        Fraction(1, 2),
        Fraction(1, 3),
        Fraction(9, 32),
        Fraction(1, 32),
    )
    soft = found.score("image", "soft")
    assert soft.log_loss == pytest.approx(-sum(log(item) for item in means) / 7)
    # beta is the last of six choices in I7, everywhere else the truth is among the first five.
    assert soft.top_5 == pytest.approx(6 / 7)
    # Of cells also in the a of I6: gamma is the last of four equals, in the order that was kept.
    assert cell.top_5 == pytest.approx(13 / 15)
    # Hard: 1/2 of the cells in I2 and I6, one of two right; 2/3 in I1, I3, I5, two of three right;
    # all in I4 and I7, one of two right: only there confidence and accuracy differ, by a half.
    assert found.score("image", "hard").ece == pytest.approx(float(Fraction(2, 7) * Fraction(1, 2)))
    assert found.score("image", "hard").log_loss is None
    bins = [item for item in found.calibration if item.level == "cell"]
    by_confidence = {round(32 * item.confidence): (item.n, item.accuracy) for item in bins}
    # 16/32: I1 2 of 3, I2 1 of 2, I3 1 of 3, I4 1 of 1, the b of I5 0 of 1, I6 1 of 2: 6 of 12.
    # 12/32: both w of I5 right, the x of I7 wrong: 2 of 3.
    assert by_confidence == {16: (12, Fraction(1, 2)), 12: (3, pytest.approx(2 / 3))}
    # |1/2 - 1/2| * 12/15 + |2/3 - 3/8| * 3/15
    assert cell.ece == pytest.approx(float((Fraction(2, 3) - Fraction(3, 8)) * Fraction(3, 15)))


def test_the_interval_is_that_of_as_many_independent_images(screen: Screen) -> None:
    hard = report(screen.workspace, str(screen.first.id)).score("image", "hard")
    # Right of images per well: 1/1, 1/2, 1/1, 1/1, 0/1, 0/1, so 4/7 of 7; an image is in a well of
    # 9/7 on average. Wells are not further apart than images by chance: 6/5 of the squares 60/49 is
    # less than 7 * 4/7 * 3/7, so r = 0. Wrong images are in three wells: r = (3 * 0 + 1) / 4.
    worth = Fraction(7) / (1 + (Fraction(9, 7) - 1) * Fraction(1, 4))
    assert worth == Fraction(98, 15)
    right, wrong = float(worth * 4 / 7), float(worth * 3 / 7)
    assert hard.low == pytest.approx(stats.beta.ppf(0.025, right, wrong + 1))
    assert hard.high == pytest.approx(stats.beta.ppf(0.975, right + 1, wrong))


def test_wells_seen_in_training_and_controls_are_told_apart(screen: Screen) -> None:
    found = report(screen.workspace, str(screen.first.id))
    assert (found.wells, found.wells_seen, found.leaks) == (6, 1, True)
    unseen = next(i for i in found.unseen if (i.level, i.vote) == ("image", "hard"))
    assert Fraction(unseen.correct, unseen.n) == Fraction(3, 6)  # without I4
    # DMSO 1/1, alpha 2/3, beta 0/1, gamma 0/1
    assert unseen.balanced_accuracy == pytest.approx(float((1 + Fraction(2, 3)) / 4))
    without = report(
        screen.workspace, str(screen.first.id), vote_options=VoteOptions(controls=False)
    )
    treated = without.score("image", "hard")
    assert Fraction(treated.correct, treated.n) == Fraction(3, 6)  # without I1
    assert treated.balanced_accuracy == pytest.approx(float((Fraction(2, 3) + Fraction(1, 2)) / 3))
    assert {item.label for item in without.by_class if item.support} == {"alpha", "beta", "gamma"}


def test_few_cells_and_close_votes_abstain(screen: Screen) -> None:
    run = str(screen.first.id)
    few = report(screen.workspace, run, vote_options=VoteOptions(min_cells=2)).score(
        "image", "hard"
    )
    # I4 and I7 have a single cell; of the others I1, I2, I5 are right.
    assert (few.n, few.correct, few.abstained, few.coverage) == (5, 3, 2, 5 / 7)
    close = report(screen.workspace, run, vote_options=VoteOptions(min_margin=0.4))
    hard = close.score("image", "hard")
    # The winner leads by 1/3, 0, 1/3, 1, 1/3, 0 and 1: I4 and I7 are left, one of them right.
    assert (hard.n, hard.correct, hard.abstained) == (2, 1, 5)
    assert [(item.label, item.support, item.abstained) for item in close.by_class] == [
        ("DMSO", 0, 1),
        ("alpha", 0, 3),
        ("beta", 2, 0),
        ("gamma", 0, 1),
    ]
    assert (close.images, close.by_plate[0].n, close.by_plate[0].abstained) == (7, 1, 3)


def test_two_runs(screen: Screen) -> None:
    first, second = str(screen.first.id), str(screen.second.id)
    found = compare(screen.workspace, first, second)
    # First right: I1, I2, I4, I5. Second right: I1, I3.
    assert (found.n, found.wells) == (7, 6)
    assert (found.both_right, found.only_first, found.only_second, found.both_wrong) == (1, 3, 1, 2)
    assert (found.first.correct, found.second.correct) == (4, 2)
    assert found.difference == pytest.approx(2 / 7)
    assert found.same == 3  # I1, and both say alpha of I6 and DMSO of I7
    # Wells: P1/A02 has one for each run and no voice; P1/A03 and P2/A01 speak for the first.
    # p = 2 * 1 / 2**2
    test = found.test
    assert (test.wells_first, test.wells_second, test.p_value) == (2, 0, 0.5)
    assert found.better is None
    assert [
        (item.name, item.truth, item.first, item.second, item.right) for item in found.differing
    ] == [
        ("P1/A02/1", "alpha", "alpha", "beta", "first"),
        ("P1/A02/2", "alpha", "beta", "alpha", "second"),
        ("P1/A03/1", "beta", "beta", "alpha", "first"),
        ("P2/A01/1", "alpha", "alpha", "gamma", "first"),
    ]
    assert [(item.what, item.first, item.second) for item in found.recipes] == [
        ("predict.top_k", "6", "1"),
        ("train.epochs", "5", "9"),
    ]
    assert found.warnings == ("Both runs had seen 1 of these wells in training.",)
    other = compare(screen.workspace, second, first, limit=1)
    assert (other.only_first, other.only_second, other.difference) == (1, 3, -found.difference)
    assert (len(other.differing), other.n_differing) == (1, 4)
    beside = report(screen.workspace, first, compare=second).comparison
    assert beside == found


def test_what_was_not_kept_is_not_guessed(screen: Screen) -> None:
    found = report(screen.workspace, str(screen.second.id))
    cell = found.score("cell", "hard")
    assert (cell.log_loss, cell.top_5) == (None, None)
    # The truth got no probability in all cells but those of I1 and I3: 3 + 3 of 15.
    assert found.score("image", "soft").log_loss is None
    (missing,) = (note for note in found.notes if note.startswith("No log loss"))
    assert "9 of 15 cells" in missing
    assert "--all-probabilities" in missing
