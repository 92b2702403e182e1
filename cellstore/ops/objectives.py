"""What a training makes small: losses, and the weight of each class in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cellstore.errors import UnknownNameError
from cellstore.ops.crops import UNKNOWN_LABEL

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
