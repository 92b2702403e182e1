"""Cells of an image: which networks there are, where their files lie, and what they return.

This module is light: the network itself is loaded by :func:`load_segmenter`, which needs the
extra ``segment``. Another engine joins by offering the :class:`Segmenter` protocol.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import urllib.request
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cellstore.errors import MissingExtraError, UnknownNameError, UserInputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

DEFAULT_MODEL = "cellstore-nuclei"
"""The network that comes with cellstore; its model card lies beside it."""

PUBLISHED_MODELS = {
    "cyto": ("cytotorch_0", "size_cytotorch_0.npy"),
    "cyto2": ("cyto2torch_0", "size_cyto2torch_0.npy"),
    "cyto3": ("cyto3", "size_cyto3.npy"),
    "nuclei": ("nucleitorch_0", "size_nucleitorch_0.npy"),
}
"""Cellpose's own networks: name -> (network file, size model file)."""

PUBLISHED_URL = "https://www.cellpose.org/models"
FLOW_THRESHOLD = 0.7
CELLPROB_THRESHOLD = -5.0
_DOWNLOAD_TIMEOUT = 30.0


@dataclass(frozen=True)
class SegmentationResult:
    """The cells found in one image.

    ``masks``: (H, W) uint16 (uint32 above 65,535 cells), 0 is background, labels 1..n.
    ``flows``: (H, W, 4) uint8, Cellpose's red, green, blue rendering of the flow field, then
    the cell probability as ``round(255 * sigmoid(logit))``.
    ``diameter``: the cell diameter in pixels that the image was scaled by.
    """

    masks: NDArray[np.uint16] | NDArray[np.uint32]
    flows: NDArray[np.uint8]
    diameter: float

    @property
    def count(self) -> int:
        """Number of cells."""
        return int(self.masks.max(initial=0))


@dataclass(frozen=True)
class ModelFiles:
    """A network on disk. ``size_model`` estimates the diameter, where there is one.

    ``sha256`` is that of the network file, or, with a size model, of the two hex digests
    written one after the other.
    """

    name: str
    network: Path
    size_model: Path | None
    sha256: str


class Segmenter(Protocol):
    """Anything that finds cells in a grey image."""

    def segment(self, image: NDArray[np.float32]) -> SegmentationResult:
        """Find the cells of ``image``, (H, W), any intensity scale.

        Raises ImageError for pixels that are not a finite 2-D plane.
        """


def model_names() -> list[str]:
    """Every name that :func:`find_model` knows, the default first."""
    return [DEFAULT_MODEL, *PUBLISHED_MODELS]


def find_model(model: str = DEFAULT_MODEL, weights_dir: Path | None = None) -> ModelFiles:
    """Locate a network by name or by path.

    ``model`` is ``cellstore-nuclei``, a published Cellpose name (``cyto``, ``cyto2``, ``cyto3``,
    ``nuclei``: fetched once into Cellpose's own folder), or the path of a network trained with
    Cellpose 3, with ``<path>_size.npz`` or Cellpose's ``<path>_size.npy`` beside it if there is
    one. ``weights_dir`` replaces the folders in which named networks are looked for.

    Raises UnknownNameError for an unknown name, UserInputError if a file cannot be had.
    """
    if model == DEFAULT_MODEL:
        return _shipped(weights_dir)
    if model in PUBLISHED_MODELS:
        return _published(model, weights_dir or cellpose_folder())
    path = Path(model).expanduser()
    if path.is_file():
        return _described(str(path), path, _size_model_beside(path))
    if path.name != model or path.exists():
        raise UserInputError(f"There is no network file at {model}. Check the path.")
    raise UnknownNameError.of("model", model, model_names())


def cellpose_folder() -> Path:
    """Where Cellpose keeps its networks: ``CELLPOSE_LOCAL_MODELS_PATH`` or its default."""
    chosen = os.environ.get("CELLPOSE_LOCAL_MODELS_PATH")
    return Path(chosen) if chosen else Path.home() / ".cellpose" / "models"


def load_segmenter(
    files: ModelFiles,
    *,
    flow_threshold: float = FLOW_THRESHOLD,
    cellprob_threshold: float = CELLPROB_THRESHOLD,
    diameter: float | None = None,
    device: str = "auto",
) -> Segmenter:
    """Load a network and return what segments grey images with it.

    The default thresholds are those of the published A549 study (DESIGN section 2), not
    Cellpose's (0.4 and 0.0). ``diameter`` in pixels; ``None`` estimates it per image with the
    size model. ``device`` is ``auto``, ``cpu`` or ``cuda``.

    Raises MissingExtraError without Cellpose, UserInputError for a file that is no Cellpose 3
    network, for a missing size model, or for parameters out of range.
    """
    try:
        from .cellpose3 import CellposeSegmenter
    except ModuleNotFoundError as error:
        raise MissingExtraError.of(error.name or "cellpose", "segment") from error
    return CellposeSegmenter(files, flow_threshold, cellprob_threshold, diameter, device)


def _shipped(weights_dir: Path | None) -> ModelFiles:
    folder = weights_dir or Path(str(resources.files("cellstore.weights")))
    network = folder / f"{DEFAULT_MODEL}.pt"
    if not network.is_file():
        raise UserInputError(
            f"The network {network.name} is missing from {folder}. Install cellstore again."
        )
    return _described(DEFAULT_MODEL, network, _size_model_beside(network))


def _published(name: str, folder: Path) -> ModelFiles:
    network, size_model = PUBLISHED_MODELS[name]
    return _described(name, _fetched(network, folder), _fetched(size_model, folder))


def _size_model_beside(network: Path) -> Path | None:
    stems = (str(network), str(network.with_suffix("")))
    names = [f"{stem}_size{suffix}" for stem in stems for suffix in (".npz", ".npy")]
    return next((Path(name) for name in names if Path(name).is_file()), None)


def _described(name: str, network: Path, size_model: Path | None) -> ModelFiles:
    digest = _sha256(network)
    if size_model is not None:
        digest = hashlib.sha256((digest + _sha256(size_model)).encode("ascii")).hexdigest()
    return ModelFiles(name, network, size_model, digest)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserInputError(f"Cannot read {path}: {error.strerror}.") from error


def _fetched(name: str, folder: Path) -> Path:
    target = folder / name
    if target.is_file():
        return target
    url = f"{PUBLISHED_URL}/{name}"
    try:
        _download(url, target)
    except OSError as error:
        raise UserInputError(
            f"Could not download {url} ({error}). Fetch it on a machine with internet access "
            f"and put it at {target}, or use --model {DEFAULT_MODEL}, which needs no download."
        ) from error
    return target


def _download(url: str, target: Path) -> None:
    """Fetch ``url`` with certificates checked (Cellpose's own download switches that off)."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT) as source,  # noqa: S310 - https
        tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as partial,
    ):
        try:
            shutil.copyfileobj(source, partial)
        except BaseException:
            Path(partial.name).unlink()
            raise
    Path(partial.name).replace(target)
