"""What quality control costs a plane: cellstore beside CellProfiler's steps, in one run.

python benchmarks/quality_speed.py [--planes 20] [--side 1080]

CellProfiler's MeasureImageQuality is not a library, so its power spectrum is written out here with
the functions that it calls (scipy.fftpack, scipy.ndimage.sum); the percentiles and the rest are
numpy's in both. Prints milliseconds a plane, the median of all planes, and the largest difference
of the slopes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.fftpack import fft2
from scipy.ndimage import gaussian_filter
from scipy.ndimage import sum as sum_of_labels

from cellstore.analysis.quality import plane_quality, power_log_log_slope
from cellstore.io.image_files import decode_tiff, encode_tiff


def scenes(number: int, side: int) -> list[np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    planes = []
    for _ in range(number):
        spots = (random.random((side, side)) > 0.9995) * 4e5
        noise = random.normal(400, 15, (side, side))
        planes.append(np.clip(gaussian_filter(spots, 6) + noise, 0, 65_535).astype(np.uint16))
    return planes


def cellprofiler_slope(plane: np.ndarray[Any, Any]) -> float:
    height, width = plane.shape
    squares = np.arange(height)[:, None] ** 2 + np.arange(width) ** 2
    squares = np.minimum(squares, np.flipud(squares))
    squares = np.minimum(squares, np.fliplr(squares))
    scaled = plane / np.median(abs(plane - plane.mean()))
    power = abs(fft2(scaled - np.mean(scaled))) ** 2
    radii = np.floor(np.sqrt(squares)).astype(int) + 1
    labels = np.arange(2, np.floor(min(height, width) / 8)).astype(int)
    rings = np.asarray(sum_of_labels(power, radii, labels))
    return float(np.polyfit(np.log(labels), np.log(rings), 1)[0])


def median_ms(work: Callable[[Any], object], items: Sequence[Any]) -> float:
    times = []
    for item in items:
        started = time.perf_counter()
        work(item)
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--planes", type=int, default=20)
    parser.add_argument("--side", type=int, default=1080)
    options = parser.parse_args()
    planes = scenes(options.planes, options.side)
    files = [encode_tiff(plane) for plane in planes]
    rows = [
        ("read a compressed TIFF", median_ms(decode_tiff, files)),
        ("slope, CellProfiler's steps", median_ms(cellprofiler_slope, planes)),
        ("slope, cellstore", median_ms(power_log_log_slope, planes)),
        ("all of cellstore's numbers", median_ms(plane_quality, planes)),
    ]
    for name, milliseconds in rows:
        print(f"{name:<30}{milliseconds:>8.1f} ms")
    differences = [abs(cellprofiler_slope(p) - (power_log_log_slope(p) or 0)) for p in planes]
    print(f"{'largest difference of slopes':<30}{max(differences):>8.1e}")


if __name__ == "__main__":
    main()
