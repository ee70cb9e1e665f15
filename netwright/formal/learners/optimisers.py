from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from netwright import checks
from netwright.formal.learners.lens import Lens


@dataclass(frozen=True)
class Optimiser:
    """A lens that stands before the parameters of a model and remembers something.

    get: S x P -> P, where the model is evaluated;  put: S x P x P' -> S x P, the step.

    P' is what comes back through the model, the learning rate's sign and size in it, so a step
    adds it. `init(params)` is the state to begin with. `move(value, change)` is how one tensor is
    changed where nothing is remembered.
    """

    init: Callable[[Any], Any]
    lens: Lens
    move: Callable[[Tensor, Tensor], Tensor] = torch.add


def ascent() -> Optimiser:
    """Return the optimiser that remembers nothing.

    get = p;  put = p + p'.

    >>> ascent().lens.put(((), torch.tensor(1.0)), torch.tensor(0.5))
    ((), tensor(1.5000))
    """
    return _plain(torch.add)


def exclusive_or_ascent() -> Optimiser:
    """Return `ascent` in Z2, on bits.

    get = p;  put = p xor p'.

    >>> exclusive_or_ascent().lens.put(((), torch.tensor([True, False])), torch.tensor([True]))
    ((), tensor([False,  True]))
    """
    return _plain(torch.bitwise_xor)


def momentum(gamma: float = 0.9) -> Optimiser:
    """Return gradient descent with momentum.

    s' = gamma s + p';  get = p;  put = p + s'.

    Raises:
        ValueError: `gamma` is not at least 0 and below 1.

    >>> s, p = momentum(0.5).lens.put((torch.tensor(1.0), torch.tensor(0.0)), torch.tensor(2.0))
    >>> s, p
    (tensor(2.5000), tensor(2.5000))
    """
    checks.between(0, 1, ends=(True, False), gamma=gamma)
    return Optimiser(_zeros, Lens(lambda sp: sp[1], _heavy_ball(gamma)))


def nesterov(gamma: float = 0.9) -> Optimiser:
    """Return gradient descent with Nesterov's momentum: the gradient is taken ahead.

    s' = gamma s + p';  get = p + gamma s;  put = p + s'.

    Raises:
        ValueError: `gamma` is not at least 0 and below 1.

    >>> nesterov(0.5).lens.get((torch.tensor(2.0), torch.tensor(1.0)))
    tensor(2.)
    """
    checks.between(0, 1, ends=(True, False), gamma=gamma)

    def get(sp: Any) -> Any:
        return tree_map(lambda s, p: p + gamma * s, *sp)

    return Optimiser(_zeros, Lens(get, _heavy_ball(gamma)))


def adagrad(rate: float = 1e-2, *, epsilon: float = 1e-10) -> Optimiser:
    """Return AdaGrad: each parameter's step shrinks with what it has moved.

    s' = s + p'^2;  get = p;  put = p + rate p' / (sqrt(s') + epsilon).

    The rate is its own, so that of the model is `learning_rate(1.0)`.

    >>> s, p = adagrad(0.1).lens.put((torch.tensor(0.0), torch.tensor(1.0)), torch.tensor(-3.0))
    >>> s, p
    (tensor(9.), tensor(0.9000))
    """
    def put(sp: Any, change: Any) -> Any:
        s = tree_map(lambda s, dp: s + dp * dp, sp[0], change)
        return s, tree_map(lambda p, dp, s: p + rate * dp / (s.sqrt() + epsilon), sp[1], change, s)

    return Optimiser(_zeros, Lens(lambda sp: sp[1], put))


def adam(rate: float = 1e-3, *, betas: tuple[float, float] = (0.9, 0.999),
         epsilon: float = 1e-8) -> Optimiser:
    """Return Adam.

    m' = b1 m + (1 - b1) p';  v' = b2 v + (1 - b2) p'^2;  t' = t + 1
    get = p;  put = p + rate (m' / (1 - b1^t')) / (sqrt(v' / (1 - b2^t')) + epsilon).

    The rate is its own, so that of the model is `learning_rate(1.0)`.

    Raises:
        ValueError: one of `betas` is not at least 0 and below 1.

    >>> (m, v, t), p = adam(0.1).lens.put(
    ...     ((torch.tensor(0.0), torch.tensor(0.0), 0), torch.tensor(1.0)), torch.tensor(-3.0))
    >>> t, p
    (1, tensor(0.9000))
    """
    first, second = betas
    decays: dict[str, Any] = {"betas[0]": first, "betas[1]": second}
    checks.between(0, 1, ends=(True, False), **decays)

    def put(sp: Any, change: Any) -> Any:
        (m, v, t), params = sp
        t = t + 1
        m = tree_map(lambda m, dp: first * m + (1 - first) * dp, m, change)
        v = tree_map(lambda v, dp: second * v + (1 - second) * dp * dp, v, change)
        scale, spread = rate / (1 - first ** t), 1 - second ** t
        return (m, v, t), tree_map(lambda p, m, v: p + scale * m / ((v / spread).sqrt() + epsilon),
                                   params, m, v)

    return Optimiser(lambda params: (_zeros(params), _zeros(params), 0),
                     Lens(lambda sp: sp[1], put))


def _plain(move: Callable[[Tensor, Tensor], Tensor]) -> Optimiser:
    return Optimiser(lambda params: (), Lens(lambda sp: sp[1], lambda sp, change: (
        (), tree_map(move, sp[1], change))), move)


def _heavy_ball(gamma: float) -> Callable[[Any, Any], Any]:
    def put(sp: Any, change: Any) -> Any:
        s = tree_map(lambda s, dp: gamma * s + dp, sp[0], change)
        return s, tree_map(torch.add, sp[1], s)
    return put


def _zeros(params: Any) -> Any:
    return tree_map(torch.zeros_like, params)
