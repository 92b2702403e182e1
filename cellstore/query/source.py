"""What a question can read: the tables of a store, through ADBC, and the views, files in ``sql/``.

Arrow streams come from the database as DuckDB takes them.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib.resources import files
from itertools import pairwise, takewhile
from typing import Any
from urllib.parse import quote

import duckdb
from sqlalchemy import text

from ..artifacts import ArtifactFolder
from ..config import VoteOptions
from ..db.session import SQLITE_BUSY_MS, Database
from ..enums import FeatureStorage
from ..errors import DatabaseError, MissingExtraError, StorageError, UserInputError
from .guard import quoted, reading_files

Columns = dict[str, str]
"""The type in DuckDB of each column, by name."""
Rows = list[tuple[Any, ...]]

STEPS = (
    "vote_options",
    "counted_cells",
    "excluded_cells",
    "eligible_cells",
    "eligible_predictions",
    "excluded_images",
    "later_exclusions",
    "predictions_with_image",
    "image_label_counts",
    "label_counts",
    "label_medians",
    "label_votes",
    "ranked_votes",
    "current_labels",
    "image_labels",
)
"""Views that the others are made of: what counts, what people say, and the steps of a vote."""

PROFILES = "profiles"
"""The view of all profiles; its values are in files."""

VIEWS = (
    "image_table",
    "well_table",
    "treatment_table",
    "cell_table",
    "run_images",
    "prediction_table",
    "votes",
    "scored_predictions",
    "accuracy",
    "confusion",
    "class_report",
    "disagreements",
    "training_runs",
    "run_parameters",
    PROFILES,
    "hit_table",
    "annotation_table",
    "lineage",
    "image_locations",
    *STEPS,
)
"""All views: first those that people ask for."""

LATER = "later_exclusions"
EXCLUDED = "excluded_cells"


def view_words(name: str) -> str:
    """Return what a row of a view is: the comment at the head of its file."""
    text = files("cellstore.query.sql").joinpath(f"{name}.sql").read_text("utf-8")
    head = takewhile(lambda line: line.startswith("--"), text.splitlines())
    return " ".join(line.removeprefix("--").strip() for line in head)


@cache
def view(name: str, options: VoteOptions | None = None) -> str:
    """Return the query of a view; two of them depend on the options of the vote."""
    text = files("cellstore.query.sql").joinpath(f"{name}.sql").read_text("utf-8")
    query = re.sub(r"\A(--.*\n)+", "", text).rstrip()
    if options is not None and name == "vote_options":
        query = (
            f"SELECT {int(options.min_cells)} AS min_cells, "
            f"CAST({float(options.min_margin)!r} AS DOUBLE) AS min_margin, "
            f"{'true' if options.controls else 'false'} AS controls"
        )
    elif options is not None and name == LATER and options.exclude_flagged is not None:
        query += f"\nOR run_id = {int(options.exclude_flagged)}"
    return query


_TYPES = {
    "INTEGER": "BIGINT",
    "BIGINT": "BIGINT",
    "BOOLEAN": "BOOLEAN",
    "FLOAT": "DOUBLE",
    "DOUBLE PRECISION": "DOUBLE",
    "DATETIME": "TIMESTAMP WITH TIME ZONE",
    "TIMESTAMP WITH TIME ZONE": "TIMESTAMP WITH TIME ZONE",
}
"""The type in DuckDB of a column that is declared so; all else, JSON among it, is text."""
_FIRST_VALUES = {"BIGINT": "0", "BOOLEAN": "0", "DOUBLE": "0.0"}

_CENTROID = {
    "centroid_y": "c.centroid_row AS centroid_y",
    "centroid_x": "c.centroid_col AS centroid_x",
}
"""The last columns of ``features`` as questions see it; the database has them in ``cells``."""

SQLITE_COLUMNS = """
    SELECT t.name, c.name, upper(c.type) FROM sqlite_master AS t, pragma_table_info(t.name) AS c
    WHERE t.type IN ('table', 'view') ORDER BY t.name, c.cid
"""
POSTGRESQL_COLUMNS = """
    SELECT table_name, column_name, upper(data_type) FROM information_schema.columns
    WHERE table_schema = current_schema() ORDER BY table_name, ordinal_position
