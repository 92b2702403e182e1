"""What a training leaves in the store: rows and a state after every epoch, a checkpoint at its end.

Files are written first, then one transaction names them. The state of an epoch takes the place of
the one before, whose file is removed when no row names it any more.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from ...config import as_parameters
from ...db.models import RunMetric
from ...reading.cells import plane_of
from ...runs import RunHandle, Workspace, attach, check_still_ours, forget_files, keep_file
from ...terms import ArtifactKind
from .plan import Plan

if TYPE_CHECKING:
    from ...ops.checkpoints import CheckpointMeta
    from ...ops.training import EpochMetrics, FitResult
    from ...ops.training_state import TrainingState

STATE = ArtifactKind.TRAINING_STATE


def keep_epoch(
    workspace: Workspace,
    run: RunHandle,
    epoch: EpochMetrics,
    waited: float,
    state: TrainingState,
) -> dict[str, float]:
    """Write the metrics of an epoch and the state at its end; return the metrics by name.

    ``waited``: the seconds in which the network waited for cells.

    Raises:
        RunCancelledError: the run was cancelled.
        StoreError: another process goes on with it.
        StorageError: the disk is full.

    """
    values = {name: float(value) for name, value in asdict(epoch).items() if name != "epoch"}
    values["waited"] = waited
    # With the number of the run in it, the file is that of no other run.
    own = state.beside({"run": run.id})
    file = workspace.artifacts.write(STATE, own.to_bytes(), ".safetensors")
    with workspace.database.begin() as session:
        check_still_ours(session, run)
        session.add_all(
            RunMetric(run_id=run.id, epoch=epoch.epoch, name=name, value=value)
            for name, value in values.items()
        )
        old = forget_files(session, run.id, STATE)
        attach(session, run.id, keep_file(session, file))
    remove(workspace, old)
    return values


def keep_checkpoint(
    workspace: Workspace, run: RunHandle, meta: CheckpointMeta, plan: Plan, result: FitResult
) -> str:
    """Write tensors and the record beside them; return the tensors' sha256.

    Their rows are written when the run ends, and the state is forgotten with it.
    """
    from ...ops.checkpoints import save_net

    write = workspace.artifacts.write
    tensors = write(ArtifactKind.CHECKPOINT, save_net(result.state), ".safetensors")
    record = meta.to_json() | {
        "tensors_sha256": tensors.sha256,
        "parameters": plan.spec.parameters,
        "image": as_parameters(plane_of(plan.segment)),
        "best_epoch": result.best_epoch,
    }
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
    files = (tensors, write(ArtifactKind.CHECKPOINT, text.encode(), ".json"))

    def link(session: Session) -> None:
        check_still_ours(session, run)
        for file in files:
            attach(session, run.id, keep_file(session, file))

    run.at_end.append(link)
    return tensors.sha256


def forget_state(run: RunHandle) -> list[str]:
    """Let the state be forgotten when the run ends; return the list that will hold its paths."""
    paths: list[str] = []

    def forget(session: Session) -> None:
        paths.extend(forget_files(session, run.id, STATE))

    run.at_end.append(forget)
    return paths


def remove(workspace: Workspace, paths: list[str]) -> None:
    """Remove files that no row names any more."""
    for path in paths:
        workspace.artifacts.remove(path)
