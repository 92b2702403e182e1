"""What a split gives away: of the store, or of the tables of others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ...db.models import Image, ImageFile, Label, Plate, SplitMember, Treatment, Well
from ...errors import UserInputError
from ...formats.splits import SplitRow, check_not_empty, read_split_tables
from ...ops.compounds import Compound
from ...ops.leaks import LeakSeverity, Member, SplitCheck, leaks
from ...runs import Workspace, find_split
from ...terms import GroupLevel, LabelField, Subset
from .candidates import compound_of
from .facts import IMPORTED, CheckResult


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
    field: LabelField | None = None,
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
    wanted = field or (LabelField.TARGET if has_target else LabelField.PERT_INAME)
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
            f"No row of the tables has a {wanted.value}, or plate and well. Choose another "
            "--field, or add a table that has it."
        )
    names = ", ".join(path.name for path in paths)
    found = leaks(members, group_level=group_level)
    result = _result(names, IMPORTED, group_level, found)
    return replace(result, images=0, rows=len(members), refused=len(tables.refusals))


def compound_in(row: SplitRow) -> Compound:
    """Return what a row of a split table says of its compound."""
    return Compound(row.name, row.identifier, row.inchikey, row.smiles)


def label_in(row: SplitRow, field: LabelField) -> str | None:
    """Return the class of a row of a split table; a compound may have an identifier only."""
    return row.target if field is LabelField.TARGET else row.name or row.identifier


def _result(name: str, protocol: str, level: GroupLevel, found: SplitCheck) -> CheckResult:
    severities = [finding.severity for finding in found.findings]
    return CheckResult(
        split=name,
        protocol=protocol,
        group_level=level.value,
        images=found.n_images,
        wells=found.n_wells,
        wells_on_both_sides=found.wells_on_both_sides,
        labels=found.n_labels,
        labels_on_both_sides=found.labels_on_both_sides,
        plates_on_both_sides=found.plates_on_both_sides,
        leaks=severities.count(LeakSeverity.LEAK),
        warnings=severities.count(LeakSeverity.WARNING),
        findings=found.findings,
    )


def _members(session: Session, split_id: int) -> Iterator[Member]:
    """Yield the images of each well, side and label as one; the database counts them."""
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
        .add_columns(Plate.barcode, Treatment.pert_iname, Treatment.identifier)
        .add_columns(Treatment.inchikey, Treatment.smiles)
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
    """Yield the digest and the sides of files that are in images of several sides."""
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
