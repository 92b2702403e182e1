"""Training of a network: loss, learning rate, the processes that train together, loop."""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from ..analysis.segmentation import pick_device
from ..config import TrainParams
from ..errors import (
    RunCancelledError,
    StorageError,
    UserInputError,
    first_line,
)
from .augmentation import augmented, seed_of
from .crops import UNKNOWN_LABEL, CellBlock
from .networks import FusionNet

T = TypeVar("T")


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

    Cells of ``UNKNOWN_LABEL`` do not count.
    """
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float32)
    if kind == "focal":
        return FocalLoss(smoothing, weight)
    return nn.CrossEntropyLoss(weight=weight, ignore_index=UNKNOWN_LABEL, label_smoothing=smoothing)


class FocalLoss(nn.Module):
    """Cross-entropy in which a class counts less the surer the network is of it.

    The mean over cells of sum over k of q_k w_k (1 - p_k) ** 2 (-log p_k): q is the smoothed
    label, w the weights, p the probabilities (Lin et al. 2017). Weighted as torch's
    ``CrossEntropyLoss`` is, to which it is equal with an exponent, ``focus``, of 0.
    """

    weight: Tensor | None

    def __init__(self, smoothing: float, weight: Tensor | None, focus: float = 2.0) -> None:
        super().__init__()
        self.smoothing, self.focus = smoothing, focus
        self.register_buffer("weight", weight)

    def forward(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The loss, a scalar."""
        known = labels != UNKNOWN_LABEL
        index = torch.where(known, labels, 0)  # picking rows would wait for an accelerator
        logs = torch.log_softmax(scores.float(), dim=1)
        target = torch.full_like(logs, self.smoothing / scores.shape[1])
        target[torch.arange(len(labels), device=labels.device), index] += 1 - self.smoothing
        weight = torch.ones_like(logs[0]) if self.weight is None else self.weight
        each = (target * weight * (1 - logs.exp()) ** self.focus * -logs).sum(dim=1)
        return (each * known).sum() / (weight[index] * known).sum()


