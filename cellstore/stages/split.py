"""Splits: made from the images of the store or from tables, listed, checked and deleted."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Select, and_, delete, func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from ..analysis.leaks import Compound, Member, SameCompounds, SplitCheck, leaks
from ..analysis.splitting import (
    Assignment,
    Cut,
    ExcludedClass,
    SplitImage,
    balanced,
    cut_by_groups,
    cut_largest,
    enough,
    folds,
    grouped_split,
    named_split,
    published_split,
)
from ..config import Selection, SplitParams
from ..db.bulk import in_lists, insert_new
from ..db.events import Change, record_events
from ..db.fields import check_field, field_column, of_parts, wells_relabelled
from ..enums import PERTURBATION, TARGET, GroupLevel, Stage, Subset
from ..errors import UnknownNameError, UserInputError, some_of
from ..io.split_tables import SplitRow, SplitTables, read_split_tables
from ..io.treatments import normalised_name
from ..jobs.lookup import IS_CURRENT, find_split, images_of
from ..jobs.runs import RecipeSpec, register, running
from ..jobs.workspace import Workspace
from ..models import (
    Image,
    ImageFile,
    Label,
    Perturbation,
    Plate,
    Run,
    Segmentation,
    Split,
    SplitGroup,
    SplitMember,
    Treatment,
    TreatmentPart,
    Well,
)
from ..notebooks import Shown
from ..query.cells import as_text, last_with_masks
from ..query.exclusions import image_counts, qc_run_for
from ..settings import need

VERSION = 1
EXAMPLES = 5
"""Rows of a table that are shown where many could not be used."""


@dataclass(frozen=True)
class SplitResult(Shown):
    """A split as it stands.

    ``counts`` are images by subset; ``excluded``: what is in no subset and why. ``leaking``: wells
    that train also test, so scores are those of wells already seen. ``validation_classes``: how
    many classes have an image that validates. ``created``: by this call, in run ``run_id``.
    ``family`` and ``fold``: which cross-validation it is a fold of.
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
    validation_classes: int
    wells_in_both_subsets: int
    excluded: dict[str, Any]
    query: str
    run_id: int | None = None
    family: str | None = None
    fold: int | None = None


@dataclass(frozen=True)
class SplitLine(Shown):
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
class Deleted(Shown):
    """Splits that are gone, or would go: one, or all folds of a family."""

    names: tuple[str, ...]
    images: int


Members = Sequence[tuple[Any, Subset]]
"""Rows of :func:`_images` with their subsets, in the order of :func:`_key`."""


def _key(row: Any) -> tuple[str, int, int, int, int, int]:
    """Return what names an image in every store."""
    return (row.barcode, row.well_row, row.well_column, row.site, row.plane, row.time_point)


def _group(row: Any, level: GroupLevel, compound: str) -> str:
    """Return the name of what an image must stay with."""
    match level:
        case GroupLevel.PLATE:
            return str(row.barcode)
        case GroupLevel.WELL:
            return f"{row.barcode}/{row.well}"
        case GroupLevel.PERTURBATION:
            return compound
    return "/".join(map(str, _key(row)))


def _new_split(members: Members, **columns: Any) -> tuple[Split, Members]:
    """Return a split before it is written, and its members."""
    split = Split(**columns, created_at=datetime.now(UTC))
    found = ((_key(row), row.label, subset.value) for row, subset in members)
    split.fingerprint = fingerprint_of_split(split, found)
    return split, members


def fingerprint_of_split(split: Split, members: Iterable[tuple[Any, str, str]]) -> str:
    """Return the SHA-256 of a split and its members: key (:func:`_key`), label, subset."""
    digest = hashlib.sha256(repr((split.protocol, split.field, split.seed)).encode())
    digest.update(split.group_level.value.encode())
    for member in members:
        digest.update(repr(member).encode())
    return digest.hexdigest()


def create_split(workspace: Workspace, name: str, params: SplitParams | None = None) -> SplitResult:
    """Assign images to subsets; see :meth:`Store.create_split`."""
    params = params or SplitParams()
    if params.several:
        raise UserInputError("Folds are several splits: make them with create_folds.")
    (result,) = create_folds(workspace, name, params)
    return result


