import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.readout import Readout, count_classes, first_parameter, mean_of_tokens, widths
from netwright.rules.rule import Rule, chain_of, checked
from netwright.runtime.modes import evaluating
from netwright.stages import Stages

__all__ = ["CascadedForward"]


@method(
    "rule",
    papers=["004-029"],
    saves=["backpropagation", "training memory", "training time"],
    needs=["classes", "a chain of stages"],
)
class CascadedForward(Rule):
    """Leave the hidden stages as they are, and train a class guess on the output of each.

    a_i = stage_i(a_{i-1});  G_i = a_i M_i^T;  L_i = loss(G_i, y);  M_i descends L_i and nothing
    else does. The last stage returns class scores: it is what the last hidden stage's guess is
    read off by, so G_{n-1} = a_n, and it descends its loss.
    predict: log of the mean over i of softmax(G_i).

    Hidden stages are what they were when the rule was built: random in the paper's plain variant.
    In its other variant they are trained by direct feedback alignment first. That is a call of
    its own here: `fit` the network with `DirectFeedbackAlignment` (or any rule, or load weights)
    and give it to this one.

    No stage needs a derivative but the last, nothing is kept for a backward pass but what a matrix
    reads, and every guess is a convex problem. The returned loss is the mean of the L_i. In train
    mode, norms of hidden stages go on to estimate their statistics.

    The paper's networks end in a hidden block, and each block has a predictor; with one linear
    layer last, as networks have it here, that is the same. Its other losses, of which the squared
    one has a closed form for a whole data set and the other is sparsemax's, are for `loss`. Where
    h is tokens and there is a label for each sample, guesses are read off the tokens' mean; h of
    any other shape is flattened.

    Args:
        num_classes: the number of classes; by default the width of the network's output.

    Shapes: a_i (batch, *size_i); M_i (classes, features_i); y (batch,), or (batch, tokens).

    Raises:
        ValueError: `num_classes` is not what the last stage returns, or is needed and missing; or
            the network has one stage.

    Paper: Zhao, Wang, Li, Jin, Lang, Ling, 2023, The Cascaded Forward Algorithm for Neural Network
    Training. Compared with others in Spyra, 2025, Beyond Backpropagation: Exploring Innovative
    Algorithms for Energy-Efficient Deep Neural Network Training.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(),
    ...                         nn.Linear(6, 3))
    >>> rule = CascadedForward(network)
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> network[0].weight.grad is None, rule.predictors[0].weight.grad.shape
    (True, torch.Size([3, 8]))
    """

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 num_classes: int | None = None,
                 loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        self.stages, self.loss = chain_of(self, network, example, loss), loss
        if len(self.stages) < 2:
            raise ValueError("network must have a hidden stage to read a guess off, got the one "
                             f"stage {self.stages.names[0]!r}; use Backprop, or cut it by cuts=")
        (*hidden, last), channels_first = widths(self.stages, example)
        self.num_classes = count_classes(self.stages, num_classes, last)
        # The last hidden stage's guess is the last stage's output.
        self.predictors = nn.ModuleList(
            Readout(name, width, self.num_classes, channels_first=first, generator=generator,
                    like=first_parameter(self.stages))
            for name, width, first in zip(self.stages.names[:-2], hidden, channels_first,
                                          strict=False))

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add each guess's own gradient to `.grad`; return the mean of the guesses' losses."""
        context, h = self.stages.context(x), x
        *hidden, last = self.stages
        losses = []
        for stage, predictor in zip(hidden, [*self.predictors, None], strict=True):
            with torch.no_grad():
                h = stage(h, context)
            scores = last(h, context) if predictor is None else predictor(h, y, x)
            loss = checked(self.loss, scores, y)
            if loss.requires_grad:  # not so in a last stage that is frozen
                loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return the log of the mean of all guesses' softmax, in eval mode, without a graph."""
        with evaluating(self):
            context, h, scores = self.stages.context(x), x, []
            for stage, predictor in zip(self.stages, [*self.predictors, None, None], strict=True):
                h = stage(h, context)
                scores += [] if predictor is None else [predictor(h)]
        # Tokens keep their own scores until it is known whether the network pools them.
        pooled = [mean_of_tokens(s, x) if s.ndim > h.ndim else s for s in scores]
        guesses = torch.stack([s.to(h.dtype).log_softmax(-1) for s in [*pooled, h]])
        return guesses.logsumexp(0) - math.log(len(guesses))
