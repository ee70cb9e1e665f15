"""Lazy faces: a package shows the public names of the files below it, found by looking there."""

import ast
import importlib
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

_ALL = re.compile(r"^__all__ = (\[[^\]]*\])", re.MULTILINE)


class Face(ModuleType):
    """A package whose names are those in the `__all__` of its files, imported when asked for.

    A file whose name begins with an underscore shows nothing. A name that is both a file's and a
    public one, as `measure.cost`, is the public one.
    """

    _beside: tuple[str, ...]
    _rooms: Mapping[str, str]
    _names: Mapping[str, str] | None

    @property
    def __all__(self) -> list[str]:
        """The public names, sorted."""
        return sorted({*self._found(), *self._rooms})

    def _found(self) -> Mapping[str, str]:
        return where(self.__name__, *self._beside) if self._names is None else self._names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in self._rooms:
            value: Any = importlib.import_module(self._rooms[name])
        elif name in self._found():
            value = getattr(importlib.import_module(self._found()[name]), name)
        elif name in _parts(Path(self.__path__[0])):
            return importlib.import_module(f"{self.__name__}.{name}")
        else:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        ModuleType.__setattr__(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a file sets its module at the package, where the public name belongs.
        if not isinstance(value, ModuleType) or name not in self._found():
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__, *_parts(Path(self.__path__[0]))})


def face(package: str, *beside: str, rooms: Mapping[str, str] | None = None,
         names: Mapping[str, str] | None = None) -> None:
    """Give `package`, which calls this in its `__init__.py`, a lazy face.

    The names of the packages or modules `beside` are shown as well, and `rooms` by another name
    than their own. `names`, each with the module that has it, stand in place of what would be
    found below the package.
    """
    module = sys.modules[package]
    module.__dict__.update(_beside=beside, _rooms=rooms or {}, _names=names)
    module.__class__ = Face


@cache
def where(*packages: str) -> dict[str, str]:
    """Return the public names below `packages`, each with the module that defines it.

    Raises:
        ImportError: two files have the same name in their `__all__`.

    >>> where("netwright.optim")["GreedyBlockDescent"]
    'netwright.optim.greedy_block_descent'
    """
    found: dict[str, str] = {}
    for package in packages:
        for module, path in files(package):
            for name in declared(path):
                if found.setdefault(name, module) != module:
                    raise ImportError(f"{name} is in the __all__ of {found[name]} and of "
                                      f"{module}; rename one of them")
    return found


def files(package: str) -> list[tuple[str, Path]]:
    """Return the modules in and below `package` with their files, private ones left out."""
    top = Path(importlib.import_module("netwright").__path__[0]).parent.joinpath(
        *package.split("."))
    if not top.is_dir():
        return [(package, top.with_suffix(".py"))]
    found = []
    for path in sorted(top.rglob("*.py")):
        parts = path.relative_to(top).with_suffix("").parts
        if not any(part.startswith("_") for part in parts):
            found.append((".".join([package, *parts]), path))
    return found


def declared(path: Path) -> list[str]:
    """Return the names in a file's `__all__`, none where it has no such list."""
    match = _ALL.search(path.read_text(encoding="utf-8"))
    return ast.literal_eval(match[1]) if match else []


@cache
def _parts(folder: Path) -> frozenset[str]:
    """Return the names of a package's own files and packages."""
    return frozenset(path.stem for path in folder.iterdir()
                     if not path.name.startswith((".", "_"))
                     and (path.suffix == ".py" or (path / "__init__.py").exists()))
