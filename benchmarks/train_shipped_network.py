"""Train the network that comes with cellstore, on rendered fields only.

    python benchmarks/train_shipped_network.py --steps 440 --seed 1 --out cellstore-nuclei.pt

writes the network (float16 state dict of a standard Cellpose 3 network, which
``CellposeModel(pretrained_model=...)`` loads as it is) and, beside it, its size model; the model
card has the commands that made the shipped one. The loss is Cellpose's: mean squared error of
five times the flow, halved, plus the cross-entropy of the cell probability (Stringer et al. 2021,
doi:10.1038/s41592-020-01018-x).
"""

from __future__ import annotations

import argparse
import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from cellpose.dynamics import masks_to_flows
from cellpose.models import CellposeModel
from cellpose.resnet_torch import CPnet
from cellpose.transforms import normalize99, resize_image
from cellpose.utils import diameters
from training_fields import LARGEST, SMALLEST, TrainingField, render_nuclei

from cellstore.analysis.segmentation import (
    CHANNELS,
    SizeModel,
    load_network,
    pick_device,
)
from cellstore.learn.finetuning import half_precision, train_step

if TYPE_CHECKING:
    from numpy.typing import NDArray


log = logging.getLogger(__name__)

DIAM_MEAN = 17.0
"""Pixels; every image is scaled so that its median cell is this wide (as Cellpose's nuclei)."""

CROP = 128
"""Pixels of a training crop: seven cells across, and thrice the steps a 224 pixel one allows."""

FIELD = 160
"""Pixels of a training field after scaling; crops move within it."""

