"""Cells of an image: the networks there are, where their files lie, and Cellpose itself.

Needs the extra ``segment`` (Cellpose 3) or ``segment-sam`` (Cellpose 4): one Python holds one of
them, and what is installed decides. The module itself is light: torch and Cellpose are imported by
what runs a network.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import shutil
import urllib.request
import uuid
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..enums import DEFAULT_MODEL
from ..errors import ImageError, UnknownNameError, UserInputError
from .regions import find_regions

if TYPE_CHECKING:
    import torch
    from cellpose.models import CellposeModel
    from numpy.typing import NDArray


class Published(NamedTuple):
    """A network that Cellpose publishes: its file, that of its size model, and who can run it."""

    files: tuple[str, ...]
    generation: int
    source: str


_CELLPOSE_3 = "https://www.cellpose.org/models"
_CELLPOSE_4 = "https://huggingface.co/mouseland/cellpose-sam/resolve/main"

PUBLISHED_MODELS = {
    "cyto": Published(("cytotorch_0", "size_cytotorch_0.npy"), 3, _CELLPOSE_3),
    "cyto2": Published(("cyto2torch_0", "size_cyto2torch_0.npy"), 3, _CELLPOSE_3),
    "cyto3": Published(("cyto3", "size_cyto3.npy"), 3, _CELLPOSE_3),
    "nuclei": Published(("nucleitorch_0", "size_nucleitorch_0.npy"), 3, _CELLPOSE_3),
    "cpsam": Published(("cpsam",), 4, _CELLPOSE_4),
    "cpsam_v2": Published(("cpsam_v2",), 4, _CELLPOSE_4),
}
"""Cellpose's own networks, by name."""

EXTRAS = {3: "segment", 4: "segment-sam"}
"""The extra that brings each generation of Cellpose; they exclude each other."""

CHANNELS = [2, 32, 64, 128, 256]
"""Width of each level of the standard network of Cellpose 3; the first is its input planes."""

SMALLEST_DIAMETER = 5.0
"""Pixels; Cellpose's own lower bound of an estimate."""

TILES, TILES_ON_GPU = 8, 64
"""Tiles of an image that the network sees at once: Cellpose's own ``batch_size``."""


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
    written one after the other. ``run_id``: the finetune run of this store that made it, if any.
    """

    name: str
    network: Path
    size_model: Path | None
    sha256: str
    run_id: int | None = None


def find_model(model: str = DEFAULT_MODEL) -> ModelFiles:
    """Locate a network by name or by path.

    ``model`` is ``cellstore-nuclei``, a published Cellpose name (``cyto``, ``cyto2``, ``cyto3``,
    ``nuclei``; with Cellpose 4 ``cpsam`` and ``cpsam_v2``: fetched once into Cellpose's own
    folder), or the path of a network trained with Cellpose, with ``<path>_size.npz`` or Cellpose's
    ``<path>_size.npy`` beside it if there is one.

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
    if published is not None:
        chosen = os.environ.get("CELLPOSE_LOCAL_MODELS_PATH")  # as Cellpose reads it
        folder = Path(chosen) if chosen else Path.home() / ".cellpose" / "models"
        paths = [_fetched(f"{published.source}/{file}", folder / file) for file in published.files]
        return describe(model, paths[0], paths[1] if len(paths) > 1 else None)
    if model == DEFAULT_MODEL:
        network = Path(str(resources.files("cellstore.weights"))) / f"{DEFAULT_MODEL}.pt"
    else:
        network = Path(model).expanduser()
        if not network.is_file():
            if network.name != model or network.exists():
                raise UserInputError(f"There is no network file at {model}. Check the path.")
            raise UnknownNameError.of("model", model, [DEFAULT_MODEL, *PUBLISHED_MODELS])
    stems = (str(network), str(network.with_suffix("")))
    beside = [Path(f"{stem}_size{suffix}") for stem in stems for suffix in (".npz", ".npy")]
    name = model if model == DEFAULT_MODEL else str(network)
    return describe(name, network, next((path for path in beside if path.is_file()), None))


