"""Which cells are exported, and which of their measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import case, func, select
from sqlalchemy.orm import Session

from ...db.models import FeatureFile, FeatureSet, Plate, Recipe, RecipeInput, Run
from ...errors import UnknownNameError, UserInputError
from ...reading.cells import input_of
from ...reading.featuresets import FEATURE_COLUMNS, find_feature_set
from ...runs import find_recipe
from ...terms import FeatureStorage, Stage

PREFIX = "Cells_"
"""Before the name of a built-in feature: pycytominer takes what begins with a compartment."""


@dataclass(frozen=True)
class Exported:
    """A segment recipe, a measure recipe, its feature set, and the plates in their order.

    ``features`` are pairs: the name in the store, the name in the export.
    """

    segment_id: int
    measure_id: int
    features: tuple[tuple[str, str], ...]
    feature_set: FeatureSet | None
    plates: tuple[Plate, ...]

    @property
    def in_files(self) -> bool:
        """Whether the values are in columnar files rather than in table ``features``."""
        return self.feature_set is not None and self.feature_set.storage is FeatureStorage.FILES


def choose(
    session: Session,
    features: str | None,
    segmentation: str | None,
    measurement: str | None,
    plates: Sequence[str],
) -> Exported:
    """Return what is to be exported; default: what was measured last, of all plates.

    Raises:
        UnknownNameError: there is no such feature set, recipe or plate.
        UserInputError: nothing has been measured, or what was asked for does not go together.
    """
    measure = _measure(session, features, segmentation, measurement)
    segment = input_of(session, measure, Stage.SEGMENT)
    if segmentation is not None:
        asked = find_recipe(session, Stage.SEGMENT, segmentation)
        if asked.id != segment.id:
            raise UserInputError(
                f"These measurements are not of the cells of segment recipe {asked.id}, but of "
                f"{segment.id}. Leave --segmentation out."
            )
    found = session.scalars(
        select(FeatureSet).where(FeatureSet.recipe_id == measure.id)
    ).one_or_none()
    return Exported(segment.id, measure.id, _names(found), found, _plates(session, plates))


def _measure(
    session: Session, features: str | None, segmentation: str | None, measurement: str | None
) -> Recipe:
    if features is None and measurement is None:
        return _last_measure(session, segmentation)
    asked = find_recipe(session, Stage.MEASURE, measurement) if measurement is not None else None
    if features is None:
        assert asked is not None
        return asked
    named = session.get_one(Recipe, find_feature_set(session, features).recipe_id)
    if asked is not None and asked.id != named.id:
        raise UserInputError(
            f"Feature set {features!r} is of measure recipe {named.id}, not {asked.id}. "
            "Give only one of --features and --measurement."
        )
    return named


def _last_measure(session: Session, segmentation: str | None) -> Recipe:
    runs = (
        select(func.max(Run.id)).where(Run.recipe_id == Recipe.id).correlate(Recipe),
        select(func.max(FeatureFile.run_id))
        .join(FeatureSet, FeatureSet.id == FeatureFile.feature_set_id)
        .where(FeatureSet.recipe_id == Recipe.id)
        .correlate(Recipe),
    )
    last = [func.coalesce(run.scalar_subquery(), 0) for run in runs]
    newest = case((last[0] > last[1], last[0]), else_=last[1])
    query = select(Recipe).where(Recipe.stage == Stage.MEASURE, newest > 0)
    of_cells = ""
    if segmentation is not None:
        asked = find_recipe(session, Stage.SEGMENT, segmentation)
        inputs = select(RecipeInput.recipe_id).where(RecipeInput.input_id == asked.id)
        query = query.where(Recipe.id.in_(inputs))
        of_cells = f" of the cells of segment recipe {asked.id}"
    found = session.scalars(query.order_by(newest.desc(), Recipe.id.desc()).limit(1)).first()
    if found is None:
        raise UserInputError(
            f"Nothing{of_cells} has been measured yet. Run: cellstore measure, or ingest a table "
            "of features."
        )
    return found


def _names(found: FeatureSet | None) -> tuple[tuple[str, str], ...]:
    if found is None or found.storage is FeatureStorage.TABLE:
        return tuple((name, f"{PREFIX}{name}") for name in FEATURE_COLUMNS)
    return tuple((column["name"], column["name"]) for column in found.columns)


def _plates(session: Session, barcodes: Sequence[str]) -> tuple[Plate, ...]:
    query = select(Plate)
    if barcodes:
        query = query.where(Plate.barcode.in_(barcodes))
    # In Python: databases sort texts each in their own way.
    found = sorted(session.scalars(query), key=lambda plate: plate.barcode)
    unknown = set(barcodes) - {plate.barcode for plate in found}
    if unknown:
        known = session.scalars(select(Plate.barcode).order_by(Plate.id).limit(500))
        raise UnknownNameError.of("plate", min(unknown), known)
    return tuple(found)
