from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.blocks.reversible.block import ReversibleBlock
from netwright.blocks.reversible.sequential import ReversibleSequential
from netwright.catalogue.facets import method
from netwright.errors import CannotReverse, MissingExtra
from netwright.reversing.engine import Add, Update

__all__ = ["GroupedReversible", "ReversibleGIN"]


@method(
    "block",
    papers=["001-007"],
    place="residual stream",
    takes=("make_conv", "channels"),
    saves=["training memory"],
    needs=["a graph"],
    search={"groups": [2, 4]},
    variants={"three groups": {"make_conv": lambda width: nn.Linear(width, width), "channels": 6,
                               "groups": 3}},
    batch=lambda: torch.randn(5, 6),
)
class GroupedReversible(ReversibleBlock):
    """Add to each group of channels what a convolution makes of the group before it.

    y_0 = x_2 + ... + x_C;  y_i = x_i + f_i(y_{i-1}, graph)  for i = 1 to C.
    Inverse: x_i = y_i - f_i(y_{i-1}, graph) for i = C down to 2, then x_1 = y_1 - f_1(y_0, graph).

    The f are 1 / C as wide as x, so C groups have 1 / C of the parameters of one convolution that
    is as wide as x.

    Args:
        make_conv: Makes the convolution of a group from its number of channels; called once for
            each group. It is called with the group's features and all further arguments.
        channels: The channels of x.
        groups: Into how many groups they are split.
        dim: The dimension that is split.

    Shapes: x and y (nodes, channels); f (nodes, channels / groups) -> the same. More arguments
    (`edge_index` (2, edges), edge weights) go to every f, and those that need it get a gradient.

    Raises:
        ValueError: there are fewer than two groups, or they do not divide `channels`.
        CannotReverse: x has other channels, or an f does not keep the shape.

    Paper: Lo, Kulatilleke, Sarhan, Layeghy, Portmann, 2023, XG-BoT: An Explainable Deep Graph
    Neural Network for Botnet Detection and Forensics; and Li, Müller, Ghanem, Koltun, 2021,
    Training Graph Neural Networks with 1000 Layers.

    >>> import torch
    >>> block = GroupedReversible(lambda width: nn.Linear(width, width), channels=6, groups=3)
    >>> x = torch.randn(5, 6)
    >>> torch.allclose(block.inverse(block(x)), x, atol=1e-6)
    True
    """

    def __init__(self, make_conv: Callable[[int], nn.Module], channels: int, groups: int = 2, *,
                 dim: int = -1) -> None:
        super().__init__()
        checks.count(1, channels=channels)
        if groups < 2 or channels % groups:
            raise ValueError(f"groups must be at least 2 and divide channels={channels}, got "
                             f"{groups}")
        width = channels // groups
        self.streams, self.dim, self.sizes = groups, dim, [width] * groups
        self.convs = nn.ModuleList(_Conv(make_conv(width)) for _ in range(groups))

    def updates(self, *args: Any, **options: Any) -> list[Update]:
        """Return the addition to each group."""
        groups = range(len(self.convs))
        return [_Grouped(f"group {i}", conv, [i - 1] if i else groups[1:], i, args, options)
                for i, conv in enumerate(self.convs)]


@method(
    "block",
    papers=["001-007"],
    place="whole network",
    takes=("dim", "features", "classes"),
    saves=["training memory"],
    needs=["a graph"],
    search={"groups": [2, 4]},
    variants={"small": {"depth": 2}},
    batch=lambda: (torch.randn(4, 8), torch.tensor([[0, 1, 2], [1, 2, 3]])),
)
class ReversibleGIN(nn.Module):
    """A graph isomorphism network as deep as you like, in the memory of one layer.

    h = W_in x;  h := GroupedReversible(h), `depth` times;  out = W_out relu(norm(h)).
    In each group: f(h)_v = mlp((1 + eps) g_v + the sum of g_u over edges u -> v), g =
    dropout(relu(norm(h))), mlp two linear layers with a ReLU between.

    It is called as PyTorch Geometric's networks are, so that its explainers take it:
    `network(features, edge_index)`.

    Args:
        dim: The channels between entry and output, which `groups` divides.
        depth: How many grouped reversible blocks there are.
        groups: Into how many groups each splits the channels.
        features: The features of a node that W_in reads; `dim`, without W_in, where it is None.
        classes: What W_out makes; None leaves W_out out, and h is returned.
        dropout: The share of g that is dropped.

    Shapes: x (nodes, features); edge_index (2, edges), messages going from its first row to its
    second; out (nodes, classes).

    Raises:
        MissingExtra: PyTorch Geometric is not installed.
        ValueError: `depth` is below 1, or `groups` does not divide `dim`, or `dropout` is no
            share.

    Paper: Lo, Kulatilleke, Sarhan, Layeghy, Portmann, 2023, XG-BoT: An Explainable Deep Graph
    Neural Network for Botnet Detection and Forensics.

    >>> import torch
    >>> network = ReversibleGIN(8, depth=30, features=3, classes=2)
    >>> network(torch.randn(4, 3), torch.tensor([[0, 1, 2], [1, 2, 3]])).shape
    torch.Size([4, 2])
    """

    def __init__(self, dim: int, depth: int, groups: int = 2, *, features: int | None = None,
                 classes: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        checks.count(1, dim=dim, depth=depth)
        checks.count(1, optional=True, features=features, classes=classes)
        checks.between(0, 1, ends=(True, False), dropout=dropout)
        self.entry = nn.Identity() if features is None else nn.Linear(features, dim)
        self.blocks = ReversibleSequential(*[
            GroupedReversible(lambda width: _GIN(width, dropout), dim, groups)
            for _ in range(depth)])
        self.output = nn.Identity() if classes is None else nn.Sequential(
            nn.LayerNorm(dim), nn.ReLU(), nn.Linear(dim, classes))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Return what the nodes' features and the edges give."""
        return self.output(self.blocks(self.entry(x), edge_index))


class _Grouped(Add):
    """The addition of what a convolution makes of the sum of the groups that it reads."""

    def make(self, reads: Sequence[Tensor]) -> Tensor:
        """Return what is added."""
        assert self.module is not None
        return self.module(reduce(add, reads), *self.args, **self.options)


class _Conv(nn.Module):
    """A group's convolution, whose shape is looked at."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        made = self.conv(x, *args, **options)
        if not isinstance(made, Tensor) or made.shape != x.shape:
            got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise CannotReverse(f"{type(self.conv).__name__} must return a tensor of the shape "
                                f"{tuple(x.shape)} that it is given, got {got}")
        return made


class _GIN(nn.Module):
    """Norm, ReLU, dropout, and a graph isomorphism convolution."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        try:
            from torch_geometric.nn import GINConv
        except ImportError as error:
            raise MissingExtra("a GIN needs PyTorch Geometric, which is not installed "
                               f"({error}); pip install 'netwright[graphs]'") from error
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.conv = GINConv(nn.Sequential(nn.Linear(width, width), nn.ReLU(),
                                          nn.Linear(width, width)))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv(self.dropout(self.norm(x).relu()), edge_index)
