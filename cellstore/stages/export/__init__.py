"""Export: a table with a row per cell, as pycytominer and CytoTable write and read it."""

from .stage import ExportFormat, ExportResult, export

__all__ = ["ExportFormat", "ExportResult", "export"]
