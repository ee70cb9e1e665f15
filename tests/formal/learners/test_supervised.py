"""Training as a composite of lenses: the same steps as torch.optim's."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils._pytree import tree_leaves, tree_map

from netwright.formal.learners import (
    Lens,
    ParaLens,
    boolean_rate,
    exclusive_or,
    learning_rate,
    model,
    mse,
    optimisers,
    softmax_cross_entropy,
    supervised,
)

X, Y = torch.randn(20, 6), torch.arange(20) % 3
CASES = {
    "descent": (None, 0.1, lambda p: torch.optim.SGD(p, 0.1)),
    "momentum": (optimisers.momentum(0.9), 0.05, lambda p: torch.optim.SGD(p, 0.05, 0.9)),
    "nesterov": (optimisers.nesterov(0.9), 0.05,
                 lambda p: torch.optim.SGD(p, 0.05, 0.9, nesterov=True)),
    "adagrad": (optimisers.adagrad(0.1), 1.0, lambda p: torch.optim.Adagrad(p, 0.1)),
    "adam": (optimisers.adam(0.01), 1.0, lambda p: torch.optim.Adam(p, 0.01)),
    "adam, other options": (optimisers.adam(0.01, betas=(0.5, 0.9), epsilon=1e-3), 1.0,
                            lambda p: torch.optim.Adam(p, 0.01, (0.5, 0.9), 1e-3)),
}


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_those_of_torch_optim(name, dtype):
    optimiser, rate, build = CASES[name]
    network = mlp().to(dtype)
    theirs = deepcopy(network)
    stepper = build(theirs.parameters())
    net = supervised(*model(network), loss=softmax_cross_entropy, rate=learning_rate(rate),
                     optimiser=optimiser)
    chosen = optimiser or optimisers.ascent()
    for _ in range(10):
        net = net.step(X.to(dtype), Y)
        stepper.zero_grad()
        cross_entropy(theirs(X.to(dtype)), Y).backward()
        stepper.step()
    where = chosen.lens.get(net.params)  # torch's weights are where Nesterov's gradient is taken
    for ours, expected in zip(tree_leaves(where), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, expected.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(net(X.to(dtype)), theirs(X.to(dtype)).detach(), rtol=0, atol=1e-5)


def test_the_square_is_torchs():
    network = mlp().double()
    params, lens = model(network)
    a, y = X.double(), torch.randn(20, 3).double()
    after = supervised(params, lens, loss=mse, rate=learning_rate(0.5)).step(a, y)
    slopes = torch.autograd.grad(mse_loss(network(a), y), list(network.parameters()))
    for p, slope, got in zip(network.parameters(), slopes, tree_leaves(after.params[1]),
                             strict=True):
        torch.testing.assert_close(got, (p - 0.5 * slope).detach())


def test_layers_compose_to_the_network():
    network = mlp().double()
    layers = [model(part) for part in network]
    params = ((layers[0][0], layers[1][0]), layers[2][0])
    composed = layers[0][1] >> layers[1][1] >> layers[2][1]
    options = {"loss": softmax_cross_entropy, "rate": learning_rate(1.0),
               "optimiser": optimisers.adam()}
    ours, whole = supervised(params, composed, **options), supervised(*model(network), **options)
    for _ in range(3):
        ours, whole = ours.step(X.double(), Y), whole.step(X.double(), Y)
    for mine, theirs in zip(tree_leaves(ours.params[1]), tree_leaves(whole.params[1]), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_request_is_the_input_after_the_same_step():
    network = mlp().double()
    net = supervised(*model(network), loss=softmax_cross_entropy, rate=learning_rate(0.5))
    a = X.double().requires_grad_()
    (slope,) = torch.autograd.grad(cross_entropy(network(a), Y), a)
    torch.testing.assert_close(net.request(net.params, X.double(), Y), (a - 0.5 * slope).detach())


def test_the_same_code_trains_a_boolean_circuit():
    """The table of a function of two bits: f(p, a) = p[a]; its bit at a is turned if wrong."""
    def put(p, a, change):
        return torch.zeros_like(p).index_put((a,), change), torch.zeros_like(a)

    table = ParaLens(lambda p, a: p[a], put)
    for bits in range(16):
        truth = torch.tensor([bool(bits >> i & 1) for i in range(4)])
        net = supervised(torch.zeros(4, dtype=torch.bool), table, loss=exclusive_or,
                         rate=boolean_rate, optimiser=optimisers.exclusive_or_ascent())
        for i in range(4):
            net = net.step(torch.tensor([i]), truth[i:i + 1])
        assert torch.equal(net(torch.arange(4)), truth)


def test_lenses_compose_and_keep_their_laws():
    first = Lens(lambda s: s[0], lambda s, b: (b, s[1]))
    second = Lens(lambda s: s[1], lambda s, b: (s[0], b))
    s = ((1, 2), (3, 4))
    for lens in (first, second, first >> second, second >> first):
        assert lens.put(s, lens.get(s)) == s
        assert lens.get(lens.put(s, "new")) == "new"
        assert lens.put(lens.put(s, "old"), "new") == lens.put(s, "new")
    both = first @ second
    assert both.get((s, s)) == ((1, 2), (3, 4))
    assert both.put((s, s), (7, 8)) == ((7, (3, 4)), ((1, 2), 8))
    left, right = (first >> second) >> first, first >> (second >> first)
    deep = ((0, (5, 6)), 1)
    assert left.put(deep, 9) == right.put(deep, 9) == ((0, (9, 6)), 1)


def test_parametric_lenses_beside_each_other():
    (p, f), (q, g) = model(nn.Linear(6, 2)), model(nn.Linear(3, 4))
    both = f @ g
    a = X, torch.randn(5, 3)
    b = both.get((p, q), a)
    (dp, dq), (da, dc) = both.put((p, q), a, tree_map(torch.ones_like, b))
    for ours, lens, params, x in ((dp, f, p, a[0]), (dq, g, q, a[1])):
        alone, _ = lens.put(params, x, torch.ones_like(lens.get(params, x)))
        assert all(torch.equal(ours[name], alone[name]) for name in alone)
    assert (da.shape, dc.shape) == (a[0].shape, a[1].shape)


def test_errors():
    with pytest.raises(ValueError, match="rate must be above 0, got -1"):
        learning_rate(-1)
    with pytest.raises(ValueError, match="gamma must be at least 0 and below 1, got 1"):
        optimisers.momentum(1.0)
    with pytest.raises(ValueError, match=r"betas\[1\] must be at least 0 and below 1, got 1.5"):
        optimisers.adam(betas=(0.9, 1.5))
    with pytest.raises(ValueError, match="put is missing"):
        Lens(lambda a: a)
    for composed in (lambda: Lens(id, id) >> 3, lambda: Lens(id, id) @ 3, lambda: mse >> 3,
                     lambda: mse @ 3):
        with pytest.raises(TypeError, match="unsupported operand"):
            composed()
    net = supervised(*model(mlp()), loss=softmax_cross_entropy, rate=learning_rate(1.0))
    with pytest.raises(ValueError, match="params must be a pair"):
        net.implement({}, X)
