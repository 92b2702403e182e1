"""Which predict run is meant, and which quality-control run's flags count for its votes."""

from __future__ import annotations

from sqlalchemy import and_, select
from sqlalchemy.orm import Session

from ..enums import Stage, Status
from ..errors import UnknownNameError
from ..jobs.lookup import run_in
from ..models import Cell, Prediction, Run, Segmentation
from .exclusions import check_cells, check_plates, count_unseen, find_qc_run, unseen_note


def predict_run(session: Session, reference: str) -> Run:
    """Return the predict run of this name; a train run stands for its latest predict run.

    Raises:
        UnknownNameError: there is no such run, or it has no predictions.
    """
    named = reference not in ("latest", "last")
    run = run_in(session, reference, () if named else (Stage.PREDICT,))
    if run.stage == Stage.TRAIN:
        later = select(Run).where(Run.parent_id == run.id, Run.stage == Stage.PREDICT)
        done = later.where(Run.status == Status.DONE).order_by(Run.id.desc()).limit(1)
        run = session.scalars(done).first() or run
    if run.stage != Stage.PREDICT:
        raise UnknownNameError(
            f"Run {run.id} ({Stage(run.stage).value}) has no predictions to report on. "
            "Label images with a trained run first: cellstore predict"
        )
    return run


def flags_on(
    session: Session, reference: str | None, run: Run
) -> tuple[int | None, tuple[str, ...]]:
    """Return the quality-control run whose flags count, and what must be said of it.

    Raises:
        UnknownNameError: there is no such quality-control run.
        UserInputError: it has not looked at what ``run`` has labelled.
    """
    if reference is None:
        return None, ()
    qc = find_qc_run(session, reference)
    said = and_(Prediction.run_id == run.id, Prediction.rank == 1)
    seen = select(Segmentation).join(Cell, Cell.segmentation_id == Segmentation.id)
    seen = seen.join(Prediction, Prediction.cell_id == Cell.id).where(said)
    images = seen.with_only_columns(Segmentation.image_id)
    check_plates(session, qc, images)
    for segment_id in session.scalars(seen.with_only_columns(Segmentation.recipe_id).distinct()):
        check_cells(session, qc, segment_id)
    unseen = count_unseen(session, qc, images)
    return qc.id, (unseen_note(qc, unseen),) if unseen else ()
