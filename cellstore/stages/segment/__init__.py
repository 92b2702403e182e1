"""Segment: find the cells of every image that a recipe has not done yet, or of a few to look at."""

from .preview import PreviewImage, PreviewResult, preview
from .stage import Found, SegmentStep, SegmentSteps, segment, segment_spec, segment_work

__all__ = [
    "Found",
    "PreviewImage",
    "PreviewResult",
    "SegmentStep",
    "SegmentSteps",
    "preview",
    "segment",
    "segment_spec",
    "segment_work",
]
