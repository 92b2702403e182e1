from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cellstore.config import IngestParams
from cellstore.errors import ImageError, MissingExtraError, UserInputError
from cellstore.io import uris
from cellstore.io.image_files import decode_tiff, encode_tiff, probe, read_plane
from cellstore.io.mask_files import read_labels
from cellstore.io.stacks import read_stack
from cellstore.io.tables import open_table
from cellstore.io.uris import (
    FETCHED,
    FileStat,
    exists,
    is_remote,
    join,
    local_path,
    map_folder,
    page_name,
    read_bytes,
    shown,
    split_page,
    stat,
)
from cellstore.stages.ingest.ingest import choose_layout

SECRET = "hunter2"


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()


@pytest.mark.parametrize(
    ("folder", "found"),
    [
        ("/home/ubuntu/bucket/cpg/images", "/data/cpg/images"),
        ("/home/ubuntu/bucket/", "/data"),
        ("/home/ubuntu/bucket", "/data"),
        ("/home/ubuntu/bucket2/cpg", "/home/ubuntu/bucket2/cpg"),
        ("/elsewhere", "/elsewhere"),
        ("relative/images", "relative/images"),
        ("", ""),
    ],
)
def test_the_beginning_of_a_folder_is_rewritten_in_whole_folders(folder: str, found: str) -> None:
    assert map_folder(folder, [("/home/ubuntu/bucket", "/data")]) == found


def test_the_longest_beginning_wins_whatever_the_order() -> None:
    pairs = [("/a", "/one"), ("/a/b/c", "/three"), ("/a/b", "/two")]
    for some in (pairs, pairs[::-1]):
        assert [map_folder(f"/a{rest}/x", some) for rest in ("", "/b", "/b/c", "/bc")] == [
            "/one/x",
            "/two/x",
            "/three/x",
            "/one/bc/x",
        ]


@pytest.mark.parametrize(
    "folder", [r"C:\scans\P1\Images", "c:/scans/P1/Images/", r"c:\scans/P1\Images"]
)
def test_folders_of_windows(folder: str) -> None:
    for old in (r"C:\scans", "c:/scans/"):
        assert map_folder(folder, [(old, "/mnt/scans")]) == "/mnt/scans/P1/Images"
    shares = [(r"\\server\share", "s3://bucket")]
    assert map_folder(r"\\server\share\P1", shares) == "s3://bucket/P1"
    assert map_folder(r"\\server\shared\P1", shares) == r"\\server\shared\P1"


def test_from_an_object_store_and_to_one() -> None:
    here = [("s3://bucket/cpg0016", "/data/x=y")]
    assert map_folder("s3://bucket/cpg0016/images/P1", here) == "/data/x=y/images/P1"
    there = [("/home/ubuntu", "s3://bucket/")]
    assert map_folder("/home/ubuntu/images/", there) == "s3://bucket/images"
    assert map_folder("/home/images", [("/", "s3://all")]) == "s3://all/home/images"


def test_folders_written_as_uris_of_files() -> None:
    maps = [("file:///a b", "/data"), ("D:/scans", "/mnt")]
    assert [map_folder(text, maps) for text in ("file:///a%20b/P1", "/a b/P1")] == ["/data/P1"] * 2
    assert map_folder("file:///D:/scans/P1", maps) == "/mnt/P1"
    assert map_folder("file:///other/P1", maps) == "/other/P1"


@pytest.mark.parametrize("pair", [("", "/data"), ("/data", ""), (" ", " ")])
def test_what_is_no_map(pair: tuple[str, str]) -> None:
    with pytest.raises(UserInputError, match="--map /old/folder=/new/folder"):
        map_folder("/data", [pair])


def test_one_folder_cannot_be_in_two_places() -> None:
    with pytest.raises(UserInputError, match="twice"):
        map_folder("/data", [("/a", "/b"), ("/a/", "/c")])
    assert map_folder("/a", [("/a", "/b"), ("/a/", "/b")]) == "/b"


@given(st.text(max_size=40), st.text(max_size=10), st.text(max_size=10))
@example(folder="FILE://", old="0", new="0")
def test_any_folder_can_be_mapped(folder: str, old: str, new: str) -> None:
    with contextlib.suppress(UserInputError):
        assert isinstance(map_folder(folder, [(old, new)]), str)
    bare = folder[7:] if folder[:7].lower() == "file://" else folder
    assert map_folder(folder, []) == bare


def test_names_are_joined_with_the_mark_of_their_folder() -> None:
    assert join("/data", "a.tif") == join("/data/", "a.tif") == "/data/a.tif"
    assert join("s3://bucket/P1", "a.tif") == "s3://bucket/P1/a.tif"
    assert join(r"D:\scans", "a.tif") == r"D:\scans\a.tif"


def test_which_places_are_elsewhere() -> None:
    assert all(map(is_remote, ["s3://b/a", "https://h/a", "memory://a", "S3://b"]))
    assert not any(map(is_remote, ["/a", "C:/a", "c://a", "a", "", "file:///a", "a/s3://b"]))
    assert local_path("file:///a%20b/c.tif") == Path("/a b/c.tif")
    with pytest.raises(UserInputError, match="not on this machine"):
        local_path("s3://bucket/a.tif")


