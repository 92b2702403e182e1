"""Models that a network has to beat: what they are, and how they are fitted and kept.

Two are classical models on the measurements of a cell; four are null baselines, which know nothing
of the cells that a treatment could have changed, or nothing of the treatments:

* ``majority``: how frequent each class is among the training images. What guessing well gets.
* ``shuffled``: as ``logistic``, but wells have exchanged their labels. What an able model gets
  where features say nothing about labels; more, if wells betray themselves.
* ``cellcount``: how many cells an image has, and nothing else. Toxic treatments kill cells, which
  is seen without looking at one.
* ``position``: row and column of the well, and nothing else. Where a treatment always sits in the
  same well, its class can be had without an image.

All are estimators of scikit-learn. They are kept with skops, which opens a file without running
code from it.
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UnknownNameError, UserInputError

Numbers = NDArray[np.float64]

MAJORITY, SHUFFLED, CELLCOUNT, POSITION = "majority", "shuffled", "cellcount", "position"
LOGISTIC, FOREST = "logistic", "forest"
NULLS = (MAJORITY, SHUFFLED, CELLCOUNT, POSITION)
BASELINES = (*NULLS, LOGISTIC, FOREST)
ON_FEATURES = (SHUFFLED, LOGISTIC, FOREST)
"""Those that read the measurements of cells; the others say the same of all cells of an image."""

POSITION_COLUMNS = ("row", "column")
COUNT_COLUMNS = ("log_cells", "log_cells_squared")

ESTIMATORS = {
    MAJORITY: "DummyClassifier",
    SHUFFLED: "LogisticRegression",
    CELLCOUNT: "LogisticRegression",
    POSITION: "RandomForestClassifier",
    LOGISTIC: "LogisticRegression",
    FOREST: "RandomForestClassifier",
}
"""What each is, in scikit-learn."""

STEPS = 1000
"""Steps of the solver after which a logistic regression is left as it is."""

TRUSTED = ["sklearn.tree._tree.Tree"]
"""What a file may hold beside what skops trusts by itself; :func:`check_trees` looks at these."""


def choose(names: Sequence[str]) -> tuple[str, ...]:
    """Return baselines by name, in the order of ``BASELINES``; ``null`` and ``all`` are groups.

    Raises ``UnknownNameError`` for another name, ``UserInputError`` for none.
    """
    groups = {"null": NULLS, "all": BASELINES}
    wanted: set[str] = set()
    for name in names:
        if name not in groups and name not in BASELINES:
            raise UnknownNameError.of("baseline", name, (*BASELINES, *groups))
        wanted.update(groups.get(name, (name,)))
    if not wanted:
        raise UserInputError(f"Name a baseline: {', '.join((*BASELINES, *groups))}.")
    return tuple(name for name in BASELINES if name in wanted)


def count_rows(cells: ArrayLike) -> Numbers:
    """Return what ``cellcount`` reads of images of so many cells: (N, 2), ``COUNT_COLUMNS``.

    The square lets a class lie between others: with the logarithm alone, a linear model could
    only tell many cells from few.
    """
    logs = np.log1p(np.asarray(cells, dtype=np.float64))
    return np.stack([logs, logs**2], axis=1)


def fit_majority(classes: NDArray[np.int64]) -> Any:
    """Return the share of each class among ``classes`` (N,) of training images."""
    from sklearn.dummy import DummyClassifier

    return DummyClassifier(strategy="prior").fit(np.empty((len(classes), 0)), classes)


def fit_logistic(
    rows: ArrayLike, classes: NDArray[np.int64], strength: float = 1.0, steps: int = STEPS
) -> tuple[Any, bool]:
    """Return a multinomial logistic regression, and whether it converged.

    ``rows`` are (N, F), standardised; ``classes`` (N,) are 0..K-1, and each occurs. ``strength`` is
    1 / C of scikit-learn: how much large coefficients cost.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / strength, max_iter=steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(np.asarray(rows, dtype=np.float64), classes)
    return model, not any(issubclass(item.category, ConvergenceWarning) for item in caught)


@dataclass(frozen=True)
class ForestConfig:
    """``trees`` of at most ``depth`` levels, whose leaves hold ``smallest_leaf`` rows or more.

    ``all_columns``: each split looks at all columns, else at the root of their number (Breiman
    2001, as in scikit-learn).
    """

    trees: int = 100
    depth: int | None = 16
    smallest_leaf: int = 5
    all_columns: bool = False


def fit_forest(
    rows: ArrayLike, classes: NDArray[np.int64], seed: int, config: ForestConfig | None = None
) -> Any:
    """Return a random forest; ``rows`` and ``classes`` as for :func:`fit_logistic`."""
    from sklearn.ensemble import RandomForestClassifier

    config = config or ForestConfig()
    model = RandomForestClassifier(
        n_estimators=config.trees,
        max_depth=config.depth,
        min_samples_leaf=config.smallest_leaf,
        max_features=None if config.all_columns else "sqrt",
        random_state=seed,
        n_jobs=-1,
    )
    # What is kept works alone: images are labelled one by one, too few rows to share out.
    return model.fit(np.asarray(rows, dtype=np.float32), classes).set_params(n_jobs=None)


def save_estimator(model: Any) -> bytes:
    """Return an estimator as a skops file; the same estimator gives the same bytes."""
    import skops.io

    # skops writes addresses in memory and the time of day. They are replaced by numbers in the
    # order in which they come, so that two equal models have one sha256.
    written = zipfile.ZipFile(io.BytesIO(skops.io.dumps(model)))
    known: dict[int, int] = {}
    names: dict[str, str] = {}

    def numbered(node: Any) -> Any:
        if isinstance(node, list):
            return [numbered(item) for item in node]
        if not isinstance(node, dict):
            return node
        made = {key: numbered(item) for key, item in node.items()}
        if isinstance(node.get("__id__"), int):
            made["__id__"] = known.setdefault(node["__id__"], len(known))
        if isinstance(node.get("file"), str):
            ending = node["file"].rpartition(".")[2]
            made["file"] = names.setdefault(node["file"], f"{len(names)}.{ending}")
        return made

    schema = json.dumps(numbered(json.loads(written.read("schema.json"))), indent=1)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        # Most leaves of a forest know few of the classes: the rest are zeros.
        for old, new in names.items():
            file.writestr(zipfile.ZipInfo(new), written.read(old), zipfile.ZIP_DEFLATED)
        file.writestr(zipfile.ZipInfo("schema.json"), schema, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def load_estimator(data: bytes, baseline: str) -> Any:
    """Return the estimator of a skops file. Damaged bytes end in errors of many kinds."""
    import skops.io

    model = skops.io.loads(data, trusted=TRUSTED)
    if type(model).__name__ != ESTIMATORS[baseline]:
        raise ValueError(f"it holds a {type(model).__name__}")
    for tree in getattr(model, "estimators_", ()):
        check_trees(tree.tree_)
    return model


def check_trees(tree: Any) -> None:
    """Raise ``ValueError`` where a row could leave the nodes of a tree, or walk in a circle.

    scikit-learn follows the numbers in a tree without a look, so a damaged file could crash it.
    """
    here, leaf = np.arange(tree.node_count), tree.children_left < 0
    for child in (tree.children_left, tree.children_right):
        inside = (child > here) & (child < tree.node_count)
        if not (inside | leaf).all():
            raise ValueError("a node of the forest leads back or out of it")
    if not ((tree.feature >= 0) & (tree.feature < tree.n_features) | leaf).all():
        raise ValueError("a node of the forest looks at a column that is not there")
