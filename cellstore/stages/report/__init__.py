"""Report: how good the labels of a predict run are, as numbers and as a page."""

from .comparison import compare
from .comparison_facts import Comparison, Difference, McNemar, RecipeDifference, Side
from .facts import (
    BaselineScore,
    CalibrationBin,
    ClassScore,
    GroupScore,
    ReportResult,
    Score,
    WellScore,
    by_baseline,
)
from .page import write_report
from .score import report

__all__ = [
    "BaselineScore",
    "CalibrationBin",
    "ClassScore",
    "Comparison",
    "Difference",
    "GroupScore",
    "McNemar",
    "RecipeDifference",
    "ReportResult",
    "Score",
    "Side",
    "WellScore",
    "by_baseline",
    "compare",
    "report",
    "write_report",
]
