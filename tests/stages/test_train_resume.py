"""A training that was stopped: resumed, it ends as if there had been no break."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import killed_training
import pytest
from killed_training import PARAMS
from small_training import Opener, StopsAfter, build, checkpoint, run_of
from sqlalchemy import select, update

from cellstore.config import SplitParams
from cellstore.enums import ArtifactKind, Stage, Status
from cellstore.errors import RunCancelledError, StoreError, UserInputError
from cellstore.jobs.runs import files_of
from cellstore.jobs.workspace import Workspace
from cellstore.learn import normalising
from cellstore.models import Cell, Run, RunMetric
from cellstore.stages import train as train_module
from cellstore.stages import verify as verifying
from cellstore.stages.manage_jobs import cancel
from cellstore.stages.split import create_split
from cellstore.stages.train import TrainResult, train
from cellstore.stages.verify import Problem, verify

ELSEWHERE = "other-host|77|0123456789ab|5|alone-01234567"


def numbers(workspace: Workspace, run_id: int) -> dict[tuple[int, str], float | None]:
    """The metrics of a run, but for those that a clock says."""
    query = select(RunMetric).where(
        RunMetric.run_id == run_id, RunMetric.name.not_in(("seconds", "waited"))
    )
    with workspace.database.read() as session:
        return {(row.epoch, row.name): row.value for row in session.scalars(query)}


def trainings(workspace: Workspace) -> list[Run]:
    with workspace.database.read() as session:
        query = select(Run).where(Run.stage == Stage.TRAIN).order_by(Run.id)
        return list(session.scalars(query))


def broken_off(workspace: Workspace, epochs: int = 2) -> int:
    """Train for some epochs, and be stopped; return the run."""
    listener = StopsAfter(epochs)
    with pytest.raises(KeyboardInterrupt):
        train(replace(workspace, progress=listener), PARAMS, device="cpu")
    run = trainings(workspace)[-1]
    assert run.status is Status.CANCELLED
    assert listener.told[-1] == "The same command goes on after the last whole epoch."
    return run.id


@pytest.mark.heavy
def test_a_killed_training_ends_as_one_that_was_not(
    built: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one beside it on the same store does not notice."""
    workspace, undisturbed = opened(built), opened(built)
    expected = train(undisturbed, PARAMS, device="cpu")
    other = train(undisturbed, replace(PARAMS, seed=1), device="cpu")

    words = [sys.executable, killed_training.__file__, str(workspace.settings.root), "2"]
    with subprocess.Popen(words) as process:
        beside = train(workspace, replace(PARAMS, seed=1), device="cpu")
        assert process.wait(timeout=120) == -9
    assert beside.checkpoint_sha256 == other.checkpoint_sha256
    killed = next(run for run in trainings(workspace) if run.status is Status.RUNNING)
    assert set(numbers(workspace, killed.id)) == {
        key for key in numbers(undisturbed, expected.run_id) if key[0] <= 2
    }

    def fail(*_: object) -> None:
        raise OSError("the power is out")

    with monkeypatch.context() as patched:
        patched.setattr(
            train_module, "keep_files", fail
        )  # after the file of epoch 3, before its rows
        with pytest.raises(OSError, match="power"):
            train(workspace, PARAMS, device="cpu")
    assert run_of(workspace, killed.id).status is Status.FAILED
    assert len(verify(workspace, minutes=0).orphans) == 1
    assert verify(workspace, minutes=0, fix=True).removed == 1

    result = train(workspace, PARAMS, device="cpu")
    assert (result.run_id, result.resumed_after, result.epochs) == (killed.id, 2, 5)
    assert result.checkpoint_sha256 == expected.checkpoint_sha256
    assert numbers(workspace, killed.id) == numbers(undisturbed, expected.run_id)
    assert len(run_of(workspace, killed.id).environment["resumed"]) == 2
    checkpoint(workspace, killed.id)  # its only files: the state is gone
    after = verify(workspace, minutes=0)
    assert (after.problems, after.orphans) == ((), ())


@pytest.mark.one_database
def test_the_same_command_goes_on_and_force_begins_anew(workspace: Workspace, tmp_path: Path):
    build(workspace, tmp_path)
    create_split(workspace, "by-well", SplitParams(test_size=0.3, validation_size=0.3))
    run_id = broken_off(workspace)
    anew = train(workspace, PARAMS, device="cpu", force=True)
    assert anew.run_id > run_id
    assert anew.resumed_after == 0
    done = train(workspace, PARAMS, device="cpu")
    assert (done.run_id, done.already_done) == (anew.run_id, True)

    other = replace(PARAMS, seed=5)
    listener = StopsAfter(1)
    with pytest.raises(KeyboardInterrupt):
        train(replace(workspace, progress=listener), other, device="cpu")
    begun = trainings(workspace)[-1].id
    goes_on = train(workspace, other, device="cpu")
    assert (goes_on.run_id, goes_on.resumed_after, goes_on.already_done) == (begun, 1, False)


