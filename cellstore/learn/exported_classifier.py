"""A classifier of cells, made of the two files of an exported model.

This file comes with the model and needs no cellstore: torch and torchvision for a network
(model.safetensors), timm for one whose backbone begins with timm:, scikit-learn and skops for
another model (model.skops). Reading the files runs no code from them.
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
TIMM = "timm:"
"""How the name of a backbone begins that is a network of timm."""

TRUSTED = ["sklearn.tree._tree.Tree"]
"""What a file may hold beside what skops trusts by itself; :func:`check_tree` looks at these."""


class Classifier:
    """Call it with the cells of one plate to get the probability of each class.

    ``labels`` are the classes, ``features`` the names of the measurements that it reads,
    ``record`` is model.json.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.record = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self.labels = tuple(self.record["labels"])
        self.scaler = Scaler(self.record["scaler"])
        self.features = self.scaler.names
        self.network: Network | None = None
        if self.record["model"] == "network":
            self.network = Network(self.record["shape"]).eval()
            self.network.load_state_dict(load_file(folder / "model.safetensors"))
        else:
            import skops.io

            self.estimator = skops.io.load(folder / "model.skops", trusted=TRUSTED)
            for item in getattr(self.estimator, "estimators_", ()):
                check_tree(item.tree_)

    def __call__(
        self, crops: Mapping[str, Tensor], features: Tensor, plate: str | None = None
    ) -> Tensor:
        """Return probabilities, (N, K) float64.

        ``crops`` by branch are (N, C, S, S) from 0 to 1, as model.json says under ``crops``;
        ``features`` (N, F) are as measured, in the order of ``self.features``; ``plate`` is the
        barcode, for a model that normalises plate by plate.
        """
        scaled = self.scaler(features.double(), plate).float()
        if not len(scaled):
            return torch.empty(0, len(self.labels), dtype=torch.float64)
        if self.network is None:
            return torch.from_numpy(self.estimator.predict_proba(scaled.numpy()))
        crop = self.record.get("crop")
        normal = {
            name: ((values.double() - crop["mean"]) / crop["std"]).float()
            for name, values in crops.items()
        }
        with torch.inference_mode():
            scores: Tensor = self.network(normal, scaled)
        return torch.softmax(scores.double(), dim=1)


def check_tree(tree: Any) -> None:
    """Raise ``ValueError`` where a row could leave the nodes of a tree, or walk in a circle.

    scikit-learn follows the numbers in a tree without a look, so a damaged file could crash it.
    """
    here, leaf = range(tree.node_count), tree.children_left < 0
    for child in (tree.children_left, tree.children_right):
        if not ((child > here) & (child < tree.node_count) | leaf).all():
            raise ValueError("a node of the forest leads back or out of it")
    if not ((tree.feature >= 0) & (tree.feature < tree.n_features) | leaf).all():
        raise ValueError("a node of the forest looks at a column that is not there")


class Scaler:
    """Measurements (N, F) of a plate to what the model reads; a value that is not there counts 0.

    ``(x - mean) / scale`` of the training subset; before that, where the model knows plates, of the
    control cells of the plate.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.plates: Mapping[str, Any] | None = record["plates"]
        self.names = tuple(record["names"])
        self.mean, self.scale = _numbers(record["mean"]), _numbers(record["scale"])

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
    """A branch for each kind of crop and one for measurements, weighted, projected, classified.

    The branches are the modules ``mask_branch``, ``flow_branch``, ``image_branch`` and
    ``tabular_branch``, those of them that ``shape["branches"]`` names.
    """

    def __init__(self, shape: Mapping[str, Any]) -> None:
        super().__init__()
        self.branches = tuple(shape["branches"])
        fused = 0
        for name in self.branches:
            if name == TABULAR:
                width = shape["tabular_width"]
                layers = nn.Linear(shape["n_features"], width), nn.ReLU(), nn.BatchNorm1d(width)
                made: nn.Module = nn.Sequential(*layers, nn.Dropout(shape["dropout"]))
            else:
                channels = shape["plane_channels" if name == "image" else "image_channels"]
                made = ImageBranch(channels, shape["backbone"])
                width = made.width
            self.add_module(f"{name}_branch", made)
            fused += width
        inner, width = shape["attention_width"], shape["projection_width"]
        self.attention = nn.Sequential(
            nn.Linear(fused, inner), nn.ReLU(), nn.Linear(inner, fused), nn.Sigmoid()
        )
        self.projection = nn.Sequential(nn.Linear(fused, width), nn.ReLU())
        self.classifier = nn.Linear(width, shape["n_classes"])

    def forward(self, crops: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """Return scores before softmax, (N, K) float32.

        ``crops`` of each branch are (N, channels, S, S), ``features`` (N, F); all float32,
        normalised. What no branch looks at may be absent, or of any shape. While training, N must
        be 2 or more (batch normalisation).
        """
        given = {**crops, TABULAR: features}
        seen = [self.get_submodule(f"{name}_branch")(given[name]) for name in self.branches]
        fused = torch.cat(seen, dim=1)
        scores: Tensor = self.classifier(self.projection(fused * self.attention(fused)))
        return scores


class ImageBranch(nn.Sequential):
    """Crops (N, channels, S, S) to embeddings (N, ``width``) float32.

    A classifier of torchvision without its head, the last linear layer; its first convolution,
    ``stem``, is made to fit. Of EfficientNets only the features, pooled: without the dropout before
    their head, as published. A backbone ``timm:NAME`` is a network of timm without its head; its
    vision transformers take crops of other sizes by interpolating the positions.
    """

    def __init__(self, channels: int, backbone: str) -> None:
        if backbone.startswith(TIMM):
            net = timm_network(backbone.removeprefix(TIMM), channels)
            super().__init__(net)
            self.backbone, self.stem = backbone, net.pretrained_cfg["first_conv"]
            self.width = getattr(net, "head_hidden_size", net.num_features)
            return
        whole = models.get_model(backbone, weights=None)
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
        nn.init.kaiming_normal_(new.weight, mode="fan_out")
        whole.set_submodule(stem, new)
        whole.set_submodule(head, nn.Identity())
        pooled = backbone.startswith("efficientnet")
        super().__init__(
            *((whole.features, nn.AdaptiveAvgPool2d(1), nn.Flatten()) if pooled else (whole,))
        )
        self.backbone, self.stem, self.width = backbone, stem, last.in_features


def timm_network(name: str, channels: int, **options: Any) -> Any:
    """Return a network of timm without its head: (N, channels, S, S) to (N, width)."""
    import timm

    if timm.get_pretrained_cfg(name).fixed_input_size:
        options["dynamic_img_size"] = True
    try:
        return timm.create_model(name, in_chans=channels, num_classes=0, **options)
    except TypeError:  # not each of a fixed size knows how to take another
        options.pop("dynamic_img_size", None)
        return timm.create_model(name, in_chans=channels, num_classes=0, **options)
