"""The questions that a store answers; see :class:`cellstore.Store`, which has them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ContrastParams, Selection
from .errors import UnknownNameError

if TYPE_CHECKING:
    import pyarrow as pa

    from .config import VoteRules
    from .enums import Stage
    from .jobs.workspace import Workspace
    from .query.describe import RelationWords
    from .query.engine import Questions
    from .query.guard import Limits
    from .query.saved_queries import SavedQuestion
    from .report.audit import Audit
    from .report.comparison import Comparison
    from .report.redo import Done
    from .report.repro import Check, Order, Repro
    from .report.scoring import ReportResult
    from .report.votes import VotesResult
    from .stages.contrast import ContrastResult
    from .stages.export import ExportResult
    from .stages.export_model import ExportedModel
    from .stages.status import StatusResult
    from .stages.verify import VerifyResult


class Answers:
    """What can be asked of an open store."""

    workspace: Workspace

    def contrast(
        self,
        params: ContrastParams | None = None,
        *,
        segmentation: str | None = None,
        measurement: str | None = None,
        force: bool = False,
    ) -> ContrastResult:
        """Say which treatments look different from control; see ``stages.contrast.contrast``."""
        from .stages.contrast import contrast

        return contrast(
            self.workspace,
            params or ContrastParams(),
            segmentation=segmentation,
            measurement=measurement,
            force=force,
        )

    def report(
        self,
        run: str = "latest",
        *,
        compare: str | None = None,
        rules: VoteRules | None = None,
        html: str | Path | None = None,
        force: bool = False,
        leave_out_flagged: str | None = None,
        maps: Sequence[str] = (),
    ) -> ReportResult:
        """Score a predict run, and write the page ``html`` if it is asked for.

        ``compare``, ``rules`` and ``leave_out_flagged``: see ``stages.report.report``. ``maps``:
        the features on the plate maps of the page.
        """
        from .report.report_page import write_report
        from .report.scoring import report

        asked: dict[str, Any] = {
            "compare": compare,
            "rules": rules,
            "force": force,
            "leave_out_flagged": leave_out_flagged,
        }
        if html is None:
            return report(self.workspace, run, **asked)
        return write_report(self.workspace, run, Path(html), maps=maps, redo=self._script, **asked)

    def _script(self, run_id: int) -> str:
        return self.repro(str(run_id)).script

    def compare(
        self,
        first: str,
        second: str,
        *,
        level: str = "image",
        vote: str = "hard",
        limit: int | None = None,
        rules: VoteRules | None = None,
        force: bool = False,
        leave_out_flagged: str | None = None,
    ) -> Comparison:
        """Say where two predict runs differ, and which is right; see ``stages.report.compare``."""
        from .report.comparison import compare

        return compare(
            self.workspace,
            first,
            second,
            level=level,
            vote=vote,
            limit=limit,
            rules=rules,
            force=force,
            leave_out_flagged=leave_out_flagged,
        )

    def votes(
        self,
        run: str = "latest",
        *,
        level: str = "image",
        vote: str = "hard",
        rules: VoteRules | None = None,
        leave_out_flagged: str | None = None,
    ) -> VotesResult:
        """Return the label of every image, or well, by the vote of its cells.

        See ``stages.votes.count_votes``.
        """
        from .report.votes import count_votes

        return count_votes(
            self.workspace,
            run,
            level=level,
            vote=vote,
            rules=rules,
            leave_out_flagged=leave_out_flagged,
        )

    def audit_image(self, image: str) -> Audit:
        """Return every run that labelled an image, and what it was labelled from."""
        from .report.audit import audit_image

        return audit_image(self.workspace, image)

    def audit_well(self, well: str) -> Audit:
        """Return what was done to a well, when that was corrected, and what its images show."""
        from .report.audit import audit_well

        return audit_well(self.workspace, well)

    def audit_cell(self, cell_id: int) -> Audit:
        """Return where a cell comes from and every prediction about it."""
        from .report.audit import audit_cell

        return audit_cell(self.workspace, cell_id)

    def audit_run(self, run: str = "latest") -> Audit:
        """Return what a run was made from, and what it made."""
        from .report.audit import audit_run

        return audit_run(self.workspace, run)

    def audit_artifact(self, name: str) -> Audit:
        """Return what a file is to the store, and what came of it; see ``stages.audit``."""
        from .report.audit import audit_artifact

        return audit_artifact(self.workspace, name)

    def audit(self, name: str) -> Audit:
        """Return the audit of whatever ``name`` names: an image, a well, a run or a file."""
        from .report.audit import audit_anything

        return audit_anything(self.workspace, name)

    def lineage_page(self, audit: Audit, html: str | Path) -> Path:
        """Write a page with a picture of where the audited thing comes from, and what came of it.

        ``parameters`` fill its ``?`` (a sequence) or ``$name`` (a mapping). ``rows``: only that
        many of the answer, the first; ``limits``: the time and memory that it may take.

        Raises:
            MissingExtraError: matplotlib or jinja2 is not installed.
            StorageError: the file cannot be written.
        """
        from .report.lineage_page import write_lineage

        return write_lineage(self.workspace, audit, Path(html))

    def repro(self, run: str = "latest") -> Repro:
        """Return the commands and versions that redo a run, and all that it relies on."""
        from .report.repro import repro

        return repro(self.workspace, run)

    def check_run(
        self,
        run: str = "latest",
        *,
        images: int | None = None,
        device: str = "auto",
        weights: str | Path | None = None,
    ) -> Check:
        """Redo a run beside the store, and compare; see ``stages.repro.check``."""
        from .report.redo import Done, check

        def carry_out(workspace: Workspace, stage: Stage, order: Order, where: str | None) -> Done:
            kind: Any = type(self)
            store = kind(workspace)
            run_id, failures = _carry_out(store, stage, order, where, device)
            return Done(run_id, failures)

        path = None if weights is None else Path(weights)
        return check(self.workspace, run, carry_out, images=images, weights=path)

    def sql(
        self,
        query: str,
        parameters: Sequence[object] | Mapping[str, object] | None = None,
        limits: Limits | None = None,
    ) -> pa.Table:
        """Answer a question in SQL (DuckDB, read only) as an Arrow table.

        ``parameters`` fill its ``?`` or ``$name``.

        Raises:
            QueryError: the question is wrong, would do more than read, or takes too much.

        """
        with self.open_questions(limits) as questions:
            return questions.ask(query, parameters)

    def open_questions(self, limits: Limits | None = None) -> AbstractContextManager[Questions]:
        """Open the store for several questions about one moment, or for answers of any size."""
        from .query.engine import open_questions

        return open_questions(self.workspace, limits)

    def ask(self, name: str, /, **parameters: object) -> pa.Table:
        """Answer a saved question as an Arrow table; see :meth:`questions`.

        Raises:
            UnknownNameError: there is none of that name, it has no such parameter, or there is no
                such run.
            QueryError: it is an own question, and wrong.

        """
        question = self.question(name)
        return self.sql(question.query, self.question_values(question, parameters))

    def questions(self) -> list[SavedQuestion]:
        """Return the saved questions: those of cellstore, and the store's own.

        Own ones are files ``questions/NAME.sql`` in the folder of the store.
        """
        from .query.saved_queries import saved_questions

        return saved_questions(self.workspace)[0]

    def question(self, name: str) -> SavedQuestion:
        """Return one saved question; see ``analytics.saved.find_question``."""
        from .query.saved_queries import find_question

        return find_question(self.workspace, name)

    def question_values(
        self, question: SavedQuestion, given: Mapping[str, object]
    ) -> dict[str, object]:
        """Return what is bound to the parameters of a question; see ``analytics.binding.bound``."""
        from .query.saved_queries import bound

        return bound(self.workspace, question, given)

    def question_problems(self) -> list[str]:
        """Say which own questions cannot be asked, and why."""
        from .query.saved_queries import saved_questions

        return saved_questions(self.workspace)[1]

    def new_question(self, name: str, beginning: str | None = None) -> Path:
        """Write the file of an own question; see ``analytics.saved.new_question``."""
        from .query.saved_queries import new_question

        return new_question(self.workspace, name, beginning)

    def schema(self) -> list[RelationWords]:
        """Return every table, view and feature set in words, with all of their columns."""
        from .query.describe import described

        with self.open_questions() as questions:
            return described(questions)

    def export(
        self,
        out: str | Path,
        *,
        format: str = "parquet",  # noqa: A002 - as on the command line
        features: str | None = None,
        segmentation: str | None = None,
        measurement: str | None = None,
        plates: tuple[str, ...] = (),
        for_spreadsheet: bool = False,
        force: bool = False,
    ) -> ExportResult:
        """Write every current cell with its measurements; see ``stages.export.export``."""
        from .stages.export import ExportFormat, export

        if format not in list(ExportFormat):
            raise UnknownNameError.of("format", format, [item.value for item in ExportFormat])
        return export(
            self.workspace,
            Path(out),
            format=ExportFormat(format),
            features=features,
            segmentation=segmentation,
            measurement=measurement,
            plates=plates,
            for_spreadsheet=for_spreadsheet,
            force=force,
        )

    def export_model(self, run: str = "latest", output: str | Path | None = None) -> ExportedModel:
        """Write a folder with a trained model; see ``stages.export_model.export_model``."""
        from .stages.export_model import export_model

        return export_model(self.workspace, run, None if output is None else Path(output))

    def status(self) -> StatusResult:
        """Count what is in the store, what is stale, and which jobs failed and why."""
        from .stages.status import status

        return status(self.workspace)

    def verify(self, *, fix: bool = False, minutes: float = 10.0) -> VerifyResult:
        """Compare the files with the database; see ``stages.verify.verify``."""
        from .stages.verify import verify

        return verify(self.workspace, fix=fix, minutes=minutes)


_Ran = tuple[int | None, tuple[tuple[str, str], ...]]
"""The number of a run, and the images that failed in it."""


def _carry_out(store: Any, stage: Stage, order: Order, where: str | None, device: str) -> _Ran:
    """Do what an order says on a store."""
    params: Any = order.params
    names = order.names
    sources = {name: names.get(name) for name in ("split", "segmentation", "measurement")}
    if "baseline" in names:
        kinds = [names["baseline"]]
        results = store.train_baselines(kinds, params, **sources, force=True, predict=False)
        return results[0].run_id, ()
    match stage.value:
        case "segment":
            result = store.segment(params, Selection(where=where), device=device)
        case "measure":
            result = store.measure(
                params, Selection(where=where), segmentation=sources["segmentation"]
            )
        case "split":
            make = store.create_split if params.folds is None else store.create_folds
            made = make(names["name"], params)
            return (made if params.folds is None else made[0]).run_id, ()
        case "train":
            return store.train(params, **sources, device=device, force=True).run_id, ()
        case _:
            result = store.predict(params, run=names["run"], device=device)
    return result.run_id, tuple(result.failures)
