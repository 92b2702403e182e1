from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import tifffile
from factories import Factory
from numpy.typing import NDArray

from cellstore.config import ImageInput
from cellstore.errors import ImageError
from cellstore.io.image_files import encode_tiff, probe
from cellstore.jobs.planes import read_image
from cellstore.jobs.workspace import Workspace
from cellstore.models import Image, ImageFile

PLANE = np.arange(12, dtype=np.uint16).reshape(3, 4)
REMOTE = "memory://bucket/P1"


@pytest.fixture
def bucket() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()


@pytest.fixture
def image(sqlite_workspace: Workspace) -> Image:
    factory = Factory(sqlite_workspace)
    return factory.image(factory.well(factory.plate(), 1, 1), missing=True)


def ingested(workspace: Workspace, image: Image, folder: str, name: str) -> None:
    """Record a file as an ingest does that has seen it."""
    factory, info = Factory(workspace), probe(f"{folder}/{name}")
    factory.add(
        ImageFile(
            image_id=image.id,
            channel="ER",
            position=2,
            name=name,
            folder_id=factory.folder(folder).id,
            sha256=info.sha256,
            size_bytes=info.size_bytes,
            modified_ns=info.mtime_ns,
        )
    )


def read(workspace: Workspace, image: Image) -> NDArray[np.float32]:
    return read_image(workspace.database, image.id, ImageInput(channels=("ER",)))


def test_a_file_of_an_object_store(sqlite_workspace: Workspace, image: Image, bucket: Any) -> None:
    bucket.pipe("/bucket/P1/a.tif", encode_tiff(PLANE))
    ingested(sqlite_workspace, image, REMOTE, "a.tif")
    np.testing.assert_array_equal(read(sqlite_workspace, image), PLANE)
    # Put there again, the same bytes are the same image: its date says nothing.
    bucket.pipe("/bucket/P1/a.tif", encode_tiff(PLANE))
    np.testing.assert_array_equal(read(sqlite_workspace, image), PLANE)


def test_other_bytes_in_an_object_store_are_refused(
    sqlite_workspace: Workspace, image: Image, bucket: Any
) -> None:
    bucket.pipe("/bucket/P1/a.tif", encode_tiff(PLANE))
    ingested(sqlite_workspace, image, REMOTE, "a.tif")
    bucket.pipe("/bucket/P1/a.tif", encode_tiff(PLANE + 1))
    with pytest.raises(ImageError, match=r"memory://bucket/P1/a\.tif has changed"):
        read(sqlite_workspace, image)
    bucket.rm("/bucket/P1/a.tif")
    with pytest.raises(ImageError, match="is not there"):
        read(sqlite_workspace, image)


def test_a_page_of_a_file(sqlite_workspace: Workspace, image: Image, tmp_path: Path) -> None:
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, np.stack([PLANE, PLANE + 7]), photometric="minisblack")
    ingested(sqlite_workspace, image, str(tmp_path), "stack.tif#page=2")
    np.testing.assert_array_equal(read(sqlite_workspace, image), PLANE + 7)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ImageError, match=r"stack\.tif has changed since it was ingested"):
        read(sqlite_workspace, image)


def test_a_file_that_is_gone_or_was_never_seen(
    sqlite_workspace: Workspace, image: Image, tmp_path: Path
) -> None:
    (tmp_path / "a.tif").write_bytes(encode_tiff(PLANE))
    ingested(sqlite_workspace, image, str(tmp_path), "a.tif")
    (tmp_path / "a.tif").unlink()
    with pytest.raises(ImageError, match=r"gone from .* cellstore relocate"):
        read(sqlite_workspace, image)
    with pytest.raises(ImageError, match="is missing"):
        read_image(sqlite_workspace.database, image.id, ImageInput(channels=("DNA",)))
