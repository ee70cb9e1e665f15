import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy

from netwright import checks
from netwright.catalogue.facets import method

__all__ = ["ScalingFit", "scaling_fit"]

Point = tuple[float, float]


@dataclass(frozen=True)
class ScalingFit:
    """How loss falls with compute: loss(C) = (C / C0)^-a + E.

    `exponent` is a, `compute_scale` C0 and `irreducible` E, which is 0 unless it was fitted.
    `envelope` holds the points (compute, loss) that were fitted. `resampled` are the fits, each
    as (a, log C0, E), of as many samples of the runs.
    """

    exponent: float
    compute_scale: float
    irreducible: float
    envelope: tuple[Point, ...]
    resampled: tuple[tuple[float, float, float], ...]

    def __call__(self, compute: float) -> float:
        """Return the loss at `compute`."""
        return math.exp(_log_loss(*self._parameters, math.log(compute)))

    @property
    def _parameters(self) -> tuple[float, float, float]:
        return self.exponent, math.log(self.compute_scale), self.irreducible

    def interval(self, level: float = 0.95) -> Point:
        """Return between what the exponent lies in `level` of the resampled fits.

        Raises:
            ValueError: `level` is not between 0 and 1.
        """
        return _interval([a for a, *_ in self.resampled], level)

    def loss_interval(self, compute: float, level: float = 0.95) -> Point:
        """Return between what the loss at `compute` lies in `level` of the resampled fits."""
        place = math.log(compute)
        return _interval([math.exp(_log_loss(*fit, place)) for fit in self.resampled], level)

    def compute_for(self, loss: float) -> float:
        """Return the compute at which the fit has `loss`, infinity where it never does.

        >>> fit = ScalingFit(0.5, 100.0, 1.0, (), ())
        >>> round(fit.compute_for(1.1)), fit.compute_for(0.9)
        (10000, inf)
        """
        if loss <= self.irreducible:
            return math.inf
        return self.compute_scale * (loss - self.irreducible) ** (-1 / self.exponent)

    def crossings(self, other: "ScalingFit", *, decades: float = 30.0) -> list[float]:
        """Return the computes at which this fit's loss becomes or ceases to be below `other`'s.

        They are looked for within `decades` powers of ten on either side of what was measured.
        An empty list says that one fit stays above the other.

        >>> slow, fast = ScalingFit(0.1, 1.0, 0.0, (), ()), ScalingFit(0.2, 100.0, 0.0, (), ())
        >>> [round(compute) for compute in slow.crossings(fast)]
        [10000]
        """
        from scipy.optimize import brentq
        measured = [math.log(c) for c, _ in (*self.envelope, *other.envelope)]
        measured = measured or [math.log(self.compute_scale), math.log(other.compute_scale)]
        wide = decades * math.log(10)
        places = numpy.linspace(min(measured) - wide, max(measured) + wide, 4001).tolist()

        def gap(place: float) -> float:
            return (_log_loss(*self._parameters, place) - _log_loss(*other._parameters, place))

        return [math.exp(brentq(gap, a, b, xtol=1e-12)) for a, b in pairwise(places)
                if gap(a) * gap(b) < 0]


@method("measure", papers=["003-212"],
        variants={"two runs": {"runs": [([1.0, 2.0, 4.0, 8.0], [4.0, 3.0, 2.2, 1.7]),
                                        ([2.0, 4.0, 8.0], [3.1, 2.3, 1.6])], "samples": 5}})
