"""Files of a store: whole or not there, found again, and never outside."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellstore import artifacts
from cellstore.artifacts import PART, ArtifactFolder, open_atomically, part_prefix, sha256_of
from cellstore.enums import ArtifactKind
from cellstore.errors import StorageError


@pytest.fixture
def folder(tmp_path: Path) -> ArtifactFolder:
    return ArtifactFolder(tmp_path / "artifacts")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(data=st.binary(max_size=5000))
def test_what_is_written_is_read(folder: ArtifactFolder, data: bytes):
    stored = folder.write(ArtifactKind.MASK, data, ".tif")
    assert folder.read(stored.path, stored.sha256) == data
    assert stored.sha256 == hashlib.sha256(data).hexdigest()
    assert stored.size_bytes == len(data)
    assert sha256_of(folder.locate(stored.path)) == stored.sha256


def test_known_bytes_are_written_once_and_look_new(folder: ArtifactFolder):
    first = folder.write(ArtifactKind.MASK, b"same", ".tif")
    target = folder.locate(first.path)
    inode = target.stat().st_ino
    os.utime(target, (0, 0))
    assert folder.write(ArtifactKind.MASK, b"same", ".tif") == first
    assert list(folder.walk()) == [first.path]
    assert target.stat().st_ino == inode
    # `verify --fix` spares young files: bytes that get their row now must be young.
    assert target.stat().st_mtime > 0


def test_a_damaged_file_is_written_again(folder: ArtifactFolder):
    stored = folder.write(ArtifactKind.MASK, b"good", ".tif")
    folder.locate(stored.path).write_bytes(b"bad!")
    folder.write(ArtifactKind.MASK, b"good", ".tif")
    assert folder.read(stored.path, stored.sha256) == b"good"


def test_a_changed_or_lost_file_is_not_read(folder: ArtifactFolder):
    stored = folder.write(ArtifactKind.MASK, b"good", ".tif")
    folder.locate(stored.path).write_bytes(b"evil")
    with pytest.raises(StorageError, match="cellstore verify"):
        folder.read(stored.path, stored.sha256)
    folder.locate(stored.path).unlink()
    with pytest.raises(StorageError, match="cellstore verify"):
        folder.read(stored.path, stored.sha256)


@pytest.mark.parametrize("path", ["../secret", "/etc/hostname", "mask/../../secret"])
def test_a_path_that_leads_out_is_refused(folder: ArtifactFolder, path: str):
    with pytest.raises(StorageError, match="leads out of the store"):
        folder.locate(path)


def test_a_link_that_leads_out_is_refused(folder: ArtifactFolder, tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder.root.mkdir()
    (folder.root / "link").symlink_to(secret)
    with pytest.raises(StorageError, match="leads out of the store"):
        folder.read("link", "0" * 64)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(folder, monkeypatch, step: str):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    owner = artifacts.os if step == "fsync" else Path
    monkeypatch.setattr(owner, step, full)
    with pytest.raises(StorageError, match=r"No space left.*run the same command again"):
        folder.write(ArtifactKind.MASK, b"data", ".tif")
    assert list(folder.walk()) == []


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifacts.os, "fsync", full)
    with pytest.raises(StorageError), open_atomically(target) as file:
        file.write(b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_without_a_number_is_told_by_its_own_words(tmp_path: Path):
    with pytest.raises(StorageError, match="file write failed"), open_atomically(tmp_path / "a"):
        raise OSError("file write failed")  # as HDF5 says it
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_for_those_whom_the_umask_lets_read(folder: ArtifactFolder):
    before = os.umask(0o027)
    try:
        stored = folder.write(ArtifactKind.MASK, b"data", ".tif")
    finally:
        os.umask(before)
    assert folder.locate(stored.path).stat().st_mode & 0o777 == 0o640


def test_a_file_where_a_folder_should_be_is_one_sentence(tmp_path: Path):
    (tmp_path / "artifacts").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot be written: (Not a directory|File exists)"):
        ArtifactFolder(tmp_path / "artifacts").write(ArtifactKind.MASK, b"data", ".tif")


def test_a_folder_where_a_file_should_be_is_one_sentence(tmp_path: Path):
    problem = pytest.raises(StorageError, match="cannot be written: Is a directory")
    with problem, open_atomically(tmp_path) as file:
        file.write(b"data")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_commands_left_is_removed_by_the_next(folder: ArtifactFolder, tmp_path: Path):
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from cellstore.artifacts import open_atomically, part_prefix
        root = Path(sys.argv[1])
        (root / f"{part_prefix()}spill" / "deep").mkdir(parents=True)
        with open_atomically(root / "x", root) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", code, str(folder.root)], check=False)
    left = {path.name for path in folder.root.glob(f"{PART}*")}
    assert len(left) == 2
    own = folder.root / f"{part_prefix()}own"
    elsewhere = folder.root / f"{PART}01234567-1-x"
    for path in (own, elsewhere):
        path.write_bytes(b"")
    folder.write(ArtifactKind.MASK, b"whole", ".tif")
    assert set(folder.root.glob(f"{PART}*")) == {own, elsewhere}
    os.utime(elsewhere, (0, 0))
    folder.write(ArtifactKind.MASK, b"more", ".tif")
    assert set(folder.root.glob(f"{PART}*")) == {own}
