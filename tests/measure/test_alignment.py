import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import netwright as nw
from netwright.measure import alignment


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(),
                         nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))


def batch():
    torch.manual_seed(1)
    return torch.randn(64, 8), torch.randint(4, (64,))


class Scaled(nw.rules.Backprop):
    """Backprop with a factor for each stage's update."""

    def __init__(self, network, factors, **options):
        super().__init__(network, **options)
        self.factors = factors

    def forward(self, x, y):
        loss = super().forward(x, y)
        for stage, factor in zip(nw.stages(self.network, x), self.factors, strict=True):
            for p in stage.parameters():
                p.grad *= factor
        return loss


class Random(nw.rules.Rule):
    def forward(self, x, y):
        for p in self.network.parameters():
            p.grad = torch.randn(p.shape, generator=self.generator)
        return cross_entropy(self.network(x).detach(), y)


class Stepping(nw.rules.Rule):
    """Gradient descent that changes the weights itself."""

    updates_weights = True

    def forward(self, x, y):
        loss = cross_entropy(self.network(x), y)
        weights = list(self.network.parameters())
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for p, gradient in zip(weights, gradients, strict=True):
                p -= 0.01 * gradient
        return loss.detach()


class Apart(nw.rules.Rule):
    """Trains a network of its own."""

    def __init__(self, network):
        super().__init__(network)
        self.own = nn.Linear(8, 4)

    def forward(self, x, y):
        loss = cross_entropy(self.own(x), y)
        loss.backward()
        return loss.detach()


def test_backprop_has_one_in_every_stage_under_dropout_and_batch_norm():
    found = alignment(nw.rules.Backprop(network()), batch())
    assert list(found) == nw.stages(network(), batch()[0]).names
    assert found == pytest.approx(dict.fromkeys(found, 1.0))


def test_scale_does_not_count_sign_does_and_a_zero_update_has_none():
    found = list(alignment(Scaled(network(), [3.0, -0.5, 0.0]), batch()).values())
    assert found[:2] == pytest.approx([1.0, -1.0])
    assert math.isnan(found[2])


def test_random_updates_are_unrelated():
    rule = Random(network(), generator=torch.Generator().manual_seed(0))
    assert all(abs(cosine) < 0.3 for cosine in alignment(rule, batch()).values())
    assert len(alignment(rule, batch())) == 3


def test_a_rule_that_changes_weights_itself_is_measured_by_the_change():
    found = alignment(Stepping(network()), batch())
    assert found == pytest.approx(dict.fromkeys(found, 1.0), abs=1e-4)


def test_the_loss_of_the_rule_is_the_one_compared_with():
    x, y = batch()
    target = nn.functional.one_hot(y, 4).float()
    found = alignment(nw.rules.Backprop(network(), loss=mse_loss), (x, target))
    assert found == pytest.approx(dict.fromkeys(found, 1.0))


def test_frozen_stages_are_left_out_and_frozen_parameters_do_not_count():
    frozen = network()
    frozen[0].requires_grad_(False)
    frozen[1].requires_grad_(False)
    frozen[4].bias.requires_grad_(False)
    found = alignment(nw.rules.Backprop(frozen), batch())
    assert list(found) == nw.stages(frozen, batch()[0]).names[1:]
    assert found == pytest.approx(dict.fromkeys(found, 1.0))


def test_a_wholly_frozen_network_has_nothing_to_compare():
    frozen = network().requires_grad_(False)
    assert alignment(Apart(frozen), batch()) == {}


def test_a_rule_that_trains_something_else_has_nothing_to_compare():
    assert alignment(Apart(network()), batch()) == {}


def test_a_network_without_stages_is_one_stage():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.ones(4))

        def forward(self, x):
            return x @ self.a * self.b

    assert alignment(nw.rules.Backprop(Odd()), batch()) == pytest.approx({"network": 1.0})


def test_everything_is_left_as_it_was():
    rule = Stepping(network(), generator=torch.Generator().manual_seed(3))
    rule.network[1].eval()
    rule.network[0].weight.grad = torch.ones(32, 8)
    gradient = rule.network[0].weight.grad
    state = {name: value.clone() for name, value in rule.state_dict().items()}
    pair = batch()
    random = torch.get_rng_state()
    first = alignment(rule, pair)
    assert torch.equal(torch.get_rng_state(), random)
    assert alignment(rule, pair) == first
    assert all(torch.equal(value, state[name]) for name, value in rule.state_dict().items())
    assert rule.network[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones(32, 8))
    assert not rule.network[1].training


@pytest.mark.parametrize("wrong", [torch.zeros(3, 8), (torch.zeros(3, 8),)])
def test_a_batch_that_is_no_pair_is_named(wrong):
    with pytest.raises(ValueError, match=r"batch must be the pair \(x, y\)"):
        alignment(nw.rules.Backprop(network()), wrong)
