"""Audit: where a label comes from."""

from .facts import (
    CellAudit,
    FlagFact,
    FrozenLabel,
    ImageAudit,
    IngestFact,
    Labelling,
    RunAudit,
    SegmentationFact,
    TreatmentChange,
    TreatmentFact,
    WellAudit,
)
from .history import audit_well
from .read import audit_cell, audit_image, audit_run, votes_query

__all__ = [
    "CellAudit",
    "FlagFact",
    "FrozenLabel",
    "ImageAudit",
    "IngestFact",
    "Labelling",
    "RunAudit",
    "SegmentationFact",
    "TreatmentChange",
    "TreatmentFact",
    "WellAudit",
    "audit_cell",
    "audit_image",
    "audit_run",
    "audit_well",
    "votes_query",
]
