"""Names for what is public, and what is public by its name; only the file in question is imported.

A name is written in full (`blocks.GLU`), as in Python (`nw.blocks.GLU`), or short (`GLU`) where one
method alone is called that. What PyTorch has is named in the same two ways: `torch.optim.SGD`, or
`SGD` where no method is called that.
"""

import importlib
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from netwright import checks
from netwright.catalogue.facets import public_name
from netwright.errors import UnknownName
from netwright.runtime.faces import declared, files

__all__ = ["locate", "name_of", "short_name"]

TORCH = {"torch.nn": nn, "torch.optim": torch.optim, "torch.nn.functional": functional}


@checks.annotated
def locate(word: str, what: str = "method") -> Any:
    """Return the method, or the part of PyTorch, that is called `word`.

    `what` is what an error calls it.

    Raises:
        UnknownName: nothing is called that.
        ValueError: two methods are, and the name must be written in full.

    >>> locate("GLU") is locate("nw.blocks.GLU")
    True
    >>> locate("torch.optim.SGD").__name__
    'SGD'
    """
    plain = word.removeprefix("nw.").removeprefix("netwright.")
    found = [plain] if plain in _public() else _called(plain)
    if not found:
        for prefix, module in TORCH.items():
            name = word.removeprefix(prefix + ".")
            if name.isidentifier() and not name.startswith("_") and callable(
                    getattr(module, name, None)):
                return getattr(module, name)
        raise UnknownName(what, word, {*map(short_name, _public())})
    if len(found) > 1:
        raise ValueError(f"{word!r} may be {' or '.join(found)}; write one of these in full")
    return getattr(importlib.import_module(_public()[found[0]]), found[0].rpartition(".")[2])


def name_of(value: Any) -> str | None:
    """Return the full name of a public class or function, None where it has none.

    >>> from netwright.rules import Backprop
    >>> name_of(Backprop), name_of(nn.Tanh), name_of(len)
    ('rules.Backprop', 'torch.nn.Tanh', None)
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return None
    if module.startswith("torch."):
        return next((f"{prefix}.{name}" for prefix, part in TORCH.items()
                     if getattr(part, name, None) is value), None)
    if not module.startswith("netwright."):
        return None
    public = public_name(module, name)
    return public if _public().get(public) == module else None


def short_name(public: str) -> str:
    """Return the shortest name by which `locate` finds what is called `public`.

    >>> short_name("rules.Backprop")
    'Backprop'
    """
    last = public.rpartition(".")[2]
    if public in _public():
        return last if _called(last) == [public] else public
    return last if not _called(last) and name_of(locate(last)) == public else public


@cache
def _public() -> dict[str, str]:
    """Return the full name of every method, each with the module that defines it."""
    return {public_name(module, name): module for module, path in files("netwright")
            if "@method(" in path.read_text(encoding="utf-8") for name in declared(path)}


def _called(word: str) -> list[str]:
    """Return the full names that end in `word`, which may be of several parts."""
    return _endings().get(word, [])


@cache
def _endings() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for public in sorted(_public()):
        parts = public.split(".")
        for start in range(len(parts)):
            found.setdefault(".".join(parts[start:]), []).append(public)
    return found
