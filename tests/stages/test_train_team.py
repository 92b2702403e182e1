"""Two processes that train one network together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import team_training
from small_training import Opener, checkpoint
from sqlalchemy import func, select

from cellstore.db.models import Run, RunMetric
from cellstore.errors import UserInputError
from cellstore.stages.train.model import share_of_batch
from cellstore.terms import Stage, Status


@pytest.mark.heavy
def test_two_processes_end_with_one_network_and_write_once(
    built: Path, opened: Opener, tmp_path: Path
) -> None:
    workspace = opened(built)
    words = [sys.executable, team_training.__file__, str(workspace.settings.root), "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, str(tmp_path)], env=environment, timeout=120, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    with workspace.database.read() as session:
        run = session.scalars(select(Run).where(Run.stage == Stage.TRAIN)).one()
        losses = select(RunMetric.value).where(RunMetric.name == "train_loss")
        kept = list(session.scalars(losses.order_by(RunMetric.epoch)))
        names = session.scalar(select(func.count(RunMetric.name.distinct())))
        assert session.scalar(select(func.count()).select_from(RunMetric)) == 2 * (names or 0)
    assert run.status is Status.DONE
    assert kept == [train for train, _ in first["losses"]]
    checkpoint(workspace, run.id)


def test_a_batch_is_shared_out() -> None:
    assert share_of_batch(512, 4) == 128
    with pytest.raises(UserInputError, match="batch of 7 cells cannot be shared out to 4"):
        share_of_batch(7, 4)
