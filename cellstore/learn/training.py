"""Training of a network, as one readable loop on Lightning Fabric."""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ..analysis.devices import pick_device
from ..errors import RunCancelledError, StorageError, UnknownNameError, UserInputError, first_line
from .branches import FLOW, IMAGE, MASK
from .crops import CROP_MEAN, CROP_STD, UNKNOWN_LABEL, CellBlock
from .networks import FusionNet

FLIPS, ROTATIONS, INTENSITY = AUGMENTATIONS = ("flips", "rotations", "intensity")

BRIGHTEST = 1.25
"""Grey values are multiplied by a factor from 1 / 1.25 to 1.25, evenly drawn on a log scale."""

_MASK_INTENSITY = 3
"""The channel of the mask crop that holds grey values."""

Move = tuple[bool, bool, bool]
"""Whether a picture is transposed, then mirrored top-bottom, then left-right."""

MOVES: tuple[Move, ...] = tuple((t, u, m) for t, u, m in product((False, True), repeat=3))
"""The eight symmetries of a square; those that do not transpose come first."""

_TURNS = (0, 5, 3, 6)
"""Positions in ``MOVES`` of no turn and of turns by 90, 180 and 270 degrees clockwise."""


def check_augmentations(kinds: Sequence[str]) -> tuple[str, ...]:
    """Return ``kinds`` in the order of ``AUGMENTATIONS``; ``UnknownNameError`` for another name."""
    for kind in kinds:
        if kind not in AUGMENTATIONS:
            raise UnknownNameError.of("augmentation", kind, AUGMENTATIONS)
    return tuple(kind for kind in AUGMENTATIONS if kind in kinds)


def augmented(cells: CellBlock, kinds: Sequence[str], entropy: Sequence[int]) -> CellBlock:
    """Return ``cells`` with their crops changed, on the device where they are.

    ``entropy`` are whole numbers of 0 or more, for example seed, epoch and step: the same numbers
    and cells give the same crops. Features, labels and ids stay.
    """
    if not kinds or not cells.crops:
        return cells
    generator = torch.Generator().manual_seed(seed_of(*entropy))
    crops = dict(cells.crops)
    moves = _drawn_moves(len(cells), kinds, generator)
    if moves is not None:
        crops = {name: _moved(stack, moves, name == FLOW) for name, stack in crops.items()}
    if INTENSITY in kinds:
        crops = {name: _brightened(stack, name, generator) for name, stack in crops.items()}
    return CellBlock(crops, cells.features, cells.labels, cells.cell_ids)


def seed_of(*entropy: int) -> int:
    """A seed of 63 bits for torch, mixed from whole numbers of 0 or more."""
    words = np.random.SeedSequence(entropy).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])


