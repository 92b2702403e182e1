"""Baselines: what a network has to beat, trained on the same side of the same split."""

from .outcome import BaselineResult
from .stage import train_baselines

__all__ = ["BaselineResult", "train_baselines"]
