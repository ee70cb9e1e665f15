from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.errors import UnknownName
from netwright.objectives.losses import cross_entropy
from netwright.rules.feedback.inputs import MIXING
from netwright.rules.feedback.matrices import Matrices, draw
from netwright.rules.readout import first_parameter, mean_of_tokens, widths
from netwright.rules.rule import Rule, chain_of, check_labels, checked
from netwright.stages import Stage, Stages

__all__ = ["TargetProjection"]

Distance = Callable[[Tensor, Tensor], Tensor]
DISTANCES: dict[str, Distance] = {"squared": lambda a, t: (a - t).square(),
                                  "absolute": lambda a, t: (a - t).abs(),
                                  "direct": lambda a, t: -a * t}


@method(
    "rule",
    papers=["004-005"],
    saves=["backpropagation", "training memory"],
    needs=["labels", "a chain of stages"],
    search={"scale": (0.3, 3.0)},
    variants={"plain": {}, "absolute": {"distance": "absolute"},
              "direct": {"distance": "direct"}},
)
class TargetProjection(Rule):
    """Train every hidden stage towards a fixed random projection of the label.

    h_i = stage_i(h_{i-1}), h_{i-1} cut off from its graph;  a_i = the mean of h_i over positions;
    t_i = act_i(y* P_i);  L_i = mean distance(a_i, t_i);  L_n = loss(h_n, y);  stage i descends L_i.
    squared: (a - t)^2;  absolute: |a - t|;  or any function of a and t, unit by unit, the mean over
    units;  direct: -a t with t = y* P, their sum over units, so that a sample's own dL_i/da_i is
    -y* P_i: direct random target projection. All are means over samples.
    P_i ~ N(0, scale^2), fixed;  y* is the one-hot label, or `y` itself where it is like the output.
    Stages that use the same weights, such as a layer that runs twice, have one P.

    No gradient passes from one stage to another, and a stage's activations are freed before the
    next stage runs. Labels of -100 do not count. The returned loss is the last stage's.

    act_i are the activations that end a stage, so that it can reach its target: behind a ReLU the
    projection is rectified, behind a recurrent layer it is tanh's. The mean is taken over the
    positions of maps and over tokens (without padding), unless each token has a label of its own.
    All this, and how P is drawn, are choices of this rule: trained towards a target at each
    position, or at each step of a sequence, networks learned less.

    Within a stage the derivative is exact, in a recurrent layer through all its steps.

    Args:
        distance: "squared", "absolute", "direct" or a function of a and t.
        scale: of the projections, above 0.

    Shapes: h_i (batch, *size_i); a_i, t_i (batch, features_i), or (batch, tokens, features_i);
    P_i (classes, features_i); y (batch,), (batch, tokens), or as the output.

    Raises:
        UnknownName: `distance` is none of those named.
        ValueError: no example; `scale` is not above 0; targets that are neither class numbers nor
            shaped as the output, or not one for each sample.

    Papers: Lomnitz, Daniels, Zhang, Piacentino, 2022, Learning with Local Gradients at the Edge.
    Frenkel, Lefebvre, Bol, 2021, Learning Without Feedback: Fixed Random Learning Signals Allow
    for Feedforward Training of Deep Neural Networks (`direct`).

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> rule = TargetProjection(network, torch.randn(2, 4))
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> rule.projections["0"].shape
    torch.Size([3, 8])
    """

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 distance: Literal["squared", "absolute", "direct"] | Distance = "squared",
                 scale: float = 1.0, loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        if isinstance(distance, str) and distance not in DISTANCES:
            raise UnknownName("distance", distance, list(DISTANCES))
        checks.above(0, scale=scale, advice="try 1")
        if example is None:
            raise ValueError("example must be an input of the network, got None; the projections "
                             "take their sizes from it")
        self.stages = chain_of(self, network, example, loss)
        self.loss, self.distance = loss, distance
        shapes = [row["shape"] for row in self.stages.table(example)]
        _, channels_first = widths(self.stages, None)
        self._tokens = [len(shape) == 3 and not first
                        for shape, first in zip(shapes, channels_first, strict=True)]
        self._output = torch.Size(shapes[-1][2 if self._tokens[-1] else 1:])
        self._ends = [[] if distance == "direct" else _ends_of(stage) for stage in self.stages]
        self.projections = Matrices(learned=False)
        like = first_parameter(self.stages)
        drawn: dict[tuple[frozenset[int], int], str] = {}
        self._homes: list[str] = []  # the name under which each hidden stage's P is kept
        for stage, shape, tokens in zip(list(self.stages)[:-1], shapes, self._tokens,
                                        strict=False):
            width = shape[-1] if tokens else shape[1]
            # weights that run twice cannot go towards two targets
            home = drawn.setdefault((frozenset(map(id, stage.parameters())), width), stage.name)
            self._homes.append(home)
            if home == stage.name:
                self.projections.add(home, draw((self._output.numel(), width), scale,
                                                torch.empty(0) if like is None else like,
                                                generator))

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add each stage's own gradient to `.grad`; return the loss of the network's output."""
        if self.loss is cross_entropy or not y.is_floating_point():
            check_labels(y, self._output[-1])
        elif y.shape[2 if self._tokens[-1] else 1:] != self._output:
            raise ValueError("y must hold class numbers of dtype int64 or be shaped as the output "
                             f"(batch, {', '.join(map(str, self._output))}), got {y.dtype} of "
                             f"{tuple(y.shape)}; use y.long() or y.view_as(output)")
        context, h, last = self.stages.context(x), x, len(self.stages) - 1
        for i, stage in enumerate(self.stages):
            h = stage(h, context)
            loss = checked(self.loss, h, y) if i == last else self._apart(i, h, y, x)
            if loss.requires_grad:  # not so in a stage that is frozen
                loss.backward()
            h = h.detach()
        return loss.detach()

    def _apart(self, i: int, h: Tensor, y: Tensor, x: Any) -> Tensor:
        """Return how far the output of hidden stage `i` is from its targets."""
        a, t = self._features(i, h, y, x), self._targets(i, y)
        if a.shape != t.shape:
            raise ValueError(
                f"y must have a target for each row of stage {self.stages.names[i]}, which gives "
                f"{tuple(a.shape)}, got targets of {tuple(t.shape)} from y of {tuple(y.shape)}; "
                "give as many as there are samples, and build the rule with an example like x")
        distance = DISTANCES[self.distance] if isinstance(self.distance, str) else self.distance
        each = distance(a, t.to(a.dtype))
        apart = each.sum(-1) if self.distance == "direct" else each.mean(-1)
        if y.is_floating_point():
            return apart.mean()
        counted = y != -100
        return (apart * counted).sum() / counted.sum().clamp(min=1)

    def _features(self, i: int, h: Tensor, y: Tensor, x: Any) -> Tensor:
        if self._tokens[i]:
            return h if y.shape[:2] == h.shape[:2] else mean_of_tokens(h, x)
        return h if h.ndim == 2 else h.flatten(2).mean(2)

    def _targets(self, i: int, y: Tensor) -> Tensor:
        P = self.projections[self._homes[i]]
        if y.is_floating_point():
            t = y.flatten(2 if self._tokens[-1] else 1).to(P.dtype) @ P
        else:
            t = P[y.clamp(min=0)]
        for activation in self._ends[i]:
            t = activation(t)
        return t


def _ends_of(stage: Stage) -> list[nn.Module]:
    """Return the activations of `stage` that stand after its last weighted module."""
    ends: list[nn.Module] = []
    for module in stage.modules:
        weighted = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
        if weighted:
            within = getattr(weighted[-1], "nonlinearity", "tanh")  # an nn.RNN's
            recurrent = isinstance(weighted[-1], (nn.RNNBase, nn.RNNCellBase))
            ends = [nn.ReLU() if within == "relu" else nn.Tanh()] if recurrent else []
        elif type(module).__module__ == "torch.nn.modules.activation" and not isinstance(
                module, MIXING):
            ends.append(module)
    return ends
