"""How a training tells that it goes on: a bar of epochs, a bar of steps, a line for each epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ...progress import Progress

if TYPE_CHECKING:
    from ...ops.training import EpochMetrics


class Teller:
    """Tells a listener of epochs and steps; ``done`` epochs were there before.

    ``listen`` is called after every step: it may end the training with an error.
    """

    def __init__(
        self, progress: Progress, epochs: int, steps: int, listen: Callable[[], None]
    ) -> None:
        self._progress, self._steps, self._listen = progress, steps, listen
        self._epochs, self._epoch, self._in_epoch = epochs, 0, False

    def begin(self, done: int) -> None:
        """Show the bar of epochs, of which some are done."""
        self._epoch = done
        self._progress.start("train", self._epochs)
        if done:
            self._progress.advance(done)

    def step(self) -> None:
        """A batch was trained on."""
        if not self._in_epoch:
            self._progress.start(f"epoch {self._epoch + 1}", self._steps)
            self._in_epoch = True
        self._progress.advance()
        self._listen()

    def epoch(self, epoch: EpochMetrics) -> None:
        """An epoch is over, and what is known of it is in the store."""
        self._leave_epoch()
        self._epoch = epoch.epoch
        self._progress.note(
            f"epoch {epoch.epoch}: loss {epoch.train_loss:.3f}, validation "
            f"{epoch.validation_loss:.3f}; accuracy {epoch.train_accuracy:.3f}, validation "
            f"{epoch.validation_accuracy:.3f}"
        )
        self._progress.advance()

    def end(self) -> None:
        """Take the bars away."""
        self._leave_epoch()
        self._progress.finish()

    def _leave_epoch(self) -> None:
        if self._in_epoch:
            self._progress.finish()
            self._in_epoch = False
