from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import GradientEdge, Node
from torch.nn import Parameter

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.exact.links import run_linked
from netwright.rules.rule import Rule, chain_of
from netwright.stages import Stages

__all__ = ["TwoStageBackward"]


@method("rule", papers=["003-164"], saves=["training time"], needs=["labels", "several processes"])
class TwoStageBackward(Rule):
    """Pass the gradient down through all stages first, and compute the weights' gradients after.

    First part, i = n..1:  g_{i-1} = (dh_i/dh_{i-1})^T g_i, noting the gradient delta at every
    operation that reads a weight.  Second part, in any order:  dL/dw = (do/dw)^T delta, o being
    that operation's output.

    Together they are what backpropagation does, and the gradients are equal. Nothing waits for the
    second part: in a pipeline the stage before can go on after the first, and the second fills the
    time in which a device would stand idle; `schedule` says how much that gains. With
    `rule(x, y, delay=True)` the second part is left until `rule.backward_weights()`, any number of
    batches later; the weights must not change in between.

    The two parts do no work twice: each weighted operation is split by itself, inside a stage too.
    What reads vectors alone, such as a norm, is not split, since the gradients of its parameters
    come with its input's, nor is a parameter that a stage uses more than once: those gradients are
    found in the first part and added in the second.

    Until the second part is done, all activations are kept, and the deltas with them.

    Shapes: h_i and g_i (batch, *size_i); x and y as the network and the loss take them.

    Raises:
        ValueError: nothing in the network is trainable.

    Paper: Rae, Lee, Richings, 2024, 2BP: 2-Stage Backpropagation.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = TwoStageBackward(network)
    >>> loss = rule(torch.randn(2, 4), torch.tensor([0, 2]), delay=True)
    >>> network[0].weight.grad is None
    True
    >>> rule.backward_weights()
    >>> network[0].weight.grad.shape
    torch.Size([8, 4])
    """

    keeps_activations = True

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        self.stages, self.loss = chain_of(self, network, example, loss, apart=False), loss
        self._delayed: list[Delayed] = []

    def forward(self, x: Any, y: Tensor, *, delay: bool = False) -> Tensor:
        """Add dL/dw to `.grad`, or leave that to `backward_weights`; return the detached loss."""
        links = run_linked(self.stages, self.loss, x, y)
        loss = links[-1].end
        learning = [p for p in self.network.parameters() if p.requires_grad]

        signal: Tensor | None = torch.ones_like(loss)
        found: list[Delayed] = []
        while links and signal is not None:
            start, end = links.pop()
            signal, delayed = backward_signal(end, signal, start, learning)
            found.append(delayed)
        self._delayed += found
        if not delay:
            self.backward_weights()
        return loss.detach()

    def backward_weights(self) -> None:
        """Add to `.grad` what calls with `delay=True` have left."""
        while self._delayed:
            backward_weights(self._delayed.pop(0))


class Delayed(NamedTuple):
    """What is left to do for the weights of a stage.

    Each of `operations` is an operation's outputs in the graph, the gradients there, and the
    parameters to follow them to; `done` holds parameters with gradients that are known already.
    """

    operations: list[tuple[list[GradientEdge], list[Tensor], list[Parameter]]]
    done: list[tuple[Parameter, Tensor]]


def backward_signal(end: Tensor, signal: Tensor, start: Any, parameters: Sequence[Parameter],
                    ) -> tuple[Tensor | None, Delayed]:
    """Return the gradient at `start`, given `signal` at `end`, and what is left for the weights.

    Where `start` does not require grad, its gradient is None.
    """
    edges, owners, shared = _weighted(end, parameters)
    into = [start] if isinstance(start, Tensor) and start.requires_grad else []
    asked = [edge for node in owners for edge in edges[node]]
    wanted: Any = [*into, *shared, *asked]
    if not wanted:
        return None, Delayed([], [])
    found = list(torch.autograd.grad(end, wanted, signal, retain_graph=True, allow_unused=True))
    below = [g if g is not None else torch.zeros_like(leaf)
             for leaf, g in zip(into, found, strict=False)]
    first, second = len(into), len(into) + len(shared)
    done = [(p, g) for p, g in zip(shared, found[first:second], strict=True) if g is not None]
    at = {edge: g for edge, g in zip(asked, found[second:], strict=True) if g is not None}
    operations = []
    for node, behind in owners.items():
        known = [edge for edge in edges[node] if edge in at]
        if known:
            operations.append((known, [at[edge] for edge in known], behind))
    return below[0] if below else None, Delayed(operations, done)


@torch.no_grad()
def backward_weights(delayed: Delayed) -> None:
    """Add the gradients of a stage's parameters to their `.grad`."""
    for parameter, gradient in delayed.done:
        if parameter.grad is None:
            parameter.grad = gradient.clone()
        else:
            parameter.grad += gradient
    for edges, gradients, parameters in delayed.operations:
        torch.autograd.backward(edges, gradients, inputs=parameters, retain_graph=True)


