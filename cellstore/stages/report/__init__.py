"""Report: how good the labels of a predict run are, as numbers and as a page."""

from .facts import ReportResult, Score
from .page import write_report
from .score import report

__all__ = ["ReportResult", "Score", "report", "write_report"]
