"""Metrics for other programs: CSV, TensorBoard or MLflow, in a folder outside the store.

The rows of the store are the record; a log is a copy, written anew from the first epoch on when a
run is gone on with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from ...errors import MissingExtraError, StorageError, UnknownNameError, first_line

CSV, TENSORBOARD, MLFLOW = LOGS = ("csv", "tensorboard", "mlflow")

_NEEDED = {TENSORBOARD: ("tensorboard", "tensorboardX"), MLFLOW: ("mlflow",)}
"""Packages of which one must be there; ``csv`` needs none."""


class _Logger(Protocol):
    def log_hyperparams(self, params: dict[str, Any]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def finalize(self, status: str) -> None: ...


@dataclass
class Logs:
    """The open loggers of a run, by kind.

    They write copies: one that fails is told of once through ``tell`` and left alone from then on,
    and the training goes on.
    """

    tell: Callable[[str], None]
    loggers: dict[str, _Logger] = field(default_factory=dict)

    def write(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of an epoch, by name."""
        self._each(lambda logger: logger.log_metrics(dict(metrics), step=epoch))

    def close(self, *, done: bool) -> None:
        """Write what is still in memory."""
        self._each(lambda logger: logger.finalize("success" if done else "failed"))

    def _each(self, act: Callable[[_Logger], None]) -> None:
        for kind, logger in list(self.loggers.items()):
            try:
                act(logger)
            except Exception as error:  # whatever a server or a disk of another's may do
                del self.loggers[kind]
                self.tell(f"The log for {kind} has ended: {first_line(error)}")


def check_logs(kinds: Sequence[str]) -> None:
    """Refuse a kind of log that is unknown, or whose package is not installed.

    Raises:
        UnknownNameError, MissingExtraError

    """
    for kind in kinds:
        if kind not in LOGS:
            raise UnknownNameError.of("kind of log", kind, LOGS)
        packages = _NEEDED.get(kind, ())
        if packages and not any(find_spec(name) for name in packages):
            raise MissingExtraError(
                f"A log for {kind} needs the package {packages[0]}, which is not installed. "
                f"Install it with: pip install {packages[0]}"
            )


def open_logs(
    kinds: Sequence[str],
    folder: Path,
    run_id: int,
    parameters: Mapping[str, Any],
    tell: Callable[[str], None],
) -> Logs:
    """Return loggers that write to ``folder``, in which earlier logs of these kinds are replaced.

    Raises:
        StorageError: the folder cannot be written.

    """
    try:
        loggers = {kind: _open(kind, folder, run_id) for kind in kinds}
        for kind, logger in loggers.items():
            if kind != CSV:  # has no place for them
                logger.log_hyperparams({name: str(value) for name, value in parameters.items()})
    except OSError as error:
        raise StorageError(
            f"Logs cannot be written to {folder}: {error.strerror}. Name another with --log-dir."
        ) from error
    return Logs(tell, loggers)


def _open(kind: str, folder: Path, run_id: int) -> Any:
    place = folder / kind
    place.mkdir(parents=True, exist_ok=True)
    if kind == MLFLOW:
        from lightning.pytorch.loggers import MLFlowLogger

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{place.resolve()}/mlflow.db"
        return MLFlowLogger("cellstore", f"run {run_id}", tracking_uri=uri)
    if kind == TENSORBOARD:
        from lightning.fabric.loggers.tensorboard import TensorBoardLogger

        for old in place.glob("events.out.tfevents.*"):
            old.unlink()
        return TensorBoardLogger(folder, name="", version=kind)
    from lightning.fabric.loggers.csv_logs import CSVLogger

    (place / "metrics.csv").unlink(missing_ok=True)
    return CSVLogger(folder, name="", version=kind, flush_logs_every_n_steps=1)
