from collections.abc import Iterable
from math import exp, log
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.rules.denoising.label_denoiser import (
    FREQUENCIES,
    integrate,
    normal,
    spread_times,
    waves,
)
from netwright.rules.rule import Rule, chain_of, check_labels
from netwright.runtime.modes import evaluating
from netwright.stages import Stages

__all__ = ["DiffusionBlocks"]

WIDTH = 64  # of the vector that tells the noise level and the class


@method(
    "rule",
    papers=["003-037"],
    saves=["backpropagation", "training memory"],
    needs=["a residual network"],
    variants={"two blocks": {"blocks": 2, "num_classes": 3}},
    network=lambda: nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(),
                                  nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 20)),
)
class DiffusionBlocks(Rule):
    """Train the blocks of a residual network apart, each as a denoiser of noise levels of its own.

    z = x + sigma noise;  log sigma ~ N(noise_mean, noise_std^2) within the band of block b;
    D_b(z, sigma) = c_skip z + c_out F_b(c_in z, sigma),  s = sigma_data,  r^2 = sigma^2 + s^2,
    c_skip = s^2 / r^2,  c_out = sigma s / r,  c_in = 1 / r;
    L_b = |D_b(z, sigma) - x|^2 / c_out^2, its mean over the numbers of x and the batch.

    `network` takes and returns data of one shape. Its first stage is the entry and its last the
    exit; what lies between keeps the shape of its signal and is cut into `blocks` runs of stages.
    F_b is the entry, the stages of block b and the exit. Entry and exit belong to every block and
    get the mean of their gradients; no gradient passes from block to block, and a block's
    activations are freed before the next runs. Block 0 has the largest noise.

    The bands share out sigma_min .. sigma_max so that each has the same probability under the
    log-normal, or with `partition="uniform"` the same width in log sigma. While it learns, a band
    reaches into its neighbours by `overlap` of its width in log sigma. With `blocks=1` the rule
    trains the whole network as one denoiser.

    What the rule adds: the noise level, and the class where `num_classes` is given, as a vector
    that is added to what each stage between entry and exit takes, by a matrix that starts at 0.

    `rule(x, y)` trains all blocks, whose loss is the mean; `rule(x, y, block=b)` one alone. y holds
    the classes, -100 where a sample shall count without one; without `num_classes` it is not
    looked at and may be None. `sample` draws data. `predict` is for `num_classes`: a class scores
    by how well the blocks restore x when they are told it.

    Args:
        blocks: how many runs of stages are trained apart.
        num_classes: the number of classes, where the data have them and are to be told.
        partition: "equal_mass" or "uniform": how the blocks share out the noise levels.
        overlap: how far a band reaches into its neighbours in training, as a share of its width.
        sigma_data: the standard deviation of the data.
        noise_mean: the mean of log sigma in training.
        noise_std: its standard deviation.
        sigma_min: the least noise.
        sigma_max: the most.

    Shapes: x, z (batch, *size); y (batch,) of int64; sigma (batch,).

    Raises:
        ValueError: the network does not return what it takes, its stages do not keep their
            shape or are fewer than `blocks`, an option is not one of those above, or y does not
            fit x.

    Papers: Shing, Akiba, 2025, DiffusionBlocks: Blockwise Training for Generative Models via
    Score-Based Diffusion; Karras, Aittala, Aila, Laine, 2022, Elucidating the Design Space of
    Diffusion-Based Generative Models (weights, noise levels and sampling).

    >>> network = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(),
    ...                         nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 2))
    >>> rule = DiffusionBlocks(network, torch.randn(5, 2), blocks=2)
    >>> rule(torch.randn(5, 2)).requires_grad
    False
    >>> rule.sample(3).shape
    torch.Size([3, 2])
    """

    same_in_shares = False  # noise is drawn for each sample

    def __init__(self, network: nn.Module | Stages, example: Tensor | None = None, *,
                 blocks: int = 4, num_classes: int | None = None,
                 partition: Literal["equal_mass", "uniform"] = "equal_mass",
                 overlap: float = 0.1, sigma_data: float = 0.5, noise_mean: float = -1.2,
                 noise_std: float = 1.2, sigma_min: float = 0.002, sigma_max: float = 80.0,
                 generator: Generator | None = None) -> None:
        super().__init__(network, generator=generator)
        checks.count(1, blocks=blocks)
        checks.above(0, sigma_data=sigma_data, noise_std=noise_std, sigma_min=sigma_min)
        checks.one_of(["equal_mass", "uniform"], partition=partition)
        checks.at_least(0, overlap=overlap, advice="try 0.1")
        checks.above(sigma_min, sigma_max=sigma_max, advice=f"sigma_min={sigma_min}")
        checks.count(1, num_classes=num_classes, optional=True)
        if not isinstance(example, Tensor):
            raise ValueError("example must be a tensor of data as x, by which the shapes of the "
                             f"stages are found, got {type(example).__name__}")
        self.stages = chain_of(self, network, example, apart=False)
        signal = _shapes(self.stages, example, blocks)
        self.size = example.shape[1:]
        self.sigma_data, self.noise_mean, self.noise_std = sigma_data, noise_mean, noise_std
        self.num_classes, self.overlap = num_classes, overlap
        self.edges = band_edges(blocks, partition, noise_mean, noise_std, sigma_min, sigma_max)
        between = range(1, len(self.stages) - 1)
        self.runs = [list(run) for run in _shared_out(between, blocks)]
        self.level = nn.Sequential(nn.Linear(2 * FREQUENCIES, WIDTH), nn.SiLU(),
                                   nn.Linear(WIDTH, WIDTH)).to(example)
        self.label = nn.Embedding((num_classes or 0) + 1, WIDTH).to(example)
        self.label.requires_grad_(num_classes is not None)
        self.tell = nn.ModuleList(nn.Linear(WIDTH, _channels(signal)) for _ in between).to(example)
        for parameter in self.tell.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, y: Tensor | None = None, block: int | None = None) -> Tensor:
        """Add the gradients of all blocks, or of `block` alone; return the loss."""
        last = len(self.runs) - 1
        checks.between(0, last, whole=True, block=block, optional=True)
        labels = self._labels(x, y)
        losses = []
        for b in range(last + 1) if block is None else [block]:
            sigma = self._drawn_levels(b, x)
            z = x + _column(sigma.to(x), x) * normal(x.shape, x, self.generator)
            skip, out, _ = self._scales(_column(sigma, x))
            wanted = (x - skip * z) / out
            loss = (self._raw(z, sigma, labels, b) - wanted).square().mean()
            if loss.requires_grad:
                (loss / (1 if block is not None else last + 1)).backward()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def denoise(self, z: Tensor, sigma: float, labels: Tensor | None = None,
                block: int | None = None) -> Tensor:
        """Return D(z, sigma), by default of the block in whose band sigma lies."""
        if block is None:
            block = min(sum(sigma < edge for edge in self.edges[1:]), len(self.runs) - 1)
        levels = torch.full((len(z),), sigma, dtype=torch.float64, device=z.device)
        skip, out, _ = self._scales(_column(levels, z))
        if labels is None:
            labels = torch.full((len(z),), self.num_classes or 0, device=z.device)
        return skip * z + out * self._raw(z, levels, labels, block)

    @torch.no_grad()
    def sample(self, n: int, steps: int = 18, labels: Tensor | None = None, *,
               solver: Literal["heun", "euler"] = "heun",
               generator: Generator | None = None) -> Tensor:
        """Draw data: start from noise of sigma_max and follow the blocks' flow to sigma = 0.

        dz/dsigma = (z - D(z, sigma)) / sigma, at `steps` levels between sigma_max and sigma_min
        that lie evenly in sigma^(1/7). `labels` (n,) are the classes to draw.
        """
        checks.count(1, n=n, steps=steps)
        checks.one_of(["heun", "euler"], solver=solver)
        if labels is not None and (self.num_classes is None or labels.shape != (n,)):
            raise ValueError(f"labels must be None or, for a rule with num_classes, ({n},), got "
                             f"{tuple(labels.shape)} with num_classes={self.num_classes}")
        like = next(self.level.parameters())
        root = 1 / 7
        sigmas = torch.linspace(self.edges[0] ** root, self.edges[-1] ** root, steps,
                                dtype=torch.float64) ** 7
        levels = sigmas.tolist()
        z = normal((n, *self.size), like, generator) * levels[0]
        with evaluating(self):
            z = integrate(lambda z, k: (z - self.denoise(z, levels[k], labels)) / levels[k], z,
                          sigmas.to(like), heun=solver == "heun")
            return self.denoise(z, levels[-1], labels)

    @torch.no_grad()
    def predict(self, x: Tensor, levels: int = 16) -> Tensor:
        """Return for each class minus the loss of restoring x as that class, at `levels` levels."""
        if self.num_classes is None:
            raise ValueError("num_classes was None, so there are no classes to predict; give "
                             "num_classes=, or use sample and denoise")
        noise = Generator().manual_seed(0)
        start, end = self._mass(self.edges[0], self.edges[-1])
        places = torch.lerp(start, end, (torch.arange(levels, dtype=torch.float64) + 0.5) / levels)
        scores = torch.zeros(len(x), self.num_classes, dtype=x.dtype, device=x.device)
        with evaluating(self):
            for sigma in self._sigma(places).tolist():
                z = x + sigma * torch.randn(x.shape, generator=noise).to(x)
                _, out, _ = self._scales(torch.tensor(sigma, dtype=torch.float64))
                for c in range(self.num_classes):
                    labels = torch.full((len(x),), c, device=x.device)
                    off = (self.denoise(z, sigma, labels) - x) / out.to(x)
                    scores[:, c] -= off.square().flatten(1).mean(1) / levels
        return scores

    def _raw(self, z: Tensor, sigma: Tensor, labels: Tensor, block: int) -> Tensor:
        """Return F_b(c_in z, sigma)."""
        h: Tensor = z * self._scales(_column(sigma, z))[2]
        context = self.stages.context(h)
        # log sigma of 0.002 .. 80 lies in about 0..1 so
        told = self.level(waves(sigma.log() / 12 + 0.55).to(self.label.weight))
        if self.num_classes is not None:
            told = told + self.label(labels)
        h = self.stages[0](h, context)
        for i in self.runs[block]:
            added: Tensor = self.tell[i - 1](told)
            h = self.stages[i](h + _beside(added, h), context)
        return self.stages[len(self.stages) - 1](h, context)

    def _scales(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return c_skip, c_out and c_in in the type of the rule's weights."""
        s, r2 = self.sigma_data, sigma.square() + self.sigma_data**2
        like = next(self.level.parameters())
        return (s**2 / r2).to(like), (sigma * s / r2.sqrt()).to(like), (1 / r2.sqrt()).to(like)

    def _drawn_levels(self, block: int, x: Tensor) -> Tensor:
        high, low = self.edges[block:block + 2]
        wider = (high / low) ** self.overlap
        start, end = self._mass(min(high * wider, self.edges[0]), max(low / wider, self.edges[-1]))
        places = spread_times(len(x), start, self.generator)
        return self._sigma(torch.lerp(start, end, places)).to(x.device)

    def _mass(self, *levels: float) -> Tensor:
        return _normal_cdf([(log(level) - self.noise_mean) / self.noise_std for level in levels])

    def _sigma(self, mass: Tensor) -> Tensor:
        return (self.noise_mean + self.noise_std * torch.special.ndtri(mass)).exp()

    def _labels(self, x: Tensor, y: Tensor | None) -> Tensor:
        if not isinstance(x, Tensor):
            raise ValueError(f"x must be a tensor of data, got {type(x).__name__}")
        if self.num_classes is None:
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if y is None or y.shape != x.shape[:1]:
            found = None if y is None else tuple(y.shape)
            raise ValueError(f"y must be ({len(x)},), a class for each sample, got {found}; leave "
                             "num_classes out to train without classes")
        check_labels(y, self.num_classes)
        return torch.where(y == -100, self.num_classes, y)


def band_edges(blocks: int, partition: str, mean: float, std: float, low: float,
               high: float) -> list[float]:
    """Return the noise levels between which the blocks' bands lie, from `high` down to `low`.

    >>> [round(edge, 3) for edge in band_edges(2, "equal_mass", 0.0, 1.0, 0.1, 10.0)]
    [10.0, 1.0, 0.1]
    """
    if partition == "uniform":
        inner = [exp(log(high) + b / blocks * (log(low) - log(high))) for b in range(1, blocks)]
    else:
        start, end = _normal_cdf([(log(high) - mean) / std, (log(low) - mean) / std])
        places = torch.lerp(start, end, torch.arange(1, blocks, dtype=torch.float64) / blocks)
        inner = (mean + std * torch.special.ndtri(places)).exp().tolist()
    return [high, *inner, low]


def _normal_cdf(values: list[float]) -> Tensor:
    return torch.special.ndtr(torch.tensor(values, dtype=torch.float64))


def _shared_out(items: range, parts: int) -> Iterable[range]:
    return (items[len(items) * b // parts:len(items) * (b + 1) // parts] for b in range(parts))


def _shapes(net: Stages, example: Tensor, blocks: int) -> tuple[int, ...]:
    """Return the shape of the signal between entry and exit; raise where there is none."""
    entry, *between, end = [tuple(row["shape"]) for row in net.table(example)] if len(net) > 1 \
        else [()] * 2
    if end != tuple(example.shape):
        raise ValueError(f"network must return what it takes, {tuple(example.shape)}, got {end}; "
                         "DiffusionBlocks trains denoisers of data, not classifiers")
    for name, shape in zip(net.names[1:], between, strict=False):
        if shape != entry:
            raise ValueError(f"network must keep the shape {entry} between its first and its last "
                             f"stage, got {shape} from stage {name}; name the stages by cuts=")
    if len(between) < blocks:
        raise ValueError(f"blocks must be at most the {len(between)} stages between the first and "
                         f"the last of network, got {blocks}; lower blocks or deepen the network")
    return entry


def _channels(shape: tuple[int, ...]) -> int:
    return shape[-1] if len(shape) < 4 else shape[1]


def _beside(added: Tensor, h: Tensor) -> Tensor:
    """Return `added` (batch, channels) so that it is added to each place of h."""
    if h.ndim < 4:
        return added.view(len(h), *[1] * (h.ndim - 2), -1)
    return added.view(len(h), -1, *[1] * (h.ndim - 2))


def _column(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.view(-1, *[1] * (x.ndim - 1))
