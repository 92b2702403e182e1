"""Models that a network has to beat: what they say, and how they are fitted and kept.

Two are classical models on the measurements of a cell; four are null baselines, which know nothing
of the cells that a treatment could have changed, or nothing of the treatments:

* ``majority``: how frequent each class is among the training images. What guessing well gets.
* ``shuffled``: as ``logistic``, but wells have exchanged their labels. What an able model gets
  where features say nothing about labels; more, if wells betray themselves.
* ``cellcount``: how many cells an image has, and nothing else. Toxic treatments kill cells, which
  is seen without looking at one.
* ``position``: row and column of the well, and nothing else. Where a treatment always sits in the
  same place, its class can be had without an image.

Fitting is scikit-learn's; what it finds is kept as plain arrays, and read by NumPy alone, so that
opening a file never runs code from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import StorageError, UnknownNameError, UserInputError, first_line
from .branches import TABULAR
from .normalising import FeatureScaler, WhiteLevels, read_scaler

if TYPE_CHECKING:
    from .crops import CellBlock


Numbers = NDArray[np.float64]
Tensors = Mapping[str, NDArray[Any]]

MAJORITY, SHUFFLED, CELLCOUNT, POSITION = "majority", "shuffled", "cellcount", "position"
LOGISTIC, FOREST = "logistic", "forest"
NULLS = (MAJORITY, SHUFFLED, CELLCOUNT, POSITION)
BASELINES = (*NULLS, LOGISTIC, FOREST)
ON_FEATURES = (SHUFFLED, LOGISTIC, FOREST)
"""Those that read the measurements of cells; the others say the same of all cells of an image."""

PLACE = ("row", "column")
COUNT = ("log_cells", "log_cells_squared")


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
    """Return what ``cellcount`` reads of images of so many cells: (N, 2), the columns ``COUNT``.

    The square lets a class lie between others: with the logarithm alone, a linear model could
    only tell many cells from few.
    """
    logs = np.log1p(np.asarray(cells, dtype=np.float64))
    return np.stack([logs, logs**2], axis=1)


_ROWS_AT_ONCE = 1024
_TREES_AT_ONCE = 10
_FOREST = ("roots", "feature", "threshold", "left", "right", "starts", "classes", "counts")


class Model(Protocol):
    """What a baseline has learned."""

    def predict(self, rows: ArrayLike) -> Numbers:
        """Probabilities (N, K) of ``rows`` (N, F), as they come from the scaler."""

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All that it has learned, by name."""


@dataclass(frozen=True)
class Constant:
    """Says the same of every row: ``probabilities`` (K,)."""

    probabilities: Numbers

    def predict(self, rows: ArrayLike) -> Numbers:
        """See :class:`Model`."""
        return np.tile(self.probabilities, (len(np.asarray(rows)), 1))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """See :class:`Model`."""
        return {"probabilities": self.probabilities}

    @classmethod
    def of(cls, tensors: Tensors) -> Constant:
        """The model that ``tensors`` are of."""
        return cls(tensors["probabilities"])


@dataclass(frozen=True)
class Linear:
    """Softmax of ``rows @ coefficients.T + intercepts``: coefficients (K, F), intercepts (K,)."""

    coefficients: Numbers
    intercepts: Numbers

    def predict(self, rows: ArrayLike) -> Numbers:
        """See :class:`Model`."""
        scores = np.asarray(rows, dtype=np.float64) @ self.coefficients.T + self.intercepts
        powers: Numbers = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares: Numbers = powers / powers.sum(axis=1, keepdims=True)
        return shares

    def tensors(self) -> dict[str, NDArray[Any]]:
        """See :class:`Model`."""
        return {"coefficients": self.coefficients, "intercepts": self.intercepts}

    @classmethod
    def of(cls, tensors: Tensors) -> Linear:
        """The model that ``tensors`` are of."""
        return cls(tensors["coefficients"], tensors["intercepts"])


