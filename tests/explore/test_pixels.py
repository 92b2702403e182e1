"""Pictures for the browser: what is in them is what is in the files."""

from __future__ import annotations

from typing import Any

import fsspec
import numpy as np
import pytest
from factories import Factory
from sqlalchemy import select
from starlette.testclient import TestClient

from cellstore.enums import PROJECTION_CHANNEL, Stage
from cellstore.errors import ImageError, UnknownNameError, UserInputError
from cellstore.explore import pixels
from cellstore.explore.requests import Explorer
from cellstore.io.image_files import encode_tiff, probe
from cellstore.jobs.planes import channel_files, open_file
from cellstore.jobs.workspace import Workspace
from cellstore.models import Cell, Image
from cellstore.report.drawing import OUTLINE_COLOUR, coloured

SIDE = 32


@pytest.fixture(scope="module")
def explorer(screen: Workspace) -> Explorer:
    return Explorer(screen)


def cells_of_two_fields(explorer: Explorer) -> list[Any]:
    """Cells of two fields, those at the rim first: id, box, image, plate."""
    with explorer.workspace.database.read() as session:
        images = list(session.scalars(select(Image).order_by(Image.id).limit(2)))
        found = [(cell, image) for image in images for cell in image.segmentations[0].cells]
        found.sort(key=lambda item: (item[0].min_row > 0, item[0].id))
        boxes = [(c.min_row, c.min_col, c.max_row, c.max_col) for c, _ in found]
        return [
            (cell.id, box, image.id, image.well.plate.barcode)
            for (cell, image), box in zip(found, boxes, strict=True)
        ]