RIDGES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""Penalties tried for the size model."""

SIZE_FIELD = 208
"""Pixels of a field of the size model, at its own scale: one tile of Cellpose with margin."""


@dataclass(frozen=True)
class TrainingParams:
    """What a training run depends on. Same parameters, same machine: same network."""

    steps: int = 440
    """Updates of the network (0: keep the one it starts from)."""
    batch: int = 8
    fresh: int = 3
    """New fields per step; the rest of the batch comes from the last ``memory`` fields."""
    memory: int = 256
    learning_rate: float = 3e-3
    weight_decay: float = 1e-5
    scale_jitter: float = 0.2
    stop_after: int = 0
    """End early, at this step of the learning-rate schedule (0: run it to its end)."""
    size_fields: int = 300
    """Fields the size model is fitted to (0: make no size model)."""
    seed: int = 1


def train(
    params: TrainingParams,
    out: Path,
    *,
    device: str = "auto",
    start: Path | None = None,
    save_every: int = 50,
) -> None:
    """Train network and size model and write both; ``out`` is the network file.

    ``start`` is a network to go on from; without it the weights are drawn from the seed.
    """
    chosen = pick_device(device)
    net = (load_network(start, "cpu").net if start else new_network(params.seed)).to(chosen)
    net.mkldnn = False
    if params.steps:
        optimise(net, params, out, chosen, save_every)
    if params.size_fields:
        size_model = train_size_model(out, params, device)
        save_size_model(out.with_name(f"{out.stem}_size.npz"), size_model)


def optimise(
    net: CPnet, params: TrainingParams, out: Path, device: torch.device, save_every: int
) -> None:
    """Train ``net``, writing it to ``out`` every ``save_every`` steps and at the end."""
    last = params.stop_after or params.steps
    optimiser = torch.optim.AdamW(
        net.parameters(), params.learning_rate, weight_decay=params.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, params.learning_rate, total_steps=params.steps, pct_start=0.1
    )
    started = time.monotonic()
    for step, batch in enumerate(itertools.islice(batches(params), last), start=1):
        both = np.stack([s.image for s in batch]), np.stack([s.target for s in batch])
        loss = train_step(net, optimiser, both, device)
        schedule.step()
        log.info("step %d loss %.4f (%.0f s)", step, loss, time.monotonic() - started)
        if step % save_every == 0 or step == last:
            save_network(net, out)


def new_network(seed: int) -> CPnet:
    """An untrained standard network, made on the CPU so that the seed fixes it everywhere."""
    torch.manual_seed(seed)
    return CPnet(list(CHANNELS), 3, sz=3, diam_mean=DIAM_MEAN)


@dataclass(frozen=True)
class Sample:
    """``image``: (2, H, W) float32. ``target``: (3, H, W) float32: cell or not, flow y, flow x."""

    image: NDArray[np.float32]
    target: NDArray[np.float32]


def batches(params: TrainingParams) -> Iterator[list[Sample]]:
    """``params.steps`` batches of crops, in part from fields rendered for this step."""
    rng = np.random.default_rng(params.seed)
    memory: list[Sample] = []
    for _ in range(params.steps):
        memory.extend(render_sample(rng, params.scale_jitter) for _ in range(params.fresh))
        memory = memory[-params.memory :]
        older = rng.integers(len(memory), size=params.batch - params.fresh)
        chosen = memory[-params.fresh :] + [memory[i] for i in older]
        yield [cropped(rng, turned(rng, sample)) for sample in chosen]


def render_sample(rng: np.random.Generator, scale_jitter: float) -> Sample:
    """A rendered field, normalised and scaled as Cellpose does before its network."""
    field = _sized_field(rng, FIELD / DIAM_MEAN)
    factor = FIELD / field.image.shape[0]
    wanted = factor * np.exp(scale_jitter * rng.standard_normal())
    side = max(CROP, round(field.image.shape[0] * wanted))
    image = resize_image(normalize99(field.image), Ly=side, Lx=side)
    masks = resize_image(field.masks, Ly=side, Lx=side, no_channels=True, interpolation=0)
    return Sample(
        np.stack([image, np.zeros_like(image)]).astype(np.float32), _target(masks.astype(int))
    )


def _sized_field(rng: np.random.Generator, cells_across: float) -> TrainingField:
    """A square field ``cells_across`` median cells wide."""
    diameter = float(np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST))))
    side = round(diameter * cells_across)
    return render_nuclei(rng, (side, side), diameter)


def _target(masks: NDArray[np.int_]) -> NDArray[np.float32]:
    flow = masks_to_flows(masks, device=torch.device("cpu"))
    target: NDArray[np.float32] = np.concatenate([masks[None] > 0, flow]).astype(np.float32)
    return target


def turned(rng: np.random.Generator, sample: Sample) -> Sample:
    """``sample`` turned by a multiple of 90 degrees and perhaps mirrored, flows included."""
    image, (cell, dy, dx) = sample.image, sample.target
    for _ in range(rng.integers(4)):
        image = np.rot90(image, axes=(1, 2))
        cell, dy, dx = np.rot90(cell), -np.rot90(dx), np.rot90(dy)
    if rng.random() < 0.5:
        image, cell, dy, dx = image[..., ::-1], cell[:, ::-1], dy[:, ::-1], -dx[:, ::-1]
    return Sample(image, np.stack([cell, dy, dx]))


def cropped(rng: np.random.Generator, sample: Sample) -> Sample:
    """A random crop of ``CROP`` pixels."""
    top, left = (int(rng.integers(side - CROP + 1)) for side in sample.image.shape[1:])
    window = (slice(None), slice(top, top + CROP), slice(left, left + CROP))
    return Sample(
        np.ascontiguousarray(sample.image[window]), np.ascontiguousarray(sample.target[window])
    )


def save_network(net: CPnet, path: Path) -> None:
    """Write the state of ``net`` with its floats in half precision."""
    torch.save(half_precision(net), path)


def fit_size_model(
    styles: NDArray[np.floating[Any]],
    diameters: NDArray[np.floating[Any]],
    diam_mean: float,
    ridge: float = 1.0,
) -> SizeModel:
    """Ridge regression of log diameter on ``styles`` (n, 256); ``diameters`` (n,) in pixels."""
    style_mean = styles.mean(axis=0, dtype=np.float64)
    target = np.log(diameters.astype(np.float64) / diam_mean)
    centred = styles.astype(np.float64) - style_mean
    normal = centred.T @ centred + ridge * np.eye(centred.shape[1])
    weights = np.linalg.solve(normal, centred.T @ (target - target.mean()))
    return SizeModel(weights, style_mean, float(target.mean()), diam_mean)


def save_size_model(path: Path, model: SizeModel) -> None:
    """Write ``model`` as an ``.npz`` of plain arrays, under the names Cellpose uses."""
    np.savez(
        path,
        A=model.weights,
        smean=model.style_mean,
        ymean=np.float64(model.offset),
        diam_mean=np.float64(model.diam_mean),
    )


def train_size_model(network: Path, params: TrainingParams, device: str = "auto") -> SizeModel:
    """Regress the diameter of rendered fields on the style the saved network gives them.

    The penalty is the one that does best on the last fifth of the fields; the model is then
    fitted to all of them.
    """
    model = load_network(network, device)
    rng = np.random.default_rng([params.seed, 1])
    rendered = (render_nuclei(rng, (SIZE_FIELD, SIZE_FIELD)) for _ in range(params.size_fields))
    fields = [field for field in rendered if field.masks.any()]
    styles = np.stack([style_of(model, field.image) for field in fields])
    truth = np.array([diameters(field.masks)[0] for field in fields])
    errors = {ridge: _held_out_error(styles, truth, ridge) for ridge in RIDGES}
    best = min(errors, key=lambda ridge: errors[ridge])
    log.info("size model: penalty %g, median error %.0f %%", best, 100 * errors[best])
    return fit_size_model(styles, truth, DIAM_MEAN, best)


def _held_out_error(styles: NDArray[np.float32], truth: NDArray[np.float64], ridge: float) -> float:
    """Median of |log(estimate / truth)| on the last fifth, fitted to the rest."""
    last = max(1, len(truth) // 5)
    trial = fit_size_model(styles[:-last], truth[:-last], DIAM_MEAN, ridge)
    estimates = np.array([trial.estimate(style) for style in styles[-last:]])
    return float(np.median(np.abs(np.log(estimates / truth[-last:]))))


def style_of(model: CellposeModel, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """The style vector (256,) of ``image`` (H, W) at its own scale."""
    style = model.eval(image, channels=[0, 0], resample=False, compute_masks=False)[-1]
    return np.asarray(style, np.float32)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("cellstore-nuclei.pt"))
    parser.add_argument("--steps", type=int, default=TrainingParams.steps)
    parser.add_argument("--seed", type=int, default=TrainingParams.seed)
    parser.add_argument("--start", type=Path, help="network to go on from")
    parser.add_argument("--stop-after", type=int, default=0, help="end early, at this step")
    parser.add_argument("--learning-rate", type=float, default=TrainingParams.learning_rate)
    parser.add_argument("--size-fields", type=int, default=TrainingParams.size_fields)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    params = TrainingParams(
        steps=chosen.steps,
        stop_after=chosen.stop_after,
        learning_rate=chosen.learning_rate,
        size_fields=chosen.size_fields,
        seed=chosen.seed,
    )
    train(params, chosen.out, device=chosen.device, start=chosen.start)


if __name__ == "__main__":
    main()
