"""The command line; each file beside this one holds a command, or the commands of a group."""

import importlib
import os
import pkgutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from netwright.errors import NetwrightError
from netwright.runtime.version import __version__
from netwright.runtime.written import plain

app = typer.Typer(add_completion=False, rich_markup_mode=None,
                  pretty_exceptions_enable=False)

# Typer brings its own copy of click in newer releases: the errors of either are found this way.
ClickException: Any = typer.BadParameter.__mro__[2]

STOPPED = "stopped; run the same command again to go on where it stopped"


def _version(show: bool) -> None:
    if show:
        print(f"netwright {__version__}")
        raise typer.Exit


@app.callback()
def netwright(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                          help="Show the version.")] = False,
) -> None:
    """Change how a network is built, trained and run; measure each change."""


def main() -> None:
    """Run the command line; bad input gets one line and exit status 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for command in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(command.name)
    told: list[int] = []
    try:
        with _told_to_end(told):
            status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        if status == 130:  # how some releases of Typer return from Ctrl-C
            status = _refuse(STOPPED, status)
    except ClickException as error:
        status = _refuse(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        status = _refuse(STOPPED, 130)
    except (NetwrightError, ValueError, OSError, ImportError) as error:
        status = _refuse(str(error) or type(error).__name__)
    except SystemExit:
        raise
    except BaseException as error:  # what the user's own code raises, and netwright's own mistakes
        if os.environ.get("NETWRIGHT_TRACEBACK"):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        status = _refuse(f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno};"
                         " NETWRIGHT_TRACEBACK=1 shows how it came to that)")
    if told and status == 130:
        status = 128 + told[0]
    sys.exit(status if isinstance(status, int) else 0)


@contextmanager
def _told_to_end(told: list[int]) -> Iterator[None]:
    """Let SIGTERM end the body as Ctrl-C does, so that what it holds is let go and that is said."""
    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        told.append(number)
        raise KeyboardInterrupt
    if threading.current_thread() is not threading.main_thread():
        yield  # where signals cannot be handled
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse(message: str, status: int = 2) -> int:
    print("netwright: " + plain(message), file=sys.stderr)
    return status
