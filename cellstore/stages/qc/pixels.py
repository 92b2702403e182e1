"""What quality control measures of each image: every channel, its file opened once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from numpy.typing import NDArray
from sqlalchemy import insert
from sqlalchemy.orm import Session

from ...db.models import ImageQuality
from ...errors import CellstoreError, ImageError
from ...ops.quality import PlaneQuality, plane_quality
from ...reading.planes import FileOrder, channel_orders, open_file
from ...runs import RecipeSpec, Task, Work
from ...terms import Stage

VERSION = 1

Order = tuple[tuple[str, FileOrder], ...]
Planes = list[tuple[str, NDArray[Any]]]
Qualities = list[tuple[str, PlaneQuality]]


def quality_spec() -> RecipeSpec:
    """Return the recipe of the numbers; limits are another's, so that they may change."""
    names = [field.name for field in fields(PlaneQuality)]
    return RecipeSpec(Stage.QC, VERSION, {"measures": names})


@dataclass(frozen=True)
class QualitySteps:
    """Makes a :class:`QualityStep` in a worker."""

    def __call__(self) -> QualityStep:
        """Return it."""
        return QualityStep()


class QualityStep:
    """Opens the files of an image and measures each channel; writes no file."""

    def read(self, order: Order) -> Planes:
        """Return the plane (H, W) of each channel."""
        return [(channel, open_file(file)) for channel, file in order]

    def compute(self, loaded: Sequence[Planes]) -> list[Qualities]:
        """Return the quality of each channel of each image."""
        return [[(channel, _quality(channel, plane)) for channel, plane in one] for one in loaded]

    def keep(self, made: Qualities) -> Qualities:
        """Keep no file: the rows are all there is."""
        return made


def _quality(channel: str, plane: NDArray[Any]) -> PlaneQuality:
    try:
        return plane_quality(plane)
    except ValueError as error:
        raise ImageError(
            f"Channel {channel} has no pixel that is a number. Export the field again."
        ) from error


def quality_work(run_id: int, recipe_id: int) -> Work[Order, Qualities]:
    """Return what is done with each image, in the name of a run."""

    def fetch(session: Session, tasks: Sequence[Task]) -> Mapping[int, Order | CellstoreError]:
        orders = channel_orders(session, [task.image_id for task in tasks])
        return {task.job_id: orders[task.image_id] for task in tasks}

    def insert_rows(session: Session, pairs: Sequence[tuple[Task, Qualities]]) -> None:
        keys = {"recipe_id": recipe_id, "run_id": run_id}
        rows = [
            {**_key(task), "channel": channel, **asdict(quality), **keys}
            for task, qualities in pairs
            for channel, quality in qualities
        ]
        if rows:
            session.execute(insert(ImageQuality), rows)

    return Work("look at pixels", QualitySteps(), fetch, insert_rows)


def _key(task: Task) -> dict[str, Any]:
    return {"image_id": task.image_id, "content_sha256": task.content_sha256}