def installed_generation() -> int | None:
    """The first number of the installed Cellpose's version: 3 or 4; ``None`` without Cellpose."""
    try:
        return int(version("cellpose").partition(".")[0])
    except (PackageNotFoundError, ValueError):
        return None


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
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # With certificates checked: Cellpose's own download switches that off.
        with urllib.request.urlopen(url, timeout=30.0) as source, partial.open("wb") as file:  # noqa: S310 - https
            shutil.copyfileobj(source, file)
        partial.replace(target)
    except OSError as error:
        raise UserInputError(
            f"Could not download {url} ({error}). Fetch it on a machine with internet access "
            f"and put it at {target}, or use --model {DEFAULT_MODEL}, which needs no download."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return target


def load_segmenter(
    files: ModelFiles,
    *,
    flow_threshold: float = 0.7,
    cellprob_threshold: float = -5.0,
    diameter: float | None = None,
    device: str = "auto",
) -> CellposeSegmenter:
    """Load a network and return what segments grey images with it.

    The default thresholds are those of the published A549 study (DESIGN section 2), not
    Cellpose's (0.4 and 0.0). ``diameter`` in pixels; ``None`` estimates it per image with the
    size model. ``device`` is ``auto``, ``cpu`` or ``cuda``.

    Raises UserInputError for a file that is no network of the installed Cellpose, or for a missing
    size model.
    """
    planes, size_model = CHANNELS[0], None
    if installed_generation() == 4:
        planes, diameter = 1, diameter or 30.0  # at which it leaves an image at its own scale
    elif diameter is None and files.size_model is not None:
        size_model = load_size_model(files.size_model)
    elif diameter is None:
        raise UserInputError(
            f"The network {files.name} has no size model, so the cell diameter cannot be "
            "estimated. Give it in pixels with --diameter, or put "
            f"{files.network.name}_size.npz beside the network."
        )
    model = load_network(files.network, device)
    return CellposeSegmenter(
        model=model,
        planes=planes,
        diameter=diameter,
        size_model=size_model,
        thresholds={
            "flow_threshold": float(flow_threshold),
            "cellprob_threshold": float(cellprob_threshold),
        },
        tiles=TILES_ON_GPU if model.device.type == "cuda" else TILES,
    )


@dataclass
class CellposeSegmenter:
    """A Cellpose network with the thresholds it is used at. Same input, same output on a CPU.

    ``tiles``: how many parts of an image the network sees at once; fewer where the memory of the
    GPU does not hold them, which is found out once. Cellpose 4 takes cells of any size: without a
    diameter nothing is scaled.
    """

    model: CellposeModel
    planes: int
    diameter: float | None
    size_model: SizeModel | None
    thresholds: dict[str, float]
    tiles: int = TILES

    def segment(self, image: NDArray[np.float32]) -> SegmentationResult:
        """Find the cells of an image.

        It is (H, W) float32 of any intensity scale, or (2, H, W): the plane of the cells
        (cytoplasm) and that of their nuclei.

        Raises:
            ImageError: pixels that are not one or two finite planes, or an image that does not
                fit into the memory of the GPU even tile by tile.
        """
        import torch

        stack, before = input_planes(image, self.planes)[None], self.tiles
        shape = stack.shape[1:3]
        while True:
            same: dict[str, Any] = {"channel_axis": 3, "batch_size": self.tiles}
            try:
                diameter = self.diameter
                if self.size_model is not None:
                    diameter = self._estimated(stack, self.size_model, same)
                found = self.model.eval(stack, diameter=diameter, **same, **self.thresholds)
                break
            except torch.cuda.OutOfMemoryError as error:
                if self.tiles == 1:
                    self.tiles = before  # it is this image that is too large
                    raise ImageError(
                        "The image does not fit into the memory of the GPU, even alone. "
                        "Use --device cpu."
                    ) from error
                torch.cuda.empty_cache()
                self.tiles //= 2
        assert diameter is not None
        masks, (colours, _, logit), _ = found
        bounded = np.clip(logit.reshape(shape).astype(np.float64), -60, 60)
        probability = np.rint(255 * (1.0 / (1.0 + np.exp(-bounded)))).astype(np.uint8)
        parts = [colours.reshape(*shape, 3), probability[..., None]]
        flows = np.concatenate(parts, axis=-1, dtype=np.uint8)
        return SegmentationResult(find_regions(masks.reshape(shape)).numbered, flows, diameter)

    def _estimated(
        self, stack: NDArray[np.float32], size_model: SizeModel, same: dict[str, Any]
    ) -> float:
        """The diameter by Cellpose's two steps: by the style vector, then by the cells found so."""
        from cellpose.utils import diameters

        style = self.model.eval(stack, resample=False, compute_masks=False, **same)[-1]
        guess = size_model.estimate(np.asarray(style).ravel())
        masks = self.model.eval(stack, diameter=guess, resample=False, interp=False, **same)[0]
        return (float(diameters(masks)[0]) if masks.any() else 0.0) or size_model.diam_mean


def input_planes(image: NDArray[np.float32], planes: int) -> NDArray[np.float32]:
    """``image``, (H, W) or (2, H, W), as (H, W, 1 or 2), float32, finite.

    Planes of zeros follow its own, up to ``planes`` of them.
    """
    given = np.asarray(image, dtype=np.float32)
    stacked = given[None] if given.ndim == 2 else given
    is_one_or_two = given.ndim == 2 or (given.ndim == 3 and len(given) == 2)
    if not is_one_or_two or min(stacked.shape[1:]) < 2:
        raise ImageError(
            f"Segmentation needs a plane (H, W) or two (2, H, W), not {given.shape} values."
        )
    if not np.isfinite(given).all():
        raise ImageError("The image holds values that are not finite numbers.")
    padding = [(0, 0), (0, 0), (0, max(0, planes - len(stacked)))]
    return np.pad(np.moveaxis(stacked, 0, -1), padding)


def load_network(path: Path, device: str = "auto") -> CellposeModel:
    """Return the network in ``path`` on ``device`` (``auto``, ``cpu``, ``cuda``).

    Raises UserInputError if the file is no network of the installed generation of Cellpose: the
    standard one of Cellpose 3, or Cellpose-SAM.
    """
    import torch
    from cellpose.models import CellposeModel

    # Without a handler Python prints Cellpose's warnings ("no mask pixels found") on stderr.
    logging.getLogger("cellpose").addHandler(logging.NullHandler())
    # The default, chosen outright: torch warns on every first use by Cellpose while it is unchosen.
    torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]
    try:  # no code in the file is run
        state = torch.load(path, map_location="cpu", weights_only=True)
        # Names and shapes first: Cellpose loads whatever matches, and a foreign file in part.
        names = {name.removeprefix("module.") for name in state}
    except Exception as error:  # torch and pickle raise what the bytes lead them to
        raise UserInputError(
            f"{path} cannot be read as a network: the file is damaged, or it is something else."
        ) from error
    installed, needed = installed_generation(), 4 if "W2" in names else 3
    if needed != installed:
        raise UserInputError(
            f"{path} is not a Cellpose {installed} network, and Cellpose {installed} is installed. "
            f"Choose another network, or, if it is a Cellpose {needed} network, use it where "
            f"cellstore is installed with: pip install 'cellstore[{EXTRAS[needed]}]'"
        )
    if installed == 4:
        if "encoder.patch_embed.proj.weight" not in names or "encoder.cls_token" in names:
            raise UserInputError(f"{path} is not a Cellpose-SAM network. Choose one such as cpsam.")
    else:
        from cellpose.resnet_torch import CPnet  # not in Cellpose 4

        expected = CPnet(list(CHANNELS), 3, sz=3).state_dict()
        # Networks of before Cellpose 2 do not hold their diameters.
        wanted = {k: v.shape for k, v in expected.items() if not k.startswith("diam_")}
        found = {k: getattr(v, "shape", None) for k, v in state.items() if k in wanted}
        if found != wanted:
            raise UserInputError(
                f"{path} is not a standard Cellpose 3 network with two input planes. "
                "Choose another file, or a name such as cellstore-nuclei."
            )
    chosen = pick_device(device)
    on_gpu = chosen.type != "cpu"
    # Cellpose 4: few CPUs have arithmetic for half precision; the others would be slower with it.
    # Cellpose 3 without mkldnn: plain torch uses oneDNN by itself, and does not convert the
    # network in each call.
    options = {"use_bfloat16": on_gpu} if installed == 4 else {"mkldnn": False}
    return CellposeModel(pretrained_model=str(path), device=chosen, gpu=on_gpu, **options)


