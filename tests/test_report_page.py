"""The page of a report: what it draws, what it says where things are missing, hostile names."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from factories import Factory
from matplotlib.figure import Figure
from screens import small_screen
from sqlalchemy import delete, update

from cellstore.config import VoteOptions
from cellstore.enums import Control, Stage, Subset
from cellstore.jobs.workspace import Workspace, create_workspace
from cellstore.models import (
    Cell,
    CellFeatures,
    FeatureSet,
    Recipe,
    Run,
    RunMetric,
    Segmentation,
)
from cellstore.notebooks import plain
from cellstore.query.engine import open_questions
from cellstore.report import report_figures
from cellstore.report.drawing import nowhere, short, svg
from cellstore.report.report_figures import matrix_of
from cellstore.report.report_page import mistakes_of, plate_maps
from cellstore.store import Store

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "'><svg/onload=alert(3)>",
    "=cmd|' /C calc'!A0",
    "$x$ \\frac{1}{0} {{ 7 * 7 }} {% raw %}",
    "</style></svg><!-- ]]> &lt;b&gt;",
    "\u202eexe.gpj\u2066 \u200f\x1b[31m\x00\x07",
    "\u6f22\u5b57 \U0001f9ec \u05e9\u05dc\u05d5\u05dd",
    "long" * 60,
)


class Page(HTMLParser):
    """The elements of a page with the names of their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: set[tuple[str, tuple[str, ...]]] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.pieces: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add((tag, tuple(sorted(name for name, _ in attrs))))
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.pieces).split())

    def values(self, tag: str, name: str) -> list[str]:
        return [value for found, key, value in self.attributes if (found, key) == (tag, name)]


def write(workspace: Workspace, path: Path, **more: object) -> Page:
    target = path / "page.html"
    Store(workspace).report(html=target, **more)  # type: ignore[arg-type]
    return Page(target)


def recipe_of(workspace: Workspace, run: Run) -> Recipe:
    with workspace.database.read() as session:
        return session.get_one(Recipe, run.recipe_id)


def named_screen(workspace: Workspace, names: tuple[str, ...]) -> None:
    """A screen in which every text that a user gives is one of ``names``."""
    make = Factory(workspace)
    labels = [make.label(name) for name in names]
    plate = make.plate(names[0][:255], batch=names[1])
    segmented = make.run(Stage.SEGMENT, command=names[2], host=names[3], user_name=names[4])
    members, cells = [], []
    for column, name in enumerate(names, start=1):
        treatment = make.treatment(name, names[0] if column < 4 else names[column - 1])
        well = make.well(plate, 1, column, treatment)
        image = make.image(well, core_name=names[6])
        members.append((image, Subset.TEST, labels[column - 1]))
        cells.append(make.cells_of(make.segmentation(image, segmented, 2)))
    split = make.split(members, name=names[1], query=names[5], protocol=names[2])
    values = [1.0] * sum(len(some) for some in cells)
    every = [cell for some in cells for cell in some]
    columns = {names[1]: values, names[2]: values}
    make.feature_files("theirs", every, columns, recipe_of(workspace, segmented))
    train = make.run(
        Stage.TRAIN,
        make.recipe(Stage.TRAIN, parameters={names[0]: names[1]}),
        split_id=split.id,
        command=names[0],
        user_name=names[1],
        query=names[2],
        environment={names[3]: names[4]},
    )
    make.metrics(train, train_loss=[1.0, 0.5], validation_loss=[2.0, 1.5])
    more = {"parent_id": train.id, "split_id": split.id, "command": names[5]}
    runs = [make.run(Stage.PREDICT, host=names[2], code_version=names[3], **more) for _ in "ab"]
    for shift, run in enumerate(runs, start=1):
        for i, pair in enumerate(cells):
            choice = labels[(i + shift * (i % 2)) % len(labels)]
            make.predict(run, pair, [[(choice, 0.6), (labels[(i + 3) % len(labels)], 0.3)]] * 2)


@pytest.fixture
def pages(sqlite_workspace: Workspace, tmp_path: Path) -> tuple[Page, Page]:
    """The same screen with names of letters, and with hostile ones."""
    tame = tuple(f"name{i}" for i in range(len(HOSTILE)))
    other, _ = create_workspace(tmp_path / "other")
    found = []
    for workspace, names in ((other, tame), (sqlite_workspace, HOSTILE)):
        named_screen(workspace, names)
        first = _first_predict(workspace)
        found.append(write(workspace, tmp_path, compare=first))
    other.database.close()
    return found[0], found[1]


def _first_predict(workspace: Workspace) -> str:
    with open_questions(workspace) as questions:
        return str(questions.ask("SELECT min(id) FROM runs WHERE stage = 'predict'").table()[0][0])


def test_names_make_no_element_and_no_attribute(pages: tuple[Page, Page]) -> None:
    tame, hostile = pages
    check_words(hostile)
    check_alternatives(tame)
    assert hostile.elements == tame.elements
    assert {tag for tag, _ in hostile.elements}.isdisjoint(
        {"script", "iframe", "object", "embed", "link", "form", "foreignobject", "base"}
    )
    assert not [name for _, name, _ in hostile.attributes if name.startswith("on")]
    for tag, name, value in hostile.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:image/", "#")), (tag, name, value[:40])
    assert "default-src 'none'" in hostile.source
    assert not re.search(r"url\((?!#)|@import", hostile.source)


