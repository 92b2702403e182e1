"""Finetune: which masks are learned from, which are held out, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cellpose.resnet_torch", reason="needs Cellpose 3")

from sqlalchemy import select  # noqa: E402
from test_ingest import loaddata, write_table  # noqa: E402
from tiny_network import new_network, save_network  # noqa: E402

from cellstore.config import FinetuneParams, IngestParams, SegmentParams  # noqa: E402
from cellstore.enums import ArtifactKind, Stage, Status  # noqa: E402
from cellstore.errors import StorageError, UnknownNameError, UserInputError  # noqa: E402
from cellstore.io.image_files import encode_tiff  # noqa: E402
from cellstore.jobs.workspace import Workspace  # noqa: E402
from cellstore.learn import finetuning  # noqa: E402
from cellstore.models import Artifact, Run, RunArtifact  # noqa: E402
from cellstore.stages.finetune import (  # noqa: E402
    Example,
    divide,
    find_examples,
    finetune,
)
from cellstore.stages.ingest.ingest import ingest  # noqa: E402
from cellstore.stages.segment import find_network, segment  # noqa: E402

pytestmark = pytest.mark.one_database

SHAPE = (48, 64)


def labels(seed: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Two touching squares and one alone."""
    masks = np.zeros(SHAPE, np.uint16)
    top = 4 + seed
    masks[top : top + 14, 4:18], masks[top : top + 14, 18:32] = 3, 7
    masks[30:44, 44:58] = 9
    return masks


class Lesson:
    """A store of four images of one well, and a folder for their corrected masks."""

    def __init__(self, workspace: Workspace, folder: Path) -> None:
        self.workspace = workspace
        self.masks = folder / "corrected"
        self.masks.mkdir()
        images = folder / "images"
        images.mkdir()
        rng = np.random.default_rng(0)
        for site in (1, 2, 3, 4):
            pixels = 100 * (labels(site) > 0) + rng.integers(0, 20, SHAPE)
            for channel in (1, 2):
                name = f"r01c02f{site:02d}p01-ch{channel}sk1fk1fl1.tiff"
                (images / name).write_bytes(encode_tiff(pixels.astype(np.uint16)))
        table = write_table(folder / "t.csv", [loaddata(site) for site in (1, 2, 3, 4)])
        ingest(workspace, table, IngestParams(images=images))

    def correct(self, *sites: int) -> None:
        for site in sites:
            path = self.masks / f"r01c02f{site:02d}_masks.tif"
            path.write_bytes(encode_tiff(labels(site)))

    def network(self, seed: int = 0) -> str:
        path = self.masks.parent / "start.pt"
        save_network(new_network(seed), path)
        return str(path)


@pytest.fixture
def lesson(workspace: Workspace, tmp_path: Path) -> Lesson:
    return Lesson(workspace, tmp_path)


# --- masks -------------------------------------------------------------------------------------


def test_masks_are_matched_to_images_by_name(lesson: Lesson) -> None:
    lesson.correct(1, 2, 3, 4)
    examples, refused = find_examples(lesson.workspace, [lesson.masks], FinetuneParams(), None)
    training, held_out = divide(examples, 0.2, seed=0)
    assert (len(training), len(held_out), refused) == (3, 1, [])
    assert {example.cells for example in examples} == {3}


def test_files_that_cannot_be_used_say_why(lesson: Lesson) -> None:
    lesson.correct(1)
    (lesson.masks / "r09c09f01_masks.tif").write_bytes(encode_tiff(labels(1)))
    (lesson.masks / "r01c02f02_masks.tif").write_bytes(encode_tiff(labels(1)[:-2]))
    (lesson.masks / "r01c02f03_masks.tif").write_bytes(encode_tiff(np.zeros(SHAPE, np.uint16)))
    again = lesson.masks / "r01c02f01_masks.tif"
    examples, refused = find_examples(
        lesson.workspace, [lesson.masks, again], FinetuneParams(), None
    )
    assert [example.file for example in examples] == ["r01c02f01_masks.tif"]
    reasons = {item["file"]: item["reason"].split(":")[0] for item in refused}
    assert reasons == {
        "r09c09f01_masks.tif": "no such image",
        "r01c02f02_masks.tif": "another shape than the image",
        "r01c02f03_masks.tif": "it has no cells, so their size is not known",
        "r01c02f01_masks.tif": "other masks of P1/A02/1 were read before it",
    }


def test_masks_of_no_image_are_refused_with_the_reason(lesson: Lesson) -> None:
    (lesson.masks / "r09c09f01_masks.tif").write_bytes(encode_tiff(labels(1)))
    with pytest.raises(UserInputError, match=r"None of the masks.*no such image"):
        finetune(lesson.workspace, [lesson.masks])


@pytest.mark.parametrize(
    ("path", "words"),
    [("none.tif", "no file"), ("notes.txt", "not a file of masks"), ("corrected", "no masks")],
)
def test_paths_without_masks_are_refused(lesson: Lesson, path: str, words: str) -> None:
    (lesson.masks.parent / "notes.txt").write_text("hello")
    with pytest.raises(UserInputError, match=words):
        finetune(lesson.workspace, [lesson.masks.parent / path])


def example(image_id: int, group: str) -> Example:
    return Example(f"{image_id}.tif", image_id, None, group, 1, None)  # type: ignore[arg-type]


