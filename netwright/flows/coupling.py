from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright.blocks.reversible.engine import Regroup, Step, Update
from netwright.flows.flow import Transform


class Permute(Transform):
    """Put the entries of a dimension in another order.

    z = x[order];  log_det = 0.

    Shapes: x and z (batch, *size), `dim` of them with as many entries as `order`.

    >>> Permute([2, 0, 1])(torch.tensor([[1., 2., 3.]]))[0]
    tensor([[3., 1., 2.]])
    """

    order: Tensor
    back: Tensor

    def __init__(self, order: Sequence[int], dim: int = 1) -> None:
        super().__init__()
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"order must name each of 0 to {len(order) - 1} once, got {order}")
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("back", self.order.argsort())
        self.dim = dim

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the one step, which moves numbers and changes none."""
        return [Regroup("Permute", lambda s: [s[0].index_select(self.dim, self.order), *s[1:]],
                        lambda s: [s[0].index_select(self.dim, self.back), *s[1:]])]


class AffineCouplingTransform(Transform):
    """Scale and shift one half of a sample by what a network makes of the other half.

    (s, t) = net(x_2[, condition]);  z_1 = x_1 exp(c(s)) + t;  z_2 = x_2;
    c(s) = clamp tanh(s / clamp);  log_det = sum c(s).

    Args:
        net: Makes scale and shift, next to each other along dimension 1.
        sizes: The entries of the two halves along dimension 1.
        clamp: What the logarithm of a scale stays below.
        flip: Whether the first half stays and the second is changed.

    Shapes: x and z (batch, sizes[0] + sizes[1], *); net takes sizes[1] entries and returns
    2 sizes[0], or the other way about where `flip` is set.

    Paper: Dinh, Sohl-Dickstein, Bengio, 2017, Density Estimation Using Real NVP.

    >>> net = nn.Linear(1, 2)
    >>> z, log_det = AffineCouplingTransform(net, (1, 1))(torch.randn(5, 2))
    >>> z.shape, log_det.shape
    (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(self, net: nn.Module, sizes: tuple[int, int], *, clamp: float = 2.0,
                 flip: bool = False) -> None:
        super().__init__()
        if not clamp > 0:
            raise ValueError(f"clamp must be above 0, got {clamp}")
        self.net, self.sizes, self.clamp, self.flip = net, tuple(sizes), clamp, flip

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the split, the affine map and the join."""
        layout = ("halves", *self.sizes)
        split = Regroup("the split before a coupling", self._split, self._join,
                        kind=("split", layout), undoes=("join", layout))
        join = Regroup("the join after a coupling", self._join, self._split,
                       kind=("join", layout), undoes=("split", layout))
        args = () if condition is None else (condition,)
        read, write = (0, 1) if self.flip else (1, 0)
        affine = _Affine("net", self.net, (read,), (write, 2), args)
        affine.clamp = self.clamp
        return [split, affine, join]

    def _split(self, streams: list[Tensor]) -> list[Tensor]:
        x, log_det = streams
        if x.shape[1] != sum(self.sizes):
            raise ValueError(f"x must have {sum(self.sizes)} entries in dimension 1, the sum of "
                             f"sizes={self.sizes}, got {tuple(x.shape)}")
        return [*[part.contiguous() for part in x.split(list(self.sizes), 1)], log_det]

    def _join(self, streams: list[Tensor]) -> list[Tensor]:
        return [torch.cat(streams[:2], 1), streams[2]]


class _Affine(Update):
    clamp = 2.0

    def change(self, x: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        """Return x exp(s) + t, and log_det + sum s."""
        s, t = self._parts(x[0], made)
        return [x[0] * s.exp() + t, x[1] + s.flatten(1).sum(1)]

    def restore(self, y: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        """Return (y - t) exp(-s), and log_det - sum s."""
        s, t = self._parts(y[0], made)
        return [(y[0] - t) * (-s).exp(), y[1] - s.flatten(1).sum(1)]

    def _parts(self, x: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        if made.shape[1] != 2 * x.shape[1]:
            raise ValueError(f"net must return {2 * x.shape[1]} entries in dimension 1, a scale "
                             f"and a shift for each of {x.shape[1]}, got {tuple(made.shape)}")
        s, t = made.to(x.dtype).chunk(2, 1)  # under autocast exp(s) exp(-s) would not be 1
        return self.clamp * torch.tanh(s / self.clamp), t
