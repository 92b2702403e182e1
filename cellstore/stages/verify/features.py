"""The files of feature sets against the cells that they are of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select

from ...db.bulk import in_lists
from ...db.models import Artifact, Cell, FeatureFile, FeatureSet, RecipeInput, Segmentation
from ...errors import StorageError
from ...progress import track
from ...reading.featuresets import FileFacts, stream_ids
from ...runs import Workspace
from .report import Problem


@dataclass(frozen=True)
class _Features:
    """A file of a feature set, what the database says of it, and whose cells it may hold."""

    path: str
    name: str
    said: FileFacts
    recipe_id: int


def check_features(workspace: Workspace, broken: set[str]) -> tuple[int, list[Problem]]:
    """Count the files of feature sets, and say which do not fit their cells."""
    with workspace.database.read() as session:
        files = [
            _Features(path, name, FileFacts(rows, first, last), recipe_id)
            for path, name, rows, first, last, recipe_id in session.execute(_feature_rows())
        ]
    problems = []
    whole = [file for file in files if file.path not in broken]
    for file, earlier in track(
        workspace.progress, "verify features", len(whole), _with_earlier(whole)
    ):
        reason = _features_reason(workspace, file, earlier)
        if reason is not None:
            problems.append(Problem(file.path, f"feature set {file.name}: {reason}"))
    return len(files), problems


def _with_earlier(files: Sequence[_Features]) -> Iterator[tuple[_Features, list[_Features]]]:
    """Yield files, by set and first cell, with those before whose range reaches into theirs."""
    near: list[_Features] = []
    for file in files:
        first = file.said.first_cell_id
        near = [
            other
            for other in near
            if other.recipe_id == file.recipe_id and other.said.last_cell_id >= first
        ]
        yield file, near
        near = [*near, file]


def _feature_rows() -> Any:
    return (
        select(
            Artifact.path,
            FeatureSet.name,
            FeatureFile.n_rows,
            FeatureFile.first_cell_id,
            FeatureFile.last_cell_id,
            FeatureSet.recipe_id,
        )
        .join(FeatureFile, FeatureFile.artifact_id == Artifact.id)
        .join(FeatureSet, FeatureSet.id == FeatureFile.feature_set_id)
        .order_by(FeatureSet.recipe_id, FeatureFile.first_cell_id, Artifact.path)
    )


def _features_reason(
    workspace: Workspace, file: _Features, earlier: Sequence[_Features]
) -> str | None:
    locate = workspace.artifacts.locate
    facts, homeless, twice = FileFacts(0, 0, 0), 0, 0
    try:
        others = [stream_ids(locate(other.path)) for other in earlier]
        taken = np.concatenate([np.empty(0, np.int64), *chain.from_iterable(others)])
        for ids in stream_ids(locate(file.path)):
            facts = facts.with_ids(ids)
            homeless += len(ids) - _cells_among(workspace, file.recipe_id, ids)
            twice += int(np.isin(ids, taken).sum())
    except StorageError as error:
        return str(error)
    if facts != file.said:
        return f"the file has {facts}, the database {file.said}"
    if twice:
        return f"{twice} of its cells are in another file of the set, too"
    return f"{homeless} of its cells are not in the database" if homeless else None


def _cells_among(workspace: Workspace, recipe_id: int, ids: NDArray[np.int64]) -> int:
    """How many of these ascending ids are cells of the segmentations that the set is of."""
    source = select(RecipeInput.input_id).where(RecipeInput.recipe_id == recipe_id)
    of_recipe = select(Segmentation.id).where(Segmentation.recipe_id.in_(source))
    there = select(Cell.id, Cell.segmentation_id).where(Cell.id.between(int(ids[0]), int(ids[-1])))
    # Cells first, then their segmentations: a join would walk all cells of the recipe, each time.
    with workspace.database.read() as session:
        homes = {row.id: row.segmentation_id for row in session.execute(there)}
        right: set[int] = set()
        for some in in_lists(set(homes.values())):
            right.update(session.scalars(of_recipe.where(Segmentation.id.in_(some))))
    cells = [cell for cell, home in homes.items() if home in right]
    return int(np.isin(ids, cells).sum())
