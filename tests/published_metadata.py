"""Rebuild the metadata table of the published study from the public CPJUMP1 tables.

Plate BR00116991: wells A01 to N07 in row order (319 wells), 9 sites each except N07 with 5.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from cellstore.io.filenames import format_well
from cellstore.io.platemaps import PlateAnnotation, read_annotation
from cellstore.io.treatments import TreatmentRecord

PLATE = "BR00116991"
LAST_WELL = (14, 7)
SITES, LAST_SITES = 9, 5
COLUMNS = ("FileName_OrigRNA", "Metadata_pert_iname", "Metadata_target")
RESPELLED_SAMPLE = "BRD-A63444178-001-01-5"
"""Well J11. CPJUMP1's cpjump1_metadata.csv spells its compound ME0328, and that of G05 ME-0328."""


def treatment_of_well(
    annotation: PlateAnnotation, plate: str, row: int, column: int
) -> TreatmentRecord | None:
    found = annotation.map_of(plate)
    well = None if found is None else found.wells.get((row, column))
    return None if well is None else well.record


def compound_annotation(cpjump1: Path) -> PlateAnnotation:
    """The compound plate map of CPJUMP1 joined with its compound table."""
    tables = cpjump1 / "metadata"
    return read_annotation(
        tables / "platemaps/2020_11_04_CPJUMP1/platemap/JUMP-Target-1_compound_platemap.txt",
        [tables / "external_metadata/JUMP-Target-1_compound_metadata.tsv"],
    )


def published_rows(cpjump1: Path, two_spellings: bool) -> Iterator[tuple[str, str, str]]:
    """(file name, pert_iname, target) of every image of the study, in its order."""
    annotation = compound_annotation(cpjump1)
    for row in range(1, LAST_WELL[0] + 1):
        for column in range(1, 25):
            if (row, column) > LAST_WELL:
                return
            treatment = treatment_of_well(annotation, PLATE, row, column)
            assert treatment is not None, format_well(row, column)
            respelled = two_spellings and treatment.identifier == RESPELLED_SAMPLE
            name = "ME0328" if respelled else treatment.pert_iname
            for site in range(1, (LAST_SITES if (row, column) == LAST_WELL else SITES) + 1):
                file = f"r{row:02d}c{column:02d}f{site:02d}p01-ch3sk1fk1fl1.tiff"
                yield file, name, treatment.target or ""


def write_published_metadata(cpjump1: Path, target: Path, two_spellings: bool = True) -> Path:
    """Write the table to ``target``: 250 labels, or 249 without ``two_spellings``."""
    with target.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        writer.writerows(published_rows(cpjump1, two_spellings))
    return target
