"""Options are made from the fields of dataclasses: defaults, presets, lists, ranges."""

# No "from __future__ import annotations": the types of the fields are read.

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cellstore.config import PRESETS, Params, SegmentParams, SplitParams, TrainParams, option
from cellstore.errors import UnknownNameError, UserInputError
from cellstore_cli.app import PRESET, Common, command


@dataclass(frozen=True)
class Cooking(Params):
    dish: str = option("soup", "What is cooked.", choices=("soup", "stew"))
    minutes: int = option(30, "How long.", min=1)
    herbs: tuple[str, ...] = option(("thyme",), "Herbs.", metavar="A,B,...")
    swaps: tuple[tuple[str, str], ...] = option((), "Swaps.", name="--swap", metavar="OLD=NEW",
                                               repeated=True)  # fmt: skip
    salt: bool = option(True, "Salt it.", negatable=True)


@pytest.fixture
def cook(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command with the options of :class:`Cooking`; returns what it got."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    got: list[Any] = []
    monkeypatch.setitem(PRESETS["published"], Cooking, {"minutes": 90, "herbs": ()})  # type: ignore[arg-type]

    @command(app, "cook")
    def _(params: Cooking, common: Common, preset: str | None = PRESET) -> None:
        got.append((params, common))

    def run(*words: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert code or not result.exception, result.exception
        return got.pop() if got else result

    return run


def test_what_is_not_typed_is_the_default_or_that_of_the_preset(cook: Any) -> None:
    params, common = cook("--minutes", 30, "--json")
    assert params == Cooking()
    assert common == Common(None, True, frozenset({"minutes", "as_json"}))
    assert cook("--preset", "published")[0] == Cooking(minutes=90, herbs=())
    # Typed is typed, also where it is the default.
    assert cook("--preset", "published", "--minutes", 30)[0] == Cooking(minutes=30, herbs=())


def test_lists_pairs_and_flags(cook: Any) -> None:
    params, _ = cook("--herbs", "sage, mint", "--swap", "a=b", "--swap", "c=d=e", "--no-salt")
    assert params.herbs == ("sage", "mint")
    assert params.swaps == (("a", "b"), ("c", "d=e"))
    assert params.salt is False
    assert cook("--herbs", "none")[0].herbs == ()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--swap", "odd"), "Write --swap OLD=NEW, not 'odd'."),
        (("--preset", "grandma"), "Unknown preset 'grandma'. Known: published."),
        (("--minutes", "0"), "0 is not in the range|greater than or equal to 1"),
        (("--dish", "pie"), "pie"),
    ],
)
def test_what_does_not_fit_is_refused(cook: Any, words: tuple[str, ...], sentence: str) -> None:
    result = cook(*words, code=2)
    said = f"{result.exception} {result.stderr}"
    assert any(part in said for part in sentence.split("|")), said


def test_the_same_is_refused_from_python() -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown loss 'x'. Known: cross-entropy, focal"):
        TrainParams(loss="x")
    with pytest.raises(UserInputError, match="--epochs must be at least 1, not 0"):
        TrainParams(epochs=0)


def test_the_published_study_is_one_word() -> None:
    segment = SegmentParams.of("published")
    assert (segment.flow_threshold, segment.cellprob_threshold) == (0.7, -5.0)
    assert (segment.channels, segment.diameter) == ((), None)  # the first three channels
    split = SplitParams.of("published")
    assert (split.protocol, split.field, split.test_size) == ("published", "perturbation", 0.2)
    assert (SegmentParams().flow_threshold, SegmentParams().cellprob_threshold) == (0.4, 0.0)


def test_segment_asks_for_channels_where_the_nuclei_are_not_known(
    cellstore: Any, store: Path
) -> None:
    lines = ["FileName_OrigRNA,FileName_OrigER,Metadata_Plate,Metadata_Well,Metadata_Site"]
    lines.append("a.tif,b.tif,P2,A01,1")
    Path("more.csv").write_text("\n".join(lines))
    cellstore("init", "two")
    cellstore("ingest", "more.csv", "--look", "nowhere", "--store", "two")
    said = cellstore("segment", "--store", "two", code=2)
    assert said.err == (
        "Error: Which channels show the cells? Name them with --channels. This store has: ER, "
        "RNA.\n"
    )
