"""Which linear layers make up a feed-forward layer, found by watching one run."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_PRODUCT = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"}
_ELEMENTWISE = _PRODUCT | {
    "relu", "relu_", "relu6", "gelu", "silu", "mish", "tanh", "tanh_", "sigmoid", "sigmoid_",
    "logsigmoid", "softplus", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu", "selu",
    "celu", "threshold", "softsign", "tanhshrink", "hardshrink", "softshrink", "sin", "cos", "exp",
    "expm1", "log1p", "erf", "abs", "__abs__", "neg", "__neg__", "square", "sqrt", "rsqrt",
    "sign", "reciprocal", "positive", "clamp", "clamp_", "clamp_min", "clamp_max", "clip", "pow",
    "__pow__", "pow_", "add", "add_", "__add__", "__radd__", "__iadd__", "sub", "__sub__",
    "rsub", "__rsub__", "div", "div_", "__truediv__", "__rtruediv__", "true_divide", "maximum",
    "minimum"}
_SAME = {"dropout", "to", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone"}
_SAME_ROWS = {"view", "reshape", "flatten", "unsqueeze", "squeeze"}


def is_linear(module: nn.Module) -> bool:
    """Return whether `module` is a linear layer: PyTorch's, or the transposed one of GPT-2."""
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx"))


