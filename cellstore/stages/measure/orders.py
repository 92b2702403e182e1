"""What the database knows of an image that is to be measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from ...config import ImageInput
from ...db.bulk import in_lists
from ...db.models import Artifact, Cell, Image, Segmentation
from ...errors import CellstoreError, ImageError
from ...reading.cells import current_segmentation
from ...reading.planes import PlaneOrder, plane_orders
from ...runs import Task
from ...runs.selection import is_current
from .groups import GroupPlan
from .step import MeasureOrder

Mask = tuple[str, str]
Planes = Mapping[int, PlaneOrder | CellstoreError]


def orders_of(
    session: Session, tasks: Sequence[Task], wanted: Mapping[int, Sequence[GroupPlan]]
) -> dict[int, MeasureOrder | CellstoreError]:
    """Return by job what a worker needs, or why the image cannot be measured.

    ``wanted``: by image the groups to measure on it, one at least, all of the same cells and
    channels.
    """
    ids = [task.image_id for task in tasks]
    book = _Book(session, ids, wanted)
    return {task.job_id: book.order(task, wanted[task.image_id]) for task in tasks}


@dataclass
class _Book:
    """Masks, cells and files of some images."""

    session: Session
    image_ids: Sequence[int]
    wanted: Mapping[int, Sequence[GroupPlan]]

    def __post_init__(self) -> None:
        plans = {plan.name: plan for plans in self.wanted.values() for plan in plans}.values()
        self._source_id = next(iter(plans)).source.id
        self._masks = _masks(self.session, self._source_id, self.image_ids)
        self._cells = _cells(self.session, [number for number, _ in self._masks.values()])
        plane = next((plan.plane for plan in plans if plan.plane), None)
        self._planes = self._files(plane) if plane else {}
        channels = next((plan.channels for plan in plans if plan.channels), ())
        self._channels = self._files(ImageInput(channels)) if channels else {}

    def _files(self, wanted: ImageInput) -> Planes:
        return plane_orders(self.session, self.image_ids, wanted)

    def order(self, task: Task, plans: Sequence[GroupPlan]) -> MeasureOrder | CellstoreError:
        """The order of one image."""
        image_id = task.image_id
        if image_id not in self._masks:
            return _unknown(self.session, self._source_id, image_id)
        number, mask = self._masks[image_id]
        plane = self._planes.get(image_id) if any(plan.plane for plan in plans) else None
        names = next((plan.channels for plan in plans if plan.channels), ())
        channels = self._channels.get(image_id) if names else None
        for found in (plane, channels):
            if isinstance(found, CellstoreError):
                return found
        assert not isinstance(plane, CellstoreError)
        assert not isinstance(channels, CellstoreError)
        return MeasureOrder(
            task.name,
            mask,
            self._cells.get(number, {}),
            tuple(plan.name for plan in plans),
            plane,
            dict(zip(names, channels.files, strict=True)) if channels else {},
        )


def _masks(
    session: Session, source_id: int, image_ids: Sequence[int]
) -> dict[int, tuple[int, Mask]]:
    """By image: its segmentation, and the path and the sha256 of the masks."""
    query = (
        select(Image.id, Segmentation.id, Artifact.path, Artifact.sha256)
        .join(Segmentation, is_current())
        .join(Artifact, Artifact.id == Segmentation.mask_artifact_id)
        .where(Segmentation.recipe_id == source_id)
    )
    found = {}
    for some in in_lists(image_ids):
        for image, number, path, sha256 in session.execute(query.where(Image.id.in_(some))):
            found[image] = (number, (path, sha256))
    return found


def _cells(session: Session, segmentations: Sequence[int]) -> dict[int, dict[int, int]]:
    """By segmentation: the cell of each label."""
    found: dict[int, dict[int, int]] = {}
    query = select(Cell.segmentation_id, Cell.label, Cell.id)
    for some in in_lists(segmentations):
        for number, label, cell in session.execute(query.where(Cell.segmentation_id.in_(some))):
            found.setdefault(number, {})[label] = cell
    return found


def _unknown(session: Session, source_id: int, image_id: int) -> CellstoreError:
    """Why an image has no masks to measure."""
    try:
        current_segmentation(session, source_id, image_id)
    except ImageError as error:
        return error
    return ImageError(
        "Another tool found these cells and their masks are unknown. "
        "If you have them, run: cellstore ingest masks DIR"
    )
