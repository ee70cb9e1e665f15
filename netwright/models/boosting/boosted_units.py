from typing import Any

import numpy
import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.models.boosting._estimators import (
    Array,
    Grown,
    GrownClassifier,
    GrownRegressor,
)
from netwright.numerics.closed_form import best_step, loss, pseudo_residual

__all__ = ["BoostedUnitsClassifier", "BoostedUnitsRegressor"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"logistic": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}


class _BoostedUnits(Grown):
    """What the regressor and the classifier share: how the network grows."""

    def __init__(self, n_steps: int = 200, n_units: int = 1, *, learning_rate: float = 1.0,
                 subsample: float = 0.5, activation: str = "logistic", weight_decay: float = 1e-4,
                 iterations: int = 200, random_state: Any = None) -> None:
        self.n_steps, self.n_units, self.learning_rate = n_steps, n_units, learning_rate
        self.subsample, self.activation = subsample, activation
        self.weight_decay, self.iterations = weight_decay, iterations
        self.random_state = random_state

    def _grow(self, x: Tensor, y: Tensor, generator: Generator) -> tuple[Any, list[float]]:
        self._check()
        n = len(x)
        constant = y.mean(0) if self._squared else y.mean(0).log()
        F = constant.expand_as(y)
        parts, losses = [], [float(loss(F, y, self._squared))]
        take = max(2, round(self.subsample * n))
        for _ in range(self.n_steps):
            r = pseudo_residual(F, y, self._squared)
            rows = torch.randperm(n, generator=generator)[:take]
            A, a, B, b = fit_part(x[rows], r[rows], self.n_units, self.activation,
                                  self.weight_decay, self.iterations, generator)
            g = torch.addmm(b, ACTIVATIONS[self.activation]()(torch.addmm(a, x, A.T)), B.T)
            step = self.learning_rate * best_step(F, g, y, self._squared)
            F = F + step * g
            parts.append((A, a, step * B, step * b))
            losses.append(float(loss(F, y, self._squared)))
        return (constant, parts), losses

    def _network(self, pieces: Any, steps: int, mean: Tensor, scale: Tensor) -> nn.Module:
        constant, parts = pieces[0], pieces[1][:steps]
        # Nothing of each first, since there may be no part.
        A, a, B = [constant.new_zeros(0, self.n_features_in_)], [constant.new_zeros(0)], [
            constant.new_zeros(len(constant), 0)]
        bias = constant
        for part in parts:
            A, a, B = [*A, part[0]], [*a, part[1]], [*B, part[2]]
            bias = bias + part[3]
        return nn.Sequential(_linear(torch.cat(A), torch.cat(a)), ACTIVATIONS[self.activation](),
                             _linear(scale[:, None] * torch.cat(B, 1), scale * bias + mean))

    def _check(self) -> None:
        checks.one_of(ACTIVATIONS, activation=self.activation)
        checks.count(1, n_steps=self.n_steps, n_units=self.n_units, iterations=self.iterations)
        checks.between(0, 1, ends=(False, True), subsample=self.subsample,
                       learning_rate=self.learning_rate, advice="1 is the whole")
        checks.at_least(0, weight_decay=self.weight_decay, advice="0 is none")


@method(
    "model",
    papers=["004-020"],
    place="whole network",
    saves=["inference time", "tuning"],
    needs=["labels"],
    search={"n_units": [1, 4], "learning_rate": (0.1, 1.0)},
)
class BoostedUnitsRegressor(_BoostedUnits, GrownRegressor):
    """A network with one hidden layer, grown by a few units at a time on what is still wrong.

    F_0 = the constant with the least loss;  F_t = F_{t-1} + learning_rate rho_t g_t,
    g_t(x) = B_t act(A_t x + a_t) + b_t, a network of `n_units` units that minimises
    mean |r - g_t|²/2 + weight_decay (|A_t|² + |B_t|²)/2 for the pseudo-residuals
    r = -dloss/dF at F_{t-1}, by L-BFGS on a drawn share `subsample` of the samples;
    rho_t = the step with the least loss on all of them.

    The parts are one network in the end: hidden weights [A_1; ..; A_T], last weights
    [learning_rate rho_t B_t], last bias F_0 + sum of learning_rate rho_t b_t.

    The loss on the training set never rises, since it is convex in the step. `losses_` is that
    loss after 0, 1, .. steps. `truncate(t)` switches the later units off: the network that
    `n_steps=t` would have given.

    rho_t is the best step, in closed form for the squared loss (the paper takes 1) and by Newton
    to the end for the cross-entropy (the paper makes one step of it). Two classes have a score
    each (the paper has one for both). y is standardised inside, and the last layer undoes it; X
    should be standardised by the user. `network_` is an `nn.Sequential` of the precision of X.

    Args:
        n_steps: how often units are added.
        n_units: that each step adds.
        learning_rate: the part of each best step that is taken.
        subsample: the share of the samples that a step's units are fitted to.
        activation: "logistic", "tanh" or another of scikit-learn's names.
        weight_decay: what the size of a step's weights costs.
        iterations: the most of L-BFGS, in a step.
        random_state: where weights and samples are drawn, as everywhere in scikit-learn.

    Shapes: X (n, inputs); A_t (n_units, inputs); B_t (outputs, n_units).

    Raises:
        ValueError: a number is out of range.
        UnknownName: `activation` is none of those that are known.

    Paper: Emami, Martínez-Muñoz, 2023, Sequential Training of Neural Networks with Gradient
    Boosting.

    >>> X, y = torch.rand(60, 3).numpy(), torch.rand(60).numpy()
    >>> model = BoostedUnitsRegressor(n_steps=5, n_units=2).fit(X, y)
    >>> model.network_
    Sequential(
      (0): Linear(in_features=3, out_features=10, bias=True)
      (1): Sigmoid()
      (2): Linear(in_features=10, out_features=1, bias=True)
    )
    """


