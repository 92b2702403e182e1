"""Orders as the words of a command: every option spelled, none left to a default."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ...config import (
    TRAIN_RECIPES,
    BaselineParams,
    ImageInput,
    MeasureParams,
    PredictParams,
    SegmentParams,
    SplitParams,
    TrainParams,
)
from .facts import Order

NONE = "none"


def words_of(order: Order) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the words of the command after ``cellstore``, and what they cannot say."""
    spell = _SPELLED[type(order.params)]
    words, doubts = spell(order.params, order.names)
    return tuple(words), (*order.doubts, *doubts)


def _option(name: str, value: Any) -> list[str]:
    # With "=", so that a value may begin with a dash.
    return [] if value is None else [f"--{name}={value}"]


def _number(value: float) -> str:
    return repr(float(value))


def _listed(name: str, values: Sequence[str]) -> list[str]:
    return [f"--{name}={','.join(values)}"] if values else []


def _commas(what: str, values: Iterable[str]) -> list[str]:
    """Doubts about names that a list with commas cannot hold."""
    return [
        f"{what} {value!r} has a comma or space at its end, which a list cannot hold: "
        "this step can be redone from Python only"
        for value in values
        if "," in value or value != value.strip() or not value
    ]


def _segment(params: SegmentParams, _names: dict[str, str]) -> tuple[list[str], list[str]]:
    image, nuclei = params.image, params.nuclei
    words = [
        "segment",
        *_option("model", params.model),
        *_option("flow-threshold", _number(params.flow_threshold)),
        *_option("cellprob-threshold", _number(params.cellprob_threshold)),
        *([] if params.diameter is None else _option("diameter", _number(params.diameter))),
        *_option("diameter-from", params.diameter_from),
        *_plane(image),
        *([] if nuclei is None else _listed("nuclei", nuclei.channels)),
    ]
    doubts = _commas("channel", (*image.channels, *(nuclei.channels if nuclei else ())))
    if nuclei is not None and (nuclei.projection != image.projection or not nuclei.channels):
        doubts.append("the planes of cells and nuclei are projected in two ways, from Python only")
    return words, doubts


def _plane(image: ImageInput) -> list[str]:
    return [*_listed("channels", image.channels), f"--projection={image.projection}"]


def _measure(params: MeasureParams, names: dict[str, str]) -> tuple[list[str], list[str]]:
    words = [
        "measure",
        *_listed("features", params.features),
        *([] if params.image is None else _plane(params.image)),
        *_option("segmentation", names.get("segmentation")),
    ]
    channels = () if params.image is None else params.image.channels
    return words, _commas("channel", channels)


def _split(params: SplitParams, names: dict[str, str]) -> tuple[list[str], list[str]]:
    size = None if params.folds is not None else _number(params.test_size)
    words = [
        *("split", "create"),
        f"--protocol={params.protocol}",
        f"--field={params.field}",
        *_of_groups(params),
        *_option("test-size", size),
        *_listed("test-plates", params.test_plates),
        *_listed("validation-plates", params.validation_plates),
        *_option("folds", params.folds),
        *_option("seed", params.seed),
        *(f"--plate={plate}" for plate in params.plates),
        *_option("where", params.where),
        *_cuts(params),
        *_option("downsample-by", params.downsample_by),
        *_option("min-images", params.min_images),
        *(["--allow-missing"] if params.allow_missing else []),
        *_left_out(params.leave_out_flagged),
        *("--", names["name"]),
    ]
    return words, _commas("plate", (*params.test_plates, *params.validation_plates))


def _of_groups(params: SplitParams) -> list[str]:
    """What the published protocol settles: it splits single images, and none validates."""
    if params.protocol == "published":
        return []
    size = _number(params.validation_size)
    return [f"--group={params.group_level}", f"--validation-size={size}"]


def _cuts(params: SplitParams) -> list[str]:
    if params.downsample is None:
        return []
    cuts = [f"--downsample={label}={size}" for label, size in params.downsample]
    return cuts or [f"--downsample={NONE}"]


def _left_out(run: str | None) -> list[str]:
    return [] if run is None else ["--leave-out-flagged", f"--qc-run={run}"]


def _sources(names: dict[str, str]) -> list[str]:
    return [
        word
        for name in ("split", "segmentation", "measurement")
        for word in _option(name, names.get(name))
    ]


def _train(params: TrainParams, names: dict[str, str]) -> tuple[list[str], list[str]]:
    weights = "--class-weights" if params.class_weights else "--no-class-weights"
    words = [
        "train",
        f"--recipe={params.recipe}",
        *_sources(names),
        *_option("features", params.features),
        *_left_out(params.leave_out_flagged),
        *([] if params.branches is None else [f"--branches={','.join(params.branches)}"]),
        *_listed("channels", params.channels),
        f"--backbone={params.backbone}",
        f"--weights={params.weights}",
        f"--crop-size={params.crop_size}",
        f"--dropout={_number(params.dropout)}",
        f"--epochs={params.epochs}",
        f"--patience={params.patience}",
        f"--monitor={params.monitor}",
        f"--batch-size={params.batch_size}",
        f"--sampler={params.sampler}",
        f"--augment={','.join(params.augment) or NONE}",
        f"--loss={params.loss}",
        weights,
        f"--label-smoothing={_number(params.label_smoothing)}",
        f"--learning-rate={_number(params.learning_rate)}",
        f"--schedule={params.schedule}",
        f"--warmup-epochs={params.warmup_epochs}",
        f"--weight-decay={_number(params.weight_decay)}",
        f"--normalise={params.normalise}",
        f"--intensity={params.intensity}",
        f"--precision={params.precision}",
        f"--seed={params.seed}",
    ]
    usual = TRAIN_RECIPES.get(params.recipe, TrainParams())
    unsaid = [n for n in ("step_size", "gamma") if getattr(params, n) != getattr(usual, n)]
    doubts = [f"{name} is {getattr(params, name)}, from Python only" for name in unsaid]
    return words, [*doubts, *_commas("channel", params.channels)]


def _baseline(params: BaselineParams, names: dict[str, str]) -> tuple[list[str], list[str]]:
    words = [
        "train",
        f"--baseline={names['baseline']}",
        "--no-predict",
        *_sources(names),
        *_option("features", params.features),
        *_left_out(params.leave_out_flagged),
        f"--max-cells={params.max_cells}",
        f"--normalise={params.normalise}",
        f"--seed={params.seed}",
    ]
    usual = BaselineParams()
    fixed = ("strength", "trees", "depth", "smallest_leaf")
    unsaid = [name for name in fixed if getattr(params, name) != getattr(usual, name)]
    return words, [f"{name} is {getattr(params, name)}, from Python only" for name in unsaid]


def _predict(params: PredictParams, names: dict[str, str]) -> tuple[list[str], list[str]]:
    kept = ["--all-probabilities"] if params.all_probabilities else [f"--top-k={params.top_k}"]
    words = [
        "predict",
        *_option("run", names.get("run")),
        f"--subset={params.subset or 'all'}",
        *_option("split", params.split),
        *(f"--plate={plate}" for plate in params.plates),
        *(f"--well={well}" for well in params.wells),
        *_option("where", params.where),
        *_option("limit", params.limit),
        *kept,
        *_option("embedding", params.embedding),
    ]
    return words, []


_SPELLED: dict[type, Callable[[Any, dict[str, str]], tuple[list[str], list[str]]]] = {
    SegmentParams: _segment,
    MeasureParams: _measure,
    SplitParams: _split,
    TrainParams: _train,
    BaselineParams: _baseline,
    PredictParams: _predict,
}
