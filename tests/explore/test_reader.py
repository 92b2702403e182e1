"""Questions of many requests at once: what they share, when they are opened anew, what holds."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from screens import SmallScreen, small_screen
from sqlalchemy import update

from cellstore.enums import Level, Stage, Status
from cellstore.errors import QueryError
from cellstore.explore.requests import Reader
from cellstore.jobs.workspace import Workspace
from cellstore.models import Plate
from cellstore.query.source import Source

SLOW = (
    "SELECT count(*) FROM range(1_000_000) AS a, range(1_000_000) AS b WHERE a.range * b.range < -1"
)
CELLS = "SELECT count(*) AS n FROM cell_table WHERE excluded IS NULL"


@pytest.fixture
def small(workspace: Workspace) -> SmallScreen:
    return small_screen(workspace)


@pytest.fixture
def reader(small: SmallScreen) -> Iterator[Reader]:
    made = Reader(small.factory.workspace)
    yield made
    made.close()


def ask(reader: Reader, sql: str) -> Any:
    with reader.questions() as questions:
        return questions.ask_ours(sql).records()


def test_what_one_request_has_loaded_the_next_one_finds(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[str] = []
    feed = Source.feed

    def counted(self: Source, target: Any, statement: str, *rest: Any) -> int:
        of_cells = any(" cells " in origin for origin in rest[-1])
        fed.append("cells" if of_cells and statement.startswith("COPY") else "table")
        return feed(self, target, statement, *rest)

    monkeypatch.setattr(Source, "feed", counted)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: ask(reader, CELLS), range(4)))
    assert answers == [[{"n": answers[0][0]["n"]}]] * 4
    assert fed.count("cells") == 1
    before = len(fed)
    assert ask(reader, CELLS) == answers[0]
    assert len(fed) == before


def test_a_slow_question_holds_no_other_up_and_can_be_stopped(reader: Reader) -> None:
    ask(reader, CELLS)
    with reader.questions() as slow, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: slow.ask_ours(SLOW).records())
        time.sleep(0.1)
        assert not waiting.done()
        assert ask(reader, CELLS)
        with reader.questions() as user:
            assert user.ask("SELECT count(*) FROM plates").records()
        assert not waiting.done()
        while not waiting.done():
            slow.interrupt()
            time.sleep(0.05)
        with pytest.raises(QueryError):
            waiting.result()
        assert slow.ask_ours("SELECT 1 AS one FROM plates LIMIT 1").records() == [{"one": 1}]


def test_a_change_is_seen_by_the_next_request_and_not_by_one_that_is_on(
    reader: Reader, small: SmallScreen
) -> None:
    (before,) = ask(reader, CELLS)
    mark = reader.mark()
    assert reader.mark() == mark
    with reader.questions() as questions:
        small.factory.exclude(Level.CELL, 1, "blurred")
        assert reader.mark() != mark
        assert ask(reader, CELLS) == [{"n": before["n"] - 1}]
        assert questions.ask_ours(CELLS).records() == [before]
    reader.close_unused()
    assert ask(reader, CELLS) == [{"n": before["n"] - 1}]


def test_while_a_run_goes_on_pages_may_be_some_seconds_old(
    reader: Reader, small: SmallScreen, monkeypatch: pytest.MonkeyPatch
) -> None:
    small.factory.run(Stage.SEGMENT, status=Status.RUNNING)
    first = ask(reader, "SELECT DISTINCT batch FROM plates")
    mark = reader.mark()
    with small.factory.workspace.database.begin() as session:
        session.execute(update(Plate).values(batch="later"))
    assert (reader.mark(), ask(reader, "SELECT DISTINCT batch FROM plates")) == (mark, first)
    monkeypatch.setattr("cellstore.explore.requests.LIVE_SECONDS", 0.0)
    monkeypatch.setattr("cellstore.explore.requests.LIVE_TIMES", 0.0)
    time.sleep(0.01)
    assert reader.mark() != mark
    assert ask(reader, "SELECT DISTINCT batch FROM plates") == [{"batch": "later"}]


def test_every_thread_is_kept_from_files_and_settings(reader: Reader) -> None:
    secret = [1]  # a variable that DuckDB could read by its name
    for _ in range(2):
        with reader.questions() as questions:
            for sql in (
                "FROM read_csv('/etc/passwd')",
                "FROM '/etc/passwd'",
                "FROM secret",
                "SELECT " + "(" * 300 + "1" + ")" * 300,
            ):
                with pytest.raises(QueryError):
                    questions.ask(sql).records()
            for name, value in (
                ("python_enable_replacements", False),
                ("enable_external_access", False),
                ("lock_configuration", True),
                ("TimeZone", "UTC"),
            ):
                (found,) = questions.ask_ours(f"SELECT current_setting('{name}') AS x").records()
                assert found["x"] == value, name
    assert secret


def test_a_cache_that_is_deleted_costs_one_answer(
    reader: Reader, small: SmallScreen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cellstore.query.engine.FEW", -1)  # as if there were many rows
    want = ask(reader, "SELECT count(*) AS n FROM predictions")
    shutil.rmtree(small.factory.workspace.settings.cache / "snapshots")
    with pytest.raises(QueryError):
        ask(reader, "SELECT count(*) AS n FROM predictions")
    assert ask(reader, "SELECT count(*) AS n FROM predictions") == want


def test_warming_up_loads_all_that_pages_read(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader.warm(threading.Event())
    mark = reader.mark()
    fed: list[str] = []
    monkeypatch.setattr(Source, "feed", lambda *_: fed.append("table"))
    for name in ("cell_table", "prediction_table", "votes", "well_table", "scored_predictions"):
        ask(reader, f"SELECT count(*) FROM {name}")
    assert (fed, reader.mark()) == ([], mark)
