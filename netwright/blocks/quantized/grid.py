import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from netwright import checks
from netwright.catalogue.facets import method
from netwright.errors import UnknownName

__all__ = ["Grid", "Quantized", "dequantize", "fake_quantize", "quantize"]

Per = Literal["tensor", "channel", "group"]
Fit = Literal["range", "error"]
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # two bits of exponent, one of fraction
FP3 = (0.0, 1.0, 2.0, 4.0)  # two bits of exponent
# Of the scale that a range asks for: what is tried where scales are to err least.
SHARES = (1.0, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.05, 1.1)
_NAMED = ("int1 to int8", "fp3", "fp4", "nf4")
_ASKED = re.compile(r"(?P<levels>[a-z]+\d)(?:/(?P<group>\d+|tensor))?(?P<asymmetric> asymmetric)?")


@method("companion", papers=["002-185"])
@dataclass(frozen=True, init=False)
class Grid:
    """The levels that weights are rounded to, and which of them share a scale.

    w ~ s F[c]: c is the code of the nearest level F[c], s = max|w| / max|F| of the weights that
    share a scale. Integer levels of b bits are -2^(b-1) to 2^(b-1) - 1, with
    s = 2 max|w| / (2^b - 1), so that no weight is further than s/2 from a level.

    Asymmetric, integers have w ~ s c + low, with low = min w and s = (max w - min w) / (2^b - 1);
    any other levels have a scale for each sign, max w / max F above zero and min w / min F below.

    With fit="error" a scale that is one for both signs is the one of some that errs least in
    Σ (w - s F[c])^2, smaller ones than the range's among them; integers may have a negative one, so
    that the largest weight can be at the lower end, which is a level longer.

    Where all that share a scale are zero, the scale is 1.

    Args:
        levels: "int2" to "int8", "fp4" (0, ±0.5, 1, 1.5, 2, 3, 4, 6), "fp3" (0, ±1, 2, 4), "nf4"
            (16 quantiles of a normal distribution), a number of bits, or levels of one's own.
        bits: the same as a number, of integers.
        group: so many neighbouring inputs of an output share a scale, None for all.
        per: "tensor" has one scale for all, "channel" one for each output, "group" is `group`.
        symmetric: False is the same as `asymmetric`.
        asymmetric: whether the two ends of a range have scales of their own.
        pad: whether a last group may be filled up with zeros.
        fit: "range", or "error" for scales that err least.

    Raises:
        ValueError: bits are not 1 to 8, levels of one's own are not 2 to 256 different finite
            numbers, or `group` and `per` say different things.
        UnknownName: no levels are called that.

    Paper: Zhang, Zhao, Cao, Zhang, Wang, Cao, Yang, Xu, 2024, AFPQ: Asymmetric Floating Point
    Quantization for LLMs. Dettmers, Pagnoni, Holtzman, Zettlemoyer, 2023, QLoRA: Efficient
    Finetuning of Quantized LLMs (nf4).

    >>> Grid("int4", group=32).bits, Grid("fp4").size, Grid("nf4").table[:2].tolist()
    (4, 15, [-1.0, -0.69619...])
    >>> print(Grid("int4", group=32), Grid.of("fp4/64 asymmetric") == Grid(
    ...     "fp4", group=64, asymmetric=True, pad=True, fit="error"))
    int4/32 True
    """

    levels: str | tuple[float, ...]
    group: int | None
    per: Per
    asymmetric: bool
    pad: bool
    fit: Fit
    numbers: tuple[float, ...] = field(repr=False, compare=False)

    def __init__(self, levels: str | int | Sequence[float] = "int8", *, bits: int | None = None,
                 group: int | None = None, per: Per | None = None, symmetric: bool = True,
                 asymmetric: bool = False, pad: bool = False, fit: Fit = "range") -> None:
        checks.count(1, group=group, optional=True)
        checks.one_of(("range", "error"), fit=fit)
        if per is not None:
            checks.one_of(("tensor", "channel", "group"), per=per)
        if (per == "group") != (group is not None) and per is not None:
            raise ValueError(f"per={per!r} and group={group} say different things; leave per out, "
                             "and give group the number of inputs that share a scale")
        said: dict[str, Any] = {"levels": _known(levels, bits), "group": group,
                "per": "group" if group else per or "channel",
                "asymmetric": asymmetric or not symmetric, "pad": pad, "fit": fit}
        said["numbers"] = _numbers(said["levels"])
        for name, value in said.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, asked: "Grid | str | int | Mapping[str, Any]") -> "Grid":
        """Return the grid that a short form stands for: "int4/32", "nf4", "int8/tensor", or bits.

        A grid is "levels", "levels/group" or "levels/tensor", with " asymmetric" behind where it
        is that; its last group is filled up, and its scales are those that err least. `as_plain`
        of a grid is another short form.

        >>> Grid.of("int4/32") == Grid("int4", group=32, pad=True, fit="error") == Grid.of(
        ...     Grid.of("int4/32").as_plain())
        True
        """
        if isinstance(asked, Grid):
            return asked
        if isinstance(asked, Mapping):
            return cls(**{**asked, "levels": asked.get("levels", "int8")})
        found = _ASKED.fullmatch(asked) if isinstance(asked, str) else None
        if found is None:
            return cls(cast(Any, asked), pad=True, fit="error")
        group = found["group"]
        return cls(found["levels"], group=int(group) if group and group != "tensor" else None,
                   per="tensor" if group == "tensor" else None,
                   asymmetric=bool(found["asymmetric"]), pad=True, fit="error")

    def as_plain(self) -> dict[str, Any]:
        """Return the grid as plain data, of which `Grid.of` makes it again."""
        levels = self.levels if isinstance(self.levels, str) else list(self.levels)
        return {"levels": levels, "group": self.group, "per": self.per,
                "asymmetric": self.asymmetric, "pad": self.pad, "fit": self.fit}

    def __str__(self) -> str:
        levels = self.levels if isinstance(self.levels, str) else f"{len(self.levels)} levels"
        shared = {"channel": "", "tensor": "/tensor", "group": f"/{self.group}"}[self.per]
        return f"{levels}{shared}{' asymmetric' * self.asymmetric}"

    @property
    def symmetric(self) -> bool:
        """Whether both signs share a scale."""
        return not self.asymmetric

    @property
    def is_integer(self) -> bool:
        """Whether levels are neighbouring whole numbers."""
        return isinstance(self.levels, str) and self.levels.startswith("int")

    @property
    def size(self) -> int:
        """How many levels there are."""
        return len(self.numbers)

    @property
    def bits(self) -> int:
        """How many bits a code has."""
        return max(1, math.ceil(math.log2(self.size)))

    @property
    def table(self) -> Tensor:
        """The levels F in order, in double precision."""
        return torch.tensor(self.numbers, dtype=torch.float64)

    def code_bits(self, columns: int) -> float:
        """Return how many bits a weight takes, its share of 16-bit scales among them.

        >>> Grid("int4", group=32).code_bits(64), Grid("int8").code_bits(256)
        (4.5, 8.0625)
        """
        shared = self.group or columns
        return self.bits + (0 if self.per == "tensor" else 16 * (1 + self.asymmetric) / shared)


