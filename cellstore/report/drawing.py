"""Pages: one HTML file each that needs nothing else, no network and no script."""

from __future__ import annotations

import base64
import io
import re
import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts import open_atomically
from ..io.filenames import format_well
from ..jobs.planes import NUCLEAR
from ..notebooks import plain
from ..settings import check_not_of_a_store

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

    from ..analysis.dose_curves import DoseCurve


Place = Callable[..., "str | None"]
"""Gives the address of what a word, names and parameters say, where the explorer shows it."""


def nowhere(*names: object, **parameters: object) -> None:
    """No address: the page is a file."""


def short(text: str, longest: int = 22) -> str:
    """Return a text for a tick of a figure: in one line, and its beginning if it is too long."""
    line = plain(" ".join(text.split()))
    return line if len(line) <= longest else line[: longest - 1] + "…"


OUTLINE_COLOUR = (255, 196, 0)
"""Amber: seen on black and on grey, also by the colour-blind."""

Limits = tuple[float, float]
"""Grey levels that are shown as black and as white."""


def grey_limits(image: NDArray[np.generic]) -> Limits:
    """Return the 1st and the 99.7th percentile of ``image`` (H, W)."""
    bottom, top = np.percentile(image.astype(np.float32), [1.0, 99.7])
    return float(bottom), float(top)


