"""The experiment store of image-based drug screens.

>>> from cellstore import Store
>>> store = Store.open("my-screen")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .store import Store

    __version__: str

__all__ = ["Store", "__version__"]


def __getattr__(name: str) -> Any:
    # Found when asked for, so that `import cellstore` costs nothing.
    if name == "Store":
        from .store import Store

        return Store
    if name == "__version__":
        from importlib.metadata import version

        return version("cellstore")
    raise AttributeError(f"module 'cellstore' has no attribute {name!r}")
