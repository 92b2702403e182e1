"""Rows of many numbers as points on a plane: principal components, and UMAP."""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

COMPONENTS = 50
"""Principal components that UMAP sees: what lies behind them is mostly noise."""
NEIGHBOURS = 15
"""Neighbours of a point in UMAP, its default."""


def components_of(centred: Floats, count: int = COMPONENTS) -> Floats:
    """Return the first principal axes of rows (N, F) whose means are 0: (F, K), K <= ``count``.

    Each has length 1; its sign, which is open, is that with which the largest of its projections
    is positive. ``centred @ axes`` are the components (N, K).
    """
    rows, columns = centred.shape
    count = min(count, rows, columns)
    if rows < columns:  # the smaller of two matrices of products
        sizes, vectors = np.linalg.eigh(centred @ centred.T)
        axes = centred.T @ vectors[:, ::-1][:, :count]
        lengths = np.sqrt(np.maximum(sizes[::-1][:count], 0))
        axes /= np.where(lengths > 1e-9 * max(1e-300, lengths.max()), lengths, np.inf)
    else:
        axes = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :count]
    projected = centred @ axes
    largest = np.abs(projected).max(axis=0)
    return np.asarray(axes * np.where(projected.max(axis=0) == largest, 1, -1))


def umap_of(parts: Floats, seed: int) -> Floats:
    """Return points (N, 2) on which rows ``parts`` (N, K) that are alike lie beside each other.

    McInnes, Healy and Melville 2018, by umap-learn.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sklearn.neighbors import NearestNeighbors
        from umap import UMAP

        # UMAP finds neighbours of few points by a function of Python for each pair.
        near = min(NEIGHBOURS, len(parts) - 1)
        found = NearestNeighbors(n_neighbors=near).fit(parts).kneighbors(parts)
        made = UMAP(
            n_neighbors=near,
            random_state=seed,
            precomputed_knn=found[::-1],
            force_approximation_algorithm=True,
        )
        return np.asarray(made.fit_transform(parts), np.float64)
