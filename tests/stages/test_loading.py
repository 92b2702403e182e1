"""Batches as training takes them from a store: the same on any machine, and no cell lost."""

import hashlib
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from small_training import Opener, pixels
from sqlalchemy import select
from sqlalchemy.orm import Session
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader

from cellstore import Store
from cellstore.analysis.features import FEATURE_NAMES
from cellstore.errors import CellstoreError, ImageError, UnknownNameError, UserInputError
from cellstore.jobs.workspace import Workspace
from cellstore.learn import batches as batches_module
from cellstore.learn import datasets
from cellstore.learn.batches import Batches, CellReader
from cellstore.learn.normalising import Scaler
from cellstore.models import Cell, Image, Split
from cellstore.query.cells import (
    CellSource,
    ImageBlock,
    choose_recipes,
    list_blocks,
    plane_of,
    stream_features,
)
from cellstore.stages import export_crops

AS_RESIZED: Any = {"mode": "bilinear", "antialias": True, "align_corners": False}


@pytest.fixture
def workspace(built: Path, opened: Opener) -> Workspace:
    return opened(built)


class Plates:
    """A scaler that writes down of which plates it was asked."""

    def __init__(self, scaler: Scaler) -> None:
        self.scaler, self.names, self.plates, self.intensities = scaler, scaler.names, set(), None

    def transform(self, rows: Any, plate: str | None = None) -> np.ndarray:
        self.plates.add(plate)
        return self.scaler.transform(rows, plate)


def reader_of(workspace: Workspace, **more: Any) -> tuple[CellReader, list[ImageBlock]]:
    with workspace.database.read() as session:
        segment, measure = choose_recipes(session, None, None)
        split = session.scalars(select(Split)).one()
        source = CellSource(segment.id, measure.id, split.id)
        blocks = list_blocks(session, source)
        scaler = Scaler.fit(FEATURE_NAMES, stream_features(session, source))
    classes = {label: i for i, label in enumerate(sorted({b.label_id for b in blocks}))}
    more = {"scaler": scaler, "crop_size": 8, "classes": classes} | more
    return CellReader(workspace, source, plane_of(segment), **more), blocks


def same(left: Any, right: Any) -> bool:
    pairs = [(left.crops[name], right.crops[name]) for name in left.crops]
    pairs += [(getattr(left, n), getattr(right, n)) for n in ("features", "labels", "cell_ids")]
    return all(torch.equal(a, b) for a, b in pairs)


def test_batches_do_not_depend_on_threads_nor_on_memory(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for threads, kept in ((1, 0), (3, 1 << 30)):
        monkeypatch.setattr(batches_module, "reading_threads", lambda n=threads: n)
        reader, blocks = reader_of(workspace, kept_bytes=kept)
        batches = Batches(reader, blocks, batch_size=5, seed=3)
        found.append([batch for epoch in (0, 1) for batch in batches(epoch)])
        assert len(found[-1]) == 2 * batches.count(0)
    assert all(same(*pair) for pair in zip(*found, strict=True))


def test_without_shuffling_batches_are_the_blocks_in_their_order(workspace: Workspace) -> None:
    reader, blocks = reader_of(workspace)
    batches = Batches(reader, blocks, batch_size=4, shuffle=False)
    for batch, block in zip(batches(0), blocks, strict=True):
        assert same(batch, reader(block.image_id))
        assert set(batch.labels.tolist()) == {reader.classes[block.label_id]}


def test_processes_share_an_epoch(workspace: Workspace) -> None:
    reader, blocks = reader_of(workspace)
    shares = [list(Batches(reader, blocks, batch_size=4, share=(rank, 2))(0)) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1])
    ids = [i for share in shares for batch in share for i in batch.cell_ids.tolist()]
    assert len(ids) == len(set(ids)) == sum(block.n_cells for block in blocks)


