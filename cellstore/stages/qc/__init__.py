"""Quality control: what is measured of each image, and what is odd on each plate."""

from .facts import FlaggedImage, PlateSummary, QcResult
from .stage import list_flags, qc, write_page, write_picture

__all__ = [
    "FlaggedImage",
    "PlateSummary",
    "QcResult",
    "list_flags",
    "qc",
    "write_page",
    "write_picture",
]
