"""Reports: numbers worked out by hand, and a page with its pictures; see test_report_page.py."""

from __future__ import annotations

import json
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from factories import Factory
from screens import SmallScreen, small_screen
from sqlalchemy import update
from unguarded import unguarded

from cellstore import settings
from cellstore.config import VoteOptions
from cellstore.enums import ArtifactKind, GroupLevel, Stage, Status, Subset
from cellstore.errors import MissingExtraError, StorageError, UnknownNameError, UserInputError
from cellstore.io.image_files import encode_tiff
from cellstore.jobs.runs import keep_files
from cellstore.jobs.workspace import Workspace
from cellstore.models import ImageFile, Segmentation, SplitMember, Well
from cellstore.report.drawing import plate_layout
from cellstore.report.scoring import report
from cellstore.store import Store


def move(screen: SmallScreen, wells: str, side: Subset) -> None:
    """Put the images of wells on another side of the split."""
    ids = [screen.images[name].id for name in wells.split()]
    with unguarded(screen.factory.workspace) as session:
        session.execute(
            update(SplitMember).where(SplitMember.image_id.in_(ids)).values(subset=side)
        )


def test_scores_of_the_small_screen(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    found = report(workspace)
    assert (found.run_id, found.train_run_id) == (screen.predict_run.id, screen.train_run.id)
    assert (found.cells, found.images, found.wells, found.classes) == (7, 3, 3, 2)
    assert found.subsets == ("test",)
    hard = found.score("image", "hard")
    assert (hard.n, hard.correct, hard.ties) == (3, 2, 2)
    # taxol right in one of two, DMSO in one of one; F1 2/3 each
    assert hard.balanced_accuracy == pytest.approx(0.75)
    assert hard.macro_f1 == pytest.approx(2 / 3)
    # one DMSO and one taxol image in training: DMSO comes first, and is right once in three
    assert found.majority_label == "DMSO"
    assert hard.majority == pytest.approx(1 / 3)
    # shares 2/3 (right), 1/2 (right), 1/2 (wrong): |2/3 - 1| / 3 + |1 - 1| / 3
    assert hard.ece == pytest.approx(1 / 9)
    assert hard.top_5 is None  # of two classes five are all
    assert found.score("image", "soft").correct == 1
    assert (found.score("cell", "hard").correct, found.score("cell", "hard").n) == (4, 7)
    json.dumps(asdict(found), allow_nan=False)


def test_the_interval_is_over_wells(sqlite_workspace: Workspace) -> None:
    make = Factory(sqlite_workspace)
    label, other = make.label("a"), make.label("b")
    plate, source = make.plate(), make.run(Stage.SEGMENT)
    members, answers = [], []
    for column in range(1, 7):
        well = make.well(plate, 1, column, make.treatment("a"))
        for site in (1, 2):
            image = make.image(well, site)
            members.append((image, Subset.TEST, label))
            answers.append((image, label if column <= 3 else other))
    split = make.split(members)
    run = make.run(Stage.PREDICT, split_id=split.id)
    for image, said in answers:
        cells = make.cells_of(make.segmentation(image, source, 1))
        make.predict(run, cells, [[(said, 0.9)]])
    found = report(sqlite_workspace)
    score = found.score("image", "hard")
    assert score.accuracy == 0.5
    # 3 of 6 wells right, both images of each: binomtest(3, 6) of scipy.
    assert (score.low, score.high) == pytest.approx((0.1181172, 0.8818828), abs=1e-6)
    assert score.majority is None  # nothing was trained on
    assert not any("too few for an interval" in note for note in found.notes)


@pytest.mark.one_database
def test_top_5_needs_more_than_five_classes_and_five_choices(workspace: Workspace) -> None:
    make = Factory(workspace)
    labels = [make.label(name) for name in "abcdefg"]
    well = make.well(make.plate(), 1, 1, make.treatment("g"))
    images = [make.image(well, site) for site in range(1, 8)]
    truths = [labels[4], labels[5], *labels[:4], labels[6]]
    split = make.split(
        [
            (image, Subset.TEST if i < 2 else Subset.TRAIN, truth)
            for i, (image, truth) in enumerate(zip(images, truths, strict=True))
        ],
        group_level=GroupLevel.IMAGE,
    )
    run = make.run(
        Stage.PREDICT, make.recipe(Stage.PREDICT, parameters={"top_k": 7}), split_id=split.id
    )
    source = make.run(Stage.SEGMENT)
    ranked = [(label, 0.5 / 2**rank) for rank, label in enumerate(labels)]
    for image in images[:2]:
        make.predict(run, make.cells_of(make.segmentation(image, source, 1)), [ranked])
    found = report(workspace)
    assert {score.top_5 for score in found.scores if score.level != "well"} == {0.5}
    assert found.score("image", "hard").low is None  # a single well
    few = make.run(
        Stage.PREDICT, make.recipe(Stage.PREDICT, parameters={"top_k": 3}), split_id=split.id
    )
    make.predict(
        few, make.cells_of(make.segmentation(images[0], make.run(Stage.SEGMENT), 1)), [ranked[:3]]
    )
    assert {score.top_5 for score in report(workspace).scores} == {None}


def test_a_leak_is_said_aloud(sqlite_workspace: Workspace) -> None:
    screen = small_screen(sqlite_workspace, GroupLevel.IMAGE)
    assert not report(sqlite_workspace).leaks
    make = screen.factory
    with sqlite_workspace.database.read() as session:
        well = session.get_one(Well, screen.images["B01"].well_id)
    other = make.image(well, 2)
    with unguarded(sqlite_workspace) as session:
        session.add(
            SplitMember(
                split_id=screen.split.id,
                image_id=other.id,
                subset=Subset.TRAIN,
                label_id=screen.labels["DMSO"].id,
            )
        )
    found = report(sqlite_workspace)
    assert (found.leaks, found.wells_seen, found.wells) == (True, 1, 3)
    assert found.leak.startswith("1 of the 3 wells scored here were seen in training")


def test_training_images_are_refused_unless_forced(sqlite_workspace: Workspace) -> None:
    screen = small_screen(sqlite_workspace)
    move(screen, "B01 B02 B03", Subset.TRAIN)
    with unguarded(sqlite_workspace) as session:  # B04 too, else it would be scored as outside
        session.add(
            SplitMember(
                split_id=screen.split.id,
                image_id=screen.images["B04"].id,
                subset=Subset.TRAIN,
                label_id=screen.labels["taxol"].id,
            )
        )
    with pytest.raises(UserInputError, match=r"only labelled the 4 images .* trained on.*--force"):
        report(sqlite_workspace)
    forced = report(sqlite_workspace, force=True)
    assert forced.subsets == ("train",)
    assert forced.notes[0] == "Forced: 4 of these images were used to train the network."
    assert forced.wells_seen == 4


def test_the_test_side_is_scored_alone(sqlite_workspace: Workspace) -> None:
    screen = small_screen(sqlite_workspace)
    move(screen, "B01", Subset.TRAIN)
    found = report(sqlite_workspace)
    assert (found.subsets, found.images) == (("test",), 2)
    assert "1 labelled training images are excluded" in found.notes[0]
    move(screen, "B02 B03", Subset.VALIDATION)
    forced = report(sqlite_workspace, force=True)
    assert forced.subsets == ("outside", "train", "validation")
    assert forced.images == 4


def test_a_well_in_two_subsets_counts_once_by_what_tests(sqlite_workspace: Workspace) -> None:
    screen = small_screen(sqlite_workspace, GroupLevel.IMAGE)
    make = screen.factory
    with sqlite_workspace.database.read() as session:
        well = session.get_one(Well, screen.images["B01"].well_id)
    other = make.image(well, 2)
    with unguarded(sqlite_workspace) as session:
        added = {"image_id": other.id, "label_id": screen.labels["DMSO"].id}
        session.add(SplitMember(split_id=screen.split.id, subset=Subset.TRAIN, **added))
    cells = make.cells_of(make.segmentation(other, screen.segment_run, 2))
    make.predict(screen.predict_run, cells, [[(screen.labels["taxol"], 0.9)]] * 2)
    whole = report(sqlite_workspace, force=True)
    found = {(item.well, item.n): item for item in whole.by_well}
    assert (found["B01", 2].correct, found["B01", 2].predicted, found["B01", 2].seen) == (
        *(1, "DMSO", True),
    )
    assert found["B02", 1].predicted == "taxol"
    assert (whole.wells, whole.score("well", "hard").n, whole.score("image", "hard").n) == (4, 4, 5)
    votes = Store(sqlite_workspace).votes(level="well")
    assert (votes.units, votes.ties, votes.table.num_rows if votes.table else 0) == (4, 2, 5)
    rows = Store(sqlite_workspace).ask("replicate-agreement").to_pylist()
    # DMSO: B01 alone. taxol: B02 to B04, of which B03 says DMSO.
    assert [(row["name_with_dose"], row["wells"]) for row in rows] == [("taxol", 3)]
    # An image of B01, and with it the well, has no answer for lack of cells.
    few = report(sqlite_workspace, vote_options=VoteOptions(min_cells=3))
    assert any("1 of 1 classes have fewer than 6 wells here, 1 of them one" in n for n in few.notes)
    assert (few.wells, few.score("image", "hard").abstained, len(few.by_well)) == (1, 2, 3)
    assert few.leak.startswith("1 of the 1 wells scored here")


def test_a_run_that_has_labelled_controls_alone(sqlite_workspace: Workspace) -> None:
    screen = small_screen(sqlite_workspace)
    run = screen.factory.run(Stage.PREDICT, parent_id=screen.train_run.id)
    cells = screen.factory.cells_of(screen.segmentations["B01"])
    screen.factory.predict(run, cells, [[(screen.labels["DMSO"], 0.9)]] * 3)
    with pytest.raises(UserInputError, match="without --no-controls"):
        report(sqlite_workspace, str(run.id), vote_options=VoteOptions(controls=False))


def test_which_run_is_meant(sqlite_workspace: Workspace) -> None:
    screen = small_screen(sqlite_workspace)
    by_train = report(sqlite_workspace, str(screen.train_run.id))
    assert by_train.run_id == screen.predict_run.id
    with pytest.raises(UnknownNameError, match=r"no predictions.*cellstore predict"):
        report(sqlite_workspace, str(screen.segment_run.id))
    with pytest.raises(UnknownNameError):
        report(sqlite_workspace, "99")


def test_an_empty_or_unfinished_run(sqlite_workspace: Workspace) -> None:
    with pytest.raises(UnknownNameError):
        report(sqlite_workspace)
    screen = small_screen(sqlite_workspace)
    run = screen.factory.run(
        Stage.PREDICT, split_id=screen.split.id, status=Status.RUNNING, parent_id=1
    )
    with pytest.raises(UserInputError, match="labelled no image"):
        report(sqlite_workspace, str(run.id))
    cells = screen.factory.cells_of(screen.segmentations["B01"])
    screen.factory.predict(run, cells, [[(screen.labels["DMSO"], 0.9)]] * 3)
    notes = report(sqlite_workspace, str(run.id)).notes
    assert notes[0] == "The run is running, so images may be missing here."


class Page(HTMLParser):
    """What a browser would load or execute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.links.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def with_pixels(screen: SmallScreen, folder: Path, well: str) -> None:
    """Give the image of a well real files: two squares, and their masks."""
    workspace = screen.factory.workspace
    masks = np.zeros((700, 600), np.uint16)
    masks[100:200, 100:220], masks[400:520, 300:420] = 1, 2
    path = folder / f"{well}.tiff"
    path.write_bytes(encode_tiff((100 + 900 * (masks > 0)).astype(np.uint16)))
    known = path.stat()
    stored = workspace.artifacts.write(ArtifactKind.MASK, encode_tiff(masks), ".tif")
    place = screen.factory.folder(str(folder))
    with workspace.database.begin() as session:
        session.execute(
            update(ImageFile)
            .where(ImageFile.image_id == screen.images[well].id)
            .values(
                folder_id=place.id,
                name=path.name,
                size_bytes=known.st_size,
                modified_ns=known.st_mtime_ns,
            )
        )
        session.execute(
            update(Segmentation)
            .where(Segmentation.id == screen.segmentations[well].id)
            .values(mask_artifact_id=keep_files(session, [stored])[0])
        )


@pytest.mark.one_database
def test_the_page_shows_images_and_says_which_are_missing(
    workspace: Workspace, tmp_path: Path
) -> None:
    screen = small_screen(workspace)
    with_pixels(screen, tmp_path, "B01")
    target = tmp_path / "report.html"
    Store(workspace).report(html=target)
    page = Page(target.read_text(encoding="utf-8"))
    pictures = [link for link in page.links if link.startswith("data:image/jpeg")]
    assert len(pictures) == 1  # the mistake
    shown = " ".join("".join(page.text).split())
    assert "Labelled taxol, is DMSO" in shown
    assert shown.count("See what else is affected with: cellstore verify") == 1
    assert "None of the 3 wells scored here was seen in training." in shown
    assert "66.7 %" in shown
    assert target.stat().st_size < 5_000_000
    assert {"svg", "table", "figcaption"} <= page.tags


def test_cells_whose_masks_are_unknown_have_no_picture_and_a_sentence(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    small_screen(sqlite_workspace)
    with sqlite_workspace.database.begin() as session:
        session.execute(update(Segmentation).values(mask_artifact_id=None))
    target = tmp_path / "report.html"
    Store(sqlite_workspace).report(html=target)
    shown = " ".join("".join(Page(target.read_text(encoding="utf-8")).text).split())
    assert shown.count("their masks are unknown") == 2
    assert "66.7 %" in shown


def test_the_same_store_gives_the_same_page(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    small_screen(sqlite_workspace)
    pages = []
    for name in ("a.html", "b.html"):
        Store(sqlite_workspace).report(html=tmp_path / name)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_a_page_that_cannot_be_written_leaves_nothing(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    small_screen(sqlite_workspace)
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        Store(sqlite_workspace).report(html=blocked / "report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "store"]


def test_the_numbers_need_no_extra_but_the_page_does(
    sqlite_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_screen(sqlite_workspace)
    monkeypatch.setattr(settings, "find_spec", lambda _name: None)
    assert report(sqlite_workspace).images == 3
    with pytest.raises(MissingExtraError, match=r"cellstore\[report\]"):
        Store(sqlite_workspace).report(html=tmp_path / "report.html")


@pytest.mark.parametrize(
    ("wells", "layout"),
    [([(8, 12)], (8, 12)), ([(1, 13)], (16, 24)), ([(17, 1)], (32, 48)), ([(40, 60)], (40, 60))],
)
def test_plate_layouts_fit_the_wells(wells: list[tuple[int, int]], layout: tuple[int, int]) -> None:
    assert plate_layout(wells) == layout


@pytest.mark.one_database
def test_images_without_a_cell_are_told(workspace: Workspace) -> None:
    """A compound that empties its wells must not raise the score unsaid."""
    make = Factory(workspace)
    taxol = make.label("taxol")
    wells = [make.well(make.plate(), 1, column, make.treatment("taxol")) for column in (1, 2)]
    images = [make.image(well) for well in wells]
    split = make.split([(image, Subset.TEST, taxol) for image in images])
    train = make.run(Stage.TRAIN, split_id=split.id)
    run = make.run(Stage.PREDICT, parent_id=train.id)
    found = [make.segmentation(image, make.run(Stage.SEGMENT), n) for n, image in enumerate(images)]
    make.predict(run, make.cells_of(found[1]), [[(taxol, 1.0)]])
    result = report(workspace)
    assert result.images == 1
    assert any(
        note.startswith("1 images of the scored subset have no label") for note in result.notes
    )
