"""Training without a store: the loop on batches that a test has made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from cellstore.config import TrainParams
from cellstore.learn.training import BatchesOf, EpochMetrics, Team, Training, TrainingState

PLAIN = TrainParams(
    epochs=2,
    patience=2,
    learning_rate=2e-3,
    schedule="step",
    warmup_epochs=0,
    augment=(),
    sampler="cells",
    seed=1,
)
"""The published recipe, but short and fast."""


def fit(
    net: Any,
    train: BatchesOf,
    validation: BatchesOf,
    params: TrainParams = PLAIN,
    on_epoch: Callable[[EpochMetrics, Training], None] = lambda _, __: None,
    *,
    class_weights: Sequence[float] | None = None,
    start: TrainingState | None = None,
    device: str = "cpu",
) -> Training:
    """Train ``net`` to the end; ``on_epoch`` hears of each epoch."""
    training = Training(net, params, Team.open(device, params.precision), class_weights)
    if start is not None:
        training.resume(start)
    with closing(training.run(train, validation)) as epochs:
        for epoch in epochs:
            on_epoch(epoch, training)
    return training
