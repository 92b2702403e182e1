"""Pages: one HTML file each that needs nothing else, no network and no script."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_PICTURES = 0x2400  # of the control characters from 0: U+2400 is the picture of U+0000
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
    "|[\ud800-\udfff\ufff9-\uffff]"
)


def plain(text: str) -> str:
    """Return ``text`` with control characters and marks of direction written out.

    Such characters could hide a part of a name or turn what follows around. Tabs and line feeds
    stay as they are.
    """
    return _HIDDEN.sub(lambda found: _written(found[0]), text)


def short(text: str, longest: int = 22) -> str:
    """Return a text for a tick of a figure: in one line, and its beginning if it is too long."""
    line = plain(" ".join(text.split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _written(character: str) -> str:
    code = ord(character)
    return chr(_PICTURES + code) if code < 0x20 else f"\\u{code:04x}"


WIDEST = 460
"""Pixels of a picture on a page."""


def smaller(plane: NDArray[np.float32], step: int) -> NDArray[np.float32]:
    """Return the means of squares of ``step`` pixels, in the shape of ``plane[::step, ::step]``."""
    missing = [(0, -length % step) for length in plane.shape]
    padded = np.pad(plane, missing, mode="edge")
    rows, columns = padded.shape[0] // step, padded.shape[1] // step
    means: NDArray[np.float32] = padded.reshape(rows, step, columns, step).mean(axis=(1, 3))
    return means


def middle(length: int, wanted: int = WIDEST) -> slice:
    """Return the middle ``wanted`` pixels of a side of ``length`` pixels."""
    start = max(0, (length - wanted) // 2)
    return slice(start, start + wanted)


def jpeg(picture: NDArray[np.uint8]) -> str:
    """Return a picture, (H, W) or (H, W, 3), as the data URI of a JPEG."""
    from imagecodecs import jpeg8_encode

    data = jpeg8_encode(np.ascontiguousarray(picture), level=85)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


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


def render(
    name: str, content: dict[str, Any], filters: Mapping[str, Callable[..., str]] | None = None
) -> str:
    """Return the page of the template ``name``, with more ``filters``.

    It may include and import other templates. Every text is escaped but figures
    (filter ``svg``) and the common look (``css``); what cannot be seen in a text is written out.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    css = files("cellstore.report.templates").joinpath("page.css").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_template),
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    environment.filters["percent"] = lambda value: _or_dash(value, 100, ".1f", " %")
    environment.filters["number"] = lambda value: _or_dash(value, 1, ".3f", "")
    environment.filters["svg"] = Markup  # figures are drawn by matplotlib, which escapes its texts
    environment.filters.update(filters or {})
    template = environment.get_template(name)
    return template.render(css=Markup(css), **content)  # noqa: S704 - ours


def _template(name: str) -> str:
    return files("cellstore.report.templates").joinpath(name).read_text(encoding="utf-8")


def _or_dash(value: float | None, factor: float, form: str, unit: str) -> str:
    return "\u2013" if value is None else f"{value * factor:{form}}{unit}"
