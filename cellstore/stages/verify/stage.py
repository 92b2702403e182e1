"""All files of a store against its database, and what no row names."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from sqlalchemy import func, select

from ...artifacts import ArtifactFolder
from ...db.models import Artifact, Run
from ...errors import StorageError
from ...runs import Workspace
from ...runs.leases import bury_runs
from ...terms import Status
from .features import check_features
from .files import check_files
from .report import Problem, VerifyResult

BATCH = 500
GRACE_MINUTES = 10.0


def verify(
    workspace: Workspace, *, fix: bool = False, minutes: float = GRACE_MINUTES
) -> VerifyResult:
    """Compare every file with its sha256, masks and features with their cells; look for orphans.

    ``fix`` removes the orphans: files left by a crash between writing a file and its row. Files
    younger than ``minutes`` are left alone, as a running command may be about to name them.
    """
    # The folder is listed before the rows are read: what a running command adds is no orphan.
    before = min(time.time() - 60 * minutes, _oldest_running(workspace))
    there = list(workspace.artifacts.walk())
    files, masks, problems = check_files(workspace)
    problems = _still_named(workspace, problems)
    features, odd = check_features(workspace, {problem.path for problem in problems})
    unnamed = _unnamed(workspace, there)
    old = [path for path in unnamed if _older(workspace.artifacts, path, before)]
    removed = sum(_remove(workspace.artifacts, path) for path in old) if fix else 0
    return VerifyResult(
        files=files,
        segmentations=masks,
        problems=(*problems, *odd),
        orphans=tuple(old),
        young=len(unnamed) - len(old),
        removed=removed,
        feature_files=features,
    )


def _still_named(workspace: Workspace, problems: list[Problem]) -> list[Problem]:
    """Leave out files that were forgotten meanwhile: a training replaces its state."""
    gone = set(_unnamed(workspace, [problem.path for problem in problems]))
    return [problem for problem in problems if problem.path not in gone]


def _oldest_running(workspace: Workspace) -> float:
    """Return when the oldest run began that may still be about to name its files.

    A run of more than a day ago was killed: nothing closed it.
    """
    now = datetime.now(UTC)
    query = select(func.min(Run.started_at)).where(
        Run.status == Status.RUNNING, Run.started_at > now - timedelta(days=1)
    )
    with workspace.database.begin() as session:
        bury_runs(session)
        found = session.scalar(query)
    return (found or now).timestamp()


def _unnamed(workspace: Workspace, there: list[str]) -> list[str]:
    unnamed: list[str] = []
    for start in range(0, len(there), BATCH):
        piece = there[start : start + BATCH]
        with workspace.database.read() as session:
            named = set(session.scalars(select(Artifact.path).where(Artifact.path.in_(piece))))
        unnamed += [path for path in piece if path not in named]
    return unnamed


def _older(folder: ArtifactFolder, path: str, moment: float) -> bool:
    try:
        return (folder.root / path).lstat().st_mtime <= moment
    except FileNotFoundError:
        return False


def _remove(folder: ArtifactFolder, path: str) -> bool:
    # Not resolved: an orphan that is a link is removed itself, never what it points to.
    try:
        (folder.root / path).unlink()
    except FileNotFoundError:
        return True
    except OSError as error:
        raise StorageError(
            f"{path} cannot be removed: {error.strerror}. Mend the permissions of the store, "
            "then run the same command again."
        ) from error
    return True