@method("companion")
@dataclass(frozen=True)
class Quantized:
    """A tensor as codes of a grid: `codes` (rows, columns), `scale` and `second` (rows, groups).

    `second` is the lowest value of asymmetric integers, and the scale below zero of other
    asymmetric levels; `shape` is the tensor's own. Columns are inputs, and those that fill up the
    last group.
    """

    codes: Tensor
    scale: Tensor
    second: Tensor | None
    shape: torch.Size
    grid: Grid


@method("companion")
@torch.no_grad()
def quantize(weight: Tensor, grid: "Grid | str | int" = "int8", *,
             dtype: torch.dtype | None = None) -> Quantized:
    """Return the codes of the nearest levels, the scales in `dtype` or in the weight's own.

    Shapes: weight (outputs, *inputs); codes (outputs, inputs), uint8.

    Raises:
        ValueError: the weight is no floating-point matrix or tensor of more axes, is not finite,
            or has inputs that the grid's groups do not divide, and the grid does not pad.

    >>> found = quantize(torch.tensor([[0.0, 1.0, -1.5]]), Grid("int2"))
    >>> found.codes.tolist(), found.scale.tolist(), dequantize(found).tolist()
    ([[2, 3, 0]], [[1.0]], [[0.0, 1.0, -2.0]])
    """
    grid = Grid.of(grid)
    rows = grouped(weight, grid)
    scale, second = scales(rows, grid, dtype or weight.dtype)
    codes = nearest(rows, scale[..., None], None if second is None else second[..., None], grid)
    return Quantized(codes.flatten(1), scale, second, weight.shape, grid)


