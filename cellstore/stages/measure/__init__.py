"""Measure: the features of every cell of every segmented image."""

from .groups import list_groups
from .stage import MeasureResult, measure

__all__ = ["MeasureResult", "list_groups", "measure"]
