"""Elementwise functions of one tensor, put together from what a network did with it."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from netwright.anatomy.run import Run, Value

_KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": nn.Identity(), "relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU(),
    "gelu (tanh)": nn.GELU("tanh"), "gelu (sigmoid)": lambda h: h * (1.702 * h).sigmoid(),
    "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(),
    "relu squared": lambda h: h.relu().square(), "relu6": nn.ReLU6(), "elu": nn.ELU(),
    "leaky relu": nn.LeakyReLU(), "softplus": nn.Softplus(), "mish": nn.Mish()}


class Expression:
    """An elementwise function of one tensor."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...],
                 kwargs: dict[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs

    def __call__(self, h: Tensor) -> Tensor:
        """Return the function of `h`, as the network computed it."""
        y: Tensor = self.function(
            *(self._value(a, h) for a in self.args),
            **{name: self._value(a, h) for name, a in self.kwargs.items()})
        return y

    def __repr__(self) -> str:
        parts = [f"{a}" for a in self.args] + [f"{k}={a}" for k, a in self.kwargs.items()]
        return f"{getattr(self.function, '__name__', self.function)}({', '.join(parts)})"

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: an ATen operation goes by its name."""
        named = isinstance(self.function, torch._ops.OpOverload)
        return vars(self) | {"function": str(self.function) if named else self.function}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was pickled."""
        vars(self).update(state)
        if isinstance(self.function, str):
            self.function = attrgetter(self.function)(torch.ops)

    @staticmethod
    def _value(part: Any, h: Tensor) -> Any:
        if isinstance(part, Itself):
            return h
        return part(h) if isinstance(part, (Expression, Named)) else part


class Itself:
    """The tensor that an `Expression` is a function of."""

    def __call__(self, h: Tensor) -> Tensor:
        """Return `h`."""
        return h

    def __repr__(self) -> str:
        return "h"


class Named:
    """A module of the network, as part of an `Expression`."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module

    def __call__(self, h: Tensor) -> Tensor:
        """Return what the module makes of `h`."""
        y: Tensor = self.module(h)
        return y

    def __repr__(self) -> str:
        return f"{self.name}(h)"


ITSELF = Itself()


def function_of(run: Run, number: int, plain: set[int]) -> Any:
    """Return the elementwise function that `number` is of the tensors in `plain`, all the same."""
    if number in plain:
        return ITSELF
    for call in run.calls:
        if call.gave == (number,) and call.taken and call.taken[0] in plain and call.name:
            return Named(call.name, call.module)
    operation = run.maker[number]
    if operation.layout or operation.dropped:
        return function_of(run, operation.taken[0], plain)

    def part(argument: Any) -> Any:
        if not isinstance(argument, Value):
            return argument
        fixed = run.scalars.get(argument.number)
        if fixed is not None and not run.fed[argument.number]:
            return fixed
        return function_of(run, argument.number, plain)
    args, kwargs = operation.arguments
    return Expression(_out_of_place(operation.function), tuple(map(part, args)),
                      {name: part(a) for name, a in kwargs.items()})


def activation_name(activation: Any) -> str:
    """Return what an activation is called, by its values; else how it is written.

    >>> activation_name(torch.relu), activation_name(nn.SiLU())
    ('relu', 'silu')
    """
    if activation is None:
        return ""
    if isinstance(activation, Named):
        return activation_name(activation.module)
    probe = torch.linspace(-4, 9, 256)
    like = next(iter(activation.parameters()), None) if isinstance(activation, nn.Module) else None
    try:
        with torch.no_grad():
            values = activation(probe if like is None else probe.to(like)).to(probe)
            for name, known in _KNOWN.items():
                if torch.allclose(known(probe), values, rtol=1e-5, atol=1e-6):
                    return name
    except (RuntimeError, TypeError):  # a function that knows its width
        pass
    return type(activation).__name__ if isinstance(activation, nn.Module) else repr(activation)


def _out_of_place(function: Any) -> Any:
    """Return the operation that leaves its argument as it was."""
    packet = function.overloadpacket.__name__
    if not packet.endswith("_") or packet.endswith("__"):
        return function
    other = getattr(getattr(torch.ops, function.namespace), packet[:-1], None)
    return getattr(other, function._overloadname, function)
