r"""What ``segment`` costs beyond Cellpose itself: the same images in a bare loop and in a store.

    python benchmarks/segment_overhead.py
    python benchmarks/segment_overhead.py --images 16 --size 540 --repeat 3

Every line is a process of its own that loads the network and works on rendered fields; its clock
runs from start to end, interpreter and imports included. ``bare loop``: ``CellposeModel.eval`` on
each file, default threads, nothing is kept. ``store``: the stage with masks, flows, cells and
rows. The diameter is given, so that both do the same. Ratios are of one round of the repetitions,
the medians of all rounds are printed.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DIAMETER = 30.0
HEADER = "FileName_OrigDNA,Metadata_Plate,Metadata_Well,Metadata_Site"


def main() -> None:
    args = parsed()
    if args.step:
        STEPS[args.step](args.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        render(folder, args.images, args.size)
        rounds = [one_round(folder) for _ in range(args.repeat)]
    print(f"{args.images} fields of {args.size} x {args.size}, {args.repeat} rounds")
    bare = statistics.median(r["bare"] for r in rounds)
    print(f"{'bare loop':24}{bare:8.1f} s")
    for step, title in (("store1", "store, 1 worker"), ("store2", "store, 2 workers")):
        seconds = statistics.median(r[step] for r in rounds)
        ratio = statistics.median(r[step] / r["bare"] for r in rounds)
        print(f"{title:24}{seconds:8.1f} s{ratio:8.3f} of the bare loop")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--size", type=int, default=1080, help="height and width in pixels")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def one_round(folder: Path) -> dict[str, float]:
    return {step: timed(step, folder) for step in STEPS}


def timed(step: str, folder: Path) -> float:
    if step != "bare":
        make_store(folder, folder / step)
    words = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
    began = time.perf_counter()
    subprocess.run(words, check=True)
    return time.perf_counter() - began


def render(folder: Path, images: int, size: int) -> None:
    """Fields of rendered nuclei, and the table that names them."""
    import numpy as np
    from training_fields import render_nuclei

    from cellstore.io.image_files import encode_tiff

    lines = [HEADER]
    rng = np.random.default_rng(1)
    for number in range(images):
        image = render_nuclei(rng, (size, size), DIAMETER).image
        plane = np.rint(60_000 * (image - image.min()) / np.ptp(image)).astype(np.uint16)
        name = f"r01c{number + 1:02d}f01p01-ch1sk1fk1fl1.tiff"
        (folder / name).write_bytes(encode_tiff(plane))
        lines.append(f"{name},P1,{chr(65 + number // 24)}{number % 24 + 1:02d},1")
    (folder / "load_data.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_store(folder: Path, root: Path) -> None:
    import shutil

    from cellstore.config import IngestParams
    from cellstore.store import Store

    shutil.rmtree(root, ignore_errors=True)
    with Store.create(root) as store:
        store.ingest(folder / "load_data.csv", IngestParams(images=folder))


def bare(folder: Path) -> None:
    import tifffile
    from cellpose.models import CellposeModel

    from cellstore.analysis.segmentation import find_model

    network = str(find_model().network)
    model = CellposeModel(pretrained_model=network, gpu=False)
    for path in sorted(folder.glob("*.tiff")):
        plane = tifffile.imread(path).astype("float32")
        model.eval(
            plane, channels=[0, 0], diameter=DIAMETER, flow_threshold=0.4, cellprob_threshold=0.0
        )


def in_store(folder: Path, name: str, workers: int) -> None:
    from cellstore.config import Resources, SegmentParams
    from cellstore.store import Store

    params = SegmentParams(diameter=DIAMETER, channels=())
    with Store.open(folder / name) as store:
        result = store.segment(params, resources=Resources(workers=workers), device="cpu")
        assert result.failures == (), result.failures


STEPS = {
    "bare": bare,
    "store1": lambda folder: in_store(folder, "store1", 1),
    "store2": lambda folder: in_store(folder, "store2", 2),
}


if __name__ == "__main__":
    main()
