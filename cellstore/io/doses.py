"""Doses as people write them, made comparable."""

from __future__ import annotations

import math

_MOLAR = {"M": 1e6, "mM": 1e3, "uM": 1.0, "nM": 1e-3, "pM": 1e-6, "fM": 1e-9}
_SPELLINGS = {"mol/l": "M", "mmol/l": "mM", "umol/l": "uM", "nmol/l": "nM", "pmol/l": "pM"}
MICROMOLAR = "uM"


def normalised_dose(dose: float, unit: str | None) -> tuple[float, str | None]:
    """Return a dose and its unit: molar ones in ``uM``, all others as they are.

    ``5000 nM``, ``5 µM`` and ``0.005 mmol/L`` are all ``(5.0, "uM")``. Twelve digits are kept, so
    that one dose in two units is one number.

    Raises:
        ValueError: the dose is negative, infinite or no number.
    """
    if not math.isfinite(dose) or dose < 0:
        raise ValueError(f"{dose} is no dose")
    # The micro sign and the Greek letter look alike.
    plain = (unit or "").strip().replace("\u00b5", "u").replace("\u03bc", "u")
    plain = _SPELLINGS.get(plain.lower(), plain)
    factor = _MOLAR.get(plain)
    if factor is None:
        return float(dose), plain or None
    return float(f"{dose * factor:.12g}"), MICROMOLAR


def dose_text(dose: float | None, unit: str | None) -> str:
    """Return a dose as it is shown: ``5 uM``; an empty text where none is known."""
    return "" if dose is None else f"{dose:.12g} {unit or ''}".strip()