def outlines(masks: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Return the pixels of cells that touch another value above, below, left or right: (H, W).

    The image border counts as no label, so a cell cut by it stays open there.
    """
    edge = np.zeros(masks.shape, bool)
    rows, columns = masks[1:] != masks[:-1], masks[:, 1:] != masks[:, :-1]
    edge[1:] |= rows
    edge[:-1] |= rows
    edge[:, 1:] |= columns
    edge[:, :-1] |= columns
    return edge & (masks > 0)


def outline_overlay(
    image: NDArray[np.generic],
    masks: NDArray[np.integer[Any]] | None,
    limits: Limits | None = None,
) -> NDArray[np.uint8]:
    """Return ``image`` (H, W) in grey with the outlines of ``masks`` (H, W): (H, W, 3).

    ``limits``: the grey levels of black and white, those of the image unless given.
    """
    bottom, top = limits or grey_limits(image)
    scaled = (image.astype(np.float32) - bottom) / max(top - bottom, 1e-9)
    grey = np.rint(255 * np.clip(scaled, 0, 1)).astype(np.uint8)
    picture = np.repeat(grey[..., None], 3, axis=-1)
    if masks is not None:
        picture[outlines(masks)] = OUTLINE_COLOUR
    return picture


COLOURS = (
    (0.15, 1.0, 0.35),
    (1.0, 0.25, 0.55),
    (1.0, 0.75, 0.1),
    (0.2, 0.9, 1.0),
    (0.9, 0.4, 1.0),
    (0.8, 0.8, 0.8),
)
NUCLEI = (0.3, 0.5, 1.0)
"""Light that channels are shown in, of red, green and blue; that of nuclei is blue."""


KNEE = 0.4


def light_of(channels: Sequence[str]) -> list[tuple[float, float, float]]:
    """Return the light of each channel that is shown together with the others."""
    colours = iter(COLOURS * len(channels))
    return [NUCLEI if NUCLEAR.search(name) else next(colours) for name in channels]


def coloured(
    planes: Sequence[NDArray[np.float32]], limits: Sequence[Limits], channels: Sequence[str] = ()
) -> NDArray[np.float32]:
    """Return planes (H, W) as a picture (H, W, 3) from 0 to 1: grey, or each in its colour.

    Where the light of several channels adds up to more than ``KNEE``, it grows less and less, in
    its own colour: cells that are bright in all channels keep their structure.
    """
    scaled = [
        np.clip((plane - low) / max(high - low, 1e-9), 0, 1)
        for plane, (low, high) in zip(planes, limits, strict=True)
    ]
    if len(scaled) == 1:
        return np.repeat(scaled[0][..., None], 3, axis=-1)
    mixed = sum(
        plane[..., None] * np.array(colour, np.float32)
        for plane, colour in zip(scaled, light_of(channels), strict=True)
    )
    light = np.asarray(mixed, np.float32)
    most = light.max(axis=-1, keepdims=True)
    bent = KNEE + (1 - KNEE) * (1 - np.exp((KNEE - most) / (1 - KNEE)))
    return light * np.where(most > KNEE, bent / np.maximum(most, KNEE), 1).astype(np.float32)


WIDEST = 460
"""Pixels of a picture on a page."""


def jpeg(picture: NDArray[np.uint8]) -> str:
    """Return a picture (H, W) or (H, W, 3) as the data URI of a JPEG."""
    from imagecodecs import jpeg8_encode

    data = jpeg8_encode(np.ascontiguousarray(picture), level=85)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def field_picture(
    plane: NDArray[np.generic],
    masks: NDArray[np.integer[Any]] | None = None,
    limits: Limits | None = None,
    *,
    detail: bool = False,
) -> str:
    """Return a field of view as the data URI of a JPEG.

    ``plane`` (H, W) in grey levels, ``masks`` (H, W) of the cells whose outlines are drawn,
    ``limits`` the grey levels of black and white. The whole field is shown smaller; with
    ``detail`` its middle at full size.
    """
    limits = limits or grey_limits(plane)
    if detail:
        starts = [max(0, (length - WIDEST) // 2) for length in plane.shape]
        window = tuple(slice(start, start + WIDEST) for start in starts)
        plane, masks = plane[window], None if masks is None else masks[window]
    else:
        # Means of squares of pixels, in the shape of plane[::step, ::step].
        step = -(-max(plane.shape) // WIDEST)
        missing = [(0, -length % step) for length in plane.shape]
        padded = np.pad(plane.astype(np.float32), missing, mode="edge")
        rows, columns = padded.shape[0] // step, padded.shape[1] // step
        plane = padded.reshape(rows, step, columns, step).mean(axis=(1, 3))
        masks = None if masks is None else masks[::step, ::step]
    picture = outline_overlay(plane, masks, limits)
    return jpeg(picture if masks is not None else picture[..., 0])


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


DRAWING = threading.Lock()


def svg(name: str, size: tuple[float, float], draw: Callable[[Figure], None], alt: str = "") -> str:
    """Return what ``draw`` puts on a figure of ``size`` inches, as an element of a page.

    ``name`` makes the ids of one figure others than those of the next; ``alt`` says in words what
    is seen, for those who do not see it.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The style is that of the process: the explorer draws in several threads.
    with DRAWING, rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # A browser has letters that matplotlib, which only measures them here, has not.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        target = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(target, format="svg", transparent=True, metadata=nothing)
    element = target.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<style.*?</style>", "", element, count=1, flags=re.DOTALL)
    head, rest = element.replace(INK, "currentColor").split(">", 1)
    width = re.search(r'width="([\d.]+)pt"', head)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    style = f' style="width:{width[1]}pt"' if width else ""
    label = f' aria-label="{escape(plain(alt))}"' if alt else ""
    return f'{head}{style} role="img"{label}>{rest}'


PLATES = ((8, 12), (16, 24), (32, 48))
"""Rows and columns of plates with 96, 384 and 1536 wells."""
SMALL_MAP, LARGE_MAP = 3.6, 7.4
"""Inches: how wide one of several plate maps is, and one that stands alone."""
LEFT, RIGHT, ABOVE, BELOW = 0.3, 0.7, 0.35, 0.05
"""Inches around a plate map: row letters, colours with their numbers, column numbers."""
NO_VALUE = (0.54, 0.56, 0.6, 0.25)
"""Colour of a well without a value, seen on white as on black."""
RING, HALO = "#d1350f", "#ffffff"
"""A ring is seen on every colour of a map, because a white one lies below it."""

WellPosition = tuple[int, int]


@dataclass(frozen=True)
class PlateMap:
    """A plate by one number: ``values`` by row and column of the well, both from 1.

    ``wells`` without a value are drawn pale; ``marked`` ones have a ring. Colours reach from
    ``limits[0]`` to ``limits[1]``. ``channel`` is empty where the number is of no channel.
    """

    plate: str
    title: str
    unit: str
    values: Mapping[WellPosition, float]
    limits: tuple[float, float]
    wells: Collection[WellPosition] = ()
    marked: Collection[WellPosition] = ()
    channel: str = ""

    def height(self, width: float, *, scale: bool = True) -> float:
        """Inches of the map if it is ``width`` inches wide, with the ``scale`` beside it or not."""
        rows, columns = plate_layout([*self.wells, *self.values])
        return (width - LEFT - (RIGHT if scale else BELOW)) * rows / columns + ABOVE + BELOW

    def extremes(self) -> str:
        """Say which wells have the lowest and the highest value."""
        known = sorted((value, format_well(*well)) for well, value in self.values.items())
        if not known:
            return "no well has a value"
        (low, first), (high, last) = known[0], known[-1]
        if low == high:
            return f"{len(known)} wells, {brief(low)} in each"
        return f"{len(known)} wells, from {brief(low)} ({first}) to {brief(high)} ({last})"


def plate_layout(wells: Collection[WellPosition]) -> tuple[int, int]:
    """Return rows and columns of the smallest standard plate that has all ``wells``."""
    row, column = max(well[0] for well in wells), max(well[1] for well in wells)
    fitting = [size for size in PLATES if row <= size[0] and column <= size[1]]
    return fitting[0] if fitting else (row, column)


def colour_limits(values: Collection[float]) -> tuple[float, float]:
    """Return the 2nd and 98th percentile: a few odd wells must not take all colours."""
    if not values:
        return 0.0, 1.0
    low, high = (float(x) for x in np.percentile(list(values), [2, 98]))
    if low == high:
        low, high = min(values), max(values)
    return low, high if high > low else low + 1


def draw_plate_map(figure: Figure, found: PlateMap, *, scale: bool = True) -> None:
    """Draw a map that fills the figure.

    Its parts have fixed positions: to lay out dozens of maps by their texts takes seconds.
    ``scale``: whether colours with their numbers stand beside it.
    """
    figure.set_layout_engine("none")
    rows, columns = plate_layout([*found.wells, *found.values])
    width, height = figure.get_size_inches()
    map_width = width - LEFT - (RIGHT if scale else BELOW)
    base, tall = BELOW / height, (height - ABOVE - BELOW) / height
    values, present = np.full((rows, columns), np.nan), np.zeros((rows, columns, 4))
    for row, column in found.wells:
        present[row - 1, column - 1] = NO_VALUE
    for (row, column), value in found.values.items():
        values[row - 1, column - 1] = value
    axes = figure.add_axes((LEFT / width, base, map_width / width, tall))
    # A picture of one pixel for each well: a page has many maps, and a path for each well is long.
    extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
    axes.imshow(present, interpolation="none", extent=extent)
    picture = axes.imshow(
        values,
        cmap="viridis",
        vmin=found.limits[0],
        vmax=found.limits[1],
        interpolation="none",
        extent=extent,
    )
    size = 8
    axes.xaxis.tick_top()
    # As many names as have room: a number is 0.17 inches wide, a letter 0.1 inches high.
    step = next(n for n in (1, 2, 4, 8, columns) if n * map_width / columns > 0.17 or n == columns)
    axes.set_xticks(range(1, columns + 1, step))
    step = next(n for n in (1, 2, 4, rows) if n * tall * height / rows > 0.1 or n == rows)
    letters = [format_well(row, 1)[:-2] for row in range(1, rows + 1, step)]
    axes.set_yticks(range(1, rows + 1, step), letters)
    axes.tick_params(length=0, labelsize=size)
    axes.spines[:].set(visible=True, alpha=0.7, linewidth=0.9)
    if found.marked:
        y, x = zip(*sorted(found.marked), strict=True)
        points = 1.3 * map_width * 72 / columns
        for colour, line in ((HALO, 2.4), (RING, 1.3)):
            axes.scatter(x, y, s=points**2, facecolors="none", edgecolors=colour, linewidths=line)
    if not scale:
        return
    beside = figure.add_axes(((width - RIGHT + 0.08) / width, base, 0.1 / width, tall))
    bar = figure.colorbar(picture, cax=beside)
    bar.outline.set_visible(False)
    beside.tick_params(length=0, labelsize=size)


def plate_map_svg(found: PlateMap, width: float = SMALL_MAP, *, scale: bool = True) -> str:
    """Return a map as an element of a page, with the ``scale`` of its colours or without."""
    named = ", ".join(text for text in (found.title, found.channel) if text)
    return svg(
        f"{found.plate} {found.title} {found.channel} {found.unit}",
        (width, found.height(width, scale=scale)),
        lambda figure: draw_plate_map(figure, found, scale=scale),
        f"Plate {found.plate}, {named} ({found.unit}): {found.extremes()}.",
    )


def element(
    kind: str, width: float, height: float, inner: str, alt: str, *, wide: bool = False
) -> str:
    """Return an SVG element of a page; ``wide``: as wide as there is room."""
    size = "" if wide else f' style="width:{width:g}px"'
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}"{size} role="img" '
        f'aria-label="{escape(plain(alt))}">{inner}</svg>'
    )