def scaling_fit(runs: Sequence[tuple[Sequence[float], Sequence[float]]], *,
                irreducible: bool = False, samples: int = 200, seed: int = 0) -> ScalingFit:
    """Fit a power law to the least loss that any of `runs` reached with so much compute.

    loss(C) = (C / C0)^-a, with `irreducible` (C / C0)^-a + E, where a > 0 and E >= 0.

    A run is the course of one training, of any rule, size and budget: its compute so far (FLOPs,
    of which `nw.measure.cost` gives those of a step) and its loss there. The points fitted are the
    lower envelope: those that no point of less or equal compute lies below. Leave out of a run
    what comes before the loss begins to follow a law, such as its first steps.

    The logarithm of the loss is fitted by least squares that flatten beyond 1 % (soft L1), so that
    single points that fell lucky do not turn the line. Confidence comes from `samples` fits of as
    many runs drawn with replacement, since the points of one run are not independent.

    Args:
        runs: pairs (compute, loss), each the course of one training.
        irreducible: whether E is fitted.
        samples: fits of drawn runs, for the confidence.
        seed: where those are drawn.

    Shapes: a run is (compute, loss), two sequences of the same length, of positive numbers.

    Raises:
        ValueError: a run is no such pair; or the envelope has fewer points than two, or three with
            `irreducible`.

    Papers: Kaplan et al., 2020, Scaling Laws for Neural Language Models. Filipovich, Cappelli,
    Hesslow, Launay, 2022, Scaling Laws Beyond Backpropagation.

    >>> compute = [1e6, 1e7, 1e8]
    >>> fit = scaling_fit([(compute, [(c / 1e9) ** -0.1 for c in compute])])
    >>> round(fit.exponent, 6), round(fit(1e9), 6)
    (0.1, 1.0)
    """
    if not runs:
        raise ValueError("runs must hold at least one (compute, loss), got none")
    curves = [_checked(i, run) for i, run in enumerate(runs)]
    checks.count(0, seed=seed)
    checks.count(1, samples=samples, advice="the default is 200")
    least = 3 if irreducible else 2
    envelope = _envelope(curves)
    if len(envelope) < least:
        raise ValueError(f"runs must have an envelope of at least {least} points, got "
                         f"{len(envelope)}; give the loss at more steps, or longer runs")
    a, scale, floor = _fitted(envelope, irreducible)
    generator = numpy.random.default_rng(seed)
    resampled = []
    for _ in range(samples):
        drawn = _envelope([curves[i] for i in generator.integers(len(curves), size=len(curves))])
        if len(drawn) >= least:
            resampled.append(_fitted(drawn, irreducible))
    return ScalingFit(a, math.exp(scale), floor, tuple(envelope), tuple(resampled))


def _checked(i: int, run: Any) -> list[Point]:
    if not isinstance(run, (tuple, list)) or len(run) != 2 or len(run[0]) != len(run[1]):
        raise ValueError(f"runs[{i}] must be (compute, loss), two sequences of the same length, "
                         f"got {str(run)[:60]}")
    points = [(float(c), float(loss)) for c, loss in zip(*run, strict=True)]
    for c, loss in points:
        if not (0 < c < math.inf and 0 < loss < math.inf):
            raise ValueError(f"runs[{i}] must hold positive, finite numbers, got compute {c} with "
                             f"loss {loss}; leave out what diverged")
    return points


def _envelope(curves: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the points that have less loss than all of less or equal compute."""
    found: list[Point] = []
    for c, loss in sorted(point for curve in curves for point in curve):
        if not found or loss < found[-1][1]:
            found.append((c, loss))
    return found


def _fitted(envelope: Sequence[Point], irreducible: bool) -> tuple[float, float, float]:
    """Return a, log C0 and E."""
    from scipy.optimize import least_squares
    u, logs = numpy.log(numpy.array(envelope)).T
    middle = statistics.fmean(u.tolist())  # which keeps slope and height apart
    best = None
    for share in ((0.05, 0.5, 0.9) if irreducible else (0.0,)):
        floor = share * math.exp(logs.min())
        slope, height = numpy.polyfit(u - middle, numpy.log(numpy.exp(logs) - floor), 1)
        start = [math.log(max(-slope, 1e-3)), height, *([math.log(floor)] if irreducible else [])]

        def off(theta: Any) -> Any:
            law = theta[1] - numpy.exp(theta[0]) * (u - middle)
            return (numpy.logaddexp(law, theta[2]) if irreducible else law) - logs

        found = least_squares(off, start, loss="soft_l1", f_scale=0.01, xtol=1e-15, ftol=1e-15,
                              gtol=1e-15, max_nfev=2000)
        best = found if best is None or found.cost < best.cost else best
    assert best is not None
    a = math.exp(best.x[0])
    return a, float(middle + best.x[1] / a), math.exp(best.x[2]) if irreducible else 0.0


def _log_loss(a: float, log_scale: float, floor: float, place: float) -> float:
    law = -a * (place - log_scale)
    return float(numpy.logaddexp(law, math.log(floor))) if floor > 0 else law


def _interval(values: Sequence[float], level: float) -> Point:
    checks.between(0, 1, ends=(False, False), level=level, advice="0.95 is usual")
    low, high = numpy.quantile(values, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high
