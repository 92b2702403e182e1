"""What a question must never do: write, read files, leave the store, or take the machine along."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from screens import small_screen

from cellstore.config import Limits
from cellstore.errors import QueryError
from cellstore.jobs.workspace import Workspace, create_workspace
from cellstore.query.engine import Questions, open_questions

ROW = "(9, 'x', 'y')"
WRITING = [
    f"INSERT INTO plates VALUES {ROW}",
    "UPDATE plates SET batch = 'x'",
    "DELETE FROM plates",
    "TRUNCATE plates",
    "MERGE INTO plates USING plates AS s ON plates.id = s.id WHEN MATCHED THEN DELETE",
    "CREATE TABLE t AS SELECT 1",
    "CREATE MACRO f(x) AS x",
    "CREATE SECRET s (TYPE s3)",
    "CREATE TYPE mood AS ENUM ('a')",
    "ALTER TABLE plates DROP COLUMN batch",
    "DROP VIEW votes",
    "COMMENT ON TABLE plates IS 'x'",
    "COPY plates TO 'out.csv'",
    "COPY (SELECT 1) TO '/tmp/out.parquet'",
    "COPY plates FROM '/etc/passwd'",
    "EXPORT DATABASE 'folder'",
    "IMPORT DATABASE 'folder'",
    "PRAGMA enable_profiling",
    "PRAGMA database_list",
    "SET memory_limit = '100GB'",
    "RESET memory_limit",
    "SET VARIABLE x = 1",
    "CALL pragma_version()",
    "ATTACH 'other.db'",
    "DETACH memory",
    "USE memory",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '/tmp/evil.duckdb_extension'",
    "UPDATE EXTENSIONS",
    "CHECKPOINT",
    "VACUUM",
    "ANALYZE",
    "BEGIN",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    f"WITH x AS (INSERT INTO plates VALUES {ROW} RETURNING *) SELECT * FROM x",
    f"WITH x AS (/* /* */ ' */ INSERT INTO plates VALUES {ROW} RETURNING * /* ' */) FROM x",
    f'WITH "a(" AS (SELECT 1), x AS (INSERT INTO plates VALUES {ROW} RETURNING *) FROM x',
    "WITH x AS MATERIALIZED (DELETE FROM plates RETURNING *) SELECT * FROM x",
    f"WITH x AS (WITH y AS (SELECT 1) INSERT INTO plates VALUES {ROW} RETURNING *) FROM x",
    "WITH x AS (WITH y AS (SELECT 1) DELETE FROM plates RETURNING *) SELECT * FROM x",
    "WITH x AS (TRUNCATE plates) SELECT 1",
    "WITH q AS (SELECT E'\\''), x AS (DELETE FROM plates RETURNING *) SELECT '' FROM x",
    f"EXPLAIN ANALYZE INSERT INTO plates VALUES {ROW}",
    f"EXPLAIN (ANALYZE, FORMAT json) INSERT INTO plates VALUES {ROW}",
    "EXPLAIN ANALYZE COPY plates TO 'out.csv'",
    "EXPLAIN ANALYZE CALL enable_logging()",
    "explain analyze create table t as select 1",
    "SELECT 1; DROP TABLE plates",
    "SELECT 1 /* ; */; /**/ DELETE FROM plates --",
    "-- harmless\nDELETE FROM plates",
]
ELSEWHERE = [
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_csv_auto('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/etc/passwd')",
    "SELECT * FROM read_json('/etc/passwd')",
    "SELECT * FROM read_ndjson_objects('/etc/passwd')",
    "SELECT * FROM read_parquet('/etc/passwd')",
    "SELECT * FROM parquet_metadata('/etc/passwd')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM \"read_text\" /* a word between */ ('/etc/passwd')",
    "SELECT * FROM system.main.read_text('/etc/passwd')",
    "SELECT * FROM READ_TEXT('cellstore.db')",
    "FROM '/etc/passwd'",
    'FROM "/etc/passwd"',
    "FROM 'cache/snapshots/*.parquet'",
    "FROM read_parquet('cache/snapshots/*.parquet')",
    "SUMMARIZE '/etc/passwd'",
    "DESCRIBE SELECT * FROM '/etc/passwd'",
    "FROM query('FROM read_text(''/etc/passwd'')')",
    "FROM query_table('/etc/passwd')",
    "FROM json_execute_serialized_sql(json_serialize_sql('FROM duckdb_settings()'))",
    "SELECT * FROM read_csv('https://example.org/x.csv')",
    "FROM 's3://bucket/x.parquet'",
    "SELECT * FROM sqlite_scan('cellstore.db', 'plates')",
    "SELECT * FROM postgres_scan('host=localhost', 'public', 'plates')",
    "FROM duckdb_settings()",
    "FROM duckdb_secrets()",
    "FROM duckdb_extensions()",
    "FROM duckdb_databases()",
    "FROM duckdb_temporary_files()",
    "SELECT current_setting('temp_directory')",
    "SELECT getenv('HOME')",
    "SELECT write_log('x')",
    "FROM which_secret('s3://x', 's3')",
    "FROM enable_logging(storage = 'file')",
    "FROM enable_profiling(save_location = 'profile')",
    "FROM force_checkpoint('memory')",
    "FROM import_database('folder')",
    "FROM add_grammar_extension('x')",
    "FROM arrow_scan(1, 2, 3)",
    "FROM pandas_scan(1)",
    "FROM python_map_function(1)",
    "FROM secret_of_the_program",
    "PIVOT (FROM read_text('/etc/passwd')) ON filename USING first(content)",
    "PIVOT '/etc/passwd' ON content",
    "SELECT * FROM (PIVOT (FROM duckdb_settings()) ON name USING first(value))",
    "PIVOT plates ON batch USING first(getenv('HOME')) GROUP BY barcode",
    "WITH x AS (PIVOT plates ON barcode USING first(current_setting('threads'))) FROM x",
]
DEEP = [
    "SELECT " + "(" * 100_000 + "1" + ")" * 100_000,
    "SELECT " + "NOT " * 100_000 + "true",
    "SELECT " + "- " * 100_000 + "1",
    "SELECT " + "[" * 10_000 + "1" + "]" * 10_000,
    "SELECT " + "(SELECT " * 2000 + "1" + ")" * 2000,
    "SELECT * FROM " + "(SELECT * FROM " * 1500 + "(SELECT 1)" + ")" * 1500,
    "SELECT " + "1 + " * 50_000 + "1",
    "SELECT NULL::INT" + "[]" * 5000,
    "(" * 50_000,
    "SELECT '" + "x" * 1_000_001 + "'",
]
ODD = ["SELECT 1 \0; DROP TABLE plates", "SELECT '\ud800'", "\udcff", "\0", " ", ";", "--", "/*"]


@pytest.fixture(scope="module")
def root(_sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that every test of this module may ask, and none may change."""
    root = tmp_path_factory.mktemp("attacked") / "store"
    root.mkdir()
    shutil.copy(_sqlite_template, root / "cellstore.db")
    workspace, _ = create_workspace(root, None)
    small_screen(workspace)
    workspace.database.close()
    return root


