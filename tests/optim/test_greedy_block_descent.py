from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import nn
from torch.nn import Parameter

from netwright.errors import UnknownName
from netwright.optim import GreedyBlockDescent

RULES = ["random", "cyclic", "gauss_southwell", "gauss_southwell_lipschitz",
         "gauss_southwell_diagonal", "gauss_southwell_quadratic"]


class Logistic:
    """Logistic regression with columns of unequal scale, an L2 penalty and a bound of its own."""

    def __init__(self, seed=0, n=60, d=12):
        generator = torch.Generator().manual_seed(seed)
        scale = torch.rand(d, generator=generator).double() * 3 + 0.2
        self.A = torch.randn(n, d, generator=generator).double() * scale
        self.y = torch.randint(2, (n,), generator=generator).double() * 2 - 1
        self.x = Parameter(torch.randn(d, generator=generator).double())
        self.bound = self.A.T @ self.A / 4 + torch.eye(d).double()

    def __call__(self):
        return nn.functional.softplus(-self.y * (self.A @ self.x)).sum() + self.x @ self.x / 2

    def gradient(self):
        return torch.autograd.grad(self(), self.x)[0]


def blocks(d=12, size=3):
    return torch.arange(d).split(size)


def promised(problem, g, block, kind):
    """What the block's step must lower the loss by, from the paper's two bounds."""
    H = problem.bound[block][:, block]
    if kind == "matrix":
        return 0.5 * g[block] @ torch.linalg.solve(H, g[block])
    return 0.5 * g[block].square().sum() / torch.linalg.eigvalsh(H)[-1]


@pytest.mark.parametrize("update", ["gradient", "matrix"])
@pytest.mark.parametrize("select", RULES)
def test_every_step_keeps_its_promise(select, update):
    problem = Logistic()
    optimizer = GreedyBlockDescent([problem.x], blocks=3, select=select, update=update,
                                   bound=problem.bound)
    for _ in range(10):
        g, before = problem.gradient(), problem.x.detach().clone()
        f = optimizer.step(problem)
        block = optimizer.last_block
        wanted = (torch.linalg.solve(problem.bound[block][:, block], g[block])
                  if update == "matrix" else
                  g[block] / torch.linalg.eigvalsh(problem.bound[block][:, block])[-1])
        torch.testing.assert_close(before[block] - problem.x.detach()[block], wanted)
        others = [i for i in range(12) if i not in block.tolist()]
        assert torch.equal(problem.x.detach()[others], before[others])
        assert problem() <= f - promised(problem, g, block, update) + 1e-12


def test_rules_choose_the_block_of_the_largest_measure():
    problem = Logistic()
    g = problem.gradient()
    measures = {
        "gauss_southwell": lambda b: g[b].norm(),
        "gauss_southwell_lipschitz": lambda b: promised(problem, g, b, "gradient"),
        "gauss_southwell_diagonal": lambda b: (g[b].square() / problem.bound.diagonal()[b]).sum(),
        "gauss_southwell_quadratic": lambda b: promised(problem, g, b, "matrix")}
    for select, measure in measures.items():
        optimizer = GreedyBlockDescent([problem.x], blocks=3, select=select, update="matrix",
                                       bound=problem.bound)
        start = problem.x.detach().clone()
        optimizer.step(problem)
        assert torch.equal(optimizer.last_block, max(blocks(), key=measure)), select
        with torch.no_grad():
            problem.x.copy_(start)
    for select, measure in (("gauss_southwell", g.abs()),
                            ("gauss_southwell_diagonal", g.square() / problem.bound.diagonal())):
        optimizer = GreedyBlockDescent([problem.x], blocks=4, select=select, variable=True,
                                       update="matrix", bound=problem.bound)
        optimizer.step(problem)
        assert set(optimizer.last_block.tolist()) == set(measure.argsort()[-4:].tolist())
        with torch.no_grad():
            problem.x.copy_(start)


