"""Audit: where a label comes from."""

from .cells import audit_cell
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
from .images import audit_image
from .labellings import votes_query
from .runs import audit_run

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