def pick_device(device: str) -> torch.device:
    """Return the processor that networks run on; ``auto`` is CUDA where there is one.

    Raises UserInputError for one that is not there.
    """
    import torch

    available = torch.cuda.is_available()
    if device == "auto":
        return torch.device("cuda" if available else "cpu")
    if device not in {"cpu", "cuda"}:
        raise UserInputError(f"Unknown device {device!r}. Use auto, cpu or cuda.")
    if device == "cuda" and not available:
        raise UserInputError("This machine has no usable CUDA device. Use cpu or auto.")
    return torch.device(device)


@dataclass(frozen=True)
class SizeModel:
    """``log(diameter / diam_mean) = weights @ (style - style_mean) + offset``.

    ``weights`` and ``style_mean``: (256,) float64. ``diam_mean``: pixels.
    """

    weights: NDArray[np.float64]
    style_mean: NDArray[np.float64]
    offset: float
    diam_mean: float

    def estimate(self, style: NDArray[np.floating[Any]]) -> float:
        """Diameter in pixels for a style vector (256,)."""
        logarithm = float(self.weights @ (style.astype(np.float64) - self.style_mean))
        diameter = float(np.exp(logarithm + self.offset)) * self.diam_mean
        return max(SMALLEST_DIAMETER, diameter) if np.isfinite(diameter) else self.diam_mean


