"""The experiment store of image-based drug screens.

>>> from cellstore import Store, TrainParams
>>> store = Store.open("my-screen")
>>> store.train(TrainParams(epochs=20), split="by-well")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import (
        BaselineParams,
        FinetuneParams,
        HitsParams,
        IngestParams,
        MeasureParams,
        PredictParams,
        ProfileParams,
        QcParams,
        Resources,
        SegmentParams,
        Selection,
        SplitParams,
        TrainParams,
        TrainSetup,
        VoteOptions,
    )
    from .store import Store

    __version__: str

__all__ = [
    "BaselineParams",
    "FinetuneParams",
    "HitsParams",
    "IngestParams",
    "MeasureParams",
    "PredictParams",
    "ProfileParams",
    "QcParams",
    "Resources",
    "SegmentParams",
    "Selection",
    "SplitParams",
    "Store",
    "TrainParams",
    "TrainSetup",
    "VoteOptions",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Found when asked for, so that `import cellstore` costs nothing.
    if name == "__version__":
        from importlib.metadata import version

        return version("cellstore")
    if name in __all__:
        return getattr(import_module(".store" if name == "Store" else ".config", __name__), name)
    raise AttributeError(f"module 'cellstore' has no attribute {name!r}")
