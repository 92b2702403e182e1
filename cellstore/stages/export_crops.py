"""The export of crops: the pixels of cells in Parquet files, for learning without this store.

Crops are as they are in the images, not resized and not scaled, which is lossless, and smaller than
what :meth:`cellstore.Store.dataset` makes of them; the README of the folder says how to get that.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..artifacts import part_prefix, sweep, writing
from ..config import ImageInput
from ..enums import Subset
from ..errors import UserInputError
from ..io.objects import BOX
from ..jobs.lookup import find_plate, find_split
from ..jobs.workspace import Workspace
from ..notebooks import Shown
from ..query.cells import (
    CellSource,
    cells_query,
    choose_recipes,
    count_cells,
    name_images,
)
from ..query.feature_files import open_set
from ..settings import check_not_of_a_store, need, track

GROUP_BYTES, FILE_BYTES = 16 << 20, 512 << 20
"""Bytes of pixels of a group of rows, which is held in memory, and of a file."""

_TEXT, _WHOLE = pa.string(), pa.int64()
SCHEMA = pa.schema(
    [
        ("cell_id", _WHOLE),
        *((name, _TEXT) for name in ("plate", "well")),
        *((name, _WHOLE) for name in ("site", "plane", "time_point")),
        *((name, _TEXT) for name in ("subset", "label")),
        ("object_number", _WHOLE),
        *((name, _WHOLE) for name in BOX),
        *((name, _WHOLE) for name in ("height", "width")),
        ("dtype", _TEXT),
        ("scale", pa.list_(pa.float32())),
        ("image", pa.binary()),
        ("mask", pa.binary()),
    ]
)
PIXELS = ("image", "mask")

README = """# {cells:,} cells of {images:,} images

Made by cellstore from segmentation {segmentation}{split}.
Channels, in this order: {channels}.

A row of `cells-*.parquet` is a cell: `cell_id`, `plate`, `well`, `site`, `plane`, `time_point`,
`subset` and `label` (of the split), `object_number`, its box in the image (`min_row` to `max_col`,
half open, in pixels), its pixels, and `scale`, the intensity of its plate that becomes 1. To read:

```python
from pathlib import Path
import numpy as np
import pyarrow.parquet as pq

for file in sorted(Path(".").glob("cells-*.parquet")):
    for batch in pq.ParquetFile(file).iter_batches(256):
        for cell in batch.to_pylist():
            shape = (-1, cell["height"], cell["width"])
            raw = np.frombuffer(cell["image"], cell["dtype"]).reshape(shape)  # (C, H, W)
            mask = np.frombuffer(cell["mask"], bool).reshape(shape[1:])  # (H, W), the cell
            scale = np.array(cell["scale"], "float32")[:, None, None]
            image = np.clip(raw.astype("float32") / scale, 0, 1) * 2 - 1  # -1 is black
```

`store.dataset(crop=96)` of cellstore gives the same, resized (equal but for rounding, 0.00001):

```python
import torch
image = torch.nn.functional.interpolate(
    torch.from_numpy(image)[None], (96, 96), mode="bilinear", antialias=True
)[0]
```

