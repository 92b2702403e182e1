"""The predict run that a report is about, and the side of its split that is scored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ...analytics import Questions
from ...config import VoteRules
from ...db.models import Recipe, Run, Split
from ...errors import UserInputError
from ...reading.learning import leak_of
from ...reading.said import flags_on, predict_run
from ...runs import Workspace
from ...terms import Status, Subset
from .rivals import find_rivals, kind_of

PREFERRED = (Subset.TEST.value, "outside", Subset.VALIDATION.value)
"""Which side is scored, if the run has labelled it; the training side only by force."""

ALL_IMAGES = """
    SELECT count(DISTINCT s.image_id) AS images, count(*) AS cells
    FROM predictions AS p
    JOIN cells AS c ON c.id = p.cell_id
    JOIN segmentations AS s ON s.id = c.segmentation_id
    JOIN run_images AS ri ON ri.run_id = p.run_id AND ri.image_id = s.image_id
    WHERE p.run_id = ? AND p.rank = 1 AND c.excluded IS NULL AND ri.truth IS NOT NULL
        AND list_contains(?, ri.subset) AND (? OR ri.control IS NULL)
"""
UNLABELLED = """
    SELECT count(*) AS images FROM split_members AS m
    WHERE m.split_id = ? AND list_contains(?, m.subset) AND m.image_id NOT IN (
        SELECT image_id FROM placed_predictions WHERE run_id = ? AND NOT excluded
    )
"""


@dataclass(frozen=True)
class Subject:
    """The predict run that a report is about, with the split that it is measured by.

    ``rules`` say which images and cells have a vote: ``rules.unflagged_by`` is the quality-control
    run whose flagged ones have none, if any. ``baseline``: which it labelled with, if with one;
    ``rivals``: runs of baselines of its split; ``feature_leak``: that its features know labels of
    the scored side, if they do.
    """

    run: Run
    split: Split
    top_k: int | None
    rules: VoteRules = field(default_factory=VoteRules)
    qc_notes: tuple[str, ...] = ()
    baseline: str | None = None
    rivals: dict[str, list[Run]] = field(default_factory=dict)
    feature_leak: str | None = None

    @property
    def qc_run_id(self) -> int | None:
        """The quality-control run whose flagged images and cells have no vote."""
        return self.rules.unflagged_by


def find_subject(
    workspace: Workspace,
    reference: str,
    leave_out_flagged: str | None = None,
    rules: VoteRules | None = None,
) -> Subject:
    """Return the predict run of this name; a train run stands for its latest predict run."""
    subject = _subject(workspace, reference, leave_out_flagged, rules)
    rivals = find_rivals(workspace, subject.run, subject.split)
    return replace(subject, baseline=kind_of(workspace, subject.run), rivals=rivals)


def _subject(
    workspace: Workspace, reference: str, leave_out_flagged: str | None, rules: VoteRules | None
) -> Subject:
    with workspace.database.read() as session:
        run = predict_run(session, reference)
        parent = session.get(Run, run.parent_id) if run.parent_id else None
        split_id = run.split_id or (parent.split_id if parent else None)
        if split_id is None:
            raise UserInputError(f"Run {run.id} belongs to no split, so there is no truth for it.")
        recipe = session.get_one(Recipe, run.recipe_id)
        rules = rules or VoteRules()
        if leave_out_flagged is None and rules.unflagged_by is not None:
            leave_out_flagged = str(rules.unflagged_by)
        qc, notes = flags_on(session, leave_out_flagged, run)
        return Subject(
            run,
            session.get_one(Split, split_id),
            recipe.parameters.get("top_k"),
            replace(rules, unflagged_by=qc),
            notes,
            feature_leak=None if parent is None else leak_of(session, parent, split_id),
        )


def chosen_sides(counts: dict[str, int], run_id: int, *, force: bool) -> tuple[str, ...]:
    """Return the sides of the split to score, of those that have labelled images.

    Raises:
        UserInputError: there are none, or only training images and ``force`` is off.
    """
    if not counts:
        raise UserInputError(
            f"Run {run_id} has labelled no image whose truth is known. "
            "Label some with: cellstore predict"
        )
    if force:
        return tuple(sorted(counts))
    for side in PREFERRED:
        if side in counts:
            return (side,)
    raise UserInputError(
        f"Run {run_id} has only labelled the {counts[Subset.TRAIN.value]} images that its network "
        "was trained on; their score says nothing about new images. Label the test side with "
        "cellstore predict, or score them anyway with --force."
    )


def count_flagged(
    questions: Questions, subject: Subject, sides: tuple[str, ...], images: int, cells: int
) -> tuple[int, int]:
    """Return how many images, and cells, more there would be without leaving out."""
    if subject.qc_run_id is None:
        return 0, 0
    everything = questions.ask(
        ALL_IMAGES, [subject.run.id, list(sides), subject.rules.controls]
    ).to_pylist()[0]
    return everything["images"] - images, everything["cells"] - cells


def unlabelled_note(
    questions: Questions, subject: Subject, sides: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the sentence on images of the scored sides that an ended run says nothing of."""
    if subject.run.status != Status.DONE:
        return ()
    asked = [subject.split.id, list(sides), subject.run.id]
    images = questions.ask(UNLABELLED, asked)["images"][0].as_py()
    if not images:
        return ()
    said = (
        f"{images:,} images of the scored side have no label by this run, so no score counts "
        "them: no cell was found in them, or the run was not asked about them."
    )
    return (said,)


def notes_on(
    subject: Subject, counts: dict[str, int], sides: tuple[str, ...], flagged: tuple[int, int]
) -> tuple[str, ...]:
    """Return what a reader must know of the scored images, a sentence each."""
    found = [subject.feature_leak] if subject.feature_leak else []
    found += _side_notes(counts, sides)
    if subject.run.status != Status.DONE:
        status = Status(subject.run.status).value
        found.append(f"The run is {status}, so images may be missing here.")
    found += _rule_notes(subject.rules)
    if subject.qc_run_id is not None:
        found += subject.qc_notes
        found.append(
            f"Left out, because quality-control run {subject.qc_run_id} flagged them: "
            f"{flagged[0]:,} images and {flagged[1]:,} cells, those of the images included."
        )
    return tuple(found)


def _side_notes(counts: dict[str, int], sides: tuple[str, ...]) -> list[str]:
    notes = []
    trained_on = counts.get(Subset.TRAIN.value, 0)
    if Subset.TRAIN.value in sides:
        notes.append(f"Forced: {trained_on:,} of these images were used to train the network.")
    elif trained_on:
        notes.append(f"{trained_on:,} labelled training images are left out (--force adds them).")
    if Subset.VALIDATION.value in sides:
        notes.append("Validation images are scored, and they decided when training stopped.")
    if "outside" in sides:
        notes.append("Images that the split does not name are scored by their treatment.")
    return notes


def _rule_notes(rules: VoteRules) -> list[str]:
    notes = []
    if rules.min_cells > 1:
        notes.append(f"Images and wells with fewer than {rules.min_cells} cells have no answer.")
    if rules.min_margin > 0:
        notes.append(
            "Images and wells have no answer where the share of the first label is less than "
            f"{100 * rules.min_margin:g} % above that of the second."
        )
    if not rules.controls:
        notes.append("Control wells are left out.")
    return notes
