"""Look again at the image files that a store knows: which of them have changed."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from sqlalchemy import select

from ...config import EVERYTHING, Selection
from ...db.models import Image
from ...runs import RecipeSpec, Workspace, images_of, register, running
from ...terms import Look, Severity, Stage
from .account import Account, Issue
from .images.files import Finder, look_at_files

VERSION = 1


@dataclass(frozen=True)
class RefreshResult:
    """What a look at the files brought. ``changed`` images have other bytes, or a file more.

    ``problems`` are the first thousand files that could not be read, ``n_problems`` all.
    """

    run_id: int
    images: int
    changed: int
    n_problems: int
    problems: tuple[Issue, ...]


def refresh(workspace: Workspace, selection: Selection = EVERYTHING) -> RefreshResult:
    """Compare the files of the images of a selection with what is known of them.

    A file of the same size and time is taken as unchanged; others are hashed. What was derived
    from bytes that have changed is stale from now on: the next run of its stage makes it anew.

    Raises:
        UnknownNameError: there is no such plate, well or column.
    """
    with workspace.database.begin() as session:
        query = images_of(session, selection)
        recipe = register(session, RecipeSpec(Stage.INGEST, VERSION, {"again": asdict(selection)}))
        finder = Finder.of(session, None, Look.HERE)
        ids = session.scalars(select(Image.id).where(Image.id.in_(query)).order_by(Image.id))
        images = np.fromiter(ids, dtype=np.int64)
    with running(workspace.database, recipe) as run:
        account = Account(run.id, "known files")
        changed = look_at_files(workspace, images, finder, account)
        with workspace.database.begin() as session:
            account.flush(session)
        problems = sum(account.reasons.values())
        run.result = {"images": len(images), "changed": len(changed), "problems": problems}
    shown = tuple(issue for issue in account.shown if issue.severity is Severity.PROBLEM)
    return RefreshResult(run.id, len(images), len(changed), problems, shown)
