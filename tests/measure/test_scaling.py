import math

import numpy
import pytest

from netwright.measure import ScalingFit, scaling_fit

COMPUTE = numpy.geomspace(1e6, 1e12, 40)


def law(a, scale, floor=0.0, compute=COMPUTE):
    return (compute / scale) ** -a + floor


@pytest.mark.parametrize(("a", "scale", "floor"), [
    (0.05, 1e20, 0.0), (0.3, 1e6, 0.0), (1.2, 1e5, 0.0), (0.2, 1e8, 1.7), (0.5, 1e7, 0.05)])
def test_an_exact_curve_gives_back_its_law(a, scale, floor):
    fit = scaling_fit([(COMPUTE, law(a, scale, floor))], irreducible=floor > 0, samples=1)
    assert fit.exponent == pytest.approx(a, rel=1e-4)
    assert math.log(fit.compute_scale) == pytest.approx(math.log(scale), rel=1e-4)
    assert fit.irreducible == pytest.approx(floor, rel=1e-3)
    assert fit(3e9) == pytest.approx(float(law(a, scale, floor, 3e9)), rel=1e-5)
    assert fit.compute_for(fit(3e9)) == pytest.approx(3e9, rel=1e-6)


def test_a_law_without_an_irreducible_part_is_found_to_have_next_to_none():
    fit = scaling_fit([(COMPUTE, law(0.2, 1e8))], irreducible=True, samples=1)
    assert fit.irreducible < 1e-3
    assert fit.exponent == pytest.approx(0.2, rel=1e-2)


def test_the_envelope_of_several_sizes_is_fitted_and_no_run_alone():
    # Each size follows the frontier until it has seen what it can hold, and stays there.
    runs = [(COMPUTE, numpy.maximum(law(0.1, 1e9), law(0.1, 1e9, compute=held)))
            for held in (1e8, 1e10, 1e12)]
    runs.append((COMPUTE, 1.5 * law(0.1, 1e9)))  # a run that is worse throughout
    fit = scaling_fit(runs, samples=20)
    assert fit.exponent == pytest.approx(0.1, rel=1e-6)
    assert len(fit.envelope) == 40
    small = scaling_fit(runs[:1], samples=1)
    assert max(c for c, _ in small.envelope) < 2e8


def test_single_points_far_off_do_not_turn_the_line():
    loss = law(0.1, 1e9)
    loss[-2] *= 0.7
    fit = scaling_fit([(COMPUTE[:-1], loss[:-1])], samples=1)
    assert fit.exponent == pytest.approx(0.1, abs=0.01)
    slope = -numpy.polyfit(numpy.log(COMPUTE[:-1]), numpy.log(loss[:-1]), 1)[0]
    assert abs(slope - 0.1) > abs(fit.exponent - 0.1)


def test_the_interval_holds_the_law_that_made_noisy_runs():
    inside = 0
    for seed in range(10):
        noise = numpy.random.default_rng(seed)
        # points of different budgets, each run once: none lies below another of less compute
        runs = [([c], [loss * math.exp(noise.normal(0, 0.004))]) for c, loss in
                zip(COMPUTE, law(0.1, 1e9), strict=True)]
        fit = scaling_fit(runs, samples=60, seed=seed)
        low, high = fit.interval(0.95)
        assert low <= fit.exponent <= high
        assert high - low < 0.01
        inside += low <= 0.1 <= high
        below, above = fit.loss_interval(1e9)
        assert below <= fit(1e9) <= above
    assert inside >= 7


def test_laws_cross_where_they_are_equal():
    one, two = (scaling_fit([(COMPUTE, law(a, scale))], samples=1)
                for a, scale in ((0.1, 1e9), (0.2, 1e10)))
    # 0.1 (u - 9) = 0.2 (u - 10) in powers of ten, so u = 11
    assert one.crossings(two) == pytest.approx([1e11], rel=1e-5)
    assert two.crossings(one) == pytest.approx([1e11], rel=1e-5)
    worse = scaling_fit([(COMPUTE, 1.2 * law(0.1, 1e9))], samples=1)
    assert ScalingFit(0.1, 1e9, 0.0, (), ()).crossings(ScalingFit(0.1, 5e9, 0.0, (), ())) == []
    assert worse(1e30) > one(1e30)
    floored = ScalingFit(0.3, 1e9, 0.5, (), ())
    first, second = ScalingFit(0.1, 1e10, 0.0, (), ()).crossings(floored)
    for place in (first, second):
        assert floored(place) == pytest.approx((place / 1e10) ** -0.1, rel=1e-6)
    assert floored.compute_for(0.5) == math.inf


def test_the_same_seed_gives_the_same_samples():
    runs = [(COMPUTE, law(0.1, 1e9) * f) for f in (1, 1.02, 1.1)]
    assert scaling_fit(runs, samples=5, seed=1) == scaling_fit(runs, samples=5, seed=1)
    assert scaling_fit(runs, samples=5, seed=1) != scaling_fit(runs, samples=5, seed=2)


def test_errors():
    with pytest.raises(ValueError, match="runs must hold at least one"):
        scaling_fit([])
    with pytest.raises(ValueError, match=r"runs\[1\] must be \(compute, loss\), two sequences"):
        scaling_fit([([1.0, 2.0], [2.0, 1.0]), ([1.0], [2.0, 1.0])])
    with pytest.raises(ValueError, match=r"runs\[0\] must hold positive, .* loss nan; leave out"):
        scaling_fit([([1.0, 2.0], [2.0, math.nan])])
    with pytest.raises(ValueError, match="envelope of at least 3 points, got 2"):
        scaling_fit([([1.0, 2.0, 3.0], [2.0, 1.0, 1.5])], irreducible=True)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        scaling_fit([([1.0, 2.0], [2.0, 1.0])], samples=0)
    fit = scaling_fit([([1.0, 2.0], [2.0, 1.0])], samples=1)
    with pytest.raises(ValueError, match=r"level must be above 0 and below 1, got 95"):
        fit.interval(95)
