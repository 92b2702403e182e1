"""The progress bar: what is done, how much is left, and how long that will take."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Bar:
    """A bar on stderr; a listener as in :mod:`cellstore.progress`."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._tasks: list[TaskID] = []

    def start(self, label: str, total: int | None) -> None:
        """Show a bar for ``total`` steps; work inside other work gets a bar below it."""
        if self._progress is None:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
                expand=True,
            )
            self._progress.start()
        self._tasks.append(self._progress.add_task(label, total=total))

    def advance(self, steps: int = 1) -> None:
        """Move the innermost bar on."""
        if self._progress is not None and self._tasks:
            self._progress.advance(self._tasks[-1], steps)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(escape(text), highlight=False)

    def finish(self) -> None:
        """Take the innermost bar away."""
        if self._progress is None or not self._tasks:
            return
        self._progress.remove_task(self._tasks.pop())
        if not self._tasks:
            self._progress.stop()
            self._progress = None