def create_folds(workspace: Workspace, name: str, params: SplitParams) -> tuple[SplitResult, ...]:
    """Make the splits of a cross-validation; see :meth:`Store.create_folds`.

    They are one family, and share the images, the classes and what is excluded. Without
    ``params.folds`` and ``params.leave_out`` one split is made, of that very name.
    """
    name = _checked_name(name, more=5 if params.several else 0)
    family = name if params.several else None
    with workspace.database.read() as session:
        params = replace(params, field=check_field(session, params.field))
        if params.leave_out not in (None, "plate"):
            params = replace(params, leave_out=check_field(session, str(params.leave_out)))
        chosen = images_of(session, Selection(plates=params.plates, where=params.where))
        qc, unseen, segment = None, 0, None
        if params.exclude_flagged is not None:
            there = select(Image.id).where(Image.id.in_(chosen), Image.content_sha256.is_not(None))
            qc, unseen = qc_run_for(session, params.exclude_flagged, there)
        if params.downsample_by == "cell":
            segment = last_with_masks(session)
        query = _candidates(params, qc)
        # Not by id, so that every store draws alike.
        rows = sorted(
            session.execute(query.add_columns(Treatment.id.label("treatment_id"))), key=_key
        )
        excluded = _count_excluded(session, chosen, params, qc, len(rows))
        if qc is not None:
            excluded["unseen_by_qc"] = unseen
        if not rows:
            raise UserInputError(_nothing_to_split(params, excluded))
        if params.leave_out is not None and (lost := sum(not row.part for row in rows)):
            raise UserInputError(
                f"{lost} of {len(rows)} images have no {params.leave_out}, so no fold can test "
                "them. Choose the others with --where, or complete the table of their wells."
            )
        compounds, cells = dict[int, str](), dict[int, int]()
        if params.group_level is GroupLevel.PERTURBATION:
            compounds = _compounds(session, query)
        if segment is not None:
            cells = _cells(session, query, segment.id, len(rows))
        images, digest = list[SplitImage](), hashlib.sha256()
        for position, row in enumerate(rows):
            of_row = compounds.get(row.treatment_id, ""), cells.get(row.image_id, 0)
            digest.update(repr((_key(row), row.well, row.label)).encode())
            if any(of_row):
                digest.update(repr(of_row).encode())
            group = _group(row, params.group_level, of_row[0])
            if params.leave_out is not None:
                group = row.part
                digest.update(group.encode())
            images.append(SplitImage(position, row.label, group, of_row[1]))
        parameters = asdict(params) | {
            "exclude_flagged": qc.id if qc else None,
            "images": digest.hexdigest(),
        }
        recipes = (qc.recipe if qc else None, segment)
        inputs = tuple(recipe for recipe in recipes if recipe is not None)
    spec = RecipeSpec(Stage.SPLIT, VERSION, parameters, inputs=inputs)
    assignments, few, cut = _assign(images, params)
    names = [name]
    if family is not None:
        names = [f"{family}-{number}" for number in range(1, len(assignments) + 1)]
    downsampled = {
        label: {"before": before, "after": after} for label, (before, after) in cut.items()
    }
    new = [
        _new_split(
            [(rows[position], subset) for position, subset in assignment.subsets.items()],
            name=name,
            protocol=params.protocol,
            field=params.field,
            group_level=params.group_level,
            seed=params.seed,
            query=as_text(query),
            excluded={
                **excluded,
                "classes": [asdict(one) for one in (*few, *assignment.excluded)],
                "downsampled": downsampled,
            },
            family=family,
            fold=number if family else None,
        )
        for number, (name, assignment) in enumerate(zip(names, assignments, strict=True), start=1)
    ]
    return _keep(workspace, new, spec)


def _checked_name(name: str, more: int = 0) -> str:
    """Return the name of a split, to which ``more`` characters can be added."""
    if not name.strip() or len(name) + more > 255 or not name.isprintable():
        raise UserInputError("A split needs a name of 1 to 255 printable characters.")
    return name.strip()


def _images(field: str, *columns: Any) -> Select[Any]:
    """Ask for images with the columns of their keys, their well and label, and more."""
    return (
        select(Image.id.label("image_id"), Plate.barcode, Well.well_row, Well.well_column)
        .add_columns(Well.name.label("well"), Image.site, Image.plane, Image.time_point)
        .add_columns(field_column(field).label("label"), *columns)
        .select_from(Image)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .outerjoin(Treatment, Treatment.id == Well.treatment_id)
    )