def load_size_model(path: Path) -> SizeModel:
    """Read an ``.npz`` of ours or an ``.npy`` of Cellpose.

    Raises UserInputError if the file is not a size model, or holds anything but numbers.
    """
    try:
        with path.open("rb") as file:
            if path.suffix == ".npz":
                with np.load(file, allow_pickle=False) as arrays:
                    values = {name: arrays[name] for name in ("A", "smean", "ymean", "diam_mean")}
            else:  # a dictionary inside a 0-dimensional array of objects
                if np.lib.format.read_magic(file) == (1, 0):  # type: ignore[no-untyped-call]
                    np.lib.format.read_array_header_1_0(file)  # type: ignore[no-untyped-call]
                else:
                    np.lib.format.read_array_header_2_0(file)  # type: ignore[no-untyped-call]
                values = _NumbersOnly(file).load().item()
        weights = np.asarray(values["A"], np.float64).ravel()
        style_mean = np.asarray(values["smean"], np.float64).ravel()
        offset, diam_mean = float(values["ymean"]), float(values["diam_mean"])
        finite = np.isfinite(weights).all() and np.isfinite(style_mean).all()
        if weights.shape != style_mean.shape or not finite or not diam_mean > 0:
            raise ValueError("its arrays do not fit together")
    except Exception as error:  # a damaged file leads numpy and pickle to errors of many kinds
        raise UserInputError(
            f"{path} is not a Cellpose size model ({error}). Train one with the network, "
            "or remove the file and give the diameter."
        ) from error
    return SizeModel(weights, style_mean, offset, diam_mean)


class _NumbersOnly(pickle.Unpickler):
    """Rebuilds numpy arrays, numpy numbers and plain containers; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy._core", "numpy.core"), name:
            case "numpy.core.multiarray", "_reconstruct":
                return _empty_array
            case "numpy.core.multiarray", "scalar":
                return _numpy_scalar
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return np.dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not a number")


def _empty_array(kind: object, shape: tuple[int, ...], _code: object) -> NDArray[Any]:
    if kind is not np.ndarray or shape != (0,):
        raise pickle.UnpicklingError("unexpected array type")
    return np.ndarray((0,), np.int8)


def _numpy_scalar(dtype: np.dtype[Any], data: bytes = b"") -> Any:
    if dtype.hasobject or len(data) != dtype.itemsize:
        raise pickle.UnpicklingError("unexpected scalar")
    return np.frombuffer(data, dtype)[0]
