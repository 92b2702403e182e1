"""Published networks that make an embedding of a crop: where they come from, and what they read.

A network is named as ``timm:NAME``, ``torchvision:NAME``, ``hf:OWNER/NAME[@REVISION]`` (a
repository of the Hugging Face hub), by the short name of one of :data:`KNOWN`, or by the path of a
local folder with ``config.json`` and ``model.safetensors``. Networks are built from the code of
timm, torchvision and transformers, or from the lines below; no code that comes with weights is run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms.v2 import functional as transforms

from ..artifacts import sha256_of
from ..errors import ImageError, UnknownNameError, UserInputError, first_line
from ..settings import need
from .crops import CROP_MEAN, CROP_STD
from .exported_classifier import TIMM, ImageBranch, timm_network
from .networks import check_backbone, start_from
from .pretrained import (
    WEIGHTS,
    State,
    check_timm_name,
    fetch,
    imagenet_state,
    owner_of,
    read_state,
    timm_weights,
)

TORCHVISION, HUB = "torchvision:", "hf:"
CHANNELS, RGB, NATIVE = MODES = ("channels", "rgb", "native")
"""What a network sees: each channel by itself as a grey picture, and what it makes of them side by
side; three channels as red, green and blue; or all channels as they are."""

CROP, IMAGE = "each channel of each crop", "all channels of a crop together"
"""What is normalised by itself, where no fixed mean and spread are subtracted and divided by."""

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"

AT_ONCE = 128
"""Pictures that go through a network together: of many channels, a batch of cells is more."""

CLASS_TOKEN = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "deit", "vit_msn")
POOLED = ("convnext", "convnextv2", "dinov3_convnext", "resnet", "swin", "swinv2")
"""Networks of transformers by what of them is the embedding: the class token, or what is pooled."""

Make = Callable[[State], nn.Module]


@dataclass(frozen=True)
class KnownModel:
    """A network of the table that ``cellstore embed --list`` prints.

    ``source``: ``hf:...`` or ``timm:...``, or a sentence where its weights are to be had.
    ``revision``: the commit of the hub that is fetched. ``channels``: how many it reads, ``None``
    for any number. ``mode``: one of :data:`MODES`. ``make``: builds it from its state dict, where
    no library does. ``size``: of the crops, in pixels; ``normalise``: what by itself.
    """

    source: str
    licence: str
    preprocessing: str
    revision: str | None = None
    mode: str = CHANNELS
    channels: int | None = None
    size: int | None = None
    normalise: str | None = None
    make: Make | None = None


@dataclass(frozen=True)
class Opened:
    """A network and what it reads: ``channels``, ``size`` in pixels, ``mean`` and ``std``.

    ``digest``: of its weights; ``config``: of the file that describes it, where there is one.
    """

    net: nn.Module
    channels: int | None
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    digest: str
    revision: str | None = None
    licence: str = "not known"
    normalise: str | None = None
    config: str | None = None


class Embedder(nn.Module):
    """Crops to embeddings; ``identity`` says which network this is and what it is shown.

    ``identity`` holds what decides the numbers: ``model``, ``revision``, ``sha256`` of the weights,
    that of its ``config``, ``mode``, ``input_size`` in pixels, ``mean`` and ``std`` or
    ``normalise``; and the ``licence``.
    """

    def __init__(self, opened: Opened, mode: str, model: str) -> None:
        super().__init__()
        self.net, self.mode, self.size = opened.net.eval(), mode, opened.size
        self.channels, self.normalise = opened.channels, opened.normalise
        self.mean: Tensor
        self.std: Tensor
        for name in ("mean", "std"):
            values = torch.tensor(getattr(opened, name), dtype=torch.float32)
            self.register_buffer(name, values[:, None, None], persistent=False)
        normal = {"mean": list(opened.mean), "std": list(opened.std)}
        self.identity: dict[str, Any] = {
            "model": model,
            "revision": opened.revision,
            "sha256": opened.digest,
            "config": opened.config,
            "mode": mode,
            "input_size": opened.size,
            "licence": opened.licence,
            **(normal if opened.normalise is None else {"normalise": opened.normalise}),
        }

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings, (N, D) float32, of crops (N, C, S, S) float32, -1 (black) to about 1.

        They are resized as torchvision does it (bilinear, with antialiasing), cut off at 0 and 1 on
        the scale where black is 0, and normalised.
        """
        n, c = images.shape[:2]
        if self.mode != CHANNELS and self.channels not in (None, c):
            raise ImageError(
                f"{self.identity['model']} reads {self.channels} channels with --mode {self.mode}, "
                f"and these are {c}. Name them with --channels, in the order in which it was "
                "trained with them, or use --mode channels."
            )
        values = images * CROP_STD + CROP_MEAN
        if values.shape[-2:] != (self.size, self.size):
            values = transforms.resize(values, [self.size, self.size], antialias=True)
        values = values.clamp(0, 1)
        if self.mode == CHANNELS:
            values = values.reshape(n * c, 1, self.size, self.size)
        if self.normalise == CROP:
            spread = values.std((2, 3), unbiased=False, keepdim=True)
            values = (values - values.mean((2, 3), keepdim=True)) / (spread + 1e-7)
        elif self.normalise == IMAGE:
            low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
            values = (values - low) / (high - low + 1e-8)
        else:
            values = (values - self.mean) / self.std  # a grey picture becomes as many as these are
        seen = torch.cat([self.net(some) for some in torch.split(values, AT_ONCE)])
        return seen.float().reshape(n, -1)


