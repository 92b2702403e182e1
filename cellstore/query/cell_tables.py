"""The cells of a split as one table, for whoever learns from them with tools of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config import Sources
from ..enums import Stage, Subset
from ..errors import UserInputError
from ..jobs.lookup import find_recipe, find_split
from ..jobs.workspace import Workspace
from .cells import choose_recipes, last_with_masks
from .engine import open_questions
from .exclusions import find_qc_run
from .feature_files import set_of_recipe
from .guard import Limits, literal, quoted

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


@dataclass(frozen=True)
class CellTable:
    """The cells of a split: a row for each, read when they are asked for.

    ``query`` is the SQL behind it, which also ``store.sql`` takes; keep it with what you make of
    the cells. Every reading is of the moment when it begins.
    """

    workspace: Workspace = field(repr=False)
    query: str

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
        """Return all rows as a data frame of polars.

        Raises:
            UserInputError: polars is not installed.
        """
        try:
            import polars
        except ImportError as error:
            raise UserInputError("polars is not installed. Run: pip install polars") from error
        return polars.from_arrow(self.to_arrow())


def cell_table(
    workspace: Workspace,
    sources: Sources,
    subset: Subset | None,
    features: str | bool,
    exclude_flagged: str | None,
) -> CellTable:
    """Return the table of the cells of a split; see :meth:`cellstore.Store.cells`.

    Raises:
        UnknownNameError: there is no such split, recipe, feature set or quality-control run.
        UserInputError: the recipes do not belong together, or nothing is measured yet.
    """
    with workspace.database.read() as session:
        split = find_split(session, sources.split)
        recipes = (sources.segmentation, sources.measurement)
        name = None
        if features:
            asked = features if isinstance(features, str) else None
            segment, measure = choose_recipes(session, *recipes, asked)
            found = set_of_recipe(session, measure.id)
            assert found is not None  # each measurement makes one
            name = found.name
        elif sources.segmentation is not None:
            segment = find_recipe(session, Stage.SEGMENT, sources.segmentation)
        else:
            segment = last_with_masks(session)
        flagged = None
        if exclude_flagged is not None:
            flagged = find_qc_run(session, exclude_flagged).id
    where = "" if subset is None else f" AND m.subset = {literal(subset.value)}"
    for unit, table in (("m.image_id", "image_flags"), ("c.id", "cell_flags")):
        if flagged is not None:
            of_run = f"SELECT {table[:-6]}_id FROM {table} WHERE run_id = {flagged}"  # noqa: S608
            where += f"\n    AND {unit} NOT IN ({of_run})"
    join = "" if name is None else f"\nLEFT JOIN {quoted(name)} AS f ON f.cell_id = c.id"
    return CellTable(
        workspace,
        CELLS.format(
            values="" if name is None else ", f.* EXCLUDE (cell_id)",
            segment=segment.id,
            split=literal(split.name),
            subset=where,
            join=join,
        ),
    )
