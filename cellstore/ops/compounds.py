"""Which treatments are one compound, whatever they are called."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

_BROAD = re.compile(r"BRD-[A-Z]\d{8}(?=-|$)")
"""A Broad compound: what follows (``-001-02-4``) names its salt, batch and supplier."""


@dataclass(frozen=True, slots=True)
class Compound:
    """What tables say of a treatment; each may be unknown."""

    name: str | None = None
    identifier: str | None = None
    inchikey: str | None = None
    smiles: str | None = None

    @property
    def structure(self) -> tuple[str, ...]:
        """What names its structure or stock: equal ones are one compound under any name."""
        broad = _BROAD.match(self.identifier or "")
        known = (
            ("identifier", broad[0] if broad else self.identifier),
            ("InChIKey", self.inchikey and self.inchikey.upper()),
            ("SMILES", self.smiles),
        )
        return tuple(f"{kind} {value}" for kind, value in known if value)

    @property
    def keys(self) -> tuple[str, ...]:
        """Its structure and its name without spelling: with one in common they are the same."""
        name = (f"name {normalised_name(self.name)}",) if self.name else ()
        return (*name, *self.structure)


def normalised_name(name: str) -> str:
    """``name`` without what spellings of a compound differ in: ``ME-0328`` becomes ``me0328``."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    # A name of such signs alone would else be the same as any other of them.
    return re.sub(r"[\s_\u002d\u2010-\u2015\u2212]", "", folded) or folded


class SameCompounds:
    """Finds which compounds are the same: those that share a key, directly or by a third one."""

    def __init__(self, compounds: Iterable[Compound]) -> None:
        self._above: dict[str, str] = {}
        for compound in compounds:
            self.add(compound)

    def add(self, compound: Compound) -> None:
        """Take note of what is one compound because of ``compound``."""
        roots = sorted({self._root(key) for key in compound.keys})
        # The first in the alphabet leads, so that the order of compounds does not matter.
        for root in roots[1:]:
            self._above[root] = roots[0]

    def group(self, compound: Compound) -> str | None:
        """Return what all that are the same as ``compound`` share; ``None``: nothing is known."""
        return self._root(compound.keys[0]) if compound.keys else None

    def _root(self, key: str) -> str:
        path = []
        while (above := self._above.setdefault(key, key)) != key:
            path.append(key)
            key = above
        for passed in path:
            self._above[passed] = key
        return key
