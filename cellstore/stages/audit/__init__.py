"""Audit: where a label comes from."""

from .cells import audit_cell
from .facts import (
    ArtifactAudit,
    Came,
    CellAudit,
    FlagFact,
    FrozenLabel,
    ImageAudit,
    IngestFact,
    KnownFile,
    Labelling,
    RunAudit,
    SegmentationFact,
    TreatmentChange,
    TreatmentFact,
    WellAudit,
)
from .files import audit_artifact
from .guess import Audit, audit_anything
from .history import audit_well
from .images import audit_image
from .labellings import votes_query
from .page import write_lineage
from .runs import audit_run

__all__ = [
    "ArtifactAudit",
    "Audit",
    "Came",
    "CellAudit",
    "FlagFact",
    "FrozenLabel",
    "ImageAudit",
    "IngestFact",
    "KnownFile",
    "Labelling",
    "RunAudit",
    "SegmentationFact",
    "TreatmentChange",
    "TreatmentFact",
    "WellAudit",
    "audit_anything",
    "audit_artifact",
    "audit_cell",
    "audit_image",
    "audit_run",
    "audit_well",
    "votes_query",
    "write_lineage",
]
