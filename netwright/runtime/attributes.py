"""What modules hold besides their parameters and buffers, and how it is put back."""

import enum
import pickle
import random
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from operator import is_
from typing import Any

import numpy
import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

# What every module has: its mode, and its tables of parameters, buffers, modules and hooks.
_TABLES = nn.Module().__dict__.keys()


class Memo(set[Any]):
    """What has been found out about a module once for all, and is no state of a pass."""


# What cannot change, or is no state of a pass.
_FIXED = (type(None), bool, int, float, complex, str, bytes, range, torch.dtype, torch.device,
          torch.layout, torch.memory_format, torch.Size, type, types.ModuleType, enum.Enum,
          types.BuiltinFunctionType, weakref.ref, random.SystemRandom, nn.Module, nn.Parameter,
          Optimizer, DataLoader, Dataset, Memo)
_QUICK = frozenset((type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size, type))
_DEPTH = 3  # how many objects lie in one another, at most: what is deeper is another's
_EMPTY = object()


class Attributes:
    """The attributes of modules as they are now, and what is in them.

    Besides the values it notes the contents of lists, dictionaries, sets, arrays and tensors, the
    states of generators, and what further objects and closures hold. Parameters, buffers,
    modules, hooks and modes are not among them, nor are those of a module that a lazy one has
    become since.

    >>> class Counts(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.passes, self.seen = 0, []
    >>> module = Counts()
    >>> before = Attributes([module])
    >>> module.passes += 1
    >>> module.seen.append("a batch")
    >>> before.differ(), before.put_back(), module.passes, module.seen
    (True, None, 0, [])
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules: list[tuple[nn.Module, type, dict[str, Any]]] = []
        self.contents: list[_Content] = []
        held: list[Any] = []
        for module in modules:
            values = vars(module)
            self.modules.append((module, type(module), dict(values)))
            held += [value for name, value in values.items()
                     if type(value) not in _QUICK and name not in _TABLES]
        if held:
            self._look_into(held)

    def _look_into(self, held: list[Any]) -> None:
        waiting = [(value, 0) for value in held]
        seen: set[int] = set()
        while waiting:
            value, depth = waiting.pop()
            if isinstance(value, _FIXED) or id(value) in seen:
                continue
            seen.add(id(value))
            content = _content(value)
            self.contents.append(content)
            depth += type(content) is _Object
            if depth <= _DEPTH:
                waiting += [(part, depth) for part in content.parts()]

    def differ(self) -> bool:
        """Return whether anything is another now."""
        return (any(_changed(module, values) for module, _, values in self.modules)
                or any(content.differs() for content in self.contents))

    def put_back(self) -> None:
        """Make everything what it was."""
        for module, kind, values in self.modules:
            if type(module) is kind and _changed(module, values):
                held = vars(module)
                for name in held.keys() - _TABLES - values.keys():
                    del held[name]
                held.update((name, values[name]) for name in values.keys() - _TABLES)
        for content in self.contents:
            if content.differs():
                content.put_back()


def _changed(module: nn.Module, values: dict[str, Any]) -> bool:
    held = vars(module)
    if len(held) == len(values) and all(map(is_, held.values(), values.values())):
        return False  # as it is nearly always, and found out in a microsecond
    return (held.keys() != values.keys()
            or any(held[name] is not values[name] for name in values.keys() - _TABLES))


class _Content:
    """What is in a value: a copy that `read` makes and `write` puts back."""

    def __init__(self, value: Any, read: Callable[[Any], Any],
                 write: Callable[[Any, Any], None], same: Callable[[Any, Any], bool]) -> None:
        self.value, self.read, self.write, self.same = value, read, write, same
        self.kept = read(value)

    def parts(self) -> Iterator[Any]:
        """Yield what it holds that may change itself."""
        kept = self.kept.values() if isinstance(self.kept, dict) else self.kept
        if isinstance(kept, Iterable) and not set(map(type, kept)) <= _QUICK:
            yield from (part for part in kept if type(part) not in _QUICK)

    def differs(self) -> bool:
        """Return whether it is another now."""
        return not self.same(self.read(self.value), self.kept)

    def put_back(self) -> None:
        """Make it what it was."""
        self.write(self.value, self.kept)


class _Whole(_Content):
    """A value without parts: numbers, or the state of a generator."""

    def parts(self) -> Iterator[Any]:
        return iter(())


class _Object(_Content):
    """The attributes of an object of any other kind."""

    def __init__(self, value: Any) -> None:
        super().__init__(value, _attributes, _set_attributes, _same_items)


class _Numbers(_Whole):
    """A tensor, which tells by its version whether it was written to."""

    def __init__(self, tensor: Tensor) -> None:
        self.version = None if tensor.is_inference() else tensor._version
        super().__init__(tensor, lambda t: t.detach().clone(), _copy, torch.equal)

    def differs(self) -> bool:
        if self.version is not None and self.value._version == self.version:
            return False
        return super().differs()


def _content(value: Any) -> _Content:
    for kind, make in _KINDS.items():
        if isinstance(value, kind):
            return make(value)
    return _Object(value)


def _copy(tensor: Tensor, kept: Tensor) -> None:
    tensor.data.copy_(kept)  # .data, so that a graph that has saved it may go on


def _same_things(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _same_items(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    return _same_things(a, b) and all(map(is_, a.values(), b.values()))


def _same_bytes(a: Any, b: Any) -> bool:
    return pickle.dumps(a) == pickle.dumps(b)


def _refill(value: Any, kept: Any) -> None:
    value.clear()
    (value.extend if isinstance(value, (list, deque, bytearray)) else value.update)(kept)


def _leave(value: Any, kept: Any) -> None:
    """Do nothing: the value itself cannot change, only what it holds."""


def _slots(value: Any) -> list[str]:
    names = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    return [name for some in names for name in ([some] if isinstance(some, str) else some)]


def _attributes(value: Any) -> dict[str, Any]:
    held = dict(getattr(value, "__dict__", {}))
    for name in _slots(value):
        with suppress(AttributeError):
            held[name] = getattr(value, name)
    return held


def _set_attributes(value: Any, kept: dict[str, Any]) -> None:
    for name in _attributes(value).keys() - kept.keys():
        object.__delattr__(value, name)
    for name, part in kept.items():
        object.__setattr__(value, name, part)


def _cells(function: Any) -> list[Any]:
    held = [*(function.__defaults__ or ())]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty
            held.append(cell.cell_contents)
    return held


def _fill_cells(function: Any, kept: list[Any]) -> None:
    cells = [cell for cell in function.__closure__ or () if _filled(cell)]
    for cell, value in zip(cells, kept[len(function.__defaults__ or ()):], strict=True):
        cell.cell_contents = value


def _filled(cell: Any) -> bool:
    with suppress(ValueError):
        return cell.cell_contents is not _EMPTY
    return False


_KINDS: dict[Any, Callable[[Any], _Content]] = {
    Tensor: _Numbers,
    dict: lambda v: _Content(v, dict, _refill, _same_items),
    (list, deque): lambda v: _Content(v, list, _refill, _same_things),
    set: lambda v: _Content(v, set, _refill, lambda a, b: bool(a == b)),
    (tuple, frozenset): lambda v: _Content(v, tuple, _leave, _same_things),
    bytearray: lambda v: _Whole(v, bytes, _refill, lambda a, b: bool(a == b)),
    types.FunctionType: lambda v: _Content(v, _cells, _fill_cells, _same_things),
    types.MethodType: lambda v: _Content(v, lambda m: [m.__self__], _leave, _same_things),
    partial: lambda v: _Content(v, lambda p: [p.func, *p.args, *p.keywords.values()], _leave,
                                _same_things),
    Generator: lambda v: _Whole(v, lambda g: g.get_state(), lambda g, s: g.set_state(s),
                                torch.equal),
    numpy.ndarray: lambda v: _Whole(v, numpy.copy, numpy.copyto, _same_bytes),
    numpy.random.Generator: lambda v: _generator(v.bit_generator),
    numpy.random.BitGenerator: lambda v: _generator(v),
    numpy.random.RandomState: lambda v: _Whole(v, lambda r: r.get_state(), lambda r, s:
                                               r.set_state(s), _same_bytes),
    random.Random: lambda v: _Whole(v, lambda r: r.getstate(), lambda r, s: r.setstate(s),
                                    lambda a, b: bool(a == b)),
}


def _generator(bits: Any) -> _Content:
    return _Whole(bits, lambda b: b.state, lambda b, state: setattr(b, "state", state), _same_bytes)
