"""Digests that change where what they stand for changes: functions, settings, tensors."""

import hashlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy
import torch
from torch import Tensor, nn


def fingerprint(*things: Any) -> str:
    """Return 12 hexadecimal digits that depend on values, and on the source code of functions.

    A function counts with what it refers to in its own module, and with the values it encloses;
    a class with its methods and those of its bases. Comments and layout do not count.

    >>> fingerprint(len, 1) == fingerprint(len, 1), fingerprint(len, 1) == fingerprint(len, 2)
    (True, False)
    """
    digest = hashlib.sha256()
    for text in _parts(list(things), {}):
        digest.update(text if isinstance(text, bytes) else text.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:12]


def code_fingerprint(*things: Any) -> str:
    """Return 12 hexadecimal digits that depend on code, and on the settings that it encloses.

    A function counts with the functions and classes that it names in its own module, with its
    defaults and the plain values that it encloses. What may change as a program runs does not:
    the state of objects, weights, global values.

    >>> code_fingerprint(lambda: 1) == code_fingerprint(lambda: 1)
    True
    >>> code_fingerprint(lambda: 1) == code_fingerprint(lambda: 2)
    False
    """
    digest = hashlib.sha256()
    for text in _codes(list(things), {}):
        digest.update(text if isinstance(text, bytes) else text.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:12]


def _codes(thing: Any, seen: dict[int, Any]) -> Iterator[str | bytes]:
    if thing is None or isinstance(thing, (str, bytes, int, float, bool, complex)):
        yield repr(thing)
    elif id(thing) in seen:
        yield "again"
    elif isinstance(thing, Tensor) and not thing.requires_grad:
        yield from _parts(thing, {})
    else:
        seen[id(thing)] = thing
        yield from _codes_within(thing, seen)


def _codes_within(thing: Any, seen: dict[int, Any]) -> Iterator[str | bytes]:
    if isinstance(thing, (list, tuple)):
        for entry in thing:
            yield from _codes(entry, seen)
    elif isinstance(thing, partial):
        yield from _codes([thing.func, *thing.args, *thing.keywords.items()], seen)
    elif inspect.ismethod(thing):
        yield from _codes([thing.__func__, type(thing.__self__)], seen)
    elif isinstance(thing, (FunctionType, type)) and _foreign(thing.__module__):
        yield f"{thing.__module__}.{thing.__qualname__}"
    elif isinstance(thing, FunctionType):
        thing = _bare(thing)
        yield from _code(thing.__code__)
        cells = [cell.cell_contents for cell in thing.__closure__ or () if _full(cell)]
        yield from _codes([*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).items(),
                           *cells], seen)
        for name in sorted(_names(thing.__code__)):
            value = thing.__globals__.get(name)
            if isinstance(value, (FunctionType, type)) and value.__module__ == thing.__module__:
                yield from _codes([name, value], seen)
    elif isinstance(thing, type):
        yield from _codes(list(thing.__bases__), seen)
        for name, value in sorted(vars(thing).items()):
            value = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(value, FunctionType):
                yield from _codes([name, value], seen)
    else:
        yield f"{type(thing).__module__}.{type(thing).__qualname__}"


def _bare(function: Any) -> Any:
    """Return a function without the check of its arguments, which learns as it is called."""
    return getattr(function, "__bare__", function)


def _full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _parts(thing: Any, seen: dict[int, Any]) -> Iterator[str | bytes]:
    if thing is None or isinstance(thing, (str, bytes, int, float, bool, complex, Path)):
        yield repr(thing)
        return
    if id(thing) in seen:
        yield "again"
        return
    seen[id(thing)] = thing  # kept, so that no other thing gets its number meanwhile
    if isinstance(thing, Tensor):
        flat = thing.detach().cpu().contiguous().flatten()
        yield f"tensor {thing.dtype} {tuple(thing.shape)}"
        yield flat.view(torch.uint8).numpy().tobytes()
    elif isinstance(thing, numpy.ndarray):
        yield f"array {thing.dtype} {thing.shape}"
        yield thing.tobytes()
    elif isinstance(thing, partial):
        yield "partial"
        yield from _parts([thing.func, thing.args, thing.keywords], seen)
    elif isinstance(thing, Mapping):
        yield "mapping"
        yield from _parts([list(pair) for pair in thing.items()], seen)
    elif isinstance(thing, (list, tuple, set, frozenset)):
        yield f"{type(thing).__name__} {len(thing)}"
        for entry in sorted(thing, key=repr) if isinstance(thing, (set, frozenset)) else thing:
            yield from _parts(entry, seen)
    elif isinstance(thing, (FunctionType, type)) and _foreign(thing.__module__):
        yield f"{thing.__module__}.{thing.__qualname__}"
    elif isinstance(thing, FunctionType):
        yield from _function(thing, seen)
    elif isinstance(thing, type):
        yield from _class(thing, seen)
    elif isinstance(thing, nn.Module):
        yield _described(thing)
        yield from _parts([type(thing), dict(thing.state_dict())], seen)
    elif inspect.ismethod(thing):
        yield from _parts([thing.__self__, thing.__func__], seen)
    elif inspect.isbuiltin(thing) or inspect.ismodule(thing):
        yield f"{type(thing).__name__} {thing.__name__}"
    elif hasattr(thing, "__dict__"):
        yield from _parts([type(thing), vars(thing)], seen)
    else:
        yield f"{type(thing).__qualname__} {_described(thing)}"


def _function(function: FunctionType, seen: dict[int, Any]) -> Iterator[str | bytes]:
    function = _bare(function)
    yield f"function {function.__module__}.{function.__qualname__}"
    yield from _code(function.__code__)
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    yield from _parts([function.__defaults__, function.__kwdefaults__, cells], seen)
    for name in sorted(_names(function.__code__)):
        value = function.__globals__.get(name)
        near = getattr(value, "__module__", function.__module__) == function.__module__
        if value is not None and near and not inspect.ismodule(value):
            yield name
            yield from _parts(value, seen)


def _class(kind: type, seen: dict[int, Any]) -> Iterator[str | bytes]:
    yield f"class {kind.__module__}.{kind.__qualname__}"
    yield from _parts([base for base in kind.__bases__ if base is not object], seen)
    for name, value in sorted(vars(kind).items()):
        value = getattr(value, "__func__", value)
        # Other names with two underscores describe the class, and Python adds some of them later.
        if isinstance(value, FunctionType) or (not name.startswith("__") and isinstance(
                value, (str, int, float, tuple, list, dict))):
            yield name
            yield from _parts(value, seen)


def is_foreign(kind: type) -> bool:
    """Return whether a class is Python's own or an installed library's: its name will do."""
    return _foreign(kind.__module__)


def _foreign(module: str) -> bool:
    """Return whether a module is of Python's own or of an installed library: its name will do."""
    top = module.split(".")[0]
    path = getattr(sys.modules.get(top), "__file__", None) or ""
    return (top in sys.stdlib_module_names and top != "__main__") or (
        top != "netwright" and bool({"site-packages", "dist-packages"} & set(Path(path).parts)))


def _code(code: CodeType) -> Iterator[str | bytes]:
    yield code.co_code
    yield repr(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        elif isinstance(constant, frozenset):
            yield repr(sorted(constant, key=repr))  # its order differs between processes
        else:
            yield repr(constant)


def _described(thing: Any) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(thing))


def _names(code: CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)
