"""Cells of an image: which networks there are, where their files lie, and what they return.

This module is light: the network itself is loaded by :func:`load_segmenter`, which needs the
extra ``segment`` (Cellpose 3) or ``segment-sam`` (Cellpose 4): one Python holds one of them, and
what is installed decides. Another engine joins by offering the :class:`Segmenter` protocol.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import MissingExtraError, UnknownNameError, UserInputError

if TYPE_CHECKING:
    from numpy.typing import NDArray


DEFAULT_MODEL = "cellstore-nuclei"
"""The network that comes with cellstore; its model card lies beside it."""


@dataclass(frozen=True)
class Published:
    """A network that Cellpose publishes: its file, its size model's, and who can run it."""

    network: str
    size_model: str | None
    generation: int
    source: str

    @property
    def files(self) -> tuple[str, ...]:
        """The names of its files."""
        return (self.network,) if self.size_model is None else (self.network, self.size_model)


_CELLPOSE_3 = "https://www.cellpose.org/models"
_CELLPOSE_4 = "https://huggingface.co/mouseland/cellpose-sam/resolve/main"

PUBLISHED_MODELS = {
    "cyto": Published("cytotorch_0", "size_cytotorch_0.npy", 3, _CELLPOSE_3),
    "cyto2": Published("cyto2torch_0", "size_cyto2torch_0.npy", 3, _CELLPOSE_3),
    "cyto3": Published("cyto3", "size_cyto3.npy", 3, _CELLPOSE_3),
    "nuclei": Published("nucleitorch_0", "size_nucleitorch_0.npy", 3, _CELLPOSE_3),
    "cpsam": Published("cpsam", None, 4, _CELLPOSE_4),
    "cpsam_v2": Published("cpsam_v2", None, 4, _CELLPOSE_4),
}
"""Cellpose's own networks, by name."""

EXTRAS = {3: "segment", 4: "segment-sam"}
"""The extra that brings each generation of Cellpose; they exclude each other."""

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
    """Anything that finds cells in images of one or two grey planes.

    An image is (H, W) float32 of any intensity scale, or (2, H, W): the plane of the cells
    (cytoplasm) and that of their nuclei.
    """

    def segment(self, image: NDArray[np.float32]) -> SegmentationResult:
        """Find the cells of ``image``.

        Raises ImageError for pixels that are not one or two finite planes.
        """

    def segment_batch(
        self, images: Sequence[NDArray[np.float32]], diameters: Sequence[float] | None = None
    ) -> list[SegmentationResult]:
        """Find the cells of each image; on a GPU, several share a call of the network.

        ``diameters``: of the cells of each image, in pixels, instead of the segmenter's own.
        A call that runs out of GPU memory is made again with fewer images. Raises ImageError for
        pixels that cannot be used and for an image that does not fit even alone.
        """


def model_names() -> list[str]:
    """Every name that :func:`find_model` knows, the default first."""
    return [DEFAULT_MODEL, *PUBLISHED_MODELS]


