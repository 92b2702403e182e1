"""A tiny network with random weights, as the Hugging Face hub would have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def save_dinov2(folder: Path, seed: int = 1, **normal: Any) -> Any:
    """A tiny random DINOv2 as transformers keeps it, which reads 28 pixels; returned, too."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    net = transformers.Dinov2Model(config).eval()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    values = {"crop_size": {"height": 28, "width": 28}, "image_mean": [0.4, 0.5, 0.6]}
    values |= {"image_std": [0.2, 0.25, 0.3], **normal}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return net
