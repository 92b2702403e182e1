"""Ingest: metadata tables become plates, wells, treatments, images and files."""

from .stage import IngestResult, Refused, ingest

__all__ = ["IngestResult", "Refused", "ingest"]
