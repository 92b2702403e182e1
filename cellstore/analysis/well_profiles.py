"""Well profiles: a row of numbers for each well, made comparable between plates.

Each function takes :class:`WellProfiles` and returns new ones. What they compute is pycytominer's
(Serrano et al., Nature Methods 22, 2025) and harmonypy's, called with their own defaults.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserInputError, some_of
from ..notebooks import SHOWN_ROWS, table

if TYPE_CHECKING:
    import pandas as pd

Numbers = NDArray[np.float64]
Which = NDArray[np.bool_]

WELL_COLUMNS = (
    *("well_id", "plate", "well", "well_row", "well_column", "batch", "cell_line", "time_point"),
    *("treatment_id", "treatment", "name_with_dose", "perturbation", "dose", "dose_unit", "target"),
    *("control", "n_cells", "n_images"),
)
"""The columns of ``WellProfiles.table``."""

FORMATS = ((2, 3), (3, 4), (4, 6), (6, 8), (8, 12), (16, 24), (32, 48))
"""Rows and columns of plates with 6, 12, 24, 48, 96, 384 and 1536 wells."""

MOST_MISSING = 0.05
"""A feature that misses in a larger share of the wells goes (pycytominer's ``na_cutoff``)."""
LEAST_VARIANCE = 1e-6
"""A feature that varies less between the wells goes (pycytominer's ``min_variance``)."""
MOST_CORRELATION = 0.9
"""Of two features that are more alike one goes (pycytominer's ``corr_threshold``)."""

FEWEST_CONTROLS = 2
"""Wells of a plate that are needed to say how much wells differ by themselves."""
FEWEST_FOR_POSITIONS = 8
"""Controls of a plate from which four numbers are estimated: twice as many."""
FEWEST_OF_LINE = 3
"""Wells of a row or column from which a median polish says what the row or column does."""
POLISHES = 10
"""Rounds of a median polish, at most; it ends before where nothing changes by more than 1 %."""

CONSTANT, MISSING, BLOCKLIST, VARIANCE, CORRELATION = (
    "the same value in most controls of a plate",
    "missing in too many wells",
    "on pycytominer's blocklist",
    "hardly varies between wells",
    "like another feature",
)
"""Why a feature goes."""


@dataclass(frozen=True)
class WellProfiles:
    """Profiles of N wells.

    ``table``: a row for each well (index 0 to N - 1) with ``WELL_COLUMNS``; ``values`` (N, F)
    float64, NaN where nothing is known: in the unit that the last step says, after
    :func:`normalise` standard deviations of the controls; ``columns``: the names of the F
    features. ``gone``: features that a step removed, by the reason; ``notes``: sentences on wells
    and plates that a reader has to know.
    """

    table: pd.DataFrame
    values: Numbers
    columns: tuple[str, ...]
    gone: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        """Return the first wells as a notebook shows them, and how many features each has."""
        first = self.table.head(SHOWN_ROWS).astype(object)
        shown = table(first.where(first.notna(), None).to_dict("records"))
        return f"<p>{len(self.table):,} wells, {len(self.columns):,} features</p>{shown}"

    @property
    def known(self) -> Which:
        """Which wells have any value, (N,)."""
        found: Which = ~np.isnan(self.values).all(axis=1)
        return found

    @property
    def controls(self) -> Which:
        """Which wells are negative controls, (N,)."""
        found: Which = (self.table["control"] == "negative").to_numpy(dtype=bool)
        return found

    def to_pandas(self) -> pd.DataFrame:
        """Return ``table`` with a column for each feature beside it."""
        import pandas as pd

        values = pd.DataFrame(self.values, columns=list(self.columns))
        return pd.concat([self.table, values], axis=1)

    def on_plates(self) -> list[tuple[str, NDArray[np.int64]]]:
        """Return each plate with the positions of its wells, in the order of the table."""
        groups = self.table.groupby("plate", sort=False).indices
        return [(str(plate), np.asarray(rows)) for plate, rows in groups.items()]

    def without(self, reason: str, names: Sequence[str]) -> WellProfiles:
        """Return them without some features, and with these in ``gone``."""
        if not (some := set(names)):
            return self
        kept = [at for at, name in enumerate(self.columns) if name not in some]
        listed = (*self.gone.get(reason, ()), *(n for n in self.columns if n in some))
        columns = tuple(self.columns[at] for at in kept)
        gone = {**self.gone, reason: listed}
        return replace(self, values=self.values[:, kept], columns=columns, gone=gone)


def on_edge(table: pd.DataFrame) -> Which:
    """Return which wells are in the outermost rows or columns of their plate, (N,).

    A plate is the smallest of ``FORMATS`` that has all its wells.
    """
    found = np.zeros(len(table), dtype=bool)
    rows, columns = (table[name].to_numpy(dtype=np.int64) for name in ("well_row", "well_column"))
    for at in table.groupby("plate", sort=False).indices.values():
        most = int(rows[at].max()), int(columns[at].max())
        fits = (shape for shape in FORMATS if shape[0] >= most[0] and shape[1] >= most[1])
        height, width = next(fits, most)
        found[at] = (rows[at] == 1) | (rows[at] == height)
        found[at] |= (columns[at] == 1) | (columns[at] == width)
    return found


def normalise(profiles: WellProfiles, method: str, against: str = "controls") -> WellProfiles:
    """Say of each plate by itself how far its wells are from the controls, or from all wells.

    ``method``: ``mad`` (median and median absolute deviation), ``standardise`` (mean and standard
    deviation), ``sphere`` (ZCA-cor whitening: features no longer go together in the controls), as
    ``pycytominer.normalize`` has them, or ``none``. A feature that does not vary in them has no
    such unit and goes. A plate with fewer than two of them cannot be compared: its wells have no
    values, and a note says so.

    Raises:
        UserInputError: no plate has them, no feature is left, or a plate cannot be sphered.
    """
    if method == "none":
        return profiles
    import pandas as pd
    from pycytominer.operations import RobustMAD, Spherize
    from sklearn.preprocessing import StandardScaler

    known, controls = profiles.known, profiles.controls
    if against == "controls" and not controls.any():
        raise UserInputError(
            "No well is a negative control, so nothing says what unchanged cells look like. Mark "
            "all wells of a treatment: cellstore ingest TABLE --control NAME=negative, or one: "
            "cellstore relabel WELL --control negative --reason TEXT. Or compare with all wells: "
            "--against all"
        )
    if method == "sphere":
        profiles = _without_gaps(profiles)
    what = "negative control wells" if against == "controls" else "wells"
    plates = profiles.on_plates()
    chosen = {plate: at[known[at] & (controls[at] | (against == "all"))] for plate, at in plates}
    short = [plate for plate, at in chosen.items() if len(at) < FEWEST_CONTROLS]
    if len(short) == len(plates):
        raise UserInputError(
            f"No plate has {FEWEST_CONTROLS} {what} with cells, which it takes to say how much "
            "wells differ by themselves. Mark more controls, or compare with all wells: "
            "--against all"
        )
    gone = np.zeros(len(profiles.columns), dtype=bool)
    values = np.full_like(profiles.values, np.nan)
    for plate, at in plates:
        if plate in short:
            continue
        frame = pd.DataFrame(profiles.values[at], columns=list(profiles.columns))
        of_reference = frame.loc[np.isin(at, chosen[plate])]
        with _gaps_allowed():
            if method == "mad":
                scaler = RobustMAD(epsilon=1e-18).fit(of_reference)  # pycytominer's default
                gone |= scaler.mad.to_numpy() == 0
                values[at] = scaler.transform(frame).to_numpy()
            elif method == "standardise":
                scaler = StandardScaler().fit(of_reference)
                gone |= scaler.var_ == 0
                values[at] = scaler.transform(frame)
            else:
                gone |= np.ptp(of_reference.to_numpy(), axis=0) == 0
    if method == "sphere":
        values = _sphered(profiles, chosen, ~gone, Spherize)
    if short:
        note = (
            f"Fewer than {FEWEST_CONTROLS} {what} with cells are on plate {some_of(short)}: wells "
            "there have no values, only their number of cells."
        )
        profiles = replace(profiles, notes=(*profiles.notes, note))
    found = replace(profiles, values=values)
    return _checked(found.without(CONSTANT, [found.columns[at] for at in np.flatnonzero(gone)]))


def _without_gaps(profiles: WellProfiles) -> WellProfiles:
    """Return them without the features that are missing in a well that has values."""
    gaps = np.isnan(profiles.values[profiles.known]).any(axis=0)
    return profiles.without(MISSING, [profiles.columns[at] for at in np.flatnonzero(gaps)])


def _sphered(
    profiles: WellProfiles, chosen: Mapping[str, NDArray[np.int64]], kept: Which, spherize: Any
) -> Numbers:
    """Sphere each plate on its reference wells; features that are not ``kept`` become NaN."""
    import pandas as pd

    values = np.full_like(profiles.values, np.nan)
    for plate, at in profiles.on_plates():
        if len(chosen[plate]) < FEWEST_CONTROLS or not kept.any():
            continue
        full = at[profiles.known[at]]
        scaler = spherize(epsilon=1e-6, center=True, method="ZCA-cor", return_numpy=True)
        reference = pd.DataFrame(profiles.values[np.ix_(chosen[plate], kept)])
        centred = (reference - reference.mean()) / reference.std()
        if np.linalg.matrix_rank(centred.to_numpy()) < min(len(centred) - 1, centred.shape[1]):
            raise UserInputError(  # it would divide by what rounding has left
                f"Plate {plate} cannot be sphered: some features of its {len(reference)} "
                "controls say exactly what others say. Remove such features "
                "(--select correlation,variance), or take --normalise mad."
            )
        scaler.fit(reference)
        values[np.ix_(full, kept)] = scaler.transform(
            pd.DataFrame(profiles.values[np.ix_(full, kept)])
        )
    return values


def select_features(profiles: WellProfiles, operations: Sequence[str]) -> WellProfiles:
    """Remove features, as pycytominer does and by its limits, over all wells together.

    ``operations``, in this order: some of ``missing`` (``drop_na_columns``), ``blocklist``,
    ``variance`` (``variance_threshold``) and ``correlation`` (``correlation_threshold``). Wells
    without any value do not count.

    Raises:
        UserInputError: no feature is left.
    """
    if not operations:
        return profiles
    import pandas as pd
    from pycytominer.cyto_utils import get_blocklist_features
    from pycytominer.operations import get_na_columns, variance_threshold

    found, known = profiles, profiles.known
    for operation in operations:
        names = list(found.columns)
        values = found.values if known.all() else found.values[known]
        frame = pd.DataFrame(values, columns=names)
        if operation == "missing":
            found = found.without(MISSING, get_na_columns(frame, names, cutoff=MOST_MISSING))
        elif operation == "blocklist":
            found = found.without(BLOCKLIST, get_blocklist_features(population_df=frame))
        elif operation == "variance":
            try:
                low = variance_threshold(frame, names, min_variance=LEAST_VARIANCE)
            except ValueError:  # scikit-learn refuses to remove all
                low = names
            found = found.without(VARIANCE, low)
        else:
            found = found.without(CORRELATION, _alike(frame))
        found = _checked(found)
    return found


def _alike(frame: pd.DataFrame) -> list[str]:
    """Return what pycytominer's ``correlation_threshold`` returns.

    It looks at one pair of features after the other: minutes for 2,000 features.
    """
    import pandas as pd

    if frame.isna().any(axis=None):
        alike = frame.corr().to_numpy()
    else:
        alike = np.atleast_2d(np.corrcoef(frame.to_numpy().T))
    sums = pd.DataFrame(np.abs(alike), index=frame.columns).sum().set_axis(frame.columns)
    order = pd.Series(np.arange(len(sums)), index=sums.sort_values().index)
    rank = order[frame.columns].to_numpy()
    pairs = np.tril(alike, -1) > MOST_CORRELATION
    # Of each pair the one goes that is more like all others.
    goes = ((pairs | pairs.T) & (rank[:, None] > rank[None, :])).any(axis=1)
    return [str(name) for name in frame.columns[goes]]


def _checked(found: WellProfiles) -> WellProfiles:
    """Return ``found`` if it has features."""
    if found.columns:
        return found
    reasons = {reason: len(names) for reason, names in found.gone.items()}
    counted = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
    raise UserInputError(
        f"None of the {sum(reasons.values())} features is left ({counted}). Remove fewer: "
        "--select none, or compare with all wells: --against all"
    )


def correct_positions(profiles: WellProfiles, method: str) -> WellProfiles:
    """Take out of the values what the row, the column and the edge of a plate do to wells.

    ``median-polish``: Tukey's, of each plate and feature: effects of rows and of columns by their
    medians, over all wells; right where treatments are spread over the plate. ``controls``: a slope
    over the rows, one over the columns and a step at the edge, by least squares on the negative
    controls of the plate, of which there must be eight; a control is corrected by what the other
    controls say, so that it stays as far from zero by chance as a treated well does. ``none``:
    nothing is changed.
    """
    if method == "none":
        return profiles
    values = profiles.values.copy()
    table, known, controls = profiles.table, profiles.known, profiles.controls
    rows, columns = (table[name].to_numpy(dtype=np.int64) for name in ("well_row", "well_column"))
    edge = on_edge(table)
    short, filled = [], []
    for plate, at in profiles.on_plates():
        if method == "median-polish":
            filled += [plate] if _fill_lines(rows[at], columns[at], controls[at]) else []
            values[at] -= _polish(values[at], rows[at], columns[at])
            continue
        own = known[at] & controls[at]
        if own.sum() < FEWEST_FOR_POSITIONS:
            short.append(plate)
            continue
        values[at] -= _by_controls(values[at], rows[at], columns[at], edge[at], own)
    notes = list(profiles.notes)
    if short:
        notes.append(
            f"Not corrected for positions, as that takes {FEWEST_FOR_POSITIONS} control wells "
            f"with cells: plate {some_of(short)}."
        )
    if filled:
        notes.append(
            f"Controls fill rows or columns of their own on plate {some_of(filled)}. A median "
            "polish takes the difference between them and treated wells for an effect of the "
            "column: take --positions controls, or none."
        )
    return replace(profiles, values=values, notes=tuple(notes))


def _fill_lines(rows: NDArray[np.int64], columns: NDArray[np.int64], controls: Which) -> bool:
    """Whether most controls are in rows, or in columns, of which most wells are controls."""
    if not controls.any():
        return False
    for lines in (rows, columns):
        share = {line: controls[lines == line].mean() for line in np.unique(lines)}
        if len(share) > 1 and np.mean([share[line] > 0.5 for line in lines[controls]]) > 0.5:
            return True
    return False


def _polish(values: Numbers, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Numbers:
    """Return the effects of rows and columns on (N, F) values, (N, F)."""
    grid = np.full((rows.max(), columns.max(), values.shape[1]), np.nan)
    grid[rows - 1, columns - 1] = values
    start = grid.copy()
    with _gaps_allowed():
        size = np.nansum(np.abs(grid))
        for _ in range(POLISHES):
            for axis in (1, 0):
                effect = np.nanmedian(grid, axis=axis, keepdims=True)
                # The middle of the plate stays.
                effect -= np.nanmedian(effect, axis=1 - axis, keepdims=True)
                wells = (~np.isnan(grid)).sum(axis=axis, keepdims=True)
                grid -= np.where(wells < FEWEST_OF_LINE, 0, np.nan_to_num(effect))
            before, size = size, np.nansum(np.abs(grid))
            if abs(before - size) <= 0.01 * size:
                break
    found: Numbers = np.nan_to_num((start - grid)[rows - 1, columns - 1])
    return found


@contextmanager
def _gaps_allowed() -> Iterator[None]:
    """Be silent about features, rows and columns of which no value is known."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _by_controls(
    values: Numbers,
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    edge: Which,
    own: Which,
) -> Numbers:
    """Return what position does to (N, F) values by the controls (``own``, (N,)) alone, (N, F)."""
    design = np.stack([rows, columns, edge], axis=1).astype(np.float64)
    design -= design[own].mean(axis=0)
    inverse = np.linalg.pinv(design[own])
    with _gaps_allowed():
        centred = values[own] - np.nanmean(values[own], axis=0)
    effect = design @ (inverse @ np.nan_to_num(centred))
    # Of a control: e / (1 - h) is its distance from what the others say of its position.
    leverage = np.einsum("ij,ji->i", design[own], inverse) + 1 / own.sum()
    rest = centred - effect[own]
    effect[own] = centred - rest / np.maximum(1 - leverage, 1e-3)[:, None]
    found: Numbers = np.nan_to_num(effect)
    return found


def correct_batches(profiles: WellProfiles, by: str, seed: int = 0) -> WellProfiles:
    """Bring plates, or batches, together by Harmony (Korsunsky et al., Nature Methods 16, 2019).

    ``by``: ``plate``, ``batch``, or ``none``. Features with a gap in a well that has values go.

    Raises:
        UserInputError: there is one plate or batch only, or a plate has no batch.
    """
    if by == "none":
        return profiles
    import harmonypy

    known = profiles.known
    groups = profiles.table.loc[known, by]
    if groups.isna().any():
        unnamed = sorted(set(profiles.table.loc[known & profiles.table[by].isna(), "plate"]))
        raise UserInputError(
            f"Plate {some_of(unnamed)} has no batch. Take --harmony plate, or give the batch in "
            "a table of plates."
        )
    if groups.nunique() < 2:
        raise UserInputError(
            f"All wells are of one {by}: Harmony has nothing to bring together. Leave --harmony "
            "out."
        )
    profiles = _checked(_without_gaps(profiles))
    few = {"nclust": 1} if known.sum() < 30 else {}  # it would make no cluster of them
    made = harmonypy.run_harmony(
        profiles.values[known], groups.to_frame(), [by], verbose=False, random_state=seed, **few
    )
    values = profiles.values.copy()
    values[known] = made.Z_corr
    return replace(profiles, values=values)