def test_what_another_machine_trains_is_left_alone(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    run_id = broken_off(workspace)
    with workspace.database.begin() as session:
        values = {"status": Status.RUNNING, "process": ELSEWHERE}
        session.execute(update(Run).where(Run.id == run_id).values(**values))
    sentence = f"Run {run_id} is training.*other-host:77.*cellstore cancel {run_id}.*--force"
    with pytest.raises(UserInputError, match=sentence):
        train(workspace, PARAMS, device="cpu")
    assert cancel(workspace, str(run_id)) == (run_id,)
    with workspace.database.begin() as session:  # of other cells it is another training
        cell = session.scalars(select(Cell).where(Cell.excluded.is_(None)).limit(1)).one()
        cell.excluded = "looked odd"
    assert train(workspace, PARAMS, device="cpu").resumed_after == 0


def test_a_run_that_another_process_took_further_is_not_spoilt(
    built: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were told to go on with it; the other was faster."""
    workspace = opened(built)
    run_id = broken_off(workspace)
    make_training = train_module.make_training

    def meanwhile(act: Any) -> Any:
        def then(*given: Any) -> Any:
            with monkeypatch.context() as patched:
                patched.setattr(train_module, "make_training", make_training)
                act()
            return make_training(*given)

        return then

    def one_more_epoch() -> None:
        with pytest.raises(KeyboardInterrupt):
            train(replace(workspace, progress=StopsAfter(1)), PARAMS, device="cpu")

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "make_training", meanwhile(one_more_epoch))
        with pytest.raises(StoreError, match="in the meantime"):
            train(workspace, PARAMS, device="cpu")
    done: list[TrainResult] = []
    finish = meanwhile(lambda: done.append(train(workspace, PARAMS, device="cpu")))
    with monkeypatch.context() as patched:
        patched.setattr(train_module, "make_training", finish)
        with pytest.raises(UserInputError, match="finished by another process"):
            train(workspace, PARAMS, device="cpu")
    assert run_of(workspace, run_id).status is Status.DONE
    checkpoint(workspace, run_id)
    assert (done[0].resumed_after, done[0].epochs) == (3, PARAMS.epochs)


def test_a_training_that_goes_on_keeps_what_was_fitted(
    built: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = opened(built)
    broken_off(workspace)
    monkeypatch.setattr(normalising, "fit_inputs", lambda *_: pytest.fail("fitted again"))
    assert train(workspace, PARAMS, device="cpu").epochs == PARAMS.epochs


class _Does(StopsAfter):
    """Does something at the end of an epoch instead of stopping."""

    def __init__(self, act: Any) -> None:
        super().__init__(99)
        self.act = act

    def note(self, text: str) -> None:
        super().note(text)
        if len(self.told) == 1:
            self.act()


def test_a_cancelled_training_ends_and_one_that_was_taken_over_too(
    built: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = opened(built)
    monkeypatch.setattr(train_module, "LISTEN_SECONDS", 0.0)
    with pytest.raises(RunCancelledError, match="was cancelled"):
        train(replace(workspace, progress=_Does(lambda: cancel(workspace))), PARAMS, device="cpu")
    run = trainings(workspace)[-1]
    assert run.status is Status.CANCELLED
    assert {epoch for epoch, _ in numbers(workspace, run.id)} == {1}

    def take_over() -> None:
        with workspace.database.begin() as session:
            session.execute(update(Run).where(Run.id == run.id).values(process=ELSEWHERE))

    with pytest.raises(StoreError, match="was continued by other-host:77"):
        train(replace(workspace, progress=_Does(take_over)), PARAMS, device="cpu")
    assert run_of(workspace, run.id).status is Status.RUNNING  # it is the other's


def test_sigterm_is_as_good_as_ctrl_c(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    listener = _Does(lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(replace(workspace, progress=listener), PARAMS, device="cpu")
    run = trainings(workspace)[-1]
    assert run.status is Status.CANCELLED
    assert listener.told[-1].startswith("The same command goes on")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_file_that_was_forgotten_while_it_was_checked_is_no_problem(
    built: Path, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = opened(built)
    run_id = broken_off(workspace, 1)
    with workspace.database.read() as session:
        path = files_of(session, run_id, ArtifactKind.TRAINING_STATE)[0].path
    (workspace.artifacts.root / path).unlink()
    assert [problem.path for problem in verify(workspace).problems] == [path]
    monkeypatch.setattr(
        verifying, "check_files", lambda _: (1, 0, [Problem("training_state/old", "is gone")])
    )
    assert verify(workspace).problems == ()
