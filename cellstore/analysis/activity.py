"""What a treatment does to wells: which measures say so, and how surely. Pure functions on arrays.

A value of a profile that is not finite becomes the mean of its column; a well without any finite
value has no profile and is left out of all measures but the cell count.

p values come from exchanging wells at random (Fisher 1935), so they are right whatever the
distribution of the features is and however these hang together. Drawing stops when ``STOP``
exchanges reached what was found (Besag and Clifford, Biometrika 78, 1991): what is far from
significant needs few draws. q values are those of Benjamini and Hochberg (1995).
``benchmarks/hits_errors.py`` holds all of them against simulated screens.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import some_of

Numbers = NDArray[np.float64]
Codes = NDArray[np.int64]
Flags = NDArray[np.bool_]
Name = TypeVar("Name", int, str)

STOP = 50
"""Exchanges that reach the statistic found; with them p is known to 14 % of itself."""
FEWEST_CONTROLS = 4
"""With fewer, nothing says how far controls are from each other."""
MOST_REPLICATES = 100
MOST_CHANGED = 0.95
"""The share of the features that change by less than the most changed ones."""
TAIL = 0.025
"""Of a 95 % interval, on each side."""
_NORMAL_MAD = 1.4826
"""Of a normal distribution, the standard deviation over the median absolute deviation."""
_LARGEST = 4_000_000
"""Numbers that one block of exchanges may hold."""


class Wells(NamedTuple):
    """N wells that are compared.

    ``values`` (N, F) are their profiles in any unit, best in standard deviations of the negative
    controls of their plate; ``groups`` (N,) the number of the treatment of each well, -1 where it
    has none; ``controls`` (N,) whether it is a negative control, which then belongs to no group;
    ``strata`` (N,): wells are compared with controls of the same one, a plate or a zone of a plate.
    """

    values: Numbers
    groups: Codes
    controls: Flags
    strata: Codes


@dataclass(frozen=True)
class Score:
    """What one measure says of a treatment or a target, with its 95 % interval, p and q.

    ``n_wells`` is how many of its wells were used, ``n_controls`` with how many controls they were
    compared, on ``n_plates`` plates (or strata). ``note`` says what is missing, and why.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    q: float | None = None
    n_wells: int = 0
    n_controls: int = 0
    n_plates: int = 0
    note: str | None = None


def activity(wells: Wells, *, permutations: int = 10_000, seed: int = 0) -> dict[int, Score]:
    """Return for each treatment how well its wells are told from controls, 0 to 1, with p and q.

    The value is the mean average precision (Kalinin et al., Nature Communications 16, 2025): for
    each well of the treatment, controls of its stratum and the other wells of the treatment are
    ranked by cosine similarity. Profiles are standardised before, in each stratum, over the wells
    that are compared, treated and controls alike (:func:`_standardised`). So they can be exchanged
    within the stratum, and p is right where the treatment does nothing. Equal means are told apart
    by the mean similarity of the wells of the treatment. Equal similarities are ranked at random.
    """
    clean, usable = _complete(wells.values)
    found: dict[int, Score] = {}
    for group, mine, ours, empty, possible in _comparisons(wells, usable):
        found[group] = empty
        if possible:
            used = np.concatenate([mine, ours])
            layer, treated = wells.strata[used], np.arange(len(used)) < len(mine)
            generator = np.random.default_rng([seed, group])
            ranks = _Ranks(_standardised(clean[used], layer), layer, generator)
            draw = _draws(layer, treated, generator)
            chosen = np.flatnonzero(treated)
            found[group] = ranks.scored(empty, chosen, draw, permutations)
    return _with_q(found)


def smallest_p(wells: Wells, permutations: int) -> dict[int, float]:
    """Return for each treatment the smallest p that :func:`activity` could give it.

    1 over the number of ways to choose as many wells in each stratum, or over ``permutations + 1``.
    """
    strata, found = wells.strata, {}
    for group, mine, ours, _, possible in _comparisons(wells, _complete(wells.values)[1]):
        if not possible:
            continue
        ways = 1
        for stratum in np.unique(strata[mine]):
            treated = int((strata[mine] == stratum).sum())
            ways *= math.comb(treated + int((strata[ours] == stratum).sum()), treated)
        found[group] = max(1 / ways, 1 / (permutations + 1))
    return found


