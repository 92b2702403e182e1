"""The learning rate of each epoch, as a function of its number alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cellstore.errors import UnknownNameError, UserInputError

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
