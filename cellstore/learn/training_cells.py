"""What is learned from which cells of which split: what networks and baselines have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ..config import BaselineParams, Sources, TrainParams
from ..enums import Subset
from ..errors import UserInputError
from ..jobs.lookup import find_split
from ..jobs.runs import RecipeSpec, digest_of_images, fingerprint
from ..jobs.workspace import Workspace
from ..models import Cell, FeatureSet, Label, Recipe, Split, SplitMember
from ..query.cells import (
    CellSource,
    ImageBlock,
    as_text,
    cells_query,
    choose_recipes,
    digests_of_chosen,
    feature_leak,
    list_blocks,
)
from ..query.exclusions import qc_run_for, unseen_notes
from ..query.feature_files import open_set


@dataclass(frozen=True)
class TrainingCells:
    """Everything that is known before the first cell is read.

    ``labels``: label ids by value, in the order of a model's outputs. ``blocks``: by subset the
    images that have cells, ``members``: how many images are in it. ``flagged``: how many images and
    cells quality control has taken away from what is learned from or validated on. ``notes`` are
    sentences that a reader of the scores has to know. ``parameters`` and ``inputs`` are those of
    the recipe; ``local`` are parameters that mean something in this store only. ``selection``: the
    SQL that selects cells.
    """

    split: Split
    segment: Recipe
    measure: Recipe
    source: CellSource
    labels: dict[str, int]
    blocks: dict[Subset, tuple[ImageBlock, ...]]
    members: dict[Subset, int]
    flagged: tuple[int, int] | None
    notes: tuple[str, ...]
    parameters: dict[str, Any]
    local: dict[str, Any]
    inputs: tuple[Recipe, ...]
    selection: str | None = None

    def query(self, subset: Subset | None = None) -> str:
        """Return the SQL of the cells, to be kept with the run."""
        found = as_text(cells_query(replace(self.source, subset=subset)))
        if self.selection is None:
            return found
        lines = ("Of these only the cells that this gives (cellstore sql):", self.selection)
        return "\n-- ".join([found, *"\n".join(lines).splitlines()])

    def fingerprints(self, trained: RecipeSpec) -> dict[str, str]:
        """Return what a model comes from, for the record beside it."""
        return {
            "train": fingerprint(trained),
            "split": self.split.fingerprint,
            "segment": self.segment.fingerprint,
            "measure": self.measure.fingerprint,
        }

    def check(self, labels: Collection[str], *subsets: Subset) -> None:
        """Refuse to learn from one class, or from a subset that has no cells; say what to do."""
        name = repr(self.split.name)
        has_cells = {block.label_id for block in self.blocks[Subset.TRAIN]}
        left = [value for value in labels if self.labels[value] in has_cells]
        if len(labels) == 1 or (self.selection is not None and len(left) == 1):
            what = "Make another split." if self.selection is None else "Select other cells."
            raise UserInputError(
                f"The training subset of split {name} has cells of one class only, "
                f"{(left or list(labels))[0]}: there is nothing to learn. {what}"
            )
        features = self.source.features
        for subset in subsets:
            called = "training" if subset is Subset.TRAIN else subset.value
            if self.blocks[subset]:
                continue
            if not (members := self.members.get(subset, 0)):
                raise UserInputError(
                    f"Split {name} has no image in its {called} subset. Make another split: "
                    "classes with three wells or more give one, or ask for another validation size."
                )
            what = "measured cells. Run: cellstore segment, then: cellstore measure"
            if self.selection is not None:
                what = "a measured cell that the selection chose. Select cells of it, too"
            elif self.flagged is not None and self.flagged[0]:
                what = (
                    f"a measured cell that quality-control run {self.source.unflagged_by} has not "
                    "flagged. Train without --exclude-flagged, or make it less strict: "
                    "cellstore qc --help"
                )
            elif features.has_gaps:
                group = self.measure.parameters.get("group")
                cure = f"cellstore measure --features {group}" if group else "cellstore ingest"
                what = f"cells in feature set {features.name!r}. Run: {cure}"
            raise UserInputError(
                f"None of the {members} images in the {called} subset of split {name} has {what}"
            )


def validation_subset(split: Split) -> Subset:
    """Return the subset that stops a training: as published, the test subset does that, too."""
    return Subset.TEST if split.protocol == "published" else Subset.VALIDATION


def find_training_cells(
    session: Session,
    workspace: Workspace,
    sources: Sources,
    params: TrainParams | BaselineParams,
    subsets: Collection[Subset] = (),
) -> TrainingCells:
    """Return what there is to learn from.

    ``params`` name the feature set (``None``: the built-in measurements last used), the
    quality-control run whose flagged images and cells do not count, and a selection of cells.
    ``subsets``: those that are read; default: the training subset and the one that stops a
    training.
    """
    split = find_split(session, sources.split)
    recipes = (sources.segmentation, sources.measurement)
    segment, measure = choose_recipes(session, *recipes, params.features)
    found = open_set(session, workspace.artifacts, measure.id)
    source = CellSource(segment.id, measure.id, split.id, features=found)
    notes: list[str] = []
    inputs = [session.get_one(Recipe, split.recipe_id), segment, measure]
    if params.exclude_flagged is not None:
        members = select(SplitMember.image_id).where(SplitMember.split_id == split.id)
        qc, unseen = qc_run_for(session, params.exclude_flagged, members, [segment.id])
        notes += unseen_notes(qc, unseen)
        inputs.append(session.get_one(Recipe, qc.recipe_id))
        source = replace(source, unflagged_by=qc.id)
    leak = feature_leak(session, measure, split.id)
    notes += [leak] if leak else []
    selection, asked = None, dict[str, Any]()
    if params.selects:
        from ..query.cell_tables import sql_of

        asked = {"where": params.where} if params.sql is None else {"sql": sql_of(params.sql)}
        source, selection, found_notes = _select(session, workspace, source, split, asked)
        notes += found_notes
    blocks = list_blocks(session, source)
    labels = (
        select(Label.value, Label.id)
        .join(SplitMember, SplitMember.label_id == Label.id)
        .where(SplitMember.split_id == split.id, SplitMember.subset == Subset.TRAIN)
        .distinct()
    )
    counts = select(SplitMember.subset, func.count()).where(SplitMember.split_id == split.id)
    used = (Subset.TRAIN, validation_subset(split))
    if source.chosen is not None:
        notes.insert(0, _use_of(source.chosen, blocks, subsets or used))
    flagged = None
    if source.unflagged_by is not None:
        everything = list_blocks(session, replace(source, unflagged_by=None))
        before, after = ([b.n_cells for b in x if b.subset in used] for x in (everything, blocks))
        flagged = (len(before) - len(after), sum(before) - sum(after))
    images = select(SplitMember.image_id).where(SplitMember.split_id == split.id)
    details: dict[int, Any] = {b.image_id: b.n_cells for b in blocks}
    if source.chosen is not None:
        which = digests_of_chosen(session, source)
        details = {image_id: [count, which[image_id]] for image_id, count in details.items()}
    cells = digest_of_images(session, images, details)
    parameters: dict[str, Any] = {"split": split.fingerprint, "cells": cells, **asked}
    if found.has_gaps:
        mark = found.mark(session, segment.id, images)
        parameters |= {"feature_files": mark, "gaps": "mean of the training subset"}
    return TrainingCells(
        split=split,
        segment=segment,
        measure=measure,
        source=source,
        # By value: the numbers of labels differ from store to store.
        labels=dict(sorted(session.execute(labels).all())),
        blocks={subset: tuple(b for b in blocks if b.subset is subset) for subset in Subset},
        members=dict(session.execute(counts.group_by(SplitMember.subset)).all()),
        flagged=flagged,
        notes=tuple(notes),
        parameters=parameters,
        local={"exclude_flagged": source.unflagged_by},
        inputs=tuple(inputs),
        selection=selection,
    )


def _select(
    session: Session,
    workspace: Workspace,
    source: CellSource,
    split: Split,
    asked: Mapping[str, str | None],
) -> tuple[CellSource, str, list[str]]:
    """Return the source with the selected cells only, the SQL, and sentences on what it reads."""
    from ..query.cell_tables import LIMITS, chosen_cells, selecting
    from ..query.engine import open_questions

    where, sql = asked.get("where"), asked.get("sql")
    name = None if source.features.files is None else source.features.name
    last = session.scalar(select(func.max(Cell.id))) or 0
    with open_questions(workspace, LIMITS) as questions:
        chosen = selecting(questions, where, sql, source.segment_id, source.measure_id, name)
        source = replace(source, chosen=chosen_cells(questions, chosen, last))
    notes = []
    if chosen.predictions_read:
        read = ", ".join(chosen.predictions_read)
        notes.append(
            f"The selection reads predictions of models ({read}). If one of them "
            "has learned from test wells of this split, scores are too good."
        )
    if labels := sorted(chosen.reads & {"labels", "split_members"}):
        notes.append(
            f"The selection reads {' and '.join(labels)}: validation cells, too, are selected by "
            "what is to be learned. Cells of the test subset are not."
        )
    for item in session.scalars(select(FeatureSet).order_by(FeatureSet.id)):
        if item.name.lower() in chosen.reads and item.recipe_id != source.measure_id:
            leak = feature_leak(session, session.get_one(Recipe, item.recipe_id), split.id)
            notes += [leak] if leak else []
    return source, chosen.query, notes


def _use_of(chosen: bytes, blocks: Sequence[ImageBlock], subsets: Collection[Subset]) -> str:
    """Say how many of the selected cells are used, and of which subsets."""
    total = int.from_bytes(chosen, "little").bit_count()
    cells = Counter[Subset]()
    for block in blocks:
        cells[block.subset] += block.n_cells
    used = [f"{cells[s]:,} in the {s.value} subset" for s in Subset if s in subsets and cells[s]]
    return f"{total:,} cells are selected, and used: {', '.join(used) or 'none'}."


def excluded_columns(features: Sequence[str], kept: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the columns without a value in the training subset, and a sentence on them."""
    gone = [name for name in features if name not in set(kept)]
    if not gone:
        return [], []
    what = f"{len(gone)} columns of the feature set have no value in the training subset"
    return gone, [f"{what} and were excluded: {', '.join(gone[:5])}."]
