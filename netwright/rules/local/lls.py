import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter, functional

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.readout import count_classes, first_parameter, mean_of_tokens, widths
from netwright.rules.rule import Rule, chain_of, checked
from netwright.stages import Stages

__all__ = ["LLS"]

TINY = 1e-6
POOLS: dict[int, Any] = {3: functional.adaptive_avg_pool1d, 4: functional.adaptive_avg_pool2d,
                         5: functional.adaptive_avg_pool3d}


@method(
    "rule",
    papers=["003-028"],
    saves=["backpropagation", "training memory"],
    needs=["classes", "a chain of stages"],
    search={"temperature": (0.1, 1.0)},
    variants={"plain": {}, "M": {"variant": "M"}, "MxM": {"variant": "MxM"},
              "square waves": {"basis": "square"}},
)
class LLS(Rule):
    """Train every hidden stage to move in step with a fixed wave that stands for the class.

    h_i = stage_i(h_{i-1}), h_{i-1} cut off from its graph;  a_i = pool(h_i) / |pool(h_i)|;
    p_i = a_i C^T, C[k, t] = cos(pi f_k (t + 1/2) / features), its sign with `basis="square"`;
    variant base: s_i = p_i;  M: s_i = m_i * p_i;  MxM: s_i = p_i M_i;
    L_i = loss(s_i / temperature, y);  stage i descends L_i, and so do its m_i or M_i.
    The last stage gives class scores itself, and descends loss(h_n, y).

    No gradient passes from one stage to another, a stage's activations are freed before the next
    stage runs, and nothing is learned beside the network but m_i, a number for each class, or
    M_i. C is computed, shared by all stages of one width, and not a part of `state_dict`.

    The frequencies f_k are the paper's open end: its program spreads them evenly from 100 to 512
    whatever the width. Here they are whole numbers spread evenly from a fifth of the features to
    all of them but one, so that the cosines are orthogonal, each of squared length features / 2.
    Square waves are nearly so. There are no more orthogonal waves than features: where there are
    too many classes, the frequencies are not whole.

    Axes after the channels' are averaged to `pool` positions each, where they have more; what
    a stage flattens itself is read whole. Where h is tokens and there is a label for each sample,
    the tokens' mean is taken. A sample whose activity is zero has no direction, and teaches that
    stage nothing.

    Args:
        num_classes: the number of classes; by default the width of the network's output.
        variant: "base", "M" or "MxM": what is learned beside the network.
        basis: "cosine" or "square", the form of the waves.
        temperature: that scores are divided by, above 0.
        pool: positions that each axis of a map is averaged to.

    Shapes: h_i (batch, *size_i); C (classes, features); m_i (classes,); M_i (classes, classes);
    y (batch,), or (batch, tokens).

    Raises:
        UnknownName: `variant` or `basis` is none of those named.
        ValueError: `num_classes` is not what the last stage returns, or is needed and missing;
            `temperature` or `pool` is not positive; a hidden stage gives a single feature.

    Paper: Apolinario, Roy, Roy, 2025, LLS: Local Learning Rule for Deep Neural Networks Inspired
    by Neural Activity Synchronization.

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = LLS(network, variant="M")
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> [modulation.shape for modulation in rule.modulations]
    [torch.Size([3])]
    """

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 num_classes: int | None = None, variant: Literal["base", "M", "MxM"] = "base",
                 basis: Literal["cosine", "square"] = "cosine", temperature: float = 0.5,
                 pool: int = 2, loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.one_of(["base", "M", "MxM"], variant=variant)
        checks.one_of(["cosine", "square"], basis=basis)
        checks.above(0, temperature=temperature, advice="try 0.5")
        checks.count(1, pool=pool, advice="it is a number of positions an axis; try 2")
        self.stages, self.loss = chain_of(self, network, example, loss), loss
        self.variant, self.basis, self.temperature, self.pool = variant, basis, temperature, pool
        (*hidden, last), (*self._channels_first, _) = widths(self.stages, example)
        self.num_classes = count_classes(self.stages, num_classes, last)
        for name, width in zip(self.stages.names, hidden, strict=False):
            _check_width(name, width)
        self.modulations = nn.ParameterList(
            Parameter(self._drawn()) for _ in hidden if variant != "base")

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add each stage's own gradient to `.grad`; return the mean of the stages' losses."""
        context, h = self.stages.context(x), x
        losses = []
        for i, stage in enumerate(self.stages):
            h = stage(h, context)
            scores = h if i == len(self.stages) - 1 else self.scores(i, h, y, x)
            loss = checked(self.loss, scores, y)
            if loss.requires_grad:  # not so in a stage that is frozen
                loss.backward()
            losses.append(loss.detach())
            h = h.detach()
        return torch.stack(losses).mean()

    def scores(self, i: int, h: Tensor, y: Tensor, x: Any = None) -> Tensor:
        """Return how well the output `h` of hidden stage `i` is in step with each class's wave.

        `y` and `x` tell whether each token has a label of its own, and which are padding.
        """
        a = self._features(i, h, y, x)
        length = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
        a = a / length.clamp_min(TINY) * (length > TINY)
        p = functional.linear(a, self._waves(i, a))
        if self.variant == "M":
            p = p * self.modulations[i]
        elif self.variant == "MxM":
            p = p @ self.modulations[i]
        return p / self.temperature

    def _features(self, i: int, h: Tensor, y: Tensor, x: Any) -> Tensor:
        if h.ndim == 3 and not self._channels_first[i]:
            return h if y.shape[:2] == h.shape[:2] else mean_of_tokens(h, x)
        if h.ndim in POOLS:
            h = POOLS[h.ndim](h, tuple(min(size, self.pool) for size in h.shape[2:]))
        return h.flatten(1)

    def _waves(self, i: int, a: Tensor) -> Tensor:
        features = a.shape[-1]
        name = f"waves_{features}"
        if name not in self._buffers:
            _check_width(self.stages.names[i], features)
            like = first_parameter(self.stages)
            made = waves(self.num_classes, features, square=self.basis == "square")
            self.register_buffer(name, made.to(a if like is None else like), persistent=False)
        return self.get_buffer(name).to(a.dtype)

    def _drawn(self) -> Tensor:
        shape = (self.num_classes,) * (1 if self.variant == "M" else 2)
        generator = self.generator
        drawn = torch.randn(shape, generator=generator,
                            device="cpu" if generator is None else generator.device)
        like = first_parameter(self.stages)
        return 0.01 * (drawn if like is None else drawn.to(like))


def waves(count: int, features: int, *, square: bool = False) -> Tensor:
    """Return `count` cosines over `features` points, or their signs, in float64.

    >>> C = waves(3, 16)
    >>> torch.allclose(C @ C.T, 8 * torch.eye(3, dtype=torch.float64))
    True
    """
    lowest = max(1, min(features // 5, features - count))
    frequencies = torch.linspace(lowest, features - 1, count, dtype=torch.float64)
    if count < features:
        frequencies = frequencies.round()
    t = torch.arange(features, dtype=torch.float64) + 0.5
    made = torch.cos(math.pi / features * frequencies[:, None] * t)
    return torch.where(made > -TINY, 1.0, -1.0).to(made.dtype) if square else made


def _check_width(stage: str, features: int | None) -> None:
    if features is not None and features < 2:
        raise ValueError(f"stage {stage} must give at least 2 features, since a single one has no "
                         f"direction, got {features}; widen it, raise pool=, or cut the stages "
                         "elsewhere")
