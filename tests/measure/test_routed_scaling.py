import math

import numpy
import pytest

from netwright.measure import RoutedScaling, effective_params, fit_routed_scaling

N, E = (values.ravel() for values in numpy.meshgrid(numpy.geomspace(1e5, 1e9, 6),
                                                    [1, 2, 4, 8, 32, 128, 512]))


def losses(a, b, c, d, start=1.0, most=math.inf):
    """The law written out, one network after another."""
    found = []
    for n, e in zip(N, E, strict=True):
        f = e if most == math.inf else 1 / (1 / (e - 1 + 1 / (1 / start - 1 / most)) + 1 / most)
        found.append(math.exp(a * math.log(n) + b * math.log(f) + c * math.log(n) * math.log(f)
                              + d))
    return found


@pytest.mark.parametrize(("a", "b", "c", "d"), [
    (-0.082, -0.108, 0.004, 2.6), (-0.2, -0.01, 0.0, 3.0), (-0.05, -0.3, 0.012, 0.5)])
def test_a_law_is_found_again_in_what_it_makes(a, b, c, d):
    law = fit_routed_scaling(N, E, losses(a, b, c, d))
    assert (law.a, law.b, law.c, law.d) == pytest.approx((a, b, c, d), abs=1e-10)
    assert (law.start, law.most) == (1.0, math.inf)
    assert law.error < 1e-12
    assert law(3e7, 16) == pytest.approx(
        math.exp(a * math.log(3e7) + b * math.log(16) + c * math.log(3e7) * math.log(16) + d))


@pytest.mark.parametrize(("start", "most"), [(1.8, 315.0), (1.3, 40.0), (3.0, 2000.0)])
def test_a_saturating_law_is_found_again_with_its_bounds(start, most):
    law = fit_routed_scaling(N, E, losses(-0.082, -0.108, 0.004, 2.6, start, most),
                             saturating=True)
    assert (law.start, law.most) == pytest.approx((start, most), rel=1e-4)
    assert (law.a, law.b, law.c, law.d) == pytest.approx((-0.082, -0.108, 0.004, 2.6), rel=1e-4)
    assert law(1e6, 64) == pytest.approx(
        fit_routed_scaling(N, E, [law(n, e) for n, e in zip(N, E, strict=True)],
                           saturating=True)(1e6, 64))


def test_a_separable_law_has_no_interaction_and_misses_one():
    true = losses(-0.082, -0.108, 0.004, 2.6)
    law = fit_routed_scaling(N, E, true, interaction=False)
    assert law.c == 0
    assert law.error > 1e-3
    exact = fit_routed_scaling(N, E, losses(-0.1, -0.05, 0.0, 2.0), interaction=False)
    assert (exact.a, exact.b, exact.d) == pytest.approx((-0.1, -0.05, 2.0))
    assert exact.error < 1e-12


def test_noise_moves_the_law_little():
    draws = numpy.random.default_rng(0)
    noisy = losses(-0.082, -0.108, 0.004, 2.6) * numpy.exp(0.002 * draws.standard_normal(len(N)))
    law = fit_routed_scaling(N, E, noisy)
    assert law.c == pytest.approx(0.004, rel=0.1)
    assert 0.001 < law.error < 0.003


@pytest.mark.parametrize(("start", "most"), [(1.0, math.inf), (1.8, 315.0)])
def test_effective_parameters_are_those_of_the_dense_network_with_that_loss(start, most):
    law = RoutedScaling(-0.082, -0.108, 0.004, 2.6, start, most, 0.0)
    for n, e in ((1e6, 1), (1e6, 8), (1e8, 128)):
        assert law(effective_params(n, e, law), 1) == pytest.approx(law(n, e), rel=1e-12)
    assert effective_params(1e6, 1, law) == pytest.approx(1e6)
    assert effective_params(1e6, 8, law) > 1e6
    # The cutoff: where b + c log N is 0, experts bring nothing.
    assert effective_params(math.exp(27), 64, law) == pytest.approx(math.exp(27), rel=1e-9)


@pytest.mark.parametrize(("given", "words"), [
    (([1, 2], [1, 2], [1]), "must be sequences of the same length"),
    (([1e6, -1], [1, 2], [1, 2]), r"n must be finite and positive, got -1\.0"),
    (([1e6, 1e7], [1, 0.5], [1, 2]), r"experts must be finite and at least 1, got 0\.5"),
    (([1e6, 1e7], [1, 2], [1, math.nan]), "loss must be finite and positive, got nan"),
    (([1e6, 1e7], [1, 2], [1, 2]), "at least 4 networks of two sizes"),
    (([1e6] * 4, [1, 2, 3, 4], [1, 2, 3, 4]), "got 4 of 1 and 4"),
    (([1e6, 1e7, 1e8, 1e9], [1, 2, 1, 1], [4, 3, 2, 1]), "two sizes with two numbers")])
def test_what_determines_no_law(given, words):
    with pytest.raises(ValueError, match=words):
        fit_routed_scaling(*given)


def test_what_has_no_effective_size():
    with pytest.raises(ValueError, match="experts must be at least 1, got 0"):
        effective_params(1e6, 0, RoutedScaling(-0.1, -0.1, 0, 0, 1, math.inf, 0))
    with pytest.raises(ValueError, match="changes with the size"):
        effective_params(1e6, 2, RoutedScaling(0.0, -0.1, 0.0, 0, 1, math.inf, 0))
