from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.blocks.reversible.block import ReversibleBlock
from netwright.blocks.reversible.mbconv import BATCH_NORMS, MBConv
from netwright.blocks.reversible.sequential import ReversibleSequential
from netwright.catalogue.facets import method
from netwright.errors import CannotReverse
from netwright.reversing.engine import Add, Regroup, Step, Update

__all__ = ["RevBiFPN", "RevSilo"]

MakeFusion = Callable[[int, int], nn.Module]


@method(
    "block",
    papers=["001-006"],
    place="residual stream",
    takes=("channels",),
    saves=["training memory"],
    needs=["images"],
    variants={"two levels": {"channels": (4, 6)}},
    batch=lambda: ((torch.randn(2, 4, 4, 4), torch.randn(2, 6, 2, 2)),),
)
class RevSilo(ReversibleBlock):
    """Let feature maps of several resolutions exchange what they hold, both ways, reversibly.

    h_j = x_j + sum_{i < j} D_ij(x_i)   from finer maps to coarser ones;
    y_j = h_j + sum_{i > j} U_ij(h_i)   and back.
    Inverse: h_j = y_j - sum_{i > j} U_ij(h_i) from the coarsest down, then
    x_j = h_j - sum_{i < j} D_ij(x_i) from the finest up.

    Level 0 is the finest; each other level has half the resolution of the one before.

    Args:
        channels: The channels of each level.
        make_down: Given i < j, makes D_ij, which takes level i to the shape of level j; an `MBConv`
            of stride 2^(j - i) where it is None.
        make_up: Given i > j, makes U_ij; an `MBConv` and linear interpolation where it is None.
        dims: 1, 2 or 3 for sequences, images and volumes.
        expand: Of the `MBConv`s.
        squeeze: Of the `MBConv`s.
        norm: Of the `MBConv`s; batch norm where it is None.

    Shapes: takes and returns a tuple of maps, x_i (batch, channels[i], *size / 2^i).

    Raises:
        ValueError: there are fewer than two levels.
        CannotReverse: the maps are not as many as `channels` or have others, or what D or U makes
            has not its level's shape.

    Paper: Chiley, Thangarasa, Gupta, Samar, Hestness, DeCoste, 2023, RevBiFPN: The Fully Reversible
    Bidirectional Feature Pyramid Network.

    >>> silo = RevSilo([4, 6, 8]).eval()
    >>> maps = [torch.randn(2, c, s, s) for c, s in ((4, 16), (6, 8), (8, 4))]
    >>> again = silo.inverse(silo(maps))
    >>> all(torch.allclose(a, b, atol=1e-5) for a, b in zip(again, maps))
    True
    """

    streams = None

    def __init__(self, channels: Sequence[int], *, make_down: MakeFusion | None = None,
                 make_up: MakeFusion | None = None, dims: int = 2, expand: float = 2.0,
                 squeeze: float = 0.0, norm: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        if len(channels) < 2:
            raise ValueError(f"channels must name at least two levels, got {list(channels)}")
        self.channels = tuple(channels)
        options: dict[str, Any] = {"dims": dims, "expand": expand, "squeeze": squeeze, "norm": norm}

        def narrow(i: int, j: int) -> nn.Module:
            stride = 2 ** (j - i)
            return MBConv(channels[i], channels[j], stride=stride, kernel_size=2 * stride - 1,
                          **options)

        def widen(i: int, j: int) -> nn.Module:
            kind = ("linear", "bilinear", "trilinear")[dims - 1]
            return nn.Sequential(MBConv(channels[i], channels[j], **options),
                                 nn.Upsample(scale_factor=2.0 ** (i - j), mode=kind))

        levels = range(len(channels))
        make_down, make_up = make_down or narrow, make_up or widen
        self.down = nn.ModuleDict({f"{i}_{j}": make_down(i, j)
                                   for j in reversed(levels) for i in levels if i < j})
        self.up = nn.ModuleDict({f"{i}_{j}": make_up(i, j)
                                 for j in levels for i in levels if i > j})

    def updates(self, *args: Any, **options: Any) -> list[Update]:
        """Return an addition for each pair: a level is read for the last time before it changes."""
        return [_Fuse(f"{way} {pair.replace('_', ' to ')}", module, [int(pair.split("_")[0])],
                      int(pair.split("_")[1]), args, options)
                for way, modules in (("down", self.down), ("up", self.up))
                for pair, module in modules.items()]

    def steps(self, *args: Any, **options: Any) -> list[Step]:
        """Return the updates, after a look at the maps."""
        return [Regroup("the maps of RevSilo", self._looked, list), *self.updates(*args, **options)]

    def _looked(self, streams: list[Tensor]) -> list[Tensor]:
        found = [stream.shape[1] for stream in streams]
        if found != list(self.channels):
            raise CannotReverse(f"RevSilo must be given maps of {list(self.channels)} channels, "
                                f"finest first, got maps of {found}")
        return streams


@method(
    "block",
    papers=["001-006"],
    place="whole network",
    takes=("inputs",),
    saves=["training memory"],
    needs=["images"],
    variants={"small": {"channels": (4, 6), "depth": 1, "fold": 2, "inputs": 1}},
    batch=lambda: torch.randn(2, 1, 4, 4),
)
class RevBiFPN(nn.Module):
    """Make a pyramid of feature maps that exchange what they hold, all of it reversible.

    x_0 = the input's pixels moved into channels;
    for each further level: couplings on every level, a new level of zeros, a `RevSilo`;
    then `depth` times: couplings on every level, a `RevSilo`.
    A coupling: y_1 = x_1 + F(x_2), y_2 = x_2 + G(y_1), x_1 and x_2 halves of the channels.

    Only the last maps are stored for the backward pass; `inverse` gives the input back.

    Args:
        channels: The channels of each level, finest first.
        depth: How many silos follow when the pyramid has all its levels.
        inputs: The channels of the input, which are repeated to fill those of the first level.
        fold: The first level's pixels have this many of the input's along each dimension.
        blocks: The couplings on each level before a silo.
        dims: 1, 2 or 3 for sequences, images and volumes.
        kernel_size: Of the couplings' `MBConv`s.
        expand: Of all `MBConv`s.
        squeeze: Of all `MBConv`s.
        norm: Makes a norm of that many channels; batch norm where it is None.
        exact: Whether the reconstruction is bit for bit, for about a byte a number and step.

    Shapes: x (batch, inputs, *size), each size a multiple of fold 2^(levels - 1); returns a tuple
    of maps, the i-th (batch, channels[i], *size / fold / 2^i).

    Raises:
        ValueError: an argument is out of range, or x has another shape.

    Paper: Chiley, Thangarasa, Gupta, Samar, Hestness, DeCoste, 2023, RevBiFPN: The Fully Reversible
    Bidirectional Feature Pyramid Network.

    >>> network = RevBiFPN([16, 24, 32], depth=1, inputs=1, fold=2)
    >>> [tuple(level.shape) for level in network(torch.randn(2, 1, 16, 16))]
    [(2, 16, 8, 8), (2, 24, 4, 4), (2, 32, 2, 2)]
    """

    def __init__(self, channels: Sequence[int] = (48, 64, 80, 160), depth: int = 2, *,
                 inputs: int = 3, fold: int = 4, blocks: int = 2, dims: int = 2,
                 kernel_size: int = 3, expand: float = 2.0, squeeze: float = 0.125,
                 norm: Callable[[int], nn.Module] | None = None, exact: bool = False) -> None:
        super().__init__()
        if len(channels) < 2 or min(channels) < 2:
            raise ValueError(f"channels must name at least two levels of at least two channels, "
                             f"got {list(channels)}")
        checks.count(0, depth=depth, blocks=blocks)
        checks.count(1, fold=fold, inputs=inputs, kernel_size=kernel_size)
        checks.between(1, 3, whole=True, dims=dims)
        each = fold ** dims
        if channels[0] % each or channels[0] // each < inputs:
            raise ValueError(f"channels[0]={channels[0]} must be a multiple of fold^dims={each} "
                             f"and at least {each * inputs}, to hold {inputs} channels of the "
                             "input; choose more channels or a smaller fold")
        self.channels, self.inputs, self.fold, self.dims = tuple(channels), inputs, fold, dims
        norm = norm or (lambda n: BATCH_NORMS[dims - 1](n, eps=1e-3))
        options: dict[str, Any] = {"dims": dims, "expand": expand, "squeeze": squeeze, "norm": norm}
        parts: list[nn.Module] = []
        for levels in [*range(1, len(channels)), *[len(channels)] * depth]:
            parts += [_Couplings(channels[:levels], kernel_size, options) for _ in range(blocks)]
            if levels < len(channels):
                parts.append(_NewLevel(channels[levels]))
                levels += 1
            parts.append(RevSilo(channels[:levels], **options))
        self.pyramid = ReversibleSequential(*parts, exact=exact)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of all levels, finest first."""
        least = self.fold * 2 ** (len(self.channels) - 1)
        if (x.ndim != 2 + self.dims or x.shape[1] != self.inputs
                or any(size % least or not size for size in x.shape[2:])):
            raise ValueError(f"x must be (batch, {self.inputs}, {self.dims} sizes that are "
                             f"multiples of {least}), got {tuple(x.shape)}; pad or resize it")
        copies = self.channels[0] // self.fold ** self.dims
        x = x.repeat(1, -(-copies // self.inputs), *[1] * self.dims)[:, :copies]
        return self.pyramid(_folded(x, self.fold))

    def inverse(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the input whose maps these are."""
        return _unfolded(self.pyramid.inverse(maps), self.fold)[:, :self.inputs]


class _Fuse(Add):

    def change(self, x: Sequence[Tensor], made: Tensor) -> Sequence[Tensor]:
        """Return x + made."""
        if made.shape != x[0].shape:
            raise CannotReverse(f"{self.name} must make its level's shape, {tuple(x[0].shape)}, "
                                f"got {tuple(made.shape)}; each level has half the resolution of "
                                "the one before, so sizes must be multiples of a power of 2")
        return super().change(x, made)


class _Couplings(ReversibleBlock):
    """An additive coupling of the two halves of each level's channels."""

    streams = None

    def __init__(self, channels: Sequence[int], kernel_size: int, options: dict[str, Any]) -> None:
        super().__init__()
        halves = [(n - n // 2, n // 2) for n in channels]
        options = {**options, "kernel_size": kernel_size}
        self.halves = [a for a, _ in halves]
        self.f = nn.ModuleList([MBConv(b, a, **options) for a, b in halves])
        self.g = nn.ModuleList([MBConv(a, b, **options) for a, b in halves])

    def updates(self, *args: Any, **options: Any) -> list[Update]:
        """Return the two additions of each level, whose halves are streams 2 k and 2 k + 1."""
        pairs = enumerate(zip(self.f, self.g, strict=True))
        return [step for k, (f, g) in pairs for step in (
            _Fuse(f"f of level {k}", f, [2 * k + 1], 2 * k, args, options),
            _Fuse(f"g of level {k}", g, [2 * k], 2 * k + 1, args, options))]

    def steps(self, *args: Any, **options: Any) -> list[Step]:
        """Return the updates between a split of every level and the joins."""
        split = Regroup("the split of the levels", self._split, self._join,
                        kind=("split levels", *self.halves), undoes=("join levels", *self.halves))
        join = Regroup("the join of the levels", self._join, self._split,
                       kind=("join levels", *self.halves), undoes=("split levels", *self.halves))
        return [split, *self.updates(*args, **options), join]

    def _split(self, streams: list[Tensor]) -> list[Tensor]:
        return [half.contiguous() for n, x in zip(self.halves, streams, strict=True)
                for half in (x[:, :n], x[:, n:])]

    def _join(self, streams: list[Tensor]) -> list[Tensor]:
        return [torch.cat(pair, 1) for pair in zip(streams[::2], streams[1::2], strict=True)]


class _NewLevel(ReversibleBlock):
    """A level of zeros at half the resolution of the last, which the next silo fills."""

    streams = None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def steps(self, *args: Any, **options: Any) -> list[Step]:
        """Return the one step, which moves the other levels as they are."""
        return [Regroup("the new level", self._more, lambda streams: streams[:-1])]

    def _more(self, streams: list[Tensor]) -> list[Tensor]:
        last = streams[-1]
        size = [n // 2 for n in last.shape[2:]]
        return [*streams, last.new_zeros(len(last), self.channels, *size)]


def _folded(x: Tensor, by: int) -> Tensor:
    """Return x with `by` neighbours along each dimension as channels of one pixel."""
    size = x.shape[2:]
    x = x.reshape(*x.shape[:2], *[n for s in size for n in (s // by, by)])
    outer, inner = range(2, x.ndim, 2), range(3, x.ndim, 2)
    return x.permute(0, 1, *inner, *outer).flatten(1, 1 + len(size))


def _unfolded(x: Tensor, by: int) -> Tensor:
    """Return what `_folded` was given."""
    size = x.shape[2:]
    dims = len(size)
    x = x.reshape(len(x), -1, *[by] * dims, *size)
    order = [n for k in range(dims) for n in (2 + dims + k, 2 + k)]
    return x.permute(0, 1, *order).reshape(*x.shape[:2], *[s * by for s in size])
