"""What a stage is that goes image by image: the methods that ``jobs/execute.py`` calls.

A stage is told apart from its neighbours by four things: which images it selects and by which
recipe (the function that is named like the stage), what it fetches of an image from the database,
what it computes, and what it inserts. Between them travel a task, its input and its output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from sqlalchemy import Select
from sqlalchemy.orm import Session

from ..errors import CellstoreError
from .queue import Task

Input = TypeVar("Input")
Output = TypeVar("Output")


@dataclass
class RunCounter:
    """The run in whose name the jobs of a recipe are done, and how much of it is done."""

    run_id: int
    recipe_id: int
    images: int = 0
    cells: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


class ImageStage(Generic[Input, Output]):
    """A stage that goes image by image; see ``Segment`` in ``stages/segment.py`` for one.

    ``load``, ``read``, ``compute`` and ``write`` run in a worker, outside any transaction: in a
    thread of this process, or in other processes, to which a copy of the stage is sent. So a stage
    is a frozen dataclass that pickles. The other methods run where the database is.
    """

    label: ClassVar[str]

    batch: int = 1
    """Images that ``compute`` is given at once."""

    images_per_file: int = 1
    """Images whose results wait for each other, to be written in one file by ``write_together``."""

    def load(self) -> None:
        """Load what the work needs, a network for example; once in each worker."""

    def fetch(
        self, session: Session, tasks: Sequence[Task]
    ) -> Mapping[int, Input | CellstoreError]:
        """Return by image id what a worker needs, or the error that makes the image fail."""
        raise NotImplementedError

    def read(self, task_input: Input) -> Any:
        """Open the files of one image."""
        raise NotImplementedError

    def compute(self, loaded: Sequence[Any]) -> Sequence[Any]:
        """Work on the images of a batch; a result for each, in their order."""
        raise NotImplementedError

    def write(self, result: Any) -> Output:
        """Write the files of one image; return all that its rows need."""
        output: Output = result
        return output

    def write_together(self, run: RunCounter, done: Sequence[tuple[Task, Output]]) -> Any:
        """Write the files that hold many images; return what ``insert`` needs to know of them."""

    def insert(
        self, session: Session, run: RunCounter, done: Sequence[tuple[Task, Output]], files: Any
    ) -> int:
        """Write the rows of some images and one recipe; return how many cells they are of.

        The transaction also closes the jobs of these images, whose files are written. ``files`` is
        what ``write_together`` returned.
        """
        raise NotImplementedError

    def requeue_lost(self, session: Session, recipe_id: int, images: Select[int]) -> int:
        """Open those jobs again whose rows are there but whose files are gone; return how many.

        A job is believed to be done of its files as well as of its rows.
        """
        return 0
