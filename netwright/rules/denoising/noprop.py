from copy import deepcopy
from math import pi
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import Parameter

from netwright import checks
from netwright.catalogue.facets import method
from netwright.objectives.losses import cross_entropy
from netwright.rules.denoising.label_denoiser import (
    LabelDenoiser,
    counted_labels,
    divergence_from_noise,
    feature_width,
    features_for,
    label_embedding,
    mean_embedding,
    nearest_embedding,
    normal,
)
from netwright.rules.rule import Rule
from netwright.runtime.modes import evaluating
from netwright.stages import Stages, call

__all__ = ["NoProp"]


@method("rule", papers=["003-168"], saves=["backpropagation"], needs=["classes"],
        variants={"three blocks": {"blocks": 3},
                  "one-hot": {"blocks": 3, "embedding": "one-hot"}})
class NoProp(Rule):
    """Train blocks that each denoise the label on their own; prediction runs them as a chain.

    z_t = sqrt(abar_t) u_y + sqrt(1 - abar_t) noise,  t = 0 (all noise) .. T (the label);
    u_hat_t = softmax(block_t(x, z_{t-1})) W;  SNR(t) = abar_t / (1 - abar_t);
    L = CE(classifier(z_T), y) + KL(z_0 || N(0, I))
        + eta/2 sum_t (SNR(t) - SNR(t-1)) |u_hat_t - u_y|^2;
    prediction: z_0 ~ N(0, I), z_t = a_t u_hat_t + b_t z_{t-1} + sqrt(c_t) noise, classifier(z_T);
    with alpha = abar_{t-1} / abar_t and r = 1 - abar_{t-1}:  a_t = sqrt(abar_t) (1 - alpha) / r;
    b_t = sqrt(alpha) (1 - abar_t) / r;  c_t = (1 - abar_t) (1 - alpha) / r.

    W holds an embedding u of each class: `embedding="learned"` (from orthogonal rows of
    `embedding_size`), `"one-hot"` (fixed), or a start of your own, which is then learned, such as
    `prototypes(x, y)`. abar is a cosine: abar_t = cos^2(pi/2 (1 - t/T + offset) / (1 + offset)).

    `network` gives each block its features of x: its scores, or whatever (batch, *, features) it
    returns where `num_classes` is given. Block 1 holds `network` itself, each further block a
    copy that starts from the same weights, so parameters and step time grow with `blocks`. Each
    block joins the features, normalised, with two small layers on z, of `width` units, and a head
    of two. The classifier starts as the nearest embedding. No gradient passes between blocks, and
    each block's activations are freed before the next runs. Labels of -100 do not count.

    One call trains every block, which gives the mean over t of the paper's update; its order, one
    block after the other, each on the whole data, is `rule(x, y, block=t)`.

    `predict` draws its noise from `seed`, so it gives the same scores for the same batch each
    time, and leaves the global random state alone. With `chains` above 1 it averages the
    probabilities of as many chains; the features of x are computed once.

    Args:
        num_classes: the number of classes; by default the width of the network's output.
        blocks: T, the number of noise levels and of copies of the network.
        eta: the weight of denoising in the loss.
        embedding: "learned", "one-hot" or a tensor (num_classes, embedding_size) to start from.
        embedding_size: numbers of a learned embedding.
        width: units of each of the layers that the rule adds.
        offset: where the cosine of abar begins.
        chains: predictions that are averaged.
        seed: where the noise of a prediction comes from.

    Shapes: x as the network takes it; y (batch, *) of int64; z, u (batch, *, embedding_size);
    W (num_classes, embedding_size).

    Raises:
        ValueError: an option is not one of those above, the width of the network's output is
            not known, or y does not fit it.

    Paper: Li, Teh, Pascanu, 2025, NoProp: Training Neural Networks without Back-propagation or
    Forward-propagation (its discrete-time variant, with the linear one of its two classifiers;
    the paper's blocks differ in their layers, and it does not give `offset`).

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = NoProp(network, example=torch.randn(2, 4), blocks=3)
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> rule.predict(torch.randn(2, 4)).shape
    torch.Size([2, 3])
    """

    embedding: Tensor
    alpha_bar: Tensor
    gain: Tensor
    steps: Tensor

    same_in_shares = False  # noise is drawn for each sample

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 num_classes: int | None = None, blocks: int = 10, eta: float = 0.1,
                 embedding: Literal["learned", "one-hot"] | Tensor = "learned",
                 embedding_size: int = 20, width: int = 128, offset: float = 0.05,
                 chains: int = 1, seed: int = 0, generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.count(1, blocks=blocks, width=width, embedding_size=embedding_size, chains=chains)
        checks.above(0, eta=eta, offset=offset)
        features, like = feature_width(self.network, example)
        classes = num_classes or features
        weights = label_embedding(embedding, classes, embedding_size, generator).to(like)
        if isinstance(embedding, str) and embedding == "one-hot":
            self.register_buffer("embedding", weights)
        else:
            self.embedding = Parameter(weights)
        size = weights.shape[1]
        self.classes, self.eta, self.chains, self.seed = classes, eta, chains, seed
        self.blocks = nn.ModuleList(
            LabelDenoiser(self.network if t == 0 else _copy(self.network), features, size, width,
                   classes).to(like) for t in range(blocks))
        self.classifier = nearest_embedding(weights)
        alpha_bar = cosine_schedule(blocks, offset)
        self.register_buffer("alpha_bar", alpha_bar.to(like))
        self.register_buffer("gain", (alpha_bar / (1 - alpha_bar)).diff().to(like))
        self.register_buffer("steps", denoising_steps(alpha_bar).to(like))

    def forward(self, x: Any, y: Tensor, block: int | None = None) -> Tensor:
        """Add the gradients of all blocks, or of `block` alone (from 0); return the loss."""
        last = len(self.blocks) - 1
        checks.between(0, last, whole=True, block=block, optional=True)
        counted, labels = counted_labels(y, self.classes)
        total = torch.zeros((), device=y.device)
        for t in range(last + 1) if block is None else [block]:
            features = features_for(self._block(t).features, x, y)
            u = self.embedding[labels]
            logits = self._block(t)(features[counted], self._noised(u, t))
            u_hat = mean_embedding(logits, self.embedding)
            weight = self.gain[t] * self.eta / 2 * (1 if block is None else last + 1)
            total += _descend(weight * (u_hat - u).square().sum(1).mean())
        u = self.embedding[labels]
        divergence = divergence_from_noise(u, self.alpha_bar[0])
        logits = self.classifier(self._noised(u, last + 1))
        return total + _descend(cross_entropy(logits, labels) + divergence)

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return the classifier's scores of z_T (of several chains: log-probabilities)."""
        generator = Generator().manual_seed(self.seed)

        def noise(features: Tensor) -> Tensor:
            shape = (self.chains, *features.shape[:-1], self.embedding.shape[1])
            return torch.randn(shape, generator=generator).to(self.embedding)

        z = torch.empty(0)
        with evaluating(self):
            for t, (a, b, c) in enumerate(self.steps):
                features = call(self._block(t).features, x)
                z = z if t else noise(features)
                logits = self._block(t)(features.expand(self.chains, *features.shape), z)
                u_hat = mean_embedding(logits, self.embedding)
                z = a * u_hat + b * z + c.sqrt() * noise(features)
            scores = self.classifier(z)
        return scores[0] if self.chains == 1 else scores.softmax(-1).mean(0).log()

    def _block(self, t: int) -> LabelDenoiser:
        block = self.blocks[t]
        assert isinstance(block, LabelDenoiser)
        return block

    def _noised(self, u: Tensor, t: int) -> Tensor:
        kept = self.alpha_bar[t]
        return kept.sqrt() * u + (1 - kept).sqrt() * normal(u.shape, u, self.generator)


