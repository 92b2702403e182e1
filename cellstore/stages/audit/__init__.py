"""Audit: where a label comes from."""

from .facts import CellAudit, ImageAudit, Labelling, RunAudit, SegmentationFact
from .read import audit_cell, audit_image, audit_run, votes_query

__all__ = [
    "CellAudit",
    "ImageAudit",
    "Labelling",
    "RunAudit",
    "SegmentationFact",
    "audit_cell",
    "audit_image",
    "audit_run",
    "votes_query",
]