def linear_sizes(module: Any) -> tuple[int, int]:
    """Return how many features a linear layer takes and gives."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.nx, module.nf


class Expression:
    """An elementwise function of one tensor, put together from what a network did with it."""

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


@dataclass
class _Hidden:
    """A tensor that is `function` of what a linear layer gave, times what another one gave."""

    tensor: Tensor  # held, so that its id stays its own
    linear: str
    read: tuple[int, float]  # what the linear layer read
    function: Any = ITSELF
    other: str | None = None


@dataclass(frozen=True)
class Seen:
    """One time that a hidden tensor came to the linear layer that reads it."""

    hidden: str
    other: str | None
    function: Any = field(compare=False)
    read: tuple[int, float] = field(compare=False)
    gave: int = field(compare=False)


@dataclass
class _Origin:
    """A tensor that holds the same rows as another one, dropout apart."""

    tensor: Tensor
    root: int
    dropped: float = 0.0

    def rows(self) -> tuple[int, float]:
        """Return what tells these rows from others."""
        return self.root, self.dropped


@dataclass
class Call:
    """What a module was given and gave."""

    read: tuple[int, float] | None
    gave: int | None
    dropped: float
    sizes: tuple[int, int] | None  # of the last axes
    single: bool  # whether one tensor is all that was given


class Watch(TorchFunctionMode):
    """Follows what linear layers give through elementwise functions to linear layers."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.names = names
        self.hidden: dict[int, _Hidden] = {}
        self.origins: dict[int, _Origin] = {}
        self.escaped: set[str] = set()
        self.seen: dict[str, list[Seen]] = {}
        self.runs: dict[str, int] = {}
        self.calls: dict[str, list[Call]] = {}
        self.order: dict[str, int] = {}
        self._entered: list[tuple[nn.Module, _Hidden | None]] = []
        self._inside = self.changed = 0

    def run(self, model: nn.Module, run: Callable[[], Any]) -> None:
        """Watch `run()`, which runs `model` or a part of it."""
        handles = []
        for module in self.names:
            handles += [module.register_forward_pre_hook(self._before, with_kwargs=True),
                        module.register_forward_hook(self._after, with_kwargs=True)]
        try:
            with self:
                output = run()
        finally:
            for handle in handles:
                handle.remove()
        self._escape(tree_leaves(output))

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        self._entered.append((module, self.hidden.get(id(first))))
        self._inside += is_linear(module)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        _, entered = self._entered.pop()
        name = self.names[module]
        self.order.setdefault(name, len(self.order))
        taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if is_linear(module):
            self._inside -= 1
            self._linear(name, taken[0], output)
            return
        if not isinstance(output, Tensor):
            self.calls.setdefault(name, []).append(Call(None, None, 0.0, None, False))
            return
        given = self.hidden.get(id(output))
        if entered and given and entered.function is ITSELF and given.linear == entered.linear and (
                given.other is None and given.function is not ITSELF):
            given.function = Named(name, module)
        read = self._origin(taken[0]) if taken else None
        gave = self._origin(output)
        self.calls.setdefault(name, []).append(Call(
            read.rows() if read else None, gave.root, gave.dropped,
            (taken[0].shape[-1], output.shape[-1]) if taken and taken[0].ndim and output.ndim
            else None, len(taken) == 1))

    def _linear(self, name: str, x: Tensor, output: Tensor) -> None:
        reads, before = self._origin(x), self.hidden.get(id(x))
        if before is not None:
            if before.function is ITSELF and before.other is None:
                self.escaped.add(before.linear)  # a product of two matrices has no hidden units
            else:
                self.seen.setdefault(name, []).append(Seen(
                    before.linear, before.other, before.function, before.read, id(output)))
        self.runs[name] = self.runs.get(name, 0) + 1
        self.origins[id(output)] = _Origin(output, id(output))
        self.hidden[id(output)] = _Hidden(output, name, reads.rows())

    def _origin(self, tensor: Tensor) -> _Origin:
        return self.origins.setdefault(id(tensor), _Origin(tensor, id(tensor)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        # Before the call, since an operation in place changes what its operand is.
        hidden = [self.hidden[id(t)] for t in leaves if id(t) in self.hidden]
        origin = self.origins.get(id(args[0])) if args and isinstance(args[0], Tensor) else None
        parts = [self.hidden.get(id(a), a) if isinstance(a, Tensor) else a for a in args]
        named = {k: self.hidden.get(id(a), a) if isinstance(a, Tensor) else a
                 for k, a in kwargs.items()}
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor):
            if name == "__setitem__" or any(isinstance(t, Tensor) for t in tree_leaves(out)):
                self._escape(leaves)
            return out
        same_width = origin and origin.tensor.shape[-1:] == out.shape[-1:]
        if origin and (name in _SAME or (name in _SAME_ROWS and same_width)):
            kept = 1 - _rate(args, kwargs) if name == "dropout" else 1.0
            self.origins[id(out)] = _Origin(out, origin.root, 1 - (1 - origin.dropped) * kept)
        elif id(out) in self.origins:  # changed in place, so that it is another tensor now
            self.changed += 1
            self.origins[id(out)] = _Origin(out, -self.changed)
        if hidden:
            self._follow(name, func, parts, named, hidden, leaves, out)
        return out

    def _follow(self, name: str, func: Any, parts: list[Any], named: dict[str, Any],
                hidden: list[_Hidden], leaves: list[Tensor], out: Tensor) -> None:
        first = hidden[0]
        others = [t for t in leaves if id(t) not in self.hidden and t.numel() > 1]
        if name in _SAME and isinstance(parts[0], _Hidden) and len(hidden) == 1:
            self.hidden[id(out)] = replace(first, tensor=out)
        elif name in _ELEMENTWISE and not others and all(
                h.linear == first.linear and h.read == first.read and h.other is None
                for h in hidden):
            def inner(part: Any) -> Any:
                return part.function if isinstance(part, _Hidden) else part
            self.hidden[id(out)] = replace(first, tensor=out, function=Expression(
                func, tuple(map(inner, parts)), {k: inner(a) for k, a in named.items()}))
        elif name in _PRODUCT and len(hidden) == 2 and self._gate(*hidden):
            gate, up = hidden if hidden[1].function is ITSELF else hidden[::-1]
            self.hidden[id(out)] = replace(gate, tensor=out, other=up.linear)
        else:
            self.hidden.pop(id(out), None)
            self.escaped |= {n for h in hidden for n in (h.linear, h.other) if n}

    @staticmethod
    def _gate(a: _Hidden, b: _Hidden) -> bool:
        """Return whether a * b is act(gate(x)) * up(x)."""
        return (a.linear != b.linear and a.read == b.read and a.other is b.other is None
                and (a.function is ITSELF or b.function is ITSELF))

    def _escape(self, leaves: list[Any]) -> None:
        for t in leaves:
            if isinstance(t, Tensor) and (h := self.hidden.get(id(t))):
                self.escaped |= {n for n in (h.linear, h.other) if n}


def _rate(args: Any, kwargs: Any) -> float:
    return float(kwargs.get("p", args[1] if len(args) > 1 else 0.5))


def watch(model: nn.Module, run: Callable[[], Any]) -> Watch:
    """Watch `run()`, which runs `model` in eval mode; return what was seen."""
    watching = Watch({module: name for name, module in model.named_modules()})
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # the fused path calls no linear layer
    with torch.no_grad():
        watching.run(model, run)
    return watching
