"""The errors that users meet, each of which says what was wrong and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class NetwrightError(Exception):
    """What every error of netwright's own is."""


class CannotStage(NetwrightError, ValueError):
    """The network could not be read as a chain of stages."""


class CannotReverse(NetwrightError, ValueError):
    """A step of a reversible network cannot be undone, or not without losing a gradient."""


class FewStages(UserWarning):
    """The network's chain is so short that a rule which teaches stages apart is backpropagation."""


class NothingToReshape(NetwrightError, ValueError):
    """A reshape found nothing in the network that it could change."""


class BrokenReshape(NetwrightError, ValueError):
    """What a reshape made does not run, or is not what was promised of it."""


class Diverged(NetwrightError, ArithmeticError):
    """A loss or a weight is no longer finite."""


class BrokenContract(NetwrightError, AssertionError):
    """A method does not keep to what every method of its kind keeps to."""


class MissingData(NetwrightError, FileNotFoundError):
    """A data set's files are not where they were looked for."""


class MissingExtra(NetwrightError, ImportError):
    """A library that one of netwright's extras brings is not installed."""


class CorruptCheckpoint(NetwrightError, ValueError):
    """A checkpoint is damaged, truncated, or belongs to another run."""


class UnreachableStorage(NetwrightError, ConnectionError):
    """The storage of a comparison could not be opened."""


class ReadOnlyStorage(UnreachableStorage):
    """The storage of a comparison may be read, and not written."""


class BadTaskFile(NetwrightError, ValueError):
    """A user's task file raised or defines no task."""


class UnknownName(NetwrightError, ValueError):
    """A name is not one of those that are known."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        lower = {entry.lower(): entry for entry in known}
        near = [lower[match] for match in get_close_matches(name.lower(), lower, n=3, cutoff=0.5)]
        few = known if len(known) <= 24 else [*known[:20], f"and {len(known) - 20} more"]
        advice = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(few)}"
        super().__init__(f"no {kind} is called {name!r}; {advice}")
