"""What can be measured on a cell: groups of features, each with unit, source and formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

_REGIONPROPS = "skimage.measure.regionprops"
_CELLPROFILER = "CellProfiler MeasureObjectIntensity"
_GLCM = "skimage.feature.graycomatrix, graycoprops"

_PAIRS = (
    "p: share of the grey levels i, j among pairs of pixels of the cell {} apart, in either order, "
    "mean over 0, 45, 90 and 135 degrees. 32 grey levels from its lowest to its highest intensity."
)

TEXTURE_DISTANCES = (1, 3)
"""Pixels between the two pixels of a pair: neighbours, and the default scale of CellProfiler."""


@dataclass(frozen=True)
class Feature:
    """A measured column. ``source``: whose definition it follows; values are equal to it."""

    name: str
    dtype: str
    unit: str
    source: str
    formula: str
    description: str

    def to_json(self) -> dict[str, str]:
        """The fields by name, as a feature set lists them."""
        return asdict(self)

    def of_channel(self, channel: str) -> Feature:
        """The same feature measured on one channel."""
        return replace(self, name=f"{self.name}_{channel}")


@dataclass(frozen=True)
class FeatureGroup:
    """Features that are measured together, by one recipe.

    ``per_channel``: on each channel, in columns ``<feature>_<channel>``; else on one plane.
    """

    name: str
    features: tuple[Feature, ...]
    per_channel: bool
    description: str

    def columns(self, channels: Sequence[str] = ()) -> tuple[Feature, ...]:
        """The columns of the group, channel by channel."""
        if not self.per_channel:
            return self.features
        return tuple(item.of_channel(name) for name in channels for item in self.features)


def _basic(name: str, unit: str, source: str, formula: str, description: str) -> Feature:
    return Feature(name, "float64", unit, f"{_REGIONPROPS}: {source}", formula, description)


def _intensity(name: str, source: str, formula: str, description: str) -> Feature:
    return Feature(name, "float64", "intensity", source, formula, description)


def _texture(prop: str, formula: str, description: str) -> tuple[Feature, ...]:
    return tuple(
        Feature(
            f"{prop}_d{distance}",
            "float64",
            "1",
            f"{_GLCM}: {prop}",
            formula,
            f"{description} {_PAIRS.format(distance)}",
        )
        for distance in TEXTURE_DISTANCES
    )


FEATURES: tuple[Feature, ...] = (
    _basic("area", "pixel^2", "area", "n", "Number of pixels of the cell."),
    _basic(
        "convex_area",
        "pixel^2",
        "area_convex",
        "pixels on or in the hull of all (r +- 1/2, c), (r, c +- 1/2)",
        "Number of pixels of its convex hull.",
    ),
    _basic(
        "perimeter",
        "pixel",
        "perimeter",
        "n1 + sqrt(2) n2 + (1 + sqrt(2))/2 n3 of outline pixels by neighbours (Benkrid, Crookes)",
        "Length of its outline, 4-connected (Benkrid).",
    ),
    _basic(
        "eccentricity",
        "1",
        "eccentricity",
        "sqrt(1 - l2/l1), l1 >= l2 eigenvalues of the inertia tensor",
        "Eccentricity of the ellipse of equal moments; 0: disc.",
    ),
    _basic(
        "mean_intensity",
        "intensity",
        "intensity_mean",
        "sum(I)/n, in 64 bits",
        "Mean intensity inside the cell.",
    ),
    _basic(
        "min_intensity",
        "intensity",
        "intensity_min",
        "min(I)",
        "Lowest intensity inside the cell.",
    ),
    _basic(
        "max_intensity",
        "intensity",
        "intensity_max",
        "max(I)",
        "Highest intensity inside the cell.",
    ),
    _basic(
        "major_axis_length",
        "pixel",
        "axis_major_length",
        "4 sqrt(l1)",
        "Long axis of the ellipse of equal moments.",
    ),
    _basic(
        "minor_axis_length",
        "pixel",
        "axis_minor_length",
        "4 sqrt(l2)",
        "Short axis of the ellipse of equal moments.",
    ),
    _basic(
        "orientation",
        "radian",
        "orientation",
        "atan2(2 mu11, mu20 - mu02)/2",
        "Angle from the row axis to the long axis, -pi/2..pi/2.",
    ),
    _basic(
        "solidity",
        "1",
        "solidity",
        "area/convex_area",
        "Area divided by the area of the convex hull.",
    ),
    _basic(
        "extent",
        "1",
        "extent",
        "area/(height width)",
        "Area divided by the area of the bounding box.",
    ),
    _basic("centroid_y", "pixel", "centroid-0", "sum(r)/n", "Row of the centroid."),
    _basic("centroid_x", "pixel", "centroid-1", "sum(c)/n", "Column of the centroid."),
)
"""The built-in measurements, in the order in which a network reads them."""

FEATURE_NAMES: tuple[str, ...] = tuple(feature.name for feature in FEATURES)

INTENSITY: tuple[Feature, ...] = (
    _intensity(
        "mean_intensity",
        f"{_REGIONPROPS}: intensity_mean",
        "sum(I)/n",
        "Mean intensity inside the cell.",
    ),
    _intensity(
        "std_intensity",
        f"{_REGIONPROPS}: intensity_std",
        "sqrt(sum((I - mean)^2)/n)",
        "Standard deviation of the intensities inside the cell.",
    ),
    _intensity(
        "min_intensity",
        f"{_REGIONPROPS}: intensity_min",
        "min(I)",
        "Lowest intensity inside the cell.",
    ),
    _intensity(
        "max_intensity",
        f"{_REGIONPROPS}: intensity_max",
        "max(I)",
        "Highest intensity inside the cell.",
    ),
    _intensity(
        "lower_quartile_intensity",
        f"numpy.quantile, linear; {_CELLPROFILER}: LowerQuartileIntensity",
        "quantile(I, 1/4)",
        "A quarter of the pixels is darker.",
    ),
    _intensity(
        "median_intensity",
        f"{_REGIONPROPS}: intensity_median",
        "median(I)",
        "Half of the pixels are darker.",
    ),
    _intensity(
        "upper_quartile_intensity",
        f"numpy.quantile, linear; {_CELLPROFILER}: UpperQuartileIntensity",
        "quantile(I, 3/4)",
        "A quarter of the pixels is brighter.",
    ),
    _intensity(
        "mad_intensity",
        f"{_CELLPROFILER}: MADIntensity",
        "median(|I - median(I)|)",
        "Median absolute deviation from the median, not scaled.",
    ),
    _intensity(
        "integrated_intensity",
        f"{_CELLPROFILER}: IntegratedIntensity",
        "sum(I)",
        "All intensity inside the cell.",
    ),
    Feature(
        "mass_displacement",
        "float64",
        "pixel",
        f"{_CELLPROFILER}: MassDisplacement",
        "|sum(I (r, c))/sum(I) - sum((r, c))/n|",
        "Distance of the centre of the light from the centroid; none where sum(I) is 0.",
    ),
    *(
        _intensity(
            f"edge_{name}_intensity",
            f"{_CELLPROFILER}: {source}IntensityEdge",
            f"{formula} at the edge",
            f"{description} (skimage.segmentation.find_boundaries, inner); none without one.",
        )
        for name, source, formula, description in (
            ("mean", "Mean", "sum(I)/n", "Mean intensity of the pixels at the cell's edge"),
            ("std", "Std", "sqrt(sum((I - mean)^2)/n)", "Standard deviation at the cell's edge"),
            ("min", "Min", "min(I)", "Lowest intensity at the cell's edge"),
            ("max", "Max", "max(I)", "Highest intensity at the cell's edge"),
            ("integrated", "Integrated", "sum(I)", "All intensity at the cell's edge"),
        )
    ),
)
"""What is measured on each channel by group ``intensity``."""

TEXTURE: tuple[Feature, ...] = (
    *_texture("contrast", "sum(p (i - j)^2)", "Differences of grey level, squared."),
    *_texture("dissimilarity", "sum(p |i - j|)", "Differences of grey level."),
    *_texture("homogeneity", "sum(p/(1 + (i - j)^2))", "Near 1 where pixels are alike."),
    *_texture("energy", "sqrt(sum(p^2))", "1 where all pairs are the same."),
    *_texture(
        "correlation",
        "sum(p (i - m)(j - m))/s^2",
        "Of the grey levels of a pair; 1 for a cell of one grey level.",
    ),
    *_texture("entropy", "-sum(p ln p)", "High where all pairs are equally frequent."),
)
"""What is measured on each channel by group ``texture``: the mean over the directions that have
pairs of pixels; a cell without any has none."""

BASIC_GROUP = FeatureGroup(
    "basic", FEATURES, False, "Shape, and intensity of one plane; what networks read by default."
)
GROUPS: dict[str, FeatureGroup] = {
    group.name: group
    for group in (
        BASIC_GROUP,
        FeatureGroup(
            "intensity", INTENSITY, True, "Distribution of the intensity of each channel."
        ),
        FeatureGroup(
            "texture", TEXTURE, True, "Grey levels of neighbouring pixels of each channel."
        ),
    )
}
"""The registry: every group by name."""
