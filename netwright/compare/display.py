"""What a running comparison shows: which change, which seed or trial, how much time is left."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from netwright.runtime.written import plain

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live


@dataclass(frozen=True)
class Status:
    """How one change on one task stands.

    `seconds` are those of each finished run; `running` holds (what, epoch, epochs) of each run
    that somebody is at.
    """

    task: str
    change: str
    ended: int
    total: int
    seconds: Sequence[float]
    running: Sequence[tuple[str, int, int]]
    failure: str = ""


class Display:
    """Shows the standing of a comparison on standard error, live where that is a terminal."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self._start = time.monotonic()
        self._ended: set[tuple[str, str]] | None = None
        self._live: Live | None = None
        self._console: Console | None = None

    def __enter__(self) -> "Display":
        if self.shown:
            from rich.console import Console
            from rich.live import Live
            self._console = Console(stderr=True)
            if self._console.is_terminal:
                self._live = Live(console=self._console, refresh_per_second=4, transient=True)
                self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """Show a line that stays."""
        if self._console is not None:
            self._console.print(plain(text), style="yellow", highlight=False, soft_wrap=True)

    def show(self, statuses: Sequence[Status]) -> None:
        """Show how things stand now."""
        if self._console is None:
            return
        ended = {(each.task, each.change) for each in statuses if each.ended == each.total}
        fresh = ended - self._ended if self._ended is not None else set()
        self._ended = ended
        for each in statuses:
            if (each.task, each.change) in fresh:
                mark, style = (f"failed: {each.failure}", "red") if each.failure else (
                    "done", "green")
                self._console.print(plain(f"{each.task} · {each.change}: {mark}"), style=style,
                                    highlight=False, soft_wrap=True)
        if self._live is not None:
            self._live.update(self._table(statuses))

    def _table(self, statuses: Sequence[Status]) -> "Group":
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text
        ended, total = sum(each.ended for each in statuses), sum(each.total for each in statuses)
        spent = time.monotonic() - self._start
        head = Table.grid(padding=(0, 1))
        head.add_row(ProgressBar(total=total, completed=ended, width=32),
                     Text(f"{ended} of {total} runs"), Text(f"{_clock(spent)} so far"),
                     Text(f"{left(statuses)}"))
        lines = [Text("  " + plain(f"{each.task} · {each.change} · {what}, epoch {epoch} of "
                                   f"{epochs}"))
                 for each in statuses for what, epoch, epochs in each.running]
        return Group(head, *lines)


def left(statuses: Sequence[Status]) -> str:
    """Return about how much time is left, in words.

    What a run will take is the mean of the change's own runs, else that of its task's, else of
    all; as many runs go on at once as now.

    >>> left([Status("digits", "Backprop", 2, 7, [3.0, 3.0], [("trial 2", 1, 9)])])
    'about 0:15 left'
    >>> left([Status("digits", "Backprop", 0, 7, [], [])])
    'time left not known yet'
    """
    everything = [s for each in statuses for s in each.seconds]
    if not everything:
        return "time left not known yet"
    needed = 0.0
    for each in statuses:
        near = [s for other in statuses if other.task == each.task for s in other.seconds]
        needed += (each.total - each.ended) * statistics.fmean(each.seconds or near or everything)
    at_once = max(1, sum(len(each.running) for each in statuses))
    return f"about {_clock(needed / at_once)} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