def activity_by_copairs(
    wells: Wells, *, null_size: int = 10_000, seed: int = 0
) -> dict[int, Score]:
    """Return mean average precision, p and q exactly as copairs says, of the profiles as they are.

    Positive pairs are wells of a treatment, negative pairs a well and a control of its stratum.
    Wells without a profile, or without controls in their stratum, are not shown to copairs.
    """
    import pandas as pd
    from copairs.map import average_precision

    clean, usable = _complete(wells.values)
    found: dict[int, Score] = {}
    shown: list[Codes] = []
    for group, mine, _, score, possible in _comparisons(wells, usable):
        found[group] = score
        if possible:
            shown.append(mine)
    if not shown:
        return found
    rows = np.concatenate([*shown, np.flatnonzero(wells.controls & usable)])
    control = wells.controls[rows]
    table = pd.DataFrame(
        {
            "group": np.where(control, -1, wells.groups[rows]),
            # Every control is a group of its own, so that no two of them are a pair.
            "alone": np.where(control, rows, -1),
            "stratum": wells.strata[rows],
        }
    )
    pair = ["group", "alone"]
    asked: tuple[Any, ...] = (table, clean[rows], pair, [], ["stratum"], pair)
    return _by_copairs(average_precision, asked, "group", found, null_size, seed)


def _by_copairs(
    average_precision: Callable[..., Any],
    asked: tuple[Any, ...],
    label: str,
    found: Mapping[Name, Score],
    null_size: int,
    seed: int,
) -> dict[Name, Score]:
    """Give scores by name what copairs says of what it is ``asked``. Its cache is not kept."""
    from copairs.map import mean_average_precision

    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scored = average_precision(*asked, progress_bar=False)
        scored = scored[scored[label] != -1]  # controls
        means = mean_average_precision(
            scored, [label], null_size, 0.05, seed, progress_bar=False, cache_dir=cache
        )
    columns = ("mean_average_precision", "p_value", "corrected_p_value")
    numbers = means[list(columns)].to_numpy(np.float64)
    return {**found} | {
        name: replace(found[name], value=float(row[0]), p=float(row[1]), q=float(row[2]))
        for name, row in zip(means[label].tolist(), numbers, strict=True)
    }


