"""Figures by matplotlib, as SVG that takes its ink from the page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from .text import plain
from .text import short as short

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#0a0b0d"
"""Stands for the colour of the page's text until the SVG is done; see :func:`svg`."""
BLUE, ORANGE, GREY = "#3b82c4", "#d97b28", "#8a8f98"
"""Told apart by the colour-blind, and seen on white as on black."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a compound may be called $x$
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
}


def colour_bar(figure: Figure, picture: Any, label: str) -> None:
    """Put the colours of ``picture`` beside it."""
    bar = figure.colorbar(picture, fraction=0.03, pad=0.02, label=label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None], alt: str = "") -> str:
    """Return what ``draw`` puts on a figure of ``size`` inches, as an element of a page.

    ``name`` makes the ids of one figure others than those of the next; ``alt`` says in words what
    is seen, for those who do not see it.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # A browser has letters that matplotlib, which only measures them here, has not.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        target = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(target, format="svg", transparent=True, metadata=nothing)
    return _as_svg(target.getvalue(), alt)


def _as_svg(text: str, alt: str) -> str:
    """Return the element alone, its ink that of the page, its size that of its place."""
    element = text[text.index("<svg") :]
    element = re.sub(r"<style.*?</style>", "", element, count=1, flags=re.DOTALL)
    head, rest = element.replace(INK, "currentColor").split(">", 1)
    width = re.search(r'width="([\d.]+)pt"', head)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    size = f' style="width:{width[1]}pt"' if width else ""
    label = f' aria-label="{escape(plain(alt))}"' if alt else ""
    return f'{head}{size} role="img"{label}>{rest}'
