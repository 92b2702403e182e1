"""The embedding of cells as a feature set: which it is, and its columns."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
from sqlalchemy import select
from sqlalchemy.orm import Session

from ...analytics.sets import check_set_name
from ...db.models import FeatureSet, Recipe
from ...db.statements import insert_new
from ...errors import UserInputError
from ...ops.features import Feature
from ...reading.featuresets import set_of_recipe
from ...reading.models import OpenModel
from ...runs import RecipeSpec, fingerprint, register
from ...terms import FeatureStorage, Stage

VERSION = 1
LAYER = "projection"


@dataclass(frozen=True)
class Embedding:
    """A feature set of ``width`` columns, filled by the network of one training run.

    Images that another predict run has embedded with the same network are not embedded again.
    """

    name: str
    spec: RecipeSpec
    features: tuple[Feature, ...]

    @property
    def schema(self) -> pa.Schema:
        """The columns of its files, without the cell id."""
        return pa.schema([(feature.name, pa.float32()) for feature in self.features])

    def register(self, session: Session) -> tuple[int, int]:
        """Insert recipe and feature set on their first use; return the numbers of both."""
        recipe = register(session, self.spec)
        row = {
            "name": self.name,
            "recipe_id": recipe.id,
            "columns": [feature.to_json() for feature in self.features],
            "storage": FeatureStorage.FILES,
        }
        insert_new(session, FeatureSet, [row])
        query = select(FeatureSet.id).where(FeatureSet.recipe_id == recipe.id)
        return recipe.id, session.scalars(query).one()


def plan_embedding(session: Session, name: str, model: OpenModel, plates: str | None) -> Embedding:
    """Return the feature set for the embedding of a model.

    ``plates``: the digest of what was fitted to plates that the training has not seen.

    Raises:
        UserInputError: the model has no embedding, or the name is bad or taken.
    """
    from ...ops.models import NetworkModel

    if not isinstance(model.model, NetworkModel):
        raise UserInputError(
            f"Training run {model.run.id} is a baseline and has no embedding. Name the run of a "
            "network, or leave --embedding out."
        )
    check_set_name(name, "--embedding")
    parameters = {"embedding": LAYER, "width": model.model.width}
    if plates is not None:
        parameters |= {"fitted_plates": plates}
    sha256 = model.checkpoint.tensors.sha256
    spec = RecipeSpec(Stage.MEASURE, VERSION, parameters, sha256, (model.segment,))
    _check_taken(session, name, model.run.id, spec)
    features = tuple(_feature(i, model.run.id) for i in range(model.model.width))
    return Embedding(name, spec, features)


def _feature(index: int, run_id: int) -> Feature:
    return Feature(
        name=f"embedding_{index:03d}",
        dtype="float32",
        unit="1",
        source=f"cellstore predict: {LAYER} of the network of training run {run_id}",
        formula="",
        description="What the classifier reads of a cell: 0 or more, meaningless alone.",
    )


def _check_taken(session: Session, name: str, run_id: int, spec: RecipeSpec) -> None:
    recipe = session.scalars(
        select(Recipe).where(Recipe.fingerprint == fingerprint(spec), Recipe.stage == spec.stage)
    ).one_or_none()
    mine = None if recipe is None else set_of_recipe(session, recipe.id)
    if mine is not None and mine.name != name:
        raise UserInputError(
            f"These embeddings are kept as feature set {mine.name!r} already: "
            f"give --embedding {mine.name}."
        )
    found = session.scalars(select(FeatureSet).where(FeatureSet.name == name)).one_or_none()
    if found is not None and (mine is None or found.id != mine.id):
        raise UserInputError(
            f"Feature set {name!r} is there already, and is not the embedding of training run "
            f"{run_id} on these plates. Give another --embedding name."
        )
