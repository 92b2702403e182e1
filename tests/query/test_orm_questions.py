"""The eight questions of docs/orm.md: Python and SQL give the same answer, on both databases."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from screens import small_screen
from sqlalchemy import func, select

from cellstore import models
from cellstore.enums import Stage, Subset
from cellstore.jobs.workspace import Workspace
from cellstore.store import Store

PAGE = Path(__file__).parents[2] / "docs" / "orm.md"
QUESTIONS = re.findall(
    r"## \d\. ([^\n]+)\n.*?```python\n(.*?)```\n\n```sql\n(.*?)```", PAGE.read_text(), re.DOTALL
)


def test_python_and_sql_give_the_same_answer(workspace: Workspace) -> None:
    assert len(QUESTIONS) == 8
    screen = small_screen(workspace)
    make, taxol = screen.factory, screen.labels["taxol"]
    other = make.run(Stage.PREDICT, parent_id=screen.train_run.id, split_id=screen.split.id)
    for well in ("B01", "B02"):
        cells = make.cells_of(screen.segmentations[well])
        make.predict(other, cells, [[(taxol, 1.0)]] * len(cells))
    ids = {"image": screen.images["B01"].id, "run": screen.predict_run.id, "other": other.id}
    for title, python, sql in QUESTIONS:
        with Store(workspace).session() as session:
            names: dict[str, Any] = {name: getattr(models, name) for name in dir(models)}
            names |= {"session": session, "select": select, "func": func, "Subset": Subset}
            names |= {"Counter": Counter, "defaultdict": defaultdict}
            names |= {f"{name}_id": number for name, number in ids.items()}
            exec(python, names)
        asked = {name: number for name, number in ids.items() if f"${name}" in sql}
        answer = Store(workspace).sql(sql, asked).to_pylist()
        assert sorted(names["rows"]) == sorted(tuple(row.values()) for row in answer) != [], title
