"""Distillation of features, none of which drowns the others."""

import pytest
import torch
from torch import nn

from netwright.objectives.losses import normalized_distillation


def test_normalized_distillation_is_the_sum_of_relative_errors_times_the_largest_norm():
    torch.manual_seed(0)
    teachers = [torch.randn(6, 4, 3), 5 * torch.randn(6, 7)]
    students = [t + 0.1 * torch.randn_like(t) for t in teachers]
    norms = [float(t.square().flatten(1).sum(1).mean()) for t in teachers]
    errors = [float((s - t).square().flatten(1).sum(1).mean())
              for s, t in zip(students, teachers, strict=True)]
    expected = max(norms) * sum(e / n for e, n in zip(errors, norms, strict=True))
    assert float(normalized_distillation(students, teachers)) == pytest.approx(expected, rel=1e-5)
    assert float(normalized_distillation(students, teachers, norms)) == pytest.approx(
        expected, rel=1e-5)


def test_a_feature_that_is_a_hundred_times_larger_keeps_its_share_of_the_gradient():
    torch.manual_seed(0)
    teachers = [torch.randn(6, 4), torch.randn(6, 4)]
    start = [t + 0.3 * torch.randn_like(t) for t in teachers]
    shares = []
    for factor in (1.0, 100.0):
        layer = nn.Linear(4, 4, bias=False)
        nn.init.eye_(layer.weight)
        pulls = []
        for i in range(2):
            scaled = [t * (factor if k == 0 else 1) for k, t in enumerate(teachers)]
            given = [layer(start[k]) * (factor if k == 0 else 1) if k == i else scaled[k]
                     for k in range(2)]
            grad, = torch.autograd.grad(normalized_distillation(given, scaled), layer.weight)
            pulls.append(grad.norm())
        shares.append(float(pulls[0] / pulls[1]))
    assert shares[0] == pytest.approx(shares[1], rel=1e-4)
    plain = [float((100 * a - 100 * b).square().mean() / (a - b).square().mean())
             for a, b in zip(start[:1], teachers[:1], strict=True)]
    assert plain[0] == pytest.approx(1e4, rel=1e-3)  # what it would be without


def test_features_that_do_not_fit_are_refused():
    x = torch.randn(3, 4)
    for given in (([x], [x, x]), ([x], [x[:, :2]]), ([], []), ([x], [x], [1.0, 2.0])):
        with pytest.raises(ValueError, match="students, teachers and norms"):
            normalized_distillation(*given)
    assert float(normalized_distillation(x, torch.zeros_like(x)).detach()) > 0
