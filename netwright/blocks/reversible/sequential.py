from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from netwright.blocks.reversible.block import ReversibleBlock
from netwright.blocks.reversible.coupling import AdditiveCoupling
from netwright.catalogue.facets import method
from netwright.errors import CannotReverse
from netwright.reversing.engine import Step, Stored, Whole, chained, run
from netwright.runtime.attributes import Memo

__all__ = ["ReversibleSequential"]


@method("block", place="residual stream", saves=["training memory"],
        network=lambda: ReversibleSequential(AdditiveCoupling(nn.Linear(4, 4), nn.Linear(4, 4))))
class ReversibleSequential(nn.Sequential):
    """Run invertible modules one after another, without storing what passes between them.

    h_{i+1} = f_i(h_i);  backward: h_i = f_i^{-1}(h_{i+1}), then the gradient through f_i.

    Outputs and gradients are those of `nn.Sequential` of the same modules, up to the rounding of
    the reconstruction, and so are the names in the `state_dict`. Only the last output is kept, at
    any depth; each module runs once more in the backward pass, under the random state, the
    autocast state and the buffers of the first time: dropout drops the same, and batch norm's
    running statistics count each batch once. The input is not touched and need not require grad.

    A module is a `ReversibleBlock`, or anything with an `inverse(y)` that undoes `forward(x)`; the
    latter costs a run of both. More arguments than the first are handed to every module. The first
    call also looks whether each module can be undone, and writes nothing in place.

    Rounding: with float32 the reconstruction through many blocks is off in the last digits (see
    the docs for measured bounds), with bfloat16 in the second. `exact=True` keeps what is lost,
    about one byte for each number of a stream and step, and reconstructs bit for bit.

    Hooks are called as often as their modules run, in the backward pass too. A block that has
    hooks itself is not opened: what it is given is kept, so that they may change what they see.

    It can be differentiated once, not twice. `torch.compile` runs it uncompiled; compile the
    modules in the blocks. In `torch.func` transforms it is `nn.Sequential`.

    Args:
        modules: what runs in turn.
        exact: whether what is reconstructed is exact, bit for bit.

    Shapes: x as the first module takes it: a tensor, or a tuple of tensors where the modules have
    several streams; the same is returned.

    Raises:
        CannotReverse: a module has no inverse, or is not undone by it, or changes its input in
            place, or a shape; what was reconstructed is not finite.

    Paper: Gomez, Ren, Urtasun, Grosse, 2017, The Reversible Residual Network: Backpropagation
    Without Storing Activations.

    >>> import torch
    >>> from netwright.blocks.reversible import AdditiveCoupling
    >>> half = lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    >>> deep = ReversibleSequential(*[AdditiveCoupling(half(), half()) for _ in range(50)])
    >>> deep(torch.randn(16, 8)).sum().backward()
    >>> deep[0].f[0].weight.grad.shape
    torch.Size([4, 4])
    """

    def __init__(self, *modules: Any, exact: bool = False) -> None:
        super().__init__(*modules)
        self.exact = exact
        self._seen = Memo()
        for name, module in self.named_children():
            _check(name, module)

    def steps(self, *args: Any, **options: Any) -> list[Step]:
        """Return the steps from the input to the output."""
        parts: list[list[Step]] = []
        for name, module in self._modules.items():  # also a module that is there twice
            assert module is not None
            _check(name, module)
            if _hooked(module) and getattr(module, "streams", 1) is not None:
                given = [t for t in tree_leaves((args, options)) if isinstance(t, Tensor)]
                parts.append([Stored(type(module).__name__, partial(_called, module, args, options),
                                     [module], given)])
            elif isinstance(module, _OPEN):
                parts.append(module.steps(*args, **options))
            else:
                parts.append([Whole(type(module).__name__, module, args, options)])
            for step in parts[-1]:
                inner = f"{step.place} of " if isinstance(module, ReversibleSequential) else ""
                step.place = f"{inner}module {name!r}"
        return chained(parts)

    def forward(self, x: Any, *args: Any,  # type: ignore[override]
                **options: Any) -> Any:
        """Return what the modules make of `x`."""
        streams = [x] if isinstance(x, Tensor) else list(x)
        # What is looked at in the first pass may be another in the first of training or of eval.
        kind = torch.is_grad_enabled(), self.training, tuple(map(_hooked, self))
        streams = run(self.steps(*args, **options), streams, exact=self.exact,
                      first=kind not in self._seen)
        self._seen.add(kind)
        return streams[0] if len(streams) == 1 else tuple(streams)

    def in_turn(self) -> list[nn.Module]:
        """Return the modules that run in turn, where what passes between them is a tensor."""
        several = any(getattr(module, "streams", 1) is None for module in self)
        return [] if several else list(self)

    def take_turn(self, k: int, x: Any, *args: Any, **options: Any) -> Any:
        """Return what module `k` makes of `x`."""
        return self[k](x, *args, **options)

    def inverse(self, y: Any, *args: Any, **options: Any) -> Any:
        """Return the `x` of which the modules make `y`."""
        for module in reversed(self):
            y = module.inverse(y, *args, **options)  # type: ignore[operator]
        return y


_OPEN = (ReversibleBlock, ReversibleSequential)  # whose steps are run rather than they themselves


def _check(name: str, module: nn.Module) -> None:
    if not callable(getattr(module, "inverse", None)):
        raise CannotReverse(
            f"module {name!r}, {type(module).__name__}, has no inverse, so its input cannot be "
            "reconstructed; put it in a coupling, or let rules.Reversible store what such modules "
            "are given")


def _called(module: nn.Module, args: Sequence[Any], options: dict[str, Any], x: Tensor) -> Any:
    return module(x, *args, **options)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)
