"""How far a search is, in the terminal: what is tried, the best so far, the time left."""

import time
from collections.abc import Sequence
from typing import Any

from netwright.advise.question import Question


class Show:
    """A line that says what is tried, the best so far beside the limits, and the time left.

    Nothing is shown where the output is not a terminal.
    """

    def __init__(self, question: Question, seconds: float, *, on: bool) -> None:
        self.question, self.seconds = question, seconds
        self._progress: Any = None
        if on:
            self._begin()

    def _begin(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        console = Console(stderr=True)
        if console.is_terminal:
            self._progress = Progress(BarColumn(bar_width=16), TimeElapsedColumn(),
                                      TextColumn("{task.description}"), console=console)
            self._task = self._progress.add_task("looking", total=self.seconds)
            self._progress.start()

    def __enter__(self) -> "Show":
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def trying(self, text: str, best: Sequence[Any], deadline: float) -> None:
        """Say what is tried now."""
        if self._progress is None:
            return
        left = max(0.0, deadline - time.monotonic())
        said = f"{left:.0f} s left; trying {text[:60]}"
        if best:
            said = f"best {self.told(best[0].quality, best[0].shares)}; {said}"
        self._progress.update(self._task, completed=max(0.0, self.seconds - left),
                              description=said)

    def told(self, quality: float, shares: Any) -> str:
        """Return a quality and the shares of what is asked for, in a few words."""
        words = [f"quality {quality:.3f}"]
        words += [f"{name.replace('_', ' ')} {shares[name]:.2f}"
                  for name in self.question.resources if name in shares]
        return ", ".join(words)
