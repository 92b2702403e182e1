"""Export a trained model: a folder that opens on another machine, without this store."""

from .stage import ExportedModel, export_model

__all__ = ["ExportedModel", "export_model"]
