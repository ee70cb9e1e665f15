"""Families of functions on an edge: their values, and their slopes for the backward pass."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from netwright.runtime.modes import transformed

_CHUNK = 2 ** 16  # features at once on a processor, which stay in its cache


class Basis(NamedTuple):
    """Functions of one variable.

    `size(grid, order)` says how many; `values(z, grid, order)` maps z (rows, inputs), which is -1
    and 1 at the ends of the grid, to (rows, size, inputs), and `slopes(z, values, grid, order)`
    to their derivatives. Where `plain`, z is the input itself.
    """

    size: Callable[[int, int], int]
    values: Callable[[Tensor, int, int], Tensor]
    slopes: Callable[[Tensor, Tensor, int, int], Tensor]
    plain: bool = False


def _spline_terms(z: Tensor, grid: int, order: int) -> tuple[Tensor, float, list[
        tuple[float, float]]]:
    """Return the distances v to the splines' centres, their scale, and (share, reach) pairs.

    A spline is sum share (reach - |v|)_+^order: a uniform B-spline is symmetric, so that of the
    order + 2 truncated powers that make it only those that reach over its outer half are needed, 2
    of 5 for a cubic one. The scale makes the first share 1.
    """
    scale = math.factorial(order) ** (-1 / order)
    centers = torch.arange(grid + order, dtype=z.dtype, device=z.device) - (grid + order - 1) / 2
    v = scale * centers.unsqueeze(-1) - (scale * grid / 2 * z).unsqueeze(-2)
    return v, scale, [((-1) ** j * math.comb(order + 1, j), scale * ((order + 1) / 2 - j))
                      for j in range((order + 2) // 2)]


def _spline_values(z: Tensor, grid: int, order: int) -> Tensor:
    v, _, terms = _spline_terms(z, grid, order)
    return _powers(v.abs(), terms, order)


def _spline_slopes(z: Tensor, values: Tensor, grid: int, order: int) -> Tensor:
    v, scale, terms = _spline_terms(z, grid, order)
    slope = torch.full((), order * scale * grid / 2, dtype=v.dtype, device=v.device)
    towards = torch.copysign(slope, v)
    return towards * _powers(v.abs(), terms, order - 1)


def _powers(w: Tensor, terms: list[tuple[float, float]], exponent: int) -> Tensor:
    """Return sum share (reach - w)_+^exponent."""
    total = w
    for i, (share, reach) in enumerate(terms):
        left = (reach - w).relu().pow(exponent) if exponent else (w < reach).to(w.dtype)
        total = torch.add(total, left, alpha=share) if i else left
    return total


def _angles(z: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    # Without a factor pi, so that the grid is no period and f(-1) need not be f(1).
    k = torch.arange(1, grid + 1, dtype=z.dtype, device=z.device).unsqueeze(-1)
    return k * z.unsqueeze(-2), k


def _fourier_values(z: Tensor, grid: int, order: int) -> Tensor:
    angles = _angles(z, grid)[0]
    return torch.cat([angles.cos(), angles.sin()], -2)


def _fourier_slopes(z: Tensor, values: Tensor, grid: int, order: int) -> Tensor:
    k = _angles(z, grid)[1]
    cos, sin = values.chunk(2, -2)
    return torch.cat([-k * sin, k * cos], -2)


def _bumps(z: Tensor, grid: int) -> Tensor:
    """Return the distances from grid + 1 points, in steps of the grid."""
    points = torch.arange(grid + 1, dtype=z.dtype, device=z.device) - grid / 2
    return (grid / 2 * z).unsqueeze(-2) - points.unsqueeze(-1)


def _rbf_values(z: Tensor, grid: int, order: int) -> Tensor:
    return _bumps(z, grid).square().neg().exp()


def _rbf_slopes(z: Tensor, values: Tensor, grid: int, order: int) -> Tensor:
    return -grid * _bumps(z, grid) * values


def _wavelet_values(z: Tensor, grid: int, order: int) -> Tensor:
    square = _bumps(z, grid).square()
    return (1 - square) * (-0.5 * square).exp()


def _wavelet_slopes(z: Tensor, values: Tensor, grid: int, order: int) -> Tensor:
    v = _bumps(z, grid)
    square = v.square()
    return (grid / 2) * v * (square - 3) * (-0.5 * square).exp()


def _chebyshev_values(z: Tensor, grid: int, order: int) -> Tensor:
    y, found = z.tanh(), [torch.ones_like(z)]
    for k in range(1, grid + order):
        found.append(y if k == 1 else 2 * y * found[-1] - found[-2])
    return torch.stack(found, -2)


def _chebyshev_slopes(z: Tensor, values: Tensor, grid: int, order: int) -> Tensor:
    y = z.tanh()
    second = [torch.ones_like(z)]  # T_k' = k U_(k-1)
    found = [torch.zeros_like(z)]
    for k in range(1, grid + order):
        found.append(k * second[-1])
        second.append(2 * y if k == 1 else 2 * y * second[-1] - second[-2])
    return torch.stack(found, -2) * (1 - y * y).unsqueeze(-2)


def _silu_slopes(z: Tensor, values: Tensor, grid: int, order: int) -> Tensor:
    s = z.sigmoid()
    return (s * (1 + z * (1 - s))).unsqueeze(-2)


BASES = {
    "bspline": Basis(lambda grid, order: grid + order, _spline_values, _spline_slopes),
    "chebyshev": Basis(lambda grid, order: grid + order, _chebyshev_values, _chebyshev_slopes),
    "fourier": Basis(lambda grid, order: 2 * grid, _fourier_values, _fourier_slopes),
    "rbf": Basis(lambda grid, order: grid + 1, _rbf_values, _rbf_slopes),
    "silu": Basis(lambda grid, order: 1, lambda z, grid, order: silu(z).unsqueeze(-2),
                  _silu_slopes, plain=True),
    "wavelet": Basis(lambda grid, order: grid + 1, _wavelet_values, _wavelet_slopes),
}


def counts(bases: Sequence[str], grid: int, order: int) -> list[int]:
    """Return how many functions each basis has."""
    return [BASES[name].size(grid, order) for name in bases]


def features(x: Tensor, center: Tensor, half: Tensor, bases: Sequence[str], grid: int,
             order: int) -> Tensor:
    """Return every function of every input, (rows, functions, inputs), basis after basis.

    The grid of input i goes from center_i - half_i to center_i + half_i. Rows are read in chunks
    that stay in cache; of the slopes, only what a chunk needs exists at any time.
    """
    if transformed():
        wide = x.to(center.dtype)
        z = (wide - center) / half
        return torch.cat([BASES[name].values(wide if BASES[name].plain else z, grid, order)
                          for name in bases], 1).to(x.dtype)
    found: Tensor = _Features.apply(x, center, half, tuple(bases), grid, order)
    return found


class _Features(torch.autograd.Function):
    """The functions' values; the backward pass reads them again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, center: Tensor, half: Tensor, bases: tuple[str, ...],
                grid: int, order: int) -> Tensor:
        starts = _starts(bases, grid, order)
        out = x.new_empty(len(x), starts[-1], x.shape[1])
        rows = _rows(out)
        for some, into in zip(x.split(rows), out.split(rows), strict=True):
            some = some.to(center.dtype)
            z = (some - center) / half
            for name, (start, end) in zip(bases, pairwise(starts), strict=True):
                into[:, start:end] = BASES[name].values(some if BASES[name].plain else z, grid,
                                                        order)
        ctx.save_for_backward(x, center, half, out)
        ctx.given = bases, grid, order
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # Plain operations throughout: PyTorch differentiates them again where it is asked to.
        x, center, half, out = ctx.saved_tensors
        bases, grid, order = ctx.given
        starts, rows, parts = _starts(bases, grid, order), _rows(out), []
        for some, values, above in zip(x.split(rows), out.split(rows), grads[0].split(rows),
                                       strict=True):
            some, values = some.to(center.dtype), values.to(center.dtype)
            z, total = (some - center) / half, torch.zeros_like(some)
            for name, (start, end) in zip(bases, pairwise(starts), strict=True):
                basis = BASES[name]
                slopes = basis.slopes(some if basis.plain else z, values[:, start:end], grid, order)
                part = (above[:, start:end] * slopes).sum(1)
                total = total + (part if basis.plain else part / half)
            parts.append(total.to(x.dtype))
        return torch.cat(parts), None, None, None, None, None


def _starts(bases: Sequence[str], grid: int, order: int) -> list[int]:
    starts = [0]
    for count in counts(bases, grid, order):
        starts.append(starts[-1] + count)
    return starts


def _rows(features: Tensor) -> int:
    if features.device.type != "cpu":
        return max(1, len(features))
    return max(1, _CHUNK // max(1, features.shape[1] * features.shape[2]))
