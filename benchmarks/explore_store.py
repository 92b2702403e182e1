"""A large store to look at: by default 10 plates, 30,720 images, some 5 million cells.

python benchmarks/explore_store.py FOLDER [--plates 10] [--sites 8]

A few rendered fields of 1080 x 1080 pixels and 5 channels, with their true masks, stand for all
images. Each plate has 80 compounds at 4 doses and 64 wells of DMSO, negative controls. Cells are
measured, flagged, split by wells and labelled by two networks; profiles and hits are the product's.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import insert, select

from cellstore.analysis.features import FEATURE_NAMES, measure_cells
from cellstore.analysis.quality import PlaneQuality, plane_quality
from cellstore.analysis.rendering import CHANNELS, TREATMENTS, FieldSpec, PlateDesign, render_field
from cellstore.config import (
    MeasureParams,
    PredictParams,
    QcParams,
    SegmentParams,
    SplitParams,
    TrainParams,
)
from cellstore.db.bulk import bulk_insert, insert_numbered
from cellstore.enums import ArtifactKind, Control, FeatureStorage, PerturbationKind, Stage, Status
from cellstore.io.image_files import encode_tiff
from cellstore.io.treatments import TreatmentRecord
from cellstore.jobs.planes import cell_rows
from cellstore.jobs.runs import RecipeSpec, keep_files, register, running
from cellstore.jobs.workspace import Workspace, create_workspace
from cellstore.models import (
    Cell,
    CellFeatures,
    FeatureSet,
    Folder,
    Image,
    ImageFile,
    ImageQuality,
    Job,
    Label,
    Perturbation,
    Plate,
    Prediction,
    Recipe,
    RunMetric,
    Segmentation,
    Split,
    SplitMember,
    Treatment,
    TreatmentPart,
    Well,
)
from cellstore.stages.hits import hits
from cellstore.stages.ingest.write_treatments import treatment_values
from cellstore.stages.profile import profile
from cellstore.stages.qc import flag_plate, flagging_of, quality_spec
from cellstore.stages.split import create_split

SIDE, DRAWN_SIDE = 1080, 540
VARIANTS = 2
"""Fields that are rendered of each made-up treatment."""
COMPOUNDS, DOSES, COLUMNS, WELLS = 80, (0.1, 1.0, 10.0, 100.0), 24, 384
STORED = FEATURE_NAMES[:-2]
"""All but the centroid, which is in table cells."""
IMAGES_AT_ONCE = 256
HEADS = ("al", "be", "ce", "do", "fo", "gi", "ibru", "keto", "lu", "mira")
TAILS = ("tinib", "stat", "zomib", "rubicin", "limus", "taxel", "olol", "prazole")
GENES = ("EGFR", "HDAC1", "PSMB5", "TOP2A", "MTOR", "TUBB", "ADRB1", "ATP4A")


@dataclass(frozen=True)
class Field:
    """A rendered field: ``cells`` (N, 7), ``features`` (N, 12), files and their quality."""

    cells: NDArray[Any]
    features: NDArray[np.float64]
    masks: NDArray[np.uint16]
    files: tuple[tuple[str, str, int, int], ...]
    quality: tuple[PlaneQuality, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="the new store; images go beside it")
    parser.add_argument("--plates", type=int, default=10)
    parser.add_argument("--sites", type=int, default=8)
    args = parser.parse_args()
    began = time.perf_counter()
    cells = make_store(args.folder, args.plates, args.sites)
    print(f"{cells:,} cells in {time.perf_counter() - began:.0f} s")


def make_store(root: Path, plates: int = 10, sites: int = 8) -> int:
    """Make the store; return how many cells it has."""
    folder = root.parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_draw_field(folder, number) for number in range(len(TREATMENTS) * VARIANTS)]
    workspace, _ = create_workspace(root)
    try:
        labels = _insert_images(workspace, folder, drawn, plates, sites)
        found = _insert_cells(workspace, drawn)
        _insert_quality(workspace, drawn, found)
        create_split(workspace, "by-well", SplitParams(test_size=0.2, validation_size=0.2))
        with workspace.database.read() as session:
            split_id = session.scalars(select(Split.id)).one()
        for seed in (0, 1):
            _insert_run(workspace, found, labels, split_id, seed)
        with workspace.database.begin() as session:
            session.connection().exec_driver_sql("ANALYZE")
        profile(workspace)
        hits(workspace)
        return int(found.counts.sum())
    finally:
        workspace.database.close()


def _draw_field(folder: Path, number: int) -> Field:
    from scipy import ndimage

    design = PlateDesign(size=DRAWN_SIDE, n_channels=5)
    spec = FieldSpec("P", 2, 2 + number, 1, TREATMENTS[number // VARIANTS])
    drawn = render_field(design, spec)
    at = np.arange(SIDE) * DRAWN_SIDE // SIDE
    masks = np.ascontiguousarray(drawn.masks[at][:, at])
    planes = [ndimage.zoom(plane, SIDE / DRAWN_SIDE, order=1) for plane in drawn.channels]
    files = []
    for channel, plane in zip(CHANNELS, planes, strict=True):
        path = folder / f"field{number:02d}-{channel.name}.tiff"
        data = encode_tiff(plane)
        path.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        files.append((path.name, digest, len(data), path.stat().st_mtime_ns))
    rows = cell_rows(masks)
    names = ("object_number", "min_row", "min_col", "max_row", "max_col", "centroid_row")
    cells = np.array([[row[name] for name in (*names, "centroid_col")] for row in rows])
    measured = measure_cells(masks, planes[-1])
    features = np.column_stack([measured[name] for name in STORED])
    quality = tuple(plane_quality(plane) for plane in planes)
    return Field(cells, features, masks, tuple(files), quality)


def _field_of(compound: int, site: int) -> int:
    """The rendered field of an image; compound 0 is DMSO, as the first made-up treatment is."""
    kind = 0 if compound == 0 else 1 + compound % (len(TREATMENTS) - 1)
    return kind * VARIANTS + site % VARIANTS


def _compound_of(content: str) -> tuple[int, int]:
    """Compound and field, which are in the made-up digest of an image."""
    return int(content[-8:-4], 16), int(content[-4:], 16)


def _insert_images(
    workspace: Workspace, folder: Path, drawn: Sequence[Field], plates: int, sites: int
) -> NDArray[np.int64]:
    """Make plates, wells and images; return the label id of each compound."""
    names = ["DMSO", *(f"{a}{b}" for a in HEADS for b in TAILS)]
    assert len(names) == COMPOUNDS + 1
    with workspace.database.begin() as session:
        kinds = []
        for number, name in enumerate(names):
            target = None if number == 0 else GENES[number % len(GENES)]
            named = Perturbation(kind=PerturbationKind.COMPOUND, name=name, target=target)
            for dose in (None,) if number == 0 else DOSES:
                unit = None if dose is None else "uM"
                record = TreatmentRecord(PerturbationKind.COMPOUND, name, dose=dose, unit=unit)
                part = TreatmentPart(position=1, perturbation=named, dose=dose, dose_unit=unit)
                kinds.append(Treatment(**treatment_values([record]), target=target, parts=[part]))
        made = [Plate(barcode=f"BR{117000 + i:08d}", batch="big") for i in range(plates)]
        place = Folder(uri=str(folder))
        labels = [Label(field="perturbation", value=name) for name in names]
        session.add_all([*kinds, *made, place, *labels])
        session.flush()
        kind_ids = [kind.id for kind in kinds]
        for plate in made:
            order = np.random.default_rng(plate.id).permutation(WELLS)
            wells = []
            for position in range(WELLS):
                row, column = divmod(position, COLUMNS)
                kind = max(0, int(order[position]) - (WELLS - len(kinds)))
                control = Control.NEGATIVE.value if kind == 0 else None
                name = f"{chr(65 + row)}{column + 1:02d}"
                wells.append((plate.id, row + 1, column + 1, name, kind_ids[kind], control))
            columns = ("plate_id", "well_row", "well_column", "name", "treatment_id", "control")
            well_ids = insert_numbered(session, Well, columns, wells)
            images, of_field = [], []
            for well_id, well in zip(well_ids, wells, strict=True):
                kind = kind_ids.index(well[4])
                compound = 0 if kind == 0 else 1 + (kind - 1) // len(DOSES)
                for site in range(1, sites + 1):
                    field = _field_of(compound, site)
                    content = f"{well_id:040x}{site:016x}{compound:04x}{field:04x}"
                    core = f"r{well[1]:02d}c{well[2]:02d}f{site:02d}"
                    images.append((well_id, site, 1, 1, core, content, 0.65))
                    of_field.append(field)
            columns = ("well_id", "site", "plane", "time_point", "core_name", "content_sha256")
            ids = insert_numbered(session, Image, (*columns, "pixel_size"), images)
            rows = [
                (image, channel.name, position, name, place.id, *known, SIDE, SIDE, "uint16")
                for image, field in zip(ids, of_field, strict=True)
                for position, (channel, (name, *known)) in enumerate(
                    zip(CHANNELS, drawn[field].files, strict=True), start=1
                )
            ]
            columns = ("image_id", "channel", "position", "name", "folder_id", "sha256")
            others = ("size_bytes", "modified_ns", "height", "width", "dtype")
            bulk_insert(session, ImageFile, (*columns, *others), rows)
        return np.array([label.id for label in labels])


@dataclass(frozen=True)
class Found:
    """The images, in the order of their ids, and their cells, which are numbered in that order.

    ``images``, ``wells``, ``compounds``, ``fields``, ``counts``: one for each image; ``first``: the
    id of its first cell. ``contents``: the digests of the images.
    """

    images: NDArray[np.int64]
    wells: NDArray[np.int64]
    compounds: NDArray[np.int64]
    fields: NDArray[np.int64]
    counts: NDArray[np.int64]
    first: NDArray[np.int64]
    contents: list[str]
    inputs: tuple[Recipe, ...]

    def parts(self) -> Iterator[tuple[slice, NDArray[np.int64]]]:
        """Some images, and for each of their cells the number of its image."""
        for start in range(0, len(self.images), IMAGES_AT_ONCE):
            part = slice(start, min(len(self.images), start + IMAGES_AT_ONCE))
            yield part, np.repeat(np.arange(part.start, part.stop), self.counts[part])


def _insert_jobs(session: Any, found: Found, part: slice, recipe: int, run: int) -> None:
    columns = ("recipe_id", "image_id", "content_sha256", "run_id", "status", "attempts", "deaths")
    rows = [
        (recipe, image, content, run, Status.DONE.value, 1, 0)
        for image, content in zip(found.images[part].tolist(), found.contents[part], strict=True)
    ]
    bulk_insert(session, Job, columns, rows)


def _insert_cells(workspace: Workspace, drawn: Sequence[Field]) -> Found:
    database = workspace.database
    with database.begin() as session:
        segment = register(
            session, RecipeSpec(Stage.SEGMENT, 1, asdict(SegmentParams.of("published")))
        )
        spec = RecipeSpec(Stage.MEASURE, 1, asdict(MeasureParams()), None, (segment,))
        measure = register(session, spec)
        about = {"dtype": "float64", "unit": "pixel", "source": "drawn"}
        columns = [{"name": name, **about} for name in FEATURE_NAMES]
        storage = FeatureStorage.TABLE
        session.add(
            FeatureSet(name="basic", recipe_id=measure.id, columns=columns, storage=storage)
        )
        rows = session.execute(
            select(Image.id, Image.well_id, Image.content_sha256).order_by(Image.id)
        ).all()
    of = np.array([_compound_of(str(row[2])) for row in rows])
    counts = np.array([len(field.cells) for field in drawn])[of[:, 1]]
    images = np.array([row[0] for row in rows])
    found = Found(
        *(images, np.array([row[1] for row in rows]), of[:, 0], of[:, 1], counts),
        *(np.cumsum(counts) - counts + 1, [str(row[2]) for row in rows], (segment, measure)),
    )
    rng = np.random.default_rng(3)
    effects = rng.normal(0, 0.25, (COMPOUNDS + 1, len(STORED))) * (
        rng.random((COMPOUNDS + 1, 1)) < 0.5
    )
    effects[0] = 0
    of_well = rng.normal(0, 0.03, (int(found.wells.max()) + 1, len(STORED)))
    now = datetime.now(UTC)
    with running(database, segment) as segmenting, running(database, measure) as measuring:
        with database.begin() as session:
            kept = [
                workspace.artifacts.write(ArtifactKind.MASK, encode_tiff(item.masks), ".tif")
                for item in drawn
            ]
            masks = keep_files(session, kept, segmenting.id)
        for part, image_of in found.parts():
            with database.begin() as session:
                segmentations = [
                    {"id": image, "image_id": image, "content_sha256": content, "diameter": 56.0}
                    | {"recipe_id": segment.id, "run_id": segmenting.id, "created_at": now}
                    | {"n_cells": count, "mask_artifact_id": masks[field]}
                    for image, content, count, field in zip(
                        *(found.images[part].tolist(), found.contents[part]),
                        *(found.counts[part].tolist(), found.fields[part].tolist()),
                        strict=True,
                    )
                ]
                session.execute(insert(Segmentation), segmentations)
                some = [drawn[field] for field in found.fields[part].tolist()]
                ids = found.first[part.start] + np.arange(image_of.size)
                cells = np.concatenate([item.cells for item in some])
                numbers = [column.astype(np.int64).tolist() for column in cells[:, :5].T]
                centres = cells[:, 5:].T.tolist()
                columns = ("id", "segmentation_id", "object_number", "min_row", "min_col")
                others = ("max_row", "max_col", "centroid_row", "centroid_col")
                values = [ids.tolist(), found.images[image_of].tolist(), *numbers, *centres]
                bulk_insert(session, Cell, (*columns, *others), list(zip(*values, strict=True)))
                shift = effects[found.compounds[image_of]] + of_well[found.wells[image_of]]
                values = np.concatenate([item.features for item in some])
                values = values * np.exp(shift + rng.normal(0, 0.05, shift.shape))
                rows = zip(
                    *(ids.tolist(), [measure.id] * ids.size, [measuring.id] * ids.size),
                    *values.round(3).T.tolist(),
                    strict=True,
                )
                columns = ("cell_id", "recipe_id", "run_id", *STORED)
                bulk_insert(session, CellFeatures, columns, list(rows))
                _insert_jobs(session, found, part, segment.id, segmenting.id)
                _insert_jobs(session, found, part, measure.id, measuring.id)
    return found


def _insert_quality(workspace: Workspace, drawn: Sequence[Field], found: Found) -> None:
    """The quality of each channel; one image in fifty is blurred. What is odd, the product says."""
    database, rng = workspace.database, np.random.default_rng(5)
    with database.begin() as session:
        quality = register(session, quality_spec())
        inputs = (quality, *found.inputs)
        recipe = register(session, RecipeSpec(Stage.QC, 1, asdict(QcParams()), None, inputs))
        plates = session.execute(select(Plate.id, Plate.barcode)).all()
    names = [item.name for item in fields(PlaneQuality)]
    columns = ("image_id", "recipe_id", "content_sha256", "channel", "run_id", *names)
    with running(database, recipe) as run:
        run.result = {"images": len(found.images), "failed": 0, "plates": [p[1] for p in plates]}
        for part, _ in found.parts():
            rows = []
            for number in range(part.start, part.stop):
                blurred = 0.2 if rng.random() < 0.02 else 1.0
                for channel, item in zip(
                    CHANNELS, drawn[found.fields[number]].quality, strict=True
                ):
                    values = [getattr(item, name) for name in names]
                    values = [value * rng.normal(1, 0.01) for value in values]
                    values[names.index("sharpness")] *= blurred
                    image = int(found.images[number])
                    key = (image, quality.id, found.contents[number], channel.name, run.id)
                    rows.append((*key, *values))
            with database.begin() as session:
                bulk_insert(session, ImageQuality, columns, rows)
                _insert_jobs(session, found, part, quality.id, run.id)
        with database.read() as session:
            flagging = flagging_of(session, run.id)
        for plate, _ in plates:
            with database.begin() as session:
                flag_plate(session, flagging, plate)


def _insert_run(
    workspace: Workspace, found: Found, labels: NDArray[np.int64], split_id: int, seed: int
) -> None:
    """A network and what it says: the second one is better, and each is better in training."""
    database, rng = workspace.database, np.random.default_rng([seed, 7])
    params = TrainParams(seed=seed)
    with database.begin() as session:
        query = select(SplitMember.image_id).where(SplitMember.split_id == split_id)
        trained_on = set(session.scalars(query.where(SplitMember.subset == "train")))
        spec = RecipeSpec(Stage.TRAIN, 1, asdict(params), None, found.inputs)
        recipe = register(session, spec)
    with running(database, recipe, split_id=split_id, seed=seed) as training:
        with database.begin() as session:
            for epoch in range(1, 14):
                loss = 4.4 * float(np.exp(-epoch / 9))
                values = {"train_loss": loss, "validation_loss": loss + 0.04 * epoch}
                values |= {"validation_accuracy": 0.3 * (1 - float(np.exp(-epoch / 4)))}
                session.add_all(
                    RunMetric(run_id=training.id, epoch=epoch, name=name, value=value)
                    for name, value in values.items()
                )
        training.result = {"epochs": 13, "best_epoch": 11}
    with database.begin() as session:
        parameters = asdict(PredictParams()) | {"top_k": 2}
        spec = RecipeSpec(Stage.PREDICT, 1, parameters, None, (recipe, *found.inputs))
        predict = register(session, spec)
    skill = rng.beta(1.2, 2.0, COMPOUNDS + 1)[found.compounds] + 0.1 * seed
    skill += 0.2 * np.isin(found.images, list(trained_on))
    usual = (found.compounds * 7 + 3) % (COMPOUNDS + 1)  # what each is mistaken for most
    columns = ("run_id", "cell_id", "rank", "label_id", "probability")
    with running(database, predict, parent_id=training.id, split_id=split_id) as run:
        for part, image_of in found.parts():
            size = image_of.size
            truth = found.compounds[image_of]
            right = rng.random(size) < np.clip(skill[image_of], 0, 0.97)
            wrong = np.where(
                rng.random(size) < 0.5, usual[image_of], rng.integers(0, COMPOUNDS + 1, size)
            )
            first = np.where(right, truth, wrong)
            second = np.where(first == truth, wrong, truth)
            second = np.where(second == first, (first + 1) % (COMPOUNDS + 1), second)
            top = np.clip(rng.beta(2, 3, size) + 0.2 * right, 0.02, 0.99)
            top = np.round(top * 1024) / 1024
            rest = np.round((1 - top) * rng.uniform(0.2, 0.9, size) * 1024) / 1024
            ids = (found.first[part.start] + np.arange(size)).tolist()
            choices = [
                (1, labels[first].tolist(), np.maximum(top, rest).tolist()),
                (2, labels[second].tolist(), np.minimum(top, rest).tolist()),
            ]
            rows = [
                (run.id, cell, rank, label, chance)
                for rank, chosen, chances in choices
                for cell, label, chance in zip(ids, chosen, chances, strict=True)
            ]
            rows.sort(key=lambda row: row[1])  # as the stage writes them
            with database.begin() as session:
                bulk_insert(session, Prediction, columns, rows)
                _insert_jobs(session, found, part, predict.id, run.id)


if __name__ == "__main__":
    main()