Predictions with `cell_id` come back with: `cellstore predictions add FILE`.
"""


@dataclass(frozen=True)
class ExportedCrops(Shown):
    """A folder that was written: ``cells`` of ``images`` in ``files``; ``bytes`` on the disk."""

    path: Path
    cells: int
    images: int
    channels: tuple[str, ...]
    files: int
    bytes: int
    segment_recipe: int


def export_crops(
    workspace: Workspace,
    out: Path,
    *,
    split: str | None = None,
    subset: Subset | None = None,
    channels: Sequence[str] = (),
    plates: Sequence[str] = (),
    segmentation: str | None = None,
    measurement: str | None = None,
) -> ExportedCrops:
    """Write the pixels of the cells of a split (default: of all cells) to the folder ``out``.

    ``channels``: default: all. Excluded cells are not among them. The folder is new, and there
    whole or not at all. Images are read one by one.
    """
    need("train")
    from ..learn.batches import CellView, prefetch, reading_threads
    from ..learn.branches import IMAGE, choose_channels
    from ..learn.normalising import Scaler, add_plates, fit_inputs, plates_of

    out = out.absolute()
    check_not_of_a_store(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserInputError(f"{out} is there already. Name a new folder.")
    database = workspace.database
    with database.read() as session:
        for barcode in plates:
            find_plate(session, barcode)
        segment, measure = choose_recipes(session, segmentation, measurement)
        of_split = None if split is None and subset is None else find_split(session, split)
        features = open_set(session, workspace.artifacts, measure.id)
        split_id = None if of_split is None else of_split.id
        source = CellSource(segment.id, measure.id, split_id, subset, tuple(plates), features)
        counts = count_cells(session, cells_query(source), source)
        if not counts:
            raise UserInputError(
                "There are no measured cells to export. Name other plates or another subset, or "
                "run: cellstore segment, then: cellstore measure"
            )
        names = choose_channels(session, source, channels)
        planes = [ImageInput((name,)) for name in names]
        if of_split is None:
            barcodes = sorted(plates) or plates_of(session, source)
            scaler = add_plates(session, database, source, planes, Scaler(intensities={}), barcodes)
        else:  # as store.dataset has it: that of the training subset, where a plate is in it
            whole = replace(source, subset=None)
            scaler = fit_inputs(session, database, whole, None, planes, tuple(Subset))
        places = name_images(session, source)
    reader, intensities = source.reader(), scaler.intensities or {}
    view = CellView((IMAGE,), names)

    def read(image_id: int) -> pa.Table:
        place = places[image_id]
        with database.read() as session:
            found = view.find(session, source, image_id, (), reader)
        rows, pictures = found.rows, view.open(workspace.artifacts, found)
        assert rows.boxes is not None
        masks, image = pictures.masks, np.stack(pictures.channels)
        whole = bool(((image >= 0) & (image < 1 << 16) & (image == np.floor(image))).all())
        image = image.astype("<u2" if whole else "<f4")
        scales = [scale if scale > 0 else np.inf for scale in intensities[str(place["plate"])]]
        columns: dict[str, Any] = {name: [value] * len(rows.boxes) for name, value in place.items()}
        columns |= {"cell_id": rows.cell_ids, "object_number": rows.labels}
        columns |= dict(zip(BOX, rows.boxes.T, strict=True))
        columns["height"], columns["width"] = (rows.boxes[:, 2:] - rows.boxes[:, :2]).T
        columns["dtype"] = [image.dtype.str] * len(rows.boxes)
        columns["scale"] = [scales] * len(rows.boxes)
        boxes = [np.s_[a:c, b:d] for a, b, c, d in rows.boxes.tolist()]
        columns["image"] = [image[(slice(None), *box)].tobytes() for box in boxes]
        own = zip(boxes, rows.labels.tolist(), strict=True)
        columns["mask"] = [(masks[box] == number).tobytes() for box, number in own]
        return pa.table([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)

    sweep(out.parent)
    part = out.parent / f"{part_prefix()}{uuid.uuid4().hex}"
    about = {"channels": json.dumps(names), "segmentation": segment.fingerprint}
    try:
        with writing(out):
            part.mkdir(parents=True)
            tables = prefetch(sorted(counts), read, reading_threads())
            read_ones = track(workspace.progress, "export", len(counts), tables)
            cells = _write(part, _groups(read_ones), about)
            text = README.format(
                cells=cells,
                images=len(counts),
                segmentation=segment.fingerprint[:12],
                split="" if of_split is None else f", split {of_split.name}",
                channels=", ".join(names),
            )
            (part / "README.md").write_text(text, encoding="utf-8")
            files = [file.stat().st_size for file in part.iterdir()]
            part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return ExportedCrops(out, cells, len(counts), names, len(files) - 1, sum(files), segment.id)


def _groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield groups of rows of some megabytes."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(part.nbytes for part in held) >= GROUP_BYTES:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _write(folder: Path, groups: Iterator[pa.Table], about: Mapping[str, str]) -> int:
    """Write files of some hundred megabytes; return how many rows."""
    cells = files = 0
    plain = [name for name in SCHEMA.names if name not in (*PIXELS, "scale")]
    group = next(groups, None)
    while group is not None:
        size = 0
        with pq.ParquetWriter(
            folder / f"cells-{files:05d}.parquet",
            SCHEMA.with_metadata(about),
            compression="zstd",
            compression_level=3,
            use_dictionary=plain,
            write_statistics=plain,
        ) as writer:
            while group is not None and size < FILE_BYTES:
                writer.write_table(group, row_group_size=group.num_rows)
                cells, size = cells + group.num_rows, size + group.nbytes
                group = next(groups, None)
        files += 1
    return cells
