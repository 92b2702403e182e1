"""The processor that networks run on."""

from __future__ import annotations

import torch

from ..errors import UserInputError


def pick_device(device: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises UserInputError for one that is not there."""
    available = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if available else "cpu")
    if device not in {"cpu", "cuda"}:
        raise UserInputError(f"Unknown device {device!r}. Use auto, cpu or cuda.")
    if device == "cuda" and not available:
        raise UserInputError("This machine has no usable CUDA device. Use cpu or auto.")
    return torch.device(device)