def test_cyclic_goes_round_and_random_draws():
    problem = Logistic()
    optimizer = GreedyBlockDescent([problem.x], blocks=3, select="cyclic", bound=problem.bound)
    firsts = []
    for _ in range(6):
        optimizer.step(problem)
        firsts.append(int(optimizer.last_block[0]))
    assert firsts == [0, 3, 6, 9, 0, 3]
    def drawn(seed):
        problem = Logistic()
        optimizer = GreedyBlockDescent([problem.x], blocks=3, select="random",
                                       bound=problem.bound,
                                       generator=torch.Generator().manual_seed(seed))
        return [int((optimizer.step(problem), optimizer.last_block[0])[1]) for _ in range(12)]
    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) > 2


def test_a_newton_step_on_a_quadratic_is_its_minimum_over_the_block():
    problem = Logistic()
    H = problem.bound
    x = Parameter(torch.randn(12).double())
    optimizer = GreedyBlockDescent([x], blocks=4, select="gauss_southwell", update="newton")
    optimizer.step(lambda: x @ H @ x / 2 - x.sum())
    g = (H @ x - 1).detach()
    assert g[optimizer.last_block].abs().max() < 1e-9
    assert g.abs().max() > 0.1


@pytest.mark.parametrize("options", [
    {"update": "newton", "select": "gauss_southwell"},
    {"update": "newton", "select": "gauss_southwell", "variable": True, "blocks": 4},
    {"update": "gradient", "select": "gauss_southwell_lipschitz", "blocks": 1}])
def test_ends_at_the_minimum_without_a_bound(options):
    problem = Logistic()
    optimizer = GreedyBlockDescent([problem.x], **options)
    values = [float(optimizer.step(problem)) for _ in range(300)]
    assert all(b <= a + 1e-10 for a, b in pairwise(values))
    assert problem.gradient().norm() < 1e-4


def test_a_newton_step_goes_down_where_the_loss_is_not_convex():
    x = Parameter(torch.tensor([0.1, 0.1]).double())
    optimizer = GreedyBlockDescent([x], blocks=2, update="newton")
    for _ in range(40):
        optimizer.step(lambda: (x.square() - 1).square().sum())
    torch.testing.assert_close(x.detach(), torch.ones(2).double())


