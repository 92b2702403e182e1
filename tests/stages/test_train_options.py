"""Recipes and options of a training, what they put into the run, and what is refused."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from killed_training import PARAMS
from small_training import Opener, Trained, checkpoint
from sqlalchemy import select, update

from cellstore.config import (
    PRESETS,
    PredictParams,
    SegmentParams,
    SplitParams,
    TrainParams,
)
from cellstore.enums import Stage, Subset
from cellstore.errors import CellstoreError, UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.models import Image, ImageFile, Label, Recipe, Run, SplitMember
from cellstore.stages.corrections import rename
from cellstore.stages.predict import predict
from cellstore.stages.train import train

STUDY = {
    "branches": ("mask", "flow", "tabular"),
    "backbone": "efficientnet_b0",
    "weights": "none",
    "crop_size": 224,
    "dropout": 0.5,
    "epochs": 50,
    "patience": 5,
    "monitor": "loss",
    "batch_size": 512,
    "sampler": "cells",
    "augment": (),
    "loss": "cross-entropy",
    "class_weights": False,
    "label_smoothing": 0.1,
    "learning_rate": 1e-4,
    "schedule": "step",
    "step_size": 5,
    "gamma": 0.5,
    "warmup_epochs": 0,
    "weight_decay": 1e-4,
    "normalise": "train",
    "intensity": "image",
    "precision": "32",
}
NOT_OF_THE_STUDY = {"features", "exclude_flagged", "where", "sql", "channels", "seed"}


def test_the_published_network_is_that_of_the_study() -> None:
    found = asdict(TrainParams.of("published"))
    assert {name: found[name] for name in STUDY} == STUDY


@pytest.mark.parametrize(
    ("kind", "rest"),
    [
        (TrainParams, NOT_OF_THE_STUDY),
        (SegmentParams, {"model"}),
        # By image, without a validation subset, DMSO cut: the protocol says so.
        (SplitParams, {item.name for item in fields(SplitParams)} - {"field", "test_size"}),
    ],
)
def test_no_new_default_changes_the_published_study(kind: type, rest: set[str]) -> None:
    named = PRESETS["published"][kind].keys()
    assert {item.name for item in fields(kind)} - named == rest - {"protocol"}


def test_a_recipe_holds_all_parameters(trained: Trained, opened: Opener) -> None:
    workspace = opened(trained.root)
    with workspace.database.read() as session:
        recipe = session.get_one(Recipe, trained.result.recipe_id)
    every = asdict(TrainParams()).keys() - {"features", "where", "sql"}  # the first is a recipe
    assert recipe.parameters.keys() >= every | {"split", "cells"}


def test_options_override_a_preset() -> None:
    small = TrainParams.of("published", crop_size=32, augment=("flips",))
    assert (small.crop_size, small.augment, small.backbone) == (32, ("flips",), "efficientnet_b0")
    assert TrainParams.of(epochs=2).warmup_epochs == 1
    assert TrainParams(epochs=2, warmup_epochs=2).warmup_epochs == 1
    with pytest.raises(UnknownNameError, match=r"Unknown preset 'tiny'. Known: published"):
        TrainParams.of("tiny")
    assert TrainParams.from_recipe(asdict(small)) == small


@pytest.mark.heavy
def test_the_default_network_looks_at_channels_by_the_scale_of_their_plate(
    built: Path, opened: Opener
) -> None:
    workspace = opened(built)
    params = TrainParams.of(
        branches=("image", "mask"),
        channels=("dna",),
        crop_size=32,
        epochs=3,
        backbone="shufflenet_v2_x0_5",
        class_weights=True,
    )
    result = train(workspace, params, device="cpu")
    assert result.branches == ("mask", "image")
    tensors, record = checkpoint(workspace, result.run_id)
    assert record["channels"] == ["DNA"]
    assert record["shape"]["plane_channels"] == 1
    assert record["shape"]["backbone"] == "shufflenet_v2_x0_5"
    assert [len(levels) for levels in record["scaler"]["intensities"].values()] == [2]
    assert record["parameters"]["augment"] == ["flips", "intensity", "rotations"]
    predicted = predict(workspace, run=str(result.run_id), device="cpu")
    assert predicted.cells == 8
    assert len(tensors) > 1000
    again = replace(params, augment=("rotations", "intensity", "flips"), channels=())
    assert train(workspace, again, device="cpu").run_id == result.run_id
    rename(workspace, "channel", "DNA", "Hoechst")
    again = replace(again, channels=("hoechst",))
    assert train(workspace, again, device="cpu").run_id == result.run_id
    labelled = predict(workspace, PredictParams(top_k=1), run=str(result.run_id), device="cpu")
    assert (labelled.cells, labelled.failures) == (8, ())


def refused(workspace: Workspace, match: str, error: type[Exception], **changes: object) -> None:
    with pytest.raises(error, match=match):
        train(workspace, replace(PARAMS, **changes), device="cpu")  # type: ignore[arg-type]


def test_what_cannot_be_trained_is_told_before_a_run_begins(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    unknown = {
        "loss": "cross-entropy, focal",
        "sampler": "cells, classes, capped",
        "schedule": "step, cosine, constant",
        "precision": "32, bf16, 16",
        "monitor": "loss, accuracy",
        "normalise": "train, plate-controls",
        "intensity": "image, plate",
    }
    for name, known in unknown.items():
        refused(workspace, f"Unknown {name} 'x'. Known: {known}", UnknownNameError, **{name: "x"})
    refused(workspace, "Unknown name for --augment 'x'", UnknownNameError, augment=("x",))
    refused(workspace, "Unknown name for --branches 'x'", UnknownNameError, branches=("x",))
    refused(workspace, "one branch or more", UserInputError, branches=())
    pictures = ("image", "tabular")
    refused(
        workspace, "Unknown channel 'ER'. Known: DNA", UnknownNameError,
        branches=pictures, channels=("ER",),
    )  # fmt: skip
    refused(
        workspace, "Only the branch image reads channels: add it", UserInputError, channels=("DNA",)
    )
    refused(
        workspace, "each channel .* once", UserInputError,
        branches=pictures, channels=("DNA", "dna"),
    )  # fmt: skip
    refused(
        workspace, "Backbone 'vit_b_32' cannot be used here", UserInputError,
        branches=pictures, backbone="vit_b_32",
    )  # fmt: skip
    refused(workspace, "negative controls", UserInputError, normalise="plate-controls")
    with workspace.database.begin() as session:
        file = session.scalars(select(ImageFile).order_by(ImageFile.id)).first()
        assert file is not None
        session.add(ImageFile(image_id=file.image_id, channel="ER", position=2, name="x.tif"))
    refused(
        workspace, "5 of the 6 images of the split have no channel 'ER'", UserInputError,
        branches=pictures, channels=("DNA", "ER"),
    )  # fmt: skip
    with workspace.database.read() as session:
        assert session.scalars(select(Run.id).where(Run.stage == Stage.TRAIN)).all() == []
        assert session.scalars(select(Recipe.id).where(Recipe.stage == Stage.TRAIN)).all() == []


def relabel(workspace: Workspace, side: Subset, value: str) -> None:
    """Give the class ``value`` to every image of a side."""
    with workspace.database.begin() as session:
        label = session.scalars(select(Label).where(Label.value == value)).one_or_none()
        if label is None:
            field = session.scalars(select(Label.field)).first()
            label = Label(field=field, value=value)
            session.add(label)
            session.flush()
        session.execute(
            update(SplitMember).where(SplitMember.subset == side).values(label_id=label.id)
        )


def test_classes_that_cannot_be_learned_are_told(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    relabel(workspace, Subset.VALIDATION, "other")
    refused(workspace, "No class in the validation subset", UserInputError)
    with workspace.database.begin() as session:
        known = session.scalars(select(Label).where(Label.value == "drug")).one()
        first = select(Image.id).order_by(Image.id)
        members = SplitMember.image_id.in_(first), SplitMember.subset == Subset.VALIDATION
        some = session.scalars(select(SplitMember.image_id).where(*members).limit(1)).one()
        session.execute(
            update(SplitMember).where(SplitMember.image_id == some).values(label_id=known.id)
        )
    result = train(workspace, replace(PARAMS, epochs=1), device="cpu")
    assert result.images == {"train": 2, "validation": 1}
    note = "1 images of the validation subset were excluded: their classes are not in the training"
    assert result.notes == (f"{note} subset.",)


def test_a_training_subset_of_one_class_is_refused(built: Path, opened: Opener) -> None:
    workspace = opened(built)
    relabel(workspace, Subset.TRAIN, "DMSO")
    refused(workspace, "of one class only, DMSO: there is nothing to learn", CellstoreError)
