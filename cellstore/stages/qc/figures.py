"""The maps of a plate, by matplotlib: as SVG for a page, or all on one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...drawing.plates import layout_of, well_names
from ...drawing.svg import STYLE, short, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .maps import WellMap

RING, HALO = "#d1350f", "#ffffff"
"""A ring is seen on every colour of the map, because a white one lies below it."""
WIDTH = 3.5
POINTS = 200.0
"""Width of a map in points, without its bar."""
BESIDE = 3
"""Maps beside each other on a picture."""


def map_svg(plate: str, found: WellMap) -> str:
    """Return one map as an element of a page."""
    rows, columns = _layout([found])
    size = (WIDTH, WIDTH * 0.8 * rows / columns + 0.3)
    name = f"{plate} {found.title} {found.channel}"

    def draw(figure: Figure) -> None:
        _draw(figure, figure.subplots(), found)
        # The letters of a page may be wider than those that were measured.
        figure.set_layout_engine("constrained", w_pad=0.08)

    return svg(name, size, draw)


def maps_png(plate: str, maps: Sequence[WellMap]) -> bytes:
    """Return a picture of all maps of a plate as PNG, on white."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows, columns = _layout(maps)
    lines = -(-len(maps) // BESIDE)
    height = WIDTH * 0.8 * rows / columns + 0.5
    with rc_context({**STYLE, "axes.titlesize": 9}):
        figure = Figure(figsize=(BESIDE * WIDTH, lines * height + 0.4), layout="constrained")
        figure.suptitle(short(plate, 60), x=0.01, ha="left", size=11)
        for place, found in enumerate(maps, start=1):
            axes = figure.add_subplot(lines, BESIDE, place)
            _draw(figure, axes, found)
            axes.set_title(_title(found))
        target = io.BytesIO()
        figure.savefig(target, format="png", dpi=150, metadata={"Software": None})
    return target.getvalue()


def _title(found: WellMap) -> str:
    return f"{found.title} {short(found.channel)}, {found.unit}".replace(" ,", ",")


def _draw(figure: Figure, axes: Axes, found: WellMap) -> None:
    rows, columns = _layout([found])
    values = np.full((rows, columns), np.nan)
    for (row, column), value in found.values.items():
        values[row - 1, column - 1] = value
    low, high = _span(values)
    # A picture of one pixel for each well: a page has many maps, and a path for each well is long.
    picture = axes.imshow(
        values,
        cmap="viridis",
        vmin=low,
        vmax=high,
        interpolation="none",
        origin="lower",
        extent=(0.5, columns + 0.5, 0.5, rows + 0.5),
    )
    well_names(axes, rows, columns, small=True)
    _rings(axes, found, POINTS / columns)
    bar = figure.colorbar(picture, ax=axes, fraction=0.03, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=7)


def _span(values: NDArray[np.float64]) -> tuple[float, float]:
    """From where to where colours go: odd wells must not take them all."""
    low, high = np.nanpercentile(values, [2, 98])
    if high == low:
        low, high = np.nanmin(values), np.nanmax(values)
    return float(low), float(high if high > low else low + 1)


def _rings(axes: Axes, found: WellMap, well: float) -> None:
    """Put a ring around each marked well, that is ``well`` points wide."""
    places = sorted(found.marked)
    x, y = [column for _, column in places], [row for row, _ in places]
    for colour, width in ((HALO, 2.4), (RING, 1.3)):
        axes.scatter(
            x, y, s=(1.3 * well) ** 2, facecolors="none", edgecolors=colour, linewidths=width
        )


def _layout(maps: Sequence[WellMap]) -> tuple[int, int]:
    places: list[Any] = [(*place, None) for found in maps for place in found.values]
    return layout_of(places)
