from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.exact.links import Link, run_linked
from netwright.rules.residual_path import is_added
from netwright.rules.rule import Rule, chain_of
from netwright.stages import Stages

__all__ = ["HighwayBackprop"]


@method(
    "rule",
    papers=["001-125"],
    needs=["labels", "a residual network"],
    search={"iterations": [1, 2, 4, 8]},
)
class HighwayBackprop(Rule):
    """Train with a gradient that runs along the residual path first and through the blocks after.

    In a run of residual stages h_i = h_{i-1} + f_i(h_{i-1}), i = 1..m, the gradient g_m at its end
    being known:  g_i^0 = g_m;  g_i^{t+1} = g_m + sum_{j>i} (df_j/dh_{j-1})^T g_j^t.
    After `iterations` = k of these, g_i^k is the sum over all paths that pass through at most k
    blocks of the run; k >= m gives the exact gradient. Then dL/dw_i := (dh_i/dw_i)^T g_i^k.

    The blocks of a run are differentiated independently of one another, so that each iteration is
    one step of a machine that has room for all of them, and the sum is one cumulative sum.
    `sequential_steps` holds how many such steps the last call took, one after another:
    min(k, m) for each run and 1 for each other stage. Backpropagation takes one for every stage.

    A stage is residual if its output has its input's shape and dtype and is the input plus
    something, which is read off the graph: additions alone lead from one to the other. `residual`
    names the stages instead, which helps where a norm or an activation follows the addition; f_i
    is then whatever the stage does beyond the identity. The gradient passes exactly through every
    other stage, and iterations begin anew behind it. The paper counts blocks over the whole
    network instead, and carries the gradient past a change of shape by the shortcut alone. A
    network without residual stages is trained by backpropagation.

    Not here: the paper's form for recurrent networks, which runs along time instead of depth.

    Args:
        iterations: k, the most blocks of a run that a path of the gradient passes through.
        residual: names of the residual stages; by default they are found.

    Shapes: h_i and g_i (batch, *size), equal in a run; x and y as the network and the loss take
    them.

    Raises:
        ValueError: `iterations` is negative, a stage in `residual` changes the shape, or nothing
            in the network is trainable.
        UnknownName: `residual` names no stage.

    Paper: Fagnou, Caillon, Delattre, Allauzen, 2025, Accelerated Training through Iterative
    Gradient Propagation Along the Residual Path.

    >>> from netwright.models import gpt
    >>> rule = HighwayBackprop(gpt(20, 8, width=16, depth=6), iterations=2)
    >>> x = torch.randint(20, (2, 8))
    >>> rule(x, x).requires_grad
    False
    >>> rule.sequential_steps, len(rule.stages)
    (5, 8)
    """

    def __init__(self, network: nn.Module | Stages, example: Any = None, *, iterations: int = 4,
                 residual: Iterable[str] | None = None,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.count(0, iterations=iterations,
                     advice="0 is the residual path alone, and the number of stages gives the "
                            "exact gradient")
        self.stages = chain_of(self, network, example, loss, apart=False)
        self.loss, self.iterations = loss, iterations
        self.residual = None if residual is None else list(residual)
        for name in self.residual or ():
            checks.one_of(self.stages.names, stage=name)
        self.sequential_steps = 0

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the approximate gradient to `.grad`; return the detached loss."""
        links = run_linked(self.stages, self.loss, x, y)
        residual = [self._is_residual(name, link)
                    for name, link in zip(self.stages.names, links, strict=True)]
        loss, learning = links[-1].end, [p for p in self.network.parameters() if p.requires_grad]
        signal, steps = torch.ones_like(loss), 0
        # A graph is freed when its link goes; what several stages share must outlast the first.
        while links and links[-1].end.requires_grad:
            run: list[Link] = []
            while residual[len(links) - 1]:  # never so in the first stage
                run.insert(0, links.pop())
            if run:
                steps += min(self.iterations, len(run))
                signals, signal = self._along(run, signal)
                torch.autograd.backward([link.end for link in run], signals, retain_graph=True,
                                        inputs=learning)
                continue
            steps += 1
            start, end = links.pop()
            into = [start] if isinstance(start, Tensor) and start.requires_grad else []
            torch.autograd.backward(end, signal, retain_graph=True, inputs=[*into, *learning])
            for h in into:
                signal = torch.zeros_like(h) if h.grad is None else h.grad
        self.sequential_steps = steps
        return loss.detach()

    def _is_residual(self, name: str, link: Link) -> bool:
        start, end = link
        if name in (self.stages.names[0], self.stages.names[-1]) or not start.requires_grad:
            return False
        fits = end.shape == start.shape and end.dtype == start.dtype
        if self.residual is None:
            return fits and is_added(start, end)
        if name in self.residual and not fits:
            raise ValueError(f"residual names stage {name!r}, whose output must have its input's "
                             f"shape and dtype, got {tuple(end.shape)} of {end.dtype} from "
                             f"{tuple(start.shape)} of {start.dtype}; leave it out")
        return name in self.residual

    def _along(self, run: Sequence[Link], top: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the gradient at each stage's output in a run, and at the run's input."""
        signals, bottom = [top] * len(run), top
        through = [torch.zeros_like(top) for _ in run]
        for t in range(min(self.iterations, len(run))):
            moved = run[:len(run) - t]  # the signals above have settled
            found = torch.autograd.grad([link.end for link in moved],
                                        [link.start for link in moved], signals[:len(moved)],
                                        retain_graph=True, materialize_grads=True)
            through[:len(moved)] = [g - signal for g, signal in zip(found, signals, strict=False)]
            *above, bottom = torch.stack([top, *reversed(through)]).cumsum(0)
            signals = above[::-1]
        return signals, bottom
