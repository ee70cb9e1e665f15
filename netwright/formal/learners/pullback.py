"""Derivatives of functions of nested tensors, as the lenses of this package take them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from netwright.stages import call


def pullback(function: Callable[..., Any], *places: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return function(*places), and what takes a change of it back to changes of the places.

    b = f(a);  b' -> (df/da)^T b'.

    Shapes: a change is shaped as what it changes; None stands for that of a whole number.

    >>> value, back = pullback(lambda p, a: p * a, torch.tensor(3.0), torch.tensor(5.0))
    >>> value, back(torch.tensor(1.0))
    (tensor(15.), (tensor(5.), tensor(3.)))
    """
    leaves, shape = tree_flatten(places)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [_leaf(leaf) for leaf in leaves]
        value = function(*tree_unflatten(leaves, shape))
    smooth = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    outputs, output_shape = tree_flatten(value)

    def back(change: Any) -> Any:
        pairs = [(output, part) for output, part in zip(outputs, tree_leaves(change), strict=True)
                 if isinstance(output, Tensor) and output.requires_grad]
        found = iter(torch.autograd.grad([output for output, _ in pairs], smooth,
                                         [part for _, part in pairs], retain_graph=True,
                                         allow_unused=True, materialize_grads=True)
                     if pairs else map(torch.zeros_like, smooth))
        return tree_unflatten([next(found) if getattr(leaf, "requires_grad", False) else None
                               for leaf in leaves], shape)

    return tree_unflatten([output.detach() if isinstance(output, Tensor) else output
                           for output in outputs], output_shape), back


def _leaf(value: Any) -> Any:
    """Return a tensor as the start of a graph where it can be one; inference tensors are copied."""
    if not isinstance(value, Tensor):
        return value
    value = value.clone() if value.is_inference() else value.detach()
    return value.requires_grad_(value.is_floating_point() or value.is_complex())


def functional(module: nn.Module) -> tuple[dict[str, Tensor], Callable[[Any, Any], Any]]:
    """Return a copy of the trainable parameters by name, and the module as a function of them.

    Frozen parameters and buffers are constants.

    >>> params, function = functional(nn.Linear(2, 3))
    >>> sorted(params), function(params, torch.zeros(4, 2)).shape
    (['bias', 'weight'], torch.Size([4, 3]))
    """
    if not isinstance(module, nn.Module):
        raise ValueError(f"module must be an nn.Module, got {type(module).__name__}; for a "
                         "function of parameters and input use ParaLens or Learner")
    for name, part in module.named_modules():
        if getattr(part, "num_batches_tracked", None) is not None and part.training:
            raise ValueError(f"{name or 'module'} must not change while it runs, got a "
                             f"{type(part).__name__} that gathers running statistics; call "
                             "module.eval(), or build it with track_running_stats=False")
    params = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    constants = {name: p.detach().clone() for name, p in [*module.named_parameters(),
                                                          *module.named_buffers()]
                 if name not in params}

    called = _Called(module)

    def function(values: Any, a: Any) -> Any:
        return functional_call(called, {f"module.{name}": value for name, value in
                                                 {**constants, **values}.items()}, (a,))

    return params, function


class _Called(nn.Module):
    """A module as `call` runs it, on a tensor, a tuple or a mapping."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, a: Any) -> Any:
        return call(self.module, a)


def shaped_as(name: str, value: Any, output: Tensor) -> None:
    """Raise ValueError unless `value` is floating point, of the shape of `output`."""
    if not isinstance(value, Tensor) or value.shape != output.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must have the output's shape {tuple(output.shape)}, got {got}; "
                         "for class numbers use one_hot(y, classes).float()")
    if not torch.is_floating_point(value):
        raise ValueError(f"{name} must hold numbers of the output's kind, got {value.dtype}; use "
                         f"{name}.to({output.dtype})")
