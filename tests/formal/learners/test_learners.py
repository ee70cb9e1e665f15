"""The laws of learners: they compose as backpropagation does."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from netwright.formal.learners import (
    Learner,
    ParaLens,
    cross_entropy_error,
    identity,
    learner,
    squared_error,
)

A, B = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)


def layer(inputs, outputs, activation=nn.Tanh):
    return nn.Sequential(nn.Linear(inputs, outputs), activation()).double()


def assert_alike(f, g, a, b):
    """Two learners give the same output, new parameters and request."""
    ours = [f(a), f.update(f.params, a, b), f.request(f.params, a, b)]
    theirs = [g(a), g.update(g.params, a, b), g.request(g.params, a, b)]
    for one, other in zip(ours, theirs, strict=True):
        assert len(tree_leaves(one)) == len(tree_leaves(other))
        for x, y in zip(tree_leaves(one), tree_leaves(other), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("error", [squared_error, cross_entropy_error])
def test_a_composite_updates_as_backpropagation_through_both(error):
    first, second = layer(4, 5), layer(5, 3)
    both = learner(first, error=error, rate=0.3) >> learner(second, error=error, rate=0.3)
    whole = learner(nn.Sequential(first, second), error=error, rate=0.3)
    assert_alike(both, whole, A, B)


def test_it_is_the_step_that_autograd_gives():
    net = nn.Sequential(layer(4, 8), layer(8, 5), nn.Linear(5, 3).double())
    composed = learner(net[0]) >> learner(net[1]) >> learner(net[2])
    a = A.clone().requires_grad_()
    error = (net(a) - B).square().sum() / 2
    *slopes, at_input = torch.autograd.grad(error, [*net.parameters(), a])
    after = composed.step(A, B)
    for p, slope, got in zip(net.parameters(), slopes, tree_leaves(after.params), strict=True):
        torch.testing.assert_close(got, (p - 0.1 * slope).detach())
    torch.testing.assert_close(composed.request(composed.params, A, B), A - at_input)


def test_a_last_layer_may_learn_by_the_cross_entropy():
    net = nn.Sequential(layer(4, 8), nn.Linear(8, 3).double())
    composed = learner(net[0]) >> learner(net[1], error=cross_entropy_error,
                                          request_error=squared_error)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    slopes = torch.autograd.grad(nn.functional.cross_entropy(net(A), y, reduction="sum"),
                                 list(net.parameters()))
    after = composed.step(A, torch.eye(3).double()[y])
    for p, slope, got in zip(net.parameters(), slopes, tree_leaves(after.params), strict=True):
        torch.testing.assert_close(got, (p - 0.1 * slope).detach())


def test_composition_is_associative_and_has_an_identity():
    f, g, h = learner(layer(4, 5)), learner(layer(5, 6)), learner(layer(6, 3))
    assert_alike((f >> g) >> h, f >> (g >> h), A, B)
    fg = f >> g >> h
    assert_alike(identity() >> fg, fg, A, B)
    assert_alike(fg >> identity(), fg, A, B)


def test_an_identity_network_is_the_identity():
    ours, a = learner(nn.Identity()), A
    torch.testing.assert_close(ours.request(ours.params, a, a + 1), a + 1)
    assert ours.update(ours.params, a, a + 1) == {}


def test_one_beside_the_other_then_two_more_is_two_chains_beside_each_other():
    f, g = learner(layer(4, 5)), learner(layer(2, 6))
    h, k = learner(layer(5, 3)), learner(layer(6, 2))
    a, b = (A, torch.randn(3, 2).double()), (B, torch.randn(3, 2).double())
    one, other = (f @ g) >> (h @ k), (f >> h) @ (g >> k)
    (p, q), (r, s) = one.update(one.params, a, b)
    (p2, r2), (q2, s2) = other.update(other.params, a, b)
    for x, y in zip(tree_leaves([one(a), one.request(one.params, a, b), p, q, r, s]),
                    tree_leaves([other(a), other.request(other.params, a, b), p2, q2, r2, s2]),
                    strict=True):
        torch.testing.assert_close(x, y)


def test_each_runs_once_however_they_are_nested():
    runs = []

    class Counted(nn.Linear):
        def forward(self, h):
            runs.append(1)
            return super().forward(h)

    f = [learner(Counted(3, 3)) for _ in range(4)]
    a = torch.randn(2, 3)
    for chain in (f[0] >> f[1] >> f[2] >> f[3], f[0] >> (f[1] >> (f[2] >> f[3]))):
        runs.clear()
        chain.step(a, a)
        assert len(runs) == 4


def test_what_was_given_stays_as_it_was():
    module = layer(4, 3)
    module[0].bias.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    net = learner(module)
    a, params = A.clone(), {name: p.clone() for name, p in net.params.items()}
    after = net.step(A, B)
    assert set(net.params) == {"0.weight"}
    assert all(torch.equal(net.params[name], p) for name, p in params.items())
    assert not torch.equal(after.params["0.weight"], params["0.weight"])
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert torch.equal(A, a)
    assert all(p.grad is None for p in module.parameters())
    module.load_state_dict(after.params, strict=False)
    torch.testing.assert_close(module(A).detach(), after(A))


def test_tokens_are_asked_for_as_they_are():
    net = learner(nn.Embedding(5, 4)) >> learner(nn.Linear(4, 3))
    a = torch.tensor([0, 3, 3])
    assert torch.equal(net.request(net.params, a, torch.randn(3, 3)), a)
    moved = net.step(a, torch.randn(3, 3)).params[0]["weight"] != net.params[0]["weight"]
    assert moved.any(1).tolist() == [True, False, False, True, False]


def test_normalisation_by_the_batch_is_differentiated():
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False),
                           nn.Linear(5, 3)).double()
    after = learner(module).step(A, B)
    slopes = torch.autograd.grad((module(A) - B).square().sum() / 2, list(module.parameters()))
    for p, slope, got in zip(module.parameters(), slopes, tree_leaves(after.params), strict=True):
        torch.testing.assert_close(got, (p - 0.1 * slope).detach())


def test_it_works_where_gradients_are_off():
    net = learner(layer(4, 3))
    with torch.no_grad():
        after = net.step(A, B)
    assert all(map(torch.equal, tree_leaves(after.params), tree_leaves(net.step(A, B).params)))
    assert not net(A).requires_grad


def test_learners_of_ones_own_compose_with_those_of_networks():
    table = Learner(torch.zeros(3, 4).double(), lambda p, a: p[a],
                    lambda p, a, b: p.index_copy(0, a, b), lambda p, a, b: a)
    net = table >> learner(layer(4, 3))
    a = torch.tensor([0, 2])
    rows = net.step(a, B[:2]).params[0]
    assert rows.any(1).tolist() == [True, False, True]


class Named(nn.Module):
    def forward(self, h):
        return {"h": h}


def test_errors():
    with pytest.raises(ValueError, match="rate must be above 0, got 0"):
        learner(nn.Linear(2, 2), rate=0)
    with pytest.raises(ValueError, match=r"module must be an nn\.Module, got function"):
        learner(lambda a: a)
    with pytest.raises(ValueError, match="1 must not change while it runs, got a BatchNorm1d"):
        learner(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    net = learner(layer(4, 3))
    with pytest.raises(ValueError, match=r"output's shape \(6, 3\), got \(6,\).*one_hot"):
        net.step(A, torch.zeros(6))
    with pytest.raises(ValueError, match=r"b must hold numbers .* torch\.int64"):
        net.step(A, torch.zeros(6, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="the network returned dict"):
        learner(Named()).step(A, B)
    with pytest.raises(ValueError, match=r"a must be a pair.*got Tensor"):
        (net @ net)(A)
    with pytest.raises(ValueError, match=r"a must be a pair.*got 3 parts"):
        (net @ net)((A, A, A))
    with pytest.raises(TypeError, match="unsupported operand"):
        net >> nn.Linear(3, 3)
    with pytest.raises(TypeError, match="unsupported operand"):
        net @ 3
    with pytest.raises(ValueError, match="put is missing"):
        ParaLens(lambda p, a: a)
