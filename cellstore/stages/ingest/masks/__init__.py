"""Masks of other tools: segmentations of the images they are named like."""
