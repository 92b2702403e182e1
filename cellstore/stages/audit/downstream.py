"""What came of an image, a recipe, a run or an ingested table: counted by the database."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from ...db.models import (
    Cell,
    CellFeatures,
    FeatureFile,
    FeatureSet,
    Image,
    Job,
    Prediction,
    Recipe,
    RecipeInput,
    Run,
    Segmentation,
    Split,
    SplitMember,
    WellChange,
)
from ...terms import Stage, Status
from .facts import Came


def came_of_images(session: Session, images: Select[int]) -> tuple[Came, ...]:
    """Return what came of some images, a query of their ids."""
    cells = select(Cell.id).join(Segmentation, Segmentation.id == Cell.segmentation_id)
    cells = cells.where(Segmentation.image_id.in_(images))
    found = select(func.count(), func.sum(Segmentation.n_cells))
    n_found, n_cells = session.execute(found.where(Segmentation.image_id.in_(images))).one()
    by = select(Segmentation.run_id).where(Segmentation.image_id.in_(images)).distinct()
    runs = tuple(sorted(session.scalars(by)))
    made = [Came("segmentations", n_found, runs), Came("cells", n_cells or 0)]
    made += [_measured(session, cells), *_measured_beside(session, images)]
    made += _splits(session, images)
    return _some([*made, *_labelled(session, cells)])


def _measured(session: Session, cells: Select[int]) -> Came:
    """Cells with built-in measurements."""
    query = select(CellFeatures.run_id, func.count()).where(CellFeatures.cell_id.in_(cells))
    rows = session.execute(query.group_by(CellFeatures.run_id)).all()
    return Came("measured cells", sum(n for _, n in rows), tuple(sorted(run for run, _ in rows)))


def _measured_beside(session: Session, images: Select[int]) -> list[Came]:
    """Feature sets in files that were measured on the images."""
    query = (
        select(FeatureSet.name, Job.run_id)
        .join(FeatureSet, FeatureSet.recipe_id == Job.recipe_id)
        .where(Job.image_id.in_(images), Job.status == Status.DONE)
        .distinct()
    )
    rows = session.execute(query).all()
    names, runs = sorted({row[0] for row in rows}), sorted({row[1] for row in rows})
    return [Came("feature sets", len(names), tuple(runs), tuple(names))]


def _splits(session: Session, images: Select[int]) -> list[Came]:
    query = (
        select(Split.id, Split.name)
        .join(SplitMember, SplitMember.split_id == Split.id)
        .where(SplitMember.image_id.in_(images))
        .distinct()
    )
    rows = sorted(session.execute(query).all())
    trained = select(Run.id).where(Run.split_id.in_([row[0] for row in rows]))
    runs = tuple(session.scalars(trained.where(Run.stage == Stage.TRAIN).order_by(Run.id)))
    return [
        Came("splits", len(rows), names=tuple(row[1] for row in rows)),
        Came("trainings on these splits", len(runs), runs),
    ]


def _labelled(session: Session, cells: Select[int]) -> list[Came]:
    query = select(Prediction.run_id, func.count())
    query = query.where(Prediction.cell_id.in_(cells), Prediction.rank == 1)
    rows = session.execute(query.group_by(Prediction.run_id)).all()
    return [Came("labelled cells", sum(n for _, n in rows), tuple(sorted(run for run, _ in rows)))]


def came_of_recipes(session: Session, recipe_ids: Collection[int]) -> tuple[Came, ...]:
    """Return what came of some recipes, and of those that read what they wrote."""
    below = recipes_below(session, recipe_ids)
    runs = select(Run.stage, Run.id).where(Run.recipe_id.in_(below)).order_by(Run.id)
    by_stage: dict[Stage, list[int]] = {}
    for stage, run_id in session.execute(runs):
        by_stage.setdefault(Stage(stage), []).append(run_id)
    made = [_segmented(session, below), _cells(session, below), _sets(session, below)]
    for stage in (Stage.SPLIT, Stage.TRAIN, Stage.PREDICT):
        found = tuple(by_stage.get(stage, ()))
        made.append(Came(f"{stage.value} runs", len(found), found))
    return _some([*made, _images_labelled(session, by_stage.get(Stage.PREDICT, ()))])


def recipes_below(session: Session, recipe_ids: Collection[int]) -> list[int]:
    """Return the ids of recipes and of all that read from them, however indirectly."""
    found = set(recipe_ids)
    level = set(recipe_ids)
    while level:
        query = select(RecipeInput.recipe_id).where(RecipeInput.input_id.in_(level))
        level = set(session.scalars(query)) - found
        found |= level
    return sorted(found)


def _segmented(session: Session, recipes: Collection[int]) -> Came:
    by = select(Run.id).where(Run.recipe_id.in_(recipes), Run.stage == Stage.SEGMENT)
    runs = tuple(session.scalars(by.order_by(Run.id)))
    query = select(func.count()).where(Segmentation.recipe_id.in_(recipes))
    return Came("segmentations", session.scalar(query) or 0, runs)


def _cells(session: Session, recipes: Collection[int]) -> Came:
    query = select(func.sum(Segmentation.n_cells)).where(Segmentation.recipe_id.in_(recipes))
    return Came("cells", session.scalar(query) or 0)


def _sets(session: Session, recipes: Collection[int]) -> Came:
    query = select(FeatureSet.name).where(FeatureSet.recipe_id.in_(recipes))
    names = tuple(session.scalars(query.order_by(FeatureSet.id)))
    return Came("feature sets", len(names), names=names)


def _images_labelled(session: Session, runs: Iterable[int]) -> Came:
    query = select(func.count()).where(Job.run_id.in_(list(runs)), Job.status == Status.DONE)
    return Came("images labelled", session.scalar(query) or 0)


def came_of_runs(session: Session, run_ids: Collection[int]) -> tuple[Came, ...]:
    """Return what runs made themselves, and what relies on their results."""
    found = select(func.count(), func.sum(Segmentation.n_cells))
    n_found, n_cells = session.execute(found.where(Segmentation.run_id.in_(run_ids))).one()
    files = select(func.count(), func.sum(FeatureFile.n_rows))
    n_files, n_rows = session.execute(files.where(FeatureFile.run_id.in_(run_ids))).one()
    wells = select(func.count(WellChange.well_id.distinct()))
    made = [
        Came("segmentations", n_found),
        Came("cells", n_cells or 0),
        Came("feature files", n_files),
        Came("cells in feature files", n_rows or 0),
        Came("wells with another treatment", _number(session, wells, run_ids)),
    ]
    children = select(Run.stage, Run.id).where(Run.parent_id.in_(run_ids)).order_by(Run.id)
    by_stage: dict[Stage, list[int]] = {}
    for stage, run_id in session.execute(children):
        by_stage.setdefault(Stage(stage), []).append(run_id)
    made += [Came(f"{stage} runs", len(ids), tuple(ids)) for stage, ids in by_stage.items()]
    return _some([*made, _images_labelled(session, by_stage.get(Stage.PREDICT, ()))])


def _number(session: Session, query: Select[int], run_ids: Collection[int]) -> int:
    return session.scalar(query.where(WellChange.run_id.in_(run_ids))) or 0


def images_of_wells_changed_by(run_ids: Collection[int]) -> Select[int]:
    """Return the query of the images in wells that got another treatment by ingest runs."""
    wells = select(WellChange.well_id).where(WellChange.run_id.in_(run_ids))
    return select(Image.id).where(Image.well_id.in_(wells))


def recipes_with_weights(session: Session, sha256: str) -> list[Recipe]:
    """Return the recipes of all stages that began from the weights with this sha256."""
    query = select(Recipe).where(Recipe.weights_sha256 == sha256).order_by(Recipe.id)
    return list(session.scalars(query))


def _some(made: Iterable[Came]) -> tuple[Came, ...]:
    return tuple(item for item in made if item.count)
