"""Pages: one HTML file each that needs nothing else, no network and no script."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from .text import plain


def render(
    package: str, content: dict[str, Any], filters: Mapping[str, Callable[..., str]] | None = None
) -> str:
    """Return the page of the template ``page.html.j2`` in ``package``, with more ``filters``.

    It may include and import other templates of the package. Every text is escaped but figures
    (filter ``svg``) and the common look (``css``); what cannot be seen in a text is written out.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    css = files("cellstore.drawing").joinpath("page.css").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: _template(package, name)),
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    environment.filters["percent"] = lambda value: _or_dash(value, 100, ".1f", " %")
    environment.filters["number"] = lambda value: _or_dash(value, 1, ".3f", "")
    environment.filters["svg"] = Markup  # figures are drawn by matplotlib, which escapes its texts
    environment.filters.update(filters or {})
    template = environment.get_template("page.html.j2")
    return template.render(css=Markup(css), **content)  # noqa: S704 - ours


def _template(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text(encoding="utf-8")


def _or_dash(value: float | None, factor: float, form: str, unit: str) -> str:
    return "\u2013" if value is None else f"{value * factor:{form}}{unit}"
