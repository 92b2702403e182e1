"""A small training, made once for all tests that read it."""

from small_training import _one_thread, built, opened, trained

__all__ = ["_one_thread", "built", "opened", "trained"]
