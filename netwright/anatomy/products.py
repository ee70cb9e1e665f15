"""Where a run multiplied by weights: linear maps and convolutions, whatever wrote them."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from netwright.anatomy.run import Operation, Run, Value

# Where the two factors stand among the arguments.
_FACTORS = {"mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1), "addmm": (1, 2),
            "addbmm": (1, 2), "baddbmm": (1, 2), "addmv": (1, 2), "linear": (0, 1),
            "_grouped_mm": (0, 1), "convolution": (0, 1)}


@dataclass(frozen=True, eq=False)
class Product:
    """One application of weights.

    `name` is the module that holds the weight, or the weight itself where that module has
    several; `weight` is None where it was computed from others. `taken` and `gave` are the values
    that go in and come out, the bias included.
    """

    name: str
    weight: str | None
    operation: Operation
    taken: int
    gave: int
    inputs: int
    outputs: int

    @property
    def convolution(self) -> bool:
        """Whether it is a convolution."""
        return self.operation.name == "convolution"


def factors(operation: Operation) -> tuple[int, int] | None:
    """Return the two tensors that `operation` multiplies and sums over, None for any other."""
    places = _FACTORS.get(operation.name)
    if places is None:
        return None
    one, two = (operation.arguments[0][place] for place in places)
    return (one.number, two.number) if isinstance(one, Value) and isinstance(two, Value) else None


def products(run: Run) -> list[Product]:
    """Return the applications of weights in `run`, in their order."""
    found = []
    for operation in run.operations:
        pair = factors(operation)
        if pair is None or run.learned(pair[0]) == run.learned(pair[1]):
            continue
        taken, weight = pair if run.learned(pair[1]) else pair[::-1]
        inputs, outputs = _sizes(run, operation, weight, first=weight == pair[0])
        number = run.source(weight)
        name, parameter = named(run, operation, number)
        found.append(Product(name, parameter, operation, taken,
                             _with_bias(run, operation.gave[0], outputs), inputs, outputs))
    return found


def _sizes(run: Run, operation: Operation, weight: int, first: bool) -> tuple[int, int]:
    """Return how many features go in and come out."""
    shape = run.shapes[weight]
    if operation.name == "convolution":
        arguments: Any = operation.arguments[0]
        transposed, groups = arguments[6], arguments[8]
        return ((shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0]))
    if len(shape) < 2:
        return shape[0], 1
    if first or operation.name == "linear":
        return shape[-1], shape[-2]
    return shape[-2], shape[-1]


def named(run: Run, operation: Operation, number: int) -> tuple[str, str | None]:
    """Return the name of a weight's place, and the weight's own where it is a parameter."""
    call = operation.call
    inner = call.name if call is not None else ""
    parameter = run.parameters.get(number)
    if parameter is None:
        return inner, None
    owner, _, own = parameter.rpartition(".")
    if call is not None and call.name != owner:  # a weight that is tied to another module's
        held = dict(run.network.named_parameters(remove_duplicate=False))
        for short, p in call.module.named_parameters(recurse=False):
            if p is held[parameter]:
                owner, own = inner, short
    place: nn.Module = run.network.get_submodule(owner)
    alone = own == "weight" or not [*place.children()]
    matrices = [p for p in place.parameters(recurse=False) if p.ndim > 1]
    return (owner if owner and alone and len(matrices) == 1 else f"{owner}.{own}".lstrip("."),
            parameter)


def _with_bias(run: Run, number: int, outputs: int) -> int:
    """Return the value that has the bias added, where one is added apart from the product."""
    last = number
    while len(run.readers[last]) == 1:
        operation = run.readers[last][0]
        if operation.name == "add":
            others = [n for n in operation.taken if n != last]
            if others and all(run.learned(n) and run.shapes[n] == (outputs,) for n in others):
                return operation.gave[0]
        if not operation.layout or operation.taken[0] != last:
            break
        last = operation.gave[0]
    return number
