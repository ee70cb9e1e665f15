from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from netwright import checks
from netwright.blocks.reversible.block import ReversibleBlock
from netwright.blocks.reversible.sequential import ReversibleSequential
from netwright.catalogue.facets import method
from netwright.errors import CannotReverse
from netwright.reversing.engine import Stored, Update, chained, run
from netwright.runtime.attributes import Memo

__all__ = ["ColumnLevel", "ColumnSupervision", "RevCol", "RevColumn"]

MakeLevel = Callable[[int], nn.Module]


@method("block", place="residual stream", takes=("levels", "channels"), saves=["training memory"],
        network=lambda: RevColumn([ColumnLevel(4, above=6), ColumnLevel(6, below=4)], (4, 6)),
        batch=lambda: ((torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4),
                        torch.randn(2, 6, 2, 2)),))
class RevColumn(ReversibleBlock):
    """Update every level of a feature hierarchy, from the lowest up, by what its neighbours hold.

    c_l = F_l(c_{l-1}, a_{l+1}) + gamma_l a_l, a what the levels held before, c_0 = x.
    Inverse, from the highest level down: a_l = (c_l - F_l(c_{l-1}, a_{l+1})) / gamma_l.

    The column of a `RevCol`. gamma_l is learned, one number a channel. Where it is nearer to 0
    than `least_scale`, it counts as that far from it, and the gradient passes as if it were not
    held there.

    Args:
        levels: F_1 to F_L. The last is called with the level below it, each other one with the
            levels below and above it.
        channels: The channels of each level.
        shortcut_scale: What gamma starts as.
        least_scale: How near to 0 gamma may come.
        dim: The dimension of the channels.

    Shapes: takes and returns (x, a_1, ..., a_L), x any shape, a_l (*, channels[l-1], *) with the
    channels at `dim`; F_l returns a_l's shape.

    Raises:
        ValueError: there are not as many `channels` as `levels`, or a scale is out of range.
        CannotReverse: a level returns another shape than its stream's.

    Paper: Cai, Zhou, Han, Sun, Kong, Li, Zhang, 2023, Reversible Column Networks.

    >>> class Level(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.f = nn.Linear(4, 4)
    ...     def forward(self, below, above=None):
    ...         return self.f(below if above is None else below + above)
    >>> column, before = RevColumn([Level(), Level()], [4, 4]), torch.randn(3, 5, 4).unbind()
    >>> again = column.inverse(column(before))
    >>> all(torch.allclose(a, b, atol=1e-5) for a, b in zip(again, before))
    True
    """

    streams = None

    def __init__(self, levels: Sequence[nn.Module], channels: Sequence[int], *,
                 shortcut_scale: float = 0.5, least_scale: float = 1e-3, dim: int = 1) -> None:
        super().__init__()
        if len(levels) != len(channels) or not levels:
            raise ValueError(f"channels must name one number for each of the {len(levels)} levels, "
                             f"got {list(channels)}")
        checks.between(0, abs(shortcut_scale), ends=(False, True), least_scale=least_scale,
                       advice=f"shortcut_scale={shortcut_scale}")
        self.levels = nn.ModuleList(levels)
        self.scales = nn.ModuleList([_Scale(n, shortcut_scale, least_scale, dim)
                                     for n in channels])

    def updates(self, *args: Any, **options: Any) -> list[Update]:
        """Return one update for each level, the lowest first."""
        top = len(self.levels)
        return [_Level(f"level {k}", level, scale, (k - 1, k + 1) if k < top else (k - 1,), k,
                       args, options)
                for k, (level, scale) in enumerate(
                    zip(self.levels, self.scales, strict=True), start=1)]

    def forward(self, x: Any, *args: Any, **options: Any) -> Any:
        """Return `x` and the levels after the update."""
        return super().forward(self._looked(x), *args, **options)

    def inverse(self, y: Any, *args: Any, **options: Any) -> Any:
        """Return `x` and the levels before it."""
        return super().inverse(self._looked(y), *args, **options)

    def _looked(self, streams: Any) -> Any:
        if isinstance(streams, Tensor) or len(streams) != len(self.levels) + 1:
            got = "a tensor" if isinstance(streams, Tensor) else f"{len(streams)} tensors"
            raise CannotReverse(f"RevColumn must be given (x, a_1, ..., a_{len(self.levels)}), "
                                f"{len(self.levels) + 1} tensors, got {got}")
        return streams

    def least_scale(self) -> Tensor:
        """Return how near to 0 the nearest scale is."""
        return torch.stack([cast(_Scale, scale).least() for scale in self.scales]).amin()


