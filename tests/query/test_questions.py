"""Questions: typed tables, one moment, snapshots, and nothing but reading."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import Factory
from screens import VOTES, SmallScreen, small_screen
from sqlalchemy import Engine, text

from cellstore.config import Limits
from cellstore.enums import Stage, Status
from cellstore.errors import DatabaseError, QueryError, StorageError, UnknownNameError
from cellstore.jobs.workspace import Workspace, create_workspace
from cellstore.models import METADATA
from cellstore.query import source
from cellstore.query.engine import COUNTS, RANKED, Questions, open_questions
from cellstore.query.source import PREDICTIONS, VIEWS, view_words
from cellstore.store import Store


def one(questions: Questions, sql: str, parameters: list[object] | None = None) -> object:
    """The single value of an answer."""
    answer = questions.ask(sql, parameters).table()
    assert (answer.num_rows, answer.num_columns) == (1, 1)
    return answer[0][0].as_py()


def snapshot_files(workspace: Workspace) -> list[Path]:
    return sorted((workspace.settings.cache / "snapshots").iterdir())


def test_every_table_has_the_rows_of_the_database(read_screen: SmallScreen) -> None:
    workspace = read_screen.workspace
    with open_questions(workspace) as questions, workspace.database.read() as session:
        for name in METADATA.tables:
            wanted = session.scalar(text(f'SELECT count(*) FROM "{name}"'))
            assert one(questions, f"SELECT count(*) FROM {name}") == wanted, name


def test_columns_are_typed_even_where_all_values_are_null(workspace: Workspace) -> None:
    Factory(workspace).plate("P1", batch=None)
    with open_questions(workspace) as questions:
        plates = questions.ask("SELECT * FROM plates").table()
        runs = questions.ask("SELECT started_at, environment, seed FROM runs").table()
    assert plates.schema.types == [pa.int64(), *[pa.string()] * 5]
    assert runs.schema.types == [pa.timestamp("us", tz="UTC"), pa.string(), pa.int64()]


def test_ids_of_a_view_are_numbers_where_sqlite_tells_some_type_of_them(
    sqlite_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = "coalesce(nullif(upper(c.type), ''), 'NUM')"  # as SQLite 3.41 and later
    query = source.SQLITE_COLUMNS.replace("upper(c.type)", newer)
    monkeypatch.setattr(source, "SQLITE_COLUMNS", query)
    with open_questions(sqlite_workspace) as questions:
        types = dict(questions.columns("exclusions"))
    assert {types[name] for name in ("id", "run_id", "annotation_id")} == {"BIGINT"}
    assert types["level"] == "VARCHAR"


def test_other_tables_of_the_database_are_out_of_reach(workspace: Workspace) -> None:
    with workspace.database.begin() as session:
        session.execute(text("CREATE TABLE others (secret INTEGER)"))
        session.execute(text("ANALYZE"))  # SQLite keeps what it finds in a table
    with open_questions(workspace) as questions:
        assert set(questions.names) == {*METADATA.tables, "exclusions", *VIEWS}
        for name in ("others", "sqlite_stat1", "alembic_version"):
            with pytest.raises(QueryError, match="does not exist"):
                questions.ask(f"FROM {name}")
    assert "others" not in {relation.name for relation in Store(workspace).schema()}


def test_what_could_not_be_copied_is_there_when_it_is_asked_for_again(
    sqlite_workspace: Workspace,
) -> None:
    small_screen(sqlite_workspace)
    copies = sqlite_workspace.settings.cache / "snapshots"
    with open_questions(sqlite_workspace) as questions:
        copies.rmdir()
        copies.write_text("in the way")
        with pytest.raises(StorageError, match="then run the same command again"):
            questions.ask("FROM cells")
        copies.unlink()
        assert one(questions, "SELECT count(*) > 0 FROM cells") is True


def test_values_come_out_as_they_went_in(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    with open_questions(workspace) as questions:
        row = questions.ask("SELECT * FROM runs WHERE stage = 'train'").records()[0]
    assert row["started_at"] == screen.train_run.started_at
    assert row["environment"] == '{"python": "3.11"}'
    assert row["result"] is None  # also where SQLAlchemy wrote the JSON value null
    assert row["user_name"] == "ada"


def test_a_text_after_thousands_of_nulls_is_read(workspace: Workspace) -> None:
    make = Factory(workspace)
    image = make.image(make.well(make.plate(), 1, 1))
    found = make.segmentation(image, make.run(Stage.SEGMENT, status=Status.RUNNING), 1500)
    make.cells(found, 1, excluded="perimeter is 0")
    with open_questions(workspace) as questions:
        assert one(questions, "SELECT count(*) FROM cells WHERE excluded IS NULL") == 1500
        assert one(questions, "SELECT max(excluded) FROM cells") == "perimeter is 0"


def test_all_answers_belong_to_one_moment(workspace: Workspace) -> None:
    make = Factory(workspace)
    make.plate("P1")
    with open_questions(workspace) as questions:
        assert one(questions, "SELECT count(*) FROM plates") == 1
        make.well(make.plate("P2"), 1, 1)
        assert one(questions, "SELECT count(*) FROM plates") == 1
        assert one(questions, "SELECT count(*) FROM wells") == 0  # read only now, same moment
    with open_questions(workspace) as questions:
        assert one(questions, "SELECT count(*) FROM wells") == 1


@pytest.mark.one_database
def test_only_the_tables_that_a_question_needs_are_read(workspace: Workspace) -> None:
    small_screen(workspace)
    with open_questions(workspace) as questions:
        questions.ask("SELECT count(*) FROM plates -- not predictions").table()
        questions.ask("SELECT 'cells' AS features FROM images").table()
        questions.ask(
            "WITH predictions AS (SELECT 1 AS x) SELECT * FROM predictions, plates"
        ).table()
        assert snapshot_files(workspace) == []
        questions.ask("SELECT * FROM votes").table()
    assert {path.name.split("-")[0] for path in snapshot_files(workspace)} == {
        "image_label_counts",
        "predictions_with_image",
        "ranked_votes",
    }


def test_a_column_that_is_named_like_a_table_is_none(sqlite_workspace: Workspace) -> None:
    small_screen(sqlite_workspace)
    query = "SELECT n_cells AS cells, $run AS features FROM votes WHERE run_id = $run"
    with open_questions(sqlite_workspace) as questions:
        assert questions.ask(query, {"run": -1}).table().num_rows == 0
        assert (
            questions.ask("WITH x AS (FROM plates) FROM x WHERE id = ?", [1]).table().num_rows == 1
        )
    assert not [path for path in snapshot_files(sqlite_workspace) if path.name.startswith("cells")]


def test_snapshots_are_made_once_and_only_for_finished_runs(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    going_on = make.run(Stage.PREDICT, status=Status.RUNNING, parent_id=screen.train_run.id)
    cells = make.cells_of(screen.segmentations["B04"])
    make.predict(going_on, cells, [[(screen.labels["DMSO"], 1.0)]])
    count = "SELECT count(*) FROM predictions WHERE rank = 1"
    with open_questions(workspace) as questions:
        assert one(questions, count) == 9
    (made,) = snapshot_files(workspace)
    before = made.stat().st_mtime_ns
    assert pq.read_table(made)["run_id"].unique().to_pylist() == [screen.predict_run.id]
    with open_questions(workspace) as questions:
        assert one(questions, count) == 9
    assert made.stat().st_mtime_ns == before


def test_rows_of_failed_and_cancelled_runs_are_copied(workspace: Workspace) -> None:
    make = Factory(workspace)
    image = make.image(make.well(make.plate(), 1, 1))
    label = make.label("DMSO")
    for status in (Status.FAILED, Status.CANCELLED, Status.RUNNING):
        cells = make.cells_of(make.segmentation(image, make.run(Stage.SEGMENT, status=status), 2))
        make.features(cells, make.run(Stage.MEASURE, status=status))
        make.predict(make.run(Stage.PREDICT, status=status), cells, [[(label, 1.0)]] * 2)
    names = ("cells", "features", "predictions_with_image")
    with open_questions(workspace) as questions:
        assert [one(questions, f"SELECT count(*) FROM {name}") for name in names] == [6] * 3
    made = [path.name.split("-")[0] for path in snapshot_files(workspace)]
    assert made == sorted(names * 2)


def test_copies_that_nobody_uses_make_room(
    sqlite_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_screen(sqlite_workspace)
    copies = sqlite_workspace.settings.cache / "snapshots"
    copies.mkdir(parents=True)
    month = 30 * 24 * 3600

    def left_after(**used: int) -> set[str]:
        """The made up copies that are left, by how many seconds ago each was used."""
        for path in copies.iterdir():
            path.unlink()
        for name, seconds in used.items():
            (copies / f"{name}.parquet").write_bytes(b"x" * 1000)
            os.utime(copies / f"{name}.parquet", (time.time() - seconds,) * 2)
        with open_questions(sqlite_workspace) as questions:
            assert questions.ask("SELECT count(*) FROM cells").records()
        return {path.stem for path in copies.iterdir()} & {*used}

    assert left_after(new=0, day=month // 30, old=month + 1) == {"new", "day"}
    monkeypatch.setattr("cellstore.query.engine.KEPT_BYTES", 5000)
    assert left_after(new=0, day=month // 30, days=month // 10) == {"new", "day", "days"}
    monkeypatch.setattr("cellstore.query.engine.KEPT_BYTES", 1)
    assert left_after(new=0, day=month // 30, days=month // 10) == {"new"}


def change_outside(workspace: Workspace, sql: str) -> None:
    """Change rows as another program would, also those that are append-only."""
    table = "predictions"
    if workspace.database.is_sqlite:
        with closing(sqlite3.connect(workspace.database.engine.url.database or "")) as connection:
            keeps = f"type = 'trigger' AND name LIKE '{table}_keep%'"
            query = f"SELECT name, sql FROM sqlite_master WHERE {keeps}"
            triggers = connection.execute(query).fetchall()
            for name, _ in triggers:
                connection.execute(f"DROP TRIGGER {name}")
            connection.execute(sql)
            for _, trigger in triggers:
                connection.execute(trigger)
            connection.commit()
        return
    with workspace.database.engine.execution_options(writes=True).begin() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {table} DISABLE TRIGGER {table}_keep")
        connection.exec_driver_sql(sql)
        connection.exec_driver_sql(f"ALTER TABLE {table} ENABLE TRIGGER {table}_keep")


def test_an_answer_does_not_depend_on_the_cache(workspace: Workspace) -> None:
    screen = small_screen(workspace)
    make = screen.factory
    qc = make.run(Stage.QC)
    cells = make.cells_of(screen.segmentations["B01"])
    for image in screen.images.values():
        make.quality(image, qc)
    for cell in cells:
        make.flag_cell(qc, cell)
    other, another = (make.image(make.well(screen.plate, 4, column)) for column in (4, 5))
    bare = make.cells_of(make.segmentation(other, screen.segment_run, 2))
    make.features(bare[:1], screen.measure_run)
    first, image = cells[0].id, screen.images["B01"]
    moved = screen.segmentations["B04"].id
    annotation = "INSERT INTO annotations (level, row_id, kind, reason, user_name, created_at)"
    debris = f"('well', {image.well_id}, 'exclusion', 'debris', 'eve', '2026-01-01')"
    changes = [
        ("cells", f"UPDATE cells SET excluded = 'debris' WHERE id = {first}"),
        (RANKED, f"UPDATE cells SET excluded = 'debris' WHERE id = {cells[1].id}"),
        ("features", f"UPDATE cells SET centroid_col = 99.5 WHERE id = {bare[0].id}"),
        ("cells", f"DELETE FROM cells WHERE id = {bare[1].id}"),
        ("features", f"UPDATE features SET area = 7 WHERE cell_id = {first}"),
        ("features", f"DELETE FROM features WHERE cell_id = {bare[0].id}"),
        ("image_quality", f"UPDATE image_quality SET mean = 5 WHERE image_id = {image.id}"),
        ("image_quality", f"DELETE FROM image_quality WHERE image_id = {image.id}"),
        ("cell_flags", f"DELETE FROM cell_flags WHERE cell_id = {first}"),
        (RANKED, f"UPDATE predictions SET probability = 0.99 WHERE cell_id = {cells[2].id}"),
        (COUNTS, f"DELETE FROM predictions WHERE cell_id = {cells[2].id} AND rank = 2"),
        (PREDICTIONS, f"UPDATE segmentations SET image_id = {another.id} WHERE id = {moved}"),
        (RANKED, f"{annotation} VALUES {debris}"),
    ]
    before = {name: sorted_rows(workspace, name) for name in dict(changes)}
    for name, change in changes:
        change_outside(workspace, change)
        found = sorted_rows(workspace, name)
        assert found != before[name], change
        copies = workspace.settings.cache / "snapshots"
        hidden = copies.rename(copies.with_name("hidden"))
        assert sorted_rows(workspace, name) == found, change
        shutil.rmtree(copies)
        hidden.rename(copies)
        before[name] = found


def sorted_rows(workspace: Workspace, name: str) -> list[tuple[Any, ...]]:
    with open_questions(workspace, only_image_votes=True) as questions:
        return sorted(questions.ask_ours(f"SELECT * FROM {name}").rows(), key=repr)


def harmed(good: bytes, harm: str) -> bytes:
    if harm == "garbage":
        return bytes(range(256)) * 8
    if harm in ("cut", "empty"):
        return good[:-20] if harm == "cut" else b""
    # One bit, where the values are: most of them would be read as others, or not at all.
    bad = bytearray(good)
    bad[len(bad) // 3] ^= 4
    return bytes(bad)


def test_lost_or_damaged_snapshots_change_nothing(sqlite_workspace: Workspace) -> None:
    small_screen(sqlite_workspace)
    query = "SELECT * FROM votes ORDER BY ALL"
    with open_questions(sqlite_workspace) as questions:
        before = questions.ask(query).table()
    made = len(snapshot_files(sqlite_workspace))
    for harm in ("delete", "cut", "empty", "garbage", "one bit", "half-written"):
        for path in snapshot_files(sqlite_workspace):
            if harm == "delete":
                path.unlink()
            elif harm == "half-written":
                path.rename(path.with_name(".part-x"))
            else:
                path.write_bytes(harmed(path.read_bytes(), harm))
        with open_questions(sqlite_workspace) as questions:
            assert questions.ask(query).table().equals(before), harm
        copies = [path for path in snapshot_files(sqlite_workspace) if path.suffix == ".parquet"]
        assert len(copies) == made, harm
        assert all(pq.read_table(path).num_rows for path in copies), harm


def test_snapshots_of_another_store_in_the_same_folder_are_not_read(tmp_path: Path) -> None:
    root = tmp_path / "a [b]* 'c' ? %20 #x"
    workspace, _ = create_workspace(root)
    small_screen(workspace)
    with open_questions(workspace) as questions:
        assert one(questions, "SELECT count(*) FROM predictions WHERE rank = 1") == 8
    workspace.database.close()
    for path in root.glob("cellstore.db*"):
        path.unlink()
    again, _ = create_workspace(root)
    make = Factory(again)
    make.plate()  # the runs of the new store begin at another minute
    for _ in range(4):
        run = make.run(Stage.PREDICT)
    assert run.id == 4
    with open_questions(again) as questions:
        assert one(questions, "SELECT count(*) FROM predictions") == 0
    again.database.close()


def test_parameters_are_bound(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    with open_questions(workspace) as questions:
        assert one(questions, "SELECT count(*) FROM wells WHERE name = ?", ["A01"]) == 1
        assert one(questions, "SELECT count(*) FROM wells WHERE name = ?", ["' OR 1=1 --"]) == 0
        votes = questions.ask(
            "SELECT * FROM votes WHERE run_id = $run AND level = 'image'",
            {"run": screen.predict_run.id},
        ).table()
    assert votes.num_rows == 3 * 4


def test_words_of_writing_in_texts_and_names_are_no_writing(sqlite_workspace: Workspace) -> None:
    asked: dict[str, dict[str, object]] = {
        """SELECT 'drop' AS "insert", (SELECT 1 AS "update") AS x /* (delete */ -- (copy""": {
            "insert": "drop",
            "x": 1,
        },
        "SELECT count(*) FROM plates": {"count_star()": 0},
        'SELECT count(*) "update" FROM plates': {"update": 0},
        "SELECT count(*) AS delete FROM plates": {"delete": 0},
        "WITH y AS (SELECT 2 AS copy) SELECT copy FROM y": {"copy": 2},
        "SELECT E'it\\'s (drop' AS x": {"x": "it's (drop"},
    }
    with open_questions(sqlite_workspace) as questions:
        for sql, wanted in asked.items():
            assert questions.ask(sql).records() == [wanted]


def test_what_others_leave_in_the_cache_cannot_be_read(sqlite_workspace: Workspace) -> None:
    spill = sqlite_workspace.settings.cache.resolve() / "spill"
    spill.mkdir(parents=True)
    (spill / "f.txt").write_text("secret")
    with open_questions(sqlite_workspace), open_questions(sqlite_workspace) as other:
        own = next(spill.glob("*-*"))
        (own / "f.txt").write_text("spilled")
        assert own.stat().st_mode & 0o777 == 0o700
        for path in (spill / "f.txt", own / "f.txt", own / ".." / "f.txt"):
            with pytest.raises(QueryError, match="no files"):
                other.ask("SELECT * FROM read_text(?)", [str(path)]).table()
            with pytest.raises(QueryError, match="no files"):
                other.ask(f"SELECT * FROM read_text('{path}')").table()
    assert [path.name for path in spill.iterdir()] == ["f.txt"]


def test_what_does_not_fit_into_memory_is_spilled(sqlite_workspace: Workspace) -> None:
    query = "SELECT max(j) FROM (SELECT i AS j FROM range(6000000) t(i) ORDER BY hash(i))"
    with open_questions(sqlite_workspace, Limits(memory_mb=64)) as questions:
        assert one(questions, query) == 5_999_999


def test_variables_of_the_program_are_out_of_reach(sqlite_workspace: Workspace) -> None:
    secret = pa.table({"password": ["hunter2"]})
    assert secret.num_rows == 1
    with open_questions(sqlite_workspace) as questions, pytest.raises(QueryError):
        questions.ask("SELECT * FROM secret").table()


def test_a_mistake_is_one_sentence_with_a_hint(sqlite_workspace: Workspace) -> None:
    hints = {
        "SELECT barcod FROM plates": '"barcode"',
        "SELECT * FROM plate": '"plates"',
        "SELEC 1": "SELEC",
        "": "There is no question",
        "SELECT * FROM plates WHERE id = ?": "parameters",
        "SELECT 1; SELECT 2": "one at a time",
    }
    with open_questions(sqlite_workspace) as questions:
        for sql, hint in hints.items():
            with pytest.raises(QueryError) as caught:
                questions.ask(sql).table()
            assert hint in str(caught.value)
            assert "\n" not in str(caught.value)


def test_a_question_that_runs_forever_is_stopped(sqlite_workspace: Workspace) -> None:
    forever = "SELECT count(*) FROM range(100000000000) AS a(i), range(1000) WHERE i % 7919 = 5"
    with open_questions(sqlite_workspace, Limits(seconds=0.3)) as questions:
        with pytest.raises(QueryError, match=r"longer than 0\.3 seconds"):
            questions.ask(forever).table()
        assert one(questions, "SELECT 1") == 1


def test_an_answer_that_never_ends_is_stopped(sqlite_workspace: Workspace) -> None:
    # Here it is Arrow that waits for DuckDB, and its error that tells.
    endless = "SELECT i FROM range(100000000000) AS t(i) WHERE i % 1000 = 0"
    with open_questions(sqlite_workspace, Limits(seconds=0.3)) as questions:
        with pytest.raises(QueryError, match=r"longer than 0\.3 seconds"):
            questions.ask(endless).table()
        assert one(questions, "SELECT 1") == 1


def test_a_mistake_found_after_the_first_rows_is_one_sentence(sqlite_workspace: Workspace) -> None:
    query = "SELECT CASE WHEN i = 2000000 THEN error('odd row') ELSE 1 END FROM range(3000000) t(i)"
    with (
        open_questions(sqlite_workspace) as questions,
        pytest.raises(QueryError, match="cannot be answered: odd row"),
    ):
        questions.ask(query).table()


def test_an_answer_too_large_is_refused(sqlite_workspace: Workspace) -> None:
    with (
        open_questions(sqlite_workspace, Limits(answer_mb=1)) as questions,
        pytest.raises(QueryError, match="larger than 1 MB"),
    ):
        questions.ask("SELECT i, i AS j FROM range(100000000) AS t(i)").table()


def test_show_and_describe_know_every_table_and_view(sqlite_workspace: Workspace) -> None:
    with open_questions(sqlite_workspace) as questions:
        shown = set(questions.ask("SHOW TABLES").table()["name"].to_pylist())
        types = dict(questions.columns("votes"))
        with pytest.raises(UnknownNameError, match="votes"):
            questions.columns("vote")
        listed = questions.ask("SELECT table_name FROM information_schema.tables").table()
        with pytest.raises(QueryError, match="Ask two questions"):
            questions.ask("SELECT * FROM information_schema.tables, plates")
    assert shown == {*METADATA.tables, "exclusions", *VIEWS}
    assert set(listed["table_name"].to_pylist()) == shown
    assert types["tie"] == "BOOLEAN"
    assert types["votes"] == "DOUBLE"


def test_every_view_is_described() -> None:
    for name in VIEWS:
        description = view_words(name)
        assert len(description) > 60, name
        assert description.rstrip().endswith("."), name


def test_a_question_waits_for_another_process_that_has_the_database_for_itself(
    sqlite_workspace: Workspace,
) -> None:
    database = sqlite_workspace.database
    code = (
        "import sqlite3, sys, time; own = sqlite3.connect(sys.argv[1]); "
        "own.execute('PRAGMA locking_mode = EXCLUSIVE'); own.execute('BEGIN IMMEDIATE'); "
        "print('mine', flush=True); time.sleep(0.5); own.rollback()"
    )
    database.engine.dispose()  # nobody else may have it open
    words = [sys.executable, "-c", code, str(database.engine.url.database)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with closing(source.Source(database)) as opened:
            assert "plates" in opened.columns


def test_a_database_that_is_gone_is_one_sentence(sqlite_workspace: Workspace) -> None:
    sqlite_workspace.database.close()
    sqlite_workspace.settings.sqlite.unlink()
    with pytest.raises(DatabaseError), open_questions(sqlite_workspace):
        pass


@pytest.mark.postgres
def test_the_password_is_not_shown(postgres_workspace: Workspace) -> None:
    from sqlalchemy import create_engine

    from cellstore.db.session import Database

    url = postgres_workspace.database.engine.url.set(password="hunter2", port=1)
    engine: Engine = create_engine(url)
    wrong = Workspace(postgres_workspace.settings, Database(engine), postgres_workspace.artifacts)
    with pytest.raises(DatabaseError) as caught, open_questions(wrong):
        pass
    assert "hunter2" not in str(caught.value)


def test_a_pivot_takes_its_columns_from_the_values(read_screen: SmallScreen) -> None:
    workspace = read_screen.workspace
    pivot = "PIVOT (FROM votes WHERE level = 'image') ON vote USING count(*) GROUP BY plate"
    texts = (pivot, f"FROM ({pivot}) -- of all, ä", f"WITH p AS ({pivot} ORDER BY plate) FROM p")
    with open_questions(workspace) as questions:
        for text_ in texts:
            wanted = [{"plate": "BR1", "hard": 4, "median": 4, "soft": 4}]
            assert questions.ask(text_).table().to_pylist() == wanted
        commented = questions.ask("PIVOT_WIDER plates ON barcode -- of each")
        assert "BR1" in commented.names
        with pytest.raises(QueryError, match="In PIVOT, say the values"):
            questions.ask("PIVOT wells ON name || '!' USING count(*)")
        both = "PIVOT wells ON well_row, well_column USING count(*) GROUP BY plate_id"
        assert questions.ask(both).names[:3] == ["plate_id", "1_1", "1_2"]
        assert questions.ask(f"EXPLAIN {both}").names == ["explain_key", "explain_value"]


def test_the_small_screen_has_the_votes_it_says(read_screen: SmallScreen) -> None:
    screen, workspace = read_screen, read_screen.workspace
    with open_questions(workspace) as questions:
        found = one(questions, "SELECT count(*) FROM predictions")
    assert found == sum(len(cell) for _, _, cells in VOTES.values() for cell in cells)
    assert screen.predict_run.parent_id == screen.train_run.id
