"""The ledger: one row per execution of a stage, written first and closed whatever happens."""

from __future__ import annotations

import getpass
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from ..artifacts import StoredFile
from ..db.models import Artifact, Recipe, Run, RunArtifact
from ..db.session import Database
from ..db.statements import insert_new
from ..errors import JobsFailedError, RunCancelledError
from ..terms import Stage, Status
from .leases import Owner, bury_runs

PACKAGES = ("cellstore", "numpy", "cellpose", "scikit-image", "torch", "torchvision", "duckdb")


@dataclass
class RunHandle:
    """A run that is under way; what is put into ``result`` is kept with it."""

    id: int
    result: dict[str, Any] = field(default_factory=dict)


@contextmanager
def running(
    database: Database,
    recipe: Recipe,
    *,
    parent_id: int | None = None,
    split_id: int | None = None,
    seed: int | None = None,
    query: str | None = None,
    resume: int | None = None,
) -> Iterator[RunHandle]:
    """Record a run of ``recipe`` around a block: done at its end, else failed or cancelled.

    ``resume`` goes on with an unfinished run instead of starting another.
    """
    if resume is None:
        resume = _start(database, recipe, parent_id, split_id, seed, query)
    else:
        _resume(database, resume)
    handle = RunHandle(resume)
    try:
        yield handle
    except (KeyboardInterrupt, RunCancelledError) as error:
        reason = str(error) or "Stopped by Ctrl-C."
        _set(database, handle.id, status=Status.CANCELLED, error=reason, **_end(handle))
        raise
    except BaseException as error:
        reason = str(error) or type(error).__name__
        _set(database, handle.id, status=Status.FAILED, error=reason, **_end(handle))
        raise
    _set(database, handle.id, status=Status.DONE, **_end(handle))


def attach(session: Session, run_id: int, artifact_id: int) -> None:
    """Say that a run wrote, or relies on, a file."""
    insert_new(session, RunArtifact, [{"run_id": run_id, "artifact_id": artifact_id}])


def keep_file(session: Session, stored: StoredFile) -> int:
    """Return the id of the artifact row of ``stored``, made if it is new."""
    row = {
        "kind": stored.kind,
        "path": stored.path,
        "sha256": stored.sha256,
        "size_bytes": stored.size_bytes,
        "created_at": datetime.now(UTC),
    }
    insert_new(session, Artifact, [row])
    return session.scalars(
        select(Artifact.id).where(Artifact.sha256 == stored.sha256, Artifact.kind == stored.kind)
    ).one()


def _start(
    database: Database,
    recipe: Recipe,
    parent_id: int | None,
    split_id: int | None,
    seed: int | None,
    query: str | None,
) -> int:
    run = Run(
        stage=Stage(recipe.stage),
        recipe_id=recipe.id,
        parent_id=parent_id,
        split_id=split_id,
        status=Status.RUNNING,
        seed=seed,
        query=query,
        command=command_line(),
        code_version=code_version(),
        environment=environment(),
        host=socket.gethostname()[:255],
        user=_user(),
        process=Owner.of_this_process().text,
        started_at=datetime.now(UTC),
    )
    with database.begin() as session:
        bury_runs(session)
        session.add(run)
        session.flush()
        return run.id


def _resume(database: Database, run_id: int) -> None:
    """Open a run again, and keep who goes on with it by which code beside who began."""
    attempt = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": f"{_user()}@{socket.gethostname()}",
        "command": command_line(),
        "code_version": code_version(),
        **environment(),
    }
    with database.begin() as session:
        run = session.get_one(Run, run_id)
        resumed = [*run.environment.get("resumed", []), attempt]
        run.environment = {**run.environment, "resumed": resumed}
        run.status, run.ended_at, run.error = Status.RUNNING, None, None
        run.process = Owner.of_this_process().text


def _set(database: Database, run_id: int, **values: Any) -> None:
    with database.begin() as session:
        session.execute(update(Run).where(Run.id == run_id).values(**values))


def _end(handle: RunHandle) -> dict[str, Any]:
    return {"ended_at": datetime.now(UTC), "result": handle.result}


def command_line() -> str:
    """Return the command that was typed, without the passwords of database URLs."""
    words = [Path(sys.argv[0]).name or "python", *sys.argv[1:]]
    return shlex.join(without_passwords(word) for word in words)


def without_passwords(word: str) -> str:
    """Return a typed word with the passwords of every URL in it replaced by ``***``.

    In a word that is a URL (or ``--option=URL``) a password may hold spaces and quotes.
    """
    # In a URL inside a longer text (an SQL question), spaces and quotes end the password.
    inner = "" if re.match(r"(-[\w-]+=)?[\w+.-]+://", word) else r"\s'\""
    masked = re.sub(
        rf"([\w+.-]+://[^:/{inner}]*):[^{inner}\0]*@", r"\1:***@", word, flags=re.DOTALL
    )
    return re.sub(
        rf"([?&][^?&=\s]*(?:pass|pwd|secret|scram)[^?&=\s]*=)[^&{inner}\0]+",
        r"\1***",
        masked,
        flags=re.IGNORECASE,
    )


@cache
def code_version() -> str:
    """Return the version of cellstore, with the commit where it runs from a checkout."""
    found = version("cellstore")
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return found
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return found
    return f"{found}+g{commit}{'.changed' if changed else ''}"


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(  # noqa: S603 - fixed words, no shell
        ["git", "-C", str(folder), *words],  # noqa: S607 - the git of the user's PATH
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout.strip()


def environment() -> dict[str, Any]:
    """Return the versions that decide numbers: Python, the platform, the packages."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def fail_if_any(failed: int, done: int, what: str) -> None:
    """End a run in which some images failed.

    Raises:
        JobsFailedError: ``failed`` is not 0.

    """
    if failed:
        raise JobsFailedError(
            f"{failed} of {failed + done} images could not be {what}; the others are done. "
            "See why with: cellstore jobs --failed. Running the same command again retries them."
        )
