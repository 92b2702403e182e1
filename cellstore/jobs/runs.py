"""Recipes and runs.

A recipe says what to do; its fingerprint is over everything that decides the result. A run is one
execution of a recipe: its row is written first and closed whatever happens.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Select, delete, select, update
from sqlalchemy.orm import Session

from ..artifacts import StoredFile
from ..db.bulk import in_lists, insert_new
from ..db.events import Change, caller, record_events, record_runs
from ..db.session import Database
from ..enums import ArtifactKind, Stage, Status
from ..errors import RunCancelledError, StoreError, UserInputError
from ..io.uris import FETCHED
from ..models import Artifact, Image, Plate, Recipe, RecipeInput, Run, RunArtifact, Well
from .queue import at_work, close_dead_runs, new_owner, shown_worker

PACKAGES = (
    *("cellstore", "numpy", "scipy", "pandas", "pyarrow", "duckdb", "sqlalchemy"),
    *("tifffile", "imagecodecs", "cellpose", "segment-anything", "scikit-image"),
    *("torch", "torchvision", "lightning", "scikit-learn", "onnxruntime", "timm", "transformers"),
    *("pycytominer", "copairs", "harmonypy", "umap-learn"),
)
"""Packages that compute, or read what is computed with; of a run, those that are installed."""

_VERSION = cache(version)
"""Read once in a process: the metadata of all of them take 50 ms."""


T = TypeVar("T")

LOCAL = ("exclude_flagged",)
"""Parameters that are row numbers of this store where they do not count."""


@dataclass(frozen=True)
class RecipeSpec:
    """Everything that decides the result of a stage.

    ``version`` is the stage's own number, raised when its output changes; ``inputs`` are the
    recipes whose results it reads. ``local`` is kept with the parameters, but does not count: row
    numbers, which mean nothing in another store.
    """

    stage: Stage
    version: int
    parameters: dict[str, Any]
    weights_sha256: str | None = None
    inputs: tuple[Recipe, ...] = ()
    local: Mapping[str, Any] = field(default_factory=dict)


def fingerprint(spec: RecipeSpec) -> str:
    """Return the sha256 of the canonical JSON of ``spec``: same fingerprint, same result."""
    content = {
        "stage": spec.stage.value,
        "version": spec.version,
        "parameters": spec.parameters,
        "weights": spec.weights_sha256,
        "inputs": sorted(recipe.fingerprint for recipe in spec.inputs),
    }
    return digest(content)


def digest(content: Any) -> str:
    """Return the sha256 of ``content`` as canonical JSON (sorted keys, no spaces, no NaN).

    Raises:
        UserInputError: a number is infinite or none at all, or something is no number and no text.
    """
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise UserInputError("A parameter is not a finite number. Give plain numbers.") from error
    except TypeError as error:
        raise UserInputError(
            f"A parameter cannot be kept: {error}. Give numbers, text, lists and dictionaries."
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_numbers(*arrays: NDArray[Any]) -> str:
    """Return the sha256 of arrays of any shape, as float64: the same once a database had them."""
    found = hashlib.sha256()
    for array in arrays:
        numbers = np.asarray(array, dtype=np.float64) + 0.0  # -0.0 is 0.0
        found.update(np.where(np.isnan(numbers), np.nan, numbers).tobytes())
    return found.hexdigest()


def digest_of_images(
    session: Session, images: Select[int], details: Mapping[int, Any] | None = None
) -> str:
    """Return a digest of images by what they are of and their bytes: the same in every store.

    ``images``: a query of their ids. ``details``: what else decides a result, such as how many
    cells an image has; images that it does not name do not count.
    """
    query = (
        select(Image.id, Plate.barcode, Well.name, Image.site, Image.plane, Image.time_point)
        .add_columns(Image.content_sha256)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .where(Image.id.in_(images))
        .execution_options(yield_per=10_000)
    )
    lines = (
        json.dumps([*keys, (details or {}).get(image_id)])
        for image_id, *keys in session.execute(query)
        if details is None or image_id in details
    )
    digests = sorted(hashlib.sha256(line.encode()).digest() for line in lines)
    return hashlib.sha256(b"".join(digests)).hexdigest()


def finished_run(session: Session, spec: RecipeSpec, split_id: int | None = None) -> Run | None:
    """Return the latest run of ``spec``, and of a split, that came to its end."""
    recipe = known_recipe(session, spec)
    if recipe is None:
        return None
    query = select(Run).where(Run.recipe_id == recipe.id, Run.status == Status.DONE)
    if split_id is not None:
        query = query.where(Run.split_id == split_id)
    return session.scalars(query.order_by(Run.id.desc()).limit(1)).first()


def result_of(run: Run, kind: type[T], **more: Any) -> T:
    """Return what a run kept, as a result of the dataclass ``kind``; ``more``: what it did not."""
    known: Any = kind
    kept = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in (run.result or {}).items()
        if name in known.__dataclass_fields__
    }
    return kind(**{"run_id": run.id, "recipe_id": run.recipe_id, **kept, **more})


def known_recipe(session: Session, spec: RecipeSpec) -> Recipe | None:
    """Return the recipe of ``spec``, if it was ever used."""
    query = select(Recipe).where(Recipe.stage == spec.stage)
    return session.scalars(query.where(Recipe.fingerprint == fingerprint(spec))).one_or_none()


def register(session: Session, spec: RecipeSpec) -> Recipe:
    """Return the recipe of ``spec``, made on its first use."""
    row = {
        "stage": spec.stage,
        "version": spec.version,
        "parameters": {**spec.parameters, **spec.local},
        "weights_sha256": spec.weights_sha256,
        "fingerprint": fingerprint(spec),
        "created_at": datetime.now(UTC),
    }
    insert_new(session, Recipe, [row])
    same = (Recipe.stage == spec.stage, Recipe.fingerprint == row["fingerprint"])
    recipe = session.scalars(select(Recipe).where(*same)).one()
    if spec.inputs:
        links = [{"recipe_id": recipe.id, "input_id": source.id} for source in spec.inputs]
        insert_new(session, RecipeInput, links)
    return recipe


@dataclass
class RunHandle:
    """A run that is under way; what is put into ``result`` is kept with it.

    ``error``: why it has failed, although it came to its end. ``owner``: the process that alone may
    close it; none: any. ``at_end`` are done in the transaction that marks it as done.
    """

    id: int
    result: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    owner: str | None = None
    at_end: list[Callable[[Session], None]] = field(default_factory=list)


@contextmanager
def running(
    database: Database,
    recipe: Recipe | RecipeSpec,
    *,
    resume: int | None = None,
    alone: bool = False,
    device: str = "cpu",
    **columns: Any,
) -> Iterator[RunHandle]:
    """Record a run of ``recipe`` around a block: done at its end, else failed or cancelled.

    A recipe that is not in the database yet is put there. ``resume`` goes on with an unfinished
    run instead of starting another. ``alone``: the run is of one process at a time; another may go
    on with it only when it is over. ``device``: where networks compute, as it was asked for.
    ``columns``: of a new run: ``parent_id``, ``split_id``, ``seed``, ``query``, ``origin``.

    Raises:
        UserInputError: the run to resume is alone, and another process is at it, or finished it.
    """
    owner = new_owner()
    FETCHED.clear()  # a server may have other files by now
    if resume is None:
        user_name, command = caller()
        run = Run(
            stage=Stage(recipe.stage),
            status=Status.RUNNING,
            command=command,
            code_version=code_version(),
            environment=environment(device),
            host=socket.gethostname()[:255],
            user_name=user_name,
            process=owner,
            started_at=datetime.now(UTC),
            **columns,
        )
        with database.begin() as session:
            close_dead_runs(session)
            known = register(session, recipe) if isinstance(recipe, RecipeSpec) else recipe
            run.recipe_id = known.id
            session.add(run)
            session.flush()
            resume = run.id
            record_runs(session, [run.id], opened=True)
    else:
        _resume(database, resume, owner, device, alone=alone)
    handle = RunHandle(resume, owner=owner if alone else None)
    status = Status.FAILED
    try:
        yield handle
        status = Status.FAILED if handle.error else Status.DONE
    except (KeyboardInterrupt, RunCancelledError) as error:
        status, handle.error = Status.CANCELLED, str(error) or "Stopped by Ctrl-C."
        raise
    except BaseException as error:
        handle.error = str(error) or type(error).__name__
        raise
    finally:
        FETCHED.clear()
        now = datetime.now(UTC)
        values: dict[str, Any] = {"status": status, "ended_at": now, "result": handle.result}
        if handle.error is not None:
            values["error"] = handle.error
        mine = update(Run).where(Run.id == handle.id)
        if handle.owner is not None:
            mine = mine.where(Run.process == handle.owner)
        with database.begin() as session:
            if status is Status.DONE:
                for act in handle.at_end:
                    act(session)
            elif not alone:
                here = owner.split("|")[:2]  # host and process
                others = [name for _, name in at_work(session, [handle.id])]
                others = [name for name in others if name.split("|")[:2] != here]
                if others:  # who shares the run goes on with it
                    values = {"process": others[0]}
            done: Any = session.execute(mine.values(**values))
            if done.rowcount and "status" in values:
                record_runs(session, [handle.id])


def check_still_ours(session: Session, run: RunHandle) -> None:
    """Find out in a transaction whether to go on with a run that is ours alone."""
    query = select(Run.status, Run.process).where(Run.id == run.id)
    status, process = session.execute(query).one()
    if process != run.owner:
        raise StoreError(
            f"Run {run.id} was continued by {shown_worker(process)}, so this process ends."
        )
    if status is Status.CANCELLED:
        raise RunCancelledError(f"Run {run.id} was cancelled.")


def keep_files(
    session: Session, stored: Sequence[StoredFile], run_id: int | None = None
) -> list[int]:
    """Return the ids of the artifact rows of files, made where they are new.

    ``run_id``: the run that wrote the files, or relies on them.
    """
    now = datetime.now(UTC)
    insert_new(session, Artifact, [asdict(file) | {"created_at": now} for file in stored])
    known = {}
    for some in in_lists({file.sha256 for file in stored}):
        query = select(Artifact.kind, Artifact.sha256, Artifact.id)
        for row in session.execute(query.where(Artifact.sha256.in_(some))):
            known[row.kind, row.sha256] = row.id
    ids = [known[file.kind, file.sha256] for file in stored]
    if run_id is not None:
        links = [{"run_id": run_id, "artifact_id": number} for number in ids]
        insert_new(session, RunArtifact, links)
    return ids


def files_of(session: Session, run_id: int, kind: ArtifactKind) -> list[Artifact]:
    """Return the files of a kind that a run wrote or relies on, the oldest first."""
    query = (
        select(Artifact)
        .join(RunArtifact, RunArtifact.artifact_id == Artifact.id)
        .where(RunArtifact.run_id == run_id, Artifact.kind == kind)
    )
    return list(session.scalars(query.order_by(Artifact.id)))


def forget_files(session: Session, run_id: int, kind: ArtifactKind) -> list[str]:
    """Drop the rows of a run's files of a kind that is its own alone; return their paths.

    The files themselves may be removed once the transaction is over, not before.
    """
    paths = []
    for file in files_of(session, run_id, kind):
        session.execute(delete(RunArtifact).where(RunArtifact.artifact_id == file.id))
        session.execute(delete(Artifact).where(Artifact.id == file.id))
        paths.append(file.path)
    return paths


def _resume(database: Database, run_id: int, owner: str, device: str, *, alone: bool) -> None:
    """Open a run again, and keep who goes on with it by which code beside who began."""
    user_name, command = caller()
    attempt = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": f"{user_name}@{socket.gethostname()}",
        "command": command,
        "code_version": code_version(),
        **environment(device),
    }
    with database.begin() as session:
        close_dead_runs(session)
        run = session.scalars(select(Run).where(Run.id == run_id).with_for_update()).one()
        if alone and run.status is Status.RUNNING:
            raise UserInputError(
                f"Run {run.id} is running, at {shown_worker(run.process)}. Wait for it, or, if "
                f"that machine has lost it, mark it as over: cellstore cancel {run.id}"
            )
        if alone and run.status is Status.DONE:
            raise UserInputError(f"Run {run.id} was finished by another process in the meantime.")
        resumed = [*run.environment.get("resumed", []), attempt]
        run.environment = {**run.environment, "resumed": resumed}
        change = Change(
            "runs", run.id, {"status": run.status.value}, {"status": Status.RUNNING.value}
        )
        record_events(session, [change])
        record_runs(session, [run.id], opened=True)
        run.status, run.ended_at, run.error = Status.RUNNING, None, None
        run.process = owner


@cache
def code_version() -> str:
    """Return the version of cellstore, with the commit where it runs from a checkout."""
    found = version("cellstore")
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return found
    words = ["git", "-C", str(folder), "describe", "--always", "--exclude=*", "--abbrev=12"]
    try:
        described = subprocess.run(  # noqa: S603 - fixed words, no shell
            [*words, "--dirty=.changed"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return found
    return f"{found}+g{described.stdout.strip()}"


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return what decides numbers: Python, the platform, the device, threads, packages.

    ``device`` (``auto``, ``cpu``, ``cuda``, ``cuda:1``) becomes its name. Torch is not loaded for
    it: of a command whose workers compute, the driver says which GPU there is.
    """
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = _VERSION(package)
        except PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    gpus, cuda = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")), None
    name = gpus[0].read_text().partition("Model:")[2].partition("\n")[0].strip() if gpus else ""
    if torch is not None and hasattr(torch, "cuda"):
        found["threads"] = torch.get_num_threads()
        if device != "cpu" and torch.cuda.is_available():
            index = int(device.partition(":")[2] or 0)
            name, cuda = torch.cuda.get_device_name(index), torch.version.cuda
    else:
        text = os.environ.get("OMP_NUM_THREADS", "")
        found["threads"] = int(text) if text.isdecimal() else os.cpu_count()
        if device != "cpu" and gpus and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            cuda = found.get("torch", "").partition("+cu")[2] or "unknown"
    found["device"] = "cpu" if cuda is None else name
    if cuda is not None:
        found["cuda"] = cuda
    return found