def _candidates(params: SplitParams, qc: Run | None) -> Select[Any]:
    query = _images(params.field).where(field_column(params.field).is_not(None))
    if params.leave_out is not None:
        by_plate = params.leave_out == "plate"
        part: Any = Plate.barcode if by_plate else field_column(params.leave_out)
        query = query.add_columns(part.label("part"))
    query = query.where(image_counts(None if qc is None else qc.id))
    if params.plates:
        query = query.where(Plate.barcode.in_(sorted(params.plates)))
    if params.where is not None:
        from ..jobs.conditions import condition  # its parser loads slowly

        query = query.where(condition(params.where))
    if not params.allow_missing:
        query = query.where(Image.content_sha256.is_not(None))
    return query


def _count_excluded(
    session: Session, chosen: Select[int], params: SplitParams, qc: Run | None, kept: int
) -> dict[str, Any]:
    """Count the chosen images that are no candidates, by the reason."""
    label = field_column(params.field)
    images = _images(params.field).with_only_columns(func.count()).where(Image.id.in_(chosen))
    missing = and_(label.is_not(None), Image.content_sha256.is_(None))
    counts = {
        "without_label": session.scalar(images.where(label.is_(None))) or 0,
        "missing_files": 0 if params.allow_missing else session.scalar(images.where(missing)) or 0,
        "annotated": session.scalar(images.where(~image_counts())) or 0,
    }
    if qc is not None:
        with_flagged = select(func.count()).select_from(_candidates(params, None).subquery())
        counts |= {"flagged": (session.scalar(with_flagged) or 0) - kept, "qc_run": qc.id}
    return counts


def _nothing_to_split(params: SplitParams, excluded: Mapping[str, int]) -> str:
    reasons = {
        "without_label": f"have no {params.field} (choose another --field)",
        "missing_files": "lack their files (ingest again with --images, or --allow-missing)",
        "annotated": "are excluded by annotations",
        "flagged": "are flagged by quality control (leave --exclude-flagged out)",
    }
    found = [f"{excluded[name]} {why}" for name, why in reasons.items() if excluded.get(name)]
    if found:
        return f"No image is left to split: {', '.join(found)}."
    if params.where is not None:
        return "No image meets the condition of --where. See: cellstore sql 'FROM image_table'"
    return "There are no images to split. Run: cellstore ingest"


_COMPOUND = (
    Treatment.name,
    *(
        of_parts(column).label(column.key)
        for column in (Perturbation.identifier, Perturbation.inchikey, Perturbation.smiles)
    ),
)
"""What :func:`_compound` reads of a treatment, or of a row of a split table."""


def _compound(row: Any) -> Compound:
    spelling = normalised_name(row.name) if row.name else None
    return Compound(row.name, row.identifier, row.inchikey, row.smiles, spelling)


def _compounds(session: Session, query: Select[Any]) -> dict[int, str]:
    """What all treatments share that are the same compound, by the ids of the treatments."""
    used = query.with_only_columns(Treatment.id).distinct()
    rows = session.execute(select(Treatment.id, *_COMPOUND).where(Treatment.id.in_(used)))
    compounds = {row.id: _compound(row) for row in rows}
    same = SameCompounds(compounds.values())
    return {key: same.group(compound) or "" for key, compound in compounds.items()}


def _cells(session: Session, query: Select[Any], segment_id: int, images: int) -> dict[int, int]:
    """How many cells a segment recipe found, by the ids of the images, all of which it needs."""
    counted = query.with_only_columns(Image.id, Segmentation.n_cells).join(
        Segmentation, and_(IS_CURRENT, Segmentation.recipe_id == segment_id)
    )
    cells = dict(session.execute(counted).all())
    if missing := images - len(cells):
        raise UserInputError(
            f"{missing} of {images} images have no cells of segment recipe {segment_id} to "
            "count. Run: cellstore segment, or use --downsample-by image."
        )
    return cells


