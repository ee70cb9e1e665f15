"""A GradScaler and a rule: refused where it would divide gradients that were never scaled."""

import pytest
import torch
from torch import nn

from netwright.rules import Backprop, MonoForward

X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("make", [Backprop, MonoForward])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_a_scaler_that_would_divide_a_rules_gradients_is_refused(make, options) -> None:
    rule, scaler = make(network()), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(rule.parameters(), 0.1, **options)
    before = [p.detach().clone() for p in rule.parameters()]
    scaler.scale(rule(X, Y))
    with pytest.raises(ValueError, match=r"GradScaler after \w+, .* write optimizer.step\(\)"):
        scaler.step(optimizer)
    assert all(map(torch.equal, before, rule.parameters()))


def test_a_scaler_that_is_off_or_scales_a_loss_of_its_own_steps() -> None:
    rule = Backprop(network())
    optimizer = torch.optim.SGD(rule.parameters(), 0.1)
    off = torch.amp.GradScaler("cpu", enabled=False)
    rule(X, Y)
    off.step(optimizer)
    on = torch.amp.GradScaler("cpu")
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(rule.network(X), Y)
    on.scale(loss).backward()
    before = [p.detach().clone() for p in rule.parameters()]
    on.step(optimizer)
    assert not any(map(torch.equal, before, rule.parameters()))


def test_another_networks_scaled_loss_is_none_of_a_rules_business() -> None:
    rule, other, scaler = Backprop(network()), network(), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    rule(X, Y)
    scaler.scale(nn.functional.cross_entropy(other(X), Y)).backward()
    before = [p.detach().clone() for p in other.parameters()]
    scaler.step(optimizer)
    assert not any(map(torch.equal, before, other.parameters()))
