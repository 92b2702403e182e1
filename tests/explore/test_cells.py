"""Which cells an address means, and the gallery of them."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from factories import MOMENT, Factory
from sqlalchemy import text
from starlette.requests import Request
from starlette.testclient import TestClient

from cellstore.enums import AnnotationKind, ImageFlagReason, Level, Stage
from cellstore.errors import QueryError, UnknownNameError, UserInputError
from cellstore.explore.cell_views import chosen_cells, keep_selection
from cellstore.explore.requests import ask
from cellstore.explore.server import make_app
from cellstore.jobs.workspace import Workspace
from cellstore.models import Annotation, Cell, Image

PLAIN = """
    SELECT c.id FROM cells AS c
    JOIN segmentations AS s ON s.id = c.segmentation_id
    JOIN images AS i ON i.id = s.image_id
    JOIN wells AS w ON w.id = i.well_id
    JOIN plates AS p ON p.id = w.plate_id
    JOIN treatments AS t ON t.id = w.treatment_id
    JOIN features AS f ON f.cell_id = c.id
    LEFT JOIN predictions AS a ON a.cell_id = c.id AND a.run_id = :first AND a.rank = 1
    LEFT JOIN labels AS l ON l.id = a.label_id
    LEFT JOIN predictions AS b ON b.cell_id = c.id AND b.run_id = :last AND b.rank = 1
    LEFT JOIN split_members AS m ON m.image_id = i.id
    LEFT JOIN labels AS n ON n.id = m.label_id
    WHERE c.excluded IS NULL AND