@method("companion")
@torch.no_grad()
def dequantize(quantized: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """Return the tensor that codes stand for, in the scales' dtype or another.

    >>> weight = torch.randn(4, 64)
    >>> near = dequantize(quantize(weight, Grid("int4", group=32)))
    >>> bool((near - weight).abs().max() <= weight.abs().max() / 15 + 1e-6)
    True
    """
    dtype = dtype or quantized.scale.dtype
    values = valued(quantized.codes, quantized.scale.to(dtype), None if quantized.second is None
                    else quantized.second.to(dtype), quantized.grid)
    count = quantized.shape[1:].numel()
    return values[:, :count].reshape(quantized.shape)


@method("companion")
def fake_quantize(weight: Tensor, grid: "Grid | str | int" = "int8") -> Tensor:
    """Return a weight rounded to a grid, through which gradients pass as if it were not.

    >>> weight = torch.randn(2, 8, requires_grad=True)
    >>> fake_quantize(weight, 4).sum().backward()
    >>> weight.grad.unique().tolist(), torch.equal(
    ...     fake_quantize(weight, 4), dequantize(quantize(weight, 4)))
    ([1.0], True)
    """
    return cast(Tensor, _StraightThrough.apply(weight, Grid.of(grid)))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, weight: Tensor, grid: Grid) -> Tensor:
        return dequantize(quantize(weight, grid))

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def grouped(weight: Tensor, grid: Grid) -> Tensor:
    """Return a weight as (outputs, groups, inputs of a group), checked and in full precision."""
    if weight.ndim < 2 or not weight.is_floating_point():
        raise ValueError("weight must be a floating-point matrix (outputs, inputs) or have more "
                         f"axes, got {tuple(weight.shape)} of {weight.dtype}")
    checks.finite(weight=weight)
    rows = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).flatten(1)
    group, width = grid.group or rows.shape[1], rows.shape[1]
    if width % group:
        if not grid.pad:
            raise ValueError(f"group must divide the {width} inputs, got {group}; try "
                             f"{math.gcd(group, width)}, or pad=True to fill the last group up")
        rows = torch.nn.functional.pad(rows, (0, -width % group))
    return rows.unflatten(1, (-1, group))


