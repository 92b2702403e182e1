"""The devices that train one network: one process for each, also on several hosts.

Lightning Fabric finds out where it runs. On one host it starts the other processes itself, by
running the same command again for each; under torchrun, SLURM and the like they are there already,
and how many there are is said by their environment.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only

from cellstore.errors import RunCancelledError, UnknownNameError, UserInputError, first_line
from cellstore.ops.devices import pick_device

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