def _drawn_moves(count: int, kinds: Sequence[str], generator: torch.Generator) -> Tensor | None:
    """(N,) int64 positions in ``MOVES``, on the CPU."""
    flips, rotations = FLIPS in kinds, ROTATIONS in kinds
    if flips and rotations:
        return torch.randint(len(MOVES), (count,), generator=generator)
    if flips:
        return torch.randint(len(MOVES) // 2, (count,), generator=generator)
    if rotations:
        return torch.tensor(_TURNS)[torch.randint(len(_TURNS), (count,), generator=generator)]
    return None


def _moved(stack: Tensor, moves: Tensor, is_flow: bool) -> Tensor:
    """Crops (N, C, S, S), each moved by its own of ``MOVES``."""
    made = stack.clone()
    for place, move in enumerate(MOVES):
        chosen = torch.nonzero(moves == place).flatten()
        if place and len(chosen):
            chosen = chosen.to(stack.device)
            made[chosen] = moved(stack[chosen], move, is_flow=is_flow)
    return made


def moved(stack: Tensor, move: Move, *, is_flow: bool = False) -> Tensor:
    """Crops (N, C, S, S) moved by one symmetry; of a flow crop the hues follow."""
    transposed, upside_down, mirrored = move
    turned = stack.transpose(-1, -2) if transposed else stack
    axes = [axis for axis, wanted in ((-2, upside_down), (-1, mirrored)) if wanted]
    turned = turned.flip(axes) if axes else turned
    if not is_flow:
        return turned
    colours = _flow_colours(move).to(stack)
    hues = torch.einsum("ij,njhw->nihw", colours, turned[:, :3])
    return torch.cat([hues, turned[:, 3:]], dim=1)


def _flow_colours(move: Move) -> Tensor:
    """(3, 3): what a move makes of the red, green and blue of a flow rendering.

    Cellpose (``plot.dx_to_circ``) paints a vector (dy, dx) of length 2 m and angle a (that of
    -dy, -dx) as m (1 + cos(a + k 2 pi / 3)) for k of 0, 1, 2: linear in m, m cos(a) and m sin(a).
    A move of the picture is a linear map of (dy, dx), hence of the colours. White stays white, so
    it holds for crops normalised alike in all channels, too.
    """
    transposed, upside_down, mirrored = move
    vectors = torch.eye(2, dtype=torch.float64)
    if transposed:
        vectors = vectors.flip(0)
    signs = torch.tensor([-1.0 if upside_down else 1.0, -1.0 if mirrored else 1.0])
    change = torch.eye(3, dtype=torch.float64)
    change[1:, 1:] = signs.double()[:, None] * vectors
    angles = torch.arange(3, dtype=torch.float64) * (2 * math.pi / 3)
    paint = torch.stack([torch.ones(3, dtype=torch.float64), angles.cos(), -angles.sin()], dim=1)
    colours: Tensor = paint @ change @ torch.linalg.inv(paint)
    return colours


def _brightened(stack: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Grey values times a factor of the cell, and for the image branch of the channel, too."""
    if name not in (MASK, IMAGE):
        return stack
    first = 0 if name == IMAGE else _MASK_INTENSITY
    grey = stack[:, first:]
    drawn = torch.rand((*grey.shape[:2], 1, 1), generator=generator)
    factors = torch.exp((2 * drawn - 1) * math.log(BRIGHTEST)).to(stack)
    values = (grey * CROP_STD + CROP_MEAN).mul(factors).clamp(0, 1)
    return torch.cat([stack[:, :first], (values - CROP_MEAN) / CROP_STD], dim=1)


CROSS_ENTROPY, FOCAL = LOSSES = ("cross-entropy", "focal")

FOCUS = 2.0
"""The exponent of the focal loss (Lin et al. 2017)."""


def balanced_weights(cells: Sequence[int]) -> tuple[float, ...]:
    """The weight of each class for ``cells`` of it: all cells / (classes * cells of the class).

    As scikit-learn's ``class_weight="balanced"``, over the classes that have cells. A class
    without cells gets 1.
    """
    there = sum(1 for count in cells if count)
    return tuple(sum(cells) / (there * count) if count else 1.0 for count in cells)


def make_loss(
    kind: str, smoothing: float, weights: Sequence[float] | None = None
) -> nn.CrossEntropyLoss | FocalLoss:
    """The loss of class scores (N, K) and class indices (N,): its mean, weighted by class.

    Cells of ``UNKNOWN_LABEL`` do not count. Raises ``UnknownNameError`` for another kind.
    """
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float32)
    if kind == CROSS_ENTROPY:
        return nn.CrossEntropyLoss(
            weight=weight, ignore_index=UNKNOWN_LABEL, label_smoothing=smoothing
        )
    if kind == FOCAL:
        return FocalLoss(smoothing, weight)
    raise UnknownNameError.of("loss", kind, LOSSES)


class FocalLoss(nn.Module):
    """Cross-entropy in which a class counts less the surer the network is of it.

    The mean over cells of sum over k of q_k w_k (1 - p_k) ** 2 (-log p_k): q is the smoothed
    label, w the weights, p the probabilities. Weighted as torch's ``CrossEntropyLoss`` is, to
    which it is equal with an exponent of 0.
    """

    weight: Tensor | None

    def __init__(self, smoothing: float, weight: Tensor | None, focus: float = FOCUS) -> None:
        super().__init__()
        self.smoothing, self.focus = smoothing, focus
        self.register_buffer("weight", weight)

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar."""
        known = labels != UNKNOWN_LABEL
        places = torch.where(known, labels, 0)  # picking rows would wait for an accelerator
        logs = torch.log_softmax(scores.float(), dim=1)
        target = torch.full_like(logs, self.smoothing / scores.shape[1])
        target[torch.arange(len(labels), device=labels.device), places] += 1 - self.smoothing
        weight = torch.ones_like(logs[0]) if self.weight is None else self.weight
        each = (target * weight * (1 - logs.exp()) ** self.focus * -logs).sum(dim=1)
        return (each * known).sum() / (weight[places] * known).sum()


STEP, COSINE, CONSTANT = SCHEDULES = ("step", "cosine", "constant")


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes over ``epochs`` epochs.

    ``step``: times ``gamma`` after every ``step_size`` epochs, as torch's ``StepLR``. ``cosine``:
    from 1 to 0 along half a cosine (Loshchilov and Hutter 2017), over the epochs after the
    warm-up. ``constant``: as it is. In ``warmup`` epochs it rises to that in equal steps.
    """

    kind: str = STEP
    epochs: int = 50
    warmup: int = 0
    step_size: int = 5
    gamma: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UnknownNameError.of("schedule", self.kind, SCHEDULES)
        if not 0 <= self.warmup < self.epochs:
            raise UserInputError(
                f"The warm-up must be shorter than the training: {self.warmup} of "
                f"{self.epochs} epochs are not. Give fewer epochs of warm-up, or more in all."
            )

    def factor(self, epoch: int) -> float:
        """What the learning rate is multiplied by in an epoch, counted from 0."""
        rise = min(1.0, (epoch + 1) / (self.warmup + 1))
        if self.kind == STEP:
            return rise * self.gamma ** (epoch // self.step_size)
        if self.kind == COSINE and epoch >= self.warmup:
            done = (epoch - self.warmup) / (self.epochs - self.warmup)
            return (1 + math.cos(math.pi * done)) / 2
        return rise


PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
"""What Lightning calls them: mixed precision keeps the weights in 32 bits."""

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes that train one network together; of most trainings, this one alone."""

    fabric: Fabric

    @property
    def size(self) -> int:
        """How many there are, on all hosts."""
        return self.fabric.world_size

    @property
    def rank(self) -> int:
        """The number of this one, from 0."""
        return self.fabric.global_rank

    @property
    def is_first(self) -> bool:
        """Whether this one writes what is written."""
        return self.rank == 0

    @property
    def device(self) -> str:
        """Where this one computes, as torch names it."""
        return str(self.fabric.device)

    def leave(self) -> None:
        """End the connection to the others."""
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def of_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, on every one of them; its errors end them all.

        Raises ``RunCancelledError`` on the others when the first fails.
        """
        if self.size == 1:
            return make()
        made: T | None = None
        error: BaseException | None = None
        if self.is_first:
            try:
                made = make()
            except BaseException as raised:
                error = raised
        told: Any = self.fabric.broadcast((made, error and (str(error) or "it stopped")))
        if error is not None:
            raise error
        if told[1] is not None:
            raise RunCancelledError(f"The first process of this training ended: {told[1]}")
        answer: T = told[0]
        return answer


def is_first() -> bool:
    """Whether this process is the first of those that trained together last, or was alone."""
    return getattr(rank_zero_only, "rank", 0) in (None, 0)


def open_fabric(device: str, precision: str = "32", devices: int = 1) -> Fabric:
    """Return the Fabric of this process; the others, if any, have been started when it is back.

    ``devices`` are those of this host; under torchrun or SLURM it has to be what they say, or 1,
    which leaves it to them.

    Raises ``UserInputError`` for a device, precision or number of devices that is not there.
    """
    check_device(device, precision, devices)
    here, hosts = _from_environment() or (devices, 1)
    if devices not in (1, here):
        raise UserInputError(
            f"There are {here} processes on this host already, for as many devices; leave "
            f"--devices {devices} out."
        )
    strategy = "ddp" if here * hosts > 1 else "auto"
    try:
        with quiet():
            fabric = Fabric(
                accelerator=pick_device(device).type,
                devices=here,
                num_nodes=hosts,
                strategy=strategy,
                precision=PRECISIONS[precision],
            )
            fabric.launch()
    except MisconfigurationException as error:  # for example in a notebook
        raise UserInputError(
            f"{here * hosts} processes cannot train together here ({first_line(error)}). Run the "
            "command cellstore train, or a script, or use one device."
        ) from error
    return fabric


def check_device(device: str, precision: str, devices: int) -> None:
    """Raise ``UserInputError`` for a device, precision or number of devices that is not there."""
    on_cuda = pick_device(device).type == "cuda"
    if precision not in PRECISIONS:
        raise UnknownNameError.of("precision", precision, PRECISIONS)
    if precision == "16" and not on_cuda:
        raise UserInputError("Precision 16 needs a GPU; on a CPU use bf16, or 32 (the default).")
    if precision == "bf16" and on_cuda and not torch.cuda.is_bf16_supported():
        raise UserInputError("This GPU cannot compute in bf16; use precision 16 or 32.")
    if devices < 1:
        raise UserInputError(f"There must be one device or more, not {devices}.")
    if on_cuda and devices > torch.cuda.device_count():
        raise UserInputError(
            f"There are {torch.cuda.device_count()} GPUs here, not {devices}; give --devices "
            f"{torch.cuda.device_count()}, or --device cpu."
        )


def _from_environment() -> tuple[int, int] | None:
    """Processes of each host, and hosts, where a launcher has started the processes."""
    if TorchElasticEnvironment.detect():
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return here, int(os.environ["WORLD_SIZE"]) // here
    with quiet():
        under_slurm = SLURMEnvironment.detect()
    if under_slurm:
        hosts = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ["SLURM_NTASKS"]) // hosts, hosts
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's remarks about hardware and settings off the terminal."""
    # Both: which of the two speaks depends on what of Lightning was imported.
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("fabric", "pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_HEADER = "cellstore"


@dataclass(frozen=True)
class TrainingState:
    """Tensors (on the CPU) by name, and a record of plain JSON values."""

    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """The file; the record stands in its header."""
        text = json.dumps(dict(self.record), sort_keys=True)
        whole = {name: value.contiguous() for name, value in self.tensors.items()}
        return save_tensors(whole, {_HEADER: text})

    @classmethod
    def from_bytes(cls, data: bytes) -> TrainingState:
        """The state in a file; no code in it is run. Raises ``StorageError`` if it is damaged."""
        try:
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])
            return cls(load_tensors(data), json.loads(header["__metadata__"][_HEADER]))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"The state of a training is damaged ({first_line(error)}). Check the store with "
                "'cellstore verify', and train anew with --force."
            ) from error

    def beside(self, record: Mapping[str, Any]) -> TrainingState:
        """The same state with more in its record."""
        return TrainingState(self.tensors, {**self.record, **record})

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix`` and a dot, without both."""
        start = f"{prefix}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}


Batches = Callable[[int], Iterable[CellBlock]]
"""The batches of an epoch, counted from 0."""

LOSS, ACCURACY = MONITORS = ("loss", "accuracy")
"""What of the validation side says which epoch is the best."""


@dataclass(frozen=True)
class FitConfig:
    """How to train. Defaults are the published ones, but ``max_epochs`` and ``patience``.

    The study stopped after 13 epochs by early stopping and does not give its patience.
    ``schedule``, ``warmup_epochs``, ``step_size`` and ``gamma`` decide the learning rate of each
    epoch (:class:`~cellstore.learn.training.Schedule`), ``loss`` and ``class_weights`` (one for
    each class) what is made small, ``augment`` how crops are changed at each step
    (:mod:`~cellstore.learn.training`). ``monitor`` of the validation side chooses the epoch.
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

    ``fabric``: of several processes (:func:`~cellstore.learn.training.open_fabric`), each of which
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