def _assign(
    images: Sequence[SplitImage], params: SplitParams
) -> tuple[list[Assignment], tuple[ExcludedClass, ...], Cut]:
    """Assign the images: once, or for each fold.

    Returns also the classes that are too small, and those that were cut before.
    """
    seed, by_cells, unit = params.seed, params.downsample_by == "cell", params.group_level.value
    group_of = {image.image_id: image.group for image in images}
    few: tuple[ExcludedClass, ...] = ()
    if params.min_images:
        images, few = enough(images, params.min_images)
    cut: Cut = {}
    by_class = not params.several and params.group_level is GroupLevel.PERTURBATION
    if params.protocol == "published":
        images, cut = cut_largest(images, seed)
    elif params.downsample is not None or by_cells:
        images, cut = balanced(images, seed, params.downsample, by_cells)
    elif not params.test_plates:
        images, cut = cut_by_groups(images, seed, by_class)
    if params.several or params.protocol == "published":
        need("train")
    if params.leave_out is not None:
        unit, number = params.leave_out, len(set(group_of.values()))
        if number == 1:
            raise UserInputError(
                f"All images have the same {unit}: without it nothing is left to train on."
            )
        if number == 2 and params.validation_size > 0:
            raise UserInputError(
                f"There are two {unit}s: one would test, one validate, and none train. Let "
                "none validate: --validation-size 0"
            )
        found = folds(images, seed, number, params.validation_size > 0, unit)
        found.sort(
            key=lambda one: min(
                group_of[key] for key, subset in one.subsets.items() if subset is Subset.TEST
            )
        )
    elif params.folds is not None:
        found = folds(images, seed, params.folds, params.validation_size > 0, unit)
    elif params.protocol == "published":
        found = [published_split(images, seed, params.test_size)]
    elif params.test_plates:
        plates = (params.test_plates, params.validation_plates)
        found = [named_split(images, seed, *plates, params.validation_size)]
    else:
        sizes = (params.test_size, params.validation_size)
        found = [grouped_split(images, seed, *sizes, by_class, unit)]
    return found, few, cut


def import_split(
    workspace: Workspace,
    name: str,
    paths: Sequence[Path],
    field: str = PERTURBATION,
    group_level: GroupLevel = GroupLevel.IMAGE,
    allow_missing: bool = False,
) -> SplitResult:
    """Keep the split that tables say; see :meth:`Store.import_split` and ``io.split_tables``.

    A row puts in its subset all images that it names: by plate, well and site as far as it says
    them; without a well those of its treatment (``identifier``, else ``pert_iname``), on its plate
    if it says one. Labels are those of the store. The database guards ``group_level``.
    """
    name = _checked_name(name)
    if group_level not in list(GroupLevel):
        raise UnknownNameError.of("group level", group_level, list(GroupLevel))
    group_level = GroupLevel(group_level)
    tables = read_split_tables([Path(path) for path in paths])
    with workspace.database.read() as session:
        field = check_field(session, field)
        members, excluded = _match(session, tables, field, allow_missing)
    query: Any = (
        select(SplitMember.image_id, SplitMember.subset, SplitMember.label_id)
        .join(Split, Split.id == SplitMember.split_id)
        .where(Split.name == name)
    )
    new = _new_split(
        members,
        name=name,
        protocol="imported",
        field=field,
        group_level=group_level,
        seed=0,
        query=as_text(query),
        excluded=excluded,
    )
    parameters = {
        "protocol": "imported",
        "field": field,
        "group_level": group_level.value,
        "files": dict(tables.digests),
        "split": new[0].fingerprint,
    }
    (result,) = _keep(workspace, [new], RecipeSpec(Stage.SPLIT, VERSION, parameters))
    return result