def check_words(page: Page) -> None:
    """Hostile names are read as they are, but for what cannot be seen."""
    words = page.words
    for name in HOSTILE[:6]:
        assert " ".join(name.split()) in words
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e\u2066\u200f]", page.source)
    assert "\\u202eexe.gpj\\u2066 \\u200f\u241b[31m\u2400\u2407" in words
    assert HOSTILE[7] in words


def check_alternatives(tame: Page) -> None:
    """Every picture is said in words, and every link leads somewhere."""
    figures = [attrs for tag, attrs in tame.elements if tag == "svg"]
    assert figures
    assert all({"role", "aria-label"} <= set(attrs) for attrs in figures)
    assert len(tame.values("svg", "aria-label")) > 8
    assert all(tame.values("svg", "aria-label"))
    assert all(tame.values("img", "alt"))
    targets = {link[1:] for link in tame.values("a", "href")}
    assert targets == set(tame.values("section", "id"))


def test_what_cannot_be_seen_is_written_out() -> None:
    assert plain("a\x00b\u202ec\n\td\ufeff") == "a\u2400b\\u202ec\n\td\\ufeff"
    assert plain("\u05e9\u05dc \u6f22 \U0001f9ec") == "\u05e9\u05dc \u6f22 \U0001f9ec"
    assert short("two\nlines \u200f") == "two lines \\u200f"
    assert short("x" * 30, 5) == "xxxx…"


def _one_letter(figure: Figure) -> None:
    figure.text(0.5, 0.5, "\U0001f9ec")


def test_letters_that_matplotlib_lacks_are_no_warning() -> None:
    drawn = svg("x", (2, 2), _one_letter, 'a"<b')
    assert "\U0001f9ec" in drawn
    assert 'aria-label="a&quot;&lt;b"' in drawn


PAIRS = [("a", "a")] * 3 + [("a", "b")] * 2 + [("b", "d")] + [("d", "d")] * 4 + [("c", "a")]
GENES = {"a": "G2", "b": "G2", "c": "G1", "d": None}


def test_mistakes_within_a_gene_are_told_apart() -> None:
    found = report_figures.confusion_of(PAIRS, GENES)
    assert found.labels == ("d", "c", "a", "b")  # without a gene first, then gene by gene
    assert found.counts.tolist() == [[4, 0, 0, 0], [0, 0, 1, 0], [0, 0, 3, 2], [1, 0, 0, 0]]
    assert (found.wrong, found.same_gene, found.grouped) == (4, 2, True)
    assert report_figures.most_confused(found, 2) == [2, 3]


def test_of_many_classes_the_most_confused_have_names() -> None:
    names = [f"c{i:03d}" for i in range(120)]
    pairs = [(name, name) for name in names] + [("c007", "c099")] * 3 + [("c050", "c051")]
    found = report_figures.confusion_of(pairs, {name: f"g{i // 2}" for i, name in enumerate(names)})
    block = matrix_of(found, nowhere)
    assert block.labels == ("c050", "c051", "c007", "c099")  # g25, g3, g49
    assert [square["count"] for square in block.rows[2][2]] == [0, 0, 1, 3]
    assert [square["solid"] for square in block.rows[2][2]] == [0, 0, 0.25, 0.75]
    assert "of 120 classes" in block.caption
    named = matrix_of(report_figures.confusion_of(pairs[:40], {}), nowhere)
    assert len(named.rows) == 40


