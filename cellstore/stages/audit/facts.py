"""What an audit finds, as plain values; moments are ISO 8601 in UTC."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FileFact:
    """A file of an image; no ``sha256``: it has not been found yet."""

    channel: str
    name: str
    uri: str | None
    sha256: str | None
    size_bytes: int | None


@dataclass(frozen=True)
class SegmentationFact:
    """The cells of an image. ``current``: the image still has the bytes they were found in.

    Of what another tool found, ``imported`` names the tool; ``diameter`` may be unknown (null),
    and ``has_masks`` says whether the masks are known.
    """

    id: int
    run_id: int
    recipe_id: int
    fingerprint: str
    weights_sha256: str | None
    parameters: dict[str, Any]
    made_at: str
    n_cells: int
    diameter: float | None
    current: bool
    has_masks: bool
    imported: str | None


@dataclass(frozen=True)
class LabelVotes:
    """How many cells chose a label first, and the sum of the probabilities that all gave it."""

    label: str
    cells: int
    probability: float


@dataclass(frozen=True)
class Labelling:
    """What one predict run said about an image.

    ``winner`` is the label of the hard vote, ``soft_winner`` of the summed probabilities, ``tie``
    whether the hard vote was a draw. ``side`` is the image's side of the split (``outside``: not
    in it), ``well_sides`` all sides on which this well has images.
    """

    run_id: int
    started_at: str
    user: str
    host: str
    code_version: str
    train_run_id: int | None
    checkpoints: tuple[str, ...]
    split: str | None
    protocol: str | None
    side: str
    well_sides: tuple[str, ...]
    well_in_training: bool
    segmentation_ids: tuple[int, ...]
    segment_recipes: tuple[int, ...]
    segment_weights: tuple[str, ...]
    n_cells: int
    votes: tuple[LabelVotes, ...]
    winner: str
    soft_winner: str
    tie: bool
    truth: str | None
    correct: bool | None


@dataclass(frozen=True)
class TreatmentFact:
    """What was done to a well, in a few words."""

    kind: str
    pert_iname: str
    target: str | None
    control: str | None
    identifier: str | None


@dataclass(frozen=True)
class TreatmentChange:
    """A file said something else of a well than was known; ``old`` is null where nothing was."""

    old: TreatmentFact | None
    new: TreatmentFact | None
    changed_at: str
    run_id: int
    file: str
    line: int | None


@dataclass(frozen=True)
class FrozenLabel:
    """The label that a split keeps, and what the well has ``now`` in the same field.

    ``since``: the last change of that field, where the two differ.
    """

    split: str
    field: str
    side: str
    label: str
    now: str | None
    differs: bool
    since: TreatmentChange | None


@dataclass(frozen=True)
class WellAudit:
    """All that is known about what a well got. ``images`` are ids."""

    well_id: int
    plate: str
    well: str
    treatment: TreatmentFact | None
    history: tuple[TreatmentChange, ...]
    images: tuple[int, ...]
    frozen_labels: tuple[FrozenLabel, ...]
    came: tuple[Came, ...] = ()


@dataclass(frozen=True)
class FlagFact:
    """A quality-control run held an image or a cell to be odd.

    Its ``value`` is not from ``low`` to ``high``; ``channel`` is null where it is about the whole.
    """

    run_id: int
    reason: str
    channel: str | None
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Came:
    """Some of what came of something: ``count`` of ``what``, by ``runs``, or called ``names``."""

    what: str
    count: int
    runs: tuple[int, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageAudit:
    """All that is known about an image and the labels it got; ``flags`` of every finished run.

    ``came``: what came of it, counted.
    """

    image_id: int
    plate: str
    well: str
    site: int
    plane: int
    time_point: int
    core_name: str
    content_sha256: str | None
    treatment: str | None
    target: str | None
    control: str | None
    treatment_history: tuple[TreatmentChange, ...]
    frozen_labels: tuple[FrozenLabel, ...]
    files: tuple[FileFact, ...]
    missing_files: int
    segmentations: tuple[SegmentationFact, ...]
    labellings: tuple[Labelling, ...]
    flags: tuple[FlagFact, ...] = ()
    came: tuple[Came, ...] = ()


@dataclass(frozen=True)
class Choice:
    """One choice of a cell in one predict run."""

    run_id: int
    rank: int
    label: str
    probability: float


@dataclass(frozen=True)
class CellAudit:
    """All that is known about a cell. ``box`` is min row, min col, max row, max col (half open).

    ``box`` and ``centroid`` are null where another tool found the cell and does not say.
    """

    cell_id: int
    image: str
    image_id: int
    label: int
    box: tuple[int, int, int, int] | None
    centroid: tuple[float, float] | None
    excluded: str | None
    segmentation: SegmentationFact
    features: dict[str, dict[str, float | None]]
    choices: tuple[Choice, ...]
    flags: tuple[FlagFact, ...] = ()


@dataclass(frozen=True)
class RunFact:
    """One run in a few words."""

    id: int
    stage: str
    status: str
    started_at: str


@dataclass(frozen=True)
class RecipeFact:
    """One recipe in a few words."""

    id: int
    stage: str
    version: int
    fingerprint: str
    weights_sha256: str | None
    parameters: dict[str, Any]


@dataclass(frozen=True)
class ArtifactFact:
    """A file that a run wrote or relies on."""

    kind: str
    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class IngestFact:
    """A file that an ingest run read; ``rows`` is the sum of the four numbers after it."""

    name: str
    sha256: str
    layout: str
    rows: int
    created: int
    updated: int
    unchanged: int
    refused: int


@dataclass(frozen=True)
class RunAudit:
    """All that is known about a run. ``inputs`` are the recipes it reads from, all the way up.

    Of an ingest: ``ingested`` are the files it read, ``changed_wells`` counts the wells whose
    treatment it changed.
    """

    run: RunFact
    ended_at: str | None
    user: str
    host: str
    command: str
    code_version: str
    environment: dict[str, Any]
    seed: int | None
    query: str | None
    result: dict[str, Any] | None
    error: str | None
    recipe: RecipeFact
    inputs: tuple[RecipeFact, ...]
    parents: tuple[RunFact, ...]
    children: tuple[RunFact, ...]
    split: str | None
    split_counts: dict[str, int]
    jobs: dict[str, int]
    artifacts: tuple[ArtifactFact, ...]
    ingested: tuple[IngestFact, ...]
    changed_wells: int
    came: tuple[Came, ...] = ()


@dataclass(frozen=True)
class KnownFile:
    """A file as the store knows it: what it is (``kind``), where, and of what.

    ``kind``: that of a stored artifact, or ``image file``, ``ingested table`` or ``weights``.
    ``key``: the id of its row; of weights that of the first recipe. ``runs`` wrote or read it.
    """

    kind: str
    key: int
    name: str
    place: str | None
    sha256: str
    size_bytes: int | None
    about: tuple[str, ...]
    runs: tuple[RunFact, ...]
    came: tuple[Came, ...]


@dataclass(frozen=True)
class ArtifactAudit:
    """What the store knows of a file. ``hashed``: the path of a file on disk that was looked up."""

    asked: str
    sha256: str
    hashed: str | None
    known: tuple[KnownFile, ...]
