from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import netwright as nw
from netwright.blocks.feedforward import Neuron, Step
from netwright.errors import UnknownName
from netwright.rules import Backprop, DeltaRule

X = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
AND, OR, XOR = (torch.tensor(t) for t in ([0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0],
                                          [0.0, 1.0, 1.0, 0.0]))


def data(units=3, seed=0):
    torch.manual_seed(seed)
    return torch.randn(7, 5, dtype=torch.double), torch.rand(7, units, dtype=torch.double)


def grads(network):
    return [p.grad for p in network.parameters()]


def test_it_is_the_rule_as_it_is_taught():
    torch.manual_seed(0)
    neuron = Neuron(2)
    w, b = neuron[0].weight.detach().clone()[0], neuron[0].bias.detach().clone()[0]
    rule = DeltaRule(neuron)
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.3)
    for x, t in [*zip(X, XOR, strict=True)] * 3:
        optimizer.zero_grad()
        rule(x[None], t[None])
        optimizer.step()
        a = 1.0 if w @ x + b >= 0 else 0.0
        w, b = w + 0.3 * (t - a) * x, b + 0.3 * (t - a)
        torch.testing.assert_close(neuron[0].weight[0], w)
        torch.testing.assert_close(neuron[0].bias[0], b)


@pytest.mark.parametrize(("activation", "loss"), [
    ("identity", lambda z, t: (z - t).square().sum(1).mean() / 2),
    ("sigmoid", lambda z, t: binary_cross_entropy_with_logits(z, t, reduction="none").sum(1).mean())
])
def test_it_is_the_gradient_of_these_losses(activation, loss):
    x, t = data()
    neuron = Neuron(5, activation, units=3).double()
    DeltaRule(neuron)(x, t)
    plain = deepcopy(neuron)
    plain.zero_grad()
    loss(plain[0](x), t).backward()
    for mine, exact in zip(grads(neuron), grads(plain), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)


def test_class_numbers_and_labels_that_do_not_count():
    x, _ = data()
    y = torch.tensor([0, 1, 2, -100, 1, -100, 0])
    one, other = Neuron(5, "sigmoid", units=3).double(), Neuron(5, "sigmoid", units=3).double()
    other.load_state_dict(one.state_dict())
    loss = DeltaRule(one)(x, y)
    kept = y >= 0
    again = DeltaRule(other)(x[kept], nn.functional.one_hot(y[kept], 3).double())
    torch.testing.assert_close(loss, again)
    for a, b in zip(grads(one), grads(other), strict=True):
        torch.testing.assert_close(a, b)
    DeltaRule(one)(x, y)  # a second call adds up
    torch.testing.assert_close(one[0].weight.grad, 2 * other[0].weight.grad)


@pytest.mark.parametrize("seed", range(5))
def test_one_neuron_solves_and_and_or_but_not_xor(seed):
    right = {}
    for name, t in (("and", AND), ("or", OR), ("xor", XOR)):
        torch.manual_seed(seed)
        rule = DeltaRule(Neuron(2))
        optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
        for _ in range(60):
            for i in range(4):
                optimizer.zero_grad()
                rule(X[i:i + 1], t[i:i + 1])
                optimizer.step()
        right[name] = float((rule.predict(X)[:, 0] == t).float().mean())
    assert right["and"] == right["or"] == 1
    assert right["xor"] <= 0.75


def test_backpropagation_has_nothing_to_go_by_where_a_neuron_steps():
    """The control: the same neuron without the rule."""
    neuron = nn.Sequential(Neuron(2))
    with pytest.raises(ValueError, match="no trainable parameters"):
        Backprop(neuron, loss=lambda a, t: (a[:, 0] - t).square().mean())(X, AND)


def test_it_keeps_what_every_rule_keeps_to():
    x, _ = data()
    x, y = x.float(), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    neuron = Neuron(5, "sigmoid", units=3)
    rule = DeltaRule(neuron, x)
    before = deepcopy(rule.state_dict())
    assert list(before) == ["network.0.weight", "network.0.bias"]
    loss = rule(x, y)
    assert loss.shape == ()
    assert not loss.requires_grad
    assert all(torch.equal(before[name], value) for name, value in rule.state_dict().items())
    assert rule.predict(x).shape == (7, 3)
    fresh = DeltaRule(Neuron(5, "sigmoid", units=3))
    fresh.load_state_dict(rule.state_dict())
    assert torch.equal(fresh.predict(x), rule.predict(x))
    copy = deepcopy(rule)
    copy(x, y)
    assert copy.network[0].weight.grad is not neuron[0].weight.grad
    neuron.zero_grad()
    neuron[0].bias.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert rule(x, y).isfinite()
    assert neuron[0].bias.grad is None
    assert neuron[0].weight.grad.dtype == torch.float32
    rule.bfloat16()
    neuron.zero_grad()
    assert rule(x.bfloat16(), y).isfinite()
    bare = nn.Linear(5, 3, bias=False)
    DeltaRule(bare)(x, y)
    assert bare.weight.grad.any()
    maps = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    DeltaRule(maps)(torch.ones(7, 2, 3), y)
    assert maps[1].weight.grad.any()
    torch.manual_seed(0)
    history = nw.fit(DeltaRule(Neuron(5, "sigmoid", units=3)), [(x, y)] * 20, epochs=5,
                     optimizer=lambda p: torch.optim.SGD(p, 1.0))
    assert history.epochs[-1].loss < history.epochs[0].loss


def test_the_step():
    z = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.bfloat16)
    assert torch.equal(Step()(z), torch.tensor([0.0, 1.0, 1.0], dtype=torch.bfloat16))


def test_what_cannot_be_is_refused():
    x = torch.zeros(2, 5)
    for make, says in [
        (lambda: Neuron(0), "in_features must be at least 1"),
        (lambda: Neuron(2, units=0), "units must be at least 1"),
        (lambda: DeltaRule(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))), "2 linear layers"),
        (lambda: DeltaRule(nn.Sequential(nn.Linear(2, 2), nn.PReLU())), "1 others"),
        (lambda: DeltaRule(Neuron(5))(x, torch.zeros(3)), r"y must be \(2,\) or \(2, 1\)"),
        (lambda: DeltaRule(Neuron(5, units=3))(x, torch.tensor([0, 3])), "between 0 and 2"),
        (lambda: DeltaRule(Neuron(5, units=3))(x, torch.zeros(2)), "int64"),
        (lambda: DeltaRule(Neuron(5))(x[None], torch.zeros(1)), "network must return"),
    ]:
        with pytest.raises(ValueError, match=says):
            make()
    with pytest.raises(UnknownName, match="tanh"):
        Neuron(2, "tan")
