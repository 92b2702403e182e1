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
from sqlalchemy import select

from cellstore.config import ImageInput, IngestParams, options_of, typed_value
from cellstore.errors import ImageError, UnknownNameError, UserInputError
from cellstore.io.image_files import encode_tiff, probe
from cellstore.io.uris import FETCHED
from cellstore.jobs.lookup import find_channels
from cellstore.jobs.planes import lacking_channels, read_image
from cellstore.jobs.workspace import Workspace
from cellstore.models import Image, ImageFile

PLANE = np.arange(12, dtype=np.uint16).reshape(3, 4)
REMOTE = "memory://bucket/P1"


@pytest.fixture
def bucket() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    FETCHED.clear()  # as each run does
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


@pytest.fixture
def channels(workspace: Workspace) -> Workspace:
    """P1 has DNA (1), 'Alexa 488, long' (2) and RNA (3), P2 has DNA (1) and RNA (2)."""
    make = Factory(workspace)
    for barcode, more in (("P1", ["Alexa 488, long", "RNA"]), ("P2", ["RNA"])):
        image = make.image(make.well(make.plate(barcode), 1, 1))
        for position, name in enumerate(more, 2):
            file = ImageFile(image_id=image.id, channel=name, position=position, name=f"{name}.tif")
            make.add(file)
    return workspace


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        (("dna",), ("DNA",)),
        (("1", "rna"), ("DNA", "RNA")),
        (("Alexa 488", "long", "DNA"), ("Alexa 488, long", "DNA")),
        (("Alexa 488, long",), ("Alexa 488, long",)),
        (("3",), ("RNA",)),
        ((), ()),
    ],
)
def test_channels_by_name_and_number(
    channels: Workspace, typed: tuple[str, ...], found: tuple[str, ...]
) -> None:
    with channels.database.read() as session:
        assert find_channels(session, typed) == found


def test_channels_that_are_not_there_or_several(channels: Workspace) -> None:
    with channels.database.read() as session:
        with pytest.raises(UserInputError, match="Channel 2 is Alexa 488, long or RNA, by plate"):
            find_channels(session, ["2"])
        with pytest.raises(UnknownNameError, match=r"channel 'DAPI'\. Known: Alexa 488, long, DNA"):
            find_channels(session, ["DNA", "DAPI"])


def test_images_without_the_channel_are_known_before(channels: Workspace) -> None:
    with channels.database.read() as session:
        wanted = [ImageInput(("Alexa 488, long",))]
        images, lacking = lacking_channels(session, select(Image.id), wanted)
        assert lacking == (("P2/r01c01f01", "no channel Alexa 488, long"),)
        assert len(session.scalars(images).all()) == 1
        one = select(Image.id).where(Image.id.not_in(images))
        with pytest.raises(UnknownNameError, match=r"selected images .*Known: DNA, RNA\."):
            lacking_channels(session, one, wanted)


def test_a_name_with_a_comma_in_an_option() -> None:
    option = next(item for item in options_of(IngestParams) if item.name == "channels")
    assert typed_value(option, ["Alexa 488, long=RNA,1=DNA"]) == (
        ("Alexa 488, long", "RNA"),
        ("1", "DNA"),
    )
    with pytest.raises(UserInputError, match="Write --channels"):
        typed_value(option, ["1=DNA,Alexa"])
