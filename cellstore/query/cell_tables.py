"""The cells of a split as one table, for whoever learns from them with tools of their own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import CellChoice, Limits, Sources
from ..enums import Stage, Subset
from ..errors import QueryError, UserInputError
from ..jobs.lookup import find_recipe, find_split
from ..jobs.workspace import Workspace
from ..notebooks import html_of
from .cells import choose_recipes, last_with_masks
from .engine import Questions, open_questions
from .exclusions import find_qc_run
from .feature_files import set_of_recipe
from .guard import literal, quoted, read_sql
from .source import PREDICTIONS

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

LIMITS = Limits(seconds=24 * 3600, answer_mb=1 << 20)
"""Whoever asks for all cells of a split wants all of them."""

CELLS = """SELECT i.plate, i.well, i.site, m.subset, l.value AS label,
    c.id AS cell_id, c.segmentation_id, c.object_number,
    c.min_row, c.min_col, c.max_row, c.max_col, c.centroid_row, c.centroid_col{values}
FROM split_members AS m
JOIN labels AS l ON l.id = m.label_id
JOIN image_table AS i ON i.image_id = m.image_id
JOIN images AS now ON now.id = m.image_id
JOIN segmentations AS s ON s.image_id = m.image_id AND s.recipe_id = {segment}
    AND (s.content_sha256 IS NULL OR s.content_sha256 = now.content_sha256)
JOIN eligible_cells AS e ON e.segmentation_id = s.id
JOIN cells AS c ON c.id = e.cell_id{join}
WHERE m.split_id = (SELECT id FROM splits WHERE name = {split}){subset}
ORDER BY c.id"""


OF_CONDITION = """SELECT cell_id
FROM (
    SELECT i.* EXCLUDE (excluded, n_cells, n_excluded_cells), c.* EXCLUDE (id, excluded),
        c.id AS cell_id, f.* EXCLUDE (cell_id)
    FROM segmentations AS s
    JOIN image_table AS i ON i.image_id = s.image_id
    JOIN cells AS c ON c.segmentation_id = s.id
    LEFT JOIN {features} AS f ON f.cell_id = c.id
    WHERE s.recipe_id = {segment}
)
WHERE (
{where}
)"""
OF_IMAGES = """SELECT c.id AS cell_id
FROM segmentations AS s
JOIN cells AS c ON c.segmentation_id = s.id
WHERE s.recipe_id = {segment} AND s.image_id IN (SELECT image_id FROM (
{sql}
))"""

_PREDICTED = ("predictions", "image_predictions")
_SQL = re.compile(r"\s*(--|/\*|\(|(select|with|from)\s)", re.IGNORECASE)


def sql_of(given: str) -> str:
    """Return the SQL that ``--sql`` names: the text itself, or that of a file."""
    if _SQL.match(given):
        return given.strip()
    try:
        text = read_sql(Path(given)).strip()
    except QueryError as error:
        raise UserInputError(f"{error} Give a file, or SQL that begins with SELECT.") from error
    # What is kept of it has to be known as SQL, and not as the name of a file, when it is redone.
    return text if _SQL.match(text) else f"--\n{text}"


@dataclass(frozen=True)
class ChosenBy:
    """A selection of cells. ``query``: their ids, in SQL.

    ``reads``: the relations that it names, in small letters; ``predictions_read``: those of
    them that hold predictions.
    """

    query: str
    reads: frozenset[str] = frozenset()
    predictions_read: tuple[str, ...] = ()


def selecting(
    questions: Questions,
    where: str | None,
    sql: str | None,
    segment_id: int,
    measure_id: int | None,
    name: str | None,
) -> ChosenBy:
    """Return what a condition on cells, or the SQL of a user, selects.

    ``where`` may name what ``image_table`` and ``cells`` have, and the measurements of the feature
    set ``name``, or of recipe ``measure_id`` in table ``features``. ``sql`` gives ``cell_id``, or
    ``image_id`` for all cells of these images that recipe ``segment_id`` has found; other columns
    do not count.
    """
    text = sql or ""
    if where is not None:
        built_in = "(SELECT * EXCLUDE (recipe_id, run_id) FROM features WHERE recipe_id = {})"
        features = built_in.format(measure_id) if name is None else quoted(name)
        text = OF_CONDITION.format(segment=segment_id, features=features, where=where)
    read, columns = questions.read(text)
    reads = frozenset(read.tables)
    predictions_read = tuple(
        sorted(n for n in reads if questions.behind({n}) & {PREDICTIONS, *_PREDICTED})
    )
    if where is not None:
        return ChosenBy(read.text, reads, predictions_read)
    kinds = {name.lower(): kind for name, kind in columns.items()}
    for name, query in (
        ("cell_id", "SELECT try_cast(cell_id AS BIGINT) AS cell_id FROM (\n{sql}\n)"),
        ("image_id", OF_IMAGES),
    ):
        if re.fullmatch("[A-Z]*INT(EGER)?", kinds.get(name, "")):
            return ChosenBy(
                query.format(sql=read.text, segment=segment_id), reads, predictions_read
            )
    given = ", ".join(columns)
    example = "SELECT cell_id FROM cell_table WHERE area > 500"
    raise UserInputError(
        f"The selection gives {given}. It needs a column cell_id, or image_id, of whole numbers. "
        f"Try: {example}"
    )


def chosen_cells(questions: Questions, chosen: ChosenBy, last: int) -> bytes:
    """Return the cells of a selection as bits; see :func:`.feature_files.are_chosen`.

    A bit for each id up to ``last`` takes less than the ids: 10 MB for 80 million cells.
    """
    bits = np.zeros((last >> 3) + 1, dtype=np.uint8)
    for batch in questions.ask(chosen.query).batches():
        ids = batch.column(0).drop_null().to_numpy()
        ids = ids[(ids > 0) & (ids <= last)]
        np.bitwise_or.at(bits, ids >> 3, (1 << (ids & 7)).astype(np.uint8))
    return bits.tobytes()


@dataclass(frozen=True)
class CellTable:
    """The cells of a split: a row for each, read when they are asked for.

    ``query`` is the SQL behind it, which also ``store.sql`` takes; keep it with what you make of
    the cells. Every reading is of the moment when it begins.
    """

    workspace: Workspace = field(repr=False)
    query: str

    def _repr_html_(self) -> str:
        how = "to_pandas(), to_polars(), to_arrow() or batches()"
        return html_of({"read it by": how, "query": self.query}, "Cells of a split")

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows as batches of Arrow, without holding all of them."""
        with open_questions(self.workspace, LIMITS) as questions:
            yield from questions.ask(self.query).batches()

    def to_arrow(self) -> pa.Table:
        """Return all rows as a table of Arrow."""
        with open_questions(self.workspace, LIMITS) as questions:
            return questions.ask(self.query).table()

    def to_pandas(self) -> pd.DataFrame:
        """Return all rows as a data frame of pandas."""
        frame: pd.DataFrame = self.to_arrow().to_pandas()
        return frame

    def to_polars(self) -> Any:
        """Return all rows as a data frame of polars."""
        try:
            import polars
        except ImportError as error:
            raise UserInputError("polars is not installed. Run: pip install polars") from error
        return polars.from_arrow(self.to_arrow())


