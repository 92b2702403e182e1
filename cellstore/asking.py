"""The questions that a store answers; see :class:`cellstore.Store`, which has them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from .config import ContrastParams
from .errors import UnknownNameError

if TYPE_CHECKING:
    import pyarrow as pa

    from .analytics import Limits, Questions
    from .analytics.describing import RelationWords
    from .analytics.saved import SavedQuestion
    from .runs.workspace import Workspace
    from .stages.audit import CellAudit, ImageAudit, RunAudit, WellAudit
    from .stages.contrast import ContrastResult
    from .stages.export import ExportResult
    from .stages.export_model import ExportedModel
    from .stages.report import ReportResult
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
        html: str | Path | None = None,
        force: bool = False,
        leave_out_flagged: str | None = None,
    ) -> ReportResult:
        """Score a predict run, and write the page ``html`` if it is asked for.

        ``leave_out_flagged``: see ``stages.report.report``.
        """
        from .stages.report import report, write_report

        if html is None:
            return report(self.workspace, run, force=force, leave_out_flagged=leave_out_flagged)
        return write_report(
            self.workspace, run, Path(html), force=force, leave_out_flagged=leave_out_flagged
        )

    def audit_image(self, image: str) -> ImageAudit:
        """Return every run that labelled an image, and what it was labelled from."""
        from .stages.audit import audit_image

        return audit_image(self.workspace, image)

    def audit_well(self, well: str) -> WellAudit:
        """Return what was done to a well, when that was corrected, and what its images show."""
        from .stages.audit import audit_well

        return audit_well(self.workspace, well)

    def audit_cell(self, cell_id: int) -> CellAudit:
        """Return where a cell comes from and every prediction about it."""
        from .stages.audit import audit_cell

        return audit_cell(self.workspace, cell_id)

    def audit_run(self, run: str = "latest") -> RunAudit:
        """Return what a run was made from, and what it made."""
        from .stages.audit import audit_run

        return audit_run(self.workspace, run)

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
        from .analytics import open_questions

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
        from .analytics.saved import saved_questions

        return saved_questions(self.workspace)[0]

    def question(self, name: str) -> SavedQuestion:
        """Return one saved question; see ``analytics.saved.find_question``."""
        from .analytics.saved import find_question

        return find_question(self.workspace, name)

    def question_values(
        self, question: SavedQuestion, given: Mapping[str, object]
    ) -> dict[str, object]:
        """Return what is bound to the parameters of a question; see ``analytics.binding.bound``."""
        from .analytics.binding import bound

        return bound(self.workspace, question, given)

    def question_problems(self) -> list[str]:
        """Say which own questions cannot be asked, and why."""
        from .analytics.saved import saved_questions

        return saved_questions(self.workspace)[1]

    def new_question(self, name: str, beginning: str | None = None) -> Path:
        """Write the file of an own question; see ``analytics.saved.new_question``."""
        from .analytics.saved import new_question

        return new_question(self.workspace, name, beginning)

    def schema(self) -> list[RelationWords]:
        """Return every table, view and feature set in words, with all of their columns."""
        from .analytics.describing import described

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
