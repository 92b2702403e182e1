"""A file that the store knows, by its path, name, id or sha256, or as it lies on the disk."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from ...artifacts import sha256_of
from ...db.models import (
    Artifact,
    FeatureFile,
    FeatureSet,
    Image,
    ImageFile,
    IngestFile,
    Plate,
    Recipe,
    Run,
    RunArtifact,
    Segmentation,
    Well,
)
from ...errors import UnknownNameError, UserInputError
from ...runs import Workspace
from ...runs.places import hex_start, neighbours, readable, starts_with
from ...terms import ArtifactKind
from .downstream import (
    came_of_images,
    came_of_recipes,
    came_of_runs,
    images_of_wells_changed_by,
    recipes_with_weights,
)
from .facts import ArtifactAudit, Came, KnownFile, RunFact
from .runs import run_fact

LISTED = 8
IMAGE_FILE, TABLE, WEIGHTS = "image file", "ingested table", "weights"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _Candidate(NamedTuple):
    """A row that a text may mean."""

    kind: str
    key: int
    sha256: str
    name: str


def audit_artifact(workspace: Workspace, text: str) -> ArtifactAudit:
    """Return what a file is to the store, and what came of it.

    ``text``: the path or name of a file that the store wrote or read, the first digits (6 at
    least) of its sha256, the id of an artifact, or the path of a file on this machine, which is
    hashed and looked up by its bytes.

    Raises:
        UnknownNameError: the store knows no such file.
        UserInputError: several files have that name; they are listed.
    """
    path = _on_disk(text)
    digest = None if path is None else sha256_of(path)
    text = readable(text)
    with workspace.database.read() as session:
        if digest is not None:
            found = _by_sha256(session, digest)
            if not found:
                raise _unknown_bytes(session, text, digest)
        else:
            found = _by_name(session, text)
        sha256 = _one_file(session, text, found)
        known = _by_sha256(session, sha256)
        return ArtifactAudit(
            asked=text,
            sha256=sha256,
            hashed=None if path is None else str(path),
            known=tuple(_known(session, item) for item in _each_once(known)),
        )


def _on_disk(text: str) -> Path | None:
    try:
        path = Path(text)
        return path if path.is_file() else None
    except (OSError, ValueError):  # too long for a path, or with a NUL
        return None


def _one_file(session: Session, text: str, found: Sequence[_Candidate]) -> str:
    if not found:
        near = [
            *neighbours(session, ImageFile.name, text),
            *neighbours(session, IngestFile.name, text),
        ]
        hint = f" Did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
        raise UnknownNameError(
            f"The store knows no file {text!r}.{hint} A file is named by its path, its name, the "
            "id of an artifact, or the first 6 digits or more of its sha256."
        )
    different = {item.sha256: item for item in found}
    if len(different) > 1:
        shown = [f"{item.kind} {item.name} ({item.sha256[:12]})" for item in different.values()]
        more = ", ..." if len(shown) > LISTED else ""
        raise UserInputError(
            f"{text!r} names several files: {', '.join(shown[:LISTED])}{more}. "
            "Name one by the start of its sha256."
        )
    return found[0].sha256


def _unknown_bytes(session: Session, text: str, digest: str) -> UnknownNameError:
    same = [item.sha256[:12] for item in _named(session, re.split(r"[/\\]", text)[-1])]
    hint = f" A file of that name was known with sha256 {', '.join(same[:3])}." if same else ""
    return UnknownNameError(
        f"The store knows no file with the bytes of {text} (sha256 {digest[:12]}).{hint}"
    )


def _by_name(session: Session, text: str) -> list[_Candidate]:
    found: list[_Candidate] = []
    if text.isdecimal() and len(text) < 19:
        found = _artifacts(session, select(Artifact).where(Artifact.id == int(text)))
    found = found or _artifacts(session, select(Artifact).where(Artifact.path == text))
    name = re.split(r"[/\\]", text)[-1]
    found = found or _named(session, text) or (_named(session, name) if name != text else [])
    start = hex_start(name.partition(".")[0])
    return found or ([] if start is None else _starting(session, start))


def _named(session: Session, name: str) -> list[_Candidate]:
    images = select(ImageFile).where(ImageFile.name == name, ImageFile.sha256.is_not(None))
    tables = select(IngestFile).where(IngestFile.name == name)
    return [*_image_files(session, images), *_tables(session, tables)]


def _starting(session: Session, start: str) -> list[_Candidate]:
    return [
        *_artifacts(session, select(Artifact).where(starts_with(Artifact.sha256, start))),
        *_image_files(session, select(ImageFile).where(starts_with(ImageFile.sha256, start))),
        *_tables(session, select(IngestFile).where(starts_with(IngestFile.sha256, start))),
        *_weights(session, select(Recipe).where(starts_with(Recipe.weights_sha256, start))),
    ]


def _by_sha256(session: Session, sha256: str) -> list[_Candidate]:
    return [
        *_artifacts(session, select(Artifact).where(Artifact.sha256 == sha256)),
        *_image_files(session, select(ImageFile).where(ImageFile.sha256 == sha256)),
        *_tables(session, select(IngestFile).where(IngestFile.sha256 == sha256)),
        *_weights(session, select(Recipe).where(Recipe.weights_sha256 == sha256)),
    ]


_MOST = 50
"""Rows of each kind that are looked at: more have one name or one start only by mistake."""


def _artifacts(session: Session, query: Select[Any]) -> list[_Candidate]:
    rows = session.scalars(query.limit(_MOST))
    return [
        _Candidate(ArtifactKind(row.kind).value, row.id, row.sha256, row.path.rpartition("/")[2])
        for row in rows
    ]


def _image_files(session: Session, query: Select[Any]) -> list[_Candidate]:
    rows = session.scalars(query.limit(_MOST))
    return [_Candidate(IMAGE_FILE, row.id, row.sha256 or "", row.name) for row in rows]


def _tables(session: Session, query: Select[Any]) -> list[_Candidate]:
    rows = session.scalars(query.order_by(IngestFile.id).limit(_MOST))
    return [_Candidate(TABLE, row.id, row.sha256, row.name) for row in rows]


def _weights(session: Session, query: Select[Any]) -> list[_Candidate]:
    return [
        _Candidate(WEIGHTS, row.id, row.weights_sha256 or "", _weights_name(row))
        for row in session.scalars(query.order_by(Recipe.id).limit(_MOST))
    ]


def _weights_name(recipe: Recipe) -> str:
    named = recipe.parameters.get("model", recipe.parameters.get("weights"))
    return str(named or f"{recipe.stage.value} recipe {recipe.id}")


def _each_once(found: Iterable[_Candidate]) -> list[_Candidate]:
    """One candidate of each kind; of image files each, for they are of several images."""
    kinds: dict[Any, list[_Candidate]] = defaultdict(list)
    for item in found:
        kinds[(item.kind, item.key if item.kind == IMAGE_FILE else None)].append(item)
    return [items[0] for items in kinds.values()]


def _known(session: Session, item: _Candidate) -> KnownFile:
    if item.kind == IMAGE_FILE:
        return _known_image_file(session, item)
    if item.kind == TABLE:
        return _known_table(session, item)
    if item.kind == WEIGHTS:
        return _known_weights(session, item)
    return _known_artifact(session, item)


def _known_image_file(session: Session, item: _Candidate) -> KnownFile:
    file = session.get_one(ImageFile, item.key)
    query = select(Plate.barcode, Well.name, Image.site, Image.core_name)
    query = query.join(Well, Well.plate_id == Plate.id).join(Image, Image.well_id == Well.id)
    barcode, well, site, core = session.execute(query.where(Image.id == file.image_id)).one()
    return KnownFile(
        *(item.kind, item.key, file.name, file.uri, item.sha256, file.size_bytes),
        about=(f"channel {file.channel} of image {barcode}/{well}/{site} {core}",),
        runs=(),
        came=came_of_images(session, select(Image.id).where(Image.id == file.image_id)),
    )


def _known_table(session: Session, item: _Candidate) -> KnownFile:
    query = select(IngestFile).where(IngestFile.sha256 == item.sha256).order_by(IngestFile.id)
    rows = session.scalars(query).all()
    run_ids = [row.run_id for row in rows]
    about = tuple(
        f"run {row.run_id} read it as {row.layout}: {row.n_rows:,} rows, {row.n_created:,} new, "
        f"{row.n_updated:,} updated, {row.n_unchanged:,} unchanged, {row.n_refused:,} refused"
        for row in rows
    )
    relabelled = came_of_images(session, images_of_wells_changed_by(run_ids))
    of_them = (Came(f"{c.what} of these wells", c.count, c.runs, c.names) for c in relabelled)
    return KnownFile(
        *(item.kind, item.key, item.name, None, item.sha256, rows[0].size_bytes),
        about=about,
        runs=_runs(session, run_ids),
        came=(*came_of_runs(session, run_ids), *of_them),
    )


def _known_weights(session: Session, item: _Candidate) -> KnownFile:
    recipes = recipes_with_weights(session, item.sha256)
    ids = [recipe.id for recipe in recipes]
    runs = session.scalars(select(Run.id).where(Run.recipe_id.in_(ids)).order_by(Run.id)).all()
    about = tuple(
        f"{recipe.stage.value} recipe {recipe.id} ({recipe.fingerprint[:12]}) uses it"
        for recipe in recipes
    )
    return KnownFile(
        *(item.kind, item.key, item.name, None, item.sha256, None),
        about=about,
        runs=_runs(session, runs),
        came=came_of_recipes(session, ids),
    )


def _known_artifact(session: Session, item: _Candidate) -> KnownFile:
    file = session.get_one(Artifact, item.key)
    written = select(RunArtifact.run_id).where(RunArtifact.artifact_id == file.id)
    by = set(session.scalars(written))
    about, came = _of_artifact(session, file, by)
    return KnownFile(
        *(item.kind, item.key, item.name, file.path, file.sha256, file.size_bytes),
        about=about,
        runs=_runs(session, by),
        came=came,
    )


def _of_artifact(
    session: Session, file: Artifact, by: set[int]
) -> tuple[tuple[str, ...], tuple[Came, ...]]:
    """What an artifact is of, and what came of it; the runs that wrote it are added to ``by``."""
    if file.kind in (ArtifactKind.MASK, ArtifactKind.FLOW):
        column = {
            ArtifactKind.MASK: Segmentation.mask_artifact_id,
            ArtifactKind.FLOW: Segmentation.flow_artifact_id,
        }[file.kind]
        rows = session.scalars(select(Segmentation).where(column == file.id).limit(_MOST)).all()
        by.update(row.run_id for row in rows)
        images = [row.image_id for row in rows]
        names = select(Plate.barcode, Image.core_name).join(Well, Well.plate_id == Plate.id)
        names = names.join(Image, Image.well_id == Well.id).where(Image.id.in_(images))
        about = tuple(f"of image {plate}/{core}" for plate, core in session.execute(names))
        chosen = select(Image.id).where(Image.id.in_(images))
        return about, came_of_images(session, chosen)
    if file.kind is ArtifactKind.FEATURES:
        return _of_features(session, file, by)
    return (), came_of_runs(session, by)


def _of_features(
    session: Session, file: Artifact, by: set[int]
) -> tuple[tuple[str, ...], tuple[Came, ...]]:
    query = select(FeatureFile, FeatureSet).join(
        FeatureSet, FeatureSet.id == FeatureFile.feature_set_id
    )
    rows = session.execute(query.where(FeatureFile.artifact_id == file.id)).all()
    by.update(part.run_id for part, _ in rows)
    about = tuple(
        f"of feature set {found.name}: {part.n_rows:,} cells, "
        f"ids {part.first_cell_id} to {part.last_cell_id}"
        for part, found in rows
    )
    return about, came_of_recipes(session, [found.recipe_id for _, found in rows])


def _runs(session: Session, ids: Iterable[int]) -> tuple[RunFact, ...]:
    query = select(Run).where(Run.id.in_(sorted(set(ids)))).order_by(Run.id)
    return tuple(run_fact(run) for run in session.scalars(query))
