"""A store that a group shares: what one user's command writes, the other can read and replace."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from screens import small_screen

from cellstore.jobs.workspace import create_workspace

GROUP, ADA, EVE = 60_010, 60_011, 60_012
COMMAND = """
import os, sys
from pathlib import Path
from cellstore.enums import ArtifactKind
from cellstore_cli.app import Common, app

def command(*words):
    try:
        app(list(words), standalone_mode=False)
    except SystemExit as end:
        assert not end.code, end.code

def work(store, data):
    command("votes", "--store", store)
    command("sql", "SELECT count(*) FROM cell_table", "--store", store)
    with Common(Path(store)).open() as opened:
        opened.workspace.artifacts.write(ArtifactKind.MASK, data, ".bin")

other, store, group, user = sys.argv[1:]
work(other, b"0")  # loads what this user may not read
os.umask(0o022)
os.setgroups([])
os.setgid(int(group))
os.setuid(int(user))
work(store, b"1")
(mask,) = Path(store, "artifacts", "mask").glob("*/*.bin")
mask.write_bytes(b"damaged")
work(store, b"1")
assert mask.read_bytes() == b"1"
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that other users reach, unlike those of pytest."""
    found = Path(tempfile.mkdtemp(prefix="cellstore-shared-"))
    found.chmod(0o755)
    yield found
    shutil.rmtree(found)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs two users")
def test_what_one_user_wrote_the_other_reads_and_replaces(folder: Path) -> None:
    stores = [folder / "other", folder / "store"]
    for store in stores:
        workspace, _ = create_workspace(store)
        small_screen(workspace)
        workspace.database.close()
    for path in (stores[1], *stores[1].rglob("*")):
        os.chown(path, ADA, GROUP)
        path.chmod(0o2775 if path.is_dir() else 0o664)

    def work_as(user: int) -> None:
        words = [sys.executable, "-c", COMMAND, *map(str, stores), str(GROUP), str(user)]
        done = subprocess.run(words, capture_output=True, text=True, cwd="/", check=False)
        assert done.returncode == 0, done.stderr[-2000:]

    def copies() -> set[tuple[str, int]]:
        return {(path.name, path.stat().st_uid) for path in (cache / "snapshots").iterdir()}

    cache = stores[1] / "cache"
    work_as(ADA)
    made = copies()
    work_as(EVE)
    assert copies() == made  # read, not made anew
    workspace, _ = create_workspace(stores[1])
    with workspace.database.begin() as session:
        session.connection().exec_driver_sql("UPDATE cells SET excluded = 'x' WHERE id = 3")
    workspace.database.close()
    work_as(EVE)
    assert {user for _, user in copies() - made} == {EVE}
    for path in (cache / "snapshots").iterdir():
        path.write_bytes(b"damaged")
    work_as(ADA)
    assert {user for _, user in copies()} == {ADA}
    assert not list((cache / "spill").iterdir())
