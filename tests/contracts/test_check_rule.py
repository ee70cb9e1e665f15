"""Rules that break the contract in one way each, and what is said of them."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import netwright as nw
from netwright.errors import BrokenContract, UnknownName
from netwright.rules import Backprop, Rule


class Broken(Rule):
    """Backpropagation, with one thing added or left out by each rule below."""

    def loss(self, x, y):
        if y.is_floating_point() or int(y.max()) > 2 or int(y.min()) < 0:
            return Backprop(self.network)(x, y)
        loss = cross_entropy(self.network(x[0] if isinstance(x, tuple) else x), y)
        loss.backward()
        return loss.detach()


class Graph(Broken):
    def forward(self, x, y):
        return cross_entropy(self.network(x), y)


class Vector(Broken):
    def forward(self, x, y):
        return self.loss(x, y)[None]


class Steps(Broken):
    def forward(self, x, y):
        loss = self.loss(x, y)
        with torch.no_grad():
            self.network[0].weight.add_(0.1)
        return loss


class Still(Broken):
    def forward(self, x, y):
        return self.loss(x, y) * 1

    def __init__(self, network):
        super().__init__(network)
        for name, p in network.named_parameters():
            p.requires_grad_(name.endswith("bias"))


class Overwrites(Broken):
    def forward(self, x, y):
        self.zero_grad()
        return self.loss(x, y)


class Draws(Broken):
    drawn = 0

    def forward(self, x, y):
        Draws.drawn += 1
        return self.loss(x, y) + Draws.drawn


class Forgets(Broken):
    def __init__(self, network):
        super().__init__(network)
        self.kept = torch.randn(3)

    def forward(self, x, y):
        return self.loss(x, y)

    def predict(self, x):
        return super().predict(x) + self.kept


class Traces(Broken):
    def forward(self, x, y):
        return self.loss(x, y)

    def predict(self, x):
        return self.network(x)


class Writes(Broken):
    def forward(self, x, y):
        loss = self.loss(x, y)
        (x[0] if isinstance(x, tuple) else x).mul_(0.9)
        return loss


class Thaws(Broken):
    def forward(self, x, y):
        for p in self.network.parameters():
            p.requires_grad_()
        return self.loss(x, y)


class Rigid(Broken):
    def __init__(self, network):
        super().__init__(network)
        self.feedback = torch.randn(3, 3)

    def forward(self, x, y):
        loss = self.loss(x, y)
        return loss + 0 * (self.network(x) @ self.feedback).sum().detach()


class Sixes(Broken):
    def forward(self, x, y):
        return self.loss(x, y) + 0 * torch.stack([*y[:6]] + [y[-1]] * 0).view(6).sum()


class Lenient(Broken):
    def forward(self, x, y):
        return self.loss(x, y.long().clamp(0, 2))


class Early(Broken):
    def __init__(self, network):
        super().__init__(network)
        self.register_buffer("calls", torch.tensor(0))

    remembers = True

    def forward(self, x, y):
        self.calls += 1
        return self.loss(x, y)


class Renames(Broken):
    def forward(self, x, y):
        self.network.register_buffer("added", torch.zeros(1), persistent=True)
        return self.loss(x, y)


class Through(Broken):
    def __call__(self, x, y):
        return self.forward(x, y)

    def forward(self, x, y):
        return self.loss(x, y)


@pytest.mark.parametrize(("rule", "check", "words"), [
    (Graph, "the loss is a finite scalar without a graph", "return loss.detach()"),
    (Vector, "the loss is a finite scalar without a graph", r"got \(1,\)"),
    (Steps, "the rule moves its network or what it adds", "weights that wait for the optimizer"),
    (Still, "the rule moves its network or what it adds", "moves some weight"),
    (Overwrites, "two calls add up as two backward passes do", "twice as much"),
    (Draws, "the same random state gives the same update", "expected the same loss"),
    (Forgets, "state goes into a fresh rule that predicts the same", "as a parameter, a buffer"),
    (Traces, "predictions are scores that leave no trace", "torch.no_grad"),
    (Writes, "inputs labels and modes are left as they were", "expected x as it was"),
    (Thaws, "a frozen layer stays as it is", "requires_grad=False"),
    (Thaws, "a frozen network gets no gradient", "requires_grad=False"),
    (Rigid, "a rule follows when it is converted", "got RuntimeError"),
    (Rigid, "everything follows the network to float64", "got RuntimeError"),
    (Sixes, "batches of any size and layout do", "got RuntimeError"),
    (Lenient, "labels that are none are refused before anything changes", "got no error"),
    (Early, "fewer labels than inputs are refused before anything changes",
     "before the refused call"),
    (Early, "an input of the wrong shape is refused before anything changes",
     "before the refused call"),
    (Through, "the update stops at the input", "detach x"),
    (Through, "the update is the same where gradients are off", "got RuntimeError"),
    (Through, "parts of an input are cut off too", "leave __call__ to Rule"),
    (Renames, "the networks own names are kept", "keep what is added on the rule"),
])
def test_what_is_broken_is_named_and_how_to_mend_it(rule, check, words):
    single = {str(check): check for check in nw.contracts.checks("rule")}[check]
    with pytest.raises(BrokenContract, match=words) as broken:
        single(rule)
    assert str(broken.value).startswith(f"{rule.__name__}: {check}: expected ")
    assert "\n" not in str(broken.value)
    with pytest.raises(BrokenContract):
        nw.contracts.check_rule(rule)


def test_a_rule_of_ones_own_is_held_on_a_network_of_ones_own():
    class Own(Backprop):
        def __init__(self, network, *, factor):
            super().__init__(network, loss=lambda h, y: factor * cross_entropy(h, y))

    def network():
        return nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))

    def batch():
        return torch.randn(9, 8), torch.arange(9) % 3
    with pytest.raises(BrokenContract, match="missing 1 required keyword-only argument: 'factor'"):
        nw.contracts.check_rule(Own, network=network, batch=batch)
    with pytest.raises(BrokenContract, match="labels that are none"):  # its loss is not ours
        nw.contracts.check_rule(Own, arguments={"factor": 2.0}, network=network, batch=batch)
    nw.contracts.check_rule(Backprop, network=network, batch=batch)


def test_nothing_random_changes_outside():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    nw.contracts.check_rule(Backprop)
    assert torch.equal(torch.rand(4), expected)


def test_names_that_are_none():
    with pytest.raises(UnknownName, match="rule"):
        nw.contracts.checks("ruel")
    with pytest.raises(UnknownName, match="variant"):
        nw.contracts.checks("rule")[0](nw.rules.MonoForward, variant="sumed")
