"""Annotations alone: plate maps and tables of treatments or plates, without any image."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sqlalchemy import ColumnElement, exists, func, select
from sqlalchemy.orm import Session

from ...config import IngestParams
from ...db.bulk import in_lists, insert_numbered, rows_in, take_ids
from ...enums import Control
from ...errors import UnknownNameError, UserInputError, some_of
from ...io.filenames import format_well
from ...io.layouts import Layout
from ...io.platemaps import PlateAnnotation, PlateMap, Position, notes_on_wells
from ...io.tables import LONGEST, open_table
from ...io.treatments import (
    PlateRow,
    TreatmentRecord,
    TreatmentRow,
    completed,
    jump_plates,
    read_aliases,
    treatment_rows,
    without_aliases,
)
from ...io.uris import writable
from ...jobs.lookup import renamed_plates
from ...jobs.workspace import Workspace
from ...models import Image, Perturbation, Plate, Well
from .account import Account
from .ingest_images import PLATE_COLUMNS, WELL, complete_plate, keep_well_metadata, read_maps
from .write_treatments import TreatmentWriter, records_of

WELLS_AT_ONCE = 20_000
"""Wells that are pointed elsewhere at a time: a control may be in a million."""


def ingest_treatments(
    workspace: Workspace,
    session: Session,
    source: Path,
    layout: Layout,
    params: IngestParams,
    account: Account,
) -> None:
    """Write an annotation in the caller's transaction; ``account`` gets the plates it names.

    * Plate maps point the wells of plates that the store has to their treatments, and make wells
      that were not there. An empty well, and a map that no plate uses, are unchanged rows.
    * A treatment table makes the treatments that are new, and points wells to those that it
      corrects: the same ``broad_sample`` (or JCP2022), and other or more values. A value that
      the table leaves open stays as it is.
    * JUMP's table of plates makes plates, and sets the batch of those that are there.
    """
    workspace.progress.start("ingest", 0)
    try:
        aliases = read_aliases(params.aliases) if params.aliases else {}
        if layout is Layout.PLATEMAP:
            _ingest_maps(session, source, params, aliases, account)
            return
        table = open_table(source)
        account.notes += table.notes
        if layout is Layout.JUMP_PLATES:
            _write_plates(session, account.take(jump_plates(table)), account)
        else:
            _write_treatments(session, account.take(treatment_rows(table)), aliases, account)
        account.flush(session)
    finally:
        workspace.progress.finish()


def _write_plates(session: Session, rows: Sequence[tuple[int, PlateRow]], account: Account) -> None:
    """Make plates, or set the batch of those that are there.

    A plate of two batches is refused the second time; a changed batch is noted as suspicious.
    """
    barcodes = dict.fromkeys(barcode for _, (barcode, _, _) in rows)
    there = rows_in(session, select(Plate), Plate.barcode, barcodes)
    plates: dict[str, Plate] = {plate.barcode: plate for (plate,) in there}
    ids = iter(take_ids(session, Plate, len(barcodes) - len(plates)))
    seen: dict[str, str | None] = {}
    for line, (barcode, batch, metadata) in rows:
        if seen.setdefault(barcode, batch) != batch:
            detail = f"{barcode} has batch {seen[barcode]} on an earlier line, {batch} here"
            account.refuse(line, "plate twice", detail)
            continue
        if barcode not in plates:
            plates[barcode] = Plate(
                id=next(ids), barcode=barcode, batch=batch, metadata_=metadata or None
            )
            session.add(plates[barcode])
            account.created += 1
            continue
        plate = plates[barcode]
        merged = {**(plate.metadata_ or {}), **metadata}
        if batch in (None, plate.batch) and merged == (plate.metadata_ or {}):
            account.unchanged += 1
            continue
        if batch is not None and plate.batch not in (None, batch):
            detail = f"{barcode}: the batch was {plate.batch}, and is {batch} now"
            account.suspicious(line, "another batch", detail)
        plate.batch, plate.metadata_ = batch or plate.batch, merged or None
        account.updated += 1
    session.flush()
    account.plates = [plate.id for plate in plates.values()]


# ---- Plate maps ----


def _ingest_maps(
    session: Session,
    source: Path,
    params: IngestParams,
    aliases: Mapping[str, str],
    account: Account,
) -> None:
    """Point the wells of the plates of the maps in ``source``."""
    annotation = read_maps(source, params)
    account.notes += annotation.notes
    plates = _plates_of_maps(session, source, annotation, params.plate, account)
    map_files = {found.path for found in annotation.maps.values()}
    for path, refusal in annotation.issues:
        if path in map_files:
            account.rows += 1
            account.refuse(*refusal, file=writable(path.name))
        else:  # a row of another table
            account.problem(*refusal, file=writable(path.name))
    for plate_map in annotation.maps.values():
        account.rows += len(plate_map.wells)
        if plate_map.name not in plates:
            account.notes.append(f"no plate of the store uses the plate map {plate_map.name}")
        writer = TreatmentWriter(session, account, writable(plate_map.path.name))
        its_plates = plates.get(plate_map.name, [])
        created, updated = _apply_map(session, writer, plate_map, its_plates, aliases, account)
        account.updated += len(updated)
        account.created += len(created - updated)
        account.unchanged += len(plate_map.wells) - len(created | updated)
        account.notes += notes_on_wells(plate_map, _imaged(session, its_plates))
        writer.report()
    account.flush(session)
    account.plates = sorted(plate for some in plates.values() for plate in some)


def _plates_of_maps(
    session: Session,
    source: Path,
    annotation: PlateAnnotation,
    named: tuple[str, ...],
    account: Account,
) -> dict[str, list[int]]:
    """Return the plates (ids) that use each map; those that the user or the map names are made.

    A table of barcodes may be of a whole screen: its plates are made where the store has none.
    """
    barcodes = annotation.barcodes
    if barcodes is None and not named:
        known = session.scalars(select(Plate.barcode).order_by(Plate.id).limit(9)).all()
        has = f" This store has {some_of(known, 8)}."
        raise UserInputError(
            f"Which plates is {source.name} for? Name them with --plate, or give a table of them "
            "with --barcodes FILE (Assay_Plate_Barcode, Plate_Map_Name)."
            f"{has if known else ''}"
        )
    if barcodes is None:
        barcodes = dict.fromkeys(named, next(iter(annotation.maps)))
    elif named:
        for barcode in named:
            if barcode not in barcodes:
                raise UnknownNameError.of("plate", barcode, sorted(barcodes))
        barcodes = {barcode: barcodes[barcode] for barcode in named}
    maps = annotation.maps
    query = select(Plate.barcode, Plate.id)
    keys = {row.barcode: row.id for row in rows_in(session, query, Plate.barcode, barcodes)}
    absent = [barcode for barcode in barcodes if barcode not in keys]
    for old, (key, now) in renamed_plates(session, absent).items():
        account.notes.append(f"plate {old} was renamed: read as {now}")
        keys[old] = key
    absent = [barcode for barcode in absent if barcode not in keys]
    if named or annotation.names_plates or not keys:
        similar = list(session.scalars(select(Plate.barcode).limit(100)))
        new = [name for name in absent if barcodes[name] in maps and maps[barcodes[name]].wells]
        for barcode in new:
            if len(barcode) > LONGEST:
                raise UserInputError(f"A plate's name has at most {LONGEST} characters.")
            near = difflib.get_close_matches(barcode, similar, n=1, cutoff=0.8)
            if near:
                account.notes.append(f"plate {barcode} is new: did you mean {near[0]}?")
        ids = insert_numbered(session, Plate, ("barcode",), [(barcode,) for barcode in new])
        keys.update(zip(new, ids, strict=True))
        if new:
            account.notes.append(
                f"new, made by this map, without images so far: plate {some_of(new)}. "
                "If that is a mistake: cellstore undo RUN"
            )
        absent = [name for name in absent if barcodes[name] not in maps]
    found: dict[str, list[int]] = defaultdict(list)
    unmapped: dict[str, list[str]] = defaultdict(list)
    for barcode, key in keys.items():
        if barcodes[barcode] in maps:
            found[barcodes[barcode]].append(key)
        else:
            unmapped[barcodes[barcode]].append(barcode)
    for name, missing in sorted(unmapped.items()):
        detail = f"{', '.join(sorted(missing))} use the plate map {name}, which was not given"
        account.problem(None, "no such plate map", detail)
    if absent:
        account.notes.append(f"{len(absent)} of {len(barcodes)} plates are not in the store")
    return found


def _apply_map(
    session: Session,
    writer: TreatmentWriter,
    plate_map: PlateMap,
    plates: Sequence[int],
    aliases: Mapping[str, str],
    account: Account,
) -> tuple[set[Position], set[Position]]:
    """Point the wells of ``plates`` to their treatments; return those made, and those changed."""
    on_map = plate_map.wells
    treated = {at: without_aliases(row.record, aliases) for at, row in on_map.items() if row.record}
    emptied = on_map.keys() - treated.keys()
    wells: dict[tuple[int, Position], int] = {}
    query = (
        select(Well.plate_id, Well.well_row, Well.well_column, Well.id, Well.treatment_id)
        .add_columns(Plate.barcode)
        .join(Plate, Plate.id == Well.plate_id)
    )
    for plate, row, column, well, treatment, barcode in session.execute(
        query.where(Well.plate_id.in_(plates))
    ):
        wells[plate, (row, column)] = well
        if treatment is not None and (row, column) in emptied:
            account.suspicious(
                on_map[row, column].line,
                "a blank well that has a treatment",
                f"{barcode}/{format_well(row, column)} is blank on the map, but keeps the "
                "treatment that it has in the store. If that is wrong: cellstore relabel "
                f"{barcode}/{format_well(row, column)} --treatment none --reason TEXT",
                file=writable(plate_map.path.name),
            )
    # All else that a map says is of its wells, also where it is the same for all.
    of_plate = [
        {key: text for key, text in row.metadata.items() if key in PLATE_COLUMNS}
        for row in on_map.values()
    ]
    common = {
        plate.id: complete_plate(plate, of_plate, set(), account)
        for plate in session.scalars(select(Plate).where(Plate.id.in_(plates)))
    }
    session.flush()
    told = [at for at, row in on_map.items() if at in treated or row.metadata]
    new = [(plate, at) for plate in plates for at in told if (plate, at) not in wells]
    rows = [(plate, *at, format_well(*at)) for plate, at in new]
    made = dict(zip(new, insert_numbered(session, Well, WELL, rows), strict=True))
    all_wells = {**wells, **made}
    wanted = {
        all_wells[plate, at]: (record, on_map[at].line)
        for plate in plates
        for at, record in treated.items()
    }
    changed = writer.assign(wanted, set(made.values()))
    metadata = {
        well: on_map[at].metadata
        for (plate, at), well in all_wells.items()
        if at in on_map and on_map[at].metadata
    }
    changed |= keep_well_metadata(session, metadata, common, account.run_id)
    return {at for _, at in made}, {at for (_, at), well in wells.items() if well in changed}


def _imaged(session: Session, plates: Sequence[int]) -> dict[Position, bool]:
    """Return the wells with images on plates, and whether their treatment is known on all."""
    query = (
        select(Well.well_row, Well.well_column, func.count(Well.treatment_id) == func.count())
        .where(Well.plate_id.in_(plates), exists().where(Image.well_id == Well.id))
        .group_by(Well.well_row, Well.well_column)
    )
    return {(row, column): bool(known) for row, column, known in session.execute(query)}


# ---- Tables of treatments ----

_Sample = frozenset[tuple[str, ...]]
"""What names the samples of a treatment: of each its identifier, else its kind and name."""
_Use = tuple[int, Control | None]
"""A treatment, and a role that wells have which got it."""


def _sample(record: TreatmentRecord) -> _Sample:
    return frozenset(
        (part.kind.value, part.pert_iname) if part.identifier is None else (part.identifier,)
        for part in record.parts
    )


def _unordered(record: TreatmentRecord) -> Hashable:
    """Return all that a record says, but for the order of its parts."""
    parts = (replace(part, control=None, others=()) for part in record.parts)
    return record.control, frozenset(parts) if record.others else record


def _write_treatments(
    session: Session,
    rows: Sequence[TreatmentRow],
    aliases: Mapping[str, str],
    account: Account,
) -> None:
    """Make new treatments, and give the wells of corrected ones what they are now.

    A row that describes a sample otherwise than an earlier row of the file is refused.
    """
    writer = TreatmentWriter(session, account)
    first: dict[_Sample, TreatmentRecord] = {}
    given: list[tuple[int, TreatmentRecord]] = []
    for line, written in rows:
        if written is None:
            account.unchanged += 1
            continue
        record = without_aliases(written, aliases)
        sample = _sample(record)
        if sample not in first:
            first[sample] = record
            given.append((line, record))
        elif first[sample] == record:
            account.unchanged += 1
        else:
            name = record.identifier or record.pert_iname
            detail = f"{name} has another description on an earlier line"
            account.refuse(line, "broad_sample twice", detail)
    known = _known(session, [record for _, record in given])
    corrected = {
        use: (record, line)
        for line, record in given
        for use, old in known[_sample(record)].items()
        if _unordered(completed(record, old)) != _unordered(old)
    }
    query = select(Well.id, Well.treatment_id, Well.control)
    treatments = {treatment for treatment, _ in corrected}
    uses: dict[int, _Use] = {
        well: (had, control)
        for well, had, control in rows_in(session, query, Well.treatment_id, treatments)
        if (had, control) in corrected
    }
    moved: set[_Use] = set()
    for some in in_lists(sorted(uses), WELLS_AT_ONCE):
        wanted = {well: corrected[uses[well]] for well in some}
        moved |= {uses[well] for well in writer.assign(wanted, ())}
    records = []
    for _, record in given:
        present = known[_sample(record)]
        complete = record
        if present:
            # A name that is given back finds the perturbation that it had before.
            named = [use for use, old in present.items() if old.pert_iname == record.pert_iname]
            latest = max(treatment for treatment, _ in named or present)
            olds = [old for (treatment, _), old in present.items() if treatment == latest]
            complete = completed(record, olds[0])
        if not present:
            account.created += 1
        elif (
            _unordered(complete) in map(_unordered, present.values()) and not moved & present.keys()
        ):
            account.unchanged += 1
        else:
            account.updated += 1
        records.append(complete)
    writer.ids(records)
    writer.report()


def _known(
    session: Session, given: Sequence[TreatmentRecord]
) -> Mapping[_Sample, dict[_Use, TreatmentRecord]]:
    """Return what the store has of each sample."""
    parts = [part for record in given for part in record.parts]
    identifiers = [part.identifier for part in parts if part.identifier is not None]
    names = [part.pert_iname for part in parts if part.identifier is None]
    conditions: list[ColumnElement[bool]] = []
    conditions += [Perturbation.identifier.in_(some) for some in in_lists(identifiers)]
    unnamed = Perturbation.identifier.is_(None)
    conditions += [Perturbation.name.in_(some) & unnamed for some in in_lists(names)]
    rows: dict[int, TreatmentRecord] = {}
    for condition in conditions:
        rows |= records_of(session, condition)
    controls: dict[int, set[Control | None]] = defaultdict(set)
    query = select(Well.treatment_id, Well.control).distinct()
    for treatment, control in rows_in(session, query, Well.treatment_id, rows):
        controls[treatment].add(control)
    by_table = {_sample(record): record.control for record in given}
    found: dict[_Sample, dict[_Use, TreatmentRecord]] = defaultdict(dict)
    for treatment, record in rows.items():
        sample = _sample(record)
        # Where it has no wells, its role is that of the table.
        for control in controls.get(treatment, {by_table.get(sample)}):
            found[sample][treatment, control] = replace(record, control=control)
    return found
