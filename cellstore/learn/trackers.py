"""What a training tells other programs: MLflow, and Weights & Biases."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..db.events import without_passwords
from ..errors import MissingExtraError, first_line
from ..io.uris import shown

MLFLOW_URI = "MLFLOW_TRACKING_URI"
PROJECT = "cellstore"
"""The MLflow experiment and the project of Weights & Biases; their own variables name others."""

_LONGEST = 500
"""Characters of a parameter in MLflow; the file recipe.json has all of them."""


def check_logs(kinds: Sequence[str]) -> None:
    """Refuse a kind of log whose package is not installed."""
    for kind in kinds:
        if find_spec(kind) is None:
            raise MissingExtraError(
                f"A log for {kind} needs the package {kind}, which is not installed. "
                f"Install it with: pip install {kind}"
            )


def of_mlflow(run_id: str, uri: str | None = None) -> dict[str, str]:
    """Return what is kept of a run of MLflow: its id, where it is, and a link to its page.

    ``uri``: of the tracking store; default: ``$MLFLOW_TRACKING_URI``. User and password in it are
    left out.
    """
    known = {"run": run_id}
    if address := uri or os.environ.get(MLFLOW_URI):
        known["at"] = shown(address)
        if address.startswith(("http://", "https://")):
            known["link"] = f"{known['at'].rstrip('/')}/#/runs/{run_id}"
    return known


@dataclass(frozen=True)
class TrackedRun:
    """What a run says of itself. ``folder``: for the files of trackers on this machine."""

    run_id: int
    folder: Path
    tags: Mapping[str, str]
    parameters: Mapping[str, Any]


class Trackers(AbstractContextManager["Trackers"]):
    """The trackers of a training, which keep copies: what one of them fails at ends it alone.

    ``known``: what :attr:`ids` was when the run was stopped; a tracker goes on with its own run
    then. ``note`` is told of failures. In a ``with`` block, trackers hear how it ended.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        run: TrackedRun | None,
        known: Mapping[str, Mapping[str, str]],
        note: Callable[[str], None],
    ) -> None:
        self.note, self.ids = note, {kind: dict(found) for kind, found in known.items()}
        self._open: dict[str, Any] = dict.fromkeys(kinds if run is not None else ())

        def begin(kind: str) -> None:
            assert run is not None
            (run.folder / kind).mkdir(parents=True, exist_ok=True)
            self._open[kind] = tracker = _KINDS[kind](run, self.ids.get(kind, {}))
            if tracker.about:
                self.ids[kind] = tracker.about

        self._each(lambda kind, _: begin(kind))

    def write(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of an epoch, by name, unless a tracker has them already."""
        self._each(lambda _, one: one.write(epoch, metrics) if epoch > one.last else None)

    def keep(self, files: Sequence[Path], scores: Mapping[str, float]) -> None:
        """Add the files of the model, and what came out."""
        self._each(lambda _, one: one.keep(files, scores))

    def __exit__(self, kind: Any, *_: object) -> None:
        self._each(lambda _, one: one.end(done=kind is None))

    def _each(self, act: Callable[[str, Any], None]) -> None:
        for kind, tracker in list(self._open.items()):
            try:
                act(kind, tracker)
            except Exception as error:  # whatever a server or a disk of another's may do
                del self._open[kind]
                self.note(f"The log for {kind} has ended: {without_passwords(first_line(error))}")


class _MLflow:
    def __init__(self, run: TrackedRun, known: Mapping[str, str]) -> None:
        uri, files = os.environ.get(MLFLOW_URI), None
        if not uri:
            own = (run.folder / "mlflow").resolve()
            uri, files = f"sqlite:///{own}/mlflow.db", (own / "files").as_uri()
        self.client = client = import_module("mlflow").MlflowClient(uri)
        self.last = 0
        if known.get("at") == shown(uri):
            self.id = known["run"]
            client.update_run(self.id, status="RUNNING")
            history = client.get_metric_history(self.id, "train_loss")
            self.last = max((item.step for item in history), default=0)
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
            found = client.get_experiment_by_name(name)
            number = found.experiment_id if found else client.create_experiment(name, files)
            made = client.create_run(number, tags=dict(run.tags), run_name=f"run {run.run_id}")
            self.id = made.info.run_id
            for key, value in run.parameters.items():
                text = value if isinstance(value, str) else json.dumps(value)
                client.log_param(self.id, key, text[:_LONGEST])
            client.log_dict(self.id, dict(run.parameters), "recipe.json")
        self.about = of_mlflow(self.id, uri)

    def write(self, epoch: int, metrics: Mapping[str, float]) -> None:
        metric, now = import_module("mlflow.entities").Metric, int(time.time() * 1000)
        values = [metric(key, value, now, epoch) for key, value in metrics.items()]
        self.client.log_batch(self.id, metrics=values)

    def keep(self, files: Sequence[Path], scores: Mapping[str, float]) -> None:
        for file in files:
            self.client.log_artifact(self.id, str(file), "model")
        for key, value in scores.items():
            self.client.log_metric(self.id, key, value)

    def end(self, *, done: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if done else "FAILED")


class _Wandb:
    def __init__(self, run: TrackedRun, known: Mapping[str, str]) -> None:
        self.wandb = import_module("wandb")
        # It would wait for a key, and copy what is printed, without these.
        quiet = self.wandb.Settings(
            silent=True, console="off", login_timeout=30, disable_git=True, save_code=False
        )
        self.number = run.run_id
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            id=known.get("run"),
            resume="allow" if known else None,
            name=f"run {run.run_id}",
            config={**run.parameters, **run.tags},
            dir=str((run.folder / "wandb").resolve()),
            settings=quiet,
        )
        self.last = int(self.run.step) - 1
        self.about = {"run": str(self.run.id)}
        if not self.run.offline and self.run.url:
            self.about["link"] = str(self.run.url)

    def write(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=epoch)

    def keep(self, files: Sequence[Path], scores: Mapping[str, float]) -> None:
        model = self.wandb.Artifact(f"{PROJECT}-run-{self.number}", type="model")
        for file in files:
            model.add_file(str(file))
        self.run.log_artifact(model)
        self.run.summary.update(dict(scores))

    def end(self, *, done: bool) -> None:
        self.run.finish(exit_code=0 if done else 1)


_KINDS: Mapping[str, Any] = {"mlflow": _MLflow, "wandb": _Wandb}
