from math import pi
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter, functional

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.denoising.label_denoiser import (
    LabelDenoiser,
    counted_labels,
    divergence_from_noise,
    feature_width,
    features_for,
    integrate,
    label_embedding,
    mean_embedding,
    nearest_embedding,
    normal,
    spread_times,
)
from netwright.rules.rule import Rule
from netwright.runtime.modes import evaluating
from netwright.stages import Stages, call

__all__ = ["NoPropContinuous"]


@method(
    "rule",
    papers=["003-168"],
    saves=["backpropagation"],
    needs=["classes"],
    search={"embedding": ["learned", "one-hot"]},
    variants={"plain": {},
              "cosine": {"schedule": "cosine", "embedding": "one-hot", "solver": "euler"}},
)
class NoPropContinuous(Rule):
    """Train one block to denoise the label at any time; prediction follows its flow to the label.

    z_t = (rho_t u_y + noise) / sqrt(1 + rho_t^2),  t in 0..1,  SNR(t) = rho_t^2;
    u_hat = softmax(block(x, z_t, t)) W,  t ~ U(0, 1);
    L = CE(classifier(z_1), y) + KL(z_0 || N(0, I)) + eta/2 SNR'(t) |u_hat - u_y|^2;
    prediction: z_0 ~ N(0, I), then the flow that keeps z_t distributed as above. For
    w = z sqrt(1 + rho^2) it is dw/drho = u_hat, in `steps` steps of Heun's or Euler's method,
    each of which is exact while u_hat does not change; block(x, z_1, 1).

    The class is what the block says at the flow's end, where in the paper classifier(z_1) reads
    it: even in training z_1 is so noisy (SNR(1) is about 7 at first) that a classifier of z_1
    alone errs where the block does not. The classifier is what keeps embeddings apart.

    `NoProp` has a block for each of a few noise levels; here a single one is told the time, and
    the number of steps is chosen at prediction. It holds `network` itself for its features of x,
    which are computed once for a batch, in training and in prediction.

    `schedule="learned"` learns log SNR(t), a rising function of t (a line and a few sigmoids
    with weights above 0) and both its ends; `"cosine"` is fixed, rho_t = 1 / tan(pi/2 (1 - t +
    offset) / (1 + offset)). The times of a batch lie evenly, from a random start. `embedding`
    and its size, `width`, `chains` and `seed` are as in `NoProp`. Labels of -100 do not count.

    Args:
        num_classes: the number of classes; by default the width of the network's output.
        eta: the weight of denoising in the loss.
        steps: of the solver, in a prediction.
        solver: "heun" or "euler".
        schedule: "learned" or "cosine".
        offset: where the cosine begins.
        embedding: "learned", "one-hot" or a tensor (num_classes, embedding_size) to start from.
        embedding_size: numbers of a learned embedding.
        width: units of each of the layers that the rule adds.
        chains: predictions that are averaged.
        seed: where the noise of a prediction comes from.

    Shapes: x as the network takes it; y (batch, *) of int64; z, u (batch, *, embedding_size);
    W (num_classes, embedding_size).

    Raises:
        ValueError: an option is not one of those above, the width of the network's output is
            not known, or y does not fit it.

    Paper: Li, Teh, Pascanu, 2025, NoProp: Training Neural Networks without Back-propagation or
    Forward-propagation (its continuous-time variant).

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = NoPropContinuous(network, example=torch.randn(2, 4))
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> rule.predict(torch.randn(2, 4)).shape
    torch.Size([2, 3])
    """

    embedding: Tensor

    same_in_shares = False  # noise is drawn for each sample

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 num_classes: int | None = None, eta: float = 1.0, steps: int = 20,
                 solver: Literal["heun", "euler"] = "heun",
                 schedule: Literal["learned", "cosine"] = "learned", offset: float = 0.05,
                 embedding: Literal["learned", "one-hot"] | Tensor = "learned",
                 embedding_size: int = 20, width: int = 128, chains: int = 1, seed: int = 0,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.count(1, steps=steps, embedding_size=embedding_size, width=width, chains=chains)
        checks.above(0, eta=eta, offset=offset)
        checks.one_of(["heun", "euler"], solver=solver)
        checks.one_of(["learned", "cosine"], schedule=schedule)
        features, like = feature_width(self.network, example)
        self.classes = num_classes or features
        weights = label_embedding(embedding, self.classes, embedding_size, generator).to(like)
        if isinstance(embedding, str) and embedding == "one-hot":
            self.register_buffer("embedding", weights)
        else:
            self.embedding = Parameter(weights)
        self.eta, self.steps, self.solver = eta, steps, solver
        self.chains, self.seed = chains, seed
        self.block = LabelDenoiser(self.network, features, weights.shape[1], width, self.classes,
                                   timed=True).to(like)
        self.classifier = nearest_embedding(weights)
        self.schedule: CosineSchedule | LearnedSchedule = (
            LearnedSchedule().to(like) if schedule == "learned" else CosineSchedule(offset))

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the block's gradient, each sample's at a time of its own; return the loss."""
        counted, labels = counted_labels(y, self.classes)
        features = features_for(self.network, x, y)[counted]
        u = self.embedding[labels]
        t = spread_times(len(u), u, self.generator)
        rho, slope = self.schedule(t)
        u_hat = self._denoised(features, self._noised(u, rho[:, None]), t)
        denoising = (self.eta * rho * slope * (u_hat - u).square().sum(1)).mean()
        first, last = self.schedule(torch.tensor([0.0, 1.0]).to(u))[0]
        kept = first.square() / (1 + first.square())
        logits = self.classifier(self._noised(u, last))
        loss = cross_entropy(logits, labels) + divergence_from_noise(u, kept) + denoising
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return the block's scores at the flow's end (of several chains: log-probabilities)."""
        with evaluating(self):
            features = call(self.network, x)
            shape = (self.chains, *features.shape[:-1])
            features = features.expand(*shape, features.shape[-1])
            times = torch.linspace(0, 1, self.steps + 1).to(self.embedding)
            knots = self.schedule(times)[0]

            def slope(w: Tensor, k: int) -> Tensor:
                z = w / (1 + knots[k].square()).sqrt()
                return self._denoised(features, z, times[k].expand(shape))

            z = torch.randn(*shape, self.embedding.shape[1],
                            generator=Generator().manual_seed(self.seed)).to(self.embedding)
            w = integrate(slope, z * (1 + knots[0].square()).sqrt(), knots,
                          heun=self.solver == "heun")
            z = w / (1 + knots[-1].square()).sqrt()
            scores: Tensor = self.block(features, z, times[-1].expand(shape))
        return scores[0] if self.chains == 1 else scores.softmax(-1).mean(0).log()

    def _denoised(self, features: Tensor, z: Tensor, t: Tensor) -> Tensor:
        return mean_embedding(self.block(features, z, t), self.embedding)

    def _noised(self, u: Tensor, rho: Tensor) -> Tensor:
        return (rho * u + normal(u.shape, u, self.generator)) / (1 + rho.square()).sqrt()


