"""Fine-tune a Cellpose 3 network on images whose masks somebody corrected.

The augmentation (any angle, mirrored, at 0.75 to 1.25 of the size) and the loss are Cellpose's
(Stringer et al. 2021, doi:10.1038/s41592-020-01018-x). Its own loop, ``train_seg``, is not used:
it seeds numpy's global generator, takes no seed, tells nobody how far it is, and leaves images
with few cells out without saying so.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from cellpose.dynamics import masks_to_flows
from cellpose.metrics import average_precision
from cellpose.resnet_torch import CPnet
from cellpose.transforms import normalize_img, random_rotate_and_resize
from cellpose.utils import diameters
from numpy.typing import NDArray

from ..analysis.regions import find_regions
from ..analysis.segmentation import (
    CHANNELS,
    input_planes,
    load_network,
)
from ..config import FinetuneParams

if TYPE_CHECKING:
    from cellpose.models import CellposeModel


CROPS_PER_IMAGE = 4
"""Crops of each image in an epoch."""

BATCH, WEIGHT_DECAY = 8, 1e-5


Batch = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Images (N, 2, H, W), and targets (N, 3, H, W): cell or not, flow y, flow x."""


@dataclass(frozen=True)
class Corrected:
    """``image``: (H, W) or (2, H, W) float32. ``masks``: (H, W), 0 is background."""

    image: NDArray[np.float32]
    masks: NDArray[np.integer[Any]]

    @property
    def diameter(self) -> float:
        """Median diameter of its cells, in pixels."""
        return float(diameters(self.masks.astype(np.int32))[0])


class Prepared:
    """Images as the network learns from them, on disk: planes, cell or not, flow y, flow x.

    ``folder`` holds one array (5, H, W) float32 per image, mapped when it is read, so that many
    large images need no more memory than a few.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.diameters: list[float] = []

    def __len__(self) -> int:
        return len(self.diameters)

    def add(self, example: Corrected) -> None:
        """Normalise an image as Cellpose does, and turn its masks into flows."""
        scaled = np.moveaxis(normalize_img(_planes(example), norm3D=False), -1, 0)
        masks = find_regions(example.masks).numbered
        flows = masks_to_flows(masks.astype(np.int64), device=torch.device("cpu"))
        array = np.concatenate([scaled, masks[None] > 0, flows]).astype(np.float32)
        np.save(self._folder / f"{len(self)}.npy", array)
        self.diameters.append(example.diameter)

    def read(self, number: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Planes (2, H, W) and target (3, H, W) of an image."""
        array = np.load(self._folder / f"{number}.npy", mmap_mode="r")
        return array[: CHANNELS[0]], array[CHANNELS[0] :]


def finetune(
    start: Path,
    examples: Prepared,
    params: FinetuneParams,
    device: str,
    on_epoch: Callable[[int, float], None],
) -> bytes:
    """Return the state of the network in ``start``, trained further on ``examples``.

    Same parameters, same machine, same images: same network. ``on_epoch`` gets the number of each
    epoch, from 1, and its mean loss.
    """
    model = load_network(start, device)
    steps = -(-len(examples) * CROPS_PER_IMAGE // BATCH)
    optimiser = torch.optim.AdamW(
        model.net.parameters(), params.learning_rate, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, params.learning_rate, total_steps=steps * params.epochs, pct_start=0.2
    )
    with seeded(params.seed):
        for epoch in range(1, params.epochs + 1):
            losses = []
            for batch in _batches(examples, model.diam_mean):
                losses.append(train_step(model.net, optimiser, batch, model.device))
                schedule.step()
            on_epoch(epoch, float(np.mean(losses)))
    return state_bytes(model)


def train_step(
    net: CPnet, optimiser: torch.optim.Optimizer, batch: Batch, device: torch.device
) -> float:
    """One update of ``net``; returns the loss."""
    net.train()
    image, target = (torch.from_numpy(part).to(device) for part in batch)
    predicted = net(image)[0]
    flow = torch.nn.functional.mse_loss(predicted[:, :2], 5 * target[:, 1:]) / 2
    cell = torch.nn.functional.binary_cross_entropy_with_logits(predicted[:, 2], target[:, 0])
    loss = flow + cell
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return float(loss.item())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, which Cellpose's augmentation draws from, for a while."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def state_bytes(model: CellposeModel) -> bytes:
    """A network as the bytes of a file that Cellpose loads, its floats in half precision.

    Without a diameter Cellpose scales images by ``diam_mean / diam_labels``: by nothing here, so
    that the style, which the size model reads, is that of an image at its own scale.
    """
    state, buffer = half_precision(model.net), io.BytesIO()
    torch.save(state | {"diam_labels": state["diam_mean"].clone()}, buffer)
    return buffer.getvalue()


def half_precision(net: CPnet) -> dict[str, torch.Tensor]:
    """The state of ``net`` with its floats in half precision, on the CPU."""
    return {
        name: value.detach().cpu().half() if value.is_floating_point() else value.cpu()
        for name, value in net.state_dict().items()
    }


def _batches(examples: Prepared, diam_mean: float) -> Iterator[Batch]:
    """Crops of every image, ``CROPS_PER_IMAGE`` times, in a new order."""
    order = np.random.permutation(np.repeat(np.arange(len(examples)), CROPS_PER_IMAGE))
    length = crop_side(diam_mean)
    for first in range(0, len(order), BATCH):
        numbers = order[first : first + BATCH]
        images, targets = zip(*(examples.read(number) for number in numbers), strict=True)
        planes, labels, _ = random_rotate_and_resize(
            list(images),
            Y=list(targets),
            rescale=[examples.diameters[number] / diam_mean for number in numbers],
            scale_range=0.5,
            xy=(length, length),
        )
        yield planes, labels


def crop_side(diam_mean: float) -> int:
    """Pixels of a crop: 7.5 median cells, and a multiple of 16, as the network needs."""
    return 16 * round(7.5 * diam_mean / 16)


def precision(network: Path, examples: Iterable[Corrected], device: str, iou: float = 0.5) -> float:
    """Mean over images of Cellpose's average precision, at its default thresholds.

    Each image is scaled by the true diameter of its cells.
    """
    model = load_network(network, device)
    scores = []
    for item in examples:
        masks = model.eval(_planes(item)[None], channel_axis=3, diameter=item.diameter)[0]
        found = masks.reshape(item.masks.shape).astype(np.int32)
        truth = find_regions(item.masks).numbered.astype(np.int32)
        scores.append(average_precision([truth], [found], threshold=[iou])[0][0])
    return float(np.mean(scores))


def _planes(item: Corrected) -> NDArray[np.float32]:
    """The planes (H, W, 2) of an image as the network takes them."""
    return input_planes(item.image, CHANNELS[0])
