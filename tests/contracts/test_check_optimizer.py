"""Optimizers that break the contract in one way each, and what is said of them."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import netwright as nw
from netwright.errors import BrokenContract


class Plain(torch.optim.Optimizer):
    """Gradient descent, with one thing added or left out by each optimizer below."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, group)
        return loss

    def move(self, p, group):
        p.sub_(group["lr"] * p.grad)


class Climbs(Plain):
    def move(self, p, group):
        p.add_(group["lr"] * p.grad)


class Counts(Plain):
    calls = 0

    def move(self, p, group):
        Counts.calls += 1
        p.sub_(group["lr"] * p.grad / Counts.calls)


class Silent(Plain):
    def step(self, closure=None):
        super().step(closure)


class Forgets(Plain):
    def __init__(self, params):
        super().__init__(params)
        self.kept = {}

    def move(self, p, group):
        self.kept[p] = 0.9 * self.kept.get(p, 0) + p.grad
        p.sub_(group["lr"] * self.kept[p])


class FirstGroup(Plain):
    def step(self, closure=None):
        with torch.enable_grad():
            loss = None if closure is None else closure()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    self.move(p, self.param_groups[0])
        return loss


class Decays(Plain):
    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.99)
        return loss


@pytest.mark.parametrize(("optimizer", "check", "words"), [
    (Climbs, "it trains in fit", "against the gradient"),
    (Counts, "the same start gives the same end", "keep nothing on the class"),
    (Silent, "a step returns the closures loss", "got None"),
    (Forgets, "state goes into a fresh optimizer", "self.state or in the groups"),
    (Forgets, "it goes on from a checkpoint", "self.state or in the groups"),
    (FirstGroup, "groups are stepped or refused", "self.param_groups"),
    (Decays, "a parameter without a gradient stays", "pass over"),
])
def test_what_is_broken_is_named_and_how_to_mend_it(optimizer, check, words):
    single = {str(check): check for check in nw.contracts.checks("optimizer")}[check]
    with pytest.raises(BrokenContract, match=words) as broken:
        single(optimizer)
    assert str(broken.value).startswith(f"{optimizer.__name__}: {check}: expected ")
    single(Plain)  # the control


@pytest.mark.parametrize(("optimizer", "arguments"), [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.Adam, {}),
    (torch.optim.AdamW, {"lr": 0.01}), (torch.optim.LBFGS, {"max_iter": 3})])
def test_pytorchs_own_keep_to_it(optimizer, arguments):
    nw.contracts.check_optimizer(optimizer, arguments=arguments)


@pytest.mark.parametrize("optimizer", [nw.optim.GreedyBlockDescent, nw.optim.BlockProximalDescent])
def test_what_differentiates_the_loss_itself_trains_by_fit(optimizer):
    torch.manual_seed(0)
    x, network = torch.randn(12, 4), nn.Linear(4, 3)
    y = (x @ torch.randn(4, 3)).argmax(1)
    history = nw.fit(network, [(x, y)], epochs=6, optimizer=optimizer, progress=False)
    losses = [epoch.loss for epoch in history.epochs]
    assert losses[-1] < losses[0]
    assert all(b <= a for a, b in pairwise(losses))
    for options in ({"accumulate": 2}, {"clip": 1.0}):
        with pytest.raises(ValueError, match=f"cannot be used with {optimizer.__name__}"):
            nw.fit(network, [(x, y)], epochs=1, optimizer=optimizer, **options)
    rule = nw.rules.LLS(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), x)
    with pytest.raises(ValueError, match="LLS does not give; train with Backprop"):
        nw.fit(rule, [(x, y)], epochs=1, optimizer=optimizer)


def test_what_a_network_draws_stays_the_same_within_a_step():
    """Else the line search would compare losses of different networks."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    seen = []

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            seen.append(float(torch.rand(())))
            return self.layer(x)
    nw.fit(Noisy(), [(x, y)] * 2, epochs=1, optimizer=nw.optim.BlockProximalDescent, progress=False)
    assert len(set(seen)) == 2
    assert len(seen) > 4
