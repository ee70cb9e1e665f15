"""Polynomial circuits: networks of additions and multiplications of discrete values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import comb
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method

__all__ = ["PolynomialCircuit", "Semiring", "Wire", "evaluator", "modular", "saturating",
           "sum_of_products"]


@dataclass(frozen=True)
class Semiring:
    """The values 0 to size - 1 of a circuit's wires, and what their sums and products become.

    a + b := reduce(a + b);  a b := reduce(a b);  minus(y, b) is what is to be added to b for y.
    """

    name: str
    size: int
    reduce: Callable[[Tensor], Tensor]
    minus: Callable[[Tensor, Tensor], Tensor]


@checks.annotated
def modular(n: int) -> Semiring:
    """Return Z_n: whole numbers modulo n. Z_2 has exclusive or as sum, and as product.

    Raises:
        ValueError: `n` is not from 2 to 256.

    >>> modular(3).reduce(torch.tensor([2 + 2, 2 * 2]))
    tensor([1, 1])
    """
    _check_size(n)
    return Semiring(f"Z_{n}", n, lambda a: a % n, lambda y, b: (y - b) % n)


@checks.annotated
def saturating(largest: int) -> Semiring:
    """Return the numbers 0 to `largest`, at which sums and products stop: 1 is or with and.

    There is nothing negative: what is too large cannot be made smaller by adding.

    Raises:
        ValueError: `largest` is not from 1 to 255.

    >>> saturating(3).reduce(torch.tensor([2 + 2, 1 * 2]))
    tensor([3, 2])
    """
    _check_size(largest + 1)
    return Semiring(f"0..{largest}, saturating", largest + 1, lambda a: a.clamp(max=largest),
                    lambda y, b: (y - b).clamp(min=0))


class Wire:
    """A value in a circuit under construction: wires and whole numbers can be added, multiplied.

    `equals(c)` is 1 where the value is c and 0 elsewhere; it has no derivative.
    """

    def __init__(self, gates: "list[_Gate]", number: int, level: int = 0) -> None:
        self._gates, self._number, self._level = gates, number, level

    def __add__(self, other: "Wire | int") -> "Wire":
        return self._joined("add", other)

    def __mul__(self, other: "Wire | int") -> "Wire":
        return self._joined("multiply", other)

    __radd__, __rmul__ = __add__, __mul__

    def equals(self, value: int) -> "Wire":
        """Return the wire that is 1 where this one is `value`."""
        return self._grown("equals", self._number, value, self._level + 1)

    def _joined(self, kind: str, other: "Wire | int") -> "Wire":
        if isinstance(other, int):
            other = self._grown("constant", 0, other, 0)
        if not isinstance(other, Wire):
            return NotImplemented
        return self._grown(kind, self._number, other._number,
                           1 + max(self._level, other._level))

    def _grown(self, kind: str, left: int, right: int, level: int) -> "Wire":
        self._gates.append(_Gate(kind, left, right, level))
        return Wire(self._gates, -len(self._gates), level)  # numbered when all gates are known


@dataclass(frozen=True)
class _Gate:
    kind: str
    left: int
    right: int
    level: int


@method("formal", papers=["001-108"])
class PolynomialCircuit(nn.Module):
    """A circuit of sums and products over a semiring, with parameters and a reverse derivative.

    y = f(w, x);  R f(w, x, dy) = (sum_j dy_j df_j/dw_i)_i, and likewise for x.

    `function(w, x)` is given a list of wires for the parameters and one for the inputs, and returns
    a list of wires for the outputs, made of them by `+`, `*` and `equals`. Gates of one depth run
    together, on the whole batch.

    The derivative is that of polynomials, gate by gate: (1, 1) of a sum, (b, a) of the product a b.
    Over Z_2 it is the difference f(x) + f(x + e_i) wherever no value is multiplied by itself; x x,
    which is x as a function, has the derivative x + x = 0. That of `equals` is 0.

    `weight` holds the parameters, zeros to begin with, as bytes; it takes no gradient, and
    `ReverseDerivativeAscent` trains it. It may be drawn: `circuit.weight.random_(semiring.size)`.

    Args:
        function: makes the outputs' wires of the parameters' and the inputs'.
        parameters: how many there are.
        inputs: how many there are.
        semiring: what sums and products mean; by default bits, with "exclusive or" and "and".

    Shapes: x (batch, inputs), whole numbers or bools below `semiring.size`; weight (parameters,);
    y and dy (batch, outputs).

    Raises:
        ValueError: `function` returns no wires, or an input is no value of the semiring.

    Paper: Wilson, Zanasi, 2022, Categories of Differentiable Polynomial Circuits for Machine
    Learning.

    >>> circuit = PolynomialCircuit(lambda w, x: [w[0] * x[0] + x[1]], parameters=1, inputs=2)
    >>> x = torch.tensor([[1, 0], [1, 1]])
    >>> circuit(x).flatten(), [d.tolist() for d in circuit.reverse_derivative(x, circuit(x))]
    (tensor([0, 1]), [[[0], [1]], [[0, 0], [0, 1]]])
    """

    left: Tensor
    right: Tensor
    outputs: Tensor

    def __init__(self, function: Callable[[list[Wire], list[Wire]], Sequence[Wire]], *,
                 parameters: int, inputs: int, semiring: Semiring | None = None) -> None:
        super().__init__()
        self.semiring = modular(2) if semiring is None else semiring
        self.inputs = inputs
        gates: list[_Gate] = []
        wires = [Wire(gates, number) for number in range(parameters + inputs)]
        made = function(wires[:parameters], wires[parameters:])
        if not isinstance(made, (list, tuple)) or not made or not all(
                isinstance(wire, Wire) for wire in made):
            raise ValueError(f"function must return a list of wires, got {made!r}; build them of "
                             "its arguments by +, * and equals")
        order = sorted(range(len(gates)), key=lambda i: (gates[i].level, gates[i].kind))
        number = {-(i + 1): len(wires) + place for place, i in enumerate(order)}
        self.groups = _groups([gates[i] for i in order], len(wires))
        constants = ("constant", "equals")
        rights = [gates[i].right if gates[i].kind in constants else
                  number.get(gates[i].right, gates[i].right) for i in order]
        lefts = [number.get(gates[i].left, gates[i].left) for i in order]
        places = [number.get(wire._number, wire._number) for wire in made]
        for name, values in (("left", lefts), ("right", rights), ("outputs", places)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)
        self.weight = nn.Parameter(torch.zeros(parameters, dtype=torch.uint8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for inputs `x`."""
        return self.wires(x)[self.outputs].T

    def reverse_derivative(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the changes of the parameters, for each sample, and of the inputs.

        Shapes: dy (batch, outputs) -> (batch, parameters), (batch, inputs).
        """
        return self.pull(self.wires(x), dy)

    def wires(self, x: Tensor) -> Tensor:
        """Return the value of every wire: parameters, inputs, then gates.

        Shapes: (wires, batch).
        """
        self._check(x)
        values = torch.empty(self._first + len(self.left), len(x), dtype=torch.int64,
                             device=x.device)
        values[:len(self.weight)] = self.weight.unsqueeze(1)
        values[len(self.weight):self._first] = x.T
        for kind, start, stop in self.groups:
            left, right = self._operands(start, stop)
            if kind == "constant":
                values[start:stop] = right.unsqueeze(1)
            elif kind == "equals":
                values[start:stop] = values[left] == right.unsqueeze(1)
            elif kind == "add":
                values[start:stop] = self.semiring.reduce(values[left] + values[right])
            else:
                values[start:stop] = self.semiring.reduce(values[left] * values[right])
        return values

    def pull(self, wires: Tensor, dy: Tensor, *, paths: bool = False) -> tuple[Tensor, Tensor]:
        """Return the reverse derivative where the wires have these values.

        With `paths` it is 1 where a change reaches a parameter or an input along some path on which
        no factor is 0, and 0 elsewhere: paths do not undo one another, as they may in Z_n.
        """
        if dy.shape != (wires.shape[1], len(self.outputs)):
            raise ValueError(f"dy must be (batch, outputs) = {(wires.shape[1], len(self.outputs))},"
                             f" got {tuple(dy.shape)}")
        reduce = saturating(1).reduce if paths else self.semiring.reduce
        changes = torch.zeros_like(wires).index_add_(0, self.outputs, dy.T.to(torch.int64))
        for kind, start, stop in reversed(self.groups):
            change, (left, right) = reduce(changes[start:stop]), self._operands(start, stop)
            if kind == "add":
                changes.index_add_(0, left, change).index_add_(0, right, change)
            elif kind == "multiply":
                to_left, to_right = change * wires[right], change * wires[left]
                changes.index_add_(0, left, to_left).index_add_(0, right, to_right)
        found = reduce(changes[:self._first]).T
        return found[:, :len(self.weight)], found[:, len(self.weight):]

    def extra_repr(self) -> str:
        """Return what a print of the circuit says."""
        return (f"inputs={self.inputs}, parameters={len(self.weight)}, outputs="
                f"{len(self.outputs)}, gates={len(self.left)}, semiring={self.semiring.name}")

    @property
    def _first(self) -> int:
        """The number of the first gate's wire."""
        return len(self.weight) + self.inputs

    def _operands(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        gates = slice(start - self._first, stop - self._first)
        return self.left[gates], self.right[gates]

    def _check(self, x: Any) -> None:
        size = self.semiring.size
        if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must hold the whole numbers 0 to {size - 1}, got {got}; threshold "
                             "it: (x > 0.5).long()")
        if x.ndim != 2 or x.shape[1] != self.inputs:
            raise ValueError(f"x must be (batch, {self.inputs}), got {tuple(x.shape)}; flatten it, "
                             "or build the circuit with as many inputs")
        if x.numel() and x.dtype != torch.bool and x.device.type == "cpu":
            low, high = x.aminmax()
            if low < 0 or high >= size:
                raise ValueError(f"x must hold the whole numbers 0 to {size - 1}, got "
                                 f"{int(low if low < 0 else high)}")


@checks.annotated
def evaluator(inputs: int, outputs: int = 1, *, semiring: Semiring | None = None
              ) -> PolynomialCircuit:
    """Return the circuit whose parameters are the table of a function: it can be any function.

    f(w, x)_j = sum_v w_jv prod_k [x_k = v_k], over all values v of the inputs; over Z_2,
    [x = 1] = x and [x = 0] = x + 1.

    Shapes: weight (outputs size^inputs,), for each output the inputs' values in counting order,
    the first input's the most significant.

    Raises:
        ValueError: there are more than a million parameters.

    Paper: Wilson, Zanasi, 2021, Reverse Derivative Ascent: A Categorical Approach to Learning
    Boolean Circuits.

    >>> circuit = evaluator(2)
    >>> circuit.weight.copy_(torch.tensor([0, 1, 1, 0])).dtype
    torch.uint8
    >>> circuit(torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])).flatten()
    tensor([0, 1, 1, 0])
    """
    chosen = modular(2) if semiring is None else semiring
    entries = chosen.size ** inputs
    _check_parameters(outputs * entries, f"inputs={inputs} and outputs={outputs}")

    def is_value(wire: Wire, value: int) -> Wire:
        if chosen.name == "Z_2":
            return wire if value else wire + 1
        return wire.equals(value)

    def function(w: list[Wire], x: list[Wire]) -> list[Wire]:
        chosen_by = [[is_value(wire, value) for value in range(chosen.size)] for wire in x]
        cells = chosen_by[0]
        for column in chosen_by[1:]:
            cells = [cell * value for cell, value in product(cells, column)]
        return [_sum([w[j * entries + i] * cell for i, cell in enumerate(cells)])
                for j in range(outputs)]

    return PolynomialCircuit(function, parameters=outputs * entries, inputs=inputs,
                             semiring=chosen)


@checks.annotated
def sum_of_products(inputs: int, outputs: int = 1, *, degree: int | None = None,
                    semiring: Semiring | None = None) -> PolynomialCircuit:
    """Return the circuit whose parameters choose among products of inputs: exclusive or is x + y.

    f(w, x)_j = sum_S w_jS prod_{k in S} x_k, over all sets S of up to `degree` inputs, the empty
    set among them; all sets where `degree` is None, which over Z_2 can be any function.

    Raises:
        ValueError: `degree` is below 0, or there are more than a million parameters.

    >>> sum_of_products(3, degree=1)
    PolynomialCircuit(inputs=3, parameters=4, outputs=1, gates=6, semiring=Z_2)
    """
    most = inputs if degree is None else degree
    checks.count(0, inputs=inputs)
    checks.count(0, degree=degree, optional=True)
    sizes = range(min(most, inputs) + 1)
    _check_parameters(outputs * sum(comb(inputs, size) for size in sizes),
                      f"inputs={inputs}, degree={degree} and outputs={outputs}")
    sets = [chosen for size in sizes for chosen in combinations(range(inputs), size)]

    def function(w: list[Wire], x: list[Wire]) -> list[Wire]:
        products: dict[tuple[int, ...], Wire] = {}
        for chosen in sets[1:]:
            products[chosen] = x[chosen[0]] if len(chosen) == 1 else \
                products[chosen[:-1]] * x[chosen[-1]]
        rows = [w[j * len(sets):(j + 1) * len(sets)] for j in range(outputs)]
        return [_sum([row[0], *(weight * products[chosen] for weight, chosen in
                                zip(row[1:], sets[1:], strict=True))]) for row in rows]

    return PolynomialCircuit(function, parameters=outputs * len(sets), inputs=inputs,
                             semiring=semiring)


def _sum(wires: list[Wire]) -> Wire:
    """Return the sum of wires as a tree, so that it is no deeper than it must be."""
    while len(wires) > 1:
        rest = wires[len(wires) // 2 * 2:]
        wires = [a + b for a, b in zip(wires[::2], wires[1::2], strict=False)] + rest
    return wires[0]


def _groups(gates: list[_Gate], first: int) -> list[tuple[str, int, int]]:
    """Return (kind, first wire, wire past the last) of each run of gates of one depth and kind."""
    found: list[tuple[str, int, int]] = []
    before = None
    for place, gate in enumerate(gates, first):
        if before == (gate.level, gate.kind):
            found[-1] = (gate.kind, found[-1][1], place + 1)
        else:
            found.append((gate.kind, place, place + 1))
        before = gate.level, gate.kind
    return found


def _check_size(size: int) -> None:
    if not 2 <= size <= 256:
        raise ValueError(f"a semiring must have 2 to 256 values, got {size}")


def _check_parameters(count: int, made_by: str) -> None:
    if not 1 <= count <= 10 ** 6:
        raise ValueError(f"{made_by} must make 1 to a million parameters, got {count}; compose "
                         "smaller circuits in an nn.Sequential")
