from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright import checks
from netwright.catalogue.facets import method
from netwright.generative.flows.flow import Transform
from netwright.reversing.engine import Regroup, Step, Update

__all__ = ["AdditiveCouplingTransform", "AffineCouplingTransform", "Permute",
           "SplineCouplingTransform"]


@method("generative", place="transform", takes=("order",),
        variants={"four": {"order": (2, 0, 3, 1)}})
class Permute(Transform):
    """Put the entries of a dimension in another order.

    z = x[order];  log_det = 0.

    Args:
        order: Which entry of x stands at each place of z.
        dim: The dimension that is put in order.

    Shapes: x and z (batch, *size), with as many entries in dimension `dim` as `order` has.

    Raises:
        ValueError: `order` does not name each entry once, or x has another number of them.

    >>> Permute([2, 0, 1])(torch.tensor([[1., 2., 3.]]))[0]
    tensor([[3., 1., 2.]])
    """

    order: Tensor
    back: Tensor

    def __init__(self, order: Sequence[int], dim: int = 1) -> None:
        super().__init__()
        order = [int(i) for i in order]
        if not order or sorted(order) != list(range(len(order))):
            raise ValueError(f"order must name each of the entries 0, 1, ... once, got {order}")
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("back", self.order.argsort())
        self.dim = dim

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the one step, which moves numbers and changes none."""
        return [Regroup("Permute", self._there, self._back)]

    def _there(self, streams: list[Tensor]) -> list[Tensor]:
        if streams[0].shape[self.dim] != len(self.order):
            raise ValueError(f"x must have {len(self.order)} entries in dimension {self.dim}, as "
                             f"many as order has, got {tuple(streams[0].shape)}")
        return [streams[0].index_select(self.dim, self.order), *streams[1:]]

    def _back(self, streams: list[Tensor]) -> list[Tensor]:
        return [streams[0].index_select(self.dim, self.back), *streams[1:]]


class _Coupling(Transform):
    """What the couplings share: a half of the entries passes, and says how to change the other."""

    def __init__(self, net: nn.Module, sizes: tuple[int, int], *, flip: bool = False) -> None:
        super().__init__()
        if len(sizes) != 2 or min(sizes) < 1:
            raise ValueError("sizes must be two numbers of entries, each at least 1, got "
                             f"{tuple(sizes)}")
        self.net, self.sizes, self.flip = net, tuple(sizes), flip

    def update(self, args: Sequence[Any], read: int, write: int) -> Update:
        """Return the step that changes streams `write` and 2, which is log_det."""
        raise TypeError(f"{type(self).__name__} must define update(args, read, write)")

    def steps(self, condition: Any = None) -> list[Step]:
        """Return the split, the change of one half, and the join."""
        layout = ("halves", *self.sizes)
        split = Regroup("the split before a coupling", self._split, self._join,
                        kind=("split", layout), undoes=("join", layout))
        join = Regroup("the join after a coupling", self._join, self._split,
                       kind=("join", layout), undoes=("split", layout))
        args = () if condition is None else (condition,)
        return [split, self.update(args, *((0, 1) if self.flip else (1, 0))), join]

    def _split(self, streams: list[Tensor]) -> list[Tensor]:
        x, log_det = streams
        if x.ndim < 2 or x.shape[1] != sum(self.sizes):
            raise ValueError(f"x must have {sum(self.sizes)} entries in dimension 1, the sum of "
                             f"sizes={self.sizes}, got {tuple(x.shape)}")
        return [*[part.contiguous() for part in x.split(list(self.sizes), 1)], log_det]

    def _join(self, streams: list[Tensor]) -> list[Tensor]:
        return [torch.cat(streams[:2], 1), streams[2]]


@method("generative", place="transform", takes=("net", "sizes"),
        network=lambda: AdditiveCouplingTransform(nn.Linear(2, 2), (2, 2)))
class AdditiveCouplingTransform(_Coupling):
    """Add to one half of a sample what a network makes of the other half.

    z_1 = x_1 + net(x_2[, condition]);  z_2 = x_2;  log_det = 0.

    Args:
        net: What is added.
        sizes: The entries of the two halves along dimension 1.
        flip: Whether the first half stays and the second is changed.

    Shapes: x and z (batch, sizes[0] + sizes[1], *); net takes sizes[1] entries and returns
    sizes[0], or the other way about where `flip` is set.

    Raises:
        ValueError: x, or what net returns, has not that many entries.

    Paper: Dinh, Krueger, Bengio, 2015, NICE: Non-linear Independent Components Estimation.

    >>> z, log_det = AdditiveCouplingTransform(nn.Linear(2, 1), (1, 2))(torch.randn(5, 3))
    >>> z.shape, log_det
    (torch.Size([5, 3]), tensor([0., 0., 0., 0., 0.]))
    """

    def update(self, args: Sequence[Any], read: int, write: int) -> Update:
        """Return the addition."""
        return _Additive("net", self.net, (read,), (write, 2), args)


@method("generative", place="transform", takes=("net", "sizes"),
        network=lambda: AffineCouplingTransform(nn.Linear(2, 4), (2, 2)))
class AffineCouplingTransform(_Coupling):
    """Scale and shift one half of a sample by what a network makes of the other half.

    (s, t) = net(x_2[, condition]);  z_1 = x_1 exp(c(s)) + t;  z_2 = x_2;
    c(s) = clamp tanh(s / clamp);  log_det = sum c(s).

    Args:
        net: Makes scales and shifts, all scales before all shifts along dimension 1.
        sizes: The entries of the two halves along dimension 1.
        clamp: What the logarithm of a scale stays below.
        flip: Whether the first half stays and the second is changed.

    Shapes: x and z (batch, sizes[0] + sizes[1], *); net takes sizes[1] entries and returns
    2 sizes[0], or the other way about where `flip` is set.

    Raises:
        ValueError: x, or what net returns, has not that many entries, or `clamp` is not positive.

    Paper: Dinh, Sohl-Dickstein, Bengio, 2017, Density Estimation Using Real NVP.

    >>> net = nn.Linear(1, 2)
    >>> z, log_det = AffineCouplingTransform(net, (1, 1))(torch.randn(5, 2))
    >>> z.shape, log_det.shape
    (torch.Size([5, 2]), torch.Size([5]))
    """

    def __init__(self, net: nn.Module, sizes: tuple[int, int], *, clamp: float = 2.0,
                 flip: bool = False) -> None:
        super().__init__(net, sizes, flip=flip)
        checks.above(0, clamp=clamp)
        self.clamp = clamp

    def update(self, args: Sequence[Any], read: int, write: int) -> Update:
        """Return the affine map."""
        affine = _Affine("net", self.net, (read,), (write, 2), args)
        affine.clamp = self.clamp
        return affine


@method("generative", place="transform", takes=("net", "sizes"), search={"bins": [4, 8, 16]},
        network=lambda: SplineCouplingTransform(nn.Linear(2, 22), (2, 2), bins=4))
class SplineCouplingTransform(_Coupling):
    """Bend one half of a sample by monotonic splines whose knots a network makes of the other.

    Between knots (a_k, b_k) and (a_{k+1}, b_{k+1}) with slopes d_k and d_{k+1}, where
    s = (b_{k+1} - b_k) / (a_{k+1} - a_k) and u = (x - a_k) / (a_{k+1} - a_k):

    z = b_k + (b_{k+1} - b_k) (s u^2 + d_k u (1 - u)) / (s + (d_k + d_{k+1} - 2 s) u (1 - u));
    log_det = sum log dz/dx.

    The knots span [-bound, bound] both ways; outside a number stays as it is. Widths and heights
    of the bins are softmaxes, slopes softplus, each kept above 0.001; the slopes at the ends are 1.
    Where net returns zeros, the transform is the identity.

    Args:
        net: Makes 3 bins - 1 numbers for each entry: widths, heights, inner slopes.
        sizes: The entries of the two halves along dimension 1.
        bins: The bins of a spline.
        bound: Where the splines end.
        flip: Whether the first half stays and the second is changed.

    Shapes: x and z (batch, sizes[0] + sizes[1], *); net takes sizes[1] entries and returns
    sizes[0] (3 bins - 1), or the other way about where `flip` is set.

    Raises:
        ValueError: x, or what net returns, has not that many entries; `bins` is below 2 or above
            500, or `bound` is not positive.

    Paper: Durkan, Bekasov, Murray, Papamakarios, 2019, Neural Spline Flows.

    >>> net = nn.Linear(1, 3 * 8 - 1)
    >>> flow = SplineCouplingTransform(net, (1, 1))
    >>> x = torch.randn(5, 2)
    >>> torch.allclose(flow.inverse(flow(x)[0]), x, atol=1e-4)
    True
    """

    def __init__(self, net: nn.Module, sizes: tuple[int, int], *, bins: int = 8,
                 bound: float = 5.0, flip: bool = False) -> None:
        super().__init__(net, sizes, flip=flip)
        checks.between(2, 500, bins=bins, whole=True)
        checks.above(0, bound=bound)
        self.bins, self.bound = bins, bound

    def update(self, args: Sequence[Any], read: int, write: int) -> Update:
        """Return the spline map."""
        spline = _Spline("net", self.net, (read,), (write, 2), args)
        spline.bins, spline.bound, spline.size = self.bins, self.bound, self.sizes[write]
        return spline


class _Additive(Update):

    def change(self, x: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        return [x[0] + _fitting(made, x[0], 1), x[1]]

    def restore(self, y: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        return [y[0] - _fitting(made, y[0], 1), y[1]]


class _Affine(Update):
    sums = (2,)
    clamp = 2.0

    def change(self, x: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        s, t = self._parts(x[0], made)
        return [x[0] * s.exp() + t, x[1] + s.flatten(1).sum(1)]

    def restore(self, y: Sequence[Tensor], made: Tensor) -> list[Tensor]:
        s, t = self._parts(y[0], made)
        return [(y[0] - t) * (-s).exp(), y[1] - s.flatten(1).sum(1)]

    def _parts(self, x: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
        s, t = _fitting(made, x, 2).chunk(2, 1)
        return self.clamp * torch.tanh(s / self.clamp), t


class _Spline(Update):
    sums = (2,)
    bins, bound, size, least = 8, 5.0, 1, 1e-3

    def make(self, reads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the inner knots (batch, size, *, 2, bins - 1), places and heights, and slopes."""
        raw, bins = super().make(reads).to(reads[0].dtype), self.bins
        count = self.size * (3 * bins - 1)
        if raw.ndim < 2 or raw.shape[1] != count:
            raise ValueError(f"net must return {count} entries in dimension 1, {3 * bins - 1} "
                             f"for each of {self.size}, got {tuple(raw.shape)}")
        raw = raw.unflatten(1, (self.size, -1)).movedim(2, -1)
        parts = raw[..., :2 * bins].unflatten(-1, (2, bins))
        # Softmax and its sums from the left; PyTorch's softmax is slow where a row is so short.
        sums = (parts - parts.detach().amax(-1, keepdim=True)).exp().cumsum(-1)
        parts = sums[..., :-1] / sums[..., -1:]
        least = torch.arange(1, bins, dtype=raw.dtype, device=raw.device) * self.least
        knots = torch.add((2 * least - 1) * self.bound, parts,
                          alpha=2 * self.bound * (1 - bins * self.least))
        # softplus(0.5413) + 0.001 is 1
        return knots, nn.functional.softplus(raw[..., 2 * bins:] + 0.53974) + self.least

    def change(self, x: Sequence[Tensor], made: tuple[Tensor, Tensor]) -> list[Tensor]:
        a0, b0, width, height, d0, d1 = self._bin(x[0], made, 0)
        inside, s = x[0].abs() < self.bound, height / width
        u = ((x[0] - a0) / width).clamp(0, 1)
        uu = u * u
        v = u - uu
        below = torch.addcmul(s, d0 + d1 - 2 * s, v)
        z = b0 + height * torch.addcmul(s * uu, d0, v) / below
        # d0 (1 - u)^2 + 2 s u (1 - u) + d1 u^2
        above = torch.addcmul(torch.addcmul(d0 * (1 - u - v), s, v, value=2), d1, uu)
        log = (above * (s / below).square()).log()
        log = torch.where(inside, log, 0.0)
        return [torch.where(inside, z, x[0]), x[1] + log.flatten(1).sum(1)]

    def restore(self, y: Sequence[Tensor], made: tuple[Tensor, Tensor]) -> list[Tensor]:
        a0, b0, width, height, d0, d1 = self._bin(y[0], made, 1)
        s, up = height / width, y[0] - b0
        both = up * (d0 + d1 - 2 * s)
        p, q, r = torch.addcmul(both, height, s - d0), height * d0 - both, s * up
        root = torch.addcmul(q * q, p, r, value=4).clamp(min=0).sqrt()
        u = (2 * r / (q + root)).clamp(0, 1)
        return [torch.where(y[0].abs() < self.bound, torch.addcmul(a0, u, width), y[0]), y[1]]

    def _bin(self, x: Tensor, made: tuple[Tensor, Tensor], by: int) -> tuple[Tensor, ...]:
        """Return place, height, width, rise and both slopes of the bin in which `x` lies.

        `by` says whether x is among the places, 0, or the heights, 1.
        """
        knots, slopes = made
        x = x.detach().unsqueeze(-1)
        k = torch.searchsorted(knots.detach()[..., by, :].contiguous(), x, right=True)
        last = self.bins - 2
        ends = torch.cat([k - 1, k], -1).clamp(0, last)
        first, final = k == 0, k == last + 1
        d = slopes.gather(-1, ends)
        d0 = torch.where(first, 1.0, d[..., :1]).squeeze(-1)
        d1 = torch.where(final, 1.0, d[..., 1:]).squeeze(-1)
        found = knots.gather(-1, ends.unsqueeze(-2).expand(*ends.shape[:-1], 2, 2))
        low = torch.where(first, -self.bound, found[..., 0])
        high = torch.where(final, self.bound, found[..., 1])
        (a0, b0), (width, height) = low.unbind(-1), (high - low).unbind(-1)
        return a0, b0, width, height, d0, d1


def _fitting(made: Tensor, x: Tensor, numbers: int) -> Tensor:
    """Return `made` in the dtype of x, if it has `numbers` numbers for each entry of that.

    In the narrower one that autocast computes in, exp(s) exp(-s) would not be 1.
    """
    wanted = (x.shape[0], numbers * x.shape[1], *x.shape[2:])
    if made.shape != wanted:
        raise ValueError(f"net must return {wanted}, {numbers} numbers for each entry that is "
                         f"changed, got {tuple(made.shape)}")
    return made.to(x.dtype)
