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
    feature_width,
    features_for,
    integrate,
    label_embedding,
    nearest_embedding,
    normal,
    spread_times,
)
from netwright.rules.rule import Rule
from netwright.runtime.modes import evaluating
from netwright.stages import Stages, call

__all__ = ["NoPropFlow"]


@method(
    "rule",
    papers=["003-168"],
    saves=["backpropagation"],
    needs=["classes"],
    search={"embedding": ["learned", "one-hot"]},
    variants={"plain": {}, "learned embedding": {"embedding": "learned"}},
)
class NoPropFlow(Rule):
    """Train one block to point from noise to the label; prediction follows it there.

    z_t = (1 - t) z_0 + t u_y,  z_0 ~ N(0, I),  t ~ U(0, 1);  v = block(x, z_t, t);
    L = |v - (u_y - z_0)|^2 + CE(classifier(z_t + (1 - t) v), y);
    prediction: z_0 ~ N(0, I), dz/dt = v in `steps` steps of Euler's method, classifier(z_1).

    The cross-entropy reads the label off where v leads from z_t in a straight line, and keeps
    embeddings that are learned apart. Those that are fixed, `"one-hot"`, need no such anchor:
    there the second term is left out, and the class is that of the nearest embedding.

    One block, told the time, stands for all noise levels. It holds `network` itself for its
    features of x, which are computed once for a batch, in training and in prediction. The times
    of a batch lie evenly, from a random start. `embedding` and its size, `width`, `chains` and
    `seed` are as in `NoProp`. Labels of -100 do not count.

    Args:
        num_classes: the number of classes; by default the width of the network's output.
        steps: of Euler's method, in a prediction.
        embedding: "one-hot", "learned" or a tensor (num_classes, embedding_size) to start from.
        embedding_size: numbers of a learned embedding.
        width: units of each of the layers that the rule adds.
        chains: predictions that are averaged.
        seed: where the noise of a prediction comes from.

    Shapes: x as the network takes it; y (batch, *) of int64; z, u, v (batch, *, embedding_size).

    Raises:
        ValueError: an option is not one of those above, the width of the network's output is
            not known, or y does not fit it.

    Paper: Li, Teh, Pascanu, 2025, NoProp: Training Neural Networks without Back-propagation or
    Forward-propagation (its flow-matching variant, with paths that carry no noise of their own).

    >>> network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    >>> rule = NoPropFlow(network, example=torch.randn(2, 4))
    >>> rule(torch.randn(2, 4), torch.tensor([0, 2])).requires_grad
    False
    >>> rule.predict(torch.randn(2, 4)).shape
    torch.Size([2, 3])
    """

    embedding: Tensor

    same_in_shares = False  # noise is drawn for each sample

    def __init__(self, network: nn.Module | Stages, example: Any = None, *,
                 num_classes: int | None = None, steps: int = 20,
                 embedding: Literal["learned", "one-hot"] | Tensor = "one-hot",
                 embedding_size: int = 20, width: int = 128, chains: int = 1, seed: int = 0,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.count(1, steps=steps, embedding_size=embedding_size, width=width, chains=chains)
        features, like = feature_width(self.network, example)
        self.classes = num_classes or features
        weights = label_embedding(embedding, self.classes, embedding_size, generator).to(like)
        self.anchored = not (isinstance(embedding, str) and embedding == "one-hot")
        if self.anchored:
            self.embedding = Parameter(weights)
        else:
            self.register_buffer("embedding", weights)
        self.classifier = nearest_embedding(weights).requires_grad_(self.anchored)
        self.steps, self.chains, self.seed = steps, chains, seed
        self.block = LabelDenoiser(self.network, features, weights.shape[1], width,
                                   weights.shape[1], timed=True).to(like)

    def forward(self, x: Any, y: Tensor) -> Tensor:
        """Add the block's gradient, each sample's at a time of its own; return the loss."""
        counted, labels = counted_labels(y, self.classes)
        features = features_for(self.network, x, y)[counted]
        u = self.embedding[labels]
        times = spread_times(len(u), u, self.generator)
        noise, t = normal(u.shape, u, self.generator), times[:, None]
        z = (1 - t) * noise + t * u
        v = self.block(features, z, times)
        loss = (v - (u - noise)).square().sum(1).mean()
        if self.anchored:
            loss = loss + cross_entropy(self.classifier(z + (1 - t) * v), labels)
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """Return the classifier's scores of z_1 (of several chains: log-probabilities)."""
        with evaluating(self):
            features = call(self.network, x)
            shape = (self.chains, *features.shape[:-1])
            features = features.expand(*shape, features.shape[-1])
            times = torch.linspace(0, 1, self.steps + 1).to(self.embedding)
            noise = torch.randn(*shape, self.embedding.shape[1],
                                generator=Generator().manual_seed(self.seed)).to(self.embedding)
            z = integrate(lambda z, k: self.block(features, z, times[k].expand(shape)), noise,
                          times, heun=False)
            scores = self.classifier(z)
        return scores[0] if self.chains == 1 else scores.softmax(-1).mean(0).log()
