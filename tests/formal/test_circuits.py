"""Circuits and their reverse derivatives, on all inputs of random circuits."""

import random
from copy import deepcopy
from itertools import product

import pytest
import torch
from torch import nn

from netwright.formal.circuits import (
    PolynomialCircuit,
    Wire,
    evaluator,
    modular,
    saturating,
    sum_of_products,
)
from netwright.formal.learners import ParaLens

SEMIRINGS = [modular(2), modular(3), modular(5), saturating(1), saturating(3)]
SEEDS = range(6)


def every(size, width):
    return torch.tensor(list(product(range(size), repeat=width))).view(-1, width)


def drawn(seed, inputs, outputs, gates, *, multilinear=False, top=2):
    """A random function of wires; no product of what depends on one input where multilinear."""
    draw = random.Random(seed)
    reads, plan = [{i} for i in range(inputs)], []
    while len(plan) < gates:
        kind = draw.choice(["add", "multiply", "constant"])
        a, b = draw.randrange(len(reads)), draw.randrange(len(reads))
        if kind == "multiply" and multilinear and reads[a] & reads[b]:
            kind = "add"
        plan.append((kind, a, draw.randrange(top) if kind == "constant" else b))
        reads.append(reads[a] if kind == "constant" else reads[a] | reads[b])
    places = [draw.randrange(len(reads)) for _ in range(outputs - 1)] + [len(reads) - 1]

    def function(x):
        values = list(x)
        for kind, a, b in plan:
            values.append(values[a] + b if kind == "constant" else values[a] + values[b]
                          if kind == "add" else values[a] * values[b])
        return [values[place] for place in places]
    return function


def circuit(function, inputs, semiring=None):
    return PolynomialCircuit(lambda w, x: function(x), parameters=0, inputs=inputs,
                             semiring=semiring)


class Dual:
    """a + b e with e e = 0, over a semiring, in plain Python: an oracle for values and slopes."""

    def __init__(self, a, b, semiring):
        self.a, self.b, self.semiring = a, b, semiring

    def _made(self, a, b):
        a, b = self.semiring.reduce(torch.tensor([a, b])).tolist()
        return Dual(a, b, self.semiring)

    def __add__(self, other):
        other = other if isinstance(other, Dual) else Dual(other, 0, self.semiring)
        return self._made(self.a + other.a, self.b + other.b)

    def __mul__(self, other):
        return self._made(self.a * other.a, self.a * other.b + self.b * other.a)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_derivative_is_the_finite_difference_over_z2(seed):
    f = circuit(drawn(seed, 4, 3, 12, multilinear=True), 4)
    x = every(2, 4)
    for j in range(3):
        dy = torch.zeros(16, 3, dtype=torch.int64)
        dy[:, j] = 1
        _, dx = f.reverse_derivative(x, dy)
        for i in range(4):
            shifted = x.clone()
            shifted[:, i] ^= 1
            assert torch.equal(dx[:, i], f(x)[:, j] ^ f(shifted)[:, j])


def test_a_value_times_itself_has_no_derivative_over_z2():
    square = circuit(lambda x: [x[0] * x[0]], 1)
    x = every(2, 1)
    assert torch.equal(square(x), x)
    assert not square.reverse_derivative(x, torch.ones_like(x))[1].any()


