"""Treatments: what was done to each well, and how that was corrected."""
