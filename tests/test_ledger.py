"""The ledger: every run is written down first, and closed whatever happens."""

from __future__ import annotations

import pytest
from factories import Factory
from sqlalchemy import func, select, update

from cellstore.db import events
from cellstore.enums import ArtifactKind, Stage, Status
from cellstore.errors import UnknownNameError, UserInputError
from cellstore.jobs.lookup import find_recipe, find_run
from cellstore.jobs.queue import close_dead_runs, new_owner
from cellstore.jobs.runs import RecipeSpec, RunHandle, keep_files, register, running
from cellstore.jobs.workspace import Workspace
from cellstore.models import Artifact, Job, Recipe, Run, RunArtifact

pytestmark = pytest.mark.one_database

ELSEWHERE = "other-host|77|0123456789ab|5|alone-01234567"


def recipe_of(workspace: Workspace) -> Recipe:
    with workspace.database.begin() as session:
        return register(session, RecipeSpec(Stage.SEGMENT, 1, {}))


def run_of(workspace: Workspace) -> Run:
    with workspace.database.read() as session:
        return session.scalars(select(Run)).one()


@pytest.mark.each_database
def test_a_run_is_there_while_it_runs_and_done_afterwards(workspace: Workspace):
    with running(workspace.database, recipe_of(workspace), seed=7, query="SELECT 1") as run:
        under_way = run_of(workspace)
        run.result["cells"] = 3
    assert (under_way.status, under_way.ended_at) == (Status.RUNNING, None)
    after = run_of(workspace)
    assert (after.status, after.result, after.error) == (Status.DONE, {"cells": 3}, None)
    assert (after.seed, after.query) == (7, "SELECT 1")
    assert after.ended_at >= after.started_at
    assert after.host
    assert after.user_name
    assert after.environment["python"]
    assert after.code_version.startswith("0.")


def _work(run: RunHandle, error: BaseException) -> None:
    run.result["cells"] = 1
    raise error


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("bad luck"), Status.FAILED, "bad luck"),
        (KeyboardInterrupt(), Status.CANCELLED, "Stopped by Ctrl-C."),
    ],
)
def test_a_run_that_fails_is_closed_with_the_reason(workspace: Workspace, error, status, reason):
    with (
        pytest.raises(type(error)),
        running(workspace.database, recipe_of(workspace)) as run,
    ):
        _work(run, error)
    after = run_of(workspace)
    assert (after.status, after.error) == (status, reason)
    assert after.result == {"cells": 1}
    assert after.ended_at is not None


@pytest.mark.each_database
def test_who_leaves_a_run_that_others_share_does_not_end_it(workspace: Workspace):
    make = Factory(workspace)
    image = make.image(make.well(make.plate("P1"), 1, 1))
    jobs = []

    def leave() -> None:
        jobs.append(make.job(run_of(workspace), image, Status.RUNNING, worker=ELSEWHERE))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), running(workspace.database, recipe_of(workspace)) as run:
        leave()
    after = run_of(workspace)
    assert (after.id, after.status, after.process) == (run.id, Status.RUNNING, ELSEWHERE)
    with workspace.database.begin() as session:  # nor does one that was killed
        host, pid, machine, _, mark = new_owner().split("|")
        dead = "|".join((host, pid, machine, "0", mark))
        session.execute(update(Run).values(process=dead))
        close_dead_runs(session)
    assert run_of(workspace).status is Status.RUNNING
    with workspace.database.begin() as session:
        session.execute(update(Job).where(Job.id == jobs[0].id).values(status=Status.DONE))
    again = running(workspace.database, recipe_of(workspace), resume=run.id)
    with pytest.raises(KeyboardInterrupt), again:
        raise KeyboardInterrupt
    assert run_of(workspace).status is Status.CANCELLED


def test_a_run_can_be_gone_on_with(workspace: Workspace):
    recipe = recipe_of(workspace)
    with pytest.raises(ValueError), running(workspace.database, recipe) as first:  # noqa: PT011
        raise ValueError
    with running(workspace.database, recipe, resume=first.id) as second:
        pass
    assert second.id == first.id
    assert (run_of(workspace).status, run_of(workspace).error) == (Status.DONE, None)


