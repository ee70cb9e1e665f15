import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.generative.flows.coupling import AffineCouplingTransform
from netwright.generative.flows.flow import Flow, Transform
from netwright.reversing.engine import Regroup, Step, Update, run

__all__ = ["LabelFlow", "weak_constraint_loss"]


@method(
    "generative",
    papers=["003-157"],
    place="whole network",
    takes=("label_dim", "cond_dim"),
    saves=["labels"],
    search={"blocks": [4, 8], "clamp": [0.5, 1.0]},
    variants={"small": {"blocks": 2, "hidden": 8}},
    batch=lambda: (torch.rand(7, 2), torch.randn(7, 5)),
)
class LabelFlow(Flow):
    """A density of the labels that a sample may have, given the sample.

    log p(y | x) = log N(f(y; x); 0, I) + log |det df/dy|;  y = f^-1(z; x), z ~ N(0, I).

    f is a chain of affine couplings between two halves of y, whose scales and shifts are made of
    the other half and x. A prediction is the mean of some labels drawn for x, each cut to [0, 1].

    `weak_constraint_loss` trains it without labels, from weak signals and bounds on how often they
    err, through the inverse: that stores nothing between the couplings either.

    Args:
        label_dim: The entries of a label: one for each class.
        cond_dim: The features of a sample x.
        blocks: How often each half is changed.
        hidden: The width of the networks.
        clamp: What the logarithm of a scale stays below.

    Shapes: x, as the condition, (batch, cond_dim); y and z (batch, label_dim).

    Raises:
        ValueError: a size is too small.

    Paper: Lu, Song, Arachie, Huang, 2025, Weakly Supervised Label Learning Flows.

    >>> flow, x = LabelFlow(2, cond_dim=5), torch.randn(7, 5)
    >>> flow.log_prob(torch.rand(7, 2), x).shape, flow.predict(x).shape
    (torch.Size([7]), torch.Size([7, 2]))
    """

    def __init__(self, label_dim: int, cond_dim: int, blocks: int = 8, *, hidden: int = 64,
                 clamp: float = 0.5) -> None:
        checks.count(2, label_dim=label_dim, advice="it is an entry for each class")
        checks.count(1, cond_dim=cond_dim, blocks=blocks, hidden=hidden)
        sizes = label_dim - label_dim // 2, label_dim // 2
        parts: list[Transform] = []
        for i in range(2 * blocks):
            changed, kept = sizes if i % 2 == 0 else sizes[::-1]
            parts.append(AffineCouplingTransform(_Conditional(kept, cond_dim, changed, hidden),
                                                 sizes, clamp=clamp, flip=bool(i % 2)))
        super().__init__(parts, label_dim)

    def drawn(self, x: Tensor, *, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return a label for each sample and its log p(y | x), with gradients to the weights."""
        device = x.device if generator is None else generator.device
        z = torch.randn(len(x), *self.size, generator=generator, dtype=x.dtype,
                        device=device).to(x.device)
        y, log_det = run([_undone(step) for step in reversed(self.steps(x))],
                         [z, z.new_zeros(len(z))])
        return y, self._base_log_prob(z) - log_det

    @torch.no_grad()
    def predict(self, x: Tensor, samples: int = 10, *,
                generator: Generator | None = None) -> Tensor:
        """Return the mean of `samples` labels for each sample, each cut to [0, 1]."""
        checks.count(1, samples=samples)
        labels = [self.drawn(x, generator=generator)[0].clamp(0, 1) for _ in range(samples)]
        return torch.stack(labels).mean(0)


@method("companion", papers=["003-157"])
def weak_constraint_loss(flow: LabelFlow, x: Tensor, signals: Tensor, bounds: Tensor, *,
                         weight: float = 10.0, generator: Generator | None = None) -> Tensor:
    """Return how unlikely the labels are that a flow draws, and how far from what is permitted.

    y ~ flow(x):  mean of -log2 p(y | x) / classes
    + weight sum_mc max(0, r_mc - bounds_mc)^2,  r_mc = mean of (1 - y_c) q_mc + y_c (1 - q_mc)
    + weight mean of sum_c max(0, -y_c)^2 + sum_c max(0, y_c - 1)^2 + (sum_c y_c - 1)^2.

    r_mc is how often weak labeler m errs about class c if the labels are y; means are over samples,
    that of r_mc over those of which the labeler says something.

    Args:
        flow: Draws the labels.
        x: The samples.
        signals: What each labeler holds for the probability of each class; NaN where it abstains.
        bounds: How often each labeler may err about each class.
        weight: Of the constraints.
        generator: Draws z.

    Shapes: x (batch, cond_dim); signals (batch, labelers, classes); bounds (labelers, classes); the
    loss is a number.

    Raises:
        ValueError: a shape or `weight` is wrong.

    Paper: Lu, Song, Arachie, Huang, 2025, Weakly Supervised Label Learning Flows.

    >>> flow, x = LabelFlow(2, cond_dim=5), torch.randn(7, 5)
    >>> weak_constraint_loss(flow, x, torch.rand(7, 3, 2), torch.full((3, 2), 0.3)).shape
    torch.Size([])
    """
    classes = flow.size[0]
    if signals.ndim != 3 or signals.shape[0] != len(x) or signals.shape[2] != classes:
        raise ValueError(f"signals must be ({len(x)}, labelers, {classes}), a probability of each "
                         f"class by each labeler, got {tuple(signals.shape)}")
    if bounds.shape != signals.shape[1:]:
        raise ValueError(f"bounds must be {tuple(signals.shape[1:])}, one for each labeler and "
                         f"class, got {tuple(bounds.shape)}")
    checks.at_least(0, weight=weight)
    y, log_prob = flow.drawn(x, generator=generator)
    unlikely = -log_prob / (classes * math.log(2))
    says = ~signals.isnan()
    q = signals.nan_to_num()
    errs = ((1 - y)[:, None] * q + y[:, None] * (1 - q)) * says
    rates = errs.sum(0) / says.sum(0).clamp(min=1)
    beyond = (rates - bounds).clamp(min=0).square().sum()
    outside = ((-y).clamp(min=0).square() + (y - 1).clamp(min=0).square()).sum(1)
    return unlikely.mean() + weight * (beyond + (outside + (y.sum(1) - 1).square()).mean())


class _Conditional(nn.Module):
    """Scale and shift of some entries of a label, from the others and the sample."""

    def __init__(self, kept: int, cond_dim: int, changed: int, hidden: int) -> None:
        super().__init__()
        last = nn.Linear(hidden, 2 * changed)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(nn.Linear(kept + cond_dim, hidden), nn.SiLU(),
                                 nn.Linear(hidden, hidden), nn.SiLU(), last)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([y, x.to(y.dtype)], 1))


class _Undone(Update):
    """A step the other way about, so that the engine runs an inverse and stores nothing."""

    def __init__(self, step: Update) -> None:
        super().__init__(f"the inverse of {step.name}", step.module, step.reads, step.writes,
                         step.args, step.options)
        self.step, self.sums = step, step.sums

    def change(self, x: Sequence[Tensor], made: Any) -> Sequence[Tensor]:
        """Return what the step was given."""
        return self.step.restore(x, made)

    def restore(self, y: Sequence[Tensor], made: Any) -> Sequence[Tensor]:
        """Return what the step returns."""
        return self.step.change(y, made)


def _undone(step: Step) -> Step:
    if isinstance(step, Update):
        return _Undone(step)
    assert isinstance(step, Regroup)
    return Regroup(step.name, step.back, step.there)
