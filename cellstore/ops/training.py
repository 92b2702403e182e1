"""Training of a network, as one readable loop on Lightning Fabric."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from cellstore.errors import (
    RunCancelledError,
    StorageError,
    UnknownNameError,
    UserInputError,
    first_line,
)
from cellstore.ops.augmentation import augmented, check_augmentations, seed_of
from cellstore.ops.crops import CellBlock
from cellstore.ops.nets import FusionNet
from cellstore.ops.objectives import CROSS_ENTROPY, make_loss
from cellstore.ops.schedules import STEP, Schedule
from cellstore.ops.teams import open_fabric, quiet
from cellstore.ops.training_state import TrainingState

Batches = Callable[[int], Iterable[CellBlock]]
"""The batches of an epoch, counted from 0."""

LOSS, ACCURACY = MONITORS = ("loss", "accuracy")
"""What of the validation side says which epoch is the best."""


@dataclass(frozen=True)
class FitConfig:
    """How to train. Defaults are the published ones, but ``max_epochs`` and ``patience``.

    The study stopped after 13 epochs by early stopping and does not give its patience.
    ``schedule``, ``warmup_epochs``, ``step_size`` and ``gamma`` decide the learning rate of each
    epoch (:class:`~cellstore.ops.schedules.Schedule`), ``loss`` and ``class_weights`` (one for
    each class) what is made small, ``augment`` how crops are changed at each step
    (:mod:`~cellstore.ops.augmentation`). ``monitor`` of the validation side chooses the epoch.
    ``device`` is ``auto``, ``cpu`` or ``cuda``, ``precision`` ``32``, ``bf16`` or ``16``.
    ``compile``: the network is compiled first. ``batch_size`` is for whoever makes the batches.
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
    schedule: str = STEP
    warmup_epochs: int = 0
    loss: str = CROSS_ENTROPY
    class_weights: tuple[float, ...] | None = None
    augment: tuple[str, ...] = ()
    monitor: str = LOSS
    precision: str = "32"
    compile: bool = False

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
        if self.monitor not in MONITORS:
            raise UnknownNameError.of("monitor", self.monitor, MONITORS)
        check_augmentations(self.augment)
        make_loss(self.loss, self.label_smoothing, self.class_weights)
        self.rates  # noqa: B018 - an unknown schedule is refused here, not in the first epoch

    @property
    def rates(self) -> Schedule:
        """How the learning rate goes."""
        return Schedule(
            self.schedule, self.max_epochs, self.warmup_epochs, self.step_size, self.gamma
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
    """The tensors (on the CPU) of the best epoch by ``FitConfig.monitor``, and all epochs."""

    state: dict[str, Tensor]
    best_epoch: int
    epochs: tuple[EpochMetrics, ...]
    stopped_early: bool


Snapshot = Callable[[], TrainingState]
"""Gives what :func:`fit` needs to go on from here."""

OnEpoch = Callable[[EpochMetrics, Snapshot], None]


def fit(
    net: FusionNet,
    train_batches: Batches,
    validation_batches: Batches,
    config: FitConfig,
    on_epoch: OnEpoch = lambda _, __: None,
    *,
    on_step: Callable[[], None] = lambda: None,
    start: TrainingState | None = None,
    fabric: Fabric | None = None,
) -> FitResult:
    """Train ``net`` in place until the monitor is no better for ``config.patience`` epochs.

    Adam on the loss (which is that of validation, too); running statistics of batch normalisation
    are means over the first ten batches (see ``_Norms``). ``train_batches(epoch)`` gives batches
    of two cells or more, with labels of 0 or more. ``on_step`` is called after every training
    batch, ``on_epoch`` after every epoch; what the latter's snapshot gives is a ``start`` from
    which the rest of the epochs comes out as if there had been no break. On a CPU with a fixed
    number of threads, the same seed, network and batches give the same result: random numbers of
    an epoch depend on the seed and the epoch only; they are torch's own, so threads of one process
    must not train at once. Nothing is printed, no file is written, and Ctrl-C comes out as
    ``KeyboardInterrupt``.

    ``fabric``: of several processes (:func:`~cellstore.ops.teams.open_fabric`), each of which
    calls this with batches of its own cells, as many of them as the others have; only the first
    calls ``on_epoch``. Metrics are those of all cells, on every process.

    Raises ``UserInputError`` for an unknown device, a precision that is not possible, a side
    without cells, a batch of one cell or of cells without a label, or a loss that is no longer
    finite; ``StorageError`` for a ``start`` of another network.
    """
    fabric = fabric or open_fabric(config.device, config.precision)
    with torch.random.fork_rng(devices=_cuda_devices(fabric)):
        trainer = _Trainer(fabric, net, config)
        if start is not None:
            trainer.restore(start)
        try:
            return trainer.run(train_batches, validation_batches, on_epoch, on_step)
        except Exception as error:
            raise _explained(error, config) from error
        finally:
            trainer.norms.restore()


def _explained(error: Exception, config: FitConfig) -> Exception:
    if config.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return UserInputError(
            f"The network cannot be compiled here ({first_line(error)}). Leave --compile out."
        )
    return error


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
        self.adam = torch.optim.Adam(
            net.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        module: Any = torch.compile(net) if config.compile else net
        with quiet():
            self.net, self.optimizer = fabric.setup(module, self.adam)
        self.norms = _Norms(net)
        self.loss = make_loss(config.loss, config.label_smoothing, config.class_weights)
        self.loss.to(fabric.device)
        self.epochs: list[EpochMetrics] = []
        self.best, self.best_state = 0, dict[str, Tensor]()

    def run(
        self,
        train: Batches,
        validation: Batches,
        on_epoch: OnEpoch,
        on_step: Callable[[], None],
    ) -> FitResult:
        while len(self.epochs) < self.config.max_epochs and not self._has_waited():
            number = len(self.epochs)
            self.epochs.append(self._epoch(number, train, validation, on_step))
            if number == 0 or self._is_better(self.epochs[-1], self.epochs[self.best]):
                self.best, self.best_state = number, _copy(self.plain)
            self._tell(on_epoch)
        return FitResult(
            self.best_state, self.best + 1, tuple(self.epochs), stopped_early=self._has_waited()
        )

    def _has_waited(self) -> bool:
        """Whether there was no better epoch for as long as patience lasts."""
        return len(self.epochs) - 1 - self.best >= self.config.patience

    def _is_better(self, epoch: EpochMetrics, other: EpochMetrics) -> bool:
        if self.config.monitor == ACCURACY:
            return epoch.validation_accuracy > other.validation_accuracy
        return epoch.validation_loss < other.validation_loss

    def _epoch(
        self, number: int, train: Batches, validation: Batches, on_step: Callable[[], None]
    ) -> EpochMetrics:
        start = time.perf_counter()
        torch.manual_seed(seed_of(self.config.seed, number, self.fabric.global_rank))
        rate = self.config.learning_rate * self.config.rates.factor(number)
        for group in self.adam.param_groups:
            group["lr"] = rate
        trained = self._mean(self._trained(number, train(number), on_step), "training")
        self._share_running_statistics()
        validated = self._mean(self._validated(validation(number)), "validation")
        return EpochMetrics(number + 1, *trained, *validated, rate, time.perf_counter() - start)

    def _trained(
        self, number: int, batches: Iterable[CellBlock], on_step: Callable[[], None]
    ) -> Iterable[Tensor]:
        self.net.train()
        for step, batch in enumerate(batches):
            if len(batch) < 2:
                raise UserInputError("A training batch holds one cell; training needs two or more.")
            entropy = (self.config.seed, number, step, self.fabric.global_rank)
            seen = augmented(batch.to(self.fabric.device), self.config.augment, entropy)
            self.norms.step()
            self.optimizer.zero_grad()
            loss, tally = self._scored(self.net, seen)
            self.fabric.backward(loss)
            self.optimizer.step()
            yield tally
            on_step()

    def _validated(self, batches: Iterable[CellBlock]) -> Iterable[Tensor]:
        # Wrapped for several processes, a network waits for the others at each batch, and they
        # may have fewer.
        alone = self.fabric.world_size == 1
        net = self.net if alone else self.plain
        self.net.eval()
        with torch.no_grad(), nullcontext() if alone else self.fabric.autocast():
            for batch in batches:
                yield self._scored(net, batch.to(self.fabric.device))[1]

    def _scored(self, net: Any, batch: CellBlock) -> tuple[Tensor, Tensor]:
        """The loss, and what :meth:`_mean` adds up: nothing is waited for on an accelerator."""
        scores, labels = net(batch.crops, batch.features), batch.labels
        loss = self.loss(scores, labels)
        known = labels >= 0
        weights = self.loss.weight
        weight = known.sum()
        if weights is not None:
            weight = (weights[torch.where(known, labels, 0)] * known).sum()
        right = (scores.argmax(dim=1) == labels).sum()
        parts = (loss.detach().double() * weight, weight, right, known.sum(), (~known).sum())
        return loss, torch.stack([part.double() for part in parts])

    def _mean(self, tallies: Iterable[Tensor], side: str) -> tuple[float, float]:
        """Loss and accuracy per cell over all batches of all processes."""
        total = torch.zeros(5, dtype=torch.float64, device=self.fabric.device)
        for tally in tallies:
            total += tally
        if self.fabric.world_size > 1:
            torch.distributed.all_reduce(total)
        loss, weight, right, cells, unknown = total.tolist()
        if unknown:
            raise UserInputError("Some cells to train on have no label; leave them out.")
        if cells == 0:
            raise UserInputError(
                f"There are no cells on the {side} side; segment and measure its images, or make "
                "another split."
            )
        if not math.isfinite(loss):
            raise UserInputError(
                f"The {side} loss is not finite in epoch {len(self.epochs) + 1}; try a lower "
                "learning rate."
            )
        return loss / weight, right / cells

    def _share_running_statistics(self) -> None:
        """Give every process those of the first, with which the network is kept."""
        if self.fabric.world_size > 1:
            for value in self.plain.buffers():
                torch.distributed.broadcast(value, 0)

    def _tell(self, on_epoch: OnEpoch) -> None:
        error: BaseException | None = None
        if self.fabric.is_global_zero:
            try:
                on_epoch(self.epochs[-1], self.snapshot)
            except BaseException as raised:
                error = raised
        if self.fabric.world_size > 1 and self.fabric.broadcast(error is not None):
            error = error or RunCancelledError("The first process of this training has stopped.")
        if error is not None:
            raise error

    def snapshot(self) -> TrainingState:
        tensors = {f"net.{name}": value for name, value in _copy(self.plain).items()}
        if self.best != len(self.epochs) - 1:
            tensors |= {f"best.{name}": value for name, value in self.best_state.items()}
        for place, values in self.adam.state_dict()["state"].items():
            kept = {f"adam.{place}.{name}": _to_cpu(value) for name, value in values.items()}
            tensors |= kept
        record = {
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best": self.best,
            "norm_steps": self.norms.steps,
            "precision": self.fabric.strategy.precision.state_dict(),
        }
        return TrainingState(tensors, record)

    def restore(self, state: TrainingState) -> None:
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.part("adam").items():
            place, _, what = name.partition(".")
            moments.setdefault(int(place), {})[what] = value
        groups = self.adam.state_dict()["param_groups"]
        try:
            self.plain.load_state_dict(state.part("net"))
            self.adam.load_state_dict({"state": moments, "param_groups": groups})
            self.epochs = [EpochMetrics(**epoch) for epoch in state.record["epochs"]]
            self.best, self.norms.steps = state.record["best"], state.record["norm_steps"]
            self.fabric.strategy.precision.load_state_dict(state.record["precision"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"The state of a training is of another network ({first_line(error)}). Train "
                "anew with --force."
            ) from error
        self.best_state = state.part("best") or _copy(self.plain)


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


def _copy(net: nn.Module) -> dict[str, Tensor]:
    return {name: _to_cpu(value) for name, value in net.state_dict().items()}


def _to_cpu(value: Tensor) -> Tensor:
    return value.detach().cpu().clone()


def _cuda_devices(fabric: Fabric) -> list[Any]:
    return [fabric.device] if fabric.device.type == "cuda" else []