"""

PREDICTIONS = "predictions_with_image"
PREDICTION_COLUMNS: Columns = {
    "run_id": "BIGINT",
    "image_id": "BIGINT",
    "cell_id": "BIGINT",
    "excluded": "BOOLEAN",
    "rank": "BIGINT",
    "label_id": "BIGINT",
    "probability": "DOUBLE",
}
"""The columns of ``predictions_with_image``; those of table ``predictions`` are among them."""
_PREDICTION_VALUES = (
    *("p.run_id", "s.image_id", "p.cell_id", "c.excluded IS NOT NULL AS excluded"),
    *("p.rank", "p.label_id", "p.probability"),
)
CELLS_OF_READER = 250_000
"""A range of so many cell ids is worth a connection of its own."""
MOST_READERS = 8


class Source:
    """One read transaction on a database; all that is read through it belongs to one moment."""

    def __init__(self, database: Database) -> None:
        """Begin the transaction; end it with :meth:`close`."""
        # The drivers themselves: their DB-API layer imports pandas, half a second for a short
        # answer.
        import adbc_driver_manager as adbc

        self.database, self.is_sqlite = database, database.is_sqlite
        self._adbc = adbc
        self._lock = threading.RLock()  # a connection answers one question at a time
        self._json: set[tuple[str, str]] = set()
        url = database.engine.url
        if self.is_sqlite:
            import adbc_driver_sqlite

            driver = adbc_driver_sqlite._driver_path()
            address = f"file:{quote(url.database or '')}?mode=ro"
            # Another process may be putting the log of the database in order. The moment begins
            # with a read.
            wait = f"PRAGMA busy_timeout = {SQLITE_BUSY_MS}"
            begin = [wait, "SELECT count(*) FROM plates"]
        else:
            try:
                import adbc_driver_postgresql
            except ModuleNotFoundError as error:
                raise MissingExtraError.of("adbc-driver-postgresql", "postgres") from error
            driver = adbc_driver_postgresql._driver_path()
            address = url.set(drivername="postgresql").render_as_string(hide_password=False)
            begin = ["SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"]
        try:
            self._handle = adbc.AdbcDatabase(driver=driver, uri=address)
            self._connection = adbc.AdbcConnection(self._handle)
            self._connection.set_autocommit(False)
        except adbc.Error as error:
            raise self._failed(error) from error
        for statement in begin:
            with self._stream(statement):
                pass

    @cached_property
    def columns(self) -> dict[str, Columns]:
        """The columns of each table, and of the view that the database has. JSON is text.

        From the database, since the classes of the tables load slower than a question is answered.
        """
        query = SQLITE_COLUMNS if self.is_sqlite else POSTGRESQL_COLUMNS
        # Those that are described; others, as sqlite_stat1 after ANALYZE, are not ours.
        words = files("cellstore.query").joinpath("schema.toml").read_text("utf-8")
        ours = set(re.findall(r"^\[(\w+)\]", words, re.MULTILINE)) - {"shared", *VIEWS}
        found: dict[str, Columns] = {}
        with self.database.read() as session:
            for table, column, kind in session.execute(text(query)):
                if table not in ours:
                    continue
                # SQLite tells no type of a view's column that is computed; since 3.41 some type.
                is_id = kind in ("", "NUM") and column.endswith("_id")
                found.setdefault(table, {})[column] = _TYPES.get(
                    "BIGINT" if is_id else kind, "VARCHAR"
                )
                if kind.startswith("JSON"):
                    self._json.add((table, column))
        found["features"] |= dict.fromkeys(_CENTROID, "DOUBLE")
        return found

    def close(self) -> None:
        """Give the connection back."""
        self._connection.close()
        self._handle.close()

    def fetch(
        self, target: duckdb.DuckDBPyConnection, name: str, condition: str = ""
    ) -> list[dict[str, Any]]:
        """Return rows of a small table by way of ``target``; ``condition`` as for feed_table."""
        rows = self.feed_table(target, "FROM {rows}", name, condition)
        return [dict(zip(self.columns[name], row, strict=True)) for row in rows]

    def feed_table(
        self, target: duckdb.DuckDBPyConnection, statement: str, name: str, condition: str = ""
    ) -> Rows:
        """Carry out ``statement`` as :meth:`feed` does, with rows of a table.

        ``condition`` is SQL of ours, to follow ``FROM table AS t``.
        """
        # JSON is text in DuckDB, and its null is no value.
        json = "nullif(CAST(t.{0} AS text), 'null') AS {0}"
        columns, origin = self.columns[name], f'"{name}" AS t'
        values = [
            (json if (name, column) in self._json else "t.{0}").format(f'"{column}"')
            for column in columns
        ]
        if name == "features":
            values[-len(_CENTROID) :] = _CENTROID.values()
            origin += " JOIN cells AS c ON c.id = t.cell_id"
        return self.feed(target, statement, columns, values, [f"{origin} {condition}"])

    def feed(
        self,
        target: duckdb.DuckDBPyConnection,
        statement: str,
        columns: Columns,
        values: Sequence[str],
        origins: Sequence[str],
    ) -> Rows:
        """Carry out a statement of DuckDB, in which ``{rows}`` stands for rows of the database.

        Return its rows: where it writes, how many it has written.

        They are ``SELECT values FROM origin`` of all ``origins`` (SQL of ours, never of a user),
        with the names and types of ``columns``. Of several origins each is read through a
        connection of its own, side by side: only for rows that nobody changes any more.
        """
        if len(origins) > 1:
            # DuckDB itself reads one stream after the other.
            def read(number: int) -> str:
                with closing(Source(self.database)) as source, closing(target.cursor()) as own:
                    part = f'"part {number}"'
                    create = f"CREATE TABLE {part} AS FROM {{rows}}"
                    source.feed(own, create, columns, values, [origins[number]])
                return part

            with ThreadPoolExecutor(len(origins)) as pool:
                parts = list(pool.map(read, range(len(origins))))
            rows = " UNION ALL ".join(f"FROM {part}" for part in parts)
            written = target.execute(statement.replace("{rows}", f"({rows})")).fetchall()
            for part in parts:
                target.execute(f"DROP TABLE {part}")
            return written
        first = ""
        if self.is_sqlite:
            # SQLite types values, not columns, and ADBC takes a column's type from its first rows:
            # a first row gives every column its type.
            empty = "''"
            typed = (
                f'{_FIRST_VALUES.get(kind, empty)} AS "{name}"' for name, kind in columns.items()
            )
            first = f'SELECT 1 AS "first", {", ".join(typed)} UNION ALL SELECT 0, '
        cast = ", ".join(f'CAST("{name}" AS {kind}) AS "{name}"' for name, kind in columns.items())
        where = ' WHERE "first" = 0' if first else ""
        query = f"{first or 'SELECT '}{', '.join(values)} FROM {origins[0]}"  # noqa: S608
        with self._stream(query) as stream:
            target.register("stream", stream)
            try:
                rows = f'(SELECT {cast} FROM "stream"{where})'  # noqa: S608
                written = target.execute(statement.replace("{rows}", rows)).fetchall()
            finally:
                target.unregister("stream")
        return written

    def feed_excluded(self, target: duckdb.DuckDBPyConnection, statement: str, flags: str) -> Rows:
        """Carry out ``statement`` as :meth:`feed` does, with the cells that do not count.

        ``flags``: SQL of ours about ``t``: which flags of quality control exclude, too.
        """
        join = "CROSS JOIN" if self.is_sqlite else "JOIN"  # few are excluded, of many cells
        origin = f"""(
            SELECT DISTINCT id FROM exclusions AS t
            WHERE t.level = 'cell' AND (t.source <> 'quality'{flags})
        ) AS e {join} cells AS c ON c.id = e.id"""  # noqa: S608 - numbers and our own words
        columns = {"cell_id": "BIGINT", "segmentation_id": "BIGINT"}
        return self.feed(
            target, statement, columns, ("c.id AS cell_id", "c.segmentation_id"), [origin]
        )

    def feed_runs(
        self,
        target: duckdb.DuckDBPyConnection,
        statement: str,
        name: str,
        runs: Sequence[int],
        *,
        have_ended: bool = False,
    ) -> Rows:
        """Carry out ``statement`` as :meth:`feed` does, with what runs wrote into a big table.

        Predictions of runs that ``have_ended`` come in no certain order: several connections read
        them.
        """
        numbers = ", ".join(str(int(run)) for run in runs)
        if name == "cells":
            own = "JOIN segmentations AS s ON s.id = t.segmentation_id"
            return self.feed_table(target, statement, name, f"{own} WHERE s.run_id IN ({numbers})")
        if name != PREDICTIONS:
            return self.feed_table(target, statement, name, f"WHERE t.run_id IN ({numbers})")
        # SQLite joins in the order that is written with CROSS JOIN, so that every step goes through
        # an index.
        join = "CROSS JOIN" if self.is_sqlite else "JOIN"
        where = f"WHERE p.run_id IN ({numbers})"
        joined = f"""predictions AS p
            {join} cells AS c ON c.id = p.cell_id
            {join} segmentations AS s ON s.id = c.segmentation_id {where}"""
        origins = [joined]
        if have_ended:
            # Two questions, each of which an index answers at once.
            cells = f"cell_id) FROM predictions WHERE run_id IN ({numbers})"
            query = text(f"SELECT (SELECT min({cells}), (SELECT max({cells})")
            with self.database.read() as session:
                low, high = session.execute(query).one()
            if low is None:  # a model that sees whole images, if it said anything
                of_images = "(SELECT *, NULL AS cell_id FROM image_predictions) AS p"
                of_images += " CROSS JOIN (SELECT NULL AS excluded) AS c"
                of_images += (
                    " JOIN (SELECT id AS image_id FROM images) AS s ON s.image_id = p.image_id"
                )
                origins = [f"{of_images} {where}"]
            else:
                cells = high + 1 - low
                parts = max(1, min(cells // CELLS_OF_READER, MOST_READERS, os.cpu_count() or 1))
                edges = [low + cells * part // parts for part in range(parts + 1)]
                origins = [
                    f"{joined} AND p.cell_id BETWEEN {first} AND {last - 1}"
                    for first, last in pairwise(edges)
                ]
        return self.feed(target, statement, PREDICTION_COLUMNS, _PREDICTION_VALUES, origins)

    @contextmanager
    def _stream(self, query: str) -> Iterator[Any]:
        """Open the Arrow stream of what a query yields."""
        with self._lock:
            try:
                statement = self._adbc.AdbcStatement(self._connection)
                try:
                    if self.is_sqlite:
                        statement.set_options(**{"adbc.sqlite.query.batch_rows": "20480"})
                    statement.set_sql_query(query)
                    stream = statement.execute_query()[0]
                    try:
                        yield stream
                    finally:
                        stream.release()
                finally:
                    statement.close()
            except self._adbc.Error as error:
                raise self._failed(error) from error

    def _failed(self, error: Exception) -> DatabaseError:
        lines = str(error).strip().splitlines() or ["no reason given"]
        return DatabaseError(f"The database {self.database.shown} failed: {lines[0]}")


# --- feature sets: each under its own name, a column per feature, a row per cell ---

_SET_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_FEATURE_TYPES = {
    **{f"{sign}int{bits}": "BIGINT" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "float": "FLOAT",
    "double": "DOUBLE",
    "string": "VARCHAR",
    "bool": "BOOLEAN",
}


def check_set_name(name: str, option: str = "--name") -> str:
    """Return the name of a feature set, if it can be one; ``option`` is what gives another.

    Raises:
        UserInputError: it is no plain name, or that of a table or of a group of features.
    """
    if not _SET_NAME.fullmatch(name):
        raise UserInputError(
            f"{name!r} cannot name a feature set. Use small letters, digits and _ (up to 63), a "
            f"letter first: {option} nuclei_v2"
        )
    from ..analysis.features import GROUPS
    from ..models import METADATA  # they load slowly, and questions need no classes of tables

    if name in GROUPS:  # it would be found in their place
        raise UserInputError(f"{name!r} is a group of cellstore's features. Give another {option}.")
    if name in {*METADATA.tables, "exclusions", *VIEWS}:
        raise UserInputError(f"{name!r} is the name of a table. Give another {option}.")
    return name


def group_of(name: str) -> str | None:
    """Return the group of a feature set that ``measure`` made: texture of texture_1a2b3c4d."""
    found = re.fullmatch(r"(\w+)_[0-9a-f]{8}", name)
    return found[1] if found else None


@dataclass(frozen=True)
class SetRelation:
    """A feature set with the type of each column, ``cell_id`` first.

    ``in_table``: its values are rows of table ``features``, else they are in files, where those of
    ``in_files`` have other names: their channel was renamed.
    """

    id: int
    name: str
    recipe_id: int
    in_table: bool
    columns: Columns
    in_files: Mapping[str, str]

    def query(
        self,
        source: Source,
        artifacts: ArtifactFolder,
        target: duckdb.DuckDBPyConnection,
        between: tuple[int, int] | None = None,
    ) -> str:
        """Return the SQL behind the set; ``between``: only files with cells from one to another."""
        if self.in_table:
            names = ", ".join(map(quoted, self.columns))
            # Columns of our own table and a number; nothing here comes from a user.
            return f"SELECT {names} FROM features WHERE recipe_id = {self.recipe_id}"  # noqa: S608
        condition = (
            f"JOIN feature_files AS f ON f.artifact_id = t.id AND f.feature_set_id = {self.id}"
        )
        if between is not None:
            first, last = between
            condition += f" AND f.first_cell_id <= {last} AND f.last_cell_id >= {first}"
        rows = source.fetch(target, "artifacts", condition)
        paths = [artifacts.existing(row["path"]) for row in rows]
        if not paths:
            return no_rows(self.columns)
        values = (
            f"CAST({quoted(self.in_files.get(name, name))} AS {kind}) AS {quoted(name)}"
            for name, kind in self.columns.items()
        )
        return f"SELECT {', '.join(values)} FROM {reading_files(paths)}"  # noqa: S608


def no_rows(columns: Columns) -> str:
    """Return the SQL that gives columns of these types, and no row."""
    nulls = (f"CAST(NULL AS {kind}) AS {quoted(name)}" for name, kind in columns.items())
    return f"SELECT {', '.join(nulls)} LIMIT 0"


def list_sets(source: Source, target: duckdb.DuckDBPyConnection) -> list[SetRelation]:
    """Return the feature sets of a store, and of each group once more the one measured last."""
    rows = source.fetch(target, "feature_sets")
    known = source.columns["features"]
    now = _renamed_everywhere(source, target)
    found = [_relation(row, known, now) for row in sorted(rows, key=lambda row: int(row["id"]))]
    runs = {
        row["recipe_id"]: row["id"]
        for row in source.fetch(target, "runs", "WHERE t.stage = 'measure' ORDER BY t.id")
    }
    groups: dict[str, SetRelation] = {}
    for item in sorted(found, key=lambda item: (runs.get(item.recipe_id, 0), item.id)):
        if group := group_of(item.name):
            groups[group] = replace(item, name=group)
    return [*found, *(groups[name] for name in groups.keys() - {item.name for item in found})]


_RENAMES = "WHERE t.table_name = 'plates' AND t.old IS NOT NULL AND t.new IS NOT NULL ORDER BY t.id"


def _renamed_everywhere(source: Source, target: duckdb.DuckDBPyConnection) -> dict[str, str]:
    """What channels are called now on all plates, by what recipes call them."""
    rows = source.fetch(target, "events", _RENAMES)
    changes = ((row["row_id"], json.loads(row["old"]), json.loads(row["new"])) for row in rows)
    renames = [item for item in changes if "channel" in item[1]]
    if not renames:
        return {}
    from ..jobs.lookup import channels_after  # with the classes of the tables: slow to load

    named = channels_after(renames)
    now = {kept: name for name, kept in named.get(None, {}).items() if name != kept}
    for names in named.values():
        for name, kept in names.items():
            if now.get(kept, name) != name:
                del now[kept]
    return now


def _relation(row: dict[str, Any], known: Columns, now: Mapping[str, str]) -> SetRelation:
    in_table = row["storage"] == FeatureStorage.TABLE
    columns = {"cell_id": "BIGINT"}
    taken, stored = {"cell_id"}, {"cell_id"}
    in_files: dict[str, str] = {}
    of_channels = now if group_of(row["name"]) else {}
    try:
        for item in json.loads(row["columns"]):
            if not in_table or item["name"] in known:
                name = item["name"]
                kept = max((c for c in of_channels if name.endswith(f"_{c}")), key=len, default="")
                shown = name.removesuffix(kept) + of_channels[kept] if kept else name
                shown, name = _unique(shown, taken), _unique(name, stored)
                columns[shown] = known[shown] if in_table else _FEATURE_TYPES[item["dtype"]]
                in_files |= {shown: name} if shown != name else {}
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(
            f"The columns of feature set {row['name']!r} are not described as they should be "
            f"({error}). Ingest it again."
        ) from error
    return SetRelation(row["id"], row["name"], row["recipe_id"], in_table, columns, in_files)


def _unique(name: str, taken: set[str]) -> str:
    """Return the name of a column as DuckDB has it, where ``Area`` and ``AREA`` are the same.

    ``taken``: the others, in small letters; the new one is added.
    """
    number, found = 0, name
    while found.lower() in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found.lower())
    return found
