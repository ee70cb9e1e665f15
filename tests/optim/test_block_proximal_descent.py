from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, nnls
from torch import nn
from torch.nn import Parameter

from netwright.errors import UnknownName
from netwright.optim import BlockProximalDescent, stationarity_gap


def factors(seed=0, shape=(6, 5, 4), rank=2):
    generator = torch.Generator().manual_seed(seed)
    true = [torch.rand(n, rank, generator=generator).double() for n in shape]
    noise = 0.05 * torch.rand(shape, generator=generator).double()
    start = [Parameter(torch.rand(n, rank, generator=generator).double()) for n in shape]
    return torch.einsum("ir,jr,kr->ijk", *true) + noise, start


def cp_loss(tensor, parts):
    return lambda: (tensor - torch.einsum("ir,jr,kr->ijk", *parts)).square().sum() / 2


def test_each_block_is_the_nonnegative_least_squares_solution():
    tensor, parts = factors()
    before = [p.detach().clone() for p in parts]
    BlockProximalDescent(parts, constraint="nonnegative", prox_weight=0.3,
                         tolerance=1e-9, inner_steps=5000).step(cp_loss(tensor, parts))
    # The first block alone, by scipy: its rows are solved for one by one.
    design = torch.einsum("jr,kr->jkr", *before[1:]).reshape(-1, 2).numpy()
    stacked = np.vstack([design, 0.3 ** 0.5 * np.eye(2)])
    for row, target, start in zip(parts[0].detach(), tensor.flatten(1), before[0], strict=True):
        wanted, _ = nnls(stacked, np.concatenate([target, 0.3 ** 0.5 * start]))
        np.testing.assert_allclose(row.numpy(), wanted, atol=1e-7)


@pytest.mark.parametrize("tolerance", [1e-8, 1.0])
def test_the_loss_falls_and_the_squared_gap_as_one_over_k(tolerance):
    for seed in range(2):
        tensor, parts = factors(seed)
        loss = cp_loss(tensor, parts)
        optimizer = BlockProximalDescent(parts, constraint="nonnegative", tolerance=tolerance,
                                         prox_weight=0.1, inner_steps=300)
        losses, gaps = [], []
        for _ in range(40):
            losses.append(float(optimizer.step(loss)))
            gaps.append(stationarity_gap(loss, parts, constraint="nonnegative"))
        assert all(b <= a + 1e-12 for a, b in pairwise(losses))
        best = np.minimum.accumulate(gaps)
        assert best[-1] ** 2 < best[4] ** 2 * 5 / 40
        assert all((p >= 0).all() for p in parts)


def test_the_gap_is_the_largest_first_order_fall():
    generator = torch.Generator().manual_seed(0)
    x = Parameter(torch.rand(4, generator=generator).double())
    with torch.no_grad():
        x[0] = 0
    c = torch.tensor([1.0, -2.0, 0.3, 1.5]).double()
    def loss():
        return c @ x
    torch.testing.assert_close(stationarity_gap(loss, [x]), float(c.norm()))
    gap = stationarity_gap(loss, [x], constraint="nonnegative")
    at, fall = x.detach().numpy(), c.numpy()
    best = minimize(lambda d: fall @ d, np.zeros(4), bounds=[(-low, None) for low in at],
                    constraints={"type": "ineq", "fun": lambda d: 1 - d @ d}, tol=1e-12)
    assert gap == pytest.approx(-best.fun, abs=1e-6)
    assert gap < float(c.norm()) - 0.1
    assert stationarity_gap(lambda: x.sum() * 0, [x]) == 0
    corner = Parameter(torch.zeros(3))
    assert stationarity_gap(lambda: corner.sum(), [corner], constraint="nonnegative") == 0
    both = Parameter(torch.ones(2))
    assert stationarity_gap(lambda: both.sum() + corner.sum(), [both, corner],
                            constraint={corner: "nonnegative"}) == pytest.approx(2 ** 0.5)


def test_simplex_and_functions_as_constraints():
    rows = Parameter(torch.randn(50, 4).double())
    BlockProximalDescent([rows], constraint="simplex")
    torch.testing.assert_close(rows.detach().sum(1), torch.ones(50).double())
    assert (rows >= 0).all()
    x, goal = Parameter(torch.zeros(3).double()), torch.tensor([2.0, 0.5, 0.1]).double()
    optimizer = BlockProximalDescent([x], constraint="simplex", prox_weight=0.1, tolerance=1e-9)
    for _ in range(100):
        optimizer.step(lambda: (x - goal).square().sum())
    # the nearest point of the simplex to (2, .5, .1) is its first corner
    torch.testing.assert_close(x.detach(), torch.tensor([1.0, 0, 0]).double(), atol=1e-6, rtol=0)
    ball = Parameter(torch.zeros(3).double())
    optimizer = BlockProximalDescent(
        [{"params": [ball], "constraint": lambda v: v / v.norm().clamp_min(1)}], prox_weight=0.1,
        tolerance=1e-9)
    for _ in range(100):
        optimizer.step(lambda: (ball - goal).square().sum())
    torch.testing.assert_close(ball.detach(), goal / goal.norm(), atol=1e-6, rtol=0)


def test_a_solver_of_ones_own_gives_what_the_inner_steps_give():
    A, b = torch.randn(20, 4).double(), torch.randn(20).double()
    inner, own = (Parameter(torch.ones(4).double()) for _ in range(2))
    def solve(p, weight):
        return torch.linalg.solve(A.T @ A + weight * torch.eye(4), A.T @ b + weight * p)
    first = BlockProximalDescent([inner], prox_weight=2.0, tolerance=1e-10)
    second = BlockProximalDescent([{"params": [own], "solve": solve}], prox_weight=2.0)
    for _ in range(3):
        first.step(lambda: (A @ inner - b).square().sum() / 2)
        second.step(lambda: (A @ own - b).square().sum() / 2)
    torch.testing.assert_close(inner, own)


def test_trains_a_module_and_leaves_what_is_frozen():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    network[0].bias.requires_grad_(False)
    before = network[0].bias.clone()
    x, y = torch.randn(40, 5), torch.randint(3, (40,))
    optimizer = BlockProximalDescent(network.parameters(), prox_weight=0.1, inner_steps=5)
    losses = [float(optimizer.step(lambda: nn.functional.cross_entropy(network(x), y)))
              for _ in range(30)]
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(network[0].bias, before)


def test_errors():
    x = Parameter(torch.ones(3))
    with pytest.raises(UnknownName, match="did you mean nonnegative"):
        BlockProximalDescent([x], constraint="nonnegativ")
    with pytest.raises(ValueError, match="prox_weight must be at least 0, got -1"):
        BlockProximalDescent([x], prox_weight=-1)
    with pytest.raises(ValueError, match="inner_steps must be at least 1, got 0"):
        BlockProximalDescent([x], inner_steps=0)
    optimizer = BlockProximalDescent([x])
    with pytest.raises(ValueError, match="closure must be a function"):
        optimizer.step()
    with pytest.raises(ArithmeticError, match="the loss is not finite near this point"):
        optimizer.step(lambda: x.sum() * float("nan"))
    assert torch.equal(x.detach(), torch.ones(3))
