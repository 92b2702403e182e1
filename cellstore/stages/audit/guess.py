"""What a name is the name of, where nobody says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...errors import UnknownNameError, UserInputError
from ...runs import Workspace
from ...runs.lookup import RUN_WORDS
from ...runs.places import looks_like_well, readable
from .facts import ArtifactAudit, ImageAudit, RunAudit, WellAudit
from .files import audit_artifact
from .history import audit_well
from .images import audit_image
from .runs import audit_run

Audit = ImageAudit | WellAudit | RunAudit | ArtifactAudit

KINDS = ("image", "well", "cell", "run", "artifact")


def audit_anything(workspace: Workspace, text: str) -> Audit:
    """Return the audit of what ``text`` names: a file on disk, a run, a well, an image, a file.

    Raises:
        UnknownNameError: it names nothing.
        UserInputError: it is a number, which may be that of anything; or several have that name.
    """
    word = readable(text)
    if word.isdecimal():
        ways = ", ".join(f"cellstore audit {kind} {word}" for kind in KINDS if kind != "well")
        raise UserInputError(f"{word} is the number of what? Say one of: {ways}.")
    if _is_file(word):
        return audit_artifact(workspace, text)
    if word.lower().startswith(("#", "run ", *RUN_WORDS)):
        return audit_run(workspace, word)
    if looks_like_well(word):
        return audit_well(workspace, word)
    return _first_known(workspace, word)


def _first_known(workspace: Workspace, word: str) -> Audit:
    first: UnknownNameError | None = None
    ways: tuple[Callable[[Workspace, str], Audit], ...] = (audit_image, audit_artifact)
    for way in ways:
        try:
            return way(workspace, word)
        except UnknownNameError as error:
            first = first or error
    assert first is not None
    raise first


def _is_file(word: str) -> bool:
    try:
        return Path(word).is_file()
    except (OSError, ValueError):
        return False