def open_embedder(
    model: str, mode: str | None = None, weights: Path | None = None, size: int | None = None
) -> Embedder:
    """Return a network that embeds crops, on the CPU and in evaluation mode.

    ``mode``: one of :data:`MODES`; default: that of a known model, else ``channels``. ``weights``:
    a file that was fetched before, instead of a download. ``size``: of its input in pixels;
    default: that with which the network was trained.
    """
    need("train")
    need("embed")
    if mode not in (None, *MODES):
        raise UnknownNameError.of("mode", mode, MODES)
    known = KNOWN.get(model)
    source = model if known is None else known.source
    if known is not None and known.make is not None:
        opened = _open_known(model, known, weights)
    elif source.startswith((TIMM, TORCHVISION)):
        opened = _open_backbone(source.removeprefix(TORCHVISION), weights)
    elif weights is not None:
        raise UserInputError(
            f"A file of weights alone does not say what {model} is: give a folder with {CONFIG} "
            f"and {WEIGHTS} as --model."
        )
    elif source.startswith(HUB):
        opened = _open_hub(source.removeprefix(HUB), known)
    elif Path(source).exists():
        opened, model = _open_folder(Path(source)), f"folder {Path(source).absolute().name}"
    else:
        raise UnknownNameError.of(
            "model (give timm:NAME, torchvision:NAME, hf:OWNER/NAME, a folder, or one of these)",
            model,
            KNOWN,
        )
    mode = mode or (CHANNELS if known is None else known.mode)
    takes = opened.channels
    if mode == RGB and takes != 3:
        raise UserInputError(f"{model} reads no colours. Use --mode {NATIVE}.")
    if mode == CHANNELS and takes not in (None, 1, 3):
        raise UserInputError(f"{model} reads {takes} channels at once. Use --mode {NATIVE}.")
    embedder = Embedder(opened if size is None else replace(opened, size=size), mode, model)
    try:
        with torch.inference_mode():
            embedder(torch.zeros((1, takes or 1, embedder.size, embedder.size)))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserInputError(
            f"{model} cannot read crops of {embedder.size} pixels ({first_line(error)}). "
            "Leave out --crop, or name another size."
        ) from error
    return embedder