@method(
    "model",
    papers=["004-020"],
    place="whole network",
    saves=["inference time", "tuning"],
    needs=["labels"],
    search={"n_units": [1, 4], "learning_rate": (0.1, 1.0)},
)
class BoostedUnitsClassifier(_BoostedUnits, GrownClassifier):
    """A network with one hidden layer, grown by a few units at a time on what is still wrong.

    As `BoostedUnitsRegressor`, with the cross-entropy for a loss: y holds
    classes of any type, and the network returns a score for each.

    Args: those of `BoostedUnitsRegressor`.

    Paper: that of `BoostedUnitsRegressor`.

    >>> X, y = torch.rand(60, 3).numpy(), ["yes", "no"] * 30
    >>> model = BoostedUnitsClassifier(n_steps=5).fit(X, y)
    >>> model.truncate(3).network_[0]
    Linear(in_features=3, out_features=3, bias=True)
    """


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Return a layer of these weights; one of no units would warn if it were drawn."""
    layer = nn.Linear(1, 1)
    layer.out_features, layer.in_features = weight.shape
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def fit_part(x: Tensor, r: Tensor, units: int, activation: str, weight_decay: float,
             iterations: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return A, a, B, b of the network of `units` units that is fitted to r by L-BFGS.

    It starts as PyTorch's layers do. In numpy, since the networks are so small that the calls
    would take longer than the sums.
    """
    from scipy.optimize import minimize
    inputs, outputs, n = x.shape[1], r.shape[1], len(x)
    X, R = x.numpy(), r.numpy()
    shapes = [(inputs, units), (units,), (units, outputs), (outputs,)]
    ends = numpy.cumsum([int(numpy.prod(shape)) for shape in shapes])
    bounds = numpy.repeat([inputs, inputs, units, units], numpy.diff(ends, prepend=0)) ** -0.5
    drawn = torch.rand(int(ends[-1]), generator=generator, dtype=torch.float64).numpy()

    def split(flat: Array) -> list[Array]:
        return [part.reshape(shape) for part, shape
                in zip(numpy.split(flat, ends[:-1]), shapes, strict=True)]

    def objective(flat: Array) -> tuple[float, Array]:
        A, a, B, b = split(flat)
        u = X @ A + a
        if activation == "relu":
            h = numpy.maximum(u, 0)
            slope = (u > 0).astype(h.dtype)
        elif activation == "tanh":
            h = numpy.tanh(u)
            slope = 1 - h * h
        else:
            h = 0.5 + 0.5 * numpy.tanh(0.5 * u)
            slope = h * (1 - h)
        error = (h @ B + b - R) / n
        back = error @ B.T * slope
        decay = numpy.concatenate([weight_decay * A.ravel(), numpy.zeros(units),
                                   weight_decay * B.ravel(), numpy.zeros(outputs)])
        gradient = numpy.concatenate([(X.T @ back).ravel(), back.sum(0), (h.T @ error).ravel(),
                                      error.sum(0)])
        value = 0.5 * n * float(numpy.vdot(error, error)) + 0.5 * float(flat @ decay)
        return value, gradient + decay

    found = minimize(objective, (2 * drawn - 1) * bounds, jac=True, method="L-BFGS-B",
                     options={"maxiter": iterations})
    A, a, B, b = (torch.tensor(part) for part in split(found.x))
    return A.T, a, B.T, b
