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
    """The masks of an image. ``current``: the image still has the bytes they were made from."""

    id: int
    run_id: int
    recipe_id: int
    fingerprint: str
    weights_sha256: str | None
    parameters: dict[str, Any]
    made_at: str
    n_cells: int
    diameter: float
    current: bool


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
class ImageAudit:
    """All that is known about an image and the labels it got."""

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
    files: tuple[FileFact, ...]
    missing_files: int
    segmentations: tuple[SegmentationFact, ...]
    labellings: tuple[Labelling, ...]


@dataclass(frozen=True)
class Choice:
    """One choice of a cell in one predict run."""

    run_id: int
    rank: int
    label: str
    probability: float


@dataclass(frozen=True)
class CellAudit:
    """All that is known about a cell. ``box`` is min row, min col, max row, max col (half open)."""

    cell_id: int
    image: str
    image_id: int
    label: int
    box: tuple[int, int, int, int]
    centroid: tuple[float, float]
    excluded: str | None
    segmentation: SegmentationFact
    features: dict[str, dict[str, float | None]]
    choices: tuple[Choice, ...]


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
class RunAudit:
    """All that is known about a run. ``inputs`` are the recipes it reads from, all the way up."""

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
