"""The command that hands cells out to other tools: export."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cellstore.errors import UserInputError

from . import render
from .context import open_store, sentences
from .options import JsonOption, PlatesOption, StoreOption


class Format(StrEnum):
    """What an export is written as."""

    PARQUET = "parquet"
    CSV = "csv"
    ANNDATA = "anndata"


@sentences
def export(
    ctx: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    form: Annotated[
        Format | None,
        typer.Option(
            "--format",
            help="Default: told by the ending of OUT: .csv, .h5ad (AnnData), else Parquet.",
            show_default=False,
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The feature set. Default: what was measured or ingested last.",
            show_default=False,
        ),
    ] = None,
    segmentation: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="Whose cells: number or start of the fingerprint, as 'cellstore status' lists "
            "them. Default: those that were measured last.",
            show_default=False,
        ),
    ] = None,
    measurement: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE", help="Which measurements, instead of --features.", show_default=False
        ),
    ] = None,
    plate: PlatesOption = None,
    for_spreadsheet: Annotated[
        bool,
        typer.Option(
            "--for-spreadsheet",
            help="CSV: put a ' before texts that a spreadsheet would run as formulas. Such a "
            "table no longer reads back as it was.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is there.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a table with a row per cell, for pycytominer and other tools.

    Columns are those of pycytominer: Metadata_Plate, Metadata_Well, Metadata_Site, ..., then
    the features, built-in ones as Cells_area and so on. Excluded cells are rows, too, with the
    reason in Metadata_Excluded. Ingesting the table into another store gives the same cells.

    \b
    Example:
      cellstore export cells.parquet
      cellstore export cells.csv --plate BR00117035 --features my_profiles
    """
    with open_store(ctx, store, quiet=as_json) as opened:
        result = opened.export(
            out,
            format=(form or _told_by(out)).value,
            features=features,
            segmentation=segmentation,
            measurement=measurement,
            plates=tuple(plate or ()),
            for_spreadsheet=for_spreadsheet,
            force=force,
        )
    if as_json:
        render.as_json(result)
        return
    render.facts(
        [
            ("written", result.path),
            ("format", result.format),
            ("cells", f"{result.cells:,}"),
            ("features", f"{result.features:,} of {result.feature_set or 'the built-in ones'}"),
            ("recipes", f"segment {result.segment_recipe}, measure {result.measure_recipe}"),
            ("plates", result.plates),
        ]
    )


def _told_by(out: Path) -> Format:
    endings = {".csv": Format.CSV, ".h5ad": Format.ANNDATA}
    endings |= dict.fromkeys((".parquet", ".pq"), Format.PARQUET)
    found = endings.get(out.suffix.lower())
    if found is None:
        raise UserInputError(
            f"{out.name} does not say its format by its ending ({', '.join(endings)}). Say it with "
            "--format."
        )
    return found
