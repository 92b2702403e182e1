"""Corrected masks with their images: which there are, and which of them are held out."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...artifacts import StoredFile
from ...config import FinetuneParams, ImageInput
from ...errors import ImageError, UserInputError
from ...formats.files.images import decode_tiff, encode_tiff
from ...formats.files.masks import mask_files
from ...progress import track
from ...reading.matching import NoMatch, read_masks_of
from ...reading.planes import read_image
from ...runs import Workspace
from ...terms import ArtifactKind

if TYPE_CHECKING:
    from ...ops.finetuning import Corrected


class Refused(NamedTuple):
    """A file of masks that is not learned from, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Example:
    """Masks of an image. ``group``: the well, which is held out as a whole."""

    file: str
    image_id: int
    content_sha256: str | None
    group: str
    cells: int
    masks: StoredFile


@dataclass(frozen=True)
class Sides:
    """What the network learns from, and what it is judged by; and what could not be used."""

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    refused: tuple[Refused, ...]


def find_examples(
    workspace: Workspace, paths: Sequence[Path], params: FinetuneParams, plate: str | None
) -> Sides:
    """Match files of masks to images, keep them as artifacts, and divide them.

    Raises:
        UserInputError: no such file or folder, or none that can be learned from.
    """
    examples: list[Example] = []
    refused: list[Refused] = []
    masks = list(mask_files(paths))
    for mask in track(workspace.progress, "read masks", len(masks), masks):
        found = read_masks_of(workspace.database, mask, plate=plate, binary=params.binary)
        if isinstance(found, NoMatch):
            refused.append(Refused(mask.name, f"{found.reason}: {found.detail}"))
        elif not found.labels.any():
            refused.append(Refused(mask.name, "it has no cells, so their size is not known"))
        elif found.image.id in {example.image_id for example in examples}:
            refused.append(Refused(mask.name, f"other masks of {found.image} were read before it"))
        else:
            image = found.image
            examples.append(
                Example(
                    mask.name,
                    image.id,
                    image.content_sha256,
                    f"{image.plate}/{image.well}",
                    len(np.unique(found.labels)) - 1,
                    _kept(workspace, found.labels),
                )
            )
    if not examples:
        reasons = "; ".join(f"{item.file}: {item.reason}" for item in refused[:3])
        raise UserInputError(f"None of the masks can be learned from. {reasons}")
    examples.sort(key=lambda example: example.image_id)
    training, held_out = divide(examples, params.held_out, params.seed)
    return Sides(tuple(training), tuple(held_out), tuple(refused))


def divide(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: whole wells, or images where there is one well only.

    About ``share`` of the groups are held out, at least one of two or more; of one, none.
    """
    wells = {example.group for example in examples}
    groups = defaultdict(list)
    for example in examples:
        groups[example.group if len(wells) > 1 else str(example.image_id)].append(example)
    names = sorted(groups)
    count = min(len(names) - 1, max(1, round(share * len(names)))) if share > 0 else 0
    chosen = np.random.default_rng(seed).permutation(len(names))[:count]
    held = {names[place] for place in chosen}
    sides: tuple[list[Example], list[Example]] = ([], [])
    for name in names:
        sides[name in held].extend(groups[name])
    return sides


def _kept(workspace: Workspace, labels: NDArray[np.uint32]) -> StoredFile:
    return workspace.artifacts.write(ArtifactKind.MASK, encode_tiff(labels), ".tif")


def digest_of(examples: Sequence[Example]) -> str:
    """A digest of images and masks: with others, another network comes out."""
    lines = [f"{item.content_sha256} {item.masks.sha256}" for item in examples]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Opened:
    """Examples as the network sees them, opened one by one, as often as they are asked for."""

    workspace: Workspace
    examples: tuple[Example, ...]
    image: ImageInput
    nuclei: ImageInput | None

    def __iter__(self) -> Iterator[Corrected]:
        for example in self.examples:
            yield self._open(example)

    def _open(self, example: Example) -> Corrected:
        from ...ops.finetuning import Corrected

        stored = self.workspace.artifacts.read(example.masks.path, example.masks.sha256)
        masks, pixels = decode_tiff(stored), self._pixels(example.image_id)
        if masks.shape != pixels.shape[-2:]:
            raise ImageError(f"{example.file} and its image differ in size.")
        return Corrected(pixels, masks.astype(np.int64))

    def _pixels(self, image_id: int) -> NDArray[np.float32]:
        cells = read_image(self.workspace.database, image_id, self.image)
        if self.nuclei is None:
            return cells
        return np.stack([cells, read_image(self.workspace.database, image_id, self.nuclei)])
