"""Plates from above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLATES = ((8, 12), (16, 24), (32, 48))
"""Rows and columns of plates with 96, 384 and 1536 wells."""


def layout_of(wells: Sequence[tuple[int, int, float | None]]) -> tuple[int, int]:
    """Return rows and columns of the smallest standard plate that has all ``wells``."""
    row, column = max(w[0] for w in wells), max(w[1] for w in wells)
    fitting = [size for size in PLATES if row <= size[0] and column <= size[1]]
    return fitting[0] if fitting else (row, column)


def well_names(axes: Axes, rows: int, columns: int, *, small: bool = False) -> None:
    """Write the letters and numbers of the wells on the left and on top; ``small``: some."""
    step = 1 if columns <= 24 else 2
    if small:
        step = max(1, columns // 6)
    letters = [chr(64 + r) if r <= 26 else f"A{chr(64 + r - 26)}" for r in range(1, rows + 1)]
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    axes.set_xticks(range(1, columns + 1, step))
    axes.set_yticks(range(1, rows + 1, step), letters[::step])
    axes.tick_params(length=0, labelsize=7 if small else 8)
    axes.spines[:].set_visible(False)
