"""Networks by what people type: a name, a file, or the run of this store that made one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from ..enums import ArtifactKind, Stage
from ..errors import UserInputError
from ..jobs.lookup import find_run
from ..jobs.workspace import Workspace
from ..models import Artifact, RunArtifact

if TYPE_CHECKING:
    from ..analysis.segmentation import ModelFiles


OF_A_RUN = "run:"
"""How a network of this store is named: ``run:12``, or ``run:latest``."""

SIZE_MODEL = ".npz"


class Network(NamedTuple):
    """Where a network lies, and the finetune run that made it, if it is one of this store."""

    files: ModelFiles
    run_id: int | None


def find_network(workspace: Workspace, model: str, weights_dir: Path | None = None) -> Network:
    """Return the network that ``model`` names: as ``ops.segmentation.find_model``, or ``run:N``.

    Raises:
        UnknownNameError: there is no such name or run.
        UserInputError: the file cannot be had, or the run made no network.
        StorageError: a stored file is gone or changed.
    """
    from ..analysis.segmentation import describe, find_model

    if not model.startswith(OF_A_RUN):
        return Network(find_model(model, weights_dir), None)
    with workspace.database.read() as session:
        run = find_run(session, model.removeprefix(OF_A_RUN), Stage.FINETUNE)
        files = _artifacts(session, run.id)
    paths = {}
    for artifact in files:
        workspace.artifacts.read(artifact.path, artifact.sha256)  # that it is what was written
        paths[artifact.path.endswith(SIZE_MODEL)] = workspace.artifacts.locate(artifact.path)
    if False not in paths:
        raise UserInputError(f"Run {run.id} did not end with a network. Choose another run.")
    return Network(describe(f"{OF_A_RUN}{run.id}", paths[False], paths.get(True)), run.id)


def _artifacts(session: Session, run_id: int) -> list[Artifact]:
    query = select(Artifact).join(RunArtifact, RunArtifact.artifact_id == Artifact.id)
    query = query.where(RunArtifact.run_id == run_id, Artifact.kind == ArtifactKind.NETWORK)
    return list(session.scalars(query.order_by(Artifact.id)))
