"""OME-Zarr plates of both versions, written here with zarr itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellstore.config import IngestParams
from cellstore.enums import Severity
from cellstore.errors import ImageError
from cellstore.io.folders import read_folder
from cellstore.io.image_files import probe, read_plane
from cellstore.io.image_tables import ImageRecord
from cellstore.io.layouts import Layout, detect
from cellstore.io.tables import Refusal
from cellstore.jobs.workspace import Workspace
from cellstore.stages.ingest.ingest import ingest, refresh

zarr = pytest.importorskip("zarr")

SIZES = {"t": 2, "c": 3, "z": 2, "y": 6, "x": 7}
LABELS = ["DNA", "ER", "RNA"]


def attributes(folder: Path, version: str, **values: Any) -> None:
    """Write what OME says of a group."""
    folder.mkdir(parents=True, exist_ok=True)
    if version == "0.4":
        (folder / ".zgroup").write_text('{"zarr_format": 2}')
        (folder / ".zattrs").write_text(json.dumps(values))
    else:
        text = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": values}}
        (folder / "zarr.json").write_text(json.dumps(text))


def pixels(axes: str, start: int = 0) -> np.ndarray:
    """Each plane has its number everywhere, from ``start``."""
    shape = tuple(SIZES[axis] for axis in axes)
    planes = np.arange(start, start + int(np.prod(shape[:-2]))).reshape(*shape[:-2], 1, 1)
    return np.broadcast_to(planes, shape).astype(np.uint16)


def field(
    folder: Path, version: str, axes: str = "tczyx", start: int = 0, labels: list[str] = LABELS
) -> None:
    units = {axis: {"unit": "micrometer"} if axis in "zyx" else {} for axis in axes}
    scale = [{"t": 1.0, "c": 1.0, "z": 2.0}.get(axis, 0.65) for axis in axes]
    transforms = [{"type": "scale", "scale": scale}]
    attributes(
        folder,
        version,
        multiscales=[
            {
                "axes": [{"name": axis, **units[axis]} for axis in axes],
                "datasets": [
                    {"path": "0", "coordinateTransformations": transforms},
                    {"path": "1", "coordinateTransformations": transforms},
                ],
            }
        ],
        omero={"channels": [{"label": label} for label in labels]},
    )
    data = pixels(axes, start)
    for level in (0, 1):
        array = zarr.create_array(
            str(folder / str(level)),
            shape=data.shape,
            chunks=(*[1] * (len(axes) - 2), 4, 4),
            dtype=data.dtype,
            zarr_format=2 if version == "0.4" else 3,
        )
        array[:] = data


def plate(folder: Path, version: str, axes: str = "tczyx", name: str | None = "BR7") -> Path:
    wells = {"B/3": ["0", "1"], "P/24": ["0"]}
    about = {"name": name} if name else {}
    paths = [{"path": path, "rowIndex": 0, "columnIndex": 0} for path in wells]
    attributes(folder, version, plate={**about, "wells": paths})
    start = 1
    for well, fields in wells.items():
        attributes(folder / well, version, well={"images": [{"path": name} for name in fields]})
        for name in fields:
            field(folder / well / name, version, axes, start)
            start += 100
    return folder


def records(folder: Path, **options: Any) -> list[ImageRecord]:
    items = list(read_folder(folder, **options))
    assert not [item for item in items if isinstance(item, Refusal)]
    return [item for item in items if isinstance(item, ImageRecord)]


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["tczyx", "czyx", "cyx", "yx", "zyx"])
def test_a_plate_is_read_plane_by_plane(tmp_path: Path, version: str, axes: str) -> None:
    path = plate(tmp_path / "P1.zarr", version, axes)
    assert detect(path) is detect(tmp_path) is Layout.IMAGE_FOLDER
    found = records(path)
    planes, times = SIZES["z"] if "z" in axes else 1, SIZES["t"] if "t" in axes else 1
    channels = LABELS if "c" in axes else ["C1"]
    assert [(r.line, r.plate, r.row, r.column, r.site, r.time_point, r.plane) for r in found] == [
        (line, "BR7", row, column, site, time, plane)
        for line, row, column, site in ((1, 2, 3, 0), (2, 2, 3, 1), (3, 16, 24, 0))
        for time in range(1, times + 1)
        for plane in range(1, planes + 1)
    ]
    assert {record.pixel_size for record in found} == {0.65}
    for record in found:
        assert [file.channel for file in record.files] == channels
        data = pixels(axes, 1 + 100 * (record.line - 1))
        for number, file in enumerate(record.files):
            index = {"t": record.time_point - 1, "c": number, "z": record.plane - 1}
            expected = data[tuple(index[axis] for axis in axes[:-2])]
            uri = f"{file.folder}/{file.name}"
            np.testing.assert_array_equal(read_plane(uri), expected)
            info = probe(uri)
            assert (info.height, info.width, info.dtype) == (6, 7, "uint16")
    every = {probe(f"{file.folder}/{file.name}").sha256 for r in found for file in r.files}
    assert len(every) == sum(len(record.files) for record in found)


def test_the_name_of_a_plate_is_given_or_in_it_or_its_folder(tmp_path: Path) -> None:
    path = plate(tmp_path / "P1.ome.zarr", "0.5", "cyx", name=None)
    assert {record.plate for record in records(path)} == {"P1"}
    assert {record.plate for record in records(path, plate="X")} == {"X"}
    names = {"DNA": "Nuclei"}
    assert records(path, channels=names)[0].files[0].channel == "Nuclei"
    plate(tmp_path / "P2.zarr", "0.4", "cyx")
    both = records(tmp_path)
    assert [(r.line, r.plate) for r in both] == [
        *((line, "P1") for line in (1, 2, 3)),
        *((line, "BR7") for line in (4, 5, 6)),
    ]


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_an_array_is_known_by_its_bytes(tmp_path: Path, version: str) -> None:
    path = plate(tmp_path / "P1.zarr", version, "cyx")
    uri = str(path / "B/3/0/0") + "#page=2"
    before = probe(uri)
    (path / "B/3/0/0/.DS_Store").write_bytes(b"x")
    zarr.open_array(str(path / "B/3/0/1"), mode="r+")[:] = 9
    assert probe(uri) == before
    zarr.open_array(str(path / "B/3/0/0"), mode="r+")[0, 0, 0] = 9
    assert probe(uri).sha256 != before.sha256


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_what_is_damaged_is_a_sentence(tmp_path: Path, version: str) -> None:
    path = plate(tmp_path / "P1.zarr", version, "cyx")
    array = path / "B/3/0/0"
    for look in (probe, read_plane):
        with pytest.raises(ImageError, match="has no page 4, only 3"):
            look(f"{array}#page=4")
        with pytest.raises(ImageError, match="holds 3 planes"):
            look(array)
    for chunk in array.rglob("*"):
        if chunk.is_file() and not chunk.name.startswith((".z", "zarr")):
            chunk.write_bytes(b"junk")
    with pytest.raises(ImageError, match="is damaged"):
        read_plane(f"{array}#page=1")
    for name in (".zarray", "zarr.json"):
        (array / name).write_text("{")
    for look in (probe, read_plane):
        with pytest.raises(ImageError, match="is not a Zarr array, or it is damaged"):
            look(f"{array}#page=1")
    with pytest.raises(ImageError, match="cannot be opened"):
        probe(path / "B")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_fields_and_wells_that_cannot_be_read_are_refused(tmp_path: Path, version: str) -> None:
    path = plate(tmp_path / "P1.zarr", version, "cyx")
    attributes(path / "B/3/1", version, multiscales=[{"axes": [], "datasets": [{"path": "../x"}]}])
    wells = [{"path": text} for text in ("B/3", "Z/99", "../..", "C/4")]
    attributes(path, version, plate={"wells": wells})
    found = [(item.line, item.reason) for item in read_folder(path) if isinstance(item, Refusal)]
    assert found == [
        (2, "image cannot be read"),
        (3, "not a well"),
        (4, "not a well"),
        (5, "well without images"),
    ]
    attributes(path / "B/3/1", version)
    assert "no multiscales" in next(
        item.detail for item in read_folder(path) if isinstance(item, Refusal)
    )
    field(path / "B/3/2", version, "cyx", labels=["only one"])
    attributes(path / "B/3", version, well={"images": [{"path": "2"}]})
    record = next(item for item in read_folder(path) if isinstance(item, ImageRecord))
    assert [file.channel for file in record.files] == ["C1", "C2", "C3"]
    single = tmp_path / "one"
    field(single / "a.zarr", version)
    (refused,) = read_folder(single)
    assert isinstance(refused, Refusal)
    assert refused.reason == "Zarr that is no plate of OME-Zarr"


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_plate_is_ingested_and_watched(
    sqlite_workspace: Workspace, tmp_path: Path, version: str
) -> None:
    path = plate(tmp_path / "P1.zarr", version, "cyx")
    result = ingest(sqlite_workspace, path)
    assert (result.created, result.refused, result.missing_images) == (3, 0, 0)
    assert ingest(sqlite_workspace, path, IngestParams(reread=True)).unchanged == 3
    assert refresh(sqlite_workspace).changed == 0
    zarr.open_array(str(path / "B/3/0/0"), mode="r+")[0] = 9
    again = refresh(sqlite_workspace)
    assert (again.changed, again.n_problems) == (1, 0)
    path.rename(tmp_path / "P9.zarr")
    gone = refresh(sqlite_workspace)
    assert {issue.severity for issue in gone.problems} == {Severity.PROBLEM}


@pytest.mark.parametrize(
    "shape",
    [[None, 3, 2, 6, 7], ["2", 3, 2, 6, 7], [2, 3, 2, 6, -7], [1, 10**12, 1, 6, 7], [10**7] * 5],
)
def test_shapes_that_no_image_has_are_refused(tmp_path: Path, shape: list[Any]) -> None:
    root = plate(tmp_path / "p.zarr", "0.4")
    described = root / "B/3/0/0/.zarray"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"shape": shape}))
    found = list(read_folder(root))
    refused = [item for item in found if isinstance(item, Refusal)]
    assert [item.reason for item in refused] == ["image cannot be read"]
    assert len(found) == 1 + 2 * 4  # the other two fields, at two times and in two planes


def test_names_that_no_database_takes_and_wells_that_are_no_path(tmp_path: Path) -> None:
    root = plate(tmp_path / "p.zarr", "0.4", name="\ud800")
    described = root / ".zattrs"
    about = json.loads(described.read_text())
    about["plate"]["wells"][1]["path"] += "\n"
    described.write_text(json.dumps(about))
    found = list(read_folder(root))
    assert {item.plate for item in found if isinstance(item, ImageRecord)} == {"?"}
    assert [item.reason for item in found if isinstance(item, Refusal)] == ["not a well"]
