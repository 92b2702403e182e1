"""Predict: what a trained model says about every cell, appended image by image."""

from .stage import PredictResult, predict

__all__ = ["PredictResult", "predict"]
