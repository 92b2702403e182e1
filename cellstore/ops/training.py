"""Training of a network, as one readable loop on Lightning Fabric."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from cellstore.errors import UserInputError
from cellstore.ops.crops import CellBlock
from cellstore.ops.nets import FusionNet

Batches = Callable[[int], Iterable[CellBlock]]
"""The batches of an epoch, counted from 0."""


@dataclass(frozen=True)
class FitConfig:
    """How to train. Defaults are the published ones, but ``max_epochs`` and ``patience``.

    The study stopped after 13 epochs by early stopping and does not give its patience.
    ``device`` is ``auto``, ``cpu`` or ``cuda``. The learning rate is multiplied by ``gamma``
    after every ``step_size`` epochs. ``batch_size`` is for whoever makes the batches.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    step_size: int = 5
    gamma: float = 0.5
    label_smoothing: float = 0.1
    max_epochs: int = 50
    patience: int = 5
    batch_size: int = 512
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.weight_decay < 0 or not 0 <= self.label_smoothing < 1:
            raise UserInputError(
                "The learning rate must be above 0, the weight decay 0 or more and the label "
                "smoothing from 0 to below 1."
            )
        if min(self.max_epochs, self.patience, self.step_size) < 1 or self.batch_size < 2:
            raise UserInputError(
                "Epochs, patience and step size must be 1 or more, the batch size 2 or more."
            )


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch, counted from 1. Losses are per cell, accuracies shares of cells.

    Training numbers are those of the batches as they were trained on: with dropout, and while
    the network changed. ``learning_rate`` is the one the epoch used.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class FitResult:
    """The tensors (on the CPU) of the epoch of lowest validation loss, and all epochs."""

    state: dict[str, Tensor]
    best_epoch: int
    epochs: tuple[EpochMetrics, ...]
    stopped_early: bool


def fit(
    net: FusionNet,
    train_batches: Batches,
    validation_batches: Batches,
    config: FitConfig,
    on_epoch: Callable[[EpochMetrics], None] = lambda _: None,
) -> FitResult:
    """Train ``net`` in place until validation loss has not fallen for ``config.patience`` epochs.

    Adam, label-smoothing cross-entropy (for validation too), ``StepLR``; running statistics of
    batch normalisation are means over the first ten batches (see ``_Norms``).
    ``train_batches(epoch)`` gives batches of two cells or more, with labels of 0 or more.
    ``on_epoch`` is called after every epoch. On a CPU with a fixed number of threads, the same
    seed, network and batches give the same result. Nothing is printed, no file is written, and
    Ctrl-C comes out as ``KeyboardInterrupt``.

    Raises ``UserInputError`` for an unknown device, a side without cells, a batch of one cell or
    of cells without a label, or a loss that is no longer finite.
    """
    fabric = _fabric(config.device)
    with torch.random.fork_rng(devices=_cuda_devices(fabric)):
        torch.manual_seed(config.seed)
        trainer = _Trainer(fabric, net, config)
        try:
            return trainer.run(train_batches, validation_batches, on_epoch)
        finally:
            trainer.norms.restore()


def predict_batch(net: FusionNet, batch: CellBlock) -> NDArray[np.float64]:
    """Class probabilities of the cells of ``batch``, (N, n_classes) float64, rows adding to 1.

    Runs on the device of ``net``, which is put into evaluation mode. No cell: (0, n_classes).
    """
    if len(batch) == 0:
        return np.empty((0, net.shape.n_classes))
    net.eval()
    batch = batch.to(next(net.parameters()).device)
    with torch.inference_mode():
        scores = net(batch.crops, batch.features)
    probabilities: NDArray[np.float64] = torch.softmax(scores.double().cpu(), dim=1).numpy()
    return probabilities


