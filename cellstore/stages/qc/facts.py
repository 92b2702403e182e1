"""What quality control says, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...runs import Forecast


@dataclass(frozen=True)
class PlateSummary:
    """A plate after quality control.

    ``images`` have files, ``seen`` of them were looked at, ``flagged`` have a flag; ``by_reason``
    counts images by reason (an image may have several). ``cells`` count, ``excluded`` (perimeter
    0) do not; ``cells_flagged`` have a flag, ``cells_by_reason`` counts them by reason.
    """

    plate: str
    images: int
    seen: int
    flagged: int
    by_reason: Mapping[str, int]
    cells: int
    excluded: int
    cells_flagged: int
    cells_by_reason: Mapping[str, int]


@dataclass(frozen=True)
class FlaggedImage:
    """A flag of an image: its ``value`` is not from ``low`` to ``high``.

    ``channel`` is empty where the reason is about the whole image.
    """

    image_id: int
    plate: str
    well: str
    site: int
    core_name: str
    reason: str
    channel: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class QcResult:
    """What quality control did and found.

    ``run_id`` is None when there was nothing to look at; ``already_done``: this run found the same
    before. ``selected``, ``waiting``, ``done``, ``failures`` and ``failed_before`` as in
    ``JobsResult``. ``segment_recipe``: whose cells, None: none; ``measure_recipe``: whose areas.
    ``notes`` are sentences that a reader of the numbers has to know; ``flags`` are listed where
    they are asked for.
    """

    run_id: int | None
    already_done: bool
    segment_recipe: int | None
    measure_recipe: int | None
    selected: int
    waiting: int
    done: int = 0
    failures: tuple[tuple[str, str], ...] = ()
    failed_before: int = 0
    plates: tuple[PlateSummary, ...] = ()
    notes: tuple[str, ...] = ()
    flags: tuple[FlaggedImage, ...] = ()
    html: str | None = None
    picture: str | None = None
    forecast: Forecast | None = None