def test_crops_are_the_pixels_of_the_files_in_the_contrast_of_their_plate(
    explorer: Explorer,
) -> None:
    cells = cells_of_two_fields(explorer)[:13]
    sheet = pixels.sheet_pixels(explorer, [cell[0] for cell in cells], side=SIDE)
    assert sheet.shape == (2 * SIDE, 10 * SIDE, 3)
    for at, (_, box, image_id, plate) in enumerate(cells):
        with explorer.workspace.database.read() as session:
            files = channel_files(session, [image_id])[image_id]
        planes = [open_file(file) for file in files]
        names = [file.channel for file in files]
        middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        # At the rim the crop is moved into the field.
        top, left = (
            min(max(0, int(where - SIDE / 2)), length - SIDE)
            for where, length in zip(middle, planes[0].shape, strict=True)
        )
        part = np.s_[top : top + SIDE, left : left + SIDE]
        limits = list(pixels.contrasts(explorer, plate, names).values())
        wanted = coloured([p[part].astype(np.float32) for p in planes], limits, names)
        row, column = divmod(at, 10)
        shown = sheet[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
        np.testing.assert_array_equal(shown, wanted)
    assert not sheet[SIDE:, 3 * SIDE :].any()  # 13 cells, then nothing


def test_the_outline_of_a_crop_is_that_of_its_cell_alone(explorer: Explorer) -> None:
    cell_id = cells_of_two_fields(explorer)[-1][0]
    plain = pixels.sheet_pixels(explorer, [cell_id], side=SIDE)
    outlined = pixels.sheet_pixels(explorer, [cell_id], side=SIDE, outlines=True)
    changed = (plain != outlined).any(axis=-1)
    assert 10 < changed.sum() < SIDE * SIDE / 4
    amber = np.array(OUTLINE_COLOUR, np.float32) / 255
    np.testing.assert_array_equal(outlined[changed], np.broadcast_to(amber, (changed.sum(), 3)))


def test_what_cannot_be_read_is_crossed_out_and_a_field_says_why(
    explorer: Explorer, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = cells_of_two_fields(explorer)
    with explorer.workspace.database.read() as session:
        gone = session.get_one(Image, cells[0][2])
        files = {file.sha256 for file in channel_files(session, [gone.id])[gone.id]}
    good = next(cell[0] for cell in cells if cell[2] != cells[0][2])

    def opened(file: Any, *rows: Any) -> Any:
        if file.sha256 in files:
            raise ImageError("The folder <b>images</b> is gone.")
        return open_file(file, *rows)

    monkeypatch.setattr(pixels, "open_file", opened)
    sheet = pixels.sheet_pixels(explorer, [cells[0][0], good], side=SIDE)
    np.testing.assert_array_equal(sheet[:, :SIDE], pixels._crossed(SIDE))
    assert sheet[:, SIDE:].std() > 0.01
    answer = client.get(f"/field/{gone.id}/thumbnail")
    assert answer.status_code == 400
    assert "The folder &lt;b&gt;images&lt;/b&gt; is gone." in answer.text


def test_images_in_an_object_store(
    sqlite_workspace: Workspace,
) -> None:
    make, files = Factory(sqlite_workspace), fsspec.filesystem("memory")
    plate, planes, cells = make.plate(), [], []
    run, folder = make.run(Stage.SEGMENT), make.folder("memory://bucket/P").id
    for number in (1, 2):
        plane = np.random.default_rng(number).integers(100, 1000 * number, (64, 64), np.uint16)
        files.pipe(f"/bucket/P/{number}.tif", encode_tiff(plane))
        uri = f"memory://bucket/P/{number}.tif"
        image = make.image(make.well(plate, 1, number), missing=True)
        with sqlite_workspace.database.begin() as session:
            row = session.get_one(Image, image.id)
            row.content_sha256 = row.files[0].sha256 = probe(uri).sha256
            row.files[0].name = f"{number}.tif"
            row.files[0].folder_id = folder
            row.files[0].height = row.files[0].width = 64
        cells.append(make.cells_of(make.segmentation(image, run, 1))[0])
        planes.append(plane.astype(np.float32))
    explorer = Explorer(sqlite_workspace)
    low, high = pixels.contrasts(explorer, plate.barcode, ["DNA"])["DNA"]
    assert 100 < low < 130
    assert 900 < high < 2000
    sheet = pixels.sheet_pixels(explorer, [cell.id for cell in cells], side=SIDE)
    for at, (cell, plane) in enumerate(zip(cells, planes, strict=True)):
        box = [int(x) for x in (cell.min_row, cell.min_col, cell.max_row, cell.max_col)]  # type: ignore[arg-type]
        top, left = (max(0, int((box[i] + box[i + 2] - SIDE) / 2)) for i in (0, 1))
        wanted = coloured([plane[top : top + SIDE, left : left + SIDE]], [(low, high)])
        np.testing.assert_array_equal(sheet[:, at * SIDE : (at + 1) * SIDE], wanted)
    assert pixels.field_thumbnail(explorer, 1, width=32)[1]().startswith(b"\xff\xd8")
    files.store.clear()


def test_a_field_that_is_much_wider_than_high(
    screen: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "read_finite", lambda *_: np.zeros((20, 900), np.uint16))
    assert pixels.field_thumbnail(Explorer(screen), 1, width=20)[1]().startswith(b"\xff\xd8")


def test_a_field_is_sent_once_and_outlines_change_it(client: TestClient) -> None:
    plain = client.get("/field/1/thumbnail?width=100")
    assert plain.headers["content-type"] == "image/jpeg"
    mark = {"if-none-match": plain.headers["etag"]}
    assert client.get("/field/1/thumbnail?width=100", headers=mark).status_code == 304
    assert client.get("/field/1/thumbnail?width=100&outlines=1", headers=mark).status_code == 200


@pytest.mark.parametrize(
    "query",
    ["width=0", "width=99999", "width=x", "channels=%00", "segmentation=99999", "width=1e9"],
)
def test_hostile_pictures_of_fields_are_refused_with_a_sentence(
    client: TestClient, query: str
) -> None:
    answer = client.get(f"/field/1/thumbnail?outlines=1&{query}")
    assert answer.status_code in (400, 404)
    assert "Back to the start" in answer.text


@pytest.mark.parametrize("number", ["0", "-1", "9" * 30, "1%2F2", "..%2F1", "%C2%B2"])
def test_no_such_field(client: TestClient, number: str) -> None:
    assert client.get(f"/field/{number}/thumbnail").status_code == 404


def test_hostile_sheets_are_refused(explorer: Explorer) -> None:
    with explorer.workspace.database.read() as session:
        known = session.scalars(select(Cell.id).limit(1)).one()
    for ids, side, channels in (
        ([known], 4, []), ([known], 100_000, []), ([], 32, []), ([known] * 401, 32, []),
    ):  # fmt: skip
        with pytest.raises(UserInputError):
            pixels.sheet_pixels(explorer, ids, side=side, channels=channels)
    for ids, channels in (([2**40], []), ([known], ["no such"])):
        with pytest.raises(UnknownNameError):
            pixels.sheet_pixels(explorer, ids, side=32, channels=channels)


def test_the_channels_that_are_shown_unless_others_are_asked_for() -> None:
    assert pixels.usual_channels(["Brightfield", "RNA", "ER", "AGP", "DNA"]) == ["RNA", "ER", "DNA"]
    assert pixels.usual_channels(["Brightfield"]) == ["Brightfield"]
    assert pixels.usual_channels(["DNA", PROJECTION_CHANNEL]) == [PROJECTION_CHANNEL]
