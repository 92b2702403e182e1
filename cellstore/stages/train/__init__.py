"""Train: the published network, or one of fewer branches, on the cells of a split."""

from .outcome import TrainResult
from .stage import train

__all__ = ["TrainResult", "train"]