def find_model(model: str = DEFAULT_MODEL, weights_dir: Path | None = None) -> ModelFiles:
    """Locate a network by name or by path.

    ``model`` is ``cellstore-nuclei``, a published Cellpose name (``cyto``, ``cyto2``, ``cyto3``,
    ``nuclei``; with Cellpose 4 ``cpsam`` and ``cpsam_v2``: fetched once into Cellpose's own
    folder), or the path of a network trained with Cellpose, with ``<path>_size.npz`` or Cellpose's
    ``<path>_size.npy`` beside it if there is one. ``weights_dir`` replaces the folders in which
    named networks are looked for.

    Raises UnknownNameError for an unknown name, UserInputError if a file cannot be had, or if the
    network is one for the other generation of Cellpose.
    """
    published = PUBLISHED_MODELS.get(model)
    if model == DEFAULT_MODEL or published is not None:
        # A network that cannot run here is refused before it is fetched.
        wanted, found = published.generation if published else 3, installed_generation()
        if found in EXTRAS and found != wanted:
            usable = DEFAULT_MODEL if found == 3 else "cpsam"
            raise UserInputError(
                f"The network {model} needs Cellpose {wanted}, and Cellpose {found} is installed "
                f"here. Use --model {usable}, or install cellstore in an environment of its own "
                f"with: pip install 'cellstore[{EXTRAS[wanted]}]'"
            )
    if model == DEFAULT_MODEL:
        folder = weights_dir or Path(str(resources.files("cellstore.weights")))
        network = folder / f"{DEFAULT_MODEL}.pt"
        if not network.is_file():
            raise UserInputError(
                f"The network {network.name} is missing from {folder}. Install cellstore again."
            )
        return describe(DEFAULT_MODEL, network, _size_model_beside(network))
    if published is not None:
        folder = weights_dir or cellpose_folder()
        paths = [_fetched(f"{published.source}/{file}", folder / file) for file in published.files]
        return describe(model, paths[0], paths[1] if len(paths) > 1 else None)
    path = Path(model).expanduser()
    if path.is_file():
        return describe(str(path), path, _size_model_beside(path))
    if path.name != model or path.exists():
        raise UserInputError(f"There is no network file at {model}. Check the path.")
    raise UnknownNameError.of("model", model, model_names())


def installed_generation() -> int | None:
    """The first number of the installed Cellpose's version: 3 or 4; ``None`` without Cellpose."""
    try:
        return int(version("cellpose").partition(".")[0])
    except (PackageNotFoundError, ValueError):
        return None


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
    sizes_given: bool = False,
) -> Segmenter:
    """Load a network and return what segments grey images with it.

    The default thresholds are those of the published A549 study (DESIGN section 2), not
    Cellpose's (0.4 and 0.0). ``diameter`` in pixels; ``None`` estimates it per image with the
    size model, unless ``sizes_given``: every image will come with its own. ``device`` is ``auto``,
    ``cpu`` or ``cuda``.

    Raises MissingExtraError without Cellpose, UserInputError for a file that is no network of the
    installed Cellpose, for a missing size model, or for parameters out of range.
    """
    generation = installed_generation() or 3
    limits = (flow_threshold, cellprob_threshold)
    try:
        from .cellpose import CellposeSegmenter

        return CellposeSegmenter(files, *limits, diameter, device, sizes_given)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(generation, EXTRAS[3])
        raise MissingExtraError.of(error.name or "cellpose", extra) from error


def _size_model_beside(network: Path) -> Path | None:
    stems = (str(network), str(network.with_suffix("")))
    names = [f"{stem}_size{suffix}" for stem in stems for suffix in (".npz", ".npy")]
    return next((Path(name) for name in names if Path(name).is_file()), None)


def describe(name: str, network: Path, size_model: Path | None) -> ModelFiles:
    """The files of a network by the ``name`` it goes by, with their sha256."""
    digests = []
    for path in (network,) if size_model is None else (network, size_model):
        try:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise UserInputError(f"Cannot read {path}: {error.strerror}.") from error
    if size_model is not None:
        digests = [hashlib.sha256("".join(digests).encode("ascii")).hexdigest()]
    return ModelFiles(name, network, size_model, digests[0])


def _fetched(url: str, target: Path) -> Path:
    if target.is_file():
        return target
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # With certificates checked: Cellpose's own download switches that off.
        with (
            urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT) as source,  # noqa: S310 - https
            tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file,
        ):
            partial = Path(file.name)
            shutil.copyfileobj(source, file)
        partial.replace(target)
    except BaseException as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise UserInputError(
            f"Could not download {url} ({error}). Fetch it on a machine with internet access "
            f"and put it at {target}, or use --model {DEFAULT_MODEL}, which needs no download."
        ) from error
    return target
