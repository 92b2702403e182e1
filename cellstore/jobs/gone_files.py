"""Files that the store has seen or made, and that are no longer where they were.

Asked in plain SQL: ``cellstore status`` asks it each time, and the classes of the tables load
slowly.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from sqlalchemy import bindparam, text
from sqlalchemy.orm import Session

from ..artifacts import ArtifactFolder
from ..io.uris import is_remote, local_path, shown, split_page

FEW = 20_000
"""Files that are looked for by name where an answer must come at once."""

IN_AT_ONCE = 5_000
GONE = "Files are gone"
"""How the reason begins for which an image failed whose files are gone."""

_MADE = """
    SELECT path FROM artifacts WHERE kind IN ('mask', 'flow', 'features', 'profiles') ORDER BY path
"""
_MAKERS = """
    SELECT a.path, s.run_id FROM artifacts AS a
    JOIN segmentations AS s ON a.id IN (s.mask_artifact_id, s.flow_artifact_id)
    WHERE a.path IN :paths
    UNION SELECT a.path, f.run_id FROM artifacts AS a
    JOIN feature_files AS f ON f.artifact_id = a.id WHERE a.path IN :paths
    UNION SELECT a.path, r.run_id FROM artifacts AS a
    JOIN run_artifacts AS r ON r.artifact_id = a.id WHERE a.kind = 'profiles' AND a.path IN :paths
"""
_NAMES = """
    SELECT folder_id, name FROM (
        SELECT id, folder_id, name FROM image_files WHERE sha256 IS NOT NULL
        ORDER BY id LIMIT :most
    ) AS files ORDER BY folder_id, id
"""
_COUNTS = "SELECT folder_id, count(*) FROM image_files WHERE sha256 IS NOT NULL GROUP BY folder_id"


@dataclass
class GoneFiles:
    """How many ``files`` of a folder are gone; ``first``: one of them.

    Of a folder that is not there: of all ``folder_ids`` within it.
    """

    folder_ids: list[int]
    folder: str
    files: int
    first: str | None = None

    @property
    def sentence(self) -> str:
        """Say it, and what to do."""
        return gone_sentence(self.folder, self.files, self.first)


def gone_sentence(folder: str, number: int | None = None, first: str | None = None) -> str:
    """Say that files (a ``number`` of them) are gone from a folder, and what to do."""
    files = GONE if number is None else f"{number:,} files are gone"
    if number == 1:
        files = "1 file is gone" if first is None else f"1 file ({first}) is gone"
    folder = shown(folder)
    return f"{files} from {folder}. If moved: cellstore relocate {folder} NEW"


def gone_folder(folder: str) -> str:
    """Return the folder that is gone: of one that is not there, the outermost that is not."""
    path = local_path(folder)
    if os.path.isdir(path):  # noqa: PTH112 - no error for odd names
        return folder
    while not os.path.isdir(path.parent):  # noqa: PTH112
        path = path.parent
    return str(path)


def find_gone(session: Session, most: int | None = None) -> list[GoneFiles]:
    """Return the folders of this machine from which files are gone.

    Every folder is looked for, and then each file, by one listing of its folder; of the files only
    the first ``most``, if that is given. Folders in object stores are not looked at.
    """
    folders = session.execute(text("SELECT id, uri FROM folders ORDER BY id")).all()
    # A folder of another machine ("C:\\data") was never seen from here.
    uris: dict[int, str] = {number: uri for number, uri in folders if not is_remote(uri)}
    gone: dict[int, int] = {}
    for number, uri in uris.items():
        if not os.path.isdir(local_path(uri)):  # noqa: PTH112 - no error for odd names
            gone[number] = 0
    absent, first = set(gone), dict[int, str]()
    if absent:
        counts: dict[int, int] = {row[0]: row[1] for row in session.execute(text(_COUNTS))}
        gone = {number: counts.get(number, 0) for number in absent}
    values = {"most": sys.maxsize if most is None else most}
    rows = session.execute(text(_NAMES), values, execution_options={"yield_per": 10_000})
    for number, names in groupby(rows, itemgetter(0)):
        if number not in uris or number in absent:
            continue
        path, listed = local_path(uris[number]), frozenset[str]()
        with suppress(OSError):
            listed = frozenset(os.listdir(path))  # noqa: PTH208
        for file in (split_page(name)[0] for _, name in names):
            # A name may lead into a folder within the folder: that is not in the list.
            if file not in listed and not os.path.exists(path / file):  # noqa: PTH110
                gone[number] = gone.get(number, 0) + 1
                first.setdefault(number, file)
    found: dict[str, GoneFiles] = {}
    for number in sorted(number for number, files in gone.items() if files):
        where = gone_folder(uris[number])
        item = found.setdefault(where, GoneFiles([], where, 0, first.get(number)))
        item.folder_ids.append(number)
        item.files += gone[number]
    return list(found.values())


def lost_files(session: Session, artifacts: ArtifactFolder) -> tuple[int, tuple[str, ...]]:
    """Return how many files that commands can make again are gone, and these commands.

    They are masks, flows, profiles and files of features; of those that another tool made, the
    commands are the ingests that brought them.
    """
    made = session.scalars(text(_MADE), execution_options={"yield_per": 10_000})
    gone = sorted(artifacts.missing(made))
    makers: dict[str, int] = {}
    for start in range(0, len(gone), IN_AT_ONCE):
        some = gone[start : start + IN_AT_ONCE]
        query = text(_MAKERS).bindparams(bindparam("paths", some, expanding=True))
        makers.update((path, run) for path, run in session.execute(query))
    runs = text("SELECT command FROM runs WHERE id IN :runs ORDER BY id").bindparams(
        bindparam("runs", sorted(set(makers.values())), expanding=True)
    )
    return len(makers), tuple(dict.fromkeys(session.scalars(runs)))