def _weighted(end: Tensor, parameters: Sequence[Parameter]) -> tuple[
        dict[Node, list[GradientEdge]], dict[Node, list[Parameter]], list[Parameter]]:
    """Return the used outputs of each operation behind `end`, who reads weights, and shared ones.

    The second maps an operation to the parameters that it alone reads; the third holds those that
    are read more than once, or by an operation that reads nothing but vectors.
    """
    if end.grad_fn is None:
        return {}, {}, []
    known, owners, shared = set(parameters), dict[Node, list[Parameter]](), list[Parameter]()
    edges: dict[Node, list[GradientEdge]] = {end.grad_fn: [GradientEdge(end.grad_fn,
                                                                       end.output_nr)]}
    readers: dict[Node, list[Node]] = {}
    leaves: list[tuple[Node, Parameter]] = []
    nodes = [end.grad_fn]
    while nodes:
        node = nodes.pop()
        for below, output in node.next_functions:
            if below is None:
                continue
            if below not in edges:
                edges[below] = []
                nodes.append(below)
                leaf = getattr(below, "variable", None)
                if leaf in known:
                    leaves.append((below, leaf))
            readers.setdefault(below, []).append(node)
            edge = GradientEdge(below, output)
            if edge not in edges[below]:
                edges[below].append(edge)
    for node, parameter in leaves:
        # Up through casts and transposes, which have nothing else to pass a gradient to.
        while len(readers.get(node, [])) == 1 and _ways(readers[node][0]) == 1:
            node = readers[node][0]
        if len(readers.get(node, [])) == 1:
            owners.setdefault(readers[node][0], []).append(parameter)
        else:
            shared.append(parameter)
    # A norm's own gradients come with its input's; apart, each would take as long as both.
    norms = {node: read for node, read in owners.items() if all(p.ndim < 2 for p in read)}
    shared += [p for read in norms.values() for p in read]
    owners = {node: read for node, read in owners.items() if node not in norms}
    return edges, owners, shared


def _ways(node: Node) -> int:
    return sum(below is not None for below, _ in node.next_functions)


def schedule(forward: Sequence[float], signals: Sequence[float], weights: Sequence[float],
             micro_batches: int, *, order: Literal["1f1b", "gpipe"] = "1f1b",
             two_stage: bool = True) -> float:
    """Return how long a pipeline takes for a step, one device a stage, in the unit of the times.

    `forward`, `signals` and `weights` hold each stage's times for one micro-batch: forward, first
    and second part of backward. In order `"gpipe"` a device runs all micro-batches forward, then
    all backward; in `"1f1b"` it goes forward n - i - 1 times in stage i of n, then forward and
    backward in turn, then backward. One micro-batch is the naive pipeline.

    A plain backward passes its gradient on after both parts. In two stages it does so after the
    first; the second, which can be broken off after each operation, fills the device's idle time
    after that, and what is left of it comes behind everything. Sending takes no time.

    With all times 1:  plain 3 (m + n - 1);  two-stage 3 m + n - 1 (1f1b, m >= n),
    3 m + 2 (n - 1) (gpipe).

    Raises:
        ValueError: the times are not of the same number of stages, or `micro_batches` is below 1.
        UnknownName: `order` is neither.

    >>> ones = [1, 1, 1, 1]
    >>> schedule(ones, ones, ones, 4, two_stage=False), schedule(ones, ones, ones, 4)
    (21, 15.0)
    """
    if not len(forward) == len(signals) == len(weights) > 0:
        raise ValueError("forward, signals and weights must have a time for each stage, got "
                         f"{len(forward)}, {len(signals)} and {len(weights)}")
    checks.count(1, micro_batches=micro_batches)
    checks.one_of(["1f1b", "gpipe"], order=order)
    n, down = len(forward), list(signals)
    if not two_stage:
        down = [a + b for a, b in zip(signals, weights, strict=True)]
    plans = [_order(i, n, micro_batches, order) for i in range(n)]
    finished: dict[tuple[str, int, int], float] = {}
    busy: list[list[tuple[str, float, float]]] = [[] for _ in range(n)]  # kind, start, end
    while any(plans):
        for i, plan in enumerate(plans):
            while plan:
                kind, batch = plan[0]
                needed = [("F", i - 1, batch)] if kind == "F" and i else []
                if kind == "B":
                    needed = [("F", i, batch), *([("B", i + 1, batch)] if i < n - 1 else [])]
                if not all(task in finished for task in needed):
                    break
                start = max([busy[i][-1][2] if busy[i] else 0, *[finished[t] for t in needed]])
                end = start + (forward if kind == "F" else down)[i]
                finished[kind, i, batch] = end
                busy[i].append((kind, start, end))
                plan.pop(0)
    if not two_stage:
        return max(tasks[-1][2] for tasks in busy)
    return max(_filled(tasks, time) for tasks, time in zip(busy, weights, strict=True))


def _order(stage: int, stages: int, micro_batches: int, order: str) -> list[tuple[str, int]]:
    ahead = micro_batches if order == "gpipe" else min(stages - stage - 1, micro_batches)
    plan = [("F", batch) for batch in range(ahead)]
    for batch in range(ahead, micro_batches):
        plan += [("F", batch), ("B", batch - ahead)]
    return plan + [("B", batch) for batch in range(micro_batches - ahead, micro_batches)]


def _filled(busy: Sequence[tuple[str, float, float]], time: float) -> float:
    """Return when a device is done that spends its idle time on what its backwards have left."""
    left, done = 0.0, 0.0
    for kind, start, end in busy:
        left = max(0.0, left - (start - done)) + (time if kind == "B" else 0)
        done = end
    return done + left