def rate_factor(params: TrainParams, epoch: int) -> float:
    """What the learning rate is multiplied by in an epoch, counted from 0.

    ``step``: times ``gamma`` after every ``step_size`` epochs, as torch's ``StepLR``. ``cosine``:
    from 1 to 0 along half a cosine (Loshchilov and Hutter 2017), over the epochs after the
    warm-up. ``constant``: as it is. In the warm-up it rises to that in equal steps.
    """
    rise = min(1.0, (epoch + 1) / (params.warmup_epochs + 1))
    if params.schedule == "step":
        return rise * params.gamma ** (epoch // params.step_size)
    if params.schedule == "cosine" and epoch >= params.warmup_epochs:
        done = (epoch - params.warmup_epochs) / (params.epochs - params.warmup_epochs)
        return (1 + math.cos(math.pi * done)) / 2
    return rise


class Team(Fabric):
    """The processes that train one network together; of most trainings, this one alone."""

    @classmethod
    def open(cls, device: str, precision: str = "32", devices: int = 1) -> Team:
        """Return the team of this process; the others, if any, have been started when it is back.

        ``devices`` are those of this host; under torchrun or SLURM it has to be what they say, or
        1, which leaves it to them.
        """
        check_device(device, precision, devices)
        with quiet():
            under_slurm = SLURMEnvironment.detect()
        here, hosts = devices, 1
        if TorchElasticEnvironment.detect():
            here = int(os.environ["LOCAL_WORLD_SIZE"])
            hosts = int(os.environ["WORLD_SIZE"]) // here
        elif under_slurm:
            hosts = int(os.environ.get("SLURM_NNODES", "1"))
            here = int(os.environ["SLURM_NTASKS"]) // hosts
        if devices not in (1, here):
            raise UserInputError(
                f"There are {here} processes on this host already, for as many devices; leave "
                f"--devices {devices} out."
            )
        # Mixed precision keeps the weights in 32 bits.
        kinds: Mapping[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
        try:
            with quiet():
                team = cls(
                    accelerator=pick_device(device).type,
                    devices=here,
                    num_nodes=hosts,
                    strategy="ddp" if here * hosts > 1 else "auto",
                    precision=kinds[precision],
                )
                team.launch()
        except MisconfigurationException as error:  # for example in a notebook
            raise UserInputError(
                f"{here * hosts} processes cannot train together here ({first_line(error)}). Run "
                "the command cellstore train, or a script, or use one device."
            ) from error
        return team

    def leave(self) -> None:
        """End the connection to the others."""
        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def of_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, on every one of them; its errors end them all."""
        if self.world_size == 1:
            return make()
        made: T | None = None
        error: BaseException | None = None
        if self.is_global_zero:
            try:
                made = make()
            except BaseException as raised:
                error = raised
        sent: Any = self.broadcast((made, error and (str(error) or "it stopped")))
        if error is not None:
            raise error
        if sent[1] is not None:
            raise RunCancelledError(f"The first process of this training ended: {sent[1]}")
        answer: T = sent[0]
        return answer


def is_first() -> bool:
    """Whether this process is the first of those that trained together last, or was alone."""
    return getattr(rank_zero_only, "rank", 0) in (None, 0)


def check_device(device: str, precision: str, devices: int) -> None:
    """Raise ``UserInputError`` for a device, precision or number of devices that is not there."""
    on_cuda = pick_device(device).type == "cuda"
    if precision == "16" and not on_cuda:
        raise UserInputError("Precision 16 needs a GPU; on a CPU use bf16, or 32 (the default).")
    if precision == "bf16" and on_cuda and not torch.cuda.is_bf16_supported():
        raise UserInputError("This GPU cannot compute in bf16; use precision 16 or 32.")
    if on_cuda and devices > torch.cuda.device_count():
        raise UserInputError(
            f"There are {torch.cuda.device_count()} GPUs here, not {devices}; give --devices "
            f"{torch.cuda.device_count()}, or --device cpu."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's remarks about hardware and settings off the terminal."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@dataclass(frozen=True)
class TrainingState:
    """All that a training needs to be resumed: tensors (on the CPU) by name, and plain values."""

    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        """Return a safetensors file; the record stands in its header."""
        text = json.dumps(dict(self.record), sort_keys=True)
        whole = {name: value.contiguous() for name, value in self.tensors.items()}
        return save_tensors(whole, {"cellstore": text})

    @classmethod
    def from_bytes(cls, data: bytes) -> TrainingState:
        """Return the state in a file; no code in it is run."""
        try:
            size = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + size])
            return cls(load_tensors(data), json.loads(header["__metadata__"]["cellstore"]))
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise StorageError(
                f"The state of a training is damaged ({first_line(error)}). Check the store with "
                "'cellstore verify', and train again with --force."
            ) from error

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix`` and a dot, without both."""
        start = f"{prefix}."
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch, counted from 1. Losses are per cell, accuracies shares of cells.

    Those of validation are ``None`` where no image validates.

    Training numbers are those of the batches as they were trained on: with dropout, and while
    the network changed. ``learning_rate`` is the one the epoch used.
    """

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    learning_rate: float
    seconds: float


BatchesOf = Callable[[int], Iterable[CellBlock]]
"""The batches of an epoch, counted from 0."""


class Training:
    """A network that is being trained, in place; iterate over :meth:`run` for its epochs.

    ``epochs`` are those that are over, ``best`` the index of the best by ``params.monitor``, and
    ``best_state`` its tensors (on the CPU). Of several processes each makes one of these, with
    batches of its own cells, as many of them as the others have; metrics are those of all cells.
    """

    def __init__(
        self,
        net: FusionNet,
        params: TrainParams,
        team: Team,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        self.net, self.params, self.team = net, params, team
        self.adam = torch.optim.Adam(
            net.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay
        )
        with quiet():
            self.wrapped, self.optimizer = team.setup(net, self.adam)
        self.loss = make_loss(params.loss, params.label_smoothing, class_weights)
        self.loss.to(team.device)
        self.epochs: list[EpochMetrics] = []
        self.best, self.best_state = 0, dict[str, Tensor]()
        self.steps = 0

    def run(
        self,
        train_batches: BatchesOf,
        validation_batches: BatchesOf | None,
        on_step: Callable[[int, int], None] = lambda _epoch, _step: None,
    ) -> Generator[EpochMetrics, None, None]:
        """Train until no epoch is better than the best for ``patience`` epochs; yield each epoch.

        Without ``validation_batches`` nothing stops it before the last epoch, which is the best.

        Adam on the loss, which is that of validation, too. ``train_batches`` has batches of two
        cells or more, with labels of 0 or more. ``on_step`` gets the numbers of the epoch and the
        step, from 0, after every training batch. On a CPU with a fixed number of threads, the same
        seed, network and batches give the same result: random numbers of an epoch depend on the
        seed and the epoch only; they are torch's own, so threads of one process must not train at
        once.
        """
        team, params, rank = self.team, self.params, self.team.global_rank
        # Running statistics of batch normalisation start at 0 and 1 and are moving averages of
        # rate 0.1. In a deep network what is left of the start multiplies over the layers, so that
        # for a hundred steps evaluation is at chance however well the network has learned. A rate
        # of 1/k at step k, down to the usual one, removes the start, as Adam's bias correction
        # does. Training itself does not read these statistics.
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
        norms = [(m, m.momentum or 0.0) for m in self.net.modules() if isinstance(m, kinds)]
        on_gpu: list[Any] = [team.device] if team.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=on_gpu):
                while len(self.epochs) < params.epochs and not self.stopped_early:
                    number, began = len(self.epochs), time.perf_counter()
                    torch.manual_seed(seed_of(params.seed, number, rank))
                    rate = params.learning_rate * rate_factor(params, number)
                    for group in self.adam.param_groups:
                        group["lr"] = rate

                    self.wrapped.train()
                    sums = torch.zeros(5, dtype=torch.float64, device=team.device)
                    for step, cells in enumerate(train_batches(number)):
                        if len(cells) < 2:
                            raise UserInputError(
                                "A training batch holds one cell; training needs two or more."
                            )
                        seen = augmented(
                            cells.to(team.device),
                            params.augment,
                            (params.seed, number, step, rank),
                        )
                        self.steps += 1
                        for layer, usual in norms:
                            layer.momentum = max(1 / self.steps, usual)
                        self.optimizer.zero_grad()
                        loss, counts = self._loss(self.wrapped, seen)
                        team.backward(loss)
                        self.optimizer.step()
                        sums += counts
                        on_step(number, step)
                    trained = self._mean(sums, "training")

                    if team.world_size > 1:  # all keep the running statistics of the first process
                        for value in self.net.buffers():
                            torch.distributed.broadcast(value, 0)
                    self.wrapped.eval()
                    # Wrapped for several processes, a network waits for the others at each batch,
                    # and they may have fewer.
                    alone = team.world_size == 1
                    net = self.wrapped if alone else self.net
                    sums = torch.zeros(5, dtype=torch.float64, device=team.device)
                    with torch.no_grad(), nullcontext() if alone else team.autocast():
                        for cells in validation_batches(number) if validation_batches else ():
                            sums += self._loss(net, cells.to(team.device))[1]
                    validated: tuple[float | None, float | None] = (None, None)
                    if validation_batches:
                        validated = self._mean(sums, "validation")

                    seconds = time.perf_counter() - began
                    epoch = EpochMetrics(number + 1, *trained, *validated, rate, seconds)
                    self.epochs.append(epoch)
                    if _better(epoch, self.epochs[self.best], params.monitor) or number == 0:
                        self.best, self.best_state = number, _copy(self.net)
                    yield epoch
        finally:
            for layer, usual in norms:
                layer.momentum = usual

    @property
    def stopped_early(self) -> bool:
        """Whether there was no better epoch for as long as patience lasts."""
        return len(self.epochs) - 1 - self.best >= self.params.patience

    def _loss(self, net: Any, cells: CellBlock) -> tuple[Tensor, Tensor]:
        """The loss, and what :meth:`_mean` needs, so that nothing waits for an accelerator."""
        scores, labels = net(cells.crops, cells.features), cells.labels
        loss, weights = self.loss(scores, labels), self.loss.weight
        known = labels >= 0
        weight = known.sum()
        if weights is not None:
            weight = (weights[torch.where(known, labels, 0)] * known).sum()
        right = (scores.argmax(dim=1) == labels).sum()
        parts = (loss.detach().double() * weight, weight, right, known.sum(), (~known).sum())
        return loss, torch.stack([part.double() for part in parts])

    def _mean(self, sums: Tensor, subset: str) -> tuple[float, float]:
        """Loss and accuracy per cell over all batches of all processes."""
        if self.team.world_size > 1:
            torch.distributed.all_reduce(sums)
        loss, weight, right, cells, unknown = sums.tolist()
        if unknown:
            raise UserInputError("Some cells to train on have no label; exclude them.")
        if cells == 0:
            raise UserInputError(
                f"There are no cells in the {subset} subset; segment and measure its images, or "
                "make another split."
            )
        if not math.isfinite(loss):
            raise UserInputError(
                f"The {subset} loss is not finite in epoch {len(self.epochs) + 1}; try a lower "
                "learning rate."
            )
        return loss / weight, right / cells

    def state(self, **more: Any) -> TrainingState:
        """What :meth:`resume` needs to go on after the last epoch as if there had been no break."""
        tensors = {f"net.{name}": value for name, value in _copy(self.net).items()}
        if self.best != len(self.epochs) - 1:
            tensors |= {f"best.{name}": value for name, value in self.best_state.items()}
        for index, values in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": _to_cpu(value) for name, value in values.items()}
        record = {
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best": self.best,
            "steps": self.steps,
            "precision": self.team.strategy.precision.state_dict(),
        }
        return TrainingState(tensors, record | more)

    def resume(self, state: TrainingState) -> None:
        """Resume from ``state``; raises ``StorageError`` if it is of another network."""
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in state.part("adam").items():
            index, _, what = name.partition(".")
            moments.setdefault(int(index), {})[what] = value
        groups = self.adam.state_dict()["param_groups"]
        try:
            self.net.load_state_dict(state.part("net"))
            self.adam.load_state_dict({"state": moments, "param_groups": groups})
            self.epochs = [EpochMetrics(**epoch) for epoch in state.record["epochs"]]
            self.best, self.steps = state.record["best"], state.record["steps"]
            self.team.strategy.precision.load_state_dict(state.record["precision"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"The state of a training is of another network ({first_line(error)}). Train "
                "again with --force."
            ) from error
        self.best_state = state.part("best") or _copy(self.net)


def _better(epoch: EpochMetrics, best: EpochMetrics, monitor: str) -> bool:
    """Whether an epoch is better than the best before it; the last one, where none validates."""
    loss, accuracy = epoch.validation_loss, epoch.validation_accuracy
    if loss is None or accuracy is None:
        return True
    if monitor == "accuracy":
        return accuracy > (best.validation_accuracy or 0.0)
    return best.validation_loss is None or loss < best.validation_loss


def _copy(net: nn.Module) -> dict[str, Tensor]:
    return {name: _to_cpu(value) for name, value in net.state_dict().items()}


def _to_cpu(value: Tensor) -> Tensor:
    return value.detach().cpu().clone()
