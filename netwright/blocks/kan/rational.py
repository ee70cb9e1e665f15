import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from netwright import checks
from netwright.catalogue.facets import method
from netwright.runtime.modes import transformed

__all__ = ["GroupRational", "RationalFeedForward"]

Backward = Literal["blocked", "autograd"]
_TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x, "swish": silu, "silu": silu, "gelu": gelu, "relu": relu,
    "tanh": torch.tanh}
_RANGE = 4.0  # where the first coefficients fit their function
_BLOCK = 2 ** 16  # entries of a block on a processor, which stay in its cache


@method(
    "block",
    papers=["004-052"],
    place="activation",
    takes=("dim",),
    search={"fit": ["swish", "gelu"]},
    variants={"plain": {}, "autograd": {"backward": "autograd"}},
)
class GroupRational(nn.Module):
    """An activation that is learnt: a quotient of two polynomials for each group of channels.

    y = P(x) / Q(x);  P(x) = a_0 + a_1 x + ... + a_m x^m;  Q(x) = 1 + |b_1 x + ... + b_n x^n|.

    Q is at least 1, so that there are no poles. The slope of |B| at B = 0 is taken as 1, since b
    would never leave 0 otherwise. The coefficients first fit a known activation on [-4, 4] by
    least squares.

    `backward="blocked"` keeps x alone, and reads it once more in the backward pass, block by block
    of rows that stay in cache: each block adds up its part of the coefficients' gradients, and the
    parts are added up at the end. The error of such a sum grows with the length of a block and the
    number of blocks, that of adding one after another with their product. `"autograd"` lets
    PyTorch differentiate the formula.

    Args:
        dim: the channels, the last axis of x.
        groups: how many runs of channels have coefficients of their own.
        degree: m.
        denominator: n.
        fit: what the activation is at first: identity, swish (silu), gelu, relu or tanh.
        share_numerator: whether the groups share a, as in the Kolmogorov-Arnold transformer.
        backward: how gradients are computed.
        block: rows of a block; without it 65536 entries on a processor, 2^24 on others.

    Shapes: x and y (*, dim); numerator (1 or groups, m + 1); denominator (groups, n).

    Raises:
        ValueError: `groups` does not divide `dim`, a size is below 1, or x has another last axis.
        UnknownName: `fit` or `backward` is none of those named above.

    Paper: Raffel, Chen, 2025, FlashKAT: Understanding and Addressing Performance Bottlenecks in
    the Kolmogorov-Arnold Transformer.

    >>> activation, x = GroupRational(16, groups=4), torch.linspace(-2, 2, 16)
    >>> (activation(x) - silu(x)).abs().max().item() < 0.01
    True
    """

    def __init__(self, dim: int, groups: int = 8, *, degree: int = 5, denominator: int = 4,
                 fit: str = "swish", share_numerator: bool = True,
                 backward: Backward = "blocked", block: int | None = None) -> None:
        super().__init__()
        checks.count(1, dim=dim, groups=groups, degree=degree, denominator=denominator,
                     block=1 if block is None else block)
        if dim % groups:
            raise ValueError(f"groups must divide dim={dim}, got {groups}; "
                             f"try {math.gcd(dim, groups)}")
        checks.one_of(_TARGETS, activation=fit)
        checks.one_of(["blocked", "autograd"], backward=backward)
        self.dim, self.groups, self.backward, self.block = dim, groups, backward, block
        a, b = _fitted(fit, degree, denominator)
        self.numerator = nn.Parameter(a.repeat(1 if share_numerator else groups, 1))
        self.denominator = nn.Parameter(b.repeat(groups, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, dim) of (*, dim)."""
        if not x.ndim or x.shape[-1] != self.dim:
            raise ValueError(f"x must be (*, {self.dim}), since dim={self.dim}, "
                             f"got {tuple(x.shape)}")
        # Powers of x need the range and the digits of float32.
        wide = torch.promote_types(x.dtype, torch.float32)
        a = self.numerator.to(wide).expand(self.groups, -1)
        b = self.denominator.to(wide)
        with torch.autocast(x.device.type, enabled=False):
            if self.backward == "autograd" or transformed():
                return _quotient(x.to(wide), *_channels(a, b, self.dim)).to(x.dtype)
            y: Tensor = _Blocked.apply(x, a, b, self._rows(x))
            return y

    def gain(self) -> float:
        """Return 1 / E[y^2] for x ~ N(0, 1), the mean over the groups.

        Weights of variance gain / dim after the activation keep the signal's variance.
        """
        x = torch.linspace(-8, 8, 401, dtype=torch.double)
        density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
        with torch.no_grad():
            a = self.numerator.double().cpu().expand(self.groups, -1)
            y = _quotient(x[:, None], *_channels(a, self.denominator.double().cpu(), self.groups))
            return float(1 / (density @ y.square()).mean())

    def extra_repr(self) -> str:
        """Return what a print shows."""
        return f"{self.dim}, groups={self.groups}, backward={self.backward!r}"

    def _rows(self, x: Tensor) -> int:
        if self.block is not None:
            return self.block
        return max(1, (_BLOCK if x.device.type == "cpu" else 2 ** 24) // self.dim)


@method(
    "block",
    papers=["004-052"],
    place="feedforward",
    takes=("dim", "hidden"),
    search={"groups": [1, 4, 8]},
)
class RationalFeedForward(nn.Module):
    """The feed-forward block of the Kolmogorov-Arnold transformer: two rational layers.

    y = W_2 F_2(W_1 F_1(x) + b_1) + b_2;  F_1 begins as the identity, F_2 as swish.

    The weights' variances are gain(F) / fan-in, so that the signal keeps its variance through the
    first layer and the second.

    Args:
        dim: size of the last axis of x.
        hidden: units between the layers, 4 `dim` where none is given.
        groups: runs of channels with coefficients of their own.
        out: size of the last axis of y, `dim` where none is given.
        bias: whether the linear layers have one.
        dropout: how much is dropped after each activation in training.
        backward: as in `GroupRational`.

    Shapes: x (*, dim), y (*, out).

    Raises:
        ValueError: `groups` does not divide `dim` or `hidden`, or a size is below 1.

    Paper: Raffel, Chen, 2025, FlashKAT: Understanding and Addressing Performance Bottlenecks in
    the Kolmogorov-Arnold Transformer.

    >>> RationalFeedForward(16, 64)(torch.zeros(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, dim: int, hidden: int | None = None, *, groups: int = 8,
                 out: int | None = None, bias: bool = True, dropout: float = 0.0,
                 backward: Backward = "blocked") -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        out = dim if out is None else out
        checks.count(1, dim=dim, hidden=hidden, out=out)
        self.first = GroupRational(dim, groups, fit="identity", backward=backward)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.second = GroupRational(hidden, groups, fit="swish", backward=backward)
        self.down = nn.Linear(hidden, out, bias=bias)
        self.dropout = nn.Dropout(dropout)
        for activation, linear in ((self.first, self.up), (self.second, self.down)):
            nn.init.normal_(linear.weight,
                            std=math.sqrt(activation.gain() / linear.in_features))
            if bias:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*, out) of (*, dim)."""
        y: Tensor = self.up(self.dropout(self.first(x)))
        y = self.down(self.dropout(self.second(y)))
        return y


class _Blocked(torch.autograd.Function):
    """The quotient, with gradients that are added up by blocks of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.rows = rows
        flat, (a, b) = x.reshape(-1, x.shape[-1]), _channels(a, b, x.shape[-1])
        y = torch.empty_like(flat)
        for some, into in zip(flat.split(rows), y.split(rows), strict=True):
            into.copy_(_quotient(some.to(a.dtype), a, b))
        return y.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, a, b = ctx.saved_tensors
        (dim, groups), rows = (x.shape[-1], len(a)), ctx.rows
        flat, above = x.reshape(-1, dim), grads[0].reshape(-1, dim)
        wide_a, wide_b = _channels(a, b, dim)
        needs_x, needs_a, needs_b = ctx.needs_input_grad[:3]
        to_x, to_a, to_b = [], [], []
        # Every operation can be differentiated again: second derivatives come from autograd.
        for some, grad in zip(flat.split(rows), above.split(rows), strict=True):
            some, grad = some.to(a.dtype), grad.to(a.dtype)
            p, p_slope = _polynomial(some, wide_a)
            outer, outer_slope = _polynomial(some, wide_b)
            inner, inner_slope = some * outer, torch.addcmul(outer, some, outer_slope)
            sign = _sign(inner)
            q = 1 + inner * sign
            over_q = grad / q
            by_sign = over_q * sign * p / q
            if needs_x:
                to_x.append((over_q * p_slope - by_sign * inner_slope).to(x.dtype))
            if needs_a:
                to_a.append(_moments(some, over_q, a.shape[1], groups))
            if needs_b:
                to_b.append(_moments(some, -by_sign * some, b.shape[1], groups))
        return (torch.cat(to_x).view_as(x) if needs_x else None,
                torch.stack(to_a).sum(0) if needs_a else None,
                torch.stack(to_b).sum(0) if needs_b else None, None)


def _channels(a: Tensor, b: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the coefficients as (degree + 1, dim): one column for each channel."""
    each = dim // len(a)
    return a.T.repeat_interleave(each, 1), b.T.repeat_interleave(each, 1)


def _quotient(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    p, inner = a[-1], b[-1]
    for lower in a[:-1].flip(0):
        p = torch.addcmul(lower, p, x)
    for lower in b[:-1].flip(0):
        inner = torch.addcmul(lower, inner, x)
    inner = inner * x
    return p.expand_as(inner) / (1 + inner * _sign(inner))


def _polynomial(x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return c_0 + c_1 x + ... and its slope, by Horner's rule."""
    value, slope = c[-1].expand_as(x), torch.zeros_like(x)
    for i in range(len(c) - 2, -1, -1):
        slope = torch.addcmul(value, slope, x) if i < len(c) - 2 else value
        value = torch.addcmul(c[i], value, x)
    return value, slope


def _moments(x: Tensor, weights: Tensor, count: int, groups: int) -> Tensor:
    """Return sum weights x^i for i < `count`, for each group."""
    sums = []
    for i in range(count):
        weights = weights * x if i else weights
        sums.append(weights.sum(0))
    return torch.stack(sums).view(count, groups, -1).sum(2).T


def _sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


@lru_cache
def _fitted(name: str, degree: int, denominator: int) -> tuple[Tensor, Tensor]:
    """Return a and b of the quotient that is nearest to a function, by weighted least squares.

    f (1 + B) = P is linear in the coefficients; dividing by the last round's Q makes what is
    minimised the distance of the quotients. B has even powers alone, none of them negative, so
    that |B| = B.
    """
    x = torch.linspace(-_RANGE, _RANGE, 201, dtype=torch.double)
    y = _TARGETS[name](x)
    powers = x[:, None] ** torch.arange(degree + 1)
    even = torch.arange(2, denominator + 1, 2)
    b, q = torch.zeros(denominator, dtype=torch.double), torch.ones_like(x)
    a = torch.linalg.lstsq(powers, y).solution
    if float((powers @ a - y).abs().max()) < 1e-9:  # a polynomial needs no denominator
        return a.float(), b.float()
    for _ in range(12):
        columns = torch.cat([powers, -y[:, None] * x[:, None] ** even], 1) / q[:, None]
        found = torch.linalg.lstsq(columns, y / q).solution
        if (found[degree + 1:] < 0).any():
            even = even[found[degree + 1:] >= 0]
            continue
        a, b = found[:degree + 1], torch.zeros_like(b)
        b[even - 1] = found[degree + 1:]
        q = 1 + (x[:, None] ** torch.arange(1, denominator + 1)) @ b
    return a.float(), b.float()