@method(
    "block",
    papers=["001-004"],
    place="whole network",
    takes=("channels",),
    saves=["training memory"],
    search={"shortcut_scale": [0.5, 1.0]},
    network=lambda: RevCol.convolutional(channels=(8, 12), blocks=(1, 1), columns=2),
    batch=lambda: torch.randn(2, 8, 4, 4),
)
class RevCol(nn.Module):
    """Refine a feature hierarchy in columns, and store the last column alone.

    x_l^t = F_l^t(x_{l-1}^t, x_{l+1}^{t-1}) + gamma_l^t x_l^{t-1},  x_0^t = x,
    where the first column has x_l^1 = F_l^1(x_{l-1}^1).

    Every column is a `RevColumn`; on the way back column t - 1 is reconstructed from column t. The
    first column's levels keep what they are given and run again. Going back through a column
    divides by gamma, so rounding errors grow at least as the product of 1 / |gamma| over columns.
    Where that would pass `growth`, the network keeps the column in between: every third at the
    scale 0.5 that the paper starts from. With scales near 1, or `growth=None`, memory does not
    depend on the number of columns at all.

    Args:
        make_level: For each level, from the lowest, a function of the column's number, 0 for the
            first, that makes F_l^t: any module. It is called with the level below it alone in the
            first column and in the highest level, with those below and above it elsewhere.
        channels: The channels of each level.
        columns: How many columns there are.
        shortcut_scale: What each gamma starts as.
        least_scale: How near to 0 a gamma may come.
        growth: How often over the scales may magnify rounding errors before a column is kept;
            None keeps the last column only.
        level: The level that is returned alone, -1 for the highest; None returns all.
        dim: The dimension of the channels.
        exact: Whether every column comes back bit for bit, for about a byte a number and column.

    Shapes: x as the lowest level takes it. Returns a tuple with a tensor for each level, of which
    dimension `dim` is its channels; or the one of `level`.

    Raises:
        ValueError: an argument is out of range, or a tap is no column.
        CannotReverse: a level returns another shape in one column than in the one before.

    Paper: Cai, Zhou, Han, Sun, Kong, Li, Zhang, 2023, Reversible Column Networks.

    >>> network = RevCol.convolutional(channels=(8, 16, 32), blocks=(1, 1, 1), columns=4)
    >>> [tuple(level.shape) for level in network(torch.randn(2, 8, 8, 8))]
    [(2, 8, 8, 8), (2, 16, 4, 4), (2, 32, 2, 2)]
    """

    def __init__(self, make_level: Sequence[MakeLevel], channels: Sequence[int], columns: int, *,
                 shortcut_scale: float = 0.5, least_scale: float = 1e-3,
                 growth: float | None = 10.0, level: int | None = None, dim: int = 1,
                 exact: bool = False) -> None:
        super().__init__()
        checks.count(1, columns=columns)
        if len(make_level) != len(channels) or not channels:
            raise ValueError(f"channels must name one number for each of the {len(make_level)} "
                             f"levels of make_level, got {list(channels)}")
        checks.at_least(1, growth=growth, optional=True, advice="None keeps the last column only")
        checks.between(-len(channels), len(channels) - 1, whole=True, optional=True, level=level,
                       advice=f"there are {len(channels)} levels")
        self.growth, self.level, self.exact = growth, level, exact
        self.first = nn.ModuleList([make(0) for make in make_level])
        self.columns = ReversibleSequential(*[
            RevColumn([make(t) for make in make_level], channels, shortcut_scale=shortcut_scale,
                      least_scale=least_scale, dim=dim) for t in range(1, columns)], exact=exact)
        self._seen = Memo()

    @classmethod
    def convolutional(cls, channels: Sequence[int], blocks: Sequence[int], columns: int, *,
                      kernel_size: int = 3, dims: int = 2, **options: Any) -> "RevCol":
        """Return the paper's network: `ColumnLevel`s, each at half the resolution of the last.

        `blocks` says how many blocks each level has; the lowest takes `channels[0]` channels.
        """
        if len(blocks) != len(channels):
            raise ValueError(f"blocks must name one number for each of the {len(channels)} "
                             f"channels, got {list(blocks)}")

        def make(level: int, column: int) -> nn.Module:
            above = channels[level + 1] if column and level + 1 < len(channels) else None
            return ColumnLevel(channels[level], below=channels[level - 1] if level else None,
                               above=above, blocks=blocks[level], kernel_size=kernel_size,
                               dims=dims)

        return cls([partial(make, level) for level in range(len(channels))], channels, columns,
                   **options)

    def forward(self, x: Tensor, taps: Sequence[int] | None = None) -> Any:
        """Return what the last column holds, or a list of what each column of `taps` holds.

        A column that is tapped is kept.
        """
        number = len(self.columns) + 1
        wanted = [number - 1] if taps is None else [t % number for t in taps
                                                    if -number <= t < number]
        if taps is not None and len(wanted) < len(taps):
            raise ValueError(f"taps must be columns of {number}, 0 to {number - 1}, got "
                             f"{list(taps)}")
        found: dict[int, Any] = {}
        streams = [x]
        for k, level in enumerate(self.first, start=1):
            step = Stored(f"level {k} of column 0", level, [level])
            streams += run([step], streams[-1:])
        ends, parts = self._kept(torch.is_grad_enabled()) | set(wanted), [*self.columns]
        start, kind = 0, (torch.is_grad_enabled(), self.training)
        for end in sorted(ends):
            steps = chained([cast(RevColumn, part).steps() for part in parts[start:end]])
            if steps:
                streams = run(steps, streams, exact=self.exact,
                              first=kind not in self._seen)
            levels, start = tuple(streams[1:]), end
            found[end] = levels if self.level is None else levels[self.level]
        self._seen.add(kind)
        return found[number - 1] if taps is None else [found[t] for t in wanted]

    @torch.no_grad()
    def _kept(self, grad: bool = True) -> set[int]:
        """Return the columns to keep lest the scales magnify rounding beyond what is allowed."""
        if self.growth is None or self.exact or not (len(self.columns) and grad):
            return set()
        least = torch.stack([cast(RevColumn, column).least_scale()
                             for column in self.columns]).clamp(max=1.0).tolist()
        kept, grown = set(), 1.0
        for t in range(len(least), 0, -1):  # going back from column t divides by least[t - 1]
            grown /= least[t - 1]
            if grown > self.growth and t < len(least):
                kept.add(t)
                grown = 1 / least[t - 1]
        return kept


