"""Train baselines: one run of stage ``train`` each, with a checkpoint like any other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

from ...config import BaselineParams
from ...db.models import Recipe, Run
from ...extras import need
from ...ops.baselines import BaselineMeta, choose, save_model
from ...reading.cells import as_text, cells_query
from ...runs import Workspace, attach, keep_file, running
from ...terms import ArtifactKind
from .fitting import Cells, Fitted, draw_cells, fit
from .outcome import BaselineResult, finished, result_of, summary
from .plan import Plan, check_blocks, commit, make_plan


def train_baselines(
    workspace: Workspace,
    kinds: Sequence[str],
    params: BaselineParams | None = None,
    *,
    split: str | None = None,
    segmentation: str | None = None,
    measurement: str | None = None,
    force: bool = False,
) -> tuple[BaselineResult, ...]:
    """Train baselines on the training side of a split (default: the latest).

    ``kinds``: some of ``cellstore.ops.baselines.BASELINES``, or the groups ``null`` and ``all``.
    A baseline that was finished with the same recipe is returned as it is, unless ``force``.

    Raises:
        MissingExtraError: scikit-learn and the like are not installed.
        UnknownNameError: no such baseline, split, recipe or feature set.
        UserInputError: the training side has no measured cells or one class, or a parameter is
            out of range.

    """
    need("train")
    chosen = choose(kinds)
    plan = make_plan(workspace, params or BaselineParams(), (split, segmentation, measurement))
    check_blocks(plan)
    workspace.progress.start("train", len(chosen))
    try:
        cells = cache(lambda: draw_cells(workspace, plan))  # read once for all that need them
        return tuple(_train(workspace, plan, kind, cells, force=force) for kind in chosen)
    finally:
        workspace.progress.finish()


def _train(
    workspace: Workspace, plan: Plan, kind: str, cells: Callable[[], Cells], *, force: bool
) -> BaselineResult:
    earlier = None if force else finished(workspace, plan, kind)
    if earlier is None:
        earlier = _new(workspace, plan, kind, cells)
    workspace.progress.advance()
    return earlier


def _new(workspace: Workspace, plan: Plan, kind: str, cells: Callable[[], Cells]) -> BaselineResult:
    recipe = commit(workspace, plan, kind)
    query = as_text(cells_query(plan.source))
    with running(
        workspace.database, recipe, split_id=plan.split.id, seed=plan.params.seed, query=query
    ) as run:
        fitted = fit(workspace, plan, kind, cells)
        sha256 = _keep_checkpoint(workspace, run.id, _meta(plan, kind, fitted, recipe), fitted)
        run.result = summary(plan, kind, fitted) | {"checkpoint_sha256": sha256}
    with workspace.database.read() as session:
        return replace(result_of(session, session.get_one(Run, run.id)), already_done=False)


def _meta(plan: Plan, kind: str, fitted: Fitted, recipe: Recipe) -> BaselineMeta:
    return BaselineMeta(
        model=kind,
        labels=tuple(plan.labels),
        field=plan.split.field.value,
        scaler=fitted.scaler,
        fingerprints={
            "train": recipe.fingerprint,
            "split": plan.split.fingerprint,
            "segment": plan.segment.fingerprint,
            "measure": plan.measure.fingerprint,
        },
        feature_set=plan.source.features.name,
    )


def _keep_checkpoint(workspace: Workspace, run_id: int, meta: BaselineMeta, fitted: Fitted) -> str:
    """Write arrays and the record beside them, then their rows; return the arrays' sha256."""
    write = workspace.artifacts.write
    tensors = write(ArtifactKind.CHECKPOINT, save_model(fitted.model), ".safetensors")
    record = meta.to_json() | {"tensors_sha256": tensors.sha256, "rows": fitted.rows}
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
    files = (tensors, write(ArtifactKind.CHECKPOINT, text.encode(), ".json"))
    with workspace.database.begin() as session:
        for file in files:
            attach(session, run_id, keep_file(session, file))
    return tensors.sha256