def test_maps_show_the_means_of_wells(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    make.cells(screen.segmentations["B03"], 3, excluded="perimeter is 0")
    rows = [
        {"well_id": screen.images[name].well_id, "correct": right}
        for name, right in (("B01", False), ("B02", True), ("B02", False), ("B03", None))
    ]
    with open_questions(workspace) as questions:
        maps, more = plate_maps(questions, screen.predict_run.id, rows)
    (accuracy,), (counts,) = maps
    assert (accuracy.plate, accuracy.title, more) == ("BR1", "Accuracy", 0)
    b1, b2, b3 = (2, 1), (2, 2), (2, 3)
    assert accuracy.values == {b1: 0, b2: 50}
    assert [counts.values[well] for well in (b1, b2, b3)] == [3, 2, 2]
    assert (1, 1) in counts.values  # of a well that trained: it has cells, too
    assert list(counts.wells) == [(1, 1), (1, 2), b1, b2, b3, (2, 4)]
    assert accuracy.extremes() == "2 wells, from 0 (B01) to 50 (B02)"


def test_a_page_says_what_is_missing(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    """No features, no metrics, no masks, no images, no boxes: as of cells that others found."""
    small_screen(sqlite_workspace)
    with sqlite_workspace.database.begin() as session:
        for table in (CellFeatures, FeatureSet, RunMetric):
            session.execute(delete(table))
        session.execute(update(Segmentation).values(mask_artifact_id=None))
        session.execute(update(Cell).values(min_row=None, centroid_row=None))
    words = write(sqlite_workspace, tmp_path, vote_options=VoteOptions(min_cells=3)).words
    for said in (
        "for fewer than 3 cells: 2 images abstain",
        "kept no metrics by epoch",
        "their masks are unknown",
        "No baseline has labelled these images yet",
    ):
        assert said in words


def test_one_well_of_one_class_has_a_page(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    make = Factory(sqlite_workspace)
    label = make.label("a")
    image = make.image(make.well(make.plate(), 1, 1, make.treatment("a")))
    split = make.split([(image, Subset.TEST, label)])
    run = make.run(Stage.PREDICT, split_id=split.id)
    cells = make.cells_of(make.segmentation(image, make.run(Stage.SEGMENT), 1))
    make.predict(run, cells, [[(label, 1.0)]])
    words = write(sqlite_workspace, tmp_path).words
    assert "How well are treatments recognised?" in words
    assert "There are too few wells (1) for an interval." in words
    assert "No image got a wrong label." in words
    assert "These labels come from no train run of this store." in words


def test_the_first_screen_names_the_best_and_the_worst_treatment(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    """By their images, of equal ones by their cells; controls are beside them, not among them."""
    make = Factory(sqlite_workspace)
    plate, segmented = make.plate("P1"), make.run(Stage.SEGMENT)
    chosen = {"DMSO": "DMSO", "taxol": "taxol", "nocodazole": "nocodazole", "vinblastine": "taxol"}
    labels = {name: make.label(name) for name in ("DMSO", "taxol", "nocodazole", "vinblastine")}
    members, cells = [], []
    for column, name in enumerate(labels, start=1):
        control = Control.NEGATIVE if name == "DMSO" else None
        image = make.image(make.well(plate, 2, column, make.treatment(name), control=control))
        members.append((image, Subset.TEST, labels[name]))
        cells.append(make.cells_of(make.segmentation(image, segmented, 3)))
    run = make.run(Stage.PREDICT, split_id=make.split(members).id)
    for some, name in zip(cells, labels, strict=True):
        answer = labels[chosen[name]]
        other = labels["DMSO"] if name == "taxol" else answer  # a third of the cells of taxol
        make.predict(run, some, [[(answer, 0.9)], [(answer, 0.9)], [(other, 0.9)]])
    words = write(sqlite_workspace, tmp_path).words
    for said in (
        "nocodazole is recognised best, vinblastine worst.",
        "nocodazole: 1 of 1 images got the right label, with 100 % of the votes of their cells.",
        "vinblastine: 0 of 1 images got the right label",
        "1 got that of taxol.",
        "Negative controls (DMSO): 1 of 1 images",
        "negative control (DMSO)",
    ):
        assert said in words


def test_where_two_runs_differ_is_shown(sqlite_workspace: Workspace, tmp_path: Path) -> None:
    screen = small_screen(sqlite_workspace)
    make = screen.factory
    other = make.run(
        Stage.PREDICT, parent_id=screen.train_run.id, split_id=screen.split.id, command="other"
    )
    for name in ("B01", "B02", "B03"):
        cells = make.cells_of(screen.segmentations[name])
        make.predict(other, cells, [[(screen.labels["DMSO"], 0.9)]] * len(cells))
    first = str(screen.predict_run.id)
    page = write(
        sqlite_workspace, tmp_path, compare=first, vote_options=VoteOptions(controls=False)
    )
    assert "Control wells are excluded." in page.words
    first, second = other.id, screen.predict_run.id
    assert f"Run {first} compared with run {second}" in page.words
    row = "<td>BR1/B02/1</td><td>taxol</td><td>DMSO</td><td>taxol</td>"
    assert f"{row}<td>run {second}</td>" in page.source
    assert "#comparison" in page.values("a", "href")


def test_mistakes_are_of_wells_apart(sqlite_workspace: Workspace) -> None:
    make = Factory(sqlite_workspace)
    labels = [make.label(name) for name in "ab"]
    plate, source = make.plate(), make.run(Stage.SEGMENT)
    members = []
    for column in range(1, 9):
        well = make.well(plate, 1, column, make.treatment("a"))
        members += [(make.image(well, site), Subset.TEST, labels[0]) for site in (1, 2)]
    split = make.split(members)
    run = make.run(Stage.PREDICT, split_id=split.id)
    rows = []
    for place, (image, _, _) in enumerate(members):
        cells = make.cells_of(make.segmentation(image, source, 1, mask_artifact_id=None))
        make.predict(run, cells, [[(labels[1], 0.5 + place / 100)]])
        rows.append(
            {
                "unit_id": image.id,
                "well_id": image.well_id,
                "vote": "soft",
                "correct": False,
                "confidence": 0.5 + place / 100,
                "truth": "a",
                "predicted": "b",
            }
        )
    with open_questions(sqlite_workspace) as questions:
        found = mistakes_of(sqlite_workspace, questions, run.id, rows)
    shares = [item["share"] for item in found]
    assert shares == pytest.approx([0.65, 0.63, 0.61, 0.59, 0.57, 0.55])  # the second of each well
    assert all(item["problem"] for item in found)
