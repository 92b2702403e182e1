"""The measurements of cells, and the features of profiles of wells, by the names of addresses."""

from __future__ import annotations

import re
from typing import NamedTuple

from sqlalchemy import select
from starlette.requests import Request

from ..enums import ArtifactKind, FeatureStorage
from ..errors import UnknownNameError, UserInputError
from ..jobs.runs import files_of
from ..models import FeatureSet, Run
from ..query.guard import quoted
from ..query.source import group_of
from ..stages.profile import NOT_FEATURES
from .requests import explorer_of, kept

UNITS = {"pixel": "pixels", "pixel^2": "pixels²", "intensity": "grey levels", "radian": "radians"}
UNITS_OF_PROFILES = {"mad": "robust SD", "standardise": "SD"}
"""The units of profiles, by how they were normalised."""

_NUMBER = re.compile(r"[A-Z]*INT(EGER)?|FLOAT|DOUBLE|DECIMAL.*")
_NO_FEATURES = ("cell_id", "recipe_id", "run_id")

MEASURED = """
    SELECT recipe_id FROM (
        SELECT r.recipe_id,
            row_number() OVER (PARTITION BY ri.input_id ORDER BY r.id DESC) AS number
        FROM runs AS r
        JOIN recipe_inputs AS ri ON ri.recipe_id = r.recipe_id
        WHERE r.stage = 'measure'
        AND r.recipe_id NOT IN (SELECT recipe_id FROM feature_sets WHERE storage = 'files')
    ) WHERE number = 1
"""
"""Whose rows of table ``features`` count, as in ``cell_table``."""


class Feature(NamedTuple):
    """A number of each cell or well: SQL ``value`` of the rows ``origin``, whose ids are ``id``."""

    name: str
    value: str
    origin: str
    unit: str = ""
    id: str = "cell_id"

    @property
    def title(self) -> str:
        """Its name and its unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def query(self) -> str:
        """SQL that gives the id and ``value``."""
        return f"SELECT {self.id}, CAST({self.value} AS DOUBLE) AS value FROM {self.origin}"  # noqa: S608


def unit_in_words(unit: str | None) -> str:
    """Return a unit as people write it; nothing of a plain number."""
    return "" if unit in (None, "1") else UNITS.get(str(unit), str(unit))


def feature_of(request: Request, name: str) -> Feature:
    """Return a measurement of cells by its name: ``area``, or ``texture.contrast`` of a set.

    Raises UnknownNameError.
    """
    known = features_known(request)
    if name not in known:
        raise UnknownNameError.of("feature", name, list(known))
    return known[name]


def features_known(request: Request) -> dict[str, Feature]:
    """Return the measurements of cells by name: those of table ``features`` first."""
    return kept(request, ("features",), lambda: _of_cells(request))


def _of_cells(request: Request) -> dict[str, Feature]:
    explorer = explorer_of(request)
    relations, groups = ["features"], set[str]()
    units: dict[tuple[str, str], str] = {}
    with explorer.workspace.database.read() as session:
        for item in session.scalars(select(FeatureSet).order_by(FeatureSet.id)):
            group = group_of(item.name) or item.name
            for made in item.columns:
                unit = unit_in_words(made.get("unit"))
                units[item.name, made["name"]] = units[group, made["name"]] = unit
            if item.storage == FeatureStorage.FILES:
                relations.append(item.name)
                groups.add(group)
    known = {}
    with explorer.reader.questions() as questions:
        recipes = [str(int(row["recipe_id"])) for row in questions.ask_ours(MEASURED).records()]
        of_recipes = f"features WHERE recipe_id IN ({', '.join(recipes) or -1})"
        for relation in (*relations, *sorted(groups - set(relations))):
            built_in = relation == "features"
            origin = of_recipes if built_in else quoted(relation)
            for column, kind in questions.columns(relation):
                if _NUMBER.fullmatch(kind) and column not in _NO_FEATURES:
                    name = column if built_in else f"{relation}.{column}"
                    unit = units.get(("basic" if built_in else relation, column), "")
                    known[name] = Feature(name, quoted(column), origin, unit)
    return known


def profile_features(request: Request, run_id: int) -> dict[str, Feature]:
    """Return the features of the wells of a profile run by name; raises UserInputError."""
    return kept(request, ("profile", run_id), lambda: _of_wells(request, run_id))


def _of_wells(request: Request, run_id: int) -> dict[str, Feature]:
    import pyarrow.parquet as pq

    explorer = explorer_of(request)
    with explorer.workspace.database.read() as session:
        files = files_of(session, run_id, ArtifactKind.PROFILES)
        parameters = session.get_one(Run, run_id).recipe.parameters
    if not files:
        raise UserInputError(f"Profile run {run_id} has no profiles.")
    with explorer.reader.questions() as questions:
        known = {name for name, _ in questions.columns("profiles")}
    names = pq.read_schema(explorer.workspace.artifacts.existing(files[0].path)).names
    origin = f"profiles WHERE run_id = {run_id}"
    unit = UNITS_OF_PROFILES.get(str(parameters.get("normalise")), "")
    return {
        name: Feature(name, quoted(name), origin, unit, "well_id")
        for name in names
        if name not in NOT_FEATURES and name in known
    }
