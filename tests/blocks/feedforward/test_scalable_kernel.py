import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from netwright.blocks.feedforward import SNNK, RandomFeatures, Sine, bundle, solve_ridge
from netwright.errors import NothingToReshape, UnknownName

FUNCTIONS = {
    "sin": torch.sin, "cos": torch.cos,
    "series": lambda z: 0.5 * torch.sin(2 * z) + 0.3 * torch.cos(z) - 0.2}
SERIES = ([2.0, -1.0, 0.0], [-0.5j, 0.3, -0.2])


def made(function, n, seed, scale=1.0):
    return RandomFeatures(5, n, SERIES if function == "series" else function, scale=scale,
                          generator=torch.Generator().manual_seed(seed)).double()


def data(norm=0.6):
    torch.manual_seed(0)
    x, w = torch.randn(7, 5).double(), torch.randn(4, 5).double()
    x, w = (norm * t / t.norm(dim=1, keepdim=True) for t in (x, w))
    return x, w, torch.randn(4).double()


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_product_is_the_layer_on_average(function, scale):
    x, w, b = data()
    exact = FUNCTIONS[function](x @ w.T + b)
    draws = torch.stack([f(x) @ f.of_weights(w, b).T
                         for f in (made(function, 4000, seed, scale) for seed in range(40))])
    error = draws.std(0) / len(draws) ** 0.5
    # No more than 4 of its own standard errors off, and those are small.
    assert ((draws.mean(0) - exact).abs() < 4 * error).all()
    assert error.max() < 0.02


def test_relu_features_are_the_arc_cosine_kernel_on_average():
    x, w, b = data(2.0)
    u = torch.cat([x, torch.ones(7, 1)], 1)
    v = torch.cat([w, b[:, None]], 1)
    norms = u.norm(dim=1)[:, None] * v.norm(dim=1)
    angle = (u @ v.T / norms).acos()
    exact = norms * (angle.sin() + (math.pi - angle) * angle.cos()) / (2 * math.pi)
    for scale in (1.0, 3.0):
        draws = torch.stack([f(x) @ f.of_weights(w, b).T
                             for f in (made("relu", 4000, seed, scale) for seed in range(40))])
        error = draws.std(0) / len(draws) ** 0.5
        assert ((draws.mean(0) - exact).abs() < 4 * error).all()
        assert error.max() < 0.05


@pytest.mark.parametrize("function", ["sin", "relu"])
def test_the_error_falls_with_the_root_of_the_number_of_features(function):
    x, w, b = data()

    def deviation(n):
        return torch.stack([f(x) @ f.of_weights(w, b).T for f in (
            made(function, n, seed) for seed in range(60))]).std(0).mean()

    # Measured: 3.9 and 4.1.
    assert 3 < deviation(64) / deviation(1024) < 5.5


def test_snnk_starts_as_the_layer_and_trains():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    snnk = SNNK(5, 3, 20_000, layer=layer, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 4, 5) / 3
    # Measured: 0.02.
    assert (snnk(x) - layer(x).sin()).abs().max() < 0.1
    small = SNNK(64, 32, 16)
    assert sum(p.numel() for p in small.parameters()) == 32 * 16
    assert small(torch.zeros(0, 64)).shape == (0, 32)
    other = SNNK(64, 32, 16)
    other.load_state_dict(small.state_dict())
    x = torch.randn(6, 64) / 8
    assert torch.equal(other(x), small(x))
    assert torch.equal(deepcopy(small)(x), small(x))
    small(x).sum().backward()
    assert small.weight.grad.isfinite().all()
    assert small.weight.grad.any()
    assert SNNK(8, 4, 6).bfloat16()(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert small(x).isfinite().all()


def mlp(act):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), act(), nn.Linear(12, 10), act(), nn.Linear(10, 3))


def test_bundling_puts_the_weights_into_one_another():
    network = mlp(nn.ReLU).double()
    before = deepcopy(network.state_dict())
    bundled = bundle(network, 6, generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, 4).double()
    first, second, _last = bundled
    one = SNNK(4, 12, 6, "relu", layer=network[0])
    one.features, one.weight = first, nn.Parameter(first.of_weights(
        network[0].weight, network[0].bias))
    # The second layer reads the first one's output through its weights.
    reads = network[2].weight @ one.weight
    expected = second(first(x)) @ second.of_weights(reads, network[2].bias).T
    expected = network[4](expected)
    torch.testing.assert_close(bundled(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network[2].weight @ one(x).T, reads @ first(x).T)
    assert sum(p.numel() for p in bundled.parameters()) == 6 * 3 + 3
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_a_bundled_sine_layer_comes_near_the_network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 12), Sine(), nn.Linear(12, 3))
    x = 2 * torch.randn(50, 4)
    apart = {}
    for example in (None, x):
        for n in (100, 10_000):
            bundled = bundle(network, n, example, generator=torch.Generator().manual_seed(0))
            apart[example is None, n] = float(
                (bundled(x) - network(x)).detach().square().mean().sqrt())
    assert apart[False, 10_000] < 0.3 * apart[False, 100]
    assert apart[False, 10_000] < 0.5 * apart[True, 10_000]  # norms that are balanced


@pytest.mark.parametrize("bias", [True, False])
def test_the_closed_form_is_the_least_squares_optimum(bias):
    torch.manual_seed(0)
    network = nn.Sequential(RandomFeatures(4, 12, "relu"), nn.Linear(12, 2, bias=bias)).double()
    x, y = torch.randn(40, 4).double(), torch.randn(40, 2).double()
    solved = solve_ridge(network, x, y, penalty=0.01)
    loss = (solved(x) - y).square().sum() / 40 + 0.01 * solved[1].weight.square().sum()
    for gradient in torch.autograd.grad(loss, list(solved.parameters())):
        assert gradient.abs().max() < 1e-12
    assert not torch.equal(network[1].weight, solved[1].weight)


def test_what_cannot_be_is_refused():
    x = torch.zeros(3, 4)
    network = nn.Sequential(nn.Linear(4, 2))
    for make, says in [
        (lambda: RandomFeatures(0, 4), "at least 1"),
        (lambda: RandomFeatures(4, 5), "n_features must be even"),
        (lambda: RandomFeatures(4, 4, scale=0.0), "scale must be above 0"),
        (lambda: RandomFeatures(4, 4, ([1.0], [])), "as many frequencies"),
        (lambda: RandomFeatures(4, 4)(torch.zeros(2, 3)), r"x must be \(\*, 4\)"),
        (lambda: RandomFeatures(4, 4).of_weights(torch.zeros(2, 3)), "weight must be"),
        (lambda: SNNK(4, 0, 4), "dim_out must be at least 1"),
        (lambda: SNNK(4, 4, 4, layer=nn.Linear(3, 4)), "layer must be"),
        (lambda: solve_ridge(nn.Sequential(nn.ReLU()), x, x), "end in a linear layer"),
        (lambda: solve_ridge(network, x, torch.zeros(3).long()), "y must be"),
        (lambda: solve_ridge(network, x, torch.zeros(3, 2), penalty=0.0), "penalty must be"),
    ]:
        with pytest.raises(ValueError, match=says):
            make()
    with pytest.raises(UnknownName, match="relu"):
        RandomFeatures(4, 4, "rel")
    for bad in (nn.Sequential(), network, nn.Sequential(nn.Linear(4, 4), nn.Tanh(),
                                                        nn.Linear(4, 2))):
        with pytest.raises(NothingToReshape, match="mlp must be"):
            bundle(bad, 4)