def name_of(model: str) -> str:
    """Return what a feature set of a network is called where nothing else is said: dinov2_small."""
    last = re.split(r"[:/]", model.partition("@")[0].rstrip("/"))[-1]
    return re.sub(r"\W+", "_", last.lower()).strip("_")


def licence_of(model: str) -> str:
    """Return the licence of a network by its name, as far as it is known before it is fetched."""
    if model in KNOWN:
        return KNOWN[model].licence
    if model.startswith(TIMM):
        check_timm_name(model.removeprefix(TIMM))
        import timm

        return timm.get_pretrained_cfg(model.removeprefix(TIMM)).license or "not known"
    return "of torchvision: BSD-3-Clause" if model.startswith(TORCHVISION) else "not known"


def _open_backbone(backbone: str, weights: Path | None) -> Opened:
    """A network of torchvision or timm, as ``train --backbone`` has it."""
    check_backbone(backbone)
    name, revision = backbone.removeprefix(TIMM), None
    if backbone.startswith(TIMM):
        import timm

        config = timm.get_pretrained_cfg(name)
        size, mean, std = config.input_size[-1], config.mean, config.std
        licence = config.license or "not known"
        if weights is None:
            weights, revision = timm_weights(name)
    else:
        usual = models.get_model_weights(name).DEFAULT.transforms()
        (size,), mean, std, licence = usual.crop_size, usual.mean, usual.std, "BSD-3-Clause"
    try:
        branch = ImageBranch(3, backbone)
    except (StopIteration, IndexError) as error:
        raise UserInputError(
            f"{backbone} cannot be used here: it has no convolution, or its head is no linear "
            "layer. Name another network."
        ) from error
    state = imagenet_state(backbone) if weights is None else read_state(weights, owner_of(backbone))
    start_from(branch, state)
    if weights is not None:
        digest = sha256_of(weights)
    else:
        every = hashlib.sha256()
        for key, value in sorted(state.items()):
            every.update(key.encode() + value.cpu().contiguous().numpy().tobytes())
        digest = every.hexdigest()
    return Opened(branch, 3, size, mean, std, digest, revision, licence)


def _open_hub(name: str, known: KnownModel | None) -> Opened:
    """A network of a repository ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` of the hub."""
    found = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", name)
    if found is None:
        raise UserInputError(f"Write hf:OWNER/NAME or hf:OWNER/NAME@REVISION, not {HUB}{name}.")
    repository, revision = found[1], found[2] or (None if known is None else known.revision)
    files, revision = fetch(repository, [CONFIG], revision, "--model DIR")
    more = [WEIGHTS] if "architecture" in _json(files[CONFIG]) else [WEIGHTS, PREPROCESSOR]
    files, revision = fetch(repository, [CONFIG, *more], revision, "--model DIR")
    licence = "not known" if known is None else known.licence
    return replace(_open_folder(files[CONFIG].parent), revision=revision, licence=licence)


