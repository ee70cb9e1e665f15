"""Blocks, functions and activations as plain data, and back."""

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch._ops import OpOverload

from netwright.catalogue.facets import public_name
from netwright.runtime.random_state import same_random_state

# The places outside netwright whose names may stand in a record.
_PLACES = ("torch.nn", "torch.nn.functional", "torch.Tensor", "torch")


def plain(value: Any) -> Any:
    """Return `value` as plain data, {"unnamed": what it is} where there is no name for it.

    A class or function becomes {"name": its public name}; a partial has its arguments beside.

    >>> plain([nn.Linear, 0.5]), plain(partial(nn.Linear, bias=False))
    ([{'name': 'torch.nn.Linear'}, 0.5], {'name': 'torch.nn.Linear', 'arguments': {'bias': False}})
    >>> plain(lambda x: x)
    {'unnamed': 'a function <lambda> of netwright.reshape._naming'}
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case list() | tuple():
            return [plain(entry) for entry in value]
        case Mapping() if all(isinstance(key, str) for key in value):
            return {key: plain(entry) for key, entry in value.items()}
        case torch.dtype():
            return {"name": str(value)}
        case Tensor() if value.numel() == 1:
            return {"tensor": value.item(), "dtype": str(value.dtype)}
        case partial():
            said = plain(value.func)
            said |= {"positional": plain(value.args)} if value.args else {}
            return said | ({"arguments": plain(value.keywords)} if value.keywords else {})
    name = name_of(value)
    return {"name": name} if name else {"unnamed": _called(value)}


def restored(said: Any) -> Any:
    """Return what `plain` or `Built` described.

    >>> restored(plain(partial(nn.Linear, bias=False)))(2, 3)
    Linear(in_features=2, out_features=3, bias=False)
    """
    match said:
        case list():
            return [restored(entry) for entry in said]
        case {"float": text}:
            return float(text)
        case {"tensor": value, "dtype": kind}:
            return torch.tensor(value, dtype=resolved(kind))
        case {"block": name}:
            return resolved(name)(*restored(said.get("positional", [])),
                                  **restored(said.get("arguments", {})))
        case {"name": name}:
            found = resolved(name)
            if "arguments" in said or "positional" in said:
                return partial(found, *restored(said.get("positional", [])),
                               **restored(said.get("arguments", {})))
            return found
        case {"unnamed": what}:
            raise ValueError(f"{what} has no public name and cannot be built again")
        case dict():
            return {key: restored(entry) for key, entry in said.items()}
    return said


def name_of(value: Any) -> str | None:
    """Return the public name of a class or function: as in `blocks.GLU` or `torch.nn.GELU`."""
    if isinstance(value, OpOverload):
        return f"torch.ops.{value}"
    own = getattr(value, "__name__", None)
    if not isinstance(own, str):
        return None
    module = getattr(value, "__module__", None) or ""
    if module.startswith("netwright."):
        name = public_name(module, own)
        return name if _found(name) is value else None
    return next((f"{place}.{own}" for place in _PLACES
                 if inspect.getattr_static(_found(place), own, None) is value
                 or getattr(_found(place), own, None) is value), None)


def resolved(name: str) -> Any:
    """Return what a public name stands for.

    Only modules, what makes blocks, and functions of tensors: a record comes from a file, and
    must not be able to name what reads or runs another.

    Raises:
        ValueError: it stands for something else, or for nothing.
    """
    found = _found(name)
    place, _, own = name.rpartition(".")
    if not (isinstance(found, torch.dtype)
            or (isinstance(found, OpOverload) and torch.Tag.pointwise in found.tags)
            or (isinstance(found, type) and issubclass(found, nn.Module))
            or (callable(found) and (place in ("blocks", "torch.nn.functional", "torch.Tensor")
                                     or (place == "torch" and hasattr(Tensor, own))))):
        raise ValueError(f"{name!r} must be the public name of a block or a module, or of a "
                         "function of torch.nn.functional")
    return found


def _found(name: str) -> Any:
    first, *rest = name.split(".")
    value: Any = torch if first == "torch" else getattr(
        importlib.import_module("netwright"), first, None)
    for part in rest:
        value = getattr(value, part, None)
    return value


class Built:
    """Modules that were made while `watching`, and the arguments that they were made from."""

    def __init__(self) -> None:
        # The modules themselves are held, so that no other one gets the number of one that went.
        self._made: dict[int, tuple[Any, list[Any], dict[str, Any]]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what every module is made from that is made in the body."""
        before = sys.getprofile()
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(before)

    def _note(self, frame: Any, event: str, _: Any) -> None:
        if event != "call" or frame.f_code.co_name != "__init__":
            return
        names, rest, options, values = inspect.getargvalues(frame)
        made = values.get(names[0]) if names else None
        if not isinstance(made, nn.Module) or id(made) in self._made:
            return  # a base class's constructor comes after the class's own
        code = frame.f_code
        given = {name: values[name] for name in names[1:]}
        given |= {name: values[name] for name in code.co_varnames[
            code.co_argcount:code.co_argcount + code.co_kwonlyargcount]}
        positional: list[Any] = []
        if rest and values[rest]:  # all that stand before a star must be given in their order
            positional = [given.pop(name) for name in names[1:]] + list(values[rest])
        self._made[id(made)] = made, positional, given | (values[options] if options else {})

    def said(self, module: nn.Module) -> dict[str, Any]:
        """Return how `module` is built again, {"unnamed": what it is} where it cannot be."""
        said = self._said(module)
        if _unnamed(said):
            return said
        with same_random_state():
            try:
                again = restored(said)
            except Exception as error:  # whatever a constructor raises
                return {"unnamed": f"{_called(module)}, which is not built again from its "
                                   f"arguments ({error})"}
        if str(again) != str(module) or _shapes(again) != _shapes(module):
            return {"unnamed": f"{_called(module)}, which was changed after it was built"}
        return said

    def _said(self, module: nn.Module) -> dict[str, Any]:
        name = name_of(type(module))
        if name is None or id(module) not in self._made:
            return {"unnamed": _called(module)}
        _, positional, given = self._made[id(module)]
        said: dict[str, Any] = {"block": name}
        if positional:
            said["positional"] = [self._value(value) for value in positional]
        defaults = _defaults(type(module))
        arguments = {key: self._value(value) for key, value in given.items()
                     if not isinstance(value, (Generator, torch.device))
                     and not (key in defaults and _same(defaults[key], value))}
        return said | ({"arguments": arguments} if arguments else {})

    def _value(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self._said(value)
        if isinstance(value, (list, tuple)):
            return [self._value(entry) for entry in value]
        return plain(value)


def _defaults(kind: type) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(
        kind).parameters.items() if parameter.default is not inspect.Parameter.empty}


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b)


def _shapes(module: nn.Module) -> dict[str, Any]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def _unnamed(said: Any) -> bool:
    return next(unnamed(said), None) is not None


def unnamed(said: Any) -> Iterator[str]:
    """Yield whatever in plain data has no name."""
    if isinstance(said, Mapping):
        if isinstance(said.get("unnamed"), str):
            yield said["unnamed"]
        for entry in said.values():
            yield from unnamed(entry)
    elif isinstance(said, list):
        for entry in said:
            yield from unnamed(entry)


def _called(value: Any) -> str:
    kind: Callable | type = value if hasattr(value, "__qualname__") else type(value)
    what = "a function " if inspect.isroutine(value) else ""
    return f"{what}{kind.__qualname__} of {kind.__module__}"
