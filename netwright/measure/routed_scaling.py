import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from netwright import checks
from netwright.catalogue.facets import method

__all__ = ["RoutedScaling", "effective_params", "fit_routed_scaling"]


@dataclass(frozen=True)
class RoutedScaling:
    """How the loss of a network with experts falls with its size N and its experts E.

    log loss = a log N + b log F + c log N log F + d,  1 / F = 1 / (E - 1 + r) + 1 / `most`,
    r = 1 / (1 / `start` - 1 / `most`): F rises from `start` at one expert to `most`, and is E
    itself where neither was fitted. All logarithms are natural ones.

    `error` is the root of the mean square by which the logarithms of the losses are missed.
    """

    a: float
    b: float
    c: float
    d: float
    start: float
    most: float
    error: float

    def __call__(self, n: float, experts: float) -> float:
        """Return the loss of a network of size `n` with so many experts."""
        u, v = math.log(n), math.log(float(_effective(experts, self.start, self.most)))
        return math.exp(self.a * u + self.b * v + self.c * u * v + self.d)


@method("measure", papers=["001-134"],
        variants={"nine runs": {"n": [1e6, 1e7, 1e8] * 3,
                                "experts": [1, 1, 1, 4, 4, 4, 16, 16, 16],
                                "loss": [4.0, 3.4, 2.9, 3.7, 3.2, 2.8, 3.5, 3.0, 2.7]}})
def fit_routed_scaling(n: Sequence[float], experts: Sequence[float], loss: Sequence[float], *,
                       interaction: bool = True, saturating: bool = False) -> RoutedScaling:
    """Fit the law by which size and number of experts together lower a language model's loss.

    log loss = a log N + b log E + c log N log E + d

    a < 0 and b < 0 are what size and experts bring, c > 0 says that experts bring less to large
    networks. Without `interaction` c is 0: the separable law, to compare with. With `saturating`
    E gives way to an F that rises from one bound, at E = 1, to another, which bends the law flat
    for very few and very many experts; the paper fits it over 1 to 512 experts. The fit is least
    squares in the logarithm of the loss.

    Args:
        n: for each network its size without the experts beside the first, that is, what an input
            runs through.
        experts: how many experts it has; 1 for a dense one.
        loss: what it reached.
        interaction: whether c is fitted.
        saturating: whether the bounds are fitted.

    Raises:
        ValueError: the three differ in length, hold what is not positive and finite or an E below
            1, or do not determine the law: too few networks, or all of one size or one E.

    Paper: Clark, de las Casas, Guy, Mensch, et al., 2022, Unified Scaling Laws for Routed
    Language Models.

    >>> sizes, experts = [1e6, 1e6, 1e7, 1e7], [1, 8, 1, 8]
    >>> loss = [n ** -0.08 * e ** -0.1 * math.exp(0.004 * math.log(n) * math.log(e) + 2)
    ...         for n, e in zip(sizes, experts)]
    >>> law = fit_routed_scaling(sizes, experts, loss)
    >>> round(law.a, 6), round(law.b, 6), round(law.c, 6), round(law.d, 6)
    (-0.08, -0.1, 0.004, 2.0)
    """
    from scipy.optimize import least_squares
    u, e, y = _checked(n, experts, loss)
    wanted = 3 + interaction + 2 * saturating
    if len(y) < wanted or len(set(u)) < 2 or len(set(e)) < 2:
        raise ValueError(f"n, experts and loss must hold at least {wanted} networks of two sizes "
                         f"and two numbers of experts, got {len(y)} of {len(set(u))} and "
                         f"{len(set(e))}")

    def linear(start: float, most: float) -> tuple[Any, Any]:
        v = numpy.log(_effective(e, start, most))
        columns = [u, v, u * v, numpy.ones_like(u)]
        if not interaction:
            columns[2] = numpy.zeros_like(u)
        design = numpy.stack(columns, 1)
        found, _, rank, _ = numpy.linalg.lstsq(design, y, rcond=None)
        if rank < 3 + interaction:
            raise ValueError("n, experts and loss must determine the law: give networks of at "
                             "least two sizes with two numbers of experts each")
        return found, design @ found - y

    start, most = 1.0, math.inf
    if saturating:  # linear in the rest, so that only the two bounds are searched for

        def bounds(theta: Any) -> tuple[float, float]:
            low = 1 + math.exp(theta[0])
            return low, low + math.exp(theta[1])

        best = min((least_squares(lambda theta: linear(*bounds(theta))[1], guess, xtol=1e-15,
                                  ftol=1e-15, gtol=1e-15, max_nfev=2000,
                                  bounds=([-20, -5], [10, 20]))
                    for guess in ((-1.0, 4.0), (0.5, 6.0), (-3.0, 3.0))), key=lambda f: f.cost)
        start, most = bounds(best.x)
    (a, b, c, d), missed = linear(start, most)
    return RoutedScaling(float(a), float(b), float(c), float(d), start, most,
                         float(numpy.sqrt(numpy.mean(missed ** 2))))


@method("companion", papers=["001-134"])
def effective_params(n: float, experts: float, law: RoutedScaling) -> float:
    """Return the size of the dense network that has the loss of this one with experts.

    log N' = (a log N + (b + c log N) log F(E) - b log F(1)) / (a + c log F(1))

    Raises:
        ValueError: `n` or `experts` is not positive, or size changes nothing by this law.

    Paper: Clark, de las Casas, Guy, Mensch, et al., 2022, Unified Scaling Laws for Routed
    Language Models.

    >>> law = RoutedScaling(-0.08, -0.1, 0.004, 2.0, 1.0, math.inf, 0.0)
    >>> round(effective_params(1e6, 1, law)), effective_params(1e6, 8, law) > 2e6
    (1000000, True)
    """
    checks.above(0, n=n)
    checks.at_least(1, experts=experts)
    u, dense = math.log(n), math.log(law.start)
    slope = law.a + law.c * dense
    if slope == 0:
        raise ValueError("law must have a loss that changes with the size of a dense network, got "
                         f"a={law.a}, c={law.c}")
    v = math.log(float(_effective(experts, law.start, law.most)))
    return math.exp((law.a * u + (law.b + law.c * u) * v - law.b * dense) / slope)


def _effective(experts: Any, start: float, most: float) -> Any:
    """Return F(E), E itself where nothing saturates."""
    if math.isinf(most):
        return numpy.asarray(experts, dtype=float) - 1 + start
    rest = 1 / (1 / start - 1 / most)
    return 1 / (1 / (numpy.asarray(experts, dtype=float) - 1 + rest) + 1 / most)


def _checked(n: Sequence[float], experts: Sequence[float],
             loss: Sequence[float]) -> tuple[Any, Any, Any]:
    given = [numpy.asarray(values, dtype=float) for values in (n, experts, loss)]
    lengths = [values.shape for values in given]
    if len(set(lengths)) > 1 or given[0].ndim != 1:
        raise ValueError("n, experts and loss must be sequences of the same length, got "
                         f"{lengths[0]}, {lengths[1]} and {lengths[2]}")
    for name, values, least in (("n", given[0], 0.0), ("experts", given[1], 1.0),
                                ("loss", given[2], 0.0)):
        wrong = values[~(numpy.isfinite(values) & (values > 0) & (values >= least))]
        if len(wrong):
            raise ValueError(f"{name} must be finite and {'at least 1' if least else 'positive'}, "
                             f"got {wrong[0]}; leave out what diverged")
    return numpy.log(given[0]), given[1], numpy.log(given[2])
