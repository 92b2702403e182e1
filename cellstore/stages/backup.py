"""Backup and restore: a store as one file, the same for both databases.

The file is a tar: ``backup.json`` (what it is, and the sha256 of the rows), ``cellstore.db`` (all
rows as an SQLite database), ``questions/`` and ``artifacts/``. On PostgreSQL the rows are copied
table by table in one transaction: no program of the server is needed, and a store can move from one
database to the other.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Connection, delete, func, insert, select, text
from sqlalchemy.exc import SQLAlchemyError

from ..artifacts import CHUNK, open_atomically, sha256_of
from ..db import migrate
from ..db.events import Change, record_events
from ..db.session import Database, connect
from ..errors import CellstoreError, StorageError, UserInputError, first_line
from ..jobs.workspace import Workspace, create_workspace
from ..models import METADATA
from ..notebooks import Shown
from ..settings import MARKER, SQLITE_NAME, check_not_of_a_store, track

FORMAT = 1
MANIFEST = "backup.json"
ARTIFACTS = "artifacts/"
QUESTIONS = "questions/"
ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Backup(Shown):
    """A backup that was written, or read. ``missing``: stored files that the store had lost.

    ``dry_run``: it was only checked, or is what would be written, about ``size_bytes`` large.
    """

    file: str
    size_bytes: int
    made_at: str
    rows: int
    artifacts: int
    missing: tuple[str, ...]
    dry_run: bool = False


# ---- Write ----


def backup(workspace: Workspace, file: Path, *, dry_run: bool = False) -> Backup:
    """Write a store to one file, as it is at this moment; it may be in use meanwhile.

    Every stored file is compared with its sha256. One that is gone or changed is named in the
    result, and is not in the backup. A dry run looks at everything, and writes no file.
    """
    check_not_of_a_store(file)
    root = workspace.settings.root
    missing, size = list[str](), 0
    with tempfile.TemporaryDirectory(
        prefix="backup-", dir=workspace.settings.make_cache()
    ) as folder:
        rows = Path(folder, SQLITE_NAME)
        _copy_database(workspace.database, rows)
        digest = sha256_of(rows)
        with closing(sqlite3.connect(f"file:{rows}?mode=ro", uri=True)) as copy:
            rows_of_all = _count(copy)
            (total,) = copy.execute("SELECT count(*) FROM artifacts").fetchone()
            listed = "SELECT path, sha256 FROM artifacts ORDER BY id"
            for path, known in track(
                workspace.progress, "check files", total, copy.execute(listed)
            ):
                target = workspace.artifacts.locate(path)
                if target.is_file() and sha256_of(target) == known:
                    size += target.stat().st_size
                else:
                    missing.append(path)
            manifest = {
                "format": FORMAT,
                "schema": migrate.HEAD,
                "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
                "rows": rows_of_all,
                "sha256": digest,
                "artifacts": total - len(missing),
                "missing": missing,
            }
            questions = sorted(path for path in (root / QUESTIONS).glob("*.sql") if path.is_file())
            if dry_run:
                found = {path.name: path.stat().st_size for path in (rows, *questions)}
                return _result(file, manifest, size + sum(found.values()), dry_run=True)
            about, lost = Path(folder, MANIFEST), set(missing)
            about.write_text(json.dumps(manifest, indent=1))
            # Links are followed: a restore takes none.
            with (
                open_atomically(file.resolve()) as out,
                tarfile.open(fileobj=out, mode="w", dereference=True) as tar,
            ):
                tar.add(about, MANIFEST)
                tar.add(rows, SQLITE_NAME)
                for question in questions:
                    tar.add(question, QUESTIONS + question.name)
                for path, _ in track(workspace.progress, "backup", total, copy.execute(listed)):
                    if path not in lost:
                        tar.add(workspace.artifacts.locate(path), ARTIFACTS + path)
                        tar.members.clear()  # type: ignore[attr-defined]  # it would remember millions
                        tar.inodes.clear()  # type: ignore[attr-defined]
    return _result(file, manifest, file.stat().st_size)


def _count(rows: sqlite3.Connection) -> int:
    """How many rows all tables have."""
    counts = (f'SELECT count(*) FROM "{name}"' for name in METADATA.tables)  # noqa: S608
    return sum(rows.execute(query).fetchone()[0] for query in counts)


def _result(file: Path, manifest: dict[str, Any], size: int, *, dry_run: bool = False) -> Backup:
    made_at, rows, files = (manifest[name] for name in ("made_at", "rows", "artifacts"))
    return Backup(str(file), size, made_at, rows, files, tuple(manifest["missing"]), dry_run)


def _copy_database(database: Database, target: Path) -> None:
    """Copy all rows, as they are at one moment, to a new SQLite database."""
    if database.is_sqlite:
        with closing(sqlite3.connect(str(database.engine.url.database))) as source:
            try:
                source.execute("VACUUM INTO ?", (str(target),))
            except sqlite3.Error as error:
                raise StorageError(
                    f"The database cannot be copied: {error}. See what is wrong with: "
                    "cellstore doctor"
                ) from error
        return
    copy = connect(target)
    try:
        migrate.upgrade(copy)
        moment = {"isolation_level": "REPEATABLE READ"}
        engine = database.engine.execution_options(**moment)
        with (
            engine.connect() as reader,
            copy.engine.execution_options(writes=True).begin() as writer,
        ):
            _copy_rows(reader, writer)
        with copy.engine.connect() as last:
            last.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        copy.close()


def _copy_rows(reader: Connection, writer: Connection) -> None:
    """Copy every row of every table; what the target has is deleted. Its triggers rest meanwhile.

    The triggers keep rows as they are; here they come from a store that they have guarded.
    """
    with _without_triggers(writer):
        for table in reversed(METADATA.sorted_tables):
            writer.execute(delete(table))
        for table in METADATA.sorted_tables:
            order = list(table.primary_key.columns)  # a row comes after the one that it refers to
            rows = reader.execution_options(yield_per=ROWS_AT_ONCE).execute(
                select(table).order_by(*order)
            )
            for some in rows.mappings().partitions():
                writer.execute(insert(table), [dict(row) for row in some])
    if writer.dialect.name != "sqlite":
        events = METADATA.tables["events"].c
        for table in METADATA.sorted_tables:
            if "id" in table.c:
                # As take_ids does: events and files of features still name rows that are deleted.
                named = select(func.max(events.row_id)).where(events.table_name == table.name)
                ids = (writer.scalar(select(func.max(table.c.id))), writer.scalar(named))
                last = max((number for number in ids if number is not None), default=None)
                sequence = text("SELECT setval(pg_get_serial_sequence(:name, 'id'), :last)")
                if last is not None:
                    writer.execute(sequence, {"name": table.name, "last": last})


@contextmanager
def _without_triggers(writer: Connection) -> Iterator[None]:
    if writer.dialect.name == "sqlite":
        query = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
        found = writer.exec_driver_sql(query).all()
        for name, _ in found:
            writer.exec_driver_sql(f'DROP TRIGGER "{name}"')
        yield
        for _, sql in found:
            writer.exec_driver_sql(sql)
        return
    for change in ("DISABLE", "ENABLE"):
        for name in METADATA.tables:
            writer.exec_driver_sql(f'ALTER TABLE "{name}" {change} TRIGGER USER')
        if change == "DISABLE":
            yield


# ---- Read ----


def restore(
    file: Path, path: Path, *, database: str | None = None, dry_run: bool = False
) -> Backup:
    """Make a store of a backup in the folder ``path``: new, or a store without anything in it.

    A dry run reads and checks the whole backup, and writes nothing that stays.
    """
    if not file.is_file():
        raise UserInputError(f"There is no file {file}. Check the path.")
    root = path.resolve()
    beside = Path(tempfile.gettempdir()) if dry_run else root.parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".restore-", dir=beside) as folder:
        found = Path(folder)
        manifest = _unpack(file, found)
        if not dry_run:
            _put_in_place(found, root, database, file.name, manifest)
    return _result(file, manifest, file.stat().st_size, dry_run=dry_run)


_VALUES = {"sha256": str, "made_at": str, "rows": int, "artifacts": int, "missing": list}


def _damaged(file: Path, why: str) -> StorageError:
    return StorageError(
        f"{file} is damaged, or not a backup: {why}. Nothing was restored; use another copy of it."
    )


def _unpack(file: Path, folder: Path) -> dict[str, Any]:
    """Write what a backup holds to a new folder, compared with its digests; return the manifest."""
    seen = 0
    try:
        with ExitStack() as stack:
            tar = stack.enter_context(tarfile.open(file, mode="r:"))
            first = tar.next()
            if first is None or first.name != MANIFEST:
                raise _damaged(file, f"it does not begin with {MANIFEST}")
            manifest: dict[str, Any] = json.loads(_bytes_of(tar, first).read())
            if not isinstance(manifest, dict):
                raise TypeError(f"{MANIFEST} is no object")
            if manifest["schema"] != migrate.HEAD or manifest["format"] != FORMAT:
                raise UserInputError(
                    f"{file} was made with the schema {manifest['schema']}, this cellstore has "
                    f"{migrate.HEAD}. Restore it with the cellstore that made it."
                )
            for key, kind in _VALUES.items():
                if not isinstance(manifest[key], kind):
                    raise TypeError(f"{key} of {MANIFEST} is {manifest[key]!r:.40}")
            rows = None
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember millions
                data, name = _bytes_of(tar, member), member.name
                expected = None
                if name == SQLITE_NAME:
                    expected = manifest["sha256"]
                elif name.startswith(ARTIFACTS) and rows is not None:
                    query = "SELECT sha256 FROM artifacts WHERE path = ?"
                    known = rows.execute(query, (name.removeprefix(ARTIFACTS),)).fetchone()
                    expected = known and known[0]
                target = folder / name
                is_question = name == QUESTIONS + Path(name).name and name.endswith(".sql")
                inside = target.resolve().is_relative_to(folder.resolve())
                if not inside or (expected is None and not is_question):
                    raise _damaged(file, f"{name!r} does not belong there")
                target.parent.mkdir(parents=True, exist_ok=True)
                digest = hashlib.sha256()
                with target.open("xb") as out:
                    while piece := data.read(CHUNK):
                        digest.update(piece)
                        out.write(piece)
                if expected is not None and digest.hexdigest() != expected:
                    raise _damaged(file, f"{name} is not what was written")
                if name == SQLITE_NAME:
                    rows = sqlite3.connect(f"file:{target}?mode=ro", uri=True)
                    stack.enter_context(closing(rows))
                    if _count(rows) != manifest["rows"]:
                        raise _damaged(file, f"{name} has not the rows of {MANIFEST}")
                seen += name.startswith(ARTIFACTS)
    except CellstoreError:
        raise
    except OSError as error:  # tarfile has errors of this kind, too
        names = (errno.EEXIST, errno.ENAMETOOLONG, errno.ENOTDIR)
        if error.errno is not None and error.errno not in names:
            raise
        raise _damaged(file, f"a file in it: {error.strerror or error}") from error
    except Exception as error:
        raise _damaged(file, str(error) or type(error).__name__) from error
    if rows is None or seen != manifest["artifacts"]:
        raise _damaged(file, f"it holds {seen:,} of {manifest['artifacts']:,} files")
    return manifest


def _bytes_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    data = tar.extractfile(member) if member.isreg() else None
    if data is None:
        raise ValueError(f"{member.name!r} is no file")
    return data


def _put_in_place(
    found: Path, root: Path, database: str | None, name: str, manifest: dict[str, Any]
) -> None:
    """Make the store in ``root``: files first, then rows."""
    workspace, is_new = create_workspace(root, database)
    try:
        with workspace.database.read() as session:
            full = [
                table.name
                for table in METADATA.sorted_tables
                if table.name != "events" and session.scalar(select(1).select_from(table).limit(1))
            ]
        if full or any((root / "artifacts").glob("*/*")):
            raise UserInputError(
                f"The store {root} is not empty ({', '.join(full[:3]) or 'artifacts'}), and is not "
                "overwritten. Restore into a new folder (and, on PostgreSQL, a new database)."
            )
        for part in (ARTIFACTS, QUESTIONS):
            if (found / part).is_dir():
                shutil.copytree(
                    found / part, root / part, dirs_exist_ok=True, copy_function=shutil.move
                )
        if workspace.database.is_sqlite:
            workspace.database.close()
            with (
                closing(sqlite3.connect(found / SQLITE_NAME)) as source,
                closing(sqlite3.connect(str(workspace.database.engine.url.database))) as target,
            ):
                source.backup(target)
        else:
            _fill(workspace.database, found / SQLITE_NAME)
        restored = {"restored": name, "made_at": manifest["made_at"]}
        with workspace.database.begin() as session:
            record_events(session, [Change("store", None, None, restored)])
    except BaseException:
        workspace.database.close()
        if is_new and database is None and workspace.settings.database is None:
            # Nothing of a store that was made for this is left.
            for left in (MARKER, SQLITE_NAME, f"{SQLITE_NAME}-wal", f"{SQLITE_NAME}-shm"):
                (root / left).unlink(missing_ok=True)
            for part in (ARTIFACTS, QUESTIONS):
                shutil.rmtree(root / part, ignore_errors=True)
        raise
    workspace.database.close()


def _fill(database: Database, file: Path) -> None:
    """Write the rows of an SQLite database to PostgreSQL, in one transaction."""
    source = connect(file)
    try:
        with source.engine.connect() as reader, database.engine.begin() as writer:
            _copy_rows(reader, writer)
    except SQLAlchemyError as error:
        reason = first_line(getattr(error, "orig", None) or error)
        raise StorageError(f"The rows cannot be written to {database.shown}: {reason}") from error
    finally:
        source.close()