def replicate_correlation(
    wells: Wells, *, permutations: int = 10_000, seed: int = 0
) -> dict[int, Score]:
    """Return for each treatment the mean Pearson correlation between its wells, -1 to 1, with p.

    p: how often as many treated wells of the same plates, of any treatments, are as much alike
    (the null of "percent replicating", Way et al., Cell Systems 13, 2022). Controls are not drawn:
    profiles are centred on them, so that they are less alike than wells of different treatments.
    """
    values, groups, controls, plates = wells
    clean, usable = _complete(values)
    generator = np.random.default_rng(seed)
    rows = clean - clean.mean(axis=1, keepdims=True)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)

    def likeness(chosen: Codes) -> Numbers:
        """Mean of all pairs, from the length of the sum of unit vectors."""
        n = chosen.shape[1]
        size: Numbers = ((_sums(rows, chosen) ** 2).sum(axis=1) - n) / (n * (n - 1))
        return size

    found: dict[int, Score] = {}
    alike: dict[tuple[tuple[int, int], ...], dict[int, float]] = {}
    for group in _treatments(groups):
        mine = np.flatnonzero((groups == group) & usable & ~controls)
        there, counts = np.unique(plates[mine], return_counts=True)
        score = Score(n_wells=len(mine), n_plates=len(there), note=_too_few(len(mine)))
        if len(mine) > 1:
            score = replace(score, value=float(likeness(mine[None])[0]))
            layout = tuple(zip(there.tolist(), counts.tolist(), strict=True))
            alike.setdefault(layout, {})[group] = score.value or 0.0
        found[group] = score
    pool = usable & ~controls & (groups >= 0)
    for layout, members in alike.items():
        parts = [(np.flatnonzero(pool & (plates == plate)), count) for plate, count in layout]
        if all(len(there) == count for there, count in parts):
            note = "There are no wells of other treatments on its plates to compare with."
            found |= {group: replace(found[group], note=note) for group in members}
            continue

        def draw(size: int, parts: list[tuple[Codes, int]] = parts) -> Codes:
            chosen = [there[_subsets(generator, size, len(there), k)] for there, k in parts]
            return np.concatenate(chosen, axis=1)

        block = max(1, _LARGEST // max(1, rows.shape[1]))
        nulls, order = np.empty(0), sorted(members)
        observed = np.array([members[group] for group in order]) - 1e-12
        while len(nulls) < permutations:
            size = min(block, permutations - len(nulls), max(512, len(nulls)))
            nulls = np.concatenate([nulls, likeness(draw(size))])
            if ((nulls[:, None] >= observed).sum(axis=0) >= STOP).all():
                break
        for group, reached in zip(order, observed.tolist(), strict=True):
            found[group] = replace(
                found[group], p=_stopped(np.flatnonzero(nulls >= reached).tolist(), nulls.size)
            )
    return _with_q(found)


def effects(wells: Wells) -> tuple[dict[int, Score], Numbers]:
    """Return how far treatments are from controls, and how far each well is (N,).

    The distance of a well is the mean over features of the size of z, z from the mean and standard
    deviation of the controls of its plate, for a control of the other controls. Its logarithm is
    then expressed by those of the controls: 0 is as far as controls of the plate are on average, 1
    one standard deviation (within plates) farther. The logarithm, as distances are skewed, and as
    few controls know a unit by a factor only. Of wells that are no controls it is the mean over
    leaving out each control, so that it means the same. NaN: no profile, or fewer than
    ``FEWEST_CONTROLS`` on its plate. Features that are constant among them do not count there.

    The interval of the mean over wells is Welch's (Biometrika 34, 1947) with three sources of
    error: the wells; the controls that they are compared with, by jackknife; the unit, by the
    spread of the controls' distances.
    """
    plates = wells.strata
    each, compared, without, constant = _log_distances(wells)
    if not compared:
        note = f"No plate has {FEWEST_CONTROLS} negative controls with a profile."
        if constant:
            note = "All features are constant among the negative controls."
        return {group: Score(note=note) for group in _treatments(wells.groups)}, each
    distances = each[np.concatenate(compared)]
    free = len(distances) - len(compared)
    unit = math.sqrt(float((distances**2).sum()) / free) or 1.0
    each /= unit
    # The relative variance of the unit, from the fourth moment; at least that of a normal.
    kurtosis = float((distances**4).mean() / max(float((distances**2).mean()) ** 2, 1e-300))
    unsure = (max(kurtosis, 3.0) - 1) / (4 * free)
    found = {}
    for group, mine, _, score, _ in _comparisons(wells, np.isfinite(each)):
        error = 0.0
        for plate in np.unique(plates[mine]):
            beside = mine[plates[mine] == plate].tolist()
            moved = np.sum([without[well] for well in beside], axis=0) / len(mine)
            error += float(((moved - moved.mean()) ** 2).sum()) * (len(moved) - 1) / len(moved)
        mean = float(each[mine].mean()) if len(mine) else 0.0
        error = error / unit**2 + mean**2 * unsure
        found[group] = _welch(score, each[mine], error, free)
    return found, each


def strongest_changes(wells: Wells) -> Numbers:
    """Return by how much the most changed features of each treatment change, (T,); NaN: not known.

    Of each feature the mean over the wells of the treatment (:func:`against_controls`); of the
    sizes of these the 95th percentile over the features. The number of cells of a treatment
    (:func:`cell_counts`) can be held against it: where it has changed by more, the cells have
    become fewer rather than different.
    """
    values, groups, controls, plates = wells
    scaled = against_controls(values[:, np.isfinite(values).any(axis=0)], controls, plates)
    known = np.isfinite(scaled).any(axis=1)
    found = np.full(int(groups.max(initial=-1)) + 1, np.nan)
    for group in _treatments(groups):
        if (mine := (groups == group) & known & ~controls).any():
            found[group] = np.quantile(np.abs(scaled[mine].mean(axis=0)), MOST_CHANGED)
    return found


def against_controls(values: Numbers, controls: Flags, plates: Codes) -> Numbers:
    """Return how far wells are from the controls of their plate, in standard deviations of these.

    (N, F); 0 where a feature is missing in all wells, or constant among the controls. NaN: the well
    has no profile, or fewer than ``FEWEST_CONTROLS`` are on its plate.
    """
    clean, usable = _complete(values)
    columns = np.flatnonzero(np.isfinite(values).any(axis=0))
    found = np.full(values.shape, np.nan)
    for plate in np.unique(plates[controls & usable]):
        wells, own = (
            np.flatnonzero(some & (plates == plate)) for some in (usable, controls & usable)
        )
        if len(own) >= FEWEST_CONTROLS:
            spread = clean[own].std(axis=0, ddof=1)
            varies = spread > 1e-10 * np.maximum(np.abs(clean[own]).max(axis=0), 1e-280)
            apart = clean[wells] - clean[own].mean(axis=0)
            found[wells] = 0.0
            found[np.ix_(wells, columns)] = np.where(
                varies, apart / np.where(varies, spread, 1.0), 0.0
            )
    return found


def _log_distances(wells: Wells) -> tuple[Numbers, list[Codes], dict[int, Numbers], bool]:
    """Return the log distance of each well (N,), 0 for the mean of the controls of its plate.

    Also the controls of each plate that has enough of them; of each well, by how much its distance
    exceeds the controls', without each of these in turn; and whether some plate has enough
    controls, but no feature varies among them.
    """
    values, _, controls, plates = wells
    clean, usable = _complete(values)
    each, ours = np.full(len(controls), np.nan), controls & usable
    compared: list[Codes] = []
    without: dict[int, Numbers] = {}
    constant = False
    for plate in np.unique(plates[ours]):
        there, own = (np.flatnonzero(some & (plates == plate)) for some in (usable, ours))
        centred = clean[own] - clean[own].mean(axis=0)
        squares, n = (centred**2).sum(axis=0), len(own)
        varies = squares > 1e-20 * (clean[own] ** 2).sum(axis=0)
        if n < FEWEST_CONTROLS or not varies.any():
            constant |= n >= FEWEST_CONTROLS
            continue
        rows, squares = (
            clean[np.ix_(there, varies)] - clean[own].mean(axis=0)[varies],
            squares[varies],
        )
        is_control, apart = np.isin(there, own), np.empty((n, len(there)))
        for position, one in enumerate(rows[is_control]):
            rest = np.maximum(squares - one**2 * n / (n - 1), 1e-6 * squares) / (n - 2)
            size = np.abs(rows + one / (n - 1)) / np.sqrt(rest)
            apart[position] = np.log(np.maximum(size.mean(axis=1), 1e-12))
        of_control = np.diagonal(apart[:, is_control])
        each[there] = apart.mean(axis=0) - of_control.mean()
        each[own] = of_control - of_control.mean()
        apart -= ((of_control.sum() - of_control) / (n - 1))[:, None]
        without |= dict(zip(there.tolist(), apart.T, strict=True))
        compared.append(own)
    return each, compared, without, constant


def cell_counts(
    counts: Numbers,
    groups: Codes,
    controls: Flags,
    plates: Codes,
    *,
    permutations: int = 10_000,
    seed: int = 0,
) -> tuple[dict[int, Score], Numbers]:
    """Return the cells of treatments relative to controls, and how far each well is (N,).

    ``counts`` (N,): cells of each well, 0 or more, best for each image; NaN: not known. The value
    is the mean over wells of count / mean count of controls of the plate, with Welch's interval as
    in :func:`effects`. p, of more or fewer cells, is by exchanging treated and control wells of a
    plate (relative to the mean over both). Wells are in standard deviations of the controls (within
    plates); NaN where a plate has no control with cells.
    """
    per_control = control_means(counts, controls, plates)
    ratio = counts / per_control
    ours = controls & np.isfinite(ratio)
    free = int(ours.sum()) - len(np.unique(plates[ours]))
    spread = math.sqrt(float(((ratio[ours] - 1) ** 2).sum()) / free) if free > 0 else 0.0
    each = (ratio - 1) / (spread or np.nan)
    found: dict[int, Score] = {}
    there = np.isfinite(ratio)
    for group, wells, others, empty, possible in _comparisons(
        Wells(ratio[:, None], groups, controls, plates), there
    ):
        score = empty
        of_plates, share = np.unique(plates[wells], return_counts=True)
        if len(wells) and free > 0:
            beside = np.array([(plates[others] == plate).sum() for plate in of_plates])
            mean = float(ratio[wells].mean())
            error = (mean * spread) ** 2 * float(((share / len(wells)) ** 2 / beside).sum())
            # Counting alone makes wells differ: without it, two wells without cells would be sure.
            counted = float(((counts[wells] + 1) / per_control[wells] ** 2).mean())
            score = _welch(score, ratio[wells], error, free, least=counted, lowest=0.0)
        if possible:
            generator = np.random.default_rng([seed, group])
            used = np.concatenate([wells, others])
            shifted = np.empty(len(used))
            for plate in of_plates:
                there = plates[used] == plate
                mean = float(counts[used[there]].mean())
                shifted[there] = counts[used[there]] / (mean or 1.0) - 1

            def off(chosen: Codes, shifted: Numbers = shifted) -> Numbers:
                total: Numbers = np.abs(shifted[chosen].sum(axis=1))
                return total

            draw = _draws(plates[used], np.arange(len(used)) < len(wells), generator)
            observed = float(off(np.arange(len(wells))[None])[0])
            block = max(1, _LARGEST // len(used))
            score = replace(score, p=_p_value(off, draw, observed, permutations, block))
        found[group] = score
    return _with_q(found), each


def control_means(counts: Numbers, controls: Flags, plates: Codes) -> Numbers:
    """Return the mean count of the controls of the plate of each well, (N,); NaN: 0 or unknown."""
    found, ours = np.full(len(counts), np.nan), controls & np.isfinite(counts)
    for plate in np.unique(plates[ours]):
        mean = float(counts[ours & (plates == plate)].mean())
        found[plates == plate] = mean if mean > 0 else np.nan
    return found


def consistency(
    values: Numbers, targets: Sequence[frozenset[str]], *, permutations: int = 10_000, seed: int = 0
) -> dict[str, Score]:
    """Return for each target how much alike the treatments (T,) that have it are, 0 to 1, with p.

    ``values`` (T, F): one profile for each treatment; ``targets``: the targets of each. The value
    is the mean average precision of treatments of the target among those that share no target with
    them. p is by exchanging the profiles of treatments. Equal means are told apart by the mean
    similarity. Targets of one treatment get a note.
    """
    clean, usable = _complete(values)
    rows = np.flatnonzero(usable)
    labels = [targets[row] for row in rows.tolist()]
    generator = np.random.default_rng(seed)
    found: dict[str, Score] = {}
    ranks = _Ranks(clean[rows], np.zeros(len(rows), dtype=np.int64), generator)
    for target in sorted(frozenset[str]().union(*targets)):
        has = np.array([target in own for own in labels], dtype=bool)
        members = np.flatnonzero(has)
        score = Score(n_wells=len(members), note=_too_few(len(members), "treatment"))
        if len(members) > 1:
            alike = np.array([[bool(labels[m] & own) for own in labels] for m in members.tolist()])
            # Columns of ``shared``: treatments that have another target in common with a member.
            others = np.flatnonzero(alike.any(axis=0) & ~has)
            shared = alike[:, others]
            if (len(rows) - len(members) - shared.sum(axis=1)).min() > 0:
                chosen = np.concatenate([members, others])

                def draw(size: int, k: int = len(chosen)) -> Codes:
                    return generator.permuted(_subsets(generator, size, len(rows), k), axis=1)

                score = ranks.scored(score, chosen, draw, permutations, shared)
            else:
                score = replace(score, note="There are no treatments of other targets.")
        found[target] = score
    return _with_q(found)


def consistency_by_copairs(
    values: Numbers, targets: Sequence[frozenset[str]], *, null_size: int = 10_000, seed: int = 0
) -> dict[str, Score]:
    """Return the measure of :func:`consistency`, p and q exactly as copairs (multilabel) says."""
    import pandas as pd
    from copairs.map.multilabel import average_precision

    clean, usable = _complete(values)
    rows = np.flatnonzero(usable)
    table = pd.DataFrame({"target": [sorted(targets[row]) for row in rows.tolist()]})
    members = table["target"].explode().dropna().value_counts()
    found = {
        target: Score(n_wells=n, note=_too_few(n, "treatment"))
        for target in sorted(frozenset[str]().union(*targets))
        for n in [int(members.get(target, 0))]
    }
    shown = np.array([len(own) > 0 for own in table["target"]], dtype=bool)
    apart = any(
        not set(one) & set(other)
        for i, one in enumerate(table["target"][shown])
        for other in table["target"][shown][:i]
    )
    if not apart or all(score.n_wells < 2 for score in found.values()):
        return found
    table = table[shown].reset_index(drop=True)
    asked: tuple[Any, ...] = (table, clean[rows[shown]], ["target"], [], [], ["target"])
    by_label = partial(average_precision, multilabel_col="target")
    return _by_copairs(by_label, asked, "target", found, null_size, seed)


def edge_check(
    values: Numbers,
    controls: Flags,
    plates: Codes,
    on_edge: Flags,
    names: Sequence[str],
    *,
    permutations: int = 2_000,
    seed: int = 0,
) -> tuple[bool, str | None]:
    """Compare control wells at the edge of their plates with those inside.

    ``on_edge`` (N,): in the outermost row or column; ``names`` of the plates, by number. The
    statistic is the length of the difference of mean profiles, standardised over the controls of
    each plate; p by exchanging edge and inside controls of a plate. Returns whether they differ
    (p < 0.05) and each plate has ``FEWEST_CONTROLS`` controls in both, so that like can be compared
    with like; and a warning, where edge and inside cannot be told apart or matched.
    """
    clean, usable = _complete(values)
    ours = np.flatnonzero(controls & usable)
    few, both = [], []
    for plate in np.unique(plates[ours]).tolist():  # wells of other plates are not compared
        zone = on_edge[ours[plates[ours] == plate]]
        if min(zone.sum(), (~zone).sum()) < FEWEST_CONTROLS:
            few.append(names[plate])
        if 0 < zone.sum() < len(zone):
            both.append(plate)
    used = ours[np.isin(plates[ours], both)]
    p = None
    if len(used) >= FEWEST_CONTROLS:
        rows, edge = _standardised(clean[used], plates[used]), on_edge[used]
        share = float(edge.mean())

        def apart(chosen: Codes) -> Numbers:
            # Sums over each plate are 0, so what the edge has is what the inside has not.
            size: Numbers = (_sums(rows, chosen) ** 2).sum(axis=1)
            return size / (len(used) * share * (1 - share))

        draw = _draws(plates[used], edge, np.random.default_rng(seed))
        observed = float(apart(np.flatnonzero(edge)[None])[0])
        block = max(1, _LARGEST // rows.shape[1])
        p = _p_value(apart, draw, observed, permutations, block)
    differs, warning = p is not None and p < 0.05, None
    if differs and few:
        warning = (
            "Control wells at the edge differ from those inside"
            f" (p = {p:.2g}), and too few controls stand in one of both to compare like with like"
            f" (plates {some_of(few)}): treatments at the edge may look active by their position"
            " alone."
        )
    elif few and p is None:
        warning = (
            f"The negative controls are not spread over edge and inside (plates {some_of(few)}):"
            " whether wells differ by their position alone cannot be checked."
        )
    return differs and not few, warning


def replicates_needed(
    wells: Numbers, controls: Numbers, *, beside: float, level: float = 0.05
) -> int | None:
    """Return about how many wells a treatment needs to be told from controls in 80 % of screens.

    ``wells`` (n, F) and ``controls`` (C, F): profiles, from the controls of their plates;
    ``beside``: how many controls a plate has; ``level``: the p to reach, which for q < 0.05 with h
    hits among m treatments is about 0.05 (h + 1) / m.

    The mean of the n (n - 1) / 2 cosines between n wells has the standard deviation s / sqrt(n (n -
    1) / 2) where nothing happens (a U statistic that is degenerate then; Hoeffding, Annals of
    Mathematical Statistics 19, 1948), s that of a cosine between a well and a control. So n is the
    smallest with mean >= (z(level) + z(0.2)) times this, in the normal approximation, and with
    (beside + 1)^n exchanges, enough for such a p. ``None``: there are fewer than two wells or
    ``FEWEST_CONTROLS`` controls, their mean cosine is not above 0, or more than ``MOST_REPLICATES``
    wells were needed. The number is as unsure as the mean of few cosines is.
    """
    from statistics import NormalDist

    rows, usable = _complete(np.concatenate([wells, controls]))
    own, others = rows[: len(wells)][usable[: len(wells)]], rows[len(wells) :][usable[len(wells) :]]
    if len(own) < 2 or len(others) < FEWEST_CONTROLS:
        return None
    own, others = (
        some / np.maximum(np.linalg.norm(some, axis=1, keepdims=True), 1e-300)
        for some in (own, others)
    )
    n = len(own)
    mean = (float((own.sum(axis=0) ** 2).sum()) - n) / (n * (n - 1))
    spread = float((own @ others.T).std())
    reach = sum(NormalDist().inv_cdf(share) for share in (1 - level, 0.8)) * spread
    for needed in range(2, MOST_REPLICATES + 1):
        exchanges = needed * math.log1p(beside)
        if mean * math.sqrt(needed * (needed - 1) / 2) >= reach and exchanges >= -math.log(level):
            return needed if mean > 0 else None
    return None


class _Ranks:
    """Which wells are more alike to a well than others, and what of a choice of wells follows.

    ``rows`` (M, F) are profiles, ``layer`` (M,) their strata. Equal similarities are ranked at
    random: by place they would favour the treated wells, which come first.
    """

    def __init__(self, rows: Numbers, layer: Codes, generator: np.random.Generator) -> None:
        size = np.linalg.norm(rows, axis=1, keepdims=True)
        unit = rows / np.where(size > 0, size, 1.0)
        self.alike = unit @ unit.T
        blurred = self.alike + 1e-9 * generator.random(self.alike.shape)
        np.fill_diagonal(blurred, -np.inf)
        order = np.argsort(-blurred, axis=1)
        m = len(rows)
        # rank[i, j]: how many are more alike to i than j; seen[i, r]: of the r + 1 most alike ones,
        # those of the stratum of i; here[i, r]: whether the last of them is.
        self.rank = np.empty((m, m), dtype=np.int64)
        np.put_along_axis(self.rank, order, np.broadcast_to(np.arange(m), (m, m)), axis=1)
        self.here = layer[order] == layer[:, None]
        self.here[:, -1] = False  # the well itself
        self.seen = np.cumsum(self.here, axis=1)

    def precision(self, chosen: Codes, shared: Flags | None = None) -> Numbers:
        """Mean average precision (B,) of wells ``chosen`` (B, n) among the others of their strata.

        ``shared`` (n, e): the last e of ``chosen`` are wells that do not count for some of the
        first n, neither as alike nor as others.
        """
        n = chosen.shape[1] - (0 if shared is None else shared.shape[1])
        own = chosen[:, :n, None]
        rank = np.sort(self.rank[own, chosen[:, None, :n]], axis=2)[:, :, :-1]
        place = np.arange(1, n)
        above = self.seen[own, rank] - np.cumsum(self.here[own, rank], axis=2)
        if shared is not None and shared.size:
            beside = self.rank[own, chosen[:, None, n:]]
            closer = (beside[:, :, None, :] < rank[..., None]) & shared[:, None, :]
            above = above - closer.sum(axis=3)
        found: Numbers = (place / (place + above)).mean(axis=(1, 2))
        return found

    def scored(
        self,
        score: Score,
        chosen: Codes,
        draw: Callable[[int], Codes],
        permutations: int,
        shared: Flags | None = None,
    ) -> Score:
        """Give a score the mean average precision of ``chosen`` (n + e,), and its p."""
        n = len(chosen) - (0 if shared is None else shared.shape[1])

        def statistic(some: Codes) -> Numbers:
            own = some[:, :n]
            together = self.alike[own[:, :, None], own[:, None, :]].mean(axis=(1, 2))
            total: Numbers = self.precision(some, shared) + 1e-6 * together
            return total

        observed = float(statistic(chosen[None])[0])
        block = max(1, _LARGEST // (8 * n * len(chosen) * (1 if n == len(chosen) else n)))
        value = float(self.precision(chosen[None], shared)[0])
        return replace(
            score, value=value, p=_p_value(statistic, draw, observed, permutations, block)
        )


def _p_value(
    statistic: Callable[[Codes], Numbers],
    draw: Callable[[int], Codes],
    observed: float,
    permutations: int,
    block: int,
) -> float:
    """P of ``observed``: draw until ``STOP`` draws reach it, at most ``permutations`` times."""
    reached: list[int] = []
    drawn = 0
    while drawn < permutations and len(reached) < STOP:
        size = min(block, permutations - drawn, max(256, drawn))
        hits = np.flatnonzero(statistic(draw(size)) >= observed - 1e-12)
        reached += (drawn + hits).tolist()
        drawn += size
    return _stopped(reached, drawn)


def _sums(rows: Numbers, chosen: Codes) -> Numbers:
    """Return the sum (B, F) of the rows (N, F) of each choice (B, n)."""
    total = np.zeros((len(chosen), rows.shape[1]))
    for place in range(chosen.shape[1]):
        total += rows[chosen[:, place]]
    return total


def _stopped(reached: Sequence[int], drawn: int) -> float:
    """P where draws number ``reached`` (ascending, from 0) of ``drawn`` were as far or farther."""
    if len(reached) >= STOP:
        return STOP / (int(reached[STOP - 1]) + 1)
    return (len(reached) + 1) / (drawn + 1)


def _draws(layer: Codes, chosen: Flags, generator: np.random.Generator) -> Callable[[int], Codes]:
    """Return what draws, B times, as many of M wells in each stratum as are ``chosen`` (M,)."""
    parts = [np.flatnonzero(layer == one) for one in np.unique(layer)]
    sizes = [int(chosen[part].sum()) for part in parts]

    def draw(size: int) -> Codes:
        drawn = [
            part[_subsets(generator, size, len(part), k)]
            for part, k in zip(parts, sizes, strict=True)
        ]
        return np.concatenate(drawn, axis=1)

    return draw


def _subsets(generator: np.random.Generator, times: int, m: int, k: int) -> Codes:
    """Return (times, k) different numbers below m, any set as likely (Floyd's algorithm)."""
    chosen = np.empty((times, k), dtype=np.int64)
    for place, top in enumerate(range(m - k, m)):
        drawn = generator.integers(0, top + 1, size=times)
        taken = (chosen[:, :place] == drawn[:, None]).any(axis=1)
        chosen[:, place] = np.where(taken, top, drawn)
    return chosen


def _complete(values: Numbers) -> tuple[Numbers, Flags]:
    """Return profiles without a gap (their columns' means), and which wells have one (N,)."""
    there = np.isfinite(values)
    usable = there.any(axis=1)
    columns = there.any(axis=0)
    if not columns.any():
        return np.zeros((len(values), 1)), usable
    kept, there = values[:, columns], there[:, columns]
    if there.all():
        return kept, usable
    mean = np.where(there, kept, 0.0).sum(axis=0) / there.sum(axis=0)
    return np.where(there, kept, mean), usable


def _standardised(rows: Numbers, layer: Codes) -> Numbers:
    """Profiles from the mean of their stratum, in standard deviations; 0 where all are equal.

    What a few wells are far off in must not shrink to what the others vary in. So each feature is
    divided by its median distance from the medians of the strata, over all wells, in units of
    their standard deviations.
    """
    found, off = np.zeros_like(rows), np.zeros_like(rows)
    for one in np.unique(layer):
        there = layer == one
        spread = rows[there].std(axis=0)
        varies = spread > 1e-10 * np.maximum(np.abs(rows[there]).max(axis=0), 1e-280)
        for moved, middle in ((found, np.mean), (off, np.median)):
            part = rows[there] - middle(rows[there], axis=0)
            moved[there] = np.where(varies, part / np.where(varies, spread, 1.0), 0.0)
    usual = _NORMAL_MAD * np.median(np.abs(off), axis=0)
    scaled: Numbers = found / np.where(usual > 1e-3, usual, 1.0)
    return scaled


def _treatments(groups: Codes) -> list[int]:
    found: list[int] = np.unique(groups[groups >= 0]).tolist()
    return found


def _comparisons(wells: Wells, usable: Flags) -> Iterator[tuple[int, Codes, Codes, Score, bool]]:
    """Each treatment, its wells, controls beside them, its empty score, and whether to compare.

    Wells that are not ``usable`` or have no controls in their stratum are left out, with a note.
    """
    _, groups, controls, strata = wells
    ours = controls & usable
    for group in _treatments(groups):
        every = np.flatnonzero((groups == group) & ~controls)
        used = every[usable[every] & np.isin(strata[every], strata[ours])]
        others = np.flatnonzero(ours & np.isin(strata, strata[used]))
        note = _too_few(len(used))
        if note is None and len(others) < FEWEST_CONTROLS:
            note = f"There are fewer than {FEWEST_CONTROLS} negative controls to compare with."
        possible = note is None
        if lacking := len(every) - len(used):
            note = f"{lacking} of {len(every)} wells have no values, or no controls beside them."
        score = Score(
            n_wells=len(used),
            n_controls=len(others),
            n_plates=len(np.unique(strata[used])),
            note=note,
        )
        yield group, used, others, score, possible


def _too_few(n: int, what: str = "well") -> str | None:
    if n > 1:
        return None
    return f"One {what} only: 2 are needed." if n else f"No {what} has values."


def _welch(
    score: Score,
    numbers: Numbers,
    error: float,
    free: float,
    *,
    least: float = 0.0,
    lowest: float = -math.inf,
) -> Score:
    """Give a score the mean of ``numbers`` (n,), and its interval from two wells on.

    ``error``: variance of what they are compared with, of ``free`` degrees of freedom; ``least``:
    variance that they have at least; ``lowest``: what the mean cannot be below.
    """
    n = len(numbers)
    if n == 0:
        return score
    mean = float(numbers.mean())
    if n == 1:
        return replace(score, value=mean)
    from scipy.stats import t

    own = max(float(numbers.var(ddof=1)), least) / n
    total = own + error
    if total == 0:
        return replace(score, value=mean, low=mean, high=mean)
    reach = float(t.isf(TAIL, total**2 / (own**2 / (n - 1) + error**2 / free))) * math.sqrt(total)
    return replace(score, value=mean, low=max(mean - reach, lowest), high=mean + reach)


def _with_q(found: dict[Name, Score]) -> dict[Name, Score]:
    """Correct the p of all scores for how many there are (Benjamini and Hochberg 1995)."""
    tested = {name: score.p for name, score in found.items() if score.p is not None}
    if not tested:
        return found
    from scipy.stats import false_discovery_control

    corrected = false_discovery_control(list(tested.values())).tolist()
    return found | {
        name: replace(found[name], q=float(q)) for name, q in zip(tested, corrected, strict=True)
    }