@pytest.mark.parametrize("select", ["gauss_southwell", "gauss_southwell_lipschitz", "cyclic"])
def test_with_l1_it_ends_at_the_lasso_and_on_its_support(select):
    problem = Logistic(d=10)
    target = problem.A[:, :2].sum(1) + 0.1 * problem.y
    x = Parameter(torch.ones(10).double())
    optimizer = GreedyBlockDescent([x], blocks=2, select=select, l1=0.2 * 60,
                                   bound=problem.A.T @ problem.A)
    for _ in range(400):
        optimizer.step(lambda: (problem.A @ x - target).square().sum() / 2)
    lasso = Lasso(alpha=0.2, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(
        problem.A.numpy(), target.numpy())
    np.testing.assert_allclose(x.detach().numpy(), lasso.coef_, atol=1e-6)
    assert ((x != 0).numpy() == (lasso.coef_ != 0)).all()


def test_better_rules_take_fewer_steps():
    steps = {select: [] for select in ("gauss_southwell_quadratic", "gauss_southwell", "random")}
    for seed in range(3):
        for select in steps:
            problem = Logistic(seed, n=100, d=40)
            optimizer = GreedyBlockDescent([problem.x], blocks=5, select=select, update="matrix",
                                           bound=problem.bound,
                                           generator=torch.Generator().manual_seed(seed))
            k = 0
            while problem.gradient().norm() > 0.1 and k < 1000:
                optimizer.step(problem)
                k += 1
            steps[select].append(k)
    quadratic, plain, random = (sum(steps[s]) for s in steps)
    assert quadratic <= plain
    assert plain < 0.8 * random


def test_trains_a_module_and_goes_on_from_its_state():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(40, 5).double(), torch.randint(3, (40,))
    def loss():
        return nn.functional.cross_entropy(network(x), y)
    optimizer = GreedyBlockDescent(network.parameters(), blocks="parameters", lipschitz=0.1)
    assert [len(b) for b in optimizer.blocks] == [30, 6, 18, 3]
    first = [float(optimizer.step(loss)) for _ in range(30)]
    assert first[-1] < first[0]
    again = GreedyBlockDescent(network.parameters(), blocks="parameters", lipschitz=9.0)
    again.load_state_dict(optimizer.state_dict())
    start = [p.detach().clone() for p in network.parameters()]
    optimizer.step(loss)
    ends = [p.detach().clone() for p in network.parameters()]
    with torch.no_grad():
        for p, s in zip(network.parameters(), start, strict=True):
            p.copy_(s)
    again.step(loss)
    assert all(torch.equal(p, e) for p, e in zip(network.parameters(), ends, strict=True))


def test_errors():
    x, H = Parameter(torch.ones(4)), torch.eye(4)
    for options, error, match in [
            ({"select": "gauss_southwel"}, UnknownName, "did you mean gauss_southwell"),
            ({"update": "newtn"}, UnknownName, "did you mean newton"),
            ({"update": "matrix"}, ValueError, "bound must be given for select="),
            ({"select": "gauss_southwell_quadratic"}, ValueError, "bound must be given"),
            ({"bound": torch.eye(3)}, ValueError, r"bound must be \(4, 4\), .* got \(3, 3\)"),
            ({"blocks": 5}, ValueError, "blocks must be between 1 and 4, got 5; params have 4"),
            ({"blocks": [torch.tensor([0, 1])]}, ValueError, "hold each of the 4 coordinates"),
            ({"blocks": "parameter"}, UnknownName, "did you mean parameters"),
            ({"blocks": 2, "l1": 1.0, "update": "newton"}, ValueError, "l1 must be 0 unless"),
            ({"blocks": 2, "l1": -1.0}, ValueError, "l1 must be at least 0"),
            ({"blocks": 2, "lipschitz": 0.0}, ValueError, "lipschitz must be above 0"),
            ({"blocks": 2, "variable": True, "bound": H}, ValueError, "variable must be False")]:
        with pytest.raises(error, match=match):
            GreedyBlockDescent([x], **options)
    with pytest.raises(ValueError, match="closure must be a function"):
        GreedyBlockDescent([x], blocks=2).step()
    with pytest.raises(ValueError, match="params must be one group, got 2"):
        GreedyBlockDescent([{"params": [x]}, {"params": [Parameter(torch.ones(1))]}], blocks=2)
    with pytest.raises(ArithmeticError, match="keeps no step of block 0"):
        GreedyBlockDescent([x], blocks=4).step(lambda: x.sum() * float("nan"))
    assert torch.equal(x.detach(), torch.ones(4))


@pytest.mark.parametrize("how", [{}, {"select": "cyclic", "blocks": "parameters"},
                                 {"update": "newton"}, {"l1": 0.01}], ids=str)
def test_frozen_parameters_have_no_coordinates(how):
    problem = Logistic()
    frozen = Parameter(torch.ones(3).double(), requires_grad=False)
    optimizer = GreedyBlockDescent([frozen, problem.x], **how)
    assert sum(map(len, optimizer.blocks)) == len(problem.x)
    losses = [float(optimizer.step(lambda: problem() + frozen.sum()).detach()) for _ in range(9)]
    assert losses[-1] < losses[0]
    assert frozen.eq(1).all()


def test_a_parameter_that_is_frozen_later_stays_as_it_is():
    problem, other = Logistic(), Parameter(torch.ones(3).double())
    optimizer = GreedyBlockDescent([problem.x, other], blocks=15)
    other.requires_grad_(False)
    before = float(problem().detach())
    optimizer.step(lambda: problem() + other.square().sum())
    assert other.eq(1).all()
    assert float(problem().detach()) < before


def test_parameters_that_are_all_frozen_are_refused():
    with pytest.raises(ValueError, match="none that requires grad; set requires_grad on some"):
        GreedyBlockDescent([Parameter(torch.ones(3), requires_grad=False)])