def _match(
    session: Session, tables: SplitTables, field: str, allow_missing: bool
) -> tuple[Members, dict[str, Any]]:
    """Return the members of the split that tables say, and what is in no subset."""
    members: dict[int, tuple[Any, Subset]] = {}
    without_image, twice = list[str](), list[str]()
    without_label, missing_files = set[int](), set[int]()
    for row, found in _match_rows(session, tables.rows, field):
        for image in found:
            if not image.label:
                without_label.add(image.image_id)
            elif image.content_sha256 is None and not allow_missing:
                missing_files.add(image.image_id)
            elif members.setdefault(image.image_id, (image, row.subset))[1] is not row.subset:
                twice.append(f"{image.barcode} {image.well} site {image.site} ({row.where})")
        if not found:
            without_image.append(row.where)
    if twice:
        raise UserInputError(
            f"Images that the tables put in two subsets: {len(twice)}, first {twice[0]}. See what "
            "the tables share with: cellstore split check --csv FILE, then correct them."
        )
    refused = [f"{file}, {refusal.detail}" for file, refusal in tables.refusals[:EXAMPLES]]
    if not members:
        raise UserInputError(
            "No row of the tables puts an image of this store in a subset. Rows that name none: "
            f"{len(without_image)} (compare their plates with: cellstore ask plates), rows that "
            f"cannot be used: {len(tables.refusals)}{f', first {refused[0]}' if refused else ''}; "
            f"images without a {field}: {len(without_label)} (choose another --field), without "
            f"files: {len(missing_files)} (--allow-missing)."
        )
    excluded = {
        "without_label": len(without_label),
        "missing_files": len(missing_files),
        "rows": len(tables.rows),
        "rows_without_image": {
            "count": len(without_image),
            "examples": without_image[:EXAMPLES],
        },
        "rows_refused": {"count": len(tables.refusals), "examples": refused},
        "classes": [],
        "downsampled": {},
    }
    return sorted(members.values(), key=lambda item: _key(item[0])), excluded


def _match_rows(
    session: Session, rows: Sequence[SplitRow], field: str
) -> Iterator[tuple[SplitRow, list[Any]]]:
    """Yield each row of a split table with the images that it names, plate by plate."""
    images = _images(
        field,
        Image.content_sha256,
        of_parts(Perturbation.identifier).label("identifier"),
        Treatment.name.label("name"),
    )
    barcodes = list(session.scalars(select(Plate.barcode).order_by(Plate.id)))
    of_plate: dict[str, list[SplitRow]] = defaultdict(list)
    for row in rows:
        if row.well is None:
            continue
        if row.plate is None and len(barcodes) != 1:
            raise UserInputError(
                f"{row.where}: well {row.well} of which plate? The store has {len(barcodes)} "
                "plates, and the table no column 'plate'. Add it."
            )
        of_plate[row.plate or barcodes[0]].append(row)
    for barcode, on_plate in of_plate.items():
        in_well: dict[str, list[Any]] = defaultdict(list)
        for image in session.execute(images.where(Plate.barcode == barcode)):
            in_well[image.well].append(image)
        for row in on_plate:
            yield row, [i for i in in_well.get(row.well or "", ()) if row.site in (None, i.site)]

    for some in in_lists([row for row in rows if row.well is None]):
        sampled = (
            select(TreatmentPart.treatment_id)
            .join(Perturbation, Perturbation.id == TreatmentPart.perturbation_id)
            .where(Perturbation.identifier.in_({row.identifier for row in some} - {None}))
        )
        named = {row.name for row in some if row.identifier is None}
        found: dict[tuple[str, str | None], list[Any]] = defaultdict(list)
        for kind, chosen in (
            ("identifier", Treatment.id.in_(sampled)),
            ("name", Treatment.name.in_(named)),
        ):
            for image in session.execute(images.where(chosen)):
                found[kind, getattr(image, kind)].append(image)
        for row in some:
            kind = "name" if row.identifier is None else "identifier"
            of_treatment = found.get((kind, getattr(row, kind)), ())
            yield row, [i for i in of_treatment if row.plate in (None, i.barcode)]


