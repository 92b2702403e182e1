"""Two processes that train one network together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import team_training
from small_training import TINY, Opener, Trained, checkpoint
from sqlalchemy import func, select
from team_training import TOGETHER, environment, told_to

from cellstore.config import Sources
from cellstore.enums import Stage, Status
from cellstore.errors import TeamError, UserInputError
from cellstore.learn import training
from cellstore.learn.training import Team
from cellstore.models import Run, RunMetric
from cellstore.stages.train import check_agreed, make_plan, share_of_batch, train


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.heavy
def test_two_processes_end_with_one_network_and_write_once(
    built: Path, opened: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process is the first of two, as torchrun starts them."""
    workspace, port = opened(built), free_port()
    words = [sys.executable, team_training.__file__, str(workspace.settings.root)]
    second = {**os.environ, **environment(1, port)}
    for name, value in environment(0, port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(training.Training, "run", told_to(tmp_path / "0"))
    with subprocess.Popen([*words, str(tmp_path / "1")], env=second) as process:
        result = train(workspace, TOGETHER, device="cpu")
        assert process.wait(timeout=60) == 0
    told = [json.loads((tmp_path / rank).read_text()) for rank in ("0", "1")]
    assert told[0] == told[1]
    assert [m["train_loss"] for m in result.metrics] == [loss for loss, _ in told[0]["losses"]]
    with workspace.database.read() as session:
        run = session.scalars(select(Run).where(Run.stage == Stage.TRAIN)).one()
        names = session.scalar(select(func.count(RunMetric.name.distinct())))
        assert session.scalar(select(func.count()).select_from(RunMetric)) == 2 * (names or 0)
    assert (run.id, run.status) == (result.run_id, Status.DONE)
    checkpoint(workspace, run.id)


def test_a_batch_is_shared_out() -> None:
    assert share_of_batch(512, 4) == 128
    with pytest.raises(UserInputError, match="batch of 7 cells cannot be shared out to 4"):
        share_of_batch(7, 4)


def test_processes_that_found_other_things_do_not_train(trained: Trained, opened: Opener) -> None:
    """The first process resolved its plan before the split changed, this one after."""
    workspace = opened(trained.root)
    plan = make_plan(workspace, TINY, Sources())

    class Second:
        def of_first(self, work: Callable[[], str]) -> str:
            return "the fingerprint that the first process found"

    class Alone(Second):
        def of_first(self, work: Callable[[], str]) -> str:
            return work()

    check_agreed(cast(Team, Alone()), plan.spec)
    with pytest.raises(TeamError, match="asked for different things"):
        check_agreed(cast(Team, Second()), plan.spec)
