"""Contrast: which treatments look different from control at all."""

from .outcome import ContrastResult, ContrastRow
from .stage import contrast

__all__ = ["ContrastResult", "ContrastRow", "contrast"]
