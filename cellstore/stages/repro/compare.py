"""What a run said and what its redo says, row by row; nothing is held but the differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from ...db.models import (
    Artifact,
    CellFeatures,
    Image,
    Label,
    Prediction,
    Run,
    RunArtifact,
    RunMetric,
    Segmentation,
    SplitMember,
)
from ...terms import ArtifactKind

SHOWN = 5
ROWS = 10_000

TOLERANCE = 1e-4
"""Of probabilities and metrics: what 32-bit sums in another order change at most, with room."""

TOLERANCE_OF_FEATURES = 1e-9
"""Of measurements, relative: they are sums in 64 bits."""

TIMES = ("seconds", "waited")
"""Metrics of a training that are about the machine."""


@dataclass
class Tally:
    """How much was compared, and the first differences."""

    what: str
    tolerance: float
    compared: int = 0
    differ: int = 0
    largest: float = 0.0
    differences: list[str] = field(default_factory=list)

    def count(self, named: str, then: Any, now: Any) -> None:
        """Compare one thing: numbers within the tolerance, everything else for equality."""
        self.compared += 1
        if then == now:
            return
        if isinstance(then, float) and isinstance(now, float):
            if math.isnan(then) and math.isnan(now):
                return
            gap = abs(then - now)
            self.largest = max(self.largest, gap if math.isfinite(gap) else math.inf)
            if gap <= self.tolerance:
                return
        self.differ += 1
        if len(self.differences) < SHOWN:
            self.differences.append(f"{named}: {_shown(then)} before, {_shown(now)} now")


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


Keyed = tuple[Any, tuple[Any, ...]]


def merged(
    then: Iterable[Keyed], now: Iterable[Keyed]
) -> Iterator[tuple[Any, tuple[Any, ...] | None, tuple[Any, ...] | None]]:
    """Yield each key of two series that ascend by key, with the values of both; None: not there."""
    olds, news = iter(then), iter(now)
    old, new = next(olds, None), next(news, None)
    while old is not None or new is not None:
        if new is None or (old is not None and old[0] < new[0]):
            assert old is not None
            yield old[0], old[1], None
            old = next(olds, None)
        elif old is None or new[0] < old[0]:
            yield new[0], None, new[1]
            new = next(news, None)
        else:
            yield old[0], old[1], new[1]
            old, new = next(olds, None), next(news, None)


def compare_predictions(
    then: Session, now: Session, runs: tuple[int, int], cells: Select[Any] | None
) -> Tally:
    """Compare labels and probabilities of each cell and rank; ``cells``: of these alone."""
    tally = Tally("predictions", TOLERANCE)
    old = _predictions(then, runs[0], cells)
    for (cell, rank), before, after in merged(old, _predictions(now, runs[1], None)):
        named = f"cell {cell}, rank {rank}"
        if before is None or after is None:
            tally.count(named, before and before[0], after and after[0])
        elif before[0] != after[0]:
            tally.count(named, f"{before[0]} {before[1]:.4f}", f"{after[0]} {after[1]:.4f}")
        else:
            tally.count(f"{named}, {before[0]}", before[1], after[1])
    return tally


def _predictions(session: Session, run_id: int, cells: Select[Any] | None) -> Iterator[Keyed]:
    query = (
        select(Prediction.cell_id, Prediction.rank, Label.value, Prediction.probability)
        .join(Label, Label.id == Prediction.label_id)
        .where(Prediction.run_id == run_id)
        .order_by(Prediction.cell_id, Prediction.rank)
    )
    if cells is not None:
        query = query.where(Prediction.cell_id.in_(cells))
    for row in session.execute(query.execution_options(yield_per=ROWS)):
        yield (row[0], row[1]), (row[2], row[3])


def compare_trainings(then: Session, now: Session, runs: tuple[int, int]) -> Tally:
    """Compare the tensors of the checkpoints by sha256; where they differ, the metrics decide."""
    tally = Tally("checkpoints and metrics", TOLERANCE)
    before, after = _tensors(then, runs[0]), _tensors(now, runs[1])
    if before == after:
        tally.count("checkpoint", before, after)
    else:
        tally.compared += 1
        tally.largest = math.ulp(1.0)  # not the same bits, whatever the metrics say
        tally.differences.append(f"checkpoint: sha256 {before[:12]} before, {after[:12]} now")
    old, new = _metrics(then, runs[0]), _metrics(now, runs[1])
    for (epoch, name), first, second in merged(old, new):
        tally.count(f"{name} of epoch {epoch}", first and first[0], second and second[0])
    if before != after and tally.compared == 1:  # a baseline has no metrics that could decide
        tally.differ += 1
    return tally


def _tensors(session: Session, run_id: int) -> str:
    query = (
        select(Artifact.sha256)
        .join(RunArtifact, RunArtifact.artifact_id == Artifact.id)
        .where(RunArtifact.run_id == run_id, Artifact.kind == ArtifactKind.CHECKPOINT)
        .where(Artifact.path.like("%.safetensors"))
    )
    return session.scalars(query.order_by(Artifact.id)).first() or "none"


def _metrics(session: Session, run_id: int) -> Iterator[Keyed]:
    query = select(RunMetric.epoch, RunMetric.name, RunMetric.value)
    query = query.where(RunMetric.run_id == run_id, RunMetric.name.not_in(TIMES))
    rows = [((row[0], row[1]), (row[2],)) for row in session.execute(query)]
    yield from sorted(rows, key=lambda row: row[0])


def compare_masks(
    then: Session, now: Session, runs: tuple[int, int], images: Sequence[int]
) -> Tally:
    """Compare the masks of images by sha256, and how many cells they have."""
    tally = Tally("images' masks", 0.0)
    pairs = merged(_masks(then, runs[0], images), _masks(now, runs[1], images))
    for image, before, after in pairs:
        tally.count(f"image {image}", before and _mask(*before), after and _mask(*after))
    return tally


def _mask(sha256: str | None, cells: int) -> str:
    return f"{cells} cells in masks {(sha256 or 'unknown')[:12]}"


def _masks(session: Session, run_id: int, images: Sequence[int]) -> Iterator[Keyed]:
    query = (
        select(Segmentation.image_id, Artifact.sha256, Segmentation.n_cells)
        .outerjoin(Artifact, Artifact.id == Segmentation.mask_artifact_id)
        .where(Segmentation.image_id.in_(images), Segmentation.run_id == run_id)
        .order_by(Segmentation.image_id)
    )
    for row in session.execute(query):
        yield row[0], (row[1], row[2])


def compare_features(
    then: Session, now: Session, recipes: tuple[int, int], cells: Select[Any]
) -> Tally:
    """Compare the built-in measurements of cells, value by value."""
    tally = Tally("measurements", TOLERANCE_OF_FEATURES)
    old, new = _features(then, recipes[0], cells), _features(now, recipes[1], None)
    names = _feature_columns()
    compare_values(tally, names, merged(old, new))
    return tally


def compare_values(
    tally: Tally,
    names: Sequence[str],
    pairs: Iterable[tuple[Any, tuple[Any, ...] | None, tuple[Any, ...] | None]],
) -> None:
    """Compare rows of numbers, each by its relative difference."""
    for cell, before, after in pairs:
        if before is None or after is None:
            told = ("measured", None) if after is None else (None, "measured")
            tally.count(f"cell {cell}", *told)
            continue
        for name, first, second in zip(names, before, after, strict=True):
            _relative(tally, f"{name} of cell {cell}", first, second)


def _relative(tally: Tally, named: str, then: Any, now: Any) -> None:
    if isinstance(then, float) and isinstance(now, float) and then != now:
        size = max(abs(then), abs(now))
        gap = abs(then - now) / size if size and math.isfinite(size) else math.nan
        if gap <= tally.tolerance:
            tally.compared += 1
            tally.largest = max(tally.largest, gap)
            return
    tally.count(named, then, now)


def _feature_columns() -> list[str]:
    keys = ("cell_id", "recipe_id", "run_id")
    return [column.name for column in CellFeatures.__table__.columns if column.name not in keys]


def _features(session: Session, recipe_id: int, cells: Select[Any] | None) -> Iterator[Keyed]:
    columns = [getattr(CellFeatures, name) for name in _feature_columns()]
    query = select(CellFeatures.cell_id).add_columns(*columns)
    query = query.where(CellFeatures.recipe_id == recipe_id).order_by(CellFeatures.cell_id)
    if cells is not None:
        query = query.where(CellFeatures.cell_id.in_(cells))
    for row in session.execute(query.execution_options(yield_per=ROWS)):
        yield row[0], tuple(row[1:])


def compare_members(then: Session, now: Session, splits: tuple[int, int]) -> Tally:
    """Compare the side and the label of each image of two splits."""
    tally = Tally("members of the split", 0.0)
    for image, before, after in merged(_members(then, splits[0]), _members(now, splits[1])):
        tally.count(f"image {image}", before and " ".join(before), after and " ".join(after))
    return tally


def _members(session: Session, split_id: int) -> Iterator[Keyed]:
    query = (
        select(SplitMember.image_id, SplitMember.subset, Label.value)
        .join(Label, Label.id == SplitMember.label_id)
        .join(Image, Image.id == SplitMember.image_id)
        .where(SplitMember.split_id == split_id)
        .order_by(SplitMember.image_id)
    )
    for row in session.execute(query.execution_options(yield_per=ROWS)):
        yield row[0], (row[1].value, row[2])


Comparer = Callable[[Session, Session, Run], Tally]