@pytest.mark.parametrize(
    "word",
    ["postgresql://me:s3cret@host/name", "--database=postgresql://me:s3cret@host/name"],
)
def test_passwords_are_masked_in_the_command(monkeypatch, word: str):
    monkeypatch.setattr(events.sys, "argv", ["/somewhere/bin/cellstore", "init", word])
    _, line = events.caller()
    assert "s3cret" not in line
    assert line.startswith("cellstore init")
    assert "me:***@host" in line


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:it's s3cret@host/name",
        'postgresql://me:a"s3cret"/b@host/name',
        "postgresql://me:s3@cret:s3cret@host/name",
        "postgresql://me:x\ns3cret@host/name",
        "postgresql://me@/name?host=/run&password=s3cret&port=1",
        "postgresql://me@/name?sslpassword=it's a s3cret&host=/run",
        "postgresql://me:s3cret@/name?PASSFILE=s3cret",
        "postgresql://me@/name?host=/run&options=-c%20token%3Ds3cret",
        "postgresql://me@/name?service=s3cret&host=/run",
    ],
)
@pytest.mark.parametrize("option", [(), ("--database",), ("--database=",)])
def test_no_way_to_type_a_password_reaches_the_ledger(monkeypatch, url: str, option):
    words = [f"{option[0]}{url}"] if option and option[0].endswith("=") else [*option, url]
    monkeypatch.setattr(events.sys, "argv", ["cellstore", "init", *words, "last"])
    _, line = events.caller()
    assert "s3" not in line
    assert "postgresql://me" in line
    assert "***" in line
    assert line.endswith(" last")


@pytest.mark.parametrize(
    "word",
    [
        "SELECT 'http://host:80/x', 'a@b', 1 FROM cells",
        "postgresql://me@host:5432/name?host=/run",
        "/data/plate:1/x@2.csv",
    ],
)
def test_words_without_a_password_are_kept_as_typed(word: str):
    assert events.without_passwords(word) == word


def test_a_url_inside_a_question_is_masked_and_the_rest_kept():
    masked = events.without_passwords("SELECT 'postgresql://me:s3cret@host/x' AS a, 'b@c' AS d")
    assert masked == "SELECT 'postgresql://me:***@host/x' AS a, 'b@c' AS d"


@pytest.mark.each_database
def test_a_file_is_kept_once_and_linked_to_its_runs(workspace: Workspace):
    stored = workspace.artifacts.write(ArtifactKind.CHECKPOINT, b"weights", ".bin")
    recipe = recipe_of(workspace)
    for _ in range(2):
        with running(workspace.database, recipe) as run, workspace.database.begin() as session:
            keep_files(session, [stored], run.id)
    with workspace.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Artifact)) == 1
        assert session.scalar(select(func.count()).select_from(RunArtifact)) == 2


def test_runs_are_found_by_number_and_as_the_latest_that_is_done(workspace: Workspace):
    make = Factory(workspace)
    first = make.run(Stage.TRAIN)
    failed = make.run(Stage.TRAIN, status=Status.FAILED)
    make.run(Stage.PREDICT)
    with workspace.database.read() as session:
        assert find_run(session, "latest", Stage.TRAIN).id == first.id
        assert find_run(session, str(failed.id), Stage.TRAIN).id == failed.id
        with pytest.raises(UnknownNameError, match="Unknown train run '99'"):
            find_run(session, "99", Stage.TRAIN)
        with pytest.raises(UserInputError, match="by its number"):
            find_run(session, "'; DROP TABLE runs; --", Stage.TRAIN)


def test_recipes_are_found_by_number_and_fingerprint(workspace: Workspace):
    make = Factory(workspace)
    first = make.recipe(Stage.SEGMENT)
    with workspace.database.read() as session:
        assert find_recipe(session, Stage.SEGMENT, str(first.id)).id == first.id
        assert find_recipe(session, Stage.SEGMENT, first.fingerprint[:10]).id == first.id
        with pytest.raises(UnknownNameError, match="Unknown measure recipe '1'"):
            find_recipe(session, Stage.MEASURE, "1")