def test_a_file_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"content")
    found = os.stat(path)  # noqa: PTH116
    for uri in (str(path), f"file://{path}", f"{path}#page=3"):
        assert stat(uri) == FileStat(7, found.st_mtime_ns)
        assert exists(uri)
    for absent in (str(tmp_path / "absent"), str(tmp_path), "a\0b", "x" * 5000):
        assert not exists(absent)
        with pytest.raises(ImageError, match="cannot be opened"):
            stat(absent)


def test_a_file_of_an_object_store(memory: Any) -> None:
    memory.pipe("/bucket/a.bin", b"content")
    for uri in ("memory://bucket/a.bin", "memory://bucket/a.bin#page=1"):
        assert read_bytes(uri) == b"content"
        assert exists(uri)
        assert stat(uri).size_bytes == 7
    assert not exists("memory://bucket/b.bin")
    for ask in (read_bytes, stat):
        with pytest.raises(ImageError, match=r"memory://bucket/b\.bin is not there"):
            ask("memory://bucket/b.bin")


def test_an_image_of_an_object_store_is_known_by_its_bytes(memory: Any) -> None:
    plane = np.arange(12, dtype=np.uint16).reshape(3, 4)
    memory.pipe("/bucket/a.tif", encode_tiff(plane))
    info = probe("memory://bucket/a.tif")
    assert (info.height, info.width, info.dtype) == (3, 4, "uint16")
    np.testing.assert_array_equal(read_plane("memory://bucket/a.tif", info.sha256), plane)
    memory.pipe("/bucket/a.tif", encode_tiff(plane + 1))
    FETCHED.clear()  # as each run does
    with pytest.raises(ImageError, match="has changed"):
        read_plane("memory://bucket/a.tif", info.sha256)
    memory.pipe("/bucket/a.tif", b"junk")
    with pytest.raises(ImageError, match="not a TIFF"):
        probe("memory://bucket/a.tif")


@pytest.mark.parametrize(
    "uri", ["zip://a::memory://b.zip", "ftp://host/a.tif", "memory://a::zip://b", "nope://a"]
)
def test_other_kinds_of_places_are_not_read(uri: str) -> None:
    for ask in (read_bytes, stat, exists):
        with pytest.raises(UserInputError, match=r"in a folder or at http://, https://"):
            ask(uri)


def test_a_missing_reader_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(uris, "import_module", absent)
    with pytest.raises(MissingExtraError, match=r"needs s3fs.*cellstore\[cloud\]"):
        read_bytes("s3://bucket/a.tif")


class Refusing:
    """A service whose errors quote the request, as they do."""

    def cat_file(self, uri: str) -> bytes:
        raise PermissionError(13, f"{uri} with key {SECRET}")

    def info(self, uri: str) -> dict[str, object]:
        raise RuntimeError(f"signature {SECRET} of {uri} does not match")


def test_secrets_of_a_place_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uris, "file_system", lambda uri: Refusing())
    uri = f"https://me:{SECRET}@host.org/images/a.tif?X-Amz-Signature={SECRET}"
    for ask in (read_bytes, stat):
        with pytest.raises(ImageError) as caught:
            ask(uri)
        assert SECRET not in str(caught.value)
        assert "https://host.org/images/a.tif" in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
    assert shown("/data/what?.tif") == "/data/what?.tif"


def test_a_server_that_tells_no_size(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def info(self, uri: str) -> dict[str, object]:
            return {"size": None}

    monkeypatch.setattr(uris, "file_system", lambda uri: Silent())
    with pytest.raises(ImageError, match="no size of"):
        stat("https://host/a.tif")


def test_pages_are_part_of_a_name() -> None:
    assert split_page("stack.ome.tiff#page=2") == ("stack.ome.tiff", 2)
    for name in ("a.tif", "a#1.tif", "a.tif#page=0", "a.tif#page=", "#page=1", "a.tif#page=1 "):
        assert split_page(name) == (name, None)
    with pytest.raises(UserInputError, match="first page is 1"):
        page_name("a.tif", 0)


@given(st.text(min_size=1, max_size=30), st.integers(1, 999_999))
def test_any_name_gets_its_page_back(name: str, page: int) -> None:
    assert split_page(page_name(name, page)) == (name, page)


def test_pipes_and_devices_are_refused_unopened(tmp_path: Path) -> None:
    """A reader that opened one would wait or read for ever."""
    pipe = tmp_path / "a.tif"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        for read in (probe, read_plane, read_stack, decode_tiff, read_labels):
            with pytest.raises(ImageError, match="pipe or a device"):
                read(path)
        with pytest.raises(UserInputError, match="pipe or a device"):
            open_table(path)
        with pytest.raises(UserInputError, match="pipe or a device"):
            choose_layout(path, IngestParams())