def _keep(
    workspace: Workspace, new: Sequence[tuple[Split, Members]], spec: RecipeSpec
) -> tuple[SplitResult, ...]:
    """Write the splits in one run, all or none; those that are there already stay as they are."""
    names, (first, members) = [split.name for split, _ in new], new[0]
    family, seed, query = first.family, first.seed, first.query
    with workspace.database.begin() as session:
        known = {s.name: s for s in session.scalars(select(Split).where(Split.name.in_(names)))}
        for split, _ in new:
            there = known.get(split.name)
            mine = (split.fingerprint, split.family)
            if there is not None and (there.fingerprint, there.family) != mine:
                raise UserInputError(
                    f"There is another split {split.name!r} already, and a split never changes. "
                    "Choose another name."
                )
        # A cross-validation and a split cannot share a name: each is used by it.
        taken = Split.family == names[0] if family is None else Split.name == family
        if session.scalar(select(Split.id).where(taken).limit(1)) is not None:
            what = "a cross-validation" if family is None else "a split"
            raise UserInputError(
                f"There is {what} {family or names[0]!r} already. Choose another name."
            )
        made = [name for name in names if name not in known]
        if not made:
            return tuple(_result(session, known[name]) for name in names)
        recipe = register(session, spec)
    with running(workspace.database, recipe, seed=seed, query=query) as run:
        try:
            with workspace.database.begin() as session:
                for split, some in new:
                    if split.name not in made:
                        continue
                    split.recipe_id = recipe.id
                    session.add(split)
                    session.flush()
                    values = sorted({row.label for row, _ in some})
                    rows = [{"field": split.field, "value": value} for value in values]
                    insert_new(session, Label, rows)
                    known_labels = select(Label.value, Label.id).where(Label.field == split.field)
                    ids = dict(session.execute(known_labels).all())
                    chosen = [
                        {
                            "split_id": split.id,
                            "image_id": row.image_id,
                            "subset": subset,
                            "label_id": ids[row.label],
                        }
                        for row, subset in some
                    ]
                    insert_new(session, SplitMember, chosen)
        except IntegrityError as error:
            raise UserInputError(
                "Another program made a split of this name at this moment. Choose another name."
            ) from error
        which = {"split": made[0]} if len(made) == 1 and family is None else {"splits": made}
        run.result = which | {"images": len(members)}
    with workspace.database.read() as session:
        splits = {s.name: s for s in session.scalars(select(Split).where(Split.name.in_(names)))}
        results = [_result(session, splits[name]) for name in names]
    return tuple(
        replace(item, created=True, run_id=run.id) if item.name in made else item
        for item in results
    )


def folds_of(workspace: Workspace, name: str | None) -> tuple[str, ...]:
    """Return the splits of a cross-validation in their order; none: nothing is called so.

    Without a name those of the latest split, if it is a fold.
    """
    with workspace.database.read() as session:
        if name is None:
            name = session.scalar(select(Split.family).order_by(Split.id.desc()).limit(1))
        query = select(Split.name).where(Split.family == name).order_by(Split.fold)
        return tuple(session.scalars(query)) if name else ()


def show_split(workspace: Workspace, name: str | None = None) -> SplitResult:
    """Return a split as it stands (default: the latest)."""
    with workspace.database.read() as session:
        return _result(session, find_split(session, name))


def _result(session: Session, split: Split) -> SplitResult:
    counts = _images_by_subset(session, split.id)
    classes = select(func.count(SplitMember.label_id.distinct()))
    classes = classes.where(SplitMember.split_id == split.id)
    validating = classes.where(SplitMember.subset == Subset.VALIDATION)
    several = (
        select(Image.well_id)
        .join(SplitMember, SplitMember.image_id == Image.id)
        .where(SplitMember.split_id == split.id)
        .group_by(Image.well_id)
        .having(func.count(SplitMember.subset.distinct()) > 1)
    )
    shared = session.scalar(select(func.count()).select_from(several.subquery())) or 0
    return SplitResult(
        **_kept(split),
        seed=split.seed,
        fingerprint=split.fingerprint,
        created=False,
        leaking=shared > 0,
        classes=session.scalar(classes) or 0,
        images=sum(counts.values()),
        counts=counts,
        validation_classes=session.scalar(validating) or 0,
        wells_in_both_subsets=shared,
        excluded=split.excluded,
        query=split.query,
    )


def _kept(split: Split) -> dict[str, Any]:
    """What is shown of every split."""
    names = ("name", "protocol", "field", "family", "fold")
    return {
        **{name: getattr(split, name) for name in names},
        "group_level": split.group_level.value,
        "frozen": split.frozen_at is not None,
    }


def _images_by_subset(session: Session, split_id: int) -> dict[str, Any]:
    """Count the images of each subset; by the primary key, so only this split's rows are read."""
    query = select(SplitMember.subset, func.count()).where(SplitMember.split_id == split_id)
    found = dict(session.execute(query.group_by(SplitMember.subset)).all())
    return {subset.value: found.get(subset, 0) for subset in Subset}


def list_splits(workspace: Workspace) -> tuple[SplitLine, ...]:
    """Return all splits, the oldest first."""
    with workspace.database.read() as session:
        runs = select(Run.split_id, func.count()).where(Run.split_id.is_not(None))
        used = dict(session.execute(runs.group_by(Run.split_id)).all())
        return tuple(
            SplitLine(
                **_kept(split),
                runs=used.get(split.id, 0),
                created_at=split.created_at,
                **_images_by_subset(session, split.id),
            )
            for split in session.scalars(select(Split).order_by(Split.id)).all()
        )


