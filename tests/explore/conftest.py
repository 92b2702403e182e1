"""Fixtures for the tests of the explorer: a screen, its pages, and a browser."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import rendered
from starlette.testclient import TestClient

from cellstore.analysis.rendering import PlateDesign
from cellstore.config import SplitParams
from cellstore.explore.server import make_app
from cellstore.jobs.workspace import Workspace, create_workspace, open_workspace
from cellstore.settings import find_store
from cellstore.store import Store

DESIGN = PlateDesign(control_wells=4, sites=1)
"""Two plates of 12 wells; four wells of DMSO on each, and two of each other treatment."""

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def _screen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of rendered plates with masks, measurements, a split and two predict runs."""
    folder = tmp_path_factory.mktemp("explored")
    workspace = create_workspace(folder / "store")[0]
    with pytest.MonkeyPatch.context() as patch:
        rendered.fill(workspace, folder / "plates", patch, design=DESIGN)
    store = Store(workspace)
    store.create_split("by-well", SplitParams())
    store.train_baselines(["logistic", "majority"], split="by-well")
    store.close()
    return folder


@pytest.fixture(scope="session")
def screen(_screen_folder: Path) -> Iterator[Workspace]:
    """The rendered screen; nobody changes it."""
    workspace = open_workspace(find_store(_screen_folder / "store"))
    yield workspace
    workspace.database.close()


@pytest.fixture(scope="session")
def client(screen: Workspace) -> Iterator[TestClient]:
    """The pages about the screen, without a browser and its scripts."""
    app = make_app(screen)
    with TestClient(app, raise_server_exceptions=False) as made:
        yield made
    app.state.explorer.reader.close()


@pytest.fixture
def writable(_screen_folder: Path, tmp_path: Path) -> Iterator[Workspace]:
    """A copy of the screen that may be changed."""
    shutil.copytree(_screen_folder / "store", tmp_path / "store")
    workspace = open_workspace(find_store(tmp_path / "store"))
    yield workspace
    workspace.database.close()


def served(workspace: Workspace, *, write: bool = False) -> Iterator[str]:
    """Serve the pages of a store in a thread; yields their address."""
    import uvicorn

    app = make_app(workspace, write=write)
    config = uvicorn.Config(app, port=0, log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    socket.listen(64)  # who comes before the server is ready waits
    thread = threading.Thread(target=server.run, args=([socket],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        socket.close()
        app.state.explorer.reader.close()


@pytest.fixture(scope="session")
def site(screen: Workspace) -> Iterator[str]:
    """The address of the pages about the screen, served."""
    yield from served(screen)


@pytest.fixture
def writable_site(writable: Workspace) -> Iterator[str]:
    """The address of the pages about a copy that may be changed."""
    yield from served(writable, write=True)


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """Chromium, with WebGL2 in software."""
    found = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        opened = playwright.chromium.launch(executable_path=found, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def tab(browser: object) -> Iterator[object]:
    """A new tab; what its scripts complain of, or its policy (CSP) refuses, fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})  # type: ignore[attr-defined]
    made = context.new_page()
    problems: list[str] = []
    made.on("pageerror", lambda error: problems.append(str(error)))
    made.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    yield made
    context.close()
    assert not problems
