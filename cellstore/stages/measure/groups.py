"""Which groups of features are measured, on which channels: a recipe and a feature set each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from ...config import ImageInput, MeasureParams, as_parameters
from ...db.models import FeatureSet, Image, ImageFile, Recipe
from ...db.statements import insert_new
from ...errors import UnknownNameError, UserInputError
from ...ops.features import BASIC_GROUP, FEATURE_NAMES, GROUPS, Feature, FeatureGroup
from ...reading.cells import plane_of
from ...reading.planes import check_channels
from ...runs import RecipeSpec, fingerprint
from ...terms import PROJECTION_CHANNEL, FeatureStorage, Stage

VERSION = 2
"""Of group ``basic``. 2: means are taken in 64 bits."""

CHANNEL_VERSION = 1
"""Of the groups that are measured channel by channel."""


def list_groups() -> tuple[FeatureGroup, ...]:
    """Return the registry: every group with its features."""
    return tuple(GROUPS.values())


@dataclass(frozen=True)
class GroupPlan:
    """One group: measured on ``plane`` (``basic``), or on each of ``channels``."""

    group: FeatureGroup
    source: Recipe
    plane: ImageInput | None
    channels: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name of the group."""
        return self.group.name

    @property
    def in_table(self) -> bool:
        """Whether the values go to table ``features``, not to files."""
        return self.group is BASIC_GROUP

    @cached_property
    def features(self) -> tuple[Feature, ...]:
        """The columns, in their order."""
        return self.group.columns(self.channels)

    @cached_property
    def spec(self) -> RecipeSpec:
        """The recipe."""
        if self.plane is not None:
            plane = as_parameters(self.plane)
            parameters = {"image": plane, "features": list(FEATURE_NAMES)}
            return RecipeSpec(Stage.MEASURE, VERSION, parameters, None, (self.source,))
        parameters = {
            "group": self.name,
            "channels": list(self.channels),
            "features": [feature.name for feature in self.group.features],
        }
        return RecipeSpec(Stage.MEASURE, CHANNEL_VERSION, parameters, None, (self.source,))

    @cached_property
    def feature_set(self) -> str:
        """The name of the feature set."""
        return f"{self.name}_{fingerprint(self.spec)[:8]}"

    def register(self, session: Session, recipe: Recipe) -> None:
        """Insert the feature set that ``recipe`` fills, on its first use."""
        row = {
            "name": self.feature_set,
            "recipe_id": recipe.id,
            "columns": [feature.to_json() for feature in self.features],
            "storage": FeatureStorage.TABLE if self.in_table else FeatureStorage.FILES,
        }
        insert_new(session, FeatureSet, [row])


def plan_groups(
    session: Session, params: MeasureParams, source: Recipe, images: Select[int]
) -> list[GroupPlan]:
    """Return a plan for each group that ``params`` names, in their order, each once.

    Raises:
        UnknownNameError: no such group or channel.
        UserInputError: no group at all.
    """
    groups = [_group(name) for name in dict.fromkeys(params.features)]
    if not groups:
        raise UserInputError(f"Name a group of features: {', '.join(GROUPS)}.")
    plane = params.image or plane_of(source)
    check_channels(session, plane)
    if not any(group.per_channel for group in groups):
        channels: tuple[str, ...] = ()
    else:
        channels = _channels(session, params.image, images)
    return [
        GroupPlan(group, source, None, channels)
        if group.per_channel
        else GroupPlan(group, source, plane, ())
        for group in groups
    ]


def _group(name: str) -> FeatureGroup:
    found = GROUPS.get(name.lower())
    if found is None:
        raise UnknownNameError.of("group of features", name, GROUPS)
    return found


def _channels(session: Session, named: ImageInput | None, images: Select[int]) -> tuple[str, ...]:
    """The channels that are named, as they are spelled; else those of the first image. Sorted."""
    query = select(ImageFile.channel)
    if named is not None and named.channels:
        of_name = (func.lower(ImageFile.channel) == name.lower() for name in named.channels)
        spelled = [session.scalars(query.where(same).limit(1)).one() for same in of_name]
        return tuple(sorted(set(spelled)))
    first = images.where(Image.content_sha256.is_not(None)).order_by(Image.id).limit(1)
    query = query.where(ImageFile.image_id.in_(first))
    found = sorted(session.scalars(query))
    if not found:
        raise UserInputError(
            "No selected image has been segmented and has its files, so its channels are unknown. "
            "Name some with --channels, or see what there is with: cellstore status"
        )
    return tuple(name for name in found if name != PROJECTION_CHANNEL) or tuple(found)