def scales(rows: Tensor, grid: Grid, dtype: torch.dtype,
           importance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the scales of rows (outputs, groups, inputs), and the second ones, in `dtype`.

    Where they are to err least, errors are weighed by `importance` (groups, inputs).
    """
    over = (0, 1, 2) if grid.per == "tensor" else (2,)
    if not rows.numel():
        one = rows.new_ones((1, 1) if grid.per == "tensor" else rows.shape[:2], dtype=dtype)
        return one, one.clone() if grid.asymmetric else None
    low, high = rows.amin(over, keepdim=True)[..., 0], rows.amax(over, keepdim=True)[..., 0]
    if grid.is_integer:
        if grid.asymmetric:
            return _usable((high - low) / (grid.size - 1), dtype), low.to(dtype)
        found = _usable(2 * torch.maximum(high, -low) / (grid.size - 1), dtype)
        # The lower end, one level longer, for the sign that goes further.
        lower = _usable(torch.where(high > -low, -high, -low) / (grid.size // 2), dtype)
        return _fitted(rows, [found, lower], grid, importance), None
    least, most = float(grid.table[0]), float(grid.table[-1])
    if grid.asymmetric:
        up = high.clamp_min(0) / most if most > 0 else torch.zeros_like(high)
        down = low.clamp_max(0) / least if least < 0 else torch.zeros_like(low)
        return _usable(up, dtype), _usable(down, dtype)
    found = _usable(torch.maximum(high, -low) / max(most, -least), dtype)
    return _fitted(rows, [found], grid, importance), None


def _usable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales that can be divided by."""
    least = torch.finfo(dtype).smallest_normal
    size = scale.abs().clamp(least, torch.finfo(dtype).max)
    return torch.where(scale == 0, 1.0, size.copysign(scale)).to(dtype)


def _fitted(rows: Tensor, starts: list[Tensor], grid: Grid, importance: Tensor | None) -> Tensor:
    """Return the first of `starts`, or of all and their shares what errs least.

    Eight bits err so little that looking for less is not worth its time.
    """
    best = starts[0]
    if grid.fit == "range" or grid.bits > 6:
        return best
    least = torch.full_like(best, float("inf"), dtype=rows.dtype)
    for start in starts:
        for share in SHARES:
            scale = _usable(start * share, best.dtype)
            codes = nearest(rows, scale[..., None], None, grid)
            values = valued(codes.flatten(1), scale.to(rows), None, grid).view_as(rows)
            error = (values - rows).square()
            error = (error if importance is None else error * importance).sum(2)
            error = error.sum((0, 1), keepdim=True) if grid.per == "tensor" else error
            best, least = torch.where(error < least, scale, best), error.minimum(least)
    return best


def nearest(values: Tensor, scale: Tensor, second: Tensor | None, grid: Grid) -> Tensor:
    """Return the codes of the levels that are nearest to values; scales broadcast against them."""
    scale = scale.to(values)
    if grid.is_integer:
        if second is not None:
            codes = ((values - second.to(values)) / scale).round_()
        else:
            codes = (values / scale).round_().add_(grid.size // 2)
        return codes.clamp_(0, grid.size - 1).to(torch.uint8)
    if second is not None:
        scale = torch.where(values > 0, scale, second.to(values))
    table = grid.table.to(values)
    return torch.bucketize(values / scale, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def valued(codes: Tensor, scale: Tensor, second: Tensor | None, grid: Grid) -> Tensor:
    """Return what codes (rows, columns) stand for, with scales (rows or 1, groups).

    Signed codes of eight bits are taken as they are.
    """
    groups = scale.shape[1]
    apart = codes.unflatten(1, (groups, -1)) if groups > 1 else codes[:, None]
    if grid.is_integer:
        values = apart.to(scale.dtype)
        if second is not None:
            return torch.addcmul(second[..., None], values, scale[..., None]).flatten(1)
        if codes.dtype == torch.uint8:
            values.sub_(grid.size // 2)
        return values.mul_(scale[..., None]).flatten(1)
    table = grid.table.to(scale)
    if second is None:
        return (table[apart.int()] * scale[..., None]).flatten(1)
    below = apart < int((grid.table < 0).sum())
    return (table[apart.int()] * torch.where(below, second[..., None], scale[..., None])).flatten(1)


def _known(levels: str | int | Sequence[float], bits: int | None) -> str | tuple[float, ...]:
    if bits is not None:
        checks.between(1, 8, whole=True, bits=bits)
        if levels not in ("int", "int8", f"int{bits}", bits):
            raise ValueError(f"bits={bits} and levels={levels!r} say different things; give one")
        return f"int{bits}"
    if isinstance(levels, str):
        if levels not in ("fp3", "fp4", "nf4") and not re.fullmatch("int[1-8]", levels):
            raise UnknownName("grid or kind of levels", levels, _NAMED)
        return levels
    if isinstance(levels, int) and not isinstance(levels, bool):
        checks.between(1, 8, whole=True, levels=levels,
                       advice='a grid of as many bits, such as "int8"')
        return f"int{levels}"
    own = tuple(sorted({float(level) for level in cast(Sequence[float], levels)}))
    if not 2 <= len(own) <= 256 or not all(map(math.isfinite, own)):
        raise ValueError(f"levels must be 2 to 256 different finite numbers, got {levels!r:.80}")
    return own


def _numbers(levels: str | tuple[float, ...]) -> tuple[float, ...]:
    """Return levels in order."""
    if isinstance(levels, tuple):
        return levels
    if levels == "nf4":
        return _normal_levels()
    if levels in ("fp4", "fp3"):
        above = FP4 if levels == "fp4" else FP3
        return tuple(sorted({-x for x in above} | set(above)))
    half = 2 ** int(levels[3]) // 2
    return tuple(float(level) for level in range(-half, half))


def _normal_levels() -> tuple[float, ...]:
    """Return quantiles of a normal distribution, seven below zero, zero, and eight above."""
    most = 1 - (1 / 30 + 1 / 32) / 2  # the paper's choice of the outermost one

    def quantiles(count: int) -> list[float]:
        shares = [most + (0.5 - most) * i / count for i in range(count)]
        return [NormalDist().inv_cdf(share) for share in shares]

    levels = sorted([-level for level in quantiles(7)] + [0.0] + quantiles(8))
    return tuple(level / levels[-1] for level in levels)