class CosineSchedule(nn.Module):
    """rho(t) = 1 / tan(angle), with an angle that falls evenly from pi/2, and its derivative.

    >>> rho, slope = CosineSchedule(0.05)(torch.tensor([0.0, 1.0]))
    >>> bool(rho[0].abs() < 1e-6 and rho[1] > 13 and slope[1] > slope[0])
    True
    """

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return rho and its derivative at the times t (*)."""
        rate = pi / 2 / (1 + self.offset)
        angle = rate * (1 - t + self.offset)
        return 1 / angle.tan(), rate / angle.sin().square()


class LearnedSchedule(nn.Module):
    """log rho(t)^2 = low + span g(t), g rising from 0 to 1, and rho's derivative.

    g(t) = (f(t) - f(0)) / (f(1) - f(0)),  f(t) = a t + sum_k c_k sigmoid(b_k t + d_k), with a, b,
    c and span above 0.

    >>> rho, slope = LearnedSchedule()(torch.linspace(0, 1, 5))
    >>> bool((rho.diff() > 0).all() and (slope > 0).all())
    True
    """

    def __init__(self, *, low: float = -3.0, span: float = 5.0, units: int = 8) -> None:
        super().__init__()
        self.low = Parameter(torch.tensor(low))
        self.span = Parameter(torch.tensor(span))
        self.line = Parameter(torch.zeros(1))
        self.rates = Parameter(torch.linspace(1, 8, units))
        self.places = Parameter(-torch.linspace(1, 8, units) / 2)
        self.heights = Parameter(torch.full((units,), -3.0))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return rho and its derivative at the times t (*)."""
        value, slope = self._raw(t)
        (start, end), _ = self._raw(torch.tensor([0.0, 1.0]).to(t))
        span = functional.softplus(self.span) / (end - start)
        rho = ((self.low + span * (value - start)) / 2).exp()
        return rho, rho * span * slope / 2

    def _raw(self, t: Tensor) -> tuple[Tensor, Tensor]:
        line, rates, heights = map(functional.softplus, (self.line, self.rates, self.heights))
        on = torch.sigmoid(t[..., None] * rates + self.places)
        return line * t + on @ heights, line + (on * (1 - on) * rates) @ heights
