"""Segment: find the cells of every image that a recipe has not done yet, or of a few to look at."""

from .preview import PreviewImage, PreviewResult, preview
from .stage import segment

__all__ = ["PreviewImage", "PreviewResult", "preview", "segment"]
