"""Repro: redo a run, by commands that a person can read, or here and now to compare."""

from .facts import DIFFERENT, EQUAL, IDENTICAL, IMPOSSIBLE, Check, Order, Repro, Step, TableRead
from .redo import CarryOut, Done, check
from .steps import repro

__all__ = [
    "DIFFERENT",
    "EQUAL",
    "IDENTICAL",
    "IMPOSSIBLE",
    "CarryOut",
    "Check",
    "Done",
    "Order",
    "Repro",
    "Step",
    "TableRead",
    "check",
    "repro",
]
