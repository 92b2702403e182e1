"""The options of the command train, by what they are about.

Where nothing is given, the recipe says: that is what None means.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from cellstore.config import TRAIN_RECIPES, TrainParams, as_parameters
from cellstore.errors import UserInputError

from . import render
from .options import names

CELLS = "Which cells"
NETWORK = "The network"
LEARNING = "How it learns"
CARRYING_OUT = "How it is carried out"
BASELINES = "Instead of a network"
SECTIONS = (CELLS, NETWORK, LEARNING, CARRYING_OUT, BASELINES)


class Sectioned(TyperCommand):
    """A command whose help lists its options by section, those without one first."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options."""
        for title, records in _sections(self, ctx):
            with formatter.section(title):
                formatter.write_dl(records)


def _sections(command: Any, ctx: Any) -> Iterator[tuple[str, list[Any]]]:
    for section in (None, *SECTIONS):
        params = [p for p in command.get_params(ctx) if _section(p) == section]
        records = [record for p in params if (record := p.get_help_record(ctx)) is not None]
        if records:
            yield section or "Options", records


_SHARED = {
    **dict.fromkeys(("leave_out_flagged", "qc_run"), CELLS),
    **dict.fromkeys(("baseline", "no_predict", "max_cells"), BASELINES),
    "device": CARRYING_OUT,
}
"""Sections of options that other commands have, too."""


def _section(param: Any) -> str | None:
    return _SHARED.get(param.name) or getattr(param, "rich_help_panel", None)


class Loss(StrEnum):
    """Losses."""

    CROSS_ENTROPY = "cross-entropy"
    FOCAL = "focal"


class Sampler(StrEnum):
    """How often cells are read in an epoch."""

    CELLS = "cells"
    CLASSES = "classes"
    CAPPED = "capped"


class ScheduleName(StrEnum):
    """How the learning rate goes."""

    STEP = "step"
    COSINE = "cosine"
    CONSTANT = "constant"


class Monitor(StrEnum):
    """What chooses the epoch."""

    LOSS = "loss"
    ACCURACY = "accuracy"


class Precision(StrEnum):
    """Numbers of the network."""

    SINGLE = "32"
    BF16 = "bf16"
    HALF = "16"


class Normalise(StrEnum):
    """What features are compared with."""

    TRAIN = "train"
    CONTROLS = "plate-controls"


class Intensity(StrEnum):
    """What is white in a crop."""

    IMAGE = "image"
    PLATE = "plate"


def _option(section: str | None, help: str, **more: Any) -> Any:  # noqa: A002 - as Typer has it
    return typer.Option(help=help, rich_help_panel=section, show_default=False, **more)


RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="The values that hold where no option is given: published, the network of the study, "
        "or compact, for few cells.",
    ),
]


def _list_recipes(wanted: bool) -> None:
    if not wanted:
        return
    recipes = {name: as_parameters(params) for name, params in TRAIN_RECIPES.items()}
    rows = sorted({key for values in recipes.values() for key in values} - {"recipe"})
    published = {key: getattr(TRAIN_RECIPES["published"], key) for key in rows}
    table = [
        [key.replace("_", "-"), *(_shown(v.get(key, published[key])) for v in recipes.values())]
        for key in rows
        if key not in ("features", "leave_out_flagged")
    ]
    render.table(["option", *recipes], table)
    raise typer.Exit


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple | list):
        return ",".join(value) or "none"
    return "what is known" if value is None else render.cell(value)


