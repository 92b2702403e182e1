"""The cells of a comparison: controls of the same plates, as many of each side on each plate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...db.models import Image
from ...ops.draws import Lowest, even_shares, lots
from ...reading.samples import places_of, read_values, stream_groups
from ...runs import Workspace
from .plan import Group, Plan, cells_of

Ids = NDArray[np.int64]

POOL = 10
"""Control cells that are read for the plates of a treatment, in multiples of what is compared."""


@dataclass(frozen=True)
class Cells:
    """N cells: ids (N,), features (N, F) float64, ids of wells (N,), barcodes of plates (N,)."""

    ids: Ids
    rows: NDArray[np.float64]
    wells: Ids
    plates: NDArray[np.str_]

    def take(self, chosen: NDArray[np.bool_]) -> Cells:
        """The cells that are ``chosen``, (N,)."""
        return Cells(self.ids[chosen], self.rows[chosen], self.wells[chosen], self.plates[chosen])

    def draw(self, number: int, seed: int) -> Cells:
        """At most ``number`` of them, evenly over wells."""
        names, counts = np.unique(self.wells, return_counts=True)
        shares = even_shares(dict(zip(names.tolist(), counts.tolist(), strict=True)), number)
        chosen = np.zeros(len(self.ids), dtype=bool)
        order = np.argsort(lots(self.ids, seed), kind="stable")
        for well, share in shares.items():
            chosen[order[self.wells[order] == well][:share]] = True
        return self.take(chosen)

    def __len__(self) -> int:
        return len(self.ids)


def read_group(workspace: Workspace, plan: Plan, group: Group, most: int) -> Cells:
    """Draw at most ``most`` cells of a group, evenly over its wells, and read their features."""
    source, columns = plan.source, plan.source.features.columns
    with workspace.database.read() as session:
        lowest = Lowest(_most_of_well(group, most), plan.params.seed)
        query = cells_of(source, group)
        for wells, ids in stream_groups(session, query, source, Image.well_id):
            lowest.add(wells, ids)
        drawn = lowest.drawn(even_shares(lowest.kept, most)).values()
        ids = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *drawn]))
        values = read_values(session, source, ids, columns)
        places = places_of(session, ids)
    return Cells(ids, values, places.wells, places.plates)


def _most_of_well(group: Group, most: int) -> int:
    """Ids to keep of a well while all are looked at: room for wells with more than others."""
    return min(most, max(20, 4 * most // max(1, group.n_wells)))


def match(treated: Cells, control: Cells, most: int, seed: int) -> tuple[Cells, Cells]:
    """Draw the same number of both on each plate that has both, at most ``most`` in all.

    So plates that differ give nothing away, and 0.5 is chance.
    """
    both = np.intersect1d(treated.plates, control.plates).tolist()
    room = {p: min(int((some.plates == p).sum()) for some in (treated, control)) for p in both}
    shares = even_shares(room, most)
    ours, theirs = (_draw(some, shares, seed) for some in (treated, control))
    return ours, theirs


def _draw(cells: Cells, shares: Mapping[str, int], seed: int) -> Cells:
    chosen = np.zeros(len(cells), dtype=bool)
    for plate, share in shares.items():
        there = cells.plates == plate
        drawn = cells.take(there).draw(share, seed)
        chosen |= np.isin(cells.ids, drawn.ids)
    return cells.take(chosen)
