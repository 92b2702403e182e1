"""What a split gives away: of the store, or of the tables of others."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Select, and_, delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from ..analysis.leaks import (
    Compound,
    Finding,
    LeakSeverity,
    Member,
    SameCompounds,
    SplitCheck,
    leaks,
)
from ..analysis.splitting import (
    MEDIAN,
    SECOND_LARGEST,
    Assignment,
    Cap,
    ExcludedClass,
    SplitImage,
    balanced,
    cut_by_groups,
    enough,
    folds,
    grouped_split,
    named_split,
    published_split,
)
from ..config import Selection, SplitParams, as_parameters
from ..db.bulk import in_lists, insert_new
from ..db.events import Change, record_events
from ..db.fields import check_field, field_column, of_parts
from ..enums import PERTURBATION, TARGET, GroupLevel, Stage, Subset
from ..errors import UnknownNameError, UserInputError
from ..extras import need
from ..io.split_tables import SplitRow, SplitTables, check_not_empty, read_split_tables
from ..jobs.lookup import find_split
from ..jobs.runs import RecipeSpec, register, running
from ..jobs.selection import images_of, is_current
from ..jobs.workspace import Workspace
from ..models import (
    Image,
    ImageFile,
    Label,
    Perturbation,
    Plate,
    Recipe,
    Run,
    Segmentation,
    Split,
    SplitGroup,
    SplitMember,
    Treatment,
    TreatmentPart,
    Well,
)
from ..query.cells import as_text, last_with_masks
from ..query.exclusions import check_plates, count_unseen, find_qc_run, image_counts

PUBLISHED = "published"
GROUPED = "grouped"
IMPORTED = "imported"


@dataclass(frozen=True)
class SplitResult:
    """A split as it stands.

    ``counts`` are images by subset; ``excluded``: what is in no subset and why. ``leaking``: wells
    that train also test, so scores are those of wells already seen. ``created``: by this call,
    in run ``run_id``. ``family`` and ``fold``: which cross-validation it is a fold of.
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
    wells_in_both_subsets: int
    excluded: dict[str, Any]
    query: str
    run_id: int | None = None
    family: str | None = None
    fold: int | None = None


@dataclass(frozen=True)
class SplitLine:
    """A split in a list: images by subset, and how many runs name it."""

    name: str
    protocol: str
    group_level: str
    field: str
    train: int
    validation: int
    test: int
    runs: int
    frozen: bool
    created_at: datetime
    family: str | None
    fold: int | None


@dataclass(frozen=True)
class Deleted:
    """Splits that are gone, or would go: one, or all folds of a family."""

    names: tuple[str, ...]
    images: int


@dataclass(frozen=True)
class CheckResult:
    """What a split gives away. ``findings`` is empty where nothing was found.

    ``split`` is its name, or the names of the tables that were looked at: then ``rows`` counts
    their rows that were, ``refused`` the lines that could not be used, and ``images`` is 0.
    ``unseen``: images whose files the store has not seen, so that their bytes were not compared.
    """

    split: str
    protocol: str
    group_level: str
    images: int
    wells: int
    wells_in_both_subsets: int
    labels: int
    labels_in_both_subsets: int
    plates_in_both_subsets: int
    leaks: int
    warnings: int
    findings: tuple[Finding, ...]
    unseen: int = 0
    rows: int = 0
    refused: int = 0


PROTOCOLS = (GROUPED, PUBLISHED)
UNITS = ("image", "cell")
FIXED_BY_PUBLISHED = {
    "test_plates": "--test-plates",
    "validation_plates": "--validation-plates",
    "folds": "--folds",
    "downsample": "--downsample",
    "downsample_by": "--downsample-by",
}


def checked_name(name: str, more: int = 0) -> str:
    """Return the name of a split, to which ``more`` characters can be added.

    Raises:
        UserInputError: it is empty, too long, or not printable.
    """
    if not name.strip() or len(name) + more > 255 or not name.isprintable():
        raise UserInputError("A split needs a name of 1 to 255 printable characters.")
    return name.strip()


def checked(params: SplitParams) -> SplitParams:
    """Return ``params`` with what follows from them, as they are kept.

    Raises:
        UnknownNameError: no such protocol, field, level or unit.
        UserInputError: they contradict each other.
    """
    _known("split protocol", params.protocol, PROTOCOLS)
    _known("unit of --downsample-by", params.downsample_by, UNITS)
    known = with_known_words(params)
    if params.protocol == PUBLISHED:
        _check_published(params)
        return replace(known, group_level=GroupLevel.IMAGE, validation_size=0.0)
    _check_level(known)
    caps(known)
    if known.folds is not None:
        share = 1 / known.folds if known.folds > 0 else 0.0
        validation = share if known.validation_size else 0.0
        return replace(known, test_size=share, validation_size=validation)
    return known


def with_known_words(params: SplitParams) -> SplitParams:
    """Return ``params`` with its group level as what it names.

    Raises:
        UnknownNameError: there is no such level.
    """
    _known("group level", params.group_level, list(GroupLevel))
    return replace(params, group_level=GroupLevel(params.group_level))


