from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from netwright import checks
from netwright.catalogue.facets import method
from netwright.formal.learners.category import Learner
from netwright.formal.learners.lens import ParaLens
from netwright.formal.learners.pullback import functional, pullback, shaped_as

__all__ = ["Error", "cross_entropy_error", "learner", "squared_error"]


@dataclass(frozen=True)
class Error:
    """How far x is from y, by its derivative in x, and the y that gives a wanted derivative.

    derivative(x, y) = de/dx;  derivative(x, invert(x, g)) = g.

    That there is such a y for every x and g is what lets a learner say, as a wanted output, what
    backpropagation says as a gradient.

    >>> x, g = torch.randn(2, 3), torch.randn(2, 3)
    >>> torch.allclose(cross_entropy_error.derivative(x, cross_entropy_error.invert(x, g)), g)
    True
    """

    derivative: Callable[[Tensor, Tensor], Tensor]
    invert: Callable[[Tensor, Tensor], Tensor]


squared_error = Error(lambda x, y: x - y, lambda x, g: x - g)
"""e = |x - y|^2 / 2, summed over everything."""

cross_entropy_error = Error(lambda x, y: torch.softmax(x, -1) - y,
                            lambda x, g: torch.softmax(x, -1) - g)
"""e = -sum y log softmax(x) over the last axis, summed over the others; y holds probabilities."""


@method("companion", papers=["003-062"])
def learner(module: nn.Module, *, error: Error = squared_error, rate: float = 0.1,
            request_error: Error | None = None) -> Learner:
    """Return the learner that descends the gradient of `module` for an error and a step size.

    E(p, a, b) = e(module_p(a), b);  update = p - rate dE/dp;  request: de/dx(a, request) = dE/da.

    This is a functor: `learner(f) >> learner(g)` updates as backpropagation through f and then g
    does, since the request of g is the output at which the error of f has the gradient that
    backpropagation would send. `request_error` is the error of the one before, by which the request
    is found, `error` itself where it is None: a last layer that learns by the cross-entropy behind
    layers that learn by the square has `error=cross_entropy_error, request_error=squared_error`.

    The error is a sum, so a batch asks for `rate` divided by its size. Frozen parameters and
    buffers are constants. `params` is a mapping of names to copies of the parameters; an input of
    whole numbers, such as tokens, cannot be wished otherwise and is asked for as it is. A request
    holds a gradient as the difference of two activations, so it is rounded as they are: use
    float64, or a `ParaLens`, which sends the gradient itself, where that matters.

    Shapes: a is what the module takes; b is shaped as what it returns.

    Raises:
        ValueError: `rate` is not above 0, b has not the output's shape, or the module gathers
            running statistics as it runs.

    Paper: Fong, Spivak, Tuyéras, 2019, Backprop as Functor: A compositional perspective on
    supervised learning.

    >>> net = learner(nn.Linear(4, 8)) >> learner(nn.Tanh()) >> learner(nn.Linear(8, 3))
    >>> a, b = torch.randn(1, 4), torch.randn(1, 3)
    >>> after = net.step(a, b)
    >>> bool((after(a) - b).norm() < (net(a) - b).norm())
    True
    """
    checks.above(0, rate=rate)
    params, function = functional(module)
    asked = error if request_error is None else request_error

    def run(p: Any, a: Any) -> tuple[Any, Callable[[Any], tuple[Any, Any]]]:
        output, back = pullback(function, p, a)

        def learn(b: Any) -> tuple[Any, Any]:
            shaped_as("b", b, output)
            dp, da = back(error.derivative(output, b))
            return (tree_map(lambda value, slope: value - rate * slope, p, dp),
                    tree_map(lambda value, slope: value if slope is None else
                             asked.invert(value, slope), a, da))

        return output, learn

    def implement(p: Any, a: Any) -> Any:
        with torch.no_grad():
            return function(p, a)

    return Learner.of(params, ParaLens(implement, run=run))
