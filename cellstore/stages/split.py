"""Split: who trains, who validates, who tests; as rows that never change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Select, and_, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from ..config import Selection, SplitParams, as_parameters
from ..db.models import (
    Image,
    ImageFile,
    Label,
    Plate,
    Recipe,
    Run,
    Split,
    SplitMember,
    Treatment,
    Well,
)
from ..db.statements import insert_new
from ..errors import UnknownNameError, UserInputError
from ..extras import need
from ..ops.leaks import Finding, Member, SplitCheck, leaks
from ..ops.splitting import Assignment, LeftOut, SplitImage, grouped_split, published_split
from ..reading.cells import as_text
from ..reading.flags import check_plates, count_unseen, find_qc_run, is_unflagged_image
from ..runs import RecipeSpec, Workspace, find_split, images_of, register, running
from ..terms import GroupLevel, LabelField, Stage, Subset

VERSION = 1
PUBLISHED = "published"
GROUPED = "grouped"
PROTOCOLS = (GROUPED, PUBLISHED)


@dataclass(frozen=True)
class SplitResult:
    """A split as it stands.

    ``counts`` are images by side; ``left_out`` says what is on no side and why. ``leaking``: wells
    that train also test, so scores are those of wells already seen. ``created``: by this call,
    in run ``run_id``.
    """

    name: str
    protocol: str
    field: str
    group_level: str
    seed: int
    fingerprint: str
    created: bool
    frozen: bool
    leaking: bool
    classes: int
    images: int
    counts: dict[str, int]
    wells_on_both_sides: int
    left_out: dict[str, Any]
    query: str
    run_id: int | None = None


@dataclass(frozen=True)
class CheckResult:
    """What a split gives away. ``findings`` is empty where nothing was found."""

    split: str
    protocol: str
    images: int
    wells: int
    wells_on_both_sides: int
    labels: int
    labels_on_both_sides: int
    plates_on_both_sides: int
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class _Candidate:
    """An image that could be in a split; ``key`` names it whatever the store."""

    image_id: int
    key: tuple[str, int, int, int, int, int]
    well: str
    label: str

    def group(self, level: GroupLevel) -> str:
        if level is GroupLevel.PLATE:
            return self.key[0]
        if level is GroupLevel.WELL:
            return f"{self.key[0]}/{self.well}"
        return "/".join(map(str, self.key))


@dataclass(frozen=True)
class _Drawn:
    """A split before it is written, its members in the order of their keys."""

    params: SplitParams
    query: str
    members: tuple[tuple[_Candidate, Subset], ...]
    spec: RecipeSpec
    fingerprint: str
    left_out: dict[str, Any]


def create_split(workspace: Workspace, name: str, params: SplitParams | None = None) -> SplitResult:
    """Assign the images that have a treatment to sides, and keep that under ``name``.

    The same images and parameters give the same split in every store. Protocol ``published``
    works by image, so wells are on both sides; ``grouped`` keeps groups together.

    Raises:
        UserInputError: the name is taken by another split, or the images cannot be split.
        UnknownNameError: no such protocol, field or plate.
        MissingExtraError: the published protocol needs scikit-learn.

    """
    name, params = _checked_name(name), _checked(params or SplitParams())
    drawn = _draw(workspace, params)
    with workspace.database.begin() as session:
        same = _existing(session, name, drawn)
        if same is not None:
            return _result(session, same)
        recipe = register(session, drawn.spec)
    with running(workspace.database, recipe, seed=params.seed, query=drawn.query) as run:
        split = _insert(workspace, name, drawn, recipe)
        run.result = {"split": name, "images": len(drawn.members)}
    with workspace.database.read() as session:
        return replace(_result(session, split), created=True, run_id=run.id)


def show_split(workspace: Workspace, name: str | None = None) -> SplitResult:
    """Return a split as it stands (default: the latest).

    Raises:
        UnknownNameError: there is none of that name.

    """
    with workspace.database.read() as session:
        return _result(session, find_split(session, name))


def check_split(workspace: Workspace, name: str | None = None) -> CheckResult:
    """Look for wells, files and spellings on both sides, and for classes on one side only.

    Raises:
        UnknownNameError: there is no split of that name.

    """
    with workspace.database.read() as session:
        split = find_split(session, name)
        found: SplitCheck = leaks(_members(session, split.id))
        return CheckResult(
            split.name,
            split.protocol,
            found.n_images,
            found.n_wells,
            found.wells_on_both_sides,
            found.n_labels,
            found.labels_on_both_sides,
            found.plates_on_both_sides,
            found.findings,
        )


def _checked_name(name: str) -> str:
    if not name.strip() or len(name) > 255 or not name.isprintable():
        raise UserInputError("A split needs a name of 1 to 255 printable characters.")
    return name.strip()


def _checked(params: SplitParams) -> SplitParams:
    if params.protocol not in PROTOCOLS:
        raise UnknownNameError.of("split protocol", params.protocol, PROTOCOLS)
    if params.field not in list(LabelField):
        raise UnknownNameError.of("label field", params.field, list(LabelField))
    if params.group_level not in list(GroupLevel):
        raise UnknownNameError.of("group level", params.group_level, list(GroupLevel))
    known = replace(
        params, field=LabelField(params.field), group_level=GroupLevel(params.group_level)
    )
    if params.protocol == PUBLISHED:
        return replace(known, group_level=GroupLevel.IMAGE, validation_size=0.0)
    return known


def _draw(workspace: Workspace, params: SplitParams) -> _Drawn:
    with workspace.database.read() as session:
        chosen = images_of(session, Selection(plates=params.plates))
        qc = _qc_run(session, params, chosen)
        query = _candidates_query(params, qc)
        pool = _pool(session, query)
        left_out = _counts_left_out(session, chosen, params)
        if qc is not None:
            left_out |= _counts_flagged(session, params, qc, len(pool), chosen)
        inputs = (session.get_one(Recipe, qc.recipe_id),) if qc else ()
    if not pool:
        raise UserInputError(_nothing_to_split(params, left_out))
    assignment = _assign(pool, params)
    parameters = _parameters(params, qc) | {"images": _digest_of(pool)}
    members = tuple((pool[index], side) for index, side in sorted(assignment.subsets.items()))
    return _Drawn(
        params,
        as_text(query),
        members,
        RecipeSpec(Stage.SPLIT, VERSION, parameters, inputs=inputs),
        _fingerprint(params, members),
        left_out | _left_out_by(assignment),
    )


def _parameters(params: SplitParams, qc: Run | None) -> dict[str, Any]:
    parameters = as_parameters(params)
    del parameters["leave_out_flagged"]  # unless it is asked for, a split is as it always was
    return parameters if qc is None else {**parameters, "leave_out_flagged": qc.id}


def _counts_flagged(
    session: Session, params: SplitParams, qc: Run, unflagged: int, chosen: Select[int]
) -> dict[str, int]:
    everything = _candidates_query(params, None).subquery()
    number = session.scalar(select(func.count()).select_from(everything)) or 0
    unseen = count_unseen(session, qc, chosen.where(Image.content_sha256.is_not(None)))
    return {"flagged": number - unflagged, "qc_run": qc.id, "unseen_by_qc": unseen}


def _qc_run(session: Session, params: SplitParams, chosen: Select[int]) -> Run | None:
    if params.leave_out_flagged is None:
        return None
    run = find_qc_run(session, params.leave_out_flagged)
    seen = select(Image.id).where(Image.id.in_(chosen), Image.content_sha256.is_not(None))
    check_plates(session, run, seen)
    return run


def _candidates_query(params: SplitParams, qc: Run | None) -> Select[Any]:
    label = getattr(Treatment, params.field.value)
    query = (
        select(Image.id.label("image_id"), Plate.barcode, Well.row, Well.column)
        .add_columns(Well.name.label("well"), Image.site, Image.plane, Image.time_point)
        .add_columns(label.label("label"))
        .select_from(Image)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .join(Treatment, Treatment.id == Well.treatment_id)
        .where(label.is_not(None))
    )
    if params.plates:
        query = query.where(Plate.barcode.in_(sorted(params.plates)))
    if not params.allow_missing:
        query = query.where(Image.content_sha256.is_not(None))
    if qc is not None:
        query = query.where(is_unflagged_image(qc.id))
    return query


def _pool(session: Session, query: Select[Any]) -> list[_Candidate]:
    """The images in an order that does not depend on ids, so that every store draws alike."""
    found = [
        _Candidate(
            row.image_id,
            (row.barcode, row.row, row.column, row.site, row.plane, row.time_point),
            row.well,
            row.label,
        )
        for row in session.execute(query)
    ]
    return sorted(found, key=lambda item: item.key)


def _counts_left_out(session: Session, chosen: Select[int], params: SplitParams) -> dict[str, int]:
    label = getattr(Treatment, params.field.value)
    base = (
        select(func.count(Image.id))
        .select_from(Image)
        .join(Well, Well.id == Image.well_id)
        .outerjoin(Treatment, Treatment.id == Well.treatment_id)
        .where(Image.id.in_(chosen))
    )
    missing = and_(label.is_not(None), Image.content_sha256.is_(None))
    return {
        "without_label": session.scalar(base.where(label.is_(None))) or 0,
        "missing_files": 0 if params.allow_missing else session.scalar(base.where(missing)) or 0,
    }


def _nothing_to_split(params: SplitParams, left_out: Mapping[str, int]) -> str:
    if left_out["missing_files"]:
        return (
            f"All {left_out['missing_files']} images with a {params.field.value} miss files. "
            "Ingest again with --images, or split without the pixels with --allow-missing."
        )
    if left_out.get("flagged"):
        return (
            f"All {left_out['flagged']} images are flagged by quality-control run "
            f"{left_out['qc_run']}. Split without --leave-out-flagged."
        )
    if left_out["without_label"]:
        return (
            f"None of the {left_out['without_label']} images has a {params.field.value}. Ingest a "
            "table that has it, or choose another --field."
        )
    return "There are no images to split. Run: cellstore ingest"


def _assign(pool: Sequence[_Candidate], params: SplitParams) -> Assignment:
    images = [
        SplitImage(index, item.label, item.group(params.group_level))
        for index, item in enumerate(pool)
    ]
    if params.protocol == PUBLISHED:
        need("train")
        return published_split(images, params.seed, params.test_size)
    return grouped_split(images, params.seed, params.test_size, params.validation_size)


def _digest_of(pool: Iterable[_Candidate]) -> str:
    digest = hashlib.sha256()
    for item in pool:
        digest.update(repr((item.key, item.well, item.label)).encode())
    return digest.hexdigest()


def _fingerprint(params: SplitParams, rows: Iterable[tuple[_Candidate, Subset]]) -> str:
    digest = hashlib.sha256(repr((params.protocol, params.field.value, params.seed)).encode())
    digest.update(params.group_level.value.encode())
    for item, side in rows:
        digest.update(repr((item.key, item.label, side.value)).encode())
    return digest.hexdigest()


def _left_out_by(assignment: Assignment) -> dict[str, Any]:
    classes = [_class_left_out(item) for item in assignment.left_out]
    cut = {
        label: {"before": before, "after": after}
        for label, (before, after) in assignment.downsampled.items()
    }
    return {"classes": classes, "downsampled": cut}


def _class_left_out(item: LeftOut) -> dict[str, Any]:
    return {"label": item.label, "images": len(item.image_ids), "reason": item.reason}


def _existing(session: Session, name: str, drawn: _Drawn) -> Split | None:
    found = session.scalars(select(Split).where(Split.name == name)).one_or_none()
    if found is not None and found.fingerprint != drawn.fingerprint:
        raise UserInputError(
            f"There is another split {name!r} already, and a split never changes. "
            "Choose another name."
        )
    return found


def _insert(workspace: Workspace, name: str, drawn: _Drawn, recipe: Recipe) -> Split:
    try:
        with workspace.database.begin() as session:
            split = _new_split(name, drawn, recipe)
            session.add(split)
            session.flush()
            _insert_members(session, split.id, drawn)
            return split
    except IntegrityError as error:
        raise UserInputError(
            f"Another program made a split {name!r} at this moment. Choose another name."
        ) from error


def _new_split(name: str, drawn: _Drawn, recipe: Recipe) -> Split:
    return Split(
        name=name,
        recipe_id=recipe.id,
        protocol=drawn.params.protocol,
        field=drawn.params.field,
        group_level=drawn.params.group_level,
        seed=drawn.params.seed,
        query=drawn.query,
        fingerprint=drawn.fingerprint,
        left_out=drawn.left_out,
        created_at=datetime.now(UTC),
        frozen_at=None,
    )


def _insert_members(session: Session, split_id: int, drawn: _Drawn) -> None:
    field = drawn.params.field
    values = sorted({item.label for item, _ in drawn.members})
    insert_new(session, Label, [{"field": field, "value": value} for value in values])
    known = select(Label.value, Label.id).where(Label.field == field)
    ids = dict(session.execute(known).all())
    rows = [
        {
            "split_id": split_id,
            "image_id": item.image_id,
            "subset": side,
            "label_id": ids[item.label],
        }
        for item, side in drawn.members
    ]
    insert_new(session, SplitMember, rows)


def _result(session: Session, split: Split) -> SplitResult:
    mine = SplitMember.split_id == split.id
    sides = select(SplitMember.subset, func.count()).where(mine).group_by(SplitMember.subset)
    found = dict(session.execute(sides).all())
    classes = select(func.count(SplitMember.label_id.distinct())).where(mine)
    shared = _wells_on_both_sides(session, split.id)
    return SplitResult(
        name=split.name,
        protocol=split.protocol,
        field=split.field.value,
        group_level=split.group_level.value,
        seed=split.seed,
        fingerprint=split.fingerprint,
        created=False,
        frozen=split.frozen_at is not None,
        leaking=shared > 0,
        classes=session.scalar(classes) or 0,
        images=sum(found.values()),
        counts={side.value: found.get(side, 0) for side in Subset},
        wells_on_both_sides=shared,
        left_out=split.left_out,
        query=split.query,
    )


def _wells_on_both_sides(session: Session, split_id: int) -> int:
    shared = (
        select(Image.well_id)
        .join(SplitMember, SplitMember.image_id == Image.id)
        .where(SplitMember.split_id == split_id)
        .group_by(Image.well_id)
        .having(func.count(SplitMember.subset.distinct()) > 1)
    )
    return session.scalar(select(func.count()).select_from(shared.subquery())) or 0


def _members(session: Session, split_id: int) -> list[Member]:
    digests = _digests(session, split_id)
    query = (
        select(SplitMember.image_id, SplitMember.subset, Label.value, Well.name.label("well"))
        .add_columns(Plate.barcode, Treatment.pert_iname)
        .join(Label, Label.id == SplitMember.label_id)
        .join(Image, Image.id == SplitMember.image_id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .outerjoin(Treatment, Treatment.id == Well.treatment_id)
        .where(SplitMember.split_id == split_id)
    )
    return [
        Member(
            row.image_id,
            row.subset,
            row.value,
            row.well,
            row.barcode,
            digests.get(row.image_id, ()),
            row.pert_iname,
        )
        for row in session.execute(query)
    ]


def _digests(session: Session, split_id: int) -> dict[int, tuple[str, ...]]:
    query = (
        select(ImageFile.image_id, ImageFile.sha256)
        .join(SplitMember, SplitMember.image_id == ImageFile.image_id)
        .where(SplitMember.split_id == split_id)
    )
    found: dict[int, tuple[str, ...]] = {}
    for image_id, sha256 in session.execute(query):
        if sha256 is not None:
            found[image_id] = (*found.get(image_id, ()), sha256)
    return found
