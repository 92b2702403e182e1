"""A function or a model of somebody's own: found by its name, described by what it is, and called.

It may be a function, a module of torch, an estimator of scikit-learn, or a file of ONNX. All are
called with a batch of cells and return a row of numbers for each. Nothing is unpickled.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import io
import mmap
import os
import re
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..artifacts import sha256_of
from ..enums import Gives
from ..errors import ImageError, MissingExtraError, UserInputError, first_line, some_of
from .trained_models import save_estimator

FUNCTION, NETWORK, ESTIMATOR, ONNX = "function", "network", "estimator", "onnx"

INPUTS = ("image", "mask", "features")
"""What of a cell a function may be given, in the order in which a network takes them."""

NOT_OPENED = (".pt", ".pth", ".ckpt", ".safetensors", ".pkl", ".pickle", ".joblib", ".skops")
"""Endings of files that hold weights, or that run code when they are opened."""


@dataclass
class OwnFunction:
    """What is applied to cells, and how it is called.

    ``name``: for people. ``reference``: ``module:name`` or the path of an ONNX file, by which other
    processes find it; ``None``: it is in this process only. ``folder``: where its module may be.
    ``gives``: what its numbers are. ``features``: the names of the columns that it is given.
    ``known``: its identity, which it should have in other processes, too.
    """

    name: str
    kind: str
    reference: str | None
    folder: str
    given: Any = field(repr=False, compare=False)
    gives: Gives = Gives.EMBEDDING
    device: str = "cpu"
    softmax: bool = False
    features: tuple[str, ...] = ()
    known: dict[str, Any] = field(default_factory=dict)
    batch_size: int = field(default=128, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "given": None}

    def load(self) -> None:
        """Find it in this process, and put a network on its device."""
        if self.given is None:
            assert self.reference is not None
            found = find_function(self.reference, self.folder)
            if self.known and found.identity() != self.known | {"name": found.name}:
                raise UserInputError(
                    f"{self.name} is not the same in each process: its module was edited, or makes "
                    "another one each time, such as a network of random weights. Set a seed in it, "
                    "or use one process: --workers 1"
                )
            self.given = found.given
        if self.kind == NETWORK:
            self.given.to(self.device)
        elif self.kind == ONNX and isinstance(self.given, Path):
            self.given = _open_onnx(self.given, self.device)

    @property
    def is_estimator(self) -> bool:
        """Whether it reads measurements only."""
        return self.kind == ESTIMATOR

    @property
    def classes(self) -> list[str] | None:
        """The classes of a classifier of scikit-learn, in its order; of others they are unknown."""
        known = getattr(self.given, "classes_", None) if self.is_estimator else None
        return None if known is None else [str(item) for item in known]

    def choose_columns(self, known: Sequence[str]) -> tuple[str, ...]:
        """Return which columns of a feature set it is given: all, or those it was fitted with."""
        if not self.is_estimator:
            return tuple(known)
        wanted = tuple(map(str, getattr(self.given, "feature_names_in_", known)))
        number = getattr(self.given, "n_features_in_", len(wanted))
        gone = [name for name in wanted if name not in set(known)]
        if gone or number != len(wanted):
            lacking = some_of(gone) or f"it knows {number}, and the set has {len(known)}"
            raise UserInputError(
                f"{self.name} was fitted with columns that this feature set does not have: "
                f"{lacking}. Name the feature set that has them: --features NAME"
            )
        return wanted

    def identity(self) -> dict[str, Any]:
        """Return what it is: equal for equal functions, another one after every change."""
        found: dict[str, Any] = {"name": self.name, "kind": self.kind}
        own = getattr(self.given, "identity", None)
        if isinstance(own, Mapping):
            return found | {"identity": dict(own)}
        if isinstance(self.given, Path):
            beside = [self.given.parent / name for name in _data_of_onnx(self.given)]
            digests = [sha256_of(path) for path in (self.given, *beside) if path.is_file()]
            return found | {"sha256": digests[0], **({"data": digests[1:]} if beside else {})}
        digest = hashlib.sha256()
        try:
            _feed(digest, self.given, _Seen(self.given))
        except Exception as error:  # weights that are not there yet, objects of any kind
            raise UserInputError(
                f"It cannot be found out whether {self.name} has changed ({first_line(error)}). "
                "Give it an attribute 'identity', a dictionary that says what it is."
            ) from error
        return found | {"sha256": digest.hexdigest()}

    def __call__(
        self, give: Callable[[slice], Mapping[str, Any]], number: int
    ) -> tuple[list[str] | None, NDArray[Any]]:
        """Return what it says of N cells: (N, D), and the names of the columns if it names them.

        ``give`` returns the inputs of some of them. A batch that does not fit into the memory of a
        GPU is halved.
        """
        names: list[str] | None = None
        rows: list[NDArray[Any]] = []
        before = self.batch_size
        while len(rows) < number:
            some = slice(len(rows), min(number, len(rows) + self.batch_size))
            size = some.stop - some.start
            try:
                answer = self._call(give(some))
            except torch.cuda.OutOfMemoryError as error:
                if size == 1:
                    self.batch_size = before  # it is this image that is too large
                    raise ImageError(
                        "Not even one cell fits into the memory of the GPU. Use --device cpu."
                    ) from error
                torch.cuda.empty_cache()
                self.batch_size = size // 2
                continue
            except (ImageError, MemoryError):
                raise
            except (Exception, SystemExit) as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                raise ImageError(
                    f"{self.name} ended with {type(error).__name__}: {first_line(error)} "
                    f"({Path(at.filename).name}, line {at.lineno})"
                ) from None
            found, numbers = self._numbers(answer, size)
            if rows and (found != names or numbers.shape[1] != len(rows[0])):
                raise ImageError(
                    f"{self.name} returned {numbers.shape[1]} columns for some cells, and other "
                    f"ones ({len(rows[0])}) for others of the same image."
                )
            names = found
            rows += list(numbers)
        return names, np.stack(rows)

    def _call(self, batch: Mapping[str, Any]) -> Any:
        if self.kind == FUNCTION:
            return self.given(
                {k: v.numpy() if isinstance(v, Tensor) else v for k, v in batch.items()}
            )
        asked = [batch[name] for name in INPUTS if name in batch]
        if self.is_estimator:
            return self._ask_estimator(asked[0])
        tensors = [torch.as_tensor(item).to(self.device, torch.float32) for item in asked]
        if self.kind == ONNX:
            return self._ask_onnx([item.cpu().numpy() for item in tensors])
        with _evaluating(self.given), torch.inference_mode():
            answer = self.given(*tensors)
        if not isinstance(answer, Tensor):
            raise ImageError(
                f"{self.name} returned {type(answer).__name__}, not one tensor (N, D). Write a "
                "function that returns the tensor that you mean, and apply that."
            )
        return answer

    def _ask_estimator(self, rows: NDArray[Any]) -> Any:
        import pandas as pd

        model, table = self.given, rows  # type: Any, Any
        if hasattr(model, "feature_names_in_"):
            table = pd.DataFrame(rows, columns=list(self.features))
        if self.gives is not Gives.PROBABILITIES and hasattr(model, "transform"):
            answer = model.transform(table)
            return answer.toarray() if hasattr(answer, "toarray") else answer
        if hasattr(model, "predict_proba"):
            columns = np.asarray(model.predict_proba(table)).T
            return dict(zip(self.classes or (), columns, strict=True))
        predicted = np.asarray(model.predict(table))
        if self.gives is not Gives.PROBABILITIES:
            return predicted[:, None] if predicted.ndim == 1 else predicted
        names = self.classes or sorted({str(item) for item in predicted})
        return {name: (predicted.astype(str) == name).astype(float) for name in names}

    def _ask_onnx(self, arrays: Sequence[NDArray[np.float32]]) -> Any:
        asked = self.given.get_inputs()
        if len(asked) != len(arrays):
            raise ImageError(
                f"{self.name} reads {len(asked)} inputs ({some_of([a.name for a in asked])}), and "
                f"is given {len(arrays)}."
            )
        feed = {}
        for item, array in zip(asked, arrays, strict=True):
            given, wanted = array.shape, tuple(item.shape)
            same = len(given) == len(wanted) and all(
                not isinstance(want, int) or want == have
                for want, have in zip(wanted, given, strict=True)
            )
            if not same:
                raise ImageError(
                    f"{self.name} reads {item.name} of shape {wanted}, and is given {given}. "
                    "Choose other --channels, another --crop or --batch-size 1."
                )
            feed[item.name] = array.astype(np.float16) if "float16" in item.type else array
        answers = [a for a in self.given.run(None, feed) if np.ndim(a) == 2]
        if not answers:
            raise ImageError(
                f"{self.name} has no output (N, D). Of a classifier of scikit-learn: export it "
                "with zipmap=False."
            )
        return answers[-1]

    def _numbers(self, answer: Any, number: int) -> tuple[list[str] | None, NDArray[Any]]:
        """What was returned of N cells as numbers (N, D), and the names of its columns."""
        names: list[str] | None = None
        if isinstance(answer, Tensor):
            answer = answer.detach().cpu()
            answer = answer.numpy() if answer.dtype is torch.float64 else answer.float().numpy()
        elif hasattr(answer, "column_names") or hasattr(answer, "columns"):
            listed = getattr(answer, "column_names", None) or answer.columns
            answer = {str(name): np.asarray(answer[name]) for name in listed}
        if isinstance(answer, Mapping):
            names = [str(name) for name in answer]
            columns = [np.asarray(column) for column in answer.values()]
            if not columns or any(column.shape != (number,) for column in columns):
                shapes = some_of([column.shape for column in columns])
                raise ImageError(
                    f"{self.name} returned columns of shape {shapes or 'none'} for {number} cells. "
                    f"Each should have the shape ({number},)."
                )
            answer = np.column_stack(columns)
        try:
            found = np.asarray(answer)
        except ValueError:  # rows of several lengths
            found = np.array(None)
        if found.dtype.kind not in "fiub":
            what = "text" if found.dtype.kind in "UST" else f"{type(answer).__name__}"
            raise ImageError(f"{self.name} returned {what}. It should return an array of numbers.")
        if found.ndim != 2 or len(found) != number or found.shape[1] == 0:
            raise ImageError(
                f"{self.name} returned an array of shape {found.shape} for {number} cells. It "
                f"should have the shape ({number}, D): a row for each cell."
            )
        if found.dtype.kind != "f" or found.itemsize < 4:
            found = found.astype(np.float32 if found.dtype.kind == "f" else np.float64)
        unknown_is_fine = self.gives is Gives.FEATURES
        bad = np.isinf(found) if unknown_is_fine else ~np.isfinite(found)
        if bad.any():
            raise ImageError(
                f"{self.name} returned a number that is infinite or none at all (NaN), for "
                f"{int(bad.any(axis=1).sum())} of {number} cells."
            )
        if self.softmax:
            grown = np.exp(found.astype(np.float64) - found.max(axis=1, keepdims=True))
            found = grown / grown.sum(axis=1, keepdims=True)
        return names, found


def find_function(given: Any, folder: str | None = None) -> OwnFunction:
    """Return what somebody wants to apply: an object, ``module:name``, or an ONNX file.

    ``folder``: where a module may be that is not installed; default: the current folder.
    """
    folder = folder or os.getcwd()  # noqa: PTH109 - as sys.path has it
    if isinstance(given, str | Path):
        return _named(str(given), folder)
    if inspect.isclass(given):
        raise UserInputError(
            f"{given.__qualname__} is a class. Make an object of it, and apply that."
        )
    if isinstance(given, nn.Module):
        kind, described = NETWORK, type(given)
    elif hasattr(given, "fit") and hasattr(given, "get_params"):
        kind, described = ESTIMATOR, type(given)
    elif callable(given):
        plain = inspect.isfunction(given) or inspect.ismethod(given) or inspect.isbuiltin(given)
        kind, described = FUNCTION, given if plain else type(given)
    else:
        raise UserInputError(
            f"What has the type {type(given).__name__} cannot be applied to cells. Give a "
            "function, a module of torch, an estimator of scikit-learn, 'module:name' or a file "
            "model.onnx."
        )
    module, name = getattr(described, "__module__", "") or "", described.__qualname__
    reference = None
    if (
        kind == FUNCTION
        and module != "__main__"
        and getattr(sys.modules.get(module), name, 0) is given
    ):
        reference = f"{module}:{name}"
    return OwnFunction(f"{module}:{name}", kind, reference, folder, given)


def _named(text: str, folder: str) -> OwnFunction:
    """What ``module:name`` or the path of a file names."""
    path = Path(text)
    if path.suffix.lower() == ".onnx":
        path = Path(folder, path)
        if not path.is_file():
            raise UserInputError(f"There is no file {path}.")
        try:
            import onnxruntime  # noqa: F401
        except ModuleNotFoundError as error:
            raise MissingExtraError.of("onnxruntime", "onnx") from error
        return OwnFunction(path.name, ONNX, str(path), folder, path)
    if path.suffix.lower() in NOT_OPENED:
        raise UserInputError(
            f"{path.name} is not opened: such a file holds weights without their model, or runs "
            "code when it is opened. Write a module my_model.py that makes the model and reads "
            "them (torch.load with weights_only=True, skops.io.load), and name it: my_model:model"
        )
    module, colon, name = text.partition(":")
    if not colon or not name or not module:
        hint = f"{path.stem}:NAME" if path.suffix == ".py" else "my_model:embed"
        raise UserInputError(
            f"{text!r} does not name a function. Write module:name, for example {hint}, or "
            "model.onnx."
        )
    if module.endswith(".py"):
        module = module.removesuffix(".py").replace("/", ".")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = import_module(module)
    except (Exception, SystemExit) as error:
        raise UserInputError(
            f"Module {module!r} cannot be imported: {type(error).__name__}: {first_line(error)}. "
            "Is it in this folder, and what it imports installed?"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            own = [key for key, value in vars(found).items() if callable(value) and key[0] != "_"]
            raise UserInputError(
                f"Module {module!r} has no {name!r}." + (f" It has {some_of(own)}." if own else "")
            )
        found = getattr(found, part)
    made = find_function(found, folder)
    made.name = made.reference = f"{module}:{name}"
    return made


def _data_of_onnx(path: Path) -> list[str]:
    """The files beside an ONNX file that hold its weights, relative to its folder, sorted.

    Each tensor in such a file says so: an entry of the key ``location`` (onnx.proto, TensorProto).
    """
    if path.stat().st_size == 0:
        return []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        found = re.finditer(rb"\n\x08location\x12([\x01-\x7f])", held)
        names = {held[item.end() : item.end() + item[1][0]] for item in found}
    return sorted(name.decode(errors="replace") for name in names if b"\0" not in name)


def _open_onnx(path: Path, device: str) -> Any:
    import onnxruntime

    there = onnxruntime.get_available_providers()
    wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
    providers = [name for name in (*wanted, "CPUExecutionProvider") if name in there]
    try:
        return onnxruntime.InferenceSession(str(path), providers=providers)
    except Exception as error:  # its errors have no common class
        raise UserInputError(
            f"{path.name} cannot be opened as ONNX: {first_line(error)}"
        ) from error


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """Switch to evaluation, and afterwards each part back to what it was."""
    before = [(part, part.training) for part in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


class _Seen(dict[int, tuple[int, Any]]):
    """The values that were met, by address; what is of the module of ``given`` is somebody's own.

    So is what is of no installed package.
    """

    def __init__(self, given: Any) -> None:
        super().__init__()
        given = given.func if isinstance(given, functools.partial) else given
        plain = inspect.isfunction(given) or inspect.ismethod(given)
        self.module = (given if plain else type(given)).__module__

    def is_of_others(self, module: str) -> bool:
        return module != self.module and _is_installed(module)


def _feed(digest: Any, value: Any, seen: _Seen) -> None:
    """Add to a digest what decides what a function returns, as far as that can be known.

    Its source and defaults, and all that it refers to by name: numbers, texts, arrays, networks,
    estimators, and functions, classes, objects and modules, whole, where they are not of an
    installed package: of these the name counts. ``seen`` are those that were met, by their address,
    and is what keeps an address from being that of another value later.
    """
    kind = type(value)
    digest.update(f"\n{kind.__module__}.{kind.__qualname__} ".encode())
    if value is None or isinstance(value, str | bytes | int | float | complex):
        digest.update(repr(value).encode())
        return
    if not isinstance(value, tuple | frozenset):  # Python may make one of two equal constants
        if (before := seen.get(id(value))) is not None:
            digest.update(f"number {before[0]}".encode())
            return
        seen[id(value)] = (len(seen), value)
    if isinstance(value, tuple | list | set | frozenset | Mapping):
        items = value.items() if isinstance(value, Mapping) else value
        items = sorted(items, key=repr) if isinstance(value, set | frozenset) else list(items)
        digest.update(f"{len(items)}".encode())
        for item in items:
            _feed(digest, item, seen)
    elif isinstance(value, np.ndarray | np.generic):
        digest.update(f"{value.dtype} {value.shape}".encode())
        # Of objects an array has the addresses.
        digest.update(repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes())
    elif isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    elif isinstance(value, nn.Module):
        _feed_network(digest, value, seen)
    elif hasattr(value, "fit") and hasattr(value, "get_params") and not inspect.isclass(value):
        _feed_estimator(digest, value)
        _feed(digest, kind, seen)
    elif hasattr(value, "to_numpy"):  # a table, or a column of one
        _feed(digest, (list(getattr(value, "columns", ())), value.to_numpy()), seen)
    elif isinstance(value, functools.partial):
        _feed(digest, (value.func, value.args, sorted(value.keywords.items())), seen)
    elif inspect.ismethod(value):
        _feed(digest, (value.__func__, value.__self__), seen)
    elif inspect.ismodule(value):
        own = not seen.is_of_others(value.__name__) and value.__file__
        digest.update(Path(own).read_bytes() if own else value.__name__.encode())
    elif inspect.isfunction(value):
        digest.update(f"{value.__module__}:{value.__qualname__}".encode())
        if not seen.is_of_others(value.__module__):
            _feed_function(digest, value, seen)
    elif inspect.isclass(value):
        digest.update(f"{value.__module__}:{value.__qualname__}".encode())
        if not seen.is_of_others(value.__module__):
            digest.update(_source(value).encode())
            made = {k: v for k, v in vars(value).items() if not k.startswith("__") or callable(v)}
            _feed(digest, (value.__bases__, made), seen)
    elif hasattr(value, "__wrapped__"):  # such as a function with a cache
        _feed(digest, value.__wrapped__, seen)
    elif isinstance(value, staticmethod | classmethod | property):
        parts = [getattr(value, name, None) for name in ("__func__", "fget")]
        _feed(digest, parts, seen)
    elif seen.is_of_others(kind.__module__):
        shown = repr(value)
        digest.update((shown if " at 0x" not in shown else getattr(value, "__name__", "")).encode())
    else:
        _feed(digest, (kind, dict(getattr(value, "__dict__", {}))), seen)


def _feed_network(digest: Any, net: nn.Module, seen: _Seen) -> None:
    """Its parts: what they are called and are, their attributes, weights and buffers."""
    digest.update(repr(net).encode())
    for name, part in net.named_modules():
        plain = {k: v for k, v in vars(part).items() if k[0] != "_" and k != "training"}
        held = {**dict(part.named_parameters(recurse=False)), **dict(part.named_buffers("", False))}
        code = getattr(part, "code", None)  # of one that torch has compiled
        _feed(digest, (name, type(part), code, plain, held), seen)


def _feed_estimator(digest: Any, estimator: Any) -> None:
    """What was learned, whichever parts of it share their memory."""
    with zipfile.ZipFile(io.BytesIO(save_estimator(estimator))) as file:
        for name in file.namelist():
            held = file.read(name)
            if name == "schema.json":
                held = re.sub(rb'"__id__": \d+', b"", held)
            digest.update(name.encode() + held)


def _feed_function(digest: Any, given: Any, seen: _Seen) -> None:
    """Its source, its defaults, and what it and the functions inside it refer to by name."""
    digest.update(_source(given).encode())
    codes = [given.__code__]
    for code in codes:
        codes += [item for item in code.co_consts if inspect.iscode(item)]
    names = {name for code in codes for name in code.co_names}
    made = {
        item.argval
        for code in codes
        for item in dis.get_instructions(code)
        if item.opname == "STORE_GLOBAL"
    }
    known = {n: given.__globals__[n] for n in names - made if n in given.__globals__}
    cells = zip(given.__code__.co_freevars, given.__closure__ or (), strict=True)
    for name, cell in cells:
        with suppress(ValueError):  # it is empty
            known[name] = cell.cell_contents
    _feed(digest, (given.__defaults__, given.__kwdefaults__, sorted(known)), seen)
    for name in sorted(known):
        _feed(digest, known[name], seen)


@functools.cache
def _is_installed(module: str | None) -> bool:
    """Whether a module is of Python, of an installed package, or of cellstore itself.

    What is made by ``exec`` may have none.
    """
    if module is None:
        return False
    first = module.partition(".")[0]
    if (first in sys.stdlib_module_names and first != "__main__") or first == "cellstore":
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return first not in ("__main__", "") and module in sys.modules
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _source(described: Any) -> str:
    """The source of a function or a class; where it is not known, what Python has made of it."""
    code = getattr(described, "__code__", None)
    try:
        text = inspect.getsource(code or described)
    except (OSError, TypeError):
        return "" if code is None else _code(code)
    # One line may have several functions without a name.
    return text if code is None or code.co_name != "<lambda>" else f"{text}\n{_code(code)}"


def _code(code: Any) -> str:
    # The order of a set is another one in each process.
    constants = (sorted(c, key=repr) if isinstance(c, frozenset) else c for c in code.co_consts)
    inner = [_code(item) if inspect.iscode(item) else repr(item) for item in constants]
    return f"{code.co_code.hex()} {code.co_names} {inner}"
