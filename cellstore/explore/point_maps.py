"""Principal components and UMAP of many cells or wells, made in the background and kept as files.

They are made once, by a thread that tells how far it is. It stops when nobody has asked for a
while: a page that is closed, or cancelled, asks no more.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..analysis.components import components_of, umap_of
from ..artifacts import open_atomically
from ..errors import CellstoreError, MissingExtraError, UserInputError
from ..query.engine import Questions
from .requests import Explorer

FORMAT = 1
"""Raised when a map of the same rows becomes another."""
COMPONENTS = 5
"""Principal components that are kept."""
MOST_FITTED = 50_000
"""Rows from which components are found, drawn by chance; fewer where they are very wide."""
FITTED_BYTES = 48 << 20
MOST_UMAP, FEWEST_UMAP = 10_000, 15
"""Rows that UMAP lays out, drawn by chance: a fit of more takes minutes."""
FARTHEST = 20.0
"""Standard deviations behind which a value counts as no farther: one odd value must not decide."""
SEED = 0
SECONDS = 3600.0
GIVEN_UP = 10.0
"""Seconds after which nobody seems to wait any more."""

Numbers = NDArray[np.float64]
Ids = NDArray[np.int64]


class Rows(NamedTuple):
    """Rows of many numbers: SQL of ours that gives ``id`` and ``columns``, and its parameters.

    ``key`` names them; other rows have another. ``words``: what they are, as "cells". Columns are
    brought to the same spread unless they are ``alike`` already.
    """

    key: str
    words: str
    sql: str
    values: Mapping[str, Any]
    columns: tuple[str, ...]
    alike: bool = False


class PointMap(NamedTuple):
    """Points of rows: a Parquet file of ``id``, ``c1``, ``c2``, ..., their titles, and a note."""

    path: Path
    titles: tuple[str, ...]
    note: str


class NotYetError(Exception):
    """A map is being made; the text says how far."""


class _GivenUpError(Exception):
    """Nobody waits any more."""


@dataclass
class _Job:
    progress: str = "Starting"
    asked: float = field(default_factory=time.monotonic)
    error: Exception | None = None

    def check(self, progress: str = "") -> None:
        self.progress = progress or self.progress
        if time.monotonic() - self.asked > GIVEN_UP:
            raise _GivenUpError


_LOCK = threading.Lock()
_BUSY = threading.Lock()
"""One is made at a time."""


def point_map(explorer: Explorer, kind: str, rows: Rows) -> PointMap:
    """Return the map ``kind`` (``pca`` or ``umap``) of some rows; begin to make it if need be.

    Raises NotYetError while it is being made, and CellstoreError if it cannot be made.
    """
    digest = hashlib.sha256(f"{FORMAT} {kind} {rows.key} {rows.columns}".encode()).hexdigest()
    path = explorer.workspace.settings.cache.resolve() / "snapshots" / f"map-{digest[:24]}.parquet"
    if kind == "umap" and find_spec("umap") is None:
        raise MissingExtraError.of("umap-learn", "hits")
    jobs: dict[str, _Job] = explorer.kept.setdefault("point maps", {})
    with _LOCK:
        if path.exists():
            with suppress(OSError):  # of another user; else the oldest copies go first
                os.utime(path)
            return _opened(path)
        job = jobs.get(digest)
        if job is not None and job.error is not None:
            del jobs[digest]
            raise job.error
        if job is None:
            job = jobs[digest] = _Job()
            work = (explorer, job, kind, rows, path, lambda: jobs.pop(digest, None))
            threading.Thread(target=_carry_out, args=work, daemon=True).start()
        job.asked = time.monotonic()
        raise NotYetError(job.progress)


def _opened(path: Path) -> PointMap:
    import pyarrow.parquet as pq

    about = json.loads((pq.read_schema(path).metadata or {})[b"cellstore"])
    return PointMap(path, tuple(about["titles"]), about["note"])


def _carry_out(
    explorer: Explorer, job: _Job, kind: str, rows: Rows, path: Path, end: Callable[[], Any]
) -> None:
    try:
        while not _BUSY.acquire(timeout=0.2):
            job.check("Waiting for another map")
        try:
            with explorer.reader.questions(SECONDS) as questions:
                _make(questions, job, kind, rows, path)
        finally:
            _BUSY.release()
        end()
    except _GivenUpError:
        end()
    except CellstoreError as error:
        job.error = error
    except Exception as error:  # the page says it; a thread has nobody else to tell
        job.error = UserInputError(f"This map cannot be made ({type(error).__name__}: {error}).")


def _make(questions: Questions, job: _Job, kind: str, rows: Rows, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    job.check(f"Counting {rows.words}")
    counted = questions.ask_ours(f"SELECT count(*) AS n FROM ({rows.sql})", rows.values)  # noqa: S608
    n = int(counted.records()[0]["n"])
    most = min(MOST_FITTED, FITTED_BYTES // (8 * max(1, len(rows.columns))))
    most = min(most, MOST_UMAP) if kind == "umap" else most
    if n < (FEWEST_UMAP if kind == "umap" else 3):
        raise UserInputError(f"These are {n} {rows.words}, too few for a map of their features.")
    job.check(f"Reading {min(n, most):,} of {n:,} {rows.words}")
    drawn = f"hash(id) % {-(-n // most)} = 0" if n > most else "true"
    sample = questions.ask_ours(f"SELECT * FROM ({rows.sql}) WHERE {drawn}", rows.values)  # noqa: S608
    ids, values = _table(sample.arrays(), rows.columns)
    fit = _Fit(values, alike=rows.alike)
    centred = fit(values)
    centred -= centred.mean(axis=0)
    if not fit.used.any():
        raise UserInputError(f"No feature differs between these {rows.words}.")
    whole = f"{n:,} {rows.words}"
    is_part = len(ids) < n
    drawn_of = f"{len(ids):,} of {whole}, drawn by chance" if is_part else f"all {whole}"
    features = f"{int(fit.used.sum()):,} features"
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "umap":
        job.check("Principal components")
        points = _umap(centred @ components_of(centred), job, f"UMAP of {len(ids):,} {rows.words}")
        titles = ["UMAP 1", "UMAP 2"]
        note = f"UMAP of {features} of {drawn_of}, seed {SEED}."
        note += " The others are not shown." if is_part else ""
    else:
        axes = components_of(centred, COMPONENTS)
        shares = (centred @ axes).var(axis=0) / centred.var(axis=0).sum()
        titles = [f"PC {at} ({share:.0%} of variance)" for at, share in enumerate(shares, 1)]
        note = f"Principal components of {features}, found from {drawn_of}."
    names = [f"c{at}" for at in range(1, len(titles) + 1)]
    schema = pa.schema(
        [("id", pa.int64()), *((name, pa.float32()) for name in names)],
        metadata={"cellstore": json.dumps({"titles": titles, "note": note})},
    )
    with open_atomically(path) as file, pq.ParquetWriter(file, schema) as writer:
        if kind == "umap":
            writer.write_table(pa.table([ids, *points.T.astype(np.float32)], schema=schema))
            return
        done = 0
        for batch in questions.ask_ours(rows.sql, rows.values).batches():
            job.check(f"Projecting {rows.words}: {done:,} of {n:,}")
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            ids, values = _table(
                {name: column.to_numpy(zero_copy_only=False) for name, column in columns.items()},
                rows.columns,
            )
            parts = (fit(values) @ axes).T.astype(np.float32)
            writer.write_table(pa.table([ids, *parts], schema=schema))
            done += len(ids)


def _table(
    arrays: Mapping[str, Any], columns: tuple[str, ...]
) -> tuple[NDArray[np.int64], Numbers]:
    """Return the ids (N,) and values (N, F); NaN where there is none."""
    values = np.empty((len(arrays["id"]), len(columns)))
    for at, name in enumerate(columns):
        values[:, at] = filled(arrays[name], np.nan)
    values[~np.isfinite(values)] = np.nan
    return np.asarray(arrays["id"], np.int64), values


def filled(array: NDArray[Any], value: float) -> NDArray[Any]:
    """Return an array with ``value`` where it is masked."""
    return np.where(np.ma.getmaskarray(array), value, np.ma.getdata(array))  # type: ignore[no-untyped-call]


class _Fit:
    """Centres values (N, F) as those it was made from; what is missing gets the mean."""

    def __init__(self, values: Numbers, *, alike: bool) -> None:
        counts = np.isfinite(values).sum(axis=0)
        with warnings.catch_warnings():  # of a column without any value
            warnings.simplefilter("ignore", RuntimeWarning)
            self.mean, spread = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
        self.used = (counts > len(values) / 2) & (spread > 1e-12 * np.maximum(1, abs(self.mean)))
        self.spread = np.where(self.used, 1.0 if alike else spread, 1.0)

    def __call__(self, values: Numbers) -> Numbers:
        scaled = np.clip((values - self.mean) / self.spread, -FARTHEST, FARTHEST)
        return np.asarray(np.where(np.isfinite(scaled) & self.used, scaled, 0.0))


def _umap(parts: Numbers, job: _Job, words: str) -> Numbers:
    """UMAP in a process of its own, which can be stopped, and whose memory is not the server's."""
    context = get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=_umap_process, args=(its, parts), daemon=True)
    process.start()
    its.close()
    began = time.monotonic()
    try:
        while not mine.poll(0.2):
            job.check(f"{words}: {time.monotonic() - began:.0f} s")
        found: Numbers = mine.recv()
    except EOFError as error:
        raise UserInputError("UMAP has ended early, perhaps for want of memory.") from error
    finally:
        process.kill()
        process.join()
        mine.close()
    return found


def _umap_process(connection: Connection, parts: Numbers) -> None:
    connection.send(umap_of(parts, SEED))
    connection.close()