def _open_folder(path: Path) -> Opened:
    """A network of a local folder with ``config.json`` and ``model.safetensors``."""
    folder = path if path.is_dir() else path.parent
    file, config = folder / WEIGHTS, folder / CONFIG
    if not (file.is_file() and config.is_file() and path in (folder, file)):
        raise UserInputError(
            f"{path} is not a network that can be opened: give a folder with {CONFIG} (of timm or "
            f"transformers) and {WEIGHTS}. Other files of weights may hold code and are not opened."
        )
    described, digest = _json(config), sha256_of(config)
    normal = _json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
    kind = described.get("model_type")
    try:
        if "architecture" in described:
            return replace(_of_timm_config(described, file), config=digest)
        if kind in CLASS_TOKEN + POOLED:
            return replace(_of_transformers(described, normal, file), config=digest)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserInputError(
            f"{config}, or {PREPROCESSOR} beside it, is not as timm or transformers write it "
            f"({first_line(error)}). Fetch it again."
        ) from error
    raise UserInputError(
        f"{config} describes a network of type {kind!r}, and cellstore does not know "
        f"which of its outputs is the embedding. Known types: "
        f"{', '.join(CLASS_TOKEN + POOLED)}, and those of timm."
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserInputError(f"{path} is no JSON ({error}). Fetch it again.") from error
    if not isinstance(found, dict):
        raise UserInputError(f"{path} describes no network. Give that of timm or transformers.")
    return found


def _of_timm_config(described: Mapping[str, Any], file: Path) -> Opened:
    name = str(described["architecture"])
    check_timm_name(name)
    config = described.get("pretrained_cfg") or described
    channels, height, _ = config.get("input_size") or (3, 224, 224)
    # What would have timm read another file is not of a network.
    own = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"}
    own |= {"cache_dir", "in_chans", "num_classes", "scriptable"}
    given = described.get("model_args") or {}
    try:
        net = timm_network(name, channels, **{k: v for k, v in given.items() if k not in own})
        state = read_state(file, owner_of(f"{TIMM}{name}"))
        net.load_state_dict({key: state[key] for key in net.state_dict()})
    except (KeyError, RuntimeError, TypeError) as error:
        raise _do_not_fit(file, error) from error
    mean, std = (list(map(float, config.get(k) or [0.5] * channels)) for k in ("mean", "std"))
    licence = str(config.get("license") or "not known")
    return Opened(net, channels, height, mean, std, sha256_of(file), licence=licence)


def _do_not_fit(file: Path, error: Exception) -> UserInputError:
    return UserInputError(
        f"The weights in {file} are not those of the network that {CONFIG} beside it describes "
        f"({first_line(error)}). Fetch both again."
    )


def _of_transformers(described: Mapping[str, Any], normal: Mapping[str, Any], file: Path) -> Opened:
    import transformers
    from transformers.utils import logging

    kind = described["model_type"]
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    more = {"add_pooling_layer": False} if kind in ("vit", "deit") else {}
    try:
        # By the type alone, so that no class is looked up in the folder.
        config = transformers.AutoConfig.for_model(**described)
        net, told = transformers.AutoModel.from_pretrained(
            file.parent,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            **more,
        )
        if lacking := [*told["missing_keys"], *told["mismatched_keys"]]:
            raise ValueError(f"{lacking[0]} is not there, or of another shape")
    except Exception as error:  # transformers raises errors of many kinds for such files
        raise _do_not_fit(file, error) from error
    finally:
        logging.set_verbosity(before)
    sizes = normal.get("crop_size") or normal.get("size") or {}
    usual = sizes.get("height") or sizes.get("shortest_edge") if isinstance(sizes, dict) else sizes
    channels = int(getattr(config, "num_channels", 3))
    given = (normal.get(f"image_{name}") or [0.5] * channels for name in ("mean", "std"))
    mean, std = (list(map(float, values)) for values in given)
    if normal.get("do_normalize") is False:
        mean, std = [0.0] * channels, [1.0] * channels
    size = int(usual or config.image_size)
    return Opened(OfTransformers(net, kind), channels, size, mean, std, sha256_of(file))


class OfTransformers(nn.Module):
    """A network of transformers that gives one row for each picture; see ``CLASS_TOKEN``."""

    def __init__(self, net: Any, kind: str) -> None:
        super().__init__()
        self.net, self.kind = net, kind

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, D) of pictures (N, C, S, S)."""
        more = {"interpolate_pos_encoding": True} if self.kind in ("vit", "deit", "vit_msn") else {}
        seen = self.net(pixel_values=images, **more)
        row: Tensor = (
            seen.last_hidden_state[:, 0] if self.kind in CLASS_TOKEN else seen.pooler_output
        )
        return row.flatten(1)


class ChannelViT(nn.Module):
    """OpenPhenom: a vision transformer that reads the patches of all channels as one row.

    The channel-agnostic masked autoencoder of Kraus et al. (CVPR 2024), its encoder: ViT-S/16 of
    parallel blocks on crops of 256 pixels, each channel standardised by itself; the mean of all
    patches is the embedding.
    """

    def __init__(self, state: State) -> None:
        from timm.models import vision_transformer as vit

        super().__init__()
        self.net = vit.vit_small_patch16_224(
            img_size=256,
            in_chans=1,
            num_classes=0,
            global_pool="avg",
            fc_norm=None,
            init_values=1e-4,
            block_fn=vit.ParallelScalingBlock,
            qkv_bias=False,
            qk_norm=True,
        )
        prefix = "encoder.vit_backbone."
        given = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        # The positions of the patches of a channel are those of each other one.
        given["pos_embed"] = given["pos_embed"][:, : self.net.pos_embed.shape[1]]
        self.net.load_state_dict(given)

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, 384) of pictures (N, C, 256, 256), with any number of channels."""
        n, c, height, width = images.shape
        normal = nn.functional.instance_norm(images).reshape(n * c, 1, height, width)
        net = self.net
        patches = net.patch_embed(normal) + net.pos_embed[:, 1:]
        first = (net.cls_token + net.pos_embed[:, :1]).expand(n, -1, -1)
        tokens = torch.cat([first, patches.reshape(n, -1, patches.shape[-1])], dim=1)
        row: Tensor = net.blocks(tokens)[:, 1:].mean(dim=1)
        return row


