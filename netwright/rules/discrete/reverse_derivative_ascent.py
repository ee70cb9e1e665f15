from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.formal.circuits import PolynomialCircuit, evaluator
from netwright.rules.rule import Rule, check_labels
from netwright.runtime.modes import evaluating
from netwright.stages import Stages

__all__ = ["ReverseDerivativeAscent"]


@method(
    "rule",
    papers=["001-034"],
    saves=["backpropagation", "derivatives"],
    needs=["classes", "a circuit"],
    network=lambda: evaluator(2, 3),
    batch=lambda: _bits(),
)
class ReverseDerivativeAscent(Rule):
    """Train the bits of a circuit themselves, by the reverse derivative of its error.

    dy = code(y) - f(w, x);  (dw, dx) = R f(w, x, dy);  w := w + dw, all in the circuit's semiring.

    Over Z_2 the error is the exclusive or of output and target, and a step turns the bits that the
    wrong outputs depend on. There is no real number, rate or optimizer, and the weights are changed
    when the rule is called (`updates_weights`). Circuits in an `nn.Sequential` pass dx on as dy.

    The paper learns from one sample after the other, which a batch of one does. In a larger batch
    each parameter takes the change that most of the samples ask for whose output depends on it, the
    smallest where as many ask for others; adding all up would undo what two samples agree on.

    A class is coded by as many outputs as there are classes, one of them 1 (`codes="one-hot"`), or
    by the digits of its number, the first output's the most significant (`"binary"`, the default
    for one output). The class that is predicted is the one from whose code the fewest outputs
    differ. The returned loss is the share of samples with a wrong output.

    Args:
        codes: "one-hot" or "binary"; by default binary where the circuit has one output.
        num_classes: the number of classes; by default as many as the outputs can code.

    Shapes: x (batch, inputs) of whole numbers or bools; y (batch,); dw (parameters,).

    Raises:
        ValueError: the network is no circuit, or its outputs do not code the classes.

    Paper: Wilson, Zanasi, 2021, Reverse Derivative Ascent: A Categorical Approach to Learning
    Boolean Circuits.

    >>> from netwright.formal.circuits import evaluator
    >>> rule = ReverseDerivativeAscent(evaluator(2))
    >>> x, y = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]), torch.tensor([0, 1, 1, 0])
    >>> rule(x, y), rule(x, y), rule.predict(x).argmax(1)
    (tensor(0.5000), tensor(0.), tensor([0, 1, 1, 0]))
    """

    updates_weights = True
    codes: Tensor

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 codes: Literal["one-hot", "binary"] | None = None, num_classes: int | None = None,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        self.circuits = _circuits(self.network)
        checks.one_of(["one-hot", "binary"], code_of_classes=codes, optional=True)
        last = self.circuits[-1]
        self.register_buffer("codes", _codes(codes, num_classes, len(last.outputs),
                                             last.semiring.size))
        if example is not None:
            with torch.no_grad():
                self.network(example)

    @torch.no_grad()
    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Change the weights by the batch; return the share of samples with a wrong output."""
        check_labels(y, len(self.codes))
        output = x[0] if isinstance(x, (tuple, list)) and len(x) == 1 else x
        wires = []
        for circuit in self.circuits:
            wires.append(circuit.wires(output))
            output = wires[-1][circuit.outputs].T
        if y.shape != (len(output),):
            raise ValueError(f"y must hold one class for each of the {len(output)} samples, got "
                             f"{tuple(y.shape)}")
        counted = y != -100
        wanted = self.codes[y.clamp(min=0)]
        dy = self.circuits[-1].semiring.minus(wanted, output) * counted.unsqueeze(1)
        reach = counted.unsqueeze(1).expand_as(output)
        steps = []
        for circuit in reversed(self.circuits):
            values = wires.pop()
            dw, dy = circuit.pull(values, dy)
            reached, reach = circuit.pull(values, reach, paths=True)
            steps.append((circuit, _most_asked(dw, reached.bool(), circuit.semiring.size)))
        for circuit, step in steps:
            if circuit.weight.numel():
                circuit.weight.copy_(circuit.semiring.reduce(circuit.weight.to(torch.int64) + step))
        wrong = (wanted != output).any(1) & counted
        return wrong.sum() / counted.sum().clamp(min=1)

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return minus the number of outputs that differ from each class's code."""
        with evaluating(self):
            output = super().predict(x)
        return -(output.unsqueeze(1) != self.codes).sum(2).float()


def _most_asked(dw: Tensor, reached: Tensor, size: int) -> Tensor:
    """Return for each parameter the change that most of the samples that reach it ask for."""
    votes = torch.stack([((dw == value) & reached).sum(0) for value in range(size)])
    return votes.argmax(0)


def _circuits(network: nn.Module) -> list[PolynomialCircuit]:
    found = list(network) if isinstance(network, nn.Sequential) else [network]
    for part in found:
        if not isinstance(part, PolynomialCircuit):
            raise ValueError("network must be a PolynomialCircuit or an nn.Sequential of them, got "
                             f"{type(part).__name__}; build one with netwright.circuits, such as "
                             "evaluator(inputs, outputs)")
    if not found:
        raise ValueError("network must hold at least one PolynomialCircuit, got an empty "
                         "nn.Sequential")
    circuits = [part for part in found if isinstance(part, PolynomialCircuit)]
    for before, after in pairwise(circuits):
        if len(before.outputs) != after.inputs or before.semiring.name != after.semiring.name:
            raise ValueError(
                f"a circuit of {after.inputs} inputs over {after.semiring.name} cannot follow one "
                f"of {len(before.outputs)} outputs over {before.semiring.name}; make them equal")
    return circuits


def _codes(kind: str | None, classes: int | None, outputs: int, size: int) -> Tensor:
    """Return the outputs that stand for each class (classes, outputs)."""
    kind = kind or ("one-hot" if outputs > 1 else "binary")
    most = outputs if kind == "one-hot" else size ** outputs
    count = min(most, 2 ** 16) if classes is None else classes
    if not 2 <= count <= most or (kind == "one-hot" and count != most):
        raise ValueError(f"num_classes={classes} must be {'' if kind == 'one-hot' else '2 to '}"
                         f"{most} for a {kind} code of {outputs} outputs; change the number of "
                         "the circuit's outputs, or codes")
    if kind == "one-hot":
        return torch.eye(count, dtype=torch.int64)
    powers = size ** torch.arange(outputs - 1, -1, -1)
    return torch.arange(count).unsqueeze(1) // powers % size


def _bits() -> tuple[Tensor, Tensor]:
    bits = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]] * 2)
    return bits, bits.sum(1)
