"""Out and in again: an export, ingested into a new store, exports as the same rows."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import Factory, treatment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, update

from cellstore.analysis.features import FEATURE_NAMES
from cellstore.config import IngestParams
from cellstore.enums import Control, PerturbationKind, Stage
from cellstore.errors import UserInputError
from cellstore.io.tables import MISSING
from cellstore.io.treatments import TreatmentRecord, target_of
from cellstore.jobs.workspace import Workspace, create_workspace
from cellstore.models import (
    Cell,
    CellFeatures,
    Image,
    ImageFile,
    Perturbation,
    Segmentation,
    Treatment,
)
from cellstore.stages.export import ExportFormat, export
from cellstore.stages.ingest.ingest import ingest
from cellstore.stages.ingest.write_treatments import DESCRIBED

TEXT = (
    (
        st.text(
            st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12
        )
        | st.sampled_from(
            ["=1+1", 'a "b", c', "two\nlines", "-x", "@x", "NA-1", "001", "1e5", "µΩ漢"]
        )
    )
    .map(str.strip)
    .filter(lambda text: text not in MISSING)
)
MAYBE = st.none() | TEXT
NUMBER = st.none() | st.floats(allow_nan=False, allow_infinity=False)
LABELS = st.sets(st.integers(1, 2**31 - 1), min_size=1, max_size=4)
FOLDERS = st.sampled_from([None, "/images", "s3://bucket/a b", "C:\\data\\µ"])


@st.composite
def treatments(draw: st.DrawFn) -> TreatmentRecord:
    name = draw(TEXT)
    roles = [Control.NEGATIVE] if name.upper() == "DMSO" else [None, *Control]
    return TreatmentRecord(
        kind=draw(st.sampled_from(list(PerturbationKind))),
        pert_iname=name,
        target=target_of(draw(MAYBE)),  # as every reader writes it
        control=draw(st.sampled_from(roles)),
        identifier=draw(MAYBE),
        inchikey=draw(MAYBE),
        smiles=draw(MAYBE),
        pubchem_cid=draw(MAYBE),
    )


@st.composite
def cells(draw: st.DrawFn) -> dict[str, Any]:
    box = draw(st.none() | st.tuples(*[st.integers(0, 5000)] * 4))
    centre = draw(st.none() | st.tuples(*[st.floats(0, 5000)] * 2))
    return {
        **dict(zip(("min_row", "min_col", "max_row", "max_col"), box or [None] * 4, strict=True)),
        **dict(zip(("centroid_row", "centroid_col"), centre or [None] * 2, strict=True)),
        "excluded": draw(MAYBE),
        "features": draw(st.none() | st.lists(NUMBER, min_size=3, max_size=3)),
    }


@st.composite
def images(draw: st.DrawFn) -> dict[str, Any]:
    labels = sorted(draw(LABELS))
    channels = draw(st.sets(st.sampled_from(["DNA", "ER", "Mito", "a b"]), max_size=3))
    return {
        "site": draw(st.integers(0, 9)),
        "plane": draw(st.integers(1, 3)),
        "time_point": draw(st.integers(1, 3)),
        "core_name": draw(TEXT),
        "cells": {label: draw(cells()) for label in labels},
        "files": {channel: draw(FOLDERS) for channel in sorted(channels)},
    }


WELLS = st.fixed_dictionaries(
    {
        "treatment": st.none() | treatments(),
        "images": st.lists(
            images(),
            min_size=1,
            max_size=3,
            unique_by=lambda image: (image["site"], image["plane"], image["time_point"]),
        ),
    }
)
PLATES = st.fixed_dictionaries(
    {
        "batch": MAYBE,
        "wells": st.dictionaries(
            st.tuples(st.integers(1, 26), st.integers(1, 48)), WELLS, min_size=1, max_size=3
        ),
    }
)
SCREENS = st.dictionaries(TEXT, PLATES, min_size=1, max_size=2)


def fill(workspace: Workspace, screen: dict[str, Any]) -> None:
    """Make the store that ``screen`` describes."""
    make = Factory(workspace)
    segment = make.recipe(Stage.SEGMENT)
    found = make.run(Stage.SEGMENT, segment)
    measured = make.run(Stage.MEASURE, make.recipe(Stage.MEASURE, inputs=[segment]))
    known: dict[str, Treatment] = {}
    for barcode, plate in screen.items():
        row = make.plate(barcode, plate["batch"])
        for (well_row, column), well in plate["wells"].items():
            treatment = _treatment(make, known, well["treatment"])
            place = make.well(row, well_row, column, treatment)
            for image in well["images"]:
                made = make.add(
                    Image(well_id=place.id, **{k: image[k] for k in KEYS}, content_sha256=None)
                )
                _files(make, made, image["files"])
                masks = make.segmentation(made, found, content_sha256=None)
                make.job(measured, made)
                _cells(make, masks, image["cells"], measured.recipe_id, measured.id)


KEYS = ("site", "plane", "time_point", "core_name")


def _treatment(
    make: Factory, known: dict[str, Treatment], record: TreatmentRecord | None
) -> Treatment | None:
    if record is None:
        return None
    with make.workspace.database.begin() as session:
        return treatment(
            session,
            record.pert_iname,
            kind=record.kind,
            identifier=record.identifier,
            **{name: getattr(record, name) for name in DESCRIBED},
        )


def _files(make: Factory, image: Image, files: dict[str, str | None]) -> None:
    for position, (channel, folder) in enumerate(files.items(), start=1):
        make.add(
            ImageFile(
                image_id=image.id,
                channel=channel,
                position=position,
                name=f"{image.id} {channel}.tif",
                folder_id=None if folder is None else make.folder(folder).id,
            )
        )


def _cells(
    make: Factory, masks: Segmentation, cells: dict[int, Any], recipe: int, run: int
) -> None:
    facts = [
        Cell(
            segmentation_id=masks.id,
            object_number=label,
            **{k: v for k, v in cell.items() if k in BOX},
        )
        for label, cell in cells.items()
    ]
    made = make.add_all(facts)
    with make.workspace.database.begin() as session:
        query = update(Segmentation).where(Segmentation.id == masks.id)
        session.execute(query.values(n_cells=len(made)))
    pairs = zip(made, cells.values(), strict=True)
    make.add_all(
        [
            CellFeatures(
                cell_id=row.id,
                recipe_id=recipe,
                run_id=run,
                **dict(zip(FEATURE_NAMES[:3], cell["features"], strict=True)),
            )
            for row, cell in pairs
            if cell["features"] is not None
        ]
    )


BOX = ("min_row", "min_col", "max_row", "max_col", "centroid_row", "centroid_col", "excluded")


def exported(workspace: Workspace, out: Path, features: str | None = None) -> pa.Table:
    """The Parquet export of a store, which is left in ``out``, without what is of this store."""
    export(workspace, out, features=features, include_excluded=True, force=True)
    return pq.read_table(out).drop(["Metadata_CellId", "Metadata_Segmentation"])


def as_text(table: pa.Table) -> list[list[str]]:
    """Rows as texts, in which 1 and 1.0 differ, and 0.0 and -0.0."""
    return [[f"{key}: {value!r}" for key, value in row.items()] for row in table.to_pylist()]


NUMBERS = count(1)


@pytest.fixture
def empty(request: pytest.FixtureRequest) -> Path:
    """The database of a store in which nothing is yet."""
    found: Path = request.getfixturevalue("_sqlite_template")
    return found


@contextmanager
def new_store(folder: Path, template: Path) -> Iterator[Workspace]:
    root = folder / f"store{next(NUMBERS)}"
    root.mkdir()
    shutil.copy(template, root / "cellstore.db")
    workspace, _ = create_workspace(root)
    yield workspace
    workspace.database.close()
    shutil.rmtree(root)


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(screen=SCREENS)
def test_parquet_out_and_in_again(screen: dict[str, Any], empty: Path, tmp_path: Path) -> None:
    with (
        new_store(tmp_path, empty) as first,
        new_store(tmp_path, empty) as second,
    ):
        fill(first, screen)
        wanted = exported(first, tmp_path / "first.parquet")
        result = ingest(second, tmp_path / "first.parquet")
        assert (result.refused, result.cells) == (0, wanted.num_rows)
        found = exported(second, tmp_path / "second.parquet")
        assert found.schema == wanted.schema
        assert as_text(found) == as_text(wanted)


EXAMPLE = {
    "001": {
        "batch": "2026_03",
        "wells": {
            (1, 2): {
                "treatment": TreatmentRecord(
                    PerturbationKind.COMPOUND, '=a, "b"\nµ', "HDAC1", Control.POSITIVE, "BRD-1"
                ),
                "images": [
                    {
                        **dict(zip(KEYS, (1, 1, 1, "r01c02f01"), strict=True)),
                        "files": {"DNA": "/images", "ER": None},
                        "cells": {
                            7: {
                                **dict.fromkeys(BOX, 1),
                                "excluded": None,
                                "features": [1.5, 0.1, 2.0],
                            },
                            9: {**dict.fromkeys(BOX), "excluded": "small", "features": None},
                        },
                    }
                ],
            },
            (2, 1): {
                "treatment": None,
                "images": [
                    {
                        **dict(zip(KEYS, (0, 2, 3, "field"), strict=True)),
                        "files": {},
                        "cells": {1: {**dict.fromkeys(BOX), "features": [None, 1e-300, -0.1]}},
                    }
                ],
            },
        },
    }
}


@pytest.mark.parametrize("form", [ExportFormat.PARQUET, ExportFormat.CSV])
def test_both_databases_and_forms(
    workspace: Workspace, empty: Path, tmp_path: Path, form: ExportFormat
) -> None:
    fill(workspace, EXAMPLE)
    wanted = exported(workspace, tmp_path / "first.parquet")
    assert wanted.num_rows == 3
    export(workspace, tmp_path / "out", format=form, include_excluded=True)
    with new_store(tmp_path, empty) as second:
        ingest(second, tmp_path / "out")
        found = exported(second, tmp_path / "second.parquet")
    assert as_text(found) == as_text(wanted)


def test_not_a_number_comes_back_as_null(
    sqlite_workspace: Workspace, empty: Path, tmp_path: Path
) -> None:
    fill(sqlite_workspace, EXAMPLE)
    table = exported(sqlite_workspace, tmp_path / "first.parquet")
    place = table.column_names.index("Cells_area")
    values: Sequence[float | None] = [math.nan, None, 1.0]
    odd = table.set_column(place, "Cells_area", pa.array(values, pa.float64()))
    pq.write_table(odd, tmp_path / "odd.parquet")
    with new_store(tmp_path, empty) as second:
        ingest(second, tmp_path / "odd.parquet")
        found = exported(second, tmp_path / "second.parquet")
    assert found.column("Cells_area").to_pylist() == [None, None, 1.0]


PARTS = [
    {"kind": "compound", "pert_iname": "taxol", "dose": 0.04, "unit": "uM", "pubchem_cid": "36314"},
    {"kind": "sirna", "pert_iname": "siNF1", "target": "NF1"},
]


@pytest.mark.one_database
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_doses_and_combinations_come_back(
    workspace: Workspace, empty: Path, tmp_path: Path, ending: str
) -> None:
    table = {
        "Metadata_Plate": ["P"] * 3,
        "Metadata_Well": ["A01", "A02", "A03"],
        "Metadata_Site": [1] * 3,
        "Metadata_ObjectNumber": [1] * 3,
        "Metadata_pert_iname": ["taxol + siNF1", "taxol", "DMSO"],
        "Metadata_components": [json.dumps(PARTS), None, None],
        "Metadata_dose": [None, 40.0, None],
        "Metadata_dose_unit": [None, "nM", None],
        "Metadata_passage": ["7", "8", None],
        "Cells_Area": [1.0, 2.0, 3.0],
    }
    pq.write_table(pa.table(table), tmp_path / "cells.parquet")
    assert ingest(workspace, tmp_path / "cells.parquet").refused == 0
    wanted = exported(workspace, tmp_path / "first.parquet")
    shown = ("pert_iname", "dose", "dose_unit", "dose_original", "control_type", "passage")
    assert [[row[f"Metadata_{name}"] for name in shown] for row in wanted.to_pylist()] == [
        ["taxol + siNF1", None, None, None, None, "7"],
        ["taxol", 0.04, "uM", "40.0 nM", None, "8"],
        ["DMSO", None, None, None, "negative", None],
    ]
    export(workspace, tmp_path / f"out.{ending}", format=ExportFormat(ending))
    with new_store(tmp_path, empty) as second:
        assert ingest(second, tmp_path / f"out.{ending}").refused == 0
        found = exported(second, tmp_path / "second.parquet")
        with second.database.read() as session:
            query = select(Perturbation.name, Perturbation.target).order_by(Perturbation.name)
            known = [tuple(row) for row in session.execute(query)]
    assert as_text(found) == as_text(wanted)
    assert known == [("DMSO", None), ("siNF1", "NF1"), ("taxol", None)]


def test_a_combination_that_cannot_be_read_is_not_known(
    sqlite_workspace: Workspace, tmp_path: Path
) -> None:
    rows = "Metadata_Plate,Metadata_Well,Metadata_Site,Metadata_ObjectNumber,Metadata_pert_iname,"
    rows += "Metadata_components,Cells_Area\nP,A01,1,1,a,{,1\nP,A02,1,1,a,[{}],2\nP,A03,1,1,a,,3\n"
    named = "{'kind': 'compound', 'pert_iname': 'a'"
    for well, wrong in enumerate(("'dose': 'five'", "'dose': -1", "'smiles': ['a']"), 4):
        cell = f"[{named}, {wrong}}}]".replace("'", '""')
        rows += f'P,A0{well},1,1,a,"{cell}",1\n'
    (tmp_path / "cells.csv").write_text(rows)
    result = ingest(sqlite_workspace, tmp_path / "cells.csv")
    assert (result.refused, result.cells, len(result.issues)) == (0, 6, 5)
    assert {issue.reason for issue in result.issues} == {"not a treatment"}


@pytest.mark.one_database
def test_an_export_is_read_in_a_store_that_has_the_images(
    workspace: Workspace, empty: Path, tmp_path: Path
) -> None:
    fill(workspace, EXAMPLE)
    wanted = exported(workspace, tmp_path / "cells.parquet")
    with pytest.raises(UserInputError, match="in this store already"):
        ingest(workspace, tmp_path / "cells.parquet", IngestParams(name="again"))
    other: Any = deepcopy(EXAMPLE)  # the same images, in which another cell was found
    other["001"]["wells"][1, 2]["images"][0]["cells"][7]["min_row"] = 0
    with new_store(tmp_path, empty) as second:
        fill(second, other)
        result = ingest(second, tmp_path / "cells.parquet", IngestParams(name="again"))
        assert (result.refused, result.cells, result.images) == (0, 3, 2)
        found = exported(second, tmp_path / "b.parquet", "again")
    assert as_text(found) == as_text(wanted)