"""
RUNS = "SELECT run_id FROM predictions GROUP BY run_id ORDER BY count(DISTINCT probability) DESC"
PROBABILITY = "SELECT avg(probability) FROM predictions WHERE rank = 1 AND run_id = :run"


def plain(workspace: Workspace, condition: str) -> set[int]:
    """What the database itself says of the cells of a condition."""
    with workspace.database.read() as session:
        first, last = session.scalars(text(RUNS))
        found = session.execute(text(PLAIN + condition), {"first": first, "last": last})
        return {row[0] for row in found}


def asked(app: Any, **filters: Any) -> Request:
    """A request with these filters in its address."""
    query = urlencode(filters, doseq=True).encode()
    scope = {"type": "http", "method": "GET", "path": "/cells", "headers": [], "app": app}
    return Request(scope | {"query_string": query})


def ids(app: Any, prefix: str = "", **filters: Any) -> set[int]:
    """The cells that these filters choose; none is chosen twice."""
    request = asked(app, **filters)
    chosen = chosen_cells(request, prefix)
    rows = ask(request, chosen.query, chosen.values)
    found = {row["cell_id"] for row in rows}
    assert len(found) == len(rows)
    return found


def test_filters_choose_the_cells_that_plain_sql_does(
    client: TestClient, screen: Workspace
) -> None:
    app: Any = client.app
    with screen.database.read() as session:
        first, last = session.scalars(text(RUNS))
        barcode, treatment = session.execute(
            text(
                "SELECT p.barcode, t.name FROM wells AS w JOIN plates AS p ON p.id = w.plate_id "
                "JOIN treatments AS t ON t.id = w.treatment_id WHERE w.control IS NULL LIMIT 1"
            )
        ).one()
        area = session.scalar(text("SELECT avg(area) FROM features"))
        sure = session.scalar(text(PROBABILITY), {"run": first})
        label = session.scalar(text("SELECT min(label_id) FROM split_members"))
        label = session.scalar(text("SELECT value FROM labels WHERE id = :id"), {"id": label})
    of_first = {"run": first}
    large, certain = f"f.area >= {area}", f"a.probability >= {sure}"
    expected: list[tuple[dict[str, Any], str]] = [
        ({}, "true"),
        ({"plate": barcode}, f"p.barcode = '{barcode}'"),
        ({"well": ["B02", "B03"]}, "w.name IN ('B02', 'B03')"),
        ({"treatment": treatment}, f"t.name = '{treatment}'"),
        ({"control": "negative"}, "w.control = 'negative'"),
        ({"control": "none"}, "w.control IS NULL"),
        ({"image": "1,2"}, "i.id IN (1, 2)"),
        ({"area": f"{area}..", "eccentricity": "..0.7"}, f"{large} AND eccentricity <= 0.7"),
        ({"where": f"area >= {area} AND site = 1 -- all"}, large),
        (of_first, "a.cell_id IS NOT NULL"),
        (of_first | {"predicted": label}, f"l.value = '{label}'"),
        (of_first | {"label": label}, f"a.cell_id IS NOT NULL AND n.value = '{label}'"),
        (of_first | {"result": "right"}, "l.value = n.value"),
        (of_first | {"result": "wrong"}, "l.value <> n.value"),
        (of_first | {"subset": "test"}, "a.cell_id IS NOT NULL AND m.subset = 'test'"),
        (of_first | {"other": last}, "a.label_id <> b.label_id"),
        (of_first | {"min_probability": sure}, certain),
        (of_first | {"max_probability": sure}, f"NOT {certain}"),
    ]
    for filters, condition in expected:
        cells = plain(screen, condition)
        assert ids(app, **filters) == cells, filters
        assert cells, filters
    # The second filter of a page has a prefix, and neither sees the other.
    both = {"well": "B02", "b.well": "B03", "b.area": f"{area}.."}
    assert ids(app, **both) == plain(screen, "w.name = 'B02'")
    assert ids(app, "b.", **both) == plain(screen, f"w.name = 'B03' AND f.area >= {area}")
    some = sorted(plain(screen, "true"))[3::7]
    name = keep_selection(app.state.explorer, np.array(some[::-1], np.int64))
    assert ids(app, selection=name) == ids(app, cells=",".join(map(str, some))) == set(some)


def test_what_cannot_be_meant_is_said_in_a_sentence(client: TestClient) -> None:
    wrong: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"area": "nan.."}, UserInputError),
        ({"area": "1e999.."}, UserInputError),
        ({"nothing": "1..2"}, UnknownNameError),
        ({"cells.id": "1..2"}, UnknownNameError),
        ({"dose": "much"}, UserInputError),
        ({"cells": "1;DROP TABLE cells"}, UserInputError),
        ({"control": "x' OR 'a' = 'a"}, UserInputError),
        ({"run": "999999"}, UnknownNameError),
        ({"selection": "../../etc/passwd"}, UnknownNameError),
        ({"flagged": "yes"}, UnknownNameError),
        ({"where": "area >"}, QueryError),
        ({"where": "true) OR (1 = 1); DELETE FROM cells --"}, QueryError),
        ({"where": "area > (SELECT count(*) FROM read_csv('/etc/passwd'))"}, QueryError),
        ({"plate": ["x"] * 501}, UserInputError),
    ]
    for filters, kind in wrong:
        with pytest.raises(kind):
            chosen_cells(asked(client.app, **filters))
    for hostile in ("' OR 1 = 1 --", '"; DROP TABLE cells', "$run", "\u202eB02", "a..b"):
        for name in ("plate", "well", "treatment", "predicted", "label"):
            assert ids(client.app, **{name: hostile}) == set()


def test_flags_exclusions_and_labels_by_people_choose_cells(writable: Workspace) -> None:
    make = Factory(writable)
    cells = sorted(plain(writable, "true"))
    qc = make.run(Stage.QC)
    with writable.database.read() as session:
        first = session.get_one(Cell, cells[0])
        image = session.get_one(
            Image, session.scalar(text("SELECT max(image_id) FROM segmentations"))
        )
    make.flag_cell(qc, first)
    make.flag_image(qc, image, ImageFlagReason.OUT_OF_FOCUS)
    of_image = plain(writable, f"i.id = {image.id}")
    make.exclude(Level.CELL, cells[1])
    values = {"user_name": "ada", "created_at": MOMENT, "kind": AnnotationKind.LABEL}
    made = [
        make.add(Annotation(level=Level.CELL, row_id=cell, value=value, **values))
        for cell, value in ((cells[2], "mitotic"), (cells[3], "debris"))
    ]
    make.add(Annotation(level=Level.CELL, row_id=cells[3], undoes_id=made[1].id, **values))
    app = make_app(writable)
    counting = set(cells) - {cells[1]}
    assert ids(app) == counting
    assert ids(app, excluded="yes") == {cells[1]}
    assert ids(app, excluded="all") == set(cells)
    flagged = ({cells[0]} | of_image) & counting
    assert ids(app, flagged="yes") == flagged
    assert ids(app, flagged="no") == counting - flagged
    assert ids(app, flagged="out of focus") == of_image & counting
    assert ids(app, annotated="yes") == ids(app, annotated="mitotic") == {cells[2]}
    assert ids(app, annotated="no") == counting - {cells[2]}
    app.state.explorer.reader.close()