@dataclass(frozen=True)
class Forest:
    """The mean of T trees over the shares of the classes in the leaf that a row ends in.

    The M nodes of all trees follow each other, ``roots`` (T,) are the first of each. A row goes to
    ``left`` of its node where its value of ``feature`` is at most ``threshold``, else to
    ``right`` (all (M,)); a leaf is left and right of itself. Leaf i holds, for each class of
    ``classes[starts[i]:starts[i + 1]]``, that many training rows as ``counts`` says there: most
    leaves know few classes, so these are (L,) instead of a table (M, K).
    """

    roots: NDArray[np.int64]
    feature: NDArray[np.int64]
    threshold: Numbers
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    starts: NDArray[np.int64]
    classes: NDArray[np.int32]
    counts: NDArray[np.int32]
    n_classes: int

    @cached_property
    def shares(self) -> Numbers:
        """The share of each class in its leaf, (L,), in the order of ``counts``."""
        leaf_of = np.repeat(np.arange(len(self.feature)), np.diff(self.starts))
        shares: Numbers = self.counts / np.bincount(leaf_of, self.counts)[leaf_of]
        return shares

    def predict(self, rows: ArrayLike) -> Numbers:
        """See :class:`Model`."""
        values = np.asarray(rows, dtype=np.float32)
        parts = [values[i : i + _ROWS_AT_ONCE] for i in range(0, len(values), _ROWS_AT_ONCE)]
        none = np.empty((0, self.n_classes))
        return np.concatenate([none, *(self._mean_shares(self._leaves(p)) for p in parts)])

    def _leaves(self, values: NDArray[np.float32]) -> NDArray[np.int64]:
        """The leaf (N, T) of each row in each tree."""
        at = np.tile(self.roots, (len(values), 1)).ravel()
        row = np.repeat(np.arange(len(values)), len(self.roots))
        walking = np.flatnonzero(self.left[at] != at)
        while len(walking):
            here = at[walking]
            low = values[row[walking], self.feature[here]] <= self.threshold[here]
            at[walking] = np.where(low, self.left[here], self.right[here])
            walking = walking[self.left[at[walking]] != at[walking]]
        return at.reshape(len(values), -1)

    def _mean_shares(self, leaves: NDArray[np.int64]) -> Numbers:
        """The mean over the leaves (N, T) of the shares of their classes, (N, K)."""
        flat = leaves.ravel()
        sizes = self.starts[flat + 1] - self.starts[flat]
        place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        entry = np.repeat(self.starts[flat], sizes) + place
        rows_of = np.repeat(np.arange(len(leaves)), leaves.shape[1])
        shares = self.shares[entry]
        bins = np.repeat(rows_of, sizes) * self.n_classes + self.classes[entry]
        added = np.bincount(bins, weights=shares, minlength=len(leaves) * self.n_classes)
        return added.reshape(len(leaves), -1) / len(self.roots)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """See :class:`Model`."""
        found: dict[str, NDArray[Any]] = {name: getattr(self, name) for name in _FOREST}
        return found | {"n_classes": np.array([self.n_classes])}

    @classmethod
    def of(cls, tensors: Tensors) -> Forest:
        """The model that ``tensors`` are of; raises ``ValueError`` if they are no forest."""
        arrays = {name: tensors[name] for name in _FOREST}
        found = cls(**arrays, n_classes=int(tensors["n_classes"][0]))
        here = np.arange(len(found.feature))
        leads_on = (found.left > here) & (found.right > here)
        ends = (found.left == here) & (found.right == here)
        if not (leads_on | ends).all():  # so that no row walks in a circle
            raise ValueError("a node of the forest leads back")
        return found


def fit_constant(counts: Sequence[int]) -> Constant:
    """The share of each class; ``counts`` (K,) of training images."""
    return Constant(np.asarray(counts, dtype=np.float64) / sum(counts))


@dataclass(frozen=True)
class LogisticConfig:
    """``strength`` is 1 / C of scikit-learn: how much large coefficients cost. 1 is its default."""

    strength: float = 1.0
    steps: int = 1000


def fit_linear(
    rows: ArrayLike, classes: NDArray[np.int64], config: LogisticConfig | None = None
) -> tuple[Linear, bool]:
    """Multinomial logistic regression, and whether it converged.

    ``rows`` are (N, F), standardised; ``classes`` (N,) are 0..K-1, and each occurs.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    config = config or LogisticConfig()
    model = LogisticRegression(C=1 / config.strength, max_iter=config.steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(np.asarray(rows, dtype=np.float64), classes)
    converged = not any(issubclass(item.category, ConvergenceWarning) for item in caught)
    return linear_of(model), converged


def linear_of(model: Any) -> Linear:
    """The arrays of a fitted ``LogisticRegression``; of two classes it keeps the second's alone."""
    coefficients, intercepts = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    if len(coefficients) == 1:
        coefficients = np.concatenate([np.zeros_like(coefficients), coefficients])
        intercepts = np.concatenate([np.zeros_like(intercepts), intercepts])
    return Linear(coefficients, intercepts)


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
) -> Forest:
    """A random forest; ``rows`` and ``classes`` as for :func:`fit_linear`."""
    from sklearn.ensemble import RandomForestClassifier

    config = config or ForestConfig()
    # A forest in memory has a table of nodes and classes; its trees are made smaller as they come.
    generator = np.random.RandomState(seed)
    parts: list[dict[str, NDArray[Any]]] = []
    while len(parts) < config.trees:
        model = RandomForestClassifier(
            n_estimators=min(_TREES_AT_ONCE, config.trees - len(parts)),
            max_depth=config.depth,
            min_samples_leaf=config.smallest_leaf,
            max_features=None if config.all_columns else "sqrt",
            random_state=generator,
            n_jobs=-1,
        )
        model.fit(np.asarray(rows, dtype=np.float32), classes)
        parts += [_tree_arrays(estimator.tree_) for estimator in model.estimators_]
    return _joined(parts, len(model.classes_))


