"""What a function of one's own is: another after every change, and the same for equal ones."""

from __future__ import annotations

import copy
import linecache
import os
import pickle
import shutil
import subprocess
import sys
import types
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from cellstore.errors import ImageError, UserInputError
from cellstore.learn.functions import find_function

NETWORK = """
    from torch import nn
    class Inner(nn.Module):
        def forward(self, x):
            return x * {}
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = Inner(), {}
        def forward(self, x):
            return self.inner(x) * self.scale
    f = Outer()
"""
DECORATED = """
    import functools
    def times(k):
        def decorate(g):
            @functools.wraps(g)
            def wrapped(batch):
                return g(batch) * k
            return wrapped
        return decorate
    @times({})
    def f(batch):
        return 1
"""
OBJECT = """
    class M:
        def __init__(self, w):
            self.w = w
        def look(self, batch):
            return self.w
    f = M({}).look
"""
CHANGES = {
    "globals": ("A, B, C = 1, 1, {}\ndef f(b):\n    return A + B + C", "1.5"),
    "a list": ("A = [1, {}]\ndef f(b):\n    return A", "3"),
    "a dictionary": ("A = dict(k=1, l={})\ndef f(b):\n    return A", "3"),
    "a helper inside": ("def g(x):\n    return {}\ndef f(b):\n    return [g(x) for x in b]", "3"),
    "a default": ("K = {}\ndef f(b, *, k=K):\n    return k", "3"),
    "an object": (
        OBJECT,
        "3",
    ),
    "a class": ("class H:\n    x = {}\ndef f(b):\n    return H.x", "3"),
    "a part of a network": (NETWORK.replace("= Inner(), {}", "= Inner(), 1"), "3"),
    "an attribute of a network": (NETWORK.replace("x * {}", "x * 1"), "3"),
    "a decorator": (DECORATED, "3"),
    "two on a line": ("f = [lambda b: b + 1, lambda b: b + 2][{}]", "0"),
}


def identity(source: str, name: str = "of_a_user") -> str:
    """The digest of ``f`` in a module of this source."""
    module, text = types.ModuleType(name), dedent(source)
    linecache.cache[f"{name}.py"] = (len(text), None, text.splitlines(True), f"{name}.py")
    exec(compile(text, f"{name}.py", "exec"), module.__dict__)
    return str(find_function(module.f).identity()["sha256"])


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_function_refers_to_is_part_of_it(what: str) -> None:
    source, other = CHANGES[what]
    first = identity(source.format(1))
    assert identity(source.format(other)) != first
    assert identity(source.format(1)) == first


def test_what_somebody_has_installed_is_known_by_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    found = []
    for number in (1, 1, 2):
        text = f"def g():\n    return {number}\ndef f(b):\n    return g()\n"
        (folder / "installed_by_me.py").write_text(text)
        monkeypatch.delitem(sys.modules, "installed_by_me", raising=False)
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)
        found.append(find_function("installed_by_me:f", str(tmp_path)).identity())
    assert found[0] == found[1] != found[2]


def test_it_is_the_same_in_each_process(tmp_path: Path) -> None:
    """Whatever the order of sets there, and wherever things lie."""
    (tmp_path / "with_sets.py").write_text(
        "import re\nS, R, T = {'x', 'y', 'zz'}, re.compile('a+'), (1, (2, 3))\n"
        "class H:\n    @property\n    def p(self):\n        return S\n"
        "f = lambda b: b in {'u', 'v', 'w', 'x'} or (S, R, T, H, re.sub)\n"
    )
    program = (
        "from cellstore.learn.functions import find_function as f\n"
        f"print(f('with_sets:f', {str(tmp_path)!r}).identity()['sha256'])"
    )
    # The other first: here the module is compiled already. Nor do the two order sets alike.
    seed = 1 + (os.environ.get("PYTHONHASHSEED") == "1")
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.strip() == find_function("with_sets:f", str(tmp_path)).identity()["sha256"]


def test_an_estimator_is_what_it_has_learned_however_it_lies_in_memory() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 3))

    def fit(trees: int) -> object:
        forest = RandomForestClassifier(trees, random_state=0)
        return make_pipeline(StandardScaler(), forest).fit(rows, np.arange(50) % 2)

    forest = fit(3)
    moved = pickle.loads(pickle.dumps(forest))
    same = [
        find_function(item).identity() for item in (forest, fit(3), copy.deepcopy(forest), moved)
    ]
    assert all(item == same[0] for item in same)
    assert find_function(fit(2)).identity() != same[0]


def test_another_function_in_a_worker_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "one_of_random_weights.py"
    module.write_text("import torch\nnet = torch.nn.Linear(2, 2)\nseen = lambda b: [[1], [1, 2]]\n")
    own = find_function("one_of_random_weights:net", str(tmp_path))
    own.known = own.identity()
    monkeypatch.delitem(sys.modules, "one_of_random_weights")
    with pytest.raises(UserInputError, match=r"not the same in each process.*--workers 1"):
        pickle.loads(pickle.dumps(own)).load()
    ragged = find_function("one_of_random_weights:seen", str(tmp_path))
    with pytest.raises(ImageError, match=r"returned list.*array of numbers"):
        ragged(lambda part: {}, 2)


def test_a_compiled_network_is_its_code_and_one_without_weights_yet_is_refused() -> None:
    class Times(nn.Module):
        def __init__(self, k: float) -> None:
            super().__init__()
            self.k = k

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.k if self.k > 2 else x + self.k

    one, other = (torch.fx.symbolic_trace(Times(k)) for k in (1.0, 3.0))
    assert find_function(one).identity() != find_function(other).identity()
    with pytest.raises(UserInputError, match=r"cannot be found out whether .*Linear has changed"):
        find_function(nn.Linear(2, 2, device="meta")).identity()


def test_weights_beside_an_onnx_file_are_part_of_it(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(3, 2), "w")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("y", TensorProto.FLOAT, ["n", 2])],
        [weights],
    )
    path = tmp_path / "model.onnx"
    onnx.save(
        helper.make_model(graph),
        str(path),
        save_as_external_data=True,
        location="weights of it.bin",
        size_threshold=0,
    )
    first = find_function(path).identity()
    (tmp_path / "unused.bin").write_bytes(b"other")
    assert find_function(path).identity() == first
    (tmp_path / "weights of it.bin").write_bytes(bytes(24))
    assert find_function(path).identity() != first