def cell_table(
    workspace: Workspace,
    sources: Sources,
    subset: Subset | None,
    choice: CellChoice,
    *,
    with_features: bool,
) -> CellTable:
    """Return the table of the cells of a split; see :meth:`cellstore.Store.cells`."""
    with workspace.database.read() as session:
        split = find_split(session, sources.split)
        recipes = (sources.segmentation, sources.measurement)
        name, measure_id = None, None
        if with_features or choice.where is not None:
            segment, measure = choose_recipes(session, *recipes, choice.features)
            found = set_of_recipe(session, measure.id)
            assert found is not None  # each measurement makes one
            name, measure_id = found.name, measure.id
        elif sources.segmentation is not None:
            segment = find_recipe(session, Stage.SEGMENT, sources.segmentation)
        else:
            segment = last_with_masks(session)
        flagged = None
        if choice.exclude_flagged is not None:
            flagged = find_qc_run(session, choice.exclude_flagged).id
    only = "" if subset is None else f" AND m.subset = {literal(subset.value)}"
    for unit, table in (("m.image_id", "image_flags"), ("c.id", "cell_flags")):
        if flagged is not None:
            of_run = f"SELECT {table[:-6]}_id FROM {table} WHERE run_id = {flagged}"  # noqa: S608
            only += f"\n    AND {unit} NOT IN ({of_run})"
    if choice.selects:
        sql = None if choice.sql is None else sql_of(choice.sql)
        with open_questions(workspace, LIMITS) as questions:
            chosen = selecting(questions, choice.where, sql, segment.id, measure_id, name)
        only += f"\n    AND c.id IN (\n{chosen.query}\n)"
    name = name if with_features else None
    join = "" if name is None else f"\nLEFT JOIN {quoted(name)} AS f ON f.cell_id = c.id"
    return CellTable(
        workspace,
        CELLS.format(
            values="" if name is None else ", f.* EXCLUDE (cell_id)",
            segment=segment.id,
            split=literal(split.name),
            subset=only,
            join=join,
        ),
    )