ListOption = Annotated[
    bool,
    typer.Option(
        "--list-recipes",
        callback=_list_recipes,
        is_eager=True,
        help="Show the values of each recipe, and end.",
    ),
]
ResumeOption = Annotated[
    str | None,
    _option(
        None,
        "Go on with a run that was broken off, after its last whole epoch, with its own options; "
        "'latest': the last such run.",
        metavar="RUN",
    ),
]
ForceOption = Annotated[
    bool,
    typer.Option("--force", help="Begin anew, even if this was trained already or was broken off."),
]
SplitOption = Annotated[
    str | None, _option(CELLS, "The split. Default: the latest.", metavar="NAME")
]
SegmentationOption = Annotated[
    str | None,
    _option(
        CELLS,
        "Which segmentation, as 'cellstore status' lists them. Default: the last used.",
        metavar="RECIPE",
    ),
]
MeasurementOption = Annotated[
    str | None,
    _option(
        CELLS,
        "Which measurement, as 'cellstore status' lists them. Default: the last used.",
        metavar="RECIPE",
    ),
]
FeaturesOption = Annotated[
    str | None,
    _option(
        CELLS,
        "The feature set that the tabular branch reads, also one ingested from another tool. "
        "Default: the built-in measurements last used.",
        metavar="NAME",
    ),
]
BranchesOption = Annotated[
    str | None,
    _option(
        NETWORK,
        "What the network looks at: some of mask, flow, image (channels) and tabular (features). "
        "Default: mask, flow and tabular, or those of them that are known of the cells.",
        metavar="A,B,...",
    ),
]
TrainChannelsOption = Annotated[
    str | None,
    _option(NETWORK, "The channels of the branch image. Default: all.", metavar="A,B,..."),
]
BackboneOption = Annotated[
    str | None,
    _option(
        NETWORK,
        "What looks at crops: a classifier of torchvision, for example efficientnet_b0, resnet18, "
        "mobilenet_v3_small, convnext_tiny.",
        metavar="NAME",
    ),
]
WeightsOption = Annotated[
    str | None,
    _option(
        NETWORK,
        "What the backbone starts from: chance, ImageNet, or a file of its weights.",
        metavar="none|imagenet|FILE",
    ),
]
CropSizeOption = Annotated[
    int | None,
    _option(NETWORK, "Crops of cells are scaled to this.", min=1, metavar="PIXELS"),
]
DropoutOption = Annotated[
    float | None,
    _option(NETWORK, "Dropout of the tabular branch.", min=0.0, max=1.0, metavar="X"),
]
EpochsOption = Annotated[
    int | None, _option(LEARNING, "At most so many passes over the cells.", min=1, metavar="N")
]
PatienceOption = Annotated[
    int | None,
    _option(LEARNING, "Stop after so many epochs without a better one.", min=1, metavar="N"),
]
MonitorOption = Annotated[
    Monitor | None, _option(LEARNING, "What of the validation side makes an epoch better.")
]
BatchSizeOption = Annotated[int | None, _option(LEARNING, "Cells per step.", min=2, metavar="N")]
SamplerOption = Annotated[
    Sampler | None,
    _option(
        LEARNING,
        "How often cells come in an epoch: each once; each class as often; the largest class only "
        "as often as the second.",
    ),
]
AugmentOption = Annotated[
    str | None,
    _option(
        LEARNING,
        "Change crops at each step: some of flips, rotations and intensity; or none.",
        metavar="A,B,...",
    ),
]
LossOption = Annotated[Loss | None, _option(LEARNING, "What is made small.")]
ClassWeightsOption = Annotated[
    bool | None,
    typer.Option(
        "--class-weights/--no-class-weights",
        help="Weigh classes in the loss by how rare they are.",
        rich_help_panel=LEARNING,
        show_default=False,
    ),
]
SmoothingOption = Annotated[
    float | None,
    _option(LEARNING, "Smoothing of the labels in the loss.", min=0.0, max=1.0, metavar="X"),
]
LearningRateOption = Annotated[
    float | None, _option(LEARNING, "Step of Adam.", min=0.0, metavar="X")
]
ScheduleOption = Annotated[
    ScheduleName | None,
    _option(LEARNING, "How the step goes: half of it every 5 epochs, a cosine, or constant."),
]
WarmupOption = Annotated[
    int | None, _option(LEARNING, "Epochs in which the step rises first.", min=0, metavar="N")
]
WeightDecayOption = Annotated[
    float | None, _option(LEARNING, "Weight decay of Adam.", min=0.0, metavar="X")
]
NormaliseOption = Annotated[
    Normalise | None,
    _option(
        LEARNING,
        "Compare features with the training side, or first with the negative controls of their "
        "plate.",
    ),
]
IntensityOption = Annotated[
    Intensity | None,
    _option(LEARNING, "White in a crop is the white of its image, or that of its plate."),
]
PrecisionOption = Annotated[
    Precision | None, _option(LEARNING, "Bits of the numbers; fewer are faster on most GPUs.")
]
SeedOption = Annotated[int | None, _option(LEARNING, "Same seed, same start.", min=0, metavar="N")]
DevicesOption = Annotated[
    int,
    typer.Option(
        "--devices",
        min=1,
        metavar="N",
        help="GPUs of this host that learn together, a process each. Under torchrun or SLURM, "
        "also on several hosts, leave it out.",
        rich_help_panel=CARRYING_OUT,
    ),
]
CompileOption = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the network first: minutes, then faster steps.",
        rich_help_panel=CARRYING_OUT,
    ),
]
LogOption = Annotated[
    str | None,
    _option(
        CARRYING_OUT,
        "Write metrics for other programs, too: some of csv, tensorboard and mlflow.",
        metavar="A,B,...",
    ),
]
LogDirOption = Annotated[
    Path | None,
    _option(CARRYING_OUT, "Where to. Default: logs/run-N, here.", metavar="DIR"),
]


OF_RESUME = frozenset(
    {"resume", "device", "devices", "compile_", "log", "log_dir", "store", "as_json"}
)
"""Options that do not change what is learned, and so go with --resume."""

_LISTS = ("branches", "channels", "augment")


def chosen_params(recipe: str, **given: Any) -> TrainParams:
    """Return the values of a recipe but for the options that were typed.

    Raises:
        UnknownNameError: there is no such recipe.
    """
    typed = {name: value for name, value in given.items() if value is not None}
    for name in _LISTS:
        if name in typed:
            typed[name] = () if typed[name] == "none" else names(typed[name])
    values = {n: v.value if isinstance(v, StrEnum) else v for n, v in typed.items()}
    return TrainParams.of(recipe, **values)


def check_resume(ctx: typer.Context) -> None:
    """Refuse options beside --resume that the run to go on with has of its own.

    Raises:
        UserInputError: one was given.
    """
    if ctx.params.get("resume") is None:
        return
    others = sorted(n for n in ctx.params if n not in OF_RESUME and was_typed(ctx, n))
    if others:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise UserInputError(
            f"--resume goes on with the options of the run itself: leave {flags} away, or train "
            "anew without --resume."
        )


def was_typed(ctx: typer.Context, name: str) -> bool:
    """Whether an option was given on the command line."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
