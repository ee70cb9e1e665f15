"""What the NoProp rules share: blocks that read x and a noisy label, and labels as vectors."""

from collections.abc import Callable
from math import pi
from typing import Any

import torch
from torch import Generator, Tensor, nn

from netwright.rules.rule import check_labels
from netwright.runtime.modes import evaluating
from netwright.stages import call

FREQUENCIES = 8


class LabelDenoiser(nn.Module):
    """A network's features of x, joined with two small layers on z (and time) by a head of two.

    Shapes: features (*, features); z (*, size); t (*) where `timed`; returns (*, outputs).

    >>> block = LabelDenoiser(nn.Linear(4, 6), 6, 3, 16, 10, timed=True)
    >>> block(block.features(torch.randn(2, 4)), torch.randn(2, 3), torch.rand(2)).shape
    torch.Size([2, 10])
    """

    def __init__(self, network: nn.Module, features: int, size: int, width: int, outputs: int, *,
                 timed: bool = False) -> None:
        super().__init__()
        self.features = network
        # Features of any scale; large ones would leave the softmax flat where it is wrong.
        self.norm = nn.LayerNorm(features) if features > 1 else nn.Identity()
        self.state = nn.Sequential(nn.Linear(size + 2 * FREQUENCIES * timed, width), nn.ReLU(),
                                   nn.Linear(width, width), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(features + width, width), nn.ReLU(),
                                  nn.Linear(width, outputs))

    def forward(self, features: Tensor, z: Tensor, t: Tensor | None = None) -> Tensor:
        """Return the head's outputs."""
        if t is not None:
            z = torch.cat([z, waves(t).to(z.dtype)], dim=-1)
        return self.head(torch.cat([self.norm(features), self.state(z)], dim=-1))


def waves(t: Tensor) -> Tensor:
    """Return the sines and cosines of the time t in 0..1 at frequencies that double.

    Shapes: t (*); returns (*, 2 FREQUENCIES).
    """
    angles = t[..., None] * (pi / 2 * 2 ** torch.arange(FREQUENCIES, device=t.device))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def mean_embedding(logits: Tensor, embedding: Tensor) -> Tensor:
    """Return the mean of the classes' embeddings under softmax(logits)."""
    return logits.softmax(-1).to(embedding.dtype) @ embedding


def divergence_from_noise(u: Tensor, kept: Tensor) -> Tensor:
    """Return the mean of KL(N(sqrt(kept) u, 1 - kept) || N(0, I)) over the rows of u."""
    size = u.shape[1]
    return (kept * (u.square().sum(1) - size).mean() - size * torch.log1p(-kept)) / 2


def nearest_embedding(embedding: Tensor) -> nn.Linear:
    """Return a linear classifier in which the class of the nearest embedding wins."""
    classifier = nn.Linear(embedding.shape[1], len(embedding)).to(embedding)
    with torch.no_grad():
        classifier.weight.copy_(embedding)
        classifier.bias.copy_(-embedding.square().sum(1) / 2)
    return classifier


def normal(shape: tuple[int, ...] | torch.Size, like: Tensor,
           generator: Generator | None) -> Tensor:
    """Return standard normal numbers on the device and in the type of `like`."""
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def spread_times(count: int, like: Tensor, generator: Generator | None) -> Tensor:
    """Return `count` times, each uniform in 0..1, that lie evenly between one another."""
    device = like.device if generator is None else generator.device
    wide = torch.promote_types(like.dtype, torch.float32)  # half precision has too few places
    start = torch.rand((), generator=generator, device=device).to(like.device, wide)
    steps = torch.arange(count, device=like.device, dtype=wide) / count
    return ((start + steps) % 1).to(like.dtype)


def integrate(slope: Callable[[Tensor, int], Tensor], w: Tensor, knots: Tensor, *,
              heun: bool) -> Tensor:
    """Return w at the last knot, by dw/dknot = slope(w, its index), in Euler's or Heun's steps."""
    for k, step in enumerate(knots.diff()):
        here = slope(w, k)
        if heun:
            here = (here + slope(w + step * here, k + 1)) / 2
        w = w + step * here
    return w


def counted_labels(y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return which of `y` are not -100, and those."""
    check_labels(y, classes)
    counted = y != -100
    labels = y[counted]
    if not len(labels):
        raise ValueError("y must hold at least one label, got none but -100")
    return counted, labels


def features_for(network: nn.Module, x: Any, y: Tensor) -> Tensor:
    """Return the network's features of x, of which y must be the labels."""
    features = call(network, x)
    if features.shape[:-1] != y.shape:
        raise ValueError(f"y must be {tuple(features.shape[:-1])} for an output of "
                         f"{tuple(features.shape)}, got {tuple(y.shape)}")
    return features


def feature_width(network: nn.Module, example: Any) -> tuple[int, Tensor]:
    """Return the width of the network's output, and a tensor of its dtype and device."""
    if example is not None:
        with evaluating(network), torch.no_grad():
            output = call(network, example)
        if output.ndim < 2:
            raise ValueError("network must return (batch, *, features), got "
                             f"{tuple(output.shape)}; keep the batch and the features apart")
        return output.shape[-1], output
    last = list(network.modules())[-1]
    if not isinstance(last, nn.Linear):
        raise ValueError(f"example was None, and {type(network).__name__} does not end in a "
                         "linear layer that tells its width; give an input as example=x")
    return last.out_features, last.weight


def label_embedding(embedding: str | Tensor, classes: int, size: int,
                    generator: Generator | None) -> Tensor:
    """Return the start of the classes' embeddings: (classes, size)."""
    if isinstance(embedding, Tensor):
        if embedding.ndim != 2 or len(embedding) != classes:
            raise ValueError(f"embedding must be ({classes}, size) for {classes} classes, got "
                             f"{tuple(embedding.shape)}")
        return embedding.detach().clone()
    if embedding == "one-hot":
        return torch.eye(classes)
    if embedding == "learned":
        return nn.init.orthogonal_(torch.empty(classes, size), generator=generator)
    raise ValueError("embedding must be 'learned', 'one-hot' or a tensor (classes, size), "
                     f"got {embedding!r}")
