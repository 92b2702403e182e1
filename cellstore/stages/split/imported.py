"""Splits that others made, as tables, matched to the images of the store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from ...config import SplitParams
from ...db.bulk import in_lists
from ...db.models import Image, Plate, Split, SplitMember, Treatment, Well
from ...errors import UserInputError
from ...formats.splits import SplitRow, SplitTables, check_not_empty, read_split_tables
from ...reading.cells import as_text
from ...runs import RecipeSpec, Workspace
from ...terms import GroupLevel, LabelField, Stage, Subset
from .candidates import Candidate
from .facts import IMPORTED, SplitResult
from .params import checked_name, with_known_words
from .writing import Drawn, keep

VERSION = 1
SHOWN = 5


@dataclass
class _Matched:
    """What became of the rows: a side for each image, and what has none."""

    sides: dict[int, tuple[Candidate, Subset]] = field(default_factory=dict)
    without_image: list[str] = field(default_factory=list)
    without_label: set[int] = field(default_factory=set)
    missing_files: set[int] = field(default_factory=set)
    twice: list[str] = field(default_factory=list)


def import_split(
    workspace: Workspace,
    name: str,
    paths: Sequence[Path],
    field: LabelField = LabelField.PERT_INAME,
    group_level: GroupLevel = GroupLevel.IMAGE,
    allow_missing: bool = False,
) -> SplitResult:
    """Keep the split that tables say (see ``formats.splits``) under ``name``, as ``imported``.

    A row puts on its side all images that it names: by plate, well and site as far as it says
    them; without a well those of its treatment (``identifier``, else ``pert_iname``), on its plate
    if it says one. Labels are those of the store. ``group_level``: what the split promises to keep
    together, which the database then guards; by default nothing.

    Raises:
        UserInputError: the name is taken; no row has an image; an image is put on two sides; a
            group is on two sides and ``group_level`` says it must not be.
        BadTableError: no table says the sides, or of what.
        UnknownNameError: there is no such field or group level.

    """
    name = checked_name(name)
    params = with_known_words(SplitParams(protocol=IMPORTED, field=field, group_level=group_level))
    tables = read_split_tables([Path(path) for path in paths])
    check_not_empty(tables)
    with workspace.database.read() as session:
        matched = _match(session, tables, params.field, allow_missing)
    _check(matched, params.field)
    members = tuple(sorted(matched.sides.values(), key=lambda item: item[0].key))
    drawn = Drawn(name, params, _query(name), members, _left_out(tables, matched))
    parameters = {
        "protocol": IMPORTED,
        "field": params.field.value,
        "group_level": params.group_level.value,
        "files": dict(tables.digests),
    }
    parameters["split"] = drawn.fingerprint
    (result,) = keep(workspace, [drawn], RecipeSpec(Stage.SPLIT, VERSION, parameters))
    return result


def _query(name: str) -> str:
    members = select(SplitMember.image_id).add_columns(SplitMember.subset, SplitMember.label_id)
    return as_text(members.join(Split, Split.id == SplitMember.split_id).where(Split.name == name))


def _match(
    session: Session, tables: SplitTables, field: LabelField, allow_missing: bool
) -> _Matched:
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
        f"{row.place}: well {row.well} of which plate? The store has {len(barcodes)} plates, and "
        "the table no column 'plate'. Add it."
    )


def _images(field: LabelField) -> Select[Any]:
    label = getattr(Treatment, field.value)
    return (
        select(Image.id, Image.site, Image.plane, Image.time_point, Image.content_sha256)
        .add_columns(Plate.barcode, Well.row, Well.column, Well.name.label("well"))
        .add_columns(Treatment.identifier, Treatment.pert_iname, label.label("label"))
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .outerjoin(Treatment, Treatment.id == Well.treatment_id)
    )


def _found(session: Session, query: Select[Any]) -> Iterator[_Found]:
    for row in session.execute(query):
        key = (row.barcode, row.row, row.column, row.site, row.plane, row.time_point)
        item = Candidate(row.id, key, row.well, row.label or "")
        yield item, row.content_sha256 is not None, row.identifier, row.pert_iname or ""


def _on_plate(session: Session, barcode: str, field: LabelField) -> dict[str | None, list[_Found]]:
    wells: dict[str | None, list[_Found]] = defaultdict(list)
    for found in _found(session, _images(field).where(Plate.barcode == barcode)):
        wells[found[0].well].append(found)
    return wells


def _match_treatments(
    session: Session,
    matched: _Matched,
    rows: Sequence[SplitRow],
    field: LabelField,
    allow_missing: bool,
) -> None:
    identifiers = {row.identifier for row in rows if row.identifier is not None}
    names = {row.name for row in rows if row.identifier is None}
    by_key: dict[tuple[str, str | None], list[_Found]] = defaultdict(list)
    for column, values in ((Treatment.identifier, identifiers), (Treatment.pert_iname, names)):
        for found in _found(session, _images(field).where(column.in_(values))):
            by_key[column.key, found[2] if column is Treatment.identifier else found[3]].append(
                found
            )
    for row in rows:
        key = ("pert_iname", row.name) if row.identifier is None else ("identifier", row.identifier)
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
            matched.twice.append(f"{item.key[0]} {item.well} site {item.key[3]} ({row.place})")
    if not some:
        matched.without_image.append(row.place)


def _check(matched: _Matched, field: LabelField) -> None:
    if matched.twice:
        raise UserInputError(
            f"{len(matched.twice)} times an image is put on two sides, first {matched.twice[0]}. "
            "See what the tables share with: cellstore split check --csv FILE, then mend them."
        )
    if matched.sides:
        return
    if matched.missing_files:
        raise UserInputError(
            f"All {len(matched.missing_files)} images that the tables name miss files. Ingest "
            "again with --images, or import without the pixels: --allow-missing."
        )
    if matched.without_label:
        raise UserInputError(
            f"None of the images that the tables name has a {field.value}. Choose another --field."
        )
    raise UserInputError(
        "No row of the tables names an image of this store. Compare plates and wells with: "
        "cellstore sql 'SELECT barcode FROM plates', and ingest the images first."
    )


def _left_out(tables: SplitTables, matched: _Matched) -> dict[str, Any]:
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
