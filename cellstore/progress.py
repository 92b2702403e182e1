"""How long work tells that it goes on, without knowing who listens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """A listener: one ``start`` per piece of work, then ``advance``, then ``finish``.

    This one shows nothing; others override what they show.
    """

    def start(self, label: str, total: int | None) -> None:
        """Begin a piece of work of ``total`` steps (``None``: unknown)."""

    def advance(self, steps: int = 1) -> None:
        """``steps`` more are done."""

    def note(self, text: str) -> None:
        """Show one line beside the bar, for example the metrics of an epoch."""

    def finish(self) -> None:
        """The piece of work is over."""


def track(progress: Progress, label: str, total: int | None, items: Iterable[T]) -> Iterator[T]:
    """Yield ``items``, telling ``progress`` of each once it has been worked on."""
    progress.start(label, total)
    try:
        for item in items:
            yield item
            progress.advance()
    finally:
        progress.finish()
