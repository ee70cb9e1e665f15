"""Reversible Heun beside what was published, its gradients, and torchdiffeq's solvers."""

import copy
import math
import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from netwright.errors import CannotReverse, MissingExtra, UnknownName
from netwright.generative.flows import ReversibleHeun, odeint
from netwright.measure import cost

pytest.importorskip("torchdiffeq", reason="needs the extra flows")
TIMES = torch.tensor([0.0, 0.3, 1.0, 1.2], dtype=torch.float64)


class Field(nn.Module):
    runs = 0

    def __init__(self, size: int = 3, *more: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(size + 1, 8), nn.Tanh(), *more, nn.Linear(8, size))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        Field.runs += 1  # of the class, since a run that is made again leaves no trace in itself
        return self.net(torch.cat([y, t.expand(*y.shape[:-1], 1)], -1))


class Turn(nn.Module):
    """dy/dt = i y (1 + t): y(t) = y_0 exp(i (t + t^2 / 2))."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return (1 + t) * torch.stack([-y[..., 1], y[..., 0]], -1)


def published(f: nn.Module, y0: Tensor, ts: Tensor, steps: int) -> Tensor:
    y = z = y0
    slope, found = f(ts[0], z), [y0]
    for begin, end in pairwise(ts):
        length = (end - begin) / steps
        for n in range(steps):
            z = 2 * y - z + length * slope
            new = f(begin + (n + 1) * length, z)
            y, slope = y + length * (slope + new) / 2, new
        found.append(y)
    return torch.stack(found)


def problem(*more: nn.Module) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Field(3, *more).double(), torch.randn(5, 3, dtype=torch.float64)


def gradients(ys: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad((ys * torch.randn_like(ys)).sum(), tensors))


def near(ours: list[Tensor], theirs: list[Tensor], error: float = 1e-10) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= error


@pytest.mark.parametrize("backward", ["reconstruct", "store"])
@pytest.mark.parametrize("times", [TIMES, TIMES.flip(0), TIMES[:2]], ids=["on", "back", "two"])
@pytest.mark.parametrize("steps", [1, 6])
def test_solution_and_gradients_are_those_of_the_published_steps(backward, times, steps):
    f, y0 = problem()
    y0.requires_grad_()
    ts = times.clone().requires_grad_()
    tensors = [y0, ts, *f.parameters()]
    theirs = published(f, y0, ts, steps)
    ours = odeint(f, y0, ts, steps=steps, backward=backward)
    near([ours], [theirs])
    near(gradients(ours, tensors), gradients(theirs, tensors))


def test_a_step_takes_one_evaluation_and_its_way_back_another():
    f, y0 = problem()
    Field.runs = 0
    ys = odeint(f, y0, TIMES, steps=10)  # the first call looks closely, at no more evaluations
    assert f.runs == 3 * 10 + 1
    ys.sum().backward()
    assert f.runs == 2 * (3 * 10 + 1)


def test_the_error_falls_with_the_square_of_the_step():
    y0, ts = torch.tensor([[1.0, 0.0]], dtype=torch.float64), TIMES[[0, 3]]
    angle = 1.2 + 1.2 ** 2 / 2
    true = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    errors = [float((odeint(Turn(), y0, ts, steps=steps)[-1] - true).norm())
              for steps in (20, 40, 80)]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(abs(order - 2) < 0.05 for order in orders)
    simple = [float((odeint(Turn(), y0, ts, solver="euler", backward="store", steps=steps)[-1]
                     - true).norm()) for steps in (20, 40)]
    assert abs(math.log2(simple[0] / simple[1]) - 1) < 0.1


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_the_solver_goes_back_to_where_it_began(dtype, bound):
    f, y0 = problem()
    f, y0 = f.to(dtype), y0.to(dtype)
    solver = ReversibleHeun(f, TIMES.to(dtype), steps=100)
    ends = solver((y0, y0))
    assert torch.allclose((ends[0] + ends[1]) / 2, odeint(f, y0, TIMES, steps=100)[-1])
    for stream in solver.inverse(ends):
        assert (stream - y0).abs().max() < bound
    if dtype == torch.float64:  # as a solver that cannot be undone does not
        there = odeint(f, y0, TIMES, solver="midpoint", backward="store", steps=20)[-1]
        back = odeint(f, there, TIMES.flip(0), solver="midpoint", backward="store", steps=20)[-1]
        assert (back - y0).abs().max() > 1e-8


def test_dropout_and_batch_norm_inside_run_as_they_ran():
    def trained(backward: str) -> tuple[list[Tensor], list[Tensor]]:
        f, y0 = problem(nn.BatchNorm1d(8), nn.Dropout(0.3))
        torch.manual_seed(3)
        ys = odeint(f, y0, TIMES, steps=4, backward=backward)
        return gradients(ys, list(f.parameters())), list(f.buffers())
    ours, theirs = trained("reconstruct"), trained("store")
    near(ours[0], theirs[0])
    near(ours[1], theirs[1], 0.0)
    assert ours[1][2] == 3 * 4 + 1  # batches that were counted


def test_the_input_keeps_its_values_and_frozen_parameters_get_no_gradient():
    f, y0 = problem()
    f.net[0].weight.requires_grad_(False)
    before = y0.clone()
    odeint(f, y0, TIMES, steps=5).sum().backward()
    assert torch.equal(y0, before)
    assert f.net[0].weight.grad is None
    assert f.net[0].bias.grad is not None


def test_gradients_pass_through_two_solves_of_the_same_module():
    f, y0 = problem()
    y0.requires_grad_()
    tensors = [y0, *f.parameters()]

    def twice(backward: str) -> Tensor:
        middle = odeint(f, y0, TIMES, steps=3, backward=backward)[-1]
        return odeint(f, middle, TIMES.flip(0), steps=2, backward=backward)
    near(gradients(twice("reconstruct"), tensors), gradients(twice("store"), tensors))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Field(3)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        slope = self.net(t, state[0])
        return slope, slope.square().sum(1) - state[1]


@pytest.mark.parametrize("options", [{"steps": 5}, {"solver": "rk4", "steps": 5}])
def test_a_tuple_of_states(options):
    torch.manual_seed(0)
    f = Pair().double()
    y0 = torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    ys, sums = odeint(f, y0, TIMES, **options)
    assert ys.shape == (4, 5, 3)
    assert sums.shape == (4, 5)
    near([ys], [odeint(f.net, y0[0], TIMES, **options)])
    if "solver" not in options:
        stored = odeint(f, y0, TIMES, steps=5, backward="store")[1]
        near(gradients(sums, list(f.parameters())), gradients(stored, list(f.parameters())))


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_torchdiffeq_solves_and_its_adjoint_is_near_the_stored_gradients(solver):
    f, y0 = problem()
    y0.requires_grad_()
    options = {"rtol": 1e-10, "atol": 1e-10} if solver == "dopri5" else {"steps": 50}
    tensors = [y0, *f.parameters()]
    exact = odeint(f, y0, TIMES, solver=solver, backward="store", **options)
    adjoint = odeint(f, y0, TIMES, solver=solver, **options)
    near([adjoint], [exact])
    near(gradients(adjoint, tensors), gradients(exact, tensors), 1e-6)
    near([odeint(f, y0, TIMES, steps=500)], [exact], 1e-5)
    if solver == "dopri5":  # the adjoint's gradients are as far off as its tolerance lets them be
        loose = {"solver": solver, "rtol": 1e-3, "atol": 1e-3}
        stored = gradients(odeint(f, y0, TIMES, backward="store", **loose), tensors)
        off = gradients(odeint(f, y0, TIMES, **loose), tensors)
        assert max(float((a - b).abs().max()) for a, b in zip(off, stored, strict=True)) > 1e-7


class Solve(nn.Module):
    def __init__(self, steps: int, backward: str) -> None:
        super().__init__()
        self.f, self.steps, self.backward = Field(3), steps, backward

    def forward(self, y: Tensor) -> Tensor:
        ts = torch.tensor([0.0, 1.0])
        return odeint(self.f, y, ts, steps=self.steps, backward=self.backward)[-1]


def test_stored_bytes_do_not_grow_with_the_steps():
    batch = torch.randn(64, 3), torch.zeros(64, dtype=torch.long)

    def saved(steps: int, backward: str) -> int:
        solve = Solve(steps, backward)
        solve(batch[0])  # the first call looks closely
        return cost(solve, batch, repeats=1, warmup=0).saved_bytes
    assert saved(16, "reconstruct") <= 1.05 * saved(2, "reconstruct")
    assert saved(16, "store") > 4 * saved(2, "store")


def test_single_precision_autocast_copies_and_no_gradients():
    f, y0 = problem()
    f, y0 = f.float(), y0.float()
    plain = odeint(f, y0, TIMES, steps=5)
    assert plain.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(odeint(copy.deepcopy(f), y0, TIMES, steps=5), plain)
    with torch.autocast("cpu", torch.bfloat16):
        low = odeint(f, y0, TIMES, steps=5)
    low.sum().backward()
    assert low.dtype == torch.float32
    assert (low - plain).abs().max() < 0.1
    half = odeint(f.bfloat16(), y0.bfloat16(), TIMES, steps=5)
    assert half.dtype == torch.bfloat16
    assert (half - plain).abs().max() < 0.2


def bad(call, words: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=words):
        call()


def test_errors_name_what_was_wrong():
    f, y0 = problem()
    bad(lambda: odeint(f, y0, TIMES, solver="dopri"), "did you mean", UnknownName)
    bad(lambda: odeint(f, y0, TIMES, backward="adjont"), "did you mean adjoint", UnknownName)
    bad(lambda: odeint(f, y0, TIMES, backward="adjoint"), "none of the ways back")
    bad(lambda: odeint(f, y0, TIMES, solver="rk4", backward="reconstruct"), "reversible_heun")
    bad(lambda: odeint(f, y0, TIMES, solver="dopri5", steps=3), "chooses its steps")
    bad(lambda: odeint(f, y0, TIMES, steps=0), "steps must be at least 1, got 0")
    bad(lambda: odeint(f, y0, TIMES[:1]), "at least two times")
    bad(lambda: odeint(f, y0, TIMES[[0, 2, 1]]), "must rise, or fall")
    bad(lambda: odeint(f, y0.long(), TIMES), "y0 must have a floating-point dtype")
    bad(lambda: odeint(lambda t, y: y, y0, TIMES), "f must be an nn.Module")
    bad(lambda: odeint(nn.Bilinear(1, 3, 3), y0, TIMES.long()), "floating-point dtype")


class Wrong(nn.Module):
    def __init__(self, change) -> None:
        super().__init__()
        self.change = change

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.change(y)


def test_fields_that_cannot_be_undone_are_named():
    _, y0 = problem()
    bad(lambda: odeint(Wrong(lambda y: y[:, :1]), y0, TIMES), "in the shape of y")
    bad(lambda: odeint(Wrong(lambda y: y.mul_(2)), y0, TIMES), "in place", CannotReverse)
    loose = torch.ones(3, dtype=torch.float64, requires_grad=True)
    stranger = Wrong(lambda y: y * loose)
    bad(lambda: odeint(stranger, y0.requires_grad_(), TIMES).sum().backward(),
        "neither a parameter", CannotReverse)


def test_without_torchdiffeq_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    f, y0 = problem()
    bad(lambda: odeint(f, y0, TIMES, solver="dopri5"), r"netwright\[flows\]", MissingExtra)


class Strange(nn.Module):
    def __init__(self, f: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.f, self.weights = f, [weight]

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.f(t, y) * self.weights[0]


@pytest.mark.parametrize("solver", ["reversible_heun", "rk4", "dopri5"])
def test_no_way_back_loses_a_gradient_though_one_without_came_first(solver: str) -> None:
    if solver != "reversible_heun":
        pytest.importorskip("torchdiffeq")
    f, y0 = problem()
    f = Strange(f, torch.ones((), dtype=y0.dtype, requires_grad=True))
    with torch.no_grad():
        odeint(f, y0, TIMES, solver=solver)
    bad(lambda: odeint(f, y0, TIMES, solver=solver).sum().backward(), "neither a parameter",
        CannotReverse)
