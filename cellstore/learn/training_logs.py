"""The metrics of a training for other programs: CSV, TensorBoard, MLflow."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, StorageError, first_line

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",)}
"""Packages of which one must be there; ``csv`` needs none."""


def check_logs(kinds: Sequence[str]) -> None:
    """Refuse a kind of log whose package is not installed.

    Raises:
        MissingExtraError

    """
    for kind in kinds:
        packages = PACKAGES.get(kind, ())
        if packages and not any(find_spec(name) for name in packages):
            raise MissingExtraError(
                f"A log for {kind} needs the package {packages[0]}, which is not installed. "
                f"Install it with: pip install {packages[0]}"
            )


class TrainingLogs:
    """Loggers that write to ``folder``, in which earlier logs of these kinds are replaced.

    They write copies: one that fails is told of once through ``note`` and left alone from then on,
    and the training goes on.

    Raises:
        StorageError: the folder cannot be written.

    """

    def __init__(
        self,
        kinds: Sequence[str],
        folder: Path,
        run_id: int,
        parameters: Mapping[str, Any],
        note: Callable[[str], None],
    ) -> None:
        self.note, self.loggers = note, dict[str, Any]()
        try:
            for kind in kinds:
                self.loggers[kind] = logger = _open(kind, folder, run_id)
                if kind != "csv":  # which has no room for them
                    logger.log_hyperparams({name: str(value) for name, value in parameters.items()})
        except OSError as error:
            raise StorageError(
                f"Logs cannot be written to {folder}: {error.strerror}. Name another folder with "
                "--log-dir."
            ) from error

    def write(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of an epoch, by name."""
        self._each(lambda logger: logger.log_metrics(dict(metrics), step=epoch))

    def close(self, *, done: bool) -> None:
        """Write what is still in memory."""
        self._each(lambda logger: logger.finalize("success" if done else "failed"))

    def _each(self, act: Callable[[Any], None]) -> None:
        for kind, logger in list(self.loggers.items()):
            try:
                act(logger)
            except Exception as error:  # whatever a server or a disk of another's may do
                del self.loggers[kind]
                self.note(f"The log for {kind} has ended: {first_line(error)}")


def _open(kind: str, folder: Path, run_id: int) -> Any:
    own = folder / kind
    own.mkdir(parents=True, exist_ok=True)
    if kind == "mlflow":
        from lightning.pytorch.loggers import MLFlowLogger

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{own.resolve()}/mlflow.db"
        return MLFlowLogger("cellstore", f"run {run_id}", tracking_uri=uri)
    if kind == "tensorboard":
        from lightning.fabric.loggers.tensorboard import TensorBoardLogger

        for old in own.glob("events.out.tfevents.*"):
            old.unlink()
        return TensorBoardLogger(folder, name="", version=kind)
    from lightning.fabric.loggers.csv_logs import CSVLogger

    (own / "metrics.csv").unlink(missing_ok=True)
    return CSVLogger(folder, name="", version=kind, flush_logs_every_n_steps=1)