def delete_split(workspace: Workspace, name: str, *, dry_run: bool = False) -> Deleted:
    """Delete a split, or all folds of a family of that name, that no run uses; all or none."""
    with workspace.database.begin() as session:
        named = or_(Split.name == name, Split.family == name)
        splits = session.scalars(select(Split).where(named).order_by(Split.id)).all()
        if not splits:
            known = session.scalars(select(Split.name).order_by(Split.id.desc()))
            raise UnknownNameError.of("split", name, known)
        for split in splits:
            if split.frozen_at is not None:
                query = select(Run.id).where(Run.split_id == split.id).order_by(Run.id)
                runs = session.scalars(query).all()
                by = f"run {some_of(runs)}" if runs else f"a run of {split.frozen_at:%Y-%m-%d}"
                raise UserInputError(
                    f"The split {split.name!r} stays: it is used by {by}, and what a network was "
                    "trained and tested on must be known as long as the network is."
                )
        ids = [split.id for split in splits]
        images = select(func.count()).select_from(SplitMember).where(SplitMember.split_id.in_(ids))
        result = Deleted(tuple(split.name for split in splits), session.scalar(images) or 0)
        if dry_run:
            return result
        gone = [
            Change("splits", split.id, {"name": split.name, "fingerprint": split.fingerprint}, None)
            for split in splits
        ]
        for table in (SplitMember, SplitGroup):
            session.execute(delete(table).where(table.split_id.in_(ids)))
        session.execute(delete(Split).where(Split.id.in_(ids)))
        record_events(session, gone)
        return result


def check_split(workspace: Workspace, name: str | None = None) -> SplitCheck:
    """Look for what a split (default: the latest) gives away, by :func:`leaks`."""
    with workspace.database.read() as session:
        split = find_split(session, name)
        unseen = (
            select(func.count())
            .select_from(SplitMember)
            .join(Image, Image.id == SplitMember.image_id)
            .where(SplitMember.split_id == split.id, Image.content_sha256.is_(None))
        )
        return replace(
            leaks(_members(session, split.id), _same_files(session, split.id), split.group_level),
            split=split.name,
            protocol=split.protocol,
            unseen=session.scalar(unseen) or 0,
            relabelled=tuple(
                f"{row.name} ({row.frozen} -> {row.now or 'none'})"
                for row in wells_relabelled(session, split.id)
            ),
        )


def check_tables(
    paths: Sequence[Path],
    field: str | None = None,
    group_level: GroupLevel = GroupLevel.WELL,
) -> SplitCheck:
    """Look for what the split tables of others give away, without a store.

    ``field``: what is to be predicted; ``None``: the target where the tables have one, else the
    compound, else only wells and plates are looked at. Image files and wells are looked at only
    where the tables name them.
    """
    tables = read_split_tables(paths)
    has_target = any(row.target is not None for row in tables.rows)
    wanted = field or (TARGET if has_target else PERTURBATION)
    members = []
    for row in tables.rows:
        # A compound may have an identifier only.
        label = row.target if wanted == TARGET else row.name or row.identifier
        if label is not None:
            members.append(Member(row.subset, label, row.plate, row.well, _compound(row)))
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
    return replace(
        leaks(members, group_level=group_level),
        split=", ".join(path.name for path in paths),
        images=0,
        rows=len(members),
        refused=len(tables.refusals),
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
        compound = _compound(row)
        yield Member(row.subset, row.value, row.barcode, row.well, compound, row.images)


def _same_files(session: Session, split_id: int) -> Iterator[tuple[str, Subset]]:
    """Yield the digest and two subsets of files that are in images of several subsets."""
    first, last = func.min(SplitMember.subset), func.max(SplitMember.subset)
    several = (
        select(ImageFile.sha256, first, last)
        .join(SplitMember, SplitMember.image_id == ImageFile.image_id)
        .where(SplitMember.split_id == split_id, ImageFile.sha256.is_not(None))
        .group_by(ImageFile.sha256)
        .having(first != last)
    )
    for sha256, *subsets in session.execute(several.execution_options(yield_per=10_000)):
        yield from ((str(sha256), subset) for subset in subsets)