@method("companion")
class ColumnLevel(nn.Module):
    """Make a level of its neighbours as the paper's convolutional network does.

    F(below, above) = blocks(down(below) + up(above)): `down` halves the resolution by a
    convolution of stride 2, `up` doubles it by nearest neighbours after a map of the channels,
    both normalised over channels; the blocks are ConvNeXt's.

    Args:
        channels: The channels of the level.
        below: The channels of the level below, None if that is what the network is given.
        above: The channels of the level above, None if none is read.
        blocks: How many ConvNeXt blocks there are.
        kernel_size: Of their depthwise convolutions.
        dims: 1, 2 or 3 for sequences, images and volumes.

    Shapes: below (batch, below or channels, *size), above (batch, above, *size of the level / 2);
    returns (batch, channels, *size of the level).

    >>> level = ColumnLevel(8, below=4, above=16)
    >>> level(torch.randn(2, 4, 8, 8), torch.randn(2, 16, 2, 2)).shape
    torch.Size([2, 8, 4, 4])
    """

    def __init__(self, channels: int, *, below: int | None = None, above: int | None = None,
                 blocks: int = 1, kernel_size: int = 3, dims: int = 2) -> None:
        super().__init__()
        checks.between(1, 3, whole=True, dims=dims)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.down = nn.Identity() if below is None else nn.Sequential(
            conv(below, channels, 2, 2), _ChannelNorm(channels, eps=1e-6))
        self.up = None if above is None else nn.Sequential(
            conv(above, channels, 1), _ChannelNorm(channels, eps=1e-6),
            nn.Upsample(scale_factor=2.0))
        self.blocks = nn.Sequential(*[_ConvNeXtBlock(channels, kernel_size, conv)
                                      for _ in range(blocks)])

    def forward(self, below: Tensor, above: Tensor | None = None) -> Tensor:
        """Return the level's features."""
        h = self.down(below)
        return self.blocks(h if self.up is None else h + self.up(above))


