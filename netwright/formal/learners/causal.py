from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from netwright import checks
from netwright.catalogue.facets import method
from netwright.formal.learners.lens import pair

__all__ = ["Stateful", "d_stateful", "delayed_trace", "pointwise"]


class Stateful:
    """A computation on sequences whose output at a time depends on the inputs until then alone.

    s_0 = state;  (s_{t+1}, b_t) = step(s_t, a_t).

    Called with a sequence it returns the sequence of outputs. `f >> g` and `f @ g` compose, the
    states side by side as a pair.

    Shapes: sequences are nested tensors (time, ...); `step` takes and returns them without time.

    Raises:
        ValueError: the inputs are not tensors of one length of at least 1, or the state changes
            its shape.

    >>> total = Stateful(torch.tensor(0.0), lambda s, a: (s + a, s + a))
    >>> total(torch.tensor([1.0, 2.0, 3.0])), (total >> total)(torch.tensor([1.0, 2.0, 3.0]))
    (tensor([1., 3., 6.]), tensor([ 1.,  4., 10.]))
    """

    def __init__(self, state: Any, step: Callable[[Any, Any], tuple[Any, Any]]) -> None:
        self.state, self.step = state, step

    def __call__(self, inputs: Any) -> Any:
        """Return the outputs for a sequence of inputs, stacked along time."""
        state, outputs = self.state, []
        for t in range(_length(inputs)):
            after, b = pair("what step returns", self.step(state, _at(inputs, t)))
            _check_state(state, after)
            state = after
            outputs.append(b)
        return tree_map(lambda *parts: torch.stack(parts), *outputs)

    def __rshift__(self, other: "Stateful") -> "Stateful":
        if not isinstance(other, Stateful):
            return NotImplemented

        def step(states: Any, a: Any) -> tuple[Any, Any]:
            s, b = self.step(states[0], a)
            t, c = other.step(states[1], b)
            return (s, t), c

        return Stateful((self.state, other.state), step)

    def __matmul__(self, other: "Stateful") -> "Stateful":
        if not isinstance(other, Stateful):
            return NotImplemented

        def step(states: Any, a: Any) -> tuple[Any, Any]:
            left, right = pair("a", a)
            (s, b), (t, d) = self.step(states[0], left), other.step(states[1], right)
            return (s, t), (b, d)

        return Stateful((self.state, other.state), step)


@checks.annotated
def pointwise(function: Callable[[Any], Any]) -> Stateful:
    """Return the computation that applies a function at each time and remembers nothing.

    >>> pointwise(torch.neg)(torch.tensor([1.0, 2.0]))
    tensor([-1., -2.])
    """
    return Stateful((), lambda state, a: (state, function(a)))


@method("companion", papers=["001-161"])
def delayed_trace(f: Callable[[Any, Any], tuple[Any, Any]] | Stateful, state: Any) -> Stateful:
    """Return `f` with its second output fed back as its second input, one time later.

    (b_t, s_{t+1}) = f(a_t, s_t);  s_0 = state.

    A recurrent network is the delayed trace of its cell. `f` is a function of (a, s), or a
    `Stateful` on pairs (a, s), whose own state goes on beside the one that is fed back.

    Shapes: s is shaped as `state`, at every time.

    Paper: Sprunger, Katsumata, 2019, Differentiable Causal Computations via Delayed Trace.

    >>> delay = delayed_trace(lambda a, s: (s, a), torch.tensor(0.0))
    >>> delay(torch.tensor([1.0, 2.0, 3.0]))
    tensor([0., 1., 2.])
    """
    if isinstance(f, Stateful):
        inner = f.step

        def step_both(states: Any, a: Any) -> tuple[Any, Any]:
            own, fed_back = states
            own, outputs = inner(own, (a, fed_back))
            b, fed_back = pair("what f returns", outputs)
            return (own, fed_back), b

        return Stateful((f.state, state), step_both)

    def step(s: Any, a: Any) -> tuple[Any, Any]:
        b, s = pair("what f returns", f(a, s))
        return s, b

    return Stateful(state, step)


@method("companion", papers=["001-161"])
def d_stateful(f: Stateful) -> Stateful:
    """Return the derivative of a computation: it takes (a, da), sequences, and returns db.

    (s_{t+1}, b_t) = step(s_t, a_t);  (ds_{t+1}, db_t) = D step(s_t, a_t)(ds_t, da_t);  ds_0 = 0.

    It is a computation with twice the state, and its memory does not grow with time: nothing is
    unrolled or kept, as it is for backpropagation through time. It is exact. It gives the change
    of all outputs along one direction; for a gradient, `torch.vmap` runs it along many at once.
    Parameters are inputs that stay the same. It can be taken again, for second derivatives.

    Raises:
        ValueError: a state or an input is not floating point.

    Paper: Sprunger, Katsumata, 2019, Differentiable Causal Computations via Delayed Trace.

    >>> square = pointwise(torch.square) >> Stateful(torch.zeros(()), lambda s, a: (s + a, s + a))
    >>> x, dx = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])
    >>> d_stateful(square)((x, dx))
    tensor([2., 2., 2.])
    """
    def step(states: Any, inputs: Any) -> tuple[Any, Any]:
        s, ds = states
        a, da = pair("a", inputs)
        for name, value in (("state", s), ("a", a), ("da", da)):
            _check_floating(name, value)
        found: Any = jvp(f.step, (s, a), (ds, da))
        (s, _), (ds, db) = found
        return (s, ds), db

    return Stateful((f.state, tree_map(torch.zeros_like, f.state)), step)


def _at(inputs: Any, t: int) -> Any:
    return tree_map(lambda leaf: leaf[t], inputs)


def _length(inputs: Any) -> int:
    leaves = tree_leaves(inputs)
    lengths = {len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in leaves}
    if len(lengths) != 1 or lengths & {None, 0}:
        got = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
               for leaf in leaves]
        raise ValueError("inputs must be tensors (time, ...) of one length of at least 1, got "
                         f"{got}; expand what stays the same: p.expand(time, *p.shape)")
    (length,) = lengths
    assert length is not None
    return length


def _check_state(before: Any, after: Any) -> None:
    old, old_shape = tree_flatten(before)
    new, new_shape = tree_flatten(after)
    shapes = [[tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
               for leaf in leaves] for leaves in (old, new)]
    if old_shape != new_shape or shapes[0] != shapes[1]:
        raise ValueError(f"the state must keep its shape, {shapes[0]}, got {shapes[1]} after a "
                         "step; give the first state the shape that step returns")


def _check_floating(name: str, value: Any) -> None:
    for leaf in tree_leaves(value):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            got = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(f"{name} must be floating point to have a derivative, got {got}; "
                             "encode whole numbers as one_hot(...).float()")