@pytest.fixture(scope="module")
def questions(root: Path) -> Iterator[Questions]:
    workspace, _ = create_workspace(root, None)
    with open_questions(workspace, Limits(seconds=20)) as questions:
        questions.ask("SELECT * FROM votes").table()  # snapshots are there to be stolen
        yield questions
    workspace.database.close()


def refused(questions: Questions, sql: str) -> str:
    with pytest.raises(QueryError) as caught:
        questions.ask(sql).table()
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    assert len(said) < 600
    assert questions.ask("SELECT count(*) AS n FROM plates").records() == [{"n": 1}]
    return said


@pytest.mark.parametrize("sql", WRITING)
def test_a_question_cannot_write(
    root: Path, questions: Questions, sql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    before = sorted(root.rglob("*"))
    assert "can only read" in refused(questions, sql) or ";" in sql
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize("sql", ELSEWHERE)
def test_a_question_sees_the_tables_of_the_store_only(
    root: Path, questions: Questions, sql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    secret_of_the_program = ["hunter2"]
    said = refused(questions, sql)
    assert secret_of_the_program[0] not in said
    assert "root:" not in said


SLOW_TO_PLAN = [
    "SELECT 1 FROM range(1)" + ", range(1)" * 900,
    "WITH a0 AS (SELECT 1)"
    + "".join(f", a{i} AS (FROM a{i - 1})" for i in range(1, 900))
    + " FROM a899",
    "SELECT " + "[" * 900 + "1" + "]" * 900,
]
"""DuckDB would plan these for many seconds, and hear no stop meanwhile."""


@pytest.mark.parametrize("sql", SLOW_TO_PLAN, ids=["joins", "steps", "lists"])
def test_what_would_be_planned_for_minutes_is_refused_at_once(
    questions: Questions, sql: str
) -> None:
    with pytest.raises(QueryError, match="nested too deeply"):
        questions.ask(sql).table()


@pytest.mark.parametrize("sql", DEEP, ids=range(len(DEEP)))
def test_deep_and_long_questions_end_in_a_sentence(questions: Questions, sql: str) -> None:
    refused(questions, sql)


@pytest.mark.parametrize("sql", ODD, ids=range(len(ODD)))
def test_what_is_no_text_is_refused(questions: Questions, sql: str) -> None:
    refused(questions, sql)


@pytest.mark.postgres
def test_the_same_is_refused_beside_postgresql(postgres_workspace: Workspace) -> None:
    small_screen(postgres_workspace)
    with open_questions(postgres_workspace) as questions:
        for sql in [*WRITING, *ELSEWHERE, *ODD][::6]:  # the guard knows no database
            refused(questions, sql)


def test_values_are_bound_and_never_run(questions: Questions) -> None:
    evil = "x'; DROP TABLE plates; --"
    sql = "SELECT $v AS v, count(*) AS n FROM plates WHERE barcode = $v"
    answer = questions.ask(sql, {"v": evil}).table()
    assert answer.to_pylist() == [{"v": evil, "n": 0}]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT len(list(range)) FROM range(2000000000)",
        "SELECT length(string_agg(range::VARCHAR, ',')) FROM range(1000000000)",
    ],
)
def test_a_question_cannot_take_all_memory(root: Path, sql: str) -> None:
    workspace, _ = create_workspace(root, None)
    with open_questions(workspace, Limits(seconds=20, memory_mb=200)) as questions:
        assert "more memory than allowed" in refused(questions, sql)
    workspace.database.close()


