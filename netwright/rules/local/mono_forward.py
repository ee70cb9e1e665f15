from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.readout import Readout, count_classes, first_parameter, mean_of_tokens, widths
from netwright.rules.rule import Rule, chain_of, checked
from netwright.runtime.modes import evaluating
from netwright.stages import Stages

__all__ = ["MonoForward"]


@method(
    "rule",
    papers=["003-039", "004-029"],
    saves=["backpropagation", "training memory"],
    needs=["classes", "a chain of stages"],
    variants={"plain": {}, "summed": {"predict_by": "sum"}},
)
class MonoForward(Rule):
    """Train every stage by the class scores that a matrix of its own reads off its output.

    a_i = stage_i(a_{i-1}), a_{i-1} cut off from its graph;  G_i = a_i M_i^T;  L_i = loss(G_i, y);
    both stage i and M_i descend L_i. The last stage's output is class scores, so G_n = a_n.

    No gradient passes from one stage to another, and a stage's activations are freed before the
    next stage runs. The returned loss is the mean of the L_i.

    The paper's network ends in a hidden layer, whose matrix gives the class; here the last stage
    is that matrix, and the hidden layer before it has one of its own to learn by. Where h is
    tokens and there is a label for each sample, the scores are read off the tokens' mean; h of
    any other shape is flattened.

    `predict_by="last"` gives the network's own output, so that the matrices can be thrown away
    after training; `"sum"` adds up the scores of all stages.

    Args:
        num_classes: the number of classes; by default the width of the network's output.
        predict_by: "last", the network's own output, or "sum", the scores of all stages added up.

    Shapes: a_i (batch, *size_i); M_i (classes, features_i); y (batch,), or (batch, tokens).

    Raises:
        ValueError: `num_classes` is not what the last stage returns, or is needed and missing.

    Paper: Gong, Li, Abdulla, 2025, Mono-Forward: Backpropagation-Free Algorithm for Efficient
    Neural Network Training Harnessing Local Errors.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = MonoForward(network)
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> [projection.weight.shape for projection in rule.projections]
    [torch.Size([3, 8])]
    """

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 num_classes: int | None = None, predict_by: Literal["last", "sum"] = "last",
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.one_of(["last", "sum"], way_of_predicting=predict_by)
        self.stages = chain_of(self, network, example, loss)
        self.loss, self.predict_by = loss, predict_by
        (*hidden, last), channels_first = widths(self.stages, example)
        self.num_classes = count_classes(self.stages, num_classes, last)
        self.projections = nn.ModuleList(
            Readout(name, width, self.num_classes, channels_first=first, generator=generator,
                    like=first_parameter(self.stages))
            for name, width, first in zip(self.stages.names, hidden, channels_first, strict=False))

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add each stage's own gradient to `.grad`; return the mean of the stages' losses."""
        context, h = self.stages.context(x), x
        losses = []
        for stage, projection in zip(self.stages, [*self.projections, None], strict=True):
            h = stage(h, context)
            loss = checked(self.loss, h if projection is None else projection(h, y, x), y)
            if loss.requires_grad:  # not so in a last stage that is frozen
                loss.backward()
            losses.append(loss.detach())
            h = h.detach()
        return torch.stack(losses).mean()

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return the last stage's scores or the sum of all, in eval mode, without a graph."""
        if self.predict_by == "last":
            return super().predict(x)
        with evaluating(self):
            context, h, scores = self.stages.context(x), x, []
            for stage, projection in zip(self.stages, [*self.projections, None], strict=True):
                h = stage(h, context)
                # Tokens keep their own scores until it is known whether the network pools them.
                scores.append(h if projection is None else projection(h))
        return sum((mean_of_tokens(s, x) if s.ndim > h.ndim else s for s in scores),
                   torch.zeros_like(h))
