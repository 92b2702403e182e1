"""Features in words: "nuclei smaller", "DNA brighter".

Known are the features of ``analysis/features.csv`` with the channel after them, and those of
CellProfiler, ``Compartment_Kind_Detail_Channel``. Every other name stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROUGH, _SMOOTH = "texture of {} rougher", "texture of {} smoother"
_VARIED, _UNIFORM = "grey levels of {} more varied", "grey levels of {} less varied"


def _by_name(*rows: tuple[str, str, str]) -> dict[str, tuple[str, str]]:
    return {name: (more, less) for names, more, less in rows for name in names.split()}


SHAPES = _by_name(
    ("area convex_area", "{} larger", "{} smaller"),
    ("perimeter", "outline of {} longer", "outline of {} shorter"),
    ("eccentricity", "{} more elongated", "{} rounder"),
    ("form_factor", "{} rounder", "{} less round"),
    ("compactness", "{} less round", "{} rounder"),
    ("major_axis_length max_feret_diameter", "{} longer", "{} shorter"),
    ("minor_axis_length min_feret_diameter", "{} wider", "{} narrower"),
    ("mean_radius median_radius maximum_radius", "{} thicker", "{} thinner"),
    ("solidity", "outline of {} less indented", "outline of {} more indented"),
    ("extent", "{} more compact", "{} less compact"),
    ("number_of_neighbors", "{} with more neighbours", "{} with fewer neighbours"),
    ("percent_touching", "{} touch more", "{} touch less"),
)
"""What a higher and a lower value of a shape says; ``{}``: the cells, nuclei or cytoplasm."""
LIGHTS = _by_name(
    ("mean_intensity median_intensity min_intensity max_intensity", "{} brighter", "{} darker"),
    ("lower_quartile_intensity upper_quartile_intensity", "{} brighter", "{} darker"),
    ("integrated_intensity", "more {} in total", "less {} in total"),
    ("std_intensity mad_intensity", "{} more uneven", "{} more even"),
    ("mass_displacement", "{} further from the centre", "{} closer to the centre"),
    ("contrast dissimilarity difference_variance", _ROUGH, _SMOOTH),
    ("homogeneity inverse_difference_moment", _SMOOTH, _ROUGH),
    ("energy angular_second_moment", _UNIFORM, _VARIED),
    ("entropy", _VARIED, _UNIFORM),
    ("radial_cv", "{} less even around the centre", "{} more even around the centre"),
    ("granularity", "{} more grainy", "{} less grainy"),
)
"""The same of light and texture; ``{}``: the channel."""
EDGE = ("edge_", "_edge")
COMPARTMENTS = {"Cells": "cells", "Nuclei": "nuclei", "Cytoplasm": "cytoplasm"}
NOT_LIGHT = "AreaShape", "Neighbors"
SPELLED = {"MADIntensity": "mad_intensity", "RadialCV": "radial_cv"}
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_DISTANCE = re.compile(r"_d\d+(?=_|$)")


def in_words(column: str, more: bool) -> str | None:
    """Say what a higher (``more``) or lower value of a feature means; ``None`` if it is not known.

    >>> in_words("mean_intensity_DNA", True)
    'DNA brighter'
    >>> in_words("Nuclei_AreaShape_Area", False)
    'nuclei smaller'
    """
    parts = column.split("_")
    if parts[0] in COMPARTMENTS and len(parts) > 2:
        return _of_cellprofiler(COMPARTMENTS[parts[0]], parts[1], parts[2:], more)
    if column in SHAPES:
        return _phrase(SHAPES[column], "cells", more)
    name = _DISTANCE.sub("", column)
    edge = name.startswith(EDGE[0])
    name = name.removeprefix(EDGE[0])
    for known in sorted(LIGHTS, key=len, reverse=True):
        if name == known or name.startswith(f"{known}_"):
            channel = name[len(known) + 1 :] or "cells"
            return _phrase(LIGHTS[known], channel, more) + " at the edge of cells" * edge
    return None


def _of_cellprofiler(of: str, kind: str, rest: Sequence[str], more: bool) -> str | None:
    detail = SPELLED.get(rest[0]) or _CAPITAL.sub("_", rest[0]).lower()
    if kind in NOT_LIGHT:
        return _phrase(SHAPES[detail], of, more) if detail in SHAPES else None
    if kind == "Granularity" and len(rest) > 1:
        detail = "granularity"
    edge = detail.endswith(EDGE[1])
    detail = detail.removesuffix(EDGE[1])
    if detail not in LIGHTS or len(rest) < 2:
        return None
    place = f"at the edge of {of}" if edge else f"in {of}"
    return f"{_phrase(LIGHTS[detail], rest[1], more)} {place}"


def _phrase(words: tuple[str, str], what: str, more: bool) -> str:
    return words[0 if more else 1].format(what)


def changes(
    columns: Sequence[str], shifts: NDArray[np.float64], least: float, most: int
) -> list[tuple[str, float]]:
    """Return what changed most, in words, each with its shift: at most ``most``, once each.

    ``shifts`` (F,): by how many standard deviations of the controls a feature differs from them;
    those closer than ``least`` are no change. Of features that say the same the largest counts; of
    two that contradict each other, too.
    """
    found: dict[str, float] = {}
    taken: set[str | None] = set()
    for index in np.argsort(-np.abs(np.nan_to_num(shifts)), kind="stable"):
        shift = float(shifts[index])
        if not abs(shift) >= least or len(found) == most:
            break
        column = columns[index]
        phrase = in_words(column, shift > 0)
        if phrase is None:
            found[f"{column} {'higher' if shift > 0 else 'lower'}"] = shift
        elif phrase not in found and phrase not in taken:
            found[phrase] = shift
            taken.add(in_words(column, shift < 0))
    return list(found.items())
