"""Files whose contents can be told to be whole, and folders that one process at a time writes."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]


def digest(path: Path) -> str:
    """Return the SHA-256 digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(content: Any) -> str:
    """Return the SHA-256 digest of what JSON makes of a value."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Busy(Exception):
    """Another process holds a folder."""


_handles: set[int] = set()  # of the folders that this process holds


def _let_go() -> None:
    """Close in a child what its parent holds, which would be held on after the parent's death."""
    for handle in _handles:
        os.close(handle)
    _handles.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the hold ends with the body, or with the process.

    It leaves no file behind. Where a file system knows no locks, nothing is held.

    Raises:
        Busy: another process holds it, or another call of this one.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    _handles.add(handle)
    try:
        with suppress(OSError):  # a network's file system may lock no folders
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Busy from error
        yield
    finally:
        if handle in _handles:  # it is not in a child, which has closed it
            _handles.remove(handle)
            os.close(handle)


def cache_folder() -> Path:
    """Return where measurements of this machine are kept: NETWRIGHT_CACHE, or the user's cache.

    Raises:
        RuntimeError: neither is known, nor a home.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("NETWRIGHT_CACHE") or Path(base) / "netwright")