def test_a_question_spills_half_of_the_free_disk_at_most(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(root)._replace(free=64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    workspace, _ = create_workspace(root, None)
    # Sorted by what keeps the rows apart, so that they have to be somewhere: here is no room.
    sql = "SELECT i FROM range(60000000) t(i) ORDER BY hash(i), i DESC LIMIT 5 OFFSET 50000000"
    with open_questions(workspace, Limits(seconds=30, memory_mb=100)) as questions:
        assert "more memory than allowed" in refused(questions, sql)
    workspace.database.close()


ALONE = """

from cellstore_cli.app import run
run()
"""


def ask_alone(root: Path, program: str, sql: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Ask on the command line: the last line of defence is about a whole process."""
    command = [sys.executable, "-c", program, "sql", sql, "--store", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux holds a program to its memory")
def test_what_a_function_makes_cannot_take_all_memory(root: Path) -> None:
    # DuckDB counts neither against its own limit while the function is at work.
    sql = "SELECT length(repeat('x', 4000000000)), len(range(2000000000))"
    said = ask_alone(root, ALONE, sql, "--memory", "200")
    assert said.returncode == 2
    assert said.stderr.startswith("Error: The question needs more memory")


def test_a_question_that_does_not_hear_is_ended_with_the_program(root: Path) -> None:
    # Each name doubles the plan, and DuckDB does not hear an interrupt while it plans.
    names = [
        f"a{i} AS NOT MATERIALIZED (SELECT x.v FROM a{i - 1} x, a{i - 1})" for i in range(1, 31)
    ]
    sql = f"WITH a0 AS NOT MATERIALIZED (SELECT 1 AS v), {', '.join(names)} FROM a30"
    said = ask_alone(root, SHORT_GRACE, sql, "--seconds", "0.3")
    assert said.returncode == 2
    assert "did not stop on request" in said.stderr


SHORT_GRACE = "import cellstore_cli.question_commands as c; c.GRACE_SECONDS = 1.0\n" + ALONE
