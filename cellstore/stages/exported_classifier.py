"""A classifier of cells, made of model.safetensors and model.json by torch and torchvision alone.

This file comes with an exported model and needs no cellstore. The two files of the model hold
numbers and text: reading them runs no code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

TABULAR = "tabular"


class Classifier:
    """Call it with the cells of one plate to get the probability of each class.

    ``labels`` are the classes, ``features`` the names of the measurements that it reads,
    ``record`` is model.json.
    """

    def __init__(self, tensors: dict[str, Tensor], record: Mapping[str, Any]) -> None:
        self.record, self.labels = record, tuple(record["labels"])
        self.scaler = Scaler(record["scaler"])
        self.features = self.scaler.names
        self.kind, self.tensors = record.get("model", "network"), tensors
        if self.kind == "network":
            self.network = Network(record["shape"]).eval()
            self.network.load_state_dict(tensors)

    @classmethod
    def load(cls, folder: str | Path) -> Classifier:
        """Return the classifier of a folder."""
        text = (Path(folder) / "model.json").read_text(encoding="utf-8")
        return cls(load_file(Path(folder) / "model.safetensors"), json.loads(text))

    def __call__(
        self, crops: Mapping[str, Tensor], features: Tensor, plate: str | None = None
    ) -> Tensor:
        """Return probabilities, (N, K) float64.

        ``crops`` by branch are (N, C, S, S) from 0 to 1, as model.json says under ``crops``;
        ``features`` (N, F) are as measured, in the order of ``self.features``; ``plate`` is the
        barcode, for a model that normalises plate by plate.
        """
        with torch.inference_mode():
            scaled = self.scaler(features.double(), plate).float()
            if self.kind == "network":
                return self._by_network(crops, scaled)
            return self._by_trees(scaled) if self.kind == "forest" else self._by_line(scaled)

    def _by_network(self, crops: Mapping[str, Tensor], features: Tensor) -> Tensor:
        crop = self.record["crop"]
        normal = {
            name: ((values.double() - crop["mean"]) / crop["std"]).float()
            for name, values in crops.items()
        }
        scores: Tensor = self.network(normal, features)
        return torch.softmax(scores.double(), dim=1)

    def _by_line(self, features: Tensor) -> Tensor:
        lines, intercepts = self.tensors["coefficients"], self.tensors["intercepts"]
        return torch.softmax(features.double() @ lines.T + intercepts, dim=1)

    def _by_trees(self, features: Tensor) -> Tensor:
        t, total = self.tensors, torch.zeros(len(features), len(self.labels), dtype=torch.float64)
        for row, values in enumerate(features):
            for root in t["roots"].tolist():
                at = root
                while int(t["left"][at]) != at:
                    low = bool(values[t["feature"][at]].double() <= t["threshold"][at])
                    at = int(t["left" if low else "right"][at])
                span = slice(int(t["starts"][at]), int(t["starts"][at + 1]))
                counts = t["counts"][span].double()
                total[row, t["classes"][span].long()] += counts / counts.sum()
        return total / len(t["roots"])


class Scaler:
    """Measurements (N, F) of a plate to what the model reads; a value that is not there counts 0.

    ``(x - mean) / scale`` of the training side; before that, where the model is of the kind
    "plate-controls", of the control cells of the plate.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.plates: Mapping[str, Any] | None = record.get("plates")
        after = record["after"] if self.plates is not None else record
        self.names = tuple(after["names"])
        self.mean, self.scale = _numbers(after["mean"]), _numbers(after["scale"])

    def __call__(self, rows: Tensor, plate: str | None) -> Tensor:
        """Return the rows scaled, (N, F) float64."""
        if self.plates is not None:
            if plate is None or plate not in self.plates:
                raise ValueError(f"This model has no control cells of plate {plate!r}.")
            known = self.plates[plate]
            rows = (rows - _numbers(known["mean"])) / _numbers(known["scale"])
        scaled = (rows - self.mean) / self.scale
        return torch.where(torch.isfinite(scaled), scaled, 0.0)


def _numbers(values: list[float | None]) -> Tensor:
    known = [float("nan") if value is None else value for value in values]
    return torch.tensor(known, dtype=torch.float64)


class Network(nn.Module):
    """A branch for each kind of crop and one for measurements, weighted, projected, classified."""

    def __init__(self, shape: Mapping[str, Any]) -> None:
        super().__init__()
        self.branches = tuple(shape["branches"])
        fused = 0
        for name in self.branches:
            branch, width = _tabular(shape) if name == TABULAR else _pictures(shape, name)
            self.add_module(f"{name}_branch", branch)
            fused += width
        inner, width = shape["attention_width"], shape["projection_width"]
        self.attention = nn.Sequential(
            nn.Linear(fused, inner), nn.ReLU(), nn.Linear(inner, fused), nn.Sigmoid()
        )
        self.projection = nn.Sequential(nn.Linear(fused, width), nn.ReLU())
        self.classifier = nn.Linear(width, shape["n_classes"])

    def forward(self, crops: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """Return scores before softmax, (N, K) float32."""
        given = {**crops, TABULAR: features}
        seen = [self.get_submodule(f"{name}_branch")(given[name]) for name in self.branches]
        fused = torch.cat(seen, dim=1)
        scores: Tensor = self.classifier(self.projection(fused * self.attention(fused)))
        return scores


def _tabular(shape: Mapping[str, Any]) -> tuple[nn.Module, int]:
    width = shape["tabular_width"]
    layers = nn.Linear(shape["n_features"], width), nn.ReLU(), nn.BatchNorm1d(width)
    return nn.Sequential(*layers, nn.Dropout(shape["dropout"])), width


def _pictures(shape: Mapping[str, Any], name: str) -> tuple[nn.Module, int]:
    """A classifier of torchvision without its head, its first convolution made to fit."""
    channels = shape["plane_channels" if name == "image" else "image_channels"]
    whole = models.get_model(shape["backbone"], weights=None)
    layers = list(whole.named_modules())
    stem, old = next((n, m) for n, m in layers if isinstance(m, nn.Conv2d))
    head, last = [(n, m) for n, m in layers if isinstance(m, nn.Linear)][-1]
    new = nn.Conv2d(
        channels,
        old.out_channels,
        kernel_size=old.kernel_size,  # type: ignore[arg-type]
        stride=old.stride,  # type: ignore[arg-type]
        padding=old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    whole.set_submodule(stem, new)
    whole.set_submodule(head, nn.Identity())
    if shape["backbone"].startswith("efficientnet"):
        pooled = nn.Sequential(whole.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return pooled, last.in_features
    return nn.Sequential(whole), last.in_features