class _Trainer:
    def __init__(self, fabric: Fabric, net: FusionNet, config: FitConfig) -> None:
        self.fabric, self.config, self.plain = fabric, config, net
        optimizer = torch.optim.Adam(
            net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        with _quiet():
            self.net, self.optimizer = fabric.setup(net, optimizer)
        self.schedule = torch.optim.lr_scheduler.StepLR(
            optimizer, step_size=config.step_size, gamma=config.gamma
        )
        self.norms = _Norms(net)
        self.loss = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    def run(
        self, train: Batches, validation: Batches, on_epoch: Callable[[EpochMetrics], None]
    ) -> FitResult:
        epochs: list[EpochMetrics] = []
        best, state = 0, _copy(self.plain)
        for number in range(self.config.max_epochs):
            epochs.append(self._epoch(number, train, validation))
            if number == 0 or epochs[-1].validation_loss < epochs[best].validation_loss:
                best, state = number, _copy(self.plain)
            on_epoch(epochs[-1])
            if number - best >= self.config.patience:
                return FitResult(state, best + 1, tuple(epochs), stopped_early=True)
        return FitResult(state, best + 1, tuple(epochs), stopped_early=False)

    def _epoch(self, number: int, train: Batches, validation: Batches) -> EpochMetrics:
        start = time.perf_counter()
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.net.train()
        trained = _mean(map(self._train, train(number)), "training", number)
        self.net.eval()
        with torch.no_grad():
            validated = _mean(map(self._measure, validation(number)), "validation", number)
        self.schedule.step()
        seconds = time.perf_counter() - start
        return EpochMetrics(number + 1, *trained, *validated, rate, seconds)

    def _train(self, batch: CellBlock) -> Tally:
        if len(batch) < 2:
            raise UserInputError("A training batch holds one cell; training needs two or more.")
        self.norms.step()
        self.optimizer.zero_grad()
        loss, tally = self._score(batch)
        self.fabric.backward(loss)
        self.optimizer.step()
        return tally

    def _measure(self, batch: CellBlock) -> Tally:
        return self._score(batch)[1]

    def _score(self, batch: CellBlock) -> tuple[Tensor, Tally]:
        batch = batch.to(self.fabric.device)
        if bool((batch.labels < 0).any()):
            raise UserInputError("Some cells to train on have no label; leave them out.")
        scores = self.net(batch.crops, batch.features)
        loss = self.loss(scores, batch.labels)
        right = (scores.argmax(dim=1) == batch.labels).sum()
        return loss, (float(loss.detach()), int(right), len(batch))


class _Norms:
    """Makes running statistics of batch normalisation plain means over the first batches.

    They start at 0 and 1 and are moving averages of rate 0.1. In a deep network what is left of
    the start multiplies over the layers, so that for a hundred steps evaluation is at chance
    however well the network has learned. A rate of 1/k at step k, down to the usual one, removes
    the start, as Adam's bias correction does. Training itself does not read these statistics.
    """

    def __init__(self, net: nn.Module) -> None:
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
        self.layers = [(m, m.momentum or 0.0) for m in net.modules() if isinstance(m, kinds)]
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        for layer, usual in self.layers:
            layer.momentum = max(1 / self.steps, usual)

    def restore(self) -> None:
        for layer, usual in self.layers:
            layer.momentum = usual


Tally = tuple[float, int, int]
"""Mean loss, number right and number of cells of a batch."""


def _mean(tallies: Iterable[Tally], side: str, epoch: int) -> tuple[float, float]:
    """Loss and accuracy per cell over all batches."""
    loss, right, cells = 0.0, 0, 0
    for batch_loss, batch_right, size in tallies:
        loss, right, cells = loss + batch_loss * size, right + batch_right, cells + size
    if cells == 0:
        raise UserInputError(
            f"There are no cells on the {side} side; segment and measure its images, or make "
            "another split."
        )
    if not math.isfinite(loss):
        raise UserInputError(
            f"The {side} loss is not finite in epoch {epoch + 1}; try a lower learning rate."
        )
    return loss / cells, right / cells


def _copy(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in net.state_dict().items()}


def _fabric(device: str) -> Fabric:
    if device not in ("auto", "cpu", "cuda"):
        raise UserInputError(f"Unknown device {device!r}; use auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserInputError("No CUDA device can be used here; choose the device cpu or auto.")
    with _quiet():
        return Fabric(accelerator=device, devices=1)


def _cuda_devices(fabric: Fabric) -> list[Any]:
    return [fabric.device] if fabric.device.type == "cuda" else []


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks about hardware and settings off the terminal."""
    logger = logging.getLogger("lightning.fabric")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
