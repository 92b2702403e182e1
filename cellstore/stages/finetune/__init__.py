"""Finetune: a Cellpose network that learns from masks that people corrected."""

from .stage import FinetuneResult, finetune

__all__ = ["FinetuneResult", "finetune"]