@pytest.mark.parametrize("semiring", SEMIRINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("seed", SEEDS)
def test_values_and_derivatives_are_those_of_dual_numbers(semiring, seed):
    function = drawn(seed, 3, 2, 9, top=semiring.size)
    f, x = circuit(function, 3, semiring), every(semiring.size, 3)[::3]
    columns = [f.reverse_derivative(x, torch.eye(2, dtype=torch.int64)[j].expand(len(x), 2))[1]
               for j in range(2)]
    y = f(x)
    for n, point in enumerate(x.tolist()):
        for i in range(3):
            duals = function([Dual(value, int(k == i), semiring) for k, value in enumerate(point)])
            assert [dual.a for dual in duals] == y[n].tolist()
            assert [dual.b for dual in duals] == [column[n, i].item() for column in columns]


@pytest.mark.parametrize("semiring", SEMIRINGS, ids=lambda s: s.name)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_axioms_of_a_reverse_derivative(semiring, seed):
    size, reduce = semiring.size, semiring.reduce
    f, g = (drawn(10 * seed + k, 2, 2, 6, top=size) for k in range(2))
    points = every(size, 6) if size < 3 else every(size, 6)[torch.randperm(size ** 6)[:500]]
    x, y, z = points[:, :2], points[:, 2:4], points[:, 4:]

    def reverse(function, x, dy):
        return circuit(function, 2, semiring).reverse_derivative(x, dy)[1]

    # sums and zero
    total = reverse(lambda x: [a + b for a, b in zip(f(x), g(x), strict=True)], x, y)
    assert torch.equal(total, reduce(reverse(f, x, y) + reverse(g, x, y)))
    # additive in the change
    assert torch.equal(reverse(f, x, reduce(y + z)), reduce(reverse(f, x, y) + reverse(f, x, z)))
    assert not reverse(f, x, torch.zeros_like(y)).any()
    # the identity and the projections
    assert torch.equal(reverse(lambda x: x, x, y), y)
    assert torch.equal(reverse(lambda x: [x[1]], x, y[:, :1])[:, 1], y[:, 0])
    # pairs
    both = circuit(lambda x: [*f(x), *g(x)], 2, semiring).reverse_derivative(
        x, torch.cat([y, z], 1))[1]
    assert torch.equal(both, reduce(reverse(f, x, y) + reverse(g, x, z)))
    # the chain rule
    middle = circuit(f, 2, semiring)(x)
    assert torch.equal(reverse(lambda x: g(f(x)), x, y), reverse(f, x, reverse(g, middle, y)))


@pytest.mark.parametrize("seed", SEEDS)
def test_second_derivatives_over_z2_are_symmetric_and_linear(seed):
    f, x = circuit(drawn(seed, 4, 1, 12, multilinear=True), 4), every(2, 4)
    slopes = f.reverse_derivative(x, torch.ones(16, 1, dtype=torch.int64))[1]
    turned = [slopes[(x ^ torch.eye(4, dtype=torch.int64)[j]) @ torch.tensor([8, 4, 2, 1])]
              for j in range(4)]
    second = torch.stack([slopes ^ there for there in turned])
    assert torch.equal(second, second.permute(2, 1, 0))


def test_paths_do_not_undo_one_another():
    f = circuit(lambda x: [x[0] * x[0] + x[1] * x[2]], 3)
    x = torch.tensor([[1, 1, 0], [0, 1, 1]])
    ones = torch.ones(2, 1, dtype=torch.int64)
    assert f.pull(f.wires(x), ones)[1].tolist() == [[0, 0, 1], [0, 1, 1]]
    assert f.pull(f.wires(x), ones, paths=True)[1].tolist() == [[1, 0, 1], [0, 1, 1]]


def test_every_function_of_three_bits_can_be_represented():
    x = every(2, 3)
    table, polynomial = evaluator(3), sum_of_products(3)
    seen = set()
    for bits in range(256):
        truth = torch.tensor([bits >> i & 1 for i in range(8)])
        table.weight.copy_(truth)
        assert torch.equal(table(x)[:, 0], truth)
        polynomial.weight.copy_(truth)
        seen.add(tuple(polynomial(x)[:, 0].tolist()))
    assert len(seen) == 256


@pytest.mark.parametrize("semiring", SEMIRINGS, ids=lambda s: s.name)
def test_a_table_can_be_any_function_over_any_semiring(semiring):
    f, x = evaluator(2, 2, semiring=semiring), every(semiring.size, 2)
    truth = torch.randint(semiring.size, (len(x), 2))
    f.weight.copy_(truth.T.flatten())
    assert torch.equal(f(x), truth)
    dw, _ = f.reverse_derivative(x, torch.ones_like(truth))
    assert torch.equal(dw.view(len(x), 2, -1).bool(), torch.eye(len(x)).bool().unsqueeze(1)
                       .expand(-1, 2, -1))


def test_a_chain_of_lenses_is_a_chain_of_circuits():
    """R is a functor to lenses: the lens of a composite is the composite of the lenses."""
    f, g = evaluator(3, 2), sum_of_products(2, 1)
    for part in (f, g):
        part.weight.random_(2)
    x, dy = every(2, 3), torch.ones(8, 1, dtype=torch.int64)

    def lens(part):
        return ParaLens(lambda p, a: part(a), lambda p, a, da: part.reverse_derivative(a, da))

    (dw, dv), dx = (lens(f) >> lens(g)).put(((), ()), x, dy)
    dv_alone, between = g.reverse_derivative(f(x), dy)
    dw_alone, dx_alone = f.reverse_derivative(x, between)
    assert torch.equal(dv, dv_alone)
    assert torch.equal(dw, dw_alone)
    assert torch.equal(dx, dx_alone)


def test_it_is_a_module():
    f = nn.Sequential(evaluator(2, 2), evaluator(2))
    f[0].weight.random_(2)
    other = deepcopy(f)
    other[0].weight.zero_()
    other.load_state_dict(f.state_dict())
    assert set(f.state_dict()) == {"0.weight", "1.weight"}
    assert torch.equal(other(every(2, 2)), f(every(2, 2)))
    assert f.double()[0].weight.dtype == torch.uint8
    x = every(2, 2).bool()
    assert torch.equal(f(x), f(x.to(torch.uint8)))
    assert f(x[:0]).shape == (0, 1)


def test_constants_and_numbers_on_either_side():
    f = circuit(lambda x: [2 * x[0] + 1, 3 + x[0] * 2, x[0].equals(2) + 1], 1, modular(5))
    x = every(5, 1)
    expected = torch.cat([(2 * x + 1) % 5, (3 + 2 * x) % 5, (x == 2) + 1], 1)
    assert torch.equal(f(x), expected)
    _, dx = f.reverse_derivative(x, torch.ones(5, 3, dtype=torch.int64))
    assert dx.flatten().tolist() == [4] * 5


def test_errors():
    f = evaluator(2)
    with pytest.raises(ValueError, match=r"x must hold the whole numbers 0 to 1, got torch.float"):
        f(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"x must be \(batch, 2\), got \(3, 4\)"):
        f(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="whole numbers 0 to 1, got 2"):
        f(torch.full((3, 2), 2))
    with pytest.raises(ValueError, match="whole numbers 0 to 1, got -1"):
        f(torch.full((3, 2), -1))
    with pytest.raises(ValueError, match="whole numbers 0 to 1, got list"):
        f([[0, 1]])
    with pytest.raises(ValueError, match=r"dy must be \(batch, outputs\) = \(4, 1\), got \(4,\)"):
        f.reverse_derivative(every(2, 2), torch.zeros(4))
    with pytest.raises(ValueError, match="function must return a list of wires, got None"):
        PolynomialCircuit(lambda w, x: None, parameters=1, inputs=1)
    with pytest.raises(ValueError, match="2 to 256 values, got 1"):
        modular(1)
    with pytest.raises(ValueError, match="2 to 256 values, got 257"):
        saturating(256)
    with pytest.raises(ValueError, match="1 to a million parameters, got 1073741824"):
        evaluator(30)
    with pytest.raises(ValueError, match="1 to a million parameters"):
        sum_of_products(60, degree=8)
    with pytest.raises(ValueError, match="degree must be at least 0, got -1"):
        sum_of_products(3, degree=-1)
    with pytest.raises(TypeError, match="unsupported operand"):
        PolynomialCircuit(lambda w, x: [x[0] + 0.5], parameters=0, inputs=1)
    assert isinstance(Wire([], 0) + 1, Wire)
