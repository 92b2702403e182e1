"""Quality control: measure the pixels of each image once, then flag what is odd on each plate."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Select, and_, exists, select
from sqlalchemy.orm import Session

from ...artifacts import write_atomically
from ...config import (
    EVERYTHING,
    THIS_PROCESS,
    QcParams,
    Resources,
    Selection,
    as_parameters,
)
from ...db.models import (
    CellFeatures,
    Image,
    Job,
    Plate,
    Recipe,
    RecipeInput,
    Run,
    Segmentation,
    Well,
)
from ...errors import UnknownNameError, UserInputError
from ...reading.cells import last_with_masks
from ...runs import (
    Outcome,
    Progressed,
    RecipeSpec,
    Share,
    Workspace,
    execute,
    find_recipe,
    images_of,
    progressed,
    register,
    running,
    work_through,
)
from ...runs.selection import is_current
from ...settings import check_not_of_a_store
from ...terms import Stage, Status
from .facts import FlaggedImage, QcResult
from .flags import Flagging, flag_plate
from .page import page, picture
from .pixels import quality_spec, quality_work
from .read import flagged_images, summaries

VERSION = 1


@dataclass(frozen=True)
class _Plan:
    """What is to be looked at: images, their plates, and by which recipes."""

    images: Select[int]
    plates: tuple[str, ...]
    quality: Recipe
    flagging: Recipe
    state: Progressed


def qc(
    workspace: Workspace,
    params: QcParams | None = None,
    selection: Selection = EVERYTHING,
    *,
    segmentation: str | None = None,
    resources: Resources = THIS_PROCESS,
    dry_run: bool = False,
) -> QcResult:
    """Measure the pixels of the selected images, and flag what is odd on their plates.

    An image is opened once, whatever the limits. It is compared with all images of its plate that
    have been looked at, not only with selected ones. Cells are those of one segment recipe
    (default: the one used last, if any), their areas those of its last measurement. Where nothing
    has changed since a run with the same limits, that run is returned.

    Raises:
        UnknownNameError: no such recipe, plate or well.
        UserInputError: a limit is out of range, or the condition cannot be read.
        StorageError, KeyboardInterrupt, RunCancelledError: see ``runs.work.work_through``.
    """
    params = _checked(params or QcParams())
    with workspace.database.read() as session:
        images = images_of(session, selection)
    if dry_run:
        return _forecast(workspace, images, resources)
    with workspace.database.begin() as session:
        plan = _plan(session, params, images, segmentation)
        earlier = _earlier(session, plan)
    if not plan.plates:
        return QcResult(None, False, None, None, plan.state.selected, plan.state.waiting)
    if earlier is not None:
        result = _result(workspace, earlier, plan, Outcome())
        return replace(result, already_done=True)
    return _run(workspace, plan, resources)


def _checked(params: QcParams) -> QcParams:
    if params.outlier <= 0 or params.cell_outlier <= 0:
        raise UserInputError("The numbers of robust standard deviations must be above 0.")
    if not 0 <= params.saturated <= 1:
        raise UserInputError("The share of saturated pixels must be from 0 to 1.")
    if params.min_images < 1:
        raise UserInputError("The least number of images must be 1 or more.")
    return params


def _forecast(workspace: Workspace, images: Select[int], resources: Resources) -> QcResult:
    spec = quality_spec()
    found = execute(
        workspace, spec, images, lambda tally: quality_work(0, 0), resources=resources, dry_run=True
    )
    return QcResult(
        None,
        False,
        None,
        None,
        found.selected,
        found.waiting,
        failed_before=found.failed_before,
        forecast=found.forecast,
    )


def _plan(
    session: Session, params: QcParams, images: Select[int], segmentation: str | None
) -> _Plan:
    quality = register(session, quality_spec())
    segment = _segment(session, segmentation)
    inputs = [quality]
    if segment is not None:
        measure = _measure_of(session, segment)
        inputs += [segment] if measure is None else [segment, measure]
    spec = RecipeSpec(Stage.QC, VERSION, as_parameters(params), None, tuple(inputs))
    seen = images.where(Image.content_sha256.is_not(None))
    on_plates = select(Plate.barcode).join(Well, Well.plate_id == Plate.id).join(Image)
    plates = session.scalars(on_plates.where(Image.id.in_(seen)).distinct())
    return _Plan(
        images,
        tuple(sorted(plates)),
        quality,
        register(session, spec),
        progressed(session, quality.id, images),
    )


def _segment(session: Session, segmentation: str | None) -> Recipe | None:
    if segmentation is not None:
        return find_recipe(session, Stage.SEGMENT, segmentation)
    try:
        return last_with_masks(session)
    except UnknownNameError:
        return _last_of_another_tool(session)


def _last_of_another_tool(session: Session) -> Recipe | None:
    """The segment recipe whose cells came last, if their masks are unknown; None: no cells."""
    query = select(Recipe).join(Segmentation, Segmentation.recipe_id == Recipe.id)
    return session.scalars(query.order_by(Segmentation.id.desc()).limit(1)).first()


def _measure_of(session: Session, segment: Recipe) -> Recipe | None:
    """The measure recipe of these cells that was used last and knows areas."""
    areas = exists().where(CellFeatures.recipe_id == Recipe.id, CellFeatures.area.is_not(None))
    query = (
        select(Recipe)
        .join(RecipeInput, RecipeInput.recipe_id == Recipe.id)
        .join(Run, Run.recipe_id == Recipe.id)
        .where(RecipeInput.input_id == segment.id, Recipe.stage == Stage.MEASURE, areas)
        .order_by(Run.id.desc())
    )
    return session.scalars(query.limit(1)).first()


def _earlier(session: Session, plan: _Plan) -> int | None:
    """The newest finished run of these limits, if it saw these plates as they are now."""
    if plan.state.todo:
        return None
    query = select(Run).where(Run.recipe_id == plan.flagging.id, Run.status == Status.DONE)
    run = session.scalars(query.order_by(Run.id.desc()).limit(1)).first()
    if run is None or run.result is None:
        return None
    plates = run.result["plates"]
    if not set(plan.plates) <= set(plates):
        return None
    same = run.result["state"] == _state(session, flagging_of(session, run.id), plates)
    return run.id if same else None


def flagging_of(session: Session, run_id: int) -> Flagging:
    """Return by which limits, and from whose rows, a quality-control run flags."""
    recipe = session.get_one(Recipe, session.get_one(Run, run_id).recipe_id)
    query = select(Recipe).join(RecipeInput, RecipeInput.input_id == Recipe.id)
    inputs = session.scalars(query.where(RecipeInput.recipe_id == recipe.id))
    ids = {Stage(source.stage): source.id for source in inputs}
    known = {field.name for field in fields(QcParams)} & recipe.parameters.keys()
    params = QcParams(**{name: recipe.parameters[name] for name in known})
    return Flagging(run_id, params, ids[Stage.QC], ids.get(Stage.SEGMENT), ids.get(Stage.MEASURE))


def _state(session: Session, flagging: Flagging, plates: Sequence[str]) -> str:
    """A digest of all that the flags of some plates depend on beside the recipe."""
    segmented = and_(is_current(), Segmentation.recipe_id == flagging.segment_id)
    query = (
        select(Image.id, Image.content_sha256, Segmentation.id)
        .join(Well, Well.id == Image.well_id)
        .join(Plate, Plate.id == Well.plate_id)
        .outerjoin(Segmentation, segmented)
        .add_columns(_done(flagging.quality_id), _done(flagging.measure_id))
        .where(Plate.barcode.in_(plates))
        .order_by(Image.id, Segmentation.id)
    )
    digest = hashlib.sha256()
    for row in session.execute(query.execution_options(yield_per=10_000)):
        digest.update(repr(tuple(row)).encode())
    return digest.hexdigest()


def _done(recipe_id: int | None) -> Any:
    job = exists().where(Job.recipe_id == recipe_id, Job.image_id == Image.id)
    return job.where(Job.content_sha256 == Image.content_sha256, Job.status == Status.DONE)


def _run(workspace: Workspace, plan: _Plan, resources: Resources) -> QcResult:
    outcome = Outcome()
    with running(workspace.database, plan.flagging) as run:
        if plan.state.todo:
            work = quality_work(run.id, plan.quality.id)
            share = Share(run.id, plan.quality.id, plan.images)
            outcome = work_through(workspace.database, workspace.progress, work, share, resources)
        run.result = {"images": outcome.done, "failed": outcome.failed, "plates": plan.plates}
        run.result["state"] = _flag(workspace, run.id, plan.plates)
    return _result(workspace, run.id, plan, outcome)


def _flag(workspace: Workspace, run_id: int, plates: Sequence[str]) -> str:
    """Flag plate by plate; return the state that the plates were in."""
    with workspace.database.read() as session:
        flagging = flagging_of(session, run_id)
        rows = session.execute(select(Plate.barcode, Plate.id).where(Plate.barcode.in_(plates)))
        ids = dict(rows.all())
        state = _state(session, flagging, plates)
    workspace.progress.start("flag", len(plates))
    try:
        for barcode in plates:
            with workspace.database.begin() as session:
                flag_plate(session, flagging, ids[barcode])
            workspace.progress.advance()
    finally:
        workspace.progress.finish()
    return state


def _result(workspace: Workspace, run_id: int, plan: _Plan, outcome: Outcome) -> QcResult:
    with workspace.database.read() as session:
        flagging = flagging_of(session, run_id)
        found = summaries(session, flagging, plan.plates)
    return QcResult(
        run_id=run_id,
        already_done=False,
        segment_recipe=flagging.segment_id,
        measure_recipe=flagging.measure_id,
        selected=plan.state.selected,
        waiting=plan.state.waiting,
        done=outcome.done,
        failures=tuple(outcome.failures),
        failed_before=plan.state.failed,
        plates=found,
        notes=_notes(flagging, found),
    )


def _notes(flagging: Flagging, plates: Sequence[Any]) -> tuple[str, ...]:
    notes = []
    few = [plate.plate for plate in plates if plate.seen < flagging.params.min_images]
    if few:
        some = ", ".join(few[:5]) + (", ..." if len(few) > 5 else "")
        notes.append(
            f"Too few images to say what is usual on {some}: only saturated and empty images are "
            f"flagged there. See --min-images, now {flagging.params.min_images}."
        )
    if flagging.segment_id is None:
        notes.append("No cells yet, so only pixels were looked at. Run: cellstore segment")
    elif flagging.measure_id is None:
        notes.append("The cells are not measured, so their areas are unknown: cellstore measure")
    return tuple(notes)


def list_flags(workspace: Workspace, result: QcResult) -> tuple[FlaggedImage, ...]:
    """Return all flags of images that a run has on the plates of ``result``."""
    if result.run_id is None:
        return ()
    plates = [plate.plate for plate in result.plates]
    with workspace.database.read() as session:
        return tuple(flagged_images(session, result.run_id, plates))


def write_page(workspace: Workspace, result: QcResult, path: Path) -> QcResult:
    """Write maps of the plates and their oddest fields as one HTML file.

    Raises:
        MissingExtraError: matplotlib or Jinja2 is not installed.
        StorageError: the file cannot be written.
        UserInputError: nothing was looked at.
    """
    flagging = _flagging(workspace, result)
    check_not_of_a_store(path)
    write_atomically(path, page(workspace, flagging, result).encode())
    return replace(result, html=str(path))


def write_picture(workspace: Workspace, result: QcResult, path: Path) -> QcResult:
    """Write the maps of one plate as a PNG; raises as :func:`write_page` does.

    Raises:
        UserInputError: nothing was looked at, or several plates were.
    """
    flagging = _flagging(workspace, result)
    if len(result.plates) != 1:
        raise UserInputError(
            f"A picture is of one plate, and {len(result.plates)} are selected. Name one with "
            "--plate, or ask for a page with --html."
        )
    check_not_of_a_store(path)
    write_atomically(path, picture(workspace, flagging, result.plates[0].plate))
    return replace(result, picture=str(path))


def _flagging(workspace: Workspace, result: QcResult) -> Flagging:
    if result.run_id is None:
        raise UserInputError(
            "No image has been looked at, so there is nothing to draw. Ingest images first."
        )
    with workspace.database.read() as session:
        return flagging_of(session, result.run_id)
