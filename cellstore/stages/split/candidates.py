"""The images that could be in a split: one query, and in an order that no store decides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Select, and_, func, select
from sqlalchemy.orm import Session

from ...config import Selection, SplitParams
from ...db.models import Image, Plate, Run, Segmentation, Treatment, Well
from ...errors import UserInputError
from ...ops.compounds import Compound, SameCompounds
from ...reading.flags import check_plates, count_unseen, find_qc_run, is_unflagged_image
from ...runs import images_of
from ...runs.selection import is_current
from ...terms import GroupLevel

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
            case GroupLevel.TREATMENT:
                return self.compound
        return "/".join(map(str, self.key))


@dataclass(frozen=True)
class Pool:
    """All candidates in the order of their keys, the query that found them, and who is not there.

    ``qc``: the run whose flagged images are left out; ``segment``: the recipe whose cells count.
    """

    candidates: tuple[Candidate, ...]
    query: Select[Any]
    left_out: Mapping[str, int]
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
        UnknownNameError: no such plate, column or quality-control run.

    """
    chosen = images_of(session, Selection(plates=params.plates, where=params.where))
    qc = _qc_run(session, params, chosen)
    query = _candidates_query(params, qc)
    found = _candidates(session, query)
    left_out = _counts_left_out(session, chosen, params)
    if qc is not None:
        left_out |= _counts_flagged(session, params, qc, len(found), chosen)
    if not found:
        raise UserInputError(_nothing_to_split(params, left_out))
    if params.group_level is GroupLevel.TREATMENT:
        found = _with_compounds(session, query, found)
    if segment_id is not None:
        found = _with_cells(session, query, found, segment_id)
    # Not by id, so that every store draws alike.
    ordered = tuple(sorted(found, key=lambda item: item.key))
    return Pool(ordered, query, left_out, qc, segment_id)


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
    if params.where is not None:
        from ...runs.conditions import condition  # its parser loads slowly

        query = query.where(condition(params.where))
    if not params.allow_missing:
        query = query.where(Image.content_sha256.is_not(None))
    if qc is not None:
        query = query.where(is_unflagged_image(qc.id))
    return query


def _candidates(session: Session, query: Select[Any]) -> list[Candidate]:
    return [
        Candidate(
            row.image_id,
            (row.barcode, row.row, row.column, row.site, row.plane, row.time_point),
            row.well,
            row.label,
        )
        for row in session.execute(query)
    ]


def compound_of(treatment: Any) -> Compound:
    """Return what a row of ``treatments`` says of its compound."""
    return Compound(
        treatment.pert_iname, treatment.identifier, treatment.inchikey, treatment.smiles
    )


def _with_compounds(
    session: Session, query: Select[Any], found: Iterable[Candidate]
) -> list[Candidate]:
    of_image = query.with_only_columns(Image.id, Treatment.id)
    used = query.with_only_columns(Treatment.id).distinct()
    rows = session.scalars(select(Treatment).where(Treatment.id.in_(used)))
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
    if params.where is not None:
        return "No image meets the condition of --where. Try it with: cellstore segment --dry-run"
    return "There are no images to split. Run: cellstore ingest"
