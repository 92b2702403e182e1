"""A run: what it was made from, and what came of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ...db.models import (
    Artifact,
    Job,
    Recipe,
    RecipeInput,
    Run,
    RunArtifact,
    Split,
    SplitMember,
)
from ...runs import Workspace, run_in
from ...terms import ArtifactKind, Subset
from .downstream import came_of_runs
from .facts import ArtifactFact, RecipeFact, RunAudit, RunFact
from .history import changed_wells, ingested


def audit_run(workspace: Workspace, reference: str) -> RunAudit:
    """Return a run (a number, or ``latest``): what it did, from what, and what came of it.

    Raises:
        UnknownNameError: there is no such run.
    """
    with workspace.database.read() as session:
        run = run_in(session, reference)
        recipe = session.get_one(Recipe, run.recipe_id)
        split = session.get(Split, run.split_id) if run.split_id else None
        return RunAudit(
            run=run_fact(run),
            ended_at=moment(run.ended_at),
            user=run.user,
            host=run.host,
            command=run.command,
            code_version=run.code_version,
            environment=run.environment,
            seed=run.seed,
            query=run.query,
            result=run.result,
            error=run.error,
            recipe=recipe_fact(recipe),
            inputs=_recipes_above(session, recipe.id),
            parents=_parents(session, run),
            children=_children(session, run.id),
            split=split.name if split else None,
            split_counts=_split_counts(session, split.id) if split else {},
            jobs=_job_counts(session, run.id),
            artifacts=artifacts_of(session, run.id),
            ingested=ingested(session, run.id),
            changed_wells=changed_wells(session, run.id),
            came=came_of_runs(session, [run.id]),
        )


def artifacts_of(session: Session, run_id: int) -> tuple[ArtifactFact, ...]:
    """Return the files that a run wrote or relies on, the oldest first."""
    query = (
        select(Artifact)
        .join(RunArtifact, RunArtifact.artifact_id == Artifact.id)
        .where(RunArtifact.run_id == run_id)
        .order_by(Artifact.id)
    )
    return tuple(
        ArtifactFact(ArtifactKind(item.kind).value, item.path, item.sha256, item.size_bytes)
        for item in session.scalars(query)
    )


def recipe_fact(recipe: Recipe) -> RecipeFact:
    """Return a recipe in a few words."""
    return RecipeFact(
        recipe.id,
        str(text_of(recipe.stage)),
        recipe.version,
        recipe.fingerprint,
        recipe.weights_sha256,
        recipe.parameters,
    )


def _recipes_above(session: Session, recipe_id: int) -> tuple[RecipeFact, ...]:
    found: dict[int, RecipeFact] = {}
    level = {recipe_id}
    while level:
        inputs = select(RecipeInput.input_id).where(RecipeInput.recipe_id.in_(level))
        above = session.scalars(select(Recipe).where(Recipe.id.in_(inputs)))
        new = {item.id: recipe_fact(item) for item in above if item.id not in found}
        found |= new
        level = set(new)
    return tuple(found[key] for key in sorted(found))


def inputs_of(session: Session, recipe_id: int) -> list[Recipe]:
    """Return the recipes that a recipe reads from itself, by id."""
    query = select(Recipe).join(RecipeInput, RecipeInput.input_id == Recipe.id)
    return list(
        session.scalars(query.where(RecipeInput.recipe_id == recipe_id).order_by(Recipe.id))
    )


def _parents(session: Session, run: Run) -> tuple[RunFact, ...]:
    found: list[RunFact] = []
    while run.parent_id is not None:
        run = session.get_one(Run, run.parent_id)
        found.append(run_fact(run))
    return tuple(found)


def _children(session: Session, run_id: int) -> tuple[RunFact, ...]:
    query = select(Run).where(Run.parent_id == run_id).order_by(Run.id)
    return tuple(run_fact(run) for run in session.scalars(query))


def run_fact(run: Run) -> RunFact:
    """Return a run in a few words."""
    return RunFact(
        run.id, str(text_of(run.stage)), str(text_of(run.status)), run.started_at.isoformat()
    )


def _split_counts(session: Session, split_id: int) -> dict[str, int]:
    query = (
        select(SplitMember.subset, func.count())
        .where(SplitMember.split_id == split_id)
        .group_by(SplitMember.subset)
    )
    counts = {Subset(subset).value: number for subset, number in session.execute(query)}
    return {side.value: counts.get(side.value, 0) for side in Subset}


def _job_counts(session: Session, run_id: int) -> dict[str, int]:
    query = select(Job.status, func.count()).where(Job.run_id == run_id).group_by(Job.status)
    return {str(text_of(status)): number for status, number in session.execute(query)}


def moment(value: datetime | None) -> str | None:
    """Return a moment as ISO 8601, or None."""
    return None if value is None else value.isoformat()


def text_of(value: Any) -> str | None:
    """Return the value of an enum as text, or None."""
    return None if value is None else str(getattr(value, "value", value))
