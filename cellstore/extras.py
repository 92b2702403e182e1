"""The optional parts of cellstore, and the sentence for one that is missing."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import MissingExtraError

MODULES = {
    "segment": ("cellpose", "skimage", "scipy", "safetensors"),
    "segment-sam": ("cellpose", "segment_anything", "skimage", "scipy", "safetensors"),
    "train": ("torch", "torchvision", "lightning", "sklearn", "skops", "safetensors"),
    "report": ("matplotlib", "jinja2", "networkx"),
    "postgres": ("psycopg", "adbc_driver_postgresql"),
    "cloud": ("fsspec", "s3fs"),
    "anndata": ("anndata",),
    "distributed": ("distributed",),
}
"""What each extra brings, by import name.

``segment`` (Cellpose 3) and ``segment-sam`` (Cellpose 4) bring the same package and exclude each
other: either serves what needs ``segment``, and which one it is decides the networks that run.
"""


def need(extra: str) -> None:
    """Check that an extra is installed, without importing it.

    Raises:
        MissingExtraError: with the command that installs it.
    """
    missing = missing_of(extra)
    if missing:
        raise MissingExtraError.of(missing[0], extra)


def missing_of(extra: str) -> tuple[str, ...]:
    """Return the modules of an extra that are not installed."""
    return tuple(name for name in MODULES[extra] if find_spec(name) is None)
