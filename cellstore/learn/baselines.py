"""Models that a network has to beat: what they are, and how they are fitted and kept.

Three are classical models on the measurements of a cell, or on what another network made of it:
``logistic`` and ``knn``, which are the two usual probes of an embedding, and ``forest``. Four are
null baselines, which know nothing of the cells that a treatment could have changed, or nothing of
the treatments:

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

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UnknownNameError, UserInputError

Numbers = NDArray[np.float64]

MAJORITY, SHUFFLED, CELLCOUNT, POSITION = "majority", "shuffled", "cellcount", "position"
LOGISTIC, KNN, FOREST = "logistic", "knn", "forest"
NULLS = (MAJORITY, SHUFFLED, CELLCOUNT, POSITION)
BASELINES = (*NULLS, LOGISTIC, KNN, FOREST)
GROUPS = {"null": NULLS, "probe": (LOGISTIC, KNN), "all": BASELINES}
ON_FEATURES = (SHUFFLED, LOGISTIC, KNN, FOREST)
"""Those that read the measurements of cells; the others say the same of all cells of an image."""

POSITION_COLUMNS = ("row", "column")
COUNT_COLUMNS = ("log_cells", "log_cells_squared")

STEPS = 1000
"""Steps of the solver after which a logistic regression is left as it is."""


def choose(names: Sequence[str]) -> tuple[str, ...]:
    """Return baselines by name or by that of one of ``GROUPS``, in the order of ``BASELINES``."""
    wanted: set[str] = set()
    for name in names:
        if name not in GROUPS and name not in BASELINES:
            raise UnknownNameError.of("baseline", name, (*BASELINES, *GROUPS))
        wanted.update(GROUPS.get(name, (name,)))
    if not wanted:
        raise UserInputError(f"Name a baseline: {', '.join((*BASELINES, *GROUPS))}.")
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


def fit_knn(rows: ArrayLike, classes: NDArray[np.int64], neighbours: int = 20) -> Any:
    """Return a classifier by the nearest training cells; ``rows`` and ``classes`` as above.

    The ``neighbours`` whose rows point most nearly the same way (cosine) vote, each by 1 / distance
    (1 - cosine). Cosine and 20 neighbours are the protocol of DINO (Caron et al., ICCV 2021), which
    weighs by exp(cosine / 0.07); 1 / distance is what scikit-learn keeps without code in the file.
    It keeps all rows, and compares with each of them.
    """
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(
        min(neighbours, len(classes)), metric="cosine", algorithm="brute", weights="distance"
    )
    return model.fit(np.asarray(rows, dtype=np.float32), classes)


def fit_forest(
    rows: ArrayLike,
    classes: NDArray[np.int64],
    seed: int,
    trees: int = 100,
    depth: int | None = 16,
    smallest_leaf: int = 5,
    *,
    all_columns: bool = False,
) -> Any:
    """Return a random forest; ``rows`` and ``classes`` as for :func:`fit_logistic`.

    It has ``trees`` of at most ``depth`` levels, whose leaves hold ``smallest_leaf`` rows or more.
    ``all_columns``: each split looks at all columns, else at the root of their number (Breiman
    2001, as in scikit-learn).
    """
    from sklearn.ensemble import RandomForestClassifier

    model = RandomForestClassifier(
        n_estimators=trees,
        max_depth=depth,
        min_samples_leaf=smallest_leaf,
        max_features=None if all_columns else "sqrt",
        random_state=seed,
        n_jobs=-1,
    )
    # What is kept works alone: images are labelled one by one, too few rows to share out.
    return model.fit(np.asarray(rows, dtype=np.float32), classes).set_params(n_jobs=None)