def cell_dino(size: str, patch: int, pixels: int, channels: int, state: State) -> nn.Module:
    """Cell-DINO: the vision transformer of DINOv2 on other channels; the class token."""
    import timm

    net = timm.create_model(
        f"vit_{size}_patch14_dinov2",
        patch_size=patch,
        img_size=pixels,
        in_chans=channels,
        num_classes=0,
    )
    # Blocks are kept in four parts, and numbered through.
    whole = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", k): v for k, v in state.items()}
    whole.pop("mask_token", None)
    net.load_state_dict(whole)
    made: nn.Module = net
    return made


class SubCell(nn.Module):
    """SubCell: a vision transformer ViT-B/16 on crops of 448 pixels, pooled by gated attention.

    Gupta et al. 2024; the encoder of SubCellPortable, without the classifiers of locations.
    """

    def __init__(self, channels: int, state: State) -> None:
        from timm.models import vision_transformer as vit

        super().__init__()
        self.net = vit.vit_base_patch16_224(
            img_size=448,
            in_chans=channels,
            num_classes=0,
            global_pool="",
            norm_layer=partial(nn.LayerNorm, eps=1e-12),
        )
        names = {
            "encoder.embeddings.cls_token": "cls_token",
            "encoder.embeddings.position_embeddings": "pos_embed",
            "encoder.embeddings.patch_embeddings.projection": "patch_embed.proj",
            "encoder.layernorm": "norm",
        }
        for i in range(len(self.net.blocks)):
            layer, block = f"encoder.encoder.layer.{i}", f"blocks.{i}"
            names |= {
                f"{layer}.layernorm_before": f"{block}.norm1",
                f"{layer}.layernorm_after": f"{block}.norm2",
                f"{layer}.attention.output.dense": f"{block}.attn.proj",
                f"{layer}.intermediate.dense": f"{block}.mlp.fc1",
                f"{layer}.output.dense": f"{block}.mlp.fc2",
            }
        whole = {}
        for theirs, ours in names.items():
            for end in ("", ".weight", ".bias"):
                if theirs + end in state:
                    whole[ours + end] = state[theirs + end]
        for i in range(len(self.net.blocks)):
            for end in ("weight", "bias"):
                parts = (f"attention.attention.{part}.{end}" for part in ("query", "key", "value"))
                whole[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(
                    [state[f"encoder.encoder.layer.{i}.{part}"] for part in parts]
                )
        self.net.load_state_dict(whole)
        self.attention_v = nn.Linear(768, 512)
        self.attention_u = nn.Linear(768, 512)
        self.attention = nn.Linear(512, 2)
        for name in ("attention_v", "attention_u", "attention"):
            # In the files, a dropout stands before these layers.
            begin = f"pool_model.{name}." + ("" if name == "attention" else "1.")
            part = {end: state[begin + end] for end in ("weight", "bias")}
            self.get_submodule(name).load_state_dict(part)

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, 1536) of pictures (N, C, 448, 448)."""
        tokens = self.net(images)
        gated = torch.tanh(self.attention_v(tokens)) * nn.functional.gelu(self.attention_u(tokens))
        weights = self.attention(gated).transpose(1, 2).softmax(dim=-1)
        row: Tensor = (weights @ tokens).flatten(1)
        return row


def _open_known(name: str, known: KnownModel, weights: Path | None) -> Opened:
    """A network of the table that no library builds."""
    assert known.make is not None
    revision = None
    if weights is None:
        if not known.source.startswith(HUB):
            raise UserInputError(
                f"The weights of {name} cannot be fetched by a program. Get them ({known.source}), "
                f"and give the file: --weights FILE. Licence: {known.licence}."
            )
        found, revision = fetch(known.source.removeprefix(HUB), [WEIGHTS], known.revision)
        weights = found[WEIGHTS]
    try:
        net = known.make(read_state(weights, name))
    except (KeyError, RuntimeError) as error:
        raise UserInputError(
            f"{weights} does not hold the weights of {name} ({first_line(error)}). Fetch it again."
        ) from error
    assert known.size is not None
    return Opened(
        net,
        known.channels,
        known.size,
        (0.0,),
        (1.0,),
        sha256_of(weights),
        revision,
        known.licence,
        known.normalise,
    )


_IMAGENET = "each channel as grey, mean and spread of ImageNet"
_DINOV3 = "DINOv3 License (accept it on the page of the repository)"
_FAIR = "FAIR Noncommercial Research License: no commercial use"
_CELL_DINO = "by a form of Meta: ai.meta.com/resources/models-and-libraries/cell-dino-downloads"

KNOWN: Mapping[str, KnownModel] = {
    "dinov2-small": KnownModel(
        "hf:facebook/dinov2-small",
        "Apache-2.0",
        _IMAGENET,
        "ed25f3a31f01632728cabb09d1542f84ab7b0056",
    ),
    "dinov3-small": KnownModel(
        "hf:facebook/dinov3-vits16-pretrain-lvd1689m",
        _DINOV3,
        _IMAGENET,
        "114c1379950215c8b35dfcd4e90a5c251dde0d32",
    ),
    "openphenom": KnownModel(
        "hf:recursionpharma/OpenPhenom",
        "Recursion's non-commercial end user licence: no commercial use",
        "all channels together, 1 to 11, each standardised by itself",
        "0f92333685f6e9f031b804c70fe246f9b05ae90d",
        mode=NATIVE,
        size=256,
        make=ChannelViT,
    ),
    "cell-dino": KnownModel(
        _CELL_DINO + ", channel_adaptive_dino_vitl16",
        _FAIR,
        "each channel by itself, standardised",
        channels=1,
        size=224,
        normalise=CROP,
        make=partial(cell_dino, "large", 16, 224, 1),
    ),
    "cell-dino-painting": KnownModel(
        _CELL_DINO + ", cell_dino_cp_vits8",
        _FAIR,
        "the five channels of Cell Painting together, each standardised",
        mode=NATIVE,
        channels=5,
        size=128,
        normalise=CROP,
        make=partial(cell_dino, "small", 8, 128, 5),
    ),
    "subcell": KnownModel(
        "models/all_channels_MAE-CellS-ProtS-Pool.pth in the public bucket czi-subcell-public",
        "MIT (of its code)",
        "microtubules, ER, DNA and a protein together, 0 to 1",
        mode=NATIVE,
        channels=4,
        size=448,
        normalise=IMAGE,
        make=partial(SubCell, 4),
    ),
}
"""Networks by a short name. The revisions are the commits that were seen at the time."""
