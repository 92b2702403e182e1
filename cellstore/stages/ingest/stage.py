"""The ingest of one metadata table: read it whole once, then write it batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

from sqlalchemy.orm import Session

from ...artifacts import sha256_of
from ...db.models import ImageFile, Recipe
from ...errors import UnknownNameError, UserInputError
from ...formats.layouts import Layout, layout_of, read_images
from ...formats.platemaps import PlateAnnotation, read_annotation
from ...formats.records import ImageRecord, Refusal
from ...formats.tables import open_table
from ...runs import RecipeSpec, RunHandle, Workspace, register, running
from ...terms import Stage
from .files import FileFinder
from .known import Known, identity, image_key, load, well_key
from .write import FoundFile, Prepared, adds, contradicts, differs, write_batch

VERSION = 1
BATCH = 500

T = TypeVar("T")


@dataclass(frozen=True)
class Refused:
    """Something that could not be used; ``reason`` is short and can be counted.

    ``file`` is the table that the line is of, where it is not the metadata table.
    """

    line: int
    reason: str
    detail: str
    file: str | None = None


@dataclass(frozen=True)
class IngestResult:
    """What one table brought. ``rows = created + completed + unchanged + refused``.

    ``completed`` rows were there and gained something: a file that was found, or changed, or a
    treatment. ``problems`` are image files that could not be used although their rows could (their
    images stay missing), and rows of the other tables that could not. ``run_id`` is None when
    nothing changed.
    """

    run_id: int | None
    layout: str
    rows: int
    created: int
    completed: int
    unchanged: int
    refused: tuple[Refused, ...]
    problems: tuple[Refused, ...]
    plates: int
    wells: int
    images: int
    missing_images: int
    notes: tuple[str, ...] = ()


@dataclass
class _Tally:
    rows: int = 0
    created: int = 0
    completed: int = 0
    unchanged: int = 0
    refused: list[Refused] = field(default_factory=list)
    plates: set[str] = field(default_factory=set)
    wells: set[tuple[str, int, int]] = field(default_factory=set)
    images: int = 0
    missing: int = 0


def ingest(
    workspace: Workspace,
    metadata: Path,
    *,
    images: Path | None = None,
    plate: str | None = None,
    layout: str | None = None,
    platemap: Path | None = None,
    compounds: Path | None = None,
    barcodes: Path | None = None,
) -> IngestResult:
    """Bring the rows of a metadata table into the store; doing it again changes nothing.

    ``images`` is the folder in which files are searched by name, ``plate`` the barcode for
    tables that name none, ``layout`` forces a reader, ``platemap`` and ``compounds`` (and
    ``barcodes`` for a folder of platemaps) say what was done to each well.

    Raises:
        BadTableError: a table is empty, lacks columns, or is of another kind. Nothing is written.
        UserInputError: a file or folder is not there, or the plate is not known.
    """
    table = open_table(metadata)
    found = layout_of(table) if layout is None else _named(layout)
    annotation = _annotation(platemap, compounds, barcodes)
    finder = FileFinder(images)
    # Read to the end once: a table that cannot be read fails before anything is written.
    total = sum(1 for _ in read_images(table, found, plate))
    inputs = [metadata, *(annotation.files if annotation else ())]
    recipe = _recipe(workspace, found, inputs)
    tally = _Tally()
    with ExitStack() as stack:
        writer = _Writer(workspace, recipe, finder, stack, tally)
        workspace.progress.start("ingest", total)
        stack.callback(workspace.progress.finish)
        for batch in _batches(_annotated(read_images(table, found, plate), annotation), BATCH):
            writer.write(batch)
            workspace.progress.advance(len(batch))
        problems = _problems(finder, annotation)
        return writer.finish(found, problems, table.notes)


def _annotation(
    platemap: Path | None, compounds: Path | None, barcodes: Path | None
) -> PlateAnnotation | None:
    if platemap is None and compounds is None and barcodes is None:
        return None
    if platemap is None or compounds is None:
        raise UserInputError(
            "A plate map and the table of its compounds go together: give both --platemap and "
            "--compounds."
        )
    return read_annotation(platemap, compounds, barcodes)


def _problems(finder: FileFinder, annotation: PlateAnnotation | None) -> tuple[Refused, ...]:
    of_files = [Refused(*problem) for problem in finder.problems]
    issues = annotation.issues if annotation else ()
    of_tables = [
        Refused(item.refusal.line, item.refusal.reason, item.refusal.detail, item.path.name)
        for item in issues
    ]
    return (*of_files, *of_tables)


def _named(layout: str) -> Layout:
    if layout not in list(Layout):
        raise UnknownNameError.of("layout", layout, [item.value for item in Layout])
    return Layout(layout)


def _recipe(workspace: Workspace, layout: Layout, inputs: Sequence[Path]) -> Recipe:
    named = [{"name": path.name, "sha256": sha256_of(path)} for path in inputs if path.is_file()]
    spec = RecipeSpec(Stage.INGEST, VERSION, {"layout": layout.value, "files": named})
    with workspace.database.begin() as session:
        return register(session, spec)


def _annotated(
    rows: Iterable[ImageRecord | Refusal], annotation: PlateAnnotation | None
) -> Iterator[ImageRecord | Refusal]:
    if annotation is None:
        yield from rows
        return
    for row in rows:
        if isinstance(row, Refusal):
            yield row
            continue
        if not annotation.knows(row.plate):
            yield Refusal(row.line, "no plate map", f"no map is named for plate {row.plate}")
            continue
        found = annotation.for_well(row.plate, row.row, row.column)
        yield replace(row, treatment=found or row.treatment)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


class _Writer:
    """Writes batches; the run is recorded at the first change, so that no change leaves no run."""

    def __init__(
        self,
        workspace: Workspace,
        recipe: Recipe,
        finder: FileFinder,
        stack: ExitStack,
        tally: _Tally,
    ) -> None:
        self._workspace = workspace
        self._recipe = recipe
        self._finder = finder
        self._stack = stack
        self._tally = tally
        self._run: RunHandle | None = None

    def write(self, batch: Sequence[ImageRecord | Refusal]) -> None:
        """Bring one batch into the store, in one transaction."""
        self._tally.rows += len(batch)
        records = [row for row in batch if isinstance(row, ImageRecord)]
        self._refuse(row for row in batch if isinstance(row, Refusal))
        with self._workspace.database.read() as session:
            known = load(session, records)
            records = self._agreeing(known, records)
            prepared = [self._prepared(known, record) for record in records]
        if any(_changes(known, row) for row in prepared):
            self._start()
            with self._workspace.database.begin() as session:
                self._count(session, known, prepared)
        else:
            self._tally.unchanged += len(prepared)
        self._look_back(prepared)

    def finish(
        self, layout: Layout, problems: tuple[Refused, ...], notes: Sequence[str]
    ) -> IngestResult:
        """Return the account of the whole table."""
        tally = self._tally
        if self._run is not None:
            self._run.result = {
                "rows": tally.rows,
                "created": tally.created,
                "completed": tally.completed,
                "unchanged": tally.unchanged,
                "refused": len(tally.refused),
            }
        return IngestResult(
            run_id=self._run.id if self._run else None,
            layout=layout.value,
            rows=tally.rows,
            created=tally.created,
            completed=tally.completed,
            unchanged=tally.unchanged,
            refused=tuple(sorted(tally.refused, key=lambda item: item.line)),
            problems=problems,
            plates=len(tally.plates),
            wells=len(tally.wells),
            images=tally.images,
            missing_images=tally.missing,
            notes=tuple(notes),
        )

    def _start(self) -> None:
        if self._run is None:
            self._run = self._stack.enter_context(running(self._workspace.database, self._recipe))

    def _refuse(self, refusals: Iterable[Refusal]) -> None:
        self._tally.refused += [Refused(row.line, row.reason, row.detail) for row in refusals]

    def _agreeing(self, known: Known, records: Sequence[ImageRecord]) -> list[ImageRecord]:
        """Refuse rows that say something else about a well than the store or an earlier row."""
        kept: list[ImageRecord] = []
        said: dict[tuple[str, int, int], ImageRecord] = {}
        for record in records:
            key = well_key(record)
            earlier = said.get(key)
            clash = contradicts(known.treatment_of(key), record.treatment) or (
                earlier is not None and _disagree(earlier, record)
            )
            if clash:
                self._refuse([_conflict(known, record, earlier)])
                continue
            if record.treatment is not None:
                said.setdefault(key, record)
            kept.append(record)
        return kept

    def _prepared(self, known: Known, record: ImageRecord) -> Prepared:
        files = self._finder.find(record, known.files_of(image_key(record)))
        core = record.core_name or f"r{record.row:02d}c{record.column:02d}f{record.site:02d}"
        return Prepared(record, core, files)

    def _count(self, session: Session, known: Known, prepared: Sequence[Prepared]) -> None:
        changed = write_batch(session, prepared)
        seen = set(known.images)
        for row in prepared:
            key = image_key(row.record)
            if key not in seen:
                self._tally.created += 1
                seen.add(key)
            elif key in changed:
                self._tally.completed += 1
            else:
                self._tally.unchanged += 1

    def _look_back(self, prepared: Sequence[Prepared]) -> None:
        with self._workspace.database.read() as session:
            known = load(session, [row.record for row in prepared])
        keys = {image_key(row.record) for row in prepared}
        self._tally.plates |= {row.record.plate for row in prepared}
        self._tally.wells |= {well_key(row.record) for row in prepared}
        self._tally.images += len(keys)
        self._tally.missing += sum(known.images[key].content_sha256 is None for key in keys)


def _disagree(earlier: ImageRecord, record: ImageRecord) -> bool:
    if earlier.treatment is None or record.treatment is None:
        return False
    return identity(earlier.treatment) != identity(record.treatment)


def _conflict(known: Known, record: ImageRecord, earlier: ImageRecord | None) -> Refusal:
    present = known.treatment_of(well_key(record))
    other = present.pert_iname if present else None
    if other is None and earlier is not None and earlier.treatment is not None:
        other = f"{earlier.treatment.pert_iname} (line {earlier.line})"
    name = record.treatment.pert_iname if record.treatment else ""
    return Refusal(
        record.line,
        "the well has another treatment",
        f"plate {record.plate}, row {record.row}, column {record.column}: {name!r} here, "
        f"{other!r} before",
    )


def _changes(known: Known, row: Prepared) -> bool:
    """Whether a row would change anything in the store."""
    key = image_key(row.record)
    if key not in known.images:
        return True
    if row.record.treatment is not None and adds(known.treatment_of(key[0]), row.record):
        return True
    present = known.files_of(key)
    return any(_file_changes(present.get(file.channel), file) for file in row.files)


def _file_changes(old: ImageFile | None, file: FoundFile) -> bool:
    return old is None or (file.info is not None and differs(old, file))
