"""The command that repro prints asks for the very parameters, by the command line's own parser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.main import get_command

import cellstore
from cellstore.config import (
    PRESETS,
    BaselineParams,
    HitsParams,
    MeasureParams,
    PredictParams,
    ProfileParams,
    SegmentParams,
    SplitParams,
    TrainParams,
)
from cellstore.enums import GroupLevel, Projection, Stage, Subset
from cellstore.jobs.runs import RecipeSpec, fingerprint
from cellstore.report.repro import RunOptions, selection_of, typed_words, words_of
from cellstore_cli.app import app


class AskedError(Exception):
    """Ends a command where it would begin to work, with what it asked for."""


class Asked:
    """Stands for a store: keeps what is asked of it, and does nothing."""

    workspace = SimpleNamespace(settings=SimpleNamespace(root=Path()))

    def __init__(self) -> None:
        self.call: tuple[str, tuple[Any, ...], dict[str, Any]] | None = None

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        def method(*args: Any, **kwargs: Any) -> None:
            self.call = (name, args, kwargs)
            raise AskedError

        return method


@pytest.fixture(scope="module")
def asked() -> Iterator[Any]:
    """Returns what a command asks of its store: the method, its arguments and its options."""
    holder: list[Asked] = []

    def fake(*_: Any, **__: Any) -> Asked:
        holder.append(Asked())
        return holder[-1]

    def ask(words: tuple[str, ...]) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        command.main(list(words), prog_name="cellstore", standalone_mode=False)
        call = holder.pop().call
        assert call is not None
        return call

    command = get_command(app)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cellstore.Store, "open", fake)
        yield ask


def marks(params: Any) -> str:
    """The fingerprint of a recipe with these parameters."""
    return fingerprint(RecipeSpec(Stage.TRAIN, 1, asdict(params)))


names = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters=","), min_size=1, max_size=12
).filter(lambda text: text == text.strip())
words = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)
lists = st.lists(names, max_size=3, unique=True).map(tuple)
filled = st.lists(names, min_size=1, max_size=3, unique=True).map(tuple)
counts = st.integers(1, 10**6)
numbers = st.floats(0, 1e6, allow_nan=False)
above_0 = st.floats(1e-9, 1e6)
below_1 = st.floats(0, 1, exclude_max=True)
segments = st.builds(
    SegmentParams,
    model=names,
    flow_threshold=numbers,
    cellprob_threshold=st.floats(-50, 50),
    diameter=st.none() | st.floats(1, 500),
    channels=st.none() | lists,
    projection=st.sampled_from(Projection),
    nuclei=lists,
)
measurements = st.builds(
    MeasureParams,
    channels=st.none() | lists,
    projection=st.sampled_from(Projection),
    features=filled,
)
every_split: dict[str, Any] = {
    "field": st.sampled_from(("target", "cell_line")),
    "seed": st.integers(0, 2**31),
    "plates": st.lists(words, max_size=2).map(tuple),
    "allow_missing": st.booleans(),
    "exclude_flagged": st.none() | st.just("7"),
    "where": st.none() | words,
    "min_images": st.integers(0, 50),
}
grouped: dict[str, Any] = every_split | {
    "downsample": st.none() | st.lists(st.tuples(names, counts.map(str)), max_size=2).map(tuple),
    "downsample_by": st.sampled_from(("image", "cell")),
    "test_size": st.floats(0.01, 0.49),
    "validation_size": st.floats(0, 0.49),
}
splits = st.one_of(
    st.builds(SplitParams, group_level=st.sampled_from(GroupLevel), **grouped),
    st.builds(
        SplitParams,
        group_level=st.just(GroupLevel.PLATE),
        test_plates=filled,
        validation_plates=lists,
        **grouped,
    ),
    st.builds(
        SplitParams,
        protocol=st.just("published"),
        test_size=st.floats(0.01, 0.99),
        **every_split,
    ),
)
augmentations = st.lists(st.sampled_from(("flips", "rotations", "intensity")), unique=True)
trainings = st.builds(
    TrainParams.of,
    st.none() | st.sampled_from(tuple(PRESETS)),
    crop_size=counts,
    batch_size=st.integers(2, 4096),
    epochs=st.integers(10, 10**6),
    patience=counts,
    learning_rate=above_0,
    weight_decay=numbers,
    label_smoothing=below_1,
    dropout=below_1,
    weights=names,
    seed=st.integers(0, 2**31),
    features=st.none() | words,
    branches=st.lists(st.sampled_from(("mask", "flow", "tabular")), unique=True).map(
        lambda found: ("image", *found)
    ),
    exclude_flagged=st.none() | st.just("7"),
    channels=lists.filter(lambda found: found != ("none",)),
    backbone=words,
    augment=augmentations.map(tuple),
    loss=st.sampled_from(("cross-entropy", "focal")),
    class_weights=st.booleans(),
    sampler=st.sampled_from(("cells", "classes", "capped")),
    schedule=st.sampled_from(("step", "cosine", "constant")),
    warmup_epochs=st.integers(0, 9),
    monitor=st.sampled_from(("loss", "accuracy")),
    precision=st.sampled_from(("32", "bf16", "16")),
    normalise=st.sampled_from(("train", "plate-controls")),
    intensity=st.sampled_from(("image", "plate")),
    step_size=counts,
    gamma=numbers,
)
baselines = st.builds(
    BaselineParams,
    max_cells=counts,
    seed=st.integers(0, 2**31),
    features=st.none() | words,
    normalise=st.sampled_from(("train", "plate-controls")),
    exclude_flagged=st.none() | st.just("7"),
    strength=above_0,
    trees=counts,
    depth=counts,
    smallest_leaf=counts,
)
predictions = st.builds(
    PredictParams,
    subset=st.none() | st.sampled_from(Subset),
    plates=st.lists(words, max_size=2).map(tuple),
    top_k=counts,
    wells=st.lists(words, max_size=2).map(tuple),
    where=st.none() | words,
    limit=st.none() | counts,
    split=st.none() | words,
    embedding=st.none() | words,
)
SOURCES = {"split": "a split", "segmentation": "0a1b", "measurement": "ff00"}
BASELINE = SOURCES | {"baseline": "logistic"}
FEW = settings(max_examples=15, deadline=None)


@given(params=segments)
@FEW
def test_segment(asked: Any, params: SegmentParams) -> None:
    spelled, doubts = words_of(RunOptions(params))
    method, args, _ = asked(spelled)
    assert (method, args[0], doubts) == ("segment", params, ())
    assert marks(args[0]) == marks(params)


@given(params=measurements)
@FEW
def test_measure(asked: Any, params: MeasureParams) -> None:
    spelled, _ = words_of(RunOptions(params, {"segmentation": "0a1b"}))
    method, args, more = asked(spelled)
    assert (method, args[0], more["segmentation"]) == ("measure", params, "0a1b")


@given(params=splits, name=words)
@FEW
def test_split(asked: Any, params: SplitParams, name: str) -> None:
    spelled, _ = words_of(RunOptions(params, {"name": name}))
    method, args, _ = asked(spelled)
    assert method == "create_split"
    assert args[0] == name
    assert args[1] == params
    assert marks(args[1]) == marks(params)


@pytest.mark.parametrize("folds", [2, 5])
def test_folds(asked: Any, folds: int) -> None:
    params = SplitParams(folds=folds, validation_size=0.0)
    spelled, _ = words_of(RunOptions(params, {"name": "five"}))
    method, args, _ = asked(spelled)
    assert (method, args) == ("create_folds", ("five", params))


@given(params=trainings)
@FEW
def test_train(asked: Any, params: TrainParams) -> None:
    spelled, doubts = words_of(RunOptions(params, SOURCES))
    method, args, more = asked(spelled)
    assert (method, args[0], doubts) == ("train", params, ())
    assert {name: more[name] for name in SOURCES} == SOURCES
    assert marks(args[0]) == marks(params)


@given(params=baselines)
@FEW
def test_baseline(asked: Any, params: BaselineParams) -> None:
    # What a logistic regression does not read, its command refuses.
    unread = ("neighbours", "trees", "depth", "smallest_leaf")
    usual = {name: getattr(BaselineParams, name) for name in unread}
    params = replace(params, **usual)
    spelled, doubts = words_of(RunOptions(params, BASELINE, unread=frozenset(unread)))
    method, args, more = asked(spelled)
    assert (method, args, doubts) == ("train_baselines", (["logistic"], params), ())
    assert {name: more[name] for name in SOURCES} == SOURCES


@given(params=predictions, everything=st.booleans())
@FEW
def test_predict(asked: Any, params: PredictParams, everything: bool) -> None:
    if everything:
        params = PredictParams(subset=params.subset, all_probabilities=True)
    spelled, _ = words_of(RunOptions(params, {"run": "12"}))
    method, args, more = asked(spelled)
    assert (method, args[0], more["run"]) == ("predict", params, "12")


@pytest.mark.parametrize(
    "params",
    [
        ProfileParams(),
        ProfileParams(select=(), plates=("P 1", "-P2"), exclude_flagged="7", features="cp"),
        ProfileParams(select=("variance",), average="weighted", normalise="sphere"),
    ],
)
def test_profile(asked: Any, params: ProfileParams) -> None:
    sources = {"segmentation": "0a1b", "measurement": "ff00"}
    spelled, doubts = words_of(RunOptions(params, sources))
    method, args, more = asked(spelled)
    assert (method, args[0], doubts) == ("profile", params, ())
    assert {name: more[name] for name in sources} == sources


@pytest.mark.parametrize(
    "params",
    [
        HitsParams(),
        HitsParams(profiles="7", plates=("P 1",), control="none", curves=("a,b", "probability:x")),
        HitsParams(run="3", q=0.1, min_effect=0.5, measure="copairs", edge="match", seed=4),
    ],
)
def test_hits(asked: Any, params: HitsParams) -> None:
    spelled, doubts = words_of(RunOptions(params))
    method, args, _ = asked(spelled)
    assert (method, args[0], doubts) == ("hits", params, ())


def test_what_a_command_cannot_say_is_said() -> None:
    for params, doubt in (
        (
            TrainParams(channels=("a,b",), branches=("image",)),
            "--channels cannot hold the name 'a,b'",
        ),
        (SegmentParams(channels=(" DNA",)), "--channels cannot hold the name ' DNA'"),
    ):
        (told,) = words_of(RunOptions(params, BASELINE))[1]
        assert doubt in told


def test_what_was_typed() -> None:
    typed = typed_words("cellstore --store 'my store' segment --plate P1 --limit=5 --json")
    assert typed == ("segment", "--plate", "P1", "--limit=5")
    assert selection_of(typed) == ["--plate=P1", "--limit=5"]
    for command in ("python run.py", "", "rm -rf /", "cellstore 'unfinished"):
        assert typed_words(command) is None
