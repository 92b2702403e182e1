"""A store whose plates are segmented, measured and labelled, made of drawn rows in a minute.

One plate is trained on, and has no cells; the others are labelled by two networks and by null
baselines. A few rendered fields, with their true masks, stand for all images.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report_fields import FIELDS, Field, draw_fields, file_name
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from cellstore.analysis.features import FEATURE_NAMES
from cellstore.config import (
    BaselineParams,
    MeasureParams,
    PredictParams,
    SegmentParams,
    TrainParams,
)
from cellstore.db.bulk import bulk_insert
from cellstore.enums import (
    PERTURBATION,
    ArtifactKind,
    Control,
    FeatureStorage,
    GroupLevel,
    PerturbationKind,
    Stage,
    Subset,
)
from cellstore.io.image_files import encode_tiff
from cellstore.io.treatments import TreatmentRecord
from cellstore.jobs.runs import RecipeSpec, keep_files, register, running
from cellstore.jobs.workspace import Workspace, create_workspace
from cellstore.models import (
    Cell,
    CellFeatures,
    FeatureSet,
    Folder,
    Image,
    ImageFile,
    Label,
    Perturbation,
    Plate,
    Prediction,
    RunMetric,
    Segmentation,
    Split,
    SplitMember,
    Treatment,
    TreatmentPart,
    Well,
)
from cellstore.stages.ingest.write_treatments import treatment_values

COMPOUND = PerturbationKind.COMPOUND
STORED = FEATURE_NAMES[:-2]
"""All but the centroid, which is in table cells."""

COLUMNS = 24
ROWS_AT_ONCE = 100_000
FAMILIES = ("HDAC", "CDK", "EGFR", "TUBB", "MAPK", "PSMB", "TOP", "AURK", "SIRT", "ADRB")
HEADS = ("al", "be", "ce", "do", "ele", "fo", "gi", "ibru", "keto", "lu", "mira", "no", "oxa")
TAILS = ("tinib", "stat", "zomib", "rubicin", "limus", "taxel", "olol", "prazole", "mycin", "fen")


@dataclass(frozen=True)
class Design:
    """How large the store is. ``leak``: images of the scored wells are trained on."""

    plates: int = 1
    wells: int = 384
    sites: int = 9
    cells: int = 130
    classes: int = 300
    targets: int = 147
    side: int = 520
    leak: bool = False


def add_design(parser: argparse.ArgumentParser) -> None:
    """Let the size be given on the command line."""
    for name in ("plates", "wells", "sites", "cells", "classes", "targets", "side"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Design(), name))
    parser.add_argument("--leak", action="store_true", help="train on images of the scored wells")


def design_of(options: argparse.Namespace) -> Design:
    """Return the size that was asked for."""
    return Design(**{name: getattr(options, name) for name in Design.__dataclass_fields__})


def make_store(root: Path, design: Design) -> int:
    """Make the store; return how many cells it has."""
    root.parent.mkdir(parents=True, exist_ok=True)
    workspace, _ = create_workspace(root)
    try:
        rng = np.random.default_rng(7)
        fields = draw_fields(root.parent / "images", design.side)
        classes = _insert_images(workspace, root.parent / "images", design)
        cells = _insert_cells(workspace, fields, design, rng)
        _insert_runs(workspace, cells, classes, rng, leak=design.leak)
        return int(cells.ids.size)
    finally:
        workspace.database.close()


def _names(design: Design) -> tuple[list[str], list[str]]:
    compounds = ["DMSO"] + [
        f"{HEADS[i // len(TAILS) % len(HEADS)]}{'vex' * (i // 130)}{TAILS[i % len(TAILS)]}"
        for i in range(design.classes - 1)
    ]
    genes = [f"{FAMILIES[i % len(FAMILIES)]}{i // len(FAMILIES) + 1}" for i in range(400)]
    return compounds, ["", *(genes[i % design.targets] for i in range(design.classes - 1))]


def _insert_images(workspace: Workspace, folder: Path, design: Design) -> list[tuple[int, str]]:
    """Make plates, wells and images; return id and target of the label of each class."""
    compounds, targets = _names(design)
    with workspace.database.begin() as session:
        kinds = [_treatment(*pair) for pair in zip(compounds, targets, strict=True)]
        labels = [Label(field=PERTURBATION, value=name) for name in compounds]
        place = Folder(uri=str(folder))
        plates = [Plate(barcode=f"BR{116990 + i:08d}") for i in range(design.plates + 1)]
        session.add_all([*kinds, *labels, place, *plates])
        session.flush()
        for plate in plates:
            _insert_plate(session, plate, [kind.id for kind in kinds], design, folder, place.id)
        return [(label.id, target) for label, target in zip(labels, targets, strict=True)]


def _treatment(name: str, target: str) -> Treatment:
    named = Perturbation(kind=COMPOUND, name=name, target=target or None)
    return Treatment(
        **treatment_values([TreatmentRecord(COMPOUND, name)]),
        target=target or None,
        parts=[TreatmentPart(position=1, perturbation=named)],
    )


def _insert_plate(
    session: Session, plate: Plate, kinds: Sequence[int], design: Design, folder: Path, place: int
) -> None:
    """A well of each class, and controls in the wells that are left."""
    order = np.random.default_rng(3).permutation(design.wells)
    rows = [
        {
            "plate_id": plate.id,
            "well_row": position // COLUMNS + 1,
            "well_column": position % COLUMNS + 1,
            "name": f"{chr(65 + position // COLUMNS)}{position % COLUMNS + 1:02d}",
            "treatment_id": kinds[order[position] if order[position] < len(kinds) else 0],
        }
        for position in range(design.wells)
    ]
    for row in rows:
        row["control"] = Control.NEGATIVE if row["treatment_id"] == kinds[0] else None
    session.execute(insert(Well), rows)
    wells = session.execute(select(Well.id, Well.name).where(Well.plate_id == plate.id)).all()
    images = [
        {"well_id": well, "site": site, "core_name": f"{name}f{site:02d}", "content_sha256": None}
        for well, name in wells
        for site in range(1, design.sites + 1)
    ]
    for row in images:
        row["content_sha256"] = f"{row['well_id']:060x}{row['site']:04x}"
    session.execute(insert(Image), images)
    ids = session.scalars(select(Image.id).join(Well).where(Well.plate_id == plate.id)).all()
    session.execute(insert(ImageFile), list(_files(ids, folder, place)))


def _files(ids: Sequence[int], folder: Path, place: int) -> Iterator[dict[str, Any]]:
    known = {path.name: path.stat() for path in folder.iterdir()}
    for image in ids:
        for channel in (1, 2, 3):
            name = file_name(image % FIELDS, channel)
            yield {
                "image_id": image,
                "channel": f"ch{channel}",
                "position": channel,
                "name": name,
                "folder_id": place,
                "sha256": "0" * 64,
                "size_bytes": known[name].st_size,
                "modified_ns": known[name].st_mtime_ns,
            }


@dataclass(frozen=True)
class Cells:
    """The id, image, well and class (from 0) of every cell, in the order of their ids."""

    ids: NDArray[np.int64]
    images: NDArray[np.int64]
    wells: NDArray[np.int64]
    classes: NDArray[np.int64]


def _insert_cells(
    workspace: Workspace, fields: Sequence[Field], design: Design, rng: np.random.Generator
) -> Cells:
    with workspace.database.begin() as session:
        recipe = register(
            session, RecipeSpec(Stage.SEGMENT, 1, asdict(SegmentParams.of("published")))
        )
        spec = RecipeSpec(Stage.MEASURE, 1, asdict(MeasureParams()), None, (recipe,))
        measured = register(session, spec)
        session.add(_basic_set(measured.id))
    found = _images_of(workspace, design)
    with (
        running(workspace.database, recipe) as segmenting,
        running(workspace.database, measured) as measuring,
        workspace.database.begin() as session,
    ):
        masks = [_keep(session, workspace, field) for field in fields]
        now = datetime.now(UTC)
        session.execute(
            insert(Segmentation),
            [
                {
                    "image_id": image,
                    "content_sha256": content,
                    "recipe_id": recipe.id,
                    "run_id": segmenting.id,
                    "n_cells": _count(image, well, design),
                    "diameter": 26.0,
                    "mask_artifact_id": masks[image % FIELDS],
                    "created_at": now,
                }
                for image, content, well, _ in found
            ],
        )
        rows = session.execute(
            select(Segmentation.id, Segmentation.image_id, Segmentation.n_cells)
        ).all()
        _write_cells(session, rows, fields)
        made = _made_cells(session, found, rows)
        _write_features(session, made, (measured.id, measuring.id), rng)
    return made


def _count(image: int, well: int, design: Design) -> int:
    """Wells differ, and fewer cells are at the edge."""
    rng = np.random.default_rng([image, well])
    position = well % design.wells
    edge = position % COLUMNS in (0, COLUMNS - 1) or position < COLUMNS
    spread = 0.15 * np.random.default_rng(well).normal() + 0.08 * rng.normal()
    return max(1, round(design.cells * (0.8 if edge else 1.02) * np.exp(spread)))


def _basic_set(recipe_id: int) -> FeatureSet:
    columns = [
        {"name": name, "dtype": "float64", "unit": "pixel", "source": "drawn"}
        for name in FEATURE_NAMES
    ]
    return FeatureSet(
        name="basic", recipe_id=recipe_id, columns=columns, storage=FeatureStorage.TABLE
    )


def _keep(session: Session, workspace: Workspace, field: Field) -> int:
    stored = workspace.artifacts.write(ArtifactKind.MASK, encode_tiff(field.masks), ".tif")
    return keep_files(session, [stored])[0]


def _images_of(workspace: Workspace, design: Design) -> list[tuple[int, str, int, int]]:
    """Image, its bytes, its well and its class, of all plates but the first."""
    query = (
        select(Image.id, Image.content_sha256, Image.well_id, Treatment.id)
        .join(Well, Well.id == Image.well_id)
        .join(Treatment, Treatment.id == Well.treatment_id)
        .where(Well.plate_id > 1)
        .order_by(Image.id)
    )
    with workspace.database.read() as session:
        return [(a, str(b), c, d - 1) for a, b, c, d in session.execute(query)]


def _write_cells(session: Session, rows: Any, fields: Sequence[Field]) -> None:
    names = ("segmentation_id", "object_number", "min_row", "min_col", "max_row", "max_col")
    part: list[tuple[Any, ...]] = []
    for segmentation, image, number in rows:
        boxes = fields[image % FIELDS].boxes
        for label in range(1, number + 1):
            part.append((segmentation, label, *boxes[(label - 1) % len(boxes)].tolist()))
        if len(part) >= ROWS_AT_ONCE:
            bulk_insert(session, Cell, names, part)
            part = []
    bulk_insert(session, Cell, names, part)


def _made_cells(session: Session, found: Any, rows: Any) -> Cells:
    by_image = {image: (well, kind) for image, _, well, kind in found}
    pairs = session.execute(select(Cell.id, Cell.segmentation_id).order_by(Cell.id)).all()
    image_of = {segmentation: image for segmentation, image, _ in rows}
    images = np.array([image_of[segmentation] for _, segmentation in pairs])
    wells, kinds = (np.array([by_image[i][k] for i in images.tolist()]) for k in (0, 1))
    return Cells(np.array([cell for cell, _ in pairs]), images, wells, kinds)


def _write_features(
    session: Session, cells: Cells, keys: tuple[int, int], rng: np.random.Generator
) -> None:
    effect = rng.normal(0, 0.12, cells.classes.max() + 1)[cells.classes]
    edge = 0.05 * np.cos(cells.wells % COLUMNS / COLUMNS * 6.3)
    names = ("cell_id", "recipe_id", "run_id", *STORED)
    for start in range(0, cells.ids.size, ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        shift = np.exp(effect[some] + edge[some])[:, None]
        values = shift * rng.gamma(20, 30, (shift.size, len(STORED)))
        ids = cells.ids[some].tolist()
        rows = [(i, *keys, *row) for i, row in zip(ids, values.tolist(), strict=True)]
        bulk_insert(session, CellFeatures, names, rows)


def _insert_runs(
    workspace: Workspace,
    cells: Cells,
    classes: list[tuple[int, str]],
    rng: np.random.Generator,
    *,
    leak: bool,
) -> None:
    split = _insert_split(workspace, classes, leak=leak)
    skills = rng.beta(1.2, 3.5, len(classes))
    shift = rng.normal(0, 0.06, len(classes))
    plain = TrainParams()
    _network(workspace, split, plain, cells, classes, np.clip(skills * 0.8 + shift, 0.01, 0.9))
    for name in ("majority", "shuffled", "cellcount", "position"):
        _baseline(workspace, split, name, cells, classes)
    better = TrainParams(seed=1)
    _network(workspace, split, better, cells, classes, np.clip(skills, 0.01, 0.95))


def _insert_split(workspace: Workspace, classes: list[tuple[int, str]], *, leak: bool) -> int:
    """All of the first plate is trained on; where it leaks, also images of every second well."""
    with workspace.database.begin() as session:
        recipe = register(session, RecipeSpec(Stage.SPLIT, 1, {"drawn": True}))
        split = Split(
            name="leave-plate-out",
            recipe_id=recipe.id,
            protocol="leave-plate-out",
            field=PERTURBATION,
            group_level=GroupLevel.IMAGE if leak else GroupLevel.PLATE,
            seed=0,
            query="SELECT id FROM images",
            fingerprint="5" * 64,
            excluded={},
            created_at=datetime.now(UTC),
            frozen_at=None,
        )
        session.add(split)
        session.flush()
        query = (
            select(Image.id, Well.plate_id, Well.treatment_id, Well.id, Image.site)
            .join(Well, Well.id == Image.well_id)
            .order_by(Image.id)
        )
        rows = []
        for image, plate, kind, well, site in session.execute(query):
            seen = plate == 1 or (leak and well % 2 == 0 and site == 1)
            side = Subset.TRAIN if seen else Subset.TEST
            rows.append((split.id, image, side.value, classes[kind - 1][0]))
        bulk_insert(session, SplitMember, ("split_id", "image_id", "subset", "label_id"), rows)
        return split.id


def _network(
    workspace: Workspace,
    split: int,
    params: TrainParams,
    cells: Cells,
    classes: list[tuple[int, str]],
    skills: NDArray[np.float64],
) -> None:
    rng = np.random.default_rng([params.seed, 11])
    with workspace.database.begin() as session:
        recipe = register(session, RecipeSpec(Stage.TRAIN, 1, asdict(params)))
    with running(workspace.database, recipe, split_id=split, seed=params.seed) as trained:
        _write_curves(workspace, trained.id, rng)
    labels = _choices(rng, cells, classes, skills)
    top = np.clip(rng.beta(2, 5, len(labels)) + 0.25 * (labels[:, 0] == cells.classes), 0.02, 0.98)
    rest = np.sort(rng.dirichlet(np.ones(4), len(labels)), axis=1)[:, ::-1]
    chances = np.column_stack([top, (1 - top)[:, None] * rest * 0.8])
    chances = np.sort(chances, axis=1)[:, ::-1]
    _predict(workspace, trained.id, split, cells, classes, labels, chances)


def _write_curves(workspace: Workspace, run: int, rng: np.random.Generator) -> None:
    epochs = np.arange(1, 14)
    curves = {
        "train_loss": 5.7 * np.exp(-epochs / 14),
        "validation_loss": 5.7 - 1.4 * (1 - np.exp(-epochs / 4)) + 0.02 * epochs,
        "train_accuracy": 0.5 * (1 - np.exp(-epochs / 9)),
        "validation_accuracy": 0.14 * (1 - np.exp(-epochs / 4)),
    }
    rows = [
        RunMetric(run_id=run, epoch=int(epoch), name=name, value=float(value))
        for name, values in curves.items()
        for epoch, value in zip(epochs, values + rng.normal(0, 0.004, epochs.size), strict=True)
    ]
    with workspace.database.begin() as session:
        session.add_all(rows)


def _choices(
    rng: np.random.Generator,
    cells: Cells,
    classes: list[tuple[int, str]],
    skills: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Five different classes for each cell: the true one by skill, else often one of its gene."""
    count, total = cells.ids.size, len(classes)
    luck = rng.normal(0, 0.08, int(cells.images.max()) + 1)[cells.images]
    sure = rng.random(count) < np.clip(skills[cells.classes] + luck, 0, 1)
    siblings = np.array([_sibling(classes, i) for i in range(total)])
    draw = rng.random(count)
    usual = (cells.classes * 7 + 3) % total  # what each class is mistaken for most
    wrong = np.where(draw < 0.2, siblings[cells.classes], rng.integers(0, total, count))
    wrong = np.where(draw > 0.75, usual, wrong)
    first = np.where(sure, cells.classes, wrong)
    steps = rng.integers(1, max(2, total // 5), (count, 4)).cumsum(axis=1)
    return np.column_stack([first, (first[:, None] + steps) % total])


def _sibling(classes: list[tuple[int, str]], number: int) -> int:
    """The next class of the same gene, or of any where there is none."""
    same = [i for i, item in enumerate(classes) if item[1] == classes[number][1]]
    after = [i for i in same if i > number] + same
    return after[0] if len(same) > 1 else (number + 1) % len(classes)


def _baseline(
    workspace: Workspace, split: int, name: str, cells: Cells, classes: list[tuple[int, str]]
) -> None:
    rng = np.random.default_rng([5, len(name)])
    parameters = asdict(BaselineParams()) | {"baseline": name}
    with workspace.database.begin() as session:
        recipe = register(session, RecipeSpec(Stage.TRAIN, 1, parameters))
    with running(workspace.database, recipe, split_id=split, seed=0) as trained:
        pass
    drawn = rng.integers(0, len(classes), int(cells.images.max()) + 1)
    drawn[rng.random(drawn.size) < 0.4] = 0
    said = np.zeros_like(cells.classes) if name == "majority" else drawn[cells.images]
    chances = np.full((said.size, 1), 0.22)
    _predict(workspace, trained.id, split, cells, classes, said[:, None], chances)


def _predict(
    workspace: Workspace,
    parent: int,
    split: int,
    cells: Cells,
    classes: list[tuple[int, str]],
    labels: NDArray[np.int64],
    chances: NDArray[np.float64],
) -> None:
    ids = np.array([label for label, _ in classes])[labels]
    parameters = asdict(PredictParams()) | {"top_k": labels.shape[1]}
    with workspace.database.begin() as session:
        recipe = register(session, RecipeSpec(Stage.PREDICT, 1, parameters))
    names = ("run_id", "cell_id", "rank", "label_id", "probability")
    with (
        running(workspace.database, recipe, parent_id=parent, split_id=split) as run,
        workspace.database.begin() as session,
    ):
        for start in range(0, len(ids), ROWS_AT_ONCE):
            some = slice(start, start + ROWS_AT_ONCE)
            rows = [
                (run.id, cell, rank, label, chance)
                for cell, answer, sure in zip(
                    cells.ids[some].tolist(),
                    ids[some].tolist(),
                    chances[some].tolist(),
                    strict=True,
                )
                for rank, (label, chance) in enumerate(zip(answer, sure, strict=True), start=1)
            ]
            bulk_insert(session, Prediction, names, rows)