def interval_bar(
    what: str,
    value: float | None,
    low: float | None,
    high: float | None,
    *,
    limits: Limits = (0.0, 1.0),
    at: float | None = 0.0,
    colour: str = BLUE,
) -> str:
    """Return a number with its interval for a row of a table, on the scale ``limits``.

    A line stands ``at`` a number; ``what`` the number is of is said to those who do not see it.
    """
    if value is None:
        return ""
    width, height = 130, 16

    def x(number: float) -> float:
        inside = (number - limits[0]) / (limits[1] - limits[0])
        return 3 + (width - 6) * float(np.clip(inside, 0, 1))

    inner, alt = "", f"{what} {brief(value)}"
    if low is not None and high is not None:
        inner = (
            f'<path d="M{x(low):.1f} 8H{x(high):.1f}" stroke="{colour}" stroke-width="5" '
            'opacity=".4"/>'
        )
        alt += f", interval {brief(low)} to {brief(high)}"
    if at is not None:
        inner += (
            f'<path d="M{x(at):.1f} 1V15" stroke="currentColor" stroke-width="1" opacity=".45"/>'
        )
    inner += f'<circle cx="{x(value):.1f}" cy="8" r="3.2" fill="{colour}"/>'
    return element("bar", width, height, inner, alt)


def draw_curve(
    name: str,
    curve: DoseCurve,
    doses: Sequence[float],
    responses: Sequence[float],
    controls: Sequence[float] = (),
    *,
    unit: str = "",
    label: str = "",
) -> str:
    """Return a dose curve as an element of a page, for one perturbation.

    ``doses`` (N,), in ``unit``, and ``responses`` (N,) of its wells; ``controls`` (M,) responses of
    control wells, which stand at the left. ``label`` says what the response is. The curve is drawn
    if it fits better than a flat line, in dashes if its EC50 is not determined. ``name`` makes the
    ids of this figure others than those of the next; see :func:`svg`. Empty without any response.
    """
    from ..analysis.dose_curves import ALPHA

    at, values = np.asarray(doses, np.float64), np.asarray(responses, np.float64)
    known = np.isfinite(values) & (at > 0)
    at, values = at[known], values[known]
    beside = np.asarray(controls, np.float64)
    beside = beside[np.isfinite(beside)]
    if not values.size:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_xscale("log")
        first, last = float(at.min()), float(at.max())
        line = np.geomspace(first, last, 80)
        left = first / (last / first) ** 0.16 if last > first else first / 3
        lowest = min([*values.tolist(), *beside.tolist()])
        highest = max([*values.tolist(), *beside.tolist()])
        margin = 0.12 * (highest - lowest) or 1.0
        if curve.p_flat is not None and curve.p_flat < ALPHA:
            axes.fill_between(line, *curve.band(line), color=BLUE, alpha=0.18, lw=0)
            dashes = "-" if curve.ec50 is not None else (0, (4, 2))
            axes.plot(line, curve.at(line), color=BLUE, lw=1.8, ls=dashes)
        if beside.size:
            # A narrow column of points, spread so that many of them can be seen.
            shift = np.linspace(-0.5, 0.5, beside.size) if beside.size > 1 else np.zeros(1)
            x = left * (last / first if last > first else 3) ** (0.06 * shift)
            axes.scatter(x, beside, s=11, color=GREY, alpha=0.7, lw=0)
            axes.axhline(float(beside.mean()), color=GREY, lw=0.8, ls=(0, (2, 3)), zorder=0)
        axes.scatter(at, values, s=20, color=ORANGE, edgecolors=HALO, linewidths=0.5, zorder=3)
        if curve.ec50 is not None and curve.low is not None and curve.high is not None:
            half = float(curve.at([curve.ec50])[0])
            axes.plot([curve.low, curve.high], [half, half], color=INK, lw=2.2, zorder=4)
            axes.plot(curve.ec50, half, "D", color=INK, ms=5, zorder=5)
        axes.set_ylim(lowest - margin, highest + margin)
        axes.set_xlim(left / 1.5, last * 1.5)
        ticks = np.unique(at)[:: -(-np.unique(at).size // 6)]
        names = [brief(float(dose)) for dose in ticks]
        if beside.size:
            ticks, names = np.append(left, ticks), ["0", *names]
        axes.set_xticks(ticks, names)
        axes.minorticks_off()
        axes.tick_params(labelsize=9)
        axes.set_xlabel(f"dose, {unit}" if unit else "dose")
        axes.set_ylabel(short(label, 32), size=9)
        axes.set_title(ec50_in_words(curve, unit), size=9, wrap=True)

    about = f"{plain(label)} by dose, {at.size} wells and {beside.size} control wells"
    return svg(name, (3.9, 2.7), draw, f"{about}. {ec50_in_words(curve, unit)}.")


def ec50_in_words(curve: DoseCurve, unit: str = "") -> str:
    """Return the EC50 with its interval, or why it is not determined."""
    if curve.ec50 is None or curve.low is None or curve.high is None:
        return f"EC50 not determined: {curve.note}"
    low, high = brief(curve.low), brief(curve.high)
    return f"EC50 {brief(curve.ec50)} {unit} (95 %: {low} to {high})".replace("  ", " ")


def brief(value: float) -> str:
    """Return a number with few digits."""
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


TEMPLATES = "cellstore.report.templates"


def environment_of(*folders: str, **more: Callable[..., str]) -> Environment:
    """Return the templates of some packages, with ``more`` filters; the first that has a name.

    Every text is escaped but figures (filter ``svg``); what cannot be seen in a text is written
    out.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    known = [files(folder) for folder in folders]

    def load(name: str) -> str | None:
        found = next((file for one in known if (file := one.joinpath(name)).is_file()), None)
        return None if found is None else found.read_text(encoding="utf-8")

    def number_or_dash(value: float | None, factor: float, form: str, unit: str) -> str:
        return "\u2013" if value is None else f"{value * factor:{form}}{unit}"

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(load),
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    environment.filters["percent"] = lambda value: number_or_dash(value, 100, ".1f", " %")
    environment.filters["number"] = lambda value: number_or_dash(value, 1, ".3f", "")
    environment.filters["svg"] = Markup  # figures are drawn by matplotlib, which escapes its texts
    environment.filters |= {"short": short, "brief": brief, **more}
    return environment


def write_html(
    path: Path,
    name: str,
    content: Mapping[str, Any],
    filters: Mapping[str, Callable[..., str]] | None = None,
) -> None:
    """Write the page of the template ``name``, with more ``filters``; raises StorageError."""
    from markupsafe import Markup

    environment = environment_of(TEMPLATES, **(filters or {}))
    css = Markup(files(TEMPLATES).joinpath("page.css").read_text(encoding="utf-8"))  # noqa: S704
    page = environment.get_template(name).render(css=css, **content)
    check_not_of_a_store(path)
    with open_atomically(path) as file:
        file.write(page.encode("utf-8", "replace"))