def test_who_takes_batches_learns_how_long_it_waited(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, blocks = reader_of(workspace)
    clock: Iterator[int] = iter(range(1000))
    monkeypatch.setattr(batches_module.time, "perf_counter", lambda: float(next(clock)))
    batches = Batches(reader, blocks, batch_size=4)
    assert batches.waited == 0
    count = len(list(batches(0)))
    assert batches.waited == count + 1  # a second for each batch, and to see that there is none


def test_an_image_that_cannot_be_read_ends_the_epoch(workspace: Workspace) -> None:
    reader, blocks = reader_of(workspace)
    wrong = [replace(blocks[0], n_cells=blocks[0].n_cells + 1), *blocks[1:]]
    with pytest.raises(ImageError, match="changed while the network was training"):
        list(Batches(reader, wrong, batch_size=4)(0))
    for file in (workspace.artifacts.root).rglob("*.tif"):
        file.unlink()
    with pytest.raises(ImageError, match="cannot be read"):
        list(Batches(reader_of(workspace)[0], blocks, batch_size=4)(0))


def test_an_image_is_opened_once_while_it_fits_in_memory(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, real = [], batches_module.read_cells

    def counted(session: Session, source: CellSource, image_id: int, *more: Any) -> Any:
        read.append(image_id)
        return real(session, source, image_id, *more)

    monkeypatch.setattr(batches_module, "read_cells", counted)
    reader, blocks = reader_of(workspace)
    one = reader.cut(blocks[0].image_id).nbytes
    for kept, times in ((1 << 20, 1), (2 * one + one // 2, None), (0, 3)):
        read.clear()
        reader, blocks = reader_of(workspace, kept_bytes=kept)
        for epoch in range(3):
            list(Batches(reader, blocks, batch_size=4)(epoch))
        counts = [read.count(block.image_id) for block in blocks]
        assert set(counts) == ({times} if times else {1, 3})


def test_channels_have_the_intensity_scale_of_their_plate(workspace: Workspace) -> None:
    scale = {"P1": (5000.0, 1000.0), "P2": (1.0, 1.0)}
    more = {"branches": ("mask", "image", "tabular"), "channels": ("dna",)}
    own, blocks = reader_of(workspace, **more)
    scaler = replace(own.scaler, intensities=scale)
    reader, _ = reader_of(workspace, **more, scaler=scaler)
    cells = reader.cut(blocks[0].image_id)
    rows, columns = cells.sizes[0]
    with workspace.database.read() as session:
        cell = session.get_one(Cell, int(cells.cell_ids[0]))
        name = session.get_one(Image, blocks[0].image_id).core_name
    light = pixels(int(name[4:6]) - 1)
    window = light[cell.min_row : cell.max_row, cell.min_col : cell.max_col]
    for white, found in (
        (1000, cells),
        (np.percentile(light, 99.9), own.cut(blocks[0].image_id)),
    ):
        layer = found.layers["image"][0, : rows * columns].reshape(rows, columns)
        np.testing.assert_allclose(layer, np.minimum(window / white, 1), rtol=1e-6)
    assert reader(blocks[0].image_id).crops.keys() == {"mask", "image"}


def test_the_scaler_is_told_the_plate(workspace: Workspace) -> None:
    plain, _ = reader_of(workspace)
    scaler = Plates(plain.scaler)
    reader, blocks = reader_of(workspace, scaler=scaler)
    reader(blocks[0].image_id)
    assert scaler.plates == {"P1"}


def test_a_quarter_of_the_memory_is_kept_that_a_container_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "memory.max"
    own = tmp_path / "own"
    monkeypatch.setattr(batches_module, "GROUPS", tmp_path)
    monkeypatch.setattr(batches_module, "OWN_GROUPS", own)
    limit.write_text("max\n")
    assert batches_module.available_memory() > 1 << 28  # of the machine
    own.write_text("0::/\n")
    assert batches_module.available_memory() > 1 << 28
    limit.write_text("1000000\n")
    assert batches_module.default_memory() == 250_000
    # A job within: its own limit counts, and those that it is within.
    job = tmp_path / "slurm" / "job_7"
    job.mkdir(parents=True)
    own.write_text("0::/slurm/job_7\n")
    assert batches_module.default_memory() == 250_000
    (job / "memory.max").write_text("400000\n")
    assert batches_module.default_memory() == 100_000
    old = tmp_path / "memory" / "slurm" / "job_7"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("80000\n")
    own.write_text("4:cpu:/slurm/job_7\n9:memory:/slurm/job_7\n")
    assert batches_module.default_memory() == 20_000


def test_a_data_set_for_loops_of_ones_own(workspace: Workspace) -> None:
    store = Store(workspace)
    cells = store.cells(subset="train").to_pandas().set_index("cell_id")
    data = store.dataset(subset="train", crop=8, mask=True, features=True, seed=3)
    assert data.classes == tuple(sorted(set(cells.label)))
    assert len(data) == len(cells)
    first = list(data)
    assert [item["cell_id"] for item in first] == [item["cell_id"] for item in data]
    data.set_epoch(1)
    assert [item["cell_id"] for item in first] != [item["cell_id"] for item in data]
    data.set_epoch(0)
    loaded = list(DataLoader(pickle.loads(pickle.dumps(data)), batch_size=4, num_workers=2))
    by_id = {item["cell_id"]: item for item in first}
    ids = [i for batch in loaded for i in batch["cell_id"].tolist()]
    assert sorted(ids) == sorted(by_id) == sorted(cells.index)  # each cell once
    for batch in loaded:
        for at, cell_id in enumerate(batch["cell_id"].tolist()):
            item = by_id[cell_id]
            assert data.classes[item["label"]] == cells.label[cell_id]
            for name in ("image", "mask", "features"):
                assert torch.equal(batch[name][at], item[name])
    assert first[0]["image"].shape == (len(data.channels), 8, 8)
    assert first[0]["mask"].shape == (1, 8, 8)
    assert first[0]["mask"].min() >= 0
    assert first[0]["mask"].max() == 1
    # As train scales them: by mean and standard deviation of the training subset.
    values = cells.loc[[item["cell_id"] for item in first], list(data.feature_names)].to_numpy()
    scaled = (values - values.mean(axis=0)) / np.where(values.std(axis=0), values.std(axis=0), 1)
    assert np.allclose(np.stack([item["features"] for item in first]), scaled, atol=1e-5)
    twice = store.dataset(subset="train", crop=8, transform=lambda item: {"id": item["cell_id"]})
    assert sorted(item["id"] for item in twice) == sorted(ids)
    with pytest.raises(UnknownNameError, match="channel"):
        store.dataset(channels=["Infrared"])


def test_exported_crops_are_those_of_the_data_set(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_crops, "GROUP_BYTES", 700)
    monkeypatch.setattr(export_crops, "FILE_BYTES", 2_000)
    here = tmp_path / "here"
    here.mkdir()
    store, out = Store(workspace), here / "crops"
    made = store.export_crops(out, split="by-well")
    table = store.cells("by-well").to_pandas().set_index("cell_id")
    assert (made.cells, made.images, made.channels) == (len(table), 6, ("DNA",))
    assert made.files > 2
    assert sorted(path.name for path in here.iterdir()) == ["crops"]
    # The examples of the README read them.
    numpy_way, torch_way = re.findall("```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    monkeypatch.chdir(out)
    found: dict[int, Any] = {}
    exec(numpy_way + " " * 12 + "found[cell['cell_id']] = cell, image, mask\n", {"found": found})
    assert set(found) == set(table.index)
    wanted = {
        item["cell_id"]: item
        for subset in ("train", "validation", "test")
        for item in store.dataset("by-well", subset, crop=96, mask=True)
    }
    fields = {
        (item["plate"], item["well"]): item["image"].numpy()
        for item in store.dataset("by-well", unit="image")
    }
    for cell_id, (cell, image, mask) in found.items():
        row = table.loc[cell_id]
        for name in ("plate", "well", "site", "label", "subset", "object_number", "min_row"):
            assert cell[name] == row[name]
        assert cell["dtype"] == "<u2"
        values = {"image": image}
        exec(torch_way, values)
        assert torch.allclose(values["image"], wanted[cell_id]["image"], atol=1e-5)
        own = interpolate(torch.from_numpy(mask.astype("f4"))[None, None], (96, 96), **AS_RESIZED)
        assert torch.allclose(own[0], wanted[cell_id]["mask"], atol=1e-5)
        if cell["subset"] == "train":  # where nothing is resized, to the last bit
            box = np.s_[:, cell["min_row"] : cell["max_row"], cell["min_col"] : cell["max_col"]]
            assert np.array_equal(image, fields[cell["plate"], cell["well"]][box])
    with pytest.raises(UserInputError, match="Name a new folder"):
        store.export_crops(out)
    part = store.export_crops(here / "part", split="by-well", subset="test", channels=["dna"])
    assert part.cells == (table.subset == "test").sum()
    file = here / "part" / "cells-00000.parquet"
    assert pq.read_table(file).schema.metadata[b"channels"] == b'["DNA"]'
    everything = store.export_crops(here / "all")
    assert everything.cells == made.cells
    assert pq.read_table(here / "all" / "cells-00000.parquet").column("label").null_count
    for file in workspace.artifacts.root.rglob("*.tif"):
        file.unlink()
    with pytest.raises(CellstoreError):
        store.export_crops(here / "broken")
    assert sorted(path.name for path in here.iterdir()) == ["all", "crops", "part"]


def test_whole_fields_are_a_data_set_too(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(workspace)
    cells = store.cells(subset="train").to_pandas()
    data = store.dataset(subset="train", unit="image", mask=True)
    loaded = [
        dict(zip(batch, values, strict=True))
        for batch in DataLoader(pickle.loads(pickle.dumps(data)), batch_size=2, num_workers=2)
        for values in zip(*batch.values(), strict=True)
    ]
    by_name = {(item["plate"], item["well"], int(item["site"])): item for item in loaded}
    assert len(by_name) == len(loaded) == len(data)  # each image once
    crops = {item["cell_id"]: item for item in store.dataset(subset="train", crop=8)}
    for name, of_image in cells.groupby(["plate", "well", "site"]):
        item = by_name.pop(name)
        for cell in of_image.itertuples():
            box = np.s_[cell.min_row : cell.max_row, cell.min_col : cell.max_col]
            assert (item["mask"][box] == cell.object_number).any()
            assert data.classes[item["label"]] == cell.label
            cut = interpolate(item["image"][(None, ..., *box)], (8, 8), **AS_RESIZED)[0]
            assert torch.allclose(cut, crops[cell.cell_id]["image"], atol=1e-5)
    assert by_name == {}
    small = next(iter(store.dataset(subset="train", unit="image", mask=True, crop=5)))
    assert small["image"].shape == (len(data.channels), 5, 5)
    assert small["mask"].shape == (5, 5)
    shares = []
    for rank in (0, 1):  # of torch.distributed
        monkeypatch.setattr(datasets, "_team", lambda rank=rank: (rank, 2))
        shares.append({item["image_id"] for item in data})
    monkeypatch.undo()
    assert shares[0].isdisjoint(shares[1])
    assert shares[0] | shares[1] == {int(item["image_id"]) for item in loaded}
    drawn = store.dataset(subset="train", unit="image", sampler="classes")
    counts = np.bincount([item["label"] for item in drawn])
    assert len(set(counts)) == 1
    said = store.dataset(subset="test", unit="image", crop=4)
    names = ("plate", "well", "site")
    table = pd.DataFrame([{name: item[name] for name in names} for item in said])
    table["label"] = data.classes[0]
    added = store.add_predictions(table, "fields", trained_on=["train"])
    assert (added.images, added.cells) == (len(said), 0)
    with pytest.raises(UserInputError, match="Features are of cells"):
        store.dataset(unit="image", features=True)


def test_the_examples_for_models_of_ones_own(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "own-models.md").read_text()
    monkeypatch.setattr(Store, "open", lambda _: Store(workspace))
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {}
    for block in re.findall("```python\n(.*?)```", page, re.DOTALL):
        exec(block, values)
    store, run = values["store"], values["added"].run_id
    name = "{plate}/{well}/{site}".format(**values["image"])
    found = {item["run_id"]: item for item in store.audit(name, "image").record["labellings"]}
    last = {item["run_id"]: item for item in values["audit"].record["labellings"]}[run]
    weights = hashlib.sha256((tmp_path / "my-network.pt").read_bytes()).hexdigest()
    assert (last["weights_sha256"], last["well_in_training"]) == (weights, False)
    rivals = {item.baseline for item in values["report"].baselines}
    assert rivals == {"majority", "shuffled", "cellcount", "position", "logistic"}
    assert found[values["labelled"].run_id]["model"] == "applied-network"
    assert values["with_light"].embedding_000.notna().all()
    fields = found[values["whole"].run_id]
    assert fields["model"] == "brightness"
    assert (last["run_id"], last["model"], last["split"]) == (run, "my-network", "by-well")
    assert last["origin"] == "declared"