def cosine_schedule(blocks: int, offset: float) -> Tensor:
    """Return abar_0 .. abar_T, from (nearly) no signal to (nearly) no noise, in float64."""
    left = 1 - torch.arange(blocks + 1, dtype=torch.float64) / blocks
    return torch.cos(pi / 2 * (left + offset) / (1 + offset)).square()


def denoising_steps(alpha_bar: Tensor) -> Tensor:
    """Return (a_t, b_t, c_t) of the exact posterior of z_t given z_{t-1} and the label.

    Shapes: alpha_bar (T + 1,); returns (T, 3).
    """
    before, after = alpha_bar[:-1], alpha_bar[1:]
    alpha, rest = before / after, 1 - before
    return torch.stack([after.sqrt() * (1 - alpha) / rest, alpha.sqrt() * (1 - after) / rest,
                        (1 - after) * (1 - alpha) / rest], dim=1)


def prototypes(x: Tensor, y: Tensor) -> Tensor:
    """Return for each class its sample with the least median distance to the class's others.

    Shapes: x (samples, *size); y (samples,) of int64; returns (classes, prod(size)).

    Raises:
        ValueError: a class between 0 and y's largest has no sample.

    >>> x = torch.tensor([[0.0], [4.0], [5.0], [6.0], [20.0], [9.0]])
    >>> prototypes(x, torch.tensor([0, 0, 0, 0, 0, 1]))
    tensor([[5.],
            [9.]])
    """
    rows = x.flatten(1)
    chosen = []
    for c in range(int(y.max()) + 1):
        own = rows[y == c]
        if not len(own):
            raise ValueError(f"y must hold a sample of each class, got none of class {c}")
        distances = torch.cdist(own, own).fill_diagonal_(torch.nan)
        chosen.append(own[distances.nanmedian(1).values.argmin()])
    return torch.stack(chosen)


def _descend(loss: Tensor) -> Tensor:
    if loss.requires_grad:
        loss.backward()
    return loss.detach()


def _copy(network: nn.Module) -> nn.Module:
    copy = deepcopy(network)
    copy.zero_grad(set_to_none=True)
    return copy
