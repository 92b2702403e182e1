"""Verify that the files of a store are what the database says."""

from .report import Problem, VerifyResult
from .stage import verify

__all__ = ["Problem", "VerifyResult", "verify"]
