"""Weights that others have trained: what they are called, how they are fetched and read.

Nothing that comes with weights is run: they are safetensors files, or state dicts that torch's
reader of weights alone opens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor
from torchvision import models

from ..errors import UnknownNameError, UserInputError, first_line
from ..io.uris import plain_file
from ..settings import need
from .exported_classifier import TIMM

WEIGHTS = "model.safetensors"

State = Mapping[str, Tensor]


def check_timm_name(name: str) -> None:
    """Refuse a name that timm does not have: that of a network, or with the tag of its weights."""
    need("embed")
    import timm

    network, _, tag = name.partition(".")
    if not timm.is_model(network):
        raise UnknownNameError.of("network of timm", network, timm.list_models())
    tags = [item.partition(".")[2] for item in timm.list_pretrained(f"{network}.*")]
    if tag and tag not in tags:
        raise UnknownNameError.of(f"weights of timm's {network}", tag, tags)


def fetch(
    repository: str,
    names: Sequence[str],
    revision: str | None = None,
    bring: str = f"--weights DIR/{WEIGHTS}",
) -> tuple[dict[str, Path], str | None]:
    """Return files of a repository of the Hugging Face hub by name, and the commit they are of.

    They are kept in the cache of ``huggingface_hub``; what is there already is not fetched again.
    ``bring``: the option that takes them, for the sentence where they cannot be had.
    """
    import huggingface_hub
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it would print each attempt
    get = partial(huggingface_hub.hf_hub_download, repository, revision=revision)
    pinned = revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None
    try:
        try:
            found = {name: Path(get(name, local_files_only=pinned)) for name in names}
        except huggingface_hub.errors.LocalEntryNotFoundError:
            if not pinned:
                raise
            found = {name: Path(get(name)) for name in names}
    except Exception as error:  # of the hub, of the network, of the disk
        errors = huggingface_hub.errors
        reason = f"{type(error).__name__}: {first_line(error).rstrip('.')}"
        if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            reason = "it cannot be reached, or HF_HUB_OFFLINE is set"
        at = "" if revision is None else f" --revision {revision}"
        login = ""
        if isinstance(error, errors.GatedRepoError):
            login = f"Accept its licence on the page of {repository}, and log in: hf auth login. "
        raise UserInputError(
            f"{repository} could not be fetched from the Hugging Face hub ({reason}). {login}"
            f"Where there is a network: hf download {repository}{at} --local-dir DIR. Then bring "
            f"the folder here and give it: {bring}"
        ) from error
    finally:
        logging.set_verbosity(before)
    folder = found[names[0]].parent
    return found, folder.name if folder.parent.name == "snapshots" else None


def timm_weights(name: str) -> tuple[Path, str | None]:
    """Return the file of pretrained weights of a network of timm, and the commit it is of."""
    check_timm_name(name)
    import timm

    config = timm.get_pretrained_cfg(name)
    if not str(config.hf_hub_id or "").startswith("timm/"):
        raise UserInputError(
            f"timm's {name} has no pretrained weights of timm's own on the Hugging Face hub. Give "
            "a file of them (--weights FILE), or a name from timm.list_pretrained()."
        )
    found, revision = fetch(str(config.hf_hub_id), [WEIGHTS])
    return found[WEIGHTS], revision


def owner_of(backbone: str) -> str:
    """Return whose network it is, for a sentence: ``torchvision's resnet18``."""
    name = backbone.removeprefix(TIMM)
    return f"timm's {name}" if backbone.startswith(TIMM) else f"torchvision's {name}"


def imagenet_state(backbone: str) -> State:
    """The best ImageNet weights that torchvision knows of a backbone, fetched and kept by it.

    Of a backbone of timm: its pretrained weights, those of the tag where the name has one, fetched
    through the Hugging Face hub and kept in its cache. Raises ``UserInputError`` if they cannot be
    fetched.
    """
    if backbone.startswith(TIMM):
        return read_state(timm_weights(backbone.removeprefix(TIMM))[0], owner_of(backbone))
    source = models.get_model_weights(backbone).DEFAULT
    try:
        state: State = source.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserInputError(
            f"The ImageNet weights could not be fetched ({error}). Download {source.url} where "
            "there is a network and give the path of that file as the weights, or train from "
            "random weights with 'none'."
        ) from error
    return state


def read_state(path: Path, owner: str) -> State:
    """The state dict in a file, ``.pth`` or ``.safetensors``; no code in it is run.

    ``owner``: whose it should be, for a sentence. Raises ``UserInputError`` if there is none.
    """
    try:
        plain_file(path)
        # Some publish what torch has written under the name of the other format.
        if path.suffix == ".safetensors" and not is_zipfile(path):
            return load_tensors(path.read_bytes())
        with path.open("rb") as file:  # by its bytes, not by its name
            state = torch.load(file, map_location="cpu", weights_only=True)
        state = state["state_dict"] if set(state) == {"state_dict"} else state
    except FileNotFoundError as error:
        raise UserInputError(f"There is no file of weights {path}; check the path.") from error
    except Exception as error:  # torch raises errors of many kinds for a file that is no state
        raise UserInputError(
            f"{path} cannot be read as weights ({first_line(error)}). Give a state dict of "
            f"{owner}, as .pth or .safetensors."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserInputError(f"{path} holds no state dict; save net.state_dict() and give that.")
    return state