def test_wells_are_held_out_whole() -> None:
    examples = [example(n, f"P/{'ABCDE'[n % 5]}01") for n in range(20)]
    training, held_out = divide(examples, 0.4, seed=3)
    assert len({item.group for item in held_out}) == 2
    assert {item.group for item in held_out}.isdisjoint({item.group for item in training})
    assert len(training) + len(held_out) == 20
    assert divide(examples, 0.4, seed=3) == (training, held_out)


@pytest.mark.parametrize(("count", "share", "held"), [(1, 0.2, 0), (2, 0.2, 1), (2, 0.9, 1)])
def test_of_one_well_single_images_are_held_out(count: int, share: float, held: int) -> None:
    training, held_out = divide([example(n, "P/A01") for n in range(count)], share, seed=0)
    assert (len(training), len(held_out)) == (count - held, held)


def test_nothing_is_held_out_if_nothing_is_asked_for() -> None:
    assert divide([example(n, "P/A01") for n in range(5)], 0.0, seed=0)[1] == []


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"learning_rate": float("nan")}, "--learning-rate must be a number"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"held_out": 1.0}, "--held-out must be at most 0.9"),
        ({"channels": ("Mito",)}, "Mito"),
        ({"nuclei": ("Mito",)}, "Mito"),
        ({"model": "run:7"}, "finetune run"),
        ({"model": "cyt03"}, "cyto3"),
    ],
)
def test_options_out_of_range_are_refused(
    lesson: Lesson, change: dict[str, Any], words: str
) -> None:
    lesson.correct(1)
    with pytest.raises(UserInputError, match=words):
        finetune(lesson.workspace, [lesson.masks], FinetuneParams(**change))


# --- a network that learns ---------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small crops, and few of them."""
    monkeypatch.setattr(finetuning, "crop_side", lambda _: 32)
    monkeypatch.setattr(finetuning, "CROPS_PER_IMAGE", 1)


@pytest.mark.each_database
@pytest.mark.heavy
@pytest.mark.usefixtures("quick")
def test_the_new_network_is_kept_and_can_be_used(lesson: Lesson) -> None:
    lesson.correct(1, 2, 3)
    params = FinetuneParams(model=lesson.network(), epochs=2)
    result = finetune(lesson.workspace, [lesson.masks], params, device="cpu")
    assert (result.images, result.held_out, result.cells) == (2, 1, 6)
    assert (result.start, result.model) == (params.model, f"run:{result.run_id}")
    assert len(result.losses) == 2
    assert result.before is not None
    assert result.after is not None
    network = find_network(lesson.workspace, result.model)
    before = torch.load(params.model, weights_only=True)
    after = torch.load(network.network, weights_only=True)
    assert not torch.equal(before["output.2.weight"], after["output.2.weight"])
    assert after["output.2.weight"].dtype == torch.float16
    with lesson.workspace.database.read() as session:
        run = session.get_one(Run, result.run_id)
        assert (run.stage, run.status, run.seed) == (Stage.FINETUNE, Status.DONE, 0)
        kinds = session.scalars(
            select(Artifact.kind).join(RunArtifact).where(RunArtifact.run_id == run.id)
        ).all()
    assert sorted(kinds) == [ArtifactKind.MASK] * 3 + [ArtifactKind.NETWORK]
    made = segment(
        lesson.workspace,
        SegmentParams.of("published", model=result.model, diameter=17.0),
        device="cpu",
    )
    assert made.done == 4
    with lesson.workspace.database.read() as session:
        assert session.get_one(Run, made.run_id).parent_id == result.run_id


@pytest.mark.heavy
@pytest.mark.usefixtures("quick")
def test_the_same_masks_and_options_are_learned_once(lesson: Lesson) -> None:
    lesson.correct(1, 2)
    params = FinetuneParams(model=lesson.network(), epochs=1, held_out=0.0)
    state = np.random.get_state()[1].copy()
    first = finetune(lesson.workspace, [lesson.masks], params, device="cpu")
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    again = finetune(lesson.workspace, [lesson.masks], params, device="cpu")
    assert (first.already_done, again.already_done) == (False, True)
    assert (again.run_id, again.losses) == (first.run_id, first.losses)
    assert (first.before, first.after, first.held_out) == (None, None, 0)
    forced = finetune(lesson.workspace, [lesson.masks], params, device="cpu", force=True)
    assert forced.run_id != first.run_id
    one, other = (find_network(lesson.workspace, r.model) for r in (first, forced))
    assert one.sha256 == other.sha256
    lesson.correct(3)
    more = finetune(lesson.workspace, [lesson.masks], params, device="cpu")
    assert more.recipe_id != first.recipe_id


@pytest.mark.heavy
@pytest.mark.usefixtures("quick")
def test_a_network_of_the_store_that_was_changed_is_not_used(lesson: Lesson) -> None:
    lesson.correct(1)
    params = FinetuneParams(model=lesson.network(), epochs=1)
    result = finetune(lesson.workspace, [lesson.masks], params, device="cpu")
    path = find_network(lesson.workspace, result.model).network
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(StorageError, match="not what was written"):
        segment(lesson.workspace, SegmentParams.of("published", model=result.model, diameter=17.0))


def test_a_run_of_another_stage_made_no_network(lesson: Lesson) -> None:
    with pytest.raises(UnknownNameError, match="finetune run"):
        find_network(lesson.workspace, "run:1")
