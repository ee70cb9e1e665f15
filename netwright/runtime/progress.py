import math
import time
from typing import Any

PATIENCE = 2.0  # seconds of silence, in which most is done
REFRESH = 0.2  # seconds between redraws, so that drawing costs a training nothing that shows


class Bar:
    """A training's progress in the terminal: epoch, loss, metric, time left.

    Nothing is shown where the output is not a terminal.
    """

    def __init__(self, epochs: int, batches: int | None, metric: str, *,
                 unit: str = "epoch") -> None:
        self._epochs, self._batches, self._metric, self._unit = epochs, batches, metric, unit
        self._epoch, self._score, self._due = 0, "", 0.0
        self._progress: Any = None
        self._begins = math.inf

    def start(self, after: float = 0.0) -> None:
        """Begin to show, once `after` seconds have passed."""
        self._begins = time.perf_counter() + after
        if not after:
            self._begin()

    def _begin(self) -> None:
        self._begins = math.inf
        self._progress = _bar()
        if self._progress is None:
            return
        self._task = self._progress.add_task(f"{self._unit} 1/{self._epochs}", figures="",
                                             total=self._epochs * (self._batches or 1))
        self._progress.start()

    def stop(self) -> None:
        """Leave the last state in the terminal."""
        if self._progress is not None:
            self._progress.refresh()
            self._progress.stop()

    def step(self, epoch: int, batch: int, loss: float) -> None:
        """Show a step of `epoch`, counted from 0, if the last redraw is long enough ago."""
        if time.perf_counter() >= self._begins:
            self._begin()
        if self._progress is None or time.perf_counter() < self._due:
            return
        done = epoch * (self._batches or 1) + (batch if self._batches else 0)
        self._show(f"{self._unit} {epoch + 1}/{self._epochs}", done, loss)

    def epoch(self, epoch: int, loss: float, score: float) -> None:
        """Show the end of `epoch`, counted from 0."""
        if time.perf_counter() >= self._begins:
            self._begin()
        if self._progress is None:
            return
        self._score = "" if score != score else f"  {self._metric} {score:.4g}"
        self._show(f"{self._unit} {epoch + 1}/{self._epochs}",
                   (epoch + 1) * (self._batches or 1), loss)

    def _show(self, description: str, done: int, loss: float) -> None:
        self._progress.update(self._task, description=description, completed=done, refresh=True,
                              figures=("" if loss != loss else f"loss {loss:.4g}") + self._score)
        self._due = time.perf_counter() + REFRESH


class Tries:
    """What has been tried of `total`, the time left and the best so far, after two seconds.

    Nothing is shown where the output is not a terminal.

    >>> with Tries("prune_sublayers", 3) as tries:
    ...     for score in (0.3, 0.1, 0.2):
    ...         tries.step(f"best {score}")
    >>> tries.done
    3
    """

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self._progress: Any = None
        self._due = time.perf_counter() + PATIENCE

    def __enter__(self) -> "Tries":
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.refresh()
            self._progress.stop()

    def step(self, best: str = "", count: int = 1) -> None:
        """Count `count` more, and show the best so far."""
        self.done += count
        if time.perf_counter() < self._due:
            return
        if self._progress is None:
            self._progress = _bar()
            if self._progress is None:
                self._due = float("inf")
                return
            self._task = self._progress.add_task(self.name, figures="", total=self.total)
            self._progress.start()
        self._progress.update(self._task, completed=self.done, refresh=True, figures=best)
        self._due = time.perf_counter() + REFRESH


def _bar() -> Any:
    """Return a bar in the terminal, None where there is none."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        return None
    return Progress(TextColumn("{task.description}"), BarColumn(),
                    TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn(),
                    TextColumn("{task.fields[figures]}"), console=console, auto_refresh=False)


def say(text: str) -> None:
    """Show a line in the terminal; nothing is shown where the output is not a terminal.

    >>> say("pruned")
    """
    from rich.console import Console
    console = Console(stderr=True)
    if console.is_terminal or console.is_jupyter:
        console.print(text, highlight=False)
