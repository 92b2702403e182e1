"""Report: how good the labels of a predict run are, as numbers and as a page."""

from .facts import BaselineScore, ReportResult, Score, by_baseline
from .page import write_report
from .score import report

__all__ = ["BaselineScore", "ReportResult", "Score", "by_baseline", "report", "write_report"]