def _tree_arrays(tree: Any) -> dict[str, NDArray[Any]]:
    """The arrays of one tree, its nodes counted from 0; all rows must weigh the same."""
    here = np.arange(tree.node_count)
    leaf = tree.children_left < 0
    counts = np.rint(tree.value[:, 0, :] * tree.weighted_n_node_samples[:, None])
    counts[~leaf] = 0
    nodes, classes = np.nonzero(counts)
    return {
        "feature": np.where(leaf, 0, tree.feature).astype(np.int64),
        "threshold": np.where(leaf, 0.0, tree.threshold),
        "left": np.where(leaf, here, tree.children_left),
        "right": np.where(leaf, here, tree.children_right),
        "sizes": np.bincount(nodes, minlength=tree.node_count),
        "classes": classes.astype(np.int32),
        "counts": counts[nodes, classes].astype(np.int32),
    }


def _joined(parts: Sequence[dict[str, NDArray[Any]]], n_classes: int) -> Forest:
    nodes = [len(part["feature"]) for part in parts]
    roots = np.cumsum([0, *nodes[:-1]])
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for name in ("left", "right"):
        joined[name] += np.repeat(roots, nodes)
    starts = np.concatenate([[0], np.cumsum(joined.pop("sizes"))])
    return Forest(roots=roots, starts=starts, n_classes=n_classes, **joined)


_FORMS: Mapping[str, Any] = {
    MAJORITY: Constant,
    SHUFFLED: Linear,
    CELLCOUNT: Linear,
    POSITION: Forest,
    LOGISTIC: Linear,
    FOREST: Forest,
}


@dataclass(frozen=True)
class BaselineMeta:
    """What has to stand beside the arrays of a baseline to use it again.

    ``labels`` are the classes in the order of the probabilities, values of ``field``; ``scaler``
    names the columns that it reads. The rest is as for a network's checkpoint.
    """

    model: str
    labels: tuple[str, ...]
    field: str
    scaler: FeatureScaler
    fingerprints: Mapping[str, str]
    feature_set: str | None = None

    @property
    def branches(self) -> tuple[str, ...]:
        """What it looks at: no image."""
        return (TABULAR,)

    @property
    def crop_size(self) -> int:
        """Of no interest, as it looks at no crops."""
        return 1

    @property
    def channels(self) -> tuple[str, ...]:
        """None, as it looks at no crops."""
        return ()

    @property
    def whites(self) -> WhiteLevels | None:
        """None, as it looks at no crops."""
        return None

    def to_json(self) -> dict[str, Any]:
        """A record that ``json.dumps`` takes as it is."""
        return {
            "model": self.model,
            "labels": list(self.labels),
            "field": self.field,
            "scaler": self.scaler.to_json(),
            "fingerprints": dict(self.fingerprints),
            "feature_set": self.feature_set,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> BaselineMeta:
        """The record that :meth:`to_json` made; raises ``UserInputError`` if it is not one."""
        try:
            found = cls(
                model=str(record["model"]),
                labels=tuple(str(label) for label in record["labels"]),
                field=str(record["field"]),
                scaler=read_scaler(record["scaler"]),
                fingerprints={str(k): str(v) for k, v in record["fingerprints"].items()},
                feature_set=record.get("feature_set"),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserInputError(f"This does not describe a baseline: {error!r}.") from error
        if found.model not in BASELINES:
            raise UnknownNameError.of("baseline", found.model, BASELINES)
        return found


def save_model(model: Model) -> bytes:
    """The arrays of a model as a safetensors file."""
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(value) for name, value in model.tensors().items()})


def load_model(tensors: bytes, record: Mapping[str, Any]) -> tuple[Model, BaselineMeta]:
    """The model of :func:`save_model`'s bytes and of ``BaselineMeta.to_json``'s record.

    Raises ``UserInputError`` if the record is not one, ``StorageError`` if the bytes are damaged
    or do not fit the record.
    """
    from safetensors.numpy import load

    meta = BaselineMeta.from_json(record)
    try:
        model: Model = _FORMS[meta.model].of(load(tensors))
        answer = model.predict(np.zeros((1, len(meta.scaler.names)), dtype=np.float32))
        fits = answer.shape == (1, len(meta.labels)) and bool(np.isfinite(answer).all())
    except Exception as error:  # damaged bytes end in errors of many kinds
        raise _damaged(first_line(error)) from error
    if not fits:
        raise _damaged("its classes are not those of the record")
    return model, meta


@dataclass(frozen=True)
class CellModel:
    """A baseline as what labels the cells of an image; see ``cellstore.learn.models``."""

    model: Model

    def predict(self, cells: CellBlock) -> Numbers:
        """Return probabilities, (N, K) float64, of N cells with features of the baseline's."""
        return self.model.predict(cells.features.numpy())


def load_baseline(
    tensors: bytes, record: Mapping[str, Any], device: str = "cpu"
) -> tuple[CellModel, BaselineMeta]:
    """The baseline as what labels cells, on any device; raises as :func:`load_model` does."""
    model, meta = load_model(tensors, record)
    return CellModel(model), meta


def _damaged(reason: str) -> StorageError:
    return StorageError(
        f"The checkpoint is damaged or of another model ({reason}). "
        "Check the store with 'cellstore verify', or train again."
    )