def _known(kind: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UnknownNameError.of(kind, value, known)


def _check_published(params: SplitParams) -> None:
    usual = {item.name: item.default for item in fields(SplitParams)}
    for name, option in FIXED_BY_PUBLISHED.items():
        if getattr(params, name) != usual[name]:
            raise UserInputError(
                f"The published protocol draws as the study did, without {option}. "
                "Split by image without it: --group image."
            )


def _check_level(params: SplitParams) -> None:
    if params.group_level is GroupLevel.PERTURBATION and params.field == PERTURBATION:
        raise UserInputError(
            "By perturbation, each compound is in one subset only, so compounds cannot be the "
            "classes: none would be both trained and tested. Predict something coarser: --field "
            "target."
        )
    named = params.test_plates or params.validation_plates
    if not named:
        return
    if params.group_level is not GroupLevel.PLATE:
        raise UserInputError("Plates for a subset need a split by whole plates: --group plate.")
    if params.folds is not None:
        raise UserInputError("With --folds every plate is tested in turn: name no plates.")
    if not params.test_plates:
        raise UserInputError("Name the plates that test, too: --test-plates A,B.")


def caps(params: SplitParams) -> tuple[Cap, ...] | None:
    """Return how the classes are to be cut.

    Raises:
        UserInputError: one says neither a number nor a word that is known.
    """
    if params.downsample is None:
        return None
    return tuple(Cap(label, _limit(label, text)) for label, text in params.downsample)


def _limit(label: str, text: str) -> int | str:
    if text in (SECOND_LARGEST, MEDIAN):
        return text
    if text.isdecimal() and 0 < int(text) < 2**31:
        return int(text)
    raise UserInputError(
        f"Cut {label!r} to {text!r}? Say --downsample {label}=N with a number, "
        f"{label}={SECOND_LARGEST} or {label}={MEDIAN}."
    )


CELL = "cell"


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image that could be in a split; ``key`` names it whatever the store.

    ``compound`` is what all treatments share that are the same compound; asked for by treatment.
    """

    image_id: int
    key: tuple[str, int, int, int, int, int]
    well: str
    label: str
    compound: str = ""
    cells: int = 0

    def group(self, level: GroupLevel) -> str:
        """Return the name of what it must stay with."""
        match level:
            case GroupLevel.PLATE:
                return self.key[0]
            case GroupLevel.WELL:
                return f"{self.key[0]}/{self.well}"
            case GroupLevel.PERTURBATION:
                return self.compound
        return "/".join(map(str, self.key))


@dataclass(frozen=True)
class Pool:
    """All candidates in the order of their keys, the query that found them, and who is not there.

    ``qc``: the run whose flagged images are excluded; ``segment``: the recipe whose cells count.
    """

    candidates: tuple[Candidate, ...]
    query: Select[Any]
    excluded: Mapping[str, int]
    qc: Run | None = None
    segment_id: int | None = None

    @property
    def digest(self) -> str:
        """The SHA-256 of what the split is drawn from."""
        digest = hashlib.sha256()
        for item in self.candidates:
            digest.update(repr((item.key, item.well, item.label)).encode())
            if item.compound or item.cells:
                digest.update(repr((item.compound, item.cells)).encode())
        return digest.hexdigest()


def read_pool(session: Session, params: SplitParams, segment_id: int | None) -> Pool:
    """Read the images that can be split.

    Raises:
        UserInputError: there are none, or their cells cannot be counted.
        UnknownNameError: no such field, plate, column or quality-control run.

    """
    check_field(session, params.field)
    chosen = images_of(session, Selection(plates=params.plates, where=params.where))
    qc = _qc_run(session, params, chosen)
    query = _candidates_query(params, qc)
    found = _candidates(session, query)
    excluded = _counts_excluded(session, chosen, params)
    if qc is not None:
        excluded |= _counts_flagged(session, params, qc, len(found), chosen)
    if not found:
        raise UserInputError(_nothing_to_split(params, excluded))
    if params.group_level is GroupLevel.PERTURBATION:
        found = _with_compounds(session, query, found)
    if segment_id is not None:
        found = _with_cells(session, query, found, segment_id)
    # Not by id, so that every store draws alike.
    ordered = tuple(sorted(found, key=lambda item: item.key))
    return Pool(ordered, query, excluded, qc, segment_id)


def _qc_run(session: Session, params: SplitParams, chosen: Select[int]) -> Run | None:
    if params.exclude_flagged is None:
        return None
    run = find_qc_run(session, params.exclude_flagged)
    seen = select(Image.id).where(Image.id.in_(chosen), Image.content_sha256.is_not(None))
    check_plates(session, run, seen)
    return run


def _candidates_query(params: SplitParams, qc: Run | None) -> Select[Any]:
    label = field_column(params.field)
    query = (
        select(Image.id.label("image_id"), Plate.barcode, Well.well_row, Well.well_column)
        .add_columns(Well.name.label("well"), Image.site, Image.plane, Image.time_point)
        .add_columns(label.label("label"))
        .select_from(Image)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .outerjoin(Treatment, Treatment.id == Well.treatment_id)
        .where(label.is_not(None), image_counts(None if qc is None else qc.id))
    )
    if params.plates:
        query = query.where(Plate.barcode.in_(sorted(params.plates)))
    if params.where is not None:
        from ..jobs.conditions import condition  # its parser loads slowly

        query = query.where(condition(params.where))
    if not params.allow_missing:
        query = query.where(Image.content_sha256.is_not(None))
    return query


def _candidates(session: Session, query: Select[Any]) -> list[Candidate]:
    return [
        Candidate(
            row.image_id,
            (row.barcode, row.well_row, row.well_column, row.site, row.plane, row.time_point),
            row.well,
            row.label,
        )
        for row in session.execute(query)
    ]


_COMPOUND = (
    Treatment.name,
    *(
        of_parts(column).label(column.key)
        for column in (Perturbation.identifier, Perturbation.inchikey, Perturbation.smiles)
    ),
)


def compound_of(treatment: Any) -> Compound:
    """Return what a row with the columns ``_COMPOUND`` says of a compound."""
    return Compound(treatment.name, treatment.identifier, treatment.inchikey, treatment.smiles)


def _with_compounds(
    session: Session, query: Select[Any], found: Iterable[Candidate]
) -> list[Candidate]:
    of_image = query.with_only_columns(Image.id, Treatment.id)
    used = query.with_only_columns(Treatment.id).distinct()
    rows = session.execute(select(Treatment.id, *_COMPOUND).where(Treatment.id.in_(used)))
    compounds = {row.id: compound_of(row) for row in rows}
    same = SameCompounds(compounds.values())
    names = {key: same.group(compound) or "" for key, compound in compounds.items()}
    treatments = dict(session.execute(of_image).all())
    return [replace(item, compound=names[treatments[item.image_id]]) for item in found]


def _with_cells(
    session: Session, query: Select[Any], found: Iterable[Candidate], segment_id: int
) -> list[Candidate]:
    counted = query.with_only_columns(Image.id, Segmentation.n_cells).join(
        Segmentation, and_(is_current(), Segmentation.recipe_id == segment_id)
    )
    cells = dict(session.execute(counted).all())
    images = list(found)
    missing = sum(item.image_id not in cells for item in images)
    if missing:
        raise UserInputError(
            f"{missing} of {len(images)} images have no cells of segment recipe {segment_id} to "
            "count. Run: cellstore segment, or use --downsample-by image."
        )
    return [replace(item, cells=cells[item.image_id]) for item in images]


def _counts_flagged(
    session: Session, params: SplitParams, qc: Run, unflagged: int, chosen: Select[int]
) -> dict[str, int]:
    everything = _candidates_query(params, None).subquery()
    number = session.scalar(select(func.count()).select_from(everything)) or 0
    unseen = count_unseen(session, qc, chosen.where(Image.content_sha256.is_not(None)))
    return {"flagged": number - unflagged, "qc_run": qc.id, "unseen_by_qc": unseen}


def _counts_excluded(session: Session, chosen: Select[int], params: SplitParams) -> dict[str, int]:
    label = field_column(params.field)
    base = (
        select(func.count(Image.id))
        .select_from(Image)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .outerjoin(Treatment, Treatment.id == Well.treatment_id)
        .where(Image.id.in_(chosen))
    )
    missing = and_(label.is_not(None), Image.content_sha256.is_(None))
    return {
        "without_label": session.scalar(base.where(label.is_(None))) or 0,
        "missing_files": 0 if params.allow_missing else session.scalar(base.where(missing)) or 0,
        "annotated": session.scalar(base.where(~image_counts())) or 0,
    }


def _nothing_to_split(params: SplitParams, excluded: Mapping[str, int]) -> str:
    if excluded["missing_files"]:
        return (
            f"All {excluded['missing_files']} images with a {params.field} lack their files. "
            "Ingest again with --images, or split without the pixels with --allow-missing."
        )
    if excluded.get("flagged"):
        return (
            f"All {excluded['flagged']} images are flagged by quality-control run "
            f"{excluded['qc_run']}. Split without --exclude-flagged."
        )
    if excluded["annotated"]:
        return (
            f"All {excluded['annotated']} images are excluded by annotations. Undo some of these, "
            "or choose other images."
        )
    if excluded["without_label"]:
        return (
            f"None of the {excluded['without_label']} images has a {params.field}. Ingest a "
            "table that has it, or choose another --field."
        )
    if params.where is not None:
        return "No image meets the condition of --where. Try it with: cellstore segment --dry-run"
    return "There are no images to split. Run: cellstore ingest"


def find_deletable(workspace: Workspace, name: str) -> Deleted:
    """Return what :func:`delete_split` would delete, without doing it.

    Raises:
        UnknownNameError: there is no split or family of that name.
        UserInputError: a run relies on it.

    """
    with workspace.database.read() as session:
        return _deleted(session, _named(session, name))


def delete_split(workspace: Workspace, name: str) -> Deleted:
    """Delete a split that no run uses, or all folds of a family of that name; all or none.

    Raises:
        UnknownNameError: there is no split or family of that name.
        UserInputError: a run relies on it.

    """
    with workspace.database.begin() as session:
        splits = _named(session, name)
        result = _deleted(session, splits)
        ids = [split.id for split in splits]
        for table in (SplitMember, SplitGroup):
            session.execute(delete(table).where(table.split_id.in_(ids)))
        session.execute(delete(Split).where(Split.id.in_(ids)))
        gone = [
            Change("splits", split.id, {"name": split.name, "fingerprint": split.fingerprint}, None)
            for split in splits
        ]
        record_events(session, gone)
        return result


def _named(session: Session, name: str) -> list[Split]:
    found = list(session.scalars(select(Split).where(Split.name == name)))
    found = found or list(session.scalars(select(Split).where(Split.family == name)))
    if not found:
        known = session.scalars(select(Split.name).order_by(Split.id.desc()))
        raise UnknownNameError.of("split", name, known)
    for split in found:
        _check_unused(session, split)
    return sorted(found, key=lambda split: split.id)


def _check_unused(session: Session, split: Split) -> None:
    runs = session.scalars(select(Run.id).where(Run.split_id == split.id).order_by(Run.id)).all()
    if runs:
        shown = ", ".join(map(str, runs[:5])) + (", ..." if len(runs) > 5 else "")
        who = f"run {shown} relies" if len(runs) == 1 else f"runs {shown} rely"
        raise UserInputError(
            f"The split {split.name!r} stays: {who} on it, and what a network was "
            "trained and tested on must be known as long as the network is."
        )
    if split.frozen_at is not None:
        raise UserInputError(
            f"The split {split.name!r} stays: it was frozen for a run on "
            f"{split.frozen_at:%Y-%m-%d}. Make a new one with: cellstore split create NAME"
        )


def _deleted(session: Session, splits: Sequence[Split]) -> Deleted:
    ids = [split.id for split in splits]
    images = select(func.count()).select_from(SplitMember).where(SplitMember.split_id.in_(ids))
    return Deleted(tuple(split.name for split in splits), session.scalar(images) or 0)


def show_split(workspace: Workspace, name: str | None = None) -> SplitResult:
    """Return a split as it stands (default: the latest).

    Raises:
        UnknownNameError: there is none of that name.

    """
    with workspace.database.read() as session:
        return result_of(session, find_split(session, name))


def list_splits(workspace: Workspace) -> tuple[SplitLine, ...]:
    """Return all splits, the oldest first."""
    with workspace.database.read() as session:
        runs = select(Run.split_id, func.count()).where(Run.split_id.is_not(None))
        used = dict(session.execute(runs.group_by(Run.split_id)).all())
        splits = session.scalars(select(Split).order_by(Split.id)).all()
        return tuple(_line(session, split, used.get(split.id, 0)) for split in splits)


def _line(session: Session, split: Split, runs: int) -> SplitLine:
    counts = counts_of(session, split.id)
    return SplitLine(
        name=split.name,
        protocol=split.protocol,
        group_level=split.group_level.value,
        field=split.field,
        train=counts.get(Subset.TRAIN, 0),
        validation=counts.get(Subset.VALIDATION, 0),
        test=counts.get(Subset.TEST, 0),
        runs=runs,
        frozen=split.frozen_at is not None,
        created_at=split.created_at,
        family=split.family,
        fold=split.fold,
    )


def counts_of(session: Session, split_id: int) -> dict[Subset, int]:
    """Return the images in each subset; by the primary key, so only this split's rows are read."""
    query = select(SplitMember.subset, func.count()).where(SplitMember.split_id == split_id)
    return dict(session.execute(query.group_by(SplitMember.subset)).all())


def result_of(session: Session, split: Split) -> SplitResult:
    """Return what there is to say of a split."""
    found = counts_of(session, split.id)
    mine = SplitMember.split_id == split.id
    classes = select(func.count(SplitMember.label_id.distinct())).where(mine)
    shared = _wells_on_both_sides(session, split.id)
    return SplitResult(
        name=split.name,
        protocol=split.protocol,
        field=split.field,
        group_level=split.group_level.value,
        seed=split.seed,
        fingerprint=split.fingerprint,
        created=False,
        frozen=split.frozen_at is not None,
        leaking=shared > 0,
        classes=session.scalar(classes) or 0,
        images=sum(found.values()),
        counts={side.value: found.get(side, 0) for side in Subset},
        wells_in_both_subsets=shared,
        excluded=split.excluded,
        query=split.query,
        family=split.family,
        fold=split.fold,
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


@dataclass(frozen=True)
class Drawn:
    """A split before it is written, its members in the order of their keys."""

    name: str
    params: SplitParams
    query: str
    members: tuple[tuple[Candidate, Subset], ...]
    excluded: dict[str, Any]
    family: str | None = None
    fold: int | None = None
    imported: bool = False

    @property
    def protocol(self) -> str:
        """How the images were assigned."""
        return IMPORTED if self.imported else self.params.protocol

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of what the split is: its members, their subsets and labels."""
        params = self.params
        digest = hashlib.sha256(repr((self.protocol, params.field, params.seed)).encode())
        digest.update(params.group_level.value.encode())
        for item, side in self.members:
            digest.update(repr((item.key, item.label, side.value)).encode())
        return digest.hexdigest()


def keep(workspace: Workspace, drawn: Sequence[Drawn], spec: RecipeSpec) -> tuple[SplitResult, ...]:
    """Write the splits in one run, all or none; those that are there already stay as they are.

    Raises:
        UserInputError: a name is taken by another split, or the database refuses a split that
            has a group in two subsets.
    """
    with workspace.database.begin() as session:
        there = {item.name: _existing(session, item) for item in drawn}
        _check_family(session, drawn[0])
        missing = [item for item in drawn if there[item.name] is None]
        if not missing:
            return tuple(result_of(session, split) for split in there.values() if split)
        recipe = register(session, spec)
    with running(
        workspace.database, recipe, seed=drawn[0].params.seed, query=drawn[0].query
    ) as run:
        _insert(workspace, missing, recipe)
        run.result = _told(missing)
    new = {item.name for item in missing}
    with workspace.database.read() as session:
        found = select(Split).where(Split.name.in_([item.name for item in drawn]))
        splits = {split.name: split for split in session.scalars(found)}
        results = [result_of(session, splits[item.name]) for item in drawn]
    return tuple(
        replace(item, created=True, run_id=run.id) if item.name in new else item for item in results
    )


def _told(drawn: Sequence[Drawn]) -> dict[str, Any]:
    if len(drawn) == 1 and drawn[0].family is None:
        return {"split": drawn[0].name, "images": len(drawn[0].members)}
    return {"splits": [item.name for item in drawn], "images": len(drawn[0].members)}


def _existing(session: Session, drawn: Drawn) -> Split | None:
    found = session.scalars(select(Split).where(Split.name == drawn.name)).one_or_none()
    if found is not None and (found.fingerprint, found.family) != (drawn.fingerprint, drawn.family):
        raise UserInputError(
            f"There is another split {drawn.name!r} already, and a split never changes. "
            "Choose another name."
        )
    return found


def _check_family(session: Session, drawn: Drawn) -> None:
    """Keep a cross-validation and a split from having one name: each is used by it."""
    taken = Split.family == drawn.name if drawn.family is None else Split.name == drawn.family
    if session.scalar(select(Split.id).where(taken).limit(1)) is not None:
        what = "a cross-validation" if drawn.family is None else "a split"
        raise UserInputError(
            f"There is {what} {drawn.family or drawn.name!r} already. Choose another name."
        )


def _insert(workspace: Workspace, drawn: Iterable[Drawn], recipe: Recipe) -> None:
    try:
        with workspace.database.begin() as session:
            for item in drawn:
                split = _new_split(item, recipe)
                session.add(split)
                session.flush()
                _insert_members(session, split.id, item)
    except IntegrityError as error:
        raise UserInputError(
            "Another program made a split of this name at this moment. Choose another name."
        ) from error


def _new_split(drawn: Drawn, recipe: Recipe) -> Split:
    return Split(
        name=drawn.name,
        recipe_id=recipe.id,
        protocol=drawn.protocol,
        field=drawn.params.field,
        group_level=drawn.params.group_level,
        seed=drawn.params.seed,
        query=drawn.query,
        fingerprint=drawn.fingerprint,
        excluded=drawn.excluded,
        created_at=datetime.now(UTC),
        frozen_at=None,
        family=drawn.family,
        fold=drawn.fold,
    )


def _insert_members(session: Session, split_id: int, drawn: Drawn) -> None:
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


CREATE_VERSION = 1


@dataclass(frozen=True)
class _Drawing:
    """What was drawn: one assignment, or one for each fold."""

    params: SplitParams
    pool: Pool
    assignments: tuple[Assignment, ...]
    spec: RecipeSpec


def create_split(workspace: Workspace, name: str, params: SplitParams | None = None) -> SplitResult:
    """Assign the images that have a treatment to subsets, and keep that under ``name``.

    The same images and parameters give the same split in every store. Protocol ``published``
    works by image, so wells are in both subsets; ``grouped`` keeps groups together.

    Raises:
        UserInputError: the name is taken by another split, or the images cannot be split.
        UnknownNameError: no such protocol, field, plate, class or column.
        MissingExtraError: the published protocol needs scikit-learn.

    """
    name, params = checked_name(name), checked(params or SplitParams())
    if params.folds is not None:
        raise UserInputError("Folds are several splits: make them with create_folds.")
    drawing = _draw(workspace, params)
    (result,) = keep(workspace, _drawn(drawing, [name]), drawing.spec)
    return result


def create_folds(workspace: Workspace, name: str, params: SplitParams) -> tuple[SplitResult, ...]:
    """Make the splits ``NAME-1`` to ``NAME-k`` of a cross-validation, all or none.

    Their test subsets partition the images; of each, the next fold's test subset validates. They
    are one family, and share the images, the classes and what is excluded.

    Raises:
        UserInputError: a name is taken by another split, or the images cannot be split so.
        UnknownNameError: no such protocol, field, plate, class or column.
        MissingExtraError: groups that hold several classes need scikit-learn.

    """
    name, params = checked_name(name, more=5), checked(params)
    if params.folds is None:
        raise UserInputError("Say how many folds there are.")
    drawing = _draw(workspace, params)
    names = [f"{name}-{number}" for number in range(1, params.folds + 1)]
    return keep(workspace, _drawn(drawing, names, name), drawing.spec)


def _drawn(drawing: _Drawing, names: Sequence[str], family: str | None = None) -> list[Drawn]:
    pool, params = drawing.pool, drawing.params
    return [
        Drawn(
            name,
            params,
            as_text(pool.query),
            tuple((pool.candidates[i], side) for i, side in sorted(assignment.subsets.items())),
            {**pool.excluded, **_excluded_by(assignment)},
            family,
            number if family else None,
        )
        for number, (name, assignment) in enumerate(
            zip(names, drawing.assignments, strict=True), start=1
        )
    ]


def _draw(workspace: Workspace, params: SplitParams) -> _Drawing:
    with workspace.database.read() as session:
        segment = last_with_masks(session) if params.downsample_by == CELL else None
        pool = read_pool(session, params, segment.id if segment else None)
        inputs = _inputs(session, pool, segment)
    assignments = _assign(pool, params)
    parameters = _parameters(params, pool) | {"images": pool.digest}
    spec = RecipeSpec(Stage.SPLIT, CREATE_VERSION, parameters, inputs=inputs)
    return _Drawing(params, pool, assignments, spec)


def _inputs(session: Session, pool: Pool, segment: Recipe | None) -> tuple[Recipe, ...]:
    qc = session.get_one(Recipe, pool.qc.recipe_id) if pool.qc else None
    return tuple(recipe for recipe in (qc, segment) if recipe is not None)


def _parameters(params: SplitParams, pool: Pool) -> dict[str, Any]:
    return as_parameters(params) | {"exclude_flagged": pool.qc.id if pool.qc else None}


def _assign(pool: Pool, params: SplitParams) -> tuple[Assignment, ...]:
    images = [
        SplitImage(index, item.label, item.group(params.group_level), item.cells)
        for index, item in enumerate(pool.candidates)
    ]
    out: tuple[ExcludedClass, ...] = ()
    if params.min_images:
        images, out = enough(images, params.min_images)
    cut: dict[str, tuple[int, int]] = {}
    if params.downsample is not None or params.downsample_by == CELL:
        images, cut = balanced(images, params.seed, caps(params), params.downsample_by == CELL)
    elif params.folds is not None:
        images, cut = cut_by_groups(images, params.seed)
    by_default = params.downsample is None and params.downsample_by != CELL
    return tuple(
        replace(
            found,
            excluded=(*out, *found.excluded),
            downsampled={**cut, **found.downsampled},
        )
        for found in _assigned(images, params, balance=by_default)
    )


def _assigned(
    images: Sequence[SplitImage], params: SplitParams, *, balance: bool
) -> list[Assignment]:
    seed, validation = params.seed, params.validation_size
    if params.folds is not None:
        need("train")
        return folds(images, seed, params.folds, validation > 0)
    if params.protocol == PUBLISHED:
        need("train")
        return [published_split(images, seed, params.test_size)]
    if params.test_plates:
        sides = (params.test_plates, params.validation_plates)
        return [named_split(images, seed, *sides, validation)]
    by_class = params.group_level is GroupLevel.PERTURBATION
    return [grouped_split(images, seed, params.test_size, validation, balance, by_class)]


def _excluded_by(assignment: Assignment) -> dict[str, Any]:
    classes = [_class_excluded(item) for item in assignment.excluded]
    cut = {
        label: {"before": before, "after": after}
        for label, (before, after) in assignment.downsampled.items()
    }
    return {"classes": classes, "downsampled": cut}


def _class_excluded(item: ExcludedClass) -> dict[str, Any]:
    return {"label": item.label, "images": len(item.image_ids), "reason": item.reason}


VERSION = 1
SHOWN = 5


@dataclass
class _Matched:
    """What became of the rows: a subset for each image, and what has none."""

    sides: dict[int, tuple[Candidate, Subset]] = field(default_factory=dict)
    without_image: list[str] = field(default_factory=list)
    without_label: set[int] = field(default_factory=set)
    missing_files: set[int] = field(default_factory=set)
    twice: list[str] = field(default_factory=list)


def import_split(
    workspace: Workspace,
    name: str,
    paths: Sequence[Path],
    field: str = PERTURBATION,
    group_level: GroupLevel = GroupLevel.IMAGE,
    allow_missing: bool = False,
) -> SplitResult:
    """Keep the split that tables say (see ``formats.splits``) under ``name``, as ``imported``.

    A row puts in its subset all images that it names: by plate, well and site as far as it says
    them; without a well those of its treatment (``identifier``, else ``pert_iname``), on its plate
    if it says one. Labels are those of the store. ``group_level``: what the split promises to keep
    together, which the database then guards; by default nothing.

    Raises:
        UserInputError: the name is taken; no row has an image; an image is put in two subsets; a
            group is in two subsets and ``group_level`` says it must not be.
        BadTableError: no table says the subsets, or of what.
        UnknownNameError: there is no such field or group level.

    """
    name = checked_name(name)
    params = with_known_words(SplitParams(field=field, group_level=group_level))
    tables = read_split_tables([Path(path) for path in paths])
    check_not_empty(tables)
    with workspace.database.read() as session:
        check_field(session, params.field)
        matched = _match(session, tables, params.field, allow_missing)
    _check(matched, params.field)
    members = tuple(sorted(matched.sides.values(), key=lambda item: item[0].key))
    excluded = _excluded(tables, matched)
    drawn = Drawn(name, params, _query(name), members, excluded, imported=True)
    parameters = {
        "protocol": IMPORTED,
        "field": params.field,
        "group_level": params.group_level.value,
        "files": dict(tables.digests),
    }
    parameters["split"] = drawn.fingerprint
    (result,) = keep(workspace, [drawn], RecipeSpec(Stage.SPLIT, VERSION, parameters))
    return result


def _query(name: str) -> str:
    members = select(SplitMember.image_id).add_columns(SplitMember.subset, SplitMember.label_id)
    return as_text(members.join(Split, Split.id == SplitMember.split_id).where(Split.name == name))


def _match(session: Session, tables: SplitTables, field: str, allow_missing: bool) -> _Matched:
    matched = _Matched()
    barcodes = list(session.scalars(select(Plate.barcode).order_by(Plate.id)))
    by_plate: dict[str, list[SplitRow]] = defaultdict(list)
    by_treatment: list[SplitRow] = []
    for row in tables.rows:
        if row.well is None:
            by_treatment.append(row)
        else:
            by_plate[_plate_of(row, barcodes)].append(row)
    for barcode, rows in by_plate.items():
        found = _on_plate(session, barcode, field)
        for row in rows:
            wanted = [c for c in found.get(row.well, ()) if row.site in (None, c[0].key[3])]
            _take(matched, row, wanted, allow_missing)
    for rows in in_lists(by_treatment):
        _match_treatments(session, matched, rows, field, allow_missing)
    return matched


_Found = tuple[Candidate, bool, str | None, str]
"""An image, whether its files are here, and the identifier and the name of its treatment."""


def _plate_of(row: SplitRow, barcodes: Sequence[str]) -> str:
    if row.plate is not None:
        return row.plate
    if len(barcodes) == 1:
        return barcodes[0]
    raise UserInputError(
        f"{row.where}: well {row.well} of which plate? The store has {len(barcodes)} plates, and "
        "the table no column 'plate'. Add it."
    )


def _images(field: str) -> Select[Any]:
    label = field_column(field)
    return (
        select(Image.id, Image.site, Image.plane, Image.time_point, Image.content_sha256)
        .add_columns(Plate.barcode, Well.well_row, Well.well_column, Well.name.label("well"))
        .add_columns(of_parts(Perturbation.identifier).label("identifier"))
        .add_columns(Treatment.name, label.label("label"))
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .outerjoin(Treatment, Treatment.id == Well.treatment_id)
    )


def _found(session: Session, query: Select[Any]) -> Iterator[_Found]:
    for row in session.execute(query):
        key = (row.barcode, row.well_row, row.well_column, row.site, row.plane, row.time_point)
        item = Candidate(row.id, key, row.well, row.label or "")
        yield item, row.content_sha256 is not None, row.identifier, row.name or ""


def _on_plate(session: Session, barcode: str, field: str) -> dict[str | None, list[_Found]]:
    wells: dict[str | None, list[_Found]] = defaultdict(list)
    for found in _found(session, _images(field).where(Plate.barcode == barcode)):
        wells[found[0].well].append(found)
    return wells


def _match_treatments(
    session: Session,
    matched: _Matched,
    rows: Sequence[SplitRow],
    field: str,
    allow_missing: bool,
) -> None:
    identifiers = {row.identifier for row in rows if row.identifier is not None}
    names = {row.name for row in rows if row.identifier is None}
    by_key: dict[tuple[str, str | None], list[_Found]] = defaultdict(list)
    sampled = (
        select(TreatmentPart.treatment_id)
        .join(Perturbation, Perturbation.id == TreatmentPart.perturbation_id)
        .where(Perturbation.identifier.in_(identifiers))
    )
    for found in _found(session, _images(field).where(Treatment.id.in_(sampled))):
        by_key["identifier", found[2]].append(found)
    for found in _found(session, _images(field).where(Treatment.name.in_(names))):
        by_key["name", found[3]].append(found)
    for row in rows:
        key = ("name", row.name) if row.identifier is None else ("identifier", row.identifier)
        wanted = [c for c in by_key.get(key, ()) if row.plate in (None, c[0].key[0])]
        _take(matched, row, wanted, allow_missing)


def _take(matched: _Matched, row: SplitRow, found: Iterable[_Found], allow_missing: bool) -> None:
    some = False
    for item, here, _, _ in found:
        some = True
        if not item.label:
            matched.without_label.add(item.image_id)
        elif not here and not allow_missing:
            matched.missing_files.add(item.image_id)
        elif matched.sides.setdefault(item.image_id, (item, row.subset))[1] is not row.subset:
            matched.twice.append(f"{item.key[0]} {item.well} site {item.key[3]} ({row.where})")
    if not some:
        matched.without_image.append(row.where)


def _check(matched: _Matched, field: str) -> None:
    if matched.twice:
        raise UserInputError(
            f"{len(matched.twice)} times an image is put in two subsets, first {matched.twice[0]}. "
            "See what the tables share with: cellstore split check --csv FILE, then mend them."
        )
    if matched.sides:
        return
    if matched.missing_files:
        raise UserInputError(
            f"All {len(matched.missing_files)} images that the tables name lack their files. "
            "Ingest again with --images, or import without the pixels: --allow-missing."
        )
    if matched.without_label:
        raise UserInputError(
            f"None of the images that the tables name has a {field}. Choose another --field."
        )
    raise UserInputError(
        "No row of the tables names an image of this store. Compare plates and wells with: "
        "cellstore sql 'SELECT barcode FROM plates', and ingest the images first."
    )


def _excluded(tables: SplitTables, matched: _Matched) -> dict[str, Any]:
    return {
        "without_label": len(matched.without_label),
        "missing_files": len(matched.missing_files),
        "rows": len(tables.rows),
        "rows_without_image": {
            "count": len(matched.without_image),
            "examples": matched.without_image[:SHOWN],
        },
        "rows_refused": {
            "count": len(tables.refusals),
            "examples": [f"{file}, {refusal.detail}" for file, refusal in tables.refusals[:SHOWN]],
        },
        "classes": [],
        "downsampled": {},
    }


def check_split(workspace: Workspace, name: str | None = None) -> CheckResult:
    """Look for what a split (default: the latest) gives away; see :func:`ops.leaks.leaks`.

    Raises:
        UnknownNameError: there is no split of that name.

    """
    with workspace.database.read() as session:
        split = find_split(session, name)
        found = leaks(
            _members(session, split.id), _same_files(session, split.id), split.group_level
        )
        result = _result(split.name, split.protocol, split.group_level, found)
        return replace(result, unseen=_unseen(session, split.id))


def check_tables(
    paths: Sequence[Path],
    field: str | None = None,
    group_level: GroupLevel = GroupLevel.WELL,
) -> CheckResult:
    """Look for what the split tables of others give away, without a store.

    ``field``: what is to be predicted; ``None``: the target where the tables have one, else the
    compound, else only wells and plates are looked at. Image files and wells are looked at only
    where the tables name them.

    Raises:
        BadTableError, UserInputError: the tables cannot be read or hold no split.

    """
    tables = read_split_tables(paths)
    check_not_empty(tables)
    has_target = any(row.target is not None for row in tables.rows)
    wanted = field or (TARGET if has_target else PERTURBATION)
    members = [
        Member(row.subset, label, row.plate, row.well, compound_in(row))
        for row in tables.rows
        if (label := label_in(row, wanted)) is not None
    ]
    if not members and field is None:
        members = [
            Member(row.subset, None, row.plate, row.well)
            for row in tables.rows
            if None not in (row.plate, row.well)
        ]
    if not members:
        raise UserInputError(
            f"No row of the tables has a {wanted}, or plate and well. Choose another "
            "--field, or add a table that has it."
        )
    names = ", ".join(path.name for path in paths)
    found = leaks(members, group_level=group_level)
    result = _result(names, IMPORTED, group_level, found)
    return replace(result, images=0, rows=len(members), refused=len(tables.refusals))


def compound_in(row: SplitRow) -> Compound:
    """Return what a row of a split table says of its compound."""
    return Compound(row.name, row.identifier, row.inchikey, row.smiles)


def label_in(row: SplitRow, field: str) -> str | None:
    """Return the class of a row of a split table; a compound may have an identifier only."""
    return row.target if field == TARGET else row.name or row.identifier


def _result(name: str, protocol: str, level: GroupLevel, found: SplitCheck) -> CheckResult:
    severities = [finding.severity for finding in found.findings]
    return CheckResult(
        split=name,
        protocol=protocol,
        group_level=level.value,
        images=found.n_images,
        wells=found.n_wells,
        wells_in_both_subsets=found.wells_in_both_subsets,
        labels=found.n_labels,
        labels_in_both_subsets=found.labels_in_both_subsets,
        plates_in_both_subsets=found.plates_in_both_subsets,
        leaks=severities.count(LeakSeverity.LEAK),
        warnings=severities.count(LeakSeverity.WARNING),
        findings=found.findings,
    )


def _members(session: Session, split_id: int) -> Iterator[Member]:
    """Yield the images of each well, subset and label as one; the database counts them."""
    keys = (SplitMember.subset, SplitMember.label_id, Image.well_id)
    counts = (
        select(*keys, func.count().label("images"))
        .join(Image, Image.id == SplitMember.image_id)
        .where(SplitMember.split_id == split_id)
        .group_by(*keys)
        .subquery()
    )
    query = (
        select(counts.c.subset, counts.c.images, Label.value, Well.name.label("well"))
        .add_columns(Plate.barcode, *_COMPOUND)
        .select_from(counts)
        .join(Label, Label.id == counts.c.label_id)
        .join(Well, Well.id == counts.c.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .outerjoin(Treatment, Treatment.id == Well.treatment_id)
    )
    for row in session.execute(query.execution_options(yield_per=10_000)):
        compound = compound_of(row)
        yield Member(row.subset, row.value, row.barcode, row.well, compound, row.images)


def _unseen(session: Session, split_id: int) -> int:
    members = select(func.count()).select_from(SplitMember)
    images = members.join(Image, Image.id == SplitMember.image_id)
    unseen = images.where(SplitMember.split_id == split_id, Image.content_sha256.is_(None))
    return session.scalar(unseen) or 0


def _same_files(session: Session, split_id: int) -> Iterator[tuple[str, Subset]]:
    """Yield the digest and the subsets of files that are in images of several subsets."""
    several = (
        select(ImageFile.sha256)
        .join(SplitMember, SplitMember.image_id == ImageFile.image_id)
        .where(SplitMember.split_id == split_id, ImageFile.sha256.is_not(None))
        .group_by(ImageFile.sha256)
        .having(func.min(SplitMember.subset) != func.max(SplitMember.subset))
        .subquery()
    )
    sides = (
        select(ImageFile.sha256, SplitMember.subset)
        .join(several, several.c.sha256 == ImageFile.sha256)
        .join(SplitMember, SplitMember.image_id == ImageFile.image_id)
        .where(SplitMember.split_id == split_id)
        .distinct()
    )
    for sha256, subset in session.execute(sides.execution_options(yield_per=10_000)):
        yield sha256 or "", subset