@method("companion", papers=["001-004"])
class ColumnSupervision(nn.Module):
    """Train a `RevCol` with heads at several columns, that early ones lose nothing of the input.

    L = sum_i alpha_i BCE(decoder_i(h_i), x) + beta_i CE(classifier_i(h_i), y), h_i the highest
    level of the i-th of n tapped columns; alpha_i = reconstruction (1 - i / (n - 1)) and
    beta_i = classification (i + 1) / n for i = 0 .. n - 2; the last head has a classifier alone,
    and beta = 1.

    As a module it is a classifier: it returns the last head's logits. `loss` is what to descend.

    Args:
        columns: The network.
        make_classifier: Makes what turns the highest level into logits.
        make_decoder: Makes what turns it into the logits of the input's pixels.
        heads: n, spread evenly over the columns.
        stem: What runs before the columns.
        reconstruction: The weight of the first decoder.
        classification: What the weight of the classifiers before the last grows towards.

    Shapes: x (batch, *size) in 0..1; y (batch,); logits (batch, classes).

    Raises:
        ValueError: there are more heads than columns, or x leaves 0..1.

    Paper: Cai, Zhou, Han, Sun, Kong, Li, Zhang, 2023, Reversible Column Networks.

    >>> columns = RevCol.convolutional(channels=(4, 8), blocks=(1, 1), columns=4)
    >>> network = ColumnSupervision(
    ...     columns, lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    ...     lambda: nn.Sequential(nn.Conv2d(8, 4, 1), nn.PixelShuffle(2)), heads=2,
    ...     stem=nn.Conv2d(1, 4, 1))
    >>> x, y = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    >>> network.loss(x, y).backward()
    >>> network(x).shape
    torch.Size([5, 3])
    """

    def __init__(self, columns: RevCol, make_classifier: Callable[[], nn.Module],
                 make_decoder: Callable[[], nn.Module], *, heads: int = 4,
                 stem: nn.Module | None = None, reconstruction: float = 4.0,
                 classification: float = 0.8) -> None:
        super().__init__()
        number = len(columns.columns) + 1
        checks.between(1, number, whole=True, heads=heads, advice=f"there are {number} columns")
        self.stem, self.columns = stem or nn.Identity(), columns
        self.taps = [(i + 1) * number // heads - 1 for i in range(heads)]
        self.classifiers = nn.ModuleList([make_classifier() for _ in range(heads)])
        self.decoders = nn.ModuleList([make_decoder() for _ in range(heads - 1)])
        self.alpha = [reconstruction * (1 - i / (heads - 1)) for i in range(heads - 1)]
        self.beta = [*(classification * (i + 1) / heads for i in range(heads - 1)), 1.0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the last head's logits."""
        return self.classifiers[-1](self._top(self.columns(self.stem(x))))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the weighted sum of all heads' losses."""
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise ValueError(f"x must be in 0..1 to be reconstructed as probabilities, got "
                             f"{float(x.amin()):.3g} to {float(x.amax()):.3g}; scale it")
        tops = [self._top(found) for found in self.columns(self.stem(x), self.taps)]
        loss = torch.stack([beta * cross_entropy(head(h), y) for beta, head, h in
                            zip(self.beta, self.classifiers, tops, strict=True)]).sum()
        for alpha, decoder, h in zip(self.alpha, self.decoders, tops, strict=False):
            loss = loss + alpha * binary_cross_entropy_with_logits(decoder(h), x)
        return loss

    def _top(self, found: Any) -> Tensor:
        return found if isinstance(found, Tensor) else found[-1]


class _Level(Update):

    def __init__(self, name: str, module: nn.Module, scale: nn.Module, reads: Sequence[int],
                 write: int, args: Sequence[Any], options: dict[str, Any]) -> None:
        super().__init__(name, module, reads, (write,), args, options)
        self.scale = scale

    def change(self, x: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        """Return gamma x + made."""
        if made.shape != x[0].shape:
            raise CannotReverse(f"{self.name} must return its stream's shape, "
                                f"{tuple(x[0].shape)}, got {tuple(made.shape)}; a level has the "
                                "same shape in every column")
        return [(x[0] * self.scale(x[0]) + made).to(x[0].dtype)]

    def restore(self, y: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        """Return (y - made) / gamma."""
        return [((y[0] - made) / self.scale(y[0])).to(y[0].dtype)]

    def modules(self) -> list[nn.Module]:
        """Return the level and its scale."""
        return [*super().modules(), self.scale]


class _Scale(nn.Module):
    """One number a channel, at least so far from 0."""

    def __init__(self, channels: int, start: float, bound: float, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), start))
        self.bound, self.dim = bound, dim

    def forward(self, x: Tensor) -> Tensor:
        """Return the scales, shaped to multiply x."""
        gamma = self.gamma
        held = torch.where(gamma < 0, gamma.clamp(max=-self.bound), gamma.clamp(min=self.bound))
        scale = gamma + (held - gamma).detach()  # held there by value, not in its gradient
        size = [1] * x.ndim
        size[self.dim] = -1
        return scale.view(size)

    def least(self) -> Tensor:
        """Return how near to 0 the nearest scale is."""
        return self.gamma.detach().abs().amin().clamp(min=self.bound).float()


class _ChannelNorm(nn.LayerNorm):

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _ConvNeXtBlock(nn.Module):

    def __init__(self, channels: int, kernel_size: int, conv: Any) -> None:
        super().__init__()
        self.mix = conv(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.wide = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.mix(x).movedim(1, -1))
        h = self.narrow(nn.functional.gelu(self.wide(h))) * self.scale
        return x + h.movedim(-1, 1)
